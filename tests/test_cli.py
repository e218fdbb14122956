"""The shell: train, check, convert, exit codes, Ctrl-C."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from tests.runs import write_config
from trainer import config as configuration
from trainer.cli import base_folder, main
from trainer.events import CheckpointSaved, JobStopped, StepDone, read_journal
from trainer.files import REPOSITORY


def test_check_says_what_would_be_trained(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_config(tmp_path, max_grad_norm=0, max_train_steps=0, epoch=3, sdxl_no_half_vae=True)
    assert main(["check", str(path), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["errors"] == []
    assert found["steps"]["max_train_steps"] == 12  # 4 pictures x 2 repeats x 3 epochs / batch 2
    assert any(note.startswith("max_grad_norm 0 -> 1.0") for note in found["effective values"])
    assert found["parameters"]["trained"] == 144_640
    assert found["memory (estimated, GiB)"]["sum"] > 0
    assert main(["check", str(path)]) == 0
    assert "max_train_steps: 12" in capsys.readouterr().out
    assert not (tmp_path / "out").exists()


def test_check_names_every_mistake_at_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_config(tmp_path, optimizer="Nonsense", mixed_precision="fp16", train_data_dir="nowhere")
    assert main(["check", str(path), "--json"]) == 2
    errors = " ".join(json.loads(capsys.readouterr().out)["errors"])
    assert "Nonsense" in errors
    assert "fp16" in errors
    assert "nowhere" in errors


def test_check_names_all_that_contradicts_in_sdxl_and_flux(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def errors(**values: Any) -> list[str]:
        path = write_config(tmp_path, pretrained_model_name_or_path="none.safetensors", **values)
        assert main(["check", str(path), "--json"]) == 2
        found: list[str] = json.loads(capsys.readouterr().out)["errors"]
        return found

    sdxl = errors(
        sdxl=True,
        v2=True,
        sdxl_cache_text_encoder_outputs=True,
        shuffle_caption=True,
        caption_dropout_rate=0.1,
        cache_latents=True,
        random_crop=True,
        rank_dropout=1.5,
        down_lr_weight="steep",
        block_dims="4,4",
        block_alphas="a",
    )
    flux = errors(
        flux1_checkbox=True,
        LoRA_type="Flux1",
        weighted_captions=True,
        train_t5xxl=True,
        flux1_cache_text_encoder_outputs=True,
        split_qkv=True,
        train_lora_ggpo=True,
        ggpo_sigma=0.03,
        ggpo_beta=0.01,
        in_dims="[4,4]",
        train_double_block_indices="19",
        train_single_block_indices="a-b",
    )
    for found, starts in (
        (
            sdxl,
            "v2 and SDXL|Cache text encoder outputs (SDXL) and training|shuffle_caption changes|"
            "caption_dropout_rate changes|random_crop changes|rank_dropout is 1.5|down_lr_weight is 'steep'|"
            "block_dims has 2 numbers|block_alphas is 'a'",
        ),
        (
            flux,
            "weighted_captions|train_t5xxl changes|GGPO and split_qkv|in_dims is|train_double_block_indices is|"
            "train_single_block_indices is",
        ),
    ):
        for start in starts.split("|"):
            assert [error for error in found if error.startswith(start)], (start, found)
        assert len(found) == len(starts.split("|")), found


def test_set_wins_over_the_file_and_is_typed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_config(tmp_path)
    assert main(["check", str(path), "--json", "--set", "max_train_steps=3", "--set", "network_dim=2"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["steps"]["max_train_steps"] == 3
    assert found["network"]["network_dim"] == 2
    assert main(["check", str(path), "--set", "network_dimm=2"]) == 2
    assert "network_dim" in capsys.readouterr().err
    assert main(["check", str(path), "--set", "network_dim=many"]) == 2


def test_convert_writes_what_kohya_loads(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = tmp_path / "old.json"
    source.write_text(
        json.dumps({"LoRA_type": "Standard", "network_dim": "32", "use_8bit_adam": True, "x": 1})
    )
    target = tmp_path / "new" / "new.json"
    assert main(["convert", str(source), str(target)]) == 0
    written = json.loads(target.read_text())
    assert written["network_dim"] == 32
    assert written["optimizer"] == "AdamW8bit"
    assert written["x"] == 1
    assert configuration.load(target).config.network_dim == 32
    assert "x" in capsys.readouterr().out


def test_exit_codes_of_bad_input(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(tmp_path / "none.json")]) == 2
    (tmp_path / "broken.json").write_text("{")
    assert main([str(tmp_path / "broken.json")]) == 2
    said = capsys.readouterr().err
    assert "none.json" in said
    assert "broken.json" in said


def test_presets_of_the_repository_start_at_the_repository(tmp_path: Path) -> None:
    assert base_folder(REPOSITORY / "presets" / "demo.json") == REPOSITORY
    assert base_folder(tmp_path / "mine.json") == Path.cwd()


@pytest.mark.skipif(os.name == "nt", reason="sends POSIX signals")
def test_ctrl_c_finishes_the_step_and_saves(tmp_path: Path) -> None:
    path = write_config(tmp_path, max_train_steps=10_000, save_every_n_epochs=0)
    process = subprocess.Popen(
        [sys.executable, "-m", "trainer", str(path)],
        cwd=REPOSITORY,
        env={**os.environ, "LORA_KILN_ENV": "current"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    out, deadline = tmp_path / "out", time.monotonic() + 240
    try:
        while not any(
            isinstance(event, StepDone)
            for journal in out.glob("logs/*/journal.jsonl")
            for event in read_journal(journal)
        ):
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        _, said = process.communicate(timeout=120)
    finally:
        process.kill()
    assert process.returncode == 130, said
    (journal,) = out.glob("logs/*/journal.jsonl")
    events = list(read_journal(journal))
    assert isinstance(events[-1], JobStopped)
    assert events[-1].step > 0
    saved = [event for event in events if isinstance(event, CheckpointSaved)]
    assert {event.kind for event in saved} == {"lora", "state"}
    assert all(event.path.exists() for event in saved)
