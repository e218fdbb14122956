"""What a traced step says it keeps, beside what autograd really keeps of the same step."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from tests import tiny
from trainer import devices, plugins
from trainer.draws import Draws
from trainer.families._base import Family
from trainer.memory.trace import GRANULE_BYTES, LiveBytes, traced
from trainer.networks import plugin_for

META = torch.device("meta")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.sd15_file(tmp_path_factory.mktemp("trace") / "model.safetensors")


def prepared(
    model: Path, device: torch.device, precision: str, checkpointing: bool
) -> tuple[Callable[[], Tensor], list[Tensor]]:
    """A micro-step's forward pass, and the tensors that are there before it."""
    job = tiny.job(model, model.parent, mixed_precision=precision, unet_lr=1e-4, text_encoder_lr=1e-5)
    dtype = devices.weight_dtype(precision)
    family: Family = plugins.Folder("trainer.families").get("sd").load(job, device, dtype, lambda _: None)
    network = plugin_for(job).create(family, job, Draws(1), lambda _: None)
    network.attach()
    network.to(device, torch.float32)
    if checkpointing:
        family.enable_gradient_checkpointing()
    models: Iterable[nn.Module] = (family.unet, *family.text_encoders.values())
    known = [tensor for one in models for tensor in (*one.parameters(), *one.buffers())]
    noisy = torch.zeros((2, 4, 32, 24), device=device, dtype=dtype)
    times = torch.zeros(2, device=device, dtype=torch.long)

    def forward() -> Tensor:
        return family.predict(noisy, times, family.encode_prompts(["a cat", "a dog"]), None)

    return forward, [*known, *network.parameters(), noisy, times]


@pytest.mark.parametrize(("precision", "checkpointing"), [("no", False), ("bf16", True)])
def test_as_much_is_kept_as_autograd_really_keeps(model: Path, precision: str, checkpointing: bool) -> None:
    half = torch.bfloat16 if precision == "bf16" else None
    forward, known = prepared(model, META, precision, checkpointing)
    found = traced(forward, known, kind="cpu", autocast=half, backward=True)
    forward, known = prepared(model, torch.device("cpu"), precision, checkpointing)
    there = {tensor.untyped_storage()._cdata for tensor in known}
    kept: dict[int, int] = {}
    holding: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in there:
            kept[storage._cdata] = -(-storage.nbytes() // GRANULE_BYTES) * GRANULE_BYTES
            holding.append(tensor)
        return tensor

    autocast = torch.autocast("cpu", half) if half else contextlib.nullcontext()
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor), autocast:
        forward()
    assert found.kept_bytes == pytest.approx(sum(kept.values()), rel=0.03)
    assert found.peak_bytes > found.kept_bytes


def test_peak_and_products_of_a_step_that_is_worked_out_by_hand() -> None:
    weight = torch.empty((256, 256), device=META)
    down = nn.Parameter(torch.empty((256, 256), device=META))
    x = torch.empty((1024, 256), device=META)
    each = 1024 * 256 * 4

    def forward() -> Tensor:
        return functional.relu(x @ weight) @ down

    found = traced(forward, [weight, down, x], kind="cpu", autocast=None, backward=True)
    # relu's output, which the second product keeps, and the result
    assert found.kept_bytes == 2 * each
    # and of the mean square: the squares, and what its own gradient takes
    assert 3 * each <= found.peak_bytes <= 6 * each + 4 * GRANULE_BYTES
    products = 3  # two forward, one for the gradient of `down`; x needs none
    assert found.flops == products * 2 * 1024 * 256 * 256


def test_memory_is_followed_until_nothing_refers_to_it() -> None:
    with LiveBytes() as live:
        first = torch.empty(1000, device=META)
        view = first[10:]
        assert live.live_bytes == 4096
        del first
        assert live.live_bytes == 4096
        second = view + 1
        assert live.live_bytes == 8192
        del view, second
        assert live.live_bytes == 0
        assert live.peak_bytes == 8192


def test_attention_keeps_no_matrix_of_all_pairs() -> None:
    query = torch.empty((1, 4, 4096, 64), device=META, requires_grad=True)
    mask = torch.ones((1, 1, 1, 4096), dtype=torch.bool, device=META)

    def forward() -> Tensor:
        return functional.scaled_dot_product_attention(query, query, query, attn_mask=mask)

    found = traced(forward, [query, mask], kind="cuda", autocast=torch.bfloat16, backward=True)
    assert found.peak_bytes < 4 * 4096 * 4096 * 2
    assert found.kept_bytes >= 2 * 4 * 4096 * 64 * 2  # the cast query and the result


def test_autocast_on_cuda_normalises_in_float32() -> None:
    norm: Any = nn.GroupNorm(4, 16).to(META)
    x = torch.empty((1, 16, 64, 64), device=META, dtype=torch.bfloat16)
    half = torch.bfloat16
    known = [x, *norm.parameters()]
    sizes = {
        kind: traced(lambda: norm(x), known, kind=kind, autocast=half, backward=False).kept_bytes
        for kind in ("cpu", "cuda")
    }
    assert sizes == {"cpu": x.nbytes, "cuda": 2 * x.nbytes}
