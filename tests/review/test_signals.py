"""Signals without a model: against dense formulas, and pictures whose figures are known."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image, ImageFilter

from tests.tools.loras import SD1, pair
from trainer.review import signals
from trainer.tools._lora import Pair


def test_norms_and_stable_ranks_are_those_of_the_products() -> None:
    pairs = {stem: pair(shape, 6, 3.0, index) for index, (stem, shape) in enumerate(SD1.items())}
    found = signals.weight_figures(pairs)
    dense = {stem: each.delta().double().numpy() for stem, each in pairs.items()}
    norms = {stem: np.linalg.norm(matrix) for stem, matrix in dense.items()}
    ranks = [np.linalg.norm(m) ** 2 / np.linalg.norm(m, 2) ** 2 for m in dense.values()]
    assert found.norm == pytest.approx(np.sqrt(sum(norm**2 for norm in norms.values())), rel=1e-5)
    assert found.stable_rank == pytest.approx(np.mean(ranks), rel=1e-5)
    assert set(found.blocks) == {"text encoder", "down 0", "down 1"}
    down = [norm for stem, norm in norms.items() if "down_blocks_0" in stem]
    assert found.blocks["down 0"] == pytest.approx(np.linalg.norm(down), rel=1e-5)
    in_down = [rank for stem, rank in zip(dense, ranks, strict=True) if "down_blocks_0" in stem]
    assert found.ranks["down 0"] == pytest.approx(np.mean(in_down), rel=1e-5)


def test_an_untouched_layer_counts_as_nothing() -> None:
    untouched = Pair(torch.randn(4, 8), torch.zeros(8, 4), 4.0)
    assert signals.sizes_of_layer(untouched) == (0.0, 0.0)
    assert signals.weight_figures({"lora_unet_mid_block_x": untouched}).stable_rank == 0.0


@pytest.mark.parametrize(
    ("stem", "block"),
    [
        ("lora_te1_text_model_encoder_layers_0_mlp_fc1", "text encoder"),
        ("lora_unet_up_blocks_1_attentions_0_proj_in", "up 1"),
        ("lora_unet_input_blocks_8_1_proj_in", "input 8"),
        ("lora_unet_middle_block_1_proj_in", "middle"),
        ("lora_unet_single_blocks_12_linear1", "single 12"),
        ("lora_unet_txt_in", "input layers"),
    ],
)
def test_blocks_have_names(stem: str, block: str) -> None:
    assert signals.block_of(stem) == block


def picture(seed: int = 0, size: int = 256) -> Image.Image:
    """Soft shapes in muted colours, with a fine pattern over them."""
    rng = np.random.default_rng(seed)
    small = rng.integers(70, 180, (16, 16, 3), dtype=np.uint8)
    soft = np.asarray(Image.fromarray(small).resize((256, 256), Image.Resampling.BICUBIC), dtype=np.int16)
    fine = rng.integers(-12, 13, (128, 128, 1)).repeat(2, 0).repeat(2, 1)
    return Image.fromarray((soft + fine).clip(0, 255).astype(np.uint8)).resize(
        (size, size), Image.Resampling.BICUBIC
    )


def test_figures_of_plain_pictures() -> None:
    red = signals.picture_figures([Image.new("RGB", (64, 64), (200, 100, 100))])
    assert red.saturation == pytest.approx(0.5)
    assert (red.contrast, red.clipped, red.detail) == pytest.approx((0, 0, 0), abs=1e-4)
    black_and_white = Image.fromarray(
        np.repeat([[[0] * 3], [[255] * 3]], 128, 0).astype(np.uint8).repeat(256, 1)
    )
    burnt = signals.picture_figures([black_and_white])
    assert burnt.clipped == pytest.approx(1.0)
    assert burnt.contrast == pytest.approx(0.5, rel=1e-3)


def test_clay_grain_and_glare_are_seen() -> None:
    usual = signals.picture_figures([picture()])
    clay = signals.picture_figures([picture().filter(ImageFilter.GaussianBlur(8))]).against(usual)
    assert clay["detail"] < -0.5
    pixels = np.asarray(picture()).astype(np.int16)
    grain = np.random.default_rng(1).integers(-40, 40, pixels.shape)
    grainy = Image.fromarray((pixels + grain).clip(0, 255).astype(np.uint8))
    assert signals.picture_figures([grainy]).against(usual)["detail"] > 1
    glaring = Image.fromarray(((pixels - 125) * 3 + 125).clip(0, 255).astype(np.uint8))
    found = signals.picture_figures([glaring]).against(usual)
    assert found["contrast"] > 0.5
    assert found["saturation"] > 0.5
    assert found["clipped"] > 1
    # Another size of the same picture has the same figures.
    assert signals.picture_figures([picture(size=512)]).against(usual)["contrast"] == pytest.approx(
        0, abs=0.02
    )


def test_copies_and_likeness_are_seen() -> None:
    training = [picture(seed) for seed in range(6)]
    assert signals.nearest([picture(2)], training) == pytest.approx(0, abs=1e-6)
    assert signals.nearest([picture(99)], training) == pytest.approx(1, abs=0.15)
    assert signals.diversity([picture(1), picture(1)]) == pytest.approx(0, abs=1e-6)
    assert signals.diversity([picture(1), picture(2)]) > 0.1
