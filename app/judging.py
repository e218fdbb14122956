"""Verdicts in the queue; see `app.works`."""

from __future__ import annotations

from pathlib import Path

from app.paths import Paths
from trainer.review.judging import Judging

__all__ = ["work"]


def work(settings: str, base: Path, paths: Paths) -> Judging:
    """The verdict that stands in the list of runs.

    Args:
        settings: From `Judging.as_json`.
        base: Folder that the configuration's relative paths start from.
        paths: What may be read and written.

    Raises:
        ConfigError: The settings cannot be used, or name files outside the roots.
    """
    judging = Judging.from_json(settings, base)
    paths.resolve(str(judging.folder), write=True)
    paths.check(judging.job())
    return judging
