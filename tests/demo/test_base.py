"""The shipped base model: what it is made of, and that it draws what it is asked for."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

from assets.demo import draw
from tests.demo import figures

PARTS = ("unet", "vae", "text_encoder", "tokenizer", "scheduler")


@pytest.fixture(scope="module")
def pipeline() -> Any:
    torch.set_num_threads(1)
    return figures.load_pipeline()


def test_is_a_whole_diffusers_folder_in_fp16_below_32_mb() -> None:
    index = json.loads((figures.BASE / "model_index.json").read_text())
    assert index["_class_name"] == "StableDiffusionPipeline"
    assert all((figures.BASE / part).is_dir() for part in PARTS)
    files = [f for f in figures.BASE.rglob("*") if f.is_file()]
    assert sum(f.stat().st_size for f in files) <= 32e6
    for file in files:
        if file.suffix == ".safetensors":
            with safe_open(file, "pt") as tensors:
                kinds = {tensors.get_slice(key).get_dtype() for key in tensors.keys()}  # noqa: SIM118
            assert kinds <= {"F16", "I64"}, file


def test_files_name_no_folder_of_the_machine_that_trained_it() -> None:
    for file in figures.BASE.rglob("*.json"):
        text = file.read_text(encoding="utf-8")
        assert "_name_or_path" not in text or json.loads(text).get("_name_or_path", "") == ""


def test_constant_of_sd_gives_latents_of_mean_0_and_deviation_1(pipeline: Any) -> None:
    from assets.demo import train_base

    portraits = figures.base_portraits(24)
    pictures_BCHW = train_base.to_tensor(draw.draw(p) for p in portraits)
    with torch.inference_mode():
        latents_BCHW = 0.18215 * pipeline.vae.encode(pictures_BCHW).latent_dist.mode()
        back_BCHW = pipeline.vae.decode(latents_BCHW / 0.18215).sample
    assert latents_BCHW.std().item() == pytest.approx(1, abs=0.15)
    assert abs(latents_BCHW.mean().item()) < 0.15
    assert (back_BCHW - pictures_BCHW).abs().mean().item() < 0.06  # of a range of 2


@pytest.mark.slow
def test_draws_what_the_prompt_says(pipeline: Any) -> None:
    measured, _ = figures.base_rates(pipeline, 16)
    assert measured.background >= 0.85
    assert measured.clothes >= 0.85
    assert measured.hair >= 0.85
    assert measured.intact >= 0.7


@pytest.mark.slow
def test_does_not_know_the_subject(pipeline: Any) -> None:
    measured, _ = figures.subject_rates(pipeline, 32)
    assert measured.subject <= 0.1
    assert measured.intact >= 0.85


def test_data_set_folder_reads_as_kohya_s() -> None:
    folder = Path(draw.__file__).parent / "images" / "25_k1ln person"
    assert len(list(folder.glob("*.png"))) == len(list(folder.glob("*.txt"))) == 16
