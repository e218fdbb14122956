"""Pictures, folders and jobs for the tests of trainer.data."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from trainer.config import KohyaConfig
from trainer.job import Job


def job(data: Path | str, **fields: Any) -> Job:
    """A job on ``data``; everything else is Kohya's default unless given."""
    values: dict[str, Any] = {
        "train_data_dir": str(data),
        "output_dir": "out",
        "pretrained_model_name_or_path": "model.safetensors",
        "max_resolution": "64,64",
        "min_bucket_reso": 64,
        "max_bucket_reso": 128,
        "bucket_no_upscale": False,
        "seed": 1,
    }
    return Job.from_config(KohyaConfig(**{**values, **fields}), base=Path(data) if data else None)


def picture(
    path: Path, size: tuple[int, int] = (64, 64), *, seed: int = 0, mode: str = "RGB", **save: Any
) -> Path:
    """Write a picture with gradients and some noise, so that every part of it is different."""
    path.parent.mkdir(parents=True, exist_ok=True)
    width, height = size
    rng = np.random.default_rng(seed)
    values = np.empty((height, width, 4), dtype=np.float64)
    values[:, :, 0] = np.linspace(0, 255, width)[None, :]
    values[:, :, 1] = np.linspace(0, 255, height)[:, None]
    values[:, :, 2] = rng.integers(0, 256)
    values[:, :, 3] = np.linspace(255, 0, width)[None, :]
    values[:, :, :3] += rng.normal(0, 8, (height, width, 3))
    image = Image.fromarray(values.clip(0, 255).astype(np.uint8), "RGBA") if mode == "RGBA" else None
    if image is None:
        image = Image.fromarray(values[:, :, :3].clip(0, 255).astype(np.uint8)).convert(mode)
    image.save(path, **save)
    return path
