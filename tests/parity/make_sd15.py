"""Write a Stable Diffusion 1.5 checkpoint with seeded random weights, in the single-file LDM layout.

The file has the keys, shapes and size of the real one, so every program that loads SD 1.5 loads it;
its weights are random, but scaled so that activations neither vanish nor grow: losses stay near 1
and answer to training. A tiny variant has the same keys with small widths, for fast tests of
whatever reads widths from the file (sd-scripts does not: it knows only the full size).

    python tests/parity/make_sd15.py sd15.safetensors [--size tiny] [--dtype float32] [--seed 7]
"""

from __future__ import annotations

import argparse
import json
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from safetensors.torch import save_file
from torch import Tensor

__all__ = [
    "FULL",
    "TINY",
    "Widths",
    "calm_vae",
    "clip_to_ldm",
    "draw",
    "ldm_tensors",
    "unet_to_ldm",
    "vae_to_ldm",
    "write",
]


@dataclass(frozen=True)
class Widths:
    """Everything in which a small model differs from SD 1.5. Heads are 8 in every UNet block, as there."""

    unet_channels: tuple[int, int, int, int] = (320, 640, 1280, 1280)
    vae_channels: tuple[int, int, int, int] = (128, 256, 512, 512)
    text_width: int = 768
    text_mlp_width: int = 3072
    text_layers: int = 12
    text_heads: int = 12


FULL = Widths()
TINY = Widths(
    unet_channels=(32, 64, 64, 64),
    vae_channels=(32, 32, 64, 64),
    text_width=32,
    text_mlp_width=64,
    text_layers=2,
    text_heads=4,
)

_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}


def _rename(name: str, rules: list[tuple[str, str]]) -> str:
    for pattern, replacement in rules:
        renamed, hits = re.subn(rf"^{pattern}(?=\.)", replacement, name)
        if hits:
            return renamed
    raise KeyError(f"{name}: no name in the LDM layout is known for this tensor")


def unet_to_ldm(name: str, blocks: int = 4) -> str:
    """LDM name (without prefix) of a tensor of diffusers' UNet2DConditionModel; SDXL has three blocks."""
    rules = [
        (r"time_embedding\.linear_1", "time_embed.0"),
        (r"time_embedding\.linear_2", "time_embed.2"),
        (r"add_embedding\.linear_1", "label_emb.0.0"),
        (r"add_embedding\.linear_2", "label_emb.0.2"),
        ("conv_in", "input_blocks.0.0"),
        ("conv_norm_out", "out.0"),
        ("conv_out", "out.2"),
        (r"mid_block\.resnets\.0", "middle_block.0"),
        (r"mid_block\.attentions\.0", "middle_block.1"),
        (r"mid_block\.resnets\.1", "middle_block.2"),
    ]
    for i in range(blocks):
        rules.append((rf"down_blocks\.{i}\.downsamplers\.0\.conv", f"input_blocks.{3 * i + 3}.0.op"))
        # The first up block of SD 1.x has no attention, so its upsampler stands one place earlier.
        upsampler = f"output_blocks.{3 * i + 2}.{1 if i == 0 and blocks == 4 else 2}.conv"
        rules.append((rf"up_blocks\.{i}\.upsamplers\.0\.conv", upsampler))
        for j in range(3):
            for place, kind in enumerate(("resnets", "attentions")):
                rules.append((rf"down_blocks\.{i}\.{kind}\.{j}", f"input_blocks.{3 * i + j + 1}.{place}"))
                rules.append((rf"up_blocks\.{i}\.{kind}\.{j}", f"output_blocks.{3 * i + j}.{place}"))
    renamed = _rename(name, rules)
    if ".resnets." in name:
        block, part, tail = re.fullmatch(r"(.*)\.(\w+)\.(weight|bias)", renamed).groups()  # type: ignore[union-attr]
        renamed = f"{block}.{_RESNET[part]}.{tail}"
    return renamed


def vae_to_ldm(name: str) -> str:
    """LDM name (without prefix) of a tensor of diffusers' AutoencoderKL with four levels."""
    for theirs, ours in (
        ("conv_norm_out", "norm_out"),
        ("conv_shortcut", "nin_shortcut"),
        ("mid_block.resnets.0", "mid.block_1"),
        ("mid_block.resnets.1", "mid.block_2"),
        ("mid_block.attentions.0", "mid.attn_1"),
        ("group_norm", "norm"),
        ("to_q", "q"),
        ("to_k", "k"),
        ("to_v", "v"),
        ("to_out.0", "proj_out"),
        ("downsamplers.0.conv", "downsample.conv"),
        ("upsamplers.0.conv", "upsample.conv"),
        ("resnets.", "block."),
        ("down_blocks.", "down."),
    ):
        name = name.replace(theirs, ours)
    return re.sub(r"up_blocks\.(\d)", lambda match: f"up.{3 - int(match[1])}", name)


