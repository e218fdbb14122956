"""What follows from a choice: keep a file, put the others away, go on from it.

Files are moved, never deleted: `trash` puts them into a folder beside, and `restore` brings them back.
"""

from __future__ import annotations

import json
import math
import re
import shutil
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from trainer.config import KohyaConfig
from trainer.errors import ConfigError
from trainer.files import atomic_path, atomic_write
from trainer.review.run_folder import KEPT, Checkpoint, RunFolder, SavedState

__all__ = [
    "TRASH",
    "Judged",
    "Kept",
    "continue_config",
    "free_name",
    "keep",
    "restore",
    "resume_config",
    "retrain_config",
    "settings_of",
    "trash",
    "trashed",
    "use_lines",
]

TRASH = "trash"
"""Folder beside the results that `trash` moves files to."""
RATES = ("learning_rate", "unet_lr", "text_encoder_lr", "t5xxl_lr")
LOWER, HIGHER = 0.5, 2.0
"""What a learning rate is multiplied by after an overtrained and after an undertrained run."""
FORBIDDEN = frozenset('/\\:*?"<>|\0')
"""What no file may be called on Windows."""


class Judged(Protocol):
    """As much of a verdict as is needed here."""

    @property
    def kind(self) -> str:
        """undertrained, good or overtrained."""


# ---- keep ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Kept:
    """A file under its final name."""

    path: Path
    copy: Path | None
    lines: tuple[tuple[str, str], ...]
    """Program, and what to type or choose there."""
    moved: tuple[Path, ...]
    """Files that went into the trash, at their new place."""


def keep(
    run: RunFolder, checkpoint: Checkpoint, name: str, *, copy_to: Path | None = None, alone: bool = False
) -> Kept:
    """Give a file its final name, and copy it to where it is used.

    Args:
        run: The run.
        checkpoint: One of its files.
        name: The final name, without an ending.
        copy_to: Folder for a copy, such as a web UI's models/Lora; none if None.
        alone: Whether the run's other files go into the trash, so that this one may also have the
            name of one of them.

    Raises:
        ConfigError: The name is taken or no file name, or a file cannot be moved or copied.
    """
    name = name.strip()
    if not name or name in (".", "..") or set(name) & FORBIDDEN or not name.isprintable() or len(name) > 120:
        raise ConfigError(f"{name!r} is no name for a file: use letters, digits, - and _")
    target = run.folder / f"{name}{checkpoint.path.suffix}"
    others = [each.path for each in run.checkpoints if each.path != checkpoint.path]
    is_same = target == checkpoint.path
    if not is_same and target.exists() and not (alone and target in others):
        raise ConfigError(
            f"{target.name} is there already: choose another name, or put the other files into the trash too"
        )
    copy = copy_to / target.name if copy_to is not None else None
    if copy is not None and copy.exists() and not _same(copy, checkpoint.path):
        raise ConfigError(f"{copy} is there already and is another file: choose another name")
    moved: tuple[Path, ...] = ()
    try:
        if alone:
            moved = trash(run.folder, others)
        if not is_same:
            _note(run, checkpoint, target.name)
            checkpoint.path.rename(target)
        if copy is not None and not copy.exists():
            with atomic_path(copy) as temporary:
                shutil.copyfile(target, temporary)
    except OSError as error:
        raise ConfigError(
            f"{target.name} could not be kept ({error}): is the disk full or write-protected?"
        ) from error
    return Kept(target, copy, use_lines(copy or target, trigger=_trigger(checkpoint)), moved)


def _same(one: Path, other: Path) -> bool:
    return one.stat().st_size == other.stat().st_size and one.read_bytes() == other.read_bytes()


def _note(run: RunFolder, checkpoint: Checkpoint, name: str) -> None:
    """Remember what the old name and the run said of a file."""
    file = run.folder / KEPT
    try:
        found: Any = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        found = {}
    values = found if isinstance(found, dict) else {}
    values[name] = {
        "run": run.name,
        "step": checkpoint.step,
        "epoch": checkpoint.epoch,
        "was": checkpoint.path.name,
    }
    atomic_write(file, json.dumps(values, indent=2, ensure_ascii=False))


def _trigger(checkpoint: Checkpoint) -> str:
    """The words of the folder that was trained on: ``10_k1ln person`` is about "k1ln person"."""
    try:
        folders = json.loads(checkpoint.metadata.get("ss_dataset_dirs", "{}"))
    except ValueError:
        return ""
    for folder in folders if isinstance(folders, dict) else {}:
        repeats, _, words = str(folder).partition("_")
        if repeats.isdigit() and words:
            return words.strip()
    return ""


