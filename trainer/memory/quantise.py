"""Frozen weights in 8 or 4 bits, made whole for the moment in which a layer uses them.

fp8 is sd-scripts' fp8_base: a plain cast to float8_e4m3fn, without scaling factors (with one where the
file's weights have one, which sd-scripts does not read). int8 (one scale a
row) and NF4 (Dettmers et al. 2023, arXiv:2305.14314; one scale for 64 weights) are stored and restored by
bitsandbytes' kernels. Its layer classes are not used: they repack an NF4 weight in the first forward
pass without gradients, after which it cannot be trained through (sample, then go on training).

A layer keeps its small weight for the backward pass too and makes it whole a second time there, so
that no forward pass leaves whole weights behind.

Axes: O/I output and input width.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional

__all__ = [
    "FORMATS",
    "Format",
    "StoredConv2d",
    "StoredLinear",
    "dense",
    "layers",
    "parameter_count",
    "quantise",
    "store",
    "stored_bytes",
]

Format = Literal["fp8", "int8", "nf4"]
FORMATS: tuple[Format, ...] = get_args(Format)

NF4_BLOCK = 64
"""Weights that share a scale: bitsandbytes' default."""
FP8_MAX = 448.0
"""Largest number of float8_e4m3fn; a cast makes NaN of what is larger."""

IN_A_BLOCK = re.compile(r"(?:^|\.)(?:\d+|mid_block)\.")
"""Layers of the repeated blocks; those before and after them (embeddings, first and last layer) are
small and stay whole."""


class StoredLinear(nn.Linear):
    """A frozen linear layer whose ``weight`` is stored small. Made from nn.Linear by `store`."""

    format: Format
    weight_scale: Tensor | None

    def forward(self, x: Tensor) -> Tensor:
        """As nn.Linear, in the dtype of ``x`` or autocast's."""
        return _forward(self, x, self.weight)


class StoredConv2d(nn.Conv2d):
    """A frozen convolution whose ``weight`` is stored small. Made from nn.Conv2d by `store`."""

    format: Format
    weight_scale: Tensor | None

    def forward(self, x: Tensor) -> Tensor:
        """As nn.Conv2d, in the dtype of ``x`` or autocast's."""
        return _forward(self, x, self.weight)


Stored = StoredLinear | StoredConv2d


class _HiddenLinear(StoredLinear):
    """A layer whose owner casts its input to the weight's dtype: it shows none."""

    hidden: Tensor

    def forward(self, x: Tensor) -> Tensor:
        return _forward(self, x, self.hidden)


