"""What a person changed about the pictures of a folder, without touching the files.

Edits stand in ``<folder>/.kiln/edits.json`` and are applied by whoever reads a picture: the page and the
trainer alike, so that what is seen is what is trained. The order is crop, quarter turns, mirroring; the
crop counts in pixels of the upright file, so that turning and mirroring leave it as it is.

Axes: H/W height and width in pixels, C channels.
"""

from __future__ import annotations

import json
import shutil
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from trainer.errors import DatasetError
from trainer.files import atomic_path, atomic_write

__all__ = [
    "FOLDER",
    "NONE",
    "Box",
    "Edit",
    "Edits",
    "change",
    "crop_seen",
    "flip",
    "load",
    "redo",
    "summary",
    "turn",
    "undo",
    "write_copies",
]

Pixels = npt.NDArray[np.uint8]
Size = tuple[int, int]
Box = tuple[int, int, int, int]
"""Left, top, right, bottom in pixels; right and bottom are the first ones outside."""

FOLDER = ".kiln"
"""Folder beside the pictures for what this program remembers of them; sd-scripts passes over it."""
FILE = "edits.json"
FORMAT = 1
KEPT = 200
"""Changes that can be undone."""
SMALLEST_PX = 16
"""Shortest edge that a crop may leave."""

_LOCK = threading.RLock()


@dataclass(frozen=True)
class Edit:
    """What is done to one picture."""

    excluded: bool = False
    crop: Box | None = None
    """In pixels of the upright file."""
    of: Size | None = None
    """Upright (width, height) of the file that the crop was drawn on."""
    turns: int = 0
    """Clockwise quarter turns, 0 to 3, after cropping."""
    flipped: bool = False
    """Mirrored left to right, after turning."""

    def fits(self, size: Size) -> bool:
        """Whether the crop was drawn on a file of this upright size."""
        return self.crop is None or self.of == size

    @property
    def changes_pixels(self) -> bool:
        """Whether anything but leaving the picture out is asked for."""
        return self.crop is not None or self.turns != 0 or self.flipped

    def size(self, size: Size) -> Size:
        """(width, height) after the edit, of a file of upright ``size``."""
        width, height = size
        if self.crop is not None and self.fits(size):
            width, height = self.crop[2] - self.crop[0], self.crop[3] - self.crop[1]
        return (height, width) if self.turns % 2 else (width, height)

    def apply(self, pixels_HWC: Pixels) -> Pixels:
        """The edited pixels of an upright picture, or of its mask."""
        height, width = pixels_HWC.shape[:2]
        if self.crop is not None and self.fits((width, height)):
            left, top, right, bottom = self.crop
            pixels_HWC = pixels_HWC[top:bottom, left:right]
        if self.turns:
            pixels_HWC = np.rot90(pixels_HWC, -self.turns)
        if self.flipped:
            pixels_HWC = pixels_HWC[:, ::-1]
        return np.ascontiguousarray(pixels_HWC) if self.changes_pixels else pixels_HWC

    def seen(self, box: Box, size: Size) -> Box:
        """Where a box of the cropped file comes to lie once turned and mirrored.

        Args:
            box: In pixels of the cropped picture, before turning.
            size: Upright size of the file.
        """
        width, height = replace(self, turns=0, flipped=False).size(size)
        for _ in range(self.turns):
            left, top, right, bottom = box
            box = height - bottom, left, height - top, right
            width, height = height, width
        if self.flipped:
            box = width - box[2], box[1], width - box[0], box[3]
        return box

    def unseen(self, box: Box, size: Size) -> Box:
        """The inverse of `seen`: a box on the edited picture, in pixels of the cropped file."""
        width, height = self.size(size)
        if self.flipped:
            box = width - box[2], box[1], width - box[0], box[3]
        for _ in range(self.turns):
            left, top, right, bottom = box
            box = top, width - right, bottom, width - left
            width, height = height, width
        return box

    def words(self) -> str:
        """What it does, in a few words."""
        parts = ["left out"] if self.excluded else []
        parts += ["cropped"] if self.crop else []
        parts += [f"turned {self.turns * 90}°"] if self.turns else []
        parts += ["mirrored"] if self.flipped else []
        return ", ".join(parts)

    def key(self) -> list[Any]:
        """What a cache of the edited pixels hangs on, as plain data."""
        return [list(self.crop) if self.crop else None, self.turns, self.flipped]

    def to_json(self) -> dict[str, Any]:
        """Plain data; defaults are left out."""
        found: dict[str, Any] = {}
        if self.excluded:
            found["excluded"] = True
        if self.crop is not None and self.of is not None:
            found["crop"], found["of"] = list(self.crop), list(self.of)
        if self.turns:
            found["turns"] = self.turns
        if self.flipped:
            found["flipped"] = True
        return found

    @classmethod
    def from_json(cls, data: Any) -> Edit:
        """Read what `to_json` gave. Raises ValueError on anything else."""
        if not isinstance(data, dict):
            raise ValueError("not an object")
        crop, of, turns = data.get("crop"), data.get("of"), data.get("turns", 0)
        if crop is not None:
            crop, of = tuple(crop), tuple(of or ())
            if len(crop) != 4 or len(of) != 2 or not all(type(item) is int for item in (*crop, *of)):
                raise ValueError("the crop is not four whole numbers")
            if not (0 <= crop[0] < crop[2] <= of[0] and 0 <= crop[1] < crop[3] <= of[1]):
                raise ValueError("the crop leaves the picture")
        if turns not in (0, 1, 2, 3):
            raise ValueError("turns is not 0 to 3")
        return cls(
            bool(data.get("excluded", False)),
            crop,
            of if crop else None,
            int(turns),
            bool(data.get("flipped", False)),
        )


