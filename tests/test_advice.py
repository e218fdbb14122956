"""What makes a run fit: the guides' order, real savings, and no more than is needed."""

from __future__ import annotations

import gc
import itertools
import json
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch

from tests import runs
from trainer import advice as advices
from trainer import config as configuration
from trainer import memory, runner
from trainer.advice import advice
from trainer.cli import main
from trainer.errors import OutOfMemoryError
from trainer.estimate import GIB, Forecast
from trainer.events import CheckpointSaved, EventLog, JobFailed, StepDone
from trainer.families.sd import StableDiffusion
from trainer.job import Job

ORDER = ("cache", "mixed_precision", "train_batch_size", "fp8", "gradient", "blocks_to_swap", "resolution")


def job(folder: Path, **values: Any) -> Job:
    return Job.from_config(configuration.loads(runs.settings(folder, **values)).config, base=folder)


def planned(monkeypatch: pytest.MonkeyPatch) -> None:
    """A forecast by sums that are easy to follow, in place of traced models."""

    def sums(run: Job, *_: Any, size: tuple[int, int] | None = None, **__: Any) -> Forecast:
        config = run.config
        whole = 8 if config.mixed_precision == "no" else 4
        weights = 2 if config.fp8_base or config.fp8_base_unet else whole
        width, height = size or (run.width, run.height)
        step = (
            config.train_batch_size
            * whole
            * width
            * height
            / 512**2
            / (4 if config.gradient_checkpointing else 1)
        )
        parts = {"weights": weights - 0.02 * config.blocks_to_swap, "step": step}
        parts["VAE"] = 0.0 if config.cache_latents else 0.25
        return Forecast(
            kind="cuda",
            parameters={},
            device={"train": {name: int(size * GIB) for name, size in parts.items()}},
            host={},
            disk={},
            first_step_s={},
            step_s=None,
            kept_bytes=0,
        )

    monkeypatch.setattr(advices, "forecast", sums)


def test_changes_come_in_the_guides_order_and_save_what_they_say(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    planned(monkeypatch)
    run = job(tmp_path, cache_latents=False, max_resolution="1024,1024", unet_lr=1e-4, text_encoder_lr=0)
    first, changes = advice(run, 0, kind="cuda")
    saved = {change.text: change.saved_bytes / GIB for change in changes}
    assert saved == pytest.approx(
        {
            "cache latents to disk": 0.25,
            "mixed_precision bf16": 4 + 32,
            "train_batch_size 1": 16,
            "fp8 base": 2,
            "gradient checkpointing": 12,
            "blocks_to_swap 57": 1.14,
            "resolution 512,512": 3,
        },
        abs=1e-6,
    )
    assert list(saved) == sorted(
        saved, key=lambda text: next(n for n, s in enumerate(ORDER) if text.startswith(s))
    )
    assert not any(change.fits for change in changes)
    assert changes[0].before_bytes == first.peak_bytes
    assert all(one.after_bytes == other.before_bytes for one, other in itertools.pairwise(changes))
    # the list ends with the first change that is enough
    _, fewer = advice(run, changes[2].after_bytes, kind="cuda")
    assert [change.text for change in fewer] == list(saved)[:3]
    assert [change.fits for change in fewer] == [False, False, True]
    assert advice(run, first.peak_bytes, kind="cuda")[1] == []
    # after a run that did not fit, clearly less must do
    _, two = advice(run, first.peak_bytes, kind="cuda", failed=True)[1]
    assert two.fits
    assert two.after_bytes <= 0.85 * first.peak_bytes


def test_no_more_blocks_are_swapped_than_needed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    planned(monkeypatch)
    run = job(
        tmp_path,
        train_batch_size=1,
        mixed_precision="bf16",
        fp8_base=True,
        gradient_checkpointing=True,
        max_resolution="512,512",
        cache_latents_to_disk=True,
    )
    _, (change,) = advice(run, int((3 - 0.02 * 23.5) * GIB), kind="cuda")
    assert change.fits
    assert change.values == {"blocks_to_swap": 24}
    assert change.text == "blocks_to_swap 24"


def test_our_own_format_comes_after_what_kohya_has(tmp_path: Path) -> None:
    run = job(tmp_path, sdxl=True, max_resolution="1024,1024", mixed_precision="bf16")
    texts = [text for text, _ in advices._candidates(run, "cuda")]
    assert texts[-2:] == ["resolution 512,512", "quantized_base nf4 in place of fp8 base"]
    changed = run.with_config(**dict(list(advices._candidates(run, "cuda"))[-1][1]))
    assert memory.choices(changed).unet == "nf4"


def test_check_says_whether_it_fits_a_card(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = runs.write_config(tmp_path, cache_latents=True)
    assert main(["check", str(path), "--json", "--vram", "8"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["will it fit"].startswith("yes: ")
    assert found["memory (estimated, GiB)"]["sum"] > 0.5  # CUDA's own memory is in it
    assert found["host memory (estimated, GiB)"]["sum"] > 1
    assert "what makes it fit" not in found
    assert all(isinstance(value, float) for value in found["memory (estimated, GiB)"].values())
    with pytest.raises(SystemExit):
        main(["check", str(path), "--vram", "big"])


def test_what_makes_it_fit_comes_with_the_fields_to_set(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    planned(monkeypatch)
    run = job(tmp_path, cache_latents=False, train_batch_size=1)
    found = advices.report(run, limit_bytes=int(2.1 * GIB), kind="cuda")
    changes = advices.changes_in(found)
    assert [dict(change.values) for change in changes] == [
        {"cache_latents": True, "cache_latents_to_disk": True},
        {"mixed_precision": "bf16"},
        {"fp8_base": True, "fp8_base_unet": False},
    ]
    assert [change.saved_bytes for change in changes] == [item["saved_bytes"] for item in found["changes"]]
    assert [str(change) for change in changes] == found["what makes it fit"]
    assert changes[-1].fits
    assert advices.changes_in({}) == []


def test_out_of_memory_ends_the_run_with_advice_and_gives_the_memory_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(advices, "WORTH_BYTES", 1 << 16)
    predict, calls = StableDiffusion.predict, [0]
    made: list[weakref.ref[Any]] = []

    def fails(self: StableDiffusion, *args: Any) -> torch.Tensor:
        if self.device.type == "meta":
            return predict(self, *args)
        calls[0] += 1
        big = torch.zeros(1000)
        made[:] = [weakref.ref(self.unet), weakref.ref(big)]
        if calls[0] == 3:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")
        return predict(self, *args)

    monkeypatch.setattr(StableDiffusion, "predict", fails)
    run, events = job(tmp_path, blocks_to_swap=5, skip_verdict=True), EventLog()
    with pytest.raises(OutOfMemoryError) as failure:
        runner.run(run, events)
    happened = events.since(0)[0]
    (failed,) = [event for event in happened if isinstance(event, JobFailed)]
    assert failed.message == str(failure.value)
    assert failed.step == 2
    assert "after step 2" in failed.message
    assert "GiB were in use" in failed.message
    assert "change, in this order, mixed_precision bf16 (saves 0." in failed.message
    saved = [event.path for event in happened if isinstance(event, CheckpointSaved)]
    assert saved == [tmp_path / "out" / "toy-step00000002.safetensors"]
    assert saved[0].name in failed.message
    gc.collect()
    assert [reference() for reference in made] == [None, None]
    # the process lives on: the same run, now with room, goes to its end
    calls[0] = 10
    again = EventLog()
    runner.run(run, again)
    assert sum(isinstance(event, StepDone) for event in again.since(0)[0]) == 8
