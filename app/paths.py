"""Which files a person may name on the page.

On loopback the page is its user's own: paths are typed freely, as in Kohya. Served to other
machines, every path lies inside the named roots, after all links are followed.
"""

from __future__ import annotations

import json
import os
import re
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path, PureWindowsPath
from typing import Any

from trainer.config import KohyaConfig, ui_of
from trainer.errors import ConfigError
from trainer.files import REPOSITORY
from trainer.job import Job
from trainer.prompts import named_file

__all__ = ["Paths"]

SHIPPED = (REPOSITORY / "assets", REPOSITORY / "presets")
PATH_FIELDS = tuple(name for name in KohyaConfig.model_fields if ui_of(name).path)
WRITTEN = ("output_dir", "logging_dir")
HUB_NAME = re.compile(r"(?!.*\.\.)[\w.-]+/[\w.-]+(/(blob|resolve)/[\w./-]+)?", re.ASCII)
"""owner/name, as models are called on the hub; where no such file exists, the trainer asks there. ../name is a path."""


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
        self._refuse_foreign(text)
        parts = text.replace("\\", "/").split("/")
        try:
            is_named = parts[0] in self.roots
            path = self._inside(parts) if is_named else (base or Path.cwd()) / Path(text).expanduser()
            resolved = path.resolve()
        except (OSError, RuntimeError, ValueError) as error:  # links in a circle, ~ of nobody
            raise ConfigError(f"{text} is no path here ({error}): check it") from error
        if not self.confined:
            return resolved
        # A colon in a name is a hidden stream on Windows.
        if ".." in parts or ":" in resolved.name:
            raise ConfigError(f"{text} is not allowed: name it from one of the roots, {self._names()}")
        allowed = [*self.roots.values(), *(() if write else SHIPPED)]
        if not any(resolved.is_relative_to(root) for root in allowed):
            raise ConfigError(f"{text} is outside the folders of this server: it has {self._names()}")
        return resolved

    def _inside(self, parts: Sequence[str]) -> Path:
        """``name/sub/file``, split at its slashes; an empty part must not lead out of the root."""
        return self.roots[parts[0]].joinpath(*(part for part in parts[1:] if part))

    def _refuse_foreign(self, text: str) -> None:
        """Raise ConfigError for what must not even be looked at.

        Asking for a file on a network share tells that share's machine who asks.
        """
        if not self.confined:
            return
        drive = PureWindowsPath(text).drive
        is_share = drive.startswith("\\\\")
        if drive and (
            os.name != "nt" or (is_share and all(root.drive != drive for root in self.roots.values()))
        ):
            kind = "on a network share" if is_share else "a Windows path"
            raise ConfigError(f"{text} is {kind}, which this server does not use: it has {self._names()}")

    def _names(self) -> str:
        return ", ".join(sorted(self.roots)) or "none (start it with --root NAME=PATH)"

    def expand(self, config: KohyaConfig) -> KohyaConfig:
        """The same settings with ``name/sub`` made a path wherever a field starts with a root's name."""
        values = {}
        for name in PATH_FIELDS:
            parts = str(getattr(config, name)).strip().replace("\\", "/").split("/")
            if parts[0] in self.roots:
                values[name] = str(self._inside(parts))
        return config.model_copy(update=values)

    def writable(self, config: KohyaConfig) -> KohyaConfig:
        """The same settings with results going into the first root, where they may not go elsewhere."""
        if not (self.confined and self.roots):
            return config
        folder = next(iter(self.roots.values())) / config.output_name
        return config.model_copy(update={"output_dir": str(folder), "logging_dir": str(folder / "logs")})

    def check(self, job: Job) -> None:
        """Everything of a run that names files, before it starts.

        Raises:
            ConfigError: It would read or write outside the roots: all places where it would.
        """
        if not self.confined:
            return
        wrong: list[str] = []
        config = job.config
        for name in PATH_FIELDS:
            text = str(getattr(config, name)).strip()
            if text and not (ui_of(name).path == "model" and self._is_hub_name(job, text)):
                try:
                    self._check_one(job, name, text, write=name in WRITTEN)
                except ConfigError as error:
                    wrong += error.messages
        if wrong:
            raise ConfigError(*wrong)
        for name, text in (
            ("output_name", job.output_name),
            ("log_tracker_name", config.log_tracker_name),
            ("--log_prefix", job.engine.log_prefix),
        ):
            if any(letter in text for letter in "/\\:\0"):
                raise ConfigError(f"{name} is {text!r}: it is a name, without / \\ and :")
        for text in job.engine.base_weights:
            self._check_one(job, "--base_weights", text)
        if named_file(job) is not None:
            self._check_one(job, "sample_prompts", config.sample_prompts.strip())
        if text := config.dataset_config.strip():
            for named in _named_in(job.path(text)):
                self._check_one(job, "dataset_config", named)

    def _check_one(self, job: Job, name: str, text: str, *, write: bool = False) -> None:
        """One path of a run, as the trainer will read it."""
        try:
            self._refuse_foreign(text)
            self.resolve(str(job.path(text)), write=write)
        except (ValueError, RuntimeError) as error:  # a zero byte; ~ of somebody who is not there
            raise ConfigError(f"{name}: {text!r} is no path here ({error})") from error
        except ConfigError as error:
            raise ConfigError(f"{name}: {error}") from error

    def _is_hub_name(self, job: Job, text: str) -> bool:
        return HUB_NAME.fullmatch(text) is not None and not job.path(text).exists()


def _named_in(path: Path) -> list[str]:
    """Paths that a dataset_config names."""
    try:
        text = path.read_text(encoding="utf-8-sig")
        values = json.loads(text) if path.suffix.lower() == ".json" else tomllib.loads(text)
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"dataset_config {path} cannot be read: {error}") from error
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
