"""A LoRA file as pairs of weights under Kohya's names, whatever program named them.

Axes: r rank, O/I output and input width, k kernel size.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from trainer.errors import ConfigError, ModelFileError
from trainer.lora_file import LoraFile, read_lora, save
from trainer.networks._names import ENDINGS, peft_alpha
from trainer.tools import _names
from trainer.tools._names import Kind

__all__ = [
    "Format",
    "Lora",
    "Pair",
    "check_output",
    "described",
    "format_of",
    "pairs_of",
    "read",
    "thin_svd",
    "write",
]

Format = _names.Format

_ROLES = {ending: "down" if ours == ".lora_down.weight" else "up" for ending, ours in ENDINGS.items()} | {
    ".lora_down.weight": "down",
    ".lora_up.weight": "up",
    ".alpha": "alpha",
}
_OTHER_TYPES = {
    "hada_": "LoHa",
    "lokr_": "LoKr",
    "oft_": "OFT",
    "dora_scale": "DoRA",
    "lora_mid": "CP-decomposed LoCon",
    "on_input": "iA3",
    ".a1.": "GLoRA",
    ".diff": "full-weight",
}


@dataclass(frozen=True)
class Pair:
    """One layer's LoRA: the layer's weight changes by ``up @ down * alpha / rank``."""

    down: Tensor
    """(r, I) or (r, I, k, k)."""
    up: Tensor
    """(O, r) or (O, r, 1, 1)."""
    alpha: float

    @property
    def rank(self) -> int:
        """R."""
        return len(self.down)

    @property
    def scale(self) -> float:
        """Alpha / rank."""
        return self.alpha / self.rank

    @property
    def is_conv(self) -> bool:
        """Whether the file holds it as a convolution (1x1 included)."""
        return self.down.ndim == 4

    @property
    def is_wide(self) -> bool:
        """Whether it is a convolution wider than 1x1."""
        return self.down.ndim == 4 and self.down.shape[2:] != (1, 1)

    def matrices(self, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
        """Up as (O, r) and down as (r, I k k)."""
        return self.up.flatten(1).to(dtype), self.down.flatten(1).to(dtype)

    def delta(self) -> Tensor:
        """The change of the layer's weight at strength 1, (O, I k k), float32."""
        up, down = self.matrices()
        return (up @ down) * self.scale

    def with_matrices(self, up: Tensor, down: Tensor, alpha: float) -> Pair:
        """The same layer with other weights, given as (O, r') and (r', I k k)."""
        rank = len(down)
        return Pair(
            down.reshape(rank, *self.down.shape[1:]).contiguous(),
            up.reshape(len(up), rank, *self.up.shape[2:]).contiguous(),
            alpha,
        )


@dataclass(frozen=True)
class Lora:
    """A LoRA file, read."""

    path: Path
    kind: Kind
    format: Format
    pairs: dict[str, Pair]
    """By Kohya's key stem."""
    metadata: dict[str, str]

    @property
    def dtype(self) -> torch.dtype:
        """Of the first pair."""
        return next(iter(self.pairs.values())).down.dtype

    @property
    def precision(self) -> str:
        """`dtype` as save_precision names it."""
        return {torch.float16: "fp16", torch.bfloat16: "bf16"}.get(self.dtype, "float")


def read(path: Path) -> Lora:
    """Read a LoRA of sd-scripts, diffusers, PEFT or Black Forest Labs' layer names.

    Raises:
        ModelFileError: Missing, broken, no LoRA, or of a type that is no plain LoRA.
    """
    file = read_lora(path)
    kind, found = pairs_of(file, path.name)
    return Lora(path, kind, format_of(file.tensors), found, file.metadata)


def format_of(keys: Iterable[str]) -> Format:
    """Whose layer names a file has."""
    for key in keys:
        if key.startswith("lora_"):
            return "kohya"
        if re.search(r"(^|\.)(double|single)_blocks\.", key):
            return "bfl"
        if key.startswith(("unet.", "transformer.", "text_encoder")):
            return "diffusers"
    return "kohya"


