"""Noise, target and loss of the Stable Diffusion family (SD 1.x, 2.x, SDXL).

The order of everything follows sd-scripts (train_util.py:get_noise_noisy_latents_and_timesteps,
custom_train_functions.py, train_network.py:process_batch). `Objective` holds its tables on the device
and never reads a number back from it.

Axes: B batch, C channels, H/W latent height and width, T training timesteps (1000).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from trainer.draws import Draws
from trainer.errors import ConfigError
from trainer.objectives import _base

if TYPE_CHECKING:
    from trainer.data.types import Batch
    from trainer.job import Job

__all__ = [
    "Drawn",
    "Noised",
    "Objective",
    "Settings",
    "alphas_cumprod",
    "check",
    "elementwise_loss",
    "huber_thresholds",
    "loss_weights",
    "prepare",
    "pyramid",
    "snr",
    "zero_terminal_snr",
]

TIMESTEPS = 1000
BETA_START, BETA_END = 0.00085, 0.012  # scaled_linear, every SD family
SNR_CEILING = 1000.0  # sd-scripts bounds the SNR near t = 0 in all weights but min-SNR

LOSS_TYPES = ("l2", "l1", "huber", "smooth_l1")
HUBER_SCHEDULES = ("constant", "exponential", "snr")


# --- tables, float32 on the CPU -----------------------------------------------------------------


def alphas_cumprod() -> Tensor:
    """Share of the signal's variance left at each timestep, (T,) (Ho et al. 2020, arXiv:2006.11239).

    Computed in float32 in the order of diffusers' DDPMScheduler, so that both agree to the last bit.
    """
    betas = torch.linspace(BETA_START**0.5, BETA_END**0.5, TIMESTEPS, dtype=torch.float32) ** 2
    return torch.cumprod(1.0 - betas, dim=0)


def zero_terminal_snr(alphas_cumprod_T: Tensor) -> Tensor:
    """The same schedule, stretched so that the last timestep is pure noise (arXiv:2305.08891).

    The betas are rebuilt and multiplied up again as sd-scripts does
    (custom_train_functions.py:fix_noise_scheduler_betas_for_zero_terminal_snr).
    """
    root_T = alphas_cumprod_T.sqrt()
    first, last = root_T[0].clone(), root_T[-1].clone()
    stretched_T = ((root_T - last) * (first / (first - last))) ** 2
    alphas_T = torch.cat([stretched_T[:1], stretched_T[1:] / stretched_T[:-1]])
    betas_T = 1.0 - alphas_T
    return torch.cumprod(1.0 - betas_T, dim=0)


def snr(alphas_cumprod_T: Tensor) -> Tensor:
    """Signal-to-noise ratio abar / (1 - abar) of each timestep, (T,)."""
    return (alphas_cumprod_T.sqrt() / (1.0 - alphas_cumprod_T).sqrt()) ** 2


def huber_thresholds(alphas_cumprod_T: Tensor, schedule: str, huber_c: float, huber_scale: float) -> Tensor:
    """Huber's c for each timestep, (T,) (sd-scripts train_util.py:get_huber_threshold_if_needed).

    "snr" takes no notice of ``huber_scale``, as in sd-scripts.
    """
    if schedule == "constant":
        return torch.full_like(alphas_cumprod_T, huber_c * huber_scale)
    if schedule == "exponential":
        timesteps_T = torch.arange(len(alphas_cumprod_T))
        return torch.exp(math.log(huber_c) / len(alphas_cumprod_T) * timesteps_T) * huber_scale
    sigmas_T = ((1.0 - alphas_cumprod_T) / alphas_cumprod_T) ** 0.5
    return (1 - huber_c) / (1 + sigmas_T) ** 2 + huber_c


def loss_weights(snr_T: Tensor, settings: Settings) -> Tensor:
    """Product of all weights that depend on the timestep alone, (T,).

    min-SNR (arXiv:2303.09556), scale_v_pred_loss_like_noise_pred, v_pred_like_loss and
    debiased_estimation_loss (arXiv:2310.08442), multiplied in sd-scripts' order. ``snr_T`` is the ratio
    before any zero-terminal-SNR stretch (sd-scripts builds it first), so that it is never 0.
    """
    weights_T = torch.ones_like(snr_T)
    if settings.min_snr_gamma:
        capped_T = snr_T.clamp(max=settings.min_snr_gamma)
        weights_T = weights_T * (capped_T / (snr_T + 1) if settings.v_prediction else capped_T / snr_T)
    bounded_T = snr_T.clamp(max=SNR_CEILING)
    v_scale_T = bounded_T / (bounded_T + 1)
    if settings.scale_v_pred_loss_like_noise_pred:
        weights_T = weights_T * v_scale_T
    if settings.v_pred_like_loss:
        weights_T = weights_T + weights_T / v_scale_T * settings.v_pred_like_loss
    if settings.debiased_estimation_loss:
        weights_T = weights_T * (1 / (bounded_T + 1) if settings.v_prediction else 1 / bounded_T.sqrt())
    return weights_T


# --- noise, on the CPU --------------------------------------------------------------------------


def pyramid(
    draws: Draws, draw_ids: Sequence[int], micro: int, shape: tuple[int, int, int], settings: Settings
) -> Tensor:
    """Coarser and coarser noise, blown up and summed: multi-resolution noise, BCHW.

    One factor between 2 and 4 is drawn for each level of the batch, not accumulated: level i has
    sides of 1 / factor^i (sd-scripts custom_train_functions.py:pyramid_noise_like).
    """
    channels, height, width = shape
    total_BCHW = torch.zeros(len(draw_ids), *shape)
    for level in range(settings.multires_noise_iterations):
        factor = 2 + 2 * float(draws.uniform(f"multires_factor{level}", [micro])[0])
        rows, columns = max(1, int(height / factor**level)), max(1, int(width / factor**level))
        coarse = draws.normal(f"multires{level}", draw_ids, (channels, rows, columns))
        blown_up = interpolate(coarse, size=(height, width), mode="bilinear")
        total_BCHW += blown_up * settings.multires_noise_discount**level
        if rows == 1 or columns == 1:
            break
    return total_BCHW


def elementwise_loss(prediction: Tensor, target: Tensor, loss_type: str, huber_c_B: Tensor | None) -> Tensor:
    """Loss of each element, float32 (sd-scripts train_util.py:conditional_loss).

    Args:
        prediction: What the denoiser gave, B first.
        target: Same shape.
        loss_type: l2, l1, or one of the pseudo-Huber losses (arXiv:2403.16728).
        huber_c_B: Threshold of each sample; needed by huber and smooth_l1 only.
    """
    error = prediction.float() - target.float()
    if loss_type == "l2":
        return error**2
    if loss_type == "l1":
        return error.abs()
    assert huber_c_B is not None
    c = huber_c_B.view(-1, *[1] * (error.ndim - 1))
    excess = 2 * ((error**2 + c**2).sqrt() - c)
    return excess * c if loss_type == "huber" else excess


# --- what the loop calls ------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Settings:
    """The configuration's part in noise and loss; names and meanings are Kohya's."""

    v_prediction: bool = False
    zero_terminal_snr: bool = False
    noise_offset: float = 0.0
    noise_offset_random_strength: bool = False
    adaptive_noise_scale: float = 0.0
    multires_noise_iterations: int = 0
    multires_noise_discount: float = 0.3
    ip_noise_gamma: float = 0.0
    ip_noise_gamma_random_strength: bool = False
    min_timestep: int = 0
    max_timestep: int = TIMESTEPS
    loss_type: str = "l2"
    huber_schedule: str = "snr"
    huber_c: float = 0.1
    huber_scale: float = 1.0
    min_snr_gamma: float = 0.0
    scale_v_pred_loss_like_noise_pred: bool = False
    v_pred_like_loss: float = 0.0
    debiased_estimation_loss: bool = False

    @classmethod
    def from_job(cls, job: Job) -> Settings:
        """Read them from the effective configuration.

        Raises:
            ConfigError: Bounds or choices that cannot be.
        """
        config = job.config
        settings = cls(
            v_prediction=config.v_parameterization,
            zero_terminal_snr=job.engine.zero_terminal_snr,
            noise_offset=config.noise_offset,
            noise_offset_random_strength=config.noise_offset_random_strength,
            adaptive_noise_scale=config.adaptive_noise_scale,
            multires_noise_iterations=config.multires_noise_iterations,
            multires_noise_discount=config.multires_noise_discount,
            ip_noise_gamma=config.ip_noise_gamma,
            ip_noise_gamma_random_strength=config.ip_noise_gamma_random_strength,
            min_timestep=config.min_timestep,
            max_timestep=config.max_timestep,
            loss_type=config.loss_type,
            huber_schedule=config.huber_schedule,
            huber_c=config.huber_c,
            huber_scale=config.huber_scale,
            min_snr_gamma=config.min_snr_gamma,
            scale_v_pred_loss_like_noise_pred=config.scale_v_pred_loss_like_noise_pred,
            v_pred_like_loss=config.v_pred_like_loss,
            debiased_estimation_loss=config.debiased_estimation_loss,
        )
        settings.check()
        return settings

    def check(self) -> None:
        """Refuse values that sd-scripts would stumble over in the middle of a run.

        Raises:
            ConfigError: Which ones, and what is allowed.
        """
        wrong = list(self._wrong())
        if wrong:
            raise ConfigError(*wrong)

    def _wrong(self) -> Iterator[str]:
        if not (0 <= self.min_timestep <= TIMESTEPS and 0 <= self.max_timestep <= TIMESTEPS):
            yield (
                f"min_timestep {self.min_timestep} and max_timestep {self.max_timestep}: they must lie "
                f"between 0 and {TIMESTEPS}"
            )
        if self.min_timestep >= self.max_timestep == TIMESTEPS:
            yield (f"min_timestep {TIMESTEPS} leaves no timestep to train: the last one is {TIMESTEPS - 1}")
        if self.loss_type not in LOSS_TYPES:
            yield f"loss_type is {self.loss_type!r}: allowed are {', '.join(LOSS_TYPES)}"
        if self.loss_type in ("huber", "smooth_l1"):
            if self.huber_schedule not in HUBER_SCHEDULES:
                yield (f"huber_schedule is {self.huber_schedule!r}: allowed are {', '.join(HUBER_SCHEDULES)}")
            if self.huber_c <= 0:
                yield f"huber_c is {self.huber_c}: it must be above 0"


@dataclass(frozen=True, kw_only=True)
class Drawn:
    """The random part of one micro-batch, on the CPU in float32; can be made ahead of time."""

    timesteps_B: Tensor
    """int64."""
    noise_BCHW: Tensor
    """Everything that the noise is, where it does not depend on the latents."""
    offset_BC11: Tensor | None = None
    """Adaptive noise offset only: the unit offset, still to be scaled by the latents."""
    offset_strength_1: Tensor | None = None
    """Adaptive noise offset only: the strength that the latents' means are added to."""
    pyramid_BCHW: Tensor | None = None
    """Adaptive noise offset only: multi-resolution noise, which comes after the offset."""
    perturbation_BCHW: Tensor | None = None
    """ip_noise_gamma's extra noise on the network's input, already scaled."""

    def pin(self) -> Drawn:
        """The same in page-locked memory, from where copies to a GPU do not wait."""
        return replace(
            self, **{name: value.pin_memory() for name, value in vars(self).items() if value is not None}
        )


