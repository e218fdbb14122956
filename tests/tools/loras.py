"""Seeded LoRA files, made of a few layers, in every naming."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from trainer.tools._lora import Pair

__all__ = ["SD1", "delta64", "pair", "tensors", "write"]

SD1: Mapping[str, tuple[int, ...]] = {
    # stem: shape of the layer's weight, O first
    "lora_te_text_model_encoder_layers_0_self_attn_q_proj": (32, 32),
    "lora_unet_down_blocks_0_attentions_0_proj_in": (32, 32, 1, 1),
    "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_k": (32, 768),
    "lora_unet_down_blocks_1_resnets_0_conv1": (64, 32, 3, 3),
}


def pair(shape: Sequence[int], rank: int, alpha: float, seed: int) -> Pair:
    """A random pair for a layer whose weight has ``shape``; singular values that fall off."""
    generator = torch.Generator().manual_seed(seed)
    out, into = shape[0], torch.Size(shape[1:]).numel()
    fall = 0.7 ** torch.arange(rank)
    up = torch.randn((out, rank), generator=generator) * fall
    down = torch.randn((rank, into), generator=generator)
    if len(shape) == 4:
        return Pair(down.reshape(rank, *shape[1:]), up[:, :, None, None].contiguous(), alpha)
    return Pair(down, up, alpha)


def tensors(
    layers: Mapping[str, Sequence[int]], rank: int, alpha: float | None, seed: int = 0
) -> dict[str, Tensor]:
    """A LoRA's tensors under Kohya's keys; without alpha where it is None."""
    found: dict[str, Tensor] = {}
    for index, (stem, shape) in enumerate(layers.items()):
        made = pair(shape, rank, alpha or rank, 100 * seed + index)
        found[f"{stem}.lora_down.weight"] = made.down
        found[f"{stem}.lora_up.weight"] = made.up
        if alpha is not None:
            found[f"{stem}.alpha"] = torch.tensor(float(alpha))
    return found


def write(
    path: Path,
    layers: Mapping[str, Sequence[int]],
    rank: int,
    alpha: float | None,
    seed: int = 0,
    metadata: Mapping[str, str] | None = None,
) -> Path:
    """The same as a file."""
    save_file(tensors(layers, rank, alpha, seed), path, dict(metadata or {}))
    return path


def delta64(found: Mapping[str, Tensor], stem: str) -> Tensor:
    """A layer's weight change by the formula, in float64, from a file's tensors under Kohya's keys."""
    down = found[f"{stem}.lora_down.weight"].double()
    up = found[f"{stem}.lora_up.weight"].double()
    alpha = float(found[f"{stem}.alpha"]) if f"{stem}.alpha" in found else float(len(down))
    return torch.einsum("or,ri->oi", up.flatten(1), down.flatten(1)) * (alpha / len(down))
