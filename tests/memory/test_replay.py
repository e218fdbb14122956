"""Blocks that are replayed claim what they would really need."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests import runs, tiny, tiny_flux
from trainer import config as configuration
from trainer import devices, memory, plugins
from trainer.draws import Draws
from trainer.families._base import Family
from trainer.job import Job
from trainer.memory import replay
from trainer.memory.trace import Traced, traced
from trainer.networks import plugin_for

META = torch.device("meta")


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Toy models of both big families."""
    folder = tmp_path_factory.mktemp("replay")
    tiny.sdxl_file(folder / "sdxl.safetensors")
    tiny_flux.files(folder / "models")
    return folder


def prepared(world: Path, family: str, **values: Any) -> tuple[Job, Family, Any]:
    fields: dict[str, Any] = {"mixed_precision": "bf16", "network_dim": 4, "text_encoder_lr": 1e-4, **values}
    if family == "sdxl":
        fields |= {"pretrained_model_name_or_path": str(world / "sdxl.safetensors"), "sdxl": True}
        settings = runs.settings(world, **fields)
    else:
        settings = tiny_flux.settings(world, **{"flux1_cache_text_encoder_outputs": False, **fields})
    job = Job.from_config(configuration.loads(settings).config, base=world)
    dtype = devices.weight_dtype("bf16")
    loaded: Family = plugins.Folder("trainer.families").get(family).load(job, META, dtype, lambda _: None)
    memory.store(loaded, job)
    network = plugin_for(job).create(loaded, job, Draws(1), lambda _: None)
    network.attach()
    network.to(META, torch.float32)
    network.train()
    if job.config.gradient_checkpointing:
        loaded.enable_gradient_checkpointing()
    return job, loaded, network


def step(loaded: Family, network: Any, blocks: list[nn.Module]) -> tuple[Traced, list[bool]]:
    """What a step needs, and which parameters get a gradient."""
    models: list[nn.Module] = [loaded.unet, *loaded.text_encoders.values()]
    known = [tensor for one in models for tensor in (*one.parameters(), *one.buffers())]
    noisy = torch.empty((2, loaded.latent_channels, 64, 48), device=META, dtype=loaded.dtype)
    times = torch.zeros(2, device=META, dtype=torch.long)

    def forward() -> Tensor:
        return loaded.predict(noisy, times, loaded.encode_prompts(["a cat", "a dog"]), None)

    known += [*network.parameters(), noisy, times]
    found = traced(forward, known, kind="cuda", autocast=torch.bfloat16, backward=True, repeated=blocks)
    trained = [parameter.grad is not None for parameter in network.parameters()]
    for parameter in network.parameters():
        parameter.grad = None
    return found, trained


@pytest.mark.parametrize(
    ("family", "values"),
    [
        ("sdxl", {}),
        ("sdxl", {"gradient_checkpointing": True}),
        ("sdxl", {"fp8_base": True, "network_dropout": 0.1, "LoRA_type": "Kohya LoCon", "conv_dim": 2}),
        ("flux", {}),
        ("flux", {"gradient_checkpointing": True, "fp8_base": True, "train_t5xxl": True}),
        ("flux", {"apply_t5_attn_mask": True, "quantized_base": "nf4", "split_qkv": True}),
    ],
)
def test_replayed_step_needs_what_the_real_one_needs(
    world: Path, family: str, values: dict[str, Any]
) -> None:
    _, loaded, network = prepared(world, family, **values)
    blocks = memory.blocks_of(loaded.unet)
    for encoder in loaded.text_encoders.values():
        blocks += memory.repeated_of(encoder)
    (whole, trained), (replayed, same) = step(loaded, network, []), step(loaded, network, blocks)
    assert any(trained)
    assert same == trained
    assert replayed.flops == pytest.approx(whole.flops, rel=0.001)
    assert replayed.kept_bytes == pytest.approx(whole.kept_bytes, rel=0.01)
    assert replayed.peak_bytes == pytest.approx(whole.peak_bytes, rel=0.01)
    assert not any("forward" in vars(block) for block in blocks)


def test_each_kind_is_run_once_in_a_process(world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, loaded, network = prepared(world, "flux", text_encoder_lr=0)
    runs_of: dict[type, int] = {}
    measured = replay._measured

    def counted(forward: Any, *args: Any) -> Any:
        kind = type(forward.__self__)
        runs_of[kind] = runs_of.get(kind, 0) + 1
        return measured(forward, *args)

    monkeypatch.setattr(replay, "_measured", counted)
    monkeypatch.setattr(replay, "_KNOWN", type(replay._KNOWN)())
    blocks = memory.blocks_of(loaded.unet)
    first = step(loaded, network, blocks)
    # of each list the first block's inputs have no gradient yet
    assert {kind.__name__: count for kind, count in runs_of.items()} == {
        "FluxTransformerBlock": 2,
        "FusedSingleBlock": 1,
    }
    assert step(loaded, network, blocks) == first
    assert sum(runs_of.values()) == 3
