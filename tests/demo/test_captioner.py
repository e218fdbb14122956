"""The demo's captioner: its size, and that it is right about drawings that it has never seen."""

from __future__ import annotations

from assets.demo import draw, make_subject
from tests.benchmarks.captioner_demo import FOLDER, measure, unseen

LARGEST_BYTES = 8 * 1024 * 1024


def test_it_is_small() -> None:
    files = [file for file in FOLDER.iterdir() if file.is_file()]
    assert sum(file.stat().st_size for file in files) < LARGEST_BYTES
    assert {"model.safetensors", "config.json"} <= {file.name for file in files}


def test_it_says_what_unseen_drawings_show() -> None:
    portraits = unseen(48)
    shares, _ = measure(FOLDER, portraits, [draw.draw(portrait) for portrait in portraits])
    assert {name: share for name, share in shares.items() if name != "all" and share < 0.9} == {}


def test_it_describes_the_demos_subject() -> None:
    portraits = make_subject.portraits()
    shares, _ = measure(FOLDER, portraits, [draw.draw(portrait) for portrait in portraits])
    assert min(shares[name] for name in ("hair", "style", "background", "clothes", "eye patch")) > 0.9
