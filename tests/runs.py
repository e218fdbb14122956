"""Whole runs on toy models: a model file, a Kohya folder of pictures, a configuration."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from tests import tiny
from trainer import config as configuration
from trainer.controls import Controls
from trainer.draws import Draws
from trainer.events import Event, EventLog
from trainer.job import Job
from trainer.loop import Outcome
from trainer.runner import run

__all__ = ["SIZES", "pictures", "settings", "train", "write_config"]

SIZES = ((96, 96), (128, 64), (100, 90), (64, 128))


def pictures(folder: Path, repeats: int = 2, name: str = "tok cat") -> Path:
    """A Kohya folder with four pictures of mixed sizes and captions; returns the folder above it."""
    target = folder / f"{repeats}_{name}"
    target.mkdir(parents=True)
    rng = np.random.default_rng(0)
    for index, (width, height) in enumerate(SIZES):
        pixels = rng.integers(0, 255, (height, width, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(target / f"{index}.png")
        (target / f"{index}.txt").write_text(f"tok cat, number {index}, red, blue", encoding="utf-8")
    return folder


def settings(folder: Path, **values: Any) -> dict[str, Any]:
    """A Kohya configuration for a toy run in ``folder``; its model and pictures are made unless named."""
    model = folder / "model.safetensors"
    if not model.exists() and "pretrained_model_name_or_path" not in values:
        tiny.sd15_file(model)
    images = folder / "img"
    if not images.exists() and "train_data_dir" not in values:
        pictures(images)
    return {
        "LoRA_type": "Standard",
        "pretrained_model_name_or_path": str(model),
        "train_data_dir": str(images),
        "output_dir": str(folder / "out"),
        "output_name": "toy",
        "max_resolution": "64,64",
        "min_bucket_reso": 64,
        "max_bucket_reso": 128,
        "bucket_no_upscale": False,
        "mixed_precision": "no",
        "optimizer": "AdamW",
        "learning_rate": 1e-3,
        "unet_lr": 1e-3,
        "text_encoder_lr": 5e-4,
        "network_dim": 4,
        "network_alpha": 2,
        "train_batch_size": 2,
        "max_train_steps": 8,
        "save_every_n_epochs": 0,
        "save_precision": "float",
        "lr_scheduler": "cosine",
        "lr_warmup": 10,
        "seed": 7,
        "sample_sampler": "euler_a",
        **values,
    }


def write_config(folder: Path, **values: Any) -> Path:
    """The same as a JSON file."""
    path = folder / "config.json"
    path.write_text(json.dumps(settings(folder, **values)), encoding="utf-8")
    return path


def train(
    folder: Path, draws: Draws | None = None, controls: Controls | None = None, **values: Any
) -> tuple[Outcome, list[Event]]:
    """Train a toy run in this process; returns how it ended and everything it said."""
    loaded = configuration.loads(settings(folder, **values))
    events = EventLog()
    outcome = run(Job.from_config(loaded.config, base=folder), events, controls, draws)
    return outcome, events.since(0)[0]
