"""What the loop asks of an objective: noise drawn ahead of time, a noisy input, a loss.

Axes: B batch, C channels, H/W latent height and width.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Generic, TypeVar

from torch import Tensor

if TYPE_CHECKING:
    from trainer.data.types import Batch
    from trainer.draws import Draws

__all__ = ["Noised", "Objective"]


@dataclass(frozen=True, kw_only=True)
class Noised:
    """One micro-batch as the denoiser sees it, on the device."""

    noisy_BCHW: Tensor
    """In the latents' dtype."""
    timesteps_B: Tensor
    """In the unit that the family's `predict` takes: 0 to 1000, whole numbers for the SD families."""


D = TypeVar("D")
N = TypeVar("N", bound=Noised)


class Objective(ABC, Generic[D, N]):
    """Noising and loss; D is the random part of a micro-batch, N what noising gives.

    A module of `trainer.objectives` exposes, beside its class, ``check(job)`` (raises ConfigError
    before anything is loaded) and ``prepare(job, device)`` (gives the objective); a family names the
    module in `Family.objective`.
    """

    @abstractmethod
    def noise_on_cpu(
        self, shape: tuple[int, int, int], draw_ids: Sequence[int], micro: int, draws: Draws
    ) -> D:
        """Draw everything for one micro-batch; safe on another thread.

        Args:
            shape: C, H, W of the latents.
            draw_ids: Place of each sample in the run.
            micro: Place of the micro-batch in the run, for what is drawn once a batch.
            draws: Where all of it comes from.
        """

    @abstractmethod
    def mix(self, latents_BCHW: Tensor, drawn: D) -> N:
        """Noise model latents, on the device, with what was drawn for them."""

    @abstractmethod
    def at_level(self, drawn: D, level: float) -> D:
        """The same draw with every sample at one noise level, from 0 (clean) to 1 (noise)."""

    @abstractmethod
    def loss(self, prediction_BCHW: Tensor, noised: N, batch: Batch) -> tuple[Tensor, Tensor]:
        """The mean over the batch, 0-d and differentiable, and the loss of each sample, (B,), detached."""
