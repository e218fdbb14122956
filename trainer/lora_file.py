"""LoRA files on disk: reading any that Kohya users have, and writing them as sd-scripts does."""

from __future__ import annotations

import hashlib
import json
import pickle
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as serialise
from safetensors.torch import save_file
from torch import Tensor

from trainer.errors import ModelFileError, SetupError
from trainer.files import atomic_path

__all__ = [
    "LEGACY_HASH_OFFSET",
    "LEGACY_HASH_SIZE_BYTES",
    "SAVE_DTYPES",
    "LoraFile",
    "check_free_space",
    "model_hashes",
    "read_lora",
    "read_metadata",
    "save",
]

SAVE_DTYPES: Mapping[str, torch.dtype] = {
    "float": torch.float32,
    "fp16": torch.float16,
    "bf16": torch.bfloat16,
}
"""save_precision; any other value (the empty text) keeps the training dtype."""

LEGACY_HASH_OFFSET = 0x100000  # the first web UI's model hash: 64 KiB from 1 MiB on
LEGACY_HASH_SIZE_BYTES = 0x10000

_PICKLED = frozenset({".ckpt", ".pt", ".pth", ".bin"})


@dataclass(frozen=True)
class LoraFile:
    """What a LoRA file holds."""

    tensors: dict[str, Tensor]
    metadata: dict[str, str] = field(default_factory=dict)


def read_lora(path: Path) -> LoraFile:
    """Read a .safetensors file or a pickled state dict (.ckpt, .pt), which never runs code.

    Args:
        path: The file.

    Raises:
        ModelFileError: Missing, broken, or no file of tensors.
    """
    _check_there(path)
    if path.suffix.lower() in _PICKLED:
        return LoraFile(_read_pickled(path))
    try:
        with safe_open(path, framework="pt") as file:
            return LoraFile({key: file.get_tensor(key) for key in file.keys()}, dict(file.metadata() or {}))  # noqa: SIM118
    except (SafetensorError, OSError, ValueError) as error:
        raise _broken(path, error) from error


def read_metadata(path: Path) -> dict[str, str]:
    """The metadata of a LoRA file, without reading its tensors; empty for pickled files.

    Args:
        path: The file.

    Raises:
        ModelFileError: Missing or broken.
    """
    _check_there(path)
    if path.suffix.lower() in _PICKLED:
        return {}
    try:
        with safe_open(path, framework="pt") as file:
            return dict(file.metadata() or {})
    except (SafetensorError, OSError, ValueError) as error:
        raise _broken(path, error) from error


def _check_there(path: Path) -> None:
    if not path.is_file():
        kind = "is a folder, not a file" if path.is_dir() else "does not exist"
        raise ModelFileError(f"the LoRA file {path} {kind}: check the path")


def _broken(path: Path, error: Exception) -> ModelFileError:
    return ModelFileError(
        f"{path.name} cannot be read as a LoRA file ({error}): it is broken or was not downloaded whole"
    )


def _read_pickled(path: Path) -> dict[str, Tensor]:
    try:
        found: Any = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, OSError, ValueError, KeyError) as error:
        raise ModelFileError(
            f"{path.name} cannot be read as a LoRA file: it is broken, or holds more than tensors "
            "and is not opened for safety; use a .safetensors version of it"
        ) from error
    if isinstance(found, dict) and isinstance(found.get("state_dict"), dict):
        found = found["state_dict"]
    if not isinstance(found, dict) or not all(isinstance(value, Tensor) for value in found.values()):
        raise ModelFileError(f"{path.name} is no LoRA file: it holds something else than named tensors")
    return dict(found)


