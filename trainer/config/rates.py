"""Learning rates of the parts of the network."""

from __future__ import annotations

from typing import Annotated

from trainer.config._section import Section
from trainer.config.ui import LORA_PLUS_TYPES, Number, Ui

__all__ = ["RateFields"]


class RateFields(Section):
    """Learning rates of the parts of the network."""

    text_encoder_lr: Annotated[
        Number,
        Ui(
            tab="Basic",
            label="Text Encoder learning rate",
            widget="number",
            min=0,
            max=1,
            step=1e-06,
            families=("sd15", "sd2", "sdxl", "sd3", "flux1", "lumina", "anima"),
            effect="honoured",
            sd_scripts_arg="--text_encoder_lr as a list [te, t5 or te]",
            since="2022-12-29",
        ),
    ] = 0.0001
    """Learning rate of the text encoder part of the LoRA. Usually lower than that of the UNet; 0 leaves
    the text encoder alone."""

    t5xxl_lr: Annotated[
        Number,
        Ui(
            tab="Basic",
            label="T5XXL learning rate",
            widget="number",
            min=0,
            max=1,
            step=1e-06,
            families=("sd3", "flux1"),
            effect="honoured",
            sd_scripts_arg="second element of --text_encoder_lr",
            since="2024-09-11",
            rare=True,
        ),
    ] = 0
    """Learning rate of the T5 text encoder part."""

    unet_lr: Annotated[
        Number,
        Ui(
            tab="Basic",
            label="Unet learning rate",
            widget="number",
            min=0,
            max=1,
            step=1e-06,
            effect="honoured",
            sd_scripts_arg="--unet_lr",
            since="2022-12-29",
        ),
    ] = 0.0001
    """Learning rate of the UNet part of the LoRA, which learns what things look like. 0 trains the text
    encoder only."""

    loraplus_lr_ratio: Annotated[
        Number,
        Ui(
            tab="Basic",
            label="LoRA+ learning rate ratio",
            widget="number",
            min=0,
            max=128,
            step=1,
            lora_types=LORA_PLUS_TYPES,
            effect="honoured",
            sd_scripts_arg="network_args loraplus_lr_ratio=…",
            since="2024-05-01",
            rare=True,
        ),
    ] = 0
    """LoRA+: let one of the two matrices of each layer learn this many times faster than the other. 16
    is common; 0 is off."""

    loraplus_unet_lr_ratio: Annotated[
        Number,
        Ui(
            tab="Basic",
            label="LoRA+ Unet learning rate ratio",
            widget="number",
            min=0,
            max=128,
            step=1,
            lora_types=LORA_PLUS_TYPES,
            effect="honoured",
            sd_scripts_arg="network_args loraplus_unet_lr_ratio=…",
            since="2024-05-01",
            rare=True,
        ),
    ] = 0
    """The LoRA+ ratio for the UNet alone; it takes precedence over the general one."""

    loraplus_text_encoder_lr_ratio: Annotated[
        Number,
        Ui(
            tab="Basic",
            label="LoRA+ Text Encoder learning rate ratio",
            widget="number",
            min=0,
            max=128,
            step=1,
            lora_types=LORA_PLUS_TYPES,
            effect="honoured",
            sd_scripts_arg="network_args loraplus_text_encoder_lr_ratio=…",
            since="2024-05-01",
            rare=True,
        ),
    ] = 0
    """The LoRA+ ratio for the text encoder alone; it takes precedence over the general one."""
