from __future__ import annotations

import math
import random
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.data.material import job
from trainer.data.buckets import (
    LATENT_MULTIPLE,
    STEP_MULTIPLE,
    BucketRules,
    aspect_error,
    crop_ltrb,
    make_buckets,
)
from trainer.data.types import Size
from trainer.errors import ConfigError, DatasetError
from trainer.families.sd import StableDiffusion


def rules(**values: object) -> BucketRules:
    given_values = {
        "resolution": (512, 512),
        "enabled": True,
        "minimum": 256,
        "maximum": 1024,
        "step": 64,
        "no_upscale": False,
        "family": "sd",
    }
    return BucketRules.make(**{**given_values, **values})  # type: ignore[arg-type]


def test_golden_list_of_512() -> None:
    tall = [(256, 832), (256, 896), (256, 960), (256, 1024), (320, 704), (320, 768), (384, 640), (448, 576)]
    expected = sorted([*tall, (512, 512), *((h, w) for w, h in tall)])
    assert make_buckets((512, 512), 256, 1024, 64) == expected
    assert len(expected) == 17


@pytest.mark.parametrize(
    ("resolution", "minimum", "maximum", "count"),
    [
        ((512, 512), 256, 1024, 17),
        ((1024, 1024), 256, 2048, 41),
        ((1024, 1024), 512, 2048, 33),
        ((768, 768), 256, 2048, 41),
        ((512, 768), 256, 1024, 19),
    ],
)
def test_golden_counts(resolution: Size, minimum: int, maximum: int, count: int) -> None:
    found = make_buckets(resolution, minimum, maximum, 64)
    assert len(found) == count
    if resolution == (512, 768):
        assert (576, 576) in found


def enumerated(resolution: Size, minimum: int, maximum: int, step: int) -> list[Size]:
    """Every pair of edges on the grid such that one edge is the longest that fits beside the other."""
    area = resolution[0] * resolution[1]
    grid = range(minimum, maximum + 1, step)
    found = set()
    for width in grid:
        fitting = [height for height in grid if width * height <= area]
        if fitting:
            found |= {(width, max(fitting)), (max(fitting), width)}
    square = max(edge for edge in range(step, 65536, step) if edge * edge <= area)
    return sorted(found | {(square, square)})


@given(
    width=st.integers(1, 40).map(lambda x: x * 64),
    height=st.integers(1, 40).map(lambda x: x * 64),
    minimum=st.integers(1, 8).map(lambda x: x * 64),
    spread=st.integers(0, 30).map(lambda x: x * 64),
)
def test_list_equals_brute_force(width: int, height: int, minimum: int, spread: int) -> None:
    maximum = minimum + spread
    assert make_buckets((width, height), minimum, maximum, 64) == enumerated(
        (width, height), minimum, maximum, 64
    )


def chosen_with_upscale(size: Size, sizes: list[Size]) -> tuple[Size, Size]:
    """An independent selection: nearest aspect by exhaustive comparison."""
    w, h = size
    if size in sizes:
        return size, size
    best, best_error = sizes[0], math.inf
    for candidate in sizes:
        error = abs(candidate[0] / candidate[1] - w / h)
        if error < best_error:
            best, best_error = candidate, error
    # Cover the bucket: the larger of the two exact scales.
    scale = max(Fraction(best[0], w), Fraction(best[1], h))
    return best, (math.floor(w * scale + Fraction(1, 2)), math.floor(h * scale + Fraction(1, 2)))


