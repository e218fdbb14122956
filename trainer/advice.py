"""Will it fit? If not, what makes it fit: each change worked out anew, in the order of Kohya's guides."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from trainer import memory
from trainer.data.types import Dataset, Size
from trainer.estimate import GIB, Forecast, forecast, texts_leave
from trainer.job import Job

__all__ = ["CHANGES", "Change", "advice", "changes_in", "report", "summary"]

WORTH_BYTES = 32 << 20
"""A change that frees less than this is not advised."""


CHANGES = "changes"
"""Where the result of `trainer.check.check` holds the changes as data, for programs."""

CLEARLY_LESS = 0.85
"""After a run that did not fit: what may be needed of what was foreseen."""


@dataclass(frozen=True, kw_only=True)
class Change:
    """One step on the way to a run that fits."""

    text: str
    values: Mapping[str, Any]
    """Fields of the configuration and their new values."""
    before_bytes: int
    """Peak of device memory without this change, but with those before it."""
    after_bytes: int
    fits: bool
    """Whether the run fits with this change and those before it."""

    @property
    def saved_bytes(self) -> int:
        """What the change frees."""
        return self.before_bytes - self.after_bytes

    def __str__(self) -> str:
        """The change and what it saves."""
        return f"{self.text}: saves {self.saved_bytes / GIB:.2f} GiB, {self.after_bytes / GIB:.2f} GiB are needed then"


def advice(
    job: Job,
    limit_bytes: int,
    dataset: Dataset | None = None,
    *,
    kind: str | None = None,
    failed: bool = False,
) -> tuple[Forecast, list[Change]]:
    """What makes ``job`` fit, in the order of Kohya's guides; each change is worked out anew.

    Changes add up. Those that free next to nothing are left out; the list ends with the first
    that makes the run fit.

    Args:
        job: The run.
        limit_bytes: Device memory that it may use.
        dataset: Its pictures.
        kind: Type of the device that is meant; the present one if None.
        failed: The run did run out of memory, so that the forecast was too low: clearly less must do.

    Returns:
        The forecast as it is, and the changes; none where it fits already.

    Raises:
        TrainerError: The model file cannot be read, or options cannot be.
    """
    first = now = forecast(job, dataset, kind=kind)
    if failed:
        limit_bytes = min(limit_bytes, int(first.peak_bytes * CLEARLY_LESS))
    found: list[Change] = []
    if first.peak_bytes <= limit_bytes:
        return first, found
    for text, values in _candidates(job, kind or first.kind):
        if now.peak_bytes <= limit_bytes:
            break
        changed = _changed(job, values)
        after = forecast(changed, dataset, kind=kind, size=_size_of(changed, values))
        if "blocks_to_swap" in values and after.peak_bytes <= limit_bytes:
            count, after = _fewest_blocks(job, values["blocks_to_swap"], limit_bytes, after, dataset, kind)
            values = {"blocks_to_swap": count}
            text, changed = f"blocks_to_swap {count}", _changed(job, values)
        if now.peak_bytes - after.peak_bytes < WORTH_BYTES:
            continue
        found.append(
            Change(
                text=text,
                values=values,
                before_bytes=now.peak_bytes,
                after_bytes=after.peak_bytes,
                fits=after.peak_bytes <= limit_bytes,
            )
        )
        job, now = changed, after
    return first, found


def _size_of(job: Job, values: Mapping[str, Any]) -> Size | None:
    return (job.width, job.height) if "max_resolution" in values else None


def _changed(job: Job, values: Mapping[str, Any]) -> Job:
    changed = job.with_config(**values)
    if "max_resolution" in values:
        width, height = (int(part) for part in values["max_resolution"].split(","))
        changed = replace(changed, width=width, height=height)
    return changed


def _fewest_blocks(
    job: Job,
    most: int,
    limit_bytes: int,
    best: Forecast,
    dataset: Dataset | None,
    kind: str | None,
) -> tuple[int, Forecast]:
    """The smallest number of swapped blocks that fits, by bisection."""
    low, high = job.config.blocks_to_swap, most
    while high - low > 1:
        middle = (low + high) // 2
        after = forecast(_changed(job, {"blocks_to_swap": middle}), dataset, kind=kind)
        if after.peak_bytes <= limit_bytes:
            high, best = middle, after
        else:
            low = middle
    return high, best


def _candidates(job: Job, kind: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Changes that this run can still make, in the order of the guides."""
    config = job.config
    if not config.cache_latents_to_disk and not (config.color_aug or config.random_crop):
        yield "cache latents to disk", {"cache_latents": True, "cache_latents_to_disk": True}
    if job.family == "sdxl" and not texts_leave(job) and not job.trains_text_encoder and not _varies(job):
        yield "cache text encoder outputs", {"sdxl_cache_text_encoder_outputs": True}
    if job.family == "flux" and not texts_leave(job) and not job.trains_t5:
        yield "cache text encoder outputs", {"flux1_cache_text_encoder_outputs": True}
    if config.mixed_precision == "no":
        half = (
            "bf16"
            if kind == "cpu" or not torch.cuda.is_available() or torch.cuda.is_bf16_supported()
            else "fp16"
        )
        yield f"mixed_precision {half}", {"mixed_precision": half}
    if config.train_batch_size > 1:
        yield "train_batch_size 1", {"train_batch_size": 1}
    if config.vae_batch_size > 1:
        yield "vae_batch_size 1", {"vae_batch_size": 1}
    if memory.choices(job).unet is None:
        yield "fp8 base", {"fp8_base": True, "fp8_base_unet": job.family == "flux"}
    if not config.gradient_checkpointing:
        yield "gradient checkpointing", {"gradient_checkpointing": True}
    if config.optimizer.lower() in ("adamw", "adam", "prodigy") and job.family != "sd":
        yield "optimizer AdamW8bit", {"optimizer": "AdamW8bit"}
    most = 35 if job.family == "flux" else 57
    if config.blocks_to_swap < most:
        yield f"blocks_to_swap {most}", {"blocks_to_swap": most}
    if job.width * job.height > 512 * 512:
        yield "resolution 512,512", {"max_resolution": "512,512"}
    if job.family != "sd" and memory.choices(job).unet != "nf4":
        whole = {"fp8_base": False, "fp8_base_unet": False}
        yield "quantized_base nf4 in place of fp8 base", {"quantized_base": "nf4", **whole}


