"""Weights stored in 8 or 4 bits: what they lose, and that gradients go through them."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from tests import tiny
from trainer import checkpoints, memory
from trainer.memory import quantise
from trainer.memory.quantise import FORMATS, Format

CPU, META = torch.device("cpu"), torch.device("meta")
# Relative rounding errors of normally distributed weights: e4m3 has 3 mantissa bits, int8 127 steps to
# the largest of a row, NF4 16 levels (0.0921 is what its authors' code gives).
ERROR = {"fp8": (0.02, 0.035), "int8": (0.004, 0.012), "nf4": (0.08, 0.1)}


def layer(kind: str) -> nn.Linear | nn.Conv2d:
    torch.manual_seed(3)
    made: nn.Linear | nn.Conv2d = (
        nn.Linear(192, 64) if kind == "linear" else nn.Conv2d(32, 48, 3, stride=2, padding=1, groups=2)
    )
    nn.init.normal_(made.weight, std=0.04)
    return made.requires_grad_(False)


def inputs(kind: str) -> Tensor:
    shape = (3, 7, 192) if kind == "linear" else (2, 32, 9, 10)
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("kind", ["linear", "conv"])
def test_output_and_gradient_are_those_of_the_rounded_weight(kind: str, form: Format) -> None:
    small = layer(kind)
    whole = small.weight.clone()
    quantise.store("x", small, whole, form)
    rounded = quantise.dense(small)
    error = float((rounded - whole).norm() / whole.norm())
    assert ERROR[form][0] < error < ERROR[form][1]
    x, y = inputs(kind).requires_grad_(), inputs(kind).requires_grad_()
    out = small(x)
    # an ordinary layer with the rounded weight, in float64
    reference: Any = copy.deepcopy(layer(kind)).double()
    reference.weight.copy_(rounded)
    expected = reference(y.double())
    torch.testing.assert_close(out, expected.float(), rtol=1e-5, atol=1e-5)
    grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(2))
    out.backward(grad)
    expected.backward(grad.double())
    assert x.grad is not None
    torch.testing.assert_close(x.grad, y.grad, rtol=1e-4, atol=1e-5)
    assert small.weight.grad is None


@pytest.mark.parametrize("form", FORMATS)
def test_bytes_are_as_promised(form: Format) -> None:
    small = layer("linear")
    weight = small.weight.clone()
    quantise.store("x", small, weight, form)
    held = sum(
        tensor.nbytes
        for name, tensor in (*small.named_parameters(), *small.named_buffers())
        if name != "bias"
    )
    assert held == quantise.stored_bytes(tuple(weight.shape), form)
    assert (
        held == {"fp8": 64 * 192, "int8": 64 * 192 + 64 * 4, "nf4": 64 * 192 // 2 + 64 * 192 // 64 * 4}[form]
    )
    on_meta = layer("linear").to_empty(device="meta")
    quantise.store("x", on_meta, on_meta.weight, form)
    assert on_meta.weight.shape == small.weight.shape
    assert on_meta(torch.empty(2, 192, device="meta")).shape == (2, 64)


def test_autocast_decides_the_dtype() -> None:
    small = layer("linear")
    quantise.store("x", small, small.weight, "fp8")
    x = inputs("linear").requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        out = small(x)
        dense = functional.linear(x, quantise.dense(small), small.bias)
    assert out.dtype == torch.bfloat16
    assert torch.equal(out, dense)
    out.float().sum().backward()
    assert x.grad is not None
    assert x.grad.dtype == torch.float32


def test_no_whole_weight_is_kept_for_the_backward_pass() -> None:
    small = layer("linear")
    quantise.store("x", small, small.weight, "fp8")
    kept: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        small(inputs("linear").requires_grad_())
    assert [tensor.dtype for tensor in kept] == [torch.float8_e4m3fn]


def test_numbers_beyond_fp8_do_not_become_nan() -> None:
    small = layer("linear")
    quantise.store("x", small, torch.full_like(small.weight, 1e4), "fp8")
    assert quantise.dense(small).eq(448).all()


def test_t5_never_sees_the_dtype_of_its_wo() -> None:
    from transformers import T5Config, T5EncoderModel

    config = T5Config(
        d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4, vocab_size=50, feed_forward_proj="gated-gelu"
    )
    torch.manual_seed(0)
    model: Any = T5EncoderModel(config).eval().requires_grad_(False)
    ids = torch.arange(12).view(1, 12)
    whole: Any = copy.deepcopy(model)
    quantise.quantise(model, "fp8")
    stored = dict(quantise.layers(model))
    assert len(stored) == 2 * 7
    for name, module in quantise.layers(whole):
        module.weight.copy_(quantise.dense(stored[name]))
    # not so if the inputs of wo were rounded too
    torch.testing.assert_close(model(ids).last_hidden_state, whole(ids).last_hidden_state)


@pytest.mark.parametrize("form", FORMATS)
def test_a_model_is_stored_while_it_is_read(tmp_path: Path, form: Format) -> None:
    folder = tiny.sd15_folder(tmp_path / "model") / "unet"
    file = checkpoints.open_weights(folder)
    names = {key: (key,) for key in file.shapes}
    built: Any = _unet(META)
    place = memory.place_with(form, built, CPU, torch.float32, swap=5)
    checkpoints.fill(built, file, names, device=CPU, dtype=torch.float32, what="UNet", place=place)
    after = copy.deepcopy(tiny.models()["unet"])
    quantise.quantise(after, form)
    stored = dict(quantise.layers(built))
    assert len(stored) > 200
    assert all(
        isinstance(module, quantise.StoredLinear | quantise.StoredConv2d) for module in stored.values()
    )
    for name, module in quantise.layers(after):
        assert torch.equal(quantise.dense(module), quantise.dense(stored[name])), name
    assert not any(tensor.is_meta for tensor in (*built.parameters(), *built.buffers()))
    assert built.conv_in.weight.dtype == torch.float32
    text = torch.randn(1, 77, 32, generator=torch.Generator().manual_seed(0))
    noisy = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        prediction = [model(noisy, torch.tensor([9]), text).sample for model in (built, after)]
        whole = tiny.models()["unet"](noisy, torch.tensor([9]), text).sample
    assert torch.equal(prediction[0], prediction[1])
    assert 0 < float((prediction[0] - whole).norm() / whole.norm()) < 4 * ERROR[form][1]


def _unet(device: torch.device) -> nn.Module:
    from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel

    config = tiny.models()["unet"].config
    with device:
        made: nn.Module = UNet2DConditionModel.from_config(config)
    return made.eval()
