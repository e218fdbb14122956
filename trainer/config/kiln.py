"""Settings of our own, which Kohya's page does not have.

They are written into the JSON only where they are set: Kohya's page leaves keys alone that it does not
know, so such a file still loads there, and trains there without them.
"""

from __future__ import annotations

from typing import Annotated

from trainer.config._section import Section
from trainer.config.ui import Ui

__all__ = ["KilnFields"]


class KilnFields(Section):
    """Settings of our own."""

    quantized_base: Annotated[
        str,
        Ui(
            tab="Advanced",
            section="LoRA Kiln",
            label="Quantized base",
            widget="dropdown",
            choices=("", "int8", "nf4"),
            effect="adapted",
            reason="Kohya has no such setting and trains the same file without it.",
            sd_scripts_arg=None,
            since="2026-11-21",
        ),
    ] = ""
    """Keep the frozen base model in 8 or 4 bits: int8 takes the memory of fp8 base and is more exact,
    nf4 takes half of that and is less exact."""

    origin_step: Annotated[
        int,
        Ui(
            tab="Advanced",
            section="LoRA Kiln",
            label="Steps before this run",
            widget="number",
            min=0,
            step=1,
            effect="adapted",
            reason="Kohya has no such setting and counts every run from 0.",
            sd_scripts_arg=None,
            since="2026-11-22",
        ),
    ] = 0
    """Steps that the LoRA network weights were trained for: names of files and samples, metadata and charts
    count on from there. Without network weights it has no effect."""

    origin_epoch: Annotated[
        int,
        Ui(
            tab="Advanced",
            section="LoRA Kiln",
            label="Epochs before this run",
            widget="number",
            min=0,
            step=1,
            effect="adapted",
            reason="Kohya has no such setting and counts every run from 1.",
            sd_scripts_arg=None,
            since="2026-11-22",
        ),
    ] = 0
    """Epochs that the LoRA network weights were trained for: names of files that are saved after an epoch
    count on from there. Without network weights it has no effect."""

    skip_verdict: Annotated[
        bool,
        Ui(
            tab="Advanced",
            section="LoRA Kiln",
            label="No verdict while training",
            widget="checkbox",
            effect="adapted",
            reason="Kohya has no such setting and measures nothing.",
            sd_scripts_arg=None,
            since="2026-11-22",
        ),
    ] = False
    """Do not measure the LoRA at each save for Review's verdict, which takes at most 3 percent of the training's
    time. The result is the same either way, and files can be measured later."""

    hold_out: Annotated[
        bool,
        Ui(
            tab="Advanced",
            section="LoRA Kiln",
            label="Hold out pictures for the verdict",
            widget="checkbox",
            effect="adapted",
            reason="Kohya has no such setting and trains all pictures.",
            sd_scripts_arg=None,
            since="2026-11-22",
        ),
    ] = False
    """Do not train one picture of eight (8 at most, none of fewer than 16): Review then shows whether the LoRA also
    learnt pictures that it has not seen. On in new settings and in presets; off in Kohya's files, which train all
    pictures."""
