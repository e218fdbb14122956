"""The training loop: steps, and what happens between them.

Nothing in a step waits for the device: losses stay there until a report is due (`_Reporter`), noise
and batches are made on the CPU ahead of time, and learning rates are Python numbers.
"""

from __future__ import annotations

import math
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from trainer import devices, metadata, outputs, prompts, sampling, states
from trainer.controls import Controls
from trainer.data.loader import Loader
from trainer.data.types import Batch
from trainer.draws import GENERATORS, Draws
from trainer.errors import DivergedError, TrainerError
from trainer.events import (
    CheckpointRemoved,
    CheckpointSaved,
    EpochStarted,
    EventLog,
    LogLine,
    PhaseStarted,
    StepDone,
)
from trainer.families._base import Family
from trainer.job import Job
from trainer.lora_file import save as save_lora
from trainer.memory.swap import BlockSwap
from trainer.networks._base import Network
from trainer.objectives._base import Objective
from trainer.optimizers import Built
from trainer.plan import Plan
from trainer.processes import Processes
from trainer.progress import LossRecorder, Pending, Scalars, fetch
from trainer.review.watch import Watch
from trainer.schedules import Schedule

__all__ = ["Outcome", "Run"]

REPORT_EVERY_S = 0.5
"""Longest time that losses wait on an accelerator before they are fetched in one transfer."""

KEEP_EVERY_S = 10.0
"""How often the weights are remembered on the host in case the loss turns to NaN."""


@dataclass(frozen=True)
class Outcome:
    """How a run ended."""

    step: int
    path: Path | None
    """Last LoRA file written."""
    state: Path | None
    """State folder to resume from, after a stop."""
    stopped: bool


