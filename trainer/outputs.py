"""Names of saved files, and which older ones a keep-last rule removes.

Source: sd-scripts train_util.py:get_epoch_ckpt_name, get_step_ckpt_name, get_remove_epoch_no,
get_remove_step_no.
"""

from __future__ import annotations

from pathlib import Path

from trainer.job import Job

__all__ = [
    "epoch_name",
    "epoch_to_remove",
    "final_name",
    "lora_path",
    "state_path",
    "step_name",
    "step_to_remove",
]

_EXTENSIONS = {"safetensors": ".safetensors", "ckpt": ".ckpt", "pt": ".pt"}


def step_name(job: Job, step: int) -> str:
    """Stem of what is saved at ``step`` of this run; the name counts the steps before it too."""
    return f"{job.output_name}-step{job.origin_step + step:08d}"


def epoch_name(job: Job, epoch: int) -> str:
    """Stem of what is saved after ``epoch`` (from 1) of this run; the name counts those before it too."""
    return f"{job.output_name}-{job.origin_epoch + epoch:06d}"


def final_name(job: Job) -> str:
    """Stem of the last file of a run."""
    return job.output_name


def lora_path(job: Job, stem: str) -> Path:
    """The LoRA file for a stem; the type follows save_model_as."""
    return job.output_dir / f"{stem}{_EXTENSIONS.get(job.config.save_model_as, '.safetensors')}"


def state_path(job: Job, stem: str) -> Path:
    """The state folder for a stem."""
    return job.output_dir / f"{stem}-state"


def epoch_to_remove(epoch: int, every: int, keep: int) -> int | None:
    """Epoch whose file goes once ``epoch`` is saved: the newest ``keep`` files stay."""
    if not keep:
        return None
    old = epoch - every * keep
    return old if old > 0 else None


def step_to_remove(step: int, every: int, keep_steps: int) -> int | None:
    """Step whose file goes once ``step`` is saved: what is more than ``keep_steps`` steps old."""
    if not keep_steps:
        return None
    old = step - keep_steps - 1
    old -= old % every
    return old if old > 0 else None
