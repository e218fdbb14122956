"""Merging LoRAs into one, and into a model file.

Two of the ways to merge are those of sd-scripts (networks/merge_lora.py, sdxl_merge_lora.py,
flux_merge_lora.py), which add or join the factors. The factors of a sum are not the sum of the factors:
with them a ratio of 0.5 counts as 0.25 on a LoRA's own part, and the products between LoRAs are added
too. "exact" gives the sum of the changes, each at its ratio.

Axes: r rank, O/I output and input width.
"""

from __future__ import annotations

import datetime
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from trainer.errors import ConfigError, ModelFileError
from trainer.lora_file import SAVE_DTYPES, read_metadata
from trainer.metadata import program
from trainer.tools import _lora
from trainer.tools._checkpoint import open_checkpoint, write_tensors
from trainer.tools._lora import Lora, Pair
from trainer.tools._names import Kind

__all__ = ["METHODS", "Method", "clamped", "merge", "merge_into", "modelspec"]

Method = Literal["exact", "svd", "sum", "concat"]
METHODS: Mapping[Method, str] = {
    "exact": "the sum of what each LoRA does, at its ratio; the rank is the sum of the ranks",
    "svd": "the same, brought down to a rank (svd_merge_lora.py)",
    "sum": "factors added, for equal ranks (merge_lora.py): cross terms, and ratios count squared",
    "concat": "factors joined (merge_lora.py --concat): ratios count squared, alpha is kept as the rank grows",
}
"""Ways to merge, and what they give."""

CLAMP_QUANTILE = 0.99
"""Of sd-scripts: factors from a decomposition are clamped to this quantile of their values."""

Say = Callable[[str], None]

ARCHITECTURES: Mapping[Kind, tuple[str, str, str]] = {
    "sd1": ("stable-diffusion-v1", "https://github.com/Stability-AI/generative-models", "512x512"),
    "sd2": ("stable-diffusion-v2-512", "https://github.com/Stability-AI/generative-models", "512x512"),
    "sdxl": ("stable-diffusion-xl-v1-base", "https://github.com/Stability-AI/generative-models", "1024x1024"),
    "flux": ("flux-1-dev", "https://github.com/black-forest-labs/flux", "1024x1024"),
}
"""modelspec.architecture, .implementation and .resolution (sd-scripts, library/sai_model_spec.py)."""
VERSIONS: Mapping[Kind, str] = {"sd1": "sd_v1", "sd2": "sd_v2", "sdxl": "sdxl_base_v1-0", "flux": "flux1"}
"""ss_base_model_version."""


def merge(
    files: Sequence[Path],
    ratios: Sequence[float],
    output: Path,
    *,
    method: Method = "exact",
    rank: int | None = None,
    conv_rank: int | None = None,
    shuffle: bool = False,
    precision: str | None = None,
    say: Say = print,
) -> Path:
    """Merge LoRA files into one.

    Args:
        files: LoRAs of one model family, named by any program.
        ratios: Strength of each; may be negative.
        output: .safetensors, with Kohya's names.
        method: See `METHODS`.
        rank: Of the result; for "svd".
        conv_rank: The same for convolutions wider than 1x1; ``rank`` if None.
        shuffle: Change the order of the ranks of each layer (merge_lora.py --shuffle); the result does the same.
        precision: save_precision; that of the first file if None.
        say: Told what is done.

    Raises:
        ConfigError: Files and ratios do not go together.
        ModelFileError: A file is no LoRA, or of another family or shape.
    """
    _check(files, ratios, output)
    if (method == "svd") != (rank is not None):
        raise ConfigError("a rank is for the method svd, and the method svd needs one")
    loras = [_lora.read(path) for path in files]
    for lora in loras[1:]:
        if lora.kind != loras[0].kind:
            raise ModelFileError(
                f"{lora.path.name} is for {lora.kind} models and {loras[0].path.name} for {loras[0].kind}: "
                "only LoRAs of one model family can be merged"
            )
    for lora, ratio in zip(loras, ratios, strict=True):
        say(f"{lora.path.name}: {len(lora.pairs)} layers at {ratio:g}")
    if method == "sum":
        pairs = _sum(loras, ratios)
    elif method == "concat":
        pairs = _concat(loras, ratios)
    else:
        pairs = _exact(loras, ratios)
        if method == "svd":
            assert rank is not None
            pairs = {name: _reduced(pair, rank, conv_rank or rank) for name, pair in pairs.items()}
    if shuffle:
        pairs = {name: _shuffled(pair) for name, pair in pairs.items()}
    kind = loras[0].kind
    metadata = _minimum(loras, kind) | _lora.described(pairs)
    metadata |= modelspec(kind, output.stem, files, lora=True)
    _lora.write(output, pairs, metadata, precision=precision or loras[0].precision, kind=kind, say=say)
    return output


def _check(files: Sequence[Path], ratios: Sequence[float], output: Path) -> None:
    if not files:
        raise ConfigError("choose at least one LoRA file")
    if len(files) != len(ratios):
        raise ConfigError(f"{len(files)} LoRA files and {len(ratios)} ratios: give one ratio for each file")
    if not all(math.isfinite(ratio) for ratio in ratios):
        raise ConfigError("a ratio is no number")
    _lora.check_output(output, *files)


