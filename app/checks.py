"""Checks before Start: what the trainer itself says of a configuration, each with a way to mend it."""

from __future__ import annotations

import html
import re
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from app.paths import Paths
from app.runs import Runs
from app.session import work_of
from app.view import duration, fold, row, set_button
from trainer.config import KohyaConfig, ui_of
from trainer.errors import TrainerError
from trainer.files import REPOSITORY
from trainer.job import Job

__all__ = ["Check", "checks", "checks_html"]

Level = Literal["good", "note", "warning", "error"]
SMALLEST_PX, LARGEST_PX = 256, 2048
"""The guide's bounds for pictures."""
GIB = 2**30
SPACE_KEPT_BYTES = 1 * GIB
FAMILY_OF_KIND: Mapping[str, Mapping[str, bool]] = {
    "sd1": {"v2": False},
    "sd2": {"v2": True},
    "sdxl": {"sdxl": True},
    "flux": {"flux1_checkbox": True},
    "sd3": {"sd3_checkbox": True},
}
"""Which switches a model file needs, by `trainer.checkpoints.Kind`."""
NAMES = {"sd1": "SD 1.x", "sd2": "SD 2.x", "sdxl": "SDXL", "flux": "FLUX.1", "sd3": "SD3"}
SWITCHES = (
    "v2",
    "sdxl",
    "flux1_checkbox",
    "sd3_checkbox",
    "hunyuan_image_checkbox",
    "anima_checkbox",
    "lumina_checkbox",
)


@dataclass(frozen=True)
class Check:
    """One line of the list."""

    level: Level
    text: str
    about: str = ""
    """The setting that it is about."""
    repair: str = ""
    """What the repair button says; "" where there is none."""
    values: Mapping[str, Any] | None = None
    """What the repair fills in."""


def checks(config: KohyaConfig, base: Path, paths: Paths, runs: Runs) -> list[Check]:
    """Look at everything that can be looked at before a run. Imports the engine.

    Args:
        config: As on the page.
        base: Folder for relative paths.
        paths: What may be read and written.
        runs: Earlier runs, for the time of a step.
    """
    from trainer.check import check

    config = paths.expand(config)
    try:
        job = Job.from_config(config, base=base, started=0.0)
        paths.check(job)
    except TrainerError as error:
        return [_failure(str(error), config)]
    model = _model(job)
    found = check(config, base=base)
    lines = list(model)
    mended = any(line.level == "error" for line in model)
    file = str(job.path(job.config.pretrained_model_name_or_path))
    # What the trainer says of a model that is named above already is not said twice.
    lines += [_failure(text, config) for text in found["errors"] if not (mended and file in text)]
    lines += _data(found, job)
    lines += _resolution(job)
    lines += _steps(found, job, runs)
    lines += _output(job, found)
    lines += _memory(found)
    effective = found.get("effective values", [])
    if effective:
        lines.append(Check("note", "Trained otherwise than written: " + "; ".join(map(str, effective))))
    idle = found.get("without effect", [])
    if idle:
        names = ", ".join(ui_of(text.partition(":")[0]).label for text in idle)
        lines.append(Check("note", f"Changed, but without effect here: {names}"))
    return lines


def _failure(text: str, config: KohyaConfig) -> Check:
    """A sentence of the trainer, with the first setting that it names."""
    names = [name for name in re.findall(r"[A-Za-z_0-9]+", text) if name in KohyaConfig.model_fields]
    name = names[0] if names else ""
    if (
        config.mixed_precision in ("fp16", "bf16")
        and config.mixed_precision in text
        and "mixed_precision" in text
    ):
        other = {"mixed_precision": "no", "full_fp16": False, "full_bf16": False}
        return Check("error", text, "mixed_precision", "Use no mixed precision", other)
    caching = {"cache_latents": False, "cache_latents_to_disk": False}
    if "needs cache_latents switched off" in text:
        return Check("error", text, name, "Do not cache latents", caching)
    return Check("error", text, name)


