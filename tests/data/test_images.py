from __future__ import annotations

import io
import itertools
import random
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps

from tests.data.material import picture
from trainer.data import images
from trainer.data.types import Fit, Subset
from trainer.errors import DatasetError

GOLDEN = Path(__file__).parent / "golden" / "opencv_resize.npz"
"""OpenCV 4.10's own results on random pictures (opencv-python-headless, x86-64)."""


def encoded(format_: str, size: tuple[int, int] = (40, 24), mode: str = "RGB", **save: Any) -> bytes:
    rng = np.random.default_rng(3)
    channels = {"RGB": 3, "RGBA": 4}[mode]
    image = Image.fromarray(rng.integers(0, 256, (size[1], size[0], channels), dtype=np.uint8), mode)
    buffer = io.BytesIO()
    image.save(buffer, format_, **save)
    return buffer.getvalue()


def with_orientation(orientation: int) -> Image.Exif:
    exif = Image.Exif()
    exif[images.ORIENTATION_TAG] = orientation
    return exif


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("format_", ["JPEG", "PNG", "WEBP", "AVIF", "TIFF"])
def test_orientation_is_honoured_as_pillow_does(tmp_path: Path, format_: str, orientation: int) -> None:
    path = tmp_path / f"a.{format_.lower()}"
    quality: dict[str, Any] = {} if format_ in ("PNG", "TIFF") else {"quality": 95}
    path.write_bytes(encoded(format_, exif=with_orientation(orientation), **quality))
    with Image.open(path) as image:
        image.load()
        expected = np.array(ImageOps.exif_transpose(image).convert("RGB"))
    assert np.array_equal(images.read_rgb(path), expected)
    assert images.read_size(path) == (expected.shape[1], expected.shape[0])
    look = images.inspect(path)
    assert look.size == images.read_size(path)
    if format_ != "TIFF":
        assert look.turned == (orientation > 1)


def test_png_with_orientation_behind_its_pixels(tmp_path: Path) -> None:
    data = encoded("PNG")
    exif = with_orientation(6).tobytes().removeprefix(b"Exif\0\0")
    chunk = b"eXIf" + exif
    chunk = struct.pack(">I", len(exif)) + chunk + struct.pack(">I", zlib.crc32(chunk))
    end = data.rindex(b"IEND") - 4
    path = tmp_path / "late.png"
    path.write_bytes(data[:end] + chunk + data[end:])
    assert images.read_size(path) == (24, 40)
    assert images.read_rgb(path).shape == (40, 24, 3)


@pytest.mark.filterwarnings("ignore")  # Pillow warns of it
def test_damaged_exif_does_not_cost_the_picture(tmp_path: Path) -> None:
    path = tmp_path / "a.jpg"
    path.write_bytes(encoded("JPEG", exif=b"Exif\0\0II*\0\xff\xff\xff\x7fgarbage"))
    assert images.read_size(path) == (40, 24)
    assert images.read_rgb(path).shape == (24, 40, 3)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "I;16", "I", "F"])
def test_modes(tmp_path: Path, mode: str) -> None:
    grey = np.tile(np.linspace(0, 255, 32).astype(np.uint8), (16, 1))
    if mode == "I;16":
        image = Image.fromarray(grey.astype(np.uint16) * 257)
    elif mode == "I":
        image = Image.fromarray(grey.astype(np.int32) * 257)
    elif mode == "F":
        image = Image.fromarray(grey.astype(np.float32) / 255)
    elif mode == "1":
        grey = np.where(grey >= 128, 255, 0).astype(np.uint8)
        image = Image.fromarray(grey).convert("1")
    elif mode == "P":
        image = Image.fromarray(grey).convert("RGB").quantize(64)
    else:
        image = Image.fromarray(grey).convert("RGB").convert(mode)
    assert image.mode == mode
    path = tmp_path / ("a.tiff" if mode in ("CMYK", "F", "I") else "a.png")
    image.save(path)
    pixels = images.read_rgb(path)
    assert pixels.shape == (16, 32, 3)
    assert np.abs(pixels.astype(int) - grey[:, :, None]).max() <= 2
    assert images.read_rgba(path).shape == (16, 32, 4)


