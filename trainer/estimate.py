"""Parameters and memory of a run, from models without weights (PyTorch's meta device).

What the backward pass keeps is counted tensor by tensor in a traced forward pass; what cannot be
traced (the library's workspaces, fragmentation, the CUDA context) is not in the figures.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from trainer import devices, plugins
from trainer.data.types import Size
from trainer.draws import Draws
from trainer.job import Job
from trainer.networks import plugin_for

__all__ = ["estimate"]

OPTIMIZER_BYTES = {"8bit": 2, "sgd": 4, "lion": 4, "adafactor": 1, "prodigy": 16}
"""State bytes a parameter, by a part of the optimizer's name; AdamW and the rest keep two float32."""


def estimate(job: Job, bucket: Size | None = None) -> dict[str, Any]:
    """Count parameters and memory of ``job``.

    Args:
        job: The run.
        bucket: Largest picture size in pixels; the resolution if None.

    Returns:
        "parameters" by part, and "memory (estimated, GiB)" by purpose.

    Raises:
        TrainerError: The model file cannot be read, or the network's options cannot be.
    """
    meta = torch.device("meta")
    dtype = devices.weight_dtype(job.config.mixed_precision)
    family = plugins.Folder("trainer.families").get(job.family).load(job, meta, dtype, _silent)
    network = plugin_for(job).create(family, job, Draws(job.seed), _silent)
    trainable = sum(parameter.numel() for parameter in network.parameters())
    full = job.config.full_fp16 or job.config.full_bf16
    network.attach()
    # The traced weights take the activations' dtype: autocast does not act on the meta device.
    network.to(meta, dtype)
    if job.config.gradient_checkpointing:
        family.enable_gradient_checkpointing()
    width, height = bucket or (job.width, job.height)
    shape = (
        job.config.train_batch_size,
        family.latent_channels,
        height // family.latent_factor,
        width // family.latent_factor,
    )
    kept_bytes = _kept_by_forward(family, shape, dtype, job)
    unet = sum(parameter.numel() for parameter in family.unet.parameters())
    text = sum(p.numel() for encoder in family.text_encoders.values() for p in encoder.parameters())
    width_bytes = dtype.itemsize
    lora_width = 2 if full else 4
    state = next((size for name, size in OPTIMIZER_BYTES.items() if name in job.config.optimizer.lower()), 8)
    parts = {
        "frozen weights": (unet + text) * width_bytes,
        "LoRA weights and gradients": trainable * 2 * lora_width,
        "optimizer": trainable * state,
        "kept for the backward pass": kept_bytes,
    }
    parts["sum"] = sum(parts.values())
    return {
        "parameters": {"UNet": unet, "text encoder": text, "trained": trainable},
        "memory (estimated, GiB)": {name: round(size / 2**30, 3) for name, size in parts.items()},
    }


def _kept_by_forward(family: Any, shape: tuple[int, ...], dtype: torch.dtype, job: Job) -> int:
    """Bytes that autograd keeps of one forward pass, frozen weights and parameters left out."""
    weights = {
        parameter.untyped_storage()._cdata
        for model in (family.unet, *family.text_encoders.values())
        for parameter in model.parameters()
    }
    kept: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        place = tensor.untyped_storage()._cdata
        if place not in weights and not tensor.is_leaf:
            kept[place] = tensor
        return tensor

    latents = torch.empty(shape, device="meta", dtype=dtype, requires_grad=True)
    timesteps = torch.zeros(shape[0], device="meta", dtype=torch.long)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        text = family.encode_prompts([""] * shape[0], weighted=job.config.weighted_captions)
        family.predict(latents, timesteps, text, None)
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


def _silent(_: str) -> None:
    """Nothing is said while estimating."""
