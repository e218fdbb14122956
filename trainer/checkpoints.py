"""Reading model files: what is in them, and their tensors under diffusers' and transformers' names.

Single files come in the LDM layout (SD 1.x, 2.x) or the SGM layout (SDXL); folders in diffusers'.
Name rules: sd-scripts, library/model_util.py and library/sdxl_model_util.py. Weights are read one
tensor at a time, straight to their place and dtype, so that a model is never in memory twice.
"""

from __future__ import annotations

import json
import re
import threading
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from trainer.errors import ModelFileError
from trainer.files import REPOSITORY

__all__ = [
    "MODELS",
    "Kind",
    "Renamed",
    "TensorFile",
    "check_fit",
    "clip_names",
    "diffusers_vae_config",
    "diffusers_vae_names",
    "fill",
    "kind_of",
    "ldm_clip_config",
    "ldm_unet_config",
    "ldm_unet_names",
    "ldm_vae_config",
    "ldm_vae_names",
    "open_clip_config",
    "open_clip_names",
    "open_tensors",
    "open_weights",
    "read_json",
    "under",
    "unet_name",
]

MODELS = REPOSITORY / "assets" / "models"
"""Folder of the facts that a single file does not carry: configurations, CLIP's byte pairs."""

Kind = Literal["sd1", "sd2", "sdxl", "sdxl_refiner", "flux", "sd3", "unet", "vae", "lora", "unknown"]

Renamed = Mapping[str, tuple[str, ...]]
"""Key in the file -> names in the model; several names share the tensor's rows in equal parts."""

MAPPED_BYTES = 256 << 20
"""Pages of a file that stay mapped while its tensors are being converted to another dtype."""


class TensorFile(ABC):
    """A file of named tensors, opened but not read."""

    path: Path
    shapes: Mapping[str, tuple[int, ...]]
    scaled: bool = False
    """Weights lie in the file in 8 bits with a scale each; they come out whole, in float32."""

    @abstractmethod
    def stream(self, keys: Iterable[str]) -> Iterator[tuple[str, Tensor]]:
        """The tensors of ``keys``, on the CPU, in the order of the file."""


class _Safetensors(TensorFile):
    def __init__(self, path: Path) -> None:
        from safetensors import safe_open

        self.path = path
        try:
            with safe_open(path, framework="pt", device="cpu") as file:
                self._order = file.offset_keys()
                self.shapes = {key: tuple(file.get_slice(key).get_shape()) for key in self._order}
                self.metadata: Mapping[str, str] = file.metadata() or {}
        except OSError as error:
            raise ModelFileError(f"{path} cannot be read: {error}") from error
        except Exception as error:
            raise ModelFileError(
                f"{path} is not a whole safetensors file ({error}): copy or download it again"
            ) from error

    def stream(self, keys: Iterable[str]) -> Iterator[tuple[str, Tensor]]:
        from safetensors import safe_open

        wanted = set(keys)
        waiting = [key for key in self._order if key in wanted]
        while waiting:
            # A closed file gives its pages back: without this the whole file would count as memory
            # in use beside the converted copy.
            with safe_open(self.path, framework="pt", device="cpu") as file:
                size_bytes = 0
                while waiting and size_bytes < MAPPED_BYTES:
                    key = waiting.pop(0)
                    tensor = file.get_tensor(key)
                    size_bytes += tensor.numel() * tensor.element_size()
                    yield key, tensor
                    del tensor


class _Pickled(TensorFile):
    def __init__(self, path: Path) -> None:
        self.path = path
        content = _unpickle(path)
        nested = content.get("state_dict", content)
        if not isinstance(nested, Mapping):
            raise ModelFileError(f"{path} holds no tensors by name: it is not a model checkpoint")
        self._tensors = {key: value for key, value in nested.items() if isinstance(value, Tensor)}
        self.shapes = {key: tuple(value.shape) for key, value in self._tensors.items()}

    def stream(self, keys: Iterable[str]) -> Iterator[tuple[str, Tensor]]:
        wanted = set(keys)
        for key in list(self._tensors):
            if key in wanted:
                yield key, self._tensors[key]


SCALES = (".scale_weight", ".weight_scale")
BESIDE = (*SCALES, ".scale_input", ".input_scale", ".comfy_quant")
"""What ComfyUI's scaled fp8 files hold beside a layer's weight, and of that the weight's scale."""
MARK = "scaled_fp8"
SCALED_FORMATS = ("float8_e4m3fn", "float8_e5m2")


