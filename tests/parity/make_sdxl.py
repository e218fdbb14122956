"""Write a checkpoint in SDXL's single-file (SGM) layout with seeded random weights.

    python tests/parity/make_sdxl.py sdxl.safetensors [--depth 1] [--text-layers 4]

All widths are SDXL's. By default the UNet has one transformer layer where SDXL has two or ten, and
the second text encoder 4 layers where SDXL has 32, so that both programs train it in full precision
on a small machine; with ``--depth 10 --text-layers 32`` it is whole (7 GB). ``text_projection`` is
symmetric: sd-scripts takes it transposed, and so it does not matter (engine facts 4.3).
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tests.parity.make_sd15 import calm_vae, draw, unet_to_ldm, vae_to_ldm

__all__ = ["open_clip_tensors", "sgm_tensors"]

TEXT_LAYERS_1 = 12
OPEN_CLIP = {
    "self_attn.out_proj": "attn.out_proj",
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
}


def open_clip_tensors(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """OpenCLIP's names for the tensors of CLIPTextModelWithProjection."""
    found = {
        "positional_embedding": state["text_model.embeddings.position_embedding.weight"],
        "token_embedding.weight": state["text_model.embeddings.token_embedding.weight"],
        "ln_final.weight": state["text_model.final_layer_norm.weight"],
        "ln_final.bias": state["text_model.final_layer_norm.bias"],
        "text_projection": state["text_projection.weight"].T.contiguous(),
        "logit_scale": torch.tensor(4.6),
    }
    layers = {int(name.split(".")[3]) for name in state if ".layers." in name}
    for layer in layers:
        old, new = f"text_model.encoder.layers.{layer}", f"transformer.resblocks.{layer}"
        for end in ("weight", "bias"):
            rows = [state[f"{old}.self_attn.{part}_proj.{end}"] for part in "qkv"]
            found[f"{new}.attn.in_proj_{end}"] = torch.cat(rows)
            for theirs, ours in OPEN_CLIP.items():
                found[f"{new}.{ours}.{end}"] = state[f"{old}.{theirs}.{end}"]
    return found


def sgm_tensors(
    depth: int, text_layers: int, *, dtype: torch.dtype = torch.float16, seed: int = 9
) -> dict[str, Tensor]:
    """All tensors of the checkpoint by their SGM names."""
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    with torch.device("meta"):
        unet = UNet2DConditionModel(
            block_out_channels=(320, 640, 1280),
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            transformer_layers_per_block=(1, min(depth, 2), depth),
            cross_attention_dim=2048,
            attention_head_dim=(5, 10, 20),
            use_linear_projection=True,
            addition_embed_type="text_time",
            addition_time_embed_dim=256,
            projection_class_embeddings_input_dim=2816,
        )
        vae = AutoencoderKL(
            block_out_channels=(128, 256, 512, 512),
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            layers_per_block=2,
        )
        one = CLIPTextModel(
            CLIPTextConfig(
                hidden_size=768,
                intermediate_size=3072,
                num_hidden_layers=TEXT_LAYERS_1,
                num_attention_heads=12,
            )
        )
        two = CLIPTextModelWithProjection(
            CLIPTextConfig(
                hidden_size=1280,
                intermediate_size=5120,
                num_hidden_layers=text_layers,
                num_attention_heads=20,
                projection_dim=1280,
            )
        )
    generator = torch.Generator().manual_seed(seed)

    def drawn(model: torch.nn.Module, layers: int = 1) -> Iterator[tuple[str, Tensor]]:
        for name, value in model.state_dict().items():
            if not name.endswith("position_ids"):
                yield name, draw(name, value.shape, layers, generator)

    # One at a time, since a whole UNet in full precision takes 10 GB.
    tensors = {
        f"model.diffusion_model.{unet_to_ldm(name, 3)}": value.to(dtype) for name, value in drawn(unet)
    }
    tensors |= {f"first_stage_model.{vae_to_ldm(name)}": calm_vae(name, value) for name, value in drawn(vae)}
    start = "conditioner.embedders.0.transformer.text_model."
    tensors |= {start + name.removeprefix("text_model."): value for name, value in drawn(one, TEXT_LAYERS_1)}
    state = dict(drawn(two, text_layers))
    projection = state["text_projection.weight"]
    state["text_projection.weight"] = (projection + projection.T) / 2**0.5
    tensors |= {
        f"conditioner.embedders.1.model.{name}": value for name, value in open_clip_tensors(state).items()
    }
    return {name: value.to(dtype).contiguous() for name, value in tensors.items()}


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("path", type=Path)
    parser.add_argument("--depth", type=int, default=1)
    parser.add_argument("--text-layers", type=int, default=4)
    parser.add_argument("--seed", type=int, default=9)
    args = parser.parse_args()
    tensors = sgm_tensors(args.depth, args.text_layers, seed=args.seed)
    unfinished = args.path.with_suffix(".partial")
    save_file(tensors, unfinished, metadata={"format": "pt"})
    unfinished.replace(args.path)
    print(json.dumps({"path": str(args.path), "size_bytes": args.path.stat().st_size}))


if __name__ == "__main__":
    main()
