"""What the loop, the network and the sampler ask of a model family.

A family file holds everything that differs between SD 1.x, SDXL and FLUX; nothing else asks which
one it is. Models are diffusers and transformers classes, frozen; the network wraps their layers.

Axes: B batch, C channels, H/W latent height and width, T text tokens, D text width.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from trainer.data.types import Batch, Dataset
    from trainer.events import Event
    from trainer.job import Job
    from trainer.prompts import SamplePrompt

__all__ = ["Family", "Part", "Say", "Target", "Text"]

Part = Literal["unet", "te1", "te2", "te3"]
"""Which model a layer belongs to; te1 is the only text encoder of SD 1.x and 2.x."""

Say = Callable[[str], None]
"""Takes a line for the console."""


@dataclass(frozen=True, kw_only=True)
class Target:
    """A layer that a network may wrap."""

    name: str
    """Kohya's key stem: lora_unet_down_blocks_0_attentions_0_proj_in, lora_te_text_model_..."""
    module: nn.Linear | nn.Conv2d
    part: Part
    block: int | None = None
    """Index into Kohya's block lists (block_dims, LR weights): 0..24 for SD; None outside the UNet."""
    conv_group: bool = False
    """Wrapped only where a conv_dim is given (residual, down- and upsampling blocks)."""
    saved_as_conv: bool = False
    """A Linear that Kohya's files hold as a 1x1 convolution (SD 2.x proj_in and proj_out)."""
    optional: bool = False
    """Wrapped only where a network option asks for it (T5, FLUX's input layers)."""
    parts: tuple[tuple[str, int], ...] = ()
    """What diffusers has in the layer's place: paths and numbers of output rows (FLUX's q, k and v)."""


@dataclass(frozen=True)
class Text:
    """What the denoiser is conditioned on."""

    states_BTD: Tensor
    pooled_BD: Tensor | None = None
    extra: Mapping[str, Tensor] = field(default_factory=dict)