def _names(loras: Sequence[Lora]) -> list[str]:
    return list(dict.fromkeys(name for lora in loras for name in lora.pairs))


def _parts(loras: Sequence[Lora], ratios: Sequence[float], name: str) -> Iterator[tuple[Pair, float]]:
    """The pairs of one layer with their ratios, of equal shape but for the rank."""
    first: Pair | None = None
    for lora, ratio in zip(loras, ratios, strict=True):
        pair = lora.pairs.get(name)
        if pair is None:
            continue
        if first is not None and pair.down.shape[1:] != first.down.shape[1:]:
            if pair.down.flatten(1).shape[1] != first.down.flatten(1).shape[1]:
                raise ModelFileError(
                    f"{lora.path.name}: {name} has inputs of {tuple(pair.down.shape[1:])} where another file has "
                    f"{tuple(first.down.shape[1:])}"
                )
            # A linear layer and a 1x1 convolution hold the same numbers.
            pair = first.with_matrices(*pair.matrices(), pair.alpha)
        first = first or pair
        yield pair, ratio


def _exact(loras: Sequence[Lora], ratios: Sequence[float]) -> dict[str, Pair]:
    """All ranks side by side, each up weight with its LoRA's strength: alpha is the rank."""
    found: dict[str, Pair] = {}
    for name in _names(loras):
        parts = list(_parts(loras, ratios, name))
        ups, downs = [], []
        for pair, ratio in parts:
            up, down = pair.matrices()
            ups.append(up * (pair.scale * ratio))
            downs.append(down)
        rank = sum(len(down) for down in downs)
        found[name] = parts[0][0].with_matrices(torch.cat(ups, dim=1), torch.cat(downs), float(rank))
    return found


def _sum(loras: Sequence[Lora], ratios: Sequence[float]) -> dict[str, Pair]:
    """Ups and downs added, each times ratio and the root of its alpha against the first file's."""
    found: dict[str, Pair] = {}
    for name in _names(loras):
        for pair, ratio in _parts(loras, ratios, name):
            base = found.get(name)
            up, down = _kohya_scaled(pair, ratio, base)
            if base is None:
                found[name] = pair.with_matrices(up, down, pair.alpha)
                continue
            if base.rank != pair.rank:
                raise ModelFileError(
                    f"{name} has rank {base.rank} in one file and {pair.rank} in another, and factors can only be "
                    "added where ranks are equal: choose the method exact or svd"
                )
            above, below = base.matrices()
            found[name] = base.with_matrices(above + up, below + down, base.alpha)
    return found


def _concat(loras: Sequence[Lora], ratios: Sequence[float]) -> dict[str, Pair]:
    """Ups and downs side by side, scaled as in `_sum`; alpha stays the first file's, as in sd-scripts."""
    found: dict[str, Pair] = {}
    for name in _names(loras):
        for pair, ratio in _parts(loras, ratios, name):
            base = found.get(name)
            up, down = _kohya_scaled(pair, ratio, base)
            if base is not None:
                above, below = base.matrices()
                up, down = torch.cat([above, up], dim=1), torch.cat([below, down])
            found[name] = pair.with_matrices(up, down, pair.alpha if base is None else base.alpha)
    return found


def _kohya_scaled(pair: Pair, ratio: float, base: Pair | None) -> tuple[Tensor, Tensor]:
    """Up and down as merge_lora.py scales them; a negative ratio turns the down weight alone."""
    factor = math.sqrt(pair.alpha / (pair.alpha if base is None else base.alpha)) * ratio
    up, down = pair.matrices()
    return up * abs(factor), down * factor


def _reduced(pair: Pair, rank: int, conv_rank: int) -> Pair:
    """The nearest pair of a lower rank (svd_merge_lora.py)."""
    wanted = conv_rank if pair.is_wide else rank
    up, down = pair.matrices()
    rank = min(wanted, len(up), pair.down.shape[1], pair.rank)
    u, s, vh = _lora.thin_svd(up * pair.scale, down)
    up, down = clamped((u[:, :rank] * s[:rank]).float(), vh[:rank].float(), CLAMP_QUANTILE)
    return pair.with_matrices(up, down, float(rank))


def clamped(up: Tensor, down: Tensor, quantile: float) -> tuple[Tensor, Tensor]:
    """Both factors without their largest values: held to a quantile of all values of the two, both ways."""
    values = torch.cat([up.flatten(), down.flatten()])
    place = quantile * (len(values) - 1)
    # torch.quantile takes no more than 16 million values.
    low = values.kthvalue(math.floor(place) + 1).values
    high = values.kthvalue(math.ceil(place) + 1).values
    limit = torch.lerp(low, high, place - math.floor(place))
    return up.clamp(-limit, limit), down.clamp(-limit, limit)


def _shuffled(pair: Pair) -> Pair:
    order = torch.randperm(pair.rank)
    return Pair(pair.down[order].contiguous(), pair.up[:, order].contiguous(), pair.alpha)


