"""Pictures to latents and back with diffusers' AutoencoderKL, whatever the family.

Axes: B batch, C channels, H/W height and width.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from trainer.errors import DivergedError

__all__ = ["decode", "fingerprint", "sample"]


@torch.no_grad()
def sample(
    vae: Any, pixels_BCHW: Tensor, generators: Sequence[torch.Generator], *, what: str, mend: str
) -> Tensor:
    """A sample of the VAE's posterior, with noise of each picture's own generator; float32, on the CPU.

    Args:
        vae: Works in its own dtype, whatever autocast says.
        pixels_BCHW: Pictures in [-1, 1].
        generators: One a picture, of the CPU.
        what: The VAE's name in a message.
        mend: What a person does to have it in full precision.

    Raises:
        DivergedError: It gave NaN, as a half-precision SDXL VAE does.
    """
    place = next(vae.parameters())
    with torch.autocast(place.device.type, enabled=False):
        posterior = vae.encode(pixels_BCHW.to(place.device, place.dtype)).latent_dist
    mean, std = posterior.mean.float().cpu(), posterior.std.float().cpu()
    noise = torch.stack([torch.randn(mean.shape[1:], generator=generator) for generator in generators])
    latents: Tensor = mean + std * noise
    if not bool(torch.isfinite(latents).all()):
        raise DivergedError(f"{what} gave NaN in {str(place.dtype).removeprefix('torch.')}: {mend}")
    return latents


@torch.no_grad()
def decode(vae: Any, latents_BCHW: Tensor) -> Tensor:
    """Pictures in [-1, 1], float32, of latents as the VAE gave them."""
    place = next(vae.parameters())
    with torch.autocast(place.device.type, enabled=False):
        pixels: Tensor = vae.decode(latents_BCHW.to(place.device, place.dtype)).sample
    return pixels.float()


def fingerprint(*models: nn.Module) -> str:
    """SHA-256 over names, dtypes, shapes and bytes of the models' tensors."""
    digest = hashlib.sha256()
    for model in models:
        for name, value in model.state_dict().items():
            digest.update(f"{name} {value.dtype} {tuple(value.shape)}\n".encode())
            digest.update(memoryview(value.detach().cpu().contiguous().view(torch.uint8).numpy()))
    return digest.hexdigest()