class _Scaled(TensorFile):
    """ComfyUI's scaled fp8: a weight is what is stored times its scale (comfy/ops.py: scaled_fp8_ops)."""

    scaled = True

    def __init__(self, file: TensorFile) -> None:
        self.path = file.path
        self._file = file
        self.shapes = {
            key: shape
            for key, shape in file.shapes.items()
            if not key.endswith(BESIDE) and key.rpartition(".")[2] != MARK
        }
        self._scales = {
            f"{key.removesuffix(end)}.weight": key
            for key in file.shapes
            for end in SCALES
            if key.endswith(end)
        }
        for key, fact in file.stream([key for key in file.shapes if key.endswith(".comfy_quant")]):
            found = json.loads(bytes(fact.tolist())).get("format")
            if found not in SCALED_FORMATS:
                raise ModelFileError(
                    f"{file.path}: {key.removesuffix('.comfy_quant')} is stored as {found}, which is not read "
                    f"here: choose a file in bf16, fp16 or fp8"
                )

    def stream(self, keys: Iterable[str]) -> Iterator[tuple[str, Tensor]]:
        wanted = set(keys) & self.shapes.keys()
        scales = dict(self._file.stream([scale for key, scale in self._scales.items() if key in wanted]))
        for key, tensor in self._file.stream(wanted):
            if key not in self._scales:
                yield key, tensor
                continue
            scale = scales[self._scales[key]].float()
            if scale.numel() not in (1, len(tensor)):
                raise ModelFileError(
                    f"{self.path}: {self._scales[key]} has {scale.numel()} numbers, expected one, or one for "
                    f"each of {len(tensor)} rows: choose another file"
                )
            yield key, tensor.float() * scale.reshape(-1, *[1] * (tensor.ndim - 1))


class _Several(TensorFile):
    """Shards of one model."""

    def __init__(self, files: Sequence[TensorFile]) -> None:
        self.path = files[0].path
        self.scaled = any(file.scaled for file in files)
        self._files = files
        self.shapes = {key: shape for file in files for key, shape in file.shapes.items()}

    def stream(self, keys: Iterable[str]) -> Iterator[tuple[str, Tensor]]:
        wanted = set(keys)
        for file in self._files:
            yield from file.stream(wanted & file.shapes.keys())


class _Inert:
    """Stands for a class that a training program left in its checkpoint: made, never run."""

    def __init__(self, *_: Any, **__: Any) -> None:
        pass

    def __setstate__(self, _: Any) -> None:
        pass


LEFT_BY_TRAINERS = ("pytorch_lightning.", "lightning.", "lightning_fabric.", "numpy.", "omegaconf.")
"""Packages whose classes old checkpoints carry beside the weights (SD 1.4 does)."""


_UNPICKLING = threading.Lock()
"""What PyTorch's reader allows is one for all threads: who is done takes back what another still needs."""


def _unpickle(path: Path) -> Mapping[str, Any]:
    """Read a pickled checkpoint without executing anything in it."""
    with _UNPICKLING:
        content = _loaded(path)
    if not isinstance(content, Mapping):
        raise ModelFileError(f"{path} holds no tensors by name: it is not a model checkpoint")
    return content


def _loaded(path: Path) -> Any:
    allowed: list[Any] = []
    try:
        foreign = torch.serialization.get_unsafe_globals_in_checkpoint(path)
    except Exception:  # noqa: BLE001  (the old tar format has no such listing; weights_only still guards)
        foreign = []
    for name in foreign:
        if not name.startswith(LEFT_BY_TRAINERS):
            raise ModelFileError(
                f"{path} would run code when opened ({name}): do not use it, or convert it to "
                ".safetensors with a program that you trust"
            )
        allowed.append((_Inert, name))
    try:
        with torch.serialization.safe_globals(allowed), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about storages of the torch that wrote the file
            try:
                return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
            except RuntimeError:  # written before torch 1.6: not a zip file, cannot be mapped
                return torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise ModelFileError(f"{path} cannot be read: {error}") from error
    except Exception as error:
        raise ModelFileError(
            f"{path} is not a checkpoint that can be opened safely ({str(error).splitlines()[0]}): "
            "copy it again, or use a .safetensors file"
        ) from error


