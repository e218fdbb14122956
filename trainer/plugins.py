"""Finding the families, networks, optimizers ... : a new one is one new file in its folder."""

from __future__ import annotations

import importlib
import pkgutil
from typing import Any

from trainer.errors import ConfigError

__all__ = ["Folder"]


class Folder:
    """The modules of a package whose names have no leading underscore; each exposes ``PLUGIN``.

    Listing imports only the package itself, never the modules in it.

    Args:
        package: Dotted name: "trainer.families".
    """

    def __init__(self, package: str) -> None:
        self.package = package

    def names(self) -> list[str]:
        """File names without ending, sorted."""
        folder = importlib.import_module(self.package).__path__
        return sorted(item.name for item in pkgutil.iter_modules(folder) if not item.name.startswith("_"))

    def get(self, name: str) -> Any:
        """The ``PLUGIN`` of a file.

        Raises:
            ConfigError: There is no such file.
        """
        if name not in self.names():
            raise ConfigError(f"{name!r} is not one of {self.package}: {', '.join(self.names())}")
        return importlib.import_module(f"{self.package}.{name}").PLUGIN
