"""Stable Diffusion 1.x and 2.x.

UNet, VAE and text encoder are diffusers' and transformers' classes; they are loaded from a single
LDM file (.safetensors, .ckpt), a diffusers folder, or a name on the model hub.
"""

from __future__ import annotations

import contextlib
import hashlib
import re
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from trainer import checkpoints
from trainer.checkpoints import MODELS, TensorFile
from trainer.errors import DivergedError, ModelFileError
from trainer.families._base import Family, Say, Target, Text
from trainer.tokens import ClipTokens, clip_tokenizer, join_chunks

if TYPE_CHECKING:
    from trainer.data.types import Batch
    from trainer.job import Job

__all__ = ["PLUGIN", "StableDiffusion"]

UNET = "model.diffusion_model."
VAE = "first_stage_model."
CLIP = "cond_stage_model.transformer."
OPEN_CLIP = "cond_stage_model.model."

SCALE = 0.18215  # sd-scripts, library/model_util.py: VAE factor of every SD 1.x and 2.x
REMEMBERED_BYTES = 256 << 20
"""Text states kept for captions that come again, while the text encoder does not change."""

TICK = {
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

# Order of sd-scripts' module tree inside a transformer block, where diffusers' differs.
KOHYA_ORDER = {"attn1": 0, "ff": 1, "attn2": 2}
ATTENTION_LAYERS = re.compile(r"(?:down_blocks|up_blocks|mid_block)\b.*\.?attentions\.\d+\.(.+)")
CONV_LAYERS = re.compile(
    r"(?:down_blocks|up_blocks|mid_block)\b.*\.?(?:resnets|downsamplers|upsamplers)\.\d+\..+"
)
TEXT_LAYERS = re.compile(r"encoder\.layers\.\d+\.(?:self_attn\.[kvq]_proj|self_attn\.out_proj|mlp\.fc[12])")


@dataclass(frozen=True)
class _Source:
    """Where the models come from: one file or a diffusers folder."""

    path: Path
    v2: bool
    file: TensorFile | None
    """None for a folder."""


class StableDiffusion(Family):
    """SD 1.x or 2.x, loaded."""

    # diffusers' own attributes are used
    unet: Any
    vae: Any

    name: ClassVar[str] = "sd"
    latent_channels: ClassVar[int] = 4
    latent_factor: ClassVar[int] = 8
    bucket_steps: ClassVar[int] = 64
    cache_suffix: ClassVar[str] = "_sd.npz"
    implementation = "diffusers"

    def __init__(
        self,
        *,
        unet: Any,
        vae: Any,
        text_encoder: nn.Module,
        tokens: ClipTokens,
        device: torch.device,
        dtype: torch.dtype,
        v2: bool,
        v_parameterization: bool,
        clip_skip: int,
        proj_saved_as_conv: bool,
        keep_text: bool,
    ) -> None:
        self.unet = unet
        self.vae = vae
        self.text_encoders = {"te1": text_encoder}
        self.tokens = tokens
        self.device = device
        self.dtype = dtype
        self.v_prediction = v_parameterization
        self.clip_skip = max(1, clip_skip)
        self.keep_text = keep_text
        """Keep the text states of each caption: only while nothing in the text encoder changes."""
        self.kohya_base_version = ("sd_v2" if v2 else "sd_v1") + ("_v" if v_parameterization else "")
        size = ("-768-v" if v_parameterization else "-512") if v2 else ""
        self.architecture = f"stable-diffusion-{'v2' if v2 else 'v1'}{size}/lora"
        self._proj_saved_as_conv = proj_saved_as_conv
        self._fingerprint = ""
        self._kept: OrderedDict[tuple[str, bool], Tensor] = OrderedDict()

    # --- loading --------------------------------------------------------------------------------

    @classmethod
    def load(cls, job: Job, device: torch.device, dtype: torch.dtype, say: Say) -> StableDiffusion:
        """Load everything; see `Family.load`."""
        config = job.config
        source = _find(job, say)
        vae_dtype = torch.float32 if job.engine.no_half_vae else dtype
        unet, linear = _load_unet(source, device, dtype)
        say(f"UNet: {sum(p.numel() for p in unet.parameters()):,} parameters")
        text_encoder = _load_text_encoder(source, device, dtype)
        vae = _load_vae(source, job, device, vae_dtype, say)
        length = int(text_encoder.config.max_position_embeddings)
        tokens = ClipTokens(
            _load_tokenizer(source, text_encoder), chunks=config.max_token_length // 75, length=length
        )
        return cls(
            unet=unet,
            vae=vae,
            text_encoder=text_encoder,
            tokens=tokens,
            device=device,
            dtype=dtype,
            v2=source.v2,
            v_parameterization=config.v_parameterization,
            clip_skip=config.clip_skip or 1,
            # sd-scripts turns the linear layers of a single SD 2.x file into convolutions.
            proj_saved_as_conv=linear and source.file is not None,
            keep_text=not job.trains_text_encoder,
        )

    # --- pictures -------------------------------------------------------------------------------

    def vae_fingerprint(self) -> str:
        """SHA-256 over the VAE's names, dtypes, shapes and bytes."""
        if not self._fingerprint:
            digest = hashlib.sha256()
            for name, value in self.vae.state_dict().items():
                digest.update(f"{name} {value.dtype} {tuple(value.shape)}\n".encode())
                digest.update(memoryview(value.detach().cpu().contiguous().view(torch.uint8).numpy()))
            self._fingerprint = digest.hexdigest()
        return self._fingerprint

    @torch.no_grad()
    def encode_images(self, pixels_BCHW: Tensor, generators: Sequence[torch.Generator]) -> Tensor:
        """Sample the VAE's posterior, unscaled, with noise of each picture's own generator."""
        place = next(self.vae.parameters())
        with _no_autocast(place.device):
            posterior = self.vae.encode(pixels_BCHW.to(place.device, place.dtype)).latent_dist
        mean, std = posterior.mean.float().cpu(), posterior.std.float().cpu()
        noise = torch.stack([torch.randn(mean.shape[1:], generator=generator) for generator in generators])
        latents: Tensor = mean + std * noise
        if not bool(torch.isfinite(latents).all()):
            raise DivergedError(
                f"the VAE gave NaN in {str(place.dtype).removeprefix('torch.')}: add --no_half_vae to "
                "additional_parameters, or use another VAE"
            )
        return latents

    def to_model_latents(self, latents_BCHW: Tensor) -> Tensor:
        """Times 0.18215."""
        return latents_BCHW * SCALE

    @torch.no_grad()
    def decode_latents(self, latents_BCHW: Tensor) -> Tensor:
        """Model latents to pictures in [-1, 1], float32."""
        place = next(self.vae.parameters())
        with _no_autocast(place.device):
            pixels: Tensor = self.vae.decode((latents_BCHW / SCALE).to(place.device, place.dtype)).sample
        return pixels.float()

    # --- text -----------------------------------------------------------------------------------

    def encode_prompts(self, prompts: Sequence[str], *, weighted: bool = False) -> Text:
        """Hidden states of captions, 75 n + 2 tokens; see `Family.encode_prompts`."""
        if self.keep_text:
            return Text(torch.stack(self._keep(prompts, weighted)))
        return Text(self._encode(prompts, weighted))

    def encode_sample_prompts(self, prompts: Sequence[str]) -> Text:
        """As Kohya's samples are conditioned: emphasis, up to 3 x 75 tokens whatever captions have.

        Each chunk keeps its start and end, and emphasis leaves the mean of the states as it was
        (sd-scripts, library/lpw_stable_diffusion.py).
        """
        ids_BNL, weights_BNL = self.tokens.samples(prompts)
        states_BNLD = self._states(ids_BNL)
        if bool((weights_BNL != 1).any()):
            weights = weights_BNL.to(states_BNLD.device, torch.float32)
            weighted = states_BNLD.float() * weights.unsqueeze(-1)
            scale = states_BNLD.float().mean((1, 2, 3)) / weighted.mean((1, 2, 3))
            plain = (weights == 1).all(dim=2).all(dim=1)
            scale = torch.where(plain, 1.0, scale)
            states_BNLD = (weighted * scale[:, None, None, None]).to(states_BNLD.dtype)
        return Text(states_BNLD.flatten(1, 2).to(self.device))

    def freeze_text(self) -> None:
        """Keep text states from now on, of the text encoder as it is now."""
        self._kept.clear()
        self.keep_text = True

    def _keep(self, prompts: Sequence[str], weighted: bool) -> list[Tensor]:
        distinct = dict.fromkeys(prompts)
        missing = [prompt for prompt in distinct if (prompt, weighted) not in self._kept]
        for prompt in distinct:
            if (prompt, weighted) in self._kept:
                self._kept.move_to_end((prompt, weighted))
        if missing:
            with torch.no_grad():
                states = self._encode(missing, weighted)
            for prompt, state in zip(missing, states.unbind(0), strict=True):
                self._kept[prompt, weighted] = state.clone()
            room = REMEMBERED_BYTES // (states[0].numel() * states.element_size())
            while len(self._kept) > max(len(distinct), room):
                self._kept.popitem(last=False)
        return [self._kept[prompt, weighted] for prompt in prompts]

    def _encode(self, prompts: Sequence[str], weighted: bool) -> Tensor:
        if not weighted:
            return join_chunks(self._states(self.tokens.captions(prompts))).to(self.device)
        ids_BNL, weights_BT = self.tokens.weighted_captions(prompts)
        states = join_chunks(self._states(ids_BNL))
        return (states * weights_BT.to(states).unsqueeze(-1)).to(self.device)

    def _states(self, ids_BNL: Tensor) -> Tensor:
        """Hidden states BNLD after clip_skip and the final norm.

        The layers are called one by one: those that clip skip leaves out are never computed.
        """
        encoder: Any = self.text_encoders["te1"]
        place = encoder.embeddings.token_embedding.weight.device
        ids = ids_BNL.flatten(0, 1).to(place, non_blocking=True)
        states: Tensor = encoder.embeddings(input_ids=ids)
        layers = encoder.encoder.layers
        for layer in layers[: len(layers) - self.clip_skip + 1]:
            states = layer(states, None, is_causal=True)
        states = encoder.final_layer_norm(states)
        return states.reshape(*ids_BNL.shape, -1)

    # --- denoising ------------------------------------------------------------------------------

    def predict(self, noisy_BCHW: Tensor, timesteps_B: Tensor, text: Text, batch: Batch | None) -> Tensor:
        """The UNet's raw prediction."""
        prediction: Tensor = self.unet(
            noisy_BCHW.to(self.dtype),
            timesteps_B,
            encoder_hidden_states=text.states_BTD.to(self.dtype),
            return_dict=False,
        )[0]
        return prediction

    # --- layers ---------------------------------------------------------------------------------

    def targets(self) -> list[Target]:
        """Text encoder, then UNet, in the order of sd-scripts' modules (engine facts 5.2)."""
        found = [
            Target(name=f"lora_te_text_model_{name.replace('.', '_')}", module=module, part="te1")
            for name, module in self.text_encoders["te1"].named_modules()
            if isinstance(module, nn.Linear) and TEXT_LAYERS.fullmatch(name)
        ]
        for name, module in _kohya_order(self.unet):
            if not isinstance(module, nn.Linear | nn.Conv2d):
                continue
            attention = ATTENTION_LAYERS.fullmatch(name)
            if not attention and not CONV_LAYERS.fullmatch(name):
                continue
            found.append(
                Target(
                    name=f"lora_unet_{name.replace('.', '_')}",
                    module=module,
                    part="unet",
                    block=_block(name),
                    conv_group=not attention,
                    saved_as_conv=self._proj_saved_as_conv
                    and attention is not None
                    and attention[1] in ("proj_in", "proj_out"),
                )
            )
        return found

    # --- memory ---------------------------------------------------------------------------------

    def move(self, parts: Iterable[Literal["vae", "text_encoders", "unet"]], device: torch.device) -> None:
        """Move whole models."""
        for part in parts:
            if part == "vae":
                self.vae.to(device)
            elif part == "unet":
                self.unet.to(device)
            else:
                for encoder in self.text_encoders.values():
                    encoder.to(device)

    def enable_gradient_checkpointing(self) -> None:
        """Recompute activations; both models go to train mode, which has no dropout to switch on."""
        self.unet.enable_gradient_checkpointing()
        self.unet.train()
        for encoder in self.text_encoders.values():
            checkpointed: Any = encoder
            checkpointed.activation_checkpointing_enable({"use_reentrant": False})
            checkpointed.train()


PLUGIN = StableDiffusion


@contextlib.contextmanager
def _no_autocast(device: torch.device) -> Iterator[None]:
    """The VAE works in its own dtype whatever the training loop casts."""
    with torch.autocast(device.type, enabled=False):
        yield


def _kohya_order(unet: nn.Module) -> list[tuple[str, nn.Module]]:
    def key(item: tuple[int, tuple[str, nn.Module]]) -> tuple[int, int, int]:
        place, (name, _) = item
        block, _, rest = name.partition(".transformer_blocks.")
        parts = rest.split(".")
        if len(parts) < 3:
            return place, 0, 0
        head = f"{block}.transformer_blocks.{parts[0]}"
        return first[head], KOHYA_ORDER.get(parts[1], 3), place

    named = list(unet.named_modules())
    first = {name: place for place, (name, _) in enumerate(named)}
    return [item for _, item in sorted(enumerate(named), key=key)]


def _block(name: str) -> int | None:
    """Index into Kohya's 25 block lists: 12 down, 1 middle, 12 up (engine facts 5.4)."""
    if name.startswith("mid_block."):
        return 12
    side, i, kind, j = name.split(".")[:4]
    place = 3 * int(i) + (2 if kind in ("downsamplers", "upsamplers") else int(j))
    return 1 + place if side == "down_blocks" else 13 + place


# --- finding and reading model files --------------------------------------------------------------


def _find(job: Job, say: Say) -> _Source:
    text = job.config.pretrained_model_name_or_path.strip()
    path = job.path(text)
    if path.is_dir():
        return _folder(path, job)
    if not path.is_file():
        path = _from_hub(text, path, say, field="pretrained_model_name_or_path (Model)", files=MODEL_FILES)
        if path.is_dir():
            return _folder(path, job)
    file = checkpoints.open_tensors(path)
    kind = checkpoints.kind_of(file.shapes)
    if kind in TICK:
        raise ModelFileError(f"{path}: {TICK[kind]}")
    _check_v2(path, kind == "sd2", job)
    if not job.config.v_parameterization and "v_pred" in file.shapes:
        say(f"{path.name} is marked as a v-prediction model, but v_parameterization is not ticked")
    _check_channels(path, file.shapes.get(f"{UNET}input_blocks.0.0.weight", (0, 4))[1])
    return _Source(path, kind == "sd2", file)


def _has(file: TensorFile, prefix: str) -> bool:
    return any(key.startswith(prefix) for key in file.shapes)


def _check_v2(path: Path, v2: bool, job: Job) -> None:
    if v2 and not job.config.v2:
        raise ModelFileError(
            f"{path}: this is an SD 2.x model: tick v2, and v_parameterization for a 768 one (Model)"
        )
    if not v2 and job.config.v2:
        raise ModelFileError(f"{path}: this is an SD 1.x model: untick v2 (Model)")


def _check_channels(path: Path, channels: int) -> None:
    if channels != 4:
        raise ModelFileError(
            f"{path} is {CHANNELS.get(channels, 'no text-to-image model')}: its UNet takes {channels} "
            "channels; choose the text-to-image model (4 channels) that it was made from"
        )


def _folder(path: Path, job: Job) -> _Source:
    for name, kind in (("text_encoder_2", "sdxl"), ("transformer", "flux")):
        if (path / name).is_dir():
            raise ModelFileError(f"{path}: {TICK[kind]}")
    if not (path / "unet").is_dir():
        raise ModelFileError(
            f"{path} is no diffusers folder (it has no folder unet): choose a checkpoint file or a folder "
            "with unet, vae, text_encoder and tokenizer"
        )
    config = checkpoints.read_json(path / "unet" / "config.json")
    _check_channels(path, int(config.get("in_channels", 4)))
    width = config.get("cross_attention_dim")
    # Other widths are of small test and demo models: there the tick decides.
    v2 = width == 1024 or (width != 768 and job.config.v2)
    _check_v2(path, v2, job)
    return _Source(path, v2, None)


def _load_unet(source: _Source, device: torch.device, dtype: torch.dtype) -> tuple[nn.Module, bool]:
    """The UNet, and whether its proj_in and proj_out are linear layers."""
    from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel

    if source.file is None:
        folder = source.path / "unet"
        config = checkpoints.read_json(folder / "config.json")
        file = checkpoints.open_weights(folder)
        names: checkpoints.Renamed = {key: (key,) for key in file.shapes}
    else:
        file = source.file
        config = _explained(file.path, checkpoints.ldm_unet_config, file.shapes, UNET, _facts(source)["unet"])
        names = checkpoints.ldm_unet_names(file.shapes, UNET)
    with torch.device("meta"):
        unet = UNet2DConditionModel.from_config(config)
    checkpoints.fill(unet, file, names, device=device, dtype=dtype, what="UNet")
    unet.eval()
    return unet, bool(config.get("use_linear_projection", False))


def _load_text_encoder(source: _Source, device: torch.device, dtype: torch.dtype) -> Any:
    from transformers import CLIPTextConfig, CLIPTextModel

    if source.file is None:
        folder = source.path / "text_encoder"
        values = checkpoints.read_json(folder / "config.json")
        file = checkpoints.open_weights(folder)
        names = checkpoints.clip_names(file.shapes)
    else:
        file, base = source.file, _facts(source)["text_encoder"]
        if source.v2:
            # SD 2.x is conditioned on the last layer but one, so the last is not built.
            values = _explained(
                file.path, checkpoints.open_clip_config, file.shapes, OPEN_CLIP, base, dropped=1
            )
            names = checkpoints.open_clip_names(file.shapes, OPEN_CLIP, values["num_hidden_layers"])
        else:
            names = checkpoints.clip_names(file.shapes, CLIP)
            values = _explained(file.path, checkpoints.ldm_clip_config, file.shapes, names, base)
    with torch.device("meta"):
        encoder = CLIPTextModel._from_config(CLIPTextConfig.from_dict(values), attn_implementation="sdpa")
    checkpoints.fill(encoder, file, names, device=device, dtype=dtype, what="text encoder")
    # Not a weight, so no file has it.
    positions = torch.arange(encoder.config.max_position_embeddings, device=device).expand((1, -1))
    encoder.embeddings.position_ids = positions
    encoder.eval()
    return encoder


def _load_vae(source: _Source, job: Job, device: torch.device, dtype: torch.dtype, say: Say) -> Any:
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL

    text = job.config.vae.strip()
    base = _facts(source)["vae"]
    if text:
        path = job.path(text)
        if not path.exists():
            path = _from_hub(text, path, say, field="vae (Advanced)", files=VAE_FILES)
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
        config = _explained(file.path, checkpoints.ldm_vae_config, file.shapes, VAE, base)
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
            else _explained(path, checkpoints.diffusers_vae_config, file.shapes, base)
        )
        return config, file, names
    prefix = VAE if _has(file, VAE) else ""
    config = _explained(path, checkpoints.ldm_vae_config, file.shapes, prefix, base)
    return config, file, checkpoints.ldm_vae_names(file.shapes, prefix)


def _load_tokenizer(source: _Source, text_encoder: Any) -> Any:
    folder = source.path / "tokenizer"
    if source.file is None and folder.is_dir():
        from transformers import CLIPTokenizer

        try:
            return CLIPTokenizer.from_pretrained(str(folder), local_files_only=True)
        except (OSError, ValueError) as error:
            raise ModelFileError(f"the tokenizer in {folder} cannot be read: {error}") from error
    tokenizer = clip_tokenizer(
        MODELS / "clip" / "bpe_simple_vocab_16e6.txt.gz",
        pad_id=_facts(source)["text_encoder"]["pad_token_id"],
    )
    if len(tokenizer) != text_encoder.config.vocab_size:
        raise ModelFileError(
            f"{source.path}: its text encoder knows {text_encoder.config.vocab_size} tokens where CLIP has "
            f"{len(tokenizer)}: put its own tokenizer into {folder}"
        )
    return tokenizer


def _facts(source: _Source) -> dict[str, Any]:
    return checkpoints.read_json(MODELS / ("sd2.json" if source.v2 else "sd1.json"))


def _explained(
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


def _from_hub(text: str, path: Path, say: Say, *, field: str, files: Sequence[str]) -> Path:
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
