"""What keeps a model within the memory at hand: small frozen weights, block swap, checkpointing.

All of it works on the denoiser's list of blocks (`blocks_of`):

    memory.placing(form, unet, device, dtype, swap=n)  # given to checkpoints.fill, which reads the file
    memory.prepare(family, job, device)  # once the base model is final
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from trainer.config.own import own_value
from trainer.errors import ConfigError
from trainer.memory import quantise
from trainer.memory.blocks import blocks_of, swapped_of
from trainer.memory.checkpointing import Offload
from trainer.memory.quantise import Format
from trainer.memory.swap import BlockSwap

if TYPE_CHECKING:
    from trainer.families._base import Family, Say
    from trainer.job import Job

__all__ = ["Choices", "Placed", "blocks_of", "choices", "placing", "prepare", "swapped_of"]

Placed = Callable[[str, Tensor], Tensor | None]
"""Takes a tensor of the model, as read from the file; gives it where and as it shall be, or None where
it has been put into the model already."""


@dataclass(frozen=True)
class Choices:
    """What a configuration asks for."""

    unet: Format | None
    """How the denoiser's layers are stored; None: in the weights' own dtype."""
    text: Format | None
    blocks_to_swap: int
    checkpointing: bool
    offload: bool
    """Inputs of checkpointed blocks wait in host memory."""


def choices(job: Job) -> Choices:
    """What ``job`` asks for (engine facts 4.2 and 7.4).

    Raises:
        ConfigError: Two settings that exclude each other.
    """
    config = job.config
    base = own_value(config, "quantized_base")
    fp8 = config.fp8_base or config.fp8_base_unet
    if base and fp8:
        raise ConfigError(
            f"quantized_base {base} and fp8 base exclude each other: untick fp8 base, or remove quantized_base"
        )
    if config.blocks_to_swap and config.dynamo_backend not in ("no", "NO", ""):
        raise ConfigError(
            "blocks_to_swap cannot be combined with compiled blocks: set it to 0, or dynamo_backend to no"
        )
    unet = "fp8" if fp8 else cast("Format | None", base or None)
    return Choices(
        unet=unet,
        text="fp8" if config.fp8_base and not config.fp8_base_unet else None,
        blocks_to_swap=config.blocks_to_swap,
        checkpointing=config.gradient_checkpointing,
        offload=config.gradient_checkpointing and config.cpu_offload_checkpointing,
    )


def placing(
    form: Format | None,
    model: nn.Module,
    device: torch.device,
    dtype: torch.dtype,
    *,
    swap: int = 0,
) -> Placed:
    """How the tensors of ``model`` are put in place, one by one, while they are read.

    Args:
        form: How the weights of its blocks' layers are stored.
        model: Built on the meta device.
        device: Where it computes.
        dtype: Of everything that is not stored small.
        swap: Blocks that stay in host memory (blocks_to_swap).
    """
    layers = {f"{name}.weight": layer for name, layer in quantise.layers(model)} if form else {}
    blocks = [blocks_of(model)[place] for place in swapped_of(model, swap)] if swap else []
    swapped = {id(module) for block in blocks for module in block.modules()}
    home = torch.device("meta" if device.type == "meta" else "cpu")
    on_host = {
        f"{name}.{own}" if name else own
        for name, module in model.named_modules()
        if id(module) in swapped
        for own in (*module._parameters, *module._buffers)
    }

    def place(name: str, tensor: Tensor) -> Tensor | None:
        target = home if name in on_host else device
        layer = layers.get(name)
        if form is None or layer is None:
            # Cast on the device, so that no more than the file's bytes travel there.
            return tensor.to(target).to(dtype)
        # Made small where the model computes, which is quick on a GPU, also if it then goes home.
        whole = tensor.to(device)
        whole = whole if form == "fp8" else whole.to(dtype)
        quantise.store(name.removesuffix(".weight"), layer, whole, form, target)
        return None

    return place


def prepare(family: Family, job: Job, device: torch.device, say: Say) -> BlockSwap | None:
    """Store small what is not yet, and begin to swap; after base weights are merged.

    Returns:
        The swap, to be closed when the run ends; None without one.
    """
    wanted = choices(job)
    if wanted.unet is not None:
        quantise.quantise(family.unet, wanted.unet)
    if wanted.text is not None:
        for encoder in family.text_encoders.values():
            quantise.quantise(encoder, wanted.text)
    if wanted.unet or wanted.text:
        size = sum(tensor.nbytes for tensor in (*family.unet.parameters(), *family.unet.buffers()))
        say(f"the frozen model is kept in {wanted.unet or 'full'}: {size / 2**30:.2f} GiB")
    if wanted.offload:
        denoiser: Any = family.unet
        denoiser.enable_gradient_checkpointing(Offload(device))
    if not wanted.blocks_to_swap:
        return None
    blocks = blocks_of(family.unet)
    swapped = swapped_of(family.unet, wanted.blocks_to_swap)
    swap = BlockSwap(blocks, swapped, device)
    say(
        f"block swap: {len(swapped)} of {len(blocks)} blocks live in host memory "
        f"({swap.host_bytes / 2**30:.2f} GiB)"
    )
    if device.type == "cuda" and not swap.pinned:
        say("the system refused page-locked memory for block swap: copies will not overlap with computing")
    return swap
