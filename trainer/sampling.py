"""Drawing sample pictures during training, as Kohya's previews are drawn.

Nothing of the training is touched: noise comes from generators of its own, modes and devices of the
models are put back. Facts: sd-scripts, library/train_util.py:sample_images_common, get_my_scheduler.

Axes: B pictures (before the denoiser once with the negative, then with the positive prompt), C channels, H/W latent
height and width.
"""

from __future__ import annotations

import contextlib
import inspect
import itertools
import random
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image, PngImagePlugin
from torch import Tensor, nn

from trainer.events import Event, LogLine, PhaseStarted, Progress, SampleReady
from trainer.families._base import Family, Text
from trainer.files import atomic_path
from trainer.job import Job
from trainer.prompts import SamplePrompt, ignored_options

__all__ = ["SAMPLERS", "Drawn", "denoise", "draw", "model_calls", "sample", "scheduler_for", "write_picture"]

SAMPLERS: dict[str, tuple[str, dict[str, Any]]] = {
    "ddim": ("DDIMScheduler", {}),
    "pndm": ("PNDMScheduler", {}),
    "lms": ("LMSDiscreteScheduler", {}),
    "euler": ("EulerDiscreteScheduler", {}),
    "euler_a": ("EulerAncestralDiscreteScheduler", {}),
    "heun": ("HeunDiscreteScheduler", {}),
    "dpm_2": ("KDPM2DiscreteScheduler", {}),
    "dpm_2_a": ("KDPM2AncestralDiscreteScheduler", {}),
    # diffusers takes no final sigma of zero with the older algorithm.
    "dpmsolver": (
        "DPMSolverMultistepScheduler",
        {"algorithm_type": "dpmsolver", "final_sigmas_type": "sigma_min"},
    ),
    "dpmsolver++": ("DPMSolverMultistepScheduler", {"algorithm_type": "dpmsolver++"}),
    "dpmsingle": ("DPMSolverSinglestepScheduler", {}),
}
"""Kohya's names; k_lms, k_euler, k_euler_a, k_dpm_2 and k_dpm_2_a are the same without k_."""

SMALLEST_PX = 64  # sd-scripts, train_util.py:sample_image_inference


def scheduler_for(sampler: str, *, v_prediction: bool) -> Any:
    """A diffusers scheduler as Kohya sets it up; DDIM for a name that is not known."""
    from trainer.libraries import diffusers

    name, options = SAMPLERS.get(sampler.removeprefix("k_"), SAMPLERS["ddim"])
    with _quiet():
        scheduler = getattr(diffusers, name)(
            num_train_timesteps=1000,
            beta_start=0.00085,
            beta_end=0.012,
            beta_schedule="scaled_linear",
            prediction_type="v_prediction" if v_prediction else "epsilon",
            **options,
        )
    if getattr(scheduler.config, "clip_sample", None) is False:
        scheduler.register_to_config(clip_sample=True)
    return scheduler


@torch.no_grad()
def denoise(
    family: Family,
    text: Text,
    scheduler: Any,
    *,
    latent_size: tuple[int, int],
    steps: int,
    cfg_scale: float,
    generators: Sequence[torch.Generator],
    stop: Callable[[], bool] = lambda: False,
    progress: Callable[[], None] = lambda: None,
) -> Tensor | None:
    """Draw the latents of pictures that go through the denoiser together.

    Args:
        family: The loaded models.
        text: Of the negative, then of the positive prompts; of the positive alone if ``cfg_scale`` is at most 1.
        scheduler: From `scheduler_for`; its state is used up.
        latent_size: Height and width.
        steps: Of the sampler.
        cfg_scale: Weight of the difference between the two prompts.
        generators: One a picture, on the CPU; gives its starting noise, then that of ancestral samplers.
        stop: Asked before each call of the UNet.
        progress: Called after each call of the UNet.

    Returns:
        Model latents BCHW, float32; None if stopped.
    """
    with _quiet():
        scheduler.set_timesteps(steps, device=family.device)
    noise = torch.cat([family.sample_noise(latent_size, generator) for generator in generators])
    latents: Tensor = noise.to(family.device) * scheduler.init_noise_sigma
    takes_generator = "generator" in inspect.signature(scheduler.step).parameters
    options = {"generator": list(generators)} if takes_generator else {}
    guided = len(text.states_BTD) == 2 * len(generators)
    for timestep in scheduler.timesteps:
        if stop():
            return None
        inputs = scheduler.scale_model_input(latents, timestep).repeat(2 if guided else 1, 1, 1, 1)
        prediction = family.predict(inputs, timestep.expand(inputs.shape[0]), text, None).float()
        if guided:
            negative, positive = prediction.chunk(2)
            prediction = negative + cfg_scale * (positive - negative)
        latents = scheduler.step(prediction, timestep, latents, return_dict=False, **options)[0]
        progress()
    return latents


