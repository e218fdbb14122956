"""Stable Diffusion 3 only."""

from __future__ import annotations

from typing import Annotated

from trainer.config._section import Section
from trainer.config.ui import SD3, Number, Ui

__all__ = ["Sd3Fields"]


class Sd3Fields(Section):
    """Stable Diffusion 3 only."""

    sd3_cache_text_encoder_outputs: Annotated[
        bool,
        Ui(
            tab="Basic",
            section="SD3",
            label="Cache Text Encoder Outputs",
            widget="checkbox",
            families=SD3,
            shown_with=("sd3_checkbox", True),
            effect="none",
            reason="SD3 is not trained.",
            sd_scripts_arg="--cache_text_encoder_outputs",
            since="2024-12-31",
        ),
    ] = False
    """Encode the captions once and free the text encoders."""

    sd3_cache_text_encoder_outputs_to_disk: Annotated[
        bool,
        Ui(
            tab="Basic",
            section="SD3",
            label="Cache Text Encoder Outputs to Disk",
            widget="checkbox",
            families=SD3,
            shown_with=("sd3_checkbox", True),
            effect="none",
            reason="SD3 is not trained.",
            sd_scripts_arg="--cache_text_encoder_outputs_to_disk",
            since="2024-12-31",
        ),
    ] = False
    """Keep the encoded captions in files, so that the next run starts faster."""

    sd3_fused_backward_pass: Annotated[
        bool,
        Ui(
            tab="Basic",
            section="SD3",
            label="Fused Backward Pass",
            widget="checkbox",
            families=SD3,
            shown_with=("sd3_checkbox", True),
            effect="none",
            reason="SD3 is not trained.",
            sd_scripts_arg="--fused_backward_pass",
            since="2024-12-31",
            rare=True,
        ),
    ] = False
    """Update each weight as soon as its gradient is known, which saves memory. It works with Adafactor
    only."""

    clip_g: Annotated[
        str,
        Ui(
            tab="Basic",
            section="SD3",
            label="CLIP-G Path",
            widget="textbox",
            families=SD3,
            shown_with=("sd3_checkbox", True),
            path="file",
            effect="none",
            reason="SD3 is not trained.",
            sd_scripts_arg="--clip_g",
            since="2024-12-31",
        ),
    ] = ""
    """File of the CLIP-G text encoder, if the checkpoint does not hold it."""

    clip_g_dropout_rate: Annotated[
        Number,
        Ui(
            tab="Basic",
            section="SD3",
            label="CLIP-G Dropout Rate",
            widget="number",
            min=0,
            step=1,
            families=SD3,
            shown_with=("sd3_checkbox", True),
            effect="none",
            reason="SD3 is not trained.",
            sd_scripts_arg="--clip_g_dropout_rate",
            since="2024-12-31",
            rare=True,
        ),
    ] = 0
    """Chance that a caption reaches the model without its CLIP-G part."""

    sd3_clip_l: Annotated[
        str,
        Ui(
            tab="Basic",
            section="SD3",
            label="CLIP-L Path",
            widget="textbox",
            families=SD3,
            shown_with=("sd3_checkbox", True),
            path="file",
            effect="none",
            reason="SD3 is not trained.",
            sd_scripts_arg="--clip_l",
            since="2024-12-31",
        ),
    ] = ""
    """File of the CLIP-L text encoder, if the checkpoint does not hold it."""

    sd3_clip_l_dropout_rate: Annotated[
        Number,
        Ui(
            tab="Basic",
            section="SD3",
            label="CLIP-L Dropout Rate",
            widget="number",
            min=0,
            step=1,
            families=SD3,
            shown_with=("sd3_checkbox", True),
            effect="none",
            reason="SD3 is not trained.",
            sd_scripts_arg="--clip_l_dropout_rate",
            since="2024-12-31",
            rare=True,
        ),
    ] = 0
    """Chance that a caption reaches the model without its CLIP-L part."""

    sd3_disable_mmap_load_safetensors: Annotated[
        bool,
        Ui(
            tab="Basic",
            section="SD3",
            label="Disable mmap load safe tensors",
            widget="checkbox",
            families=SD3,
            shown_with=("sd3_checkbox", True),
            effect="none",
            reason="SD3 is not trained.",
            sd_scripts_arg="--disable_mmap_load_safetensors",
            since="2024-12-31",
            rare=True,
        ),
    ] = False
    """Read the model file in one go. It can be faster on some network drives."""

    sd3_enable_scaled_pos_embed: Annotated[
        bool,
        Ui(
            tab="Basic",
            section="SD3",
            label="Enable Scaled Positional Embeddings",
            widget="checkbox",
            families=SD3,
            shown_with=("sd3_checkbox", True),
            effect="none",
            reason="SD3 is not trained.",
            sd_scripts_arg="--enable_scaled_pos_embed",
            since="2024-12-31",
            rare=True,
        ),
    ] = False
    """Fit the position information to the picture size, for SD 3.5 with several resolutions."""

    logit_mean: Annotated[
        Number,
        Ui(
            tab="Basic",
            section="SD3",
            label="Logit Mean",
            widget="number",
            step=1,
            families=SD3,
            shown_with=("sd3_checkbox", True),
            effect="adapted",
            reason="SD3 is not trained; FLUX.1 takes it from the additional parameters only, as in Kohya.",
            sd_scripts_arg="--logit_mean",
            since="2024-12-31",
            rare=True,
        ),
    ] = 0
    """Centre of the noise levels that training practises: above 0 noisier, below 0 cleaner."""

    logit_std: Annotated[
        Number,
        Ui(
            tab="Basic",
            section="SD3",
            label="Logit Std",
            widget="number",
            step=1,
            families=SD3,
            shown_with=("sd3_checkbox", True),
            effect="adapted",
            reason="SD3 is not trained; FLUX.1 takes it from the additional parameters only, as in Kohya.",
            sd_scripts_arg="--logit_std",
            since="2024-12-31",
            rare=True,
        ),
    ] = 1
    """Spread of the noise levels around that centre."""

    mode_scale: Annotated[
        Number,
        Ui(
            tab="Basic",
            section="SD3",
            label="Mode Scale",
            widget="number",
            step=1,
            families=SD3,
            shown_with=("sd3_checkbox", True),
            effect="adapted",
            reason="SD3 is not trained; FLUX.1 takes it from the additional parameters only, as in Kohya.",
            sd_scripts_arg="--mode_scale",
            since="2024-12-31",
            rare=True,
        ),
    ] = 1.29
    """Shape of the weighting scheme "mode": higher practises the middle noise levels more."""

    pos_emb_random_crop_rate: Annotated[
        Number,
        Ui(
            tab="Basic",
            section="SD3",
            label="Positional Embedding Random Crop Rate",
            widget="number",
            min=0,
            step=1,
            families=SD3,
            shown_with=("sd3_checkbox", True),
            effect="none",
            reason="SD3 is not trained.",
            sd_scripts_arg="--pos_emb_random_crop_rate",
            since="2024-12-31",
            rare=True,
        ),
    ] = 0
    """Chance that a random part of the position information is used."""

    save_clip: Annotated[
        bool,
        Ui(
            tab="Basic",
            section="SD3",
            label="Save CLIP models",
            widget="checkbox",
            families=SD3,
            shown_with=("sd3_checkbox", True),
            effect="none",
            reason="SD3 is not trained.",
            sd_scripts_arg="--save_clip",
            since="2024-12-31",
            rare=True,
        ),
    ] = False
    """Save the CLIP encoders beside the result."""

    save_t5xxl: Annotated[
        bool,
        Ui(
            tab="Basic",
            section="SD3",
            label="Save T5-XXL model",
            widget="checkbox",
            families=SD3,
            shown_with=("sd3_checkbox", True),
            effect="none",
            reason="SD3 is not trained.",
            sd_scripts_arg="--save_t5xxl",
            since="2024-12-31",
            rare=True,
        ),
    ] = False
    """Save the T5 encoder beside the result."""

    sd3_t5_dropout_rate: Annotated[
        Number,
        Ui(
            tab="Basic",
            section="SD3",
            label="T5 Dropout Rate",
            widget="number",
            min=0,
            step=1,
            families=SD3,
            shown_with=("sd3_checkbox", True),
            effect="none",
            reason="SD3 is not trained.",
            sd_scripts_arg="--t5_dropout_rate",
            since="2024-12-31",
            rare=True,
        ),
    ] = 0
    """Chance that a caption reaches the model without its T5 part."""

    sd3_t5xxl: Annotated[
        str,
        Ui(
            tab="Basic",
            section="SD3",
            label="T5-XXL Path",
            widget="textbox",
            families=SD3,
            shown_with=("sd3_checkbox", True),
            path="file",
            effect="none",
            reason="SD3 is not trained.",
            sd_scripts_arg="--t5xxl",
            since="2024-12-31",
        ),
    ] = ""
    """File of the T5-XXL text encoder, if the checkpoint does not hold it."""

    t5xxl_device: Annotated[
        str,
        Ui(
            tab="Basic",
            section="SD3",
            label="T5-XXL Device",
            widget="textbox",
            families=SD3,
            shown_with=("sd3_checkbox", True),
            effect="none",
            reason="SD3 is not trained.",
            sd_scripts_arg="--t5xxl_device",
            since="2024-12-31",
            rare=True,
        ),
    ] = ""
    """Device that T5 runs on, for example cpu."""

    t5xxl_dtype: Annotated[
        str,
        Ui(
            tab="Basic",
            section="SD3",
            label="T5-XXL Dtype",
            widget="dropdown",
            choices=("float32", "fp16", "bf16"),
            families=SD3,
            shown_with=("sd3_checkbox", True),
            effect="none",
            reason="SD3 is not trained.",
            sd_scripts_arg="--t5xxl_dtype",
            since="2024-12-31",
            rare=True,
        ),
    ] = "bf16"
    """Number format of T5."""

    sd3_text_encoder_batch_size: Annotated[
        int,
        Ui(
            tab="Basic",
            section="SD3",
            label="Text Encoder Batch Size",
            widget="number",
            min=1,
            max=1024,
            step=1,
            families=SD3,
            shown_with=("sd3_checkbox", True),
            effect="none",
            reason="SD3 is not trained.",
            sd_scripts_arg="--text_encoder_batch_size",
            since="2024-12-31",
            rare=True,
        ),
    ] = 1
    """Captions that are encoded at once while the cache is built."""

    weighting_scheme: Annotated[
        str,
        Ui(
            tab="Basic",
            section="SD3",
            label="Weighting Scheme",
            widget="dropdown",
            choices=("logit_normal", "sigma_sqrt", "mode", "cosmap", "uniform"),
            families=SD3,
            shown_with=("sd3_checkbox", True),
            effect="adapted",
            reason="SD3 is not trained; FLUX.1 takes it from the additional parameters only, as in Kohya.",
            sd_scripts_arg="--weighting_scheme",
            since="2024-12-31",
        ),
    ] = "logit_normal"
    """Which noise levels training practises most. "logit_normal" prefers the middle, "uniform" treats
    all alike."""