def use_lines(file: Path, *, trigger: str = "") -> tuple[tuple[str, str], ...]:
    """How a LoRA file is used: program, and what to type or choose there.

    Args:
        file: Where it lies; below a folder ``loras``, ComfyUI names it from there.
        trigger: Words of the prompt that it was trained for.
    """
    parts = [part.lower() for part in file.parts]
    inside = file.name
    if "loras" in parts[:-1]:
        first = len(parts) - 1 - parts[::-1].index("loras")
        inside = "/".join(file.parts[first + 1 :])
    prompt = f"<lora:{file.stem}:0.8>" + (f" {trigger}" if trigger else "")
    return (
        ("AUTOMATIC1111 / Forge", prompt),
        ("ComfyUI", f"Load LoRA: lora_name {inside}, strength_model 0.8, strength_clip 0.8"),
        ("diffusers", f'pipe.load_lora_weights("{file.parent.name}", weight_name="{file.name}")'),
    )


# ---- trash ----------------------------------------------------------------------------------------------


def trash(folder: Path, paths: Iterable[Path]) -> tuple[Path, ...]:
    """Move files or state folders of a results folder into its trash.

    Raises:
        ConfigError: One lies elsewhere, or cannot be moved.
    """
    target = folder / TRASH
    moved = []
    for path in paths:
        if path.parent != folder:
            raise ConfigError(f"{path.name} does not lie in the results folder: nothing more was moved")
        place = target / path.name
        number = 2
        while place.exists():
            place, number = target / f"{path.stem} ({number}){path.suffix}", number + 1
        try:
            target.mkdir(exist_ok=True)
            path.rename(place)
        except OSError as error:
            raise ConfigError(
                f"{path.name} could not be moved to the trash: {error.strerror or error}"
            ) from error
        moved.append(place)
    return tuple(moved)


def trashed(folder: Path) -> tuple[Path, ...]:
    """What lies in a results folder's trash."""
    try:
        return tuple(sorted((folder / TRASH).iterdir()))
    except OSError:
        return ()


def restore(folder: Path, names: Sequence[str] | None = None) -> tuple[Path, ...]:
    """Bring files back from the trash; those whose name has been given away meanwhile stay there.

    Args:
        folder: The results folder.
        names: Of the files; all if None.

    Raises:
        ConfigError: A file cannot be moved.
    """
    back = []
    for path in trashed(folder):
        name = re.sub(r" \(\d+\)(?=\.[^.]*$|$)", "", path.name)
        place = folder / name
        if (names is not None and path.name not in names) or place.exists():
            continue
        try:
            path.rename(place)
        except OSError as error:
            raise ConfigError(f"{path.name} could not be brought back: {error.strerror or error}") from error
        back.append(place)
    return tuple(back)


# ---- going on -------------------------------------------------------------------------------------------


def free_name(folder: Path, name: str) -> str:
    """``name-2``, ``name-3`` ...: the first that no file in the folder begins with."""
    stem = re.sub(r"-\d{1,3}$", "", name) or name
    try:
        taken = [path.name for path in folder.iterdir()]
    except OSError:
        taken = []
    number = 2
    while any(
        each.startswith((f"{stem}-{number}.", f"{stem}-{number}-", f"{stem}-{number}_")) for each in taken
    ):
        number += 1
    return f"{stem}-{number}"


