"""A grid is drawn by the trainer's sampler, goes on where it was cut off, and is the same picture as a sample."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tests import tiny, tiny_flux
from tests.runs import train
from trainer.errors import ConfigError, StopTraining
from trainer.events import Event, Progress, SampleReady
from trainer.review.grid import Grid, grid_lists, pictures_folder
from trainer.review.run_folder import RunFolder, open_run
from trainer.work import Done, Work

PROMPTS = "tok cat --w 64 --h 64 --s 2 --d 5 --n blurry\na dog --w 64 --h 64 --s 2 --d 6"


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A toy run with a preview at its last step; shared: copy it before changing it."""
    folder = tmp_path_factory.mktemp("trained")
    train(
        folder,
        sample_every_n_steps=4,
        save_every_n_steps=4,
        sample_prompts=PROMPTS,
        max_train_steps=8,
        unet_lr=0.02,
        text_encoder_lr=0.01,
        LoRA_type="Kohya LoCon",
        conv_dim=2,
    )
    return folder


def pixels(path: Path) -> np.ndarray:
    with Image.open(path) as picture:
        return np.asarray(picture.convert("RGB")).astype(np.int32)


def drawn(work: Work, events: list[Event] | None = None) -> Done:
    told = [] if events is None else events
    return work.run(told.append, lambda: False)


def grid_of(run: RunFolder, folder: Path, **values: object) -> Grid:
    assert run.config is not None
    options = {"prompts": PROMPTS, "strengths": "1", **values}
    return Grid.of(run, run.config, folder, run.checkpoints, **options)  # type: ignore[arg-type]


def test_a_grid_shows_what_the_samples_of_the_run_showed(trained: Path, tmp_path: Path) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(trained / "out", folder / "out")
    run = open_run(folder / "out")
    grid = grid_of(run, trained, strengths="1, 0", with_base=True)
    events: list[Event] = []
    done = drawn(grid, events)
    out = folder / "out" / "txt2img-images"
    assert done.path == out / f"grid_{grid.key}.png"
    # Three files (steps 4 and 8 and the final one), two strengths, two prompts, and the base model's column;
    # at strength 0 every file is the base model, drawn once.
    assert len(grid.cells) == (3 * 2 + 1) * 2
    told = [event for event in events if isinstance(event, SampleReady)]
    assert len(told) == len({cell.path for cell in grid.cells}) == 3 * 2 + 2
    progress = [event for event in events if isinstance(event, Progress)]
    assert progress[-1].done == progress[-1].total
    by_place = {(cell.step, cell.strength, cell.seed): cell.path for cell in grid.cells}
    for row in run.rows:
        assert row.seed is not None
        for step, picture in row.pictures.items():
            assert np.array_equal(pixels(picture.path), pixels(by_place[step, 1.0, row.seed]))
            assert not np.array_equal(pixels(picture.path), pixels(by_place[0, 0.0, row.seed]))
    with Image.open(by_place[8, 1.0, 5]) as cell:
        text = str(cell.info["parameters"])
    assert text.startswith(
        "tok cat\nNegative prompt: blurry\nSteps: 2, Sampler: euler_a, CFG scale: 7.5, Seed: 5"
    )
    assert "<lora:toy:1>" in text or "<lora:toy-step00000008:1>" in text
    with Image.open(done.path) as sheet:
        assert sheet.width > 7 * 64
        assert "toy.safetensors" in str(sheet.info["parameters"])
    (listed,) = grid_lists(out, "toy")
    assert (listed.sheet, len(listed.cells)) == (done.path, len(grid.cells))
    assert grid_lists(out, "another") == ()


@pytest.mark.parametrize("family", ["sdxl", "flux"])
def test_other_families_draw_grids_too(family: str, tmp_path: Path) -> None:
    options: dict[str, Any] = {
        "max_train_steps": 1,
        "sample_every_n_steps": 1,
        "sample_prompts": "tok cat --w 64 --h 64 --s 1 --d 5 --l 2 --n ugly",
        "unet_lr": 0.05,
        "skip_verdict": True,
    }
    if family == "flux":
        options = tiny_flux.settings(tmp_path, **options)
    else:
        model = tiny.sdxl_file(tmp_path / "xl.safetensors")
        options |= {"sdxl": True, "pretrained_model_name_or_path": str(model)}
    train(tmp_path, **options)
    run = open_run(tmp_path / "out")
    grid = grid_of(run, tmp_path, prompts="", strengths="1 0.5", with_base=True)
    drawn(grid)
    base, full, half = (pixels(cell.path) for cell in grid.cells)
    (sample,) = run.pictures
    assert np.array_equal(full, pixels(sample.path))
    assert not np.array_equal(full, base)
    assert not np.array_equal(half, base)


def test_a_grid_that_was_stopped_goes_on(trained: Path, tmp_path: Path) -> None:
    run = open_run(trained / "out")
    grid = replace(
        grid_of(run, trained, strengths="0.6"),
        folder=tmp_path,
        files=((trained / "out" / "toy.safetensors", 8),),
    )
    events: list[Event] = []

    def stopped() -> bool:
        return any(isinstance(event, SampleReady) for event in events)

    with pytest.raises(StopTraining):
        grid.run(events.append, stopped)
    first, second = (cell.path for cell in grid.cells)
    assert (first.exists(), second.exists()) == (True, False)
    before = first.stat().st_mtime_ns
    again: list[Event] = []
    # As it comes back from the list of runs.
    assert Grid.from_json(grid.as_json(), trained) == grid
    drawn(Grid.from_json(grid.as_json(), trained), again)
    assert first.stat().st_mtime_ns == before
    assert [event.path for event in again if isinstance(event, SampleReady)] == [second]
    # All are there: no model is loaded, and the sheet is the same.
    third: list[Event] = []
    assert drawn(grid, third).path == tmp_path / f"grid_{grid.key}.png"
    assert third == []


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"strengths": "strong"}, "LoRA strength is a number"),
        ({"strengths": "9"}, "from 0 to 2"),
        ({"seeds": "1.5"}, "seed is a whole number"),
        ({"prompts": "# nothing"}, "no prompt"),
        ({"seeds": " ".join(map(str, range(200))), "strengths": "1 0.5"}, "choose at most 600"),
    ],
)
def test_what_cannot_be_drawn_is_said(trained: Path, values: dict[str, str], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        grid_of(open_run(trained / "out"), trained, **values)


def test_the_folder_of_the_guide_is_used_where_it_is(tmp_path: Path) -> None:
    results = tmp_path / "results_current"
    assert pictures_folder(results) == results / "txt2img-images"
    (tmp_path / "txt2img-images").mkdir()
    assert pictures_folder(results) == tmp_path / "txt2img-images"
