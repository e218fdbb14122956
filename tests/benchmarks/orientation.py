"""How well mirrored pictures are found: k of n mirrored, over many draws, on drawn and on real pictures.

    python -m tests.benchmarks.orientation                                     # the demo's subject, drawn anew
    python -m tests.benchmarks.orientation --sets FOLDER                       # each sub-folder is one subject
    python -m tests.benchmarks.orientation --sets FOLDER --chance              # every sub-folder mixed: nobody twice
    python -m tests.benchmarks.orientation --sets FOLDER --writing             # one line of writing in each picture
    python -m tests.benchmarks.orientation --sets FOLDER --only odd --learn    # writes assets/models/poses.npy

Every picture of a set is taken to be right as it is. Precision is the share of named pictures that were
mirrored, recall the share of mirrored ones that were named; sets that are called too symmetric, or two groups
of nearly the same size, name none. The ranges are 95 % intervals of a bootstrap over the subjects.

`--only odd` and `--only even` take every second folder, by the number at its end: method, poses and confidences were
settled on the odd people of the AT&T (ORL) face database, and the even ones are reported (README.md beside).
"""

from __future__ import annotations

import argparse
import random
import re
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFont

from assets.demo import draw, make_subject
from trainer.pictures.faces import Detector
from trainer.pictures.orientation import POSES, Look, compare, differences, look

ENDINGS = (".png", ".jpg", ".jpeg", ".pgm", ".webp")
SHARES = (0.0, 0.1, 0.2, 0.3)
LEARNED = 8
"""Directions that pose and light take."""


def demo_set(rng: random.Random, count: int) -> list[Look]:
    """The demo's subject in ``count`` settings of which no two are alike."""
    looks = []
    for _ in range(count):
        one = draw.random_portrait(rng)
        portrait = make_subject.subject(
            one.background, one.pattern, one.clothes, one.garment, one.facing, one.smile, rng
        )
        looks.append(look(np.asarray(draw.draw(portrait)), None))
    return looks


