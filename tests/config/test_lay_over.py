"""A preset laid over the page: what it has changes, the rest and the paths stay."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from trainer.config import KohyaConfig, lay_over
from trainer.errors import ConfigError

PAGE = KohyaConfig.model_validate(
    {
        "pretrained_model_name_or_path": "/models/mine.safetensors",
        "train_data_dir": "/data",
        "output_name": "kat",
        "max_train_steps": 700,
        "network_dim": 64,
        "network_alpha": 32,
        "optimizer": "Lion",
        "page_key": 1,
    }
)


def test_only_what_the_preset_has_changes() -> None:
    laid = lay_over({"network_dim": "16", "unet_lr": None, "preset_key": 2}, PAGE).config
    assert laid == PAGE.model_copy(update={"network_dim": 16}).model_validate(
        PAGE.model_dump() | {"network_dim": 16, "preset_key": 2}
    )
    assert (laid.network_alpha, laid.max_train_steps, laid.optimizer) == (32, 700, "Lion")
    assert laid.model_extra == {"page_key": 1, "preset_key": 2}


def test_paths_of_the_page_stay() -> None:
    preset = {
        "pretrained_model_name_or_path": "/theirs",
        "train_data_dir": "",
        "output_name": "theirs",
        "vae": "/their/vae",
        "lora_network_weights": "/their/lora",
    }
    laid = lay_over(preset, PAGE).config
    assert laid.pretrained_model_name_or_path == "/models/mine.safetensors"
    assert (laid.train_data_dir, laid.output_name) == ("/data", "kat")
    assert (laid.vae, laid.network_weights) == ("/their/vae", "/their/lora")  # not filled in on the page
    every = lay_over(preset, PAGE, keep_paths=False).config
    assert (every.pretrained_model_name_or_path, every.train_data_dir) == ("/theirs", "")


def test_old_spellings_are_understood_and_reported() -> None:
    laid = lay_over({"use_8bit_adam": True, "xformers": False, "conv_dims": "4"}, PAGE)
    assert (laid.config.optimizer, laid.config.xformers) == ("AdamW8bit", "none")
    assert laid.config.conv_block_dims == "4"
    assert {finding.key for finding in laid.of("converted")} >= {"use_8bit_adam", "xformers", "conv_dims"}


def test_what_cannot_be_read_leaves_the_page_as_it_is() -> None:
    laid = lay_over({"network_dim": "many"}, PAGE)
    assert laid.config == PAGE
    (finding,) = laid.of("invalid")
    assert finding.used == 64


def test_from_a_file(tmp_path: Path) -> None:
    path = tmp_path / "preset.json"
    path.write_text(json.dumps({"epoch": 9}), encoding="utf-8-sig")
    laid = lay_over(path, PAGE)
    assert (laid.config.epoch, laid.path) == (9, path)
    with pytest.raises(ConfigError, match=r"none\.json"):
        lay_over(tmp_path / "none.json", PAGE)
    with pytest.raises(ConfigError, match="a list"):
        lay_over("[]", PAGE)
