"""LoRA (Hu et al. 2021, arXiv:2106.09685) on linear layers and convolutions, as sd-scripts makes it.

A layer computes ``base(x) + up(down(x)) * alpha / rank``; the product of the two weights is never
formed. Types "Standard" (linear layers and 1x1 convolutions of the transformer blocks) and
"Kohya LoCon" (residual, down- and upsampling blocks as well).

Axes: r rank, O/I output and input width, k kernel size.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from trainer.errors import ConfigError, ModelFileError
from trainer.lora_file import read_lora
from trainer.networks._base import Network, ParamGroup
from trainer.networks._blocks import BlockCounts, block_ranks, lr_weights
from trainer.networks._names import kohya_tensors

if TYPE_CHECKING:
    from trainer.draws import Draws
    from trainer.families._base import Family, Say, Target
    from trainer.job import Job

__all__ = ["LoraLayer", "LoraNetwork", "lr_groups", "number", "product_square"]

LORA_PLUS = ("loraplus_lr_ratio", "loraplus_unet_lr_ratio", "loraplus_text_encoder_lr_ratio")
LR_WEIGHTS = ("down_lr_weight", "mid_lr_weight", "up_lr_weight")

RankAndAlpha = tuple[int, float]
Ranks = Callable[["Target"], RankAndAlpha | None]
"""Rank and alpha of a layer; None leaves the layer alone."""


class LoraLayer(nn.Module):
    """The trainable pair of one layer, and what the layer's forward pass becomes.

    Args:
        target: The layer; it is not owned, moved or saved by this module.
        rank: Width between the two weights.
        alpha: The product is scaled by alpha / rank. 0 means rank.
        generator: Gives the start of the down weight; the up weight starts at 0.
        dropout: Chance of each element of down(x) to be dropped.
        rank_dropout: Chance of each rank to be dropped, for a whole sample.
        module_dropout: Chance of the whole addition to be left out of a call.
    """

    def __init__(
        self,
        target: Target,
        rank: int,
        alpha: float,
        *,
        generator: torch.Generator,
        dropout: float = 0.0,
        rank_dropout: float = 0.0,
        module_dropout: float = 0.0,
    ) -> None:
        super().__init__()
        base = target.module
        self.target = (target,)  # in a tuple, so that the frozen layer is no submodule
        self.rank = rank
        self.alpha = alpha or rank
        self.dropout = dropout
        self.rank_dropout = rank_dropout
        self.module_dropout = module_dropout
        self.multiplier = 1.0
        self.is_conv = isinstance(base, nn.Conv2d)
        if isinstance(base, nn.Conv2d):
            down_shape: tuple[int, ...] = (rank, base.in_channels // base.groups, *base.kernel_size)
            up_shape: tuple[int, ...] = (base.out_channels, rank, 1, 1)
        else:
            down_shape, up_shape = (rank, base.in_features), (base.out_features, rank)
        self.lora_down = nn.Parameter(torch.empty(down_shape))
        self.lora_up = nn.Parameter(torch.zeros(up_shape))
        nn.init.kaiming_uniform_(self.lora_down, a=math.sqrt(5), generator=generator)
        self.base_forward: Callable[[Tensor], Tensor] | None = None
        self.was_patched = False

    @property
    def scale(self) -> float:
        """Alpha / rank."""
        return self.alpha / self.rank

    def attach(self) -> None:
        """Take the place of the layer's forward pass."""
        module = self.target[0].module
        if self.base_forward is None:
            module.requires_grad_(False)
            self.was_patched = "forward" in vars(module)
            self.base_forward = module.forward
            # On the instance, not as a wrapping module: names, moves and state dicts stay the model's own.
            module.forward = self.forward  # type: ignore[method-assign, assignment]

    def detach(self) -> None:
        """Give the layer its own forward pass back."""
        module = self.target[0].module
        if self.base_forward is not None:
            if self.was_patched:
                module.forward = self.base_forward  # type: ignore[method-assign, assignment]
            else:
                del module.forward
            self.base_forward = None

    def forward(self, x: Tensor) -> Tensor:
        """The layer's output with the addition. Only valid while attached."""
        assert self.base_forward is not None
        out = self.base_forward(x)
        if self.multiplier == 0:
            return out
        factor = self.multiplier * self.scale
        keep: Tensor | None = None
        if self.module_dropout and self.training:
            # A draw on the CPU: no wait for the device. Compiled, a branch would split the graph.
            keep = torch.rand(1) >= self.module_dropout
            if not torch.compiler.is_compiling():
                if not keep:
                    return out
                keep = None
        narrow = self._down(x)
        if self.dropout and self.training:
            narrow = functional.dropout(narrow, self.dropout)
        if self.rank_dropout and self.training:
            mask_Br = torch.rand((narrow.shape[0], self.rank), device=narrow.device) > self.rank_dropout
            between = narrow.ndim - 2
            shape = (-1, self.rank, *[1] * between) if self.is_conv else (-1, *[1] * between, self.rank)
            narrow = narrow * mask_Br.view(shape)
            factor /= 1 - self.rank_dropout
        if keep is not None:
            narrow = narrow * keep.to(narrow.device)
        if not self.is_conv:
            # One pass over the wide output, where scaling and adding would take two more.
            up_rO = self.lora_up.t()
            return torch.addmm(out.flatten(0, -2), narrow.flatten(0, -2), up_rO, alpha=factor).view(out.shape)
        # Scaled while it is r channels wide.
        return out + functional.conv2d(narrow if factor == 1 else narrow * factor, self.lora_up)

    def _down(self, x: Tensor) -> Tensor:
        base = self.target[0].module
        if isinstance(base, nn.Conv2d):
            return functional.conv2d(
                x, self.lora_down, None, base.stride, base.padding, base.dilation, base.groups
            )
        return functional.linear(x, self.lora_down)

    def tensors(self) -> dict[str, Tensor]:
        """The layer's part of the state dict, detached, on the CPU."""
        (target,) = self.target
        down, up = self.lora_down.detach().cpu(), self.lora_up.detach().cpu()
        # A whole number stays one: without save_precision, Kohya's alphas are int64 then.
        alpha = torch.tensor(self.alpha, dtype=up.dtype if isinstance(self.alpha, float) else None)
        if target.saved_as_conv:
            down, up = down[:, :, None, None], up[:, :, None, None]
        return {
            f"{target.name}.alpha": alpha,
            f"{target.name}.lora_down.weight": down,
            f"{target.name}.lora_up.weight": up,
        }

    def product_norm(self) -> Tensor:
        """Frobenius norm of ``up @ down * scale``, 0-d."""
        return product_square(self.lora_down, self.lora_up).sqrt() * self.scale

    @torch.no_grad()
    def load(self, tensors: Mapping[str, Tensor]) -> set[str]:
        """Take this layer's tensors from ``tensors``; returns the keys that were used.

        Raises:
            ModelFileError: A tensor has another shape.
        """
        name = self.target[0].name
        used: set[str] = set()
        for key, parameter in (
            (f"{name}.lora_down.weight", self.lora_down),
            (f"{name}.lora_up.weight", self.lora_up),
        ):
            if key not in tensors:
                continue
            value = tensors[key]
            # Kohya's files hold some linear layers as 1x1 convolutions, and other programs' do not.
            if value.numel() == parameter.numel() and {value.ndim, parameter.ndim} == {2, 4}:
                value = value.reshape(parameter.shape)
            if value.shape != parameter.shape:
                raise ModelFileError(
                    f"{key} is {tuple(value.shape)} in the file, and this network's is "
                    f"{tuple(parameter.shape)}: set network_dim to the file's rank, or dim_from_weights"
                )
            parameter.copy_(value)
            used.add(key)
        key = f"{name}.alpha"
        if key in tensors:
            alpha = float(tensors[key]) or self.rank
            if alpha != self.alpha:
                self.alpha = alpha
            used.add(key)
        return used