@dataclass
class Run:
    """All parts of a run, loaded and ready to train."""

    job: Job
    plan: Plan
    accelerator: Accelerator
    draws: Draws
    loader: Loader
    family: Family
    network: Network
    objective: Objective[Any, Any]
    built: Built
    schedule: Schedule
    metadata: metadata.Metadata
    events: EventLog
    controls: Controls
    scalars: Scalars
    swap: BlockSwap | None = None
    processes: Processes = field(default_factory=Processes)
    watch: Watch | None = None
    step: int = 0
    losses: tuple[float, ...] = ()
    last_lora: Path | None = None
    last_state: Path | None = None
    _good: tuple[int, dict[str, Tensor]] | None = None

    @property
    def counted(self) -> int:
        """The step as events, names and metadata tell it: those before this run are counted too."""
        return self.job.origin_step + self.step

    @property
    def counted_steps(self) -> int:
        """The last step, counted in the same way."""
        return self.job.origin_step + self.plan.max_train_steps

    # --- the steps ---------------------------------------------------------------------------

    def train(self) -> Outcome:
        """Train to the last step, or until a stop is asked for.

        Raises:
            DivergedError: The loss became NaN or infinite; the last good weights are saved.
            TrainerError: The final file could not be saved.
        """
        config, plan = self.job.config, self.plan
        report = _Reporter(self)
        if self.step == 0 and self.job.engine.sample_at_first:
            self.sample(epoch=0)
        self.events.emit(PhaseStarted(phase="train", total=self.counted_steps, unit="steps"))
        if self.watch is not None:
            self.watch.begin(self)
        report.restart_clock()
        stop_text_encoder_at = _text_encoder_stop(self.job, plan)
        epoch = self.step // plan.updates_per_epoch
        self.network.train(True)
        self.built.train()
        if stop_text_encoder_at is not None and self.step >= stop_text_encoder_at:
            self._freeze_text_encoder()  # a resumed run
            stop_text_encoder_at = None
        while self.step < plan.max_train_steps:
            before = self.job.origin_epoch
            self.events.emit(EpochStarted(epoch=before + epoch + 1, epochs=before + plan.epochs))
            for pending in self._epoch(epoch):
                report.add(pending)
                if stop_text_encoder_at is not None and self.step >= stop_text_encoder_at:
                    self._freeze_text_encoder()
                    stop_text_encoder_at = None
                    self._say(f"text encoder stops training at step {self.counted}")
                if self._after_step(report, epoch):
                    return self._stop(report, epoch)
                if self.step >= plan.max_train_steps:
                    break
            report.flush()
            self.scalars.epoch(epoch + 1, report.recorder.average)
            self._after_epoch(report, epoch + 1)
            epoch += 1
        report.flush()
        path = self.save(outputs.final_name(self.job), epoch=epoch, must=True)
        if config.save_state or config.save_state_on_train_end:
            self.save_state(outputs.final_name(self.job), epoch, report)
        return Outcome(step=self.counted, path=path, state=self.last_state, stopped=False)

    def _freeze_text_encoder(self) -> None:
        self.network.freeze_text_encoder()
        config = self.job.config
        if not (config.network_dropout or config.rank_dropout or config.module_dropout):
            self.family.freeze_text()  # a dropout would make every reading of a caption another one

    def _epoch(self, epoch: int) -> Iterator[Pending]:
        """Train through the rest of an epoch, one yield an optimizer update."""
        plan, accumulation = self.plan, self.job.config.gradient_accumulation_steps
        skip = (self.step - epoch * plan.updates_per_epoch) * accumulation
        index = skip
        losses: list[Tensor] = []
        extra: dict[str, Tensor | float] = {}
        batches = self._batches_per_epoch

        def place(number: int) -> int:
            """Place in the run of this process's batch ``number`` of the epoch: they take turns."""
            turn = number * self.processes.count + self.processes.index
            return epoch * plan.batches_per_epoch + turn % plan.batches_per_epoch

        def draw(batch: Batch, number: int) -> Any:
            return self.objective.noise_on_cpu(
                self._latent_shape(batch), batch.draw_ids, place(number), self.draws
            )

        for batch, drawn in self.loader.epoch_with(epoch, skip, draw):
            losses.append(self._micro_step(batch, drawn, place(index)))
            index += 1
            if index % accumulation and index < batches:
                continue
            if self.processes.count > 1:
                self._share(losses)
            lr = self._update()
            if self.job.config.scale_weight_norms:
                extra |= self.network.apply_max_norm(self.job.config.scale_weight_norms)
            self.step += 1
            yield Pending(
                step=self.step,
                epoch=epoch + 1,
                first_micro_in_epoch=index - len(losses),
                losses=losses,
                lr=lr,
                extra={**extra, **self.built.scalars()},
            )
            losses, extra = [], {}

    @property
    def _batches_per_epoch(self) -> int:
        """Micro-batches of this process."""
        return -(-self.plan.batches_per_epoch // self.processes.count)

    def _micro_step(self, batch: Batch, drawn: Any, place: int) -> Tensor:
        """Forward and backward pass of the micro-batch at ``place`` in the run; the loss stays on the device."""
        family = self.family
        # Dropouts draw from torch's own generator, which gradient checkpointing replays.
        with GENERATORS:
            torch.manual_seed(self.draws.key("step", place))
            noised = self.objective.mix(self._latents(batch), drawn)
            with self.accelerator.autocast():
                text = family.encode_batch(batch, weighted=self.job.config.weighted_captions)
                prediction = family.predict(
                    noised.noisy_BCHW.to(family.dtype), noised.timesteps_B, text, batch
                )
            loss, _ = self.objective.loss(prediction, noised, batch)
            self.accelerator.backward(loss / self.job.config.gradient_accumulation_steps)
        return loss.detach()

    def _latent_shape(self, batch: Batch) -> tuple[int, int, int]:
        """C, H, W of a batch's latents, before they are encoded."""
        width, height = batch.bucket
        factor = self.family.latent_factor
        return self.family.latent_channels, height // factor, width // factor

    def _latents(self, batch: Batch) -> Tensor:
        """Model latents of a batch, from the cache or by encoding now."""
        device = self.accelerator.device
        if batch.latents_BCHW is not None:
            latents = batch.latents_BCHW
        else:
            assert batch.pixels_BCHW is not None
            generators = [self.draws.generator("vae", draw_id) for draw_id in batch.draw_ids]
            with torch.no_grad():
                latents = self.family.encode_images(batch.pixels_BCHW, generators)
        return self.family.to_model_latents(latents.to(device, non_blocking=True))

    def _update(self) -> dict[str, float]:
        """Clip, optimizer step, schedule; returns the rates that this step used."""
        if self.job.config.max_grad_norm:
            self.accelerator.clip_grad_norm_(list(self.network.parameters()), self.job.config.max_grad_norm)
        self.network.before_update()
        lr = self.schedule.rates()
        with GENERATORS:
            self.built.optimizer.step()
        if not getattr(self.built.optimizer, "step_was_skipped", False):
            self.schedule.step()
        self.built.optimizer.zero_grad(set_to_none=True)
        return lr

    def _share(self, losses: list[Tensor]) -> None:
        """Mean of gradients and losses over all processes."""
        grads = [parameter.grad for parameter in self.network.parameters() if parameter.grad is not None]
        self.processes.average([*grads, *losses])

    # --- between steps -----------------------------------------------------------------------

    def _after_step(self, report: _Reporter, epoch: int) -> bool:
        """Samples, saves and requests that are due; True when a stop was asked for."""
        config, last = self.job.config, self.step >= self.plan.max_train_steps
        every_n_epochs = config.sample_every_n_epochs
        due = (
            config.sample_every_n_steps
            and not every_n_epochs
            and self.step % config.sample_every_n_steps == 0
        )
        stop, save, sample = self.processes.agree(self.controls)
        if stop:
            self.controls.stop.set()  # of a process that was not asked itself
        if due or sample:
            self.controls.sample.clear()
            report.flush()
            self.sample(epoch=None)
            report.restart_clock()
        if config.save_every_n_steps and self.step % config.save_every_n_steps == 0:
            report.flush()
            self._save_step(report, epoch)
            report.restart_clock()
        if save and not last:
            self.controls.save.clear()
            report.flush()
            self.save(outputs.step_name(self.job, self.step), epoch=epoch)
            if config.save_state:
                self.save_state(outputs.step_name(self.job, self.step), epoch + 1, report)
            report.restart_clock()
        return stop and not last

    def _save_step(self, report: _Reporter, epoch: int) -> None:
        config, every = self.job.config, self.job.config.save_every_n_steps
        stem = outputs.step_name(self.job, self.step)
        # sd-scripts writes the 0-based epoch into files saved at a step.
        if self.save(stem, epoch=epoch) is not None:
            old = outputs.step_to_remove(self.step, every, config.save_last_n_steps)
            if old is not None:
                self._remove(outputs.lora_path(self.job, outputs.step_name(self.job, old)))
        if config.save_state and self.save_state(stem, epoch + 1, report) is not None:
            old = outputs.step_to_remove(
                self.step, every, config.save_last_n_steps_state or config.save_last_n_steps
            )
            if old is not None:
                self._remove(outputs.state_path(self.job, outputs.step_name(self.job, old)))

    def _after_epoch(self, report: _Reporter, epoch: int) -> None:
        """What is due after ``epoch`` (from 1)."""
        config, every = self.job.config, self.plan.save_every_n_epochs
        if every and epoch % every == 0 and epoch < self.plan.epochs:
            stem = outputs.epoch_name(self.job, epoch)
            if self.save(stem, epoch=epoch) is not None:
                old = outputs.epoch_to_remove(epoch, every, config.save_last_n_epochs)
                if old is not None:
                    self._remove(outputs.lora_path(self.job, outputs.epoch_name(self.job, old)))
            if config.save_state and self.save_state(stem, epoch, report) is not None:
                keep = config.save_last_n_epochs_state or config.save_last_n_epochs
                old = outputs.epoch_to_remove(epoch, every, keep)
                if old is not None:
                    self._remove(outputs.state_path(self.job, outputs.epoch_name(self.job, old)))
        if config.sample_every_n_epochs and epoch % config.sample_every_n_epochs == 0:
            self.sample(epoch=epoch)
        report.restart_clock()

    def _stop(self, report: _Reporter, epoch: int) -> Outcome:
        report.flush()
        stem = outputs.step_name(self.job, self.step)
        self._say(f"stopping after step {self.counted}: saving")
        path = self.save(stem, epoch=epoch, must=True)
        state = self.save_state(stem, epoch + 1, report)
        return Outcome(step=self.counted, path=path, state=state, stopped=True)

    # --- saving and sampling -----------------------------------------------------------------

    def save(self, stem: str, *, epoch: int, must: bool = False) -> Path | None:
        """Write the LoRA under ``stem``.

        Returns:
            The file, or None where it could not be written and ``must`` is not set: training goes on.

        Raises:
            TrainerError: It could not be written and ``must`` is set.
        """
        path = outputs.lora_path(self.job, stem)
        if not self.processes.is_first:
            return path  # the first process writes it
        epoch += self.job.origin_epoch
        self.built.eval()
        try:
            tensors = self.network.state_dict()
            self._check_finite(tensors)
            size_bytes = save_lora(
                path,
                tensors,
                self.metadata.at(step=self.counted, epoch=epoch),
                self.job.config.save_precision,
            )
        except (OSError, TrainerError) as error:
            if must or isinstance(error, DivergedError):
                raise
            self.events.emit(LogLine(message=f"{path.name} was not saved: {error}", level="error"))
            return None
        finally:
            self.built.train()
        self.last_lora = path
        self.events.emit(
            CheckpointSaved(step=self.counted, epoch=epoch, path=path, kind="lora", size_bytes=size_bytes)
        )
        if self.watch is not None and self.step:
            self.watch.look(self, path, must=must)
        return path

    def save_state(self, stem: str, epoch: int, report: _Reporter) -> Path | None:
        """Write a state folder under ``stem``; None where it failed (training goes on)."""
        folder = outputs.state_path(self.job, stem)
        if not self.processes.is_first:
            return folder
        position = states.Position(
            step=self.step,
            epoch=epoch,
            seed=self.job.seed,
            losses=tuple(report.recorder.losses),
            config_hash=states.config_hash(self.job),
        )
        scaler = self.accelerator.scaler
        try:
            size_bytes = states.save_state(
                folder,
                position=position,
                network=self.network.state_dict(),
                optimizer=self.built.state_dict(),
                scheduler=self.schedule.state_dict(),
                scaler=None if scaler is None else scaler.state_dict(),
            )
        except OSError as error:
            self.events.emit(LogLine(message=f"{folder.name} was not saved: {error}", level="error"))
            return None
        self.last_state = folder
        self.events.emit(
            CheckpointSaved(
                step=self.counted,
                epoch=self.job.origin_epoch + epoch,
                path=folder,
                kind="state",
                size_bytes=size_bytes,
            )
        )
        return folder

    def sample(self, *, epoch: int | None) -> None:
        """Draw the sample prompts; training state and draws are untouched."""
        wanted = prompts.for_job(self.job)
        if not wanted or not self.processes.is_first:
            return
        self.built.eval()
        self.network.train(False)
        try:
            with torch.no_grad(), self.accelerator.autocast():
                sampling.sample(
                    self.family,
                    self.job,
                    wanted,
                    step=self.counted,
                    epoch=None if epoch is None else self.job.origin_epoch + epoch,
                    stop=self.controls.stop.is_set,
                    emit=self.events.emit,
                )
        except torch.OutOfMemoryError:
            devices.free()
            self.events.emit(
                LogLine(message="not enough memory for the samples: none drawn this time", level="error")
            )
        except (OSError, TrainerError) as error:
            self.events.emit(LogLine(message=f"samples were not drawn: {error}", level="error"))
        finally:
            self.network.train(True)
            self.built.train()
        if self.watch is not None and self.step:
            self.watch.look(self, None)
        self.events.emit(PhaseStarted(phase="train", total=self.counted_steps, unit="steps"))

    def keep_good(self) -> None:
        """Remember the weights on the host, if they are all finite; called while losses are."""
        if not self.processes.is_first:
            return
        tensors = {name: value.clone() for name, value in self.network.state_dict().items()}
        if all(bool(torch.isfinite(value).all()) for value in tensors.values()):
            self._good = (self.step, tensors)

    def save_last_good(self) -> Path | None:
        """After NaN: write the weights that `keep_good` remembered last."""
        if self._good is None:
            return None
        step, tensors = self._good
        path = outputs.lora_path(self.job, f"{outputs.step_name(self.job, step)}-last-good")
        counted, epoch = self.job.origin_step + step, self.job.origin_epoch
        size_bytes = save_lora(
            path, tensors, self.metadata.at(step=counted, epoch=epoch), self.job.config.save_precision
        )
        self.events.emit(
            CheckpointSaved(step=counted, epoch=epoch, path=path, kind="lora", size_bytes=size_bytes)
        )
        return path

    def save_after_failure(self) -> Path | None:
        """After running out of memory: write the weights of the last whole step, if there are any."""
        if self.step == 0 or not self.processes.is_first:
            return None
        try:
            return self.save(outputs.step_name(self.job, self.step), epoch=0)
        except (TrainerError, RuntimeError, MemoryError):
            return None  # no room even for that: the failure itself is what is told

    def _check_finite(self, tensors: dict[str, Tensor]) -> None:
        bad = [name for name, value in tensors.items() if not bool(torch.isfinite(value).all())]
        if bad:
            raise DivergedError(
                f"{len(bad)} of {len(tensors)} LoRA tensors hold NaN or infinity, {bad[0]} first"
            )

    def _remove(self, path: Path) -> None:
        if not path.exists() or not self.processes.is_first:
            return
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)
        self.events.emit(CheckpointRemoved(path=path))

    def _say(self, message: str) -> None:
        self.events.emit(LogLine(message=message))


