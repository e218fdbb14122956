"""Frozen convolutions whose weights lie as the processor wants them.

oneDNN computes on weights in blocks of its own. Given plain ones it rearranges them in every forward
and every backward pass, which for the wide layers of a UNet at a LoRA's small batches takes longer than
the convolution itself: on a CPU with AMX, bf16, the 3x3 layers of SD 1.5 at 256 px take 2.1 s a step
with plain weights and 0.8 s with packed ones (one thread). The weights of a LoRA's base never change, so they
are packed once: the forward copy takes the place of the plain weight, and the backward pass, which is a
convolution with the kernel turned round, gets a second one.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["can_pack", "pack"]

Packed = torch.ops.mkldnn._convolution_pointwise
"""Convolution with packed weights, as torch's own compiler calls it; torch is pinned exactly."""


def can_pack(layer: nn.Module, dtype: torch.dtype = torch.bfloat16) -> bool:
    """Whether ``layer`` is a frozen convolution that `pack` knows how to run.

    Its output must be as large as its input, so that the backward pass is such a convolution too.
    """
    if not isinstance(layer, nn.Conv2d) or isinstance(layer.padding, str):
        return False
    weight = layer.weight
    return (
        weight.device.type == "cpu"
        and weight.layout == torch.strided
        and weight.dtype == dtype
        and not weight.requires_grad
        and layer.padding_mode == "zeros"
        and layer.groups == 1
        and layer.stride == (1, 1)
        and layer.dilation == (1, 1)
        and layer.kernel_size == tuple(2 * pad + 1 for pad in layer.padding)
        and min(layer.in_channels, layer.out_channels) >= 16
    )


def pack(model: nn.Module) -> int:
    """Let the frozen convolutions of ``model`` pack their weights when they are first used.

    Only bf16: in float32 the second copy costs more memory than the time is worth.

    Returns:
        How many layers that concerns.
    """
    known = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
    if not known or not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return 0
    layers = [layer for layer in model.modules() if can_pack(layer)]
    for layer in layers:
        layer.forward = _Layer(layer)
    return len(layers)


class _Layer:
    """Forward pass of a convolution that packs its weights at the first input, whose size decides how."""

    def __init__(self, layer: nn.Module) -> None:
        assert isinstance(layer, nn.Conv2d)
        self.layer = layer
        self.padding = list(map(int, layer.padding))
        self.turned: Tensor | None = None

    def __call__(self, x_BCHW: Tensor) -> Tensor:
        if torch.is_autocast_enabled("cpu"):
            x_BCHW = x_BCHW.to(torch.get_autocast_dtype("cpu"))
        if self.turned is None:
            self._pack(x_BCHW)
        inputs = (x_BCHW, self.layer.weight, self.turned, self.layer.bias, self.padding)
        out: Tensor = _Convolution.apply(*inputs)  # type: ignore[no-untyped-call]
        return out

    def _pack(self, x_BCHW: Tensor) -> None:
        batch, _, height, width = x_BCHW.shape
        plain = self.layer.weight.detach()
        turned = plain.flip(2, 3).transpose(0, 1).contiguous()
        reorder = torch.ops.mkldnn._reorder_convolution_weight
        sizes = {"in": [batch, plain.shape[1], height, width], "out": [batch, plain.shape[0], height, width]}
        self.turned = reorder(turned, self.padding, input_size=sizes["out"])
        packed = reorder(plain, self.padding, input_size=sizes["in"])
        # It says its own shape and dtype, gives the plain values with to_dense(), and nothing
        # computes with it by mistake.
        self.layer.weight = nn.Parameter(packed, requires_grad=False)


class _Convolution(torch.autograd.Function):
    """Same-size convolution with frozen packed weights; the gradient is that of the input alone."""

    @staticmethod
    def forward(
        ctx: Any, x_BCHW: Tensor, packed: Tensor, turned: Tensor, bias: Tensor | None, padding: list[int]
    ) -> Tensor:
        ctx.turned, ctx.padding = turned, padding
        out: Tensor = Packed(x_BCHW, packed, bias, padding, [1, 1], [1, 1], 1, "none", [], "")
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        (grad_BCHW,) = grads
        found = Packed(grad_BCHW, ctx.turned, None, ctx.padding, [1, 1], [1, 1], 1, "none", [], "")
        return found, None, None, None, None
