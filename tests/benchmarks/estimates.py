"""What the planner says of each preset, for a card of a given size: a table in Markdown.

    python -m tests.benchmarks.estimates [PRESET ...] [--vram GIB]

Models are of full size and hollow (`tests.hollow`): nothing is loaded, so no card is needed. Every figure is
an estimate. With ``--vram``, what would make a preset fit a smaller card is listed too.
"""

from __future__ import annotations

import argparse
import os
import re
import tempfile
import time
from pathlib import Path

from tests import hollow
from trainer import config as configuration
from trainer.advice import advice
from trainer.files import REPOSITORY
from trainer.job import Job

MODELS = {"sd": hollow.sd15, "sdxl": hollow.sdxl, "flux": hollow.flux}
GIB = 2**30


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("presets", nargs="*")
    parser.add_argument("--vram", type=float, help="GiB; the preset's own card if not given")
    options = parser.parse_args()
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    names = options.presets or sorted(
        path.stem for path in (REPOSITORY / "presets").glob("*.json") if path.stem != "demo"
    )
    print("| preset | card | needed | most in | weights | activations | host | planned in |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- |")
    changes = []
    with tempfile.TemporaryDirectory() as scratch:
        made: dict[str, dict[str, Path]] = {}
        for name in names:
            config = configuration.load(REPOSITORY / "presets" / f"{name}.json").config
            family = "flux" if config.flux1_checkbox else "sdxl" if config.sdxl else "sd"
            if family not in made:
                made[family] = MODELS[family](Path(scratch))
            files = {field: str(path) for field, path in made[family].items()}
            files |= {"output_dir": scratch, "train_data_dir": scratch}
            job = Job.from_config(config.model_copy(update=files), base=REPOSITORY)
            size = re.search(r"(\d+) GB", config.training_comment)
            card = options.vram or float(size[1] if size else 0)
            began = time.perf_counter()
            found, ways = advice(job, int(card * GIB), kind="cuda")
            took_s = time.perf_counter() - began
            train = found.device["train"]
            parts = (train["frozen weights"] / GIB, train["activations"] / GIB, found.host_bytes / GIB)
            weights, activations, host = (f"{part:.2f}" for part in parts)
            print(
                f"| {name} | {card:g} | {found.peak_bytes / GIB:.2f} | {found.peak_phase} | {weights} | "
                f"{activations} | {host} | {took_s:.1f} s |"
            )
            changes += [f"{name}, {card:g} GiB: {change}" for change in ways]
    print(*changes, sep="\n")


if __name__ == "__main__":
    main()
