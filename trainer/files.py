"""Writing files so that a kill or a full disk never leaves half of one behind."""

from __future__ import annotations

import contextlib
import os
import uuid
from collections.abc import Iterator
from pathlib import Path

__all__ = ["REPOSITORY", "atomic_path", "atomic_write"]

REPOSITORY = Path(__file__).resolve().parent.parent
"""Folder that holds app, trainer, presets and assets; relative paths of shipped presets start here."""


@contextlib.contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside ``path``; when the block ends well, it takes the place of ``path``.

    The data is flushed to disk before the rename, so after a power cut either the old or the new
    file is there. If the block raises, the temporary file is removed and the old file stays.

    Args:
        path: The file to write; its folder is created.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        temporary.touch()
        usual = temporary.stat().st_mode
        yield temporary
        # Some libraries make files that only their owner may read; people share results.
        temporary.chmod(usual)
        with temporary.open("rb+") as handle:
            os.fsync(handle.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def atomic_write(path: Path, data: str | bytes) -> None:
    """Write ``data`` (text as UTF-8, newlines kept as they are) to ``path`` as `atomic_path` does."""
    with atomic_path(path) as temporary:
        temporary.write_bytes(data.encode("utf-8") if isinstance(data, str) else data)
