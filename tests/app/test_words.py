"""The language files hold what stands on the page, and all of them the same."""

from __future__ import annotations

import json
import re

import pytest

from app import looks
from app.fields import explain
from trainer.config import KohyaConfig, help_of, ui_of
from trainer.files import REPOSITORY

OTHERS = [code for code in looks.LANGUAGES if code != "en"]


@pytest.mark.parametrize("code", OTHERS)
def test_a_language_has_every_text_with_its_numbers(code: str) -> None:
    first, words = looks.words(OTHERS[0]), looks.words(code)
    assert list(words) == list(first)
    for source, text in words.items():
        assert text.strip() == text != "", source
        assert re.findall(r"\{[*+]?\}", source) == re.findall(r"\{[*+]?\}", text), source


def test_every_text_is_one_of_the_page() -> None:
    files = [
        *REPOSITORY.glob("app/**/*.py"),
        *REPOSITORY.glob("trainer/**/*.py"),
        *REPOSITORY.glob("assets/*.js"),
    ]
    code = "\n".join(file.read_text(encoding="utf-8") for file in files)
    code = re.sub(r'"\n\s+f?"', "", code)  # sentences over several lines
    unknown = []
    for source in looks.words(OTHERS[0]):
        parts = [
            part
            for part in source.replace("wait since", "wait{}since")
            .replace("waits since", "waits{}since")
            .replace("{*}", "{}")
            .replace("{+}", "{}")
            .split("{}")
        ]
        if not all(part.strip() in code for part in parts if part.strip()):
            unknown.append(source)
    assert unknown == []


@pytest.mark.parametrize("code", OTHERS)
def test_the_help_of_every_setting_is_translated(code: str) -> None:
    parts = json.loads(
        (REPOSITORY / "assets" / "languages" / f"help.{code}.json").read_text(encoding="utf-8")
    )
    needed = {"No effect here:", "Here:", "to"}
    needed |= {" ".join(help_of(name).split()) for name in KohyaConfig.model_fields if not ui_of(name).hidden}
    assert needed - set(parts) == set(), "to be translated"
    helps = looks.helps(code)
    name = "vae_batch_size"
    assert helps[explain(name, ui_of(name))] != explain(name, ui_of(name))
    # Figures and names of options survive the translation.
    for source, text in helps.items():
        options = r"--\w+|\b\w+_\w+\b|\bcosine\b|\bsafetensors\b|\d+(?:\.\d+)?"
        there, here = (re.findall(options, re.sub(r'"\w+ ?\w*"', "", one)) for one in (source, text))
        assert sorted(here) == sorted(there), source


@pytest.mark.parametrize("code", ["", "en", "xx", "../es", "/etc/passwd"])
def test_no_other_file_is_read(code: str) -> None:
    assert looks.words(code) == {}
