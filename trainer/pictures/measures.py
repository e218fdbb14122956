"""What is measured of each picture, from one small decode, and remembered for as long as the file stays.

Axes: H/W height and width in pixels, C channels (RGB).
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt

from trainer.data.images import read_small
from trainer.errors import DatasetError, StopTraining
from trainer.files import atomic_write
from trainer.pictures import marks, orientation
from trainer.pictures.faces import Detector, Face

__all__ = ["EDGE_PX", "Measure", "measure", "measure_all"]

Pixels = npt.NDArray[np.uint8]
Floats = npt.NDArray[np.float32]

EDGE_PX = 640
"""Longest edge of what is looked at: about what training sees."""
VERSION = 3
"""Of these measures: older ones are made anew."""

FLAT, NO_EDGES = 8.0, 9.0
"""Below the one steepness nothing is an edge, and the picture not blurred: the other."""
BAR_SHARE = 0.02
"""Thinnest bar that counts, as a share of the edge."""
BAND_SHARE = 0.2
"""How far from the edge writing is looked for."""


@dataclass(frozen=True)
class Measure:
    """One picture's figures. Boxes are fractions of width and height: left, top, right, bottom."""

    size: tuple[int, int] = (0, 0)
    """Upright (width, height) of the file."""
    sha256: str = ""
    hashes: tuple[int, int] = (0, 0)
    """Difference hash and DCT hash, 64 bits each."""
    mirrored_hashes: tuple[int, int] = (0, 0)
    tiny: str = ""
    """The picture in 16 x 16 RGB pixels, as hexadecimal digits: hashes only say where to look closer."""
    sharpness: float = 0.0
    """How steep the edges are compared with blurred ones: 2 or more where sharp, towards 1 where blurred."""
    bars: tuple[float, float, float, float] = (0.0, 0.0, 0.0, 0.0)
    """Thickness of flat bars at the left, top, right and bottom."""
    texts: tuple[tuple[float, float, float, float], ...] = ()
    """Boxes near the edges that look like writing."""
    faces: tuple[Face, ...] = ()
    background: tuple[float, ...] = ()
    """Colours along the left, top and right edges (CIELAB)."""
    clothes: tuple[float, ...] = ()
    """Colour below the face (CIELAB); empty where there is no face or nothing below it."""
    edges: str = ""
    """Where its edges are (`trainer.pictures.marks`): a logo's are at the same place in many pictures."""
    error: str = ""
    """Why it cannot be read."""

    @property
    def face(self) -> Face | None:
        """The largest face."""
        return self.faces[0] if self.faces else None


def measure(path: Path, detector: Detector) -> tuple[Measure, Pixels | None]:
    """Measure one picture; also the small pixels that it was measured on, for a thumbnail."""
    try:
        with path.open("rb") as file:
            sha256 = hashlib.file_digest(file, "sha256").hexdigest()
        pixels, size = read_small(path, EDGE_PX)
    except DatasetError as error:
        return Measure(error=str(error).partition("cannot be read: ")[2] or str(error)), None
    except OSError as error:
        return Measure(error=f"{error.strerror or error}: check that it exists and may be read"), None
    grey = np.asarray(cv2.cvtColor(pixels, cv2.COLOR_RGB2GRAY), dtype=np.uint8)
    faces = tuple(
        face if face.yaw is not None else replace(face, yaw=round(orientation.yaw(pixels, face), 2))
        for face in detector.find(pixels)
    )
    bars = _bars(grey)
    return (
        Measure(
            size=size,
            sha256=sha256,
            hashes=_hashes(grey),
            mirrored_hashes=_hashes(np.ascontiguousarray(grey[:, ::-1])),
            tiny=np.asarray(cv2.resize(pixels, (16, 16), interpolation=cv2.INTER_AREA)).tobytes().hex(),
            sharpness=_sharpness(grey),
            bars=bars,
            texts=tuple(_texts(grey)) if not any(bars) else (),
            faces=faces,
            background=_background(pixels),
            clothes=_clothes(pixels, faces),
            edges=marks.edges(grey),
        ),
        pixels,
    )


def _hashes(grey_HW: Pixels) -> tuple[int, int]:
    """Difference hash (signs of steps across) and DCT hash (signs of the lowest frequencies)."""
    small = cv2.resize(grey_HW, (9, 8), interpolation=cv2.INTER_AREA).astype(np.int16)
    steps = small[:, 1:] > small[:, :-1]
    square = cv2.resize(grey_HW, (32, 32), interpolation=cv2.INTER_AREA).astype(np.float32)
    low = np.asarray(cv2.dct(square))[:8, :8].ravel()
    signs = low > np.median(low[1:])
    return _bits(steps), _bits(signs)


def _bits(flags: npt.NDArray[np.bool_]) -> int:
    return int.from_bytes(np.packbits(flags.ravel()).tobytes(), "big")


