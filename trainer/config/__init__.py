"""Every setting of a run: its declaration, and Kohya's JSON in and out."""

from __future__ import annotations

from trainer.config.kohya import KohyaConfig, help_of, ui_of
from trainer.config.load import lay_over, load, loads
from trainer.config.report import Finding, Loaded
from trainer.config.save import dumps, save
from trainer.config.ui import Ui
from trainer.config.values import with_values

__all__ = [
    "Finding",
    "KohyaConfig",
    "Loaded",
    "Ui",
    "dumps",
    "help_of",
    "lay_over",
    "load",
    "loads",
    "save",
    "ui_of",
    "with_values",
]
