"""Names of other programs: what a file does stays the same, and diffusers itself reads what is written."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.networks import small
from tests.tools.loras import delta64, pair, tensors, write
from trainer.errors import ModelFileError
from trainer.families.sdxl import kohya_name
from trainer.tools import _names
from trainer.tools.convert import convert

QUIET: dict[str, Any] = {"say": lambda _: None}

SDXL = {
    "lora_unet_input_blocks_4_1_transformer_blocks_0_attn2_to_k": (64, 2048),
    "lora_unet_input_blocks_3_0_op": (32, 32, 3, 3),
    "lora_unet_middle_block_1_proj_out": (64, 64),
    "lora_unet_output_blocks_5_2_conv": (64, 64, 3, 3),
    "lora_unet_output_blocks_3_0_skip_connection": (64, 96, 1, 1),
    "lora_te1_text_model_encoder_layers_0_self_attn_out_proj": (32, 32),
    "lora_te2_text_model_encoder_layers_1_mlp_fc1": (64, 32),
}
FLUX = {
    "lora_unet_double_blocks_0_img_attn_qkv": (96, 32),
    "lora_unet_double_blocks_0_txt_attn_qkv": (96, 32),
    "lora_unet_double_blocks_1_img_mod_lin": (192, 32),
    "lora_unet_double_blocks_1_txt_mlp_2": (32, 128),
    "lora_unet_single_blocks_3_linear1": (224, 32),
    "lora_unet_single_blocks_3_linear2": (32, 160),
    "lora_unet_single_blocks_0_modulation_lin": (96, 32),
}


def peft_delta(found: dict[str, Tensor], name: str) -> Tensor:
    """What a layer under a dotted name is changed by, float64."""
    down, up = found[f"{name}.lora_A.weight"].double(), found[f"{name}.lora_B.weight"].double()
    return up.flatten(1) @ down.flatten(1)


@pytest.mark.parametrize(("layers", "kind"), [(SDXL, "sdxl_base_v1-0"), (FLUX, "flux1")])
@pytest.mark.parametrize("to", ["diffusers", "bfl"])
def test_there_and_back(layers: dict[str, tuple[int, ...]], kind: str, to: Any, tmp_path: Path) -> None:
    file = write(tmp_path / "a.safetensors", layers, 8, 1.0, 4, {"ss_base_model_version": kind})
    out, back = tmp_path / "b.safetensors", tmp_path / "c.safetensors"
    if to == "bfl" and kind != "flux1":
        with pytest.raises(ModelFileError, match="Black Forest Labs"):
            convert(file, out, to, **QUIET)
        return
    convert(file, out, to, **QUIET)
    convert(out, back, "kohya", **QUIET)
    before, after = load_file(file), load_file(back)
    assert {key.partition(".")[0] for key in after} == set(layers)
    for stem in layers:
        torch.testing.assert_close(delta64(after, stem), delta64(before, stem), rtol=1e-5, atol=1e-6)
        assert after[f"{stem}.lora_down.weight"].shape == before[f"{stem}.lora_down.weight"].shape


def test_diffusers_reads_sdxl_as_its_own_conversion_does(tmp_path: Path) -> None:
    """The same layers and changes as diffusers makes of Kohya's file itself."""
    from diffusers.loaders.lora_conversion_utils import (
        _convert_non_diffusers_lora_to_diffusers,
        _maybe_map_sgm_blocks_to_diffusers,
    )

    class Config:
        layers_per_block = 2

    file = write(tmp_path / "a.safetensors", SDXL, 4, 2.0, 1)
    convert(file, tmp_path / "b.safetensors", "diffusers", **QUIET)
    mine = load_file(tmp_path / "b.safetensors")
    mapped = _maybe_map_sgm_blocks_to_diffusers(load_file(file), Config())
    theirs, alphas = _convert_non_diffusers_lora_to_diffusers(mapped)
    checked = 0
    for key in theirs:
        if ".down.weight" not in key:
            continue
        # Attention comes under the names of diffusers' old processors.
        stem = re.sub(r"(\.lora_linear_layer|\.lora|_lora)\.down\.weight$", "", key)
        old = stem
        stem = stem.replace(".processor.to_k", ".to_k").replace("self_attn.to_out", "self_attn.out_proj")
        down, up = theirs[key].double(), theirs[key.replace(".down.", ".up.")].double()
        scale = next(value for name, value in alphas.items() if name.startswith(old)) / len(down)
        torch.testing.assert_close(
            peft_delta(mine, stem), up.flatten(1) @ down.flatten(1) * scale, rtol=1e-5, atol=1e-6
        )
        checked += 1
    assert checked == len(SDXL) == len(mine) / 2


