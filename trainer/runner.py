"""From a job to a finished LoRA: preparation, the loop, and one sentence for whatever goes wrong.

`run` does it in the calling thread; `trainer.worker` puts it on a thread of its own.
"""

from __future__ import annotations

import time
import traceback
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
import torch._dynamo  # an optimizer would, at its first step, while another thread may import it too
from accelerate import Accelerator
from accelerate.state import AcceleratorState

from trainer import config as configuration
from trainer import (
    devices,
    launch,
    memory,
    metadata,
    networks,
    optimizers,
    plugins,
    prompts,
    quiet,
    schedules,
    states,
)
from trainer.controls import Controls
from trainer.data import cache as caches
from trainer.data import folder
from trainer.data.dataset_config import apply_dataset_config
from trainer.data.loader import Loader
from trainer.data.types import Dataset
from trainer.draws import Draws
from trainer.errors import ConfigError, OutOfMemoryError, StateError, StopTraining, TrainerError
from trainer.events import (
    EventLog,
    JobFailed,
    JobFinished,
    JobStarted,
    JobStopped,
    LogLine,
    MemorySampled,
    PhaseStarted,
    Progress,
)
from trainer.job import Job
from trainer.loop import Outcome, Run, guarded
from trainer.objectives import objective_for
from trainer.plan import Plan
from trainer.processes import PeerLostError, Processes, join
from trainer.progress import Scalars
from trainer.review.probe import held_batches
from trainer.review.watch import PICTURES, Watch

quiet.hush()
import bitsandbytes  # noqa: E402, F401 - diffusers would, likewise

__all__ = ["prepare", "run"]

FAMILIES = plugins.Folder("trainer.families")


def run(job: Job, events: EventLog, controls: Controls | None = None, draws: Draws | None = None) -> Outcome:
    """Train ``job`` to its end, in this thread.

    Args:
        job: What to train.
        events: Gets everything that happens; its journal is opened in the output folder.
        controls: Stop, save and sample requests.
        draws: Replaces the run's random draws (a replay).

    Raises:
        TrainerError: Said as `JobFailed` too.
    """
    started = time.time()
    controls = controls or Controls()
    if launch.wants_children(job) and not launch.is_child():
        return launch.run(job, events, controls)
    current: Run | None = None
    processes = Processes()
    try:
        processes, job = join(job, devices.choose())
        if processes.is_first:
            events.open(job.journal)
        current = prepare(job, events, controls, draws, processes)
        outcome = guarded(current, current.train)
        processes.leave()
        elapsed_s = time.time() - started
        if outcome.stopped:
            stopped = JobStopped(
                step=outcome.step, path=outcome.path, state=outcome.state, elapsed_s=elapsed_s
            )
            events.emit(stopped)
        else:
            assert outcome.path is not None
            events.emit(JobFinished(step=outcome.step, path=outcome.path, elapsed_s=elapsed_s))
        return outcome
    except StopTraining:
        events.emit(JobStopped(step=0, path=None, state=None, elapsed_s=time.time() - started))
        return Outcome(step=0, path=None, state=None, stopped=True)
    except BaseException as error:
        known, step = error, 0 if current is None else current.counted
        if _is_out_of_memory(error):
            used = devices.memory(devices.choose())
            # The tensors of the step that failed hang on the frames that it went through.
            traceback.clear_frames(error.__traceback__)
            devices.free()
            kept = None if current is None else current.save_after_failure()
            _let_go(current)
            current = None
            devices.free()
            known = _out_of_memory(job, error, step, used, kept)
        detail = "" if isinstance(known, TrainerError) else traceback.format_exc()
        if not processes.is_first and not isinstance(known, PeerLostError):
            events.open(processes.own_journal(job))
        if isinstance(known, PeerLostError) and launch.is_told():
            raise  # the parent knows why the other one ended
        events.emit(JobFailed(message=_sentence(known), step=step, detail=detail))
        if known is error:
            raise
        raise known from error
    finally:
        _let_go(current)
        current = None
        devices.free()
        events.close()


def _let_go(current: Run | None) -> None:
    """Take a run apart, so that nothing holds its models."""
    if current is None:
        return
    current.scalars.close()
    current.network.detach()
    if current.swap is not None:
        current.swap.close()


