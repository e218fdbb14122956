"""Stable Diffusion 1.x and 2.x.

UNet, VAE and text encoder are diffusers' and transformers' classes; they are loaded from a single
LDM file (.safetensors, .ckpt), a diffusers folder, or a name on the model hub.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from trainer import checkpoints
from trainer.checkpoints import MODELS
from trainer.errors import ModelFileError
from trainer.families import _sources
from trainer.families._base import Say, Target, Text
from trainer.families._latent_diffusion import LatentDiffusion, clip_states, in_kohya_order
from trainer.families._sources import TICK, UNET, Source
from trainer.tokens import ClipTokens, join_chunks

if TYPE_CHECKING:
    from trainer.data.types import Batch
    from trainer.job import Job

__all__ = ["PLUGIN", "StableDiffusion"]

CLIP = "cond_stage_model.transformer."
OPEN_CLIP = "cond_stage_model.model."


@dataclass(frozen=True)
class _Source(Source):
    v2: bool


class StableDiffusion(LatentDiffusion):
    """SD 1.x or 2.x, loaded."""

    name: ClassVar[str] = "sd"
    bucket_steps: ClassVar[int] = 64
    cache_suffix: ClassVar[str] = "_sd.npz"
    vae_scale: ClassVar[float] = 0.18215  # sd-scripts, library/model_util.py: every SD 1.x and 2.x
    full_vae: ClassVar[str] = "add --no_half_vae to additional_parameters"
    implementation = "diffusers"

    def __init__(
        self,
        *,
        unet: Callable[[], nn.Module],
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
        super().__init__(
            unet=unet,
            vae=vae,
            text_encoders={"te1": text_encoder},
            device=device,
            dtype=dtype,
            keep_text=keep_text,
        )
        self.tokens = tokens
        self.v_prediction = v_parameterization
        self.clip_skip = max(1, clip_skip)
        self.kohya_base_version = ("sd_v2" if v2 else "sd_v1") + ("_v" if v_parameterization else "")
        size = ("-768-v" if v_parameterization else "-512") if v2 else ""
        self.architecture = f"stable-diffusion-{'v2' if v2 else 'v1'}{size}/lora"
        self._proj_saved_as_conv = proj_saved_as_conv

    # --- loading --------------------------------------------------------------------------------

    @classmethod
    def load(cls, job: Job, device: torch.device, dtype: torch.dtype, say: Say) -> StableDiffusion:
        """Load all but the UNet, whose file is looked over; see `Family.load`."""
        config = job.config
        source = _find(job, say)
        vae_dtype = torch.float32 if job.engine.no_half_vae else dtype
        unet = _sources.UnetFile(source, device, dtype, job, say)
        text_encoder = _load_text_encoder(source, device, dtype, job)
        vae = _sources.load_vae(source, job, device, vae_dtype, say)
        length = int(text_encoder.config.max_position_embeddings)
        tokenizer = _sources.load_tokenizer(
            source,
            "tokenizer",
            text_encoder.config.vocab_size,
            pad_id=source.facts["text_encoder"]["pad_token_id"],
        )
        tokens = ClipTokens(tokenizer, chunks=config.max_token_length // 75, length=length)
        return cls(
            unet=unet.read,
            vae=vae,
            text_encoder=text_encoder,
            tokens=tokens,
            device=device,
            dtype=dtype,
            v2=source.v2,
            v_parameterization=config.v_parameterization,
            clip_skip=config.clip_skip or 1,
            # sd-scripts turns the linear layers of a single SD 2.x file into convolutions.
            proj_saved_as_conv=unet.linear and source.file is not None,
            keep_text=not job.trains_text_encoder,
        )

    # --- text -----------------------------------------------------------------------------------

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

    def encode_now(self, prompts: Sequence[str], weighted: bool) -> Text:
        """See `LatentDiffusion.encode_now`."""
        if not weighted:
            return Text(join_chunks(self._states(self.tokens.captions(prompts))).to(self.device))
        ids_BNL, weights_BT = self.tokens.weighted_captions(prompts)
        states = join_chunks(self._states(ids_BNL))
        return Text((states * weights_BT.to(states).unsqueeze(-1)).to(self.device))

    def _states(self, ids_BNL: Tensor) -> Tensor:
        """Hidden states BNLD after clip_skip and the final norm."""
        encoder: Any = self.text_encoders["te1"]
        layers = len(encoder.encoder.layers) - self.clip_skip + 1
        states: Tensor = encoder.final_layer_norm(clip_states(encoder, ids_BNL.flatten(0, 1), layers))
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
        places = in_kohya_order(self.unet)
        layers = sorted(self.unet_layers(), key=lambda layer: places[layer[0]])
        return [
            *self.text_targets("te1", "lora_te"),
            *(
                Target(
                    name=f"lora_unet_{name.replace('.', '_')}",
                    module=module,
                    part="unet",
                    block=_block(name),
                    conv_group=attention is None,
                    saved_as_conv=self._proj_saved_as_conv and attention in ("proj_in", "proj_out"),
                )
                for name, module, attention in layers
            ),
        ]


PLUGIN = StableDiffusion


def _block(name: str) -> int | None:
    """Index into Kohya's 25 block lists: 12 down, 1 middle, 12 up (engine facts 5.4)."""
    if name.startswith("mid_block."):
        return 12
    side, i, kind, j = name.split(".")[:4]
    place = 3 * int(i) + (2 if kind in ("downsamplers", "upsamplers") else int(j))
    return 1 + place if side == "down_blocks" else 13 + place


