"""What the loop asks of a network: the small trainable part beside the frozen model."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from trainer.draws import Draws
    from trainer.families._base import Family, Say
    from trainer.job import Job
    from trainer.networks._blocks import BlockCounts

__all__ = ["Network", "ParamGroup"]


@dataclass(frozen=True)
class ParamGroup:
    """Parameters that share a learning rate, under Kohya's log name ("textencoder", "unet plus")."""

    name: str
    params: list[nn.Parameter]
    lr: float


class Network(ABC):
    """Layers attached to a family's models. `create` attaches nothing; `attach` does."""

    kohya_types: ClassVar[tuple[str, ...]]
    """Values of LoRA_type that this file serves."""
    module: str
    """ss_network_module: networks.lora ..."""

    @classmethod  # noqa: B027
    def check(cls, job: Job, counts: BlockCounts) -> None:
        """Refuse options that cannot be, before a model is loaded.

        Args:
            job: The run.
            counts: Number of blocks of its family, `trainer.families._base.Family.kohya_blocks`.

        Raises:
            ConfigError: With a sentence for each of them.
        """

    @classmethod
    @abstractmethod
    def create(cls, family: Family, job: Job, draws: Draws, say: Say) -> Network:
        """Make the layers for ``job`` (dims, alphas, dropouts, blocks), initialised from ``draws``.

        With dim_from_weights, dims and alphas come from the file; `network_weights` are loaded here.

        Raises:
            ConfigError: Options that cannot be (a block list of the wrong length ...).
            ModelFileError: network_weights missing, broken or of other shapes.
        """

    @abstractmethod
    def attach(self) -> None:
        """Put the layers into the models' forward passes."""

    @abstractmethod
    def detach(self) -> None:
        """Take them out again; the models are as before."""

    @abstractmethod
    def train(self, mode: bool = True) -> None:
        """Dropouts on or off."""

    @abstractmethod
    def set_multiplier(self, multiplier: float) -> None:
        """Strength of the network; 0 gives the base model's output."""

    @abstractmethod
    def to(self, device: torch.device, dtype: torch.dtype) -> None:
        """Move the parameters: float32, or half with full_fp16 / full_bf16."""

    @abstractmethod
    def param_groups(self) -> list[ParamGroup]:
        """Groups in Kohya's order (text encoders, then UNet; base, then plus); lr 0 is left out."""

    @abstractmethod
    def parameters(self) -> Iterator[nn.Parameter]:
        """All trainable parameters, in the order of the state dict."""

    @abstractmethod
    def freeze_text_encoder(self) -> None:
        """Stop training the text encoder's layers (stop_text_encoder_training); they keep working."""

    @abstractmethod
    def state_dict(self) -> dict[str, Tensor]:
        """Tensors under Kohya's keys, detached, on the CPU, in the training dtype."""

    @abstractmethod
    def load_state_dict(self, tensors: Mapping[str, Tensor]) -> list[str]:
        """Load tensors under Kohya's keys; returns a line for each key left over or missing."""

    def before_update(self) -> None:  # noqa: B027
        """Look at the gradients of a step, clipped, before the optimizer uses them."""

    @abstractmethod
    def apply_max_norm(self, limit: float) -> dict[str, Tensor]:
        """scale_weight_norms: TensorBoard tags and 0-d tensors, still on the device."""

    @abstractmethod
    def metadata(self) -> dict[str, str]:
        """ss_network_* entries (module, dim, alpha, args) as sd-scripts writes them."""

    @staticmethod
    @abstractmethod
    def merge(family: Family, file: Path, multiplier: float, say: Say) -> None:
        """Add a LoRA file to the frozen weights for good (base_weights)."""
