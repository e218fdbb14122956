"""Stable Diffusion XL, and what is made from it: Pony, Illustrious, NoobAI.

Two text encoders (CLIP-L and OpenCLIP bigG), whose last layers but one are joined, and a UNet that
is told the size and crop of each picture (Podell et al. 2023, arXiv:2307.01952). Facts: sd-scripts,
sdxl_train_network.py, library/strategy_sdxl.py, library/sdxl_model_util.py.

Axes: B batch, C channels, H/W latent height and width, T text tokens, D text width, N chunks of a
caption, L tokens of a chunk.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from trainer import checkpoints, memory
from trainer.checkpoints import MODELS, TensorFile
from trainer.data import text_cache
from trainer.data.buckets import crop_ltrb
from trainer.errors import ConfigError, ModelFileError
from trainer.families import _sources
from trainer.families._base import Part, Say, Target, Text
from trainer.families._latent_diffusion import LatentDiffusion, clip_states, in_kohya_order
from trainer.families._sources import TICK, UNET, Source
from trainer.families._vae import fingerprint
from trainer.tokens import ClipTokens, join_chunks

if TYPE_CHECKING:
    from trainer.data.types import Batch, Dataset
    from trainer.events import Event
    from trainer.job import Job

__all__ = ["PLUGIN", "StableDiffusionXL", "kohya_name", "texts_wait", "time_ids"]

CLIP_L = "conditioner.embedders.0.transformer."
OPEN_CLIP = "conditioner.embedders.1.model."
PROJECTION = f"{OPEN_CLIP}text_projection"

MODEL_FILES = [
    *_sources.MODEL_FILES,
    "text_encoder_2/config.json",
    "text_encoder_2/model.safetensors",
    "tokenizer_2/*",
]

NAMES = ("hidden_state1", "hidden_state2", "pool2")
"""Arrays of a text cache file: states of the two encoders, pooled text (sd-scripts: strategy_sdxl.py)."""


class StableDiffusionXL(LatentDiffusion):
    """SDXL, loaded."""

    name: ClassVar[str] = "sdxl"
    bucket_steps: ClassVar[int] = 32
    cache_suffix: ClassVar[str] = "_sdxl.npz"
    kohya_blocks: ClassVar[tuple[int, int, int, int, int]] = (1, 9, 3, 9, 1)
    vae_scale: ClassVar[float] = 0.13025  # sd-scripts, sdxl_model_util.py: whatever the VAE file says
    full_vae: ClassVar[str] = "tick No half VAE (SDXL)"
    kohya_base_version = "sdxl_base_v1-0"
    architecture = "stable-diffusion-xl-v1-base/lora"
    implementation = "https://github.com/Stability-AI/generative-models"

    def __init__(
        self,
        *,
        unet: Callable[[], nn.Module],
        vae: Any,
        text_encoders: dict[Part, nn.Module],
        tokens: dict[Part, ClipTokens],
        device: torch.device,
        dtype: torch.dtype,
        keep_text: bool,
        texts_wait: bool = False,
    ) -> None:
        super().__init__(
            unet=unet,
            vae=vae,
            text_encoders=text_encoders,
            device=device,
            dtype=dtype,
            keep_text=keep_text,
        )
        self.tokens = tokens
        self.texts_wait = texts_wait
        """The text encoders are on the CPU until the latents are cached."""
        self._cached: text_cache.TextCache | None = None

    # --- loading --------------------------------------------------------------------------------

    @classmethod
    def check(cls, job: Job, dataset: Dataset) -> None:
        """What sd-scripts refuses for SDXL; see `Family.check`."""
        if not job.caches_sdxl_text:
            return
        wrong = [
            f"{name} changes captions from step to step, so it needs Cache text encoder outputs (SDXL) "
            f"switched off (folder {subset.folder.name})"
            for subset in dataset.subsets
            for name in (
                "shuffle_caption",
                "caption_dropout_rate",
                "caption_tag_dropout_rate",
                "token_warmup_step",
            )
            if getattr(subset, name)
        ]
        if wrong:
            raise ConfigError(*wrong)

    @classmethod
    def load(cls, job: Job, device: torch.device, dtype: torch.dtype, say: Say) -> StableDiffusionXL:
        """Load all but the UNet, whose file is looked over; see `Family.load`."""
        config = job.config
        source = _find(job, say)
        if config.clip_skip > 1:
            say(
                f"clip_skip {config.clip_skip} has no effect: SDXL is always conditioned on the last layer but one"
            )
        full_vae = config.sdxl_no_half_vae or job.engine.no_half_vae
        wait = texts_wait(job, device)
        unet = _sources.UnetFile(source, device, dtype, job, say)
        text_encoders = _load_text_encoders(source, torch.device("cpu") if wait else device, dtype, job)
        vae = _sources.load_vae(source, job, device, torch.float32 if full_vae else dtype, say)
        tokens: dict[Part, ClipTokens] = {}
        parts: tuple[tuple[Part, str, str], ...] = (
            ("te1", "tokenizer", "text_encoder"),
            ("te2", "tokenizer_2", "text_encoder_2"),
        )
        for part, folder, facts in parts:
            settings: Any = text_encoders[part].config
            pad_id = source.facts[facts]["pad_token_id"]
            tokenizer = _sources.load_tokenizer(source, folder, settings.vocab_size, pad_id)
            tokens[part] = ClipTokens(
                tokenizer,
                chunks=config.max_token_length // 75,
                length=int(settings.max_position_embeddings),
                # OpenCLIP pads with id 0 whatever a folder's tokenizer says (sd-scripts: strategy_sdxl.py).
                pad=0 if part == "te2" else None,
            )
        return cls(
            unet=unet.read,
            vae=vae,
            text_encoders=text_encoders,
            tokens=tokens,
            device=device,
            dtype=dtype,
            keep_text=not job.trains_text_encoder,
            texts_wait=wait,
        )

    # --- text -----------------------------------------------------------------------------------

    def encode_now(self, prompts: Sequence[str], weighted: bool) -> Text:
        """States of both encoders' last layers but one, side by side, and OpenCLIP's pooled text.

        Emphasis multiplies the states of both encoders; the pooled text has none.
        """
        states: list[Tensor] = []
        pooled: Tensor | None = None
        for part, tokens in self.tokens.items():
            weights_BT: Tensor | None = None
            if weighted:
                ids_BNL, weights_BT = tokens.weighted_captions(prompts)
            else:
                ids_BNL = tokens.captions(prompts)
            encoder: Any = self.text_encoders[part]
            inner = getattr(encoder, "text_model", encoder)
            flat = clip_states(inner, ids_BNL.flatten(0, 1), len(inner.encoder.layers) - 1)
            states_BNLD = flat.reshape(*ids_BNL.shape, -1)
            joined = join_chunks(states_BNLD)
            if weights_BT is not None:
                joined = joined * weights_BT.to(joined).unsqueeze(-1)
            states.append(joined)
            if part == "te2":
                pooled = _pooled(encoder, states_BNLD[:, 0], ids_BNL[:, 0], tokens.eos)
        assert pooled is not None
        return Text(torch.cat(states, dim=-1).to(self.device), pooled.to(self.device))

    def prepare_text(
        self, job: Job, dataset: Dataset, *, emit: Callable[[Event], None], stop: Callable[[], bool]
    ) -> None:
        """Cache what the encoders give for each stored caption, and move them to the CPU."""
        if self.texts_wait:
            self.move(["text_encoders"], self.device)
            self.texts_wait = False
        if job.caches_sdxl_text:
            self._cache_text(job, dataset, emit, stop)
            self.move(["text_encoders"], torch.device("cpu"))

    def _cache_text(
        self, job: Job, dataset: Dataset, emit: Callable[[Event], None], stop: Callable[[], bool]
    ) -> None:
        weighted = job.config.weighted_captions

        def encode(captions: Sequence[str]) -> list[dict[str, Tensor]]:
            width: int = self.text_encoders["te1"].config.hidden_size  # type: ignore[assignment, union-attr]
            place = self.device
            with torch.no_grad(), torch.autocast(place.type, self.dtype, self.dtype != torch.float32):
                text = self.encode_now(captions, weighted)
            assert text.pooled_BD is not None
            rows = zip(text.states_BTD.cpu(), text.pooled_BD.cpu(), strict=True)
            return [
                dict(zip(NAMES, (states[:, :width], states[:, width:], pooled), strict=True))
                for states, pooled in rows
            ]

        to_disk = job.engine.cache_text_encoder_outputs_to_disk
        self._cached = text_cache.prepare(
            dataset,
            suffix="_te_outputs.npz" if to_disk else None,
            facts={
                "encoders": fingerprint(*self.text_encoders.values()) if to_disk else "",
                "max_token_length": job.config.max_token_length,
                "weighted": weighted,
            },
            names=NAMES,
            encode=encode,
            trust=job.config.skip_cache_check,
            emit=emit,
            stop=stop,
        )

    def encode_batch(self, batch: Batch, *, weighted: bool = False) -> Text:
        """Cached conditioning of a micro-batch, or that of its captions."""
        if self._cached is None:
            return super().encode_batch(batch, weighted=weighted)
        entries = [self._cached.get(index) for index in batch.pictures]
        one, two, pooled = (torch.stack([entry[name] for entry in entries]) for name in NAMES)

        def here(tensor: Tensor) -> Tensor:
            return tensor.to(self.device, self.dtype, non_blocking=True)

        return Text(here(torch.cat([one, two], dim=-1)), here(pooled))

    # --- denoising ------------------------------------------------------------------------------

    def predict(self, noisy_BCHW: Tensor, timesteps_B: Tensor, text: Text, batch: Batch | None) -> Tensor:
        """The UNet's raw prediction.

        Without a batch (samples), the picture counts as made in the size that is drawn, uncropped.
        """
        assert text.pooled_BD is not None
        if batch is None:
            height, width = (size * self.latent_factor for size in noisy_BCHW.shape[-2:])
            time_ids_B6 = torch.tensor([[height, width, 0, 0, height, width]] * len(noisy_BCHW))
        else:
            time_ids_B6 = time_ids(batch)
        prediction: Tensor = self.unet(
            noisy_BCHW.to(self.dtype),
            timesteps_B,
            encoder_hidden_states=text.states_BTD.to(self.dtype),
            added_cond_kwargs={
                "text_embeds": text.pooled_BD.to(self.dtype),
                # In half precision 1023 and 1025 would be the same size.
                "time_ids": time_ids_B6.to(noisy_BCHW.device, torch.float32, non_blocking=True),
            },
            return_dict=False,
        )[0]
        return prediction

    # --- layers ---------------------------------------------------------------------------------

    def targets(self) -> list[Target]:
        """Text encoders, then UNet, in the order of sd-scripts' modules (engine facts 5.2)."""
        places = in_kohya_order(self.unet)
        found = []
        for name, module, attention in self.unet_layers():
            saved = kohya_name(name)
            block = _block(saved)
            # Inside a block the residual part comes first, then attention, then the sampler.
            order = (block, 0 if saved.startswith("middle") else int(saved.split("_")[3]), *places[name])
            target = Target(
                name=f"lora_unet_{saved}",
                module=module,
                part="unet",
                block=block,
                conv_group=attention is None,
            )
            found.append((order, target))
        found.sort(key=lambda item: item[0])
        return [
            *self.text_targets("te1", "lora_te1"),
            *self.text_targets("te2", "lora_te2"),
            *(target for _, target in found),
        ]


