"""Review on the server's side: what a page may open, and what its buttons do."""

from __future__ import annotations

import json
import math
import re
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from app.fields import Form
from app.paths import Paths
from app.run_html import BY_LOSSES, BY_PICTURES, MEASURED, Seen, Thumbnails, run_html, verdict_html
from app.session import Session
from app.tabs.review import answer, past_html
from trainer import config as configuration
from trainer.config import KohyaConfig
from trainer.errors import ConfigError
from trainer.events import EventLog, JobStarted, StepDone
from trainer.review.run_folder import open_run
from trainer.review.verdict import Signal, Verdict

EVIL = '<img src=x onerror="alert(1)">'


class Shown(Form):
    """The form without its widgets: values by name."""

    def __init__(self) -> None:
        self.widgets = {name: name for name in ("network_weights", "epoch", "output_name", "unet_lr")}


def results(folder: Path, name: str = "run") -> Path:
    """A results folder with a journal, two files and pictures; its texts are HTML."""
    (folder / "sample").mkdir(parents=True)
    log = EventLog(folder / "logs" / f"{name}-20260101-000000" / "journal.jsonl")
    log.emit(JobStarted(name=name, output_dir=folder, family="sd", first_step=0, steps=20, epochs=2))
    for step in range(1, 21):
        log.emit(StepDone(step=step, epoch=1, loss=1 / step, avr_loss=1 / step, lr={EVIL: 1e-4}, step_s=0.1))
    log.close()
    for step, stem in ((10, f"{name}-000001"), (20, name)):
        entries = {"ss_output_name": name, "ss_network_module": "networks.lora", "ss_steps": str(step)}
        save_file({"x.alpha": torch.ones(1)}, folder / f"{stem}.safetensors", entries)
        picture = folder / "sample" / f"{name}_{step:06d}_00_20260102000000_7.png"
        Image.new("RGB", (300, 200)).save(picture)
    config = KohyaConfig(
        output_name=name,
        output_dir=str(folder),
        sample_prompts=f"a cat {EVIL} --d 7",
        unet_lr=4e-4,
        pretrained_model_name_or_path=str(folder / "model.safetensors"),
        train_data_dir=str(folder),
    )
    configuration.save(config, folder / f"{name}_20260101-000000.json")
    return folder


@pytest.fixture
def session(tmp_path: Path) -> Session:
    """A server for many people, whose only root is ``mine``."""
    roots = {"mine": tmp_path / "mine"}
    (tmp_path / "mine").mkdir()
    paths = Paths(roots, confined=True)
    return Session(paths=paths, state=tmp_path / "state", config=KohyaConfig(), base=tmp_path, admin="ann")


def ask(session: Session, user: str = "ann", **data: Any) -> dict[str, Any]:
    return answer(session, Shown(), data, user)


def test_a_run_is_shown_with_everything_escaped_and_its_pictures_served(
    session: Session, tmp_path: Path
) -> None:
    folder = results(tmp_path / "mine" / "out")
    picture = next((folder / "sample").iterdir())
    assert not session.may_serve(str(picture))
    shown = ask(session, do="open", path="mine/out")
    assert (shown["name"], shown["path"]) == ("run", str(folder))
    text = shown["html"]
    assert "<img src=x" not in text
    assert "&lt;img src=x" in text
    assert text.count("data-pick=") == 2
    assert text.count("<svg") >= 4
    assert session.may_serve(str(picture))
    assert not session.may_serve(str(folder / "run.safetensors"))
    # Nothing new: nothing is sent. A picture more: all is.
    assert ask(session, do="look", path=str(folder), name="run", signature=shown["signature"]) == {}
    time.sleep(0.02)
    Image.new("RGB", (8, 8)).save(folder / "sample" / "run_000015_00_20260102000000_7.png")
    assert "Step 15" in ask(session, do="look", path=str(folder), signature=shown["signature"])["html"]