def test_sixteen_bit_colour_png(tmp_path: Path) -> None:
    raw = b"".join(b"\0" + struct.pack(">12H", *([65535, 32768, 257] * 4)) for _ in range(3))
    chunks = [
        (b"IHDR", struct.pack(">IIBBBBB", 4, 3, 16, 2, 0, 0, 0)),
        (b"IDAT", zlib.compress(raw)),
        (b"IEND", b""),
    ]
    data = b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
        for kind, body in chunks
    )
    path = tmp_path / "a.png"
    path.write_bytes(data)
    assert images.read_rgb(path).tolist() == [[[255, 128, 1]] * 4] * 3


def test_cmyk_jpeg(tmp_path: Path) -> None:
    path = tmp_path / "a.jpg"
    Image.new("RGB", (32, 32), (200, 100, 50)).convert("CMYK").save(path, quality=100)
    assert np.abs(images.read_rgb(path).astype(int) - (200, 100, 50)).max() <= 3


def test_palette_with_transparency_keeps_colour_and_alpha(tmp_path: Path) -> None:
    image = Image.new("P", (4, 4))
    image.putpalette([10, 20, 30, 200, 100, 50])
    image.putpixel((1, 0), 1)
    path = tmp_path / "a.png"
    image.save(path, transparency=bytes([255, 0]))
    assert images.read_rgb(path)[0, :2].tolist() == [[10, 20, 30], [200, 100, 50]]
    assert images.read_rgba(path)[0, :2, 3].tolist() == [255, 0]
    assert images.inspect(path).transparent


def test_alpha_is_dropped_not_blended(tmp_path: Path) -> None:
    path = tmp_path / "a.webp"
    Image.new("RGBA", (8, 8), (250, 10, 10, 0)).save(path, lossless=True, exact=True)
    assert images.read_rgb(path)[0, 0].tolist() == [250, 10, 10]
    assert images.read_rgba(path)[0, 0].tolist() == [250, 10, 10, 0]


@pytest.mark.parametrize("format_", ["WEBP", "PNG", "GIF", "AVIF"])
def test_first_frame_of_an_animation(tmp_path: Path, format_: str) -> None:
    frames = [Image.new("RGB", (32, 32), colour) for colour in ((255, 0, 0), (0, 255, 0), (0, 0, 255))]
    path = tmp_path / f"a.{format_.lower()}"
    frames[0].save(path, format_, save_all=True, append_images=frames[1:], duration=50)
    red = images.read_rgb(path)[16, 16].astype(int)
    assert red[0] > 240
    assert red[1:].max() < 15
    assert images.inspect(path).size == (32, 32)


def test_content_counts_not_the_ending(tmp_path: Path) -> None:
    path = tmp_path / "a.jpg"
    path.write_bytes(encoded("PNG"))
    assert images.read_rgb(path).shape == (24, 40, 3)
    assert images.inspect(path).format == "PNG"


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "empty"),
        (b"hello", "is no PNG"),
        (b'<?xml version="1.0"?>\n<svg xmlns="http://www.w3.org/2000/svg"></svg>', "SVG"),
        (b"<!DOCTYPE html><html></html>", "web page"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "Git LFS"),
        (b"\0\0\0\x18ftypheic\0\0\0\0", "HEIC"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n", "is no PNG"),
    ],
)
def test_files_that_are_no_pictures(tmp_path: Path, content: bytes, says: str) -> None:
    path = tmp_path / "a.png"
    path.write_bytes(content)
    for read in (images.read_size, images.read_rgb, images.read_rgba, images.inspect):
        with pytest.raises(DatasetError, match=says) as caught:
            read(path)
        assert str(path) in str(caught.value)
        assert "\n" not in str(caught.value)


def test_missing_file_and_folder(tmp_path: Path) -> None:
    for path in (tmp_path / "none.png", tmp_path):
        for read in (images.read_size, images.read_rgb, images.inspect):
            with pytest.raises(DatasetError, match="cannot be read"):
                read(path)


