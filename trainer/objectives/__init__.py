"""Noise, targets and losses, as pure functions of tensors: one file each."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any, Protocol, cast

from trainer import plugins
from trainer.errors import ConfigError

if TYPE_CHECKING:
    import torch

    from trainer.job import Job
    from trainer.objectives._base import Objective

__all__ = ["objective_for"]


class _Module(Protocol):
    def check(self, job: Job) -> None:
        """Refuse settings that cannot be, before anything is loaded."""

    def prepare(self, job: Job, device: torch.device | str) -> Objective[Any, Any]:
        """The objective of ``job``, its tables on ``device``."""


def objective_for(job: Job) -> _Module:
    """The module of trainer.objectives that the job's family names.

    Raises:
        ConfigError: This version does not train the family.
    """
    families = plugins.Folder("trainer.families")
    if job.family not in families.names():
        raise ConfigError(
            f"this version does not train {job.family} models: choose another base model (Model)"
        )
    family = families.get(job.family)
    return cast("_Module", importlib.import_module(f"trainer.objectives.{family.objective}"))
