"""File tools in the queue; see `app.works`."""

from __future__ import annotations

from pathlib import Path

from app.paths import Paths
from trainer.tools.work import READS, ToolWork

__all__ = ["work"]


def work(settings: str, base: Path, paths: Paths) -> ToolWork:
    """The use of a tool that stands in the list of runs, with its paths made absolute.

    Args:
        settings: From `ToolWork.as_json`.
        base: Folder that relative paths start from.
        paths: What may be read and written.

    Raises:
        ConfigError: The settings cannot be used, or name files outside the roots.
    """
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
