"""Finding and reading model files: what all Stable Diffusion families share.

A model comes as a single file (.safetensors, .ckpt), a diffusers folder, or a name on the model hub.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from trainer import checkpoints, memory
from trainer.checkpoints import MODELS, TensorFile
from trainer.errors import ModelFileError
from trainer.families._base import Say
from trainer.memory.quantise import parameter_count
from trainer.tokens import clip_tokenizer

if TYPE_CHECKING:
    from trainer.job import Job

__all__ = [
    "MODEL_FILES",
    "TICK",
    "UNET",
    "VAE",
    "VAE_FILES",
    "Source",
    "UnetFile",
    "check_channels",
    "explained",
    "from_hub",
    "has",
    "load_clip",
    "load_tokenizer",
    "load_vae",
    "locate",
]

UNET = "model.diffusion_model."
VAE = "first_stage_model."

TICK = {
    "sd1": "this is an SD 1.x model: untick SDXL (Model)",
    "sd2": "this is an SD 2.x model: untick SDXL and tick v2 (Model)",
    "sdxl": "this is an SDXL checkpoint: tick SDXL (Model)",
    "sdxl_refiner": "this is the SDXL refiner, which cannot be trained here: choose an SDXL base model",
    "flux": "this is a FLUX model: tick Flux.1 (Model)",
    "sd3": "this is an SD3 model, which LoRA Kiln does not train",
    "unet": "this file holds a UNet but no text encoder: choose the full checkpoint",
    "vae": "this is a VAE only: choose a full checkpoint here and give the VAE in the field vae",
    "lora": "this is a LoRA, not a base model: choose a checkpoint here; a LoRA to go on with belongs in "
    "LoRA network weights",
    "unknown": "its keys are of no model family that LoRA Kiln knows: expected a Stable Diffusion checkpoint",
}
CHANNELS = {
    5: "a depth-to-image model",
    7: "an upscaler",
    8: "an image-editing (instruct-pix2pix) model",
    9: "an inpainting model",
}


@dataclass(frozen=True)
class Source:
    """Where the models come from: one file or a diffusers folder."""

    path: Path
    file: TensorFile | None
    """None for a folder."""
    facts: Mapping[str, Any]
    """What the shapes in a single file cannot tell, from assets/models."""


def locate(job: Job, say: Say, *, files: Sequence[str]) -> Path:
    """The base model's file or diffusers folder, fetched from the hub where the name is one of there.

    Raises:
        ModelFileError: It is nowhere.
    """
    text = job.config.pretrained_model_name_or_path.strip()
    path = job.path(text)
    if path.exists():
        return path
    return from_hub(text, path, say, field="pretrained_model_name_or_path (Model)", files=files)


def has(file: TensorFile, prefix: str) -> bool:
    return any(key.startswith(prefix) for key in file.shapes)


def check_channels(path: Path, channels: int) -> None:
    if channels != 4:
        raise ModelFileError(
            f"{path} is {CHANNELS.get(channels, 'no text-to-image model')}: its UNet takes {channels} "
            "channels; choose the text-to-image model (4 channels) that it was made from"
        )


class UnetFile:
    """A UNet whose file has been looked over but not read.

    Args:
        source: Where the models come from.
        device: Where it shall be.
        dtype: Of its weights.
        job: Says how they are stored.
        say: Told the number of parameters.

    Raises:
        ModelFileError: The file lacks a tensor of it, or has one of another shape.
    """

    def __init__(self, source: Source, device: torch.device, dtype: torch.dtype, job: Job, say: Say) -> None:
        from trainer.libraries import UNet2DConditionModel

        if source.file is None:
            folder = source.path / "unet"
            config = checkpoints.read_json(folder / "config.json")
            self._file = checkpoints.open_weights(folder)
            self._names: checkpoints.Renamed = {key: (key,) for key in self._file.shapes}
        else:
            self._file = source.file
            shapes = self._file.shapes
            config = explained(
                self._file.path, checkpoints.ldm_unet_config, shapes, UNET, source.facts["unet"]
            )
            self._names = checkpoints.ldm_unet_names(shapes, UNET)
        self.linear = bool(config.get("use_linear_projection", False))
        """Whether proj_in and proj_out are linear layers."""
        with torch.device("meta"):
            self._model = UNet2DConditionModel.from_config(config)
        self._job, self._device, self._dtype = job, device, dtype
        checkpoints.check_fit(self._model, self._file, self._names, what="UNet")
        say(f"UNet: {parameter_count(self._model):,} parameters")

    def read(self) -> nn.Module:
        """The UNet on its device, frozen, in eval mode. To be called once."""
        model: nn.Module = self._model
        place = memory.placing(self._job, "unet", model, self._device, self._dtype, scaled=self._file.scaled)
        checkpoints.fill(
            model,
            self._file,
            self._names,
            device=self._device,
            dtype=self._dtype,
            what="UNet",
            place=place,
        )
        return model.eval()


def load_clip(
    kind: Any,
    values: Mapping[str, Any],
    file: TensorFile,
    names: checkpoints.Renamed,
    *,
    device: torch.device,
    dtype: torch.dtype,
    job: Job,
) -> Any:
    """A CLIP text encoder.

    Args:
        kind: CLIPTextModel or CLIPTextModelWithProjection.
        values: Of its CLIPTextConfig.
        file: Where the weights are.
        names: Which tensor goes where.
        device: Where it shall be.
        dtype: Of its weights.
        job: Says whether they are stored small.
    """
    from trainer.libraries import CLIPTextConfig

    with torch.device("meta"):
        # Without dtype=None the one that the config names would become PyTorch's default, in all threads.
        encoder = kind._from_config(
            CLIPTextConfig.from_dict(dict(values)), attn_implementation="sdpa", dtype=None
        )
    place = memory.placing(job, "text", encoder, device, dtype, scaled=file.scaled)
    checkpoints.fill(encoder, file, names, device=device, dtype=dtype, what="text encoder", place=place)
    # Not a weight, so no file has it.
    embeddings = getattr(encoder, "text_model", encoder).embeddings
    positions = torch.arange(encoder.config.max_position_embeddings, device=device)
    embeddings.position_ids = positions.expand((1, -1))
    encoder.eval()
    return encoder


def load_vae(source: Source, job: Job, device: torch.device, dtype: torch.dtype, say: Say) -> Any:
    """The VAE: the file in the field vae, or the model's own."""
    from trainer.libraries import AutoencoderKL

    text = job.config.vae.strip()
    base = source.facts["vae"]
    if text:
        path = job.path(text)
        if not path.exists():
            path = from_hub(text, path, say, field="vae (Advanced)", files=VAE_FILES)
        say(f"VAE: {path}")
        if path.is_dir():
            folder = path if (path / "config.json").is_file() else path / "vae"
            config, file, names = _diffusers_vae(folder)
        else:
            config, file, names = _single_vae(path, base)
    elif source.file is None:
        config, file, names = _diffusers_vae(source.path / "vae")
    else:
        file = source.file
        config = explained(file.path, checkpoints.ldm_vae_config, file.shapes, VAE, base)
        names = checkpoints.ldm_vae_names(file.shapes, VAE)
    if config.get("latent_channels", 4) != 4:
        raise ModelFileError(
            f"{file.path} is a VAE of {config['latent_channels']} latent channels, not of the SD families (4)"
        )
    with torch.device("meta"):
        vae = AutoencoderKL.from_config(config)
    checkpoints.fill(vae, file, names, device=device, dtype=dtype, what="VAE")
    vae.eval()
    return vae


