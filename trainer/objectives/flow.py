"""Noise, target and loss of FLUX.1: rectified flow (Liu et al. 2022, arXiv:2209.03003).

A straight path leads from the latents (sigma 0) to noise (sigma 1); the target is its velocity, noise
minus latents, whatever the prediction type. Order and formulas follow sd-scripts
(library/flux_train_utils.py: get_noisy_model_input_and_timesteps, apply_model_prediction_type).

Axes: B batch, C channels, H/W latent height and width.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from trainer.draws import Draws
from trainer.errors import ConfigError
from trainer.objectives import _base
from trainer.objectives.ddpm import LOSS_TYPES, elementwise_loss

if TYPE_CHECKING:
    from trainer.data.types import Batch
    from trainer.job import Job

__all__ = [
    "Drawn",
    "FlowEuler",
    "Noised",
    "Objective",
    "Settings",
    "check",
    "flux_mu",
    "prepare",
    "schedule",
    "shifted",
    "sigma_weights",
    "sigmas",
]

TIMESTEPS = 1000
SAMPLINGS = ("sigma", "uniform", "sigmoid", "shift", "flux_shift")
PREDICTIONS = ("raw", "additive", "sigma_scaled")
WEIGHTINGS = ("uniform", "logit_normal", "mode", "sigma_sqrt", "cosmap", "none")


# --- noise levels ---------------------------------------------------------------------------------


def shifted(sigma: Tensor, shift: float) -> Tensor:
    """Noise levels in [0, 1] moved towards noise by ``shift`` above 1, towards pictures below 1."""
    return sigma * shift / (1 + (shift - 1) * sigma)


def flux_mu(tokens: int) -> float:
    """How far FLUX moves its noise levels for a picture of ``tokens`` (16 x 16 px each): 0.5 to 1.15."""
    slope = (1.15 - 0.5) / (4096 - 256)
    return slope * (tokens - 256) + 0.5


def schedule(steps: int, tokens: int) -> Tensor:
    """Noise levels of a sampler from 1 to 0, float32, (steps + 1,) (flux_train_utils.py:get_schedule)."""
    return shifted(torch.linspace(1, 0, steps + 1), math.exp(flux_mu(tokens)))


def sigma_weights(sigma: Tensor, weighting_scheme: str) -> Tensor:
    """Loss weight of each noise level (Esser et al. 2024, arXiv:2403.03206); used by sigma_scaled only."""
    if weighting_scheme == "sigma_sqrt":
        return sigma**-2.0
    if weighting_scheme == "cosmap":
        return 2 / (math.pi * (1 - 2 * sigma + 2 * sigma**2))
    return torch.ones_like(sigma)


class FlowEuler:
    """Euler's method along the path, with the calls that the sampling loop makes of a scheduler.

    FLUX previews always use it, with the noise levels moved for the picture's size.
    """

    init_noise_sigma = 1.0

    def __init__(self, tokens: int) -> None:
        self._tokens = tokens
        self.timesteps = torch.empty(0)
        self._sigmas: list[float] = []

    def set_timesteps(self, steps: int, device: torch.device | str | None = None) -> None:
        """Start over with ``steps`` steps."""
        sigmas = schedule(steps, self._tokens)
        self._sigmas = sigmas.tolist()
        self.timesteps = (sigmas[:-1] * TIMESTEPS).to(device)
        self._at = 0

    def scale_model_input(self, latents: Tensor, timestep: Tensor) -> Tensor:
        """The model takes the latents as they are."""
        return latents

    def step(
        self, velocity: Tensor, timestep: Tensor, latents: Tensor, *, return_dict: bool = False
    ) -> tuple[Tensor]:
        """One step towards the picture."""
        sigma, following = self._sigmas[self._at : self._at + 2]
        self._at += 1
        return (latents + (following - sigma) * velocity,)


# --- what the loop calls --------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Settings:
    """The configuration's part in noise and loss; names and meanings are Kohya's."""

    timestep_sampling: str = "sigma"
    sigmoid_scale: float = 1.0
    discrete_flow_shift: float = 3.0
    weighting_scheme: str = "uniform"
    logit_mean: float = 0.0
    logit_std: float = 1.0
    mode_scale: float = 1.29
    model_prediction_type: str = "sigma_scaled"
    ip_noise_gamma: float = 0.0
    ip_noise_gamma_random_strength: bool = False
    loss_type: str = "l2"
    huber_schedule: str = "snr"
    huber_c: float = 0.1
    huber_scale: float = 1.0

    @classmethod
    def from_job(cls, job: Job) -> Settings:
        """Read them from the effective configuration.

        Raises:
            ConfigError: Choices that cannot be.
        """
        config = job.config
        settings = cls(
            timestep_sampling=config.timestep_sampling,
            sigmoid_scale=job.engine.sigmoid_scale,
            discrete_flow_shift=config.discrete_flow_shift,
            weighting_scheme=config.weighting_scheme,
            logit_mean=config.logit_mean,
            logit_std=config.logit_std,
            mode_scale=config.mode_scale,
            model_prediction_type=config.model_prediction_type,
            ip_noise_gamma=config.ip_noise_gamma,
            ip_noise_gamma_random_strength=config.ip_noise_gamma_random_strength,
            loss_type=config.loss_type,
            huber_schedule=config.huber_schedule,
            huber_c=config.huber_c,
            huber_scale=config.huber_scale,
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
        for name, allowed in (
            ("timestep_sampling", SAMPLINGS),
            ("model_prediction_type", PREDICTIONS),
            ("weighting_scheme", WEIGHTINGS),
            ("loss_type", LOSS_TYPES),
        ):
            if getattr(self, name) not in allowed:
                yield f"{name} is {getattr(self, name)!r}: allowed are {', '.join(allowed)}"
        if self.discrete_flow_shift <= 0:
            yield f"discrete_flow_shift is {self.discrete_flow_shift}: it must be above 0"
        if self.loss_type in ("huber", "smooth_l1"):
            if self.huber_schedule not in ("constant", "exponential"):
                yield (
                    f"huber_schedule is {self.huber_schedule!r}: FLUX.1 has no signal-to-noise table, choose "
                    "constant or exponential"
                )
            if self.huber_c <= 0:
                yield f"huber_c is {self.huber_c}: it must be above 0"


@dataclass(frozen=True, kw_only=True)
class Drawn:
    """The random part of one micro-batch, on the CPU in float32; can be made ahead of time."""

    sigma_B: Tensor
    """Noise levels in [0, 1]."""
    noise_BCHW: Tensor
    perturbation_BCHW: Tensor | None = None
    """ip_noise_gamma's extra noise on the transformer's input, already scaled."""

    def pin(self) -> Drawn:
        """The same in page-locked memory, from where copies to a GPU do not wait."""
        pinned: dict[str, Any] = {
            name: value.pin_memory() for name, value in vars(self).items() if value is not None
        }
        return replace(self, **pinned)


@dataclass(frozen=True, kw_only=True)
class Noised(_base.Noised):
    """One micro-batch as the transformer sees it; timesteps are 1000 sigma."""

    target_BCHW: Tensor
    """float32: noise minus latents."""
    sigma_B: Tensor
    """float32."""


def sigmas(settings: Settings, draw_ids: Sequence[int], tokens: int, draws: Draws) -> Tensor:
    """Noise levels of a micro-batch, float32, (B,).

    Args:
        settings: How they are spread.
        draw_ids: Place of each sample in the run.
        tokens: Of a picture, for flux_shift.
        draws: Where they come from.
    """
    sampling = settings.timestep_sampling
    if sampling == "sigma":
        if settings.weighting_scheme == "logit_normal":
            normal_B = draws.normal("sigma", draw_ids, (1,)).squeeze(1)
            place_B = torch.sigmoid(settings.logit_mean + settings.logit_std * normal_B)
        else:
            place_B = draws.uniform("sigma", draw_ids)
            if settings.weighting_scheme == "mode":
                bend_B = torch.cos(math.pi * place_B / 2) ** 2 - 1 + place_B
                place_B = 1 - place_B - settings.mode_scale * bend_B
        # A table of 1000 levels, the noisiest first.
        index_B = (place_B * TIMESTEPS).long().clamp(0, TIMESTEPS - 1)
        return shifted((TIMESTEPS - index_B) / TIMESTEPS, settings.discrete_flow_shift)
    if sampling == "uniform":
        return draws.uniform("sigma", draw_ids)
    sigma_B = torch.sigmoid(settings.sigmoid_scale * draws.normal("sigma", draw_ids, (1,)).squeeze(1))
    if sampling == "shift":
        return shifted(sigma_B, settings.discrete_flow_shift)
    if sampling == "flux_shift":
        return shifted(sigma_B, math.exp(flux_mu(tokens)))
    return sigma_B


@dataclass(frozen=True, kw_only=True)
class Objective(_base.Objective[Drawn, Noised]):
    """Noising and loss."""

    settings: Settings
    device: torch.device

    def noise_on_cpu(
        self, shape: tuple[int, int, int], draw_ids: Sequence[int], micro: int, draws: Draws
    ) -> Drawn:
        """See `Objective.noise_on_cpu` of trainer.objectives._base."""
        chosen = self.settings
        noise_BCHW = draws.noise(draw_ids, shape)
        sigma_B = sigmas(chosen, draw_ids, (shape[1] // 2) * (shape[2] // 2), draws)
        perturbation_BCHW = None
        if chosen.ip_noise_gamma:
            strength = torch.tensor([chosen.ip_noise_gamma])
            if chosen.ip_noise_gamma_random_strength:
                strength = draws.uniform("ip_noise_strength", [micro]) * chosen.ip_noise_gamma
            perturbation_BCHW = strength * draws.normal("ip_noise", draw_ids, shape)
        drawn = Drawn(sigma_B=sigma_B, noise_BCHW=noise_BCHW, perturbation_BCHW=perturbation_BCHW)
        return drawn.pin() if self.device.type == "cuda" else drawn

    def at_level(self, drawn: Drawn, level: float) -> Drawn:
        """See `Objective.at_level` of trainer.objectives._base."""
        return replace(drawn, sigma_B=torch.full_like(drawn.sigma_B, level))

    def mix(self, latents_BCHW: Tensor, drawn: Drawn) -> Noised:
        """Noise ``latents_BCHW`` with what was drawn for them; the sum is formed in float32."""
        device = latents_BCHW.device
        clean_BCHW = latents_BCHW.float()
        noise_BCHW = drawn.noise_BCHW.to(device, non_blocking=True)
        sigma_B = drawn.sigma_B.to(device, non_blocking=True)
        sigma_B111 = sigma_B.view(-1, 1, 1, 1)
        mixed_BCHW = noise_BCHW
        if drawn.perturbation_BCHW is not None:
            mixed_BCHW = noise_BCHW + drawn.perturbation_BCHW.to(device, non_blocking=True)
        noisy_BCHW = (1.0 - sigma_B111) * clean_BCHW + sigma_B111 * mixed_BCHW
        return Noised(
            noisy_BCHW=noisy_BCHW.to(latents_BCHW.dtype),
            timesteps_B=sigma_B * TIMESTEPS,
            target_BCHW=noise_BCHW - clean_BCHW,
            sigma_B=sigma_B,
        )

    def loss(self, prediction_BCHW: Tensor, noised: Noised, batch: Batch) -> tuple[Tensor, Tensor]:
        """Loss of a micro-batch, in float32.

        The prediction is read by model_prediction_type; the target is the velocity all the same, so only
        "raw" is flow matching. Weights, masks and means come in the order of sd-scripts' process_batch.

        Returns:
            The mean over the batch, 0-d and differentiable, and the loss of each sample, (B,), detached.
        """
        chosen = self.settings
        prediction_BCHW = prediction_BCHW.float()
        sigma_B111 = noised.sigma_B.view(-1, 1, 1, 1)
        if chosen.model_prediction_type == "additive":
            prediction_BCHW = prediction_BCHW + noised.noisy_BCHW
        elif chosen.model_prediction_type == "sigma_scaled":
            prediction_BCHW = prediction_BCHW * -sigma_B111 + noised.noisy_BCHW
        losses = elementwise_loss(
            prediction_BCHW, noised.target_BCHW, chosen.loss_type, self._huber_c(noised.timesteps_B)
        )
        if chosen.model_prediction_type == "sigma_scaled":
            losses = losses * sigma_weights(sigma_B111, chosen.weighting_scheme)
        if batch.masks_B1HW is not None:
            masks_B1HW = batch.masks_B1HW.to(losses.device, losses.dtype, non_blocking=True)
            losses = losses * interpolate(masks_B1HW, size=losses.shape[-2:], mode="area")
        losses_B = losses.mean(dim=(1, 2, 3))
        losses_B = losses_B * batch.loss_weights_B.to(losses.device, non_blocking=True)
        return losses_B.mean(), losses_B.detach()

    def _huber_c(self, timesteps_B: Tensor) -> Tensor | None:
        """Huber's threshold of each sample (train_util.py:get_huber_threshold_if_needed)."""
        chosen = self.settings
        if chosen.loss_type not in ("huber", "smooth_l1"):
            return None
        if chosen.huber_schedule == "constant":
            return torch.full_like(timesteps_B, chosen.huber_c * chosen.huber_scale)
        return torch.exp(math.log(chosen.huber_c) / TIMESTEPS * timesteps_B) * chosen.huber_scale


def check(job: Job) -> None:
    """Refuse noise and loss settings that cannot be, before anything is loaded.

    Raises:
        ConfigError: Which one, and what is allowed.
    """
    Settings.from_job(job)


def prepare(job: Job, device: torch.device | str) -> Objective:
    """The objective of ``job``.

    Raises:
        ConfigError: Choices that cannot be.
    """
    return Objective(settings=Settings.from_job(job), device=torch.device(device))