def bomb(width: int, height: int) -> bytes:
    body = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunk = b"IHDR" + body
    return b"\x89PNG\r\n\x1a\n" + struct.pack(">I", len(body)) + chunk + struct.pack(">I", zlib.crc32(chunk))


def test_decompression_bomb_is_refused_by_its_header(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    path.write_bytes(bomb(60000, 60000) + encoded("PNG")[33:])
    for read in (images.read_size, images.read_rgb, images.inspect):
        with pytest.raises(DatasetError, match="million pixels"):
            read(path)


FORMATS = ["PNG", "JPEG", "WEBP", "AVIF", "BMP", "GIF"]


@pytest.mark.parametrize("format_", FORMATS)
def test_truncated_files_are_found_without_decoding_them_in_full(tmp_path: Path, format_: str) -> None:
    data = encoded(format_, (96, 64))
    path = tmp_path / "a.png"
    for share in (0.2, 0.5, 0.9):
        path.write_bytes(data[: int(len(data) * share)])
        images._inspect.cache_clear()
        with pytest.raises(DatasetError):
            images.inspect(path)
        with pytest.raises(DatasetError):
            images.read_rgb(path)


@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    format_=st.sampled_from(FORMATS),
    flips=st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(0, 7)), max_size=12),
    keep=st.one_of(st.just(1.0), st.floats(0, 1)),
    insert=st.one_of(st.just(b""), st.binary(max_size=40)),
)
@pytest.mark.filterwarnings("ignore")
def test_damaged_bytes_give_a_picture_or_one_sentence(
    tmp_path: Path, format_: str, flips: list[tuple[float, int]], keep: float, insert: bytes
) -> None:
    data = bytearray(
        encoded(format_, (24, 16), exif=with_orientation(6))
        if format_ in ("JPEG", "PNG", "WEBP")
        else encoded(format_, (24, 16))
    )
    for place, bit in flips:
        data[int(place * len(data))] ^= 1 << bit
    data = data[: int(len(data) * keep)]
    middle = len(data) // 2
    path = tmp_path / "a.jpg"
    path.write_bytes(bytes(data[:middle]) + insert + bytes(data[middle:]))
    images._inspect.cache_clear()
    for read in (images.inspect, images.read_size, images.read_rgb, images.read_rgba):
        message = ""
        try:
            found = read(path)
        except DatasetError as error:
            message = str(error)
        else:
            if isinstance(found, np.ndarray):
                assert found.dtype == np.uint8
                assert found.shape[:2] == images.read_size(path)[::-1]
        assert not message or (str(path) in message and "\n" not in message)


def test_inspect_sees_a_changed_file(tmp_path: Path) -> None:
    path = picture(tmp_path / "a.png", (32, 16))
    assert images.inspect(path).size == (32, 16)
    picture(path, (48, 40))
    assert images.inspect(path).size == (48, 40)


def test_resize_equals_opencv() -> None:
    golden = np.load(GOLDEN)
    for name in golden.files:
        method, _, number = name.partition("_")
        if method == "source":
            continue
        expected = golden[name]
        size = expected.shape[1], expected.shape[0]
        source = golden[f"source_{number}"]
        found = images.resize(source, size, method)
        difference = np.abs(found.astype(int) - expected)
        assert difference.max() <= (0 if method in ("area", "nearest") else 1), name
        if method == "area":
            assert np.array_equal(images.resize(source, size), expected)


def area_reference(pixels: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """The integral of the picture over each target pixel, in float64."""

    def weights(source: int, target: int) -> np.ndarray:
        found = np.zeros((target, source))
        for row, column in itertools.product(range(target), range(source)):
            start, end = row * source / target, (row + 1) * source / target
            found[row, column] = max(0.0, min(end, column + 1) - max(start, column)) * target / source
        return found

    down, across = weights(pixels.shape[0], size[1]), weights(pixels.shape[1], size[0])
    mean: np.ndarray = np.einsum("ab,bcd,ec->aed", down, pixels.astype(np.float64), across)
    return mean


@pytest.mark.parametrize(
    ("source", "target"), [((50, 37), (23, 20)), ((64, 40), (16, 10)), ((33, 31), (32, 31))]
)
def test_shrinking_is_the_mean_over_pixel_areas(source: tuple[int, int], target: tuple[int, int]) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (source[1], source[0], 3), dtype=np.uint8)
    assert np.abs(images.resize(pixels, target) - area_reference(pixels, target)).max() <= 0.501