def product_square(down: Tensor, up: Tensor) -> Tensor:
    """Squared Frobenius norm of ``up @ down`` from the two r x r Gram matrices: O x I is never formed."""
    down_rX, up_Or = down.flatten(1).float(), up.flatten(1).float()
    square: Tensor = ((up_Or.T @ up_Or) * (down_rX @ down_rX.T)).sum()
    return square.clamp(min=0)


class LoraNetwork(Network):
    """The layers of one LoRA, in Kohya's order."""

    kohya_types: ClassVar[tuple[str, ...]] = ("Standard", "Kohya LoCon")
    module = "networks.lora"

    def __init__(self, layers: list[LoraLayer], job: Job, weights: list[float] | None) -> None:
        self.layers = layers
        self.job = job
        self.block_lr_weights = weights

    @classmethod
    def check(cls, job: Job, counts: BlockCounts) -> None:
        """See `Network.check`."""
        wrong: list[str] = []
        for look in cls.looks(job, counts):
            try:
                look()
            except ConfigError as error:
                wrong += error.messages
        if wrong:
            raise ConfigError(*dict.fromkeys(wrong))

    @classmethod
    def looks(cls, job: Job, counts: BlockCounts) -> Iterator[Callable[[], object]]:
        """What `check` does, option by option: each raises ConfigError where it cannot be."""
        args = job.network_args
        yield partial(_dropouts, {"dropout": str(job.config.network_dropout or 0.0)})
        for name in ("rank_dropout", "module_dropout"):
            yield partial(_dropouts, _only(args, name))
        for name in LORA_PLUS:
            yield partial(number, args, name)
        for name in LR_WEIGHTS:
            yield partial(lr_weights, _only(args, name, "block_lr_zero_threshold"), counts)
        total = sum(counts)
        if total and any(name in args for name in ("block_dims", *LR_WEIGHTS)):
            ones = ",".join(["1"] * total)  # without conv_block_dims nobody looks at conv_block_alphas
            also = {"conv_block_dims": ones} if "conv_block_dims" in args else {}
            for name in ("block_dims", "block_alphas", "conv_block_dims", "conv_block_alphas"):
                given, equal = also | _only(args, name), [1.0] * total
                yield partial(block_ranks, given, counts, equal, dim=1, alpha=1, conv_dim=1, conv_alpha=1)

    @classmethod
    def create(cls, family: Family, job: Job, draws: Draws, say: Say) -> LoraNetwork:
        """See `Network.create`."""
        args, config = job.network_args, job.config
        weights = lr_weights(args, family.kohya_blocks)
        path = job.path(config.network_weights) if config.network_weights else None
        start = kohya_tensors(read_lora(path), family) if path else None
        from_weights = start is not None and config.dim_from_weights
        if start is not None and from_weights:
            ranks = ranks_of(start)
            say(
                "dim_from_weights: ranks and alphas come from the file; as in Kohya, dropouts and LoRA+ are off"
            )
        else:
            ranks = cls.ranks(family, job, weights)
        dropouts = _dropouts({**args, "dropout": str(config.network_dropout or 0.0)})
        if from_weights:
            dropouts = dict.fromkeys(dropouts, 0.0)
        layers = []
        for target in family.targets():
            found = ranks(target) if cls.trains(job, target, from_weights=from_weights) else None
            if found is not None and found[0] > 0:
                generator = draws.generator(f"lora {target.name}")
                rank, alpha = found
                layers.append(cls.layer(job, target)(target, rank, alpha, generator=generator, **dropouts))
        if not layers:
            raise ConfigError(
                "no layer gets a LoRA: every block has rank or weight 0"
                + (", or none is in network_weights" if from_weights else "")
            )
        network = cls(layers, job, weights)
        say(network.describe())
        if start is not None and path is not None:
            network._start_from(path, start, say)
        return network

    @classmethod
    def ranks(cls, family: Family, job: Job, weights: list[float] | None) -> Ranks:
        """Rank and alpha of each layer from the configuration.

        Args:
            family: The loaded models.
            job: The run.
            weights: Learning rate weights of the blocks, if there are any.
        """
        return _ranks(family, job, weights)

    @classmethod
    def trains(cls, job: Job, target: Target, *, from_weights: bool) -> bool:
        """Whether the job trains the part of the model that ``target`` belongs to.

        Args:
            job: The run.
            target: The layer.
            from_weights: Layers are taken from a file (dim_from_weights).
        """
        if target.optional:
            return False
        return job.trains_unet if target.part == "unet" else job.trains_text_encoder

    @classmethod
    def layer(cls, job: Job, target: Target) -> type[LoraLayer]:
        """The class of a layer's trainable pair."""
        return LoraLayer

    def describe(self) -> str:
        """One line for the console: ranks, alphas and number of modules."""
        pairs = sorted({(layer.rank, float(layer.alpha)) for layer in self.layers})
        shown = ", ".join(f"{rank} (alpha {alpha:g})" for rank, alpha in pairs[:4])
        unet = sum(layer.target[0].part == "unet" for layer in self.layers)
        size = sum(parameter.numel() for parameter in self.parameters())
        return (
            f"network: rank {shown}{' and more' if len(pairs) > 4 else ''}; {unet} modules in the UNet, "
            f"{len(self.layers) - unet} in the text encoder, {size:,} parameters"
        )

    def _start_from(self, path: Path, tensors: Mapping[str, Tensor], say: Say) -> None:
        alphas = [layer.alpha for layer in self.layers]
        used = {key for layer in self.layers for key in layer.load(tensors)}
        if not any(key.endswith("weight") for key in used):
            raise ModelFileError(
                f"network_weights: none of the {len(tensors)} tensors in {path.name} belongs to a layer "
                "that is trained: is it a LoRA of another model family or of another LoRA type?"
            )
        if not all(bool(torch.isfinite(parameter).all()) for parameter in self.parameters()):
            raise ModelFileError(f"network_weights: {path.name} holds NaN or infinite numbers")
        missing = sum(f"{layer.target[0].name}.lora_up.weight" not in used for layer in self.layers)
        say(
            f"network_weights: {len(used)} of {len(tensors)} tensors taken from {path.name}"
            + (f"; {missing} layers are not in it and start from nothing" if missing else "")
        )
        changed = {
            layer.alpha for layer, before in zip(self.layers, alphas, strict=True) if layer.alpha != before
        }
        if changed:
            shown = ", ".join(f"{alpha:g}" for alpha in sorted(changed)[:4])
            say(f"network_weights: alpha {shown} comes from the file, whose weights were trained with it")

    def attach(self) -> None:
        """See `Network.attach`."""
        for layer in self.layers:
            layer.attach()

    def detach(self) -> None:
        """See `Network.detach`."""
        for layer in self.layers:
            layer.detach()

    def train(self, mode: bool = True) -> None:
        """See `Network.train`."""
        for layer in self.layers:
            layer.train(mode)

    def set_multiplier(self, multiplier: float) -> None:
        """See `Network.set_multiplier`."""
        for layer in self.layers:
            layer.multiplier = multiplier

    def to(self, device: torch.device, dtype: torch.dtype) -> None:
        """See `Network.to`."""
        for layer in self.layers:
            layer.to(device, dtype)

    def param_groups(self) -> list[ParamGroup]:
        """See `Network.param_groups`."""
        args = self.job.network_args
        plain = {} if self.job.config.network_weights and self.job.config.dim_from_weights else args
        ratio = number(plain, "loraplus_lr_ratio")
        unet_ratio = number(plain, "loraplus_unet_lr_ratio") or ratio
        text_ratio = number(plain, "loraplus_text_encoder_lr_ratio") or ratio
        text = [layer for layer in self.layers if layer.target[0].part != "unet"]
        unet = [layer for layer in self.layers if layer.target[0].part == "unet"]
        found = lr_groups("textencoder", text, self.job.text_encoder_lr, text_ratio)
        if self.block_lr_weights is None:
            return found + lr_groups("unet", unet, self.job.unet_lr, unet_ratio)
        blocks: dict[int, list[LoraLayer]] = {}  # in the order in which the layers come
        for layer in unet:
            blocks.setdefault(_block(layer.target[0]), []).append(layer)
        for block, layers in blocks.items():
            rate = self.job.unet_lr * self.block_lr_weights[block]
            found += lr_groups(f"unet_block{block}", layers, rate, unet_ratio)
        return found

    def parameters(self) -> Iterator[nn.Parameter]:
        """See `Network.parameters`."""
        for layer in self.layers:
            yield layer.lora_down
            yield layer.lora_up

    def freeze_text_encoder(self) -> None:
        """See `Network.freeze_text_encoder`."""
        for layer in self.layers:
            if layer.target[0].part != "unet":
                layer.requires_grad_(False)
                layer.lora_down.grad = layer.lora_up.grad = None

    def state_dict(self) -> dict[str, Tensor]:
        """See `Network.state_dict`."""
        return {key: tensor for layer in self.layers for key, tensor in layer.tensors().items()}

    def load_state_dict(self, tensors: Mapping[str, Tensor]) -> list[str]:
        """See `Network.load_state_dict`.

        Raises:
            ModelFileError: A tensor has another shape.
        """
        used = {key for layer in self.layers for key in layer.load(tensors)}
        ours = self.state_dict().keys()
        return [f"{key} is in the file and not in the network" for key in tensors if key not in used] + [
            f"{key} is in the network and not in the file" for key in ours if key not in used
        ]

    @torch.no_grad()
    def apply_max_norm(self, limit: float) -> dict[str, Tensor]:
        """Shrink every pair whose product ``up @ down * alpha / r`` has a Frobenius norm above ``limit``.

        Both weights are multiplied by the same root, so that the product gets the norm ``limit``
        (networks/lora.py:apply_max_norm_regularization). For a k x k convolution the norm is that of
        the composed kernel, which is the product of the flattened weights.
        """
        norms = torch.stack([layer.product_norm() for layer in self.layers])
        floored = norms.clamp(min=limit / 2)
        ratios = floored.clamp(max=limit) / floored
        roots = [root for root in ratios.sqrt().unbind() for _ in range(2)]
        for parameter, root in zip(self.parameters(), roots, strict=True):
            parameter.mul_(root)
        scaled = norms * ratios
        return {
            "max_norm/keys_scaled": (ratios != 1).sum(),
            "norm/avg_key_norm": scaled.mean(),
            "max_norm/max_key_norm": scaled.max(),
        }

    def metadata(self) -> dict[str, str]:
        """See `Network.metadata`."""
        config, engine = self.job.config, self.job.engine
        found = {
            "ss_network_module": engine.network_module or self.module,
            "ss_network_dim": str(config.network_dim),
            "ss_network_alpha": str(config.network_alpha),
            "ss_network_dropout": str(config.network_dropout or None),
        }
        if self.job.network_args:
            args: dict[str, str | float | None] = dict(self.job.network_args)
            if not (config.network_weights and config.dim_from_weights):
                args.setdefault("dropout", config.network_dropout or None)
            found["ss_network_args"] = json.dumps(args)
        return found

    @staticmethod
    def merge(family: Family, file: Path, multiplier: float, say: Say) -> None:
        """See `Network.merge`.

        Raises:
            ModelFileError: The file cannot be read, or no layer of it belongs to the model.
        """
        tensors = kohya_tensors(read_lora(file), family)
        ranks = ranks_of(tensors)
        merged: set[str] = set()
        with torch.no_grad():
            for target in family.targets():
                found = ranks(target)
                if found is None:
                    continue
                rank, alpha = found
                weight = target.module.weight
                down = tensors[f"{target.name}.lora_down.weight"].to(weight.device, torch.float32)
                up = tensors[f"{target.name}.lora_up.weight"].to(weight.device, torch.float32)
                if rank * weight[0].numel() != down.numel() or up.numel() != weight.shape[0] * rank:
                    raise ModelFileError(
                        f"base_weights: {target.name} in {file.name} has other sizes than the model: "
                        "is it a LoRA of another model family?"
                    )
                change = (up.flatten(1) @ down.flatten(1)).view(weight.shape)
                weight.copy_(weight.float() + change * (multiplier * (alpha or rank) / rank))
                merged.add(target.name)
        if not merged:
            raise ModelFileError(
                f"base_weights: no layer of {file.name} belongs to the model: is it a LoRA of another "
                "model family or of another LoRA type?"
            )
        left = {key.partition(".")[0] for key in tensors} - merged
        say(
            f"base_weights: {len(merged)} layers of {file.name} merged with strength {multiplier:g}"
            + (f"; {len(left)} have no place in this model" if left else "")
        )


