"""What is wrong with a set of pictures, why it matters, and what mends it.

Works on the measures of `trainer.pictures.measures`; nothing is read here. What a check cannot know it
does not claim: faces are only counted where the detector finds them in most of the set.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import numpy.typing as npt

from trainer.pictures import marks
from trainer.pictures.measures import Measure

__all__ = ["KINDS", "LARGEST_PX", "SMALLEST_PX", "Finding", "Repair", "examine"]

SMALLEST_PX, LARGEST_PX = 256, 2048
"""The guide's bounds for the edges of a picture."""
FEWEST = 8
NEAR_BITS = 8
"""Two 64-bit hashes that differ in this many bits at most may belong to nearly the same picture ..."""
NEAR_GREY = 9.0
"""... and whose 16 x 16 pixels differ by this many of 255 levels at most, lightness set aside."""
BLURRED = 1.45
"""Sharpness below which a picture is blurred: sharp photographs have 1.5 to 3.5, blurred by 2 px of 640 1.1 to 1.45."""
SAME_COLOUR = 11.0
"""CIELAB distance within which two backgrounds or clothes count as the same."""
SAME_SHARE = 0.6
SAME_POSE = 0.55
"""Faces whose yaw differs by this at most, the outermost tenths aside, look the same way: 1 is about 45 degrees."""
SECOND_FACE = 0.45
"""A face of this share of the largest one's width is a second person, smaller ones are passers-by."""
LEAST_KEPT = 0.6
"""Share of a picture that must be left for a mark to be cut off."""
ENOUGH_FOR_VARIETY = 8
MOST_COMPARED = 500
"""Pictures whose backgrounds are compared with each other; of more, as many spread evenly."""

KINDS: Mapping[str, str] = {
    "broken": "Cannot be read",
    "same": "The same picture twice",
    "near": "Nearly the same picture",
    "small": "Too small",
    "large": "Larger than needed",
    "blur": "Blurred",
    "bars": "Bars or a frame",
    "text": "Writing near the edge",
    "logo": "The same mark on many",
    "faces": "Several faces",
    "noface": "No face found",
    "few": "Few pictures",
    "background": "Backgrounds too much alike",
    "clothes": "Clothes too much alike",
    "pose": "All look the same way",
}
"""Titles of the checks, in the order in which they are shown."""

Box = tuple[float, float, float, float]


@dataclass(frozen=True)
class Repair:
    """What a button does about a finding. Boxes are fractions of the upright file."""

    do: Literal["exclude", "crop"]
    names: tuple[str, ...]
    box: Box | None = None
    label: str = ""


@dataclass(frozen=True)
class Finding:
    """One thing, about one picture, some of them, or the set."""

    kind: str
    level: Literal["error", "warning", "note"]
    message: str
    names: tuple[str, ...] = ()
    """Pictures that it is about; empty for the set as a whole."""
    repairs: tuple[Repair, ...] = field(default=())


def examine(
    measures: Mapping[str, Measure], *, person: bool, all_names: Sequence[str] | None = None
) -> list[Finding]:
    """The findings about a set.

    Args:
        measures: By a name that is unique in the set.
        person: Whether a person is trained: then faces are counted and compared.
        all_names: Order of the pictures; that of ``measures`` if None.

    Returns:
        Findings in the order of `KINDS`.
    """
    names = list(all_names if all_names is not None else measures)
    good = {name: measures[name] for name in names if not measures[name].error}
    found = [
        Finding(
            "broken", "error", f"{name} cannot be read: {measures[name].error}", (name,), (_exclude(name),)
        )
        for name in names
        if measures[name].error
    ]
    found += _duplicates(good)
    for name, one in good.items():
        found += _sizes(name, one)
        found += _blurred(name, one)
        found += _borders(name, one)
    found += _marks(good)
    if person:
        found += _faces(good)
    if 0 < len(good) < FEWEST:
        found.append(
            Finding(
                "few",
                "warning",
                f"{len(good)} picture{'s' if len(good) > 1 else ''}: a LoRA learns best from 15 to 40 that differ, "
                "and repeats do not replace them",
            )
        )
    found += _variety(good, person)
    order = {kind: place for place, kind in enumerate(KINDS)}
    return sorted(found, key=lambda finding: order[finding.kind])


def _exclude(*names: str) -> Repair:
    return Repair("exclude", names, label="Leave out")


def _sizes(name: str, one: Measure) -> list[Finding]:
    width, height = one.size
    if min(width, height) < SMALLEST_PX:
        return [
            Finding(
                "small",
                "warning",
                f"{name} has {width} x {height} pixels: below {SMALLEST_PX} it has to be enlarged and teaches blur",
                (name,),
                (_exclude(name),),
            )
        ]
    if max(width, height) > LARGEST_PX:
        return [
            Finding(
                "large",
                "note",
                f"{name} has {width} x {height} pixels: it is shrunk to its bucket each time, which costs time alone",
                (name,),
                (_exclude(name),),
            )
        ]
    return []