NO_MEMORY = (
    "can't allocate memory",  # PyTorch, for a tensor
    "cannot allocate memory",  # the system, for a file that is mapped
    "could not create a primitive",  # oneDNN, for the code of a layer and its work space
    "could not execute a primitive",
    "bad_alloc",  # C++
)
"""What libraries say, as `RuntimeError` or `OSError`, when the computer has no more memory."""


def _is_out_of_memory(error: BaseException) -> bool:
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    said = str(error).lower()
    return isinstance(error, RuntimeError | OSError) and any(words in said for words in NO_MEMORY)


def _out_of_memory(
    job: Job, error: BaseException, step: int, used: MemorySampled, kept: Path | None
) -> OutOfMemoryError:
    """What happened, by the figures measured at that moment, and what makes the run fit."""
    from trainer.advice import advice

    card = isinstance(error, torch.OutOfMemoryError)
    in_use, total = used.ram_bytes, used.ram_total_bytes
    if card and used.vram_bytes is not None and used.vram_total_bytes is not None:
        in_use, total = used.vram_bytes, used.vram_total_bytes
    where = "before the first step" if step == 0 else f"after step {step}"
    said = (
        f"{'the card' if card else 'the computer'} ran out of memory {where} "
        f"({in_use / 2**30:.1f} of {total / 2**30:.1f} GiB were in use): "
    )
    changes: list[str] = []
    try:
        job = apply_dataset_config(job)
        _, found = advice(job, total, folder.scan(job), failed=True)
        changes = [f"{change.text} (saves {change.saved_bytes / 2**30:.2f} GiB)" for change in found]
    except (TrainerError, RuntimeError, MemoryError, OSError):
        pass  # the advice that needs no sums is given instead
    said += (
        "change, in this order, " + ", ".join(changes)
        if changes
        else "lower train_batch_size or max_resolution, switch gradient_checkpointing on, or cache latents to disk"
    )
    return OutOfMemoryError(said + (f"; what was trained so far is in {kept.name}" if kept else ""))


def _sentence(error: BaseException) -> str:
    if isinstance(error, TrainerError):
        return str(error)
    if isinstance(error, KeyboardInterrupt):
        return "interrupted at once: what was trained since the last save is lost"
    return f"{type(error).__name__}: {error}"


