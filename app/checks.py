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
from trainer.errors import ConfigError, TrainerError
from trainer.files import REPOSITORY
from trainer.job import Job

__all__ = ["Check", "checks", "checks_html"]

Level = Literal["good", "note", "warning", "error"]
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
    job, wrong = Job.draft(config, base=base, started=0.0)
    try:
        paths.check(job)
    except ConfigError as error:  # nothing there is looked at
        return [_failure(text, config) for text in [*wrong, *error.messages]]
    model = _model(job)
    found = check(config, base=base)
    lines = list(model)
    mended = any(line.level == "error" for line in model)
    file = str(job.path(job.config.pretrained_model_name_or_path))
    # What the trainer says of a model that is named above already is not said twice.
    lines += [_failure(text, config) for text in found["errors"] if not (mended and file in text)]
    lines += _files(job)
    lines += _data(found, job)
    lines += _resolution(job)
    lines += _samples(job)
    lines += _steps(found, job, runs)
    lines += _output(job, found)
    lines += _memory(found)
    for note in map(str, found.get("effective values", [])):
        lines.append(Check("note", f"Trained otherwise than written: {note}", _named_in(note)))
    for text in found.get("without effect", []):
        name = text.partition(":")[0]
        default = KohyaConfig.model_fields[name].default
        label = f"Changed, but without effect here: {ui_of(name).label}"
        lines.append(Check("note", label, name, "Back to the default", {name: default}))
    return lines


def _named_in(text: str) -> str:
    """The first setting that a sentence names."""
    names = [name for name in re.findall(r"[A-Za-z_0-9]+", text) if name in KohyaConfig.model_fields]
    return names[0] if names else "additional_parameters" if text.startswith("--") else ""


ONE_DEVICE = {"num_processes": 1, "num_machines": 1, "gpu_ids": ""}
UNCACHED = {"cache_latents": False, "cache_latents_to_disk": False}
UNCACHED_TEXT = {
    "sdxl_cache_text_encoder_outputs": False,
    "flux1_cache_text_encoder_outputs": False,
    "flux1_cache_text_encoder_outputs_to_disk": False,
}
REPAIRS: tuple[tuple[str, str, Mapping[str, Any]], ...] = (
    (r"^full_fp16 and full_bf16", "Switch both off", {"full_fp16": False, "full_bf16": False}),
    (r"^full_fp16 needs", "Switch full fp16 off", {"full_fp16": False}),
    (r"^full_bf16 needs", "Switch full bf16 off", {"full_bf16": False}),
    (r"needs cache_latents switched off", "Do not cache latents", UNCACHED),
    (r"^adaptive_noise_scale only", "Set to 0", {"adaptive_noise_scale": 0}),
    (r"^scale_v_pred_loss", "Switch it off", {"scale_v_pred_loss_like_noise_pred": False}),
    (r"^v_pred_like_loss", "Set to 0", {"v_pred_like_loss": 0}),
    (r"^max_token_length", "Set to 75", {"max_token_length": 75}),
    (r"^LoRA_type .* does not fit FLUX", "Choose Flux1", {"LoRA_type": "Flux1"}),
    (r"^LoRA_type Flux1 is for", "Choose Standard", {"LoRA_type": "Standard"}),
    (r"^weighted_captions", "Switch it off", {"weighted_captions": False}),
    (r"^t5xxl_lr needs", "Set to 0", {"t5xxl_lr": 0}),
    (r"are all 0: nothing would train", "Set to 0.0001", {"learning_rate": 1e-4, "unet_lr": 1e-4}),
    (r"^max_resolution is '", "Set to 512,512", {"max_resolution": "512,512"}),
    (r"^min_bucket_reso \d+ is larger", "Set to 64", {"min_bucket_reso": 64}),
    (r"^max_bucket_reso \d+ is smaller", "Set to 2048", {"max_bucket_reso": 2048}),
    (r"^bucket_reso_steps", "Set to 64", {"bucket_reso_steps": 64}),
    (r"^lr_scheduler is ", "Choose cosine", {"lr_scheduler": "cosine"}),
    (r"has no warm-up, and", "No warm-up", {"lr_warmup": 0, "lr_warmup_steps": 0}),
    (r"^min_timestep", "All timesteps", {"min_timestep": 0, "max_timestep": 1000}),
    (
        r"^(num_processes|num_machines|gpu_ids|extra_accelerate_launch_args)",
        "Train on one device",
        ONE_DEVICE,
    ),
    (r"^blocks_to_swap cannot be combined", "Swap no blocks", {"blocks_to_swap": 0}),
    (r"^train_t5xxl changes what|ache text encoder outputs", "Do not cache text", UNCACHED_TEXT),
    (r"^v2 and SDXL exclude", "It is SDXL", {"v2": False}),
)
"""What mends a contradiction: a pattern of the trainer's sentence, the button's words, and the values."""


def _failure(text: str, config: KohyaConfig) -> Check:
    """A sentence of the trainer, with the first setting that it names and what mends it."""
    name = _named_in(text)
    if (
        config.mixed_precision in ("fp16", "bf16")
        and config.mixed_precision in text
        and text.startswith("mixed_precision")
    ):
        other = {"mixed_precision": "no", "full_fp16": False, "full_bf16": False}
        return Check("error", text, "mixed_precision", "Use no mixed precision", other)
    for pattern, words, values in REPAIRS:
        if re.search(pattern, text):
            return Check("error", text, name or next(iter(values)), words, values)
    if nearest := re.search(r"choose (\w+), the nearest equivalent", text):
        return Check("error", text, "optimizer", f"Choose {nearest[1]}", {"optimizer": nearest[1]})
    return Check("error", text, name)


