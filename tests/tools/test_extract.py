"""Extracting: what two models differ by comes back, at its rank, under the names that sd-scripts gives."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from tests import tiny, tiny_flux
from tests.networks import small
from tests.tools.loras import delta64, pair
from trainer.errors import ModelFileError
from trainer.lora_file import read_lora
from trainer.tools.extract import extract, top_pair

QUIET: dict[str, Any] = {"say": lambda _: None}


def test_the_difference_of_two_models_comes_back(tmp_path: Path) -> None:
    model = tiny.sd15_file(tmp_path / "a.safetensors")
    tensors = load_file(model)
    changed = {
        "lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_attn1_to_q": (
            "model.diffusion_model.input_blocks.4.1.transformer_blocks.0.attn1.to_q.weight"
        ),
        "lora_unet_mid_block_resnets_0_conv1": "model.diffusion_model.middle_block.0.in_layers.2.weight",
        "lora_te_text_model_encoder_layers_0_mlp_fc2": (
            "cond_stage_model.transformer.text_model.encoder.layers.0.mlp.fc2.weight"
        ),
    }
    for index, key in enumerate(changed.values()):
        tensors[key] = tensors[key] + 0.1 * pair(tensors[key].shape, 2, 2.0, index).delta().reshape(
            tensors[key].shape
        )
    save_file(tensors, tmp_path / "b.safetensors")
    out = tmp_path / "out.safetensors"
    extract(
        model, tmp_path / "b.safetensors", out, 4, conv_rank=3, clamp_quantile=1.0, precision="float", **QUIET
    )
    made, first = load_file(out), load_file(model)
    for stem, key in changed.items():
        whole = (tensors[key].double() - first[key].double()).flatten(1).numpy()
        # Of rank 2, so all of it is there; the clamp at the largest positive value may cut negative ones.
        error = np.linalg.norm(delta64(made, stem).numpy() - whole) / np.linalg.norm(whole)
        assert error < 0.2
    # The layers are those of a network with convolutions on this model, as sd-scripts makes it.
    names = {key.partition(".")[0] for key in made}
    assert names == {target.name for target in small.family().targets()}
    assert made["lora_unet_mid_block_resnets_0_conv1.lora_down.weight"].shape[0] == 3
    metadata = read_lora(out).metadata
    assert metadata["ss_network_args"] == '{"conv_dim": "3", "conv_alpha": "3.0"}'
    # Text encoders that are the same are left out, and so are convolutions without a rank for them.
    tensors[changed["lora_te_text_model_encoder_layers_0_mlp_fc2"]] = first[
        changed["lora_te_text_model_encoder_layers_0_mlp_fc2"]
    ]
    save_file(tensors, tmp_path / "c.safetensors")
    extract(model, tmp_path / "c.safetensors", out, 4, **QUIET)
    names = {key.partition(".")[0] for key in load_file(out)}
    expected = {t.name for t in small.family().targets() if t.part == "unet" and not t.conv_group}
    assert names == expected


def test_flux_and_sdxl_layers(tmp_path: Path) -> None:
    files = tiny_flux.files(tmp_path / "m")
    model = files["pretrained_model_name_or_path"]
    tensors = load_file(model)
    tensors["double_blocks.0.img_attn.qkv.weight"] += 0.01
    save_file(tensors, tmp_path / "b.safetensors")
    out = tmp_path / "out.safetensors"
    extract(model, tmp_path / "b.safetensors", out, 2, **QUIET)
    names = {key.partition(".")[0] for key in load_file(out)}
    assert len(names) == 2 * 10 + 2 * 3
    assert "lora_unet_single_blocks_1_modulation_lin" in names
    assert "lora_unet_img_in" not in names
    sdxl = tiny.sdxl_file(tmp_path / "x.safetensors")
    with pytest.raises(ModelFileError, match="take two of a kind"):
        extract(model, sdxl, out, 2, **QUIET)


@pytest.mark.parametrize("shape", [(1400, 1300), (1300, 1500)])
def test_wide_layers_take_the_largest_singular_vectors(shape: tuple[int, int]) -> None:
    whole = pair(shape, 6, 6.0, 3).delta() + 0.01 * torch.randn(
        shape, generator=torch.Generator().manual_seed(0)
    )
    found = top_pair(whole, 3, 1.0)
    u, s, v = torch.svd_lowrank(whole.double(), q=12, niter=6)
    best = (u[:, :3] * s[:3]) @ v[:, :3].T
    # A clamp at the largest value may touch the few below its negative.
    error = float((found.delta().double() - best).norm() / best.norm())
    assert error < 0.1