def prepare(
    job: Job,
    events: EventLog,
    controls: Controls,
    draws: Draws | None = None,
    processes: Processes | None = None,
) -> Run:
    """Everything before step 1: pictures, models, caches, network, optimizer, resumed state.

    Raises:
        TrainerError: Something is missing or cannot work; said before anything slow where possible.
    """
    job = apply_dataset_config(job)
    config = job.config

    def say(message: str) -> None:
        events.emit(LogLine(message=message))

    def warn(message: str) -> None:
        events.emit(LogLine(message=message, level="warning"))

    objective = objective_for(job)
    processes = processes or Processes()
    device = devices.choose()
    devices.check_precision(config.mixed_precision, device)
    plugin = networks.plugin_for(job)
    optimizers.check(job, device)
    memory.check(job, device)
    objective.check(job)
    job.output_dir.mkdir(parents=True, exist_ok=True)
    if processes.is_first:
        states.sweep(job.output_dir)
    say(f"device: {devices.describe(device)}; precision: {config.mixed_precision}")
    for note in (*job.notes, *launch.notes(job), *optimizers.notes(job), *memory.notes(job)):
        say(str(note))

    events.emit(PhaseStarted(phase="read pictures"))

    def advance(done: int, total: int) -> None:
        events.emit(Progress(phase="read pictures", done=done, total=total))

    if job.origin_step:
        say(f"steps are counted on from {job.origin_step}, for which network_weights was trained")
    dataset = folder.scan(job, advance)
    for finding in dataset.findings:
        # What is left out is no error of the run: it goes on without it.
        level: Literal["info", "warning"] = "info" if finding.level == "info" else "warning"
        events.emit(LogLine(message=finding.message, level=level))
    FAMILIES.get(job.family).check(job, dataset)
    accelerator = _accelerator(config.mixed_precision, device)
    plan = Plan.make(job, dataset, processes.count)
    schedules.check(job, plan)
    resumed = states.load_state(job.path(config.resume)) if config.resume.strip() else None
    if resumed is not None:
        job, plan = _check_resume(job, plan, resumed, warn)
    draws = draws or Draws(job.seed)
    _say_dataset(dataset, plan, say)
    if processes.is_first:
        configuration.save(job.written, job.output_dir / f"{job.output_name}_{job.stamp}.json")
        prompts.write_prompt_file(job)

    events.emit(PhaseStarted(phase="load model"))
    began = time.perf_counter()
    family = FAMILIES.get(job.family).load(
        job, accelerator.device, devices.weight_dtype(config.mixed_precision), say
    )
    say(f"VAE and text encoders read in {time.perf_counter() - began:.1f} s")
    with processes.one_of_each_machine_first():
        latents = caches.prepare(job, dataset, family, draws, emit=events.emit, stop=controls.stop.is_set)
        measured = latents is not None and processes.is_first and not config.skip_verdict
        held = held_batches(dataset.held_out(), family, PICTURES) if measured else ()
        if latents is not None:
            family.move(["vae"], torch.device("cpu"))
        family.prepare_text(job, dataset, emit=events.emit, stop=controls.stop.is_set)

    # Only now: the denoiser is never in memory beside the VAE at work, where latents are cached.
    events.emit(PhaseStarted(phase="load model"))
    began = time.perf_counter()
    say(f"{type(family.unet).__name__} read in {time.perf_counter() - began:.1f} s")
    for file, multiplier in _base_weights(job):
        plugin.merge(family, file, multiplier, say)
    swap = memory.prepare(family, job, accelerator.device, say)
    network = plugin.create(family, job, draws, say)
    network.attach()
    full = (
        {"fp16": torch.float16, "bf16": torch.bfloat16}[config.mixed_precision]
        if (config.full_fp16 or config.full_bf16)
        else torch.float32
    )
    network.to(accelerator.device, full)
    if config.gradient_checkpointing:
        family.enable_gradient_checkpointing()
        memory.offload(family, job, accelerator.device)
    if config.dynamo_backend not in ("no", "NO", ""):
        _compile(family.unet, job, say)
    groups = network.param_groups()
    if not groups:
        raise ConfigError("no layer has a learning rate above 0: nothing would be trained")
    built = optimizers.create(job, groups)
    built.optimizer = accelerator.prepare(built.optimizer)
    schedule = schedules.create(job, built, plan)
    parameters = sum(parameter.numel() for parameter in network.parameters())
    say(f"optimizer: {built.description}; {parameters:,} trainable parameters")

    current = Run(
        job=job,
        plan=plan,
        accelerator=accelerator,
        draws=draws,
        loader=Loader(
            job,
            dataset,
            latents,
            draws,
            plan,
            device=accelerator.device,
            process=processes.index,
            processes=processes.count,
        ),
        family=family,
        network=network,
        objective=objective.prepare(job, accelerator.device),
        built=built,
        schedule=schedule,
        metadata=metadata.Metadata(job, dataset, plan, family, network, built.description),
        events=events,
        controls=controls,
        scalars=Scalars(_tensorboard_folder(job) if processes.is_first else None),
        swap=swap,
        processes=processes,
    )
    if resumed is not None:
        _restore(current, resumed, say)
    if latents is not None and measured:
        current.watch = Watch(dataset, latents, job.journal.parent / "measures.json", held)
    events.emit(
        JobStarted(
            name=job.output_name,
            output_dir=job.output_dir,
            family=job.family,
            first_step=current.counted,
            steps=current.counted_steps,
            epochs=job.origin_epoch + plan.epochs,
            facts={
                "pictures": len(dataset.pictures),
                "pictures with repeats": dataset.num_train_images,
                "buckets": {f"{w}x{h}": n for (w, h), n in dataset.bucket_counts().items()},
                "batches per epoch": plan.batches_per_epoch,
                "steps per epoch": plan.updates_per_epoch,
                "trainable parameters": parameters,
                "device": devices.describe(device),
                "seed": job.seed,
                **({"processes": processes.count} if processes.count > 1 else {}),
            },
        )
    )
    events.emit(devices.memory(accelerator.device))
    return current


