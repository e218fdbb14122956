"""How often each check of the Dataset tab finds the flaw that it is for, and how often it finds one that is not there.

    python -m tests.benchmarks.doctor PHOTOS [--people FOLDER] [--rounds 4]

PHOTOS holds some dozen photographs of different things, such as those of scikit-image (``skimage/data``) and of
Debian's opencv-doc. In each round twelve of them are taken, four get the flaw, and the set is checked as the page
checks it. A hit is a flawed picture that is named; a false alarm one of the others. PEOPLE has a folder for
each person, one face in each picture, such as the AT&T (ORL) database of faces.
"""

from __future__ import annotations

import argparse
import io
import random
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

from PIL import Image, ImageDraw, ImageFilter, ImageFont

from trainer.pictures.doctor import Finding, examine
from trainer.pictures.faces import Detector
from trainer.pictures.measures import measure_all

ENDINGS = (".png", ".jpg", ".jpeg", ".pgm", ".webp")
EDGE_PX = 768
TAKEN, FLAWED = 12, 4
Flaw = Callable[[Image.Image, random.Random], Image.Image]
SHAPE = (4, 3)


def blurred(radius: float) -> Flaw:
    return lambda image, _: image.filter(ImageFilter.GaussianBlur(radius * image.width / 640))


def framed(image: Image.Image, rng: random.Random) -> Image.Image:
    """Letterboxed, or in a frame, in black, white or a colour."""
    share, colour = rng.uniform(0.04, 0.15), rng.choice(["black", "white", "navy"])
    across = round(share * image.width) * rng.randint(0, 1)
    found = Image.new("RGB", image.size, colour)
    down = round(share * image.height)
    found.paste(image.resize((image.width - 2 * across, image.height - 2 * down)), (across, down))
    return found


