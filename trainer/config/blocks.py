"""Rates, ranks and alphas for single blocks of the UNet."""

from __future__ import annotations

from typing import Annotated

from trainer.config._section import Section
from trainer.config.ui import BLOCK_TYPES, SD, Ui

__all__ = ["BlockFields"]


class BlockFields(Section):
    """Rates, ranks and alphas for single blocks of the UNet."""

    down_lr_weight: Annotated[
        str,
        Ui(
            tab="Advanced",
            section="Weights",
            label="Down LR weights",
            widget="textbox",
            families=SD,
            lora_types=BLOCK_TYPES,
            effect="honoured",
            sd_scripts_arg="network_args down_lr_weight=…",
            since="2023-04-05",
            rare=True,
        ),
    ] = ""
    """How fast each input block of the UNet learns: 12 numbers separated by commas, or a curve such as
    cosine+.5. 0 leaves a block out."""

    mid_lr_weight: Annotated[
        str,
        Ui(
            tab="Advanced",
            section="Weights",
            label="Mid LR weights",
            widget="textbox",
            families=SD,
            lora_types=BLOCK_TYPES,
            effect="honoured",
            sd_scripts_arg="network_args mid_lr_weight=…",
            since="2023-04-05",
            rare=True,
        ),
    ] = ""
    """How fast the middle block of the UNet learns, compared with the others."""

    up_lr_weight: Annotated[
        str,
        Ui(
            tab="Advanced",
            section="Weights",
            label="Up LR weights",
            widget="textbox",
            families=SD,
            lora_types=BLOCK_TYPES,
            effect="honoured",
            sd_scripts_arg="network_args up_lr_weight=…",
            since="2023-04-05",
            rare=True,
        ),
    ] = ""
    """How fast each output block of the UNet learns: 12 numbers separated by commas, or a curve such as
    cosine+.5. 0 leaves a block out."""

    block_lr_zero_threshold: Annotated[
        str,
        Ui(
            tab="Advanced",
            section="Weights",
            label="Blocks LR zero threshold",
            widget="textbox",
            families=SD,
            lora_types=BLOCK_TYPES,
            effect="honoured",
            sd_scripts_arg="network_args block_lr_zero_threshold=…",
            since="2023-04-05",
            rare=True,
        ),
    ] = ""
    """Blocks whose factor is not above this number are left out."""

    block_dims: Annotated[
        str,
        Ui(
            tab="Advanced",
            section="Blocks",
            label="Block dims",
            widget="textbox",
            families=SD,
            lora_types=BLOCK_TYPES,
            effect="honoured",
            sd_scripts_arg="network_args block_dims=…",
            since="2023-04-05",
            rare=True,
        ),
    ] = ""
    """Rank for each block of the UNet: 25 numbers separated by commas. Empty uses the network rank
    everywhere."""

    block_alphas: Annotated[
        str,
        Ui(
            tab="Advanced",
            section="Blocks",
            label="Block alphas",
            widget="textbox",
            families=SD,
            lora_types=BLOCK_TYPES,
            effect="honoured",
            sd_scripts_arg="network_args block_alphas=…",
            since="2023-04-05",
            rare=True,
        ),
    ] = ""
    """Alpha for each block of the UNet: 25 numbers separated by commas. Empty uses the network alpha
    everywhere."""

    conv_block_dims: Annotated[
        str,
        Ui(
            tab="Advanced",
            section="Conv",
            label="Conv dims",
            widget="textbox",
            families=SD,
            lora_types=BLOCK_TYPES,
            effect="honoured",
            sd_scripts_arg="network_args conv_block_dims=…",
            since="2023-07-19",
            rare=True,
        ),
    ] = ""
    """Convolution rank for each block of the UNet: 25 numbers separated by commas. Empty uses the
    convolution rank everywhere."""

    conv_block_alphas: Annotated[
        str,
        Ui(
            tab="Advanced",
            section="Conv",
            label="Conv alphas",
            widget="textbox",
            families=SD,
            lora_types=BLOCK_TYPES,
            effect="honoured",
            sd_scripts_arg="network_args conv_block_alphas=…",
            since="2023-07-19",
            rare=True,
        ),
    ] = ""
    """Convolution alpha for each block of the UNet: 25 numbers separated by commas. Empty uses the
    convolution alpha everywhere."""
