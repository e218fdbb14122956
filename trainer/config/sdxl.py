"""SDXL only."""

from __future__ import annotations

from typing import Annotated

from trainer.config._section import Section
from trainer.config.ui import SDXL, Ui

__all__ = ["SdxlFields"]


class SdxlFields(Section):
    """SDXL only."""

    sdxl_cache_text_encoder_outputs: Annotated[
        bool,
        Ui(
            tab="Basic",
            section="SDXL Specific Parameters",
            label="Cache text encoder outputs",
            widget="checkbox",
            families=SDXL,
            shown_with=("sdxl", True),
            effect="adapted",
            reason="As in Kohya, the stored captions are encoded: prefix, suffix and wildcards have no part in it. "
            "With --cache_text_encoder_outputs_to_disk (Additional parameters), files made from another caption or "
            "model are made anew, which Kohya does not notice.",
            sd_scripts_arg="--cache_text_encoder_outputs",
            since="2023-07-02",
        ),
    ] = False
    """Encode the captions once and free the text encoders. Saves memory, but captions cannot be shuffled
    and the text encoders cannot be trained."""

    sdxl_no_half_vae: Annotated[
        bool,
        Ui(
            tab="Basic",
            section="SDXL Specific Parameters",
            label="No half VAE",
            widget="checkbox",
            families=SDXL,
            shown_with=("sdxl", True),
            effect="honoured",
            sd_scripts_arg="--no_half_vae",
            since="2023-07-02",
        ),
    ] = False
    """Run the VAE in full precision. The original VAE of SDXL gives black pictures in fp16 without it."""
