"""Block swap: the same numbers as without, to the last bit, forward and backward."""

from __future__ import annotations

import copy
import gc
import itertools
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests import tiny
from trainer.memory import quantise
from trainer.memory.blocks import blocks_of, spread, swapped_of
from trainer.memory.checkpointing import Offload
from trainer.memory.swap import BlockSwap

CPU = torch.device("cpu")


class Adapter(nn.Module):
    """A trainable pair beside a frozen linear layer, as a LoRA hooks it in."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.down = nn.Parameter(torch.randn(4, base.in_features) * 0.1)
        self.up = nn.Parameter(torch.randn(base.out_features, 4) * 0.1)
        forward = base.forward
        base.forward = lambda x: forward(x) + x @ self.down.T @ self.up.T  # type: ignore[method-assign, assignment]


def unet(form: quantise.Format | None = None) -> tuple[Any, list[nn.Parameter]]:
    """A toy UNet in train mode with trainable pairs at its attention layers."""
    model: Any = copy.deepcopy(tiny.models()["unet"]).train()
    if form is not None:
        quantise.quantise(model, form)
    torch.manual_seed(0)
    pairs = [
        Adapter(module)
        for name, module in model.named_modules()
        if name.endswith(("to_q", "to_v", "ff.net.2"))
    ]
    return model, [parameter for pair in pairs for parameter in pair.parameters()]


def steps(model: Any, parameters: list[nn.Parameter]) -> list[Tensor]:
    """Losses and gradients of two steps, with a picture drawn between them."""
    found: list[Tensor] = []
    generator = torch.Generator().manual_seed(5)
    for step in range(2):
        noisy = torch.randn(2, 4, 8, 8, generator=generator)
        text = torch.randn(2, 77, 32, generator=generator)
        loss = model(noisy, torch.tensor([9, 700]), text).sample.square().mean()
        loss.backward()
        found.append(loss.detach())
        for parameter in parameters:
            assert parameter.grad is not None
            found.append(parameter.grad)
            with torch.no_grad():
                parameter.sub_(parameter.grad, alpha=0.1)
            parameter.grad = None
        if step == 0:
            with torch.no_grad():
                found.append(model(noisy, torch.tensor([3, 3]), text).sample)
    return found


@pytest.mark.parametrize(
    ("count", "checkpointed", "form"),
    [(9, False, None), (9, True, None), (38, False, "fp8"), (38, True, "fp8"), (1, True, "nf4")],
)
def test_losses_and_gradients_are_the_same_to_the_last_bit(
    count: int, checkpointed: bool, form: quantise.Format | None
) -> None:
    plain, parameters = unet(form)
    expected = steps(plain, parameters)
    model, parameters = unet(form)
    if checkpointed:
        model.enable_gradient_checkpointing()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    blocks = blocks_of(model)
    swap = BlockSwap(blocks, swapped_of(model, count), CPU)
    assert swap.host_bytes > 0
    # the two slots are all that the device holds of the swapped blocks
    assert swap.device_bytes <= 2 * max(
        sum(-(-t.nbytes // 64) * 64 for t in (*block.parameters(), *block.buffers())) for block in blocks
    )
    found = steps(model, parameters)
    assert len(found) == len(expected)
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))
    if count > 2:
        # Up and down again: the two blocks at each turn are there already.
        forward = count - 2
        assert swap.fetches <= 2 + 5 * forward + 2 * (count if not checkpointed else 0) + 4
    swap.close()
    assert not any("forward" in vars(block) for block in blocks)
    after = model.state_dict()
    assert all(torch.equal(value, after[name]) for name, value in before.items())


def test_without_checkpointing_no_swapped_weight_is_kept() -> None:
    model, _ = unet()
    blocks = blocks_of(model)
    swap = BlockSwap(blocks, range(len(blocks)), CPU)
    loss = model(torch.randn(1, 4, 8, 8), torch.tensor([9]), torch.randn(1, 77, 32)).sample.square().mean()
    gc.collect()
    # one block's weights are all overwritten: a kept one would spoil the gradients unseen
    for slot in swap._slots:
        slot.piece.fill_(255)
        slot.holds = None
    loss.backward()
    swap.close()
    assert torch.isfinite(loss)


def test_blocks_come_in_the_order_of_the_forward_pass() -> None:
    model, _ = unet()
    called: list[nn.Module] = []
    blocks = blocks_of(model)
    for block in blocks:
        block.register_forward_pre_hook(lambda module, _: called.append(module))
    model(torch.randn(1, 4, 8, 8), torch.tensor([9]), torch.randn(1, 77, 32))
    assert called == blocks
    assert len(blocks) == 38  # 22 residual, 16 transformer blocks


def test_places_are_spread_evenly() -> None:
    assert spread(0, 9) == []
    assert spread(3, 9) == [1, 4, 7]
    assert spread(12, 9) == list(range(9))
    for count in range(1, 40):
        places = spread(count, 40)
        assert len(set(places)) == count
        gaps = {after - before for before, after in itertools.pairwise(places)}
        assert not gaps or max(gaps) - min(gaps) <= 1


def test_flux_counts_as_kohya_does() -> None:
    from diffusers.models.transformers.transformer_flux import FluxTransformer2DModel

    with torch.device("meta"):
        model = FluxTransformer2DModel(
            num_layers=19,
            num_single_layers=38,
            attention_head_dim=8,
            num_attention_heads=2,
            axes_dims_rope=(2, 2, 4),
        )
    assert len(blocks_of(model)) == 57
    for count in (1, 2, 18, 35):
        places = swapped_of(model, count)
        doubles = sum(place < 19 for place in places)
        assert (doubles, len(places) - doubles) == (count // 2, min(38, 2 * (count - count // 2)))


def test_offloaded_checkpointing_gives_the_same_to_the_last_bit() -> None:
    plain, parameters = unet()
    expected = steps(plain, parameters)
    model, parameters = unet()
    offload = Offload(CPU, small_bytes=0)
    model.enable_gradient_checkpointing(offload)
    found = steps(model, parameters)
    assert offload.moved_bytes > 0
    assert not offload._kept  # all came back
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


@pytest.mark.gpu
@pytest.mark.parametrize("checkpointed", [False, True])
def test_on_a_gpu_copies_overlap_and_change_nothing(checkpointed: bool) -> None:
    device = torch.device("cuda")

    def run(swapped: int, offloaded: bool = False) -> list[Tensor]:
        model, parameters = unet("fp8")
        model.to(device)
        for parameter in parameters:
            parameter.data = parameter.data.to(device)
        if offloaded:
            model.enable_gradient_checkpointing(Offload(device, small_bytes=0))
        elif checkpointed:
            model.enable_gradient_checkpointing()
        swap = BlockSwap(blocks_of(model), swapped_of(model, swapped), device)
        assert swap.pinned or not swapped
        generator = torch.Generator().manual_seed(5)
        found: list[Tensor] = []
        for _ in range(3):
            noisy = torch.randn(2, 4, 8, 8, generator=generator).to(device)
            text = torch.randn(2, 77, 32, generator=generator).to(device)
            loss = model(noisy, torch.tensor([9, 700], device=device), text).sample.square().mean()
            loss.backward()
            found.append(loss.detach())
            found += [parameter.grad for parameter in parameters if parameter.grad is not None]
            for parameter in parameters:
                parameter.grad = None
        torch.cuda.synchronize()
        swap.close()
        return found

    expected = run(0)
    for found in (run(9), run(38), run(38, offloaded=True) if checkpointed else expected):
        for one, other in zip(found, expected, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
