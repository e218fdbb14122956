"""Job: a configuration and everything that is worked out from it before anything is loaded.

`Job.config` holds the *effective* values: what kohya_ss and sd-scripts would train with, traps
included (engine facts 0.2: zeros that the GUI drops, optional groups that it does not send). Every
place where an effective value differs from the written one is a `Note`, shown by the page and by
``python -m trainer check``.
"""

from __future__ import annotations

import ast
import random
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

from trainer.config import KohyaConfig, with_values
from trainer.data.sizes import parse_resolution
from trainer.engine_options import IGNORED, EngineOptions, parse_additional_parameters
from trainer.errors import ConfigError

__all__ = ["Job", "Note", "parse_arguments"]

Value = TypeVar("Value")

ZERO_MEANS: Mapping[str, tuple[float, str]] = {
    "max_grad_norm": (
        1.0,
        "Kohya drops a 0 and its engine clips at 1.0 (--max_grad_norm 0 in additional_parameters: off)",
    ),
    "network_alpha": (1, "Kohya drops a 0 and its engine uses alpha 1"),
    "network_dim": (4, "Kohya drops a 0 and its engine uses rank 4"),
    "prior_loss_weight": (1.0, "Kohya drops a 0 and its engine uses 1.0"),
    "huber_c": (0.1, "Kohya drops a 0 and its engine uses 0.1"),
    "huber_scale": (1.0, "Kohya drops a 0 and its engine uses 1.0"),
    "lr_scheduler_power": (1.0, "Kohya drops a 0 and its engine uses 1.0"),
    "lr_scheduler_num_cycles": (1, "Kohya drops a 0 and its engine uses 1"),
    "multires_noise_discount": (0.3, "Kohya drops a 0 and its engine uses 0.3"),
    "max_timestep": (1000, "Kohya drops a 0 and its engine uses 1000"),
    "vae_batch_size": (1, "0 means one picture at a time"),
    "train_batch_size": (1, "Kohya drops a 0 and its engine uses 1"),
    "gradient_accumulation_steps": (1, "Kohya drops a 0 and its engine uses 1"),
    "max_token_length": (75, "75 tokens is the engine's own length"),
    "bucket_reso_steps": (64, "Kohya drops a 0 and its engine uses 64"),
    "min_bucket_reso": (256, "Kohya drops a 0 and its engine uses 256"),
    "max_bucket_reso": (1024, "Kohya drops a 0 and its engine uses 1024"),
}
"""Fields in which a written 0 never reaches sd-scripts, and what its parser's default then is."""


FAMILY_BOXES: Mapping[str, str] = {"sdxl": "sdxl", "flux1_checkbox": "flux"}
"""Model check box -> file in trainer/families, in the order in which Kohya's page asks; else sd."""


@dataclass(frozen=True)
class Note:
    """An effective value that differs from the written one, or something a person should know."""

    field: str
    written: Any
    effective: Any
    reason: str

    def __str__(self) -> str:
        """One line: field, written -> effective, and why."""
        if self.written == self.effective:
            return f"{self.field}: {self.reason}"
        return f"{self.field} {self.written!r} -> {self.effective!r}: {self.reason}"


def parse_arguments(field: str, text: str) -> dict[str, Any]:
    """Read ``key=value`` parts as sd-scripts does: values are Python literals, never code.

    Args:
        field: Name of the field, for messages.
        text: ``weight_decay=0.1 betas=0.9,0.99``; quotes around a part are dropped.

    Raises:
        ConfigError: A part without ``=``, or a value that is no literal.
    """
    found: dict[str, Any] = {}
    for part in text.replace('"', "").split():
        name, equals, value = part.partition("=")
        if not equals or not name or "=" in value:
            raise ConfigError(f"{field}: {part!r} must read key=value, parts separated by one space")
        try:
            found[name] = ast.literal_eval(value)
        except (ValueError, SyntaxError) as error:
            raise ConfigError(
                f"{field}: the value of {name} is {value!r}, which is neither a number, True/False, None, "
                "a tuple nor a quoted text"
            ) from error
    return found