def clip_to_ldm(name: str) -> str:
    """LDM name (without prefix) of a tensor of transformers' CLIPTextModel, 4.x or 5.x."""
    return name if name.startswith("text_model.") else f"text_model.{name}"


def _shapes(widths: Widths) -> Iterator[tuple[Literal["unet", "vae", "text"], str, torch.Size]]:
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    with torch.device("meta"):
        unet = UNet2DConditionModel(
            sample_size=64,
            block_out_channels=widths.unet_channels,
            cross_attention_dim=widths.text_width,
            attention_head_dim=8,
        )
        vae = AutoencoderKL(
            block_out_channels=widths.vae_channels,
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            layers_per_block=2,
            latent_channels=4,
            sample_size=512,
        )
        text = CLIPTextModel(
            CLIPTextConfig(
                hidden_size=widths.text_width,
                intermediate_size=widths.text_mlp_width,
                num_hidden_layers=widths.text_layers,
                num_attention_heads=widths.text_heads,
                vocab_size=49408,
                max_position_embeddings=77,
                hidden_act="quick_gelu",
            )
        )
    for name, tensor in unet.state_dict().items():
        yield "unet", name, tensor.shape
    for name, tensor in vae.state_dict().items():
        yield "vae", name, tensor.shape
    for name, tensor in text.state_dict().items():
        if not name.endswith("position_ids"):
            yield "text", name, tensor.shape


def draw(name: str, shape: torch.Size, layers: int, generator: torch.Generator) -> Tensor:
    """Unit gain for each layer; residual branches of the text encoder shrink with its depth, as in CLIP."""
    values: Tensor = torch.randn(shape, generator=generator)
    if len(shape) == 1:
        norm = "norm" in name and name.endswith("weight")
        return 1 + 0.05 * values if norm else 0.02 * values
    if "embedding.weight" in name:
        return values * (0.5 if "token" in name else 0.1)
    fan_in = shape[1:].numel()
    gain = 1.0
    if name.endswith(("self_attn.out_proj.weight", "mlp.fc2.weight")):
        gain = 1 / math.sqrt(2 * layers)
    if name.endswith("conv_out.weight"):
        gain = 0.5
    return values * (gain / math.sqrt(fan_in))


def calm_vae(name: str, values: Tensor) -> Tensor:
    """A VAE tensor as in files, its latents spread near 1/0.18215 with next to no variance of their own."""
    if name == "quant_conv.weight":
        values[:4] *= 5 / 0.6
        values[4:] = 0
    if name == "quant_conv.bias":
        values[4:] = -12.0
    return values[:, :, None, None] if ".attentions." in name and values.ndim == 2 else values


def ldm_tensors(
    widths: Widths = FULL, *, dtype: torch.dtype = torch.float16, seed: int = 7
) -> dict[str, Tensor]:
    """All tensors of the checkpoint by their LDM names."""
    generator = torch.Generator().manual_seed(seed)
    prefixes = {
        "unet": ("model.diffusion_model.", unet_to_ldm),
        "vae": ("first_stage_model.", vae_to_ldm),
        "text": ("cond_stage_model.transformer.", clip_to_ldm),
    }
    tensors: dict[str, Tensor] = {}
    for part, name, shape in _shapes(widths):
        values = draw(name, shape, widths.text_layers, generator)
        if part == "vae":
            values = calm_vae(name, values)
        prefix, rename = prefixes[part]
        key = prefix + rename(name)
        if key in tensors:
            raise KeyError(f"{key}: two tensors got this name")
        tensors[key] = values.to(dtype).contiguous()
    # What the original files carry besides weights; a loader has to ignore it.
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    tensors["betas"] = betas.float()
    tensors["alphas_cumprod"] = (1 - betas).cumprod(0).float()
    tensors["cond_stage_model.transformer.text_model.embeddings.position_ids"] = torch.arange(77)[None]
    return tensors


def write(path: Path, widths: Widths = FULL, *, dtype: torch.dtype = torch.float16, seed: int = 7) -> None:
    """Write the checkpoint beside its place and rename it there."""
    tensors = ldm_tensors(widths, dtype=dtype, seed=seed)
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(".partial")
    save_file(tensors, unfinished, metadata={"format": "pt"})
    unfinished.replace(path)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("path", type=Path)
    parser.add_argument("--size", choices=("full", "tiny"), default="full")
    parser.add_argument("--dtype", choices=("float16", "float32"), default="float16")
    parser.add_argument("--seed", type=int, default=7)
    args = parser.parse_args()
    widths = FULL if args.size == "full" else TINY
    write(args.path, widths, dtype=getattr(torch, args.dtype), seed=args.seed)
    print(json.dumps({"path": str(args.path), "size_bytes": args.path.stat().st_size}))


if __name__ == "__main__":
    main()
