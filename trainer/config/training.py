"""Batches, epochs, steps, pictures, schedule and optimizer."""

from __future__ import annotations

from typing import Annotated

from trainer.config._section import Section
from trainer.config.ui import SD, Number, Ui

__all__ = ["TrainingFields"]


class TrainingFields(Section):
    """Batches, epochs, steps, pictures, schedule and optimizer."""

    train_inpainting: Annotated[
        bool,
        Ui(
            tab="Basic",
            label="Train inpainting model",
            widget="checkbox",
            families=SD,
            effect="none",
            reason="Inpainting models are not trained.",
            sd_scripts_arg="--train_inpainting",
            since="2026-07-08",
            rare=True,
        ),
    ] = False
    """Train a model that fills in masked parts of a picture. It needs an inpainting base model with nine
    input channels."""

    train_batch_size: Annotated[
        int,
        Ui(
            tab="Basic",
            label="Train batch size",
            widget="slider",
            min=1,
            max=64,
            step=1,
            effect="honoured",
            sd_scripts_arg="--train_batch_size",
            since="2022-12-28",
        ),
    ] = 1
    """Pictures that go through the model at once. More is faster overall and smoother, but needs more
    memory."""

    epoch: Annotated[
        int,
        Ui(
            tab="Basic",
            label="Epoch",
            widget="number",
            step=1,
            effect="honoured",
            sd_scripts_arg=None,
            since="2022-12-28",
        ),
    ] = 1
    """How often the training goes through all pictures, repeats included. It only counts if both Max
    train steps and Max train epoch are 0."""

    max_train_epochs: Annotated[
        int,
        Ui(
            tab="Basic",
            label="Max train epoch",
            widget="number",
            min=0,
            step=1,
            effect="honoured",
            sd_scripts_arg="--max_train_epochs",
            since="2023-01-15",
        ),
    ] = 0
    """If above 0, the training ends after this many passes over the data, whatever the step count says."""

    max_train_steps: Annotated[
        int,
        Ui(
            tab="Basic",
            label="Max train steps",
            widget="number",
            step=1,
            effect="honoured",
            sd_scripts_arg="--max_train_steps",
            since="2023-08-09",
        ),
    ] = 1600
    """Number of training steps. 0 means that it is worked out from pictures, repeats, batch size and
    epochs; too many steps burn the subject in."""

    save_every_n_epochs: Annotated[
        int,
        Ui(
            tab="Basic",
            label="Save every N epochs",
            widget="number",
            step=1,
            effect="honoured",
            sd_scripts_arg="--save_every_n_epochs",
            since="2022-12-28",
        ),
    ] = 1
    """Save a LoRA after every so many epochs, so that you can pick the best one afterwards. 0 saves only
    the last."""

    caption_extension: Annotated[
        str,
        Ui(
            tab="Basic",
            label="Caption file extension",
            widget="dropdown",
            choices=("", ".cap", ".caption", ".txt"),
            free_text=True,
            effect="honoured",
            sd_scripts_arg="--caption_extension",
            since="2023-01-15",
        ),
    ] = ".txt"
    """Ending of the text file with the caption beside each picture. If there is no such file, the name
    of the folder is the caption."""

    seed: Annotated[
        int,
        Ui(
            tab="Basic",
            label="Seed",
            widget="number",
            min=0,
            step=1,
            effect="honoured",
            sd_scripts_arg="--seed",
            since="2022-12-28",
        ),
    ] = 0
    """Starting number of the random generator. The same seed repeats a run; 0 draws a new one each time."""

    cache_latents: Annotated[
        bool,
        Ui(
            tab="Basic",
            label="Cache latents",
            widget="checkbox",
            effect="honoured",
            sd_scripts_arg="--cache_latents",
            since="2023-01-15",
        ),
    ] = True
    """Encode every picture once and keep the result in memory. Much faster and saves video memory, but
    excludes colour changes and random crops."""

    cache_latents_to_disk: Annotated[
        bool,
        Ui(
            tab="Basic",
            label="Cache latents to disk",
            widget="checkbox",
            effect="adapted",
            reason="A file made from another picture, VAE or size is never used; Kohya checks little.",
            sd_scripts_arg="--cache_latents_to_disk",
            since="2023-05-01",
        ),
    ] = False
    """Keep the encoded pictures in files beside the originals, so that the next run starts faster and
    less memory is needed."""

    lr_scheduler: Annotated[
        str,
        Ui(
            tab="Basic",
            label="LR Scheduler",
            widget="dropdown",
            choices=(
                "adafactor",
                "constant",
                "constant_with_warmup",
                "cosine",
                "cosine_with_restarts",
                "linear",
                "piecewise_constant",
                "polynomial",
                "cosine_with_min_lr",
                "inverse_sqrt",
                "warmup_stable_decay",
            ),
            effect="honoured",
            sd_scripts_arg="--lr_scheduler",
            since="2022-12-28",
        ),
    ] = "cosine"
    """How the learning rate changes during the run. "cosine" falls gently to zero, "constant" stays the
    same."""

    lr_scheduler_type: Annotated[
        str,
        Ui(
            tab="Basic",
            label="LR Scheduler type",
            widget="dropdown",
            choices=("", "CosineAnnealingLR"),
            free_text=True,
            effect="honoured",
            sd_scripts_arg="--lr_scheduler_type",
            since="2024-05-25",
            rare=True,
        ),
    ] = ""
    """Class name of another scheduler from PyTorch, or a module path. If given, it takes the place of
    the LR Scheduler."""

    optimizer: Annotated[
        str,
        Ui(
            tab="Basic",
            label="Optimizer",
            widget="dropdown",
            choices=(
                "AdamW",
                "AdamWScheduleFree",
                "AdamW8bit",
                "Adafactor",
                "bitsandbytes.optim.AdEMAMix8bit",
                "bitsandbytes.optim.PagedAdEMAMix8bit",
                "DAdaptation",
                "DAdaptAdaGrad",
                "DAdaptAdam",
                "DAdaptAdan",
                "DAdaptAdanIP",
                "DAdaptAdamPreprint",
                "DAdaptLion",
                "DAdaptSGD",
                "Lion",
                "Lion8bit",
                "PagedAdamW8bit",
                "PagedAdamW32bit",
                "PagedLion8bit",
                "Prodigy",
                "prodigyplus.ProdigyPlusScheduleFree",
                "pytorch_optimizer.CAME",
                "RAdamScheduleFree",
                "SGDNesterov",
                "SGDNesterov8bit",
                "SGDScheduleFree",
            ),
            free_text=True,
            effect="honoured",
            sd_scripts_arg="--optimizer_type",
            since="2023-02-19",
        ),
    ] = "AdamW8bit"
    """The rule that turns errors into changes of the weights. AdamW8bit is a good start; Prodigy and
    DAdapt find the learning rate themselves and want it set to 1."""

    max_grad_norm: Annotated[
        Number,
        Ui(
            tab="Basic",
            label="Max grad norm",
            widget="number",
            step=1,
            effect="honoured",
            sd_scripts_arg="--max_grad_norm",
            since="2023-12-10",
        ),
    ] = 1
    """Upper limit for the size of one update, which protects against outliers. As in Kohya, 0 means 1;
    only the additional parameter --max_grad_norm 0 turns the limit off."""

    lr_scheduler_args: Annotated[
        str,
        Ui(
            tab="Basic",
            label="LR scheduler extra arguments",
            widget="textbox",
            effect="honoured",
            sd_scripts_arg="--lr_scheduler_args",
            since="2023-08-09",
            rare=True,
        ),
    ] = ""
    """Further options for the scheduler as name=value, separated by spaces."""

    optimizer_args: Annotated[
        str,
        Ui(
            tab="Basic",
            label="Optimizer extra arguments",
            widget="textbox",
            effect="honoured",
            sd_scripts_arg="--optimizer_args",
            since="2023-02-22",
        ),
    ] = ""
    """Further options for the optimizer as name=value, separated by spaces, for example
    weight_decay=0.01 betas=0.9,0.99."""

    learning_rate: Annotated[
        Number,
        Ui(
            tab="Basic",
            label="Learning rate",
            widget="number",
            min=-1,
            max=1,
            step=1e-06,
            effect="honoured",
            sd_scripts_arg="--learning_rate",
            since="2022-12-28",
        ),
    ] = 0.0001
    """How big the changes of each step are, for every part without a rate of its own. Too high burns the
    LoRA, too low learns nothing."""

    lr_warmup: Annotated[
        int,
        Ui(
            tab="Basic",
            label="LR warmup (% of total steps)",
            widget="slider",
            min=0,
            max=100,
            step=1,
            effect="honoured",
            sd_scripts_arg="--lr_warmup_steps as a fraction",
            since="2022-12-28",
        ),
    ] = 10
    """Share of the run, in percent, during which the learning rate climbs from zero. A short climb
    avoids a rough start."""

    lr_warmup_steps: Annotated[
        int,
        Ui(
            tab="Basic",
            label="LR warmup steps (override)",
            widget="number",
            min=0,
            step=1,
            effect="honoured",
            sd_scripts_arg="--lr_warmup_steps",
            since="2024-09-12",
        ),
    ] = 0
    """The same climb counted in steps. If it is above 0, the percentage is ignored."""

    lr_scheduler_num_cycles: Annotated[
        int,
        Ui(
            tab="Basic",
            label="LR # cycles",
            widget="number",
            min=1,
            step=1,
            effect="honoured",
            sd_scripts_arg="--lr_scheduler_num_cycles",
            since="2023-01-30",
        ),
    ] = 1
    """How often "cosine_with_restarts" starts over during the run."""

    lr_scheduler_power: Annotated[
        Number,
        Ui(
            tab="Basic",
            label="LR power",
            widget="number",
            min=0,
            step=0.01,
            effect="honoured",
            sd_scripts_arg="--lr_scheduler_power",
            since="2023-01-30",
        ),
    ] = 1
    """Bend of the "polynomial" curve: 1 is a straight line, more falls faster at first."""

    max_resolution: Annotated[
        str,
        Ui(
            tab="Basic",
            label="Max resolution",
            widget="textbox",
            effect="honoured",
            sd_scripts_arg="--resolution",
            since="2022-12-28",
        ),
    ] = "512,512"
    """Picture size for training as "width,height". With buckets it is the area that pictures are shrunk
    to; SD 1.5 was made for 512,512."""

    stop_text_encoder_training: Annotated[
        int,
        Ui(
            tab="Basic",
            label="Stop TE (% of total steps)",
            widget="slider",
            min=-1,
            max=100,
            step=1,
            families=SD,
            effect="adapted",
            reason="Kohya shows this field but ignores it for a LoRA; here the text encoder really stops.",
            sd_scripts_arg=None,
            since="2022-12-28",
            rare=True,
        ),
    ] = 0
    """Percent of all steps after which the text encoder stops learning while the rest goes on. 0 trains
    it to the end, -1 not at all."""

    enable_bucket: Annotated[
        bool,
        Ui(
            tab="Basic",
            label="Enable buckets",
            widget="checkbox",
            effect="honoured",
            sd_scripts_arg="--enable_bucket",
            since="2022-12-28",
        ),
    ] = True
    """Sort pictures by shape so that portraits and landscapes train without being cut to one shape."""

    min_bucket_reso: Annotated[
        int,
        Ui(
            tab="Basic",
            label="Minimum bucket resolution",
            widget="slider",
            min=64,
            max=4096,
            step=64,
            effect="honoured",
            sd_scripts_arg="--min_bucket_reso",
            since="2023-07-16",
        ),
    ] = 256
    """Shortest side, in pixels, that a bucket may have. It only counts if small pictures may be
    enlarged."""

    max_bucket_reso: Annotated[
        int,
        Ui(
            tab="Basic",
            label="Maximum bucket resolution",
            widget="slider",
            min=64,
            max=4096,
            step=64,
            effect="honoured",
            sd_scripts_arg="--max_bucket_reso",
            since="2023-07-16",
        ),
    ] = 2048
    """Longest side, in pixels, that a bucket may have. It only counts if small pictures may be enlarged."""
