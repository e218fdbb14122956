"""Measuring while a run trains leaves what is trained as it is, and keeps within its share of the time."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from tests import runs
from trainer.events import LogLine
from trainer.review import watch
from trainer.review.measure import measures_file, read_measures
from trainer.review.run_folder import open_run
from trainer.review.verdict import judge

SETTINGS: dict[str, Any] = {
    "max_train_steps": 6,
    "save_every_n_steps": 2,
    "cache_latents": True,
    "network_dropout": 0.1,
}


def test_the_weights_are_the_same_with_and_without(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watch, "BUDGET", 1e9)  # so that every save is measured
    torch.manual_seed(1)
    outcome, events = runs.train(tmp_path / "with", **SETTINGS)
    torch.manual_seed(2)
    plain, _ = runs.train(tmp_path / "without", skip_verdict=True, **SETTINGS)
    assert outcome.path is not None
    assert plain.path is not None
    one, two = load_file(outcome.path), load_file(plain.path)
    assert one.keys() == two.keys()
    assert all(torch.equal(value, two[key]) for key, value in one.items())
    assert not [event for event in events if isinstance(event, LogLine) and "verdict" in event.message]
    found = read_measures(measures_file(open_run(tmp_path / "with" / "out")))
    assert found is not None
    assert [point.step for point in found.points] == [2, 4, 6]
    assert found.points[-1].file == "toy.safetensors"
    assert found.trigger == "tok"
    assert found.base is not None
    # The base is measured with the LoRA off, and the LoRA has changed something by its end.
    assert found.points[-1].own != found.base.own
    assert found.points[-1].norm > 0
    assert found.cost_share is not None
    assert not measures_file(open_run(tmp_path / "without" / "out")).exists()


def test_measuring_stops_where_its_share_of_the_time_is_used_up(tmp_path: Path) -> None:
    """A run whose steps take no time to speak of: only the last save, which is always measured, is."""
    folder = runs.pictures(tmp_path / "img") / "2_tok cat"
    for number in range(3, 19):
        Image.new("RGB", (64, 64), (number * 12, 90, 0)).save(folder / f"{number}.png")
    began = time.perf_counter()
    runs.train(tmp_path, hold_out=True, **SETTINGS)
    found = read_measures(measures_file(open_run(tmp_path / "out")))
    assert found is not None
    assert time.perf_counter() - began < 60
    assert [point.step for point in found.points][-1] == 6
    assert len(found.points) < 3
    # Two of the 19 pictures were held out, and are measured beside those that are trained.
    assert found.base is not None
    assert len(found.base.held) == len(found.points[-1].held) == len(found.base.levels)
    assert found.points[-1].held != found.points[-1].own
    assert next(signal for signal in judge(found).signals if signal.name == "held").says is None