@pytest.mark.parametrize("path", ["", "/etc", "../other", "mine/../../other", "other"])
def test_nothing_outside_the_roots_is_opened(session: Session, tmp_path: Path, path: str) -> None:
    results(tmp_path / "other")
    with pytest.raises(ConfigError):
        ask(session, do="open", path=path)
    with pytest.raises(ConfigError):
        ask(session, do="open", path=str(tmp_path / "other"))


def test_links_out_of_the_roots_are_not_followed(session: Session, tmp_path: Path) -> None:
    folder, other = results(tmp_path / "mine" / "out"), results(tmp_path / "other")
    for path in (folder / "sample").iterdir():
        path.unlink()
    (folder / "sample").rmdir()
    (folder / "sample").symlink_to(other / "sample", target_is_directory=True)
    with pytest.raises(ConfigError, match="outside the folders"):
        ask(session, do="open", path="mine/out")
    assert not session.may_serve(str(next((other / "sample").iterdir())))


def test_keeping_moving_away_and_bringing_back(session: Session, tmp_path: Path) -> None:
    folder = results(tmp_path / "mine" / "out")
    models = tmp_path / "mine" / "models" / "Lora"
    models.mkdir(parents=True)
    run = {"path": str(folder), "name": "run", "file": "run-000001.safetensors"}
    for copy_to, says in (("/etc", "outside"), (str(models / "none"), "there is no folder")):
        with pytest.raises(ConfigError, match=says):
            ask(session, do="keep", final_name="best", copy_to=copy_to, **run)
    kept = ask(session, do="keep", final_name="best", copy_to="mine/models/Lora", alone=True, **run)
    assert "&lt;lora:best:0.8&gt;" in kept["said"]
    assert (models / "best.safetensors").is_file()
    assert [path.name for path in folder.glob("*.safetensors")] == ["best.safetensors"]
    assert "1 file is in the trash" in kept["html"]
    back = ask(session, do="restore", path=str(folder), name="run")
    assert "run.safetensors" in back["html"]
    assert "in the trash" not in back["html"]


def test_others_files_are_left_alone(session: Session, tmp_path: Path) -> None:
    folder = results(tmp_path / "mine" / "out")
    run = session.queue.add(name="run", owner="bob", config="{}", base=str(tmp_path))
    journal = folder / "logs" / "run-20260101-000000" / "journal.jsonl"
    session.queue.change(run.id, status="finished", journal=str(journal), started=1.0, ended=2.0)
    assert f'data-review-run="{run.id}"' in past_html(session)
    shown = ask(session, "eve", do="open", run=run.id)
    assert 'name="final_name"' not in shown["html"]
    assert 'name="final_name"' in ask(session, "bob", do="open", run=run.id)["html"]
    for what in ("keep", "restore", "report"):
        with pytest.raises(ConfigError, match="started by somebody else"):
            ask(session, "eve", do=what, path=str(folder), name="run", file="run.safetensors", final_name="x")
    assert (folder / "run.safetensors").is_file()


def test_going_on_fills_the_page(session: Session, tmp_path: Path) -> None:
    folder = results(tmp_path / "mine" / "out")
    run = {"path": str(folder), "name": "run", "file": "run-000001.safetensors"}
    filled = ask(session, do="continue", epochs="3", rate="overtrained", **run)
    assert filled["values"] == {
        "network_weights": str(folder / "run-000001.safetensors"),
        "epoch": 3,
        "output_name": "run-2",
        "unet_lr": 2e-4,
    }
    assert (filled["rest"]["origin_step"], filled["tab"]) == (10, "Train")
    assert ask(session, do="again", rate="undertrained", **run)["values"]["unet_lr"] == 8e-4
    with pytest.raises(ConfigError, match="how many epochs"):
        ask(session, do="continue", epochs="many", **run)
    with pytest.raises(ConfigError, match="no file of this run"):
        ask(session, do="continue", epochs="1", path=str(folder), name="run", file="../../x.safetensors")


