"""FLUX.1 dev and schnell.

The transformer comes from a file in Black Forest Labs' layout (bf16, fp16 or fp8) or from a diffusers
folder; autoencoder, CLIP-L and T5-XXL from files of their own or from the same folder. The tokenizers
are part of this program.

Nothing is in memory before it is needed: the transformer is loaded when it is first asked for, after
the text encoders have done their work and gone (where text encoder outputs are cached).

Axes: B batch, C channels, H/W latent height and width, T text tokens, D text width.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import psutil
import torch
from torch import Tensor, nn

from trainer import checkpoints, memory, prompts
from trainer.checkpoints import MODELS, TensorFile
from trainer.data import captions
from trainer.draws import Draws
from trainer.errors import DatasetError, DivergedError, ModelFileError, StopTraining
from trainer.events import Event, LogLine, PhaseStarted, Progress
from trainer.families import _flux_model as model_files
from trainer.families import _vae
from trainer.families._base import Family, Part, Say, Target, Text
from trainer.families._flux_texts import (
    Encoded,
    Recent,
    TextStore,
    batched,
    file_names,
    read_file,
    texts_of_run,
    write_file,
)
from trainer.memory.quantise import parameter_count
from trainer.objectives.flow import FlowEuler
from trainer.tokens import ClipTokens, clip_tokenizer

if TYPE_CHECKING:
    from trainer.data.types import Batch, Dataset
    from trainer.job import Job

__all__ = ["PLUGIN", "Flux"]

SCALE, SHIFT = 0.3611, 0.1159  # sd-scripts, library/flux_models.py: scale_factor, shift_factor of the ae
PREFIX = "model.diffusion_model."
DEV_TOKENS, SCHNELL_TOKENS = 512, 256  # T5 tokens of each variant
CLIP_TOKENS = 77

TEXT_BATCH = 8
"""Texts that go through T5 at a time while they are cached."""
REMEMBERED_BYTES = 256 << 20
"""Encoded texts kept for captions that come again, where nothing is cached."""
ROOM = 1.3
"""T5 stays on the device while texts are cached if this many times its size is free there."""

TEXT_LAYERS = ("k_proj", "v_proj", "q_proj", "out_proj", "fc1", "fc2")
T5_LAYERS = ("q", "k", "v", "o", "wi_0", "wi_1", "wo")

TICK = {
    "sdxl": "this is an SDXL checkpoint: tick SDXL instead of Flux.1 (Model)",
    "sdxl_refiner": "this is the SDXL refiner, which cannot be trained here: choose flux1-dev.safetensors",
    "sd1": "this is a Stable Diffusion checkpoint: untick Flux.1 (Model)",
    "sd2": "this is a Stable Diffusion checkpoint: untick Flux.1 and tick v2 (Model)",
    "sd3": "this is an SD3 model, which LoRA Kiln does not train",
    "vae": "this is an autoencoder only: choose flux1-dev.safetensors here and give it in VAE Path (Flux.1)",
    "lora": "this is a LoRA, not a base model: choose flux1-dev.safetensors here",
    "unet": "this is no FLUX.1 transformer: choose flux1-dev.safetensors",
    "unknown": "its keys are of no model that LoRA Kiln knows: choose flux1-dev.safetensors",
}


class Flux(Family):
    """FLUX.1, loaded."""

    vae: Any

    name: ClassVar[str] = "flux"
    objective: ClassVar[str] = "flow"
    latent_channels: ClassVar[int] = 16
    latent_factor: ClassVar[int] = 8
    bucket_steps: ClassVar[int] = 64
    kohya_blocks: ClassVar[tuple[int, int, int, int, int]] = (0, 0, 0, 0, 0)
    cache_suffix: ClassVar[str] = "_flux.npz"
    sample_steps: ClassVar[int] = 20
    sample_cfg_scale: ClassVar[float] = 1.0
    sample_sampler: ClassVar[str] = "euler"
    sample_multiple_px: ClassVar[int] = 16
    kohya_base_version = "flux1"
    implementation = "https://github.com/black-forest-labs/flux"

    def __init__(
        self,
        *,
        transformer: _Transformer,
        vae: Any,
        texts: _TextEncoders,
        job: Job,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        config = job.config
        self._transformer = transformer
        self.vae = vae
        self._texts = texts
        self.text_encoders = texts.loaded
        self.device = device
        self.dtype = dtype
        self.architecture = f"flux-1-{'dev' if transformer.guided else 'schnell'}/lora"
        self.guidance_scale = float(config.guidance_scale)
        self.masked = config.apply_t5_attn_mask
        self.trains_clip = job.trains_text_encoder
        self.trains_t5 = job.trains_t5
        self._kept: TextStore | Recent = Recent(REMEMBERED_BYTES)
        self._fingerprint = ""

    def load_unet(self) -> nn.Module:
        """The transformer; see `Family.load_unet`."""
        model: nn.Module = self._transformer.load()
        return model

    # --- loading --------------------------------------------------------------------------------

    @classmethod
    def load(cls, job: Job, device: torch.device, dtype: torch.dtype, say: Say) -> Flux:
        """Check all files, load autoencoder and text encoders; see `Family.load`."""
        folder = job.path(job.config.pretrained_model_name_or_path.strip())
        transformer = _Transformer(_find(folder), job, device, dtype, say)
        base = folder if folder.is_dir() else None
        tokens = job.config.t5xxl_max_token_length or (DEV_TOKENS if transformer.guided else SCHNELL_TOKENS)
        texts = _TextEncoders(base, job, device, dtype, say, t5_tokens=tokens)
        vae = _load_vae(base, job, device, torch.float32 if job.engine.no_half_vae else dtype)
        if vae.config.latent_channels != cls.latent_channels:
            raise ModelFileError(
                f"the autoencoder has {vae.config.latent_channels} latent channels where FLUX.1 has "
                f"{cls.latent_channels}: give FLUX's own ae.safetensors in VAE Path (Flux.1)"
            )
        return cls(transformer=transformer, vae=vae, texts=texts, job=job, device=device, dtype=dtype)

    # --- pictures -------------------------------------------------------------------------------

    def vae_fingerprint(self) -> str:
        """SHA-256 over the autoencoder's names, dtypes, shapes and bytes."""
        if not self._fingerprint:
            self._fingerprint = _vae.fingerprint(self.vae)
        return self._fingerprint

    def encode_images(self, pixels_BCHW: Tensor, generators: Sequence[torch.Generator]) -> Tensor:
        """A sample of the autoencoder, shifted and scaled as the transformer wants it."""
        mend = "add --no_half_vae to additional_parameters, or use bf16"
        return SCALE * (
            _vae.sample(self.vae, pixels_BCHW, generators, what="the autoencoder", mend=mend) - SHIFT
        )

    def to_model_latents(self, latents_BCHW: Tensor) -> Tensor:
        """Cached latents are ready for the transformer."""
        return latents_BCHW

    def decode_latents(self, latents_BCHW: Tensor) -> Tensor:
        """Model latents to pictures in [-1, 1], float32."""
        return _vae.decode(self.vae, latents_BCHW / SCALE + SHIFT)

    # --- text -----------------------------------------------------------------------------------

    def prepare_text(
        self, job: Job, dataset: Dataset, *, emit: Callable[[Event], None], stop: Callable[[], bool]
    ) -> None:
        """Encode every text that the run will need; then T5, and CLIP-L unless it trains, are gone.

        Raises:
            StopTraining: ``stop`` said so.
        """
        if not caches_texts(job):
            return
        draws = Draws(job.seed)
        store = TextStore(psutil.virtual_memory().available // 3, job.output_dir)
        files = (
            _caption_files(job, dataset, draws) if job.config.flux1_cache_text_encoder_outputs_to_disk else {}
        )
        for text, paths in files.items():
            key = None if job.config.skip_cache_check else self._texts.key(text, masked=self.masked)
            for path in paths:
                found = read_file(
                    path, key, length=self._texts.t5_tokens, masked=self.masked, dtype=self.dtype
                )
                if found is not None and text not in store:
                    store.put(text, found)
        if len(store):
            emit(LogLine(message=f"text outputs of {len(store)} captions taken from their files"))
        wanted = texts_of_run(job, dataset, draws)
        for prompt in prompts.for_job(job):
            wanted += [prompt.prompt, prompt.negative]
        missing = [text for text in dict.fromkeys(wanted) if text not in store]
        self._fill(store, missing, files, emit, stop)
        if store.on_disk():
            emit(
                LogLine(
                    message=f"{store.on_disk()} of {len(store)} encoded texts did not fit into memory: they are "
                    "in a scratch folder in output_dir while the run lasts"
                )
            )
        self._kept = store
        self._texts.drop("te3")
        if not self.trains_clip:
            self._texts.drop("te1")
        emit(
            LogLine(
                message=f"{len(store)} texts encoded; T5-XXL {'and CLIP-L ' * (not self.trains_clip)}freed"
            )
        )

    def _fill(
        self,
        store: TextStore,
        missing: Sequence[str],
        files: Mapping[str, Sequence[Path]],
        emit: Callable[[Event], None],
        stop: Callable[[], bool],
    ) -> None:
        phase, done = "cache texts", 0
        emit(PhaseStarted(phase=phase, total=len(missing), unit="texts"))
        with self._texts.at_work():
            for texts in batched(missing, TEXT_BATCH):
                if stop():
                    raise StopTraining
                for text, encoded in zip(texts, self._encode(texts), strict=True):
                    for path in files.get(text, ()):
                        try:
                            write_file(
                                path, encoded, self._texts.key(text, masked=self.masked), masked=self.masked
                            )
                        except OSError as error:
                            emit(LogLine(message=f"{path} was not written: {error}", level="warning"))
                    try:
                        store.put(text, encoded)
                    except OSError as error:
                        raise DatasetError(
                            f"{len(missing)} encoded texts fit neither into memory nor into output_dir ({error}): "
                            "make room, or switch shuffle_caption or the caching of text encoder outputs off"
                        ) from error
                done += len(texts)
                emit(Progress(phase=phase, done=done, total=len(missing)))

    @torch.no_grad()
    def _encode(self, texts: Sequence[str]) -> list[Encoded]:
        """Texts through both encoders, as they are now."""
        ids_BT, mask_BT = self._texts.t5_ids(texts)
        with torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32):
            pooled_BD = self._texts.clip(texts).to("cpu", self.dtype)
            states_BTD = self._texts.t5(ids_BT, mask_BT if self.masked else None).to("cpu", self.dtype)
        if not bool(torch.isfinite(states_BTD).all()):
            raise DivergedError(
                f"T5-XXL gave NaN in {str(self.dtype).removeprefix('torch.')}: use mixed_precision bf16"
            )
        # Copies, so that one kept text does not keep the memory of a whole batch.
        return [
            Encoded(pooled_BD[row].clone(), states_BTD[row].clone(), mask_BT[row].clone())
            for row in range(len(texts))
        ]

    def encode_prompts(self, prompts: Sequence[str], *, weighted: bool = False) -> Text:
        """T5's states and CLIP-L's pooled state; FLUX reads no emphasis, as in Kohya.

        A text that was not foreseen (a sample prompt edited during the run) brings the text encoders
        back for a moment.
        """
        ids_BT, mask_BT = self._texts.t5_ids(prompts)
        if self.device.type == "meta":
            states_BTD, pooled_BD = self._texts.on_meta(len(prompts))
        else:
            entries = [] if self.trains_t5 else self._entries(prompts)
            if self.trains_t5:
                states_BTD = self._texts.t5(ids_BT, mask_BT if self.masked else None)
            else:
                states_BTD = torch.stack([entry.states_TD for entry in entries])
            if self.trains_clip or self.trains_t5:
                pooled_BD = self._texts.clip(prompts)
            else:
                pooled_BD = torch.stack([entry.pooled_D for entry in entries])
        extra = {"mask_BT": mask_BT.to(self.device, non_blocking=True)} if self.masked else {}
        return Text(
            states_BTD.to(self.device, non_blocking=True),
            pooled_BD.to(self.device, non_blocking=True),
            extra,
        )

    def _entries(self, texts: Sequence[str]) -> list[Encoded]:
        found = {text: self._kept.get(text) for text in dict.fromkeys(texts) if text in self._kept}
        missing = [text for text in dict.fromkeys(texts) if text not in found]
        if missing:
            with self._texts.at_work():
                found |= dict(zip(missing, self._encode(missing), strict=True))
            for text in missing:
                self._kept.put(text, found[text])
        return [found[text] for text in texts]

    def for_sample(self, text: Text, prompt: prompts.SamplePrompt) -> Text:
        """The prompt's embedded guidance (--g), 3.5 if it gives none."""
        guidance = 3.5 if prompt.guidance is None else prompt.guidance
        guidance_B = torch.full((len(text.states_BTD),), guidance, device=self.device)
        return Text(text.states_BTD, text.pooled_BD, {**text.extra, "guidance_B": guidance_B})

    # --- denoising ------------------------------------------------------------------------------

    def sample_scheduler(self, width: int, height: int) -> FlowEuler:
        """Euler's method, whatever sampler is named; the noise levels hang on the picture's size."""
        return FlowEuler(width // 16 * (height // 16))

    def uses_negative(self, cfg_scale: float) -> bool:
        """As Kohya's previews: any scale but 1."""
        return cfg_scale != 1

    def sample_noise(self, latent_size: tuple[int, int], generator: torch.Generator) -> Tensor:
        """Starting noise, drawn token by token as Kohya's previews are, 1CHW."""
        height, width = latent_size
        tokens = torch.randn((1, height // 2 * (width // 2), 4 * self.latent_channels), generator=generator)
        return unpack(tokens, height, width)

    def predict(self, noisy_BCHW: Tensor, timesteps_B: Tensor, text: Text, batch: Batch | None) -> Tensor:
        """The transformer's velocity."""
        batch_size, _, height, width = noisy_BCHW.shape
        transformer, device = self.unet, noisy_BCHW.device
        states_BTD = text.states_BTD.to(self.dtype)
        assert text.pooled_BD is not None
        guidance_B: Tensor | None = None
        if self._transformer.guided:
            guidance_B = text.extra.get("guidance_B")
            if guidance_B is None:
                guidance_B = torch.full((batch_size,), self.guidance_scale, device=device)
        tokens_BLD = pack(noisy_BCHW.to(self.dtype))
        attention: dict[str, Tensor] | None = None
        if self.masked:
            seen_BL = torch.ones((batch_size, tokens_BLD.shape[1]), dtype=torch.bool, device=device)
            mask_BT = text.extra["mask_BT"].to(device=device, dtype=torch.bool)
            attention = {"attention_mask": torch.cat([mask_BT, seen_BL], dim=1)[:, None, None, :]}
        prediction_BLD = transformer(
            hidden_states=tokens_BLD,
            encoder_hidden_states=states_BTD,
            pooled_projections=text.pooled_BD.to(self.dtype),
            timestep=timesteps_B / 1000,
            img_ids=_positions(height // 2, width // 2, device),
            txt_ids=torch.zeros((states_BTD.shape[1], 3), device=device),
            guidance=guidance_B,
            joint_attention_kwargs=attention,
            return_dict=False,
        )[0]
        return unpack(prediction_BLD, height, width)

    # --- layers ---------------------------------------------------------------------------------

    def targets(self) -> list[Target]:
        """CLIP-L, T5, blocks, input layers, in the order of networks/lora_flux.py."""
        found: list[Target] = []
        for part, encoder in self.text_encoders.items():
            clip = part == "te1"
            start, layers = ("lora_te1_text_model_", TEXT_LAYERS) if clip else ("lora_te3_", T5_LAYERS)
            found += [
                Target(name=start + name.replace(".", "_"), module=module, part=part, optional=not clip)
                for name, module in encoder.named_modules()
                if isinstance(module, nn.Linear) and name.rpartition(".")[2] in layers
            ]
        for old, new in model_files.target_names(self._transformer.doubles, self._transformer.singles):
            if old.startswith("guidance_in.") and not self._transformer.guided:
                continue
            module = self.unet.get_submodule(new)
            found.append(
                Target(
                    name=f"lora_unet_{old.replace('.', '_')}",
                    module=module,
                    part="unet",
                    optional="_blocks." not in old,
                    parts=model_files.diffusers_parts(old, new, module),
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
                self._texts.move(device)

    def enable_gradient_checkpointing(self) -> None:
        """Recompute activations; everything stays in eval mode (T5 would drop out, as it does in Kohya)."""
        self.unet.enable_gradient_checkpointing()
        for encoder in self.text_encoders.values():
            checkpointed: Any = encoder
            checkpointed.activation_checkpointing_enable({"use_reentrant": False})
            checkpointed.train()  # CLIP-L has no dropout, and T5's is set to 0


PLUGIN = Flux


def caches_texts(job: Job) -> bool:
    """Whether text encoder outputs are cached."""
    config = job.config
    return config.flux1_cache_text_encoder_outputs or config.flux1_cache_text_encoder_outputs_to_disk


def pack(latents_BCHW: Tensor) -> Tensor:
    """Squares of 2 x 2 latents to tokens, BLD with D in the order c, row, column."""
    batch, channels, height, width = latents_BCHW.shape
    squares = latents_BCHW.reshape(batch, channels, height // 2, 2, width // 2, 2)
    return squares.permute(0, 2, 4, 1, 3, 5).reshape(batch, height // 2 * (width // 2), channels * 4)


def unpack(tokens_BLD: Tensor, height: int, width: int) -> Tensor:
    """The reverse of `pack`: BCHW."""
    batch, _, features = tokens_BLD.shape
    squares = tokens_BLD.reshape(batch, height // 2, width // 2, features // 4, 2, 2)
    return squares.permute(0, 3, 1, 4, 2, 5).reshape(batch, features // 4, height, width)


@cache
def _positions(rows: int, columns: int, device: torch.device) -> Tensor:
    """(0, row, column) of each token."""
    places = torch.zeros((rows, columns, 3))
    places[..., 1] = torch.arange(rows)[:, None]
    places[..., 2] = torch.arange(columns)[None, :]
    return places.reshape(-1, 3).to(device)


def _caption_files(job: Job, dataset: Dataset, draws: Draws) -> dict[str, list[Path]]:
    """Cache files of each text, of the pictures whose text never varies."""
    wanted = [
        index
        for index, repeats in enumerate(dataset.repeats)
        if repeats and not captions.varies(dataset.subsets[dataset.pictures[index].subset])
    ]
    found: dict[str, list[Path]] = {}
    for index, path in file_names(dataset.pictures, wanted).items():
        picture = dataset.pictures[index]
        text = captions.process(
            picture.caption,
            dataset.subsets[picture.subset],
            draws.random("caption", 0),
            epoch=1,
            step=0,
            max_steps=1,
        )
        found.setdefault(text, []).append(path)
    return found


# --- the transformer's file -----------------------------------------------------------------------


def _find(path: Path) -> TensorFile:
    """The transformer's tensors in the BFL layout.

    Raises:
        ModelFileError: There is no file, or it is of another model.
    """
    if path.is_dir():
        folder = path / "transformer" if (path / "transformer").is_dir() else path
        if not (folder / "config.json").is_file():
            raise ModelFileError(
                f"{path} is no diffusers folder of FLUX.1 (it has no folder transformer): choose "
                "flux1-dev.safetensors or such a folder"
            )
        file = checkpoints.open_weights(folder)
    elif path.is_file() and "-of-0" in path.stem:
        file = checkpoints.open_weights(path.parent)
    elif path.is_file():
        file = checkpoints.open_tensors(path)
    else:
        raise ModelFileError(
            f"{path} does not exist: choose flux1-dev.safetensors or a diffusers folder of FLUX.1 as "
            "pretrained_model_name_or_path (Model)"
        )
    kind = checkpoints.kind_of(file.shapes)
    if kind != "flux":
        raise ModelFileError(f"{path}: {TICK[kind]}")
    if any(key.startswith("transformer_blocks.") for key in file.shapes):
        return model_files.as_bfl(file)
    return file


class _Transformer:
    """A checked file, and how the transformer is made from it."""

    def __init__(
        self, file: TensorFile, job: Job, device: torch.device, dtype: torch.dtype, say: Say
    ) -> None:
        self._file, self._device, self._dtype, self._say = file, device, dtype, say
        self._job = job
        self._from_diffusers = isinstance(file, model_files.Joined)
        prefix = PREFIX if any(key.startswith(PREFIX) for key in file.shapes) else ""
        shapes = checkpoints.under(file.shapes, prefix)
        try:
            self.config = model_files.bfl_config(shapes, _facts()["transformer"])
        except ModelFileError as error:
            raise ModelFileError(f"{file.path}: {error}") from error
        self._names = model_files.bfl_names(file.shapes, prefix)
        self.guided: bool = self.config["guidance_embeds"]
        self.doubles: int = self.config["num_layers"]
        self.singles: int = self.config["num_single_layers"]
        missing = set(model_files.build(self.config).state_dict()) - {
            name for names in self._names.values() for name in names
        }
        if missing:
            raise ModelFileError(
                f"{file.path} lacks {len(missing)} tensors of the FLUX.1 transformer (e.g. {min(missing)}): "
                "the file is incomplete"
            )

    def load(self) -> Any:
        """The transformer on its device, frozen, in eval mode."""
        model = model_files.build(self.config)
        checkpoints.fill(
            model,
            self._file,
            self._names,
            device=self._device,
            dtype=self._dtype,
            what="FLUX.1 transformer",
            place=memory.placing(
                self._job, "unet", model, self._device, self._dtype, scaled=self._file.scaled
            ),
        )
        if not self._from_diffusers:
            model_files.swap_halves(model)
        model.eval()
        self._say(
            f"FLUX.1 {'dev' if self.guided else 'schnell'}: {self.doubles} double and {self.singles} single "
            f"blocks, {parameter_count(model):,} parameters"
        )
        return model


# --- autoencoder and text encoders ----------------------------------------------------------------


@cache
def _facts() -> dict[str, Any]:
    return checkpoints.read_json(MODELS / "flux.json")


def _given(job: Job, field: str, base: Path | None, folder: str, label: str, example: str) -> Path:
    """The path of a model: its field, or a folder of the diffusers base."""
    text = str(getattr(job.config, field)).strip()
    if text:
        path = job.path(text)
        if not path.exists():
            raise ModelFileError(f"{path} does not exist: give {example} in {label} (Flux.1)")
        return path
    if base is not None and (base / folder).is_dir():
        return base / folder
    raise ModelFileError(f"{label} (Flux.1) is empty: FLUX.1 needs {example}")


def _open(path: Path) -> TensorFile:
    return checkpoints.open_weights(path) if path.is_dir() else checkpoints.open_tensors(path)


def _load_vae(base: Path | None, job: Job, device: torch.device, dtype: torch.dtype) -> Any:
    from trainer.libraries import AutoencoderKL

    path = _given(job, "ae", base, "vae", "VAE Path", "its autoencoder, ae.safetensors")
    file = _open(path)
    try:
        if any(".down_blocks." in key for key in file.shapes):
            names = checkpoints.diffusers_vae_names(file.shapes)
            config = checkpoints.diffusers_vae_config(file.shapes, _facts()["vae"])
        else:
            names = checkpoints.ldm_vae_names(file.shapes, "")
            config = checkpoints.ldm_vae_config(file.shapes, "", _facts()["vae"])
    except (ModelFileError, KeyError, IndexError) as error:
        raise ModelFileError(
            f"{path} is no autoencoder ({error}): give ae.safetensors in VAE Path (Flux.1)"
        ) from error
    with torch.device("meta"):
        vae = AutoencoderKL.from_config(config)
    checkpoints.fill(vae, file, names, device=device, dtype=dtype, what="autoencoder")
    vae.eval()
    return vae


class _TextEncoders:
    """CLIP-L and T5-XXL: loaded, at work, gone, and back for a moment when an unforeseen text comes."""

    def __init__(
        self,
        base: Path | None,
        job: Job,
        device: torch.device,
        dtype: torch.dtype,
        say: Say,
        *,
        t5_tokens: int,
    ) -> None:
        self._job, self._device, self._dtype, self._say = job, device, dtype, say
        clip_l = _given(job, "clip_l", base, "text_encoder", "CLIP-L Path", "clip_l.safetensors")
        t5xxl = _given(job, "t5xxl", base, "text_encoder_2", "T5-XXL Path", "t5xxl_fp16.safetensors")
        self._files: dict[Part, TensorFile] = {"te1": _open(clip_l), "te3": _open(t5xxl)}
        self.t5_tokens = t5_tokens
        self._tokens = ClipTokens(
            clip_tokenizer(MODELS / "clip" / "bpe_simple_vocab_16e6.txt.gz"), chunks=1, length=CLIP_TOKENS
        )
        self._t5_config = model_files.t5_config(self._files["te3"].shapes, _facts()["text_encoder_2"], t5xxl)
        self._clip_config = _clip_config(self._files["te1"])
        self._cached = caches_texts(job)
        self._fingerprints: dict[str, str] = {}
        self._ids: dict[str, tuple[Tensor, Tensor]] = {}
        self.loaded: dict[Part, nn.Module] = {}
        if device.type == "meta" and self._cached and not job.trains_text_encoder:
            return  # what is gone before the first step does not count
        self.loaded["te1"] = self._load_clip(device)
        if device.type != "meta" or not self._cached:
            self.loaded["te3"] = self._load_t5(resident=not self._cached)

    def _load_clip(self, device: torch.device) -> Any:
        from trainer.libraries import CLIPTextConfig, CLIPTextModel

        file = self._files["te1"]
        with torch.device("meta"):
            encoder = CLIPTextModel._from_config(
                CLIPTextConfig.from_dict(self._clip_config), attn_implementation="sdpa", dtype=None
            )
        # Some files carry CLIP's logit_scale along, a single number.
        names = checkpoints.clip_names(key for key, shape in file.shapes.items() if shape)
        place = memory.placing(self._job, "text", encoder, device, self._dtype)
        checkpoints.fill(encoder, file, names, device=device, dtype=self._dtype, what="CLIP-L", place=place)
        positions = torch.arange(encoder.config.max_position_embeddings, device=device).expand((1, -1))
        encoder.embeddings.position_ids = positions
        encoder.eval()
        return encoder

    def _load_t5(self, *, resident: bool) -> Any:
        """T5; not ``resident``: as it is in the file, mapped where it can be, to be put to work by `at_work`."""
        from trainer.libraries import T5Config, T5EncoderModel

        file = self._files["te3"]
        with torch.device("meta"):
            encoder = T5EncoderModel._from_config(T5Config(**self._t5_config), dtype=None)
        stack = encoder.encoder
        checkpoints.fill(
            stack,
            file,
            model_files.t5_names(file.shapes),
            device=self._device if resident else torch.device("cpu"),
            dtype=self._dtype,
            what="T5-XXL",
            place=memory.placing(self._job, "text", stack, self._device, self._dtype, scaled=file.scaled)
            if resident
            # What has a scale in the file cannot be used as it is there.
            else lambda _, tensor: tensor.to(self._dtype) if file.scaled else tensor,
        )
        encoder.shared = stack.embed_tokens
        encoder.eval()
        return encoder

    def drop(self, part: Part) -> None:
        """Let an encoder go from memory."""
        self.loaded.pop(part, None)

    def move(self, device: torch.device) -> None:
        """Move what is resident."""
        for part, encoder in self.loaded.items():
            if part == "te1" or not self._cached:
                encoder.to(device)

    @contextlib.contextmanager
    def at_work(self) -> Iterator[None]:
        """Both encoders loaded, T5 with its layers on the device in the working dtype.

        A mapped T5 is brought there whole if there is room, otherwise layer by layer for each batch.
        Encoders that are not there are loaded, on the CPU, and let go afterwards.
        """
        guests = [part for part in ("te1", "te3") if part not in self.loaded]
        device = self._device if "te3" in self.loaded else torch.device("cpu")
        if "te1" in guests:
            self.loaded["te1"] = self._load_clip(device)
        if "te3" in guests:
            self._say("a text that was not foreseen: T5-XXL is loaded for it and freed again")
            self.loaded["te3"] = self._load_t5(resident=False)
        stack: Any = self.loaded["te3"]
        stack = stack.encoder
        try:
            if self._cached:
                pieces = [stack.embed_tokens, *stack.block, stack.final_layer_norm]
                with placed(pieces, device, self._dtype, whole=_has_room(pieces, device, self._dtype)):
                    yield
            else:
                yield
        finally:
            for part in guests:
                self.drop(part)  # type: ignore[arg-type]

    def t5_ids(self, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Ids and mask of texts, both BT, int64 on the CPU; cut and padded to `t5_tokens`."""
        for text in texts:
            if text not in self._ids:
                found = _t5_tokenizer()(
                    text, max_length=self.t5_tokens, padding="max_length", truncation=True
                )
                self._ids[text] = torch.tensor(found.input_ids), torch.tensor(found.attention_mask)
        ids, masks = zip(*(self._ids[text] for text in texts), strict=True)
        return torch.stack(ids), torch.stack(masks)

    def clip(self, texts: Sequence[str]) -> Tensor:
        """CLIP-L's pooled state, BD."""
        encoder: Any = self.loaded["te1"]
        ids_BT = self._tokens.captions(texts)[:, 0].to(encoder.embeddings.token_embedding.weight.device)
        pooled: Tensor = encoder(ids_BT).pooler_output
        return pooled

    def t5(self, ids_BT: Tensor, mask_BT: Tensor | None) -> Tensor:
        """T5's last hidden states, BTD."""
        encoder: Any = self.loaded["te3"]
        device = self._device if "te3" in self.loaded else torch.device("cpu")
        states: Tensor = encoder(
            input_ids=ids_BT.to(device), attention_mask=None if mask_BT is None else mask_BT.to(device)
        ).last_hidden_state
        return states

    def on_meta(self, count: int) -> tuple[Tensor, Tensor]:
        """States and pooled of ``count`` texts, without content."""
        states = (count, self.t5_tokens, self._t5_config["d_model"])
        pooled = (count, self._clip_config["hidden_size"])
        return tuple(torch.empty(shape, device="meta", dtype=self._dtype) for shape in (states, pooled))  # type: ignore[return-value]

    def key(self, text: str, *, masked: bool) -> str:
        """Everything that the encoded text depends on, as a hash."""
        facts = {
            "format": 1,
            "text": text,
            "clip_l": self._fingerprint("te1"),
            "t5xxl": self._fingerprint("te3"),
            "tokens": self.t5_tokens,
            "masked": masked,
            "dtype": str(self._dtype),
        }
        return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()

    def _fingerprint(self, part: Part) -> str:
        if part not in self._fingerprints:
            self._fingerprints[part] = _fingerprint(self._files[part].path)
        return self._fingerprints[part]


@cache
def _t5_tokenizer() -> Any:
    """T5's tokenizer from the sentence-piece model that comes with this program."""
    from trainer.libraries import T5Tokenizer

    return T5Tokenizer.from_pretrained(str(MODELS / "t5"), local_files_only=True)


def _clip_config(file: TensorFile) -> dict[str, Any]:
    names = checkpoints.clip_names(file.shapes)
    try:
        return checkpoints.ldm_clip_config(file.shapes, names, _facts()["text_encoder"])
    except (ModelFileError, KeyError, ValueError) as error:
        raise ModelFileError(
            f"{file.path} is no CLIP-L text encoder: give clip_l.safetensors in CLIP-L Path (Flux.1)"
        ) from error


def _fingerprint(path: Path) -> str:
    """A hash of a large file's size, first MiB (with all tensor names) and 16 samples of the rest."""
    size = path.stat().st_size
    digest = hashlib.sha256(str(size).encode())
    with path.open("rb") as handle:
        for place in range(17):
            handle.seek(size * place // 17)
            digest.update(handle.read(1 << 20))
    return digest.hexdigest()


def _has_room(pieces: Sequence[nn.Module], device: torch.device, dtype: torch.dtype) -> bool:
    if device.type != "cuda":
        return False
    needed = sum(p.numel() * dtype.itemsize for piece in pieces for p in piece.parameters())
    return torch.cuda.mem_get_info(device)[0] > ROOM * needed


@contextlib.contextmanager
def placed(
    pieces: Sequence[nn.Module], device: torch.device, dtype: torch.dtype, *, whole: bool
) -> Iterator[None]:
    """Let ``pieces`` of a frozen model work on ``device`` in ``dtype``, wherever their weights are.

    Args:
        pieces: Called one after the other.
        device: Where they work.
        dtype: In which they work.
        whole: Weights stay there once a piece has been called; otherwise they leave after each call.
    """
    kept = [[(p, p.data) for p in piece.parameters()] for piece in pieces]

    def come(place: int) -> Callable[..., None]:
        def act(*_: Any) -> None:
            for parameter, data in kept[place]:
                parameter.data = data.to(device, dtype)

        return act

    def leave(place: int) -> Callable[..., None]:
        def act(*_: Any) -> None:
            for parameter, data in kept[place]:
                parameter.data = data

        return act

    handles = [piece.register_forward_pre_hook(come(place)) for place, piece in enumerate(pieces)]
    if not whole:
        handles += [piece.register_forward_hook(leave(place)) for place, piece in enumerate(pieces)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
        for place in range(len(pieces)):
            leave(place)()