def written(image: Image.Image, rng: random.Random) -> Image.Image:
    """A line of writing along the upper or lower edge."""
    size = rng.randint(image.height // 30, image.height // 14)
    text = rng.choice(
        ["© Jane Smith 2024", "www.stockphotos.example", "12.05.2019 14:33", "Best of the year"]
    )
    y = size // 2 if rng.random() < 0.5 else image.height - 2 * size
    found = image.copy()
    pen, font = ImageDraw.Draw(found), ImageFont.load_default(size)
    pen.text(
        (image.width // 12, y),
        text,
        rng.choice(["white", "yellow"]),
        font,
        stroke_width=1,
        stroke_fill="black",
    )
    return found


def stamped(place: str, opacity: int) -> Flaw:
    """A logo at one place."""

    def act(image: Image.Image, _: random.Random) -> Image.Image:
        size = image.height // 12
        font, layer = ImageFont.load_default(size), Image.new("RGBA", image.size)
        x = {"l": 20.0, "r": image.width - 20 - font.getlength("PhotoStock"), "c": image.width * 0.3}[
            place[1]
        ]
        y = {"t": 16.0, "b": image.height - 1.6 * size, "m": image.height * 0.45}[place[0]]
        pen = ImageDraw.Draw(layer)
        colours = ((255, 255, 255, opacity), (0, 0, 0, opacity))
        pen.text((x, y), "PhotoStock", colours[0], font, stroke_width=2, stroke_fill=colours[1])
        return Image.alpha_composite(image.convert("RGBA"), layer).convert("RGB")

    return act


def again(image: Image.Image, rng: random.Random) -> Image.Image:
    """Smaller, a little lighter, compressed."""
    small = image.resize((round(0.7 * image.width), round(0.7 * image.height)))
    small = small.point([min(255, value + rng.randint(4, 8)) for value in range(256)] * 3)
    file = io.BytesIO()
    small.save(file, "JPEG", quality=60)
    return Image.open(file).convert("RGB")


def trimmed(image: Image.Image, rng: random.Random) -> Image.Image:
    """The same without 3 % at its edges."""
    left, top = round(0.03 * image.width), round(0.03 * image.height)
    return image.crop((left, top, image.width - left, image.height - top))


def moved(image: Image.Image, rng: random.Random) -> Image.Image:
    """The same head, elsewhere, in another light."""
    scale = rng.uniform(1.0, 1.15)
    large = image.resize((round(scale * image.width), round(scale * image.height)))
    left, top = rng.randint(0, large.width - image.width), rng.randint(0, large.height - image.height)
    found = large.crop((left, top, left + image.width, top + image.height))
    gain, shift = rng.uniform(0.7, 1.2), rng.randint(-20, 30)
    return found.point([int(min(255, max(0, gain * value + shift))) for value in range(256)] * 3)


def load(path: Path) -> Image.Image:
    """One shape and size for all, so that only the flaw differs."""
    with Image.open(path) as file:
        image = file.convert("RGB")
    width, height = image.size
    wide = min(width, height * SHAPE[0] // SHAPE[1])
    tall = wide * SHAPE[1] // SHAPE[0]
    left, top = (width - wide) // 2, (height - tall) // 2
    return image.crop((left, top, left + wide, top + tall)).resize((EDGE_PX, EDGE_PX * SHAPE[1] // SHAPE[0]))


def check(folder: Path, person: bool = False) -> list[Finding]:
    """What the page finds in a folder."""
    found = measure_all(sorted(folder.iterdir()), Detector())
    return examine({path.name: one for path, one in found.items()}, person=person)


class Table:
    """Hits and false alarms, by kind of flaw."""

    def __init__(self) -> None:
        self.rows: dict[str, list[int]] = {}

    def add(self, name: str, hits: int, flawed: int, alarms: int, clean: int) -> None:
        row = self.rows.setdefault(name, [0, 0, 0, 0])
        self.rows[name] = [one + more for one, more in zip(row, (hits, flawed, alarms, clean), strict=True)]

    def show(self) -> None:
        print("| flaw | found | false alarms |\n| --- | --- | --- |")
        for name, (hits, flawed, alarms, clean) in self.rows.items():
            false = f"{alarms} of {clean}" if clean else ""
            print(f"| {name} | {hits} of {flawed} | {false} |")


def save(images: Sequence[Image.Image], folder: Path) -> list[str]:
    names = [f"{index:02}.jpg" for index in range(len(images))]
    for name, image in zip(names, images, strict=True):
        image.save(folder / name, quality=92)
    return names


def photographs(paths: Sequence[Path], rounds: int, table: Table) -> None:
    """Flaws of single pictures, and of a set."""
    flaws: list[tuple[str, str, Flaw]] = [
        ("blur, radius 2 px at 640", "blur", blurred(2)),
        ("blur, radius 4 px", "blur", blurred(4)),
        ("bars or a frame", "bars", framed),
        ("a line of writing at the edge", "text", written),
    ]
    pairs: list[tuple[str, Flaw]] = [
        ("smaller, lighter, compressed again", again),
        ("cut by 3 % on each side", trimmed),
        ("mirrored", lambda image, _: image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)),
    ]
    for turn in range(rounds):
        rng = random.Random(turn)
        images = [load(path) for path in rng.sample(list(paths), TAKEN)]
        for title, kind, flaw in flaws:
            made = [flaw(image, rng) if index < FLAWED else image for index, image in enumerate(images)]
            hits, alarms = named(made, kind)
            table.add(title, hits, FLAWED, alarms, TAKEN - FLAWED)
        for title, flaw in pairs:
            hits, alarms = named(
                [*images, *(flaw(image, rng) for image in images[:FLAWED])], "near", paired=True
            )
            table.add(f"nearly the same: {title}", hits, FLAWED, alarms, TAKEN - FLAWED)
        for place, opacity in (("br", 255), ("tl", 130), ("mc", 130)):
            for share, having in (("all", TAKEN), ("eight", 8)):
                mark = stamped(place, opacity)
                made = [mark(image, rng) if index < having else image for index, image in enumerate(images)]
                hits, alarms = named(made, "logo", flawed=having)
                word = "opaque" if opacity == 255 else "half transparent"
                table.add(f"the same {word} logo on {share} of {TAKEN}", hits, having, alarms, TAKEN - having)
        hits, alarms = named(images, "logo", flawed=0)
        table.add("no logo", hits, 0, alarms, TAKEN)
        with tempfile.TemporaryDirectory() as work:
            names = save(images, Path(work))
            for name in names[:FLAWED]:
                data = (Path(work) / name).read_bytes()
                (Path(work) / name).write_bytes(data[: len(data) // 2])
            (Path(work) / "copy.jpg").write_bytes((Path(work) / names[-1]).read_bytes())
            found = check(Path(work))
        broken = {finding.names[0] for finding in found if finding.kind == "broken"}
        table.add("cut off in the middle", len(broken & set(names[:FLAWED])), FLAWED, len(broken) - FLAWED, 9)
        same = [set(finding.names) for finding in found if finding.kind == "same"]
        table.add("the same file twice", int({"copy.jpg", names[-1]} in same), 1, max(0, len(same) - 1), 8)
        kinds = {finding.kind for finding in found}
        table.add("backgrounds that differ", 0, 0, int("background" in kinds), 1)


def named(
    images: Sequence[Image.Image], kind: str, *, flawed: int = FLAWED, paired: bool = False
) -> tuple[int, int]:
    """Flawed pictures that a kind of finding names, and others; with ``paired`` pairs of first and last ones."""
    with tempfile.TemporaryDirectory() as work:
        names = save(images, Path(work))
        found = [finding.names for finding in check(Path(work)) if finding.kind == kind]
    if paired:
        wanted = [{names[index], names[TAKEN + index]} for index in range(FLAWED)]
        hits = sum(any(pair <= set(group) for group in found) for pair in wanted)
        others = {name for group in found for name in group} - {name for pair in wanted for name in pair}
        return hits, len(others)
    said = {name for group in found for name in group}
    return len(said & set(names[:flawed])), len(said - set(names[:flawed]))


def people(folders: Sequence[Path], photos: Sequence[Path], rounds: int, table: Table) -> None:
    """What is said about faces."""
    sets = [
        [Image.open(path).convert("RGB").resize((552, 672)) for path in sorted(folder.iterdir())[:10]]
        for folder in folders
    ]
    for turn, own in enumerate(sets):
        rng = random.Random(turn)
        other = sets[(turn + 1) % len(sets)]
        pair = Image.new("RGB", (1104, 672))
        pair.paste(own[0], (0, 0))
        pair.paste(other[0], (552, 0))
        with tempfile.TemporaryDirectory() as work:
            names = save([*own[1:], pair, load(rng.choice(list(photos)))], Path(work))
            found = check(Path(work), person=True)
        several = {finding.names[0] for finding in found if finding.kind == "faces"}
        missed = {finding.names[0] for finding in found if finding.kind == "noface" and finding.names}
        table.add("two people in one picture", int(names[9] in several), 1, len(several - {names[9]}), 9)
        table.add("no face in a picture", int(names[10] in missed), 1, len(missed - {names[10]}), 9)
        kinds = {finding.kind for finding in found}
        table.add("one person before one wall: backgrounds alike", int("background" in kinds), 1, 0, 0)
        with tempfile.TemporaryDirectory() as work:
            save([moved(own[0], rng) for _ in range(10)], Path(work))
            straight = {finding.kind for finding in check(Path(work), person=True)}
        table.add("one way of looking", int("pose" in straight), 1, int("pose" in kinds), 1)
        if turn < rounds:
            with tempfile.TemporaryDirectory() as work:
                save([load(path) for path in rng.sample(list(photos), TAKEN)], Path(work))
                judged = any(
                    finding.kind in ("faces", "pose", "clothes") for finding in check(Path(work), person=True)
                )
            table.add("things taken for people", 0, 0, int(judged), 1)


def main() -> None:
    """Print the table of the README."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("photos", type=Path)
    parser.add_argument("--people", type=Path)
    parser.add_argument("--rounds", type=int, default=4)
    given = parser.parse_args()
    photos = sorted(path for path in given.photos.iterdir() if path.suffix.lower() in ENDINGS)
    table = Table()
    photographs(photos, given.rounds, table)
    if given.people:
        folders = sorted(path for path in given.people.iterdir() if path.is_dir())
        people(folders, photos, given.rounds, table)
    table.show()


if __name__ == "__main__":
    main()
