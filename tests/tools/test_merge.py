"""Merging: against the formulas in float64, and against figures that sd-scripts' own tools gave."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from tests import tiny, tiny_flux
from tests.tools.loras import SD1, delta64, pair, tensors, write
from trainer.errors import ConfigError, ModelFileError
from trainer.lora_file import read_lora
from trainer.tools.merge import clamped, merge, merge_into

KEY = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_k"


def quiet(_: str) -> None:
    """Takes what a tool says."""


@pytest.fixture
def two(tmp_path: Path) -> list[Path]:
    """LoRAs of other ranks and alphas; the second lacks a layer, and says nothing of its alpha."""
    fewer = dict(list(SD1.items())[1:])
    first = write(
        tmp_path / "a.safetensors", SD1, 8, 4.0, 1, {"ss_base_model_version": "sd_v1", "ss_v2": "False"}
    )
    return [first, write(tmp_path / "b.safetensors", fewer, 4, None, 2)]


def test_exact_is_the_sum_of_the_changes(two: list[Path], tmp_path: Path) -> None:
    out = merge(two, [0.7, -1.5], tmp_path / "out.safetensors", say=quiet)
    made, a, b = load_file(out), load_file(two[0]), load_file(two[1])
    for stem in SD1:
        expected = 0.7 * delta64(a, stem)
        if f"{stem}.alpha" in a and f"{stem}.lora_up.weight" in b:
            expected = expected - 1.5 * delta64(b, stem)
        torch.testing.assert_close(delta64(made, stem), expected, rtol=1e-5, atol=1e-6)
        assert made[f"{stem}.lora_down.weight"].shape[1:] == SD1[stem][1:]
    metadata = read_lora(out).metadata
    assert metadata["ss_base_model_version"] == "sd_v1"
    assert metadata["ss_network_dim"] == "Dynamic"  # 12, and 8 where only one file has the layer
    assert metadata["modelspec.merged_from"] == "a, b"
    assert len(metadata["sshs_model_hash"]) == 64


def test_svd_is_the_nearest_of_the_rank(two: list[Path], tmp_path: Path) -> None:
    out = merge(two, [1.0, 0.5], tmp_path / "out.safetensors", method="svd", rank=3, conv_rank=5, say=quiet)
    made, a, b = load_file(out), load_file(two[0]), load_file(two[1])
    for stem in list(SD1)[1:]:
        whole = (delta64(a, stem) + 0.5 * delta64(b, stem)).numpy()
        u, s, vh = np.linalg.svd(whole, full_matrices=False)
        rank = 5 if "conv1" in stem else 3
        up, down = u[:, :rank] * s[:rank], vh[:rank]
        # Clamped like svd_merge_lora.py; which signs a decomposition gives is free.
        limit = np.quantile(np.abs(np.concatenate([up.ravel(), down.ravel()])), 0.99)
        mine = made[f"{stem}.lora_up.weight"].flatten(1), made[f"{stem}.lora_down.weight"].flatten(1)
        assert mine[1].shape[0] == rank
        assert float(mine[0].abs().max()) <= limit * (1 + 1e-5)
        kept = np.linalg.norm(delta64(made, stem).numpy() - whole) / np.linalg.norm(whole)
        best = np.sqrt((s[rank:] ** 2).sum() / (s**2).sum())
        assert best - 1e-6 <= kept < best + 0.25  # clamping costs a little


def test_sum_and_concat_scale_factors_as_sdscripts(tmp_path: Path) -> None:
    a = write(tmp_path / "a.safetensors", SD1, 4, 4.0, 1)
    b = write(tmp_path / "b.safetensors", SD1, 4, 1.0, 2)
    one, two = load_file(a), load_file(b)
    for method in ("sum", "concat"):
        made = load_file(
            merge([a, b], [0.5, -0.8], tmp_path / f"{method}.safetensors", method=method, say=quiet)
        )
        root = (1.0 / 4.0) ** 0.5
        for stem in SD1:
            parts = {
                "up": (one[f"{stem}.lora_up.weight"] * 0.5, two[f"{stem}.lora_up.weight"] * (root * 0.8)),
                "down": (
                    one[f"{stem}.lora_down.weight"] * 0.5,
                    two[f"{stem}.lora_down.weight"] * (root * -0.8),
                ),
            }
            for side, (x, y) in parts.items():
                expected = x + y if method == "sum" else torch.cat([x, y], dim=1 if side == "up" else 0)
                torch.testing.assert_close(made[f"{stem}.lora_{side}.weight"], expected)
            assert float(made[f"{stem}.alpha"]) == 4.0


def test_shuffle_keeps_what_it_does(two: list[Path], tmp_path: Path) -> None:
    torch.manual_seed(3)
    out = load_file(merge(two[:1], [1.0], tmp_path / "out.safetensors", shuffle=True, say=quiet))
    before = load_file(two[0])
    torch.testing.assert_close(delta64(out, KEY), delta64(before, KEY), rtol=1e-5, atol=1e-6)
    assert not torch.equal(out[f"{KEY}.lora_down.weight"], before[f"{KEY}.lora_down.weight"])


def test_clamped_takes_the_quantile_of_both() -> None:
    made = pair((40, 30), 5, 5.0, 0)
    up, down = clamped(made.up, made.down, 0.9)
    limit = np.quantile(np.concatenate([made.up.numpy().ravel(), made.down.numpy().ravel()]), 0.9)
    assert float(up.abs().max()) == pytest.approx(limit, rel=1e-6)
    inside = made.down.abs() < limit
    torch.testing.assert_close(down[inside], made.down[inside], rtol=0, atol=0)


def test_what_does_not_go_together_is_refused(two: list[Path], tmp_path: Path) -> None:
    with pytest.raises(ModelFileError, match="rank 8 in one file and 4"):
        merge(two, [1, 1], tmp_path / "out.safetensors", method="sum", say=quiet)
    with pytest.raises(ConfigError, match="one ratio for each"):
        merge(two, [1], tmp_path / "out.safetensors", say=quiet)
    with pytest.raises(ConfigError, match="another name"):
        merge(two, [1, 1], two[0], say=quiet)
    with pytest.raises(ConfigError, match="ending"):
        merge(two, [1, 1], tmp_path / "out.ckpt", say=quiet)
    flux = write(tmp_path / "f.safetensors", {"lora_unet_double_blocks_0_img_attn_proj": (64, 64)}, 2, 2)
    with pytest.raises(ModelFileError, match="one model family"):
        merge([two[0], flux], [1, 1], tmp_path / "out.safetensors", say=quiet)
    save_file({"x.lokr_w1": torch.zeros(2)}, tmp_path / "k.safetensors")
    with pytest.raises(ModelFileError, match="LoKr"):
        merge([tmp_path / "k.safetensors"], [1], tmp_path / "out.safetensors", say=quiet)
    assert not (tmp_path / "out.safetensors").exists()


PLACES: dict[str, dict[str, tuple[str, slice | None]]] = {
    "sd15": {
        "lora_unet_mid_block_attentions_0_proj_in": (
            "model.diffusion_model.middle_block.1.proj_in.weight",
            None,
        ),
        "lora_unet_up_blocks_1_resnets_2_conv1": (
            "model.diffusion_model.output_blocks.5.0.in_layers.2.weight",
            None,
        ),
        "lora_te_text_model_encoder_layers_1_mlp_fc1": (
            "cond_stage_model.transformer.text_model.encoder.layers.1.mlp.fc1.weight",
            None,
        ),
    },
    "sdxl": {
        "lora_unet_input_blocks_4_1_transformer_blocks_0_attn2_to_k": (
            "model.diffusion_model.input_blocks.4.1.transformer_blocks.0.attn2.to_k.weight",
            None,
        ),
        "lora_te2_text_model_encoder_layers_1_self_attn_k_proj": (
            "conditioner.embedders.1.model.transformer.resblocks.1.attn.in_proj_weight",
            slice(64, 128),  # q, k, v, 64 rows each
        ),
    },
    "flux": {
        "lora_unet_double_blocks_1_img_attn_qkv": ("double_blocks.1.img_attn.qkv.weight", None),
        "lora_unet_single_blocks_0_linear1": ("single_blocks.0.linear1.weight", None),
    },
}


@pytest.mark.parametrize("family", PLACES)
def test_merge_into_changes_the_named_weights_alone(family: str, tmp_path: Path) -> None:
    if family == "flux":
        model = tiny_flux.files(tmp_path / "m", dtype=torch.bfloat16)["pretrained_model_name_or_path"]
    else:
        maker = tiny.sd15_file if family == "sd15" else tiny.sdxl_file
        model = maker(tmp_path / "model.safetensors", dtype=torch.float16)
    before = load_file(model)
    layers = {}
    for stem, (key, rows) in PLACES[family].items():
        shape = before[key][rows].shape if rows else before[key].shape
        layers[stem] = tuple(shape)
    kind = {"sd15": "sd_v1", "sdxl": "sdxl_base_v1-0", "flux": "flux1"}[family]
    lora = write(tmp_path / "l.safetensors", layers, 4, 2.0, 5, {"ss_base_model_version": kind})
    out = merge_into(model, [lora], [0.5], tmp_path / "out.safetensors", precision="float", say=quiet)
    after, changes = load_file(out), load_file(lora)
    expected = {key: value.double() for key, value in before.items()}
    for stem, (key, rows) in PLACES[family].items():
        place = expected[key][rows] if rows else expected[key]
        place += 0.5 * delta64(changes, stem).reshape(place.shape)
    assert after.keys() == before.keys()
    for key, value in expected.items():
        torch.testing.assert_close(after[key].double(), value, rtol=1e-6, atol=1e-6)
    with safe_open(out, framework="pt") as file:
        assert file.metadata()["modelspec.merged_from"] == f"{model.stem}, l"
    # Without a precision, every tensor keeps its own.
    same = load_file(merge_into(model, [lora], [0.0], tmp_path / "same.safetensors", say=quiet))
    assert all(
        torch.equal(same[key], value) and same[key].dtype == value.dtype for key, value in before.items()
    )


def test_merge_into_says_what_does_not_fit(tmp_path: Path) -> None:
    files = tiny_flux.files(tmp_path / "m")
    said: list[str] = []
    layers = {
        "lora_te1_text_model_encoder_layers_0_mlp_fc1": (64, 32),
        "lora_unet_double_blocks_0_img_attn_proj": (64, 64),
    }
    lora = write(tmp_path / "l.safetensors", layers, 2, 2.0, 0, {"ss_base_model_version": "flux1"})
    out = tmp_path / "clip.safetensors"
    merge_into(files["clip_l"], [lora], [1.0], out, say=said.append)
    assert any("1 layers are not in clip_l.safetensors" in line for line in said)
    key = "text_model.encoder.layers.0.mlp.fc1.weight"
    change = load_file(out)[key] - load_file(files["clip_l"])[key]
    torch.testing.assert_close(
        change.double(), delta64(tensors(layers, 2, 2.0), next(iter(layers))), rtol=1e-4, atol=1e-5
    )
    sd = write(tmp_path / "sd.safetensors", SD1, 2, 2.0)
    with pytest.raises(ModelFileError, match="is for sd1 models"):
        merge_into(files["clip_l"], [sd], [1.0], tmp_path / "no.safetensors", say=quiet)
