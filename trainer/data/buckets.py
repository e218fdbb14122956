"""Buckets: which sizes training uses, and which of them each picture gets.

Figures are those of sd-scripts (model_util.py:make_bucket_resolutions, train_util.py:BucketManager),
to the last rounding, since the size decides which batch a picture is in.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from trainer.data.types import Fit, Size
from trainer.errors import ConfigError, DatasetError
from trainer.job import Job

__all__ = ["LATENT_MULTIPLE", "STEP_MULTIPLE", "BucketRules", "aspect_error", "crop_ltrb", "make_buckets"]

STEP_MULTIPLE: Mapping[str, int] = {"sd": 64, "sdxl": 32, "flux": 64}
"""bucket_reso_steps must be a multiple of this (sd-scripts: assert_extra_args of each trainer)."""

LATENT_MULTIPLE: Mapping[str, int] = {"sd": 8, "sdxl": 8, "flux": 16}
"""Pixels to a latent; FLUX packs 2 x 2 latents into a token."""


def make_buckets(resolution: Size, minimum: int, maximum: int, step: int) -> list[Size]:
    """All sizes of about the area of ``resolution``, ascending.

    Args:
        resolution: (width, height) in pixels.
        minimum: Shortest edge, a multiple of ``step``.
        maximum: Longest edge, a multiple of ``step``.
        step: Edges are multiples of it.
    """
    area = resolution[0] * resolution[1]
    square = int(math.sqrt(area) // step) * step
    sizes = {(square, square)}
    for width in range(minimum, maximum + 1, step):
        height = min(maximum, area // width // step * step)
        if height >= minimum:
            sizes |= {(width, height), (height, width)}
    return sorted(sizes)


def crop_ltrb(bucket: Size, original: Size) -> tuple[float, float, float, float]:
    """Left, top, right, bottom as SDXL is told them: how the whole picture would lie inside the bucket.

    Not the crop that is really made (sd-scripts, train_util.py:BucketManager.get_crop_ltrb, after
    Stability AI's preprocessing).

    Args:
        bucket: (width, height) that is trained.
        original: (width, height) of the file.
    """
    aspect = original[0] / original[1]
    width: float
    height: float
    if bucket[0] / bucket[1] > aspect:
        width, height = bucket[1] * aspect, bucket[1]
    else:
        width, height = bucket[0], bucket[0] / aspect
    left, top = (bucket[0] - width) // 2, (bucket[1] - height) // 2
    return left, top, left + width, top + height


def aspect_error(bucket: Size, size: Size) -> float:
    """How far the bucket's aspect ratio is from the picture's."""
    return abs(bucket[0] / bucket[1] - size[0] / size[1])


def _half_up(value: float) -> int:
    return int(value + 0.5)


@dataclass(frozen=True)
class BucketRules:
    """How pictures are sorted into sizes; `from_job` checks the values."""

    resolution: Size
    enabled: bool
    minimum: int
    maximum: int
    step: int
    no_upscale: bool
    sizes: tuple[Size, ...] = ()
    """The sizes to choose from; empty with ``no_upscale`` and without buckets."""

    @classmethod
    def make(
        cls,
        *,
        resolution: Size,
        enabled: bool,
        minimum: int,
        maximum: int,
        step: int,
        no_upscale: bool,
        family: str,
    ) -> BucketRules:
        """Check the values as sd-scripts does and list the sizes.

        Args:
            resolution: (width, height) that gives the area, and the one size without buckets.
            enabled: enable_bucket.
            minimum: Shortest edge; lowered to a multiple of ``step``.
            maximum: Longest edge; raised to a multiple of ``step``.
            step: bucket_reso_steps.
            no_upscale: Never enlarge; ``minimum`` and ``maximum`` then say nothing.
            family: sd, sdxl or flux, for what sizes it can work with.

        Raises:
            ConfigError: Values that contradict each other or that the family cannot work with.
        """
        width, height = resolution
        if not enabled:
            multiple = LATENT_MULTIPLE[family]
            if width % multiple or height % multiple:
                raise ConfigError(
                    f"max_resolution {width},{height} must be multiples of {multiple} "
                    "when enable_bucket is off: round them, or switch buckets on"
                )
            return cls(resolution, False, 0, 0, multiple, False)
        multiple = STEP_MULTIPLE[family]
        if step < 1 or step % multiple:
            raise ConfigError(
                f"bucket_reso_steps is {step}: {family} models need a multiple of {multiple}, such as 64"
            )
        minimum -= minimum % step
        maximum += -maximum % step
        wrong = []
        if min(width, height) < minimum:
            wrong.append(
                f"min_bucket_reso {minimum} is larger than max_resolution {width},{height}: "
                "lower it, or raise the resolution"
            )
        if max(width, height) > maximum:
            wrong.append(
                f"max_bucket_reso {maximum} is smaller than max_resolution {width},{height}: "
                "raise it, or lower the resolution"
            )
        if wrong:
            raise ConfigError(*wrong)
        # A minimum below the step would become 0, which no size can have.
        sizes = () if no_upscale else make_buckets(resolution, max(minimum, step), maximum, step)
        if (0, 0) in sizes:
            raise ConfigError(
                f"max_resolution {width},{height} is smaller than one bucket step of {step} pixels: raise it"
            )
        return cls(resolution, True, minimum, maximum, step, no_upscale, tuple(sizes))

    @classmethod
    def from_job(cls, job: Job) -> BucketRules:
        """The rules that a job's fields give. Raises ConfigError as `make` does."""
        config = job.config
        return cls.make(
            resolution=(job.width, job.height),
            enabled=config.enable_bucket,
            minimum=config.min_bucket_reso,
            maximum=config.max_bucket_reso,
            step=config.bucket_reso_steps,
            no_upscale=config.bucket_no_upscale,
            family=job.family,
        )

    def fit(self, size: Size) -> Fit:
        """The bucket of a picture and the size that it is resized to before cropping.

        Args:
            size: Upright (width, height) of the picture.

        Raises:
            DatasetError: The picture is too small for any bucket.
        """
        if not self.enabled:
            return Fit(self.resolution, _cover(size, self.resolution))
        if self.no_upscale:
            return self._fit_without_enlarging(size)
        aspect = size[0] / size[1]
        bucket = size if size in self.sizes else min(self.sizes, key=lambda b: abs(b[0] / b[1] - aspect))
        return Fit(bucket, _cover(size, bucket))

    def _fit_without_enlarging(self, size: Size) -> Fit:
        width, height = size
        area = self.resolution[0] * self.resolution[1]
        resized = size
        if width * height > area:
            resized = self._shrunk(width / height, area)
        bucket = (resized[0] - resized[0] % self.step, resized[1] - resized[1] % self.step)
        if not all(bucket):
            if width * height <= area:
                raise DatasetError(
                    f"{width} x {height} pixels are too few for a bucket step of {self.step}: "
                    "use a larger picture, or switch bucket_no_upscale off"
                )
            raise DatasetError(
                f"{width} x {height} pixels, shrunk to the area of max_resolution {self.resolution[0]},"
                f"{self.resolution[1]}, are narrower than a bucket step of {self.step}: "
                "raise the resolution, or switch bucket_no_upscale off"
            )
        return Fit(bucket, resized)

    def _shrunk(self, aspect: float, area: int) -> Size:
        """About ``area`` pixels, one edge a multiple of the step: the one that keeps the aspect better."""
        ideal_width = math.sqrt(area * aspect)
        ideal_height = area / ideal_width
        width = self._floored(ideal_width)
        height_for_width = self._floored(width / aspect)
        height = self._floored(ideal_height)
        width_for_height = self._floored(height * aspect)
        # A picture so long that an edge rounds to 0 is refused by the caller.
        by_width = abs(width / height_for_width - aspect) if height_for_width else math.inf
        by_height = abs(width_for_height / height - aspect) if height else math.inf
        if by_width < by_height:
            return width, _half_up(width / aspect)
        return _half_up(height * aspect), height

    def _floored(self, value: float) -> int:
        rounded = _half_up(value)
        return rounded - rounded % self.step


def _cover(size: Size, bucket: Size) -> Size:
    """The picture's size once it just covers ``bucket``."""
    wider = size[0] / size[1] > bucket[0] / bucket[1]
    scale = bucket[1] / size[1] if wider else bucket[0] / size[0]
    resized = _half_up(size[0] * scale), _half_up(size[1] * scale)
    # Rounding of extreme aspects may end a pixel short of the bucket, where sd-scripts stops.
    return max(resized[0], bucket[0]), max(resized[1], bucket[1])