NONE = Edit()


@dataclass(frozen=True)
class _Step:
    """One change that can be taken back: what the pictures had before, and what they got."""

    words: str
    time: float
    before: Mapping[str, Edit]
    after: Mapping[str, Edit]

    def to_json(self) -> dict[str, Any]:
        return {
            "words": self.words,
            "time": self.time,
            "before": {name: edit.to_json() for name, edit in self.before.items()},
            "after": {name: edit.to_json() for name, edit in self.after.items()},
        }

    @classmethod
    def from_json(cls, data: Any) -> _Step:
        return cls(
            str(data["words"]),
            float(data["time"]),
            {str(name): Edit.from_json(edit) for name, edit in data["before"].items()},
            {str(name): Edit.from_json(edit) for name, edit in data["after"].items()},
        )


@dataclass(frozen=True)
class Edits:
    """The edits of one folder, by file name, and the changes that led to them."""

    pictures: Mapping[str, Edit]
    done: tuple[_Step, ...] = ()
    undone: tuple[_Step, ...] = ()
    """Changes that were taken back, the last one first to come again."""

    def of(self, name: str) -> Edit:
        """The edit of a picture; `NONE` where there is none."""
        return self.pictures.get(name, NONE)


def _file(folder: Path) -> Path:
    return folder / FOLDER / FILE


def load(folder: Path) -> Edits:
    """The edits of a folder's pictures; none where nobody made any.

    Raises:
        DatasetError: The file is damaged: training without what a person asked for would be wrong.
    """
    path = _file(folder)
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return Edits({})
    except (OSError, UnicodeDecodeError) as error:
        raise DatasetError(f"the edits of {folder} cannot be read from {path} ({error})") from error
    try:
        data = json.loads(text)
        if data.get("format") != FORMAT:
            raise ValueError(f"format {data.get('format')!r} is not {FORMAT}")
        return Edits(
            {str(name): Edit.from_json(edit) for name, edit in data["pictures"].items()},
            tuple(_Step.from_json(step) for step in data.get("done", [])),
            tuple(_Step.from_json(step) for step in data.get("undone", [])),
        )
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise DatasetError(
            f"the edits of {folder} in {path} are damaged ({error}): remove that file to use the pictures as they are"
        ) from error


def _save(folder: Path, edits: Edits) -> None:
    data = {
        "format": FORMAT,
        "pictures": {name: edit.to_json() for name, edit in sorted(edits.pictures.items()) if edit != NONE},
        "done": [step.to_json() for step in edits.done[-KEPT:]],
        "undone": [step.to_json() for step in edits.undone[:KEPT]],
    }
    try:
        atomic_write(_file(folder), json.dumps(data, indent=1))
    except OSError as error:
        raise DatasetError(
            f"the edits cannot be saved to {_file(folder)} ({error.strerror or error}): make the folder writable"
        ) from error


def change(folder: Path, names: Iterable[str], edit: Callable[[str, Edit], Edit], words: str) -> Edits:
    """Change the edits of some pictures, as one step that `undo` takes back.

    Args:
        folder: Where the pictures lie.
        names: Their file names.
        edit: Gives the new edit from a name and the old one.
        words: What was done, for the list of changes.

    Raises:
        DatasetError: A name that is no picture there, or edits that cannot be read or written.
    """
    with _LOCK:
        edits = load(folder)
        before: dict[str, Edit] = {}
        after: dict[str, Edit] = {}
        for name in names:
            if not name or Path(name).name != name or not (folder / name).is_file():
                raise DatasetError(f"there is no picture {name!r} in {folder}: look at the folder again")
            old = edits.of(name)
            new = edit(name, old)
            if new != old:
                before[name], after[name] = old, new
        if not after:
            return edits
        step = _Step(words, time.time(), before, after)
        changed = Edits({**edits.pictures, **after}, (*edits.done, step)[-KEPT:], ())
        _save(folder, changed)
        return changed


def undo(folder: Path) -> str:
    """Take the last change of a folder back; what it was, or "" where there is none."""
    with _LOCK:
        edits = load(folder)
        if not edits.done:
            return ""
        step = edits.done[-1]
        _save(
            folder,
            Edits({**edits.pictures, **step.before}, edits.done[:-1], (step, *edits.undone)),
        )
        return step.words


