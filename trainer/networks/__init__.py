"""Network types: one file each."""

from __future__ import annotations

from typing import TYPE_CHECKING

from trainer import plugins
from trainer.errors import ConfigError

if TYPE_CHECKING:
    from trainer.job import Job
    from trainer.networks._base import Network

__all__ = ["plugin_for"]


def plugin_for(job: Job) -> type[Network]:
    """The network class that serves the job's LoRA_type.

    Raises:
        ConfigError: None does; the message lists those that are trained.
    """
    folder = plugins.Folder("trainer.networks")
    known: list[str] = []
    for name in folder.names():
        plugin: type[Network] = folder.get(name)
        if job.config.LoRA_type in plugin.kohya_types:
            return plugin
        known += plugin.kohya_types
    raise ConfigError(
        f"LoRA_type {job.config.LoRA_type!r} is not trained by this version: choose {' or '.join(sorted(known))}"
    )
