"""A results folder is understood with its journal and without it, as Kohya leaves it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from tests.runs import train
from trainer.errors import ConfigError
from trainer.events import StepDone
from trainer.review.charts import charts
from trainer.review.keep import continue_config, keep
from trainer.review.run_folder import open_run, read_header

PROMPTS = "tok cat --w 64 --h 64 --s 2 --d 5\na <b>dog</b> --w 64 --h 64 --s 2 --d 6"


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[StepDone]]:
    """A toy run of 8 steps in 2 epochs with samples of each epoch; shared: do not change it."""
    folder = tmp_path_factory.mktemp("trained")
    _, events = train(
        folder,
        save_every_n_epochs=1,
        sample_every_n_epochs=1,
        sample_prompts=PROMPTS,
        save_state_on_train_end=True,
        additional_parameters="--sample_at_first",
        logging_dir=str(folder / "tensorboard"),
    )
    return folder, [event for event in events if isinstance(event, StepDone)]


def foreign(trained: Path, folder: Path) -> Path:
    """The same results without a journal, and pictures without text: what Kohya's engine leaves."""
    out = shutil.copytree(trained / "out", folder / "out")
    shutil.rmtree(out / "logs")
    for path in (out / "sample").glob("*.png"):
        with Image.open(path) as picture:
            pixels = picture.convert("RGB").copy()
        pixels.save(path)
    return out


def test_a_run_of_ours_is_told_by_its_journal(trained: tuple[Path, list[StepDone]]) -> None:
    folder, steps = trained
    run = open_run(folder / "out")
    assert (run.name, run.names, run.end, run.last_step, run.planned_steps) == (
        "toy",
        ("toy",),
        "finished",
        8,
        8,
    )
    assert run.steps == (0, 4, 8)
    assert [(row.prompt, row.seed, list(row.pictures)) for row in run.rows] == [
        ("tok cat", 5, [0, 4, 8]),
        ("a <b>dog</b>", 6, [0, 4, 8]),
    ]
    assert [(each.path.name, each.step, each.epoch) for each in run.checkpoints] == [
        ("toy-000001.safetensors", 4, 1),
        ("toy.safetensors", 8, 2),
    ]
    assert [point.loss for point in run.points] == [event.loss for event in steps]
    assert run.points[2].lr == steps[2].lr
    assert [(state.path.name, state.step) for state in run.states] == [("toy-state", 8)]
    assert run.config is not None
    assert run.config.network_dim == 4
    near = {step: run.nearest(step) for step in (0, 5, 6, 7)}
    assert {step: each.step for step, each in near.items() if each} == {0: 4, 5: 4, 6: 4, 7: 8}


def test_a_folder_of_kohya_is_told_by_names_and_metadata(
    trained: tuple[Path, list[StepDone]], tmp_path: Path
) -> None:
    out = foreign(trained[0], tmp_path)
    run = open_run(out)
    known = open_run(trained[0] / "out")
    assert run.journal is None
    # Epochs in the names of the pictures become steps by the files that name both.
    assert run.steps == (0, 4, 8)
    assert [(row.prompt, row.seed) for row in run.rows] == [("tok cat", 5), ("a <b>dog</b>", 6)]
    assert [(each.path.name, each.step) for each in run.checkpoints] == [
        (each.path.name, each.step) for each in known.checkpoints
    ]
    # Loss and rates come from TensorBoard's log, which the JSON names.
    assert [point.step for point in run.points] == list(range(1, 9))
    assert [point.loss for point in run.points] == pytest.approx(
        [point.loss for point in known.points], rel=1e-5
    )
    assert run.points[0].lr == pytest.approx(known.points[0].lr)
    assert open_run(out, may_read=lambda path: False).points == ()
    # Opened by any of its files.
    for file in ("toy-000001.safetensors", "sample", next(out.glob("toy_*.json")).name):
        assert open_run(out / file).name == "toy"


def test_steps_of_an_epoch_come_from_the_batches_where_no_file_is_named_by_epoch(
    trained: tuple[Path, list[StepDone]], tmp_path: Path
) -> None:
    out = foreign(trained[0], tmp_path)
    (out / "toy-000001.safetensors").unlink()
    # 4 pictures x 2 repeats in batches of 2: 4 steps an epoch (ss_num_batches_per_epoch).
    assert read_header(out / "toy.safetensors")["ss_num_batches_per_epoch"] == "4"
    assert open_run(out).steps == (0, 4, 8)
    (out / "toy.safetensors").unlink()
    assert open_run(out).steps == (0,)


