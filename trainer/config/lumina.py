"""Lumina Image 2.0 only."""

from __future__ import annotations

from typing import Annotated

from trainer.config._section import Section
from trainer.config.ui import LUMINA, Number, Ui

__all__ = ["LuminaFields"]


class LuminaFields(Section):
    """Lumina Image 2.0 only."""

    lumina_cache_text_encoder_outputs: Annotated[
        bool,
        Ui(
            tab="Basic",
            section="Lumina Image 2.0",
            label="Cache Text Encoder Outputs",
            widget="checkbox",
            families=LUMINA,
            shown_with=("lumina_checkbox", True),
            effect="none",
            reason="Lumina is not trained.",
            sd_scripts_arg="--cache_text_encoder_outputs",
            since="2026-07-09",
            rare=True,
        ),
    ] = False
    """Encode the captions once and free the text encoder."""

    lumina_cache_text_encoder_outputs_to_disk: Annotated[
        bool,
        Ui(
            tab="Basic",
            section="Lumina Image 2.0",
            label="Cache Text Encoder Outputs to Disk",
            widget="checkbox",
            families=LUMINA,
            shown_with=("lumina_checkbox", True),
            effect="none",
            reason="Lumina is not trained.",
            sd_scripts_arg="--cache_text_encoder_outputs_to_disk",
            since="2026-07-09",
            rare=True,
        ),
    ] = False
    """Keep the encoded captions in files, so that the next run starts faster."""

    lumina_gemma2: Annotated[
        str,
        Ui(
            tab="Basic",
            section="Lumina Image 2.0",
            label="Gemma2 Path",
            widget="textbox",
            families=LUMINA,
            shown_with=("lumina_checkbox", True),
            path="file",
            effect="none",
            reason="Lumina is not trained.",
            sd_scripts_arg="--gemma2",
            since="2026-02-10",
            rare=True,
        ),
    ] = ""
    """File of the Gemma-2 text encoder."""

    lumina_ae: Annotated[
        str,
        Ui(
            tab="Basic",
            section="Lumina Image 2.0",
            label="AE Path",
            widget="textbox",
            families=LUMINA,
            shown_with=("lumina_checkbox", True),
            path="file",
            effect="none",
            reason="Lumina is not trained.",
            sd_scripts_arg="--ae",
            since="2026-02-10",
            rare=True,
        ),
    ] = ""
    """File of the autoencoder, which turns pictures into latents."""

    lumina_discrete_flow_shift: Annotated[
        Number,
        Ui(
            tab="Basic",
            section="Lumina Image 2.0",
            label="Discrete Flow Shift",
            widget="number",
            min=-1024,
            max=1024,
            step=0.01,
            families=LUMINA,
            shown_with=("lumina_checkbox", True),
            effect="none",
            reason="Lumina is not trained.",
            sd_scripts_arg="--discrete_flow_shift",
            since="2026-02-10",
            rare=True,
        ),
    ] = 6
    """Moves training towards noisier pictures; higher cares more for composition than for detail."""

    lumina_model_prediction_type: Annotated[
        str,
        Ui(
            tab="Basic",
            section="Lumina Image 2.0",
            label="Model Prediction Type",
            widget="dropdown",
            choices=("raw", "additive", "sigma_scaled"),
            families=LUMINA,
            shown_with=("lumina_checkbox", True),
            effect="none",
            reason="Lumina is not trained.",
            sd_scripts_arg="--model_prediction_type",
            since="2026-02-10",
            rare=True,
        ),
    ] = "raw"
    """How the output of the model is read. "raw" fits how it was trained."""

    lumina_timestep_sampling: Annotated[
        str,
        Ui(
            tab="Basic",
            section="Lumina Image 2.0",
            label="Timestep Sampling",
            widget="dropdown",
            choices=("sigma", "uniform", "sigmoid", "shift", "nextdit_shift", "flux_shift"),
            families=LUMINA,
            shown_with=("lumina_checkbox", True),
            effect="none",
            reason="Lumina is not trained.",
            sd_scripts_arg="--timestep_sampling",
            since="2026-02-10",
            rare=True,
        ),
    ] = "shift"
    """How noisy the training pictures are made."""

    lumina_sigmoid_scale: Annotated[
        Number,
        Ui(
            tab="Basic",
            section="Lumina Image 2.0",
            label="Sigmoid Scale",
            widget="number",
            min=0,
            max=1024,
            step=0.01,
            families=LUMINA,
            shown_with=("lumina_checkbox", True),
            effect="none",
            reason="Lumina is not trained.",
            sd_scripts_arg="--sigmoid_scale",
            since="2026-02-10",
            rare=True,
        ),
    ] = 1
    """Width of the sigmoid sampling: higher spreads training over more noise levels."""

    lumina_gemma2_max_token_length: Annotated[
        int,
        Ui(
            tab="Basic",
            section="Lumina Image 2.0",
            label="Gemma2 Max Token Length",
            widget="number",
            min=1,
            max=4096,
            step=1,
            families=LUMINA,
            shown_with=("lumina_checkbox", True),
            effect="none",
            reason="Lumina is not trained.",
            sd_scripts_arg="--gemma2_max_token_length",
            since="2026-02-10",
            rare=True,
        ),
    ] = 256
    """Longest caption for Gemma-2, in tokens."""

    lumina_system_prompt: Annotated[
        str,
        Ui(
            tab="Basic",
            section="Lumina Image 2.0",
            label="System Prompt",
            widget="textbox",
            families=LUMINA,
            shown_with=("lumina_checkbox", True),
            effect="none",
            reason="Lumina is not trained.",
            sd_scripts_arg="--system_prompt",
            since="2026-02-10",
            rare=True,
        ),
    ] = ""
    """Instruction put before every caption."""

    lumina_use_flash_attn: Annotated[
        bool,
        Ui(
            tab="Basic",
            section="Lumina Image 2.0",
            label="Use Flash Attention",
            widget="checkbox",
            families=LUMINA,
            shown_with=("lumina_checkbox", True),
            effect="none",
            reason="Lumina is not trained.",
            sd_scripts_arg="--use_flash_attn",
            since="2026-02-10",
            rare=True,
        ),
    ] = False
    """Compute attention with the flash-attention library."""

    lumina_use_sage_attn: Annotated[
        bool,
        Ui(
            tab="Basic",
            section="Lumina Image 2.0",
            label="Use Sage Attention",
            widget="checkbox",
            families=LUMINA,
            shown_with=("lumina_checkbox", True),
            effect="none",
            reason="Lumina is not trained.",
            sd_scripts_arg="--use_sage_attn",
            since="2026-02-10",
            rare=True,
        ),
    ] = False
    """Compute attention with the SageAttention library."""
