"""SIGKILL at any moment costs at most the steps since the last save, and resuming changes nothing."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.runs import settings, train, write_config
from trainer.events import CheckpointSaved, Event, PhaseStarted, SampleReady, StepDone, read_journal
from trainer.files import REPOSITORY

# Everything that draws random numbers is on; a state is saved every two steps.
BUSY: dict[str, Any] = {
    "network_dropout": 0.1,
    "rank_dropout": 0.1,
    "module_dropout": 0.1,
    "noise_offset": 0.1,
    "noise_offset_random_strength": True,
    "ip_noise_gamma": 0.1,
    "shuffle_caption": True,
    "caption_dropout_rate": 0.2,
    "flip_aug": True,
    "gradient_accumulation_steps": 2,
    "optimizer": "AdamW8bit",
    "save_state": True,
    "save_every_n_steps": 2,
    "sample_every_n_steps": 3,
    "sample_prompts": "tok cat --w 64 --h 64 --s 8",
    "max_train_steps": 9,
}


def events_of(folder: Path) -> list[Event]:
    return [event for journal in folder.glob("logs/*/journal.jsonl") for event in read_journal(journal)]


def kill_when(config: Path, out: Path, ripe: Callable[[list[Event]], bool]) -> None:
    """Start a run as a process of its own and kill it the moment ``ripe`` says so."""
    process = subprocess.Popen(
        [sys.executable, "-m", "trainer", str(config)],
        cwd=REPOSITORY,
        env={**os.environ, "LORA_KILN_ENV": "current"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
    )
    try:
        deadline = time.monotonic() + 300
        while not ripe(events_of(out)):
            if process.poll() is not None:
                _, stderr = process.communicate()
                pytest.fail(f"the run ended before it was killed: {stderr.decode()[-2000:]}")
            assert time.monotonic() < deadline
            time.sleep(0.002)
        process.kill()
    finally:
        process.kill()
        process.wait()
        if process.stderr is not None:
            process.stderr.close()


def elsewhere(folder: Path, out: Path) -> dict[str, Any]:
    """The model and pictures of the run in ``folder``, for a run that writes below ``out``."""
    return {
        "pretrained_model_name_or_path": str(folder / "model.safetensors"),
        "train_data_dir": str(folder / "img"),
        "output_dir": str(out / "out"),
    }


def last_state(events: list[Event]) -> Path:
    return [e.path for e in events if isinstance(e, CheckpointSaved) and e.kind == "state"][-1]


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, torch.Tensor]]:
    folder = tmp_path_factory.mktemp("unbroken")
    outcome, _ = train(folder, **BUSY)
    assert outcome.path is not None
    return folder, load_file(outcome.path)


def between_steps(events: list[Event]) -> bool:
    return any(isinstance(event, StepDone) and event.step == 5 for event in events)


def while_sampling(events: list[Event]) -> bool:
    steps = [event.step for event in events if isinstance(event, StepDone)]
    phases = [event.phase for event in events if isinstance(event, PhaseStarted)]
    drawn = [event for event in events if isinstance(event, SampleReady)]
    return bool(steps) and steps[-1] == 3 and phases[-1] == "sample" and not drawn


@pytest.mark.parametrize("ripe", [between_steps, while_sampling])
def test_a_killed_run_resumes_to_the_same_weights(
    unbroken: tuple[Path, dict[str, torch.Tensor]], tmp_path: Path, ripe: Callable[[list[Event]], bool]
) -> None:
    folder, expected = unbroken
    same = BUSY | elsewhere(folder, tmp_path)
    kill_when(write_config(tmp_path, **same), tmp_path / "out", ripe)
    state = last_state(events_of(tmp_path / "out"))
    outcome, events = train(tmp_path, **same | {"resume": str(state)})
    assert next(event.step for event in events if isinstance(event, StepDone)) == int(state.name[8:16]) + 1
    assert outcome.path is not None
    resumed = load_file(outcome.path)
    assert resumed.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(resumed[name], tensor), name


def test_a_kill_in_the_middle_of_a_save_leaves_whole_files_only(
    unbroken: tuple[Path, dict[str, torch.Tensor]], tmp_path: Path
) -> None:
    folder, expected = unbroken
    same = BUSY | elsewhere(folder, tmp_path) | {"save_every_n_steps": 1}
    out = tmp_path / "out"

    def saving(events: list[Event]) -> bool:
        states = [event for event in events if isinstance(event, CheckpointSaved) and event.kind == "state"]
        return len(states) >= 2 and any(out.glob(".*-state.*.tmp"))

    kill_when(write_config(tmp_path, **same), out, saving)
    for path in out.glob("*.safetensors"):
        assert load_file(path).keys() == expected.keys()
    state = last_state(events_of(out))
    outcome, _ = train(tmp_path, **same | {"resume": str(state)})
    assert not list(out.glob(".*.tmp")), "what the kill left behind is swept at the next start"
    assert outcome.path is not None
    resumed = load_file(outcome.path)
    assert all(torch.equal(resumed[name], tensor) for name, tensor in expected.items())


def test_settings_of_the_toy_run_are_what_kohya_would_save(tmp_path: Path) -> None:
    """The runs above go through the same loader as a person's file, without a complaint but gaps."""
    from trainer import config as configuration

    report = configuration.loads(settings(tmp_path, **BUSY)).report
    assert {finding.kind for finding in report} <= {"missing"}
