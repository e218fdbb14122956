"""Reads from the pixels of a demo portrait what it shows.

It knows the palette and the layout of `assets.demo.draw` and nothing of any model, so it can judge drawn
pictures and samples alike. "Left" and "right" are the viewer's.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt
from PIL import Image

from assets.demo import draw

Pixels = npt.NDArray[np.float32]
Mask = npt.NDArray[np.bool_]

FAR: Final = 60.0
"""Distance in RGB beyond which a pixel is none of the known colours."""
DARK: Final = 62.0
"""Luma below which a pixel may belong to a patch; the darkest skin is 80."""
FILLED: Final = 0.8
"""Share of the searched rectangle, 12 x 10 pixels, that a patch fills; eyes with glasses fill half."""
MOST: Final = 0.5
"""Share of a region's pixels that must agree."""


@dataclass(frozen=True)
class Reading:
    """What a picture shows; None where no answer is clear enough.

    Attributes:
        background: Name in `draw.BACKGROUNDS`.
        clothes: Name in `draw.CLOTHES`.
        hair: Name in `draw.HAIRS` or `draw.UNSEEN_HAIR`.
        facing: Name in `draw.FACINGS`.
        patch: "left" or "right", the side of the face with an eye patch.
        palette_error: Mean distance of the pixels to the nearest colour of the drawn world, in RGB steps of 255.
        roughness: Mean absolute Laplacian, in steps of 255.
    """

    background: str | None
    clothes: str | None
    hair: str | None
    facing: str | None
    patch: str | None
    palette_error: float
    roughness: float

    @property
    def subject_shown(self) -> bool:
        """The demo's subject: the patch on her own left eye, and blue hair."""
        return self.patch == "right" and self.hair in draw.UNSEEN_HAIR

    @property
    def intact(self) -> bool:
        """A clean portrait: flat colours of the drawn world, no grain, and a face that can be read."""
        clean = (
            self.palette_error <= PALETTE_ERROR_LIMIT and ROUGHNESS_LOW <= self.roughness <= ROUGHNESS_LIMIT
        )
        return clean and self.facing is not None


PALETTE_ERROR_LIMIT: Final = 15.0
ROUGHNESS_LOW: Final = 2.0
ROUGHNESS_LIMIT: Final = 20.0


def read(picture: Image.Image) -> Reading:
    """Reads one picture; another size than 128 x 128 is resized first."""
    if picture.size != (draw.SIZE_PX, draw.SIZE_PX):
        picture = picture.resize((draw.SIZE_PX, draw.SIZE_PX), Image.Resampling.BOX)
    pixels_HWC: Pixels = np.asarray(picture.convert("RGB"), dtype=np.float32)
    sides = np.concatenate([pixels_HWC[2:88, 1:19], pixels_HWC[2:88, 109:127]])
    mouth_x = _mouth_x(pixels_HWC)
    return Reading(
        background=_vote(sides, {name: draw.background_colours(name) for name in draw.BACKGROUNDS}),
        clothes=_vote(
            pixels_HWC[113:128, 22:106], {name: draw.clothes_colours(name) for name in draw.CLOTHES}
        ),
        hair=_vote(
            pixels_HWC[30:36, 52:77], {n: draw.hair_colours(n) for n in draw.HAIRS | draw.UNSEEN_HAIR}
        ),
        facing=_facing(mouth_x),
        patch=_patch(pixels_HWC, mouth_x),
        palette_error=float(_distances(pixels_HWC.reshape(-1, 3), _PALETTE).min(1).mean()),
        roughness=_roughness(pixels_HWC),
    )


def _distances(pixels_NC: Pixels, colours_KC: Pixels) -> Pixels:
    """Distance of N pixels to K colours."""
    squares = (pixels_NC**2).sum(1)[:, None] + (colours_KC**2).sum(1)[None] - 2 * pixels_NC @ colours_KC.T
    distances: Pixels = np.sqrt(np.maximum(squares, 0))
    return distances


def _vote(region: Pixels, classes: Mapping[str, list[draw.Rgb]]) -> str | None:
    """The class whose colours are nearest to most pixels of the region."""
    names = [name for name, colours in classes.items() for _ in colours]
    colours_KC: Pixels = np.array([c for colours in classes.values() for c in colours], dtype=np.float32)
    distances = _distances(region.reshape(-1, 3), colours_KC)
    nearest = distances.argmin(1)[distances.min(1) <= FAR]
    votes = dict.fromkeys(names, 0)
    for k, count in zip(*np.unique(nearest, return_counts=True), strict=True):
        votes[names[k]] += int(count)
    winner = max(votes, key=lambda name: votes[name])
    return winner if votes[winner] >= MOST * len(distances) else None


def _mouth_x(pixels_HWC: Pixels) -> float | None:
    """Middle of the mouth: the only dark pinkish red in the lower face (skin and hair there are yellower)."""
    top, left = 71, 45
    r, g, b = (pixels_HWC[top:84, left:84, k] for k in range(3))
    mask: Mask = (r - g > 55) & (b > g - 4) & (b < g + 32) & (r > 80) & (r < 225)
    columns = mask.sum(0).astype(np.float32)
    middle = int(np.convolve(columns, np.ones(15), mode="same").argmax())
    window = columns[
        max(middle - 8, 0) : middle + 9
    ]  # One mouth's width: blurred hair ends elsewhere are left out.
    if window.sum() < 12:
        return None
    return float(left + max(middle - 8, 0) + (window * np.arange(len(window))).sum() / window.sum())


def _facing(mouth_x: float | None) -> str | None:
    if mouth_x is None:
        return None
    if 59.8 <= mouth_x <= 68.2:
        return "front"
    return "left" if mouth_x < 64 else "right"


def _patch(pixels_HWC: Pixels, mouth_x: float | None) -> str | None:
    """Looks for a filled dark area, larger than any eye, where the eyes are."""
    dark: Pixels = (pixels_HWC @ np.array([0.299, 0.587, 0.114], dtype=np.float32) < DARK).astype(np.float32)
    sums = np.pad(dark.cumsum(0).cumsum(1), ((1, 0), (1, 0)))
    half_w, half_h = 6, 5
    best = 0.0
    best_xs: list[int] = []
    for y in range(58, 68):
        for x in range(44, 85):
            x0, x1, y0, y1 = x - half_w, x + half_w, y - half_h, y + half_h
            filled = float(sums[y1, x1] - sums[y0, x1] - sums[y1, x0] + sums[y0, x0]) / (4 * half_w * half_h)
            if filled > best:
                best, best_xs = filled, []
            if filled == best:
                best_xs.append(x)
    if best < FILLED:
        return None
    # The middle of all places that fit best: a patch is wider than the rectangle, and an edge would say little.
    middle = sum(best_xs) / len(best_xs)
    return "right" if middle > (64 if mouth_x is None else mouth_x) else "left"


def _roughness(pixels_HWC: Pixels) -> float:
    centre = pixels_HWC[1:-1, 1:-1] * 4
    around = pixels_HWC[:-2, 1:-1] + pixels_HWC[2:, 1:-1] + pixels_HWC[1:-1, :-2] + pixels_HWC[1:-1, 2:]
    return float(np.abs(centre - around).mean())


_PALETTE: Final[Pixels] = np.array(draw.palette(), dtype=np.float32)