# --- finding and reading model files --------------------------------------------------------------


def _find(job: Job, say: Say) -> _Source:
    path = _sources.locate(job, say, files=_sources.MODEL_FILES)
    if path.is_dir():
        return _folder(path, job)
    file = checkpoints.open_tensors(path)
    kind = checkpoints.kind_of(file.shapes)
    if kind not in ("sd1", "sd2"):
        raise ModelFileError(f"{path}: {TICK[kind]}")
    _check_v2(path, kind == "sd2", job)
    if not job.config.v_parameterization and "v_pred" in file.shapes:
        say(f"{path.name} is marked as a v-prediction model, but v_parameterization is not ticked")
    _sources.check_channels(path, file.shapes.get(f"{UNET}input_blocks.0.0.weight", (0, 4))[1])
    return _Source(path, file, _facts(kind == "sd2"), kind == "sd2")


def _check_v2(path: Path, v2: bool, job: Job) -> None:
    if v2 and not job.config.v2:
        raise ModelFileError(
            f"{path}: this is an SD 2.x model: tick v2, and v_parameterization for a 768 one (Model)"
        )
    if not v2 and job.config.v2:
        raise ModelFileError(f"{path}: this is an SD 1.x model: untick v2 (Model)")


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
    _sources.check_channels(path, int(config.get("in_channels", 4)))
    width = config.get("cross_attention_dim")
    # Other widths are of small test and demo models: there the tick decides.
    v2 = width == 1024 or (width != 768 and job.config.v2)
    _check_v2(path, v2, job)
    return _Source(path, None, _facts(v2), v2)


def _load_text_encoder(source: _Source, device: torch.device, dtype: torch.dtype, job: Job) -> Any:
    from trainer.libraries import CLIPTextModel

    if source.file is None:
        folder = source.path / "text_encoder"
        values = checkpoints.read_json(folder / "config.json")
        file = checkpoints.open_weights(folder)
        names = checkpoints.clip_names(file.shapes)
    else:
        file, base = source.file, source.facts["text_encoder"]
        if source.v2:
            # SD 2.x is conditioned on the last layer but one, so the last is not built.
            values = _sources.explained(
                file.path, checkpoints.open_clip_config, file.shapes, OPEN_CLIP, base, dropped=1
            )
            names = checkpoints.open_clip_names(file.shapes, OPEN_CLIP, values["num_hidden_layers"])
        else:
            names = checkpoints.clip_names(file.shapes, CLIP)
            values = _sources.explained(file.path, checkpoints.ldm_clip_config, file.shapes, names, base)
    return _sources.load_clip(CLIPTextModel, values, file, names, device=device, dtype=dtype, job=job)


def _facts(v2: bool) -> dict[str, Any]:
    return checkpoints.read_json(MODELS / ("sd2.json" if v2 else "sd1.json"))
