"""The checkpoint that the comparisons use has the layout of the real one."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from tests.parity.make_sd15 import (
    FULL,
    TINY,
    _shapes,
    clip_to_ldm,
    ldm_tensors,
    unet_to_ldm,
    vae_to_ldm,
    write,
)

# From the published v1-5 checkpoint: a few names in each part, where the rules are least regular.
REAL_NAMES = {
    "model.diffusion_model.input_blocks.3.0.op.weight": (320, 320, 3, 3),
    "model.diffusion_model.input_blocks.4.0.skip_connection.weight": (640, 320, 1, 1),
    "model.diffusion_model.middle_block.1.transformer_blocks.0.attn2.to_k.weight": (1280, 768),
    "model.diffusion_model.output_blocks.2.1.conv.weight": (1280, 1280, 3, 3),
    "model.diffusion_model.output_blocks.5.2.conv.weight": (1280, 1280, 3, 3),
    "model.diffusion_model.output_blocks.11.0.in_layers.2.weight": (320, 640, 3, 3),
    "first_stage_model.encoder.mid.attn_1.q.weight": (512, 512, 1, 1),
    "first_stage_model.decoder.up.3.upsample.conv.weight": (512, 512, 3, 3),
    "first_stage_model.decoder.up.0.block.0.nin_shortcut.weight": (128, 256, 1, 1),
    "first_stage_model.quant_conv.weight": (8, 8, 1, 1),
    "cond_stage_model.transformer.text_model.embeddings.token_embedding.weight": (49408, 768),
    "cond_stage_model.transformer.text_model.encoder.layers.11.mlp.fc1.weight": (3072, 768),
    "cond_stage_model.transformer.text_model.final_layer_norm.bias": (768,),
}


def test_full_size_layout() -> None:
    rename = {"unet": unet_to_ldm, "vae": vae_to_ldm, "text": clip_to_ldm}
    prefix = {
        "unet": "model.diffusion_model.",
        "vae": "first_stage_model.",
        "text": "cond_stage_model.transformer.",
    }
    found = {prefix[part] + rename[part](name): tuple(shape) for part, name, shape in _shapes(FULL)}
    # 686 + 248 + 196 tensors, position ids apart.
    assert len(found) == 1130
    attention = "first_stage_model.encoder.mid.attn_1.q.weight"
    assert found.pop(attention) == REAL_NAMES[attention][:2]  # the writer adds the two axes
    expected = {name: shape for name, shape in REAL_NAMES.items() if name != attention}
    assert {name: found[name] for name in expected} == expected


def test_tiny_file_loads_through_diffusers_converters(tmp_path: Path) -> None:
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint, convert_ldm_vae_checkpoint

    unet = UNet2DConditionModel(
        block_out_channels=TINY.unet_channels, cross_attention_dim=TINY.text_width, attention_head_dim=8
    )
    vae = AutoencoderKL(
        block_out_channels=TINY.vae_channels,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=2,
    )
    path = tmp_path / "tiny.safetensors"
    write(path, TINY)
    with safe_open(path, framework="pt") as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    unet.load_state_dict(convert_ldm_unet_checkpoint(dict(tensors), dict(unet.config)), strict=True)
    vae.load_state_dict(convert_ldm_vae_checkpoint(dict(tensors), dict(vae.config)), strict=True)
    assert not list(tmp_path.glob("*.partial"))

    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        latents = vae.encode(torch.rand(1, 3, 64, 64, generator=generator) * 2 - 1).latent_dist
        context = torch.randn(1, 77, TINY.text_width, generator=generator)
        prediction = unet(torch.randn(1, 4, 8, 8, generator=generator), 500, context).sample
    assert latents.std.max() < 0.01
    assert 1 < latents.mean.std() < 20
    assert 0.2 < prediction.std() < 1


def test_same_seed_same_weights() -> None:
    first, again, other = (ldm_tensors(TINY, seed=seed) for seed in (1, 1, 2))
    key = "model.diffusion_model.out.2.weight"
    assert torch.equal(first[key], again[key])
    assert not torch.equal(first[key], other[key])


def test_unknown_name_is_refused() -> None:
    with pytest.raises(KeyError, match="new_block"):
        unet_to_ldm("new_block.0.weight")
