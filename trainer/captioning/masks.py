"""Loss masks of a picture: which one training reads, how it looks there, and one drawn by a person.

A mask is as large as its picture; where it is white the loss counts, where it is black it does not
(sd-scripts, custom_train_functions.py:apply_masked_loss). Masks drawn on the page lie in
``<folder>/.kiln/masks`` under the pictures' stems, where `trainer.data.folder` finds them.
"""

from __future__ import annotations

import io
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt
from PIL import Image

from trainer.data.folder import MASKS
from trainer.data.images import inspect, read_rgb, read_rgba, with_mask
from trainer.data.types import Fit, Subset
from trainer.errors import DatasetError
from trainer.files import atomic_path
from trainer.pictures import edits
from trainer.pictures.edits import Edit

__all__ = ["Mask", "drawn_file", "read", "remove", "save"]

Pixels = npt.NDArray[np.uint8]

LARGEST_BYTES = 8 * 1024 * 1024


@dataclass(frozen=True)
class Mask:
    """What training does with a picture's mask."""

    kind: Literal["none", "file", "drawn", "alpha"]
    trained: bool
    """Whether training reads it with the settings as they stand."""
    words: str
    """In one sentence."""
    values_HW: Pixels | None = None
    """0 to 255, of the picture after its edits."""


def drawn_file(picture: Path) -> Path:
    """Where the mask of a picture lies that a person drew."""
    return picture.parent / edits.FOLDER / MASKS / f"{picture.stem}.png"


def read(picture: Path, mask_file: Path | None, subset: Subset | None, *, masked_loss: bool) -> Mask:
    """The mask of a picture as training reads it.

    Args:
        picture: Its file.
        mask_file: What `trainer.data.folder` found for it.
        subset: The folder's treatment; None where the settings name another folder.
        masked_loss: The setting.

    Raises:
        DatasetError: Picture or mask cannot be read.
    """
    edit = edits.load(picture.parent).of(picture.name)
    if mask_file is None and drawn_file(picture).is_file():
        mask_file = drawn_file(picture)
    if mask_file is not None:
        size = edit.size(inspect(picture).size)
        if inspect(mask_file).size != inspect(picture).size:
            raise DatasetError(f"mask {mask_file} has another size than {picture.name}: draw it again")
        blank = np.zeros((size[1], size[0], 3), np.uint8)
        values = with_mask(blank, mask_file, Fit(size, size), edit=edit)[:, :, 3]
        kind: Literal["file", "drawn"] = "drawn" if mask_file == drawn_file(picture) else "file"
        words = "Training counts the bright part only." if masked_loss else NOT_YET
        return Mask(kind, masked_loss, words, values)
    if inspect(picture).transparent:
        used = masked_loss and subset is not None and subset.alpha_mask
        words = (
            "Training counts the opaque part only."
            if used
            else "This picture's transparency is not used: switch masked_loss on and add --alpha_mask to the "
            "additional parameters."
        )
        return Mask("alpha", used, words, edit.apply(read_rgba(picture))[:, :, 3])
    return Mask("none", False, "The whole picture counts.")


NOT_YET = "This mask is not used yet: switch masked_loss on."


def save(picture: Path, data: bytes) -> Path:
    """Keep a mask that was drawn on a picture as the page shows it, edits included.

    Args:
        picture: Its file.
        data: A PNG of any size; bright where the loss counts.

    Returns:
        The file that was written, as large as the picture's file.

    Raises:
        DatasetError: That is no picture, or it cannot be written.
    """
    if len(data) > LARGEST_BYTES:
        raise DatasetError(f"the mask is {len(data):,} bytes: the limit is {LARGEST_BYTES:,}")
    edit = edits.load(picture.parent).of(picture.name)
    whole = inspect(picture).size
    shown = edit.size(whole)
    drawn = read_rgb(data, Path("the mask"))
    fitted = Image.fromarray(drawn[:, :, 0]).resize(shown, Image.Resampling.BILINEAR)
    values = _unedited(np.asarray(fitted), edit, whole)
    path = drawn_file(picture)
    try:
        with atomic_path(path) as temporary:
            buffer = io.BytesIO()
            Image.fromarray(values).save(buffer, "PNG", optimize=True)
            temporary.write_bytes(buffer.getvalue())
    except OSError as error:
        raise DatasetError(f"{path} cannot be written: {error.strerror or error}") from error
    return path


def _unedited(values_HW: Pixels, edit: Edit, whole: tuple[int, int]) -> Pixels:
    """A mask of the edited picture put back where it lies in the file; what was cropped away counts."""
    if edit.flipped:
        values_HW = values_HW[:, ::-1]
    if edit.turns:
        values_HW = np.rot90(values_HW, edit.turns)
    if edit.crop is None or not edit.fits(whole):
        return np.ascontiguousarray(values_HW)
    left, top, right, bottom = edit.crop
    full = np.full((whole[1], whole[0]), 255, np.uint8)
    full[top:bottom, left:right] = values_HW
    return full


def remove(picture: Path) -> None:
    """Take the drawn mask of a picture away.

    Raises:
        DatasetError: It cannot be removed.
    """
    path = drawn_file(picture)
    try:
        path.unlink(missing_ok=True)
    except OSError as error:
        raise DatasetError(f"{path} cannot be removed: {error.strerror or error}") from error
