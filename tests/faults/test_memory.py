"""A run for which there is really no memory: a process that the system gives no more."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.runs import settings
from trainer.events import JobFailed, read_journal
from trainer.files import REPOSITORY


@pytest.mark.skipif(sys.platform != "linux", reason="others do not enforce the limit")
def test_out_of_memory_ends_with_advice_and_the_process_trains_a_smaller_run(tmp_path: Path) -> None:
    same = {"cache_latents": True, "text_encoder_lr": 0, "max_train_steps": 1, "skip_verdict": True}
    big = {"max_resolution": "256,256", "enable_bucket": False, "train_batch_size": 8}
    for name, values in (("big", big), ("small", {"train_batch_size": 1})):
        config = settings(tmp_path, output_name=name, **same, **values)
        (tmp_path / f"{name}.json").write_text(json.dumps(config), encoding="utf-8")
    done = subprocess.run(
        [sys.executable, "-m", "tests.faults.little_memory", tmp_path / "big.json", tmp_path / "small.json"],
        cwd=REPOSITORY,
        # What is freed goes back to the system at once, as large tensors of a real model do.
        env={**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    (journal,) = (tmp_path / "out" / "logs").glob("big-*/journal.jsonl")
    (failed,) = [event for event in read_journal(journal) if isinstance(event, JobFailed)]
    assert failed.message.startswith("the computer ran out of memory before the first step ("), done
    assert " GiB were in use): change, in this order, " in failed.message
    assert "mixed_precision bf16 (saves 0." in failed.message
    assert not failed.detail
    assert done.stdout.splitlines() == [f"failed: {failed.message}", "finished: 1"], done
    assert (tmp_path / "out" / "small.safetensors").is_file()
    assert not (tmp_path / "out" / "big.safetensors").exists()
    assert done.returncode == 0
    assert "Traceback" not in done.stderr