def model_hashes(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> dict[str, str]:
    """sshs_model_hash and sshs_legacy_hash (sd-scripts, train_util.py:precalculate_safetensors_hashes).

    Both are taken over a file with only the ss_ entries as its metadata, so that later edits of the
    other entries leave them as they are. The first is sha256 over the tensors' bytes; the second the
    first 8 digits of sha256 over 64 KiB from 1 MiB on, header included.

    Args:
        tensors: As they are written.
        metadata: All entries of the file.
    """
    data = memoryview(
        serialise(dict(tensors), {key: value for key, value in metadata.items() if key.startswith("ss_")})
    )
    payload = 8 + int.from_bytes(data[:8], "little")
    legacy = data[LEGACY_HASH_OFFSET : LEGACY_HASH_OFFSET + LEGACY_HASH_SIZE_BYTES]
    return {
        "sshs_model_hash": hashlib.sha256(data[payload:]).hexdigest(),
        "sshs_legacy_hash": hashlib.sha256(legacy).hexdigest()[:8],
    }


def check_free_space(folder: Path, needed_bytes: int) -> None:
    """See that ``folder`` (or its nearest existing parent) has room for a file.

    Raises:
        SetupError: Too little space.
    """
    there = next((place for place in (folder, *folder.parents) if place.exists()), Path.cwd())
    free_bytes = shutil.disk_usage(there).free
    if free_bytes < needed_bytes:
        raise SetupError(
            f"saving needs {needed_bytes / 1e6:.1f} MB, but {folder} has {free_bytes / 1e6:.1f} MB free: "
            "make room on that disk"
        )


def save(
    path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str], precision: str | None = None
) -> int:
    """Write a LoRA file beside its place, read it back, and only then move it there.

    Args:
        path: .safetensors, or .ckpt / .pt for a pickled state dict, which has no metadata.
        tensors: Under Kohya's keys, on the CPU.
        metadata: ss_* and modelspec.* entries; the hashes are added.
        precision: save_precision (`SAVE_DTYPES`): all tensors, alphas included, are cast to it.

    Returns:
        Size of the file in bytes.

    Raises:
        SetupError: The disk is full.
        ModelFileError: What was read back differs from what was written.
    """
    dtype = SAVE_DTYPES.get(precision or "")
    ready = {
        key: tensor.detach().to("cpu", dtype if dtype is not None else tensor.dtype).contiguous()
        for key, tensor in tensors.items()
    }
    payload_bytes = sum(tensor.nbytes for tensor in ready.values())
    entries = {str(key): str(value) for key, value in metadata.items()}
    header_bytes = 200 * len(ready) + len(json.dumps(entries))
    check_free_space(path.parent, payload_bytes + header_bytes)
    pickled = path.suffix.lower() in _PICKLED
    try:
        with atomic_path(path) as temporary:
            if pickled:
                torch.save(ready, temporary)
                _verify_pickled(path, temporary, ready)
            else:
                entries |= model_hashes(ready, entries)
                save_file(ready, temporary, entries)
                _verify(path, temporary, len(ready), entries["sshs_model_hash"])
            return temporary.stat().st_size
    except (OSError, SafetensorError) as error:
        raise SetupError(
            f"{path} could not be written ({error}): is the disk full or write-protected?"
        ) from error


def _verify(path: Path, written: Path, count: int, expected: str) -> None:
    """Open what was written: so many tensors, and their bytes hash to what was meant."""
    with safe_open(written, framework="pt") as file:
        found = len(file.keys())
    digest = hashlib.sha256()
    with written.open("rb") as handle:
        handle.seek(8 + int.from_bytes(handle.read(8), "little"))
        while chunk := handle.read(1 << 20):
            digest.update(chunk)
    if found != count or digest.hexdigest() != expected:
        raise ModelFileError(f"{path.name} was not written correctly and is not kept: check the disk")


def _verify_pickled(path: Path, written: Path, expected: Mapping[str, Tensor]) -> None:
    try:
        found = _read_pickled(written)
    except ModelFileError as error:
        raise ModelFileError(
            f"{path.name} was not written correctly and is not kept: check the disk"
        ) from error
    same = found.keys() == expected.keys() and all(
        torch.equal(found[key].nan_to_num(), expected[key].nan_to_num()) for key in expected
    )
    if not same:
        raise ModelFileError(f"{path.name} was not written correctly and is not kept: check the disk")