def _model(job: Job) -> list[Check]:
    """Whether the model file can be read, and is of the family that was chosen."""
    from trainer.checkpoints import kind_of, open_tensors

    name = "pretrained_model_name_or_path"
    path = job.path(job.config.pretrained_model_name_or_path)
    if not path.exists():
        return []  # a name on the hub, or what the trainer says of it
    if path.is_dir():
        return [Check("good", f"Model: the folder {path.name}", name)]
    try:
        kind = kind_of(open_tensors(path).shapes)
    except TrainerError as error:
        return [Check("error", str(error), name)]
    wanted = FAMILY_OF_KIND.get(kind)
    if wanted is None:
        return [Check("error", f"{path.name} is no base model ({kind}): choose another file", name)]
    now = {switch: bool(getattr(job.config, switch, False)) for switch in SWITCHES}
    right = {switch: wanted.get(switch, False) for switch in SWITCHES}
    if now != right:
        text = f"{path.name} is {NAMES[kind]}, but another kind of model is ticked"
        return [Check("error", text, name, f"Set to {NAMES[kind]}", right)]
    return [Check("good", f"Model: {path.name}, {NAMES[kind]}", name)]


def _data(found: Mapping[str, Any], job: Job) -> list[Check]:
    data = found.get("data set")
    if not data:
        return []
    lines = []
    count, repeated = data["pictures"], data["training pictures with repeats"]
    buckets = ", ".join(f"{size}: {number}" for size, number in found["buckets"].items())
    text = f"{count} pictures found, {repeated} with repeats; buckets {buckets}"
    lines.append(Check("good" if count else "error", text, "train_data_dir"))
    for finding in data["findings"]:
        level, _, message = str(finding).partition(": ")
        lowered: Level = "note" if level == "info" else "warning"
        where = "caption_extension" if "caption" in message else "train_data_dir"
        lines.append(Check(lowered, message, where))
    return lines


def _resolution(job: Job) -> list[Check]:
    sides = (job.width, job.height)
    shipped = job.path(job.config.pretrained_model_name_or_path).is_relative_to(REPOSITORY / "assets")
    if shipped or all(SMALLEST_PX <= side <= LARGEST_PX for side in sides):
        return []
    text = f"Resolution {job.width} x {job.height}: usual is {SMALLEST_PX} to {LARGEST_PX} pixels a side"
    fitting = ",".join(str(min(max(side, SMALLEST_PX), LARGEST_PX)) for side in sides)
    return [Check("warning", text, "max_resolution", f"Set to {fitting}", {"max_resolution": fitting})]


def _steps(found: Mapping[str, Any], job: Job, runs: Runs) -> list[Check]:
    steps = found.get("steps")
    if not steps:
        return []
    total = steps["max_train_steps"]
    setting = next(
        (name for name in ("max_train_epochs", "max_train_steps") if getattr(job.config, name)), "epoch"
    )
    lines = [Check("good", f"{total} steps. " + "; ".join(steps["arithmetic"]), setting)]
    if setting == "max_train_steps" and job.config.epoch > 1 and not job.config.dataset_config:
        text = f"max_train_steps is {job.config.max_train_steps}, so epoch {job.config.epoch} decides nothing"
        lines.append(Check("note", text, "epoch", "Let the epochs decide", {"max_train_steps": 0}))
    step_s = runs.last_step_s(work_of(job))
    guessed_s = found.get("seconds a step (a rough estimate)")
    if step_s is not None:
        lines.append(Check("good", f"About {duration(step_s * total)}, as fast as the last run like it"))
    elif guessed_s:
        lines.append(Check("note", f"Roughly {duration(guessed_s * total)}; the first steps will tell"))
    else:
        lines.append(
            Check("note", "How long it takes is known after its first steps: no run like it was made yet")
        )
    return lines