def _diffusers_vae(folder: Path) -> tuple[dict[str, Any], TensorFile, checkpoints.Renamed]:
    file = checkpoints.open_weights(folder)
    return checkpoints.read_json(folder / "config.json"), file, checkpoints.diffusers_vae_names(file.shapes)


def _single_vae(
    path: Path, base: Mapping[str, Any]
) -> tuple[dict[str, Any], TensorFile, checkpoints.Renamed]:
    """A VAE from a full checkpoint, a bare LDM VAE, or diffusers weights."""
    file = checkpoints.open_tensors(path)
    if any(".down_blocks." in key for key in file.shapes):
        names = checkpoints.diffusers_vae_names(file.shapes)
        beside = path.parent / "config.json"
        config = (
            checkpoints.read_json(beside)
            if beside.is_file()
            else explained(path, checkpoints.diffusers_vae_config, file.shapes, base)
        )
        return config, file, names
    prefix = VAE if has(file, VAE) else ""
    config = explained(path, checkpoints.ldm_vae_config, file.shapes, prefix, base)
    return config, file, checkpoints.ldm_vae_names(file.shapes, prefix)


def load_tokenizer(source: Source, name: str, vocabulary: int, pad_id: int) -> Any:
    """A CLIP tokenizer: the folder's own, else CLIP's byte pairs.

    Args:
        source: Where the models come from.
        name: Folder in a diffusers folder: "tokenizer", "tokenizer_2".
        vocabulary: Tokens that the text encoder knows.
        pad_id: What CLIP's byte pairs are padded with.

    Raises:
        ModelFileError: It cannot be read, or CLIP's does not fit the text encoder.
    """
    folder = source.path / name
    if source.file is None and folder.is_dir():
        from trainer.libraries import CLIPTokenizer

        try:
            return CLIPTokenizer.from_pretrained(str(folder), local_files_only=True)
        except (OSError, ValueError) as error:
            raise ModelFileError(f"the tokenizer in {folder} cannot be read: {error}") from error
    tokenizer = clip_tokenizer(MODELS / "clip" / "bpe_simple_vocab_16e6.txt.gz", pad_id=pad_id)
    if len(tokenizer) != vocabulary:
        raise ModelFileError(
            f"{source.path}: its text encoder knows {vocabulary} tokens where CLIP has "
            f"{len(tokenizer)}: put its own tokenizer into {folder}"
        )
    return tokenizer


