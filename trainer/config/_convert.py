"""One value from a JSON file, a widget or a command line, made into the type of its setting.

The conversions are those that Kohya's page makes while it loads a file, and those that files of
earlier years need on top.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal, get_args

from pydantic.fields import FieldInfo

from trainer.config.ui import Ui

__all__ = ["Kind", "Setting", "convert", "setting_from", "switch"]

Kind = Literal["boolean", "integer", "number", "string"]

INT64_MAX = 2**63 - 1

BLANK_IS_ZERO = frozenset(
    [
        "adaptive_noise_scale",
        "caption_dropout_every_n_epochs",
        "clip_skip",
        "epoch",
        "gradient_accumulation_steps",
        "keep_tokens",
        "learning_rate",
        "lr_warmup",
        "max_data_loader_n_workers",
        "max_train_epochs",
        "max_train_steps",
        "noise_offset",
        "save_every_n_epochs",
        "seed",
        "text_encoder_lr",
        "unet_lr",
    ]
)
"""Number boxes that were text boxes once: Kohya reads an empty text in them as 0, not as the default."""

SEPARATORS = {
    "additional_parameters": " ",
    "lr_scheduler_args": " ",
    "max_resolution": ",",
    "optimizer_args": " ",
    "sample_prompts": "\n",
}
"""What joins the parts where a file holds a list instead of a text."""

OLD_VALUES: dict[str, dict[str, str]] = {
    "LoRA_type": {"LoCon": "LyCORIS/LoCon"},
    "quantized_base": {"INT8": "int8", "NF4": "nf4"},
    "xformers": {"True": "xformers", "true": "xformers", "False": "none", "false": "none"},
}
"""Spellings of earlier versions, by setting."""

TRUE_WORDS = frozenset(["true", "1", "1.0", "yes", "on"])
FALSE_WORDS = frozenset(["false", "0", "0.0", "no", "off", "", "none", "null"])


@dataclass(frozen=True)
class Setting:
    """A setting as the conversions see it."""

    name: str
    kind: Kind
    default: Any
    ui: Ui


def setting_from(name: str, field: FieldInfo) -> Setting:
    """The setting that a field of a section declares.

    Raises:
        TypeError: The field has no `Ui`, or a type that no setting has.
    """
    found = [item for item in field.metadata if isinstance(item, Ui)]
    if len(found) != 1:
        raise TypeError(f"{name} needs exactly one Ui in its annotation")
    kinds: dict[Any, Kind] = {bool: "boolean", int: "integer", str: "string"}
    kind = kinds.get(field.annotation)
    if kind is None:
        if set(get_args(field.annotation)) != {int, float}:
            raise TypeError(f"{name} has the type {field.annotation}, which no setting has")
        kind = "number"
    return Setting(name, kind, field.default, found[0])


def convert(setting: Setting, value: Any) -> tuple[Any, str]:
    """Make ``value`` a value of ``setting``.

    Args:
        setting: The setting.
        value: Anything that a JSON file can hold; None means not set and gives the default.

    Returns:
        The value, and what was done to it as a sentence part ("" if nothing).

    Raises:
        ValueError: It cannot be converted; the message says what is allowed.
    """
    if value is None:
        return setting.default, "empty, so the default is used"
    if setting.kind == "boolean":
        return switch(value)
    if setting.kind == "string":
        return _string(setting, value)
    return _number(setting, value)


def switch(value: Any) -> tuple[bool, str]:
    """Read a switch as `convert` does.

    Raises:
        ValueError: It is neither on nor off.
    """
    if isinstance(value, bool):
        return value, ""
    if isinstance(value, int | float) and value in (0, 1):
        return bool(value), "number read as a switch"
    if isinstance(value, str):
        word = value.strip().lower()
        if word in TRUE_WORDS:
            return True, "text read as a switch"
        if word in FALSE_WORDS:
            return False, "text read as a switch"
    raise ValueError("allowed are true and false")


def _number(setting: Setting, value: Any) -> tuple[int | float, str]:
    whole = setting.kind == "integer"
    allowed = "allowed is a whole number" if whole else "allowed is a number"
    note = ""
    if isinstance(value, bool):
        value, note = int(value), "switch read as a number"
    elif isinstance(value, str):
        text = value.strip()
        if not text:
            if setting.name in BLANK_IS_ZERO:
                return 0, "empty, which Kohya reads as 0"
            return setting.default, "empty, so the default is used"
        value, note = _parse(text, allowed), "text read as a number"
    if not isinstance(value, int | float) or not math.isfinite(_as_float(value, allowed)):
        raise ValueError(allowed)
    if isinstance(value, float) and value.is_integer() and abs(value) < 2**53:
        value = int(value)
    elif whole and isinstance(value, float):
        value, note = math.floor(value + 0.5), "rounded to a whole number"
    if abs(value) > INT64_MAX and isinstance(value, int):
        if whole:
            raise ValueError(f"{allowed} below 2 to the power of 63")
        value, note = float(value), "rounded to a floating-point number"
    return value, note


def _as_float(value: int | float, allowed: str) -> float:
    try:
        return float(value)
    except OverflowError as error:
        raise ValueError(allowed) from error


def _parse(text: str, allowed: str) -> int | float:
    if len(text) > 400:
        raise ValueError(allowed)
    try:
        return int(text)
    except ValueError:
        try:
            return float(text)
        except ValueError as error:
            raise ValueError(allowed) from error


def _string(setting: Setting, value: Any) -> tuple[str, str]:
    note = ""
    if isinstance(value, bool) and setting.name in OLD_VALUES:
        value = str(value)
    if isinstance(value, list) and all(isinstance(part, str | int | float) for part in value):
        separator = SEPARATORS.get(setting.name)
        if separator is not None or not value:
            value, note = (separator or "").join(map(_text, value)), "list read as a text"
    elif isinstance(value, int | float) and not isinstance(value, bool):
        value, note = _text(value), "number read as a text"
    if not isinstance(value, str):
        raise ValueError("allowed is a text")
    valid = value.encode("utf-8", "replace").decode("utf-8")
    if valid != value:
        value, note = valid, "characters that are half of a pair were replaced by a question mark"
    if value in OLD_VALUES.get(setting.name, {}):
        return OLD_VALUES[setting.name][value], "value of an earlier version"
    if setting.ui.choices and value not in setting.ui.choices:
        if value.strip() in setting.ui.choices:
            return value.strip(), "spaces around the value were removed"
        if setting.name == "save_model_as":
            return "safetensors", "a LoRA is saved as ckpt or safetensors, so Kohya takes safetensors"
    return value, note


def _text(value: str | int | float) -> str:
    if isinstance(value, float) and value.is_integer() and abs(value) < 2**53:
        value = int(value)
    try:
        return str(value)
    except ValueError as error:  # more digits than Python turns into a text
        raise ValueError("allowed is a text") from error
