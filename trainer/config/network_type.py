"""Which kind of network is trained, and from what it starts."""

from __future__ import annotations

from typing import Annotated

from trainer.config._section import Section
from trainer.config.ui import LORA_TYPES, LYCORIS_TYPES, RANKED_TYPES, Ui

__all__ = ["NetworkTypeFields"]


class NetworkTypeFields(Section):
    """Which kind of network is trained, and from what it starts."""

    LoRA_type: Annotated[
        str,
        Ui(
            tab="Basic",
            label="LoRA type",
            widget="dropdown",
            choices=LORA_TYPES,
            trained_choices=("Flux1", "Kohya LoCon", "Standard"),
            effect="adapted",
            reason="Standard, Kohya LoCon and Flux1 are trained; a run with another type is refused before it starts.",
            sd_scripts_arg="--network_module",
            since="2023-03-02",
        ),
    ] = "Standard"
    """Kind of network to train. Standard suits nearly everything; Kohya LoCon also changes the
    convolutions, which helps with styles."""

    LyCORIS_preset: Annotated[
        str,
        Ui(
            tab="Basic",
            label="LyCORIS Preset",
            widget="dropdown",
            choices=(
                "attn-mlp",
                "attn-only",
                "full",
                "full-lin",
                "unet-transformer-only",
                "unet-convblock-only",
            ),
            free_text=True,
            lora_types=LYCORIS_TYPES,
            effect="none",
            reason="The LyCORIS types are not trained by this version.",
            sd_scripts_arg="network_args preset=…",
            since="2023-12-04",
        ),
    ] = "full"
    """Which layers a LyCORIS network changes: a name from the list, or the path of a TOML file."""

    network_weights: Annotated[
        str,
        Ui(
            tab="Basic",
            label="Network weights",
            widget="textbox",
            lora_types=RANKED_TYPES,
            path="file",
            effect="adapted",
            reason="The alpha in the file counts; Kohya trains with the alpha set here and saves that of the file.",
            sd_scripts_arg="--network_weights",
            since="2024-04-20",
        ),
    ] = ""
    """An existing LoRA file to go on training from. Use it to continue a LoRA that was stopped too
    early."""

    dim_from_weights: Annotated[
        bool,
        Ui(
            tab="Basic",
            label="DIM from weights",
            widget="checkbox",
            lora_types=RANKED_TYPES,
            effect="honoured",
            sd_scripts_arg="--dim_from_weights",
            since="2023-05-11",
        ),
    ] = False
    """Take rank and alpha from the LoRA file in "Network weights" instead of the fields here."""
