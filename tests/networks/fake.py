"""A family of diffusers' own classes in toy sizes, with the layers that sd-scripts would wrap."""

from __future__ import annotations

import re
from typing import Any, cast

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel

from trainer.config import KohyaConfig
from trainer.families._base import Family, Target
from trainer.job import Job

KINDS = {"Transformer2DModel": False, "ResnetBlock2D": True, "Downsample2D": True, "Upsample2D": True}


def block_of(path: str) -> int:
    """Index into the 25 blocks, from the path (engine facts 5.4)."""
    if path.startswith("mid_block"):
        return 12
    found = re.match(r"(down|up)_blocks\.(\d+)\.(\w+?)\.(\d+)", path)
    assert found
    way, i, kind, j = found.groups()
    place = 3 * int(i) + (2 if "samplers" in kind else int(j))
    return (1 if way == "down" else 13) + place


class FakeFamily:
    """The attributes and the one method of `Family` that a network uses."""

    kohya_blocks = Family.kohya_blocks

    def __init__(self, *, full_size: bool = False, text_layers: int = 2) -> None:
        sizes: dict[str, Any] = {} if full_size else {"block_out_channels": (32, 32, 64, 64)}
        self.unet = UNet2DConditionModel(
            sample_size=8,
            cross_attention_dim=768 if full_size else 16,
            attention_head_dim=8,
            norm_num_groups=32 if full_size else 8,
            **sizes,
        )
        width = 768 if full_size else 16
        config = CLIPTextConfig(
            vocab_size=99,
            hidden_size=width,
            intermediate_size=4 * width,
            num_hidden_layers=12 if full_size else text_layers,
            num_attention_heads=12 if full_size else 2,
            max_position_embeddings=77,
            eos_token_id=98,
            bos_token_id=97,
        )
        self.text_encoder = CLIPTextModel(config)
        self.text_encoders = {"te1": self.text_encoder}
        for model in (self.unet, self.text_encoder):
            model.requires_grad_(False).eval()

    def targets(self) -> list[Target]:
        found = []
        for path, module in self.text_encoder.named_modules():
            if isinstance(module, nn.Linear):
                stem = path if path.startswith("text_model.") else f"text_model.{path}"
                found.append(Target(name="lora_te_" + stem.replace(".", "_"), module=module, part="te1"))
        for outer, parent in self.unet.named_modules():
            conv_group = KINDS.get(type(parent).__name__)
            if conv_group is None:
                continue
            for inner, module in parent.named_modules():
                if isinstance(module, nn.Linear | nn.Conv2d):
                    path = f"{outer}.{inner}"
                    found.append(
                        Target(
                            name="lora_unet_" + path.replace(".", "_"),
                            module=module,
                            part="unet",
                            block=block_of(path),
                            conv_group=conv_group,
                        )
                    )
        return found


def family(seed: int = 0, **sizes: Any) -> Family:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return cast(Family, FakeFamily(**sizes))


def vae() -> AutoencoderKL:
    return AutoencoderKL(
        block_out_channels=(8,), norm_num_groups=4, latent_channels=4, sample_size=8, layers_per_block=1
    )


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
