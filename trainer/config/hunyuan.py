"""HunyuanImage 2.1 only."""

from __future__ import annotations

from typing import Annotated

from trainer.config._section import Section
from trainer.config.ui import HUNYUAN, Number, Ui

__all__ = ["HunyuanFields"]


class HunyuanFields(Section):
    """HunyuanImage 2.1 only."""

    hunyuan_image_cache_text_encoder_outputs: Annotated[
        bool,
        Ui(
            tab="Basic",
            section="HunyuanImage-2.1",
            label="Cache Text Encoder Outputs",
            widget="checkbox",
            families=HUNYUAN,
            shown_with=("hunyuan_image_checkbox", True),
            effect="none",
            reason="HunyuanImage is not trained.",
            sd_scripts_arg="--cache_text_encoder_outputs",
            since="2026-07-08",
            rare=True,
        ),
    ] = False
    """Encode the captions once and free the text encoders."""

    hunyuan_image_cache_text_encoder_outputs_to_disk: Annotated[
        bool,
        Ui(
            tab="Basic",
            section="HunyuanImage-2.1",
            label="Cache Text Encoder Outputs to Disk",
            widget="checkbox",
            families=HUNYUAN,
            shown_with=("hunyuan_image_checkbox", True),
            effect="none",
            reason="HunyuanImage is not trained.",
            sd_scripts_arg="--cache_text_encoder_outputs_to_disk",
            since="2026-07-08",
            rare=True,
        ),
    ] = False
    """Keep the encoded captions in files, so that the next run starts faster."""

    hunyuan_text_encoder: Annotated[
        str,
        Ui(
            tab="Basic",
            section="HunyuanImage-2.1",
            label="Qwen2.5-VL Path",
            widget="textbox",
            families=HUNYUAN,
            shown_with=("hunyuan_image_checkbox", True),
            path="file",
            effect="none",
            reason="HunyuanImage is not trained.",
            sd_scripts_arg="--text_encoder",
            since="2026-07-08",
            rare=True,
        ),
    ] = ""
    """File of the Qwen2.5-VL text encoder."""

    hunyuan_byt5: Annotated[
        str,
        Ui(
            tab="Basic",
            section="HunyuanImage-2.1",
            label="byT5 Path",
            widget="textbox",
            families=HUNYUAN,
            shown_with=("hunyuan_image_checkbox", True),
            path="file",
            effect="none",
            reason="HunyuanImage is not trained.",
            sd_scripts_arg="--byt5",
            since="2026-07-08",
            rare=True,
        ),
    ] = ""
    """File of the byT5 text encoder, which reads lettering."""

    hunyuan_vae: Annotated[
        str,
        Ui(
            tab="Basic",
            section="HunyuanImage-2.1",
            label="VAE Path",
            widget="textbox",
            families=HUNYUAN,
            shown_with=("hunyuan_image_checkbox", True),
            path="file",
            effect="none",
            reason="HunyuanImage is not trained.",
            sd_scripts_arg="--vae",
            since="2026-07-08",
            rare=True,
        ),
    ] = ""
    """File of the VAE of HunyuanImage; it takes the place of the general VAE field."""

    hunyuan_discrete_flow_shift: Annotated[
        Number,
        Ui(
            tab="Basic",
            section="HunyuanImage-2.1",
            label="Discrete Flow Shift",
            widget="number",
            min=-1024,
            max=1024,
            step=0.01,
            families=HUNYUAN,
            shown_with=("hunyuan_image_checkbox", True),
            effect="none",
            reason="HunyuanImage is not trained.",
            sd_scripts_arg="--discrete_flow_shift",
            since="2026-07-08",
            rare=True,
        ),
    ] = 5
    """Moves training towards noisier pictures; higher cares more for composition than for detail."""

    hunyuan_model_prediction_type: Annotated[
        str,
        Ui(
            tab="Basic",
            section="HunyuanImage-2.1",
            label="Model Prediction Type",
            widget="dropdown",
            choices=("raw", "additive", "sigma_scaled"),
            families=HUNYUAN,
            shown_with=("hunyuan_image_checkbox", True),
            effect="none",
            reason="HunyuanImage is not trained.",
            sd_scripts_arg="--model_prediction_type",
            since="2026-07-08",
            rare=True,
        ),
    ] = "raw"
    """How the output of the model is read. "raw" fits how it was trained."""

    hunyuan_timestep_sampling: Annotated[
        str,
        Ui(
            tab="Basic",
            section="HunyuanImage-2.1",
            label="Timestep Sampling",
            widget="dropdown",
            choices=("sigma", "uniform", "sigmoid", "shift", "flux_shift"),
            families=HUNYUAN,
            shown_with=("hunyuan_image_checkbox", True),
            effect="none",
            reason="HunyuanImage is not trained.",
            sd_scripts_arg="--timestep_sampling",
            since="2026-07-08",
            rare=True,
        ),
    ] = "sigma"
    """How noisy the training pictures are made."""

    hunyuan_sigmoid_scale: Annotated[
        Number,
        Ui(
            tab="Basic",
            section="HunyuanImage-2.1",
            label="Sigmoid Scale",
            widget="number",
            min=0,
            max=1024,
            step=0.01,
            families=HUNYUAN,
            shown_with=("hunyuan_image_checkbox", True),
            effect="none",
            reason="HunyuanImage is not trained.",
            sd_scripts_arg="--sigmoid_scale",
            since="2026-07-08",
            rare=True,
        ),
    ] = 1
    """Width of the sigmoid sampling: higher spreads training over more noise levels."""

    hunyuan_attn_mode: Annotated[
        str,
        Ui(
            tab="Basic",
            section="HunyuanImage-2.1",
            label="Attention Mode",
            widget="dropdown",
            choices=("torch", "xformers", "flash", "sageattn"),
            families=HUNYUAN,
            shown_with=("hunyuan_image_checkbox", True),
            effect="none",
            reason="HunyuanImage is not trained.",
            sd_scripts_arg="--attn_mode",
            since="2026-07-08",
            rare=True,
        ),
    ] = "torch"
    """Which program library computes attention."""

    hunyuan_split_attn: Annotated[
        bool,
        Ui(
            tab="Basic",
            section="HunyuanImage-2.1",
            label="Split Attention",
            widget="checkbox",
            families=HUNYUAN,
            shown_with=("hunyuan_image_checkbox", True),
            effect="none",
            reason="HunyuanImage is not trained.",
            sd_scripts_arg="--split_attn",
            since="2026-07-08",
            rare=True,
        ),
    ] = False
    """Compute attention picture by picture: less memory, slower."""

    hunyuan_fp8_scaled: Annotated[
        bool,
        Ui(
            tab="Basic",
            section="HunyuanImage-2.1",
            label="FP8 Scaled",
            widget="checkbox",
            families=HUNYUAN,
            shown_with=("hunyuan_image_checkbox", True),
            effect="none",
            reason="HunyuanImage is not trained.",
            sd_scripts_arg="--fp8_scaled",
            since="2026-07-08",
            rare=True,
        ),
    ] = False
    """Keep the model in 8-bit numbers with a scale, which halves its memory."""

    hunyuan_fp8_vl: Annotated[
        bool,
        Ui(
            tab="Basic",
            section="HunyuanImage-2.1",
            label="FP8 VLM",
            widget="checkbox",
            families=HUNYUAN,
            shown_with=("hunyuan_image_checkbox", True),
            effect="none",
            reason="HunyuanImage is not trained.",
            sd_scripts_arg="--fp8_vl",
            since="2026-07-08",
            rare=True,
        ),
    ] = False
    """Keep the Qwen text encoder in 8-bit numbers."""

    hunyuan_text_encoder_cpu: Annotated[
        bool,
        Ui(
            tab="Basic",
            section="HunyuanImage-2.1",
            label="Text Encoder on CPU",
            widget="checkbox",
            families=HUNYUAN,
            shown_with=("hunyuan_image_checkbox", True),
            effect="none",
            reason="HunyuanImage is not trained.",
            sd_scripts_arg="--text_encoder_cpu",
            since="2026-07-08",
            rare=True,
        ),
    ] = False
    """Run the text encoders on the CPU, which saves video memory."""

    hunyuan_vae_chunk_size: Annotated[
        int,
        Ui(
            tab="Basic",
            section="HunyuanImage-2.1",
            label="VAE Chunk Size",
            widget="number",
            min=0,
            max=1024,
            step=1,
            families=HUNYUAN,
            shown_with=("hunyuan_image_checkbox", True),
            effect="none",
            reason="HunyuanImage is not trained.",
            sd_scripts_arg="--vae_chunk_size",
            since="2026-07-08",
            rare=True,
        ),
    ] = 0
    """Let the VAE work in slices of this size to save memory; 0 is off."""