def _blurred(name: str, one: Measure) -> list[Finding]:
    if one.sharpness >= BLURRED:
        return []
    message = f"{name} is blurred: even its sharpest edges are soft, and the LoRA would learn that"
    return [Finding("blur", "warning", message, (name,), (_exclude(name),))]


def _borders(name: str, one: Measure) -> list[Finding]:
    found = []
    left, top, right, bottom = one.bars
    if any(one.bars):
        box = left, top, 1 - right, 1 - bottom
        where = " and ".join(
            side for side, share in zip(("left", "top", "right", "bottom"), one.bars, strict=True) if share
        )
        found.append(
            Finding(
                "bars",
                "warning",
                f"{name} has a bar at the {where}: the LoRA would learn to draw it",
                (name,),
                (Repair("crop", (name,), box, "Cut it off"), _exclude(name)),
            )
        )
    if one.texts:
        tops = [box[3] for box in one.texts if box[3] < 0.5]
        bottoms = [box[1] for box in one.texts if box[1] > 0.5]
        crop: Box = (0.0, max(tops, default=0.0), 1.0, min(bottoms, default=1.0))
        where = " and ".join(word for word, there in (("top", tops), ("bottom", bottoms)) if there)
        found.append(
            Finding(
                "text",
                "note",
                f"{name} seems to have writing or a watermark at the {where}",
                (name,),
                (Repair("crop", (name,), crop, "Cut it off"), _exclude(name)),
            )
        )
    return found


def _marks(good: Mapping[str, Measure]) -> list[Finding]:
    """Logos and watermarks: what stays at one place while the pictures change."""
    found = []
    packed = {name: one.edges for name, one in good.items() if not any(one.bars)}
    for mark in marks.find(packed, {name: good[name].size for name in packed}):
        left, top, right, bottom = mark.box
        where = " ".join(
            word
            for word, there in (
                ("top", bottom < 0.5),
                ("bottom", top > 0.5),
                ("left", right < 0.5),
                ("right", left > 0.5),
            )
            if there
        )
        # Of the four strips beside the mark the largest is kept.
        strips: list[Box] = [(0, 0, 1, top), (0, bottom, 1, 1), (0, 0, left, 1), (right, 0, 1, 1)]
        largest = max(strips, key=lambda box: (box[2] - box[0]) * (box[3] - box[1]))
        kept = (largest[2] - largest[0]) * (largest[3] - largest[1])
        repairs = (Repair("crop", mark.names, largest, "Cut it off"),) if kept >= LEAST_KEPT else ()
        found.append(
            Finding(
                "logo",
                "warning",
                f"{len(mark.names)} of {len(good)} have the same mark at the {where or 'middle'}, a logo or watermark: "
                "the LoRA would learn to draw it",
                mark.names,
                (*repairs, _exclude(*mark.names)),
            )
        )
    return found


def _are_near(one: npt.NDArray[np.uint64], others: npt.NDArray[np.uint64]) -> npt.NDArray[np.bool_]:
    """Whether both hashes of a picture differ little from those of each of the others."""
    found: npt.NDArray[np.bool_] = (np.bitwise_count(one[None, :] ^ others) <= NEAR_BITS).all(axis=1)
    return found


def _duplicates(good: Mapping[str, Measure]) -> list[Finding]:
    found = []
    by_content: dict[str, list[str]] = defaultdict(list)
    for name, one in good.items():
        by_content[one.sha256].append(name)
    for group in by_content.values():
        if len(group) > 1:
            found.append(
                Finding(
                    "same",
                    "warning",
                    f"{' and '.join(group)} are the same file: it would weigh {len(group)} times as much",
                    tuple(group),
                    (Repair("exclude", tuple(group[1:]), label="Keep the first"),),
                )
            )
    first = [group[0] for group in by_content.values()]
    found += _near(first, good)
    return found


def _near(names: Sequence[str], good: Mapping[str, Measure]) -> list[Finding]:
    if len(names) < 2:
        return []
    plain = np.array([good[name].hashes for name in names], dtype=np.uint64)
    turned = np.array([good[name].mirrored_hashes for name in names], dtype=np.uint64)
    found: list[Finding] = []
    grouped: set[int] = set()
    for index, name in enumerate(names):
        if index in grouped:
            continue
        here, group = _tiny(good[name]), [name]
        near, mirrored = _are_near(plain[index], plain), _are_near(plain[index], turned)
        for other in np.flatnonzero(near | mirrored).tolist():
            if other <= index or other in grouped:
                continue
            there = _tiny(good[names[other]])
            if near[other] and _differ(here, there) <= NEAR_GREY:
                group.append(names[other])
                grouped.add(other)
            elif mirrored[other] and _differ(here, there[:, ::-1]) <= NEAR_GREY:
                found.append(_alike("show the same, one of them mirrored", [name, names[other]], good))
        if len(group) > 1:
            found.append(_alike("look nearly the same", group, good))
    return found


