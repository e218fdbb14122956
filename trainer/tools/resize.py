"""Bringing a LoRA to another rank: the nearest one of that rank in each layer (networks/resize_lora.py).

The dynamic methods choose each layer's rank from its singular values S: sv_ratio keeps those above the
largest / x, sv_cumulative a share x of their sum, sv_fro a share x of the Frobenius norm. As in sd-scripts
one more than that is kept, up to the rank given.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from trainer.errors import ConfigError
from trainer.tools import _lora
from trainer.tools._lora import Pair

__all__ = ["DYNAMIC_METHODS", "DynamicMethod", "Resized", "new_rank", "resize"]

DynamicMethod = Literal["sv_ratio", "sv_fro", "sv_cumulative"]
DYNAMIC_METHODS: tuple[DynamicMethod, ...] = ("sv_ratio", "sv_fro", "sv_cumulative")

SMALLEST = 1e-6
"""A layer whose largest singular value is not above this counts as empty and gets rank 1."""

Say = Callable[[str], None]


@dataclass(frozen=True)
class Resized:
    """What was kept."""

    path: Path
    ranks: dict[str, int]
    """New rank of each layer."""
    kept: dict[str, float]
    """Share of each layer's Frobenius norm."""


def new_rank(values_N: Tensor, limit: int, method: DynamicMethod | None, parameter: float) -> int:
    """The rank that a layer gets.

    Args:
        values_N: All singular values of the layer's weight change, falling; zeros included.
        limit: Largest rank.
        method: None takes ``limit``.
        parameter: Of the method.
    """
    if float(values_N[0]) <= SMALLEST:
        return 1
    if method is None:
        return limit
    if method == "sv_ratio":
        index = int((values_N > values_N[0] / parameter).sum())
    elif method == "sv_cumulative":
        shares = values_N.cumsum(0) / values_N.sum()
        index = int((shares < parameter).sum()) + 1
    else:
        shares = values_N.square().cumsum(0) / values_N.square().sum()
        index = int((shares < parameter**2).sum()) + 1
    return min(max(1, min(index, len(values_N) - 1)) + 1, limit)


def resize(
    file: Path,
    output: Path,
    rank: int,
    *,
    conv_rank: int | None = None,
    method: DynamicMethod | None = None,
    parameter: float | None = None,
    precision: str | None = None,
    say: Say = print,
) -> Resized:
    """Write ``file`` at another rank; alpha changes with it, so that the strength stays.

    Args:
        file: A LoRA, named by any program.
        output: .safetensors, with the names that ``file`` has.
        rank: Of every layer, or the largest one with a dynamic method. Layers never get more ranks than they have.
        conv_rank: The same for layers that are stored as convolutions; ``rank`` if None.
        method: How each layer's rank is chosen.
        parameter: Of the method: a ratio of 1 or more for sv_ratio, else a share from 0 to 1.
        precision: save_precision; that of the file if None.
        say: Told what is done.

    Raises:
        ConfigError: A rank or parameter that cannot be.
        ModelFileError: The file is no LoRA.
    """
    _lora.check_output(output, file)
    _check(rank, conv_rank, method, parameter)
    lora = _lora.read(file)
    pairs: dict[str, Pair] = {}
    kept: dict[str, float] = {}
    for name, pair in lora.pairs.items():
        limit = (conv_rank or rank) if pair.is_conv else rank
        pairs[name], kept[name] = _resized(pair, limit, method, parameter or 0.0)
    old = max(pair.rank for pair in lora.pairs.values())
    metadata = dict(lora.metadata)
    comment = metadata.get("ss_training_comment", "")
    if method is None:
        conv = "" if conv_rank in (None, rank) else f" (conv: {conv_rank})"
        metadata |= _lora.described(pairs)
        metadata["ss_training_comment"] = f"dimension is resized from {old} to {rank}{conv}; {comment}"
    else:
        metadata |= {"ss_network_dim": "Dynamic", "ss_network_alpha": "Dynamic"}
        metadata["ss_training_comment"] = f"Dynamic resize with {method}: {parameter} from {old}; {comment}"
    ranks = {name: pair.rank for name, pair in pairs.items()}
    say(f"{file.name}: rank {old}, {len(pairs)} layers")
    say(
        "new ranks: "
        + ", ".join(f"{rank} ({count})" for rank, count in sorted(Counter(ranks.values()).items()))
    )
    say(
        f"kept of the weight changes (Frobenius norm): {sum(kept.values()) / len(kept):.1%} on average, "
        f"{min(kept.values()):.1%} at least"
    )
    _lora.write(
        output,
        pairs,
        metadata,
        precision=precision or lora.precision,
        kind=lora.kind,
        format=lora.format,
        say=say,
    )
    return Resized(output, ranks, kept)


def _check(rank: int, conv_rank: int | None, method: DynamicMethod | None, parameter: float | None) -> None:
    if rank < 1 or (conv_rank is not None and conv_rank < 1):
        raise ConfigError("a rank must be 1 or more")
    if method is None:
        if parameter is not None:
            raise ConfigError("a parameter is for a dynamic method: sv_ratio, sv_fro or sv_cumulative")
    elif method not in DYNAMIC_METHODS:
        raise ConfigError(f"method {method!r}: choose sv_ratio, sv_fro or sv_cumulative")
    elif parameter is None:
        raise ConfigError(f"{method} needs a parameter: a ratio above 1 for sv_ratio, else a share below 1")
    elif (method == "sv_ratio" and parameter < 1) or (method != "sv_ratio" and not 0 < parameter <= 1):
        raise ConfigError(
            f"{method} cannot have the parameter {parameter:g}: sv_ratio takes a ratio of 1 or more, the others a "
            "share above 0 and up to 1"
        )


def _resized(pair: Pair, limit: int, method: DynamicMethod | None, parameter: float) -> tuple[Pair, float]:
    up, down = pair.matrices()
    u, s, vh = _lora.thin_svd(up, down)
    # A full decomposition has a value for every row or column; beyond the rank they are 0.
    all_values = torch.zeros(min(len(up), down.shape[1]), dtype=s.dtype)
    all_values[: len(s)] = s
    rank = min(new_rank(all_values, limit, method, parameter), pair.rank, len(s))
    whole = float(s.norm())
    share = float(s[:rank].norm()) / whole if whole else 1.0
    made = pair.with_matrices((u[:, :rank] * s[:rank]).float(), vh[:rank].float(), pair.scale * rank)
    return made, share
