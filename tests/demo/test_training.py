"""presets/demo.json, trained by the engine, teaches the base model the subject; three times the steps burns it."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.demo import figures
from trainer import config as configuration
from trainer import runner
from trainer.events import EventLog
from trainer.files import REPOSITORY
from trainer.job import Job

PRESET = REPOSITORY / "presets" / "demo.json"


def train(out: Path, times: int = 1) -> Path:
    """Trains the preset, without previews, for `times` its steps; gives the LoRA."""
    values = json.loads(PRESET.read_text(encoding="utf-8"))
    values |= {
        "output_dir": str(out),
        "logging_dir": "",
        "max_train_steps": times * values["max_train_steps"],
        "save_every_n_epochs": 0,
        "sample_every_n_steps": 0,
        "sample_prompts": "",
    }
    config = configuration.loads(json.dumps(values)).config
    runner.run(Job.from_config(config, base=REPOSITORY), EventLog())
    return out / f"{values['output_name']}.safetensors"


def rates(lora: Path) -> figures.Rates:
    """Of 32 samples with the LoRA on; the pictures are left beside it."""
    measured, pictures = figures.subject_rates(figures.load_pipeline(lora=lora), 32)
    figures.contact_sheet(pictures).save(lora.with_suffix(".png"))
    print(lora.stem, measured)
    return measured


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Any:
    torch.set_num_threads(1)
    return rates(train(tmp_path_factory.mktemp("demo")))


@pytest.mark.slow
def test_shows_the_subject_and_still_follows_the_prompt(trained: figures.Rates) -> None:
    assert trained.subject >= 0.8
    assert trained.background >= 0.8


@pytest.mark.long
def test_three_times_the_steps_burns_it(trained: figures.Rates, tmp_path: Path) -> None:
    """It shows the subject whatever is asked for, and more of the faces come apart."""
    burnt = rates(train(tmp_path, times=3))
    assert burnt.subject >= 0.8
    assert burnt.background <= trained.background - 0.5
    assert burnt.clothes <= trained.clothes - 0.5
    assert burnt.intact <= trained.intact - 0.2
