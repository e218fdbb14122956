"""What the settings of every section have in common."""

from __future__ import annotations

from functools import cache
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationInfo, field_validator

from trainer.config._convert import Setting, convert, setting_from

__all__ = ["Section"]


class Section(BaseModel):
    """A group of settings. Values are converted as those of a file are; what cannot be is an error."""

    model_config = ConfigDict(frozen=True, extra="allow", use_attribute_docstrings=True)

    @field_validator("*", mode="before")
    @classmethod
    def _from_any_kind(cls, value: Any, info: ValidationInfo) -> Any:
        if info.field_name is None:
            return value
        return convert(cls.setting(info.field_name), value)[0]

    @classmethod
    @cache
    def setting(cls, name: str) -> Setting:
        """The declaration of one setting.

        Raises:
            KeyError: There is no such setting.
        """
        return setting_from(name, cls.model_fields[name])
