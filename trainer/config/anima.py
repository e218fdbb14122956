"""Anima only."""

from __future__ import annotations

from typing import Annotated

from trainer.config._section import Section
from trainer.config.ui import ANIMA, Number, Ui

__all__ = ["AnimaFields"]


class AnimaFields(Section):
    """Anima only."""

    anima_cache_text_encoder_outputs: Annotated[
        bool,
        Ui(
            tab="Basic",
            section="Anima",
            label="Cache Text Encoder Outputs",
            widget="checkbox",
            families=ANIMA,
            shown_with=("anima_checkbox", True),
            effect="none",
            reason="Anima is not trained.",
            sd_scripts_arg="--cache_text_encoder_outputs",
            since="2026-02-11",
            rare=True,
        ),
    ] = False
    """Encode the captions once and free the text encoder."""

    anima_cache_text_encoder_outputs_to_disk: Annotated[
        bool,
        Ui(
            tab="Basic",
            section="Anima",
            label="Cache Text Encoder Outputs to Disk",
            widget="checkbox",
            families=ANIMA,
            shown_with=("anima_checkbox", True),
            effect="none",
            reason="Anima is not trained.",
            sd_scripts_arg="--cache_text_encoder_outputs_to_disk",
            since="2026-02-11",
            rare=True,
        ),
    ] = False
    """Keep the encoded captions in files, so that the next run starts faster."""

    anima_qwen3: Annotated[
        str,
        Ui(
            tab="Basic",
            section="Anima",
            label="Qwen3 Path",
            widget="textbox",
            families=ANIMA,
            shown_with=("anima_checkbox", True),
            path="file",
            effect="none",
            reason="Anima is not trained.",
            sd_scripts_arg="--qwen3",
            since="2026-02-11",
            rare=True,
        ),
    ] = ""
    """File or folder of the Qwen3 text encoder."""

    anima_vae: Annotated[
        str,
        Ui(
            tab="Basic",
            section="Anima",
            label="VAE Path",
            widget="textbox",
            families=ANIMA,
            shown_with=("anima_checkbox", True),
            path="file",
            effect="none",
            reason="Anima is not trained.",
            sd_scripts_arg="--vae",
            since="2026-02-11",
            rare=True,
        ),
    ] = ""
    """File of the Qwen-Image VAE; it takes the place of the general VAE field."""

    anima_llm_adapter_path: Annotated[
        str,
        Ui(
            tab="Basic",
            section="Anima",
            label="LLM Adapter Path",
            widget="textbox",
            families=ANIMA,
            shown_with=("anima_checkbox", True),
            path="file",
            effect="none",
            reason="Anima is not trained.",
            sd_scripts_arg="--llm_adapter_path",
            since="2026-02-11",
            rare=True,
        ),
    ] = ""
    """File of the text adapter, if the model file does not hold it."""

    anima_t5_tokenizer_path: Annotated[
        str,
        Ui(
            tab="Basic",
            section="Anima",
            label="T5 Tokenizer Path",
            widget="textbox",
            families=ANIMA,
            shown_with=("anima_checkbox", True),
            path="folder",
            effect="none",
            reason="Anima is not trained.",
            sd_scripts_arg="--t5_tokenizer_path",
            since="2026-02-11",
            rare=True,
        ),
    ] = ""
    """Folder of a T5 tokenizer. If it is empty, the bundled one is used."""

    anima_discrete_flow_shift: Annotated[
        Number,
        Ui(
            tab="Basic",
            section="Anima",
            label="Discrete Flow Shift",
            widget="number",
            min=-1024,
            max=1024,
            step=0.01,
            families=ANIMA,
            shown_with=("anima_checkbox", True),
            effect="none",
            reason="Anima is not trained.",
            sd_scripts_arg="--discrete_flow_shift",
            since="2026-02-11",
            rare=True,
        ),
    ] = 1
    """Moves training towards noisier pictures, used by timestep sampling "shift"."""

    anima_timestep_sampling: Annotated[
        str,
        Ui(
            tab="Basic",
            section="Anima",
            label="Timestep Sampling",
            widget="dropdown",
            choices=("sigma", "uniform", "sigmoid", "shift", "flux_shift"),
            families=ANIMA,
            shown_with=("anima_checkbox", True),
            effect="none",
            reason="Anima is not trained.",
            sd_scripts_arg="--timestep_sampling",
            since="2026-02-11",
            rare=True,
        ),
    ] = "sigmoid"
    """How noisy the training pictures are made."""

    anima_sigmoid_scale: Annotated[
        Number,
        Ui(
            tab="Basic",
            section="Anima",
            label="Sigmoid Scale",
            widget="number",
            min=0,
            max=1024,
            step=0.01,
            families=ANIMA,
            shown_with=("anima_checkbox", True),
            effect="none",
            reason="Anima is not trained.",
            sd_scripts_arg="--sigmoid_scale",
            since="2026-02-11",
            rare=True,
        ),
    ] = 1
    """Width of the sigmoid sampling: higher spreads training over more noise levels."""

    anima_qwen3_max_token_length: Annotated[
        int,
        Ui(
            tab="Basic",
            section="Anima",
            label="Qwen3 Max Token Length",
            widget="number",
            min=0,
            max=4096,
            step=1,
            families=ANIMA,
            shown_with=("anima_checkbox", True),
            effect="none",
            reason="Anima is not trained.",
            sd_scripts_arg="--qwen3_max_token_length",
            since="2026-02-11",
            rare=True,
        ),
    ] = 512
    """Longest caption for Qwen3, in tokens."""

    anima_t5_max_token_length: Annotated[
        int,
        Ui(
            tab="Basic",
            section="Anima",
            label="T5 Max Token Length",
            widget="number",
            min=0,
            max=4096,
            step=1,
            families=ANIMA,
            shown_with=("anima_checkbox", True),
            effect="none",
            reason="Anima is not trained.",
            sd_scripts_arg="--t5_max_token_length",
            since="2026-02-11",
            rare=True,
        ),
    ] = 512
    """Longest caption for the T5 tokenizer, in tokens."""

    anima_attn_mode: Annotated[
        str,
        Ui(
            tab="Basic",
            section="Anima",
            label="Attention Mode",
            widget="dropdown",
            choices=("torch", "xformers", "flash", "sageattn"),
            families=ANIMA,
            shown_with=("anima_checkbox", True),
            effect="none",
            reason="Anima is not trained.",
            sd_scripts_arg="--attn_mode",
            since="2026-02-11",
            rare=True,
        ),
    ] = "torch"
    """Which program library computes attention."""

    anima_split_attn: Annotated[
        bool,
        Ui(
            tab="Basic",
            section="Anima",
            label="Split Attention",
            widget="checkbox",
            families=ANIMA,
            shown_with=("anima_checkbox", True),
            effect="none",
            reason="Anima is not trained.",
            sd_scripts_arg="--split_attn",
            since="2026-02-11",
            rare=True,
        ),
    ] = False
    """Compute attention picture by picture: less memory, slower."""

    anima_vae_chunk_size: Annotated[
        int,
        Ui(
            tab="Basic",
            section="Anima",
            label="VAE Chunk Size",
            widget="number",
            min=0,
            max=1024,
            step=2,
            families=ANIMA,
            shown_with=("anima_checkbox", True),
            effect="none",
            reason="Anima is not trained.",
            sd_scripts_arg="--vae_chunk_size",
            since="2026-02-11",
            rare=True,
        ),
    ] = 0
    """Let the VAE work in slices of this even size to save memory; 0 is off."""

    anima_vae_disable_cache: Annotated[
        bool,
        Ui(
            tab="Basic",
            section="Anima",
            label="VAE Disable Cache",
            widget="checkbox",
            families=ANIMA,
            shown_with=("anima_checkbox", True),
            effect="none",
            reason="Anima is not trained.",
            sd_scripts_arg="--vae_disable_cache",
            since="2026-02-11",
            rare=True,
        ),
    ] = False
    """Turn off the internal cache of the VAE to save memory."""

    anima_unsloth_offload_checkpointing: Annotated[
        bool,
        Ui(
            tab="Basic",
            section="Anima",
            label="Unsloth Offload Checkpointing",
            widget="checkbox",
            families=ANIMA,
            shown_with=("anima_checkbox", True),
            effect="none",
            reason="Anima is not trained.",
            sd_scripts_arg="--unsloth_offload_checkpointing",
            since="2026-02-11",
            rare=True,
        ),
    ] = False
    """Move intermediate results to main memory while the card goes on working."""

    anima_qwen_image_vae_2d: Annotated[
        bool,
        Ui(
            tab="Basic",
            section="Anima",
            label="Qwen-Image VAE 2D",
            widget="checkbox",
            families=ANIMA,
            shown_with=("anima_checkbox", True),
            effect="none",
            reason="Anima is not trained.",
            sd_scripts_arg="--qwen_image_vae_2d",
            since="2026-07-08",
            rare=True,
        ),
    ] = False
    """Use the faster form of the VAE that knows single pictures only."""

    anima_compile: Annotated[
        bool,
        Ui(
            tab="Basic",
            section="Anima",
            label="Per-block Torch Compile",
            widget="checkbox",
            families=ANIMA,
            shown_with=("anima_checkbox", True),
            effect="none",
            reason="Anima is not trained.",
            sd_scripts_arg="--compile",
            since="2026-07-08",
            rare=True,
        ),
    ] = False
    """Compile each block: slower to start, faster afterwards."""

    anima_torch_compile: Annotated[
        bool,
        Ui(
            tab="Basic",
            section="Anima",
            label="Legacy Torch Compile (accelerate dynamo)",
            widget="checkbox",
            families=ANIMA,
            shown_with=("anima_checkbox", True),
            effect="none",
            reason="Anima is not trained.",
            sd_scripts_arg="--torch_compile",
            since="2026-02-12",
            rare=True,
        ),
    ] = False
    """Compile the whole model in the older way."""

    anima_compile_backend: Annotated[
        str,
        Ui(
            tab="Basic",
            section="Anima",
            label="Compile Backend",
            widget="textbox",
            families=ANIMA,
            shown_with=("anima_checkbox", True),
            effect="none",
            reason="Anima is not trained.",
            sd_scripts_arg="--compile_backend",
            since="2026-07-08",
            rare=True,
        ),
    ] = "inductor"
    """Compiler that is used."""

    anima_compile_mode: Annotated[
        str,
        Ui(
            tab="Basic",
            section="Anima",
            label="Compile Mode",
            widget="dropdown",
            choices=("default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs"),
            families=ANIMA,
            shown_with=("anima_checkbox", True),
            effect="none",
            reason="Anima is not trained.",
            sd_scripts_arg="--compile_mode",
            since="2026-07-08",
            rare=True,
        ),
    ] = "default"
    """How hard the compiler tries."""

    anima_compile_dynamic: Annotated[
        str,
        Ui(
            tab="Basic",
            section="Anima",
            label="Compile Dynamic Shapes",
            widget="dropdown",
            choices=("auto", "true", "false"),
            families=ANIMA,
            shown_with=("anima_checkbox", True),
            effect="none",
            reason="Anima is not trained.",
            sd_scripts_arg="--compile_dynamic",
            since="2026-07-08",
            rare=True,
        ),
    ] = "auto"
    """Whether the compiler prepares for pictures of changing size."""

    anima_compile_fullgraph: Annotated[
        bool,
        Ui(
            tab="Basic",
            section="Anima",
            label="Compile Fullgraph",
            widget="checkbox",
            families=ANIMA,
            shown_with=("anima_checkbox", True),
            effect="none",
            reason="Anima is not trained.",
            sd_scripts_arg="--compile_fullgraph",
            since="2026-07-08",
            rare=True,
        ),
    ] = False
    """Ask the compiler for one piece without gaps, or an error."""

    anima_compile_cache_size_limit: Annotated[
        int,
        Ui(
            tab="Basic",
            section="Anima",
            label="Compile Cache Size Limit",
            widget="number",
            min=0,
            max=1024,
            step=1,
            families=ANIMA,
            shown_with=("anima_checkbox", True),
            effect="none",
            reason="Anima is not trained.",
            sd_scripts_arg="--compile_cache_size_limit",
            since="2026-07-08",
            rare=True,
        ),
    ] = 0
    """How many compiled forms are kept; 0 leaves it to PyTorch."""
