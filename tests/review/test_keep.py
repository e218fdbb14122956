"""A chosen file gets its name and its place; the others can be put away and brought back."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from trainer import config as configuration
from trainer.config import KohyaConfig
from trainer.errors import ConfigError
from trainer.review.keep import (
    continue_config,
    free_name,
    keep,
    restore,
    resume_config,
    retrain_config,
    settings_of,
    trash,
    use_lines,
)
from trainer.review.run_folder import RunFolder, open_run


@dataclass(frozen=True)
class Said:
    kind: str


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A results folder: three files with metadata, one of them the final one; a state; a JSON."""
    out = tmp_path / "out"
    out.mkdir()
    for stem, step, epoch in (("k1ln-000002", 200, 2), ("k1ln-000004", 400, 4), ("k1ln", 600, 6)):
        entries = {
            "ss_output_name": "k1ln",
            "ss_network_module": "networks.lora",
            "ss_steps": str(step),
            "ss_epoch": str(epoch),
            "ss_dataset_dirs": json.dumps({"10_k1ln person": {"n_repeats": 10, "img_count": 40}}),
        }
        save_file({"x.alpha": torch.tensor(float(step))}, out / f"{stem}.safetensors", entries)
    (out / "k1ln-000004-state").mkdir()
    (out / "k1ln-000004-state" / "train_state.json").write_text('{"current_epoch": 4, "current_step": 400}')
    config = KohyaConfig(
        output_name="k1ln",
        output_dir="moved/away",
        unet_lr=3e-4,
        text_encoder_lr=5e-5,
        learning_rate=3e-4,
        epoch=6,
    )
    configuration.save(config, out / "k1ln_20260101-120000.json")
    return out


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.glob("*.safetensors"))


def test_a_kept_file_gets_its_name_and_a_copy_and_keeps_its_step(folder: Path, tmp_path: Path) -> None:
    target = tmp_path / "models" / "Lora"
    target.mkdir(parents=True)
    run = open_run(folder)
    data = (folder / "k1ln-000004.safetensors").read_bytes()
    kept = keep(run, run.checkpoint("k1ln-000004.safetensors"), "blue hair", copy_to=target)
    assert names(folder) == ["blue hair.safetensors", "k1ln-000002.safetensors", "k1ln.safetensors"]
    assert kept.copy == target / "blue hair.safetensors"
    assert kept.copy.read_bytes() == data
    assert dict(kept.lines)["AUTOMATIC1111 / Forge"] == "<lora:blue hair:0.8> k1ln person"
    again = open_run(folder)
    assert again.name == "k1ln"
    assert [(each.path.stem, each.step, each.epoch) for each in again.checkpoints] == [
        ("k1ln-000002", 200, 2),
        ("blue hair", 400, 4),
        ("k1ln", 600, 6),
    ]
    # Once more is no mistake; another file of that name there is.
    keep(again, again.checkpoint("blue hair.safetensors"), "blue hair", copy_to=target)
    (target / "k1ln.safetensors").write_bytes(b"somebody else's")
    with pytest.raises(ConfigError, match="is another file"):
        keep(again, again.checkpoint("k1ln.safetensors"), "k1ln", copy_to=target)


def test_the_step_of_a_renamed_file_without_metadata_is_remembered(folder: Path) -> None:
    save_file({"x.alpha": torch.ones(1)}, folder / "k1ln-step00000300.safetensors")
    run = open_run(folder)
    keep(run, run.checkpoint("k1ln-step00000300.safetensors"), "chosen")
    found = open_run(folder, "k1ln").checkpoint("chosen.safetensors")
    assert (found.step, found.metadata) == (300, {})


def test_a_name_that_is_taken_needs_the_others_away_and_they_come_back(folder: Path) -> None:
    run = open_run(folder)
    chosen = run.checkpoint("k1ln-000004.safetensors")
    with pytest.raises(ConfigError, match="is there already: choose another name"):
        keep(run, chosen, "k1ln")
    kept = keep(run, chosen, "k1ln", alone=True)
    assert names(folder) == ["k1ln.safetensors"]
    assert open_run(folder).checkpoints[0].step == 400
    assert [path.name for path in kept.moved] == ["k1ln-000002.safetensors", "k1ln.safetensors"]
    # What has a new owner of its name stays where it is.
    assert [path.name for path in restore(folder)] == ["k1ln-000002.safetensors"]
    assert (folder / "trash" / "k1ln.safetensors").exists()
    assert open_run(folder).checkpoint("k1ln.safetensors").step == 400


