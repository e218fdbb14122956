"""LoRA on FLUX.1: Kohya's type "Flux1" (sd-scripts, networks/lora_flux.py).

The layers are those of Black Forest Labs' files, where q, k and v (and the MLP of a single block) are
one; the family's transformer is built that way, so a layer's LoRA is an ordinary one. With split_qkv
each part gets a pair of its own, and the file holds them as one: down weights stacked, up weights on
the block diagonal.

Axes: r rank, n parts of a layer, O/I output and input width.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from trainer.errors import ConfigError, ModelFileError
from trainer.memory.quantise import dense
from trainer.networks._base import ParamGroup
from trainer.networks.lora import (
    LoraLayer,
    LoraNetwork,
    Ranks,
    lr_groups,
    number,
    product_square,
)

if TYPE_CHECKING:
    from trainer.draws import Draws
    from trainer.families._base import Family, Say, Target
    from trainer.job import Job
    from trainer.networks._blocks import BlockCounts

__all__ = ["FluxLoraNetwork", "PerturbedLoraLayer", "SplitLoraLayer"]

DOUBLE_BLOCKS, SINGLE_BLOCKS = 19, 38
"""Of FLUX.1; block numbers are checked against them, also with a pruned model."""

PART_RANKS: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("img_attn_dim", ("img_attn",)),
    ("txt_attn_dim", ("txt_attn",)),
    ("img_mlp_dim", ("img_mlp",)),
    ("txt_mlp_dim", ("txt_mlp",)),
    ("img_mod_dim", ("img_mod",)),
    ("txt_mod_dim", ("txt_mod",)),
    ("single_dim", ("single_blocks", "linear")),
    ("single_mod_dim", ("modulation",)),
)
"""Options for the rank of a kind of layer, and what such a layer's name contains; the first counts."""

GGPO = ("ggpo_sigma", "ggpo_beta")
NORM_ROWS = 1000
"""Rows of a frozen weight whose norms are taken for GGPO (sd-scripts)."""

IN_LAYERS = ("_img_in", "_time_in", "_vector_in", "_guidance_in", "_txt_in")
"""What the names of the input layers contain, in the order of in_dims."""


class SplitLoraLayer(LoraLayer):
    """One pair for each of the n parts that a fused layer's output consists of.

    ``lora_down`` holds the n down weights, (n r, I); ``lora_up`` the rows of each part's up weight, (O, r).
    """

    def __init__(self, target: Target, rank: int, alpha: float, **options: Any) -> None:
        super().__init__(target, rank, alpha, **options)
        base = target.module
        assert isinstance(base, nn.Linear)
        width = base.in_features
        self.rows = [width] * 3
        if base.out_features > 3 * width:
            self.rows.append(base.out_features - 3 * width)
        downs = [self.lora_down.detach()]
        generator = options["generator"]
        for _ in self.rows[1:]:
            downs.append(nn.init.kaiming_uniform_(torch.empty_like(downs[0]), a=5**0.5, generator=generator))
        self.lora_down = nn.Parameter(torch.cat(downs))

    def forward(self, x: Tensor) -> Tensor:
        """The layer's output with the addition. Only valid while attached."""
        assert self.base_forward is not None
        out = self.base_forward(x)
        if self.multiplier == 0:
            return out
        if self.module_dropout and self.training and torch.rand(1) < self.module_dropout:
            return out
        factor = self.multiplier * self.scale
        narrow = functional.linear(x, self.lora_down)
        if self.dropout and self.training:
            narrow = functional.dropout(narrow, self.dropout)
        if self.rank_dropout and self.training:
            shape = (narrow.shape[0], *[1] * (narrow.ndim - 2), narrow.shape[-1])
            narrow = narrow * (torch.rand(shape, device=narrow.device) > self.rank_dropout)
            factor /= 1 - self.rank_dropout
        ups = torch.split_with_sizes(self.lora_up, self.rows)
        parts = narrow.chunk(len(self.rows), dim=-1)
        change = [functional.linear(part, up) for part, up in zip(parts, ups, strict=True)]
        return out + torch.cat(change, dim=-1) * factor

    def tensors(self) -> dict[str, Tensor]:
        """See `LoraLayer.tensors`.

        The stored rank is n r, so alpha is stored n times as large: readers divide one by the other.
        (sd-scripts stores alpha as it is; its files have an n-th of the strength that was trained.)
        """
        found = super().tensors()
        name = self.target[0].name
        ups = torch.split_with_sizes(self.lora_up.detach().cpu(), self.rows)
        found[f"{name}.lora_up.weight"] = _block_diagonal(ups)
        found[f"{name}.alpha"] = found[f"{name}.alpha"] * len(self.rows)
        return found

    def product_norm(self) -> Tensor:
        """See `LoraLayer.product_norm`: the parts' rows are apart, so their squares add up."""
        downs = self.lora_down.chunk(len(self.rows))
        ups = torch.split_with_sizes(self.lora_up, self.rows)
        squares = [product_square(down, up) for down, up in zip(downs, ups, strict=True)]
        return torch.stack(squares).sum().sqrt() * self.scale

    @torch.no_grad()
    def load(self, tensors: Mapping[str, Tensor]) -> set[str]:
        """See `LoraLayer.load`; a file of one pair for the whole layer gives it to every part."""
        name, count = self.target[0].name, len(self.rows)
        down, up = (tensors.get(f"{name}.lora_{side}.weight") for side in ("down", "up"))
        if down is None or up is None:
            return super().load(tensors)
        alpha = tensors.get(f"{name}.alpha")
        if down.shape == self.lora_down.shape and up.shape == (sum(self.rows), count * self.rank):
            offset, blocks = 0, []
            for index, rows in enumerate(self.rows):
                columns = slice(index * self.rank, (index + 1) * self.rank)
                blocks.append(up[offset : offset + rows, columns])
                offset += rows
            up = torch.cat(blocks)
            alpha = None if alpha is None else alpha / count
        elif down.shape == (self.rank, self.lora_down.shape[1]) and up.shape == self.lora_up.shape:
            down = down.repeat(count, 1)
        else:
            raise ModelFileError(
                f"{name} is {tuple(down.shape)} and {tuple(up.shape)} in the file, which does not fit rank "
                f"{self.rank} with split_qkv: set network_dim to the file's rank, or switch split_qkv off"
            )
        self.lora_down.copy_(down)
        self.lora_up.copy_(up)
        used = {f"{name}.lora_down.weight", f"{name}.lora_up.weight"}
        if alpha is not None:
            value = float(alpha) or float(self.rank)
            if value != self.alpha:
                self.alpha = value
            used.add(f"{name}.alpha")
        return used


