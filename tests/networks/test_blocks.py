"""Block lists and learning-rate curves against numbers worked out by hand."""

from __future__ import annotations

import math

import pytest

from trainer.errors import ConfigError
from trainer.networks._blocks import block_ranks, lr_weights

SD = (0, 12, 1, 12, 0)
SDXL = (1, 9, 3, 9, 1)


def weights(counts: tuple[int, int, int, int, int] = SD, **args: str) -> list[float]:
    found = lr_weights(args, counts)
    assert found is not None
    return found


def test_no_weights_is_none() -> None:
    assert lr_weights({"block_dims": "1"}, SD) is None


@pytest.mark.parametrize(
    ("curve", "first", "middle", "last"),
    [
        ("sine", 0.0, math.sin(math.pi / 4), 1.0),
        ("cosine", 1.0, math.cos(math.pi / 4), 0.0),
        ("linear", 0.0, 0.5, 1.0),
        ("reverse_linear", 1.0, 0.5, 0.0),
        ("zeros", 0.0, 0.0, 0.0),
    ],
)
def test_curves(curve: str, first: float, middle: float, last: float) -> None:
    # SDXL has an odd number of blocks each way, so the middle entry lies in the middle of the curve.
    plain = weights(SDXL, down_lr_weight=curve)[1:10]
    assert plain[0] == pytest.approx(first)
    assert plain[4] == pytest.approx(middle)
    assert plain[-1] == pytest.approx(last)
    raised = weights(SDXL, up_lr_weight=f"{curve}+0.25")[13:22]
    assert raised == pytest.approx([weight + 0.25 for weight in plain])


def test_all_twelve_points_of_a_sine() -> None:
    # math.sin(math.pi * (i / 11) / 2), to six places from a table.
    expected = [0.0, 0.142315, 0.281733, 0.415415, 0.540641, 0.654861]
    assert weights(down_lr_weight="sine")[:6] == pytest.approx(expected, abs=1e-6)


def test_lists_are_filled_with_one_and_cut() -> None:
    found = weights(down_lr_weight="0.5,0.25", mid_lr_weight="2,3,4", up_lr_weight=",".join(["0.1"] * 20))
    assert found == [0.5, 0.25, *[1.0] * 10, 2.0, *[0.1] * 12]


def test_empty_places_in_a_list_are_zero() -> None:
    assert weights(down_lr_weight="1,,1")[:4] == [1.0, 0.0, 1.0, 1.0]


def test_threshold_zeroes_what_is_not_above_it() -> None:
    found = weights(down_lr_weight="0.1,0.2,0.3", block_lr_zero_threshold="0.2")
    assert found[:4] == [0.0, 0.0, 0.3, 1.0]
    assert found[12:] == [1.0] * 13  # parts without weights keep their rate


@pytest.mark.parametrize("text", ["wave", "sine+x", "1,a"])
def test_nonsense_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="up_lr_weight"):
        lr_weights({"up_lr_weight": text}, SD)


def ranks(weights: list[float] | None = None, conv_dim: int | None = None, **args: str):  # type: ignore[no-untyped-def]
    return block_ranks(args, SD, weights, dim=4, alpha=2, conv_dim=conv_dim, conv_alpha=1.0)


def test_without_lists_or_weights_there_are_no_block_ranks() -> None:
    assert ranks(block_alphas="1") is None


def test_lists_of_the_right_length() -> None:
    found = ranks(block_dims=",".join(str(index) for index in range(25)), block_alphas=",".join(["0.5"] * 25))
    assert found.dims == list(range(25))
    assert found.alphas == [0.5] * 25
    assert found.conv_dims is None


def test_block_dims_alone_use_the_common_alpha_and_conv_dim() -> None:
    found = ranks(block_dims=",".join(["8"] * 25), conv_dim=3)
    assert found.alphas == [2] * 25
    assert found.conv_dims == [3] * 25
    assert found.conv_alphas == [1.0] * 25


def test_weight_zero_removes_the_block() -> None:
    found = ranks(weights=[0.0, *[1.0] * 24], conv_dim=3)
    assert found.dims == [0, *[4] * 24]
    assert found.conv_dims == [0, *[3] * 24]


@pytest.mark.parametrize("field", ["block_dims", "block_alphas", "conv_block_dims"])
def test_wrong_length_names_field_and_count(field: str) -> None:
    args = {"block_dims": ",".join(["4"] * 25), field: "1,2,3"}
    with pytest.raises(ConfigError, match=f"{field} has 3 numbers.*25"):
        block_ranks(args, SD, None, dim=4, alpha=2, conv_dim=None, conv_alpha=1.0)


def test_ranks_are_whole() -> None:
    with pytest.raises(ConfigError, match="whole"):
        ranks(block_dims=",".join(["1.5"] * 25))
