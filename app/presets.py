"""The presets that come with the program: Kohya JSON files in presets/."""

from __future__ import annotations

from pathlib import Path

from trainer.errors import ConfigError
from trainer.files import REPOSITORY

__all__ = ["DEMO", "base_of", "choices", "names", "path_of"]

FOLDER = REPOSITORY / "presets"
DEMO = "demo"

WORDS = {"sd15": "SD 1.5", "sd2": "SD 2", "sdxl": "SDXL", "flux": "FLUX", "lora": "LoRA", "locon": "LoCon"}
"""Parts of file names that are not spelled as they are read."""


def names() -> list[str]:
    """File names without ending, the demo last."""
    found = sorted(path.stem for path in FOLDER.glob("*.json"))
    return sorted(found, key=lambda name: name == DEMO)


def choices() -> list[tuple[str, str]]:
    """Title and name of each preset, as a dropdown takes them."""
    return [(title(name), name) for name in names()]


def title(name: str) -> str:
    """A file name as a person reads it: sd15_photo is "SD 1.5 photo"."""
    words = [WORDS.get(word.lower(), word) for word in name.replace("-", "_").split("_") if word]
    text = " ".join(words)
    return text[:1].upper() + text[1:]


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