@dataclass(frozen=True, kw_only=True)
class Job:
    """A run, checked as far as it can be without looking at pictures or loading a model."""

    written: KohyaConfig
    """As loaded: what goes back into the JSON beside the results."""
    config: KohyaConfig
    """Effective values."""
    engine: EngineOptions
    notes: tuple[Note, ...]
    base: Path
    """Folder that relative paths start from."""
    started: float
    """Seconds since the epoch; names the run's folder, JSON and samples."""
    family: str
    """File in trainer/families: sd, sdxl, flux."""
    seed: int
    width: int
    height: int
    unet_lr: float
    """0 where the UNet does not train."""
    text_encoder_lr: float
    """0 where the text encoder does not train."""
    t5xxl_lr: float
    """FLUX: 0 where T5 does not train."""
    network_args: Mapping[str, str]
    """Network options as sd-scripts gets them, k=v texts."""
    optimizer_args: Mapping[str, Any]
    lr_scheduler_args: Mapping[str, Any]

    @classmethod
    def from_config(
        cls, config: KohyaConfig, *, base: Path | None = None, started: float | None = None
    ) -> Job:
        """Work out what ``config`` trains.

        Args:
            config: As loaded or as edited on the page.
            base: Folder for relative paths; the working folder if None.
            started: Time of the start; now if None.

        Raises:
            ConfigError: Fields that contradict each other or that cannot be read: all of them.
        """
        job, wrong = cls.draft(config, base=base, started=started)
        if wrong:
            raise ConfigError(*wrong)
        return job

    @classmethod
    def draft(
        cls, config: KohyaConfig, *, base: Path | None = None, started: float | None = None
    ) -> tuple[Job, list[str]]:
        """As `from_config`, with a sentence for each thing that is wrong.

        A job with any of them cannot be trained: usual values stand where a field cannot be read, so
        that the rest of it can be looked at.
        """
        notes: list[Note] = []
        wrong: list[str] = []
        none: tuple[EngineOptions, dict[str, Any], list[str]] = (EngineOptions(), {}, [])
        engine, overrides, other = _attempt(
            wrong, none, parse_additional_parameters, config.additional_parameters
        )
        notes += [Note("additional_parameters", f"--{name}", "", _no_effect(name)) for name in other]
        values: dict[str, Any] = {}
        for name, (default, reason) in ZERO_MEANS.items():
            if getattr(config, name) in (0, None) and name not in overrides:
                values[name] = default
                if name not in ("vae_batch_size", "max_token_length"):
                    notes.append(Note(name, getattr(config, name), default, reason))
        values |= _gated(config, notes)
        if _attempt(wrong, "sd", _family, config) == "flux":
            overrides = {FLUX_RENAMED.get(name, name): value for name, value in overrides.items()}
            if engine.cache_text_encoder_outputs_to_disk:  # an option for SDXL, whose page has no field
                overrides["flux1_cache_text_encoder_outputs_to_disk"] = True
            values |= _flux_values(config, overrides, notes)
        effective = config.model_copy(update=values)
        for name, value in overrides.items():
            effective = _attempt(wrong, effective, with_values, effective, {name: str(value)})
            now = getattr(effective, name)
            notes.append(Note(name, getattr(config, name), now, "set by additional_parameters"))
        family = _attempt(wrong, "sd", _family, effective)
        unet_lr, text_encoder_lr = _attempt(wrong, (1e-4, 0.0), _rates, effective, engine, notes)
        network_args = _network_args(effective, engine, notes, wrong)
        width, height = _attempt(wrong, (512, 512), parse_resolution, effective.max_resolution)
        seed = effective.seed
        if not seed:
            seed = random.SystemRandom().randrange(1, 2**31)
            notes.append(Note("seed", 0, seed, "0 draws a new seed for every run"))
        wrong += [*_contradictions(effective, engine), *_flux_contradictions(effective, family)]
        if family == "sdxl":
            wrong += _sdxl_contradictions(effective, engine, text_encoder_lr)
        job = cls(
            written=config,
            config=effective,
            engine=engine,
            notes=tuple(notes),
            base=(base or Path.cwd()).resolve(),
            started=time.time() if started is None else started,
            family=family,
            seed=seed,
            width=width,
            height=height,
            unet_lr=unet_lr,
            text_encoder_lr=text_encoder_lr,
            t5xxl_lr=_t5xxl_lr(effective, family, text_encoder_lr, network_args),
            network_args=network_args,
            optimizer_args=_attempt(wrong, {}, parse_arguments, "optimizer_args", effective.optimizer_args),
            lr_scheduler_args=_attempt(
                wrong, {}, parse_arguments, "lr_scheduler_args", effective.lr_scheduler_args
            ),
        )
        return job, list(dict.fromkeys(wrong))

    def path(self, text: str) -> Path:
        """A path as written in the configuration, made absolute from `base`."""
        return (self.base / Path(text).expanduser()).resolve()

    @property
    def output_dir(self) -> Path:
        """Where LoRA files, states, samples and the JSON go."""
        return self.path(self.config.output_dir)

    @property
    def output_name(self) -> str:
        """File name stem of everything saved."""
        return self.config.output_name or "last"

    @property
    def stamp(self) -> str:
        """YYYYmmdd-HHMMSS of the start, local time, as in Kohya's file names."""
        return time.strftime("%Y%m%d-%H%M%S", time.localtime(self.started))

    @property
    def journal(self) -> Path:
        """The run's journal file."""
        return self.output_dir / "logs" / f"{self.output_name}-{self.stamp}" / "journal.jsonl"

    @property
    def origin_step(self) -> int:
        """Steps that network_weights was trained for, where the run counts on from them; else 0."""
        return self.config.origin_step if self.config.network_weights.strip() else 0

    @property
    def origin_epoch(self) -> int:
        """Epochs that network_weights was trained for, where the run counts on from them; else 0."""
        return self.config.origin_epoch if self.config.network_weights.strip() else 0

    @property
    def trains_unet(self) -> bool:
        """Whether UNet layers are optimised."""
        return self.unet_lr > 0

    @property
    def trains_text_encoder(self) -> bool:
        """Whether text encoder layers are optimised (and saved)."""
        return self.text_encoder_lr > 0

    @property
    def caches_sdxl_text(self) -> bool:
        """SDXL: whether the text encoders' outputs are worked out once, before the first step."""
        return _caches_sdxl_text(self.config, self.engine)

    @property
    def trains_t5(self) -> bool:
        """Whether T5 layers are optimised, which only FLUX has."""
        return self.t5xxl_lr > 0

    def with_config(self, **values: Any) -> Job:
        """The same job with some effective values replaced (tests, advice after running out of memory)."""
        return replace(self, config=self.config.model_copy(update=values))


