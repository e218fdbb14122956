"""Train the demo world with kohya-ss/sd-scripts, from a Kohya JSON, and leave its results folder as it makes it.

Runs in the environment of sd-scripts (see README.md), not in ours. Nothing is recorded or replayed:

    python run_sdscripts_demo.py SETTINGS.json --source sd-scripts

sd-scripts knows one size of UNet. It is told that of the demo's base model, by the constants that it
builds its own from, and that a block without attention may have a downsampler. The demo's tokenizer stands
where it looks for CLIP's, the text encoder's tensors get the names that older transformers know, and
torchvision has the stand-in of `run_sdscripts`. Nothing else is changed. Beside the results lies the JSON,
as Kohya's page leaves it there.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

REPOSITORY = Path(__file__).resolve().parents[2]


def fit(base: Path) -> None:
    """Let sd-scripts build the UNet of ``base``, a diffusers folder."""
    unets: Any = importlib.import_module("library.original_unet")
    unet = json.loads((base / "unet" / "config.json").read_text(encoding="utf-8"))
    widths, groups = tuple(unet["block_out_channels"]), unet["norm_num_groups"]
    unets.BLOCK_OUT_CHANNELS = widths
    unets.TIMESTEP_INPUT_DIM, unets.TIME_EMBED_DIM = widths[0], widths[0] * 4
    unets.LAYERS_PER_BLOCK, unets.LAYERS_PER_BLOCK_UP = unet["layers_per_block"], unet["layers_per_block"] + 1
    unets.NORM_GROUPS = unets.TRANSFORMER_NORM_NUM_GROUPS = groups
    unets.DOWN_BLOCK_TYPES, unets.UP_BLOCK_TYPES = unet["down_block_types"], unet["up_block_types"]
    make = unets.DownBlock2D.__init__

    def with_downsampler(self: Any, *args: Any, **kwargs: Any) -> None:
        make(self, *args, **kwargs)
        if self.downsamplers is not None:
            # In SD 1.5 no such block has one, and sd-scripts' list does not register it.
            self.downsamplers = torch.nn.ModuleList(self.downsamplers)

    unets.DownBlock2D.__init__ = with_downsampler


def copy_base(base: Path, copy: Path) -> None:
    """Copy the base model, with the tensor names that transformers 4 wrote into a text encoder's file."""
    shutil.copytree(base, copy)
    weights = copy / "text_encoder" / "model.safetensors"
    tensors = load_file(weights)
    save_file({f"text_model.{name}": tensor for name, tensor in tensors.items()}, weights, {"format": "pt"})


def page_options(config: dict[str, Any], scratch: Path) -> tuple[dict[str, Any], list[str]]:
    """What Kohya's page gives sd-scripts for the JSON, with tokenizer, log and samples."""
    cases = importlib.import_module("cases")
    base = REPOSITORY / config["pretrained_model_name_or_path"]  # an absolute path stays what it is
    copy_base(base, scratch / base.name)
    config = {**config, "pretrained_model_name_or_path": str(scratch / base.name)}
    # Its own defaults, at which it stops when they are given: the former always, the latter in bf16 on a CPU.
    for key, default in (("max_token_length", 75), ("clip_skip", 1)):
        if config[key] == default:
            del config[key]
    values, extra = cases.engine_options(config)
    shutil.copytree(base / "tokenizer", scratch / "openai_clip-vit-large-patch14")
    values["tokenizer_cache_dir"] = str(scratch)
    if config["logging_dir"]:
        values |= {"logging_dir": config["logging_dir"], "log_with": "tensorboard"}
    if config["sample_prompts"] and config["sample_every_n_steps"]:
        prompts = Path(config["output_dir"]) / "sample" / "prompt.txt"
        prompts.parent.mkdir(parents=True, exist_ok=True)
        prompts.write_text(config["sample_prompts"], encoding="utf-8")
        values |= {
            "sample_prompts": str(prompts),
            **{key: config[key] for key in ("sample_every_n_steps", "sample_sampler")},
        }
    return values, extra


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("settings", type=Path, help="a complete Kohya JSON, its paths absolute or the demo's")
    parser.add_argument("--source", type=Path, required=True, help="folder of sd-scripts")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()

    sys.path[:0] = [str(options.source.resolve()), str(Path(__file__).resolve().parent)]
    config = json.loads(options.settings.read_text(encoding="utf-8"))
    output = Path(config["output_dir"])
    output.mkdir(parents=True, exist_ok=True)
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    torch.set_num_threads(options.threads)
    importlib.import_module("run_sdscripts").install_torchvision_stand_in()
    with tempfile.TemporaryDirectory() as scratch:
        values, extra = page_options(config, Path(scratch))
        settings = Path(scratch) / "sd-scripts.toml"
        settings.write_text(importlib.import_module("toml").dumps(values), encoding="utf-8")
        stamp = time.strftime("%Y%m%d-%H%M%S")
        shutil.copy(options.settings, output / f"{config['output_name']}_{stamp}.json")
        os.chdir(options.source)
        script = importlib.import_module("train_network")
        fit(Path(values["pretrained_model_name_or_path"]))
        train_util = importlib.import_module("library.train_util")
        sys.argv = ["train_network.py", "--config_file", str(settings), *extra]
        arguments = script.setup_parser()
        args = arguments.parse_args()
        train_util.verify_command_line_training_args(args)
        script.NetworkTrainer().train(train_util.read_config_from_file(args, arguments))


if __name__ == "__main__":
    main()