class PerturbedLoraLayer(LoraLayer):
    """A pair beside which noise is added to the frozen weight while it trains (GGPO).

    Chang et al. 2025, arXiv:2502.14538; sd-scripts, networks/lora_flux.py:LoRAModule.
    The noise of a row grows with the norm of the row's weights and with that of its last gradient, so it
    begins after the first step. It is fed forward only: no gradient passes through it.
    """

    sigma = 0.0
    beta = 0.0
    norm: Tensor
    """Mean norm of the frozen weight's rows, 0-d."""

    def __init__(self, target: Target, rank: int, alpha: float, **options: Any) -> None:
        super().__init__(target, rank, alpha, **options)
        self.spread_O1: Tensor | None = None
        """Standard deviation of each row's noise."""

    @torch.no_grad()
    def begin(self, sigma: float, beta: float, generator: torch.Generator) -> None:
        """Take the norm of the frozen weight's rows, of a thousand of them where there are more.

        Args:
            sigma: Noise for the norm of a row's weights.
            beta: Noise for the square of its gradient's norm.
            generator: Draws the rows.
        """
        self.sigma, self.beta = sigma, beta
        weight_OI = dense(self.target[0].module, torch.float32)
        rows = torch.randperm(len(weight_OI), generator=generator)[:NORM_ROWS]
        self.norm = torch.linalg.vector_norm(weight_OI[rows.to(weight_OI.device)], dim=1).mean()

    @torch.no_grad()
    def look(self) -> None:
        """Set the noise by the weights and gradients of this step.

        As in sd-scripts the norm of the pair's product is taken without its scale. The sums of squares
        come from r x r products: O x I is never formed.
        """
        up_Or, down_rI = self.lora_up.float(), self.lora_down.float()
        if self.lora_up.grad is None or self.lora_down.grad is None:
            return
        change_O1 = _row_squares(up_Or, down_rI)
        grad_O1 = _row_squares(
            torch.cat([up_Or, self.lora_up.grad.float()], dim=1),
            torch.cat([self.lora_down.grad.float(), down_rI]),
        )
        norm = self.norm.to(up_Or.device)
        spread = self.sigma * (norm.square() + change_O1).sqrt() + self.beta * self.scale**2 * grad_O1
        self.spread_O1 = spread / len(up_Or) ** 0.5

    def forward(self, x: Tensor) -> Tensor:
        """The layer's output with the addition and the noise. Only valid while attached."""
        if not self.training or self.spread_O1 is None or self.multiplier == 0:
            return super().forward(x)
        assert self.base_forward is not None
        chance, self.module_dropout = self.module_dropout, 0.0
        if chance and torch.rand(1) < chance:
            self.module_dropout = chance
            return self.base_forward(x)
        out = super().forward(x)
        self.module_dropout = chance
        with torch.no_grad():
            shape = (len(self.lora_up), self.lora_down.shape[1])
            noise_OI = torch.randn(shape, dtype=self.lora_up.dtype, device=self.lora_up.device)
            change = functional.linear(x, noise_OI.mul_(self.spread_O1.to(noise_OI.dtype)))
        return out + change


