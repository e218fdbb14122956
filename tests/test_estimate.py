"""The forecast beside what is really allocated, and beside published figures of full-size models."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from tests import hollow, runs, tiny, tiny_flux
from trainer import config as configuration
from trainer import memory, optimizers, plugins
from trainer.data import folder
from trainer.estimate import GIB, forecast, optimizer_bytes
from trainer.job import Job
from trainer.networks._base import ParamGroup


def job(folder_: Path, **values: Any) -> Job:
    return Job.from_config(configuration.loads(runs.settings(folder_, **values)).config, base=folder_)


OPTIMIZERS = ["AdamW", "AdamW8bit", "Lion", "Adafactor", "Prodigy", "AdamWScheduleFree", "DAdaptAdam"]


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_optimizer_state_is_as_large_as_it_really_is(tmp_path: Path, name: str) -> None:
    run = job(tmp_path, optimizer=name, optimizer_args="", learning_rate=1.0, unet_lr=1.0, text_encoder_lr=0)
    generator = torch.Generator().manual_seed(0)

    def parameters() -> list[nn.Parameter]:
        shapes = [(8, 640), (640, 8), (8, 640), (4, 320, 1, 1), (16, 1280)] * 2
        return [nn.Parameter(torch.randn(shape, generator=generator) * 0.01) for shape in shapes]

    predicted = optimizer_bytes(run, [ParamGroup("unet", parameters(), 1.0)])
    real = parameters()
    built = optimizers.create(run, [ParamGroup("unet", real, 1.0)])
    for _ in range(2):
        for parameter in real:
            parameter.grad = torch.randn(parameter.shape, generator=generator) * 0.01
        built.optimizer.step()
    counted: dict[int, int] = {}
    for values in built.inner.state.values():
        for value in values.values():
            if isinstance(value, torch.Tensor) and value.ndim:
                counted[value.untyped_storage().data_ptr()] = value.nbytes
    # 8-bit optimizers share two tables of 256 numbers
    assert predicted == pytest.approx(sum(counted.values()), rel=0.02, abs=8 * 2048)


def test_frozen_weights_are_as_large_as_they_really_are(tmp_path: Path) -> None:
    run = job(tmp_path, fp8_base=True, blocks_to_swap=9, mixed_precision="bf16")
    found = forecast(run, kind="cuda")
    family: Any = (
        plugins.Folder("trainer.families")
        .get("sd")
        .load(run, torch.device("cpu"), torch.bfloat16, lambda _: None)
    )
    swap = memory.prepare(family, run, torch.device("cpu"), lambda _: None)
    assert swap is not None
    train = found.device["train"]
    tensors = [*family.unet.parameters(), *family.unet.buffers()]
    swapped = [tensor for master in swap._masters for tensor in master.home]
    held = sum(tensor.nbytes for tensor in tensors) - sum(tensor.nbytes for tensor in swapped)
    assert train["frozen weights"] == pytest.approx(held, rel=0.001)
    assert train["slots for swapped blocks"] == swap.device_bytes
    assert found.host["swapped blocks"] == swap.host_bytes
    texts = [tensor for model in family.text_encoders.values() for tensor in model.parameters()]
    assert train["text encoders"] == pytest.approx(sum(tensor.nbytes for tensor in texts), rel=0.001)
    swap.close()


@pytest.mark.slow
def test_full_sd15_is_near_to_what_another_trainer_was_measured_with(tmp_path: Path) -> None:
    """SimpleTuner's report: SD 1.5 at 512 px, LoRA of rank 16, bf16, batch 1, nothing but the UNet on
    the card: 2.87 GiB of tensors."""
    run = job(
        tmp_path,
        pretrained_model_name_or_path=str(hollow.sd15(tmp_path)["pretrained_model_name_or_path"]),
        max_resolution="512,512",
        mixed_precision="bf16",
        network_dim=16,
        train_batch_size=1,
        text_encoder_lr=0,
    )
    train = forecast(run, kind="cuda").device["train"]
    names = ("frozen weights", "LoRA", "LoRA gradients", "optimizer state", "activations")
    assert sum(train[name] for name in names) / GIB == pytest.approx(2.87, rel=0.05)
    # without the estimates, all figures together are the parts that were counted
    assert sum(train.values()) > sum(train[name] for name in names)


def test_disk_and_host_memory_follow_the_plan(tmp_path: Path) -> None:
    run = job(tmp_path, save_every_n_steps=2, save_state=True, cache_latents_to_disk=True, cache_latents=True)
    dataset = folder.scan(run)
    found = forecast(run, dataset)
    # 8 steps, saved at 2, 4, 6, 8 and at the end, as float32
    assert found.disk["LoRA files"] == 5 * 4 * found.parameters["trained"]
    assert found.disk["latent caches"] == sum(
        4 * 4 * (fit.bucket[0] // 8) * (fit.bucket[1] // 8) for fit in dataset.fits
    )
    assert "latents" not in found.host
    in_memory = forecast(run.with_config(cache_latents_to_disk=False), dataset)
    assert in_memory.host["latents"] == found.disk["latent caches"]
    assert "latent caches" not in in_memory.disk
    assert found.step_s is not None
    assert sum(found.first_step_s.values()) > found.first_step_s["start"] > 0


def test_every_family_has_a_forecast(tmp_path: Path) -> None:
    xl = job(
        tmp_path,
        pretrained_model_name_or_path=str(tiny.sdxl_file(tmp_path / "xl.safetensors")),
        sdxl=True,
        sdxl_cache_text_encoder_outputs=True,
        text_encoder_lr=0,
        sample_every_n_steps=1,
        sample_prompts="a cat --w 64 --h 64",
    )
    found = forecast(xl, kind="cuda")
    assert "text encoders" not in found.device["train"]
    assert found.host["text encoders"] > 0
    assert found.device["draw samples"]["working memory"] > 0
    flux = Job.from_config(
        configuration.loads(
            tiny_flux.settings(tmp_path / "flux", blocks_to_swap=2, gradient_checkpointing=True)
        ).config,
        base=tmp_path,
    )
    found = forecast(flux, kind="cuda")
    assert found.host["swapped blocks"] > 0
    assert "text encoders" not in found.device["train"]
