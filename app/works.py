"""The kinds of work, beside training, that the queue can hold."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import TYPE_CHECKING

from app.paths import Paths
from trainer.errors import ConfigError

if TYPE_CHECKING:
    from trainer.work import Work

__all__ = ["KINDS", "load"]

KINDS: dict[str, str] = {
    "captions": "app.captions",
    "grid": "app.grids",
    "tool": "app.tool_works",
    "verdict": "app.judging",
}
"""Kind of work to the module whose ``work(settings, base, paths)`` makes it from the settings in the list."""


def load(kind: str, settings: str, base: Path, paths: Paths) -> Work:
    """Make the work that stands in the list of runs.

    Args:
        kind: A key of `KINDS`.
        settings: What the kind's module wrote: JSON, which may be of an older version of the program.
        base: Folder that relative paths start from.
        paths: What may be read and written.

    Raises:
        ConfigError: The kind is unknown, or the settings cannot be used.
    """
    if kind not in KINDS:
        raise ConfigError(
            f"this program does not know the work {kind!r}: it is a newer version's, or was removed"
        )
    work: Work = importlib.import_module(KINDS[kind]).work(settings, base, paths)
    return work
