"""Changes to many captions, each against what a person would expect to read."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest

from trainer.captioning import changes, habits
from trainer.captioning.captions import Caption
from trainer.errors import ConfigError


def caption(text: str | None, name: str = "a.txt", problem: str = "") -> Caption:
    return Caption(
        name=name,
        picture=Path(name).with_suffix(".png"),
        text=text or "",
        exists=text is not None,
        problem=problem,
        source="file",
        by="",
        time=0.0,
        versions=1,
    )


def changed(text: str | None, **operation: Any) -> str | None:
    """What a caption says after an operation; None where it stays."""
    edits = changes.plan([caption(text)], changes.parse(operation))
    assert all(edit.before == text for edit in edits)
    return edits[0].after if edits else None


@pytest.mark.parametrize(
    ("text", "operation", "after"),
    [
        ("cat, red", {"do": "add", "tag": "k1ln"}, "k1ln, cat, red"),
        ("cat, red", {"do": "add", "tag": "k1ln", "place": "last"}, "cat, red, k1ln"),
        ("Cat, red", {"do": "add", "tag": "cat"}, None),
        (None, {"do": "add", "tag": "cat"}, "cat"),
        ("cat,  red , Dog", {"do": "remove", "tags": ["RED", "dog"]}, "cat"),
        ("cat,  red", {"do": "remove", "tags": ["blue"]}, None),
        (None, {"do": "remove", "tags": ["blue"]}, None),
        ("a, b, c", {"do": "rename", "tag": "b", "to": "c"}, "a, c"),
        ("a, b, c", {"do": "move", "tag": "c"}, "c, a, b"),
        ("a, b, c", {"do": "move", "tag": "a", "place": "last"}, "b, c, a"),
        ("a, b", {"do": "move", "tag": "z"}, None),
        ("z, c, b, a", {"do": "sort", "by": "name", "keep": 1}, "z, a, b, c"),
        ("a red cat", {"do": "replace", "find": "red", "to": "blue"}, "a blue cat"),
        ("a Red cat", {"do": "replace", "find": "red", "to": "blue"}, None),
        ("a Red cat", {"do": "replace", "find": "red", "to": "b", "match_case": False}, "a b cat"),
        ("1+1 (x)", {"do": "replace", "find": "(x)", "to": r"\1"}, r"1+1 \1"),
        (
            "cat dog",
            {"do": "replace", "find": r"(\w+) (\w+)", "to": r"\2 \1", "is_pattern": True},
            "dog cat",
        ),
        ("cat", {"do": "affix", "prefix": "k1ln", "postfix": "photo"}, "k1ln cat photo"),
        ("k1ln cat", {"do": "affix", "prefix": "k1ln"}, None),
        (None, {"do": "affix", "prefix": "k1ln"}, "k1ln"),
    ],
)
def test_operations(text: str | None, operation: dict[str, Any], after: str | None) -> None:
    assert changed(text, **operation) == after


def test_sorting_puts_the_frequent_ones_first() -> None:
    captions = [caption("x, rare, often", "a.txt"), caption("often", "b.txt")]
    edits = changes.plan(captions, changes.parse({"do": "sort", "by": "count", "keep": 1}))
    assert [(edit.name, edit.after) for edit in edits] == [("a.txt", "x, often, rare")]


def test_files_that_cannot_be_read_are_passed_over() -> None:
    broken = caption("caf?", problem="the file is not UTF-8")
    assert changes.plan([broken], changes.parse({"do": "add", "tag": "x"})) == []


@pytest.mark.parametrize("pattern", ["(a+)+$", "(a|a)*$", "(.*?,){30}x"])
def test_patterns_without_end_are_stopped(pattern: str) -> None:
    began = time.monotonic()
    captions = [caption(text) for text in ("a" * 5000 + "!", "a," * 2000 + "!")] * 200
    operation = changes.parse({"do": "replace", "find": pattern, "to": "", "is_pattern": True})
    with pytest.raises(ConfigError, match="takes more than"):
        changes.plan(captions, operation)
    assert time.monotonic() - began < 30


@pytest.mark.parametrize(
    ("operation", "said"),
    [
        ({"do": "replace", "find": "(", "is_pattern": True}, "pattern"),
        ({"do": "replace", "find": "a", "to": r"\3", "is_pattern": True}, "does not fit"),
        ({"do": "replace", "find": "", "to": "x"}, "find"),
        ({"do": "replace", "find": "", "is_pattern": True, "to": "x"}, "find"),
        ({"do": "replace", "find": "a", "to": "b" * 5000}, "to"),
        ({"do": "explode"}, "change"),
        ({"do": "unhabit", "habits": ["no such"]}, "no habit"),
        ("remove", "change"),
    ],
)
def test_what_makes_no_sense_is_a_sentence(operation: Any, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        changes.plan([caption("a cat")], changes.parse(operation))


def test_captions_cannot_be_made_huge() -> None:
    operation = changes.parse({"do": "replace", "find": "a", "to": "b" * 4000})
    with pytest.raises(ConfigError, match="letters"):
        changes.plan([caption("a" * 1000)], operation)


def test_the_table_counts_captions_and_not_words() -> None:
    captions = [caption("cat, cat, Red hair"), caption("red hair, dog\nsecond, line"), caption("red hair")]
    assert changes.table(captions) == [("red hair", 3), ("cat", 1), ("dog", 1)]


def test_a_diff_tells_what_went_and_what_came() -> None:
    before, after = "a red cat, sitting", "a blue cat, lying down"
    runs = changes.diff(before, after)
    assert "".join(text for kind, text in runs if kind != "new") == before
    assert "".join(text for kind, text in runs if kind != "gone") == after
    assert ("gone", "red") in runs
    assert ("new", "blue") in runs


@pytest.mark.parametrize(
    ("text", "name", "after"),
    [
        (
            "a woman with long hair holding a remote control in her hand",
            "holding things",
            "a woman with long hair",
        ),
        ("a man in a suit with a microphone in his hand", "things in hands", "a man in a suit"),
        (
            "a man with a microphone in his hand and a blue tie",
            "things in hands",
            "a man and a blue tie",
        ),
        ("a woman, holding a cell phone, smiling", "holding things", "a woman, smiling"),
        ("a girl is talking on a cell phone", "on the phone", "a girl"),
        ("there is a man that is smiling", "there is", "a man that is smiling"),
        ("arafed woman in a red dress", "arafed", "woman in a red dress"),
        ("a close up of a cat", "words about the picture", "a cat"),
        ("a picture of a man with glasses", "words about the picture", "a man with glasses"),
        ("a man with a white background", "empty backgrounds", "a man"),
        ("a woman taking a selfie with a cell phone in a mirror", "taking a selfie", "a woman"),
    ],
)
def test_habits_go_and_leave_a_clean_caption(text: str, name: str, after: str) -> None:
    assert name in [hit for hit, _ in habits.found(text)]
    assert habits.remover([name])(text) == after


@pytest.mark.parametrize(
    "text",
    [
        "a man holding a baby",
        "person, curly brown hair, black hoodie, blue background with dots, facing left",
        "a woman with long hair and a red dress",
        "a man with a beard",
        "a remote village in the mountains",
        "a dog holding its head up",
        "k1ln person, blue background with stripes, serious",
    ],
)
def test_what_is_no_habit_stays(text: str) -> None:
    assert habits.found(text) == []
    assert habits.remover([habit.name for habit in habits.HABITS])(text) == text


def test_phrases_of_ones_own() -> None:
    own = ["wearing a tie", "(blurry)"]
    text = "a man Wearing  a tie, (blurry), in a room"
    assert [name for name, _ in habits.found(text, own)] == own
    assert habits.remover([], own)(text) == "a man, in a room"
    assert changed("a man wearing a tie", do="unhabit", habits=[], own=own) == "a man"
