from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests import tiny
from tests.data.material import job
from trainer.families.sd import StableDiffusion


def load(folder: Path, seed: int) -> StableDiffusion:
    model = tiny.sd15_folder(folder / f"model{seed}", seed=seed)
    run = job(folder, pretrained_model_name_or_path=str(model), mixed_precision="no")
    return StableDiffusion.load(run, torch.device("cpu"), torch.float32, lambda _: None)


@pytest.fixture(scope="session")
def family(tmp_path_factory: pytest.TempPathFactory) -> StableDiffusion:
    """Toy SD 1.5 with a real VAE."""
    return load(tmp_path_factory.mktemp("family"), 0)


@pytest.fixture(scope="session")
def other_family(tmp_path_factory: pytest.TempPathFactory) -> StableDiffusion:
    """The same with another VAE."""
    return load(tmp_path_factory.mktemp("other"), 1)