class Family(ABC):
    """A loaded model family. Built by `load`; lives as long as one job."""

    name: ClassVar[str]
    """Folder name and dropdown value: "sd"."""
    objective: ClassVar[str] = "ddpm"
    """File in trainer/objectives: how it is noised and what its loss is."""
    kohya_base_version: str
    """ss_base_model_version: sd_v1, sd_v2, sd_v2_v, sdxl_base_v1-0, flux1."""
    architecture: str
    """modelspec.architecture, e.g. stable-diffusion-v1/lora."""
    implementation: str
    """modelspec.implementation."""
    latent_channels: ClassVar[int]
    latent_factor: ClassVar[int]
    """Pixels to a latent, each way (8)."""
    bucket_steps: ClassVar[int]
    """bucket_reso_steps must be a multiple of this (sd-scripts asserts 64 for SD, 32 for SDXL)."""
    kohya_blocks: ClassVar[tuple[int, int, int, int, int]] = (0, 12, 1, 12, 0)
    """Entries of Kohya's block lists: before, input, middle, output, after. SDXL (1, 9, 3, 9, 1); else 0."""
    sample_steps: ClassVar[int] = 30
    """Steps of a sample picture whose prompt gives none."""
    sample_cfg_scale: ClassVar[float] = 7.5
    """CFG scale of a sample picture whose prompt gives none."""
    sample_sampler: ClassVar[str] = ""
    """Sampler of all sample pictures; empty where prompt and configuration choose."""
    sample_multiple_px: ClassVar[int] = 8
    """Sample pictures' sides are cut to a multiple of this."""
    cache_suffix: ClassVar[str]
    """Ending of the latent cache file: "_sd.npz"."""
    device: torch.device
    dtype: torch.dtype
    """dtype of the frozen weights."""
    vae: nn.Module
    text_encoders: dict[Part, nn.Module]

    @classmethod  # noqa: B027
    def check(cls, job: Job, dataset: Dataset) -> None:
        """Refuse what this family cannot train, before anything is loaded.

        Raises:
            ConfigError: Settings that exclude each other, or that the pictures' subsets do not allow.
        """

    @cached_property
    def unet(self) -> Any:
        """The denoiser, read from its file when it is first asked for.

        That is after pictures and texts are encoded, where they are cached: the memory then never
        holds the denoiser beside the VAE at work.
        """
        return self.load_unet()

    @abstractmethod
    def load_unet(self) -> nn.Module:
        """Read the denoiser to the device, frozen and in eval mode."""

    @classmethod
    @abstractmethod
    def load(cls, job: Job, device: torch.device, dtype: torch.dtype, say: Say) -> Family:
        """Load tokenizers, text encoders and VAE, frozen and in eval mode; look the denoiser's file over.

        Raises:
            ModelFileError: A file is missing, broken or of another family.
        """

    @abstractmethod
    def vae_fingerprint(self) -> str:
        """Changes whenever the VAE (weights, precision) does: part of a latent cache's key."""

    @abstractmethod
    def encode_images(self, pixels_BCHW: Tensor, generators: Sequence[torch.Generator]) -> Tensor:
        """One VAE sample for each picture, as it is cached (SD: unscaled), float32, on the CPU.

        Args:
            pixels_BCHW: Pictures in [-1, 1].
            generators: One CPU generator a picture, for the VAE's own noise.

        Raises:
            DivergedError: The VAE gave NaN (a half-precision SDXL VAE does).
        """

    @abstractmethod
    def to_model_latents(self, latents_BCHW: Tensor) -> Tensor:
        """Cached latents to what the denoiser works on (SD: times 0.18215)."""

    @abstractmethod
    def decode_latents(self, latents_BCHW: Tensor) -> Tensor:
        """Model latents to pictures in [-1, 1], float32."""

    @abstractmethod
    def encode_prompts(self, prompts: Sequence[str], *, weighted: bool = False) -> Text:
        """Text conditioning; differentiable where the text encoder trains.

        Args:
            prompts: Processed captions or sample prompts.
            weighted: Read (word:1.2) emphasis, as samples and weighted_captions do.
        """

    def encode_sample_prompts(self, prompts: Sequence[str]) -> Text:
        """Text conditioning for sample pictures; prompts may be longer than captions."""
        return self.encode_prompts(prompts, weighted=True)

    def prepare_text(  # noqa: B027
        self, job: Job, dataset: Dataset, *, emit: Callable[[Event], None], stop: Callable[[], bool]
    ) -> None:
        """Cache text encoder outputs where the job says so, and move the encoders out of the way.

        Called once, before the network is attached.

        Raises:
            StopTraining: ``stop`` said so.
        """

    def encode_batch(self, batch: Batch, *, weighted: bool = False) -> Text:
        """Text conditioning of a micro-batch, from what `prepare_text` cached or of its captions."""
        return self.encode_prompts(batch.captions, weighted=weighted)

    def for_sample(self, text: Text, prompt: SamplePrompt) -> Text:
        """``text`` with what else a sample prompt says (FLUX's embedded guidance)."""
        return text

    def sample_scheduler(self, width: int, height: int) -> Any | None:
        """The sampler of pictures of this size, in pixels; None where the sampler's name decides."""
        return None

    def sample_noise(self, latent_size: tuple[int, int], generator: torch.Generator) -> Tensor:
        """Starting noise of a sample picture, 1CHW, float32, on the CPU."""
        return torch.randn((1, self.latent_channels, *latent_size), generator=generator)

    def uses_negative(self, cfg_scale: float) -> bool:
        """Whether a sample picture with this CFG scale needs its negative prompt."""
        return cfg_scale > 1

    def freeze_text(self) -> None:  # noqa: B027
        """The text encoders change no more: what they give for a caption may be kept from now on."""

    @abstractmethod
    def predict(self, noisy_BCHW: Tensor, timesteps_B: Tensor, text: Text, batch: Batch | None) -> Tensor:
        """The denoiser's raw prediction (noise or velocity), BCHW.

        ``batch`` carries the micro-conditioning that SDXL wants; None while sampling.
        """

    @abstractmethod
    def targets(self) -> list[Target]:
        """Every layer that any network type may wrap, in Kohya's order: text encoders, then UNet."""

    @abstractmethod
    def move(self, parts: Iterable[Literal["vae", "text_encoders", "unet"]], device: torch.device) -> None:
        """Move models, e.g. the VAE off the device once the latents are cached."""

    @abstractmethod
    def enable_gradient_checkpointing(self) -> None:
        """Recompute activations in the backward pass, in the UNet and the text encoders."""
