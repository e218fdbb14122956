"""Tokens and keys, which never reach a file."""

from __future__ import annotations

import re

from trainer.config.kohya import KohyaConfig

__all__ = ["SECRET_SETTINGS", "without_secrets"]

SECRET_SETTINGS = tuple(name for name in KohyaConfig.model_fields if KohyaConfig.setting(name).ui.secret)
"""Settings whose whole value is a secret."""

_OPTION = re.compile(rf"""--(?:{"|".join(SECRET_SETTINGS)})(?:\s*=\s*|\s+)(?:"[^"]*"|'[^']*'|(?!--)\S+)""")


def without_secrets(name: str, text: str) -> str:
    """The text of a setting without what must not be stored; the same text if there is nothing.

    Args:
        name: Name of the setting.
        text: Its value.
    """
    if name in SECRET_SETTINGS:
        return ""
    if name == "additional_parameters":
        clean = _OPTION.sub("", text)
        return clean if clean == text else " ".join(clean.split())
    return text
