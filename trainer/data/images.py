"""Pictures from disk to pixels: read upright, resize and crop as sd-scripts does.

Axes: H/W height and width in pixels, C channels (RGB or RGBA), uint8.
"""

from __future__ import annotations

import functools
import io
import os
import random
import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Literal

import numpy as np
import numpy.typing as npt
from PIL import Image

from trainer.data.types import Fit, Size, Subset
from trainer.errors import DatasetError
from trainer.pictures.edits import NONE, Edit

__all__ = [
    "INTERPOLATIONS",
    "PICTURE_EXTENSIONS",
    "Look",
    "crop",
    "face_crop",
    "fit_pixels",
    "inspect",
    "jitter_colour",
    "read_rgb",
    "read_rgba",
    "read_size",
    "read_small",
    "resize",
    "to_tensor_values",
    "with_mask",
]

Pixels = npt.NDArray[np.uint8]

PICTURE_EXTENSIONS = frozenset({".png", ".jpg", ".jpeg", ".webp", ".bmp", ".avif"})
"""Endings of training pictures (sd-scripts, train_util.py:IMAGE_EXTENSIONS), here in any case."""

FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "AVIF", "GIF", "TIFF")
"""What a file may hold whatever its ending says. No format that starts another program (EPS)."""

MAX_PIXELS = 178_956_970
"""Twice Pillow's warning level, where Pillow itself refuses: 2 GiB / 4 bytes / 3 channels."""

ORIENTATION_TAG = 0x0112
UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""What brings a picture with each EXIF orientation upright (Exif 2.32, tag Orientation)."""

INTERPOLATIONS = (
    "lanczos",
    "lanczos4",
    "box",
    "area",
    "nearest",
    "linear",
    "bilinear",
    "cubic",
    "bicubic",
)
"""Values of resize_interpolation (sd-scripts, utils.py:validate_interpolation_fn)."""

# Pictures between Pillow's warning and its refusal are read: MAX_PIXELS is the limit here. What Pillow
# says of odd metadata is no reason to alarm a person; damage that matters raises.
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)
warnings.filterwarnings("ignore", category=UserWarning, module=r"PIL\.")


@dataclass(frozen=True)
class Look:
    """What a checked picture file holds."""

    size: Size
    """Upright (width, height) in pixels."""
    transparent: bool
    """Whether it has an alpha channel or a transparent colour."""
    turned: bool
    """Whether EXIF orientation changes how it is shown."""
    format: str
    """Pillow's name of the format: JPEG, PNG ..."""


def _guess(head: bytes) -> str:
    text = head.lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if b"<svg" in text:
        return "it is an SVG drawing: export it as PNG"
    if text.startswith((b"<!doctype html", b"<html")):
        return "it is a web page saved under a picture's name: download the picture itself"
    if text.startswith(b"version https://git-lfs"):
        return "it is a Git LFS pointer: run git lfs pull"
    if head[4:12] in (b"ftypheic", b"ftypheix", b"ftypmif1", b"ftypmsf1", b"ftyphevc"):
        return "it is a HEIC photo: convert it to JPEG or PNG"
    if head[:2] == b"\xff\x0a" or head[4:8] == b"JXL ":
        return "it is JPEG XL: convert it to PNG or WebP"
    return "it is no PNG, JPEG, WebP, AVIF or BMP, or its beginning is damaged: replace or remove it"


def _refuse(path: Path | None, reason: str) -> DatasetError:
    return DatasetError(f"{path or 'a picture'} cannot be read: {reason}")


def _late_png_orientation(file: IO[bytes]) -> int:
    """Orientation from an eXIf chunk behind the pixels, where Pillow only finds it after decoding."""
    file.seek(8)
    while len(header := file.read(8)) == 8:
        length = int.from_bytes(header[:4], "big")
        if header[4:] == b"eXIf":
            exif = Image.Exif()
            exif.load(file.read(min(length, 1 << 20)))
            return int(exif.get(ORIENTATION_TAG, 1))
        file.seek(length + 4, os.SEEK_CUR)
    return 1


