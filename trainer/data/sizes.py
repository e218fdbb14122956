"""Sizes as Kohya's files write them."""

from __future__ import annotations

from trainer.errors import ConfigError

__all__ = ["parse_resolution"]


def parse_resolution(text: str) -> tuple[int, int]:
    """Read max_resolution: "512,512", "512x768" or "512" as (width, height) in pixels.

    Raises:
        ConfigError: Not one or two whole numbers above 0.
    """
    parts = text.lower().replace("x", ",").replace(" ", "").strip(",").split(",")
    try:
        numbers = [int(float(part)) for part in parts]
    except (ValueError, OverflowError):
        numbers = []
    if len(numbers) not in (1, 2) or min(numbers) < 1:
        raise ConfigError(f'max_resolution is {text!r}: write width and height in pixels, e.g. "512,512"')
    return numbers[0], numbers[-1]