def _sharpness(grey_HW: Pixels) -> float:
    """Steepness of the steepest edges, relative to that after a blur of 2 px.

    Sharp edges lose more than half of it and edges that were blurred before lose little, whether the picture
    has much fine detail or hardly any.
    """

    def steepest(values_HW: Floats) -> float:
        across, down = cv2.Sobel(values_HW, cv2.CV_32F, 1, 0), cv2.Sobel(values_HW, cv2.CV_32F, 0, 1)
        return float(np.percentile(cv2.magnitude(across, down).ravel()[::3], 99.5))

    grey = grey_HW.astype(np.float32)
    before = steepest(grey)
    after = steepest(np.asarray(cv2.GaussianBlur(grey, (0, 0), 2), dtype=np.float32))
    return before / after if after > FLAT else NO_EDGES


def _bars(grey_HW: Pixels) -> tuple[float, float, float, float]:
    """Flat bars that end in a straight line, as letterboxing and frames do and a plain wall does not."""

    def thickness(rows_HW: Pixels) -> float:
        values = rows_HW.astype(np.float32)
        first = float(values[0].mean())
        flat = (values.std(axis=1) < 5) & (np.abs(values.mean(axis=1) - first) < 6)
        count = int(np.argmin(flat)) if not flat.all() else 0
        if count < max(3, BAR_SHARE * len(values)) or count > 0.45 * len(values):
            return 0.0
        after = values[min(count + 1, len(values) - 1)]
        return count / len(values) if float((np.abs(after - first) > 18).mean()) > 0.5 else 0.0

    left, right = thickness(grey_HW.T), thickness(grey_HW[:, ::-1].T)
    top, bottom = thickness(grey_HW), thickness(grey_HW[::-1])
    return left, top, right, bottom


