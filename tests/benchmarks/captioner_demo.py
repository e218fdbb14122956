"""How often the demo's captioner is right, attribute by attribute, on drawings that it has never seen.

python -m tests.benchmarks.captioner_demo [--pictures 500] [--model FOLDER]

It goes through the same classes as the Captioning tab, with Kohya's settings.
"""

from __future__ import annotations

import argparse
import random
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image

from assets.demo import draw, make_subject
from assets.demo.captioner import train
from trainer.captioning.captioners.blip import PLUGIN

UNSEEN = "captions of unseen drawings"
"""Seed of the portraits; those of the training have another."""
FOLDER = Path(train.__file__).parent / "blip"


def said(caption: str) -> dict[str, str]:
    """What a caption says, by attribute; "" where it is silent."""
    tags = caption.split(", ")

    def ending(word: str) -> str:
        return next((tag for tag in tags if tag.endswith(word)), "")

    hair = ending(" hair").split()
    clothes = next((tag.split() for tag in tags if tag.split()[-1:] and tag.split()[-1] in draw.GARMENTS), [])
    background = next((tag for tag in tags if " background" in tag), "")
    return {
        "hair": hair[-2] if len(hair) == 3 else "",
        "style": hair[0] if len(hair) == 3 else "",
        "skin": ending(" skin"),
        "clothes": clothes[0] if len(clothes) == 2 else "",
        "garment": clothes[-1] if len(clothes) == 2 else "",
        "background": background.split(" background")[0],
        "pattern": background.partition(" background")[2].strip(),
        "facing": next((tag for tag in tags if tag.startswith("facing ")), ""),
        "mood": next((tag for tag in tags if tag in ("smiling", "serious")), ""),
        "glasses": "glasses" if "glasses" in tags else "",
        "eye patch": "eye patch" if "eye patch" in tags else "",
    }


def measure(
    model: Path, portraits: Sequence[draw.Portrait], pictures: Sequence[Image.Image], batch: int = 32
) -> tuple[dict[str, float], float]:
    """Share of right answers for each attribute, the share of wholly right captions under "all", and seconds."""
    options = PLUGIN.options_class(batch_size=batch)
    captioner = PLUGIN.load(model, options, torch.device("cpu"), torch.float32, print)
    began = time.perf_counter()
    captions = [
        caption
        for start in range(0, len(pictures), batch)
        for caption in captioner.describe(pictures[start : start + batch])
    ]
    elapsed_s = time.perf_counter() - began
    right: dict[str, list[bool]] = {}
    for portrait, caption in zip(portraits, captions, strict=True):
        truth, answer = said(train.caption(portrait)), said(caption)
        for name, value in truth.items():
            right.setdefault(name, []).append(answer[name] == value)
        right.setdefault("all", []).append(answer == truth and caption.startswith("person, "))
    return {name: sum(values) / len(values) for name, values in right.items()}, elapsed_s


def unseen(count: int) -> list[draw.Portrait]:
    """Portraits of the whole world that no training picture was made from."""
    rng = random.Random(UNSEEN)
    return [train.random_portrait(rng) for _ in range(count)]


def main() -> None:
    """Print the tables of the README."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--pictures", type=int, default=500)
    parser.add_argument("--model", type=Path, default=FOLDER)
    given = parser.parse_args()
    sets = {"unseen drawings": unseen(given.pictures), "the demo's subject": make_subject.portraits()}
    for name, portraits in sets.items():
        shares, elapsed_s = measure(given.model, portraits, [draw.draw(portrait) for portrait in portraits])
        print(f"{name}: {len(portraits)} pictures, {1000 * elapsed_s / len(portraits):.0f} ms each")
        print("  " + ", ".join(f"{attribute} {share:.1%}" for attribute, share in shares.items()))


if __name__ == "__main__":
    main()
