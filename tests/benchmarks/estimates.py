"""What the planner says of each preset: a table in Markdown.

    python -m tests.benchmarks.estimates [PRESET ...] [--cards GIB ...] [--advice] [--rate TFLOPS] [--disk GB]

Models are of full size and hollow (`tests.hollow`): nothing is loaded, so no card is needed. Twenty square
pictures of 1024 px stand for a data set. Every figure is an estimate: seconds are those of a card that
multiplies matrices at the given rate, and of a disk that reads at the given one. With ``--advice`` what makes
a preset fit a card that is too small for it is listed too.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from pathlib import Path
from unittest import mock

from PIL import Image

from tests import hollow
from trainer import config as configuration
from trainer import estimate
from trainer.advice import advice
from trainer.data import folder
from trainer.estimate import GIB, Forecast, forecast
from trainer.files import REPOSITORY
from trainer.job import Job

MODELS = {"sd": hollow.sd15, "sdxl": hollow.sdxl, "flux": hollow.flux}
CARDS = [8.0, 10.0, 12.0, 16.0, 24.0]
PICTURES = 20


def pictures(target: Path) -> Path:
    """A Kohya folder; returns the folder above it."""
    (target / "10_subject").mkdir(parents=True)
    for index in range(PICTURES):
        Image.new("RGB", (1024, 1024), (index, 0, 0)).save(target / "10_subject" / f"{index}.png")
    return target


def row(name: str, found: Forecast, cards: list[float], took_s: float) -> str:
    """A line of the table."""
    train = found.device["train"]
    gib = (
        found.peak_bytes,
        train["frozen weights"],
        train["activations"],
        found.host_bytes,
        sum(found.disk.values()),
    )
    device, *rest = (f"{size / GIB:.2f}" for size in gib)
    seconds = f"{sum(found.first_step_s.values()):.0f} s", f"{found.step_s or 0:.2f} s"
    fits = ("yes" if found.peak_bytes <= card * GIB else "no" for card in cards)
    cells = (name, f"{device} ({found.peak_phase})", *rest, *seconds, *fits, f"{took_s:.1f} s")
    return f"| {' | '.join(cells)} |"


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("presets", nargs="*")
    parser.add_argument("--cards", type=float, nargs="+", default=CARDS, help="GiB")
    parser.add_argument("--advice", action="store_true", help="what makes it fit a smaller card")
    parser.add_argument("--rate", type=float, default=71.0, help="TFLOPS of a card in 16 bits")
    parser.add_argument("--disk", type=float, default=1.0, help="GB a second")
    options = parser.parse_args()
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    rate, disk = estimate.USED_SHARE * options.rate * 1e12, options.disk * 1e9
    names = options.presets or sorted(
        path.stem for path in (REPOSITORY / "presets").glob("*.json") if path.stem != "demo"
    )
    titles = ["preset", "device", "weights", "activations", "host", "disk", "to the first step", "a step"]
    titles += [*(f"{card:g}" for card in options.cards), "planned in (CPU)"]
    print(f"| {' | '.join(titles)} |")
    print(f"|{' --- |' * len(titles)}")
    changes: list[str] = []
    # Neither the card nor the files are there to be measured.
    given = mock.patch.multiple(estimate, _rate=lambda _: rate, _read_rate=lambda _: disk)
    with given, tempfile.TemporaryDirectory() as scratch:
        made: dict[str, dict[str, Path]] = {}
        images = pictures(Path(scratch) / "img")
        for name in names:
            config = configuration.load(REPOSITORY / "presets" / f"{name}.json").config
            family = "flux" if config.flux1_checkbox else "sdxl" if config.sdxl else "sd"
            if family not in made:
                made[family] = MODELS[family](Path(scratch))
            files = {field: str(path) for field, path in made[family].items()}
            files |= {"output_dir": scratch, "train_data_dir": str(images)}
            job = Job.from_config(config.model_copy(update=files), base=REPOSITORY)
            dataset = folder.scan(job)
            began = time.process_time()
            found = forecast(job, dataset, kind="cuda")
            print(row(name, found, options.cards, time.process_time() - began), flush=True)
            for card in options.cards if options.advice else ():
                _, ways = advice(job, int(card * GIB), dataset, kind="cuda")
                changes += [f"{name}, {card:g} GiB: {change}" for change in ways]
    print(*changes, sep="\n")


if __name__ == "__main__":
    main()
