"""Changes to the noise, and what is left out at random."""

from __future__ import annotations

from typing import Annotated

from trainer.config._section import Section
from trainer.config.ui import SD, Number, Ui

__all__ = ["NoiseFields"]


class NoiseFields(Section):
    """Changes to the noise, and what is left out at random."""

    noise_offset_type: Annotated[
        str,
        Ui(
            tab="Advanced",
            label="Noise offset type",
            widget="dropdown",
            choices=("Original", "Multires"),
            families=SD,
            effect="honoured",
            sd_scripts_arg="written as noise_offset_type, which the backend does not read",
            since="2023-05-07",
        ),
    ] = "Original"
    """Which of the two ways of changing the noise is used. Only the fields of the chosen one count."""

    noise_offset: Annotated[
        Number,
        Ui(
            tab="Advanced",
            label="Noise offset",
            widget="slider",
            min=0,
            max=1,
            step=0.01,
            families=SD,
            effect="honoured",
            sd_scripts_arg="--noise_offset",
            since="2023-02-22",
        ),
    ] = 0
    """Shift the brightness of the noise, so that very dark and very bright pictures can be learned. 0.05
    to 0.1 is usual."""

    noise_offset_random_strength: Annotated[
        bool,
        Ui(
            tab="Advanced",
            label="Noise offset random strength",
            widget="checkbox",
            families=SD,
            effect="honoured",
            sd_scripts_arg="--noise_offset_random_strength",
            since="2024-03-26",
            rare=True,
        ),
    ] = False
    """Draw the strength of the offset anew each step, between 0 and the value above."""

    adaptive_noise_scale: Annotated[
        Number,
        Ui(
            tab="Advanced",
            label="Adaptive noise scale",
            widget="slider",
            min=-1,
            max=1,
            step=0.001,
            families=SD,
            effect="honoured",
            sd_scripts_arg="--adaptive_noise_scale",
            since="2023-05-07",
            rare=True,
        ),
    ] = 0
    """Let the offset grow with the brightness of each picture. It needs a noise offset."""

    multires_noise_iterations: Annotated[
        int,
        Ui(
            tab="Advanced",
            label="Multires noise iterations",
            widget="slider",
            min=0,
            max=64,
            step=1,
            families=SD,
            shown_with=("noise_offset_type", "Multires"),
            effect="honoured",
            sd_scripts_arg="--multires_noise_iterations",
            since="2023-05-03",
            rare=True,
        ),
    ] = 0
    """Mix in coarser noise this many times, for more contrast. 6 to 10 is usual, 0 is off."""

    multires_noise_discount: Annotated[
        Number,
        Ui(
            tab="Advanced",
            label="Multires noise discount",
            widget="slider",
            min=0,
            max=1,
            step=0.01,
            families=SD,
            shown_with=("noise_offset_type", "Multires"),
            effect="honoured",
            sd_scripts_arg="--multires_noise_discount",
            since="2023-05-03",
            rare=True,
        ),
    ] = 0.3
    """How strong each coarser layer of noise is compared with the finer one."""

    ip_noise_gamma: Annotated[
        Number,
        Ui(
            tab="Advanced",
            label="IP noise gamma",
            widget="slider",
            min=0,
            max=1,
            step=0.01,
            families=("sd15", "sd2", "sdxl", "flux1", "lumina", "anima", "hunyuan"),
            effect="honoured",
            sd_scripts_arg="--ip_noise_gamma",
            since="2024-03-26",
            rare=True,
        ),
    ] = 0
    """Add extra noise to what the model sees but not to what it should predict, which makes it sturdier.
    0.1 is usual, 0 is off."""

    ip_noise_gamma_random_strength: Annotated[
        bool,
        Ui(
            tab="Advanced",
            label="IP noise gamma random strength",
            widget="checkbox",
            families=("sd15", "sd2", "sdxl", "flux1", "lumina", "anima", "hunyuan"),
            effect="honoured",
            sd_scripts_arg="--ip_noise_gamma_random_strength",
            since="2024-03-26",
            rare=True,
        ),
    ] = False
    """Draw the strength of that extra noise anew each step, between 0 and the value above."""

    caption_dropout_every_n_epochs: Annotated[
        int,
        Ui(
            tab="Advanced",
            label="Dropout caption every n epochs",
            widget="number",
            step=1,
            effect="honoured",
            sd_scripts_arg="--caption_dropout_every_n_epochs",
            since="2023-02-07",
            rare=True,
        ),
    ] = 0
    """In every so many epochs all captions are left out; 0 is off."""

    caption_dropout_rate: Annotated[
        Number,
        Ui(
            tab="Advanced",
            label="Rate of caption dropout",
            widget="slider",
            min=0,
            max=1,
            step=0.01,
            effect="honoured",
            sd_scripts_arg="--caption_dropout_rate",
            since="2023-02-07",
        ),
    ] = 0
    """Chance that a picture is trained without its caption, so that the LoRA also works with short
    prompts."""

    vae_batch_size: Annotated[
        int,
        Ui(
            tab="Advanced",
            label="VAE batch size",
            widget="slider",
            min=0,
            max=32,
            step=1,
            effect="honoured",
            sd_scripts_arg="--vae_batch_size",
            since="2023-03-21",
            rare=True,
        ),
    ] = 0
    """Pictures that are encoded at once while latents are cached. More is faster and needs more memory."""

    blocks_to_swap: Annotated[
        int,
        Ui(
            tab="Advanced",
            label="Blocks to swap",
            widget="slider",
            min=0,
            max=57,
            step=1,
            families=("sd3", "flux1", "lumina", "anima", "hunyuan"),
            effect="adapted",
            reason="SD and SDXL models swap blocks too; the blocks in host memory are never copied back.",
            sd_scripts_arg="--blocks_to_swap",
            since="2024-11-16",
        ),
    ] = 0
    """Number of blocks of the model kept in main memory and fetched when needed: less video memory,
    slower."""

    show_timesteps: Annotated[
        str,
        Ui(
            tab="Advanced",
            label="Show timesteps",
            widget="dropdown",
            choices=("", "console", "image"),
            families=("flux1", "sd3", "anima", "lumina"),
            effect="none",
            reason="It belongs to families that this version does not train.",
            sd_scripts_arg="--show_timesteps",
            since="2026-07-08",
            rare=True,
        ),
    ] = ""
    """Draw how often each noise level is trained, and stop without training."""

    show_timesteps_resolution: Annotated[
        str,
        Ui(
            tab="Advanced",
            label="Show timesteps resolution",
            widget="textbox",
            families=("flux1", "sd3", "anima", "lumina"),
            effect="none",
            reason="It belongs to families that this version does not train.",
            sd_scripts_arg="--show_timesteps_resolution",
            since="2026-07-08",
            rare=True,
        ),
    ] = "1024"
    """Picture size assumed for that drawing."""
