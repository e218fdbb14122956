"""The SD family on toy models or on shapes alone, and jobs for it, without any file."""

from __future__ import annotations

import copy
from typing import Any, Literal

import torch
from diffusers import UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel

from tests import tiny
from trainer.config import KohyaConfig
from trainer.families.sd import StableDiffusion
from trainer.job import Job

__all__ = ["family", "full_size", "job"]


def _family(
    unet: Any, text_encoder: Any, *, v2: bool, single_file: bool = True, v_parameterization: bool = False
) -> StableDiffusion:
    return StableDiffusion(
        unet=lambda: unet,
        vae=None,
        text_encoder=text_encoder,
        tokens=None,  # type: ignore[arg-type]  # nothing here reads words
        device=torch.device("cpu"),
        dtype=torch.float32,
        v2=v2,
        v_parameterization=v_parameterization,
        clip_skip=1,
        proj_saved_as_conv=v2 and single_file,
        keep_text=False,
    )


def family(
    version: Literal[1, 2] = 1, *, single_file: bool = True, v_parameterization: bool = False
) -> StableDiffusion:
    """A copy of the toy models, to be changed at will, as if loaded from a single file or a folder."""
    models = tiny.models(version)
    unet, text_encoder = copy.deepcopy(models["unet"]), copy.deepcopy(models["text_encoder"])
    return _family(
        unet,
        text_encoder,
        v2=version == 2,
        single_file=single_file,
        v_parameterization=v_parameterization,
    )


def full_size(version: Literal[1, 2]) -> StableDiffusion:
    """SD 1.5 or 2.1 in its true sizes, on the meta device: shapes without numbers."""
    width, layers, heads = (768, 12, 12) if version == 1 else (1024, 23, 16)
    with torch.device("meta"):
        unet = UNet2DConditionModel(
            cross_attention_dim=width,
            attention_head_dim=8 if version == 1 else [5, 10, 20, 20],
            use_linear_projection=version == 2,
        )
        text_encoder = CLIPTextModel(
            CLIPTextConfig(
                vocab_size=49408,
                hidden_size=width,
                intermediate_size=4 * width,
                num_hidden_layers=layers,
                num_attention_heads=heads,
            )
        )
    return _family(unet, text_encoder, v2=version == 2)


def job(**values: Any) -> Job:
    """A job with a small network, both parts trained unless ``values`` say otherwise."""
    given = {
        "pretrained_model_name_or_path": "model.safetensors",
        "train_data_dir": "pictures",
        "output_dir": "out",
        "unet_lr": 1e-4,
        "text_encoder_lr": 5e-5,
        "network_dim": 4,
        "network_alpha": 2,
        "seed": 7,
    }
    return Job.from_config(KohyaConfig(**{**given, **values}))
