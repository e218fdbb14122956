"""Captions, memory and speed."""

from __future__ import annotations

from typing import Annotated

from trainer.config._section import Section
from trainer.config.ui import FLUX, SD, Ui

__all__ = ["ComputeFields"]


class ComputeFields(Section):
    """Captions, memory and speed."""

    keep_tokens: Annotated[
        int,
        Ui(
            tab="Advanced",
            label="Keep n tokens",
            widget="slider",
            min=0,
            max=32,
            step=1,
            effect="honoured",
            sd_scripts_arg="--keep_tokens",
            since="2023-01-27",
        ),
    ] = 0
    """When captions are shuffled, the first so many parts stay in front. Use it to keep the trigger word
    in its place."""

    clip_skip: Annotated[
        int,
        Ui(
            tab="Advanced",
            label="Clip skip",
            widget="slider",
            min=0,
            max=12,
            step=1,
            families=("sd15", "sd2"),
            effect="honoured",
            sd_scripts_arg="--clip_skip",
            since="2023-01-05",
        ),
    ] = 1
    """Which layer of the text encoder is used, counted from the end. 1 for most models, 2 for anime
    models of SD 1.5."""

    max_token_length: Annotated[
        int,
        Ui(
            tab="Advanced",
            label="Max Token Length",
            widget="dropdown",
            choices=(75, 150, 225),
            families=SD,
            effect="honoured",
            sd_scripts_arg="--max_token_length",
            since="2023-01-10",
        ),
    ] = 75
    """Longest caption, in tokens. 150 and 225 read longer captions in pieces of 75."""

    fp8_base: Annotated[
        bool,
        Ui(
            tab="Advanced",
            label="fp8 base",
            widget="checkbox",
            families=("sd15", "sd2", "sdxl", "sd3", "flux1", "lumina"),
            effect="adapted",
            reason="Norms, biases and the layers outside the repeated blocks keep their precision; they are small.",
            sd_scripts_arg="--fp8_base",
            since="2024-01-27",
        ),
    ] = False
    """Keep the base model in 8-bit numbers: half the memory, slightly less exact."""

    fp8_base_unet: Annotated[
        bool,
        Ui(
            tab="Advanced",
            label="fp8 base unet",
            widget="checkbox",
            families=FLUX,
            effect="adapted",
            reason="Norms, biases and the layers outside the repeated blocks keep their precision; SD models too.",
            sd_scripts_arg="--fp8_base_unet",
            since="2024-08-27",
        ),
    ] = False
    """Keep only the large model in 8-bit numbers and the text encoders as they are."""

    full_fp16: Annotated[
        bool,
        Ui(
            tab="Advanced",
            label="Full fp16 training (experimental)",
            widget="checkbox",
            effect="honoured",
            sd_scripts_arg="--full_fp16",
            since="2022-12-28",
        ),
    ] = False
    """Keep the LoRA itself in fp16 too. It saves a little memory and can make training unstable; mixed
    precision must be fp16."""

    full_bf16: Annotated[
        bool,
        Ui(
            tab="Advanced",
            label="Full bf16 training (experimental)",
            widget="checkbox",
            effect="honoured",
            sd_scripts_arg="--full_bf16",
            since="2023-07-16",
        ),
    ] = False
    """Keep the LoRA itself in bf16 too. It saves a little memory and loses precision; mixed precision
    must be bf16."""

    highvram: Annotated[
        bool,
        Ui(
            tab="Advanced",
            label="highvram",
            widget="checkbox",
            effect="none",
            reason="Memory is never cleared inside the training steps, so there is nothing to leave out.",
            sd_scripts_arg="--highvram",
            since="2024-08-13",
            rare=True,
        ),
    ] = False
    """Do not tidy up memory between steps, which is faster on large cards."""

    lowvram: Annotated[
        bool,
        Ui(
            tab="Advanced",
            label="lowvram",
            widget="checkbox",
            hidden=True,
            effect="none",
            reason="Kohya itself no longer uses it.",
            sd_scripts_arg=None,
            since="2024-08-13",
            rare=True,
        ),
    ] = False
    """Former switch for small graphics cards."""

    skip_cache_check: Annotated[
        bool,
        Ui(
            tab="Advanced",
            label="Skip cache check",
            widget="checkbox",
            effect="honoured",
            sd_scripts_arg="--skip_cache_check",
            since="2024-10-14",
            rare=True,
        ),
    ] = False
    """Use cached files without looking inside them, which starts faster."""

    gradient_checkpointing: Annotated[
        bool,
        Ui(
            tab="Advanced",
            label="Gradient checkpointing",
            widget="checkbox",
            effect="honoured",
            sd_scripts_arg="--gradient_checkpointing",
            since="2022-12-28",
        ),
    ] = False
    """Compute some results twice instead of keeping them: much less memory, about a quarter slower."""

    shuffle_caption: Annotated[
        bool,
        Ui(
            tab="Advanced",
            label="Shuffle caption",
            widget="checkbox",
            effect="honoured",
            sd_scripts_arg="--shuffle_caption",
            since="2022-12-28",
        ),
    ] = False
    """Mix the order of the comma-separated parts of a caption each time, so that no part depends on its
    place."""

    persistent_data_loader_workers: Annotated[
        bool,
        Ui(
            tab="Advanced",
            label="Persistent data loader",
            widget="checkbox",
            effect="none",
            reason="Batches come from a thread that lives as long as the run.",
            sd_scripts_arg="--persistent_data_loader_workers",
            since="2023-02-04",
            rare=True,
        ),
    ] = False
    """Keep the loading processes alive between epochs."""

    mem_eff_attn: Annotated[
        bool,
        Ui(
            tab="Advanced",
            label="Memory efficient attention",
            widget="checkbox",
            families=SD,
            effect="none",
            reason="PyTorch's own attention is always used; it needs no more memory and is faster.",
            sd_scripts_arg="--mem_eff_attn",
            since="2023-01-08",
            rare=True,
        ),
    ] = False
    """Slower attention that needs less memory."""

    xformers: Annotated[
        str,
        Ui(
            tab="Advanced",
            label="CrossAttention",
            widget="dropdown",
            choices=("none", "sdpa", "xformers"),
            trained_choices=("sdpa", "xformers"),
            effect="none",
            reason="PyTorch's own scaled-dot-product attention is always used; the result is the same.",
            sd_scripts_arg="--xformers or --sdpa or neither",
            since="2022-12-28",
        ),
    ] = "xformers"
    """Which program library computes attention. It changes speed and memory, not the result."""