def explained(
    path: Path, function: Callable[..., dict[str, Any]], *args: Any, **options: Any
) -> dict[str, Any]:
    """Call ``function`` and say which file was at fault, whatever tensor it misses."""
    try:
        return function(*args, **options)
    except ModelFileError as error:
        raise ModelFileError(f"{path}: {error}") from error
    except (KeyError, IndexError, ValueError) as error:
        raise ModelFileError(
            f"{path} is incomplete or of an unknown architecture: no tensor {error}"
        ) from error


# --- the model hub --------------------------------------------------------------------------------

HUB_NAME = re.compile(r"(?P<repo>[\w.-]+/[\w.-]+)(?:/(?:blob|resolve)/(?P<branch>[^/]+)/(?P<file>.+))?")
MOVED = {"runwayml/stable-diffusion-v1-5": "stable-diffusion-v1-5/stable-diffusion-v1-5"}
"""Repositories that are gone, and the copy that took their place."""

MODEL_FILES = [
    "model_index.json",
    "unet/config.json",
    "unet/diffusion_pytorch_model.safetensors",
    "vae/config.json",
    "vae/diffusion_pytorch_model.safetensors",
    "text_encoder/config.json",
    "text_encoder/model.safetensors",
    "tokenizer/*",
]
VAE_FILES = [
    "config.json",
    "diffusion_pytorch_model.safetensors",
    "vae/config.json",
    "vae/diffusion_pytorch_model.safetensors",
]
OTHER_FILES = ["*.fp16.*", "*non_ema*", "*openvino*", "*onnx*"]
"""Weights that a folder may hold a second time."""


def from_hub(text: str, path: Path, say: Say, *, field: str, files: Sequence[str]) -> Path:
    """The local copy of a model that is named as on the hub, fetched if it is not there yet.

    Args:
        text: As written in ``field``: owner/name, or owner/name/blob/main/file.
        path: ``text`` read as a path, for messages.
        say: Told before anything is fetched.
        field: Where ``text`` comes from.
        files: What a folder needs.
    """
    match = HUB_NAME.fullmatch(text)
    is_file = Path(text).suffix in (".safetensors", ".ckpt", ".pt", ".bin")
    if not match or (is_file and not match["file"]):
        raise ModelFileError(
            f"{path} does not exist: give a checkpoint file or a diffusers folder in {field}"
        )
    from huggingface_hub import constants, hf_hub_download, snapshot_download

    name, branch = match["file"], match["branch"]
    if name and not is_file:
        name += ".safetensors"
    reason: Exception | None = None
    offline = bool(constants.HF_HUB_OFFLINE)
    for local in (True,) if offline else (True, False):
        for repo in dict.fromkeys((match["repo"], MOVED.get(match["repo"], match["repo"]))):
            if not local:
                say(f"{repo} is not on this machine: fetching it from the model hub")
            try:
                if name:
                    return Path(hf_hub_download(repo, name, revision=branch, local_files_only=local))
                for wanted in (files, [re.sub(r"[^/]+\.safetensors$", "*.bin", file) for file in files]):
                    folder = Path(
                        snapshot_download(
                            repo,
                            allow_patterns=list(wanted),
                            ignore_patterns=OTHER_FILES,
                            local_files_only=local,
                        )
                    )
                    # Older repositories have pickles only.
                    if any(folder.rglob("diffusion_pytorch_model*")):
                        return folder
            except Exception as error:  # noqa: BLE001  (the hub client raises its own, httpx's and OS errors)
                reason = error
    raise ModelFileError(
        f"{text} is neither here as {path} nor in the model cache, "
        + ("and the hub is switched off (HF_HUB_OFFLINE)" if offline else "and the hub did not give it")
        + f": download the checkpoint file (.safetensors) and give its path in {field}"
    ) from reason
