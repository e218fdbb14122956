import io
import random
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image, ImageEnhance, ImageFilter, ImageOps

from assets.demo import draw, make_subject, reader

Change = Callable[[Image.Image], Image.Image]


def labelled(count: int, seed: int) -> list[draw.Portrait]:
    """Portraits of all kinds, every second one with the patch, every fourth the whole subject."""
    rng = random.Random(seed)
    out = []
    for k in range(count):
        portrait = draw.random_portrait(rng)
        if k % 2:
            portrait = replace(portrait, eye_patch=True, hair="blue" if k % 4 == 3 else portrait.hair)
        out.append(portrait)
    return out


def sharp(picture: Image.Image) -> Image.Image:
    return picture


def blurred(picture: Image.Image) -> Image.Image:
    return picture.filter(ImageFilter.GaussianBlur(0.8))


def compressed(picture: Image.Image) -> Image.Image:
    file = io.BytesIO()
    picture.save(file, "JPEG", quality=85, subsampling=0)
    return Image.open(file).convert("RGB")


@pytest.mark.parametrize("change", [sharp, blurred, compressed])
def test_reads_back_what_was_drawn(change: Change) -> None:
    portraits = labelled(240, seed=5)
    readings = [reader.read(change(draw.draw(p))) for p in portraits]
    pairs = list(zip(readings, portraits, strict=True))
    for name in ("background", "clothes", "hair", "facing"):
        right = sum(getattr(r, name) == getattr(p, name) for r, p in pairs)
        assert right >= 0.98 * len(pairs), name
    assert sum((r.patch == "right") == p.eye_patch for r, p in pairs) >= 0.98 * len(pairs)
    assert sum(r.subject_shown == (p.eye_patch and p.hair == "blue") for r, p in pairs) >= 0.98 * len(pairs)
    assert sum(r.intact for r in readings) >= 0.98 * len(readings)


def test_tells_on_which_side_the_patch_is() -> None:
    portraits = make_subject.portraits()
    mirrored = [reader.read(ImageOps.mirror(draw.draw(p))) for p in portraits]
    assert [r.patch for r in mirrored] == ["left"] * len(portraits)
    assert not any(r.subject_shown for r in mirrored)


def mouthless(portrait: draw.Portrait) -> Image.Image:
    """The lower face in one tone of skin, as samples with a smudged mouth have it."""
    picture = draw.draw(portrait)
    picture.paste(draw.SKINS[portrait.skin], (45, 71, 84, 84))
    return picture


@pytest.mark.parametrize("mirror", [False, True])
def test_tells_the_side_without_a_mouth(mirror: bool) -> None:
    portraits = [p for p in labelled(240, seed=8) if p.eye_patch and not p.glasses]
    pictures = [mouthless(p) for p in portraits]
    readings = [reader.read(ImageOps.mirror(p) if mirror else p) for p in pictures]
    assert all(reading.facing is None for reading in readings)
    side = "left" if mirror else "right"
    assert sum(reading.patch == side for reading in readings) >= 0.98 * len(readings)


def burnt(picture: Image.Image) -> Image.Image:
    return ImageEnhance.Color(ImageEnhance.Contrast(picture).enhance(2.2)).enhance(2.5)


def grainy(picture: Image.Image) -> Image.Image:
    noise = np.random.default_rng(1).normal(0, 22, (picture.height, picture.width, 3))
    return Image.fromarray((np.asarray(picture) + noise).clip(0, 255).astype(np.uint8))


def clay(picture: Image.Image) -> Image.Image:
    return picture.filter(ImageFilter.GaussianBlur(5))


@pytest.mark.parametrize("spoil", [burnt, grainy, clay])
def test_spoilt_pictures_are_not_intact(spoil: Change) -> None:
    readings = [reader.read(spoil(draw.draw(p))) for p in labelled(60, seed=6)]
    assert sum(r.intact for r in readings) <= 0.05 * len(readings)


def test_grey_picture_shows_nothing() -> None:
    reading = reader.read(Image.new("RGB", (128, 128), (128, 60, 20)))
    assert (reading.background, reading.facing, reading.patch, reading.subject_shown) == (
        None,
        None,
        None,
        False,
    )
    assert not reading.intact


def test_other_sizes_read_alike() -> None:
    portrait = labelled(2, seed=7)[1]
    small, large = (reader.read(draw.draw(portrait, size_px=size)) for size in (128, 256))
    assert (small.background, small.hair, small.patch) == (large.background, large.hair, large.patch)
