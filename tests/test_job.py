"""Options of sd-scripts' command line and where they go."""

from __future__ import annotations

from pathlib import Path

import pytest

from trainer.config import KohyaConfig
from trainer.job import Job


@pytest.mark.parametrize("option", ["cache_text_encoder_outputs", "cache_text_encoder_outputs_to_disk"])
def test_caching_options_reach_the_family(option: str, tmp_path: Path) -> None:
    """Kohya's page has boxes of its own for SDXL (in memory only) and FLUX; the engine has one option each."""

    def job(**values: object) -> Job:
        common = {"pretrained_model_name_or_path": "m", "train_data_dir": "d", "output_dir": "o"}
        extra = {"additional_parameters": f"--{option}", "unet_lr": 1e-4, "text_encoder_lr": 0, **values}
        return Job.from_config(KohyaConfig(**common | extra), base=tmp_path)

    to_disk = option.endswith("_to_disk")
    sdxl = job(sdxl=True)
    assert sdxl.config.sdxl_cache_text_encoder_outputs is not to_disk
    assert sdxl.engine.cache_text_encoder_outputs_to_disk is to_disk
    flux = job(flux1_checkbox=True, LoRA_type="Flux1").config
    assert flux.flux1_cache_text_encoder_outputs_to_disk is to_disk
    assert flux.flux1_cache_text_encoder_outputs is not to_disk
    assert not flux.sdxl_cache_text_encoder_outputs