def open_tensors(path: Path) -> TensorFile:
    """Open a .safetensors, .ckpt, .pt, .pth or .bin file.

    Raises:
        ModelFileError: It is missing, broken, or would have to execute code.
    """
    if not path.is_file():
        raise ModelFileError(f"there is no model file {path}")
    if path.suffix.lower() in (".ckpt", ".pt", ".pth", ".bin"):
        return _Pickled(path)
    file = _Safetensors(path)
    return _Scaled(file) if any(key.endswith(SCALES) for key in file.shapes) else file


def open_weights(folder: Path) -> TensorFile:
    """Open the weights of one model of a diffusers folder (unet, vae, text_encoder ...).

    Full precision comes before fp16 variants, safetensors before pickles; shards are joined.

    Raises:
        ModelFileError: No weights are there, or they are broken.
    """
    stems = ("diffusion_pytorch_model", "model", "pytorch_model")
    for ending in (".safetensors", ".fp16.safetensors", ".bin", ".fp16.bin"):
        for stem in stems:
            file = folder / f"{stem}{ending}"
            if file.is_file():
                return open_tensors(file)
            index = folder / f"{stem}{ending.replace('.fp16', '')}.index{'.fp16' * ('fp16' in ending)}.json"
            if index.is_file():
                shards = sorted(set(read_json(index).get("weight_map", {}).values()))
                return _Several([open_tensors(folder / Path(str(shard)).name) for shard in shards])
    raise ModelFileError(f"{folder} holds no weights: expected {stems[0]}.safetensors or model.safetensors")


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file.

    Raises:
        ModelFileError: It is missing or not a JSON object.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"))
    except FileNotFoundError as error:
        raise ModelFileError(f"{path} is missing: the model folder is incomplete") from error
    except (OSError, ValueError) as error:
        raise ModelFileError(f"{path} cannot be read as JSON: {error}") from error
    if not isinstance(content, dict):
        raise ModelFileError(f"{path} should hold one JSON object")
    return content


def kind_of(keys: Iterable[str]) -> Kind:
    """Which family a single file belongs to, by its keys (engine facts 4.1)."""
    starts = {
        "lora_unet_": "lora",
        "lora_te": "lora",
        "conditioner.embedders.1.": "sdxl",
        "conditioner.embedders.0.model.": "sdxl_refiner",
        "cond_stage_model.model.": "sd2",
        "cond_stage_model.transformer.": "sd1",
        "double_blocks.": "flux",
        "model.diffusion_model.double_blocks.": "flux",
        "transformer_blocks.0.attn.add_k_proj.": "flux",
        "joint_blocks.": "sd3",
        "model.diffusion_model.joint_blocks.": "sd3",
        "model.diffusion_model.": "unet",
        "first_stage_model.": "vae",
        "encoder.down": "vae",
    }
    found = set[str]()
    for key in keys:
        found |= {kind for start, kind in starts.items() if key.startswith(start)}
        if ".lora_down." in key or ".lora_A." in key:
            found.add("lora")
    order: tuple[Kind, ...] = ("lora", "sdxl", "sdxl_refiner", "sd3", "flux", "sd2", "sd1", "unet", "vae")
    return next((kind for kind in order if kind in found), "unknown")


def under(shapes: Mapping[str, tuple[int, ...]], prefix: str) -> dict[str, tuple[int, ...]]:
    """The entries whose keys start with ``prefix``, without it."""
    return {key[len(prefix) :]: shape for key, shape in shapes.items() if key.startswith(prefix)}