PLUGIN = StableDiffusionXL


def texts_wait(job: Job, device: torch.device) -> bool:
    """Whether the text encoders are loaded to the CPU, since the VAE needs the card first to cache latents.

    Those that are stored small are put in their place while they are read.
    """
    config = job.config
    caches = config.cache_latents or config.cache_latents_to_disk
    return device.type == "cuda" and caches and memory.choices(job).text is None


def time_ids(batch: Batch) -> Tensor:
    """What SDXL is told of each picture, (B, 6): original height and width, top, left, target height, width.

    Top and left do not describe the crop that is made (`buckets.crop_ltrb`); a mirrored picture
    gets the space at its right as left (sd-scripts, train_util.py:BaseDataset.__getitem__).
    """
    width, height = batch.bucket
    rows = []
    for (original_width, original_height), flipped in zip(batch.sizes, batch.flipped, strict=True):
        left, top, right, _ = crop_ltrb(batch.bucket, (original_width, original_height))
        rows.append(
            (
                original_height,
                original_width,
                int(top),
                int(width - right if flipped else left),
                height,
                width,
            )
        )
    return torch.tensor(rows)


def _pooled(encoder: Any, states_BLD: Tensor, ids_BL: Tensor, eos: int) -> Tensor:
    """Projected state at the first end token, from the states before the last layer.

    Of several chunks sd-scripts takes the first one's, so the last layer runs on that alone.
    """
    inner = encoder.text_model
    last_BLD = inner.encoder.layers[-1](states_BLD, None, is_causal=True)
    rows = torch.arange(len(ids_BL), device=last_BLD.device)
    place_B = (ids_BL == eos).int().argmax(dim=1).to(last_BLD.device, non_blocking=True)
    pooled: Tensor = encoder.text_projection(inner.final_layer_norm(last_BLD[rows, place_B]))
    return pooled