@pytest.mark.parametrize("name", ["", "..", "a/b", "a\\b", "C:x", "x\0", "x" * 200])
def test_no_name_leads_out_of_the_folder(folder: Path, name: str) -> None:
    run = open_run(folder)
    with pytest.raises(ConfigError, match="no name for a file"):
        keep(run, run.checkpoints[0], name)
    with pytest.raises(ConfigError, match="does not lie in the results folder"):
        trash(folder, [folder.parent / "other.safetensors"])


def test_two_of_one_name_in_the_trash_stay_apart(folder: Path) -> None:
    for content in (b"1", b"2"):
        (folder / "a.safetensors").write_bytes(content)
        trash(folder, [folder / "a.safetensors"])
    assert sorted(path.name for path in (folder / "trash").iterdir()) == [
        "a (2).safetensors",
        "a.safetensors",
    ]
    restore(folder, ["a (2).safetensors"])
    assert (folder / "a.safetensors").read_bytes() == b"2"


def test_going_on_fills_in_what_it_takes(folder: Path) -> None:
    run = open_run(folder)
    config = continue_config(run, run.checkpoint("k1ln-000004.safetensors"), 3)
    assert config.network_weights == str(folder / "k1ln-000004.safetensors")
    assert config.dim_from_weights
    assert (config.epoch, config.max_train_epochs, config.max_train_steps) == (3, 0, 0)
    assert (config.output_name, config.output_dir) == ("k1ln-2", str(folder))
    assert (config.origin_step, config.origin_epoch) == (400, 4)
    assert (config.unet_lr, config.resume) == (3e-4, "")
    # It survives the JSON, and a verdict's advice.
    assert configuration.loads(configuration.dumps(config)).config == config
    lower = continue_config(run, run.checkpoints[0], 1, judged=Said("overtrained"))
    assert (lower.unet_lr, lower.text_encoder_lr, lower.learning_rate) == (1.5e-4, 2.5e-5, 1.5e-4)
    higher = retrain_config(run, Said("undertrained"))
    assert (higher.unet_lr, higher.output_name, higher.network_weights) == (6e-4, "k1ln-2", "")
    resumed = resume_config(run, run.states[0])
    assert (resumed.resume, run.states[0].step) == (str(folder / "k1ln-000004-state"), 400)
    assert (resumed.output_name, resumed.epoch) == ("k1ln", 6)
    for epochs in (0, -1, 10**6):
        with pytest.raises(ConfigError, match="cannot be added"):
            continue_config(run, run.checkpoints[0], epochs)


def test_names_count_up_past_what_is_there(folder: Path) -> None:
    assert free_name(folder, "k1ln") == "k1ln-2"
    (folder / "k1ln-2-000001.safetensors").touch()
    assert free_name(folder, "k1ln") == free_name(folder, "k1ln-2") == "k1ln-3"
    assert free_name(folder / "none", "x") == "x-2"


def test_a_folder_without_json_goes_on_from_metadata(folder: Path) -> None:
    next(folder.glob("*.json")).unlink()
    entries = {
        "ss_base_model_version": "sdxl_base_v1-0",
        "ss_unet_lr": "0.0002",
        "ss_network_dim": "16",
        "ss_resolution": "(1024, 768)",
        "ss_enable_bucket": "False",
        "ss_min_bucket_reso": "128",
        "ss_sd_model_name": "base.safetensors",
        "ss_output_name": "k1ln",
        "ss_steps": "700",
    }
    save_file({"x.alpha": torch.ones(1)}, folder / "k1ln-step00000700.safetensors", entries)
    run: RunFolder = open_run(folder, "k1ln")
    config = settings_of(run)
    assert (config.sdxl, config.unet_lr, config.network_dim) == (True, 2e-4, 16)
    assert (config.max_resolution, config.pretrained_model_name_or_path) == ("1024,768", "base.safetensors")
    assert (config.enable_bucket, config.min_bucket_reso) == (False, 128)
    with pytest.raises(ConfigError, match="has no JSON"):
        resume_config(run, run.states[0])


def test_comfyui_names_a_file_from_its_loras_folder() -> None:
    lines = dict(use_lines(Path("/ui/models/loras/people/k1ln.safetensors")))
    assert "lora_name people/k1ln.safetensors" in lines["ComfyUI"]
