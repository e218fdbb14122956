"""Kohya's JSON out: what kohya_ss writes, and loads back."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from trainer.config._secrets import without_secrets
from trainer.config.kiln import KilnFields
from trainer.config.kohya import KohyaConfig
from trainer.config.load import HIDDEN, loads
from trainer.config.report import Finding
from trainer.errors import ConfigError
from trainer.files import atomic_write

__all__ = ["dumps", "save"]


def dumps(config: KohyaConfig) -> str:
    """The configuration as Kohya's save button writes it, without tokens; settings of our own where set.

    Sorted by key, two spaces deep, ASCII with escapes, whole numbers without a fraction; keys that
    are no settings are written back as they were.

    Raises:
        ConfigError: A key that is no setting holds something that JSON cannot.
    """
    return _written(_values(config))


def save(config: KohyaConfig, path: Path | str) -> tuple[Finding, ...]:
    """Write the configuration to a file, or leave the file as it was.

    Args:
        config: What to write.
        path: The file; its folder is created.

    Returns:
        What was left out: tokens, which never reach a file.

    Raises:
        ConfigError: The configuration would not load back as it is, or the file cannot be written.
    """
    path = Path(path)
    values = _values(config)
    text = _written(values)
    back = loads(text).config
    for name in values.keys() & KohyaConfig.model_fields.keys():
        if getattr(back, name) != values[name]:
            raise ConfigError(
                f"{path} was not written, because {name} would not load back: it is {values[name]!r} and "
                f"would be read as {getattr(back, name)!r}"
            )
    try:
        atomic_write(path, text)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise ConfigError(f"{path} cannot be written ({reason}): choose another folder or name") from error
    return tuple(
        Finding("unsupported", name, HIDDEN, values[name], f"{name} was saved without its token")
        for name in KohyaConfig.model_fields
        if name in values
        and KohyaConfig.setting(name).kind == "string"
        and values[name] != getattr(config, name)
    )


def _values(config: KohyaConfig) -> dict[str, Any]:
    values: dict[str, Any] = dict(config.model_extra or {})
    for name in KohyaConfig.model_fields:
        value = getattr(config, name)
        if isinstance(value, float) and value.is_integer() and abs(value) < 2**53:
            value = int(value)
        if isinstance(value, str):
            value = without_secrets(name, value)
        if name in KilnFields.model_fields and value == KohyaConfig.setting(name).default:
            values.pop(name, None)
        else:
            values[name] = value
    return values


def _written(values: dict[str, Any]) -> str:
    try:
        return json.dumps(values, indent=2, sort_keys=True)
    except (TypeError, ValueError, RecursionError) as error:
        raise ConfigError(
            f"the configuration cannot be written as JSON ({error}): check its unknown keys"
        ) from error
