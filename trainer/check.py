"""What would be trained: ``python -m trainer check``, and the page's checks before Start."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from trainer import advice, devices, launch, memory, networks, optimizers, plugins, schedules
from trainer.config import Finding, KohyaConfig, ui_of
from trainer.data import folder
from trainer.data.dataset_config import apply_dataset_config
from trainer.data.types import Dataset
from trainer.errors import ConfigError, TrainerError
from trainer.job import Job
from trainer.objectives import objective_for
from trainer.plan import Plan

__all__ = ["LARGEST_PX", "SMALLEST_PX", "check", "lines", "without_effect"]

SMALLEST_PX, LARGEST_PX = 256, 2048
"""The guides' bounds for the sides of pictures."""


def check(
    config: KohyaConfig, report: Sequence[Finding] = (), *, base: Path, vram_gb: float | None = None
) -> dict[str, Any]:
    """Look at everything that can be looked at without training.

    Args:
        config: The configuration.
        report: What was found while loading it.
        base: Folder for relative paths.
        vram_gb: Memory of the card that the run shall fit into, in GiB; the present device's if None.

    Returns:
        Plain data: findings, notes, errors, data set, buckets, steps, parameters, memory, advice.
    """
    found: dict[str, Any] = {
        "load report": [{"kind": item.kind, "key": item.key, "message": item.message} for item in report],
        "effective values": [],
        "without effect": without_effect(config),
        "errors": [],
    }
    job, errors = Job.draft(config, base=base)
    found["errors"] = errors
    is_sound = not errors
    with _gathered(errors):
        job = apply_dataset_config(job)
    found["effective values"] = [str(note) for note in job.notes]
    found["family"] = job.family
    found["network"] = {
        "LoRA_type": job.config.LoRA_type,
        "network_dim": job.config.network_dim,
        "network_alpha": job.config.network_alpha,
        "network_args": dict(job.network_args),
    }
    found["learning rates"] = {"unet": job.unet_lr, "text encoder": job.text_encoder_lr}
    device = devices.choose()
    found["device"] = devices.describe(device)
    with _gathered(errors):
        devices.check_precision(job.config.mixed_precision, device)
    with _gathered(errors):
        launch.check(job)
        found["effective values"] += [str(note) for note in launch.notes(job)]
        if launch.processes(job) > 1:
            found["processes"] = launch.processes(job)
    with _gathered(errors):
        memory.check(job, device)
        found["effective values"] += [str(note) for note in memory.notes(job)]
    problems = optimizers.problems(job, device)
    errors += problems
    if not problems:
        found["effective values"] += [str(note) for note in optimizers.notes(job)]
    with _gathered(errors):
        objective_for(job).check(job)
    family = plugins.Folder("trainer.families").get(job.family)
    with _gathered(errors):
        networks.plugin_for(job).check(job, family.kohya_blocks)
    dataset: Dataset | None = None
    if job.config.train_data_dir.strip() or job.config.dataset_config.strip():
        with _gathered(errors):
            dataset = folder.scan(job)
    if dataset is not None:
        found |= _dataset(dataset)
        with _gathered(errors):
            family.check(job, dataset)
        plan = Plan.make(job, dataset, launch.processes(job))
        found["steps"] = {
            "max_train_steps": plan.max_train_steps,
            "epochs": plan.epochs,
            "batches per epoch": plan.batches_per_epoch,
            "steps per epoch": plan.updates_per_epoch,
            "warm-up": plan.warmup_steps,
            "arithmetic": list(plan.arithmetic),
        }
        with _gathered(errors):
            schedules.check(job, plan)
    if is_sound:
        with _gathered(errors):
            found |= _model(job, dataset, device, vram_gb)
    return found


@contextlib.contextmanager
def _gathered(errors: list[str]) -> Iterator[None]:
    """Put what is wrong beside what else is, and go on."""
    try:
        yield
    except ConfigError as error:
        errors += [message for message in error.messages if message not in errors]
    except TrainerError as error:
        errors.append(str(error))


def without_effect(config: KohyaConfig) -> list[str]:
    """Fields that were changed from their default and do nothing here, each with the reason."""
    fields = type(config).model_fields
    return [
        f"{name}: {ui_of(name).reason}"
        for name, field in fields.items()
        if ui_of(name).effect == "none" and getattr(config, name) not in (field.default, None, "")
    ]


def _dataset(dataset: Dataset) -> dict[str, Any]:
    return {
        "data set": {
            "pictures": len(dataset.pictures),
            "without a caption file": sum(picture.caption_file is None for picture in dataset.pictures),
            "sizes outside 256 to 2048": sum(
                not SMALLEST_PX <= min(picture.size) <= max(picture.size) <= LARGEST_PX
                for picture in dataset.pictures
            ),
            "training pictures with repeats": dataset.num_train_images,
            "class pictures with repeats": dataset.num_reg_images,
            "subsets": [
                {"folder": str(subset.folder), "repeats": subset.repeats, "class pictures": subset.is_reg}
                for subset in dataset.subsets
            ],
            "findings": [f"{finding.level}: {finding.message}" for finding in dataset.findings],
        },
        "buckets": {f"{w}x{h}": count for (w, h), count in dataset.bucket_counts().items()},
        "mean aspect ratio error": dataset.mean_aspect_error,
    }


def _model(job: Job, dataset: Dataset | None, device: torch.device, vram_gb: float | None) -> dict[str, Any]:
    """Parameters, memory, time and disk, from a model without weights."""
    if vram_gb is not None:
        return advice.report(job, dataset, limit_bytes=int(vram_gb * 2**30), kind="cuda")
    sampled = devices.memory(device)
    return advice.report(
        job, dataset, limit_bytes=sampled.vram_total_bytes or sampled.ram_total_bytes, kind=device.type
    )


def lines(found: dict[str, Any]) -> Iterable[str]:
    """The result of `check` for a person."""
    for title, value in found.items():
        if title == advice.CHANGES or value in ([], {}, None, ""):
            continue
        if isinstance(value, dict):
            yield f"{title}:"
            for name, item in value.items():
                if isinstance(item, list):
                    yield from (f"  {name}: {_one(part)}" for part in item)
                else:
                    yield f"  {name}: {_one(item)}"
        elif isinstance(value, list):
            yield f"{title}:"
            yield from (f"  {_one(item)}" for item in value)
        else:
            yield f"{title}: {value}"


def _one(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name} {item}" for name, item in value.items())
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)
