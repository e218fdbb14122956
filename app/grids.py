"""Grids of pictures in the queue; see `app.works`."""

from __future__ import annotations

from pathlib import Path

from app.paths import Paths
from trainer.review.grid import Grid

__all__ = ["work"]


def work(settings: str, base: Path, paths: Paths) -> Grid:
    """The grid that stands in the list of runs.

    Args:
        settings: From `Grid.as_json`.
        base: Folder that the configuration's relative paths start from.
        paths: What may be read and written.

    Raises:
        ConfigError: The settings cannot be used, or name files outside the roots.
    """
    grid = Grid.from_json(settings, base)
    paths.resolve(str(grid.folder), write=True)
    for file, _ in grid.files:
        paths.resolve(str(file))
    paths.check(grid.job())
    return grid