def _varies(job: Job) -> bool:
    config = job.config
    return bool(config.shuffle_caption or config.caption_dropout_rate or job.engine.caption_tag_dropout_rate)


def _gib(sizes: Mapping[str, int]) -> dict[str, float]:
    return {name: round(size / GIB, 3) for name, size in sizes.items()}


def summary(found: Forecast, limit_bytes: int | None, changes: list[Change]) -> dict[str, Any]:
    """A forecast as plain data for `trainer.check`: GiB, seconds and sentences."""
    phase = found.peak_phase
    peak = {**_gib(found.device[phase]), "sum": round(found.peak_bytes / GIB, 3)}
    result: dict[str, Any] = {
        "parameters": dict(found.parameters),
        "memory (estimated, GiB)": peak,
        "phase that needs most": phase,
        "other phases (estimated, GiB)": {
            name: round(sum(sizes.values()) / GIB, 3) for name, sizes in found.device.items() if name != phase
        },
        "host memory (estimated, GiB)": {**_gib(found.host), "sum": round(found.host_bytes / GIB, 3)},
        "disk (estimated, GiB)": {**_gib(found.disk), "sum": round(sum(found.disk.values()) / GIB, 3)},
        "seconds to the first step (a rough estimate)": {
            **{name: round(value, 1) for name, value in found.first_step_s.items()},
            "sum": round(sum(found.first_step_s.values()), 1),
        },
    }
    if found.step_s is not None:
        result["seconds a step (a rough estimate)"] = round(found.step_s, 3)
    if limit_bytes is not None:
        result["will it fit"] = _verdict(found, limit_bytes, changes)
    if changes:
        result["what makes it fit"] = [str(change) for change in changes]
        result[CHANGES] = [
            {**asdict(change), "values": dict(change.values), "saved_bytes": change.saved_bytes}
            for change in changes
        ]
    return result


def changes_in(found: Mapping[str, Any]) -> list[Change]:
    """What makes a run fit, from the result of `trainer.check.check`, in the order of the guides.

    Each change's ``values`` are fields of the configuration with their new values. Changes add up; the
    last one that is needed has ``fits``, where any does.
    """
    return [
        Change(**{name: value for name, value in item.items() if name != "saved_bytes"})
        for item in found.get(CHANGES, ())
    ]


def _verdict(found: Forecast, limit_bytes: int, changes: list[Change]) -> str:
    needs = f"{found.peak_bytes / GIB:.2f} GiB are needed ({found.peak_phase}) of {limit_bytes / GIB:.2f} GiB"
    if found.peak_bytes <= limit_bytes:
        return f"yes: {needs}"
    if changes and changes[-1].fits:
        return f"no: {needs}; with the changes below it does"
    least = changes[-1].after_bytes if changes else found.peak_bytes
    return f"no: {needs}, and at least {least / GIB:.2f} GiB with all that can be changed"


def report(
    job: Job, dataset: Dataset | None = None, *, limit_bytes: int | None = None, kind: str | None = None
) -> dict[str, Any]:
    """`forecast`, and `advice` where it does not fit, as plain data.

    Args:
        job: The run.
        dataset: Its pictures.
        limit_bytes: Device memory that it may use; None asks for no verdict.
        kind: Type of the device that is meant; the present one if None.

    Raises:
        TrainerError: The model file cannot be read, or options cannot be.
    """
    if limit_bytes is None:
        return summary(forecast(job, dataset, kind=kind), None, [])
    found, changes = advice(job, limit_bytes, dataset, kind=kind)
    return summary(found, limit_bytes, changes)