@torch.no_grad()
def sample(
    family: Family,
    job: Job,
    prompts: Sequence[SamplePrompt],
    *,
    step: int,
    epoch: int | None,
    stop: Callable[[], bool],
    emit: Callable[[Event], None],
) -> None:
    """Draw ``prompts`` into ``<output_dir>/sample`` under Kohya's file names.

    The caller sets up what the forward pass needs (autocast, network dropouts off).

    Args:
        family: The loaded models, with the network attached.
        job: For sampler, names and folders.
        prompts: From `trainer.prompts.for_job`.
        step: Optimizer updates so far; 0 before training.
        epoch: From 1, at the end of an epoch; 0 before training; None between two epochs.
        stop: Whether the run shall end: the picture in hand is given up.
        emit: Gets progress, and a `SampleReady` for each picture.

    Raises:
        OSError: A picture cannot be written.
    """
    names = {_settings(family, job, prompt)[2] for prompt in prompts}
    for line in ignored_options(prompts):
        emit(LogLine(message=line, level="warning"))
    for name in sorted(names - _known_samplers()):
        emit(LogLine(message=f"there is no sampler {name!r}: drawn with ddim, as in Kohya", level="warning"))
    total = model_calls(family, job, prompts)
    emit(PhaseStarted(phase="sample", total=total, unit="steps"))
    done = 0

    def progress() -> None:
        nonlocal done
        done += 1
        emit(Progress(phase="sample", done=done, total=total))

    for index, drawn in enumerate(draw(family, job, prompts, stop=stop, progress=progress)):
        prompt = prompts[index]
        path = job.output_dir / "sample" / _file_name(job, prompt, index, step, epoch)
        facts = f"{drawn.facts}, Model: {job.output_name}, Training step: {step}"
        write_picture(path, drawn.pixels_1CHW, prompt, facts, {"seed": str(drawn.seed), "step": str(step)})
        emit(
            SampleReady(step=step, epoch=epoch, index=index, prompt=prompt.prompt, seed=drawn.seed, path=path)
        )


@dataclass(frozen=True)
class Drawn:
    """One picture."""

    pixels_1CHW: Tensor
    """In [-1, 1], float32."""
    seed: int
    facts: str
    """Steps, sampler, CFG scale, seed and size, as AUTOMATIC1111's web UI writes them."""


def model_calls(family: Family, job: Job, prompts: Sequence[SamplePrompt]) -> int:
    """How often the denoiser is called for ``prompts``: what a bar counts."""
    total = 0
    for prompt in prompts:
        scheduler = _scheduler(family, job, prompt)
        with _quiet():
            scheduler.set_timesteps(_settings(family, job, prompt)[0])
        total += len(scheduler.timesteps)
    return total