def _files(job: Job) -> list[Check]:
    """Files and folders that are named and not there."""
    lines = []
    flux = ("ae", "clip_l", "t5xxl") if job.family == "flux" else ()
    for name in ("network_weights", "resume", "reg_data_dir", *flux):
        text = str(getattr(job.config, name)).strip()
        if text and not job.path(text).exists():
            empty = ("Leave it empty", {name: ""}) if name not in flux else ("", None)
            lines.append(Check("error", f"{ui_of(name).label}: {text} does not exist", name, *empty))
    return lines


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
    count, repeated = data["pictures"], data["training pictures with repeats"]
    where = "train_data_dir" if not job.config.dataset_config.strip() else "dataset_config"
    lines = [Check("good" if count else "error", f"{count} pictures found, {repeated} with repeats", where)]
    buckets = ", ".join(f"{size}: {number}" for size, number in found["buckets"].items())
    error = found.get("mean aspect ratio error", 0.0)
    sized = f"Buckets with repeats: {buckets}; mean aspect ratio error {error:.3f}"
    lines.append(Check("good", sized, "max_bucket_reso" if job.config.enable_bucket else "enable_bucket"))
    odd, shipped = data["sizes outside 256 to 2048"], _is_shipped(job)
    if odd and not shipped:
        one = "1 picture has a side outside 256 to 2048 pixels: take better ones"
        many = f"{odd} pictures have a side outside 256 to 2048 pixels: take better ones"
        lines.append(Check("warning", one if odd == 1 else many, where))
    if not data["without a caption file"]:
        lines.append(Check("good", "Every picture has a caption", "caption_extension"))
    for finding in data["findings"]:
        level, _, message = str(finding).partition(": ")
        lowered: Level = "note" if level == "info" else "warning"
        lines.append(Check(lowered, message, "caption_extension" if "caption" in message else where))
    return lines


def _is_shipped(job: Job) -> bool:
    """Whether the base model is the demo's, which works on small pictures."""
    return job.path(job.config.pretrained_model_name_or_path).is_relative_to(REPOSITORY / "assets")


def _resolution(job: Job) -> list[Check]:
    from trainer.check import LARGEST_PX, SMALLEST_PX

    sides = (job.width, job.height)
    text = f"Resolution {job.width} x {job.height}"
    if _is_shipped(job) or all(SMALLEST_PX <= side <= LARGEST_PX for side in sides):
        return [Check("good", text, "max_resolution")]
    text += f": usual is {SMALLEST_PX} to {LARGEST_PX} pixels a side"
    fitting = ",".join(str(min(max(side, SMALLEST_PX), LARGEST_PX)) for side in sides)
    return [Check("warning", text, "max_resolution", f"Set to {fitting}", {"max_resolution": fitting})]


def _samples(job: Job) -> list[Check]:
    """Whether there will be pictures to judge the run by."""
    config = job.config
    draws = config.sample_every_n_steps or config.sample_every_n_epochs or job.engine.sample_at_first
    if not config.sample_prompts.strip():
        text = "No sample prompt: no pictures will show how the training goes"
        return [Check("note", text, "sample_prompts")]
    if not draws:
        text = "The sample prompts are drawn only when asked for: no interval is set"
        name = "sample_every_n_steps"
        return [Check("note", text, name, "Every 100 steps", {name: 100})]
    return []


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
        text = f"About {duration(step_s * total)}, as fast as the last run like it"
        lines.append(Check("good", text, setting))
    elif guessed_s:
        text = f"Roughly {duration(guessed_s * total)}; the first steps will tell"
        lines.append(Check("note", text, setting))
    else:
        text = "How long it takes is known after its first steps: no run like it was made yet"
        lines.append(Check("note", text, setting))
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
    free, one, whole = free_bytes / GIB, one_bytes / 2**20, whole_bytes / GIB
    if whole_bytes:
        text = (
            f"{free:.1f} GiB free on the disk; LoRA files take about {one:.0f} MiB each, "
            f"the whole run {whole:.2f} GiB"
        )
    else:
        text = f"{free:.1f} GiB free on the disk"
    needed = max(10 * one_bytes, whole_bytes)
    level: Level = "warning" if free_bytes < SPACE_KEPT_BYTES + needed else "good"
    return [*lines, Check(level, text, "output_dir")]


def _memory(found: Mapping[str, Any]) -> list[Check]:
    import torch

    from trainer import devices
    from trainer.advice import changes_in

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
    changes = changes_in(found)
    if not changes:
        level: Level = "good" if need * GIB < 0.9 * total_bytes else "warning"
        return [Check(level, text, "train_batch_size")]
    lines = []
    together: dict[str, Any] = {}
    for number, change in enumerate(changes, 1):
        together |= change.values
        about = next(iter(change.values))
        lines.append(Check("warning", f"{number}. {change}", about, "Do this", dict(change.values)))
    words = "Make it fit" if changes[-1].fits else "Do all that can be done"
    return [Check("warning", text, "train_batch_size", words, together), *lines]


WORDS: Mapping[Level, str] = {"good": "OK", "note": "Note", "warning": "Look", "error": "Mend"}


GIST = ("train_data_dir", "max_train_steps")
"""What a person wants to know before each start, good or not: how many pictures, how many steps, how long."""


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
    well = [line for level in order[2:] for line in found if line.level == level]
    urgent += "".join(_line(line) for line in well if line.about in GIST)
    rest = "".join(_line(line) for line in well if line.about not in GIST)
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
