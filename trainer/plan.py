"""Steps, epochs and warm-up: the arithmetic of kohya_ss and sd-scripts.

Sources: kohya_gui/lora_gui.py:train_model (images x epochs, warm-up percentage) and sd-scripts
train_network.py (max_train_epochs, updates per epoch).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from trainer.data.types import Dataset
from trainer.events import counted
from trainer.job import Job

__all__ = ["Plan"]

COUNTED_BY_KOHYA = {".jpg", ".jpeg", ".png", ".webp"}
"""The extensions that kohya_ss counts when it turns epochs into steps; others train all the same."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """How long a run lasts. A step is one optimizer update."""

    batches_per_epoch: int
    """Micro-batches over all devices; each bucket is rounded up to whole batches."""
    updates_per_epoch: int
    max_train_steps: int
    epochs: int
    """Epochs begun: the last one may be cut short by max_train_steps."""
    warmup_steps: int
    save_every_n_epochs: int
    """0 where no epoch is saved."""
    arithmetic: tuple[str, ...]
    """The sums, as lines for a person."""

    @classmethod
    def make(cls, job: Job, dataset: Dataset, processes: int = 1) -> Plan:
        """Work out the steps of ``job`` on ``dataset``.

        Args:
            job: The run.
            dataset: Its pictures, in buckets.
            processes: Devices that share each step's batches.
        """
        config = job.config
        accumulation = config.gradient_accumulation_steps
        batch_size = config.train_batch_size
        batches = dataset.batches_per_epoch(batch_size)
        updates = max(1, math.ceil(batches / processes / accumulation))
        lines: list[str] = []
        if config.max_train_epochs:
            steps = config.max_train_epochs * updates
            lines.append(f"max_train_epochs {config.max_train_epochs} x {updates} steps an epoch = {steps}")
        elif config.max_train_steps:
            steps = config.max_train_steps
            lines.append(f"max_train_steps = {steps}")
        elif config.dataset_config:
            steps = 1600
            lines.append("neither steps nor epochs given with dataset_config: 1600 steps, as in sd-scripts")
        else:
            steps = _steps_from_epochs(job, dataset, lines)
        warmup = _warmup(job, steps)
        if warmup:
            lines.append(f"warm-up: {warmup} steps")
        epochs = math.ceil(steps / updates)
        lines.append(
            f"{batches} batches of at most {batch_size} an epoch, {updates} steps an epoch, "
            + counted(epochs, "epoch")
        )
        every = config.save_every_n_epochs
        if job.engine.save_n_epoch_ratio:
            every = max(1, epochs // job.engine.save_n_epoch_ratio)
        return cls(
            batches_per_epoch=batches,
            updates_per_epoch=updates,
            max_train_steps=steps,
            epochs=epochs,
            warmup_steps=warmup,
            save_every_n_epochs=every,
            arithmetic=tuple(lines),
        )


def _steps_from_epochs(job: Job, dataset: Dataset, lines: list[str]) -> int:
    """The GUI's sum: images x repeats / batch / accumulation x epochs x (2 with class pictures)."""
    config = job.config
    total = sum(
        dataset.subsets[picture.subset].repeats
        for picture in dataset.pictures
        if not dataset.subsets[picture.subset].is_reg and picture.path.suffix.lower() in COUNTED_BY_KOHYA
    )
    total = total or dataset.num_train_images
    factor = 2 if config.reg_data_dir.strip() else 1
    epochs = config.epoch or 1
    batch_size, accumulation = config.train_batch_size, config.gradient_accumulation_steps
    steps = max(1, math.ceil(total / batch_size / accumulation * epochs * factor))
    lines.append(
        f"({total} pictures with repeats / {batch_size} batch size / {accumulation} accumulation "
        f"x {epochs} epochs x {factor}) = {steps} steps"
    )
    return steps


def _warmup(job: Job, steps: int) -> int:
    config = job.config
    if config.lr_warmup_steps > 0:
        return config.lr_warmup_steps
    if config.dataset_config and config.max_train_steps > 0:
        return round(config.lr_warmup * config.max_train_steps / 100)
    return int(config.lr_warmup / 100 * steps)
