"""The presets that come with the program: Kohya JSON files in presets/."""

from __future__ import annotations

from pathlib import Path

from trainer import config as configuration
from trainer.config import KohyaConfig, Loaded
from trainer.errors import ConfigError
from trainer.files import REPOSITORY

__all__ = ["DEMO", "NEW", "base_of", "choices", "lay", "names", "path_of"]

FOLDER = REPOSITORY / "presets"
DEMO = "demo"
NEW = KohyaConfig(hold_out=True)
"""Where a person begins. A file that has no such key, as Kohya's have not, trains all pictures, as there."""

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


def lay(name: str, typed: KohyaConfig, base: Path) -> tuple[Loaded, Path]:
    """Lay a preset over what stands on the page: the paths and names there stay, as in Kohya.

    A preset with training pictures of its own is a whole configuration and takes the page's place.

    Args:
        name: Of the preset.
        typed: What stands on the page.
        base: Folder that relative paths on the page start from.

    Returns:
        The configuration, and the folder that its relative paths start from.

    Raises:
        ConfigError: There is no such preset.
    """
    file = path_of(name)
    whole = configuration.load(file)
    if whole.config.train_data_dir or whole.config.dataset_config:
        return whole, base_of(file)
    return configuration.lay_over(file, typed), base