class _Frozen(torch.autograd.Function):
    """A layer with a stored weight; the only gradient is that of its input."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, scale: Tensor | None, bias: Tensor | None, layer: Stored
    ) -> Tensor:
        kind = x.device.type
        autocast = kind != "meta" and torch.is_autocast_enabled(kind)
        dtype = torch.get_autocast_dtype(kind) if autocast else x.dtype
        ctx.save_for_backward(weight, scale)
        ctx.layer, ctx.shape, ctx.dtype = layer, x.shape, x.dtype
        whole = _whole(layer, weight, scale, dtype)
        bias = None if bias is None else bias.to(dtype)
        if isinstance(layer, nn.Linear):
            return functional.linear(x.to(dtype), whole, bias)
        out: Tensor = layer._conv_forward(x.to(dtype), whole, bias)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, None, None, None, None]:
        (grad,) = grads
        if not ctx.needs_input_grad[0]:
            return None, None, None, None, None
        weight, scale = ctx.saved_tensors
        layer = ctx.layer
        whole = _whole(layer, weight, scale, grad.dtype)
        if isinstance(layer, nn.Linear):
            return (grad @ whole).to(ctx.dtype), None, None, None, None
        back: Tensor = torch.ops.aten.convolution_backward(
            grad,
            grad.new_empty((1,)).expand(ctx.shape),  # of the input, only the shape is used
            whole,
            None,
            layer.stride,
            layer.padding,
            layer.dilation,
            False,
            (0, 0),
            layer.groups,
            (True, False, False),
        )[0]
        return back.to(ctx.dtype), None, None, None, None


def _forward(layer: Stored, x: Tensor, weight: Tensor) -> Tensor:
    out: Tensor = _Frozen.apply(  # type: ignore[no-untyped-call]
        x, weight, layer.weight_scale, layer.bias, layer
    )
    return out


def layers(model: nn.Module) -> Iterator[tuple[str, nn.Linear | nn.Conv2d]]:
    """The layers of ``model`` that may be stored small, by name."""
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear | nn.Conv2d) and IN_A_BLOCK.search(f"{name}."):
            # padding by name or by reflection is in no model that is trained here
            if isinstance(module, nn.Conv2d) and module.padding_mode != "zeros":
                continue
            yield name, module


def store(
    name: str,
    layer: nn.Linear | nn.Conv2d,
    weight: Tensor,
    form: Format,
    device: torch.device | None = None,
    *,
    scaled: bool = False,
) -> None:
    """Give ``layer`` a weight that is stored small.

    Args:
        name: Of the layer in its model.
        layer: Becomes a `StoredLinear` or `StoredConv2d`; its bias stays as it is.
        weight: Whole, of the layer's shape; on the meta device too.
        form: How it is stored.
        device: Where; the weight's if None.
        scaled: Whether fp8 gets a scale, so that its largest number stands for the weight's; made for
            weights that come from such a file, which are then what they were there.
    """
    small, scale = _small(weight.detach(), form, scaled=scaled)
    small, scale = small.to(device), None if scale is None else scale.to(device)
    stored: Any = layer
    stored.register_buffer("weight_scale", scale, persistent=False)
    stored.format = form
    parameter = nn.Parameter(small, requires_grad=False)
    # transformers' T5 casts what goes into this layer to its weight's dtype.
    if name.rpartition(".")[2] == "wo":
        stored.__class__ = _HiddenLinear
        del stored.weight
        stored.register_parameter("hidden", parameter)
        stored.weight = None
        return
    stored.__class__ = StoredConv2d if isinstance(layer, nn.Conv2d) else StoredLinear
    stored.weight = parameter


def quantise(model: nn.Module, form: Format) -> None:
    """Store all of `layers` small where they are not yet, one at a time."""
    for name, layer in layers(model):
        if not isinstance(layer, StoredLinear | StoredConv2d):
            store(name, layer, layer.weight, form)


def dense(layer: nn.Linear | nn.Conv2d, dtype: torch.dtype = torch.float32) -> Tensor:
    """The whole weight of a layer, stored small or not."""
    if isinstance(layer, StoredLinear | StoredConv2d):
        small = layer.hidden if isinstance(layer, _HiddenLinear) else layer.weight
        return _whole(layer, small, layer.weight_scale, dtype)
    return layer.weight.to(dtype)


def parameter_count(model: nn.Module) -> int:
    """Parameters of ``model``, however its weights are stored."""
    total = 0
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if isinstance(module, StoredLinear | StoredConv2d) and name in ("weight", "hidden"):
                total += torch.Size(_shape(module)).numel()
            else:
                total += parameter.numel()
    return total


def stored_bytes(shape: tuple[int, ...], form: Format) -> int:
    """Bytes of a weight of ``shape`` with its scales."""
    small, scale = _small(torch.empty(shape, device="meta"), form)
    return small.nbytes + (0 if scale is None else scale.nbytes)


def _shape(layer: Stored) -> tuple[int, ...]:
    if isinstance(layer, nn.Linear):
        return layer.out_features, layer.in_features
    return layer.out_channels, layer.in_channels // layer.groups, *layer.kernel_size


def _small(weight: Tensor, form: Format, *, scaled: bool = False) -> tuple[Tensor, Tensor | None]:
    if form == "fp8":
        if weight.dtype == torch.float8_e4m3fn:
            return weight, None
        if scaled:
            scale = (weight.abs().amax().float() / FP8_MAX).clamp(min=1e-12)
            return (weight.float() / scale).to(torch.float8_e4m3fn), scale
        return weight.clamp(-FP8_MAX, FP8_MAX).to(torch.float8_e4m3fn), None
    rows = weight.shape[0]
    if form == "int8":
        if weight.is_meta:
            return weight.new_empty(weight.shape, dtype=torch.int8), weight.new_empty(
                rows, dtype=torch.float32
            )
        from bitsandbytes import functional as kernels

        flat = weight.flatten(1).contiguous()
        # the CUDA kernel takes half precision
        small, scale, _ = kernels.int8_vectorwise_quant(flat.half() if flat.is_cuda else flat)
        return small.view(weight.shape), scale
    if weight.is_meta:
        blocks = -(-weight.numel() // NF4_BLOCK)
        return weight.new_empty((-(-weight.numel() // 2), 1), dtype=torch.uint8), weight.new_empty(
            blocks, dtype=torch.float32
        )
    from bitsandbytes import functional as kernels

    packed, state = kernels.quantize_4bit(
        weight.contiguous(), blocksize=NF4_BLOCK, quant_type="nf4", compress_statistics=False
    )
    return packed, state.absmax


def _whole(layer: Stored, small: Tensor, scale: Tensor | None, dtype: torch.dtype) -> Tensor:
    if layer.format == "fp8":
        return small.to(dtype) if scale is None else small.float().mul_(scale).to(dtype)
    assert scale is not None
    if layer.format == "int8":
        # in float32: the product with the scale is rounded once
        rows = (small.flatten(1) * (scale / 127).unsqueeze(1)).to(dtype)
        return rows.view(small.shape)
    shape = _shape(layer)
    if small.is_meta:
        return torch.empty(shape, dtype=dtype, device="meta")
    import bitsandbytes  # noqa: F401  (registers the operator)

    # The function around the operator would make its table anew each time, on the host.
    whole: Tensor = torch.ops.bitsandbytes.dequantize_4bit.default(
        small, scale, NF4_BLOCK, "nf4", shape, dtype
    )
    return whole
