"""Signals that need no model: the weights of a file, and the pixels of its pictures.

Axes: H/W height and width, C channels, N pictures.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image

from trainer.tools import _lora
from trainer.tools._lora import Pair

__all__ = [
    "PictureFigures",
    "WeightFigures",
    "block_of",
    "diversity",
    "nearest",
    "picture_figures",
    "sizes_of_layer",
    "weight_figures",
]

SIDE_PX = 256
"""Pictures are brought to this longest side first, so that figures of different sizes compare."""
THUMBNAIL_PX = 16

Floats = npt.NDArray[np.float32]


# --- weights ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class WeightFigures:
    """What a LoRA file adds, without forming the products."""

    norm: float
    """Frobenius norm of all weight changes together."""
    stable_rank: float
    """Mean over layers of ||D||_F^2 / ||D||_2^2: in how many directions the changes go."""
    blocks: Mapping[str, float]
    """Norm of each block's changes."""
    ranks: Mapping[str, float]
    """Mean stable rank of each block's layers; blocks without a change are left out."""


def sizes_of_layer(pair: Pair) -> tuple[float, float]:
    """Frobenius norm of a layer's change, and its stable rank (0 for an untouched layer)."""
    up, down = pair.matrices()
    _, values, _ = _lora.thin_svd(up, down)
    squares = values.square()
    total, largest = float(squares.sum()), float(squares[0])
    if largest <= 0:
        return 0.0, 0.0
    return total**0.5 * abs(pair.scale), total / largest


def block_of(stem: str) -> str:
    """The block that a layer belongs to, as a person would call it: "text encoder", "down 1", "double 12".

    >>> block_of("lora_unet_up_blocks_1_attentions_0_proj_in")
    'up 1'
    """
    if not stem.startswith("lora_unet_"):
        return "text encoder"
    match = re.match(r"lora_unet_(down|up|input|output|double|single)_blocks_(\d+)", stem)
    if match:
        return f"{match[1]} {match[2]}"
    return "middle" if re.match(r"lora_unet_(mid|middle)_block", stem) else "input layers"


def weight_figures(pairs: Mapping[str, Pair]) -> WeightFigures:
    """Norms and spectra of weight changes, by Kohya's key stem."""
    blocks: dict[str, float] = {}
    ranks: dict[str, list[float]] = {}
    for stem, pair in pairs.items():
        norm, rank = sizes_of_layer(pair)
        block = block_of(stem)
        blocks[block] = blocks.get(block, 0.0) + norm**2
        if rank:
            ranks.setdefault(block, []).append(rank)
    every = [rank for some in ranks.values() for rank in some]
    return WeightFigures(
        norm=sum(blocks.values()) ** 0.5,
        stable_rank=sum(every) / len(every) if every else 0.0,
        blocks={name: square**0.5 for name, square in blocks.items()},
        ranks={name: sum(some) / len(some) for name, some in ranks.items()},
    )


# --- pictures -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class PictureFigures:
    """Averages over one or several pictures, each 0 to 1 or nearly."""

    saturation: float
    """Mean of (max - min) / max over the channels."""
    contrast: float
    """Standard deviation of the luma."""
    clipped: float
    """Share of values at an end of the scale."""
    detail: float
    """Mean absolute Laplacian of the luma: fine structure; grain raises it, clay lowers it."""

    def against(self, other: PictureFigures) -> dict[str, float]:
        """Natural logarithm of each figure over that of ``other``; 0 is equal."""
        floor = 0.004
        return {
            name: float(np.log((getattr(self, name) + floor) / (getattr(other, name) + floor)))
            for name in ("saturation", "contrast", "clipped", "detail")
        }


def _pixels(picture: Image.Image | Path) -> Floats:
    if isinstance(picture, Path):
        with Image.open(picture) as opened:
            return _pixels(opened.convert("RGB"))
    picture = picture.convert("RGB")
    longest = max(picture.size)
    if longest != SIDE_PX:
        size = tuple(max(1, round(side * SIDE_PX / longest)) for side in picture.size)
        picture = picture.resize((size[0], size[1]), Image.Resampling.LANCZOS)
    found: Floats = np.asarray(picture, dtype=np.float32) / np.float32(255)
    return found


def picture_figures(pictures: Iterable[Image.Image | Path]) -> PictureFigures:
    """Figures of pictures, averaged.

    Args:
        pictures: At least one; files or opened.
    """
    rows = []
    for picture in pictures:
        pixels = _pixels(picture)
        highest, lowest = pixels.max(2), pixels.min(2)
        luma = pixels @ np.array([0.299, 0.587, 0.114], dtype=np.float32)
        middle = luma[1:-1, 1:-1] * 4
        around = luma[:-2, 1:-1] + luma[2:, 1:-1] + luma[1:-1, :-2] + luma[1:-1, 2:]
        rows.append(
            (
                float(((highest - lowest) / np.maximum(highest, 1e-3)).mean()),
                float(luma.std()),
                float(((pixels < 2 / 255) | (pixels > 253 / 255)).mean()),
                float(np.abs(middle - around).mean()),
            )
        )
    means = np.mean(rows, axis=0)
    return PictureFigures(*(float(value) for value in means))


def _thumbnails(pictures: Sequence[Image.Image | Path]) -> Floats:
    rows = []
    for picture in pictures:
        pixels = _pixels(picture)
        image = Image.fromarray((pixels * 255).astype(np.uint8))
        small = image.resize((THUMBNAIL_PX, THUMBNAIL_PX), Image.Resampling.BOX)
        rows.append(np.asarray(small, dtype=np.float32).ravel() / 255)
    return np.stack(rows)


def _distances(one_NC: Floats, two_MC: Floats) -> Floats:
    """Root mean square difference of every picture of one to every picture of the other."""
    difference = one_NC[:, None] - two_MC[None]
    found: Floats = np.sqrt((difference**2).mean(-1))
    return found


def diversity(pictures: Sequence[Image.Image | Path]) -> float:
    """Mean distance between pictures of one prompt from several seeds; 0 where all are alike.

    Args:
        pictures: At least two.
    """
    thumbnails = _thumbnails(pictures)
    distances = _distances(thumbnails, thumbnails)
    count = len(pictures)
    return float(distances.sum() / (count * (count - 1)))


def nearest(pictures: Sequence[Image.Image | Path], training: Sequence[Image.Image | Path]) -> float:
    """How near pictures come to their nearest training picture, against how near those are to each other.

    1 is as near as training pictures are to their nearest neighbour; well below it, pictures are copied.
    """
    made, given = _thumbnails(pictures), _thumbnails(training)
    own = _distances(given, given) + np.eye(len(given), dtype=np.float32) * 9
    usual = float(own.min(1).mean()) if len(given) > 1 else 1.0
    return float(_distances(made, given).min(1).mean()) / max(usual, 1e-6)