# --- Kohya's names ------------------------------------------------------------------------------

RESNET = {new: old.replace(".", "_") for old, new in checkpoints.RESNET.items()}
LAYERS = 2
"""Residual blocks of a level, samplers not counted; a level of the output side has one more."""


def kohya_name(name: str) -> str:
    """A UNet layer's name in Kohya's files: the original (SGM) path, dots as underscores.

    down_blocks.1.attentions.0.proj_in -> input_blocks_4_1_proj_in

    Args:
        name: Path in diffusers' UNet2DConditionModel.
    """
    if match := re.fullmatch(r"mid_block\.(resnets|attentions)\.(\d+)\.(.+)", name):
        place = 2 * int(match[2]) if match[1] == "resnets" else 1
        return f"middle_block_{place}_{_inner(match[1], match[3])}"
    match = re.fullmatch(r"(down|up)_blocks\.(\d+)\.(\w+)\.(\d+)\.(.+)", name)
    if match is None:
        raise ValueError(f"{name} is no layer of a block")
    side, i, kind, j, rest = match[1], int(match[2]), match[3], int(match[4]), match[5]
    level = i * (LAYERS + 1)
    if kind == "downsamplers":
        return f"input_blocks_{level + LAYERS + 1}_0_op"
    if kind == "upsamplers":
        return f"output_blocks_{level + LAYERS}_2_conv"
    start = f"input_blocks_{level + j + 1}" if side == "down" else f"output_blocks_{level + j}"
    return f"{start}_{0 if kind == 'resnets' else 1}_{_inner(kind, rest)}"


