"""SDXL at its full size: shapes, no weights."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import nn

from trainer.families.sdxl import StableDiffusionXL

__all__ = ["full_size", "models"]


def models(
    depth: tuple[int, int, int] = (1, 2, 10), text_layers: tuple[int, int] = (12, 32)
) -> tuple[Any, dict[Any, nn.Module]]:
    """UNet and text encoders on the meta device, by SDXL's published configurations.

    Args:
        depth: Transformer layers in each of the UNet's three levels.
        text_layers: Layers of CLIP-L and of OpenCLIP bigG.
    """
    from diffusers import UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    def text(kind: Any, width: int, layers: int) -> nn.Module:
        sizes = {"hidden_size": width, "intermediate_size": 4 * width, "projection_dim": width}
        model: nn.Module = kind(
            CLIPTextConfig(**sizes, num_hidden_layers=layers, num_attention_heads=width // 64)
        )
        return model

    with torch.device("meta"):
        unet = UNet2DConditionModel(
            block_out_channels=(320, 640, 1280),
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            transformer_layers_per_block=depth,
            cross_attention_dim=2048,
            attention_head_dim=(5, 10, 20),
            use_linear_projection=True,
            addition_embed_type="text_time",
            addition_time_embed_dim=256,
            projection_class_embeddings_input_dim=2816,
        )
        encoders = {
            "te1": text(CLIPTextModel, 768, text_layers[0]),
            "te2": text(CLIPTextModelWithProjection, 1280, text_layers[1]),
        }
    return unet, cast("dict[Any, nn.Module]", encoders)


def full_size() -> StableDiffusionXL:
    """The family around them; enough for its layers and their names."""
    unet, encoders = models()
    return StableDiffusionXL(
        unet=lambda: unet,
        vae=nn.Identity(),
        text_encoders=encoders,
        tokens={},
        device=torch.device("cpu"),
        dtype=torch.float32,
        keep_text=False,
    )
