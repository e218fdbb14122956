"""The page checks settings and loads captioners on threads of their own: a run in the same process must not notice."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests import runs, tiny, tiny_flux
from tests.captioning import tiny as tiny_captioners
from trainer import config as configuration
from trainer import devices, estimate, optimizers, plugins
from trainer.captioning.captioners import CAPTIONERS
from trainer.draws import GENERATORS
from trainer.files import REPOSITORY
from trainer.job import Job

DROPOUTS = {"network_dropout": 0.2, "rank_dropout": 0.2, "module_dropout": 0.3}


def in_half_precision(folder: Path) -> Path:
    """A diffusers folder whose text encoders' configurations say float16, as those of published models do."""
    for file in folder.glob("text_encoder*/config.json"):
        values = json.loads(file.read_text(encoding="utf-8"))
        file.write_text(json.dumps(values | {"dtype": "float16"}), encoding="utf-8")
    return folder


def job(family: str, folder: Path, **values: Any) -> Job:
    if family == "flux":
        settings = tiny_flux.settings(folder, **values)
    else:
        make = {"sd": tiny.sd15_folder, "sdxl": tiny.sdxl_folder}[family]
        model = in_half_precision(make(folder / "model"))
        settings = runs.settings(
            folder, pretrained_model_name_or_path=str(model), sdxl=family == "sdxl", **values
        )
    return Job.from_config(configuration.loads(settings).config, base=folder)


def kept_to_itself(lock: Any) -> bool:
    """Whether no other thread could take ``lock`` now."""
    free: list[bool] = []

    def look() -> None:
        free.append(lock.acquire(blocking=False))
        if free[0]:
            lock.release()

    other = threading.Thread(target=look)
    other.start()
    other.join()
    return not free[0]


@pytest.fixture
def defaults(monkeypatch: pytest.MonkeyPatch) -> list[tuple[torch.dtype, bool]]:
    """Each dtype that was made PyTorch's default, and whether checks were kept out meanwhile."""
    found: list[tuple[torch.dtype, bool]] = []
    set_default_dtype = torch.set_default_dtype

    def noted(dtype: torch.dtype) -> None:
        found.append((dtype, kept_to_itself(devices.DEFAULT_DTYPE)))
        set_default_dtype(dtype)

    monkeypatch.setattr(torch, "set_default_dtype", noted)
    return found


@pytest.mark.parametrize("family", ["sd", "sdxl", "flux"])
def test_no_base_model_changes_the_default_dtype(
    family: str, tmp_path: Path, defaults: list[tuple[torch.dtype, bool]]
) -> None:
    run = job(family, tmp_path)
    defaults.clear()  # making the toy models may have
    estimate.forecast(run, kind="cpu")
    plugins.Folder("trainer.families").get(family).load(
        run, torch.device("cpu"), torch.float32, lambda _: None
    )
    assert defaults == []


@pytest.mark.parametrize("name", ["blip", "florence2"])
def test_a_captioner_in_half_precision_is_made_while_no_check_goes_on(
    name: str, tmp_path: Path, defaults: list[tuple[torch.dtype, bool]]
) -> None:
    folder = getattr(tiny_captioners, name)(tmp_path / name)
    defaults.clear()
    captioner = CAPTIONERS.get(name)
    captioner.load(folder, captioner.options_class(), torch.device("cpu"), torch.bfloat16, lambda _: None)
    assert torch.bfloat16 in [dtype for dtype, _ in defaults]
    assert all(alone for _, alone in defaults)
    assert torch.get_default_dtype() == torch.float32


@pytest.mark.parametrize("family", ["sd", "flux"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_no_check_touches_a_steps_generators(
    family: str, checkpointing: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {"train_lora_ggpo": True, "ggpo_sigma": 0.03, "ggpo_beta": 0.01} if family == "flux" else {}
    run = job(family, tmp_path, gradient_checkpointing=checkpointing, **DROPOUTS, **options)
    before = torch.get_rng_state()
    outside = []
    for name in ("set_rng_state", "manual_seed", "seed"):
        act = getattr(torch.random, name)

        def noted(*args: Any, act: Any = act) -> Any:
            outside.append(not kept_to_itself(GENERATORS))
            return act(*args)

        monkeypatch.setattr(torch.random, name, noted)
        monkeypatch.setattr(torch, name, noted)
    estimate.forecast(run, kind="cpu")
    assert optimizers.problems(run, torch.device("cpu")) == []
    assert outside
    assert not any(outside)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_run_is_the_same_while_settings_are_checked(tmp_path: Path) -> None:
    """Samples and weights, with a draw in every layer of every step."""
    values: dict[str, Any] = {
        **DROPOUTS,
        "gradient_checkpointing": True,
        "max_train_steps": 4,
        "sample_every_n_steps": 2,
        "sample_prompts": "a cat --w 64 --h 64 --s 2 --d 1",
        "additional_parameters": "--sample_at_first",
    }
    checked = job("sd", tmp_path, **values)
    for name in ("pretrained_model_name_or_path", "train_data_dir"):
        values[name] = getattr(checked.config, name)
    checks = []
    done = threading.Event()

    def check() -> None:
        while not done.is_set():
            estimate._MEMOS.clear()
            checks.append(estimate.forecast(checked, kind="cpu"))
            assert optimizers.problems(checked, torch.device("cpu")) == []

    def trained(name: str) -> tuple[dict[str, torch.Tensor], list[bytes]]:
        (tmp_path / name).mkdir()
        runs.train(tmp_path / name, **values)
        samples = sorted((tmp_path / name / "out" / "sample").glob("*.png"))
        return load_file(tmp_path / name / "out" / "toy.safetensors"), [file.read_bytes() for file in samples]

    weights, samples = trained("alone")
    beside = threading.Thread(target=check)
    beside.start()
    try:
        weights_beside, samples_beside = trained("beside")
    finally:
        done.set()
        beside.join()
    assert checks
    assert len(samples) == 3
    assert samples == samples_beside
    assert all(torch.equal(weights[key], weights_beside[key]) for key in weights)


AT_ONCE = """
import sys, threading
from pathlib import Path
from trainer import config, estimate
from trainer.events import EventLog
from trainer.files import REPOSITORY
from trainer.job import Job
from trainer.runner import run

file = Path(sys.argv[1])
job = Job.from_config(config.load(file).config, base=file.parent)
start = threading.Thread(target=lambda: print(run(job, EventLog()).step), daemon=True)
start.start()
estimate.forecast(job, kind="cpu")
start.join()
"""


def test_the_first_check_and_the_first_start_may_come_at_once(tmp_path: Path) -> None:
    """Each needs the libraries, which neither has imported yet."""
    file = runs.write_config(tmp_path, max_train_steps=1)
    found = subprocess.run(
        [sys.executable, "-c", AT_ONCE, str(file)],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        check=False,
    )
    assert found.returncode == 0, found.stderr
    assert found.stdout.split() == ["1"], found.stderr


def test_one_module_imports_the_libraries() -> None:
    """Where another does so by itself, two threads can be given half a library."""
    wanted = re.compile(r"^\s*(?:import|from) (?:diffusers|transformers)\b", re.MULTILINE)
    found = [
        file.relative_to(REPOSITORY).as_posix()
        for part in ("app", "trainer")
        for file in sorted((REPOSITORY / part).rglob("*.py"))
        if wanted.search(file.read_text(encoding="utf-8"))
    ]
    assert found == ["trainer/libraries.py"]