def settings_of(run: RunFolder) -> KohyaConfig:
    """The run's settings: its JSON, or as much as its LoRA's metadata tells.

    Raises:
        ConfigError: There is neither.
    """
    if run.config is not None:
        return run.config
    found = run.metadata
    if not found:
        raise ConfigError(
            f"{run.name} has neither a JSON nor metadata: load its settings on Parameters first"
        )
    version = found.get("ss_base_model_version", "")
    values: dict[str, Any] = {
        "output_name": run.name,
        "output_dir": str(run.folder),
        "sdxl": version.startswith("sdxl"),
        "flux1_checkbox": version.startswith("flux"),
        "v2": version.startswith("sd_v2"),
        "v_parameterization": version.endswith("_v"),
        "LoRA_type": "Flux1" if version.startswith("flux") else "Standard",
        "pretrained_model_name_or_path": _text(found.get("ss_sd_model_name")),
        "vae": _text(found.get("ss_vae_name")),
    }
    for key, name, read in (
        ("ss_learning_rate", "learning_rate", float),
        ("ss_unet_lr", "unet_lr", float),
        ("ss_text_encoder_lr", "text_encoder_lr", float),
        ("ss_network_dim", "network_dim", int),
        ("ss_network_alpha", "network_alpha", float),
        ("ss_clip_skip", "clip_skip", int),
        ("ss_seed", "seed", int),
        ("ss_batch_size_per_device", "train_batch_size", int),
        ("ss_gradient_accumulation_steps", "gradient_accumulation_steps", int),
        ("ss_min_snr_gamma", "min_snr_gamma", float),
        ("ss_noise_offset", "noise_offset", float),
        ("ss_mixed_precision", "mixed_precision", str),
        ("ss_lr_scheduler", "lr_scheduler", str),
        ("ss_enable_bucket", "enable_bucket", "True".__eq__),
        ("ss_bucket_no_upscale", "bucket_no_upscale", "True".__eq__),
        ("ss_min_bucket_reso", "min_bucket_reso", int),
        ("ss_max_bucket_reso", "max_bucket_reso", int),
    ):
        try:
            value = read(found[key])
        except (KeyError, ValueError):
            continue
        values[name] = value
    size = re.findall(r"\d+", found.get("ss_resolution", ""))
    if len(size) == 2:
        values["max_resolution"] = ",".join(size)
    from trainer.config import loads

    return loads(values).config


def _text(value: str | None) -> str:
    return "" if value in (None, "None") else str(value)


def continue_config(
    run: RunFolder, checkpoint: Checkpoint, epochs: int, *, judged: Judged | None = None
) -> KohyaConfig:
    """The settings that train a kept file on.

    Epochs alone decide how long; ranks and alphas come from the file; names, samples and charts count
    on from the file's step (origin_step).

    Args:
        run: The run.
        checkpoint: The file to go on from.
        epochs: To add.
        judged: A verdict, whose advice the learning rates follow.

    Raises:
        ConfigError: ``epochs`` is no count, or the run has no settings.
    """
    if not 1 <= epochs <= 1000:
        raise ConfigError(f"{epochs} epochs cannot be added: choose 1 to 1000")
    config = settings_of(run)
    changed = _with(
        config,
        network_weights=str(checkpoint.path),
        dim_from_weights=True,
        resume="",
        epoch=epochs,
        max_train_epochs=0,
        max_train_steps=0,
        output_dir=str(run.folder),
        output_name=free_name(run.folder, run.name),
        origin_step=checkpoint.step,
        origin_epoch=_epochs_done(run, checkpoint),
    )
    return changed if judged is None else _with_rates(changed, _advised(judged))


def _epochs_done(run: RunFolder, checkpoint: Checkpoint) -> int:
    """Whole epochs behind a file."""
    if checkpoint.epoch is not None:
        return checkpoint.epoch
    found = checkpoint.metadata.get("ss_epoch", "")
    return int(found) if found.isdigit() else 0


def resume_config(run: RunFolder, state: SavedState) -> KohyaConfig:
    """The settings that go on from a state folder, as if the run had never stopped.

    Raises:
        ConfigError: The run has no settings, or the state is not there any more.
    """
    if not state.path.is_dir():
        raise ConfigError(f"{state.path.name} is not there any more: open the run again")
    if run.config is None:
        raise ConfigError(
            f"{run.name} has no JSON, and a state fits its own settings alone: load them on Parameters, "
            "and name the state in Resume"
        )
    return _with(run.config, resume=str(state.path), output_dir=str(run.folder))


def retrain_config(run: RunFolder, judged: Judged) -> KohyaConfig:
    """The settings for training again from the start, with the learning rates that a verdict suggests.

    Raises:
        ConfigError: The run has no settings.
    """
    config = settings_of(run)
    changed = _with(
        config, resume="", output_dir=str(run.folder), output_name=free_name(run.folder, run.name)
    )
    if config.origin_step:  # a continued run begins again from the base
        changed = _with(changed, network_weights="", dim_from_weights=False, origin_step=0, origin_epoch=0)
    return _with_rates(changed, _advised(judged))


def _advised(judged: Judged) -> float:
    return {"overtrained": LOWER, "undertrained": HIGHER}.get(judged.kind, 1.0)


def _with_rates(config: KohyaConfig, factor: float) -> KohyaConfig:
    """All learning rates times ``factor``, to two digits."""
    values = {name: _rounded(float(getattr(config, name) or 0) * factor) for name in RATES}
    return _with(config, **{name: value for name, value in values.items() if value})


def _rounded(value: float) -> float:
    return value and round(value, 1 - math.floor(math.log10(abs(value))))


def _with(config: KohyaConfig, **values: Any) -> KohyaConfig:
    return config.model_copy(update=values)