def pairs_of(file: LoraFile, name: str) -> tuple[Kind, dict[str, Pair]]:
    """The family that a file is for, and its pairs by Kohya's key stem.

    Args:
        file: As read.
        name: For messages.

    Raises:
        ModelFileError: It holds something else than plain LoRA pairs.
    """
    split: dict[str, dict[str, Tensor]] = {}
    for key, tensor in file.tensors.items():
        ending = next((ending for ending in _ROLES if key.endswith(ending)), None)
        if ending is None:
            other = next((label for mark, label in _OTHER_TYPES.items() if mark in key), "")
            reason = f"holds {other} weights ({key})" if other else f"has a tensor {key}"
            raise ModelFileError(f"{name} {reason}: the file tools work on plain LoRA files")
        split.setdefault(key.removesuffix(ending), {})[_ROLES[ending]] = tensor
    pairs: dict[str, Pair] = {}
    for stem, parts in split.items():
        if parts.keys() == {"alpha"}:
            continue
        if "down" not in parts or "up" not in parts:
            raise ModelFileError(
                f"{name} is incomplete: {stem} lacks its {'up' if 'down' in parts else 'down'} weight"
            )
        down, up = parts["down"], parts["up"]
        if down.ndim not in (2, 4) or up.ndim != down.ndim or up.shape[1] != down.shape[0]:
            raise ModelFileError(
                f"{name} is broken: {stem} has weights of {tuple(down.shape)} and {tuple(up.shape)}"
            )
        alpha = float(parts["alpha"]) if "alpha" in parts else peft_alpha(stem, file.metadata)
        pairs[stem] = Pair(down, up, alpha or float(len(down)))
    if not pairs:
        raise ModelFileError(f"{name} holds no LoRA weights: choose a LoRA file")
    kind = _names.kind_of(pairs, {stem: pair.down.shape[1] for stem, pair in pairs.items()}, file.metadata)
    return kind, _named(pairs, kind)


def _named(pairs: Mapping[str, Pair], kind: Kind) -> dict[str, Pair]:
    """The pairs under Kohya's stems; what diffusers splits of FLUX's layers is put together."""
    found: dict[str, Pair] = {}
    groups: dict[str, dict[int, Pair]] = {}
    for stem, pair in pairs.items():
        name, part = _names.to_kohya(stem, kind)
        if part is None:
            found[name] = pair
        else:
            groups.setdefault(name, {})[part] = pair
            found[name] = pair  # keeps the place; replaced below
    for name, group in groups.items():
        found[name] = _joined(group, _names.part_count(name))
    return found


def _joined(group: Mapping[int, Pair], count: int) -> Pair:
    """Pairs of a layer's parts as one pair of the whole layer.

    Parts with one down weight between them (a fused LoRA that was taken apart) get one again; else
    down weights are stacked and up weights stand on the block diagonal.
    """
    first = next(iter(group.values()))
    width = first.down.shape[1]
    rows = [
        len(group[part].up) if part in group else width * (4 if part == 3 else 1) for part in range(count)
    ]
    shared = all(
        pair.alpha == first.alpha
        and pair.down.shape == first.down.shape
        and torch.equal(pair.down, first.down)
        for pair in group.values()
    )
    if shared:
        up = first.up.new_zeros((sum(rows), first.rank))
        for part, pair in group.items():
            up[sum(rows[:part]) :][: rows[part]] = pair.up
        return Pair(first.down, up, first.alpha)
    rank = sum(pair.rank for pair in group.values())
    up, column = first.up.new_zeros((sum(rows), rank)), 0
    same_scale = len({pair.scale for pair in group.values()}) == 1
    for part, pair in sorted(group.items()):
        strength = 1.0 if same_scale else pair.scale
        up[sum(rows[:part]) :][: rows[part], column : column + pair.rank] = pair.up * strength
        column += pair.rank
    down = torch.cat([group[part].down for part in sorted(group)])
    return Pair(down, up, rank * first.scale if same_scale else float(rank))