def _inner(kind: str, rest: str) -> str:
    return RESNET[rest] if kind == "resnets" else rest.replace(".", "_")


def _block(saved: str) -> int:
    """Index into Kohya's 23 block lists (sd-scripts, networks/lora.py:get_block_index)."""
    side, _, rest = saved.partition("_block")
    number = int(rest.split("_")[1])
    return number + {"input": 1, "middle": 10, "output": 13}[side]


# --- finding and reading model files ------------------------------------------------------------


def _find(job: Job, say: Say) -> Source:
    path = _sources.locate(job, say, files=MODEL_FILES)
    facts = checkpoints.read_json(MODELS / "sdxl.json")
    if path.is_dir():
        _check_folder(path)
        return Source(path, None, facts)
    file = checkpoints.open_tensors(path)
    kind = checkpoints.kind_of(file.shapes)
    if kind != "sdxl":
        raise ModelFileError(f"{path}: {TICK[kind]}")
    _sources.check_channels(path, file.shapes.get(f"{UNET}input_blocks.0.0.weight", (0, 4))[1])
    for mark, box, on in (
        ("v_pred", "v_parameterization", job.config.v_parameterization),
        ("ztsnr", "--zero_terminal_snr (additional_parameters)", job.engine.zero_terminal_snr),
    ):
        if mark in file.shapes and not on:
            say(f"{path.name} is marked {mark}, but {box} is not set: the LoRA would learn the wrong target")
    return Source(path, file, facts)