class FluxLoraNetwork(LoraNetwork):
    """The layers of one FLUX LoRA, in sd-scripts' order."""

    kohya_types: ClassVar[tuple[str, ...]] = ("Flux1",)
    module = "networks.lora_flux"

    @classmethod
    def looks(cls, job: Job, counts: BlockCounts) -> Iterator[Callable[[], object]]:
        """See `LoraNetwork.looks`."""
        yield from super().looks(job, counts)
        args = job.network_args
        yield partial(_only_one, job)
        for name in (*GGPO, *(name for name, _ in PART_RANKS)):
            yield partial(number, args, name)
        yield partial(_in_dims, args.get("in_dims", ""))
        for name in ("network_reg_dims", "network_reg_lrs"):
            yield partial(pairs, args.get(name, ""), name)
        yield partial(_train_blocks, args)
        yield partial(_blocks, args, "train_double_block_indices", DOUBLE_BLOCKS)
        yield partial(_blocks, args, "train_single_block_indices", SINGLE_BLOCKS)

    @classmethod
    def create(cls, family: Family, job: Job, draws: Draws, say: Say) -> LoraNetwork:
        """See `Network.create`."""
        _only_one(job)
        network = super().create(family, job, draws, say)
        for layer in network.layers:
            if isinstance(layer, PerturbedLoraLayer):
                sigma, beta = (number(job.network_args, name) for name in GGPO)
                layer.begin(sigma, beta, draws.generator(f"ggpo {layer.target[0].name}"))
        return network

    def before_update(self) -> None:
        """See `Network.before_update`."""
        for layer in self.layers:
            if isinstance(layer, PerturbedLoraLayer):
                layer.look()

    @classmethod
    def ranks(cls, family: Family, job: Job, weights: list[float] | None) -> Ranks:
        """See `LoraNetwork.ranks`; options in the order in which lora_flux.py looks at them."""
        args, dim, alpha = job.network_args, job.config.network_dim, job.config.network_alpha
        parts = [(int(number(args, name)), words) for name, words in PART_RANKS if name in args]
        in_dims = _in_dims(args.get("in_dims", ""))
        by_pattern = pairs(args.get("network_reg_dims", ""), "network_reg_dims")
        train_blocks = _train_blocks(args)
        chosen = {
            "double": _blocks(args, "train_double_block_indices", DOUBLE_BLOCKS),
            "single": _blocks(args, "train_single_block_indices", SINGLE_BLOCKS),
        }

        def ranks(target: Target) -> tuple[int, float] | None:
            name = target.name
            kind = "double" if "_double_blocks_" in name else "single" if "_single_blocks_" in name else ""
            if kind and train_blocks not in ("all", kind):
                return None
            for pattern, value in by_pattern:
                if pattern.search(name):
                    return int(value), alpha
            if target.part != "unet":
                return dim, alpha
            if not kind:
                place = next(index for index, word in enumerate(IN_LAYERS) if word in name)
                return (in_dims[place], alpha) if in_dims else None
            rank = next((value for value, words in parts if all(word in name for word in words)), dim)
            block = int(name.split("_")[4])
            return (rank if block in chosen[kind] else 0), alpha

        return ranks

    @classmethod
    def trains(cls, job: Job, target: Target, *, from_weights: bool) -> bool:
        """See `LoraNetwork.trains`."""
        if target.part == "te3":
            return job.trains_t5 or (from_weights and job.trains_text_encoder)
        if target.part == "te1":
            return job.trains_text_encoder
        wanted = not target.optional or from_weights or "in_dims" in job.network_args
        return job.trains_unet and wanted

    @classmethod
    def layer(cls, job: Job, target: Target) -> type[LoraLayer]:
        """See `LoraNetwork.layer`."""
        from_weights = job.config.network_weights and job.config.dim_from_weights
        fused = target.name.endswith(("_qkv", "_linear1"))
        if _perturbs(job) and not from_weights:
            return PerturbedLoraLayer
        split = fused and job.network_args.get("split_qkv") == "True" and not from_weights
        return SplitLoraLayer if split else LoraLayer

    def param_groups(self) -> list[ParamGroup]:
        """CLIP-L, T5, transformer; in each, groups of network_reg_lrs first, then base and plus."""
        job = self.job
        from_weights = job.config.network_weights and job.config.dim_from_weights
        args: Mapping[str, str] = {} if from_weights else job.network_args
        ratio = number(args, "loraplus_lr_ratio")
        text_ratio = number(args, "loraplus_text_encoder_lr_ratio") or ratio
        by_pattern = pairs(args.get("network_reg_lrs", ""), "network_reg_lrs")
        found: list[ParamGroup] = []
        for name, part, rate, plus in (
            # sd-scripts' names end in a blank.
            ("textencoder 1 ", "te1", job.text_encoder_lr, text_ratio),
            ("textencoder 2 ", "te3", job.t5xxl_lr or job.text_encoder_lr, text_ratio),
            ("unet", "unet", job.unet_lr, number(args, "loraplus_unet_lr_ratio") or ratio),
        ):
            rest = [layer for layer in self.layers if layer.target[0].part == part]
            for index, (pattern, value) in enumerate(by_pattern):
                matched = [layer for layer in rest if pattern.search(layer.target[0].name)]
                rest = [layer for layer in rest if layer not in matched]
                start = f"{name} " if part != "unet" else "unet "
                found += lr_groups(f"{start}reg_lr_{index}", matched, value, plus)
            found += lr_groups(name, rest, rate, plus)
        return found


