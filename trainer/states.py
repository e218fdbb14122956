"""State folders: everything a run needs to go on as if it had never stopped.

Laid out as accelerate and sd-scripts lay them out (model.safetensors, optimizer.bin, scheduler.bin,
scaler.pt, train_state.json), plus ``kiln_state.json``. There are no generator states: every draw is a
function of the seed and the position (`trainer.draws`), so the position is enough.

A folder is written beside its final place and renamed when it is complete.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from trainer.errors import StateError
from trainer.job import Job

__all__ = ["Position", "State", "config_hash", "load_state", "save_state", "sweep"]

VERSION = 1


@dataclass(frozen=True, kw_only=True)
class Position:
    """Where a run stands after a completed step."""

    step: int
    """Optimizer updates done."""
    epoch: int
    """Epochs begun, from 1."""
    seed: int
    losses: tuple[float, ...] = ()
    """Losses behind avr_loss: one for each micro-batch of the last epoch's worth."""
    config_hash: str = ""
    version: int = VERSION
    by: str = "lora-kiln"


@dataclass(frozen=True)
class State:
    """What a state folder held."""

    position: Position
    network: Mapping[str, Tensor]
    optimizer: Mapping[str, Any]
    scheduler: Mapping[str, Any] | None
    scaler: Mapping[str, Any] | None
    foreign: bool = field(default=False)
    """Written by sd-scripts: no exact position, so the run goes on at the start of an epoch's step."""


def config_hash(job: Job) -> str:
    """Hash of what decides the training, so that a changed configuration is noticed on resume."""
    ignored = {
        "resume",
        "output_dir",
        "output_name",
        "logging_dir",
        "max_train_steps",
        "max_train_epochs",
        "epoch",
        "training_comment",
    }
    values = {
        name: value
        for name, value in sorted(job.config.model_dump().items())
        if name not in ignored and not name.startswith(("save_", "sample_", "metadata_", "log_"))
    }
    return hashlib.sha256(json.dumps(values, sort_keys=True, default=str).encode()).hexdigest()[:16]


def _flush(folder: Path) -> None:
    """Bring all files to disk, with the permissions that the person's files usually have."""
    usual = (folder / "kiln_state.json").stat().st_mode
    for path in folder.iterdir():
        path.chmod(usual)
        with path.open("rb+") as handle:
            os.fsync(handle.fileno())


def save_state(
    folder: Path,
    *,
    position: Position,
    network: Mapping[str, Tensor],
    optimizer: Mapping[str, Any],
    scheduler: Mapping[str, Any] | None,
    scaler: Mapping[str, Any] | None,
) -> int:
    """Write a state folder, replacing an older one of the same name only once it is complete.

    Returns:
        Its size in bytes.

    Raises:
        OSError: The disk is full or cannot be written; the older folder is untouched.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = folder.with_name(f".{folder.name}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        temporary.mkdir()
        save_file(
            {name: value.contiguous() for name, value in network.items()}, temporary / "model.safetensors"
        )
        torch.save(dict(optimizer), temporary / "optimizer.bin")
        if scheduler is not None:
            torch.save(dict(scheduler), temporary / "scheduler.bin")
        if scaler is not None:
            torch.save(dict(scaler), temporary / "scaler.pt")
        kohya = {"current_epoch": position.epoch, "current_step": position.step}
        (temporary / "train_state.json").write_text(json.dumps(kohya), encoding="utf-8")
        (temporary / "kiln_state.json").write_text(json.dumps(asdict(position)), encoding="utf-8")
        _flush(temporary)
        size_bytes = sum(path.stat().st_size for path in temporary.iterdir())
        if folder.exists():
            old = folder.with_name(f".{folder.name}.{uuid.uuid4().hex[:8]}.tmp")
            folder.rename(old)
            temporary.rename(folder)
            shutil.rmtree(old, ignore_errors=True)
        else:
            temporary.rename(folder)
        return size_bytes
    except (RuntimeError, SafetensorError) as error:
        # What torch and safetensors make of a full disk.
        raise OSError(str(error)) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise StateError(f"{path} cannot be read ({error}): resume from another state folder") from error
    if not isinstance(values, dict):
        raise StateError(f"{path} is not a JSON object: resume from another state folder")
    return values


def _load(path: Path) -> dict[str, Any]:
    try:
        loaded = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise StateError(f"{path.name} is missing in {path.parent}: this is not a complete state") from None
    except Exception as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise StateError(f"{path} cannot be read ({reason}): resume from another state folder") from error
    if not isinstance(loaded, dict):
        raise StateError(f"{path} does not hold a state: resume from another state folder")
    return loaded


def load_state(folder: Path) -> State:
    """Read a state folder, ours or one written by sd-scripts.

    Raises:
        StateError: It is missing, incomplete or broken.
    """
    if not folder.is_dir():
        raise StateError(f"resume: {folder} is no folder; choose one that ends in -state")
    try:
        network = load_file(folder / "model.safetensors")
    except (OSError, SafetensorError) as error:
        raise StateError(f"{folder / 'model.safetensors'} cannot be read ({error})") from error
    foreign = not (folder / "kiln_state.json").exists()
    if foreign:
        values = _read_json(folder / "train_state.json")
        position = Position(
            step=int(values.get("current_step", 0)),
            epoch=int(values.get("current_epoch", 1)),
            seed=0,
            by="sd-scripts",
        )
    else:
        values = _read_json(folder / "kiln_state.json")
        try:
            position = Position(**{**values, "losses": tuple(values.get("losses", ()))})
        except TypeError as error:
            raise StateError(f"{folder / 'kiln_state.json'} was written by another version") from error
    return State(
        position=position,
        network=network,
        optimizer=_load(folder / "optimizer.bin"),
        scheduler=_load(folder / "scheduler.bin") if (folder / "scheduler.bin").exists() else None,
        scaler=_load(folder / "scaler.pt") if (folder / "scaler.pt").exists() else None,
        foreign=foreign,
    )


def sweep(folder: Path) -> None:
    """Remove what a kill in the middle of a save left behind in ``folder``."""
    if not folder.is_dir():
        return
    for path in folder.glob(".*.tmp"):
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)
