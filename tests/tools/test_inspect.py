"""Inspecting: what is told is what is in the file, and settings come back as they were trained with."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.tools.loras import SD1, delta64, write
from trainer import config as configuration
from trainer.cli import main
from trainer.config import KohyaConfig
from trainer.errors import ModelFileError
from trainer.lora_file import read_lora
from trainer.lora_file import save as save_lora
from trainer.tools.inspect import OTHER_NAME, SAME_NAME, inspect, lines, recovered_config

METADATA = {
    "ss_base_model_version": "sdxl_base_v1-0",
    "ss_network_module": "networks.lora",
    "ss_network_dim": "8",
    "ss_network_alpha": "4.0",
    "ss_network_args": '{"conv_dim": "4", "conv_alpha": "1.0", "rank_dropout": "0.1"}',
    "ss_learning_rate": "0.0001",
    "ss_unet_lr": "0.0001",
    "ss_text_encoder_lr": "None",
    "ss_optimizer": "torch.optim.adamw.AdamW(weight_decay=0.1,betas=(0.9, 0.99))",
    "ss_lr_scheduler": "cosine",
    "ss_lr_warmup_steps": "0.1",
    "ss_resolution": "(1024, 768)",
    "ss_batch_size_per_device": "2",
    "ss_max_train_steps": "400",
    "ss_seed": "42",
    "ss_clip_skip": "None",
    "ss_min_snr_gamma": "5.0",
    "ss_cache_latents": "True",
    "ss_multires_noise_iterations": "6",
    "ss_multires_noise_discount": "0.2",
    "ss_debiased_estimation": "False",
    "ss_sd_model_name": "sd_xl_base_1.0.safetensors",
    "ss_sd_model_hash": "NOFILE",
    "ss_dataset_dirs": json.dumps({"10_tok cat": {"n_repeats": 10, "img_count": 8}}),
    "ss_tag_frequency": json.dumps({"10_tok cat": {"red": 3, "tok cat": 8}, "5_x": {"red": 2}}),
    "modelspec.title": "my cat",
}


def test_a_file_is_described(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    save_lora(path, load_file(write(tmp_path / "raw.safetensors", SD1, 8, 4.0)), METADATA, "fp16")
    found = inspect(path)
    assert found.layers == {"text encoder": 1, "unet": 3}
    assert found.dims == {8: 4}
    assert found.alphas == {4.0: 4}
    assert found.convolutions == 1
    assert found.folders == {"10_tok cat": {"n_repeats": 10, "img_count": 8}}
    assert list(found.tags.items()) == [("tok cat", 8), ("red", 5)]
    assert found.hashes["sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()
    assert found.hash_matches is True
    tensors = load_file(path)
    norm = sum(float(delta64(tensors, stem).norm()) ** 2 for stem in SD1) ** 0.5
    assert found.norm == pytest.approx(norm, rel=1e-3)
    text = "\n".join(lines(found))
    for part in ("8 pictures x 10", "tok cat (8)", "dim: 8; alpha: 4", "my cat", found.hashes["sha256"]):
        assert part in text
    # What sd-scripts writes where a model has no hash is not told.
    assert "model hash" not in text
    # Another tensor under the old metadata is found out.
    metadata = read_lora(path).metadata
    tensors[next(iter(tensors))] += 1
    save_file(tensors, path, metadata)
    assert inspect(path).hash_matches is False


def test_settings_come_back() -> None:
    found = recovered_config(METADATA)
    config = found.config
    assert config.sdxl
    assert not config.flux1_checkbox
    assert config.LoRA_type == "Kohya LoCon"
    assert (config.network_dim, config.network_alpha, config.conv_dim, config.conv_alpha) == (8, 4, 4, 1)
    assert config.rank_dropout == 0.1
    assert (config.unet_lr, config.text_encoder_lr, config.learning_rate) == (0.0001, 0, 0.0001)
    assert config.optimizer == "AdamW"
    assert config.optimizer_args == "weight_decay=0.1 betas=(0.9,0.99)"
    assert config.lr_warmup == 10
    assert config.max_resolution == "1024,768"
    assert (config.train_batch_size, config.max_train_steps, config.seed) == (2, 400, 42)
    assert config.min_snr_gamma == 5
    assert config.cache_latents is True
    assert config.noise_offset_type == "Multires"
    assert config.pretrained_model_name_or_path == "sd_xl_base_1.0.safetensors"
    assert config.metadata_title == "my cat"
    assert "train_data_dir" in found.lost
    with pytest.raises(ModelFileError, match="no training settings"):
        recovered_config({"ss_network_dim": "4"})


def test_the_tables_name_settings() -> None:
    names = {*SAME_NAME, *OTHER_NAME.values()}
    assert names <= set(KohyaConfig.model_fields)


def test_what_our_own_run_writes_comes_back(tmp_path: Path) -> None:
    """A trained file's metadata gives the settings that it was trained with."""
    from tests import runs

    settings: dict[str, Any] = {
        "network_dim": 4,
        "network_alpha": 2,
        "optimizer_args": "weight_decay=0.02",
        "min_snr_gamma": 5,
    }
    outcome, _ = runs.train(tmp_path, max_train_steps=1, **settings)
    assert outcome.path is not None
    config = recovered_config(read_lora(outcome.path).metadata).config
    written = configuration.loads(runs.settings(tmp_path, max_train_steps=1, **settings)).config
    for name in (
        *(
            "LoRA_type",
            "network_dim",
            "network_alpha",
            "unet_lr",
            "text_encoder_lr",
            "optimizer",
            "min_snr_gamma",
        ),
        *("max_train_steps", "train_batch_size", "seed", "lr_scheduler", "lr_warmup", "mixed_precision"),
        *("min_bucket_reso", "max_bucket_reso", "enable_bucket", "output_name", "max_resolution"),
    ):
        assert getattr(config, name) == getattr(written, name), name
    assert "weight_decay=0.02" in config.optimizer_args


def test_in_the_shell(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "a.safetensors"
    save_lora(path, load_file(write(tmp_path / "raw.safetensors", SD1, 8, 4.0)), METADATA)
    assert main(["inspect", str(path), "--config", str(tmp_path / "back.json")]) == 0
    assert "pictures x 10" in capsys.readouterr().out
    assert configuration.load(tmp_path / "back.json").config.seed == 42
    assert main(["inspect", str(path), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["dims"] == {"8": 4}
    small, merged = tmp_path / "small.safetensors", tmp_path / "m.safetensors"
    assert (
        main(["resize", str(path), str(small), "--rank", "2", "--dynamic", "sv_fro", "--parameter", "0.9"])
        == 0
    )
    assert (
        main(["merge", str(path), str(small), "--ratio", "0.5", "--ratio", "-0.5", "--output", str(merged)])
        == 0
    )
    assert main(["convert-lora", str(merged), str(tmp_path / "d.safetensors"), "--to", "diffusers"]) == 0
    assert any(
        key.startswith("unet.input") or key.startswith("unet.down")
        for key in load_file(tmp_path / "d.safetensors")
    )
    assert main(["merge", str(path), "--output", str(path)]) == 2  # a result over its source
    assert torch.equal(load_file(path)["lora_unet_down_blocks_1_resnets_0_conv1.alpha"], torch.tensor(4.0))