def _check_folder(path: Path) -> None:
    if (path / "transformer").is_dir():
        raise ModelFileError(f"{path}: {TICK['flux']}")
    if not (path / "unet").is_dir():
        raise ModelFileError(
            f"{path} is no diffusers folder (it has no folder unet): choose a checkpoint file or a folder "
            "with unet, vae, text_encoder, text_encoder_2 and tokenizers"
        )
    if not (path / "text_encoder_2").is_dir():
        raise ModelFileError(
            f"{path}: its second text encoder is missing, so it is no SDXL model: untick SDXL"
        )
    if not (path / "text_encoder").is_dir():
        raise ModelFileError(f"{path}: {TICK['sdxl_refiner']}")
    config = checkpoints.read_json(path / "unet" / "config.json")
    _sources.check_channels(path, int(config.get("in_channels", 4)))


def _load_text_encoders(
    source: Source, device: torch.device, dtype: torch.dtype, job: Job
) -> dict[Part, nn.Module]:
    from trainer.libraries import CLIPTextModel, CLIPTextModelWithProjection

    if source.file is None:
        folders = source.path / "text_encoder", source.path / "text_encoder_2"
        values, values2 = (checkpoints.read_json(folder / "config.json") for folder in folders)
        file, file2 = (checkpoints.open_weights(folder) for folder in folders)
        names = checkpoints.clip_names(file.shapes)
        names2: checkpoints.Renamed = {
            key: (key,) for key in file2.shapes if not key.endswith("position_ids")
        }
    else:
        file, facts = source.file, source.facts
        names = checkpoints.clip_names(file.shapes, CLIP_L)
        values = _sources.explained(
            file.path, checkpoints.ldm_clip_config, file.shapes, names, facts["text_encoder"]
        )
        values2 = _sources.explained(
            file.path,
            checkpoints.open_clip_config,
            file.shapes,
            OPEN_CLIP,
            facts["text_encoder_2"],
            dropped=0,
        )
        file2, projection = _projection(file)
        values2["projection_dim"] = file2.shapes[projection][0]
        inner = checkpoints.open_clip_names(file.shapes, OPEN_CLIP, values2["num_hidden_layers"])
        names2 = {key: tuple(f"text_model.{name}" for name in new) for key, new in inner.items()}
        names2[projection] = ("text_projection.weight",)

    def load(kind: Any, values: dict[str, Any], file: TensorFile, names: checkpoints.Renamed) -> nn.Module:
        encoder: nn.Module = _sources.load_clip(
            kind, values, file, names, device=device, dtype=dtype, job=job
        )
        return encoder

    return {
        "te1": load(CLIPTextModel, values, file, names),
        "te2": load(CLIPTextModelWithProjection, values2, file2, names2),
    }


def _projection(file: TensorFile) -> tuple[TensorFile, str]:
    """The file with its text projection as a linear layer's weight, and that tensor's key.

    The original multiplies ``state @ P``, a linear layer by its weight transposed. sd-scripts takes P as
    it is, unlike the original, diffusers and every inference program (engine facts 4.3).
    """
    if f"{PROJECTION}.weight" in file.shapes:  # Playground v2 stores the linear layer
        return file, f"{PROJECTION}.weight"
    if PROJECTION not in file.shapes:
        raise ModelFileError(f"{file.path} is incomplete: no tensor {PROJECTION}")
    return _Transposed(file, PROJECTION), PROJECTION


class _Transposed(TensorFile):
    """A file of which one tensor is turned over."""

    def __init__(self, file: TensorFile, key: str) -> None:
        self.path = file.path
        self.scaled = file.scaled
        self.shapes = {**file.shapes, key: file.shapes[key][::-1]}
        self._file, self._key = file, key

    def stream(self, keys: Iterable[str]) -> Iterator[tuple[str, Tensor]]:
        for key, tensor in self._file.stream(keys):
            yield key, tensor.T.contiguous() if key == self._key else tensor
