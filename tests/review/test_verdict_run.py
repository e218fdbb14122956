"""Measuring a finished run: its files one after the other, what is known already, what cannot be measured."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from tests import runs
from trainer.cli import main
from trainer.errors import ConfigError, StopTraining
from trainer.events import Event, LogLine
from trainer.review.measure import Measures, measure_run, measures_file, read_measures
from trainer.review.run_folder import RunFolder, open_run
from trainer.review.verdict import judge

Trained = tuple[Path, RunFolder]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    folder = tmp_path_factory.mktemp("run")
    runs.train(folder, max_train_steps=4, save_every_n_steps=2, skip_verdict=True)
    runs.pictures(folder / "held", name="tok dog")
    return folder, open_run(folder / "out")


def measured(trained: Trained, said: list[Event] | None = None, **options: object) -> Measures:
    folder, run = trained
    assert run.config is not None
    emit = (said if said is not None else []).append
    return measure_run(run, run.config, folder, emit=emit, pictures=2, draw=False, **options)  # type: ignore[arg-type]


def test_every_file_is_measured_against_the_base(trained: Trained) -> None:
    found = measured(trained, strengths=(0.5,), held=str(trained[0] / "held"))
    # The save at the last step and the final file are the same, and measured once.
    assert [point.step for point in found.points] == [2, 4, 4]
    assert found.points[-1].file == "toy.safetensors"
    assert found.points[-1].own == found.points[-2].own
    assert found.base is not None
    assert len(found.base.own) == len(found.base.held) == len(found.base.levels) == 4
    assert found.base.moved == (0, 0, 0, 0)
    first, _, last = found.points
    assert 0 < first.norm < last.norm
    assert last.own != found.base.own
    assert max(last.moved) > max(first.moved) > 0
    assert found.trigger == "tok"
    assert found.training["saturation"] > 0
    # At half the strength the losses lie elsewhere than at full strength and than the base's.
    assert last.strengths["0.5"] not in (last.own, found.base.own)
    assert judge(found).sentence
    # Nothing is measured twice.
    again = measured(trained, known=found, held=str(trained[0] / "held"))
    assert again.points == found.points
    # What was measured during training is not mixed with it.
    assert found.base is not None
    coarse = replace(found, base=replace(found.base, levels=(0.4, 0.8)), cost_share=0.01)
    assert measured(trained, known=coarse).cost_share == 0.01


def test_what_is_drawn_is_shown_to_the_base_model(trained: Trained, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trainer.review.measure.DRAWN_STEPS", 2)
    monkeypatch.setattr("trainer.review.measure.DRAWN_CAPTIONS", 3)
    folder, run = trained
    assert run.config is not None
    drawn: dict[str, int] = {}
    found = measure_run(
        run,
        run.config,
        folder,
        emit=lambda event: None,
        pictures=2,
        drawn=lambda name, made: drawn.update({name: len(made)}),
    )
    # The first caption is drawn by two seeds.
    assert drawn == {"": 4, run.checkpoints[0].path.name: 4, run.checkpoints[1].path.name: 4}
    assert found.base is not None
    # The base model draws its own captions, and is asked about these.
    assert found.base.drawn == found.base.drawn_own
    for mine, other in zip(found.base.drawn, found.base.drawn_other, strict=True):
        assert mine != other
    for point, plain in zip(found.points, measured(trained).points, strict=True):
        assert len(point.drawn) == len(point.drawn_own) == 4
        assert point.drawn != point.drawn_own
        # The LoRA was off for a moment only.
        assert (point.own, point.moved) == (plain.own, plain.moved)
    assert found.points[0].drawn != found.points[-1].drawn
    # Nothing is drawn twice.
    again = measure_run(run, run.config, folder, emit=lambda event: None, pictures=2, known=found)
    assert (again.base, again.points) == (found.base, found.points)
    # What was measured in another way is not taken for it.
    coarse = replace(found, base=replace(found.base, levels=(0.4, 0.8), drawn=(9.0, 9.0)))
    anew = measure_run(run, run.config, folder, emit=lambda event: None, pictures=2, known=coarse)
    assert anew.base == found.base


def test_without_pictures_only_files_are_measured(trained: Trained) -> None:
    folder, run = trained
    assert run.config is not None
    said: list[Event] = []
    config = run.config.model_copy(update={"train_data_dir": str(folder / "gone")})
    found = measure_run(run, config, folder, emit=said.append)
    assert found.base is None
    assert [point.step for point in found.points] == [2, 4, 4]
    assert found.points[0].norm > 0
    assert any(isinstance(event, LogLine) and "losses cannot be measured" in event.message for event in said)
    with pytest.raises(ConfigError, match="nothing to judge"):
        judge(found)


def test_a_stop_ends_it(trained: Trained) -> None:
    with pytest.raises(StopTraining):
        measured(trained, stopped=lambda: True)


def test_a_file_of_another_program_is_measured_too(trained: Trained, tmp_path: Path) -> None:
    """A results folder without a journal, with a JSON and files alone, as sd-scripts leaves it."""
    folder, run = trained
    for path in (*(each.path for each in run.checkpoints), run.config_file):
        assert path is not None
        (tmp_path / path.name).write_bytes(path.read_bytes())
    other = open_run(tmp_path)
    assert other.journal is None
    assert other.config_file is not None
    assert json.loads(other.config_file.read_text(encoding="utf-8"))["output_name"] == "toy"
    assert other.config is not None
    found = measure_run(other, other.config, folder, emit=lambda event: None, pictures=1, draw=False)
    assert [point.step for point in found.points] == [2, 4, 4]
    assert found.base is not None


def test_a_folder_without_a_json_is_judged_in_the_shell(
    trained: Trained, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Model and pictures are named, since a LoRA's metadata holds no paths."""
    monkeypatch.setattr("trainer.review.measure.DRAWN_STEPS", 2)
    folder, run = trained
    last = run.checkpoints[-1].path
    (tmp_path / last.name).write_bytes(last.read_bytes())
    assert open_run(tmp_path).config is None
    named = ["--model", str(folder / "model.safetensors"), "--pictures", str(folder / "img")]
    assert main(["verdict", str(tmp_path), *named]) == 0
    said = capsys.readouterr().out
    assert "toy.safetensors" in said
    for told in (
        "Learnt from the training pictures",
        "Contrast against the training pictures",
        "Weights, block by block",
    ):
        assert told in said
    measures = read_measures(measures_file(open_run(tmp_path)))
    assert measures is not None
    assert measures.base is not None
    assert measures.base.pictures["contrast"] > 0
