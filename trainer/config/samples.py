"""Sample pictures during the run."""

from __future__ import annotations

from typing import Annotated

from trainer.config._section import Section
from trainer.config.ui import Ui

__all__ = ["SampleFields"]


class SampleFields(Section):
    """Sample pictures during the run."""

    sample_every_n_steps: Annotated[
        int,
        Ui(
            tab="Samples",
            label="Sample every n steps",
            widget="number",
            step=1,
            effect="honoured",
            sd_scripts_arg="--sample_every_n_steps",
            since="2023-03-06",
        ),
    ] = 0
    """Draw sample pictures after every so many steps; 0 is off. It is ignored if epochs are given below."""

    sample_every_n_epochs: Annotated[
        int,
        Ui(
            tab="Samples",
            label="Sample every n epochs",
            widget="number",
            step=1,
            effect="honoured",
            sd_scripts_arg="--sample_every_n_epochs",
            since="2023-03-06",
        ),
    ] = 0
    """Draw sample pictures after every so many epochs; 0 is off."""

    sample_sampler: Annotated[
        str,
        Ui(
            tab="Samples",
            label="Sample sampler",
            widget="dropdown",
            choices=(
                "ddim",
                "pndm",
                "lms",
                "euler",
                "euler_a",
                "heun",
                "dpm_2",
                "dpm_2_a",
                "dpmsolver",
                "dpmsolver++",
                "dpmsingle",
                "k_lms",
                "k_euler",
                "k_euler_a",
                "k_dpm_2",
                "k_dpm_2_a",
            ),
            effect="honoured",
            sd_scripts_arg="--sample_sampler",
            since="2023-03-06",
        ),
    ] = "euler_a"
    """Method by which sample pictures are drawn. euler_a is quick and lively, ddim calm."""

    sample_prompts: Annotated[
        str,
        Ui(
            tab="Samples",
            label="Sample prompts",
            widget="textbox",
            lines=8,
            effect="honoured",
            sd_scripts_arg="--sample_prompts",
            since="2023-03-06",
        ),
    ] = ""
    """One prompt in each line for the sample pictures. Options go at the end: --n what to avoid, --w
    width, --h height, --d seed, --s steps, --l guidance."""