def _orientation(image: Image.Image, file: IO[bytes]) -> int:
    if image.format == "TIFF":
        return 1  # Pillow turns it while decoding, and its size is upright from the start
    try:
        # PNG's own getexif would decode all pixels first.
        value = Image.Image.getexif(image).get(ORIENTATION_TAG)
        if value is None and image.format == "PNG":
            place = file.tell()
            value = _late_png_orientation(file)
            file.seek(place)
        return int(value) if value in UPRIGHT else 1
    except Exception:  # noqa: BLE001 - damaged EXIF data raises anything and is no reason to lose the picture
        return 1


@dataclass(frozen=True)
class _Opened:
    image: Image.Image
    orientation: int

    @property
    def size(self) -> Size:
        width, height = self.image.size
        return (height, width) if self.orientation >= 5 else (width, height)


def _open(file: IO[bytes], path: Path | None) -> _Opened:
    """Read the header. Raises DatasetError."""
    head = file.read(512)
    if not head:
        raise _refuse(path, "the file is empty (0 bytes): replace or remove it")
    file.seek(0)
    try:
        image = Image.open(file, formats=FORMATS)
    except Image.DecompressionBombError as error:
        raise _refuse(
            path, f"it has more than {MAX_PIXELS / 1e6:.0f} million pixels: make it smaller"
        ) from error
    except Exception as error:  # Pillow's parsers raise anything on damaged data
        raise _refuse(path, _guess(head)) from error
    if image.size[0] * image.size[1] > MAX_PIXELS:
        raise _refuse(path, f"it has more than {MAX_PIXELS / 1e6:.0f} million pixels: make it smaller")
    if min(image.size) < 1:
        raise _refuse(path, f"its size is {image.size[0]} x {image.size[1]} pixels: replace or remove it")
    return _Opened(image, _orientation(image, file))


def _damaged(path: Path | None, error: Exception) -> DatasetError:
    reason = str(error).splitlines()[0][:120] if str(error) else type(error).__name__
    return _refuse(path, f"the file is damaged or incomplete ({reason}): replace or remove it")


def _file(path: Path) -> IO[bytes]:
    try:
        return path.open("rb")
    except OSError as error:
        raise _refuse(path, f"{error.strerror or error}: check that it exists and may be read") from error


def read_size(path: Path) -> Size:
    """Upright (width, height) of a picture, from its header only.

    Raises:
        DatasetError: Not a readable picture.
    """
    with _file(path) as file:
        return _open(file, path).size


def inspect(path: Path) -> Look:
    """Check that a picture can be read to its end, as cheaply as its format allows.

    JPEG is decoded at an eighth of its size, PNG is checked by its checksums, all else is decoded.
    Remembered for as long as time stamp and size of the file stay the same.

    Raises:
        DatasetError: Not a readable picture.
    """
    try:
        stat = path.stat()
    except OSError as error:
        raise _refuse(path, f"{error.strerror or error}: check that it exists and may be read") from error
    found = _inspect(path, stat.st_mtime_ns, stat.st_size)
    if isinstance(found, str):
        raise DatasetError(found)
    return found


