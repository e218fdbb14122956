"""What the checks say of a configuration, before anything is loaded."""

from __future__ import annotations

from pathlib import Path

import pytest

from app.checks import Check, checks_html
from app.paths import Paths
from app.runs import Runs
from trainer.config import KohyaConfig


@pytest.fixture
def runs(tmp_path: Path) -> Runs:
    return Runs(tmp_path / "runs.sqlite3")


@pytest.mark.parametrize(
    ("values", "about", "repair"),
    [
        ({}, "output_dir", {}),
        ({"output_dir": "o"}, "train_data_dir", {}),
        ({"output_dir": "o", "train_data_dir": "t", "full_bf16": True}, "full_bf16", {}),
        (
            {"output_dir": "o", "train_data_dir": "t", "color_aug": True},
            "color_aug",
            {"cache_latents": False, "cache_latents_to_disk": False},
        ),
    ],
)
def test_what_contradicts_itself_names_its_field(
    values: dict[str, object], about: str, repair: dict[str, object], tmp_path: Path, runs: Runs
) -> None:
    from app.checks import checks

    (found,) = checks(KohyaConfig(**values), tmp_path, Paths({}, confined=False), runs)
    assert found.level == "error"
    assert found.about == about
    assert dict(found.values or {}) == repair


def test_the_list_is_escaped_and_names_what_is_urgent_first() -> None:
    evil = "<img src=x onerror=alert(1)>"
    lines = [
        Check("good", "fine"),
        Check("error", evil, "seed", evil, {"seed": evil}),
        Check("warning", "hm"),
    ]
    text = checks_html(lines)
    assert "<img" not in text
    assert "1 to mend before it can start" in text
    assert text.index("Mend") < text.index("hm") < text.index("fine")
    assert "Ready; 1 to look at" in checks_html(lines[2:])
    assert "Ready to start" in checks_html(lines[:1])
