"""Whole runs on toy models: what is saved, sampled, stopped, refused, and given back."""

from __future__ import annotations

import gc
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from tests.runs import pictures, train
from trainer.controls import Controls
from trainer.draws import Draws
from trainer.errors import ConfigError, DatasetError, DivergedError, ModelFileError, StateError
from trainer.events import (
    CheckpointRemoved,
    CheckpointSaved,
    Event,
    EventLog,
    JobFinished,
    JobStarted,
    JobStopped,
    SampleReady,
    StepDone,
    read_journal,
)

PROMPT = "tok cat --w 64 --h 64 --s 3 --d 5"


def steps(events: list[Event]) -> list[StepDone]:
    return [event for event in events if isinstance(event, StepDone)]


def test_a_run_leaves_what_kohya_leaves_and_the_journal_tells_all(tmp_path: Path) -> None:
    outcome, events = train(
        tmp_path,
        save_every_n_epochs=1,
        save_every_n_steps=3,
        save_last_n_steps=3,
        save_state=True,
        sample_every_n_steps=4,
        sample_prompts=PROMPT,
        max_train_steps=12,
        logging_dir=str(tmp_path / "tb"),
        additional_parameters="--sample_at_first",
    )
    out = tmp_path / "out"
    # 5 buckets' worth: 4 pictures x 2 repeats in batches of 2 are 4 steps an epoch.
    assert sorted(path.name for path in out.glob("*.safetensors")) == [
        "toy-000001.safetensors",
        "toy-000002.safetensors",
        "toy-step00000009.safetensors",
        "toy-step00000012.safetensors",
        "toy.safetensors",
    ]
    removed = [event.path.name for event in events if isinstance(event, CheckpointRemoved)]
    assert "toy-step00000003.safetensors" in removed
    assert (out / "toy-state").is_dir()
    assert len(list(out.glob("toy_*.json"))) == 1
    samples = [event for event in events if isinstance(event, SampleReady)]
    assert [event.step for event in samples] == [0, 4, 8, 12]
    assert samples[0].path.name.startswith("toy_e000000_00_")
    assert samples[1].path.name.startswith("toy_000004_00_")
    assert samples[1].path.name.endswith("_5.png")
    assert [event.step for event in steps(events)] == list(range(1, 13))
    (journal,) = out.glob("logs/*/journal.jsonl")
    assert list(read_journal(journal)) == events
    assert isinstance(events[-1], JobFinished)
    assert outcome.path == out / "toy.safetensors"
    with safe_open(out / "toy.safetensors", "pt") as file:
        metadata = file.metadata()
    assert metadata["ss_steps"] == "12"
    assert metadata["ss_num_train_images"] == "8"


def test_norms_are_held_down_after_the_last_update_too(tmp_path: Path) -> None:
    limit = 0.02
    outcome, _ = train(
        tmp_path,
        scale_weight_norms=limit,
        max_train_steps=3,
        learning_rate=0.05,
        unet_lr=0.05,
        text_encoder_lr=0.05,
        save_precision="float",
    )
    assert outcome.path is not None
    saved = load_file(outcome.path)
    norms = []
    for name, down in saved.items():
        if name.endswith("lora_down.weight"):
            up, alpha = (
                saved[name.replace("lora_down", "lora_up")],
                saved[name.replace("lora_down.weight", "alpha")],
            )
            scale = float(alpha) / len(down)
            norms.append(float((up.flatten(1).double() @ down.flatten(1).double() * scale).norm()))
    assert max(norms) <= limit * (1 + 1e-4)
    assert sum(norm > limit * 0.99 for norm in norms) > len(norms) / 2, "the limit is felt"


