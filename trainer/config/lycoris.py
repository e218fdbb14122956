"""Options of the LyCORIS networks."""

from __future__ import annotations

from typing import Annotated

from trainer.config._section import Section
from trainer.config.ui import LOKR_TYPES, NORM_TYPES, RANK_SCALE_TYPES, TUCKER_TYPES, WEIGHT_TYPES, Number, Ui

__all__ = ["LycorisFields"]


class LycorisFields(Section):
    """Options of the LyCORIS networks."""

    factor: Annotated[
        int,
        Ui(
            tab="Basic",
            section="LyCORIS",
            label="LoKr factor",
            widget="slider",
            min=-1,
            max=64,
            step=1,
            lora_types=LOKR_TYPES,
            effect="none",
            reason="LoKr is not trained by this version.",
            sd_scripts_arg="network_args factor=…",
            since="2023-06-07",
        ),
    ] = -1
    """How LoKr divides each layer into two factors. -1 looks for the most even division; larger values
    give smaller files."""

    bypass_mode: Annotated[
        bool,
        Ui(
            tab="Basic",
            section="LyCORIS",
            label="Bypass mode",
            widget="checkbox",
            lora_types=WEIGHT_TYPES,
            effect="none",
            reason="The LyCORIS types are not trained by this version.",
            sd_scripts_arg="network_args bypass_mode=True/False",
            since="2024-03-19",
            rare=True,
        ),
    ] = False
    """Run the network beside the layer instead of changing the layer's weight."""

    dora_wd: Annotated[
        bool,
        Ui(
            tab="Basic",
            section="LyCORIS",
            label="DoRA Weight Decompose",
            widget="checkbox",
            lora_types=WEIGHT_TYPES,
            effect="none",
            reason="The LyCORIS types are not trained by this version.",
            sd_scripts_arg="network_args dora_wd=True/False",
            since="2024-03-19",
        ),
    ] = False
    """DoRA: learn the length and the direction of each weight row apart. It can be closer to full
    training but is slower."""

    use_cp: Annotated[
        bool,
        Ui(
            tab="Basic",
            section="LyCORIS",
            label="Use CP decomposition",
            widget="checkbox",
            lora_types=("LyCORIS/LoKr",),
            effect="none",
            reason="LoKr is not trained by this version.",
            sd_scripts_arg="network_args use_cp=True/False",
            since="2023-06-07",
            rare=True,
        ),
    ] = False
    """Older name of the Tucker decomposition, which makes convolution layers smaller."""

    use_tucker: Annotated[
        bool,
        Ui(
            tab="Basic",
            section="LyCORIS",
            label="Use Tucker decomposition",
            widget="checkbox",
            lora_types=TUCKER_TYPES,
            effect="none",
            reason="The LyCORIS types are not trained by this version.",
            sd_scripts_arg="network_args use_tucker=…",
            since="2023-12-10",
            rare=True,
        ),
    ] = False
    """Split convolution layers further (Tucker decomposition): a smaller file with a little less
    capacity."""

    use_scalar: Annotated[
        bool,
        Ui(
            tab="Basic",
            section="LyCORIS",
            label="Use Scalar",
            widget="checkbox",
            lora_types=WEIGHT_TYPES,
            effect="none",
            reason="The LyCORIS types are not trained by this version.",
            sd_scripts_arg="network_args use_scalar=True/False",
            since="2023-12-10",
            rare=True,
        ),
    ] = False
    """Learn one extra strength for each layer, which starts the network in another way."""

    rank_dropout_scale: Annotated[
        bool,
        Ui(
            tab="Basic",
            section="LyCORIS",
            label="Rank Dropout Scale",
            widget="checkbox",
            lora_types=RANK_SCALE_TYPES,
            effect="none",
            reason="The LyCORIS types are not trained by this version.",
            sd_scripts_arg="network_args rank_dropout_scale=True/False",
            since="2023-12-10",
            rare=True,
        ),
    ] = False
    """Strengthen the remaining ranks when rank dropout leaves some out, so that the total stays the
    same."""

    constrain: Annotated[
        Number,
        Ui(
            tab="Basic",
            section="LyCORIS",
            label="Constrain OFT",
            widget="number",
            step=1,
            lora_types=("LyCORIS/Diag-OFT",),
            effect="none",
            reason="Diag-OFT is not trained by this version.",
            sd_scripts_arg="network_args constraint=…",
            since="2023-12-10",
            rare=True,
        ),
    ] = 0
    """Limit on how far Diag-OFT may turn a layer. 0 sets no limit."""

    rescaled: Annotated[
        bool,
        Ui(
            tab="Basic",
            section="LyCORIS",
            label="Rescaled OFT",
            widget="checkbox",
            lora_types=("LyCORIS/Diag-OFT",),
            effect="none",
            reason="Diag-OFT is not trained by this version.",
            sd_scripts_arg="network_args rescaled=True/False",
            since="2023-12-10",
            rare=True,
        ),
    ] = False
    """Let Diag-OFT also learn the size of its change, not only the rotation."""

    train_norm: Annotated[
        bool,
        Ui(
            tab="Basic",
            section="LyCORIS",
            label="Train Norm",
            widget="checkbox",
            lora_types=NORM_TYPES,
            effect="none",
            reason="The LyCORIS types are not trained by this version.",
            sd_scripts_arg="network_args train_norm=True/False",
            since="2023-12-10",
            rare=True,
        ),
    ] = False
    """Train the normalisation layers too."""

    decompose_both: Annotated[
        bool,
        Ui(
            tab="Basic",
            section="LyCORIS",
            label="LoKr decompose both",
            widget="checkbox",
            lora_types=("LyCORIS/LoKr",),
            effect="none",
            reason="LoKr is not trained by this version.",
            sd_scripts_arg="network_args decompose_both=True/False",
            since="2023-06-07",
            rare=True,
        ),
    ] = False
    """Give both factors of LoKr a low rank: a smaller file with less capacity."""

    train_on_input: Annotated[
        bool,
        Ui(
            tab="Basic",
            section="LyCORIS",
            label="iA3 train on input",
            widget="checkbox",
            lora_types=("LyCORIS/iA3",),
            effect="none",
            reason="iA3 is not trained by this version.",
            sd_scripts_arg="network_args train_on_input=True/False",
            since="2023-06-07",
            rare=True,
        ),
    ] = True
    """Let iA3 scale what goes into a layer rather than what comes out."""
