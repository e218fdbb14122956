"""Captioning as work of the queue: what it writes, what it leaves alone, progress and Stop."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tests.captioning import tiny
from trainer.captioning.captions import Captions, Edit
from trainer.captioning.work import CaptionSettings, CaptionWork
from trainer.controls import Controls
from trainer.errors import ConfigError, DatasetError, StopTraining
from trainer.events import Event, EventLog, LogLine, Progress, WorkFinished, read_journal
from trainer.work import perform


@pytest.fixture
def world(tmp_path: Path) -> Path:
    """Five pictures, one of them broken; the tagger calls every picture "long hair"."""
    folder = tmp_path / "10_cat"
    folder.mkdir()
    for index in range(4):
        pixels = np.full((24, 16, 3), 60 * index, np.uint8)
        Image.fromarray(pixels).save(folder / f"{index}.png")
    (folder / "4.png").write_bytes(b"broken")
    tiny.tagger(tmp_path / "tagger", bias=[-9, -9, -9, -9, 9, -9, -9, -9, -9], size_px=16)
    return tmp_path


def work(world: Path, **more: Any) -> CaptionWork:
    settings = CaptionSettings(captioner="wd14", model="tagger", folders=("10_cat",), **more)
    return CaptionWork.from_json(CaptionWork.settings_json(settings), world)


def run(work: CaptionWork) -> tuple[str, list[Event]]:
    events: list[Event] = []
    return work.run(events.append, lambda: False).message, events


def texts(world: Path) -> dict[str, str]:
    return {file.stem: file.read_text() for file in sorted((world / "10_cat").glob("*.txt"))}


def test_captions_are_written_with_progress_and_a_sentence_about_the_broken_one(world: Path) -> None:
    message, events = run(work(world, prefix="k1ln,", postfix="photo"))
    assert texts(world) == {str(index): "k1ln, long hair photo\n" for index in range(4)}
    assert "4 captions written" in message
    assert "1 picture could not be read" in message
    last = [event for event in events if isinstance(event, Progress)][-1]
    assert (last.done, last.total) == (5, 5)
    lines = [event for event in events if isinstance(event, LogLine)]
    assert any(line.level == "warning" and "4.png" in line.message for line in lines)
    captions = Captions(world / "10_cat")
    assert captions.get("0.txt").by == "WD14 tagger (tagger)"
    undone = captions.undo()
    assert undone is not None
    assert len(undone.done) == 4
    assert texts(world) == {}


@pytest.mark.parametrize(
    ("existing", "replaced"), [("keep", {"3"}), ("machine", {"2", "3"}), ("all", {"0", "1", "2", "3"})]
)
def test_captions_of_a_person_stay_unless_asked(world: Path, existing: str, replaced: set[str]) -> None:
    folder = world / "10_cat"
    (folder / "0.txt").write_text("there before\n")
    captions = Captions(folder)
    captions.write([Edit("1.txt", None, "from BLIP"), Edit("2.txt", None, "old")], "BLIP", "captioner")
    captions.write([Edit("1.txt", "from BLIP", "a person's")], "edited")
    run(work(world, existing=existing))
    assert {name for name, text in texts(world).items() if text == "long hair\n"} == replaced


def test_an_edit_made_while_the_captioner_looks_is_kept(world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from trainer.captioning.captioners.wd14 import Wd14

    describe = Wd14.describe

    def slow(self: Wd14, pictures: Any) -> list[str]:
        (world / "10_cat" / "0.txt").write_text("typed meanwhile")
        return describe(self, pictures)

    monkeypatch.setattr(Wd14, "describe", slow)
    message, _ = run(work(world))
    assert texts(world)["0"] == "typed meanwhile"
    assert "1 kept that were edited meanwhile" in message


def test_new_tags_are_appended(world: Path) -> None:
    (world / "10_cat" / "0.txt").write_text("cat, long hair\n")
    (world / "10_cat" / "1.txt").write_text("cat\n")
    run(work(world, append=True))
    assert texts(world) == {
        "0": "cat, long hair\n",
        "1": "cat, long hair\n",
        "2": "long hair\n",
        "3": "long hair\n",
    }


def test_stop_keeps_what_was_written_and_the_journal_tells_it(world: Path) -> None:
    journal_of = work(world)
    events, controls = EventLog(), Controls()
    perform(journal_of, events, controls)
    finished = [event for event in read_journal(journal_of.journal) if isinstance(event, WorkFinished)]
    assert len(finished) == 1
    stopping = threading.Event()

    def emit(event: Event) -> None:
        if isinstance(event, LogLine) and "tagger runs" in event.message:
            stopping.set()

    with pytest.raises(StopTraining):
        work(world, existing="all").run(emit, stopping.is_set)


def test_the_picture_is_described_as_it_is_trained(world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from trainer.captioning.captioners.wd14 import Wd14
    from trainer.pictures import edits

    seen: list[tuple[int, int]] = []

    def describe(self: Wd14, pictures: Any) -> list[str]:
        seen.extend(picture.size for picture in pictures)
        return ["x"] * len(pictures)

    monkeypatch.setattr(Wd14, "describe", describe)
    edits.change(world / "10_cat", ["0.png"], lambda _, edit: edits.turn(edit, 1), "turned")
    edits.change(world / "10_cat", ["1.png"], lambda _, edit: edits.Edit(excluded=True), "left out")
    run(work(world))
    assert seen == [(24, 16), (16, 24), (16, 24)]
    assert "1" not in texts(world)


def test_what_cannot_be_done_is_a_sentence(world: Path) -> None:
    for index in range(5):
        (world / "10_cat" / f"{index}.txt").write_text("kept")
    with pytest.raises(DatasetError, match="nothing to caption"):
        run(work(world))
    for options, said in (
        ({"captioner": "nobody", "model": "x"}, "is not one of"),
        ({"captioner": "wd14", "model": "x", "options": {"general_threshold": 7}}, "General threshold"),
        ({"captioner": "wd14", "model": "x", "options": {"evil": 1}}, "evil"),
        ({"captioner": "wd14", "model": "x", "extension": ".png"}, "overwrite"),
        ({"captioner": "wd14", "model": "x", "extension": "/../x"}, "extension"),
    ):
        settings = CaptionSettings(folders=("10_cat",), **options)
        with pytest.raises(ConfigError, match=said):
            CaptionWork.from_json(settings.model_dump_json(exclude_none=True), world)
    with pytest.raises(ConfigError, match="folders"):
        CaptionWork.from_json('{"captioner": "wd14", "model": "x", "folders": []}', world)
    with pytest.raises(ConfigError):
        CaptionWork.from_json("no json", world)