class _Reporter:
    """Turns losses that wait on the device into events, in few transfers."""

    def __init__(self, run: Run) -> None:
        self.run = run
        self.recorder = LossRecorder(run._batches_per_epoch, run.losses)
        self.waiting: list[Pending] = []
        self._last = time.perf_counter()
        self._memory_at = 0.0
        self._kept_at = time.perf_counter()

    def restart_clock(self) -> None:
        """Leave the time of samples and saves out of the step time."""
        self._last = time.perf_counter()

    def add(self, pending: Pending) -> None:
        """Take a finished step; report at once on a CPU, in bundles on an accelerator."""
        self.waiting.append(pending)
        on_cpu = pending.losses[0].device.type == "cpu"
        if on_cpu or pending.done_at - self._last >= REPORT_EVERY_S:
            self.flush()

    def flush(self) -> None:
        """Emit everything that waits.

        Raises:
            DivergedError: A loss is NaN or infinite.
        """
        if not self.waiting:
            return
        run, waiting = self.run, self.waiting
        self.waiting = []
        values = fetch(waiting)
        now = time.perf_counter()
        step_s = (now - self._last) / len(waiting)
        self._last = now
        for pending, losses in zip(waiting, values, strict=True):
            for offset, loss in enumerate(losses):
                if not math.isfinite(loss):
                    raise DivergedError(_why_diverged(run, run.job.origin_step + pending.step, loss))
                self.recorder.add(pending.first_micro_in_epoch + offset, loss)
            extra = {name: float(value) for name, value in pending.extra.items()}
            mean = sum(losses) / len(losses)
            average = self.recorder.average
            run.events.emit(
                StepDone(
                    step=run.job.origin_step + pending.step,
                    epoch=run.job.origin_epoch + pending.epoch,
                    loss=mean,
                    avr_loss=average,
                    lr=pending.lr,
                    step_s=step_s,
                    extra=extra,
                )
            )
            rates = {f"lr/{name}": rate for name, rate in pending.lr.items()}
            run.scalars.step(run.job.origin_step + pending.step, losses, average, {**rates, **extra})
        if now - self._kept_at > KEEP_EVERY_S:
            run.keep_good()
            self._kept_at = time.perf_counter()
        if now - self._memory_at > 1.0:
            run.events.emit(devices.memory(run.accelerator.device))
            self._memory_at = now


