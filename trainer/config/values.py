"""Single settings given as text: ``--set network_dim=16``."""

from __future__ import annotations

import difflib
from collections.abc import Mapping

from trainer.config._convert import convert
from trainer.config.kohya import KohyaConfig
from trainer.config.legacy import RENAMED
from trainer.errors import ConfigError

__all__ = ["with_values"]


def with_values(config: KohyaConfig, values: Mapping[str, str]) -> KohyaConfig:
    """A copy of ``config`` with some settings replaced.

    Args:
        config: Stays as it is.
        values: Texts by the name of the setting, read as the setting's type; names of earlier
            versions are understood.

    Raises:
        ConfigError: An unknown name (close ones are listed), a text that the type cannot hold, or
            one that is not among the choices of a closed list.
    """
    found: dict[str, object] = {}
    for key, text in values.items():
        name = RENAMED.get(key, key)
        if name not in KohyaConfig.model_fields:
            close = difflib.get_close_matches(key, KohyaConfig.model_fields, n=3)
            hint = f"did you mean {' or '.join(close)}?" if close else "see Kohya's JSON for the names"
            raise ConfigError(f"there is no setting named {key!r}: {hint}")
        setting = KohyaConfig.setting(name)
        try:
            found[name], _ = convert(setting, text)
        except ValueError as error:
            raise ConfigError(f"{key} cannot be {_short(text)}: {error}") from error
        allowed = setting.ui.outside(found[name]) if setting.ui.choices else ""
        if allowed:
            raise ConfigError(f"{key} cannot be {_short(text)}: allowed is {allowed}")
    return config.model_copy(update=found)


def _short(text: str) -> str:
    shown = repr(text)
    return shown if len(shown) <= 80 else shown[:77] + "..."