def _attempt(wrong: list[str], otherwise: Value, act: Callable[..., Value], *arguments: Any) -> Value:
    """What ``act`` gives, or ``otherwise`` with what it complains of in ``wrong``."""
    try:
        return act(*arguments)
    except ConfigError as error:
        wrong += error.messages
        return otherwise


def _no_effect(name: str) -> str:
    if name in IGNORED:
        return "says how sd-scripts runs, not what it trains; not needed here"
    return "is not an option that this trainer knows; it has no effect"


def _gated(config: KohyaConfig, notes: list[Note]) -> dict[str, Any]:
    """Fields that the GUI does not send because another one is off (engine facts 0.2, item 5)."""
    values: dict[str, Any] = {}
    multires = config.noise_offset_type == "Multires"
    if multires:
        values |= {"noise_offset": 0.0, "noise_offset_random_strength": False, "adaptive_noise_scale": 0.0}
    else:
        values |= {"multires_noise_iterations": 0}
    if config.lr_scheduler == "constant" and not config.lr_scheduler_type:
        values |= {"lr_warmup": 0}
        if config.lr_warmup:
            notes.append(Note("lr_warmup", config.lr_warmup, 0, 'Kohya\'s page sets it to 0 with "constant"'))
    for name, value in values.items():
        if getattr(config, name) and name != "lr_warmup":
            notes.append(
                Note(
                    name,
                    getattr(config, name),
                    value,
                    f"not sent with noise_offset_type {config.noise_offset_type}",
                )
            )
    return values


def _family(config: KohyaConfig) -> str:
    for flag, name in (
        ("sd3_checkbox", "SD3"),
        ("lumina_checkbox", "Lumina"),
        ("hunyuan_image_checkbox", "HunyuanImage"),
        ("anima_checkbox", "Anima"),
    ):
        if getattr(config, flag, False):
            raise ConfigError(f"this configuration is for {name}, which LoRA Kiln does not train")
    return next((family for box, family in FAMILY_BOXES.items() if getattr(config, box)), "sd")


def _rates(config: KohyaConfig, engine: EngineOptions, notes: list[Note]) -> tuple[float, float]:
    """Learning rates of UNet and text encoder (engine facts 0.2 item 2 and 8.1)."""
    unet, text = float(config.unet_lr or 0), float(config.text_encoder_lr or 0)
    base = float(config.learning_rate or 0)
    if engine.network_train_unet_only and engine.network_train_text_encoder_only:
        raise ConfigError("network_train_unet_only and network_train_text_encoder_only exclude each other")
    if not unet and not text:
        if not base:
            raise ConfigError("learning_rate, unet_lr and text_encoder_lr are all 0: nothing would train")
        notes.append(Note("unet_lr", 0, base, "both rates are 0, so both parts train at learning_rate"))
        unet = text = base
    if engine.network_train_unet_only:
        text = 0.0
    if engine.network_train_text_encoder_only:
        unet = 0.0
    if not text:
        notes.append(Note("text_encoder_lr", 0, 0, "the text encoder is not trained"))
    if not unet:
        notes.append(Note("unet_lr", 0, 0, "the UNet is not trained"))
    return unet, text