def test_tensorboard_has_kohyas_tags(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    _, events = train(tmp_path, logging_dir=str(tmp_path / "tb"), max_train_steps=4, scale_weight_norms=1.0)
    (folder,) = (tmp_path / "tb").glob("*/network_train")
    found = EventAccumulator(str(folder))
    found.Reload()
    tags = set(found.Tags()["scalars"])
    assert {"loss/current", "loss/average", "loss/epoch_average", "lr/unet", "lr/textencoder"} <= tags
    assert {"max_norm/keys_scaled", "max_norm/max_key_norm", "norm/avg_key_norm"} <= tags
    written = [item.value for item in found.Scalars("loss/average")]
    assert written == pytest.approx([event.avr_loss for event in steps(events)], rel=1e-6)


def test_sampling_changes_nothing_in_the_training(tmp_path: Path) -> None:
    same: dict[str, Any] = {"network_dropout": 0.2, "noise_offset": 0.1, "optimizer": "AdamWScheduleFree"}
    plain, _ = train(tmp_path, output_name="plain", lr_scheduler="constant", **same)
    drawn, events = train(
        tmp_path,
        output_name="drawn",
        lr_scheduler="constant",
        sample_every_n_steps=2,
        sample_prompts="tok cat --w 64 --h 64 --s 3\n" + PROMPT,
        **same,
    )
    assert sum(isinstance(event, SampleReady) for event in events) == 8
    assert plain.path is not None
    assert drawn.path is not None
    one, two = load_file(plain.path), load_file(drawn.path)
    assert all(torch.equal(one[name], two[name]) for name in one)


class StopAfter(EventLog):
    """Presses Stop when a step is reported."""

    def __init__(self, controls: Controls, step: int) -> None:
        super().__init__()
        self.controls, self.step = controls, step

    def emit(self, event: Event) -> None:
        super().emit(event)
        if isinstance(event, StepDone) and event.step == self.step:
            self.controls.stop.set()


def test_stop_saves_and_resume_goes_on_to_the_same_weights(tmp_path: Path) -> None:
    from tests.runs import settings
    from trainer import config as configuration
    from trainer.job import Job
    from trainer.runner import run

    whole, _ = train(tmp_path, output_name="whole", stop_text_encoder_training=50)
    controls = Controls()
    log = StopAfter(controls, 5)
    values = settings(tmp_path, output_name="part", stop_text_encoder_training=50)
    stopped = run(Job.from_config(configuration.loads(values).config, base=tmp_path), log, controls)
    assert stopped.stopped
    assert stopped.step == 5
    assert stopped.path is not None
    assert stopped.path.name == "part-step00000005.safetensors"
    assert isinstance(log.since(0)[0][-1], JobStopped)
    resumed, events = train(
        tmp_path, output_name="part", stop_text_encoder_training=50, resume=str(stopped.state)
    )
    assert next(event for event in events if isinstance(event, JobStarted)).first_step == 5
    assert whole.path is not None
    assert resumed.path is not None
    one, two = load_file(whole.path), load_file(resumed.path)
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_the_text_encoder_stops_when_asked(tmp_path: Path) -> None:
    """stop_text_encoder_training 50: its weights at the end are those of half the run."""
    outcome, _ = train(tmp_path, stop_text_encoder_training=50, save_every_n_steps=4, max_train_steps=8)
    assert outcome.path is not None
    end, half = load_file(outcome.path), load_file(tmp_path / "out" / "toy-step00000004.safetensors")
    text = [name for name in end if name.startswith("lora_te")]
    unet = [name for name in end if name.startswith("lora_unet") and "lora_up" in name]
    assert all(torch.equal(end[name], half[name]) for name in text)
    assert not any(torch.equal(end[name], half[name]) for name in unet)


class NaNAt(Draws):
    """Noise turns to NaN at one place of the run."""

    def noise(self, draw_ids: Any, shape: Any) -> torch.Tensor:
        noise = super().noise(draw_ids, shape)
        return noise * math.nan if 8 in draw_ids else noise


def test_nan_ends_the_run_and_keeps_the_last_good_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("trainer.loop.KEEP_EVERY_S", 0.0)
    with pytest.raises(DivergedError, match="NaN at step") as caught:
        train(tmp_path, draws=NaNAt(7))
    (kept,) = (tmp_path / "out").glob("*-last-good.safetensors")
    assert kept.name in str(caught.value)
    assert all(bool(torch.isfinite(tensor).all()) for tensor in load_file(kept).values())


def test_a_full_disk_costs_the_save_not_the_training(tmp_path: Path) -> None:
    resource = pytest.importorskip("resource", reason="file size limits stand in for a full disk; POSIX only")
    import signal

    from tests.runs import settings
    from trainer import config as configuration
    from trainer.job import Job
    from trainer.runner import run

    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)

    class FullBetween(EventLog):
        def emit(self, event: Event) -> None:
            super().emit(event)
            if isinstance(event, StepDone):
                full = 3 <= event.step < 6
                resource.setrlimit(resource.RLIMIT_FSIZE, (2000 if full else soft, hard))

    log = FullBetween()
    values = settings(tmp_path, save_every_n_steps=1, save_state=True)
    try:
        outcome = run(Job.from_config(configuration.loads(values).config, base=tmp_path), log)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, before)
    events = log.since(0)[0]
    saved = {event.step for event in events if isinstance(event, CheckpointSaved) and event.kind == "lora"}
    assert outcome.step == 8
    assert {1, 2, 6, 7, 8} <= saved
    assert not saved & {3, 4, 5}
    assert sum("was not saved" in getattr(event, "message", "") for event in events) == 6
    assert not list((tmp_path / "out").glob(".*.tmp"))
    (journal,) = (tmp_path / "out").glob("logs/*/journal.jsonl")
    assert [event.step for event in read_journal(journal) if isinstance(event, StepDone)] == list(range(1, 9))