def _minimum(loras: Sequence[Lora], kind: Kind) -> dict[str, str]:
    """The few ss_ entries of a merged file (train_util.py:build_minimum_network_metadata)."""
    found = {
        "ss_network_module": "networks.lora_flux" if kind == "flux" else "networks.lora",
        "ss_v2": str(kind == "sd2"),
        "ss_base_model_version": VERSIONS[kind],
    }
    for name in ("ss_v2", "ss_base_model_version"):
        told = next((lora.metadata[name] for lora in loras if name in lora.metadata), None)
        if told is not None:
            found[name] = told
    return found


def modelspec(kind: Kind, title: str, sources: Sequence[Path], *, lora: bool) -> dict[str, str]:
    """modelspec.* entries of a made file, with the titles of what it was made from."""
    architecture, implementation, resolution = ARCHITECTURES[kind]
    if lora and kind in ("sd1", "sd2"):
        implementation = "diffusers"
    titles = []
    for path in sources:
        entries = read_metadata(path) if path.suffix.lower() == ".safetensors" else {}
        titles.append(entries.get("modelspec.title") or path.stem)
    found = {
        "sai_model_spec": "1.0.1",
        "architecture": architecture + ("/lora" if lora else ""),
        "implementation": implementation,
        "title": title,
        "resolution": resolution,
        "date": datetime.datetime.fromtimestamp(int(time.time())).isoformat(),
        "implementation_version": program(),
    }
    if titles:
        found["merged_from"] = ", ".join(titles)
    return {f"modelspec.{name}": value for name, value in found.items()}


def merge_into(
    model: Path,
    files: Sequence[Path],
    ratios: Sequence[float],
    output: Path,
    *,
    precision: str | None = None,
    say: Say = print,
) -> Path:
    """Add LoRAs to a model's weights: ``W + ratio * alpha / rank * up @ down``, in float32.

    The model is read and written tensor by tensor. Layers of the LoRAs that the file does not have (text
    encoders of FLUX.1, which lie in files of their own) are named and left out.

    Args:
        model: A single SD 1.x, SD 2.x, SDXL or FLUX.1 file, or FLUX.1's CLIP-L or T5.
        files: LoRAs.
        ratios: Strength of each.
        output: .safetensors.
        precision: Of all floating-point tensors; as in the file if None.
        say: Told what is done.

    Raises:
        ConfigError: Files and ratios do not go together.
        ModelFileError: A file is not what it should be, or no layer of a LoRA fits the model.
    """
    _check(files, ratios, output)
    _lora.check_output(output, model)
    checkpoint = open_checkpoint(model)
    changes: dict[str, list[tuple[str, Pair, float]]] = {}
    for path, ratio in zip(files, ratios, strict=True):
        lora = _lora.read(path)
        if lora.kind != checkpoint.kind:
            raise ModelFileError(f"{path.name} is for {lora.kind} models, {model.name} is {checkpoint.kind}")
        missing = [name for name in lora.pairs if name not in checkpoint.places]
        if len(missing) == len(lora.pairs):
            raise ModelFileError(f"no layer of {path.name} is in {model.name} ({missing[0]} ...)")
        say(f"{path.name}: {len(lora.pairs) - len(missing)} layers at {ratio:g}")
        if missing:
            say(
                f"{path.name}: {len(missing)} layers are not in {model.name} and are left out ({missing[0]} ...)"
            )
        for name, pair in lora.pairs.items():
            if name in checkpoint.places:
                changes.setdefault(checkpoint.places[name].key, []).append((name, pair, ratio))
    dtype = SAVE_DTYPES.get(precision or "")
    layout: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {}
    dtypes = checkpoint.dtypes()
    for key, shape in checkpoint.file.shapes.items():
        kept = dtypes[key]
        layout[key] = (dtype if dtype is not None and kept.is_floating_point else kept, shape)

    def merged() -> Iterator[tuple[str, Tensor]]:
        for key, tensor in checkpoint.file.stream(layout):
            if key in changes:
                weight = tensor.to(torch.float32, copy=True)
                for name, pair, ratio in changes[key]:
                    rows = checkpoint.places[name].of(weight)
                    delta = pair.delta()
                    if delta.numel() != rows.numel():
                        raise ModelFileError(
                            f"{name} changes a weight of {tuple(delta.shape)}, but the model's is {tuple(rows.shape)}"
                        )
                    rows += ratio * delta.reshape(rows.shape)
                tensor = weight
            yield key, tensor

    dropped = ("modelspec.hash_sha256", "modelspec.thumbnail")
    metadata = {key: value for key, value in checkpoint.metadata.items() if key not in dropped}
    made = modelspec(checkpoint.kind, output.stem, [model, *files], lora=False)
    # What the model says of itself stays: a v-prediction model is still one.
    metadata = made | {
        key: metadata[key] for key in metadata if key not in ("modelspec.title", "modelspec.date")
    }
    metadata["modelspec.merged_from"] = made["modelspec.merged_from"]
    size_bytes = write_tensors(output, layout, merged(), metadata)
    say(f"saved {output} ({size_bytes / 2**20:.1f} MiB), {len(changes)} tensors changed")
    return output
