"""The tools in the shell: ``python -m trainer inspect``, ``merge``, ``resize`` and so on (`VERBS`).

Nothing heavy is imported before a command runs.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console

__all__ = ["VERBS", "add_commands"]

VERBS = ("inspect", "merge", "merge-into", "resize", "extract", "convert-lora")
"""The words that these commands start with."""

PRECISIONS = ("float", "fp16", "bf16")


def add_commands(commands: Any) -> None:
    """Add the tools' commands to the program's.

    Args:
        commands: What ``ArgumentParser.add_subparsers`` gave.
    """
    command = commands.add_parser("inspect", help="say what a LoRA file holds")
    command.add_argument("file", type=Path, help="a LoRA")
    command.add_argument(
        "--config", type=Path, metavar="JSON", help="save its settings as a Kohya configuration"
    )
    command.add_argument("--json", action="store_true", help="print JSON")
    command.set_defaults(run=_inspect)

    command = commands.add_parser("merge", help="merge LoRA files into one")
    _several(command)
    command.add_argument(
        "--method",
        choices=("exact", "svd", "sum", "concat"),
        default="exact",
        help="exact: what each LoRA does, added (default); svd: the same at --rank; sum, concat: as sd-scripts' "
        "merge_lora.py, whose ratios count squared",
    )
    command.add_argument("--rank", type=int, help="of the result, for svd")
    command.add_argument("--conv-rank", type=int, help="the same for 3x3 convolutions")
    command.add_argument("--shuffle", action="store_true", help="change the order of the ranks")
    command.set_defaults(run=partial(_use, "merge"))

    command = commands.add_parser("merge-into", help="add LoRAs to a model file")
    command.add_argument("model", type=Path, help="an SD, SDXL or FLUX.1 file, or FLUX.1's CLIP-L or T5")
    _several(command)
    command.set_defaults(run=partial(_use, "merge-into"))

    command = commands.add_parser("resize", help="bring a LoRA to another rank")
    command.add_argument("file", type=Path, help="a LoRA")
    command.add_argument("output", type=Path, help="where to save it (.safetensors)")
    command.add_argument("--rank", type=int, required=True, help="new rank; with --dynamic the largest one")
    command.add_argument("--conv-rank", type=int, help="the same for layers stored as convolutions")
    command.add_argument(
        "--dynamic",
        choices=("sv_ratio", "sv_fro", "sv_cumulative"),
        dest="method",
        help="choose the rank of each layer",
    )
    command.add_argument("--parameter", type=float, help="of --dynamic: a ratio for sv_ratio, else a share")
    _precision(command)
    command.set_defaults(run=partial(_use, "resize"))

    command = commands.add_parser("extract", help="make a LoRA from two models")
    command.add_argument("original", type=Path, help="the base model's file")
    command.add_argument("tuned", type=Path, help="the file of the model made from it")
    command.add_argument("output", type=Path, help="where to save the LoRA (.safetensors)")
    command.add_argument("--rank", type=int, required=True)
    command.add_argument("--conv-rank", type=int, help="of 3x3 convolutions, which are left out otherwise")
    command.add_argument(
        "--clamp-quantile", type=float, default=0.99, help="largest values are held to it (0.99)"
    )
    command.add_argument(
        "--min-diff", type=float, default=0.01, help="text encoders that differ by less are left out (0.01)"
    )
    command.add_argument("--device", help="where to compute, e.g. cuda")
    _precision(command, "fp16")
    command.set_defaults(run=partial(_use, "extract"))

    command = commands.add_parser("convert-lora", help="write a LoRA with another program's layer names")
    command.add_argument("file", type=Path, help="a LoRA")
    command.add_argument("output", type=Path, help="where to save it (.safetensors)")
    command.add_argument("--to", choices=("kohya", "diffusers", "bfl"), required=True)
    _precision(command)
    command.set_defaults(run=partial(_use, "convert-lora"))


def _several(command: argparse.ArgumentParser) -> None:
    command.add_argument("files", type=Path, nargs="+", help="LoRA files")
    command.add_argument(
        "--ratio",
        type=float,
        action="append",
        dest="ratios",
        help="strength of a file, in their order; 1 if left out",
    )
    command.add_argument("--output", type=Path, required=True, help="where to save the result (.safetensors)")
    _precision(command)


def _precision(command: argparse.ArgumentParser, default: str | None = None) -> None:
    text = f"default {default}" if default else "as in the file if left out"
    command.add_argument("--precision", choices=PRECISIONS, default=default, help=f"of the result; {text}")


def _say(text: str) -> None:
    Console().print(text, markup=False, highlight=False, soft_wrap=True)


def _inspect(options: argparse.Namespace) -> int:
    from trainer.tools.inspect import inspect, lines, save_config

    found = inspect(options.file)
    if options.json:
        values = dataclasses.asdict(found)
        sys.stdout.write(json.dumps(values, indent=2, ensure_ascii=False, default=str) + "\n")
    else:
        for line in lines(found):
            _say(line)
    if options.config is not None:
        save_config(options.file, options.config, Console(stderr=True).print if options.json else _say)
    return 0


def _use(tool: str, options: argparse.Namespace) -> int:
    from trainer.tools.work import use

    use(tool, vars(options), _say)
    return 0
