"""Keys of our own beside Kohya's: kept in the JSON only where somebody set them.

Kohya leaves keys alone that it does not know, so a file with one of these still loads there.
"""

from __future__ import annotations

from dataclasses import dataclass

from trainer.config.kohya import KohyaConfig

__all__ = ["OWN_KEYS", "OwnKey", "own_value"]


@dataclass(frozen=True)
class OwnKey:
    """A setting that Kohya's page does not have."""

    label: str
    choices: tuple[str, ...]
    """Without "", which is the same as leaving the key out."""
    help: str


OWN_KEYS: dict[str, OwnKey] = {}


def own_value(config: KohyaConfig, key: str) -> str:
    """The value of one of `OWN_KEYS` in lower case; "" where it is not set or is none of the choices."""
    value = (config.model_extra or {}).get(key)
    text = value.strip().lower() if isinstance(value, str) else ""
    return text if text in OWN_KEYS[key].choices else ""
