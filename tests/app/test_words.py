"""The language files hold what stands on the page, and all of them the same."""

from __future__ import annotations

import re

import pytest

from app import looks
from app.fields import ESSENTIAL, explain
from trainer.config import ui_of
from trainer.files import REPOSITORY

OTHERS = [code for code in looks.LANGUAGES if code != "en"]


@pytest.mark.parametrize("code", OTHERS)
def test_a_language_has_every_text_with_its_numbers(code: str) -> None:
    first, words = looks.words(OTHERS[0]), looks.words(code)
    assert list(words) == list(first)
    for source, text in words.items():
        assert text.strip() == text != "", source
        assert source.count("{}") == text.count("{}"), source


def test_every_text_is_one_of_the_page() -> None:
    files = [
        *REPOSITORY.glob("app/*.py"),
        *REPOSITORY.glob("app/tabs/*.py"),
        *(REPOSITORY / "assets" / name for name in ("page.js", "review.js")),
    ]
    code = "\n".join(file.read_text(encoding="utf-8") for file in files)
    code = re.sub(r'"\n\s+f?"', "", code)  # sentences over several lines
    raw = [explain(name, ui_of(name)) for name in ESSENTIAL]
    helps = {*raw, *(re.sub(r"\d+(?:[.,:]\d+)*", "{}", text) for text in raw)}
    unknown = []
    for source in looks.words(OTHERS[0]):
        parts = [
            part
            for part in source.replace("wait since", "wait{}since")
            .replace("waits since", "waits{}since")
            .split("{}")
        ]
        if source not in helps and not all(part.strip() in code for part in parts if part.strip()):
            unknown.append(source)
    assert unknown == []
    assert len(helps & set(looks.words(OTHERS[0]))) == len(ESSENTIAL)


@pytest.mark.parametrize("code", ["", "en", "xx", "../es", "/etc/passwd"])
def test_no_other_file_is_read(code: str) -> None:
    assert looks.words(code) == {}
