"""Changes to the pictures and the weight of noise levels."""

from __future__ import annotations

from typing import Annotated

from trainer.config._section import Section
from trainer.config.ui import SD, Number, Ui

__all__ = ["LossFields"]


class LossFields(Section):
    """Changes to the pictures and the weight of noise levels."""

    color_aug: Annotated[
        bool,
        Ui(
            tab="Advanced",
            label="Color augmentation",
            widget="checkbox",
            effect="honoured",
            sd_scripts_arg="--color_aug",
            since="2023-01-01",
            rare=True,
        ),
    ] = False
    """Change the colours of pictures a little each time. Useful against a colour cast, but latents
    cannot be cached."""

    flip_aug: Annotated[
        bool,
        Ui(
            tab="Advanced",
            label="Flip augmentation",
            widget="checkbox",
            effect="honoured",
            sd_scripts_arg="--flip_aug",
            since="2023-01-01",
        ),
    ] = False
    """Mirror pictures at random, which doubles a small set. Do not use it for faces or anything that is
    not symmetric."""

    masked_loss: Annotated[
        bool,
        Ui(
            tab="Advanced",
            label="Masked loss",
            widget="checkbox",
            effect="honoured",
            sd_scripts_arg="--masked_loss",
            since="2024-03-26",
            rare=True,
        ),
    ] = False
    """Learn only from the bright part of each picture's mask and ignore the rest. Masks are drawn on
    Captioning or come from a data set configuration's conditioning_data_dir; for alpha channels add --alpha_mask to
    the additional parameters."""

    scale_v_pred_loss_like_noise_pred: Annotated[
        bool,
        Ui(
            tab="Advanced",
            label="Scale v prediction loss",
            widget="checkbox",
            families=SD,
            effect="honoured",
            sd_scripts_arg="--scale_v_pred_loss_like_noise_pred",
            since="2023-06-04",
            rare=True,
        ),
    ] = False
    """Give models that predict velocity the same weighting of noise levels as other models."""

    min_snr_gamma: Annotated[
        int,
        Ui(
            tab="Advanced",
            label="Min SNR gamma",
            widget="slider",
            min=0,
            max=20,
            step=1,
            families=SD,
            effect="honoured",
            sd_scripts_arg="--min_snr_gamma",
            since="2023-03-28",
        ),
    ] = 0
    """Keep easy, nearly clean pictures from ruling the training. 5 is the usual value, 0 is off."""

    debiased_estimation_loss: Annotated[
        bool,
        Ui(
            tab="Advanced",
            label="Debiased Estimation loss",
            widget="checkbox",
            families=SD,
            effect="honoured",
            sd_scripts_arg="--debiased_estimation_loss",
            since="2023-11-11",
            rare=True,
        ),
    ] = False
    """Weight noise levels so that very noisy pictures count more, which can help composition."""

    bucket_no_upscale: Annotated[
        bool,
        Ui(
            tab="Advanced",
            label="Don't upscale bucket resolution",
            widget="checkbox",
            effect="honoured",
            sd_scripts_arg="--bucket_no_upscale",
            since="2023-02-05",
        ),
    ] = True
    """Never enlarge small pictures to fill a bucket; they train at their own size."""

    bucket_reso_steps: Annotated[
        int,
        Ui(
            tab="Advanced",
            label="Bucket resolution steps",
            widget="slider",
            min=1,
            max=128,
            step=1,
            effect="honoured",
            sd_scripts_arg="--bucket_reso_steps",
            since="2023-02-05",
        ),
    ] = 64
    """Bucket sides are multiples of this many pixels. SD 1.x, 2.x and FLUX need a multiple of 64, SDXL of 32."""

    random_crop: Annotated[
        bool,
        Ui(
            tab="Advanced",
            label="Random crop instead of center crop",
            widget="checkbox",
            effect="honoured",
            sd_scripts_arg="--random_crop",
            since="2023-02-05",
            rare=True,
        ),
    ] = False
    """Cut pictures at a random place instead of the middle. Latents cannot be cached then."""

    v_pred_like_loss: Annotated[
        Number,
        Ui(
            tab="Advanced",
            label="V Pred like loss",
            widget="slider",
            min=0,
            max=1,
            step=0.01,
            families=SD,
            effect="honoured",
            sd_scripts_arg="--v_pred_like_loss",
            since="2023-08-09",
            rare=True,
        ),
    ] = 0
    """Add a share of the error in the way velocity models count it, which strengthens very noisy
    pictures. 0 is off."""

    min_timestep: Annotated[
        int,
        Ui(
            tab="Advanced",
            label="Min Timestep",
            widget="slider",
            min=0,
            max=1000,
            step=1,
            families=("sd15", "sd2", "sdxl", "sd3"),
            effect="honoured",
            sd_scripts_arg="--min_timestep",
            since="2023-07-03",
            rare=True,
        ),
    ] = 0
    """Lowest noise level that is trained. A higher value leaves out fine detail."""

    max_timestep: Annotated[
        int,
        Ui(
            tab="Advanced",
            label="Max Timestep",
            widget="slider",
            min=0,
            max=1000,
            step=1,
            families=("sd15", "sd2", "sdxl", "sd3"),
            effect="honoured",
            sd_scripts_arg="--max_timestep",
            since="2023-07-03",
            rare=True,
        ),
    ] = 1000
    """Highest noise level that is trained. A lower value leaves out composition."""
