"""The captions of a folder: where a text came from, undo, and what is never overwritten."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image

from trainer.captioning.captions import LARGEST_BYTES, Caption, Captions, Edit
from trainer.errors import DatasetError


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("a", "b", "c"):
        Image.new("RGB", (8, 8)).save(tmp_path / f"{name}.png")
    (tmp_path / "a.txt").write_text("a cat\n")
    (tmp_path / "b.txt").write_text("a dog\r\nsecond line\r\n")
    return tmp_path


def by_name(captions: Captions) -> dict[str, Caption]:
    return {caption.name: caption for caption in captions.all()}


def test_reading_writes_nothing_and_tells_missing_from_empty(folder: Path) -> None:
    (folder / "c.txt").write_bytes(b"")
    before = sorted(path.name for path in folder.iterdir())
    found = by_name(Captions(folder))
    assert [found[name].text for name in ("a.txt", "b.txt", "c.txt")] == ["a cat", "a dog\nsecond line", ""]
    assert found["c.txt"].exists
    assert {caption.source for caption in found.values()} == {"file"}
    (folder / "c.txt").unlink()
    assert not by_name(Captions(folder))["c.txt"].exists
    assert sorted(path.name for path in folder.iterdir()) == [name for name in before if name != "c.txt"]


def test_undo_goes_back_to_no_file_and_redo_comes_again(folder: Path) -> None:
    captions = Captions(folder)
    edits = [Edit("a.txt", "a cat", "a tabby"), Edit("c.txt", None, "a bird")]
    written = captions.write(edits, "BLIP", "captioner")
    assert written.done == ("a.txt", "c.txt")
    assert (folder / "c.txt").read_bytes() == b"a bird\n"
    assert by_name(captions)["c.txt"].machine
    undone = Captions(folder).undo()  # of another page
    assert undone is not None
    assert undone.done == ("a.txt", "c.txt")
    assert (folder / "a.txt").read_text() == "a cat\n"
    assert not (folder / "c.txt").exists()
    assert captions.undo() is None
    again = captions.redo()
    assert again is not None
    assert (folder / "c.txt").read_text() == "a bird\n"
    assert captions.redo() is None


def test_a_later_edit_is_neither_overwritten_nor_undone_by_an_earlier_step(folder: Path) -> None:
    captions = Captions(folder)
    captions.write([Edit("a.txt", "a cat", "one"), Edit("b.txt", "a dog\nsecond line", "two")], "both")
    stale = captions.write([Edit("a.txt", "a cat", "late")], "a captioner that began before", "captioner")
    assert (stale.done, stale.kept) == ((), ("a.txt",))
    (folder / "a.txt").write_text("changed in an editor")
    undone = captions.undo()
    assert undone is not None
    assert (undone.done, undone.kept) == (("b.txt",), ("a.txt",))
    assert (folder / "a.txt").read_text() == "changed in an editor"


def test_changes_by_other_programs_are_noticed_and_count_as_a_persons(folder: Path) -> None:
    captions = Captions(folder)
    captions.write([Edit("a.txt", "a cat", "from BLIP")], "BLIP", "captioner")
    (folder / "a.txt").write_text("from Notepad\n")
    caption = by_name(captions)["a.txt"]
    assert (caption.source, caption.machine) == ("outside", False)
    captions.write([Edit("a.txt", "from Notepad", "from the page")], "edited")
    story = [(version.text, version.source) for version in captions.history("a.txt")]
    assert story == [
        ("a cat", "file"),
        ("from BLIP", "captioner"),
        ("from Notepad", "outside"),
        ("from the page", "edit"),
    ]


def test_parts_of_one_step_are_undone_together(folder: Path) -> None:
    captions = Captions(folder)
    captions.write([Edit("a.txt", "a cat", "1")], "BLIP", "captioner", "step")
    captions.write([Edit("c.txt", None, "3")], "BLIP", "captioner", "step")
    undone = captions.undo()
    assert undone is not None
    assert set(undone.done) == {"a.txt", "c.txt"}


@pytest.mark.parametrize(
    ("data", "shown", "problem"),
    [
        ("Größe".encode("latin-1"), "Größe", "UTF-8"),
        (b"a\0cat\0", "acat", "zero bytes"),
        (b"x" * (LARGEST_BYTES + 1), "x" * 2000, "bytes"),
        (b"\xef\xbb\xbfwith a mark", "with a mark", ""),
    ],
)
def test_odd_files_are_shown_with_a_sentence(folder: Path, data: bytes, shown: str, problem: str) -> None:
    (folder / "a.txt").write_bytes(data)
    captions = Captions(folder)
    caption = by_name(captions)["a.txt"]
    assert caption.text == shown
    assert problem in caption.problem
    assert bool(problem) == bool(caption.problem)
    captions.write([Edit("a.txt", caption.text, f"{shown[:5]} mended")], "edited")
    assert by_name(captions)["a.txt"].problem == ""
    assert (folder / "a.txt").read_bytes() == f"{shown[:5]} mended\n".encode()


@pytest.mark.parametrize(
    "name", ["../a.txt", "/etc/passwd", "a.png", ".kiln/captions.txt", "a\0.txt", ".txt"]
)
def test_names_that_lead_elsewhere_are_refused(folder: Path, name: str) -> None:
    with pytest.raises(DatasetError, match="is no caption"):
        Captions(folder).write([Edit(name, None, "x")], "edited")


def test_hostile_texts_are_kept_as_they_are_and_huge_ones_refused(folder: Path) -> None:
    captions = Captions(folder)
    captions.write([Edit("a.txt", "a cat", "<script>alert(1)</script>\ud800\0")], "edited")
    assert (folder / "a.txt").read_text() == "<script>alert(1)</script>?\n"
    with pytest.raises(DatasetError, match="too long"):
        captions.write([Edit("c.txt", None, "x" * (LARGEST_BYTES + 1))], "edited")
    assert not (folder / "c.txt").exists()


def test_a_damaged_history_loses_the_way_back_and_nothing_else(folder: Path) -> None:
    captions = Captions(folder)
    captions.write([Edit("a.txt", "a cat", "one")], "edited")
    captions.file.write_text('{"captions": {"a.txt": {"at": 7, "versions": []}}, "changes": []}')
    assert by_name(captions)["a.txt"].text == "one"
    assert captions.undo() is None
    assert captions.file.with_suffix(".damaged.json").exists()
    captions.write([Edit("a.txt", "one", "two")], "edited")
    assert [version.text for version in captions.history("a.txt")] == ["one", "two"]


def test_the_history_has_an_end(folder: Path) -> None:
    captions = Captions(folder)
    text: str | None = "a cat"
    for number in range(60):
        captions.write([Edit("a.txt", text, str(number))], "edited")
        text = str(number)
    kept = json.loads(captions.file.read_text())["captions"]["a.txt"]["versions"]
    assert len(kept) == 40
    assert captions.history("a.txt")[-1].text == "59"
    undone = captions.undo()
    assert undone is not None
    assert (folder / "a.txt").read_text() == "58\n"
