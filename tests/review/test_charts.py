"""Charts: loss, validation and learning rates on one axis of steps, from whatever a run left."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch.utils.tensorboard import SummaryWriter

from trainer.events import EventLog, JobStarted, StepDone
from trainer.review.charts import charts
from trainer.review.measure import Measure, Measures, measures_file, write_measures
from trainer.review.run_folder import open_run


def lora(path: Path, step: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    entries = {"ss_output_name": "run", "ss_network_module": "networks.lora", "ss_steps": str(step)}
    save_file({"x.alpha": torch.ones(1)}, path, entries)


def axis(chart: str) -> str:
    found = re.search(r'data-first="\d+" data-last="\d+"', chart)
    assert found
    return found[0]


def places(chart: str, name: str) -> list[tuple[float, float]]:
    """Points of a line, in px."""
    found = re.search(rf'<path class="[^"]+" d="M([^"]+)"><title>{name}</title>', chart)
    assert found, name
    return [(float(x), float(y)) for x, y in (pair.split(",") for pair in found[1].split(" "))]


def test_validation_that_sdscripts_logged_is_shown(tmp_path: Path) -> None:
    """Tags of sd-scripts, train_network.py: those by epoch count epochs, and are left out."""
    lora(tmp_path / "run.safetensors", 40)
    with SummaryWriter(str(tmp_path / "log" / "20260101000000" / "network_train")) as writer:
        for step in range(1, 41):
            writer.add_scalar("loss/current", 1 / step, step)
            writer.add_scalar("lr/unet", 1e-4, step)
        for step in (20, 40):
            writer.add_scalar("loss/validation/step_average", 0.5 + step / 100, step)
        writer.add_scalar("loss/validation/epoch_average", 9.0, 1)
    found = dict(charts(open_run(tmp_path)))
    assert list(found) == ["Loss", "Validation loss", "Learning rate"]
    assert {axis(chart) for chart in found.values()} == {'data-first="1" data-last="40"'}
    line = places(found["Validation loss"], "loss/validation/step_average")
    every = places(found["Loss"], "each step")
    assert [x for x, _ in line] == [every[19][0], every[39][0]]
    assert "epoch_average" not in found["Validation loss"]


def test_losses_on_held_out_pictures_are_shown(tmp_path: Path) -> None:
    lora(tmp_path / "run.safetensors", 20)
    log = EventLog(tmp_path / "logs" / "run-20260101-000000" / "journal.jsonl")
    log.emit(JobStarted(name="run", output_dir=tmp_path, family="sd", first_step=0, steps=20, epochs=2))
    for step in range(1, 21):
        log.emit(StepDone(step=step, epoch=1, loss=0.5, avr_loss=0.5, lr={"unet": 1e-4}, step_s=0.1))
    log.close()
    run = open_run(tmp_path)
    base, first, last = (
        Measure(step=step, file="", norm=1, stable_rank=1, levels=(0.4, 0.8), own=own, held=held)
        for step, own, held in (
            (0, (0.4, 0.2), (0.4, 0.4)),
            (10, (0.2, 0.1), (0.4, 0.2)),
            (20, (0.1, 0.1), (0.6, 0.4)),
        )
    )
    write_measures(measures_file(run), Measures(base=base, points=(first, last)))
    found = dict(charts(run))
    # The base model stands at step 0, on every chart.
    assert {axis(chart) for chart in found.values()} == {'data-first="0" data-last="20"'}
    held = places(found["Validation loss"], "held-out pictures")
    trained = places(found["Validation loss"], "trained pictures")
    assert [x for x, _ in held] == [x for x, _ in trained] == pytest.approx([56, 403, 750])
    # Means of the levels, on an axis from 0 to the largest, 0.5.
    heights = [(166 - y) / 156 * 0.5 for _, y in held]
    assert heights == pytest.approx([0.4, 0.3, 0.5], abs=1e-3)
    # A run without such pictures has no such chart.
    bare = Measure(step=10, file="", norm=1, stable_rank=1, levels=(0.4,), own=(0.2,))
    write_measures(measures_file(run), Measures(base=bare, points=(bare,)))
    assert list(dict(charts(run))) == ["Loss", "Learning rate"]