def check_fit(model: nn.Module, file: TensorFile, names: Renamed, *, what: str) -> None:
    """Whether a file has what a model needs, by names and shapes alone.

    Args:
        model: Built on the meta device.
        file: Where the weights are.
        names: Which tensor goes where.
        what: Name of the model, for messages.

    Raises:
        ModelFileError: A tensor is missing or has another shape.
    """
    expected = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    there: set[str] = set()
    for key, targets in names.items():
        whole = file.shapes.get(key)
        if whole is None:
            continue
        part = (whole[0] // len(targets), *whole[1:]) if len(targets) > 1 else tuple(whole)
        for name in targets:
            # 1x1 convolutions and linear layers hold the same numbers.
            if name in expected and _squeezed(part) != _squeezed(expected[name]):
                raise ModelFileError(
                    f"{file.path}: {key} is {list(part)} where this {what} has {list(expected[name])}"
                )
            there.add(name)
    missing = [name for name in expected if name not in there]
    if missing:
        raise ModelFileError(
            f"{file.path} lacks {len(missing)} of the {len(expected)} tensors of the {what} "
            f"(e.g. {missing[0]}): the file is incomplete or of another architecture"
        )


def fill(
    model: nn.Module,
    file: TensorFile,
    names: Renamed,
    *,
    device: torch.device,
    dtype: torch.dtype,
    what: str,
    place: Callable[[str, Tensor], Tensor | None] | None = None,
) -> None:
    """Give a model built on the meta device its weights, frozen, one tensor at a time.

    Args:
        model: Its parameters are replaced, never copied into.
        file: Where the weights are.
        names: Which tensor goes where.
        device: Where the model shall be.
        dtype: Of the floating-point weights. A CPU model that is stored in this dtype stays mapped
            from its file.
        what: Name of the model, for messages.
        place: Puts each tensor where and as it shall be, in place of ``device`` and ``dtype``
            (`trainer.memory.placing`); None from it: the tensor is in the model already.

    Raises:
        ModelFileError: A tensor is missing or has another shape.
    """
    check_fit(model, file, names, what=what)
    expected = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    loaded: dict[str, Tensor] = {}
    placed: set[str] = set()
    for key, tensor in file.stream(names):
        targets = names[key]
        for name, part in zip(targets, tensor.chunk(len(targets)), strict=True):
            if name not in expected:
                continue
            part = part.reshape(expected[name])
            # A part of a larger tensor gets storage of its own, so that the rest can go.
            if place is not None:
                value = place(name, part.clone() if len(targets) > 1 else part)
            else:
                # Cast on the device, so that no more than the file's bytes travel there.
                value = part.to(device, copy=len(targets) > 1).to(dtype)
            if value is None:
                placed.add(name)
            else:
                loaded[name] = value
    model.load_state_dict(loaded, assign=True, strict=not placed)
    model.requires_grad_(False)


def _squeezed(shape: Sequence[int]) -> tuple[int, ...]:
    return tuple(size for size in shape if size != 1)


# --- UNet, LDM and SGM names ------------------------------------------------------------------

RESNET = {
    "in_layers.0": "norm1",
    "in_layers.2": "conv1",
    "emb_layers.1": "time_emb_proj",
    "out_layers.0": "norm2",
    "out_layers.3": "conv2",
    "skip_connection": "conv_shortcut",
}
UNET_ENDS = {
    "time_embed.0.": "time_embedding.linear_1.",
    "time_embed.2.": "time_embedding.linear_2.",
    "label_emb.0.0.": "add_embedding.linear_1.",
    "label_emb.0.2.": "add_embedding.linear_2.",
    "input_blocks.0.0.": "conv_in.",
    "out.0.": "conv_norm_out.",
    "out.2.": "conv_out.",
}
UNET_BLOCK = re.compile(r"(input_blocks|output_blocks)\.(\d+)\.(\d+)\.(.+)")
UNET_MIDDLE = re.compile(r"middle_block\.([012])\.(.+)")


def _layers_per_block(shapes: Mapping[str, tuple[int, ...]]) -> int:
    downs = [int(key.split(".")[1]) for key in shapes if re.match(r"input_blocks\.\d+\.0\.op\.weight", key)]
    inputs = {int(key.split(".")[1]) for key in shapes if key.startswith("input_blocks.")}
    return (min(downs) if downs else max(inputs) + 1) - 1


def ldm_unet_names(shapes: Mapping[str, tuple[int, ...]], prefix: str) -> Renamed:
    """LDM or SGM keys under ``prefix`` -> names in UNet2DConditionModel (engine facts 4.3)."""
    inner = under(shapes, prefix)
    layers = _layers_per_block(inner)
    return {prefix + key: (unet_name(key, layers),) for key in inner}


def unet_name(key: str, layers: int) -> str:
    """A key of the LDM or SGM layout as diffusers names it.

    Args:
        key: Without "model.diffusion_model.".
        layers: Residual blocks of a level: 2 in SD and SDXL.
    """
    for start, name in UNET_ENDS.items():
        if key.startswith(start):
            return name + key[len(start) :]
    if middle := UNET_MIDDLE.fullmatch(key):
        part, rest = int(middle[1]), middle[2]
        if part == 1:
            return f"mid_block.attentions.0.{rest}"
        return f"mid_block.resnets.{part // 2}.{_resnet(rest)}"
    if block := UNET_BLOCK.fullmatch(key):
        side, index, part, rest = block[1], int(block[2]), int(block[3]), block[4]
        if side == "input_blocks":
            i, j = divmod(index - 1, layers + 1)
            if rest.startswith("op."):
                return f"down_blocks.{i}.downsamplers.0.conv.{rest[3:]}"
            side = f"down_blocks.{i}"
        else:
            i, j = divmod(index, layers + 1)
            if rest.startswith("conv."):
                return f"up_blocks.{i}.upsamplers.0.{rest}"
            side = f"up_blocks.{i}"
        return f"{side}.resnets.{j}.{_resnet(rest)}" if part == 0 else f"{side}.attentions.{j}.{rest}"
    return key


def _resnet(key: str) -> str:
    for start, name in RESNET.items():
        if key.startswith(start + "."):
            return name + key[len(start) :]
    return key


def ldm_unet_config(
    shapes: Mapping[str, tuple[int, ...]], prefix: str, base: Mapping[str, Any]
) -> dict[str, Any]:
    """Configuration of the UNet under ``prefix``: sizes from the shapes, the rest from ``base``.

    Args:
        shapes: All shapes of the file.
        prefix: "model.diffusion_model."
        base: What shapes cannot tell; ``head_width`` stands for heads of that width in each block.

    Raises:
        ModelFileError: The UNet's tensors are not there.
    """
    inner = under(shapes, prefix)
    if "input_blocks.0.0.weight" not in inner or "middle_block.1.proj_in.weight" not in inner:
        raise ModelFileError(f"the file holds no UNet under {prefix!r}: choose a full checkpoint")
    layers = _layers_per_block(inner)
    blocks = -(
        -(len({key.split(".")[1] for key in inner if key.startswith("input_blocks.")}) - 1) // (layers + 1)
    )
    first = [1 + i * (layers + 1) for i in range(blocks)]
    channels = [inner[f"input_blocks.{n}.0.out_layers.3.weight"][0] for n in first]
    depths = [_depth(inner, f"input_blocks.{n}.1.") for n in first]
    config = {name: value for name, value in base.items() if name != "head_width"}
    if "head_width" in base:
        config["attention_head_dim"] = [max(1, size // base["head_width"]) for size in channels]
    if "label_emb.0.0.weight" in inner:  # SDXL: pooled text and sizes
        config["projection_class_embeddings_input_dim"] = inner["label_emb.0.0.weight"][1]
    middle = "middle_block.1."
    return config | {
        "in_channels": inner["input_blocks.0.0.weight"][1],
        "out_channels": inner["out.2.weight"][0],
        "block_out_channels": channels,
        "layers_per_block": layers,
        "down_block_types": ["CrossAttnDownBlock2D" if depth else "DownBlock2D" for depth in depths],
        "up_block_types": ["CrossAttnUpBlock2D" if depth else "UpBlock2D" for depth in reversed(depths)],
        # The deepest block's number also counts for the middle.
        "transformer_layers_per_block": [*(depth or 1 for depth in depths[:-1]), _depth(inner, middle)],
        "cross_attention_dim": inner[f"{middle}transformer_blocks.0.attn2.to_k.weight"][1],
        "use_linear_projection": len(inner[f"{middle}proj_in.weight"]) == 2,
    }


def _depth(shapes: Mapping[str, tuple[int, ...]], prefix: str) -> int:
    """How many transformer blocks lie under ``prefix``."""
    return len({key.split(".")[1] for key in under(shapes, prefix) if key.startswith("transformer_blocks.")})


# --- VAE --------------------------------------------------------------------------------------

VAE_ATTENTION = {
    "norm": "group_norm",
    "q": "to_q",
    "k": "to_k",
    "v": "to_v",
    "proj_out": "to_out.0",
    # diffusers before 0.18
    "query": "to_q",
    "key": "to_k",
    "value": "to_v",
    "proj_attn": "to_out.0",
}


def ldm_vae_names(shapes: Mapping[str, tuple[int, ...]], prefix: str) -> Renamed:
    """LDM keys under ``prefix`` ("first_stage_model." or "") -> names in AutoencoderKL."""
    inner = under(shapes, prefix)
    blocks = len({key.split(".")[2] for key in inner if key.startswith("decoder.up.")})
    return {prefix + key: (_vae_name(key, blocks),) for key in inner}


def _vae_name(key: str, blocks: int) -> str:
    key = key.replace(".nin_shortcut.", ".conv_shortcut.").replace(".norm_out.", ".conv_norm_out.")
    key = re.sub(r"\.mid\.block_([12])\.", lambda m: f".mid_block.resnets.{int(m[1]) - 1}.", key)
    if attention := re.fullmatch(r"(.+)\.mid\.attn_1\.(\w+)\.(\w+)", key):
        return f"{attention[1]}.mid_block.attentions.0.{VAE_ATTENTION[attention[2]]}.{attention[3]}"
    key = re.sub(r"^encoder\.down\.(\d+)\.block\.", r"encoder.down_blocks.\1.resnets.", key)
    key = re.sub(r"^encoder\.down\.(\d+)\.downsample\.", r"encoder.down_blocks.\1.downsamplers.0.", key)
    key = re.sub(
        r"^decoder\.up\.(\d+)\.block\.", lambda m: f"decoder.up_blocks.{blocks - 1 - int(m[1])}.resnets.", key
    )
    return re.sub(
        r"^decoder\.up\.(\d+)\.upsample\.",
        lambda m: f"decoder.up_blocks.{blocks - 1 - int(m[1])}.upsamplers.0.",
        key,
    )


def diffusers_vae_names(keys: Iterable[str]) -> Renamed:
    """Diffusers keys of any age -> names in today's AutoencoderKL."""
    old = re.compile(r"(.+\.attentions\.0)\.(query|key|value|proj_attn)\.(\w+)")
    names = {}
    for key in keys:
        match = old.fullmatch(key)
        names[key] = (f"{match[1]}.{VAE_ATTENTION[match[2]]}.{match[3]}" if match else key,)
    return names


def ldm_vae_config(
    shapes: Mapping[str, tuple[int, ...]], prefix: str, base: Mapping[str, Any]
) -> dict[str, Any]:
    """Configuration of the VAE under ``prefix``.

    Raises:
        ModelFileError: The VAE's tensors are not there.
    """
    inner = under(shapes, prefix)
    if "decoder.conv_in.weight" not in inner or "encoder.conv_in.weight" not in inner:
        raise ModelFileError(f"the file holds no VAE under {prefix!r}: give a VAE file in the field vae")
    blocks = len({key.split(".")[2] for key in inner if key.startswith("encoder.down.")})
    return dict(base) | {
        "in_channels": inner["encoder.conv_in.weight"][1],
        "out_channels": inner["decoder.conv_out.weight"][0],
        "latent_channels": inner["decoder.conv_in.weight"][1],
        "block_out_channels": [inner[f"encoder.down.{i}.block.0.conv2.weight"][0] for i in range(blocks)],
        "layers_per_block": len(
            {key.split(".")[4] for key in inner if key.startswith("encoder.down.0.block.")}
        ),
        "down_block_types": ["DownEncoderBlock2D"] * blocks,
        "up_block_types": ["UpDecoderBlock2D"] * blocks,
        "use_quant_conv": "quant_conv.weight" in inner,
        "use_post_quant_conv": "post_quant_conv.weight" in inner,
    }


def diffusers_vae_config(shapes: Mapping[str, tuple[int, ...]], base: Mapping[str, Any]) -> dict[str, Any]:
    """Configuration of a VAE that comes as diffusers weights without their config.json."""
    down = "encoder.down_blocks."
    blocks = len({key.split(".")[2] for key in shapes if key.startswith(down)})
    return dict(base) | {
        "in_channels": shapes["encoder.conv_in.weight"][1],
        "out_channels": shapes["decoder.conv_out.weight"][0],
        "latent_channels": shapes["decoder.conv_in.weight"][1],
        "block_out_channels": [shapes[f"{down}{i}.resnets.0.conv2.weight"][0] for i in range(blocks)],
        "layers_per_block": len({key.split(".")[4] for key in shapes if key.startswith(f"{down}0.resnets.")}),
        "down_block_types": ["DownEncoderBlock2D"] * blocks,
        "up_block_types": ["UpDecoderBlock2D"] * blocks,
        "use_quant_conv": "quant_conv.weight" in shapes,
        "use_post_quant_conv": "post_quant_conv.weight" in shapes,
    }


# --- CLIP text encoders -----------------------------------------------------------------------


def clip_names(keys: Iterable[str], prefix: str = "") -> Renamed:
    """Transformers keys under ``prefix`` -> names in CLIPTextModel.

    transformers 5 has no ``text_model.`` level in this class; files have it or not.
    """
    names = {}
    for key in keys:
        if key.startswith(prefix) and not key.endswith("position_ids"):
            names[key] = (key[len(prefix) :].removeprefix("text_model."),)
    return names


def ldm_clip_config(
    shapes: Mapping[str, tuple[int, ...]], names: Renamed, base: Mapping[str, Any]
) -> dict[str, Any]:
    """CLIPTextConfig values for tensors that `clip_names` has named.

    Raises:
        ModelFileError: The text encoder's tensors are not there.
    """
    inner = {new: shapes[key] for key, news in names.items() for new in news}
    if "embeddings.token_embedding.weight" not in inner:
        raise ModelFileError("the file holds no text encoder: choose a full checkpoint, not a bare UNet")
    vocab, width = inner["embeddings.token_embedding.weight"]
    return {name: value for name, value in base.items() if name != "head_width"} | {
        "vocab_size": vocab,
        "hidden_size": width,
        "projection_dim": width,
        "intermediate_size": inner["encoder.layers.0.mlp.fc1.weight"][0],
        "num_attention_heads": max(1, width // base["head_width"]),
        "num_hidden_layers": len(
            {name.split(".")[2] for name in inner if name.startswith("encoder.layers.")}
        ),
        "max_position_embeddings": inner["embeddings.position_embedding.weight"][0],
    }


OPEN_CLIP = {
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
    "attn.out_proj": "self_attn.out_proj",
}
OPEN_CLIP_ENDS = {
    "positional_embedding": "embeddings.position_embedding.weight",
    "token_embedding.weight": "embeddings.token_embedding.weight",
    "ln_final.weight": "final_layer_norm.weight",
    "ln_final.bias": "final_layer_norm.bias",
}


def open_clip_names(keys: Iterable[str], prefix: str, layers: int) -> Renamed:
    """OpenCLIP keys under ``prefix`` -> names in CLIPTextModel, the first ``layers`` layers only."""
    names: dict[str, tuple[str, ...]] = {}
    for key in keys:
        inner = key.removeprefix(prefix)
        if inner in OPEN_CLIP_ENDS:
            names[key] = (OPEN_CLIP_ENDS[inner],)
        elif block := re.fullmatch(r"transformer\.resblocks\.(\d+)\.(.+)\.?(weight|bias)", inner):
            if int(block[1]) >= layers:
                continue
            layer, part = f"encoder.layers.{block[1]}", block[2].rstrip("._")
            if part == "attn.in_proj":
                names[key] = tuple(f"{layer}.self_attn.{which}_proj.{block[3]}" for which in "qkv")
            elif part in OPEN_CLIP:
                names[key] = (f"{layer}.{OPEN_CLIP[part]}.{block[3]}",)
    return names


def open_clip_config(
    shapes: Mapping[str, tuple[int, ...]], prefix: str, base: Mapping[str, Any], *, dropped: int
) -> dict[str, Any]:
    """CLIPTextConfig values for an OpenCLIP encoder whose last ``dropped`` layers are left out."""
    inner = under(shapes, prefix)
    if "token_embedding.weight" not in inner:
        raise ModelFileError("the file holds no text encoder: choose a full checkpoint, not a bare UNet")
    blocks = {key.split(".")[2] for key in inner if key.startswith("transformer.resblocks.")}
    vocab, width = inner["token_embedding.weight"]
    return {name: value for name, value in base.items() if name != "head_width"} | {
        "vocab_size": vocab,
        "hidden_size": width,
        "projection_dim": width,
        "intermediate_size": inner["transformer.resblocks.0.mlp.c_fc.weight"][0],
        "num_attention_heads": max(1, width // base["head_width"]),
        "num_hidden_layers": len(blocks) - dropped,
        "max_position_embeddings": inner["positional_embedding"][0],
    }