FLUX_ENGINE_VALUES: Mapping[str, Any] = {
    "weighting_scheme": "uniform",
    "logit_mean": 0.0,
    "logit_std": 1.0,
    "mode_scale": 1.29,
}
"""Fields of Kohya's SD3 tab that its page does not send for FLUX: sd-scripts' defaults hold."""

FLUX_RENAMED: Mapping[str, str] = {
    "sdxl_cache_text_encoder_outputs": "flux1_cache_text_encoder_outputs",
}
"""Options of sd-scripts whose field is another one for FLUX."""

FLUX_ZERO_MEANS: Mapping[str, float] = {"guidance_scale": 3.5, "discrete_flow_shift": 3.0}
"""FLUX fields in which a written 0 never reaches sd-scripts, and what its parser's default then is."""


def _flux_values(config: KohyaConfig, overrides: Mapping[str, Any], notes: list[Note]) -> dict[str, Any]:
    """Effective values that only a FLUX run has."""
    values = dict(FLUX_ENGINE_VALUES)
    for name, default in FLUX_ZERO_MEANS.items():
        if not getattr(config, name) and name not in overrides:
            values[name] = default
            reason = f"Kohya drops a 0 and its engine uses {default:g}"
            notes.append(Note(name, getattr(config, name), default, reason))
    # Files of the first days of September 2024 have a blank behind "flux_shift".
    values["timestep_sampling"] = config.timestep_sampling.strip()
    if config.model_prediction_type != "raw":
        notes.append(
            Note(
                "model_prediction_type",
                config.model_prediction_type,
                config.model_prediction_type,
                f'"{config.model_prediction_type}" is trained as sd-scripts does, against the velocity, which it '
                'does not predict: "raw" is what FLUX.1 recipes use',
            )
        )
    return values


def _flux_contradictions(config: KohyaConfig, family: str) -> Iterator[str]:
    """Combinations around FLUX that cannot be trained."""
    if family != "flux":
        if config.LoRA_type == "Flux1":
            yield "LoRA_type Flux1 is for FLUX.1 models: tick Flux.1 (Model), or choose Standard"
        return
    if config.LoRA_type in ("Standard", "Kohya LoCon"):
        yield f"LoRA_type {config.LoRA_type} does not fit FLUX.1: choose Flux1"
    if config.model_type == "chroma":
        yield "model_type chroma: LoRA Kiln trains FLUX.1, not Chroma"
    if config.weighted_captions:
        yield "weighted_captions: T5 reads no emphasis, so it cannot be used with FLUX.1: untick it"
    caching = config.flux1_cache_text_encoder_outputs or config.flux1_cache_text_encoder_outputs_to_disk
    if caching and config.train_t5xxl and config.LoRA_type == "Flux1":
        yield (
            "train_t5xxl changes what T5 gives, so flux1_cache_text_encoder_outputs cannot be used with it: "
            "switch one of the two off"
        )
    if config.t5xxl_lr and not config.text_encoder_lr:
        yield "t5xxl_lr needs a text_encoder_lr above 0 too"


def _sdxl_contradictions(config: KohyaConfig, engine: EngineOptions, text_encoder_lr: float) -> Iterator[str]:
    """Combinations that sd-scripts refuses for SDXL (sdxl_train_util.py:verify_sdxl_training_args)."""
    if config.v2:
        yield "v2 and SDXL exclude each other: untick v2 (Model)"
    if text_encoder_lr > 0 and _caches_sdxl_text(config, engine):
        yield (
            "Cache text encoder outputs (SDXL) and training the text encoders exclude each other: "
            "set text_encoder_lr to 0, or untick it"
        )


def _caches_sdxl_text(config: KohyaConfig, engine: EngineOptions) -> bool:
    return config.sdxl_cache_text_encoder_outputs or engine.cache_text_encoder_outputs_to_disk


def _t5xxl_lr(
    config: KohyaConfig, family: str, text_encoder_lr: float, network_args: Mapping[str, str]
) -> float:
    """T5's rate: its own, or that of the text encoder (Kohya's page sends both as a list)."""
    if family != "flux" or network_args.get("train_t5xxl") != "True" or not text_encoder_lr:
        return 0.0
    return float(config.t5xxl_lr or text_encoder_lr)


