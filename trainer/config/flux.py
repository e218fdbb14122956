"""FLUX.1 and Chroma only."""

from __future__ import annotations

from typing import Annotated

from trainer.config._section import Section
from trainer.config.ui import FLUX, Number, Ui

__all__ = ["FluxFields"]


class FluxFields(Section):
    """FLUX.1 and Chroma only."""

    flux1_cache_text_encoder_outputs: Annotated[
        bool,
        Ui(
            tab="Basic",
            section="Flux.1",
            label="Cache Text Encoder Outputs",
            widget="checkbox",
            families=FLUX,
            shown_with=("flux1_checkbox", True),
            effect="adapted",
            reason="Captions that are shuffled or dropped out still are: every text of the run is encoded beforehand.",
            sd_scripts_arg="--cache_text_encoder_outputs",
            since="2024-08-10",
        ),
    ] = False
    """Encode the captions once and free the text encoders. Saves much memory, but captions cannot vary
    and T5 cannot be trained."""

    flux1_cache_text_encoder_outputs_to_disk: Annotated[
        bool,
        Ui(
            tab="Basic",
            section="Flux.1",
            label="Cache Text Encoder Outputs to Disk",
            widget="checkbox",
            families=FLUX,
            shown_with=("flux1_checkbox", True),
            effect="adapted",
            reason="Files of other captions or other text encoders are made anew; captions that vary stay out of them.",
            sd_scripts_arg="--cache_text_encoder_outputs_to_disk",
            since="2024-08-10",
        ),
    ] = False
    """Keep the encoded captions in files, so that the next run starts faster."""

    model_type: Annotated[
        str,
        Ui(
            tab="Basic",
            section="Flux.1",
            label="Base Model Type",
            widget="dropdown",
            choices=("flux", "chroma"),
            families=FLUX,
            shown_with=("flux1_checkbox", True),
            effect="adapted",
            reason="FLUX.1 is trained. Chroma has no CLIP-L and gets its modulation from a network of its own, so a "
            "run on it is refused before it starts.",
            sd_scripts_arg="--model_type chroma",
            since="2026-07-10",
            rare=True,
        ),
    ] = "flux"
    """Whether the base model is FLUX.1 or Chroma, which has the same shape but no CLIP-L."""

    ae: Annotated[
        str,
        Ui(
            tab="Basic",
            section="Flux.1",
            label="VAE Path",
            widget="textbox",
            families=FLUX,
            shown_with=("flux1_checkbox", True),
            path="file",
            effect="adapted",
            reason="May be left empty with a diffusers folder, which has its own.",
            sd_scripts_arg="--ae",
            since="2024-08-10",
        ),
    ] = ""
    """File of the FLUX autoencoder, which turns pictures into latents."""

    clip_l: Annotated[
        str,
        Ui(
            tab="Basic",
            section="Flux.1",
            label="CLIP-L Path",
            widget="textbox",
            families=FLUX,
            shown_with=("flux1_checkbox", True),
            path="file",
            effect="adapted",
            reason="Runs with CLIP-L's own activation, quick_gelu, as in every program that draws with FLUX; Kohya's "
            "engine runs it with gelu. May be left empty with a diffusers folder, which has its own.",
            sd_scripts_arg="--clip_l",
            since="2024-08-10",
        ),
    ] = ""
    """File of the CLIP-L text encoder."""

    t5xxl: Annotated[
        str,
        Ui(
            tab="Basic",
            section="Flux.1",
            label="T5-XXL Path",
            widget="textbox",
            families=FLUX,
            shown_with=("flux1_checkbox", True),
            path="file",
            effect="adapted",
            reason="May be left empty with a diffusers folder, which has its own.",
            sd_scripts_arg="--t5xxl",
            since="2024-08-10",
        ),
    ] = ""
    """File of the T5-XXL text encoder."""

    discrete_flow_shift: Annotated[
        Number,
        Ui(
            tab="Basic",
            section="Flux.1",
            label="Discrete Flow Shift",
            widget="number",
            min=-1024,
            max=1024,
            step=0.01,
            families=FLUX,
            shown_with=("flux1_checkbox", True),
            effect="honoured",
            sd_scripts_arg="--discrete_flow_shift",
            since="2024-08-13",
        ),
    ] = 3
    """Moves training towards noisier pictures, used by timestep sampling "shift". About 3 is usual;
    higher cares more for composition than for detail."""

    model_prediction_type: Annotated[
        str,
        Ui(
            tab="Basic",
            section="Flux.1",
            label="Model Prediction Type",
            widget="dropdown",
            choices=("raw", "additive", "sigma_scaled"),
            families=FLUX,
            shown_with=("flux1_checkbox", True),
            effect="honoured",
            sd_scripts_arg="--model_prediction_type",
            since="2024-08-13",
        ),
    ] = "sigma_scaled"
    """How the output of the model is read. "raw" is the one that fits how FLUX was trained."""

    timestep_sampling: Annotated[
        str,
        Ui(
            tab="Basic",
            section="Flux.1",
            label="Timestep Sampling",
            widget="dropdown",
            choices=("flux_shift", "sigma", "shift", "sigmoid", "uniform"),
            families=FLUX,
            shown_with=("flux1_checkbox", True),
            effect="honoured",
            sd_scripts_arg="--timestep_sampling",
            since="2024-08-13",
        ),
    ] = "sigma"
    """How noisy the training pictures are made. "shift" and "flux_shift" practise mid to high noise more
    often, "uniform" all levels alike."""

    apply_t5_attn_mask: Annotated[
        bool,
        Ui(
            tab="Basic",
            section="Flux.1",
            label="Apply T5 Attention Mask",
            widget="checkbox",
            families=FLUX,
            shown_with=("flux1_checkbox", True),
            effect="honoured",
            sd_scripts_arg="--apply_t5_attn_mask",
            since="2024-08-21",
        ),
    ] = False
    """Hide the empty places after a short caption from the model. Chroma needs it."""

    split_mode: Annotated[
        bool,
        Ui(
            tab="Basic",
            section="Flux.1",
            label="Split Mode",
            widget="checkbox",
            families=FLUX,
            shown_with=("flux1_checkbox", True),
            effect="adapted",
            reason="Only the single blocks learn, as in Kohya; block swap (18 blocks) frees the memory, in less time.",
            sd_scripts_arg="--split_mode and network_args train_blocks=single",
            since="2024-08-16",
            rare=True,
        ),
    ] = False
    """Older way to train FLUX with little memory: only single blocks learn, and the run takes about
    twice as long."""

    train_blocks: Annotated[
        str,
        Ui(
            tab="Basic",
            section="Flux.1",
            label="Train Blocks",
            widget="dropdown",
            choices=("all", "double", "single"),
            families=FLUX,
            shown_with=("flux1_checkbox", True),
            effect="adapted",
            reason="It counts here; Kohya shows it but does not send it.",
            sd_scripts_arg=None,
            since="2024-08-16",
            rare=True,
        ),
    ] = "all"
    """Which half of FLUX learns: all blocks, the double ones (text and picture apart) or the single ones
    (together)."""

    split_qkv: Annotated[
        bool,
        Ui(
            tab="Basic",
            section="Flux.1",
            label="Split QKV",
            widget="checkbox",
            families=FLUX,
            lora_types=("Flux1",),
            shown_with=("flux1_checkbox", True),
            effect="adapted",
            reason="The saved alpha fits the stacked rank; Kohya's file has a third or a quarter of the strength.",
            sd_scripts_arg="network_args split_qkv=True",
            since="2024-08-24",
            rare=True,
        ),
    ] = False
    """Give query, key and value a LoRA each instead of one for all three."""

    train_t5xxl: Annotated[
        bool,
        Ui(
            tab="Basic",
            section="Flux.1",
            label="Train T5-XXL",
            widget="checkbox",
            families=FLUX,
            lora_types=("Flux1",),
            shown_with=("flux1_checkbox", True),
            effect="honoured",
            sd_scripts_arg="network_args train_t5xxl=True",
            since="2024-09-04",
            rare=True,
        ),
    ] = False
    """Train the T5 text encoder too, which needs a lot of memory."""

    cpu_offload_checkpointing: Annotated[
        bool,
        Ui(
            tab="Basic",
            section="Flux.1",
            label="CPU Offload Checkpointing",
            widget="checkbox",
            families=FLUX,
            shown_with=("flux1_checkbox", True),
            effect="adapted",
            reason="SD and SDXL models too, and together with block swap, which Kohya refuses.",
            sd_scripts_arg="--cpu_offload_checkpointing",
            since="2024-09-05",
            rare=True,
        ),
    ] = False
    """Keep intermediate results in main memory: less video memory, slower."""

    guidance_scale: Annotated[
        Number,
        Ui(
            tab="Basic",
            section="Flux.1",
            label="Guidance Scale",
            widget="number",
            min=0,
            max=1024,
            step=0.1,
            families=FLUX,
            shown_with=("flux1_checkbox", True),
            effect="honoured",
            sd_scripts_arg="--guidance_scale",
            since="2024-08-17",
        ),
    ] = 3.5
    """Guidance value shown to FLUX while training. 1 is usual for a LoRA on FLUX.1 dev."""

    t5xxl_max_token_length: Annotated[
        int,
        Ui(
            tab="Basic",
            section="Flux.1",
            label="T5-XXL Max Token Length",
            widget="number",
            min=0,
            max=4096,
            step=1,
            families=FLUX,
            shown_with=("flux1_checkbox", True),
            effect="honoured",
            sd_scripts_arg="--t5xxl_max_token_length",
            since="2024-08-16",
            rare=True,
        ),
    ] = 512
    """Longest caption for T5, in tokens. 512 suits FLUX.1 dev, 256 schnell."""

    enable_all_linear: Annotated[
        bool,
        Ui(
            tab="Basic",
            section="Flux.1",
            label="Enable All Linear",
            widget="checkbox",
            families=FLUX,
            lora_types=("Flux1 OFT",),
            shown_with=("flux1_checkbox", True),
            effect="none",
            reason="Flux1 OFT is not trained by this version.",
            sd_scripts_arg="network_args enable_all_linear=True",
            since="2024-09-14",
            rare=True,
        ),
    ] = False
    """Apply OFT to all linear layers instead of attention only."""

    mem_eff_save: Annotated[
        bool,
        Ui(
            tab="Basic",
            section="Flux.1",
            label="Memory Efficient Save",
            widget="checkbox",
            families=FLUX,
            shown_with=("flux1_checkbox", True),
            effect="none",
            reason="It is about saving whole models; a LoRA is small.",
            sd_scripts_arg="--mem_eff_save",
            since="2024-08-19",
            rare=True,
        ),
    ] = False
    """Write large checkpoints piece by piece. It matters for whole models, not for a LoRA."""

    single_blocks_to_swap: Annotated[
        int,
        Ui(
            tab="Basic",
            section="Flux.1",
            label="Single Blocks to swap (deprecated)",
            widget="slider",
            min=0,
            max=19,
            step=1,
            families=FLUX,
            shown_with=("flux1_checkbox", True),
            effect="none",
            reason='Kohya no longer reads it; "Blocks to swap" took its place.',
            sd_scripts_arg="written as single_blocks_to_swap, which the backend no longer reads",
            since="2024-11-16",
            rare=True,
        ),
    ] = 0
    """Number of single blocks kept in main memory."""

    double_blocks_to_swap: Annotated[
        int,
        Ui(
            tab="Basic",
            section="Flux.1",
            label="Double Blocks to swap (deprecated)",
            widget="slider",
            min=0,
            max=38,
            step=1,
            families=FLUX,
            shown_with=("flux1_checkbox", True),
            effect="none",
            reason='Kohya no longer reads it; "Blocks to swap" took its place.',
            sd_scripts_arg="written as double_blocks_to_swap, which the backend no longer reads",
            since="2024-11-16",
            rare=True,
        ),
    ] = 0
    """Number of double blocks kept in main memory."""

    img_attn_dim: Annotated[
        str,
        Ui(
            tab="Basic",
            section="Flux.1 > Rank for layers",
            label="img_attn_dim",
            widget="textbox",
            families=FLUX,
            lora_types=("Flux1",),
            shown_with=("flux1_checkbox", True),
            effect="honoured",
            sd_scripts_arg="network_args img_attn_dim=…",
            since="2024-09-14",
            rare=True,
        ),
    ] = ""
    """Rank for the picture attention of the double blocks. Empty means the network rank, 0 leaves them
    out."""

    img_mlp_dim: Annotated[
        str,
        Ui(
            tab="Basic",
            section="Flux.1 > Rank for layers",
            label="img_mlp_dim",
            widget="textbox",
            families=FLUX,
            lora_types=("Flux1",),
            shown_with=("flux1_checkbox", True),
            effect="honoured",
            sd_scripts_arg="network_args img_mlp_dim=…",
            since="2024-09-14",
            rare=True,
        ),
    ] = ""
    """Rank for the picture MLP of the double blocks. Empty means the network rank, 0 leaves them out."""

    img_mod_dim: Annotated[
        str,
        Ui(
            tab="Basic",
            section="Flux.1 > Rank for layers",
            label="img_mod_dim",
            widget="textbox",
            families=FLUX,
            lora_types=("Flux1",),
            shown_with=("flux1_checkbox", True),
            effect="honoured",
            sd_scripts_arg="network_args img_mod_dim=…",
            since="2024-09-14",
            rare=True,
        ),
    ] = ""
    """Rank for the picture modulation of the double blocks. Empty means the network rank, 0 leaves them
    out."""

    single_dim: Annotated[
        str,
        Ui(
            tab="Basic",
            section="Flux.1 > Rank for layers",
            label="single_dim",
            widget="textbox",
            families=FLUX,
            lora_types=("Flux1",),
            shown_with=("flux1_checkbox", True),
            effect="honoured",
            sd_scripts_arg="network_args single_dim=…",
            since="2024-09-14",
            rare=True,
        ),
    ] = ""
    """Rank for the linear layers of the single blocks. Empty means the network rank, 0 leaves them out."""

    txt_attn_dim: Annotated[
        str,
        Ui(
            tab="Basic",
            section="Flux.1 > Rank for layers",
            label="txt_attn_dim",
            widget="textbox",
            families=FLUX,
            lora_types=("Flux1",),
            shown_with=("flux1_checkbox", True),
            effect="honoured",
            sd_scripts_arg="network_args txt_attn_dim=…",
            since="2024-09-14",
            rare=True,
        ),
    ] = ""
    """Rank for the text attention of the double blocks. Empty means the network rank, 0 leaves them out."""

    txt_mlp_dim: Annotated[
        str,
        Ui(
            tab="Basic",
            section="Flux.1 > Rank for layers",
            label="txt_mlp_dim",
            widget="textbox",
            families=FLUX,
            lora_types=("Flux1",),
            shown_with=("flux1_checkbox", True),
            effect="honoured",
            sd_scripts_arg="network_args txt_mlp_dim=…",
            since="2024-09-14",
            rare=True,
        ),
    ] = ""
    """Rank for the text MLP of the double blocks. Empty means the network rank, 0 leaves them out."""

    txt_mod_dim: Annotated[
        str,
        Ui(
            tab="Basic",
            section="Flux.1 > Rank for layers",
            label="txt_mod_dim",
            widget="textbox",
            families=FLUX,
            lora_types=("Flux1",),
            shown_with=("flux1_checkbox", True),
            effect="honoured",
            sd_scripts_arg="network_args txt_mod_dim=…",
            since="2024-09-14",
            rare=True,
        ),
    ] = ""
    """Rank for the text modulation of the double blocks. Empty means the network rank, 0 leaves them
    out."""

    single_mod_dim: Annotated[
        str,
        Ui(
            tab="Basic",
            section="Flux.1 > Rank for layers",
            label="single_mod_dim",
            widget="textbox",
            families=FLUX,
            lora_types=("Flux1",),
            shown_with=("flux1_checkbox", True),
            effect="honoured",
            sd_scripts_arg="network_args single_mod_dim=…",
            since="2024-09-14",
            rare=True,
        ),
    ] = ""
    """Rank for the modulation of the single blocks. Empty means the network rank, 0 leaves them out."""

    in_dims: Annotated[
        str,
        Ui(
            tab="Basic",
            section="Flux.1 > Rank for layers",
            label="in_dims",
            widget="textbox",
            families=FLUX,
            lora_types=("Flux1",),
            shown_with=("flux1_checkbox", True),
            effect="honoured",
            sd_scripts_arg="network_args in_dims=…",
            since="2024-09-14",
            rare=True,
        ),
    ] = ""
    """Five ranks for the input layers, separated by commas: picture, time, vector, guidance, text. Empty
    leaves them untrained."""

    train_double_block_indices: Annotated[
        str,
        Ui(
            tab="Basic",
            section="Flux.1 > Blocks to train",
            label="train_double_block_indices",
            widget="textbox",
            families=FLUX,
            lora_types=("Flux1",),
            shown_with=("flux1_checkbox", True),
            effect="honoured",
            sd_scripts_arg="network_args train_double_block_indices=…",
            since="2024-09-16",
            rare=True,
        ),
    ] = "all"
    """Which of the 19 double blocks learn: "all", "none", or numbers and ranges such as 0-3,8."""

    train_single_block_indices: Annotated[
        str,
        Ui(
            tab="Basic",
            section="Flux.1 > Blocks to train",
            label="train_single_block_indices",
            widget="textbox",
            families=FLUX,
            lora_types=("Flux1",),
            shown_with=("flux1_checkbox", True),
            effect="honoured",
            sd_scripts_arg="network_args train_single_block_indices=…",
            since="2024-09-16",
            rare=True,
        ),
    ] = "all"
    """Which of the 38 single blocks learn: "all", "none", or numbers and ranges such as 0-3,8."""
