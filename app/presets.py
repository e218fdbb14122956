"""The presets that come with the program: Kohya JSON files in presets/."""

from __future__ import annotations

from pathlib import Path

from trainer.errors import ConfigError
from trainer.files import REPOSITORY

__all__ = ["base_of", "names", "path_of"]

FOLDER = REPOSITORY / "presets"


def names() -> list[str]:
    """File names without ending, the demo last."""
    found = sorted(path.stem for path in FOLDER.glob("*.json"))
    return sorted(found, key=lambda name: name == "demo")


def path_of(name: str) -> Path:
    """The file of a preset.

    Raises:
        ConfigError: There is none of that name.
    """
    if name not in names():
        raise ConfigError(f"there is no preset {name!r}: choose one of {', '.join(names())}")
    return FOLDER / f"{name}.json"


def base_of(file: Path) -> Path:
    """Where a file's relative paths start: the repository for its presets, else the working folder."""
    return REPOSITORY if file.resolve().is_relative_to(FOLDER) else Path.cwd()