def test_diffusers_reads_flux_as_its_own_conversion_does(tmp_path: Path) -> None:
    from diffusers.loaders.lora_conversion_utils import _convert_kohya_flux_lora_to_diffusers

    width = 3072  # diffusers' conversion knows FLUX.1's rows alone
    layers = {
        "lora_unet_double_blocks_0_img_attn_qkv": (3 * width, width),
        "lora_unet_double_blocks_0_img_attn_proj": (width, width),
        "lora_unet_single_blocks_3_linear1": (7 * width, width),
        "lora_unet_single_blocks_3_linear2": (width, 5 * width),
    }
    file = write(tmp_path / "a.safetensors", layers, 4, 2.0, 1)
    convert(file, tmp_path / "b.safetensors", "diffusers", **QUIET)
    mine, theirs = (
        load_file(tmp_path / "b.safetensors"),
        _convert_kohya_flux_lora_to_diffusers(load_file(file)),
    )
    assert set(mine) == set(theirs)
    for key in mine:
        if key.endswith("lora_A.weight"):
            name = key.removesuffix(".lora_A.weight")
            rows = slice(0, 50)  # enough to tell one part from another
            mine_rows = mine[f"{name}.lora_B.weight"][rows] @ mine[key]
            torch.testing.assert_close(
                mine_rows, theirs[f"{name}.lora_B.weight"][rows] @ theirs[key], rtol=1e-4, atol=1e-5
            )


def test_parts_with_ranks_and_alphas_of_their_own_are_joined(tmp_path: Path) -> None:
    start = "transformer.single_transformer_blocks.0"
    found: dict[str, Tensor] = {}
    expected = []
    for index, (part, rows, rank) in enumerate(
        (("attn.to_q", 32, 2), ("attn.to_v", 32, 3), ("proj_mlp", 128, 4))
    ):
        made = pair((rows, 32), rank, 1.5, index)
        found[f"{start}.{part}.lora_A.weight"], found[f"{start}.{part}.lora_B.weight"] = made.down, made.up
        found[f"{start}.{part}.alpha"] = torch.tensor(1.5)
        expected.append(made.delta())
    save_file(found, tmp_path / "a.safetensors")
    convert(tmp_path / "a.safetensors", tmp_path / "b.safetensors", "kohya", **QUIET)
    whole = torch.cat([expected[0], torch.zeros(32, 32), expected[1], expected[2]])
    made64 = delta64(load_file(tmp_path / "b.safetensors"), "lora_unet_single_blocks_0_linear1")
    torch.testing.assert_close(made64, whole.double(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("version", [1, 2])
def test_every_layer_of_a_family_finds_its_way(version: Any) -> None:
    family = small.family(version=version)
    kind: _names.Kind = "sd1" if version == 1 else "sd2"
    for target in family.targets():
        if target.part != "unet" and "self_attn" not in target.name and "mlp" not in target.name:
            continue
        (dotted,) = _names.from_kohya(target.name, kind, "diffusers")
        assert _names.to_kohya(dotted, kind) == (target.name, None)
        model = family.unet if target.part == "unet" else family.text_encoders[target.part]
        path = dotted.partition(".")[2]
        if target.part != "unet":
            path = path.removeprefix("text_model.")
        assert model.get_submodule(path) is target.module


def test_every_layer_of_sdxl_finds_its_way() -> None:
    from tests import tiny

    unet = tiny.sdxl_models()["unet"]
    count = 0
    for path, module in unet.named_modules():
        if isinstance(module, (torch.nn.Linear, torch.nn.Conv2d)) and "_block" in path:
            name = f"lora_unet_{kohya_name(path)}"
            assert _names.from_kohya(name, "sdxl", "diffusers") == (f"unet.{path}",)
            assert _names.to_kohya(f"unet.{path}", "sdxl") == (name, None)
            assert _names.to_kohya("lora_unet_" + path.replace(".", "_"), "sdxl") == (name, None)
            count += 1
    assert count > 100


def test_families_are_told_from_names_and_widths() -> None:
    key = "lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_attn2_to_k"
    assert _names.kind_of([key], {key: 768}, {}) == "sd1"
    assert _names.kind_of([key], {key: 1024}, {}) == "sd2"
    assert _names.kind_of([key], {key: 2048}, {}) == "sdxl"
    assert _names.kind_of([key], {key: 32}, {"ss_base_model_version": "sd_v2_v"}) == "sd2"
    assert _names.kind_of(["lora_te1_x", "lora_te2_x"], {}, {}) == "sdxl"
    assert _names.kind_of(["diffusion_model.double_blocks.0.img_mlp.0"], {}, {}) == "flux"
    with pytest.raises(ModelFileError, match="no model family"):
        _names.kind_of(["blocks.0.attn"], {}, {})


def test_scale_goes_into_the_weights_without_loss(tmp_path: Path) -> None:
    stem, name = "lora_unet_double_blocks_0_img_attn_proj", "diffusion_model.double_blocks.0.img_attn.proj"
    found = {key: value.half() for key, value in tensors({stem: (32, 32)}, 16, 1.0, 2).items()}
    save_file(found, tmp_path / "a.safetensors")
    convert(tmp_path / "a.safetensors", tmp_path / "b.safetensors", "bfl", **QUIET)
    made = load_file(tmp_path / "b.safetensors")
    # 1/16 = 1/4 * 1/4: powers of two change no digit.
    assert torch.equal(made[f"{name}.lora_A.weight"], found[f"{stem}.lora_down.weight"] / 4)
    assert torch.equal(made[f"{name}.lora_B.weight"], found[f"{stem}.lora_up.weight"] / 4)
