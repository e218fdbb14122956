"""Toy models on disk, made once for all tests of a folder."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests import tiny
from trainer.families.sd import StableDiffusion
from trainer.job import Job


@pytest.fixture(scope="session")
def shelf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for model files that tests only read."""
    return tmp_path_factory.mktemp("models")


def load(job: Job, dtype: torch.dtype = torch.float32) -> StableDiffusion:
    return StableDiffusion.load(job, torch.device("cpu"), dtype, lambda _: None)


@pytest.fixture(scope="session")
def folder(shelf: Path) -> Path:
    return tiny.sd15_folder(shelf / "sd15")


@pytest.fixture(scope="session")
def file(shelf: Path) -> Path:
    return tiny.sd15_file(shelf / "sd15.safetensors")
