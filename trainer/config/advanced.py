"""Batches, the VAE and the shape of the loss."""

from __future__ import annotations

from typing import Annotated

from trainer.config._section import Section
from trainer.config.ui import Number, Ui

__all__ = ["AdvancedFields"]


class AdvancedFields(Section):
    """Batches, the VAE and the shape of the loss."""

    gradient_accumulation_steps: Annotated[
        int,
        Ui(
            tab="Advanced",
            label="Gradient accumulate steps",
            widget="slider",
            min=1,
            max=120,
            step=1,
            effect="honoured",
            sd_scripts_arg="--gradient_accumulation_steps",
            since="2023-01-08",
        ),
    ] = 1
    """Add up this many batches before each change of the weights. It acts like a larger batch without
    its memory."""

    weighted_captions: Annotated[
        bool,
        Ui(
            tab="Advanced",
            label="Weighted captions",
            widget="checkbox",
            families=("sd15", "sd2", "sdxl", "lumina"),
            effect="honoured",
            sd_scripts_arg="--weighted_captions",
            since="2023-04-09",
            rare=True,
        ),
    ] = False
    """Read weights in captions such as (red hair:1.3), as in the web UIs."""

    prior_loss_weight: Annotated[
        Number,
        Ui(
            tab="Advanced",
            label="Prior loss weight",
            widget="number",
            step=1,
            effect="honoured",
            sd_scripts_arg="--prior_loss_weight",
            since="2022-12-28",
        ),
    ] = 1
    """How much regularisation pictures count compared with your own. Lower protects the class less."""

    vae: Annotated[
        str,
        Ui(
            tab="Advanced",
            label="VAE (Optional: Path to checkpoint of vae for training)",
            widget="dropdown",
            free_text=True,
            families=("sd15", "sd2", "sdxl", "sd3"),
            path="model",
            effect="honoured",
            sd_scripts_arg="--vae",
            since="2023-11-03",
        ),
    ] = ""
    """Another VAE for encoding the pictures. If it is empty, the one inside the base model is used."""

    additional_parameters: Annotated[
        str,
        Ui(
            tab="Advanced",
            label="Additional parameters",
            widget="textbox",
            effect="adapted",
            reason="Options of sd-scripts that this trainer knows are obeyed; a check of the run lists the others.",
            sd_scripts_arg="appended to the script's command line",
            since="2023-03-07",
        ),
    ] = ""
    """Options of sd-scripts that have no field here, written as on a command line, for example
    --sample_at_first. They win over the fields."""

    loss_type: Annotated[
        str,
        Ui(
            tab="Advanced",
            section="Scheduled Huber Loss",
            label="Loss type",
            widget="dropdown",
            choices=("huber", "smooth_l1", "l1", "l2"),
            effect="honoured",
            sd_scripts_arg="--loss_type",
            since="2024-04-07",
        ),
    ] = "l2"
    """How errors are counted. l2 is standard; huber, smooth_l1 and l1 care less about single bad
    pictures."""

    huber_schedule: Annotated[
        str,
        Ui(
            tab="Advanced",
            section="Scheduled Huber Loss",
            label="Huber schedule",
            widget="dropdown",
            choices=("constant", "exponential", "snr"),
            effect="honoured",
            sd_scripts_arg="--huber_schedule",
            since="2024-04-07",
            rare=True,
        ),
    ] = "snr"
    """Where huber and smooth_l1 switch from squared to plain errors: the same everywhere, or depending
    on how noisy the picture is."""

    huber_c: Annotated[
        Number,
        Ui(
            tab="Advanced",
            section="Scheduled Huber Loss",
            label="Huber C",
            widget="number",
            min=0,
            max=1,
            step=0.01,
            effect="honoured",
            sd_scripts_arg="--huber_c",
            since="2024-04-07",
            rare=True,
        ),
    ] = 0.1
    """Error size at which huber and smooth_l1 switch. Smaller ignores outliers more but keeps fewer
    details."""

    huber_scale: Annotated[
        Number,
        Ui(
            tab="Advanced",
            section="Scheduled Huber Loss",
            label="Huber scale",
            widget="number",
            min=0,
            max=10,
            step=0.01,
            effect="honoured",
            sd_scripts_arg="--huber_scale",
            since="2024-12-30",
            rare=True,
        ),
    ] = 1
    """Multiplies that error size. It has no effect with the schedule "snr"."""