def _tiny(one: Measure) -> npt.NDArray[np.float32]:
    pixels = np.frombuffer(bytes.fromhex(one.tiny), np.uint8)
    return pixels.astype(np.float32).reshape(16, 16, 3)


def _differ(one: npt.NDArray[np.float32], other: npt.NDArray[np.float32]) -> float:
    return float(np.abs((one - one.mean()) - (other - other.mean())).mean())


def _alike(words: str, group: Sequence[str], good: Mapping[str, Measure]) -> Finding:
    best = max(group, key=lambda name: good[name].size[0] * good[name].size[1])
    worse = tuple(name for name in group if name != best)
    shown = " and ".join(group) if len(group) < 4 else f"{', '.join(group[:3])} and {len(group) - 3} more"
    return Finding(
        "near",
        "note",
        f"{shown} {words}: the LoRA may learn that one moment by heart",
        tuple(group),
        (Repair("exclude", worse, label=f"Keep {best} alone"),),
    )


def _faces(good: Mapping[str, Measure]) -> list[Finding]:
    with_face = [name for name, one in good.items() if one.faces]
    if len(good) < 3 or len(with_face) < 0.5 * len(good):
        if not good:
            return []
        return [
            Finding(
                "noface",
                "note",
                f"a face was found in {len(with_face)} of {len(good)}: drawn, turned or covered faces are beyond this "
                "detector, so faces are not judged here",
            )
        ]
    found = []
    for name, one in good.items():
        large = [face for face in one.faces if face.width >= SECOND_FACE * one.faces[0].width]
        if not large:
            found.append(
                Finding(
                    "noface",
                    "note",
                    f"no face was found in {name}: turned away, covered or small, it teaches little of a person",
                    (name,),
                    (_exclude(name),),
                )
            )
        elif len(large) > 1:
            found.append(
                Finding(
                    "faces",
                    "warning",
                    f"{name} shows {len(large)} faces: the LoRA would mix them",
                    (name,),
                    (Repair("crop", (name,), around(one), "Crop to the largest"), _exclude(name)),
                )
            )
    return found


def around(one: Measure, space: float = 0.9) -> Box | None:
    """A square-ish box around the largest face with ``space`` face widths on each side; None without a face."""
    face = one.face
    if face is None:
        return None
    wide, tall = face.right - face.left, face.bottom - face.top
    return (
        max(0.0, face.left - space * wide),
        max(0.0, face.top - 0.8 * space * tall),
        min(1.0, face.right + space * wide),
        min(1.0, face.bottom + 1.2 * space * tall),
    )


def _variety(good: Mapping[str, Measure], person: bool) -> list[Finding]:
    found: list[Finding] = []
    sets = [("background", "background", {name: one.background for name, one in good.items()})]
    if person:
        sets.append(("clothes", "clothes", {name: one.clothes for name, one in good.items() if one.clothes}))
    for kind, word, values in sets:
        if len(values) < ENOUGH_FOR_VARIETY:
            continue
        names = list(values)[:: max(1, len(values) // MOST_COMPARED)]
        points = np.array([values[name] for name in names]).reshape(len(names), -1, 3)
        distances = np.linalg.norm(points[:, None] - points[None, :], axis=-1).mean(axis=-1)
        close = distances < SAME_COLOUR
        centre = int(close.sum(axis=1).argmax())
        group = [names[index] for index in np.flatnonzero(close[centre])]
        if len(group) > SAME_SHARE * len(names):
            found.append(
                Finding(
                    kind,
                    "warning",
                    f"{len(group)} of {len(names)} have nearly the same {word}: the LoRA would take it for a part of "
                    "the subject",
                    tuple(group),
                )
            )
    yaws = [one.face.yaw for one in good.values() if one.face is not None and one.face.yaw is not None]
    if person and len(yaws) >= ENOUGH_FOR_VARIETY:
        low, middle, high = np.percentile(yaws, (10, 50, 90))
        if high - low < SAME_POSE:
            where = (
                "straight at the camera"
                if abs(middle) < 0.3
                else "to the left"
                if middle < 0
                else "to the right"
            )
            found.append(
                Finding(
                    "pose",
                    "note",
                    f"nearly all of the {len(yaws)} faces found look {where}: add some that look elsewhere",
                )
            )
    return found