FLUX_ARGS = (
    "img_attn_dim",
    "txt_attn_dim",
    "img_mlp_dim",
    "txt_mlp_dim",
    "img_mod_dim",
    "txt_mod_dim",
    "single_dim",
    "single_mod_dim",
    "in_dims",
    "train_double_block_indices",
    "train_single_block_indices",
    "split_qkv",
    "train_t5xxl",
)
"""Fields that become options of networks.lora_flux, where they are not empty or off."""


def _network_args(
    config: KohyaConfig, engine: EngineOptions, notes: list[Note], wrong: list[str]
) -> dict[str, str]:
    """Options for the network module, as the GUI sends them (lora_tab_behaviour h)."""
    found: dict[str, Any] = {}
    if config.LoRA_type == "Flux1":
        found |= {name: getattr(config, name) for name in FLUX_ARGS if getattr(config, name)}
        if config.train_lora_ggpo:
            found |= {
                name: getattr(config, name) for name in ("ggpo_beta", "ggpo_sigma") if getattr(config, name)
            }
        if config.split_mode:
            found["train_blocks"] = "single"
            if config.train_blocks != "single":
                reason = "split_mode trains the single blocks only, as in Kohya"
                notes.append(Note("train_blocks", config.train_blocks, "single", reason))
        elif config.train_blocks != "all":
            found["train_blocks"] = config.train_blocks
            reason = (
                "counts here; Kohya's page shows it and does not send it, so its engine trains all blocks"
            )
            notes.append(Note("train_blocks", config.train_blocks, config.train_blocks, reason))
    if config.LoRA_type == "Kohya LoCon":
        found |= {"conv_dim": config.conv_dim, "conv_alpha": config.conv_alpha}
    for name in (
        "down_lr_weight",
        "mid_lr_weight",
        "up_lr_weight",
        "block_lr_zero_threshold",
        "block_dims",
        "block_alphas",
        "conv_block_dims",
        "conv_block_alphas",
    ):
        if getattr(config, name):
            found[name] = getattr(config, name)
    for name in (
        "rank_dropout",
        "module_dropout",
        "loraplus_lr_ratio",
        "loraplus_unet_lr_ratio",
        "loraplus_text_encoder_lr_ratio",
    ):
        if getattr(config, name):
            found[name] = getattr(config, name)
    for part in engine.network_args:
        name, equals, value = part.partition("=")
        if equals:
            found[name] = value
        else:
            wrong.append(f"--network_args: {part!r} must read key=value")
    return {name: str(value) for name, value in found.items()}


def _contradictions(config: KohyaConfig, engine: EngineOptions) -> Iterator[str]:
    """Combinations that sd-scripts refuses, said before anything is loaded."""
    if config.full_fp16 and config.mixed_precision != "fp16":
        yield "full_fp16 needs mixed_precision fp16"
    if config.full_bf16 and config.mixed_precision != "bf16":
        yield "full_bf16 needs mixed_precision bf16"
    if config.full_fp16 and config.full_bf16:
        yield "full_fp16 and full_bf16 exclude each other"
    caching = config.cache_latents or config.cache_latents_to_disk
    if caching and (config.color_aug or config.random_crop):
        which = "color_aug" if config.color_aug else "random_crop"
        yield f"{which} changes the picture every time, so it needs cache_latents switched off"
    if config.adaptive_noise_scale and not config.noise_offset:
        yield "adaptive_noise_scale only scales noise_offset: set noise_offset too, or 0 here"
    if config.scale_v_pred_loss_like_noise_pred and not config.v_parameterization:
        yield "scale_v_pred_loss_like_noise_pred is for v_parameterization only"
    if config.v_pred_like_loss and config.v_parameterization:
        yield "v_pred_like_loss is for models that predict noise, not with v_parameterization"
    if not config.output_dir.strip():
        yield "output_dir is empty: choose the folder that gets the LoRA (Folders)"
    if not config.pretrained_model_name_or_path.strip():
        yield "pretrained_model_name_or_path is empty: choose a base model (Model)"
    if not config.train_data_dir.strip() and not config.dataset_config.strip():
        yield "train_data_dir is empty: choose the folder with the training pictures (Folders)"
    if config.max_token_length not in (75, 150, 225):
        yield f"max_token_length is {config.max_token_length}: allowed are 75, 150 and 225"
    if engine.base_weights_multiplier and len(engine.base_weights_multiplier) > len(engine.base_weights):
        yield "base_weights_multiplier has more values than base_weights has files"