def _block(target: Target) -> int:
    if target.block is None:
        raise ConfigError(f"block options cannot be used with this model: {target.name} belongs to no block")
    return target.block


def _only(args: Mapping[str, str], *names: str) -> dict[str, str]:
    return {name: args[name] for name in names if name in args}


def _dropouts(args: Mapping[str, str]) -> dict[str, float]:
    """The chances of the three dropouts.

    Raises:
        ConfigError: One is no chance.
    """
    found = {name: number(args, name) for name in ("dropout", "rank_dropout", "module_dropout")}
    for name, chance in found.items():
        if not 0 <= chance < 1:
            raise ConfigError(f"{name} is {chance}: it must be at least 0 and below 1")
    return found


def number(args: Mapping[str, str], name: str) -> float:
    """A network option as a number, 0 if it is not given.

    Raises:
        ConfigError: It is no number.
    """
    text = args.get(name, "0")
    try:
        return float(text)
    except ValueError as error:
        raise ConfigError(f"network option {name} is {text!r}: expected a number") from error


def lr_groups(name: str, layers: list[LoraLayer], rate: float, ratio: float) -> list[ParamGroup]:
    """One group, or two with LoRA+ (Hayou et al. 2024, arXiv:2402.12354): up weights learn faster."""
    if not layers or not rate:
        return []
    if not ratio:
        return [ParamGroup(name, [p for layer in layers for p in (layer.lora_down, layer.lora_up)], rate)]
    return [
        ParamGroup(name, [layer.lora_down for layer in layers], rate),
        ParamGroup(f"{name} plus", [layer.lora_up for layer in layers], rate * ratio),
    ]


