"""sd-scripts' command-line options that Kohya's page has no field for.

A person passes them through `additional_parameters`; they win over the fields, as in Kohya, where
they come last on the command line. Options that do have a field are given to the field.
"""

from __future__ import annotations

import shlex
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from trainer.config import KohyaConfig
from trainer.errors import ConfigError

__all__ = ["EngineOptions", "parse_additional_parameters"]

RENAMED = {
    "resolution": "max_resolution",
    "optimizer_type": "optimizer",
    "t5xxl_lr": "t5xxl_lr",
    "cache_text_encoder_outputs": "sdxl_cache_text_encoder_outputs",
    "no_half_vae": "sdxl_no_half_vae",
}
"""Options whose field on the page has another name."""

IGNORED = frozenset(
    {
        "console_log_file",
        "console_log_level",
        "console_log_simple",
        "ddp_gradient_as_bucket_view",
        "ddp_static_graph",
        "ddp_timeout",
        "deepspeed",
        "disable_mmap_load_safetensors",
        "dynamo_backend",
        "lowram",
        "mem_eff_attn",
        "sdpa",
        "tokenizer_cache_dir",
        "torch_compile",
        "xformers",
    }
)
"""Options that say how sd-scripts runs, not what it trains."""


class EngineOptions(BaseModel):
    """The options and their defaults, as sd-scripts' parser has them."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    sample_at_first: bool = False
    """Draw the sample prompts once before step 1."""
    network_train_unet_only: bool = False
    network_train_text_encoder_only: bool = False
    network_args: tuple[str, ...] = ()
    network_module: str = ""
    base_weights: tuple[str, ...] = ()
    """LoRA files merged into the frozen base before training."""
    base_weights_multiplier: tuple[float, ...] = ()
    initial_epoch: int | None = None
    initial_step: int | None = None
    skip_until_initial_step: bool = False
    zero_terminal_snr: bool = False
    sigmoid_scale: float = 1.0
    """FLUX: spread of the noise levels of timestep sampling sigmoid, shift and flux_shift."""
    no_metadata: bool = False
    lr_decay_steps: float = 0
    lr_scheduler_timescale: int | None = None
    lr_scheduler_min_lr_ratio: float | None = None
    save_n_epoch_ratio: int | None = None
    log_prefix: str = ""
    alpha_mask: bool = False
    caption_tag_dropout_rate: float = 0.0
    caption_prefix: str = ""
    caption_suffix: str = ""
    caption_separator: str = ","
    keep_tokens_separator: str = ""
    secondary_separator: str = ""
    enable_wildcard: bool = False
    token_warmup_min: int = 1
    token_warmup_step: float = 0.0
    face_crop_aug_range: str = ""
    dataset_repeats: int = 1
    resize_interpolation: str = ""
    no_half_vae: bool = False
    cache_text_encoder_outputs_to_disk: bool = False
    training_comment: str = ""
    metadata_usage_hint: str = ""
    metadata_trigger_phrase: str = ""


def _tokens(text: str) -> list[str]:
    try:
        return shlex.split(text, posix=True)
    except ValueError as error:
        raise ConfigError(
            f"additional_parameters {text!r} cannot be split into options ({error}): check the quotes"
        ) from error


def parse_additional_parameters(text: str) -> tuple[EngineOptions, dict[str, Any], list[str]]:
    """Split the field's text into engine options, overridden fields, and options that have no effect.

    Args:
        text: Command-line options as typed: ``--sample_at_first --max_grad_norm 0``.

    Returns:
        The options; values for `KohyaConfig` fields that the text overrides, still as text or True;
        names of options that are known and say nothing about the training, or are unknown.

    Raises:
        ConfigError: The text cannot be split, or a value is of the wrong type.
    """
    tokens = _tokens(text.replace("\\", "/") if "\\" in text else text)
    given: dict[str, list[str]] = {}
    name = ""
    for token in tokens:
        if token.startswith("--") and len(token) > 2:
            name, _, value = token[2:].partition("=")
            name = name.replace("-", "_")
            given[name] = [value] if value else []
        elif name:
            given[name].append(token)
        else:
            raise ConfigError(
                f"additional_parameters starts with {token!r}: every option needs its name, e.g. --seed 1"
            )
    options: dict[str, Any] = {}
    fields: dict[str, Any] = {}
    other: list[str] = []
    for name, values in given.items():
        field = RENAMED.get(name, name)
        if name in EngineOptions.model_fields:
            options[name] = _option_value(name, values)
        elif field in KohyaConfig.model_fields:
            fields[field] = True if not values else " ".join(values)
        else:
            other.append(name)
    try:
        return EngineOptions(**options), fields, other
    except ValidationError as error:
        first = error.errors()[0]
        raise ConfigError(
            f"--{first['loc'][0]} in additional_parameters has the value {first['input']!r}: {first['msg']}"
        ) from error


def _option_value(name: str, values: list[str]) -> Any:
    kind = EngineOptions.model_fields[name].annotation
    if kind is bool:
        return True
    if "tuple" in str(kind):
        return tuple(values)
    return " ".join(values)
