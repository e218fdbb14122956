"""Choosing a file or folder on the server, one folder at a time, inside what `Paths` allows."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from app.paths import Paths
from trainer.errors import ConfigError

__all__ = ["listing"]

LARGEST_FOLDER = 2000
"""Entries that a listing shows at most."""
ENDINGS: dict[str, tuple[str, ...]] = {
    "json": (".json",),
    "save": (".json",),
    "model": (".safetensors", ".ckpt", ".pt"),
    "file": (".safetensors", ".ckpt", ".pt", ".toml", ".json", ".txt"),
    "folder": (),
}


def listing(paths: Paths, kind: str, text: str) -> dict[str, Any]:
    """The entries of a folder that may be chosen or opened.

    Args:
        paths: What may be named.
        kind: What is looked for: json, save (a folder for one), model, file or folder.
        text: A folder, or a file in it; "" for where to begin.

    Returns:
        ``path`` of the folder, its ``entries`` (name, path, folder), and an ``error`` where the text
        leads nowhere; then the entries are those of the place to begin.
    """
    endings = ENDINGS.get(kind, ())
    error = ""
    folder: Path | None = None
    if text.strip():
        try:
            folder = paths.resolve(text)
            while not folder.is_dir() and folder.parent != folder:
                folder = paths.resolve(str(folder.parent))
        except (ConfigError, OSError) as problem:
            error, folder = str(problem), None
    if folder is None:
        if paths.confined:
            roots = [
                {"name": f"{name}/", "path": str(root), "folder": True} for name, root in paths.roots.items()
            ]
            return {
                "path": "",
                "entries": roots,
                "error": error or ("" if roots else "This server has no --root."),
            }
        folder = Path.cwd()
    try:
        entries = _entries(paths, folder, endings)
    except OSError as problem:
        entries, error = [], f"{folder} cannot be read: {problem.strerror or problem}"
    above = _above(paths, folder)
    return {"path": str(folder), "entries": [*above, *entries[:LARGEST_FOLDER]], "error": error}


def _above(paths: Paths, folder: Path) -> list[dict[str, Any]]:
    """The way up: out of a root to the list of roots."""
    if paths.confined and folder in paths.roots.values():
        return [{"name": "↑ all folders", "path": "", "folder": True}]
    if folder.parent == folder:
        return []
    return [{"name": "↑ ..", "path": str(folder.parent), "folder": True}]


def _entries(paths: Paths, folder: Path, endings: tuple[str, ...]) -> list[dict[str, Any]]:
    found: list[tuple[bool, str, Path]] = []
    with os.scandir(folder) as items:
        for item in items:
            if item.name.startswith("."):
                continue
            path = folder / item.name
            try:
                is_folder = item.is_dir()
                if item.is_symlink():
                    paths.resolve(str(path))  # links may lead out
            except (OSError, ConfigError):
                continue
            if is_folder or item.name.lower().endswith(endings or ("\0",)):
                found.append((not is_folder, item.name, path))
    found.sort(key=lambda entry: (entry[0], entry[1].lower()))
    return [
        {"name": f"{name}/" if not is_file else name, "path": str(path), "folder": not is_file}
        for is_file, name, path in found
    ]
