"""Packed convolutions compute what plain ones do."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from trainer.memory.packing import can_pack, pack

pytestmark = pytest.mark.skipif(
    not torch.ops.mkldnn._is_mkldnn_bf16_supported(),
    reason="this processor has no bf16 convolutions to pack for",
)


def _layer(inputs: int, outputs: int, kernel: int) -> nn.Conv2d:
    torch.manual_seed(3)
    return nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2).bfloat16().requires_grad_(False)


def _both(layer: nn.Module, x: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
    x = x.clone().requires_grad_()
    out = layer(x)
    out.backward(grad)
    assert x.grad is not None
    return out.detach().double(), x.grad.double()


@pytest.mark.parametrize(
    ("size", "inputs", "outputs", "kernel"),
    [((2, 8, 8), 64, 96, 3), ((1, 7, 5), 96, 32, 1), ((3, 4, 4), 32, 16, 5)],
)
def test_output_and_gradient_are_those_of_the_formula(
    size: tuple[int, int, int], inputs: int, outputs: int, kernel: int
) -> None:
    batch, height, width = size
    layer = _layer(inputs, outputs, kernel)
    x = torch.randn(batch, inputs, height, width).bfloat16()
    grad = torch.randn(batch, outputs, height, width).bfloat16()
    weight, bias = layer.weight.double(), layer.bias
    assert bias is not None
    exact = functional.conv2d(x.double(), weight, bias.double(), padding=kernel // 2)
    exact_grad = functional.conv_transpose2d(grad.double(), weight, padding=kernel // 2)
    assert pack(layer) == 1
    for _ in range(2):  # packed with the first input
        out, found = _both(layer, x, grad)
        torch.testing.assert_close(out, exact, rtol=2**-7, atol=1e-2)
        torch.testing.assert_close(found, exact_grad, rtol=2**-7, atol=1e-2)
    other = torch.randn(1, inputs, 2 * height, width + 3).bfloat16()
    wide = functional.conv2d(other.double(), weight, bias.double(), padding=kernel // 2)
    torch.testing.assert_close(layer(other).double(), wide, rtol=2**-7, atol=1e-2)
    assert torch.equal(layer.weight.to_dense().double(), weight), "the packed weight is the weight"
    assert layer.weight.shape == weight.shape


def test_autocast_casts_as_it_does_for_a_plain_layer() -> None:
    layer, x = _layer(32, 32, 3), torch.randn(1, 32, 6, 6)
    with torch.autocast("cpu", torch.bfloat16):
        plain = layer(x)
        pack(layer)
        packed = layer(x)
    assert packed.dtype == plain.dtype == torch.bfloat16
    torch.testing.assert_close(packed, plain)


def test_what_differs_is_left_alone() -> None:
    kept = [
        nn.Conv2d(32, 32, 3, padding=1).bfloat16(),  # trained
        _layer(32, 32, 3).float(),
        _layer(4, 32, 3),
        nn.Conv2d(32, 32, 3, stride=2, padding=1).bfloat16().requires_grad_(False),
        nn.Conv2d(32, 32, 3).bfloat16().requires_grad_(False),
        nn.Conv2d(32, 32, 3, padding=1, groups=2).bfloat16().requires_grad_(False),
        nn.Conv2d(32, 32, 3, padding=1, padding_mode="reflect").bfloat16().requires_grad_(False),
        nn.Linear(32, 32).bfloat16().requires_grad_(False),
    ]
    assert not any(can_pack(layer) for layer in kept)
    assert pack(nn.ModuleList(kept)) == 0