@functools.lru_cache(maxsize=65536)
def _inspect(path: Path, _modified_ns: int, _size_bytes: int) -> Look | str:
    try:
        with _file(path) as file:
            opened = _open(file, path)
            image = opened.image
            look = Look(
                opened.size,
                image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info,
                opened.orientation != 1,
                str(image.format),
            )
            try:
                if image.format == "PNG":
                    image.verify()
                else:
                    if image.format in ("JPEG", "MPO"):
                        image.draft("RGB", (image.size[0] // 8, image.size[1] // 8))
                    image.load()
            except Exception as error:  # decoders raise anything on damaged data
                raise _damaged(path, error) from error
            return look
    except DatasetError as error:
        return str(error)


def _to_eight_bits(image: Image.Image) -> Image.Image:
    """16-bit, integer and float greyscale to 8 bits, scaled (Pillow's own conversion clips them)."""
    if not image.mode.startswith(("I", "F")):
        return image
    values = np.asarray(image).astype(np.float64)
    values = np.nan_to_num(values, nan=0.0, posinf=0.0, neginf=0.0)
    top = values.max(initial=0.0)
    if image.mode == "F" and top <= 1.0:
        values = values * 255.0
    elif top > 255.0 or image.mode.startswith("I;16"):
        # 16 bits; a mode "I" file may hold up to 32.
        values = values * (255.0 / (65535.0 if top <= 65535.0 else top))
    return Image.fromarray(np.clip(np.rint(values), 0, 255).astype(np.uint8), "L")


def _decode(source: Path | bytes, mode: Literal["RGB", "RGBA"], path: Path | None) -> Pixels:
    file: IO[bytes] = io.BytesIO(source) if isinstance(source, bytes) else _file(source)
    with file:
        opened = _open(file, path)
        try:
            image = opened.image
            image.load()
            image = _to_eight_bits(image)
            if image.mode == "P" and "transparency" in image.info:
                image = image.convert("RGBA")  # straight to RGB, Pillow warns; the colours are the same
            if image.mode != mode:
                image = image.convert(mode)
            if opened.orientation in UPRIGHT:
                image = image.transpose(UPRIGHT[opened.orientation])
            return np.array(image, dtype=np.uint8)
        except Exception as error:  # decoders raise anything on damaged data
            raise _damaged(path, error) from error


def read_rgb(source: Path | bytes, name: Path | None = None) -> Pixels:
    """Upright pixels, HW3. Alpha is dropped, as in sd-scripts; of an animation the first frame is read.

    Args:
        source: The file, or its content.
        name: What to call it in messages where ``source`` is content.

    Raises:
        DatasetError: Not a readable picture.
    """
    return _decode(source, "RGB", source if isinstance(source, Path) else name)


def read_rgba(source: Path | bytes, name: Path | None = None) -> Pixels:
    """Upright pixels with alpha, HW4; opaque where the file has no alpha. See `read_rgb`."""
    return _decode(source, "RGBA", source if isinstance(source, Path) else name)


def read_small(path: Path, edge: int) -> tuple[Pixels, Size]:
    """Upright pixels, HW3, shrunk so that the longer edge has at most ``edge``, and the whole picture's size.

    For looking at many pictures: JPEG is decoded at the next larger of a half, a quarter or an eighth,
    so this is not what is trained.

    Raises:
        DatasetError: Not a readable picture.
    """
    with _file(path) as file:
        opened = _open(file, path)
        image, size = opened.image, opened.size
        try:
            if image.format in ("JPEG", "MPO"):
                image.draft("RGB", (edge, edge))
            image.load()
            image = _to_eight_bits(image)
            if image.mode == "P" and "transparency" in image.info:
                image = image.convert("RGBA")
            if image.mode != "RGB":
                image = image.convert("RGB")
            longest = max(image.size)
            if longest > edge:
                scale = edge / longest
                target = max(1, round(image.size[0] * scale)), max(1, round(image.size[1] * scale))
                image = image.resize(target, Image.Resampling.BOX, reducing_gap=2.0)
            if opened.orientation in UPRIGHT:
                image = image.transpose(UPRIGHT[opened.orientation])
            return np.array(image, dtype=np.uint8), size
        except Exception as error:  # decoders raise anything on damaged data
            raise _damaged(path, error) from error


Taps = tuple[npt.NDArray[np.intp], npt.NDArray[np.float32]]
"""For each target pixel the source pixels that it is made of, and their weights: (target, K) each."""


def _padded(lists: Iterable[list[tuple[int, float]]]) -> Taps:
    entries = list(lists)
    count = max(map(len, entries))
    index = np.zeros((len(entries), count), dtype=np.intp)
    weight = np.zeros((len(entries), count), dtype=np.float32)
    for row, entry in enumerate(entries):
        for column, (source, value) in enumerate(entry):
            index[row, column] = source
            weight[row, column] = value
    return index, weight


def _area_taps(source: int, target: int) -> Taps:
    """Share of each source pixel in each target pixel when shrinking (OpenCV, INTER_AREA).

    Shares below a thousandth of a source pixel are left out, as OpenCV does.
    """
    scale = 1.0 / (target / source)
    lists = []
    for place in range(target):
        start, end = place * scale, place * scale + scale
        width = min(scale, source - start)
        first, last = int(np.ceil(start)), min(int(np.floor(end)), source - 1)
        first = min(first, last)
        taps = []
        if first - start > 1e-3:
            taps.append((first - 1, (first - start) / width))
        taps += [(inner, 1.0 / width) for inner in range(first, last)]
        if end - last > 1e-3:
            taps.append((last, min(min(end - last, 1.0), width) / width))
        lists.append(taps)
    return _padded(lists)


def _linear_taps(source: int, target: int, *, area: bool) -> Taps:
    """Two neighbours (OpenCV, INTER_LINEAR; with ``area`` its INTER_AREA for enlarging)."""
    enlarged = target / source
    scale = 1.0 / enlarged  # rounded as OpenCV rounds it, so that whole places stay whole
    lists = []
    for place in range(target):
        if area:
            first = int(np.floor(place * scale))
            share = (place + 1) - (first + 1) * enlarged
            share = 0.0 if share <= 0 else share - np.floor(share)
        else:
            centre = (place + 0.5) * scale - 0.5
            first = int(np.floor(centre))
            share = centre - first
        lists.append(
            [
                (min(max(first, 0), source - 1), 1.0 - share),
                (min(max(first + 1, 0), source - 1), share),
            ]
        )
    return _padded(lists)


def _cubic_taps(source: int, target: int) -> Taps:
    """Four neighbours, Keys' cubic with a = -0.75 (OpenCV, INTER_CUBIC)."""
    a = -0.75
    scale = source / target
    lists = []
    for place in range(target):
        centre = (place + 0.5) * scale - 0.5
        first = int(np.floor(centre))
        x = centre - first
        weights = [
            ((a * (x + 1) - 5 * a) * (x + 1) + 8 * a) * (x + 1) - 4 * a,
            ((a + 2) * x - (a + 3)) * x * x + 1,
            ((a + 2) * (1 - x) - (a + 3)) * (1 - x) * (1 - x) + 1,
        ]
        weights.append(1.0 - sum(weights))
        lists.append(
            [
                (min(max(first + offset, 0), source - 1), weight)
                for offset, weight in zip((-1, 0, 1, 2), weights, strict=True)
            ]
        )
    return _padded(lists)


def _nearest(source: int, target: int) -> npt.NDArray[np.int64]:
    """The source pixel under the middle of each target pixel, in 16-bit fractions (INTER_NEAREST_EXACT)."""
    step = ((source << 16) + target // 2) // target
    places: npt.NDArray[np.int64] = (step * np.arange(target, dtype=np.int64) + step // 2 - source % 2) >> 16
    return places.clip(0, source - 1)


def _combine(rows: npt.NDArray[Any], taps: Taps) -> npt.NDArray[np.float32]:
    """Weighted sums of ``rows``, tap after tap in float32, which is OpenCV's order of adding."""
    index, weight = taps
    total = rows[index[:, 0]] * weight[:, 0, None]
    picked, share = np.empty(total.shape, rows.dtype), np.empty_like(total)
    for tap in range(1, index.shape[1]):
        np.take(rows, index[:, tap], axis=0, out=picked, mode="clip")
        np.multiply(picked, weight[:, tap, None], out=share)
        total += share
    return total


def _separable(pixels_HWC: Pixels, across: Taps, down: Taps) -> Pixels:
    """Across, then down, in parts small enough for the CPU's cache."""
    height, width, channels = pixels_HWC.shape
    target = len(across[0])
    narrowed = np.empty((height, target * channels), dtype=np.float32)
    block = max(1, (1 << 18) // (width * channels))
    for start in range(0, height, block):
        part = pixels_HWC[start : start + block]
        columns = np.ascontiguousarray(part.transpose(1, 0, 2)).reshape(width, -1)
        mixed = _combine(columns, across).reshape(target, len(part), channels)
        narrowed[start : start + block] = mixed.transpose(1, 0, 2).reshape(len(part), -1)
    found = np.empty((len(down[0]), target * channels), dtype=np.uint8)
    block = max(64, (1 << 19) // height)
    for start in range(0, target * channels, block):
        mixed = _combine(narrowed[:, start : start + block], down)
        found[:, start : start + block] = np.rint(mixed).clip(0, 255)
    return found.reshape(-1, target, channels)


def _area_whole(pixels_HWC: Pixels, across: int, down: int) -> Pixels:
    """Mean of blocks of ``down`` x ``across`` pixels (OpenCV rounds 2 x 2 blocks half up, others half even)."""
    total = np.zeros(
        (pixels_HWC.shape[0] // down, pixels_HWC.shape[1] // across, pixels_HWC.shape[2]), np.int32
    )
    for row in range(down):
        for column in range(across):
            total += pixels_HWC[row::down, column::across]
    if across == down == 2:
        halved: Pixels = ((total + 2) >> 2).astype(np.uint8)
        return halved
    mean: npt.NDArray[np.float32] = np.rint(total.astype(np.float32) * np.float32(1.0 / (across * down)))
    return mean.astype(np.uint8)


def _area(pixels_HWC: Pixels, size: Size) -> Pixels:
    height, width = pixels_HWC.shape[:2]
    if width % size[0] == 0 and height % size[1] == 0:
        return _area_whole(pixels_HWC, width // size[0], height // size[1])
    return _separable(pixels_HWC, _area_taps(width, size[0]), _area_taps(height, size[1]))


def resize(pixels_HWC: Pixels, size: Size, interpolation: str = "") -> Pixels:
    """Resize as sd-scripts does (utils.py:resize_image).

    By itself: pixel areas where no axis grows (OpenCV's INTER_AREA, reproduced to the bit), else
    Lanczos (Pillow). bilinear and bicubic follow OpenCV to within one grey level.

    Args:
        pixels_HWC: RGB or RGBA.
        size: Target (width, height).
        interpolation: One of `INTERPOLATIONS`, or "".

    Raises:
        DatasetError: Unknown interpolation.
    """
    height, width = pixels_HWC.shape[:2]
    if (width, height) == size:
        return pixels_HWC
    shrinks = width >= size[0] and height >= size[1]
    method = interpolation or ("area" if shrinks else "lanczos")
    if method in ("lanczos", "lanczos4", "box"):
        filter_ = Image.Resampling.BOX if method == "box" else Image.Resampling.LANCZOS
        return np.array(Image.fromarray(pixels_HWC).resize(size, filter_), dtype=np.uint8)
    if method == "area" and shrinks:
        return _area(pixels_HWC, size)
    if method == "nearest":
        rows, columns = _nearest(height, size[1]), _nearest(width, size[0])
        return np.ascontiguousarray(pixels_HWC[rows[:, None], columns[None, :]])
    if method in ("linear", "bilinear", "area"):
        area = method == "area"
        return _separable(
            pixels_HWC,
            _linear_taps(width, size[0], area=area),
            _linear_taps(height, size[1], area=area),
        )
    if method in ("cubic", "bicubic"):
        return _separable(pixels_HWC, _cubic_taps(width, size[0]), _cubic_taps(height, size[1]))
    raise DatasetError(f"resize_interpolation is {method!r}: choose one of {', '.join(INTERPOLATIONS)}")


def crop(pixels_HWC: Pixels, size: Size, start: tuple[int, int] | None = None) -> Pixels:
    """Cut (width, height) out of the middle, or from ``start`` (left, top)."""
    height, width = pixels_HWC.shape[:2]
    left, top = start or ((width - size[0]) // 2, (height - size[1]) // 2)
    return pixels_HWC[top : top + size[1], left : left + size[0]]


def fit_pixels(
    pixels_HWC: Pixels, fit: Fit, interpolation: str = "", start: tuple[int, int] | None = None
) -> Pixels:
    """Resize and crop into a bucket (sd-scripts, train_util.py:trim_and_resize_if_required)."""
    return crop(resize(pixels_HWC, fit.resized, interpolation), fit.bucket, start)


def with_mask(
    pixels_HWC: Pixels,
    mask_file: Path,
    fit: Fit,
    interpolation: str = "",
    start: tuple[int, int] | None = None,
    edit: Edit = NONE,
) -> Pixels:
    """Fitted pixels with the red channel of ``mask_file``, edited and fitted likewise, in place of their alpha.

    Raises:
        DatasetError: The mask cannot be read.
    """
    mask = fit_pixels(edit.apply(read_rgb(mask_file)), fit, interpolation, start)
    return np.concatenate([pixels_HWC[:, :, :3], mask[:, :, :1]], axis=2)


def to_tensor_values(pixels_HWC: Pixels) -> npt.NDArray[np.float32]:
    """uint8 RGB(A) to float32 RGB in [-1, 1], CHW: (x / 255 - 0.5) / 0.5, in that order."""
    values = pixels_HWC[:, :, :3].transpose(2, 0, 1).astype(np.float32)
    values /= np.float32(255)
    values -= np.float32(0.5)
    values /= np.float32(0.5)
    return values


def jitter_colour(pixels_HWC: Pixels, rng: random.Random) -> Pixels:
    """color_aug: with probability 0.33 either a hue shift of up to 16 degrees or a gamma of 0.95 to 1.05.

    As sd-scripts (train_util.py:AugHelper.color_aug): gamma works on values 0 to 255 and darkens or
    lightens as well; the hue shift is U(-8, 8) on OpenCV's scale of 180.

    Args:
        pixels_HWC: RGB or RGBA; alpha stays as it is.
        rng: The sample's own random generator.
    """
    if rng.random() > 0.33:
        return pixels_HWC
    changed = pixels_HWC.copy()
    if rng.random() > 0.5:
        shift = rng.uniform(-8, 8) / 180 * 256
        hsv = np.array(Image.fromarray(np.ascontiguousarray(pixels_HWC[:, :, :3])).convert("HSV"))
        hsv[:, :, 0] = np.rint(hsv[:, :, 0] + shift).astype(np.int16) % 256
        changed[:, :, :3] = np.array(Image.fromarray(hsv, "HSV").convert("RGB"))
    else:
        gamma = rng.uniform(0.95, 1.05)
        changed[:, :, :3] = np.clip(pixels_HWC[:, :, :3].astype(np.float32) ** gamma, 0, 255).astype(np.uint8)
    return changed


def _face(path: Path) -> tuple[int, int, int, int] | None:
    """Centre x, y, width and height of the face, from a name that ends in _x_y_w_h."""
    parts = path.stem.split("_")
    if len(parts) < 5:
        return None
    try:
        x, y, width, height = map(int, parts[-4:])
    except ValueError as error:
        raise DatasetError(
            f"{path}: with face_crop_aug_range, a name with four or more _ must end in _x_y_width_height of the face"
        ) from error
    return (x, y, width, height) if x > 0 and max(width, height) > 0 else None


def face_crop(
    pixels_HWC: Pixels, path: Path, subset: Subset, size: Size, rng: random.Random
) -> Pixels | None:
    """Shrink and crop around the face that the file's name gives (sd-scripts: BaseDataset.crop_target).

    The face ends up between 1/high and 1/low of the shorter edge, as far as the picture allows.

    Args:
        pixels_HWC: The whole picture.
        path: Its name ends in _x_y_width_height of the face, in pixels, x and y being its centre.
        subset: face_crop_aug_range (low, high) and random_crop.
        size: (width, height) to cut out.
        rng: The sample's own random generator.

    Returns:
        The crop, or None where the name gives no face or the picture is too small.
    """
    face = _face(path)
    height, width = pixels_HWC.shape[:2]
    if face is None or subset.face_crop_aug_range is None or width < size[0] or height < size[1]:
        return None
    if (width, height) == size:
        return pixels_HWC
    low, high = subset.face_crop_aug_range
    face_size, edge = max(face[2:]), min(size)
    smallest = min(1.0, max(size[1] / height, size[0] / width, edge / (face_size * high)))
    largest = min(1.0, max(smallest, edge / (face_size * low)))
    scale = smallest if smallest >= largest else rng.uniform(smallest, largest)
    resized = max(size[0], int(width * scale + 0.5)), max(size[1], int(height * scale + 0.5))
    pixels_HWC = resize(pixels_HWC, resized, subset.resize_interpolation)
    start: list[int] = []
    for axis in (1, 0):  # height first, as sd-scripts draws
        length, target, centre = resized[axis], size[axis], int(face[axis] * scale + 0.5)
        place = centre - target // 2
        if subset.random_crop:
            reach = max(length - centre, centre)
            place += rng.randint(0, reach) + rng.randint(0, reach) - reach
        elif low != high and face_size > edge // 10 and face_size >= 40:
            place += rng.randint(-face_size // 20, face_size // 20)
        start.append(max(0, min(place, length - target)))
    return crop(pixels_HWC, size, (start[1], start[0]))
