"""diffusers as the reader of our LoRA files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

NO_MODEL = "No LoRA keys associated to NoneType"
"""What diffusers says where a pipeline has no text encoder, which is no complaint about a key."""


def loaded_by_diffusers(pipeline: Any, file: Path, caplog: pytest.LogCaptureFixture) -> int:
    """Layers of a pipeline that a LoRA file was laid over; fails if diffusers says anything about keys."""
    from diffusers.utils import logging

    logging.enable_propagation()
    try:
        caplog.clear()
        pipeline.load_lora_weights(str(file))
    finally:
        logging.disable_propagation()
    said = [record.getMessage() for record in caplog.records]
    about = [each for each in said if "key" in each.lower() or "not found" in each.lower()]
    assert [each for each in about if not each.startswith(NO_MODEL)] == []
    models = [model for model in pipeline.components.values() if isinstance(model, torch.nn.Module)]
    return sum("lora_A" in name for model in models for name, _ in model.named_parameters())