PLUGIN = FluxLoraNetwork


def _perturbs(job: Job) -> bool:
    return all(name in job.network_args for name in GGPO)


def _row_squares(a_OX: Tensor, b_XI: Tensor) -> Tensor:
    """Sum of squares of each row of ``a @ b``, O1."""
    squares: Tensor = ((a_OX @ (b_XI @ b_XI.T)) * a_OX).sum(dim=1, keepdim=True)
    return squares.clamp(min=0)


def _block_diagonal(blocks: Sequence[Tensor]) -> Tensor:
    """(O, n r) with the (rows, r) blocks on its diagonal."""
    rank = blocks[0].shape[1]
    whole = blocks[0].new_zeros((sum(len(block) for block in blocks), rank * len(blocks)))
    offset = 0
    for index, block in enumerate(blocks):
        whole[offset : offset + len(block), index * rank : (index + 1) * rank] = block
        offset += len(block)
    return whole


def _only_one(job: Job) -> None:
    if _perturbs(job) and job.network_args.get("split_qkv") == "True":
        raise ConfigError("GGPO and split_qkv exclude each other (sd-scripts fails on both): untick one")


def _train_blocks(args: Mapping[str, str]) -> str:
    found = args.get("train_blocks", "all")
    if found not in ("all", "double", "single"):
        raise ConfigError(f"train_blocks is {found!r}: allowed are all, double and single")
    return found


def _in_dims(text: str) -> list[int]:
    inner = text.strip().removeprefix("[").removesuffix("]")
    if not inner:
        return []
    try:
        found = [int(part) for part in inner.split(",")]
    except ValueError:
        found = []
    if len(found) != 5:
        raise ConfigError(f"in_dims is {text!r}: expected five ranks (img, time, vector, guidance, txt)")
    return found


def _blocks(args: Mapping[str, str], field: str, count: int) -> Sequence[int]:
    """Block numbers that an option names: all, none, or numbers and ranges such as 0-3,8."""
    text = args.get(field, "all").strip()
    if text == "all":
        return range(count)
    if text in ("none", ""):
        return []
    found: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(r"\s*(\d+)\s*(?:-\s*(\d+)\s*)?", part)
        first, last = (int(match[1]), int(match[2] or match[1])) if match else (1, 0)
        if not first <= last < count:
            raise ConfigError(
                f"{field} is {text!r}: expected all, none, or numbers and ranges from 0 to {count - 1} such as "
                "0-3,8"
            )
        found += range(first, last + 1)
    return found


def pairs(text: str, field: str) -> list[tuple[re.Pattern[str], float]]:
    """Read ``regex=number,regex=number``.

    Raises:
        ConfigError: A part is not of this form.
    """
    found = []
    for part in filter(None, (each.strip() for each in text.split(","))):
        pattern, equals, value = part.partition("=")
        try:
            if not equals:
                raise ValueError(part)
            found.append((re.compile(pattern.strip()), float(value)))
        except (ValueError, re.error) as error:
            raise ConfigError(f"{field}: {part!r} must read regex=number ({error})") from error
    return found