def thin_svd(up_Or: Tensor, down_rI: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Singular value decomposition of ``up @ down`` without forming the product.

    With up = Qu Ru and down^T = Qd Rd the product is Qu (Ru Rd^T) Qd^T, and the matrix in the middle has
    no more than r rows and columns.

    Returns:
        U (O, n), S (n) in falling order and Vh (n, I), float64.
    """
    left, upper = torch.linalg.qr(up_Or.double())
    right, lower = torch.linalg.qr(down_rI.double().T)
    u, s, vh = torch.linalg.svd(upper @ lower.T, full_matrices=False)
    return left @ u, s, vh @ right.T


def described(pairs: Mapping[str, Pair]) -> dict[str, str]:
    """ss_network_dim and ss_network_alpha; "Dynamic" where layers differ, as in sd-scripts."""
    dims = {pair.rank for pair in pairs.values()}
    alphas = {pair.alpha for pair in pairs.values()}
    return {
        "ss_network_dim": str(dims.pop()) if len(dims) == 1 else "Dynamic",
        "ss_network_alpha": str(alphas.pop()) if len(alphas) == 1 else "Dynamic",
    }


def check_output(path: Path, *inputs: Path) -> None:
    """Refuse outputs that are no .safetensors file or that are one of the inputs.

    Raises:
        ConfigError: Choose another name.
    """
    if path.suffix.lower() != ".safetensors":
        raise ConfigError(f"{path.name or path}: the result is written as .safetensors; give it that ending")
    for source in inputs:
        if path.exists() and source.exists() and path.samefile(source):
            raise ConfigError(f"{path} is one of the files that are read: give the result another name")


def write(
    path: Path,
    pairs: Mapping[str, Pair],
    metadata: Mapping[str, str],
    *,
    precision: str | None,
    kind: Kind,
    format: Format = "kohya",
    say: Callable[[str], None] | None = None,
) -> int:
    """Write pairs as a LoRA file with fresh hashes.

    Args:
        path: .safetensors.
        pairs: By Kohya's stem.
        metadata: Without hashes.
        precision: save_precision; None keeps each tensor's dtype.
        kind: The family.
        format: Whose names the file gets. Those without alpha get weights that include it.
        say: Told what was written.

    Returns:
        Size in bytes.
    """
    tensors: dict[str, Tensor] = {}
    for stem, pair in pairs.items():
        if format == "kohya":
            tensors[f"{stem}.lora_down.weight"] = pair.down
            tensors[f"{stem}.lora_up.weight"] = pair.up
            tensors[f"{stem}.alpha"] = torch.tensor(pair.alpha, dtype=pair.down.dtype)
            continue
        for name, (down, up) in _split(stem, pair, kind, format).items():
            tensors[f"{name}.lora_A.weight"] = down
            tensors[f"{name}.lora_B.weight"] = up
    kept = {key: value for key, value in metadata.items() if not key.startswith("sshs_")}
    size_bytes = save(path, tensors, kept, precision)
    if say is not None:
        say(f"saved {path} ({size_bytes / 2**20:.1f} MiB)")
    return size_bytes


def _split(stem: str, pair: Pair, kind: Kind, format: Format) -> dict[str, tuple[Tensor, Tensor]]:
    """Names and weights of a pair in a format without alpha."""
    names = _names.from_kohya(stem, kind, format)
    for_down, for_up = balanced(pair.scale)
    down, up = pair.down * for_down, pair.up * for_up
    if len(names) == 1:
        return {names[0]: (down, up)}
    width = down.shape[1]
    rows = [width] * 3 + [len(up) - 3 * width] * (len(names) - 3)
    ups = torch.split_with_sizes(up, rows)
    count = len(names)
    if pair.rank % count == 0:
        rank = pair.rank // count
        blocks = [part[:, index * rank : (index + 1) * rank] for index, part in enumerate(ups)]
        # Each part with a pair of its own, put together once: all that is off the diagonal is 0.
        if sum(int(block.count_nonzero()) for block in blocks) == int(up.count_nonzero()):
            downs = down.chunk(count)
            return {
                name: (downs[index].clone(), blocks[index].contiguous()) for index, name in enumerate(names)
            }
    return {name: (down.clone(), ups[index].contiguous()) for index, name in enumerate(names)}


def balanced(scale: float) -> tuple[float, float]:
    """``scale`` as two factors for down and up, the second a power of two, so that neither is tiny.

    As sd-scripts divides it (networks/convert_flux_lora.py:convert_to_ai_toolkit).
    """
    for_down, for_up = scale, 1.0
    while 0 < for_down * 2 < for_up:
        for_down *= 2
        for_up /= 2
    return for_down, for_up
