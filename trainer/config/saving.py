"""Saves during the run."""

from __future__ import annotations

from typing import Annotated

from trainer.config._section import Section
from trainer.config.ui import Ui

__all__ = ["SavingFields"]


class SavingFields(Section):
    """Saves during the run."""

    save_every_n_steps: Annotated[
        int,
        Ui(
            tab="Advanced",
            label="Save every N steps",
            widget="number",
            step=1,
            effect="honoured",
            sd_scripts_arg="--save_every_n_steps",
            since="2023-04-27",
        ),
    ] = 0
    """Save a LoRA after every so many steps; 0 is off."""

    save_last_n_steps: Annotated[
        int,
        Ui(
            tab="Advanced",
            label="Save last N steps",
            widget="number",
            step=1,
            effect="honoured",
            sd_scripts_arg="--save_last_n_steps",
            since="2023-04-27",
            rare=True,
        ),
    ] = 0
    """Delete step saves that are more than this many steps old; 0 keeps all."""

    save_last_n_steps_state: Annotated[
        int,
        Ui(
            tab="Advanced",
            label="Save last N steps state",
            widget="number",
            step=1,
            effect="honoured",
            sd_scripts_arg="--save_last_n_steps_state",
            since="2023-04-27",
            rare=True,
        ),
    ] = 0
    """Delete state folders that are more than this many steps old; 0 follows the LoRA files."""

    save_last_n_epochs: Annotated[
        int,
        Ui(
            tab="Advanced",
            label="Save last N epochs",
            widget="number",
            step=1,
            effect="honoured",
            sd_scripts_arg="--save_last_n_epochs",
            since="2024-10-29",
            rare=True,
        ),
    ] = 0
    """Keep only the newest so many epoch saves; 0 keeps all."""

    save_last_n_epochs_state: Annotated[
        int,
        Ui(
            tab="Advanced",
            label="Save last N epochs state",
            widget="number",
            step=1,
            effect="honoured",
            sd_scripts_arg="--save_last_n_epochs_state",
            since="2024-10-18",
            rare=True,
        ),
    ] = 0
    """Keep only the newest so many epoch states; 0 follows the LoRA files."""
