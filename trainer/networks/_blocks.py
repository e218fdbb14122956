"""Kohya's block options: a rank, an alpha and a learning-rate weight for each block of the UNet.

The lists run from the input blocks over the middle to the output blocks (networks/lora.py of
sd-scripts): 12 + 1 + 12 = 25 entries for SD 1.x and 2.x, 1 + 9 + 3 + 9 + 1 = 23 for SDXL, whose
first and last entry have no layers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

from trainer.errors import ConfigError

__all__ = ["BlockCounts", "BlockRanks", "block_ranks", "lr_weights"]

BlockCounts = tuple[int, int, int, int, int]
"""Entries for: before the input blocks, input, middle, output, after the output blocks."""


@dataclass(frozen=True)
class BlockRanks:
    """Rank and alpha of every block; the lists for k x k convolutions are None where those are left alone."""

    dims: list[int]
    alphas: list[float]
    conv_dims: list[int] | None = None
    conv_alphas: list[float] | None = None

    def without(self, blocks: set[int]) -> BlockRanks:
        """The same with rank 0 (no layers) in ``blocks``."""
        conv = self.conv_dims
        return replace(
            self,
            dims=[0 if index in blocks else dim for index, dim in enumerate(self.dims)],
            conv_dims=conv and [0 if index in blocks else dim for index, dim in enumerate(conv)],
        )


def _curve(name: str, field: str, count: int) -> list[float]:
    """Weights of a named curve, with an optional ``+base`` behind the name."""
    kind, _, base_text = name.partition("+")
    rising: Mapping[str, Callable[[float], float]] = {
        "sine": lambda part: math.sin(math.pi * part / 2),
        "linear": lambda part: part,
        "zeros": lambda part: 0.0,
    }
    falling = {"cosine": "sine", "reverse_linear": "linear"}
    shape = rising.get(falling.get(kind, kind))
    if shape is None:
        raise ConfigError(
            f"{field} is {name!r}: expected {count} numbers separated by commas, or one of "
            "sine, cosine, linear, reverse_linear, zeros, each with an optional +base such as sine+0.25"
        )
    base = _numbers(base_text or "0", field)[0]
    weights = [shape(index / (count - 1)) + base for index in range(count)]
    return weights[::-1] if kind in falling else weights


def _numbers(text: str, field: str) -> list[float]:
    try:
        return [float(part) if part.strip() else 0.0 for part in text.split(",")]
    except ValueError as error:
        raise ConfigError(f"{field} is {text!r}: expected numbers separated by commas") from error


def _weights(args: Mapping[str, str], field: str, count: int, *, curves: bool) -> list[float]:
    """One part's weights, cut or filled with 1 to ``count``; all 1 where nothing is given."""
    if field not in args:
        return [1.0] * count
    text = args[field].strip()
    found = _curve(text, field, count) if curves and "," not in text else _numbers(text, field)
    threshold = _numbers(args.get("block_lr_zero_threshold", "0"), "block_lr_zero_threshold")[0]
    return [weight if weight > threshold else 0.0 for weight in (found + [1.0] * count)[:count]]


def lr_weights(args: Mapping[str, str], counts: BlockCounts) -> list[float] | None:
    """Learning-rate weight of every block, or None where no weights are given.

    Args:
        args: Network options; down_lr_weight, mid_lr_weight, up_lr_weight and
            block_lr_zero_threshold are read. Weights not above the threshold become 0.
        counts: Number of blocks of the family.

    Raises:
        ConfigError: A value that is neither numbers nor a curve.
    """
    if not any(f"{part}_lr_weight" in args for part in ("down", "mid", "up")):
        return None
    before, down, mid, up, after = counts
    return [
        *[1.0] * before,
        *_weights(args, "down_lr_weight", down, curves=True),
        *_weights(args, "mid_lr_weight", mid, curves=False),
        *_weights(args, "up_lr_weight", up, curves=True),
        *[1.0] * after,
    ]


def _list(args: Mapping[str, str], field: str, count: int, default: float) -> list[float]:
    if field not in args:
        return [default] * count
    found = _numbers(args[field], field)
    if len(found) != count:
        raise ConfigError(f"{field} has {len(found)} numbers, this model has {count} blocks: give {count}")
    return found


def block_ranks(
    args: Mapping[str, str],
    counts: BlockCounts,
    weights: list[float] | None,
    *,
    dim: int,
    alpha: float,
    conv_dim: int | None,
    conv_alpha: float,
) -> BlockRanks | None:
    """Ranks and alphas block by block, or None where neither block_dims nor weights are given.

    Blocks whose learning-rate weight is 0 get rank 0: they are not made at all.

    Args:
        args: Network options; block_dims, block_alphas, conv_block_dims and conv_block_alphas are read.
        counts: Number of blocks of the family.
        weights: What `lr_weights` found.
        dim: Rank where no list is given.
        alpha: Alpha where no list is given.
        conv_dim: Rank of k x k convolutions where no list is given; None leaves them alone.
        conv_alpha: Alpha of k x k convolutions where no list is given.

    Raises:
        ConfigError: A list of the wrong length, or ranks that are no whole numbers.
    """
    if "block_dims" not in args and weights is None:
        return None
    count = sum(counts)
    ranks = BlockRanks(
        _ranks(_list(args, "block_dims", count, dim), "block_dims"),
        _list(args, "block_alphas", count, alpha),
    )
    if "conv_block_dims" in args or conv_dim is not None:
        conv_dims = _ranks(_list(args, "conv_block_dims", count, conv_dim or 0), "conv_block_dims")
        # Without conv_block_dims sd-scripts does not look at conv_block_alphas.
        listed = args if "conv_block_dims" in args else {}
        conv_alphas = _list(listed, "conv_block_alphas", count, conv_alpha)
        ranks = replace(ranks, conv_dims=conv_dims, conv_alphas=conv_alphas)
    return ranks.without({index for index, weight in enumerate(weights or []) if weight == 0})


def _ranks(numbers: list[float], field: str) -> list[int]:
    if any(number != int(number) or number < 0 for number in numbers):
        raise ConfigError(f"{field} must hold whole numbers from 0 (no layers) on")
    return [int(number) for number in numbers]
