"""Text encoder outputs of the stored captions, made once and kept in RAM or in npz files.

Files lie beside the pictures under sd-scripts' names with its arrays (strategy_base.py:
TextEncoderOutputsCachingStrategy). One more array holds a key: a hash of the caption and of what
encoded it, so that an edited caption or another model never gets old outputs, which sd-scripts
does not notice.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import psutil
import torch
from torch import Tensor

from trainer.data.types import Dataset, Subset
from trainer.errors import DatasetError, StopTraining
from trainer.events import Event, LogLine, PhaseStarted, Progress
from trainer.files import atomic_path

__all__ = ["KEY", "Entry", "TextCache", "file_names", "prepare"]

KEY = "lora_kiln_key"
"""Array that says what a file's outputs were made from."""

PHASE = "cache text encoder outputs"
BATCH = 8
"""Captions that are encoded together."""

Entry = Mapping[str, Tensor]
"""What is cached of one caption, by array name, on the CPU."""

Encode = Callable[[Sequence[str]], Sequence[Entry]]


class TextCache:
    """Entries by picture index: all in RAM, or read from their files and kept while RAM lasts."""

    def __init__(self, names: Sequence[str], budget_bytes: int) -> None:
        self._names = names
        self._budget_bytes = budget_bytes
        self._entries: dict[int, Entry] = {}
        self._files: dict[int, tuple[Path, str]] = {}

    def put(self, index: int, entry: Entry, file: Path | None = None, key: str = "") -> None:
        """Keep an entry; one that is also in ``file`` only while there is room for it."""
        if file is not None:
            self._files[index] = file, key
            size_bytes = sum(tensor.nbytes for tensor in entry.values())
            if size_bytes > self._budget_bytes:
                return
            self._budget_bytes -= size_bytes
        self._entries[index] = entry

    def get(self, index: int) -> Entry:
        """The entry of a picture's caption.

        Raises:
            DatasetError: Its file was removed or changed since the run began.
        """
        found = self._entries.get(index)
        if found is None:
            path, key = self._files[index]
            found = _read(path, self._names, key)
            if found is None:
                raise DatasetError(
                    f"text cache {path} was removed or changed during the run: start again to rebuild it"
                )
        return found


def file_names(dataset: Dataset, wanted: Sequence[int], suffix: str) -> dict[int, Path]:
    """Cache file of each picture's caption: the picture's path without its ending, and ``suffix``.

    Where a.jpg and a.png would share a file, the later one keeps its ending in the name.
    """
    owner: dict[Path, Path] = {}
    names: dict[int, Path] = {}
    for index in wanted:
        path = dataset.pictures[index].path
        name = path.with_name(f"{path.stem}{suffix}")
        if owner.setdefault(name, path) != path:
            name = path.with_name(f"{path.name}{suffix}")
        names[index] = name
    return names


def prepare(
    dataset: Dataset,
    *,
    suffix: str | None,
    facts: Mapping[str, Any],
    names: Sequence[str],
    encode: Encode,
    trust: bool,
    emit: Callable[[Event], None],
    stop: Callable[[], bool],
) -> TextCache:
    """Encode the captions that are not in a usable file yet.

    The stored caption is encoded as it is: what is done to captions at each step (prefix, suffix,
    wildcards ...) has no part in it (sd-scripts: cache_batch_outputs).

    Args:
        dataset: The pictures and their captions.
        suffix: Ending of the files; None caches in RAM only.
        facts: What the outputs depend on beside the caption; plain data.
        names: Arrays of an entry.
        encode: Gives the entries of some captions.
        trust: Take files as they are (skip_cache_check).
        emit: Gets the progress.
        stop: Asked between batches.

    Raises:
        StopTraining: ``stop`` said so.
    """
    _say_unused(dataset.subsets, emit)
    wanted = [index for index, repeats in enumerate(dataset.repeats) if repeats]
    files = file_names(dataset, wanted, suffix) if suffix else {}
    cache = TextCache(names, psutil.virtual_memory().available // 4)
    missing: dict[str, list[int]] = {}
    for index in wanted:
        caption, file = dataset.pictures[index].caption, files.get(index)
        if file is not None and file.exists():
            key = "" if trust else _key(caption, facts)
            entry = _read(file, names, key)
            if entry is not None:
                cache.put(index, entry, file, key)
                continue
        missing.setdefault(caption, []).append(index)
    captions = list(missing)
    emit(PhaseStarted(phase=PHASE, total=len(captions), unit="captions"))
    told = False
    for start in range(0, len(captions), BATCH):
        if stop():
            raise StopTraining
        group = captions[start : start + BATCH]
        for caption, raw in zip(group, encode(group), strict=True):
            entry = {name: tensor.clone() for name, tensor in raw.items()}
            key = _key(caption, facts)
            for index in missing[caption]:
                file = files.get(index)
                if file is not None:
                    try:
                        _write(file, entry, key)
                    except OSError as error:
                        if not told:
                            emit(LogLine(message=_not_written(file, error), level="warning"))
                        told, file = True, None
                cache.put(index, entry, file, key)
        emit(Progress(phase=PHASE, done=start + len(group), total=len(captions)))
    return cache


def _key(caption: str, facts: Mapping[str, Any]) -> str:
    text = json.dumps({"format": 1, "caption": caption, **facts}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def _read(path: Path, names: Sequence[str], key: str) -> Entry | None:
    """The entry in a file, or None where it lacks something, is damaged, or was made from something else."""
    try:
        with path.open("rb") as handle, np.load(handle) as arrays:
            if key and (KEY not in arrays or str(arrays[KEY]) != key):
                return None
            found = {name: torch.from_numpy(arrays[name]) for name in names}
    except Exception:  # noqa: BLE001 - a damaged file raises anything from zip, zlib and numpy: it is made anew
        return None
    return found if all(bool(torch.isfinite(tensor).all()) for tensor in found.values()) else None


def _write(path: Path, entry: Entry, key: str) -> None:
    arrays: dict[str, npt.NDArray[Any]] = {
        # numpy has no bfloat16: sd-scripts stores it as float32.
        name: (tensor.float() if tensor.dtype == torch.bfloat16 else tensor).numpy()
        for name, tensor in entry.items()
    }
    with atomic_path(path) as temporary, temporary.open("wb") as handle:
        np.savez(handle, **arrays, **{KEY: np.array(key)})  # type: ignore[arg-type]


def _say_unused(subsets: Sequence[Subset], emit: Callable[[Event], None]) -> None:
    """Name what happens to captions at each step otherwise and cannot with cached outputs."""
    unused = (
        "caption_prefix",
        "caption_suffix",
        "enable_wildcard",
        "secondary_separator",
        "caption_dropout_every_n_epochs",
    )
    given = [name for name in unused if any(getattr(subset, name) for subset in subsets)]
    if given:
        emit(
            LogLine(
                message=f"without effect while text encoder outputs are cached, as in Kohya: {', '.join(given)}",
                level="warning",
            )
        )


def _not_written(path: Path, error: OSError) -> str:
    return (
        f"text encoder outputs cannot be saved to {path} ({error.strerror or error}): they stay in memory and "
        "are made again at the next start"
    )