def test_a_grid_is_put_into_the_queue_with_its_paths_checked(session: Session, tmp_path: Path) -> None:
    folder = results(tmp_path / "mine" / "out")
    session.runner._thread = type("Going", (), {"is_alive": lambda self: True})()
    run = {"path": str(folder), "name": "run", "file": "run.safetensors"}
    assert not ask(session, do="open", **run)["busy"]
    ask(session, do="grid", files=["run.safetensors"], strengths="1 0.8", seeds="1 2", prompts="", **run)
    assert ask(session, do="open", **run)["busy"]
    (waiting,) = session.queue.waiting()
    assert (waiting.kind, waiting.name) == ("grid", "run: grid of 4")
    settings = json.loads(waiting.config)
    assert settings["folder"] == str(folder / "txt2img-images")
    with pytest.raises(ConfigError, match="outside the folders"):
        ask(session, do="try", prompts="a", model=str(tmp_path / "model.safetensors"), **run)
    with pytest.raises(ConfigError, match="no file is chosen"):
        ask(session, do="grid", files=[], strengths="1", prompts="a", **run)


def test_a_run_without_settings_is_judged_by_pictures_that_a_person_names(
    session: Session, tmp_path: Path
) -> None:
    folder = results(tmp_path / "mine" / "out")
    assert 'name="pictures"' not in verdict_html(open_run(folder), None)
    next(folder.glob("*.json")).unlink()
    assert 'name="pictures" form="review-form"' in verdict_html(open_run(folder), None)
    session.runner._thread = type("Going", (), {"is_alive": lambda self: True})()
    run = {"do": "judge", "path": str(folder), "name": "run", "model": "mine/model.safetensors"}
    ask(session, pictures="mine/img", **run)
    (waiting,) = session.queue.waiting()
    config = json.loads(waiting.config)["config"]
    assert (waiting.kind, config["train_data_dir"]) == ("verdict", str(tmp_path / "mine" / "img"))
    with pytest.raises(ConfigError, match="outside the folders"):
        ask(session, pictures="/etc", **run)


def test_a_report_is_saved_and_given_out(session: Session, tmp_path: Path) -> None:
    folder = results(tmp_path / "mine" / "out")
    told = ask(session, do="report", path=str(folder), name="run")
    report = folder / "run_report.html"
    assert told["fetch"].endswith("run_report.html")
    assert session.may_serve(str(report))
    assert not session.may_serve(str(folder / "run.safetensors"))
    text = report.read_text(encoding="utf-8")
    assert "<img src=x" not in text
    assert str(tmp_path) not in text


def test_a_verdict_is_shown_with_what_it_rests_on(session: Session, tmp_path: Path) -> None:
    folder = results(tmp_path / "mine" / "out")
    run = open_run(folder)
    assert 'data-review="{&quot;do&quot;: &quot;judge&quot;}"' in verdict_html(run, None)
    signal = Signal(
        "own", f"Own loss {EVIL}", {10: 0.9, 20: math.nan}, 0.95, "lower is better", "good", "why"
    )
    kept = Verdict("overtrained", f"Keep it {EVIL}", (5, 10), "run-000001.safetensors", (signal,))
    text = verdict_html(run, kept)
    assert "<img" not in text
    assert text.count("&lt;img src=x") == 2
    # The file to keep is chosen by a click on it, and a gentler run is offered.
    assert 'for="review-file-0"' in text
    assert "half as high" in text
    assert ">0.9<" in text
    # How far it can be trusted depends on what it rests on.
    for names, words in (("learnt new", MEASURED), ("learnt", BY_LOSSES), ("contrast", BY_PICTURES)):
        signals = tuple(replace(signal, name=name) for name in names.split())
        assert words in verdict_html(run, replace(kept, signals=signals))
    # It is also the one that is chosen at first, instead of the last.
    for verdict, name, advised in (
        (kept, "run-000001.safetensors", "run-000001.safetensors"),
        (None, "run.safetensors", ""),
    ):
        seen = Seen(going=False, may_write=True, grids=(), trashed=(), model="", verdict=verdict)
        page = run_html(run, seen, Thumbnails(tmp_path / "thumbnails"))
        assert re.findall(r'name="file" [^>]*value="([^"]+)" checked>', page) == [name]
        assert f'data-advised="{advised}"' in page
