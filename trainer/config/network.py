"""Size, strength and dropouts of the network."""

from __future__ import annotations

from typing import Annotated

from trainer.config._section import Section
from trainer.config.ui import (
    CONVOLUTION_TYPES,
    DROPOUT_TYPES,
    DYLORA_TYPES,
    FLUX,
    NETWORK_DROPOUT_TYPES,
    NORM_SCALE_TYPES,
    RANKED_TYPES,
    Number,
    Ui,
)

__all__ = ["NetworkFields"]


class NetworkFields(Section):
    """Size, strength and dropouts of the network."""

    network_dim: Annotated[
        int,
        Ui(
            tab="Basic",
            label="Network Rank (Dimension)",
            widget="slider",
            min=1,
            max=512,
            step=1,
            lora_types=RANKED_TYPES,
            effect="honoured",
            sd_scripts_arg="--network_dim",
            since="2022-12-29",
        ),
    ] = 8
    """Rank of the LoRA: how much it can hold. 8 to 32 suits most subjects; larger makes bigger files and
    learns unwanted details sooner."""

    network_alpha: Annotated[
        Number,
        Ui(
            tab="Basic",
            label="Network Alpha",
            widget="slider",
            min=1e-05,
            max=1024,
            step=1e-05,
            lora_types=RANKED_TYPES,
            effect="honoured",
            sd_scripts_arg="--network_alpha",
            since="2023-01-22",
        ),
    ] = 1
    """Strength of the LoRA in training: changes are multiplied by alpha divided by rank. Half the rank
    is common; a smaller alpha needs a higher learning rate."""

    conv_dim: Annotated[
        int,
        Ui(
            tab="Basic",
            label="Convolution Rank (Dimension)",
            widget="slider",
            min=0,
            max=512,
            step=1,
            lora_types=CONVOLUTION_TYPES,
            effect="honoured",
            sd_scripts_arg="network_args conv_dim=…",
            since="2023-03-01",
        ),
    ] = 1
    """Rank of the convolution layers (Kohya LoCon). 0 leaves them out."""

    conv_alpha: Annotated[
        int,
        Ui(
            tab="Basic",
            label="Convolution Alpha",
            widget="slider",
            min=0,
            max=512,
            step=1,
            lora_types=CONVOLUTION_TYPES,
            effect="honoured",
            sd_scripts_arg="network_args conv_alpha=…",
            since="2023-03-01",
        ),
    ] = 1
    """Alpha of the convolution layers; their changes are multiplied by alpha divided by their rank."""

    scale_weight_norms: Annotated[
        Number,
        Ui(
            tab="Basic",
            label="Scale weight norms",
            widget="slider",
            min=0,
            max=10,
            step=0.01,
            lora_types=NORM_SCALE_TYPES,
            effect="honoured",
            sd_scripts_arg="--scale_weight_norms",
            since="2023-06-03",
        ),
    ] = 0
    """Keeps each layer's change below this size, against overtraining. 1 is the usual value, 0 is off."""

    network_dropout: Annotated[
        Number,
        Ui(
            tab="Basic",
            label="Network dropout",
            widget="slider",
            min=0,
            max=1,
            step=0.01,
            lora_types=NETWORK_DROPOUT_TYPES,
            effect="honoured",
            sd_scripts_arg="--network_dropout",
            since="2023-06-03",
        ),
    ] = 0
    """Chance that a value inside the LoRA is left out in a step. 0.1 to 0.3 makes it less likely to
    learn pictures by heart."""

    rank_dropout: Annotated[
        Number,
        Ui(
            tab="Basic",
            label="Rank dropout",
            widget="slider",
            min=0,
            max=1,
            step=0.01,
            lora_types=DROPOUT_TYPES,
            effect="honoured",
            sd_scripts_arg="network_args rank_dropout=…",
            since="2023-06-03",
        ),
    ] = 0
    """Chance that a whole rank is left out in a step, against overtraining. 0.1 to 0.3 is usual."""

    module_dropout: Annotated[
        Number,
        Ui(
            tab="Basic",
            label="Module dropout",
            widget="slider",
            min=0,
            max=1,
            step=0.01,
            lora_types=DROPOUT_TYPES,
            effect="honoured",
            sd_scripts_arg="network_args module_dropout=…",
            since="2023-06-03",
        ),
    ] = 0
    """Chance that a whole layer of the LoRA is skipped in a step, against overtraining. 0.1 to 0.3 is
    usual."""

    unit: Annotated[
        int,
        Ui(
            tab="Basic",
            label="DyLoRA Unit / Block size",
            widget="slider",
            min=1,
            max=64,
            step=1,
            lora_types=DYLORA_TYPES,
            effect="none",
            reason="DyLoRA is not trained by this version.",
            sd_scripts_arg="network_args unit=…",
            since="2023-04-15",
            rare=True,
        ),
    ] = 1
    """Distance between the ranks that DyLoRA trains inside each other."""

    train_lora_ggpo: Annotated[
        bool,
        Ui(
            tab="Basic",
            label="Train LoRA GGPO",
            widget="checkbox",
            families=FLUX,
            lora_types=("Flux1",),
            shown_with=("flux1_checkbox", True),
            effect="honoured",
            sd_scripts_arg=None,
            since="2025-03-30",
            rare=True,
        ),
    ] = False
    """Disturb the weights a little while training, so that the result depends less on single pictures."""

    ggpo_sigma: Annotated[
        Number,
        Ui(
            tab="Basic",
            label="GGPO sigma",
            widget="number",
            step=1,
            families=FLUX,
            lora_types=("Flux1",),
            shown_with=("train_lora_ggpo", True),
            effect="honoured",
            sd_scripts_arg="network_args ggpo_sigma=…",
            since="2025-03-30",
            rare=True,
        ),
    ] = 0.03
    """Strength of that disturbance."""

    ggpo_beta: Annotated[
        Number,
        Ui(
            tab="Basic",
            label="GGPO beta",
            widget="number",
            step=1,
            families=FLUX,
            lora_types=("Flux1",),
            shown_with=("train_lora_ggpo", True),
            effect="honoured",
            sd_scripts_arg="network_args ggpo_beta=…",
            since="2025-03-30",
            rare=True,
        ),
    ] = 0.01
    """How much the size of the gradients adds to that disturbance."""