def _texts(grey_HW: Pixels) -> list[tuple[float, float, float, float]]:
    """Lines of writing near the upper and lower edge: six or more strokes of one height, side by side.

    Strokes are what is lighter or darker than its surroundings (top hat and black hat).
    """
    height, width = grey_HW.shape
    band = max(8, int(BAND_SHARE * height))
    grey_HW = np.asarray(cv2.GaussianBlur(grey_HW, (3, 3), 0), dtype=np.uint8)  # noise has strokes, too
    found = []
    for start in (0, height - band):
        part = grey_HW[start : start + band]
        kernel = np.ones((max(9, band // 4), max(9, band // 4)), np.uint8)
        for kind in (cv2.MORPH_TOPHAT, cv2.MORPH_BLACKHAT):
            strokes = np.asarray(cv2.morphologyEx(part, kind, kernel), dtype=np.uint8)
            threshold, _ = cv2.threshold(strokes, 0, 255, cv2.THRESH_BINARY | cv2.THRESH_OTSU)
            _, _, stats, _ = cv2.connectedComponentsWithStats(
                (strokes > max(45.0, threshold)).astype(np.uint8), connectivity=8
            )
            for left, top, right, bottom in _lines(stats[1:].astype(np.int64), height):
                found.append((left / width, (start + top) / height, right / width, (start + bottom) / height))
    return found[:20]


def _lines(stats: npt.NDArray[np.int64], height: int) -> list[tuple[int, int, int, int]]:
    """Chains of neighbouring components that are alike in height and stand on one line."""
    tall, wide = stats[:, 3], stats[:, 2]
    is_letter = (tall >= max(6, 0.01 * height)) & (tall <= 0.11 * height) & (wide <= 2.2 * tall)
    is_letter &= (wide >= 0.08 * tall) & (stats[:, 4] >= 0.15 * tall * wide)
    letters = stats[is_letter]
    letters = letters[np.argsort(letters[:, 0])]
    if len(letters) > 400:  # a texture, not writing
        return []
    chains: list[list[npt.NDArray[np.int64]]] = []
    for letter in letters:
        left, top, _, tall_, _ = letter.tolist()
        for chain in chains:
            other_left, other_top, other_wide, other_tall, _ = chain[-1].tolist()
            larger = max(tall_, other_tall)
            gap = left - (other_left + other_wide)
            if (
                -0.2 * larger <= gap <= 0.9 * larger
                and min(tall_, other_tall) > 0.45 * larger
                and abs((top + tall_) - (other_top + other_tall)) < 0.3 * larger
            ):
                chain.append(letter)
                break
        else:
            chains.append([letter])
    found = []
    for chain in chains:
        rows = np.array(chain)
        if len(rows) < 6:
            continue
        heights, bottoms = rows[:, 3], rows[:, 1] + rows[:, 3]
        middle = float(np.median(heights))
        # Letters have two or three heights and share a line; leaves and stones do neither.
        aligned = float((np.abs(bottoms - np.median(bottoms)) <= max(1.5, 0.12 * middle)).mean())
        even = float((np.abs(heights - middle) <= 0.35 * middle).mean())
        if aligned >= 0.6 and even >= 0.6:
            left, right = int(rows[0, 0]), int((rows[:, 0] + rows[:, 2]).max())
            found.append((left, int(rows[:, 1].min()), right, int(bottoms.max())))
    return found


def _lab(pixels_HWC: Pixels) -> Floats:
    values = pixels_HWC.astype(np.float32) / 255
    return np.asarray(cv2.cvtColor(values, cv2.COLOR_RGB2LAB), dtype=np.float32)


def _background(pixels_HWC: Pixels) -> tuple[float, ...]:
    small = _lab(np.asarray(cv2.resize(pixels_HWC, (32, 32), interpolation=cv2.INTER_AREA), dtype=np.uint8))
    parts = (small[2:20, :5], small[:4, 6:26], small[2:20, 27:])
    return tuple(round(float(value), 1) for part in parts for value in np.median(part.reshape(-1, 3), axis=0))


def _clothes(pixels_HWC: Pixels, faces: Sequence[Face]) -> tuple[float, ...]:
    if not faces:
        return ()
    face = faces[0]
    height, width = pixels_HWC.shape[:2]
    tall = face.bottom - face.top
    top, bottom = face.bottom + 0.45 * tall, min(1.0, face.bottom + 1.3 * tall)
    if bottom - top < 0.3 * tall:
        return ()
    part = pixels_HWC[
        int(top * height) : int(bottom * height), int(face.left * width) : int(face.right * width)
    ]
    if part.size == 0:
        return ()
    return tuple(round(float(value), 1) for value in np.median(_lab(part).reshape(-1, 3), axis=0))


# ---- many pictures, and what is remembered of them -----------------------------------------------------


def _key(path: Path, detector: Detector) -> str:
    found = path.stat()
    return f"{VERSION}|{detector.name}|{found.st_mtime_ns}|{found.st_size}"


def _file_of(folder: Path, cache: Path | None) -> Path | None:
    name = hashlib.sha256(str(folder.resolve()).encode()).hexdigest()[:16]
    return cache / f"{name}.json" if cache is not None else None


@dataclass
class _Store:
    """The measures of one folder's pictures, by name."""

    file: Path | None
    entries: dict[str, dict[str, Any]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.file is None:
            return
        try:
            data = json.loads(self.file.read_text(encoding="utf-8"))
            self.entries = {name: entry for name, entry in data.items() if isinstance(entry, dict)}
        except (OSError, ValueError, AttributeError):
            self.entries = {}  # a damaged file only costs the time to measure again

    def get(self, name: str, key: str) -> Measure | None:
        entry = self.entries.get(name)
        if entry is None or entry.get("key") != key:
            return None
        try:
            values = dict(entry["values"])
            values["faces"] = tuple(Face(**face) for face in values.get("faces", []))
            values["texts"] = tuple(tuple(box) for box in values.get("texts", []))
            for name in ("size", "hashes", "mirrored_hashes", "bars", "background", "clothes"):
                values[name] = tuple(values.get(name, ()))
            return Measure(**values)
        except (KeyError, TypeError, ValueError):
            return None

    def save(self, present: set[str]) -> None:
        kept = {name: entry for name, entry in self.entries.items() if name in present}
        if self.file is None:
            return
        with contextlib.suppress(OSError):  # without room they are measured each time
            atomic_write(self.file, json.dumps(kept))


def measure_all(
    paths: Sequence[Path],
    detector: Detector,
    *,
    cache: Path | None = None,
    advance: Callable[[int, int], None] | None = None,
    stop: Callable[[], bool] = lambda: False,
    each: Callable[[Path, Pixels], None] | None = None,
) -> dict[Path, Measure]:
    """Measure pictures on all cores; what has not changed since the last time is not read again.

    Args:
        paths: The pictures.
        detector: Of faces.
        cache: Folder for what is remembered; None remembers nothing.
        advance: Called with pictures done and in all.
        stop: Asked between pictures; what was measured so far is remembered.
        each: Called in a worker thread with each picture that was read and its small pixels.

    Raises:
        StopTraining: ``stop`` said so.
    """
    stores = {folder: _Store(_file_of(folder, cache)) for folder in {path.parent for path in paths}}
    found: dict[Path, Measure] = {}
    missing: list[tuple[Path, str]] = []
    for path in paths:
        try:
            key = _key(path, detector)
        except OSError as error:
            found[path] = Measure(error=f"{error.strerror or error}: check that it exists and may be read")
            continue
        known = stores[path.parent].get(path.name, key)
        if known is None:
            missing.append((path, key))
        else:
            found[path] = known
    lock = threading.Lock()

    def work(item: tuple[Path, str]) -> None:
        if stop():
            return
        path, key = item
        result, pixels = measure(path, detector)
        if each is not None and pixels is not None:
            each(path, pixels)
        entry = {"key": key, "values": asdict(result)}
        with lock:
            found[path] = result
            stores[path.parent].entries[path.name] = entry
            if advance is not None:
                advance(len(found), len(paths))

    if advance is not None:
        advance(len(found), len(paths))
    if missing:
        threads = cv2.getNumThreads()
        cv2.setNumThreads(1)  # the pictures are spread over the cores already
        try:
            with ThreadPoolExecutor(max_workers=min(16, os.cpu_count() or 1)) as pool:
                for done in as_completed([pool.submit(work, item) for item in missing]):
                    done.result()
        finally:
            cv2.setNumThreads(threads)
            for folder, store in stores.items():
                store.save({path.name for path in paths if path.parent == folder})
    if stop():
        raise StopTraining
    return {path: found[path] for path in paths}
