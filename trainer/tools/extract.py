"""A LoRA from two models: what the second has over the first, at a rank.

As sd-scripts does it (networks/extract_lora_from_models.py, flux_extract_lora.py): the largest singular
values of each layer's difference, and factors clamped to a quantile. Models are read layer by layer.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from trainer.errors import ConfigError, ModelFileError
from trainer.tools import _lora
from trainer.tools._checkpoint import Checkpoint, open_checkpoint
from trainer.tools._lora import Pair
from trainer.tools._names import Kind
from trainer.tools.merge import CLAMP_QUANTILE, VERSIONS, clamped, modelspec

__all__ = ["extract", "top_pair"]

DENSE_WIDTH = 1280
"""Of the deepest layers of SD and SDXL."""

Say = Callable[[str], None]

_TEXT = re.compile(r"lora_te\d?_text_model_encoder_layers_\d+_(self_attn_(q|k|v|out)_proj|mlp_fc[12])")
_ATTENTION = re.compile(
    r"lora_unet_.*(attentions_\d+|(input|output)_blocks_\d+_1|middle_block_1)_"
    r"(proj_in|proj_out|transformer_blocks_\d+_(attn[12]_to_(q|k|v|out_0)|ff_net_(0_proj|2)))"
)
_RESIDUAL = re.compile(
    r"lora_unet_.*(resnets_\d+_(conv1|conv2|time_emb_proj|conv_shortcut)|(down|up)samplers_0_conv"
    r"|blocks?_\d+(_0)?_(in_layers_2|out_layers_3|emb_layers_1|skip_connection|op)|output_blocks_\d+_2_conv)"
)
_FLUX = re.compile(r"lora_unet_(double|single)_blocks_\d+_(?!.*norm).+")


def _wanted(name: str, kind: Kind, convs: bool) -> bool:
    """Whether sd-scripts' network has this layer."""
    if kind == "flux":
        return _FLUX.fullmatch(name) is not None
    patterns = (_TEXT, _ATTENTION, _RESIDUAL) if convs else (_TEXT, _ATTENTION)
    return any(pattern.fullmatch(name) for pattern in patterns)


def extract(
    original: Path,
    tuned: Path,
    output: Path,
    rank: int,
    *,
    conv_rank: int | None = None,
    clamp_quantile: float = CLAMP_QUANTILE,
    min_diff: float = 0.01,
    precision: str | None = "fp16",
    device: str | None = None,
    say: Say = print,
) -> Path:
    """Write the LoRA that brings ``original`` near ``tuned``.

    Args:
        original: A single SD 1.x, SD 2.x, SDXL or FLUX.1 file.
        tuned: A file of the same family.
        output: .safetensors, with Kohya's names.
        rank: Of each layer; alpha is the same.
        conv_rank: Of 3x3 convolutions of the residual, down- and upsampling blocks; None leaves those
            blocks out, as Kohya does.
        clamp_quantile: Values of the factors are held to this quantile.
        min_diff: The text encoders are left out where none of their weights differs by more.
        precision: save_precision.
        device: Where the decompositions are made; the CPU if None.
        say: Told what is done.

    Raises:
        ConfigError: A value that cannot be.
        ModelFileError: The files are not two models of one family.
    """
    _lora.check_output(output, original, tuned)
    if rank < 1 or (conv_rank is not None and conv_rank < 1):
        raise ConfigError("a rank must be 1 or more")
    if not 0 < clamp_quantile <= 1:
        raise ConfigError("clamp_quantile must be above 0 and up to 1")
    first, second = open_checkpoint(original), open_checkpoint(tuned)
    if first.kind != second.kind:
        raise ModelFileError(
            f"{original.name} is {first.kind} and {tuned.name} is {second.kind}: take two of a kind"
        )
    kind = first.kind
    names = [name for name in first.places if _wanted(name, kind, conv_rank is not None)]
    missing = [name for name in names if name not in second.places]
    if missing or not names:
        raise ModelFileError(
            f"{tuned.name} lacks layers that {original.name} has ({(missing or ['all'])[0]} ...)"
        )
    text = [name for name in names if not name.startswith("lora_unet_")]
    largest = max((float(_difference(name, first, second).abs().max()) for name in text), default=0.0)
    if text and largest <= min_diff:
        say(f"the text encoders differ by {largest:.2g} at most and are left out")
        names = [name for name in names if name not in set(text)]
    pairs: dict[str, Pair] = {}
    for index, name in enumerate(names):
        difference = _difference(name, first, second)
        if (
            kind == "sd2"
            and difference.ndim == 2
            and name.endswith(("_proj_in", "_proj_out"))
            and "lora_unet" in name
        ):
            difference = difference[:, :, None, None]  # sd-scripts has convolutions there
        wide = difference.ndim == 4 and difference.shape[2:] != (1, 1)
        limit = conv_rank if wide and conv_rank is not None else rank
        pairs[name] = top_pair(difference, limit, clamp_quantile, device)
        if (index + 1) % 100 == 0:
            say(f"{index + 1} of {len(names)} layers")
    args = {} if conv_rank is None else {"conv_dim": str(conv_rank), "conv_alpha": str(float(conv_rank))}
    metadata = {
        "ss_v2": str(kind == "sd2"),
        "ss_base_model_version": VERSIONS[kind],
        "ss_network_module": "networks.lora_flux" if kind == "flux" else "networks.lora",
        "ss_network_dim": str(rank),
        "ss_network_alpha": str(float(rank)),
        "ss_network_args": json.dumps(args),
    } | modelspec(kind, output.stem, [], lora=True)
    _lora.write(output, pairs, metadata, precision=precision, kind=kind, say=say)
    return output