@dataclass(frozen=True, kw_only=True)
class Noised(_base.Noised):
    """One micro-batch as the denoiser sees it, on the device; timesteps are int64."""

    target_BCHW: Tensor
    """float32: the noise, or the velocity of a v-prediction model."""
    noise_BCHW: Tensor
    """The noise without ip_noise_gamma's perturbation, in the latents' dtype."""


@dataclass(frozen=True, kw_only=True)
class Objective(_base.Objective[Drawn, Noised]):
    """Noising and loss with their tables on one device."""

    settings: Settings
    device: torch.device
    signal_T: Tensor
    """sqrt(abar)."""
    sigma_T: Tensor
    """sqrt(1 - abar)."""
    weights_T: Tensor
    """Loss weight of each timestep."""
    huber_c_T: Tensor | None

    @classmethod
    def build(cls, settings: Settings, device: torch.device | str) -> Objective:
        """Compute the tables on the CPU and bring them to ``device``."""
        device = torch.device(device)
        plain_T = alphas_cumprod()
        used_T = zero_terminal_snr(plain_T) if settings.zero_terminal_snr else plain_T
        huber_c_T = None
        if settings.loss_type in ("huber", "smooth_l1"):
            thresholds_T = huber_thresholds(
                used_T, settings.huber_schedule, settings.huber_c, settings.huber_scale
            )
            huber_c_T = thresholds_T.to(device)
        return cls(
            settings=settings,
            device=device,
            signal_T=used_T.sqrt().to(device),
            sigma_T=(1.0 - used_T).sqrt().to(device),
            weights_T=loss_weights(snr(plain_T), settings).to(device),
            huber_c_T=huber_c_T,
        )

    def noise_on_cpu(
        self,
        shape: tuple[int, int, int],
        draw_ids: Sequence[int],
        micro: int,
        draws: Draws,
    ) -> Drawn:
        """Draw everything for one micro-batch, in sd-scripts' order; safe on another thread.

        Args:
            shape: C, H, W of the latents.
            draw_ids: Place of each sample in the run.
            micro: Place of the micro-batch in the run, for what is drawn once a batch.
            draws: Where all of it comes from.
        """
        chosen = self.settings
        noise_BCHW = draws.noise(draw_ids, shape)
        offset_BC11 = offset_strength_1 = pyramid_BCHW = perturbation_BCHW = None
        if chosen.noise_offset:
            offset_strength_1 = torch.tensor([chosen.noise_offset])
            if chosen.noise_offset_random_strength:
                offset_strength_1 = draws.uniform("noise_offset_strength", [micro]) * chosen.noise_offset
            offset_BC11 = draws.normal("noise_offset", draw_ids, (shape[0], 1, 1))
        if chosen.multires_noise_iterations:
            pyramid_BCHW = pyramid(draws, draw_ids, micro, shape, chosen)
        if chosen.min_timestep < chosen.max_timestep:
            timesteps_B = draws.timesteps(draw_ids, chosen.min_timestep, chosen.max_timestep)
        else:  # sd-scripts train_util.py:get_timesteps
            timesteps_B = torch.full((len(draw_ids),), chosen.max_timestep)
        if chosen.ip_noise_gamma:
            strength = torch.tensor([chosen.ip_noise_gamma])
            if chosen.ip_noise_gamma_random_strength:
                strength = draws.uniform("ip_noise_strength", [micro]) * chosen.ip_noise_gamma
            perturbation_BCHW = strength * draws.normal("ip_noise", draw_ids, shape)
        drawn = Drawn(
            timesteps_B=timesteps_B,
            noise_BCHW=noise_BCHW,
            offset_BC11=offset_BC11,
            offset_strength_1=offset_strength_1,
            pyramid_BCHW=pyramid_BCHW,
            perturbation_BCHW=perturbation_BCHW,
        )
        if not chosen.adaptive_noise_scale:
            # Nothing hangs on the latents: one tensor travels to the device instead of four.
            offset = None
            if offset_BC11 is not None and offset_strength_1 is not None:
                offset = offset_strength_1 * offset_BC11
            drawn = replace(
                drawn,
                noise_BCHW=_combine(noise_BCHW, offset, pyramid_BCHW),
                offset_BC11=None,
                offset_strength_1=None,
                pyramid_BCHW=None,
            )
        return drawn.pin() if self.device.type == "cuda" else drawn

    def at_level(self, drawn: Drawn, level: float) -> Drawn:
        """See `Objective.at_level` of trainer.objectives._base: a share of the timesteps."""
        timestep = min(max(round(level * TIMESTEPS), 0), TIMESTEPS - 1)
        return replace(drawn, timesteps_B=torch.full_like(drawn.timesteps_B, timestep))

    def mix(self, latents_BCHW: Tensor, drawn: Drawn) -> Noised:
        """Noise ``latents_BCHW`` with what was drawn for them.

        The sum is formed in float32 and rounded once, to the latents' dtype; half-precision latents
        get noise that was drawn in float32 and rounded (sd-scripts draws it in half precision).

        Args:
            latents_BCHW: Model latents (scaled), on the device.
            drawn: From `noise_on_cpu`, for this batch.
        """
        device, dtype = latents_BCHW.device, latents_BCHW.dtype

        def here(tensor: Tensor) -> Tensor:
            return tensor.to(device, non_blocking=True)

        timesteps_B = here(drawn.timesteps_B)
        clean_BCHW = latents_BCHW.float()
        noise_BCHW = here(drawn.noise_BCHW)
        if drawn.offset_BC11 is not None and drawn.offset_strength_1 is not None:
            means_BC11 = clean_BCHW.mean(dim=(2, 3), keepdim=True).abs()
            strength = here(drawn.offset_strength_1) + self.settings.adaptive_noise_scale * means_BC11
            coarse_BCHW = None if drawn.pyramid_BCHW is None else here(drawn.pyramid_BCHW)
            noise_BCHW = _combine(noise_BCHW, strength.clamp(min=0.0) * here(drawn.offset_BC11), coarse_BCHW)
        noise_BCHW = noise_BCHW.to(dtype)
        signal_B111 = self.signal_T[timesteps_B].view(-1, 1, 1, 1)
        sigma_B111 = self.sigma_T[timesteps_B].view(-1, 1, 1, 1)
        exact_BCHW = noise_BCHW.float()
        mixed_BCHW = exact_BCHW
        if drawn.perturbation_BCHW is not None:
            mixed_BCHW = exact_BCHW + here(drawn.perturbation_BCHW)
        target_BCHW = exact_BCHW
        if self.settings.v_prediction:
            target_BCHW = signal_B111 * exact_BCHW - sigma_B111 * clean_BCHW
        return Noised(
            noisy_BCHW=(signal_B111 * clean_BCHW + sigma_B111 * mixed_BCHW).to(dtype),
            timesteps_B=timesteps_B,
            target_BCHW=target_BCHW,
            noise_BCHW=noise_BCHW,
        )

    def noise_latents(
        self, latents_BCHW: Tensor, draw_ids: Sequence[int], micro: int, draws: Draws
    ) -> Noised:
        """Draw and mix in one go: see `noise_on_cpu` and `mix`."""
        channels, height, width = latents_BCHW.shape[1:]
        return self.mix(latents_BCHW, self.noise_on_cpu((channels, height, width), draw_ids, micro, draws))

    def loss(self, prediction_BCHW: Tensor, noised: Noised, batch: Batch) -> tuple[Tensor, Tensor]:
        """Loss of a micro-batch, in float32.

        Masks are shrunk to latent size by area and multiplied in, with no division by their area; then
        come the mean of each sample, its weight (prior_loss_weight) and the weight of its timestep.

        Returns:
            The mean over the batch, 0-d and differentiable, and the loss of each sample, (B,), detached.
        """
        timesteps_B = noised.timesteps_B
        huber_c_B = None if self.huber_c_T is None else self.huber_c_T[timesteps_B]
        losses = elementwise_loss(prediction_BCHW, noised.target_BCHW, self.settings.loss_type, huber_c_B)
        if batch.masks_B1HW is not None:
            masks_B1HW = batch.masks_B1HW.to(losses.device, losses.dtype, non_blocking=True)
            losses = losses * interpolate(masks_B1HW, size=losses.shape[-2:], mode="area")
        losses_B = losses.mean(dim=(1, 2, 3))
        losses_B = losses_B * batch.loss_weights_B.to(losses.device, non_blocking=True)
        losses_B = losses_B * self.weights_T[timesteps_B]
        return losses_B.mean(), losses_B.detach()


def _combine(noise_BCHW: Tensor, offset_BC11: Tensor | None, pyramid_BCHW: Tensor | None) -> Tensor:
    """Noise plus offset; with a pyramid, brought back to unit deviation over the whole batch."""
    if offset_BC11 is not None:
        noise_BCHW = noise_BCHW + offset_BC11
    if pyramid_BCHW is not None:
        noise_BCHW = noise_BCHW + pyramid_BCHW
        noise_BCHW = noise_BCHW / noise_BCHW.std()
    return noise_BCHW


def check(job: Job) -> None:
    """Refuse noise and loss settings that cannot be, before anything is loaded.

    Raises:
        ConfigError: Which one, and what is allowed.
    """
    Settings.from_job(job)


def prepare(job: Job, device: torch.device | str) -> Objective:
    """The objective of ``job``, its tables on ``device``.

    Raises:
        ConfigError: Bounds or choices that cannot be.
    """
    return Objective.build(Settings.from_job(job), device)