@torch.no_grad()
def draw(
    family: Family,
    job: Job,
    prompts: Sequence[SamplePrompt],
    *,
    together: int = 1,
    stop: Callable[[], bool] = lambda: False,
    progress: Callable[[], None] = lambda: None,
) -> Iterator[Drawn]:
    """Draw ``prompts`` in their order; ends early where ``stop`` says so.

    The texts are encoded before the first picture, so that the text encoders are on the device once.

    Args:
        family: The loaded models, with whatever network is attached.
        job: For the sampler and the kind of prediction.
        prompts: What to draw.
        together: So many neighbours of the same settings may go through the denoiser at once. Each keeps its own
            noise; it differs by rounding from the same picture drawn alone.
        stop: Asked before each call of the denoiser.
        progress: Called after each call of the denoiser.
    """
    with _evaluating(family):
        with _on_device(family, "text_encoders"):
            texts = []
            for prompt in prompts:
                guided = family.uses_negative(_settings(family, job, prompt)[1])
                words = [prompt.negative, prompt.prompt] if guided else [prompt.prompt]
                texts.append(family.for_sample(family.encode_sample_prompts(words), prompt))
        alike = itertools.groupby(
            zip(prompts, texts, strict=True),
            # Texts of different length would have to be padded, which changes what is drawn.
            key=lambda one: (_settings(family, job, one[0]), one[1].states_BTD.shape),
        )
        for (settings, _), group in alike:
            steps, cfg_scale, name, width, height = settings
            waiting = list(group)
            while waiting:
                some, waiting = waiting[:together], waiting[together:]
                # Not from any generator of the run, so that its draws stay what they are.
                seeds = [
                    random.SystemRandom().randrange(2**32) if prompt.seed is None else prompt.seed
                    for prompt, _ in some
                ]
                latents = denoise(
                    family,
                    _together([text for _, text in some]),
                    _scheduler(family, job, some[0][0]),
                    latent_size=(height // family.latent_factor, width // family.latent_factor),
                    steps=steps,
                    cfg_scale=cfg_scale,
                    generators=[torch.Generator().manual_seed(seed % 2**64) for seed in seeds],
                    stop=stop,
                    progress=progress,
                )
                if latents is None:
                    return
                with _on_device(family, "vae"):
                    pixels = family.decode_latents(latents)
                for seed, pixels_CHW in zip(seeds, pixels, strict=True):
                    facts = f"Steps: {steps}, Sampler: {name}, CFG scale: {cfg_scale:g}, Seed: {seed}, "
                    yield Drawn(pixels_CHW[None], seed, f"{facts}Size: {width}x{height}")


def _together(texts: Sequence[Text]) -> Text:
    """Of several pictures: all negative prompts, then all positive ones."""

    def joined(tensors: Sequence[Tensor]) -> Tensor:
        return torch.stack(list(tensors), dim=1).flatten(0, 1)

    pooled = [text.pooled_BD for text in texts if text.pooled_BD is not None]
    return Text(
        joined([text.states_BTD for text in texts]),
        joined(pooled) if pooled else None,
        {name: joined([text.extra[name] for text in texts]) for name in texts[0].extra},
    )


def _scheduler(family: Family, job: Job, prompt: SamplePrompt) -> Any:
    """A fresh scheduler for a picture."""
    _, _, name, width, height = _settings(family, job, prompt)
    return family.sample_scheduler(width, height) or scheduler_for(
        name, v_prediction=job.config.v_parameterization
    )


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without diffusers' notes to programmers: on numpy 2, on "dpmsolver", which it is about to drop."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        warnings.simplefilter("ignore", DeprecationWarning)
        yield


def _known_samplers() -> set[str]:
    return {*SAMPLERS, *(f"k_{name}" for name in SAMPLERS)}


def _settings(family: Family, job: Job, prompt: SamplePrompt) -> tuple[int, float, str, int, int]:
    """Steps, CFG scale, sampler, width and height of a picture."""
    width, height = (
        max(SMALLEST_PX, size - size % family.sample_multiple_px) for size in (prompt.width, prompt.height)
    )
    return (
        prompt.steps or family.sample_steps,
        family.sample_cfg_scale if prompt.cfg_scale is None else prompt.cfg_scale,
        family.sample_sampler or prompt.sampler or job.config.sample_sampler or "ddim",
        width,
        height,
    )


def _file_name(job: Job, prompt: SamplePrompt, index: int, step: int, epoch: int | None) -> str:
    start = f"{job.config.output_name}_" if job.config.output_name else ""
    when = f"{step:06d}" if epoch is None else f"e{epoch:06d}"
    end = "" if prompt.seed is None else f"_{prompt.seed}"
    return f"{start}{when}_{index:02d}_{time.strftime('%Y%m%d%H%M%S')}{end}.png"


def write_picture(
    path: Path, pixels_1CHW: Tensor, prompt: SamplePrompt, facts: str, more: dict[str, str]
) -> None:
    """Save as PNG with the text that AUTOMATIC1111's web UI reads, and ``more``.

    Raises:
        OSError: It cannot be written.
    """
    levels = ((pixels_1CHW[0] / 2 + 0.5).clamp(0, 1) * 255).round().to(torch.uint8)
    negative = f"\nNegative prompt: {prompt.negative}" if prompt.negative else ""
    text = PngImagePlugin.PngInfo()
    text.add_itxt("parameters", f"{prompt.prompt}{negative}\n{facts}")
    for key, value in {"prompt": prompt.prompt, **more}.items():
        text.add_itxt(key, value)
    with atomic_path(path) as temporary:
        picture = Image.fromarray(levels.permute(1, 2, 0).contiguous().cpu().numpy())
        picture.save(temporary, format="PNG", pnginfo=text)


@contextlib.contextmanager
def _evaluating(family: Family) -> Iterator[None]:
    """All models in eval mode; afterwards every module's mode is what it was."""
    models: list[nn.Module] = [family.unet, *family.text_encoders.values()]
    modes = [(module, module.training) for model in models for module in model.modules()]
    for model in models:
        model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


@contextlib.contextmanager
def _on_device(family: Family, part: Any) -> Iterator[None]:
    """The models of ``part`` on the family's device; afterwards back where they were."""
    model = family.vae if part == "vae" else next(iter(family.text_encoders.values()), None)
    if model is None:  # cached and gone
        yield
        return
    before = next(model.parameters()).device
    family.move([part], family.device)
    try:
        yield
    finally:
        if before != next(model.parameters()).device:
            family.move([part], before)
