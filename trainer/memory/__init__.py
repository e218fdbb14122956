"""What keeps a model within the memory at hand: small frozen weights, block swap, checkpointing.

All of it works on the denoiser's list of blocks (`blocks_of`):

    memory.placing(job, "unet", unet, device, dtype)  # given to checkpoints.fill, which reads the file
    memory.prepare(family, job, device, say)  # once the base model is final, before the network is attached
    memory.offload(family, job, device)  # after gradient checkpointing is switched on
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, cast

import torch
from torch import Tensor, nn

from trainer.errors import ConfigError
from trainer.memory import packing, quantise
from trainer.memory.blocks import blocks_of, repeated_of, swapped_of
from trainer.memory.checkpointing import Offload
from trainer.memory.quantise import Format
from trainer.memory.swap import SLOTS, BlockSwap, piece_bytes

if TYPE_CHECKING:
    from trainer.families._base import Family, Say
    from trainer.job import Job, Note

__all__ = [
    "Choices",
    "Placed",
    "blocks_of",
    "check",
    "choices",
    "notes",
    "offload",
    "place_with",
    "placing",
    "prepare",
    "repeated_of",
    "store",
    "swapped_bytes",
    "swapped_of",
]

Placed = Callable[[str, Tensor], Tensor | None]
"""Takes a tensor of the model, as read from the file; gives it where and as it shall be, or None where
it has been put into the model already."""


SPLIT_MODE_BLOCKS = 18
"""Blocks to swap that free as much memory as FLUX's old split_mode did (sd-scripts' own advice)."""


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
    base = config.quantized_base
    if base not in ("", "int8", "nf4"):
        raise ConfigError(f"quantized_base is {base!r}: allowed are int8 and nf4, or nothing")
    fp8 = config.fp8_base or config.fp8_base_unet
    if base and fp8:
        raise ConfigError(
            f"quantized_base {base} and fp8 base exclude each other: untick fp8 base, or remove quantized_base"
        )
    swap = _blocks_to_swap(job)
    if swap and config.dynamo_backend not in ("no", "NO", ""):
        raise ConfigError(
            "blocks_to_swap cannot be combined with compiled blocks: set it to 0, or dynamo_backend to no"
        )
    return Choices(
        unet="fp8" if fp8 else cast("Format | None", base or None),
        text="fp8" if config.fp8_base and not config.fp8_base_unet else None,
        blocks_to_swap=swap,
        checkpointing=config.gradient_checkpointing,
        offload=config.gradient_checkpointing and config.cpu_offload_checkpointing,
    )


def check(job: Job, device: torch.device) -> None:
    """Refuse what ``device`` cannot do, before a model is loaded.

    Raises:
        ConfigError: With what to choose instead.
    """
    wanted = choices(job)
    if wanted.unet and device.type not in ("cpu", "cuda"):
        name = "fp8 base" if wanted.unet == "fp8" else f"quantized_base {wanted.unet}"
        raise ConfigError(
            f"{name} needs an NVIDIA card or a CPU, and this run would use {device.type.upper()}: switch it off"
        )


def notes(job: Job) -> list[Note]:
    """Memory settings whose effect differs from what is written."""
    from trainer.job import Note

    config, found = job.config, []
    if _is_split(job):
        found.append(
            Note(
                "split_mode",
                True,
                f"blocks_to_swap {_blocks_to_swap(job)}",
                "block swap frees as much memory and costs less time",
            )
        )
    if config.cpu_offload_checkpointing and not config.gradient_checkpointing:
        found.append(
            Note(
                "cpu_offload_checkpointing",
                True,
                False,
                "it moves what gradient_checkpointing keeps, and that is off",
            )
        )
    if (config.fp8_base or config.fp8_base_unet) and config.mixed_precision == "no":
        found.append(
            Note("fp8_base", True, True, "computed in fp32, since mixed_precision is no; Kohya refuses that")
        )
    return found


def _is_split(job: Job) -> bool:
    return job.config.split_mode and job.family == "flux"


def _blocks_to_swap(job: Job) -> int:
    return max(job.config.blocks_to_swap, SPLIT_MODE_BLOCKS if _is_split(job) else 0)


def placing(
    job: Job,
    part: Literal["unet", "text"],
    model: nn.Module,
    device: torch.device,
    dtype: torch.dtype,
    *,
    scaled: bool = False,
) -> Placed | None:
    """How the tensors of a model are put in place, one by one, while they are read from the file.

    Args:
        job: What is asked for.
        part: The denoiser, or a text encoder.
        model: Built on the meta device.
        device: Where it computes.
        dtype: Of everything that is not stored small.
        scaled: The file's weights have scales (`trainer.checkpoints.TensorFile.scaled`).

    Returns:
        For `trainer.checkpoints.fill`; None where nothing is special about this model.
    """
    wanted = choices(job)
    form = wanted.unet if part == "unet" else wanted.text
    if job.engine.base_weights:
        form = None  # they are added to whole weights; `prepare` follows
    swap = wanted.blocks_to_swap if part == "unet" else 0
    return place_with(form, model, device, dtype, swap=swap, scaled=scaled) if form or swap else None


def place_with(
    form: Format | None,
    model: nn.Module,
    device: torch.device,
    dtype: torch.dtype,
    *,
    swap: int = 0,
    scaled: bool = False,
) -> Placed:
    """The same for a given format and number of blocks in host memory."""
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
        quantise.store(name.removesuffix(".weight"), layer, whole, form, target, scaled=scaled)
        return None

    return place


def store(family: Family, job: Job) -> None:
    """Store small what the configuration wants small and is not yet."""
    wanted = choices(job)
    if wanted.unet is not None:
        quantise.quantise(family.unet, wanted.unet)
    if wanted.text is not None:
        for encoder in family.text_encoders.values():
            quantise.quantise(encoder, wanted.text)


def prepare(family: Family, job: Job, device: torch.device, say: Say) -> BlockSwap | None:
    """Store small what is not yet, and begin to swap.

    Returns:
        The swap, to be closed when the run ends; None without one.
    """
    wanted = choices(job)
    store(family, job)
    if wanted.unet is not None:
        size = sum(tensor.nbytes for tensor in (*family.unet.parameters(), *family.unet.buffers()))
        say(f"the frozen model is kept in {wanted.unet}: {size / 2**30:.2f} GiB")
    plain = job.config.dynamo_backend in ("no", "NO", "")
    if device.type == "cpu" and plain and (layers := packing.pack(family.unet)):
        say(f"{layers} convolutions keep their weights as this processor computes on them")
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


def offload(family: Family, job: Job, device: torch.device) -> Offload | None:
    """Keep the inputs of checkpointed blocks in host memory, where the job says so."""
    if not choices(job).offload:
        return None
    moved = Offload(device)
    denoiser: Any = family.unet
    denoiser.enable_gradient_checkpointing(moved)
    return moved


def swapped_bytes(denoiser: nn.Module, count: int) -> tuple[int, int]:
    """What ``blocks_to_swap`` = ``count`` keeps in host memory, and the slots on the device for it."""
    blocks = blocks_of(denoiser) if count else []
    sizes = [piece_bytes(blocks[place]) for place in swapped_of(denoiser, count)] if count else []
    return sum(sizes), max(sizes, default=0) * min(SLOTS, len(sizes))
