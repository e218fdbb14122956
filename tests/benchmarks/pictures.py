"""How long 1,000 pictures of 4 to 12 megapixels take: opening, all checks, the same again, thumbnails,
and whether the page is answered meanwhile.

    python -m tests.benchmarks.pictures FOLDER [--pictures 1000] [--photos FOLDER_OF_PHOTOS]

FOLDER gets the pictures (about 2 GB; made once). Without --photos they are drawn; photographs of faces
take about as long. 40 files are encoded and copied with other bytes behind their end, so that each has to
be read and decoded.

What was measured stands in README.md beside.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from app.album import Tasks, answer
from app.paths import Paths
from app.session import Session
from trainer.config import KohyaConfig
from trainer.data.images import read_rgb

DIFFERENT = 40
MEGAPIXELS = (4, 6, 8, 12)
ASKED_EVERY_S = 2.0
"""How often the page asks for the folder's pictures while they are checked."""


def make(folder: Path, count: int, photos: Path | None) -> None:
    """Write the pictures that are not there yet."""
    folder.mkdir(parents=True, exist_ok=True)
    sources = sorted(photos.glob("*.jpg")) if photos else []
    for index in range(min(DIFFERENT, count)):
        if (folder / f"{index:04}.jpg").exists():
            continue
        pixels = MEGAPIXELS[index % len(MEGAPIXELS)] * 1_000_000
        size = round((pixels * 4 / 3) ** 0.5), round((pixels * 3 / 4) ** 0.5)
        rng = np.random.default_rng(index)
        if sources:
            image = Image.fromarray(read_rgb(sources[index % len(sources)]))
        else:
            image = Image.fromarray(rng.integers(0, 256, (48, 64, 3), dtype=np.uint8))
        values = np.asarray(image.resize(size, Image.Resampling.BICUBIC)).astype(np.int16)
        values = values + rng.integers(-6, 7, values.shape[:2])[:, :, None].astype(np.int16)
        Image.fromarray(values.clip(0, 255).astype(np.uint8)).save(folder / f"{index:04}.jpg", quality=90)
    for index in range(DIFFERENT, count):
        path = folder / f"{index:04}.jpg"
        if not path.exists():
            path.write_bytes((folder / f"{index % DIFFERENT:04}.jpg").read_bytes() + index.to_bytes(4, "big"))


def timed(words: str, work: Callable[[], Any]) -> Any:
    """Run and print how long it took."""
    began, cpu = time.perf_counter(), time.process_time()
    found = work()
    spent, spent_cpu = time.perf_counter() - began, time.process_time() - cpu
    print(f"{words:34} {spent:7.1f} s  ({spent_cpu:.1f} s of CPU)", flush=True)
    return found


def main() -> None:
    """Time what the page does with a large set."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--pictures", type=int, default=1000)
    parser.add_argument("--photos", type=Path)
    given = parser.parse_args()
    pictures = given.folder / "pictures"
    make(pictures, given.pictures, given.photos)
    state = given.folder / f"state-{os.getpid()}"
    session = Session(paths=Paths({}, confined=False), state=state, config=KohyaConfig(), base=given.folder)
    tasks = Tasks()

    def ask(do: str, **data: Any) -> dict[str, Any]:
        return answer(session, tasks, {"do": do, "folder": str(pictures), "settings": "", **data}, "")

    def check() -> dict[str, Any]:
        key, asked, slowest_s = ask("check", person=True)["task"], time.perf_counter(), 0.0
        while not (found := ask("progress", task=key))["over"]:
            time.sleep(0.1)
            if (began := time.perf_counter()) - asked > ASKED_EVERY_S:
                ask("open")
                asked = time.perf_counter()
                slowest_s = max(slowest_s, asked - began)
        print(f"meanwhile the grid was there after {slowest_s:.1f} s at most")
        result: dict[str, Any] = found["result"]
        return result

    print(f"{given.pictures} pictures, {sum(p.stat().st_size for p in pictures.iterdir()) / 2**30:.2f} GiB")
    opened = timed("open the folder", lambda: ask("open"))
    ids = [one["id"] for part in opened["sets"] for one in part["pictures"]]
    timed("first 24 thumbnails", lambda: ask("thumbs", ids=ids[:24]))
    found = timed("all checks", check)
    timed("all checks again", check)
    timed("80 thumbnails after the checks", lambda: ask("thumbs", ids=ids[100:180]))
    kinds: dict[str, int] = {}
    for finding in found["findings"]:
        kinds[finding["kind"]] = kinds.get(finding["kind"], 0) + 1
    print(kinds)


if __name__ == "__main__":
    main()