def test_enlarging_is_pillows_lanczos_and_mixed_too() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (30, 40, 3), dtype=np.uint8)
    for size in ((80, 60), (40, 31), (20, 40)):
        expected = np.array(Image.fromarray(pixels).resize(size, Image.Resampling.LANCZOS))
        assert np.array_equal(images.resize(pixels, size), expected)
    box = np.array(Image.fromarray(pixels).resize((17, 11), Image.Resampling.BOX))
    assert np.array_equal(images.resize(pixels, (17, 11), "box"), box)
    with pytest.raises(DatasetError, match="resize_interpolation"):
        images.resize(pixels, (17, 11), "magic")


def test_crop_starts_at_half_the_excess() -> None:
    pixels = np.arange(7 * 10 * 3, dtype=np.uint8).reshape(7, 10, 3)
    cut = images.fit_pixels(pixels, Fit((4, 4), (10, 7)))
    assert np.array_equal(cut, pixels[1:5, 3:7])


def test_tensor_values_are_minus_one_to_one() -> None:
    pixels = np.array([[[0, 128, 255]]], dtype=np.uint8)
    values = images.to_tensor_values(pixels)
    assert values.shape == (3, 1, 1)
    expected = [(np.float32(x) / np.float32(255) - np.float32(0.5)) / np.float32(0.5) for x in (0, 128, 255)]
    assert values[:, 0, 0].tolist() == [float(x) for x in expected]


def test_colour_jitter_keeps_to_its_bounds() -> None:
    pixels = np.random.default_rng(0).integers(40, 200, (16, 16, 4), dtype=np.uint8)
    kinds = {"same": 0, "hue": 0, "gamma": 0}
    for seed in range(300):
        changed = images.jitter_colour(pixels, random.Random(seed))
        assert np.array_equal(changed[:, :, 3], pixels[:, :, 3])
        if np.array_equal(changed, pixels):
            kinds["same"] += 1
            continue
        value, before = changed[:, :, :3].max(2).astype(int), pixels[:, :, :3].max(2).astype(int)
        if np.abs(value - before).max() <= 2:  # a hue shift keeps the brightest channel
            kinds["hue"] += 1
        else:
            kinds["gamma"] += 1
            low, high = pixels[:, :, :3].astype(float) ** 0.95, pixels[:, :, :3].astype(float) ** 1.05
            assert (changed[:, :, :3] >= np.floor(low) - 1).all()
            assert (changed[:, :, :3] <= np.ceil(high).clip(0, 255)).all()
    assert 150 < kinds["same"] < 250
    assert min(kinds["hue"], kinds["gamma"]) > 20


def test_face_crop_holds_the_face(tmp_path: Path) -> None:
    path = tmp_path / "girl_300_200_100_120.png"
    pixels = np.zeros((600, 800, 3), dtype=np.uint8)
    pixels[195:205, 295:305] = 255  # the middle of the face
    subset = Subset(folder=tmp_path, repeats=1, class_tokens="", face_crop_aug_range=(2.0, 4.0))
    for seed in range(20):
        cut = images.face_crop(pixels, path, subset, (256, 256), random.Random(seed))
        assert cut is not None
        assert cut.shape == (256, 256, 3)
        assert cut.max() > 100
    plain = tmp_path / "girl.png"
    assert images.face_crop(pixels, plain, subset, (256, 256), random.Random(0)) is None
    with pytest.raises(DatasetError, match="_x_y_width_height"):
        images.face_crop(pixels, tmp_path / "a_b_c_d_e.png", subset, (256, 256), random.Random(0))