def _ranks(family: Family, job: Job, weights: list[float] | None) -> Ranks:
    """Ranks and alphas from the configuration (networks/lora.py:create_network)."""
    args, config = job.network_args, job.config
    dim, alpha = config.network_dim, config.network_alpha
    conv_dim = int(number(args, "conv_dim")) if "conv_dim" in args else None
    conv_alpha = number(args, "conv_alpha") if "conv_alpha" in args else 1.0
    if ("block_dims" in args or weights is not None) and not sum(family.kohya_blocks):
        raise ConfigError("block_dims and block LR weights are for SD 1.x, 2.x and SDXL: clear them (Blocks)")
    blocks = block_ranks(
        args,
        family.kohya_blocks,
        weights,
        dim=dim,
        alpha=alpha,
        conv_dim=conv_dim,
        conv_alpha=conv_alpha,
    )
    with_convs = conv_dim is not None if blocks is None else blocks.conv_dims is not None

    def ranks(target: Target) -> RankAndAlpha | None:
        if target.conv_group and not with_convs:
            return None
        wide = isinstance(target.module, nn.Conv2d) and target.module.kernel_size != (1, 1)
        if blocks is not None and target.part == "unet":
            block = _block(target)
            if not wide:
                return blocks.dims[block], blocks.alphas[block]
            if blocks.conv_dims is None or blocks.conv_alphas is None:
                return None
            return blocks.conv_dims[block], blocks.conv_alphas[block]
        if not wide:
            return dim, alpha
        return None if conv_dim is None else (conv_dim, conv_alpha)

    return ranks


def ranks_of(tensors: Mapping[str, Tensor]) -> Ranks:
    """Ranks and alphas of a file; layers that are not in it are left alone."""

    def ranks(target: Target) -> RankAndAlpha | None:
        down = tensors.get(f"{target.name}.lora_down.weight")
        if down is None or f"{target.name}.lora_up.weight" not in tensors:
            return None
        alpha = tensors.get(f"{target.name}.alpha")
        return down.shape[0], float(down.shape[0] if alpha is None else alpha)

    return ranks


PLUGIN = LoraNetwork
