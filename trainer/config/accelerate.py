"""Precision, devices and processes."""

from __future__ import annotations

from typing import Annotated

from trainer.config._section import Section
from trainer.config.ui import Ui

__all__ = ["AccelerateFields"]


class AccelerateFields(Section):
    """Precision, devices and processes."""

    mixed_precision: Annotated[
        str,
        Ui(
            tab="Accelerate launch",
            section="Resource Selection",
            label="Mixed precision",
            widget="dropdown",
            choices=("no", "fp16", "bf16", "fp8"),
            trained_choices=("no", "fp16", "bf16"),
            effect="honoured",
            reason="fp8 needs libraries that are not part of this program.",
            sd_scripts_arg="accelerate --mixed_precision and TOML mixed_precision",
            since="2022-12-28",
        ),
    ] = "fp16"
    """Number format for the calculations. bf16 is best where the card has it, fp16 suits older cards, no
    is slow and exact."""

    num_processes: Annotated[
        int,
        Ui(
            tab="Accelerate launch",
            section="Resource Selection",
            label="Number of processes",
            widget="number",
            min=1,
            step=1,
            effect="honoured",
            sd_scripts_arg="accelerate --num_processes",
            since="2024-02-02",
            rare=True,
        ),
    ] = 1
    """How many training processes run, usually one for each graphics card."""

    num_machines: Annotated[
        int,
        Ui(
            tab="Accelerate launch",
            section="Resource Selection",
            label="Number of machines",
            widget="number",
            min=1,
            step=1,
            effect="honoured",
            sd_scripts_arg="accelerate --num_machines",
            since="2024-02-02",
            rare=True,
        ),
    ] = 1
    """How many computers share the training."""

    num_cpu_threads_per_process: Annotated[
        int,
        Ui(
            tab="Accelerate launch",
            section="Resource Selection",
            label="Number of CPU threads per core",
            widget="slider",
            min=1,
            step=1,
            effect="adapted",
            reason="It counts where several processes train; a single one uses as many as suit the machine.",
            sd_scripts_arg="accelerate --num_cpu_threads_per_process",
            since="2022-12-28",
            rare=True,
        ),
    ] = 2
    """CPU threads for each process. It matters little when a graphics card does the work."""

    dynamo_backend: Annotated[
        str,
        Ui(
            tab="Accelerate launch",
            section="Resource Selection",
            label="Dynamo backend",
            widget="dropdown",
            choices=(
                "no",
                "eager",
                "aot_eager",
                "inductor",
                "aot_ts_nvfuser",
                "nvprims_nvfuser",
                "cudagraphs",
                "ofi",
                "fx2trt",
                "onnxrt",
                "tensorrt",
                "ipex",
                "tvm",
            ),
            effect="adapted",
            reason="The repeated blocks of the UNet are compiled one by one instead of the whole model.",
            sd_scripts_arg="accelerate --dynamo_backend and TOML dynamo_backend",
            since="2024-04-15",
            rare=True,
        ),
    ] = "no"
    """Compiler for the model. It can speed up long runs but needs minutes to start."""

    dynamo_mode: Annotated[
        str,
        Ui(
            tab="Accelerate launch",
            section="Resource Selection",
            label="Dynamo mode",
            widget="dropdown",
            choices=("default", "reduce-overhead", "max-autotune"),
            effect="adapted",
            reason="The repeated blocks of the UNet are compiled one by one instead of the whole model.",
            sd_scripts_arg="accelerate --dynamo_mode",
            since="2024-04-15",
            rare=True,
        ),
    ] = "default"
    """How hard the compiler tries: more effort takes longer to start."""

    dynamo_use_fullgraph: Annotated[
        bool,
        Ui(
            tab="Accelerate launch",
            section="Resource Selection",
            label="Dynamo use fullgraph",
            widget="checkbox",
            effect="adapted",
            reason="The repeated blocks of the UNet are compiled one by one instead of the whole model.",
            sd_scripts_arg="accelerate --dynamo_use_fullgraph",
            since="2024-04-15",
            rare=True,
        ),
    ] = False
    """Ask the compiler for one piece without gaps, or an error."""

    dynamo_use_dynamic: Annotated[
        bool,
        Ui(
            tab="Accelerate launch",
            section="Resource Selection",
            label="Dynamo use dynamic",
            widget="checkbox",
            effect="adapted",
            reason="The repeated blocks of the UNet are compiled one by one instead of the whole model.",
            sd_scripts_arg="accelerate --dynamo_use_dynamic",
            since="2024-04-15",
            rare=True,
        ),
    ] = False
    """Let the compiler prepare for pictures of changing size, so that it compiles fewer times."""

    multi_gpu: Annotated[
        bool,
        Ui(
            tab="Accelerate launch",
            section="Hardware Selection",
            label="Multi GPU",
            widget="checkbox",
            effect="adapted",
            reason="The number of processes decides: more than one means several cards.",
            sd_scripts_arg="accelerate --multi_gpu",
            since="2024-02-02",
            rare=True,
        ),
    ] = False
    """Share the training between several graphics cards."""

    gpu_ids: Annotated[
        str,
        Ui(
            tab="Accelerate launch",
            section="Distributed GPUs",
            label="GPU IDs",
            widget="textbox",
            effect="honoured",
            sd_scripts_arg="accelerate --gpu_ids",
            since="2024-02-02",
            rare=True,
        ),
    ] = ""
    """Numbers of the graphics cards to use, separated by commas."""

    main_process_port: Annotated[
        int,
        Ui(
            tab="Accelerate launch",
            section="Distributed GPUs",
            label="Main process port",
            widget="number",
            min=0,
            max=65535,
            step=1,
            effect="honoured",
            sd_scripts_arg="accelerate --main_process_port",
            since="2024-03-29",
            rare=True,
        ),
    ] = 0
    """Network port at which the processes of a shared run meet."""

    extra_accelerate_launch_args: Annotated[
        str,
        Ui(
            tab="Accelerate launch",
            label="Extra accelerate launch arguments",
            widget="textbox",
            effect="adapted",
            reason="Only options that say how processes start and find each other are taken.",
            sd_scripts_arg="appended to the accelerate command",
            since="2024-04-02",
            rare=True,
        ),
    ] = ""
    """Further options for the accelerate launch command."""
