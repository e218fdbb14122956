"""Every setting of a run: its declaration, and Kohya's JSON in and out."""

from __future__ import annotations

from trainer.config.kohya import KohyaConfig, help_of, ui_of
from trainer.config.ui import Ui
from trainer.config.values import with_values

__all__ = ["KohyaConfig", "Ui", "help_of", "ui_of", "with_values"]