def chosen_without_upscale(size: Size, resolution: Size, step: int) -> tuple[Size, Size]:
    """An independent selection: both candidates are built and compared."""
    w, h = size
    area = resolution[0] * resolution[1]
    resized = size
    if w * h > area:
        aspect = w / h

        def down(x: float) -> int:
            return int(x + 0.5) // step * step

        wide = math.sqrt(area * aspect)
        tall = area / wide
        first = (down(wide), down(down(wide) / aspect))
        second = (down(down(tall) * aspect), down(tall))
        if abs(first[0] / first[1] - aspect) < abs(second[0] / second[1] - aspect):
            resized = (first[0], int(first[0] / aspect + 0.5))
        else:
            resized = (int(second[1] * aspect + 0.5), second[1])
    return (resized[0] // step * step, resized[1] // step * step), resized


def test_24000_random_sizes() -> None:
    rng = random.Random(5)
    sizes = make_buckets((512, 512), 256, 1024, 64)
    large = make_buckets((1024, 1024), 256, 2048, 64)
    small_rules, large_rules = rules(), rules(resolution=(1024, 1024), maximum=2048)
    free_rules = rules(no_upscale=True)
    off_by_one = 0
    for _ in range(8000):
        size = (rng.randint(200, 5000), rng.randint(200, 5000))
        for chooser, listed in ((small_rules, sizes), (large_rules, large)):
            fit = chooser.fit(size)
            bucket, resized = chosen_with_upscale(size, listed)
            assert fit.bucket == bucket
            # Exact fractions and floats may fall on different sides of a half.
            difference = max(abs(fit.resized[0] - resized[0]), abs(fit.resized[1] - resized[1]))
            assert difference <= 1
            off_by_one += difference
            assert fit.resized[0] >= bucket[0]
            assert fit.resized[1] >= bucket[1]
        if min(size) >= 64:
            fit = free_rules.fit(size)
            assert (fit.bucket, fit.resized) == chosen_without_upscale(size, (512, 512), 64)
            assert not fit.upscaled(size)
    assert off_by_one < 20


def test_no_upscale_keeps_a_small_picture_and_shrinks_a_large_one() -> None:
    free = rules(no_upscale=True)
    assert free.fit((300, 400)).resized == (300, 400)
    assert free.fit((300, 400)).bucket == (256, 384)
    assert free.fit((4000, 3000)).bucket[0] * free.fit((4000, 3000)).bucket[1] <= 512 * 512
    # min and max play no part: wider than max_bucket_reso.
    assert free.fit((2000, 100)).bucket == (1984, 64)


@pytest.mark.parametrize(
    ("size", "says"),
    [
        ((40, 400), "too few"),
        ((400, 63), "too few"),
        ((1, 1), "too few"),
        ((60000, 65), "narrower than a bucket step"),
    ],
)
def test_picture_below_one_step_is_refused_without_upscaling(size: Size, says: str) -> None:
    with pytest.raises(DatasetError, match=says):
        rules(no_upscale=True).fit(size)


@given(width=st.integers(1, 20000), height=st.integers(1, 20000))
def test_every_size_gets_a_bucket_it_covers(width: int, height: int) -> None:
    for chooser in (rules(), rules(resolution=(512, 768)), rules(enabled=False)):
        fit = chooser.fit((width, height))
        assert fit.resized[0] >= fit.bucket[0]
        assert fit.resized[1] >= fit.bucket[1]


def test_without_buckets_there_is_one_size() -> None:
    one = rules(enabled=False)
    assert one.fit((1000, 600)).bucket == (512, 512)
    assert one.fit((1000, 600)).resized == (853, 512)
    assert one.fit((100, 100)).resized == (512, 512)


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"step": 32}, "bucket_reso_steps is 32: sd models need a multiple of 64"),
        ({"step": 0}, "bucket_reso_steps is 0"),
        ({"step": 16, "family": "sdxl"}, "multiple of 32"),
        ({"step": 32, "family": "flux"}, "multiple of 64"),
        ({"minimum": 640}, "min_bucket_reso 640 is larger"),
        ({"maximum": 448}, "max_bucket_reso 448 is smaller"),
        ({"resolution": (509, 512), "enabled": False}, "multiples of 8"),
        ({"resolution": (32, 32), "minimum": 0, "maximum": 64}, "smaller than one bucket step"),
    ],
)
def test_settings_that_cannot_be_met(values: dict[str, object], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        rules(**values)


def test_sdxl_may_step_by_32_and_edges_are_rounded_to_steps() -> None:
    assert rules(step=32, family="sdxl").step == 32
    rounded = rules(minimum=300, maximum=1000)
    assert (rounded.minimum, rounded.maximum) == (256, 1024)
    assert list(rounded.sizes) == make_buckets((512, 512), 256, 1024, 64)


def test_rules_come_from_the_job(tmp_path: Path) -> None:
    found = BucketRules.from_job(
        job(
            tmp_path,
            max_resolution="512,768",
            bucket_no_upscale=False,
            min_bucket_reso=256,
            max_bucket_reso=1024,
        )
    )
    assert found == rules(resolution=(512, 768))
    assert replace(found, resolution=(512, 512)) != found


def test_sdxl_crop_example() -> None:
    left, top, right, bottom = crop_ltrb((896, 1152), (1200, 1600))
    assert [int(x) for x in (left, top, right, bottom)] == [16, 0, 880, 1152]
    assert 896 - int(right) == 16  # the left edge of a mirrored sample


@given(w=st.integers(1, 5000), h=st.integers(1, 5000), bw=st.integers(1, 40), bh=st.integers(1, 40))
def test_crop_describes_the_whole_picture_inside_the_bucket(w: int, h: int, bw: int, bh: int) -> None:
    bucket = (bw * 64, bh * 64)
    left, top, right, bottom = crop_ltrb(bucket, (w, h))
    assert left >= 0
    assert top >= 0
    assert right <= bucket[0] + 1e-6
    assert bottom <= bucket[1] + 1e-6
    assert math.isclose((right - left) / (bottom - top), w / h, rel_tol=1e-9)


def test_aspect_error() -> None:
    assert aspect_error((512, 512), (600, 400)) == pytest.approx(0.5)


def test_families_and_buckets_agree_on_steps() -> None:
    assert STEP_MULTIPLE["sd"] == StableDiffusion.bucket_steps
    assert LATENT_MULTIPLE["sd"] == StableDiffusion.latent_factor
