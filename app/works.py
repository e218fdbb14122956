"""The kinds of work, beside training, that the queue can hold: made from the settings in the list of runs.

What is made may read and write nothing outside the roots.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from app.paths import Paths
from trainer.errors import ConfigError
from trainer.review.grid import Grid
from trainer.review.judging import Judging
from trainer.tools.work import READS, ToolWork

if TYPE_CHECKING:
    from trainer.work import Work

__all__ = ["KINDS", "load"]


def _captions(settings: str, base: Path, paths: Paths) -> Work:
    from app.captions import work  # it needs the session, which needs this module

    return work(settings, base, paths)


def _grid(settings: str, base: Path, paths: Paths) -> Work:
    grid = Grid.from_json(settings, base)
    paths.resolve(str(grid.folder), write=True)
    for file, _ in grid.files:
        paths.resolve(str(file))
    paths.check(grid.job())
    return grid


def _verdict(settings: str, base: Path, paths: Paths) -> Work:
    judging = Judging.from_json(settings, base)
    paths.resolve(str(judging.folder), write=True)
    paths.check(judging.job())
    return judging


def _tool(settings: str, base: Path, paths: Paths) -> Work:
    asked = ToolWork.from_json(settings)
    values = dict(asked.values)
    for name in READS:
        named = values.get(name)
        if isinstance(named, str):
            values[name] = str(paths.resolve(named, base=base))
        elif isinstance(named, list):
            values[name] = [str(paths.resolve(str(each), base=base)) for each in named]
    values["output"] = str(paths.resolve(str(values["output"]), write=True, base=base))
    return ToolWork(asked.tool, values)


KINDS: dict[str, Callable[[str, Path, Paths], Work]] = {
    "captions": _captions,
    "grid": _grid,
    "tool": _tool,
    "verdict": _verdict,
}
"""Kind of work to what makes it."""


def load(kind: str, settings: str, base: Path, paths: Paths) -> Work:
    """Make the work that stands in the list of runs.

    Args:
        kind: A key of `KINDS`.
        settings: What the work's ``as_json`` wrote, perhaps in an older version of the program.
        base: Folder that relative paths start from.
        paths: What may be read and written.

    Raises:
        ConfigError: The kind is unknown, or the settings cannot be used or name files outside the roots.
    """
    if kind not in KINDS:
        raise ConfigError(
            f"this program does not know the work {kind!r}: it is a newer version's, or was removed"
        )
    return KINDS[kind](settings, base, paths)