def test_other_runs_in_the_folder_stay_apart(tmp_path: Path) -> None:
    weights = {"lora_unet_x.alpha": torch.ones(1)}
    for name, entries in (
        (
            "one-step00000100",
            {"ss_output_name": "one", "ss_steps": "100", "ss_network_module": "networks.lora"},
        ),
        ("two-000003", {"ss_output_name": "two", "ss_steps": "90", "ss_network_module": "networks.lora"}),
        ("renamed", {"ss_output_name": "one", "ss_steps": "70", "ss_network_module": "networks.lora"}),
        ("bare-000002", {}),
        ("model", {}),
    ):
        save_file(weights, tmp_path / f"{name}.safetensors", entries)
    (tmp_path / "sample").mkdir()
    for name in (
        "one_000100_00_20260101000000_3.png",
        "one_000100_00_20260101000500_3.png",
        "one_e000001_00_20260101000000.png",
        "two_000090_00_20260101000000.png",
        "note.png",
    ):
        Image.new("RGB", (8, 8)).save(tmp_path / "sample" / name)
    run = open_run(tmp_path, "one")
    assert set(run.names) == {"one", "two", "bare"}
    assert [(each.path.stem, each.step) for each in run.checkpoints] == [
        ("renamed", 70),
        ("one-step00000100", 100),
    ]
    # Drawn twice at a step: the newer picture; at an epoch of unknown length: none.
    assert [(each.step, each.path.name[22:28], each.seed) for each in run.pictures] == [(100, "000500", 3)]
    assert open_run(tmp_path, "bare").checkpoints[0].epoch == 2
    with pytest.raises(ConfigError, match="no run called three: there are"):
        open_run(tmp_path, "three")


def test_what_is_no_results_folder_is_said(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="holds no run"):
        open_run(tmp_path)
    with pytest.raises(ConfigError, match="there is no folder"):
        open_run(tmp_path / "none")
    (tmp_path / "broken-000001.safetensors").write_bytes(b"no tensors")
    (tmp_path / "broken_20260101-000000.json").write_text("{")
    run = open_run(tmp_path)
    assert (run.name, run.config, len(run.checkpoints)) == ("broken", None, 1)


def test_a_continued_run_counts_on(trained: tuple[Path, list[StepDone]], tmp_path: Path) -> None:
    source = shutil.copytree(trained[0] / "out", tmp_path / "out")
    run = open_run(source)
    config = continue_config(run, run.checkpoint("toy-000001.safetensors"), 2)
    assert (config.output_name, config.origin_step, config.origin_epoch) == ("toy-2", 4, 1)
    assert (config.epoch, config.max_train_steps, config.max_train_epochs) == (2, 0, 0)
    values = {**json.loads(config.model_dump_json()), "train_data_dir": str(trained[0] / "img")}
    values["pretrained_model_name_or_path"] = str(trained[0] / "model.safetensors")
    values["save_every_n_steps"] = 3
    outcome, events = train(tmp_path, **values)
    assert outcome.step == 12
    assert [event.step for event in events if isinstance(event, StepDone)] == list(range(5, 13))
    names = {path.name for path in source.glob("toy-2*.safetensors")}
    # Epoch 2 is this run's first; saves after 3 and 6 of its own steps, counted on from 4.
    assert names == {
        "toy-2-000002.safetensors",
        "toy-2-step00000007.safetensors",
        "toy-2-step00000010.safetensors",
        "toy-2.safetensors",
    }
    last = read_header(source / "toy-2.safetensors")
    assert (last["ss_steps"], last["ss_epoch"]) == ("12", "3")
    went_on = open_run(source, "toy-2")
    assert went_on.steps == (4, 8, 12)
    assert went_on.planned_steps == 12
    assert [point.step for point in went_on.points] == list(range(5, 13))
    # The chart begins where the first run began, also where the file has another name by now.
    kept = keep(run, run.checkpoint("toy-000001.safetensors"), "chosen")
    renamed = json.loads((config_file := went_on.config_file or source).read_text(encoding="utf-8"))
    config_file.write_text(json.dumps(renamed | {"network_weights": str(kept.path)}), encoding="utf-8")
    for each in (went_on, open_run(source, "toy-2")):
        assert each.earlier == run.points[:4]
        loss = charts(each)[0][1]
        assert 'data-first="1" data-last="12"' in loss
        assert "goes on from step 4" in loss
    # Without the journal it is the same.
    shutil.rmtree(source / "logs")
    assert open_run(source, "toy-2").steps == (4, 8, 12)
