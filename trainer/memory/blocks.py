"""The repeated blocks of a denoiser: units of checkpointing and of block swap."""

from __future__ import annotations

from typing import Any

from torch import nn

__all__ = ["blocks_of", "repeated_of", "spread", "swapped_of"]


def blocks_of(denoiser: nn.Module) -> list[nn.Module]:
    """The blocks in the order of the forward pass, each what gradient checkpointing runs again as one.

    For diffusers' UNets these are residual and transformer blocks, for its FLUX transformer the double
    and then the single blocks.
    """
    model: Any = denoiser
    if hasattr(model, "single_transformer_blocks"):
        return [*model.transformer_blocks, *model.single_transformer_blocks]
    found: list[nn.Module] = []
    for block in (*model.down_blocks, model.mid_block, *model.up_blocks):
        resnets, attentions = list(block.resnets), list(getattr(block, "attentions", ()))
        first = 1 if block is model.mid_block else 0  # its first residual block comes alone
        found += resnets[:first]
        for place, resnet in enumerate(resnets[first:]):
            transformer = list(attentions[place].transformer_blocks) if place < len(attentions) else []
            found += [*transformer, resnet] if first else [resnet, *transformer]
    return found


def repeated_of(encoder: nn.Module) -> list[nn.Module]:
    """The layers of a text encoder: the longest list of modules of one class."""
    lists = [module for module in encoder.modules() if isinstance(module, nn.ModuleList)]
    alike = [list(found) for found in lists if len({type(module) for module in found}) == 1]
    return max(alike, key=len, default=[])


def swapped_of(denoiser: nn.Module, count: int) -> list[int]:
    """Places in `blocks_of` of the blocks that ``blocks_to_swap`` = ``count`` keeps in host memory.

    FLUX counts as Kohya does: half of them double blocks, and two single blocks (each less than half
    as large) for each of the other half (sd-scripts, flux_models.py:enable_block_swap).
    """
    model: Any = denoiser
    if not hasattr(model, "single_transformer_blocks"):
        return spread(count, len(blocks_of(denoiser)))
    doubles, singles = len(model.transformer_blocks), len(model.single_transformer_blocks)
    half = min(count // 2, doubles)
    rest = min(2 * (count - half), singles)
    return spread(half, doubles) + [doubles + place for place in spread(rest, singles)]


def spread(count: int, total: int) -> list[int]:
    """``count`` of ``total`` places, spread evenly: copies then overlap with the blocks between them."""
    count = max(0, min(count, total))
    return [(2 * index + 1) * total // (2 * count) for index in range(count)]
