"""Model files as the tools see them: where a LoRA's layers lie, and writing tensor by tensor."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from trainer import checkpoints
from trainer.checkpoints import TensorFile
from trainer.errors import ModelFileError, SetupError
from trainer.files import atomic_path
from trainer.lora_file import check_free_space
from trainer.tools._names import Kind

__all__ = ["Checkpoint", "Place", "open_checkpoint", "write_tensors"]

UNET = "model.diffusion_model."
DTYPES: Mapping[torch.dtype, str] = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
"""As safetensors' header names them."""


@dataclass(frozen=True)
class Place:
    """Where a layer's weight is: the ``index``-th of ``count`` equal parts of a tensor's rows."""

    key: str
    index: int = 0
    count: int = 1

    def of(self, tensor: Tensor) -> Tensor:
        """The layer's rows of the tensor, not copied."""
        return tensor.chunk(self.count)[self.index]


@dataclass(frozen=True)
class Checkpoint:
    """A single model file, opened."""

    file: TensorFile
    kind: Kind
    places: Mapping[str, Place]
    """By Kohya's key stem: every weight matrix and convolution of UNet and text encoders."""
    metadata: Mapping[str, str]

    def dtypes(self) -> dict[str, torch.dtype]:
        """Dtype of every tensor."""
        if self.file.path.suffix.lower() == ".safetensors":
            by_name = {name: dtype for dtype, name in DTYPES.items()}
            with safe_open(self.file.path, framework="pt") as file:
                return {key: by_name[file.get_slice(key).get_dtype()] for key in self.file.shapes}
        return {key: tensor.dtype for key, tensor in self.file.stream(self.file.shapes)}

    def weight(self, name: str) -> Tensor:
        """A layer's weight, on the CPU."""
        place = self.places[name]
        return place.of(next(self.file.stream([place.key]))[1])


def open_checkpoint(path: Path) -> Checkpoint:
    """Open an SD 1.x, SD 2.x, SDXL or FLUX.1 file, or a CLIP-L or T5 file that belongs to FLUX.1.

    Raises:
        ModelFileError: Missing, broken, or of another kind.
    """
    file = checkpoints.open_tensors(path)
    shapes = file.shapes
    kind = checkpoints.kind_of(shapes)
    names: dict[str, tuple[str, ...]] = {}
    family: Kind
    if kind in ("sd1", "sd2"):
        family = "sd1" if kind == "sd1" else "sd2"
        unet = checkpoints.ldm_unet_names(shapes, UNET)
        names |= {key: tuple(f"unet.{name}" for name in found) for key, found in unet.items()}
        if kind == "sd1":
            names |= _text(checkpoints.clip_names(shapes, "cond_stage_model.transformer."), "te")
        else:
            names |= _text(_open_clip(shapes, "cond_stage_model.model.", dropped=1), "te")
    elif kind == "sdxl":
        family = "sdxl"
        names |= {key: (f"unet.{key[len(UNET) :]}",) for key in shapes if key.startswith(UNET)}
        names |= _text(checkpoints.clip_names(shapes, "conditioner.embedders.0.transformer."), "te1")
        names |= _text(_open_clip(shapes, "conditioner.embedders.1.model.", dropped=0), "te2")
    elif kind == "flux" and any("double_blocks." in key for key in shapes):
        family = "flux"
        names |= {key: (f"unet.{key.removeprefix(UNET)}",) for key in shapes}
    elif "text_model.encoder.layers.0.mlp.fc1.weight" in shapes:
        family = "flux"
        names |= _text(checkpoints.clip_names(shapes), "te1")
    elif "encoder.block.0.layer.0.SelfAttention.q.weight" in shapes:
        family = "flux"
        names |= {key: (f"te3.{key}",) for key in shapes}
    else:
        raise ModelFileError(
            f"{path.name} is no single SD 1.x, SD 2.x, SDXL or FLUX.1 file with the original layer names, and no "
            "text encoder of FLUX.1: choose such a file"
        )
    places: dict[str, Place] = {}
    for key, found in names.items():
        for index, name in enumerate(found):
            if name.endswith(".weight") and len(shapes[key]) > 1:
                stem = "lora_" + name.removesuffix(".weight").replace(".", "_")
                places[stem] = Place(key, index, len(found))
    return Checkpoint(file, family, places, getattr(file, "metadata", {}))


def _text(names: checkpoints.Renamed, part: str) -> dict[str, tuple[str, ...]]:
    return {key: tuple(f"{part}.text_model.{name}" for name in found) for key, found in names.items()}


def _open_clip(shapes: Mapping[str, tuple[int, ...]], prefix: str, *, dropped: int) -> checkpoints.Renamed:
    blocks = {
        match[1]
        for key in shapes
        if (match := re.match(re.escape(prefix) + r"transformer\.resblocks\.(\d+)\.", key))
    }
    return checkpoints.open_clip_names(
        [key for key in shapes if key.startswith(prefix)], prefix, len(blocks) - dropped
    )


def write_tensors(
    path: Path,
    layout: Mapping[str, tuple[torch.dtype, tuple[int, ...]]],
    tensors: Iterable[tuple[str, Tensor]],
    metadata: Mapping[str, str],
) -> int:
    """Write a .safetensors file one tensor at a time, so that a model is never in memory whole.

    Args:
        path: The file; it appears when all is written.
        layout: dtype and shape of every tensor.
        tensors: All of them, in any order.
        metadata: Entries of the header.

    Returns:
        Size in bytes.

    Raises:
        SetupError: The disk is full or write-protected.
        ModelFileError: A tensor is missing or has another shape.
    """
    header: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    offsets: dict[str, int] = {}
    end = 0
    # Widest types first, as safetensors itself orders them, so that every tensor is aligned.
    for key in sorted(layout, key=lambda each: (-layout[each][0].itemsize, each)):
        dtype, shape = layout[key]
        size_bytes = dtype.itemsize * torch.Size(shape).numel()
        header[key] = {"dtype": DTYPES[dtype], "shape": list(shape), "data_offsets": [end, end + size_bytes]}
        offsets[key] = end
        end += size_bytes
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode("utf-8")
    text += b" " * (-len(text) % 8)
    start = 8 + len(text)
    check_free_space(path.parent, start + end)
    try:
        with atomic_path(path) as temporary:
            left = set(layout)
            with temporary.open("wb") as handle:
                handle.write(len(text).to_bytes(8, "little") + text)
                for key, tensor in tensors:
                    dtype, shape = layout[key]
                    if tuple(tensor.shape) != tuple(shape):
                        raise ModelFileError(
                            f"{key} is {list(tensor.shape)} where {list(shape)} was expected"
                        )
                    handle.seek(start + offsets[key])
                    data = tensor.detach().to("cpu", dtype).contiguous()
                    handle.write(data.reshape(-1).view(torch.uint8).numpy().data)
                    left.discard(key)
            if left:
                raise ModelFileError(
                    f"{path.name} was not written: {len(left)} tensors are missing ({min(left)} ...)"
                )
            with safe_open(temporary, framework="pt") as file:
                if set(file.keys()) != layout.keys():
                    raise ModelFileError(
                        f"{path.name} was not written correctly and is not kept: check the disk"
                    )
            return temporary.stat().st_size
    except (OSError, SafetensorError) as error:
        raise SetupError(
            f"{path} could not be written ({error}): is the disk full or write-protected?"
        ) from error