def _output(job: Job, found: Mapping[str, Any]) -> list[Check]:
    from trainer import outputs

    lines = []
    file = outputs.lora_path(job, outputs.final_name(job))
    if file.exists():
        number = 2
        while outputs.lora_path(job, f"{job.output_name}-{number}").exists():
            number += 1
        other = f"{job.output_name}-{number}"
        text = f"{file.name} is in {file.parent} already: a run under this name replaces it"
        lines.append(Check("warning", text, "output_name", f"Call it {other}", {"output_name": other}))
    folder = job.output_dir
    while not folder.exists() and folder.parent != folder:
        folder = folder.parent
    try:
        free_bytes = shutil.disk_usage(folder).free
    except OSError as error:
        return [*lines, Check("error", f"{folder} cannot be used: {error.strerror}", "output_dir")]
    trained = found.get("parameters", {}).get("trained", 0)
    whole_bytes = float(found.get("disk (estimated, GiB)", {}).get("sum", 0)) * GIB
    one_bytes = trained * {"float": 4}.get(job.config.save_precision, 2)
    text = f"{free_bytes / GIB:.1f} GiB free on the disk"
    if one_bytes:
        text += f"; each LoRA file takes about {one_bytes / 2**20:.0f} MiB"
    if whole_bytes:
        text += f", the whole run {whole_bytes / GIB:.2f} GiB"
    needed = max(10 * one_bytes, whole_bytes)
    level: Level = "warning" if free_bytes < SPACE_KEPT_BYTES + needed else "good"
    return [*lines, Check(level, text, "output_dir")]


def _memory(found: Mapping[str, Any]) -> list[Check]:
    import torch

    from trainer import devices

    plan = found.get("memory (estimated, GiB)")
    if not plan:
        return []
    sampled = devices.memory(devices.choose())
    has_card = sampled.vram_total_bytes is not None and torch.cuda.is_available()
    total_bytes = (sampled.vram_total_bytes if has_card else sampled.ram_total_bytes) or 0
    need = float(plan["sum"])
    parts = ", ".join(f"{name} {size:.2f}" for name, size in plan.items() if name != "sum")
    where = f"of {total_bytes / GIB:.1f} GiB on {'the card' if has_card else 'this computer (no card)'}"
    text = f"Memory plan: {need:.2f} GiB {where} ({parts})"
    if "will it fit" in found:
        text += f". {found['will it fit']}"
    if need * GIB < 0.9 * total_bytes:
        return [Check("good", text)]
    text += "".join(f"; {change}" for change in found.get("what makes it fit", []))
    values = {
        "train_batch_size": 1,
        "gradient_checkpointing": True,
        "cache_latents_to_disk": True,
        "cache_latents": True,
    }
    return [
        Check(
            "warning",
            text,
            "train_batch_size",
            "Save memory: batch 1, checkpointing, latents on disk",
            values,
        )
    ]


WORDS: Mapping[Level, str] = {"good": "OK", "note": "Note", "warning": "Look", "error": "Mend"}


def checks_html(lines: Iterable[Check]) -> str:
    """The list for a person: what must be mended first, what is well folded away."""
    found = list(lines)
    order: tuple[Level, ...] = ("error", "warning", "note", "good")
    counts = {level: sum(line.level == level for line in found) for level in order}
    if counts["error"]:
        title, tone = f"{counts['error']} to mend before it can start", "failed"
    elif counts["warning"]:
        title, tone = f"Ready; {counts['warning']} to look at", "warned"
    else:
        title, tone = "Ready to start", "done"
    urgent = "".join(_line(line) for level in order[:2] for line in found if line.level == level)
    rest = "".join(_line(line) for level in order[2:] for line in found if line.level == level)
    more = fold("All checks", f'<ul class="kiln-checks">{rest}</ul>') if rest else ""
    first = f'<ul class="kiln-checks">{urgent}</ul>' if urgent else ""
    return f'<div class="kiln-alert kiln-ready {tone}" role="status"><p>{html.escape(title)}</p>{first}{more}</div>'


def _line(line: Check) -> str:
    buttons = set_button(line.repair, line.values, "primary") if line.values else ""
    if line.about:
        label = html.escape(ui_of(line.about).label)
        name = html.escape(line.about, quote=True)
        buttons += f'<button type="button" class="kiln-small" data-go="{name}">{label}</button>'
    words = f"<b>{WORDS[line.level]}</b><span>{html.escape(line.text)}</span>"
    return f'<li class="{line.level}">{words}{row(buttons)}</li>'
