"""Several processes train what one trains with the batch that they have together; requests reach them."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from tests.runs import settings, train
from trainer import config as configuration
from trainer import launch
from trainer.controls import Controls
from trainer.draws import Draws
from trainer.errors import ConfigError, TrainerError
from trainer.events import Event, EventLog, JobFailed, JobStopped, SampleReady, StepDone, read_journal
from trainer.job import Job
from trainer.runner import run

STEPS = 40


class Wider(Draws):
    """One process that takes, batch for batch, what two take by turns."""

    def batches(self, epoch: int, buckets: Sequence[Sequence[int]], batch_size: int) -> list[tuple[int, ...]]:
        narrow = super().batches(epoch, buckets, batch_size // 2)
        return [one + other for one, other in zip(narrow[::2], narrow[1::2], strict=True)]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("LORA_KILN_ENV", "current")
    pictures = tmp_path / "img" / "2_cat"
    pictures.mkdir(parents=True)
    noise = np.random.default_rng(0)
    for index in range(8):
        Image.fromarray(noise.integers(0, 255, (64, 64, 3), dtype=np.uint8)).save(pictures / f"{index}.png")
        (pictures / f"{index}.txt").write_text(f"cat {index}, red, blue", encoding="utf-8")
    return tmp_path


BUSY: dict[str, Any] = {
    "max_train_steps": STEPS,
    "noise_offset": 0.1,
    "ip_noise_gamma": 0.1,
    "shuffle_caption": True,
    "cache_latents": True,
    "sample_prompts": "cat --w 64 --h 64 --s 1 --d 1",
    "save_state": True,
}


# Adam divides a gradient by its own size, so where that is below its epsilon it makes steps of what is rounding: one
# process with another convolution kernel then ends 5e-2 from itself. Here a difference stays as small as it arose.
LINEAR: dict[str, Any] = {
    "optimizer": "SGDNesterov",
    "learning_rate": 0.2,
    "unet_lr": 0.2,
    "text_encoder_lr": 0.2,
}


def steps_of(events: Sequence[Event]) -> dict[int, StepDone]:
    return {event.step: event for event in events if isinstance(event, StepDone)}


def launched(folder: Path, **values: Any) -> tuple[Job, EventLog, Controls]:
    loaded = configuration.loads(settings(folder, num_processes=2, **BUSY, **values))
    return Job.from_config(loaded.config, base=folder), EventLog(), Controls()


def watch(events: EventLog, act: Any) -> threading.Thread:
    """Call ``act`` once a few steps are done."""

    def wait() -> None:
        end = time.monotonic() + 240
        while len(steps_of(events.since(0)[0])) < 3 and time.monotonic() < end:
            time.sleep(0.02)
        act()

    thread = threading.Thread(target=wait, daemon=True)
    thread.start()
    return thread


@pytest.mark.slow
def test_two_processes_are_one_with_twice_the_batch(folder: Path) -> None:
    job, events, controls = launched(folder, train_batch_size=2, **LINEAR)
    controls.save.set()
    controls.sample.set()
    stopper = watch(events, controls.stop.set)
    outcome = run(job, events, controls)
    stopper.join()
    said = events.since(0)[0]
    assert outcome.stopped
    assert outcome.state is not None
    assert 3 <= outcome.step < STEPS
    assert isinstance(said[-1], JobStopped)
    assert [event for event in said if isinstance(event, StepDone)] == [
        event for event in read_journal(job.journal) if isinstance(event, StepDone)
    ]
    assert (folder / "out" / "toy-step00000001.safetensors").exists()
    assert sum(isinstance(event, SampleReady) for event in said) == 1
    assert psutil.Process().children(recursive=True) == []

    # One process goes on from their state, and another one did it all from the start.
    wide = Wider(7)
    both = {**BUSY, **LINEAR, "train_batch_size": 4, "sample_prompts": ""}
    _, rest = train(folder, wide, resume=str(outcome.state), output_name="rest", **both)
    _, whole = train(folder, wide, output_name="whole", **both)
    parts, reference = steps_of(said) | steps_of(rest), steps_of(whole)
    assert list(parts) == list(reference) == list(range(1, STEPS + 1))
    for step, done in reference.items():
        assert parts[step].loss == pytest.approx(done.loss, rel=2e-4), step
        assert parts[step].avr_loss == pytest.approx(done.avr_loss, rel=2e-4), step
        assert parts[step].lr == done.lr
    mine = load_file(folder / "out" / "rest.safetensors")
    for name, tensor in load_file(folder / "out" / "whole.safetensors").items():
        torch.testing.assert_close(mine[name], tensor, rtol=2e-3, atol=5e-6)


@pytest.mark.slow
def test_a_child_that_dies_ends_the_run_and_leaves_nothing_behind(folder: Path) -> None:
    job, events, controls = launched(folder, train_batch_size=1)
    victims: list[psutil.Process] = []

    def kill_one() -> None:
        for process in psutil.Process().children(recursive=True):
            if "--asks" in process.cmdline() and process.environ().get("RANK") == "1":
                victims.append(process)
                process.kill()

    killer = watch(events, kill_one)
    with pytest.raises(TrainerError, match="a training process was killed"):
        run(job, events, controls)
    killer.join()
    assert len(victims) == 1
    assert psutil.Process().children(recursive=True) == []
    ends = [event for event in events.since(0)[0] if isinstance(event, JobFailed)]
    assert len(ends) == 1
    assert "processes.txt" in ends[0].message
    assert [event for event in read_journal(job.journal) if isinstance(event, JobFailed)] == ends


def asks(**values: Any) -> Job:
    given = {"output_dir": "out", "train_data_dir": "img", "pretrained_model_name_or_path": "m", **values}
    return Job.from_config(configuration.loads(given).config)


def test_one_process_needs_no_children() -> None:
    assert not launch.wants_children(asks())
    assert not launch.wants_children(asks(gpu_ids="0", num_processes=0, num_machines=0))
    assert launch.notes(asks(multi_gpu=True))
    assert launch.wants_children(asks(num_processes=2))


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"gpu_ids": "0;1"}, "gpu_ids"),
        ({"num_machines": 2, "num_processes": 3}, "multiple"),
        ({"extra_accelerate_launch_args": "other.py"}, "not taken"),
        ({"extra_accelerate_launch_args": "--config_file x.yaml"}, "not taken"),
        ({"extra_accelerate_launch_args": "--machine_rank --quiet"}, "needs a value"),
        ({"extra_accelerate_launch_args": "'"}, "split"),
    ],
)
def test_what_cannot_be_launched_is_said(values: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        launch.check(asks(**{"num_processes": 2, **values}))


def test_the_command_of_two_machines_with_cards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    more = "--machine_rank 1 --main_process_ip=10.0.0.1 --same_network"
    values = {"num_processes": 4, "num_machines": 2, "gpu_ids": "0, 3", "main_process_port": 29501}
    job = asks(**values, extra_accelerate_launch_args=more, mixed_precision="bf16")
    launch.check(job)
    words = launch.command(job, ["my.json"])
    assert words[1:3] == ["-m", "accelerate.commands.launch"]
    assert words[-3:] == ["--module", "trainer", "my.json"]
    from accelerate.commands.launch import launch_command_parser

    read = launch_command_parser().parse_args(words[3:])
    assert (read.num_processes, read.num_machines, read.multi_gpu) == (4, 2, True)
    assert (read.gpu_ids, read.main_process_port, read.machine_rank) == ("0,3", 29501, 1)
    assert (read.main_process_ip, read.same_network, read.mixed_precision) == ("10.0.0.1", True, "bf16")
    assert (read.training_script, read.training_script_args) == ("trainer", ["my.json"])
    with pytest.raises(ConfigError, match="main_process_ip"):
        launch.check(asks(**values))
    with pytest.raises(ConfigError, match="5 processes"):
        launch.check(asks(num_processes=5))
    with pytest.raises(ConfigError, match="names card 7"):
        launch.check(asks(num_processes=2, gpu_ids="0,7"))