def read_set(folder: Path, detector: Detector, writing: str = "") -> list[Look]:
    """The pictures of a folder, as the page takes them; with ``writing`` on them somewhere."""
    rng, found = random.Random(folder.name), []
    for path in sorted(path for path in folder.iterdir() if path.suffix.lower() in ENDINGS):
        with Image.open(path) as file:
            image = file.convert("RGB")
        image.thumbnail((480, 480))
        if writing:
            font = ImageFont.load_default(rng.randint(image.height // 12, image.height // 6))
            across = max(1, image.width - int(font.getlength(writing)))
            place = rng.randrange(across), rng.randrange(int(0.8 * image.height))
            ImageDraw.Draw(image).text(place, writing, "white", font, stroke_width=1, stroke_fill="black")
        pixels = np.asarray(image)
        faces = detector.find(pixels)
        found.append((pixels, faces[0] if faces else None))
    has_faces = sum(face is not None for _, face in found) >= 0.6 * len(found)
    return [look(pixels, face if has_faces else None) for pixels, face in found]


def learn(sets: Sequence[list[Look]]) -> None:
    """Write the directions in which left and right change within the pictures of one person."""
    within = [differences(looks) - differences(looks).mean(axis=0) for looks in sets]
    _, _, directions = np.linalg.svd(np.concatenate(within), full_matrices=False)
    if POSES.exists():  # a direction and its opposite are the same; `yaw` counts on the sign of the first
        directions[0] *= np.sign(directions[0] @ np.load(POSES)[0].astype(np.float32))
    np.save(POSES, directions[:LEARNED].astype(np.float16), allow_pickle=False)
    print(f"{POSES}: {LEARNED} of {len(directions)} directions")


COUNTS = ("draws", "unclear", "two", "named", "right", "mirrored", "answered")


def count(looks: list[Look], share: float, draws: int, rng: np.random.Generator) -> npt.NDArray[np.float64]:
    """Sums over draws of one subject, in the order of `COUNTS`."""
    total = np.zeros(len(COUNTS))
    for _ in range(draws):
        mirrored = max(round(share * len(looks)), 1) if share else 0
        truth = set(rng.choice(len(looks), mirrored, replace=False).tolist())
        found = compare([one.mirror() if i in truth else one for i, one in enumerate(looks)])
        answers = found.is_clear and not found.in_two_groups
        named = found.suspects
        total += (
            1,
            not found.is_clear,
            found.is_clear and found.in_two_groups,
            len(named),
            len(truth & set(named)),
            len(truth),
            len(truth) if answers else 0,
        )
        for index in named:
            TRUE[round(20 * found.confidences[index]) / 20].append(index in truth)
    return total


TRUE: dict[float, list[bool]] = defaultdict(list)
"""Whether pictures that were named were mirrored, by the confidence that was shown."""


def ratio(sums: npt.NDArray[np.float64], part: str, whole: str) -> npt.NDArray[np.float64]:
    over = sums[..., COUNTS.index(whole)]
    shares: npt.NDArray[np.float64] = np.divide(
        sums[..., COUNTS.index(part)], over, out=np.full(over.shape, np.nan), where=over > 0
    )
    return shares


def measure(sets: Sequence[list[Look]], shares: Sequence[float], draws: int, seed: int = 0) -> None:
    """Print a line for each share of mirrored pictures, and how true the confidences are."""
    rng = np.random.default_rng(seed)
    for share in shares:
        counted = np.array([count(looks, share, draws if share else 1, rng) for looks in sets])
        total = counted.sum(axis=0)
        again = counted[rng.integers(len(sets), size=(2000, len(sets)))].sum(axis=1)
        words = [f"{share:4.0%} mirrored  {int(total[0]):5} draws"]
        words += [f"{int(total[1])} too symmetric, {int(total[2])} two groups"]
        if share:
            for name, part, whole in (
                ("precision", "right", "named"),
                ("recall", "right", "mirrored"),
                ("recall where it answered", "right", "answered"),
            ):
                shown = ratio(again, part, whole)
                low, high = (
                    np.percentile(shown[~np.isnan(shown)], (2.5, 97.5))
                    if not np.isnan(shown).all()
                    else (0, 1)
                )
                words.append(f"{name} {float(ratio(total, part, whole)):.2f} ({low:.2f} to {high:.2f})")
        else:
            words.append(f"{int(total[3])} pictures named wrongly")
        print("  ".join(words), flush=True)
    print(
        "named at: "
        + ", ".join(f"{sure:.2f}: {np.mean(TRUE[sure]):.2f} of {len(TRUE[sure])}" for sure in sorted(TRUE))
    )


def main() -> None:
    """Measure what the arguments ask for."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sets", type=Path)
    parser.add_argument("--only", choices=("odd", "even"))
    parser.add_argument("--chance", action="store_true")
    parser.add_argument("--writing", action="store_true")
    parser.add_argument("--learn", action="store_true")
    parser.add_argument("--draws", type=int, default=20)
    given = parser.parse_args()
    if given.sets is None:
        rng = random.Random(1)
        for size in (8, 16, 30):
            print(f"the demo's subject, {size} pictures")
            measure([demo_set(rng, size) for _ in range(6)], SHARES, given.draws)
        return
    folders = sorted(path for path in given.sets.iterdir() if path.is_dir())
    if given.only:
        numbers = {path: int("0" + re.sub(r".*?(\d*)$", r"\1", path.name)) for path in folders}
        folders = [path for path in folders if numbers[path] % 2 == (given.only == "odd")]
    sets = [read_set(folder, Detector(), "Summer 2024" * given.writing) for folder in folders]
    if given.learn:
        learn(sets)
        return
    if given.chance:
        mixed = np.random.default_rng(0)
        most = min(map(len, sets))
        sets = [[one[int(mixed.integers(len(one)))] for one in sets][: most * 2] for _ in range(len(sets))]
    print(f"{given.sets.name}: {len(sets)} sets of {min(map(len, sets))} to {max(map(len, sets))} pictures")
    measure(sets, SHARES, given.draws)


if __name__ == "__main__":
    main()
