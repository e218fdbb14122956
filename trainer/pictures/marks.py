"""A logo or watermark that stands at the same place in many pictures.

One picture alone cannot show what is a mark and what belongs to it. Over a set, the edges of the pictures
come and go while those of a mark stay where they are (Dekel et al. 2017, "On the effectiveness of visible
watermarks", who take the median of the gradients; here only their signs, as votes, so that a
picture needs a few kilobytes in the memory of what was measured).

Axes: N pictures, P planes of edges (to the right and down, rising and falling), H/W cells.
"""

from __future__ import annotations

import base64
import zlib
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass

import cv2
import numpy as np
import numpy.typing as npt

__all__ = ["FEWEST", "Mark", "edges", "find"]

GRID = 128
"""Cells along each edge: a mark of a tenth of the width still has a dozen."""
STEP = 10
"""Grey levels across two cells that make an edge."""
FEWEST = 5
"""Pictures that have to have the mark."""
SHARE = 0.4
"""Of the pictures of one shape."""
AROUND = 65
"""Cells across, within which edges are as frequent as chance would have them."""
BEYOND_CHANCE = 3.5
"""Standard deviations above what the edges around would give."""
CELLS = 14
"""Fewer cells that stay are chance; so are some of the four times 16,384, but not side by side."""
LARGEST = 0.3
"""Share of the picture that a mark covers at most: more is the same background."""
ALONE = 0.6
"""Share of all cells that stay which lie in the mark: a studio's wall stays all over."""
MATCH = 0.5
"""Share of a mark's cells that a picture with it has."""

Bits = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class Mark:
    """One mark: where it is, in fractions (left, top, right, bottom), and which pictures have it."""

    box: tuple[float, float, float, float]
    names: tuple[str, ...]


def edges(grey_HW: npt.NDArray[np.uint8]) -> str:
    """Where the edges of a picture are, packed: some thousand letters."""
    small = cv2.resize(grey_HW, (GRID, GRID), interpolation=cv2.INTER_AREA).astype(np.int16)
    planes = np.zeros((4, GRID, GRID), bool)
    across, down = small[:, 2:] - small[:, :-2], small[2:] - small[:-2]
    planes[0, :, 1:-1], planes[1, :, 1:-1] = across > STEP, across < -STEP
    planes[2, 1:-1], planes[3, 1:-1] = down > STEP, down < -STEP
    return base64.b85encode(zlib.compress(np.packbits(planes).tobytes(), 1)).decode("ascii")


def _planes(text: str) -> Bits:
    packed = np.frombuffer(zlib.decompress(base64.b85decode(text)), np.uint8)
    return np.unpackbits(packed).reshape(4, GRID, GRID).astype(bool)


def _around(plane_HW: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """Sums around each cell, without what would lie outside."""
    found = cv2.blur(plane_HW, (AROUND, AROUND), borderType=cv2.BORDER_CONSTANT)
    return np.asarray(found, dtype=np.float32)


def find(packed: Mapping[str, str], sizes: Mapping[str, tuple[int, int]]) -> list[Mark]:
    """Marks that stay while the pictures change.

    Args:
        packed: What `edges` gave of each picture.
        sizes: Their (width, height): those of one shape are compared.
    """
    shapes: dict[int, list[str]] = defaultdict(list)
    for name, text in packed.items():
        if text:
            shapes[round(20 * float(np.log(sizes[name][0] / sizes[name][1])))].append(name)
    return [mark for names in shapes.values() if len(names) >= FEWEST for mark in _find(names, packed)]


def _find(names: list[str], packed: Mapping[str, str]) -> list[Mark]:
    planes_NPHW = np.stack([_planes(packed[name]) for name in names])
    count = len(names)
    shares_PHW = planes_NPHW.mean(axis=0, dtype=np.float32)
    around_PHW = np.stack([_around(plane) for plane in shares_PHW]) / _around(
        np.ones((GRID, GRID), np.float32)
    )
    beyond_PHW = (shares_PHW - around_PHW) * np.sqrt(count / (around_PHW * (1 - around_PHW) + 0.25 / count))
    stays_PHW = (beyond_PHW > BEYOND_CHANCE) & (shares_PHW * count >= max(FEWEST, SHARE * count))
    stays_HW = stays_PHW.any(axis=0).astype(np.uint8)
    total = int(stays_HW.sum())
    if total < CELLS:
        return []
    joined = cv2.dilate(stays_HW, np.ones((5, 9), np.uint8))
    pieces, labels = cv2.connectedComponents(joined)
    found = []
    for piece in range(1, pieces):
        inside = (labels == piece) & (stays_HW > 0)
        rows, columns = np.nonzero(inside)
        if len(rows) < max(CELLS, ALONE * total):
            continue
        top, bottom = int(rows.min()), int(rows.max()) + 1
        left, right = int(columns.min()), int(columns.max()) + 1
        if (bottom - top) * (right - left) > LARGEST * GRID**2:
            continue
        matches_N = planes_NPHW[:, stays_PHW & inside].mean(axis=1)
        having = tuple(name for name, match in zip(names, matches_N, strict=True) if match >= MATCH)
        if len(having) >= FEWEST:
            box = (
                max(0, left - 1) / GRID,
                max(0, top - 1) / GRID,
                min(GRID, right + 1) / GRID,
                min(GRID, bottom + 1) / GRID,
            )
            found.append(Mark(box, having))
    return found