def _accelerator(mixed_precision: str, device: torch.device) -> Accelerator:
    # accelerate keeps the first run's precision in a process-wide state.
    AcceleratorState._reset_state(False)
    return Accelerator(mixed_precision=mixed_precision, cpu=device.type == "cpu")


def _base_weights(job: Job) -> list[tuple[Path, float]]:
    files = job.engine.base_weights
    multipliers = [*job.engine.base_weights_multiplier, *[1.0] * len(files)][: len(files)]
    return [(job.path(file), multiplier) for file, multiplier in zip(files, multipliers, strict=True)]


def _compile(unet: Any, job: Job, say: Callable[[str], None]) -> None:
    config = job.config
    options = {
        "backend": config.dynamo_backend.lower(),
        "mode": config.dynamo_mode if config.dynamo_mode != "default" else None,
        "fullgraph": config.dynamo_use_fullgraph,
        "dynamic": True if config.dynamo_use_dynamic else None,
    }
    unet.compile_repeated_blocks(**{name: value for name, value in options.items() if value is not None})
    say(
        f"repeated blocks are compiled ({options['backend']}): the first step of each picture size takes longer"
    )


def _tensorboard_folder(job: Job) -> Path | None:
    """Kohya's place: logging_dir/<prefix><stamp>/<tracker name>; the run's own log folder without one."""
    config = job.config
    name = config.log_tracker_name or "network_train"
    if not config.logging_dir.strip():
        return None
    return job.path(config.logging_dir) / f"{job.engine.log_prefix}{job.stamp.replace('-', '')}" / name


def _say_dataset(dataset: Dataset, plan: Plan, say: Callable[[str], None]) -> None:
    for index, subset in enumerate(dataset.subsets):
        count = sum(picture.subset == index for picture in dataset.pictures)
        kind = "class pictures" if subset.is_reg else "pictures"
        say(f"{subset.folder.name}: {count} {kind} x {subset.repeats} repeats")
    for (width, height), count in dataset.bucket_counts().items():
        say(f"bucket {width}x{height}: {count} with repeats")
    say(f"mean aspect ratio error: {dataset.mean_aspect_error:.4f}")
    for line in plan.arithmetic:
        say(line)


def _check_resume(
    job: Job, plan: Plan, resumed: states.State, warn: Callable[[str], None]
) -> tuple[Job, Plan]:
    """The state must leave something to train; its seed is the run's seed."""
    position = resumed.position
    if position.step >= plan.max_train_steps:
        raise StateError(
            f"the state is at step {position.step} and the run ends at step {plan.max_train_steps}: raise "
            "max_train_steps (or the epochs) to train on"
        )
    if resumed.foreign:
        return job, plan
    if job.config.seed not in (0, position.seed) and job.written.seed:
        warn(f"seed {job.written.seed} is not used: the resumed run goes on with its own, {position.seed}")
    job = replace(job, seed=position.seed)
    if position.config_hash != states.config_hash(job):
        warn("the configuration has changed since the state was saved: the run goes on with the new one")
    return job, plan


def _restore(current: Run, resumed: states.State, say: Callable[[str], None]) -> None:
    """Put a saved state into the loaded run.

    Raises:
        StateError: The state belongs to another network or optimizer.
    """
    complaints = current.network.load_state_dict(resumed.network)
    if complaints:
        raise StateError(
            f"the state belongs to another network: {complaints[0]} ({len(complaints)} differences)"
        )
    try:
        current.built.load_state_dict(resumed.optimizer)
        if resumed.scheduler is not None:
            current.schedule.load_state_dict(resumed.scheduler)
    except (ValueError, KeyError) as error:
        raise StateError(f"the state belongs to another optimizer or scheduler ({error})") from error
    if resumed.scaler is not None and current.accelerator.scaler is not None:
        current.accelerator.scaler.load_state_dict(dict(resumed.scaler))
    position, plan = resumed.position, current.plan
    current.step = position.step
    current.losses = position.losses
    say(f"resumed at step {position.step} of {plan.max_train_steps}")