def redo(folder: Path) -> str:
    """Make the change again that was taken back last; what it was, or ""."""
    with _LOCK:
        edits = load(folder)
        if not edits.undone:
            return ""
        step = edits.undone[0]
        _save(
            folder,
            Edits({**edits.pictures, **step.after}, (*edits.done, step), edits.undone[1:]),
        )
        return step.words


def turn(edit: Edit, quarters: int) -> Edit:
    """Turn what is seen clockwise by quarters; a mirrored picture turns the other way underneath."""
    return replace(edit, turns=(edit.turns + (-quarters if edit.flipped else quarters)) % 4)


def flip(edit: Edit) -> Edit:
    """Mirror what is seen, left to right."""
    return replace(edit, flipped=not edit.flipped)


def crop_seen(edit: Edit, box: Box | None, size: Size) -> Edit:
    """Crop to a box drawn on what is seen; None takes the crop away.

    Args:
        edit: What is done to the picture so far.
        box: In pixels of the edited picture.
        size: Upright size of the file.

    Raises:
        DatasetError: The box leaves the picture or less than 16 pixels of it.
    """
    if box is None:
        return replace(edit, crop=None, of=None)
    if not edit.fits(size):
        edit = replace(edit, crop=None, of=None)
    width, height = edit.size(size)
    left, top = max(0, box[0]), max(0, box[1])
    right, bottom = min(width, box[2]), min(height, box[3])
    if right - left < SMALLEST_PX or bottom - top < SMALLEST_PX:
        raise DatasetError(
            f"the crop would leave {max(0, right - left)} x {max(0, bottom - top)} pixels: draw a larger one"
        )
    inner = edit.unseen((left, top, right, bottom), size)
    start = edit.crop[:2] if edit.crop else (0, 0)
    crop = inner[0] + start[0], inner[1] + start[1], inner[2] + start[0], inner[3] + start[1]
    if crop == (0, 0, *size):
        return replace(edit, crop=None, of=None)
    return replace(edit, crop=crop, of=size)


def summary(edits: Sequence[Edit]) -> str:
    """How many pictures are edited and how, such as "3 cropped, 1 mirrored"; "" for none."""
    counts = (
        (sum(edit.crop is not None for edit in edits), "cropped"),
        (sum(edit.turns != 0 for edit in edits), "turned"),
        (sum(edit.flipped for edit in edits), "mirrored"),
    )
    return ", ".join(f"{count} {word}" for count, word in counts if count)


def write_copies(
    folder: Path, target: Path, advance: Callable[[int, int], None] | None = None
) -> tuple[int, int]:
    """Write the pictures of a folder as they are after all edits into another one, captions beside them.

    What is not edited is copied as it is; edited pictures become PNG, or JPEG at quality 95 where the
    file was one. Pictures that are left out are not written.

    Args:
        folder: Where the pictures lie.
        target: A folder that does not exist yet, or is empty.
        advance: Called with pictures done and in all.

    Returns:
        Pictures written, and how many of them edited.

    Raises:
        DatasetError: The target is not empty, or a picture cannot be read or written.
    """
    from PIL import Image

    from trainer.data.folder import list_pictures
    from trainer.data.images import inspect, read_rgb, read_rgba

    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise DatasetError(f"{target} is not empty: choose a new folder for the copies")
    edits = load(folder)
    paths = [path for path in list_pictures(folder) if not edits.of(path.name).excluded]
    edited = 0
    try:
        target.mkdir(parents=True, exist_ok=True)
        for index, path in enumerate(paths):
            edit = edits.of(path.name)
            if edit.changes_pixels:
                look = inspect(path)
                pixels = edit.apply(read_rgba(path) if look.transparent else read_rgb(path))
                is_jpeg = look.format in ("JPEG", "MPO")
                name = path.name if is_jpeg else f"{path.stem}.png"
                if name != path.name and (folder / name).exists():
                    name = f"{path.name}.png"  # beside another picture of its stem
                written = target / name
                with atomic_path(written) as temporary:
                    options: dict[str, Any] = {"quality": 95, "subsampling": 0} if is_jpeg else {}
                    Image.fromarray(pixels).save(temporary, "JPEG" if is_jpeg else "PNG", **options)
                edited += 1
            else:
                shutil.copy2(path, target / path.name)
            for beside in sorted(folder.glob(f"{_escaped(path.stem)}.*")):
                if beside.suffix.lower() in (".txt", ".caption", ".cap", ".txt2"):
                    shutil.copy2(beside, target / beside.name)
            if advance is not None:
                advance(index + 1, len(paths))
    except OSError as error:
        raise DatasetError(
            f"the copies cannot be written to {target} ({error.strerror or error}): free some space, or choose "
            "another folder"
        ) from error
    return len(paths), edited


def _escaped(text: str) -> str:
    """A file name's stem for `Path.glob`."""
    return "".join(f"[{letter}]" if letter in "[]*?" else letter for letter in text)