def _why_diverged(run: Run, step: int, loss: float) -> str:
    """One sentence: what happened, the likely cause, what to do."""
    config = run.job.config
    kind = "NaN" if math.isnan(loss) else "infinite"
    if config.full_fp16:
        cause = "full_fp16 has little range: switch it off, or use bf16 where the card has it"
    elif config.mixed_precision == "fp16":
        cause = (
            "fp16 overflowed or the learning rate is too high: lower it, or use bf16 where the card has it"
        )
    elif max(run.job.unet_lr, run.job.text_encoder_lr) > 5e-3 and "prodigy" not in config.optimizer.lower():
        cause = f"the learning rate {max(run.job.unet_lr, run.job.text_encoder_lr):g} is very high: lower it"
    elif not config.max_grad_norm:
        cause = "gradients are not clipped: set max_grad_norm to 1, or lower the learning rate"
    else:
        cause = (
            "lower the learning rate; if it comes back at step 1, the base model or VAE file may be damaged"
        )
    return f"the loss became {kind} at step {step}; the likely cause: {cause}"


def _text_encoder_stop(job: Job, plan: Plan) -> int | None:
    """Step from which the text encoder rests: stop_text_encoder_training is a percentage of all steps."""
    percent = job.config.stop_text_encoder_training
    if not percent or not job.trains_text_encoder:
        return None
    return round(plan.max_train_steps * min(percent, 100) / 100)


def guarded(run: Run, act: Callable[[], Outcome]) -> Outcome:
    """Run ``act``; after NaN the last good weights are saved, and the message names the file."""
    try:
        return act()
    except DivergedError as error:
        kept = run.save_last_good()
        note = f"; the last good weights are in {kept.name}" if kept else ""
        raise DivergedError(f"{error}{note}") from error