def _difference(name: str, first: Checkpoint, second: Checkpoint) -> Tensor:
    one, two = first.weight(name), second.weight(name)
    if one.shape != two.shape:
        raise ModelFileError(f"{name} is {tuple(one.shape)} in one model and {tuple(two.shape)} in the other")
    return two.float() - one.float()


def top_pair(difference: Tensor, limit: int, clamp_quantile: float, device: str | None = None) -> Pair:
    """The pair of rank ``limit`` or less that is nearest to a weight difference, before clamping.

    Layers wider than `DENSE_WIDTH` both ways come from the eigenvectors of the smaller Gram matrix, in
    float64, which is much less work than the whole decomposition that sd-scripts makes of FLUX's.

    Args:
        difference: (O, I) or (O, I, k, k).
        limit: Largest rank; never above O or I.
        clamp_quantile: See `extract`.
        device: Where to compute.
    """
    rank = min(limit, difference.shape[0], difference.shape[1])
    matrix = difference.flatten(1).to(device or "cpu")
    if not matrix.any():  # most layers of two models that differ by a merged LoRA
        down = torch.eye(rank, matrix.shape[1])
        return _clamped_pair(torch.zeros(len(matrix), rank), down, difference, 1.0)
    if min(matrix.shape) <= DENSE_WIDTH:
        # The limit of the clamp depends on the signs of the vectors: this gives sd-scripts' own.
        u, s, vh = torch.linalg.svd(matrix.float(), full_matrices=False)
        return _clamped_pair(u[:, :rank] * s[:rank], vh[:rank], difference, clamp_quantile)
    matrix = matrix.double()
    tall = matrix.shape[0] >= matrix.shape[1]
    gram = matrix.T @ matrix if tall else matrix @ matrix.T
    _, vectors = torch.linalg.eigh(gram)
    top = vectors[:, -rank:].flip(1)
    if tall:
        up, down = matrix @ top, top.T  # U S and V^T
    else:
        projected = top.T @ matrix  # S V^T
        values = projected.norm(dim=1, keepdim=True)
        down = projected / values.clamp(min=torch.finfo(values.dtype).tiny)
        up = top * values.T
    return _clamped_pair(up, down, difference, clamp_quantile)


def _clamped_pair(up: Tensor, down: Tensor, difference: Tensor, clamp_quantile: float) -> Pair:
    up, down = clamped(up.float().cpu(), down.float().cpu(), clamp_quantile)
    if difference.ndim == 4:
        up = up[:, :, None, None]
    return Pair(down.reshape(len(down), *difference.shape[1:]), up, float(len(down)))
