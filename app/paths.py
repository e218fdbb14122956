"""Which files a person may name on the page.

On loopback the page is its user's own: paths are typed freely, as in Kohya. Served to other
machines, every path lies inside the named roots, after all links are followed.
"""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from pathlib import Path, PureWindowsPath
from typing import Any

from trainer.config import KohyaConfig, ui_of
from trainer.errors import ConfigError
from trainer.files import REPOSITORY
from trainer.job import Job

__all__ = ["Paths"]

SHIPPED = (REPOSITORY / "assets", REPOSITORY / "presets")


class Paths:
    """Resolves typed paths.

    Args:
        roots: Folders by name; ``name/sub/file`` is read as a path inside one.
        confined: Whether nothing outside the roots may be named.
    """

    def __init__(self, roots: Mapping[str, Path], *, confined: bool) -> None:
        self.roots = {name: path.resolve() for name, path in roots.items()}
        self.confined = confined

    def resolve(self, text: str, *, write: bool = False, base: Path | None = None) -> Path:
        """The file or folder that ``text`` names.

        Args:
            text: As typed: a path, or one that starts with a root's name.
            write: Whether it is going to be written; the program's own files are read-only.
            base: Folder of relative paths; the working folder if None.

        Raises:
            ConfigError: Empty, of another kind of machine, or outside the roots.
        """
        text = text.strip()
        if not text or "\0" in text:
            raise ConfigError("the path is empty: type one")
        first, _, rest = text.replace("\\", "/").partition("/")
        typed = (base or Path.cwd()) / Path(text).expanduser()
        path = self.roots[first] / rest if first in self.roots else typed
        if not self.confined:
            return path.resolve()
        if PureWindowsPath(text).drive and not path.drive:
            raise ConfigError(f"{text} is a Windows path, and this server does not run on Windows")
        if ".." in Path(text.replace("\\", "/")).parts or ":" in path.name:
            raise ConfigError(f"{text} is not allowed: name it from one of the roots, {self._names()}")
        resolved = path.resolve()
        allowed = [*self.roots.values(), *(() if write else SHIPPED)]
        if not any(resolved == root or resolved.is_relative_to(root) for root in allowed):
            raise ConfigError(f"{text} is outside the folders of this server: it has {self._names()}")
        return resolved

    def _names(self) -> str:
        return ", ".join(sorted(self.roots)) or "none (start it with --root NAME=PATH)"

    def check(self, job: Job) -> None:
        """Every path of a run, before it starts.

        Raises:
            ConfigError: One lies outside the roots.
        """
        if not self.confined:
            return
        config = job.config
        for name in KohyaConfig.model_fields:
            value = getattr(config, name)
            if ui_of(name).path and isinstance(value, str) and value.strip():
                self.check_one(job, value, write=name in ("output_dir", "logging_dir"))
        for text in job.engine.base_weights:
            self.check_one(job, text)
        if config.dataset_config.strip():
            for text in _named_in(job.path(config.dataset_config)):
                self.check_one(job, text)

    def check_one(self, job: Job, text: str, *, write: bool = False) -> None:
        """One path of a run, as the trainer will read it."""
        self.resolve(str(job.path(text)), write=write)


def _named_in(path: Path) -> list[str]:
    """Paths that a dataset_config names."""
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} cannot be read as TOML: {error}") from error
    found: list[str] = []

    def walk(value: Any) -> None:
        if isinstance(value, dict):
            for name, item in value.items():
                if isinstance(item, str) and name.endswith(("dir", "file")):
                    found.append(item)
                walk(item)
        elif isinstance(value, list):
            for item in value:
                walk(item)

    walk(values)
    return found