def test_the_memory_of_a_run_is_given_back(tmp_path: Path) -> None:
    from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel

    gc.collect()
    before = {id(item) for item in gc.get_objects() if type(item) is UNet2DConditionModel}
    train(tmp_path, max_train_steps=2)
    left = [item for item in gc.get_objects() if type(item) is UNet2DConditionModel]
    assert not [item for item in left if id(item) not in before]


def test_network_weights_continue_a_lora(tmp_path: Path) -> None:
    first, _ = train(tmp_path, output_name="first", max_train_steps=3)
    assert first.path is not None
    same, _ = train(
        tmp_path,
        output_name="second",
        max_train_steps=1,
        network_weights=str(first.path),
        dim_from_weights=True,
        network_dim=9,
        unet_lr=1e-12,
        text_encoder_lr=1e-12,
    )
    assert same.path is not None
    one, two = load_file(first.path), load_file(same.path)
    assert one.keys() == two.keys()
    for name, tensor in one.items():
        torch.testing.assert_close(two[name], tensor, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("values", "error", "words"),
    [
        ({"pretrained_model_name_or_path": "nowhere.safetensors"}, ModelFileError, "nowhere"),
        ({"train_data_dir": "nothing-here"}, DatasetError, "nothing-here"),
        ({"mixed_precision": "fp16"}, ConfigError, "bf16"),
        ({"LoRA_type": "LyCORIS/LoHa"}, ConfigError, "Standard"),
        ({"sd3_checkbox": True}, ConfigError, "SD3"),
        ({"optimizer": "NoSuchThing"}, ConfigError, "NoSuchThing"),
        ({"resume": "no-state"}, StateError, "no-state"),
        ({"network_weights": "no-lora.safetensors"}, ModelFileError, "no-lora"),
        ({"lr_scheduler": "no-such"}, ConfigError, "no-such"),
    ],
)
def test_what_cannot_be_is_said_in_a_sentence(
    tmp_path: Path, values: dict[str, Any], error: type[Exception], words: str
) -> None:
    with pytest.raises(error) as caught:
        train(tmp_path, **values)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not list((tmp_path / "out").glob("*.safetensors"))


def test_broken_pictures_are_named_and_left_out(tmp_path: Path) -> None:
    folder = pictures(tmp_path / "img") / "2_tok cat"
    (folder / "broken.png").write_bytes((folder / "0.png").read_bytes()[:100])
    _, events = train(tmp_path, max_train_steps=2)
    assert any("broken.png" in getattr(event, "message", "") for event in events)
    for path in folder.glob("*.png"):
        path.write_bytes(b"no picture")
    with pytest.raises(DatasetError):
        train(tmp_path, max_train_steps=2)


def test_the_json_beside_the_results_trains_the_same_again(tmp_path: Path) -> None:
    from trainer import config as configuration

    first, _ = train(tmp_path, max_train_steps=3)
    (saved,) = (tmp_path / "out").glob("toy_*.json")
    again, _ = train(tmp_path, **{**json.loads(saved.read_text()), "output_name": "again"})
    assert configuration.load(saved).report == ()
    assert first.path is not None
    assert again.path is not None
    one, two = load_file(first.path), load_file(again.path)
    assert all(torch.equal(one[name], two[name]) for name in one)
