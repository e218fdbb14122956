"""Whole toy runs with the memory settings on: the same LoRA where nothing may differ, a close one else."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from tests import tiny, tiny_flux
from tests.runs import train
from trainer.events import Event, LogLine, SampleReady, StepDone
from trainer.memory import quantise


def losses(events: list[Event]) -> list[float]:
    return [event.loss for event in events if isinstance(event, StepDone)]


def lora(folder: Path) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = load_file(folder / "out" / "toy.safetensors")
    return tensors


def run(folder: Path, **values: Any) -> tuple[list[Event], dict[str, Tensor]]:
    _, events = train(folder, max_train_steps=3, sample_prompts="a cat --w 64 --h 64 --s 2 --d 1", **values)
    return events, lora(folder)


@pytest.fixture(scope="module")
def plain_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("plain")


@pytest.fixture(scope="module")
def plain(plain_folder: Path) -> tuple[list[Event], dict[str, Tensor]]:
    return run(plain_folder)


def test_swap_and_offload_change_nothing(
    tmp_path: Path, plain: tuple[list[Event], dict[str, Tensor]]
) -> None:
    events, found = run(
        tmp_path,
        blocks_to_swap=30,
        gradient_checkpointing=True,
        cpu_offload_checkpointing=True,
        sample_every_n_steps=2,
    )
    assert losses(events) == losses(plain[0])
    assert all(torch.equal(value, found[key]) for key, value in plain[1].items())
    assert any(isinstance(event, SampleReady) for event in events)
    said = [event.message for event in events if isinstance(event, LogLine)]
    assert any(line.startswith("block swap: 30 of 38 blocks") for line in said)


@pytest.mark.parametrize(
    ("values", "closeness"),
    [
        ({"fp8_base": True}, 0.1),
        ({"fp8_base_unet": True, "blocks_to_swap": 12}, 0.1),
        ({"quantized_base": "int8"}, 0.05),
        ({"quantized_base": "nf4", "blocks_to_swap": 38}, 0.3),
    ],
)
def test_a_small_base_trains_much_the_same(
    tmp_path: Path,
    plain: tuple[list[Event], dict[str, Tensor]],
    values: dict[str, Any],
    closeness: float,
) -> None:
    events, found = run(tmp_path, sample_every_n_steps=1, **values)
    assert losses(events) == pytest.approx(losses(plain[0]), rel=closeness)
    assert losses(events) != losses(plain[0])
    assert found.keys() == plain[1].keys()
    assert sum(isinstance(event, SampleReady) for event in events) == 3  # drawn, and trained on


def test_sdxl_with_everything_on(tmp_path: Path) -> None:
    model = tiny.sdxl_file(tmp_path / "xl.safetensors")
    events, found = run(
        tmp_path,
        pretrained_model_name_or_path=str(model),
        sdxl=True,
        fp8_base=True,
        blocks_to_swap=8,
        gradient_checkpointing=True,
        cpu_offload_checkpointing=True,
        sample_every_n_steps=2,
    )
    assert len(losses(events)) == 3
    assert all(bool(torch.isfinite(value).all()) for value in found.values())
    assert any(isinstance(event, SampleReady) for event in events)


def test_flux_swaps_as_kohya_counts_and_changes_nothing(tmp_path: Path) -> None:
    found = []
    for name, swap in (("plain", 0), ("swap", 2)):
        folder = tmp_path / name
        values = tiny_flux.settings(folder, blocks_to_swap=swap, fp8_base_unet=True, max_train_steps=2)
        _, events = train(folder, **values)
        found.append((losses(events), lora(folder)))
    said = [event.message for event in events if isinstance(event, LogLine)]
    assert any(line.startswith("block swap: 3 of 4 blocks") for line in said)  # 1 double, 2 single
    assert found[0][0] == found[1][0]
    assert all(torch.equal(value, found[1][1][key]) for key, value in found[0][1].items())


def test_a_resumed_run_on_fp8_goes_on_to_the_same_weights(tmp_path: Path) -> None:
    values: dict[str, Any] = {"fp8_base": True, "blocks_to_swap": 9, "max_train_steps": 3}
    train(tmp_path / "whole", save_every_n_steps=2, save_state=True, **values)
    state = tmp_path / "whole" / "out" / "toy-step00000002-state"
    _, events = train(tmp_path / "parts", resume=str(state), **values)
    assert len(losses(events)) == 1
    whole, parts = lora(tmp_path / "whole"), lora(tmp_path / "parts")
    assert all(torch.equal(value, parts[key]) for key, value in whole.items())


def test_base_weights_are_merged_before_anything_is_rounded(
    plain: tuple[list[Event], dict[str, Tensor]], plain_folder: Path, tmp_path: Path
) -> None:
    file = plain_folder / "out" / "toy.safetensors"
    merged = f'--base_weights "{file.as_posix()}" --base_weights_multiplier 5'
    first: dict[str, Any] = {"max_train_steps": 1, "additional_parameters": merged}
    (exact,) = losses(train(tmp_path / "exact", **first)[1])
    (small,) = losses(train(tmp_path / "small", quantized_base="int8", **first)[1])
    assert small == pytest.approx(exact, rel=0.02)
    assert abs(small - exact) < abs(losses(plain[0])[0] - exact)


def test_the_lora_learns_through_rounded_weights_as_through_whole_ones() -> None:
    torch.manual_seed(0)
    base = torch.nn.Linear(64, 32).requires_grad_(False)
    whole = base.weight.clone()
    down = torch.randn(4, 64, requires_grad=True)
    up = torch.randn(32, 4, requires_grad=True)
    x = torch.randn(8, 64, requires_grad=True)

    def gradients() -> list[Tensor]:
        hidden = base(x) + x @ down.T @ up.T
        hidden.relu().square().mean().backward()
        found = [value.grad.clone() for value in (x, down, up) if value.grad is not None]
        for value in (x, down, up):
            value.grad = None
        return found

    expected = gradients()
    quantise.store("x", base, whole, "fp8")
    for one, other in zip(gradients(), expected, strict=True):
        assert float((one - other).norm() / other.norm()) < 0.03
