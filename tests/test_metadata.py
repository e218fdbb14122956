"""Metadata against that of files which sd-scripts wrote, recorded from real runs."""

from __future__ import annotations

import datetime
import functools
import hashlib
import json
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.families import sdxl_full
from tests.networks.small import family
from tests.networks.small import job as small_job
from tests.parity.make_golden import VOLATILE
from tests.parity.make_photos import PHOTOS, REG_PHOTOS
from trainer import metadata as subject
from trainer.config import KohyaConfig
from trainer.data.types import Dataset, Fit, Picture, Size, Subset
from trainer.job import Job
from trainer.metadata import MINIMUM_KEYS, Metadata, model_hash, program
from trainer.networks.lora import LoraNetwork
from trainer.plan import Plan

RUNS = json.loads((Path(__file__).parent / "parity" / "golden" / "runs.json").read_text("utf-8"))
"""Recorded runs of sd-scripts; entries that differ from run to run are null."""
WHOLE_NUMBERS = {"ss_huber_scale", "ss_max_grad_norm", "ss_prior_loss_weight", "ss_min_snr_gamma"}
FAMILY = functools.cache(family)
SDXL = functools.cache(sdxl_full.full_size)
HASHES = {"sshs_model_hash", "sshs_legacy_hash"}
"""Added where the file is written."""


def dataset(buckets: dict[Size, int], mean_aspect_error: float, reg: bool = False) -> Dataset:
    """The photographs of the recorded runs; the buckets are taken as recorded, they are tested elsewhere."""
    subsets, pictures, repeats = [], [], []
    for is_reg, photos in ((False, PHOTOS), (True, REG_PHOTOS if reg else {})):
        for name, captions in photos.items():
            number, _, token = name.partition("_")
            folder = Path("private") / "photos" / name
            subsets.append(Subset(folder=folder, repeats=int(number), class_tokens=token, is_reg=is_reg))
            for file, caption in captions.items():
                pictures.append(
                    Picture(
                        path=folder / file,
                        subset=len(subsets) - 1,
                        size=(512, 512),
                        caption=caption or token,
                        caption_file=None,
                    )
                )
                repeats.append(int(number))
    # Any split that leaves no bucket empty: only the buckets themselves are compared.
    sizes = list(buckets)
    fits = [Fit(sizes[k % len(sizes)], (0, 0)) for k in range(len(pictures))]
    return Dataset(
        subsets=tuple(subsets),
        pictures=tuple(pictures),
        fits=tuple(fits),
        repeats=tuple(repeats),
        buckets=tuple(sorted(buckets)),
        num_train_images=sum(
            n for n, p in zip(repeats, pictures, strict=True) if not subsets[p.subset].is_reg
        ),
        num_reg_images=sum(n for n, p in zip(repeats, pictures, strict=True) if subsets[p.subset].is_reg),
        mean_aspect_error=mean_aspect_error,
    )


def plan(batches: int, steps: int, epochs: int) -> Plan:
    return Plan(
        batches_per_epoch=batches,
        updates_per_epoch=batches,
        max_train_steps=steps,
        epochs=epochs,
        warmup_steps=0,
        save_every_n_epochs=0,
        arithmetic=(),
    )


def small_dataset() -> Dataset:
    return dataset({(256, 256): 18}, 0.0)


def network_for(job: Job) -> LoraNetwork:
    """A network without layers: its entries come from the job alone."""
    return LoraNetwork([], job, None)


def make(job: Job, data: Dataset | None = None, **values: Any) -> Metadata:
    return Metadata(
        job,
        data or small_dataset(),
        plan(9, 20, 3),
        FAMILY(),
        network_for(job),
        "torch.optim.adamw.AdamW",
        **values,
    )


@pytest.mark.parametrize("name", RUNS)
def test_entries_are_those_of_sd_scripts(name: str, tmp_path: Path) -> None:
    record = RUNS[name]
    golden = record["metadata"]
    expected = {key: value for key, value in golden.items() if value is not None}
    bucket_info = json.loads(expected["ss_bucket_info"])
    buckets = {tuple(b["resolution"]): b["count"] for b in bucket_info["buckets"].values()}
    data = dataset(buckets, bucket_info["mean_img_ar_error"], bool(record["config"]["reg_data_dir"]))
    model = tmp_path / expected["ss_sd_model_name"]
    model.write_bytes(b"not a model")
    values = {**record["config"], "pretrained_model_name_or_path": str(model), "network_weights": ""}
    job = Job.from_config(KohyaConfig(**values), base=tmp_path)
    made = plan(
        int(expected["ss_num_batches_per_epoch"]),
        int(expected["ss_max_train_steps"]),
        int(expected["ss_num_epochs"]),
    )
    sdxl = job.family == "sdxl"
    version = 2 if job.config.v2 else 1
    v_parameterization = job.config.v_parameterization
    model_family = SDXL() if sdxl else FAMILY(version, v_parameterization=v_parameterization)
    found = Metadata(job, data, made, model_family, network_for(job), expected["ss_optimizer"]).at(
        step=int(expected["ss_steps"]), epoch=int(expected["ss_epoch"])
    )
    assert found.keys() == golden.keys() - HASHES
    jsons = {
        "ss_bucket_info",
        "ss_tag_frequency",
        "ss_dataset_dirs",
        "ss_reg_dataset_dirs",
        "ss_network_args",
    }
    for key, value in expected.items():
        if key == "ss_bucket_info":
            # Counts per bucket hang on the pictures' sizes, which are tested with the buckets.
            ours, theirs = json.loads(found[key]), json.loads(value)
            assert ours["mean_img_ar_error"] == theirs["mean_img_ar_error"]
            assert {k: b["resolution"] for k, b in ours["buckets"].items()} == {
                k: b["resolution"] for k, b in theirs["buckets"].items()
            }
        elif key in jsons:
            assert json.loads(found[key]) == json.loads(value), key
        elif key in WHOLE_NUMBERS:
            # A page in JavaScript knows no 1.0: Kohya's writes 1, a JSON that goes past it 1.0.
            assert found[key] in (value, value.removesuffix(".0")), key
        else:
            assert found[key] == value, key
    assert set(golden) - set(expected) <= VOLATILE


def test_everything_is_text_and_no_path_is_told(tmp_path: Path) -> None:
    model = tmp_path / "secret-place" / "model.safetensors"
    model.parent.mkdir()
    model.write_bytes(b"x")
    job = small_job(
        pretrained_model_name_or_path=str(model),
        output_dir=str(tmp_path / "secret-place"),
        train_data_dir=str(tmp_path / "secret-place"),
        wandb_api_key="k3y",
        huggingface_token="t0ken",
    )
    found = make(job).at(step=1, epoch=1)
    assert all(isinstance(key, str) and isinstance(value, str) for key, value in found.items())
    told = json.dumps(found)
    assert not any(word in told for word in ("secret-place", "private", "k3y", "t0ken", str(Path.home())))
    assert found["ss_sd_model_name"] == "model.safetensors"


def test_a_hub_name_is_told_and_a_lost_path_is_not() -> None:
    found = make(small_job(pretrained_model_name_or_path="someone/model")).at(step=1, epoch=1)
    assert found["ss_sd_model_name"] == "someone/model"
    assert "ss_sd_model_hash" not in found
    lost = str(Path("/nowhere/at/all.safetensors").absolute())
    found = make(small_job(pretrained_model_name_or_path=lost)).at(step=1, epoch=1)
    assert found["ss_sd_model_name"] == "all.safetensors"


def test_model_hashes(tmp_path: Path) -> None:
    data = bytes(range(256)) * 6000  # 1.5 MB: the old hash has something to read
    model, vae = tmp_path / "m.safetensors", tmp_path / "v.pt"
    model.write_bytes(data)
    vae.write_bytes(data[::-1])
    found = make(small_job(pretrained_model_name_or_path=str(model), vae=str(vae))).at(step=1, epoch=1)
    assert found["ss_new_sd_model_hash"] == hashlib.sha256(data).hexdigest()
    assert found["ss_sd_model_hash"] == hashlib.sha256(data[0x100000:0x110000]).hexdigest()[:8]
    assert found["ss_new_vae_hash"] == hashlib.sha256(data[::-1]).hexdigest()
    assert found["ss_vae_name"] == "v.pt"
    assert model_hash(tmp_path) == "IsADirectory"
    assert model_hash(tmp_path / "gone") == "NOFILE"


def test_hashing_does_not_hold_up_the_start_and_is_remembered(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, cache = tmp_path / "m.safetensors", tmp_path / "cache" / "hashes.json"
    model.write_bytes(b"abc")
    monkeypatch.setattr(subject, "CACHED_FROM_BYTES", 1)
    gate, calls = threading.Event(), []
    digest = subject._Hashes._digest

    def slow(self: Any, path: Path) -> str:
        calls.append(path.name)
        assert gate.wait(30)
        return digest(self, path)

    monkeypatch.setattr(subject._Hashes, "_digest", slow)
    job = small_job(pretrained_model_name_or_path=str(model))
    first = make(job, hash_cache=cache)  # returns while the thread still waits
    assert first._hashes._thread.is_alive()
    gate.set()
    expected = hashlib.sha256(b"abc").hexdigest()
    assert first.at(step=1, epoch=1)["ss_new_sd_model_hash"] == expected
    assert make(job, hash_cache=cache).at(step=1, epoch=1)["ss_new_sd_model_hash"] == expected
    assert calls == ["m.safetensors"]
    model.write_bytes(b"abcd")  # another file under the same name
    changed = make(job, hash_cache=cache).at(step=1, epoch=1)["ss_new_sd_model_hash"]
    assert changed == hashlib.sha256(b"abcd").hexdigest()
    cache.write_text("{broken", encoding="utf-8")
    assert make(job, hash_cache=cache).at(step=1, epoch=1)["ss_new_sd_model_hash"] == changed


def test_an_abandoned_run_stops_hashing(tmp_path: Path) -> None:
    model = tmp_path / "m.safetensors"
    with model.open("wb") as file:
        file.truncate(1 << 30)
    made = make(small_job(pretrained_model_name_or_path=str(model)), hash_cache=tmp_path / "cache.json")
    thread = made._hashes._thread
    del made
    thread.join(30)
    assert not thread.is_alive()
    assert not (tmp_path / "cache.json").exists()


def test_step_epoch_and_times() -> None:
    job = small_job()
    found = make(job).at(step=7, epoch=2, now=1_700_000_000.5)
    assert (found["ss_steps"], found["ss_epoch"]) == ("7", "2")
    assert found["ss_training_finished_at"] == "1700000000.5"
    assert found["ss_training_started_at"] == str(job.started)
    assert found["modelspec.date"] == datetime.datetime.fromtimestamp(1_700_000_000).isoformat()
    again = make(job).at(step=7, epoch=2)
    assert again["ss_session_id"] != found["ss_session_id"]
    assert again.keys() == found.keys()


def test_it_names_itself() -> None:
    found = make(small_job()).at(step=1, epoch=1)
    assert program().startswith("lora-kiln/")
    assert found["modelspec.implementation_version"] == program()
    assert found["ss_sd_scripts_commit_hash"] == program()


def test_no_metadata_keeps_the_minimum_and_the_modelspec() -> None:
    job = small_job(additional_parameters="--no_metadata", LoRA_type="Kohya LoCon")
    found = make(job).at(step=1, epoch=1)
    assert {key for key in found if key.startswith("ss_")} == set(MINIMUM_KEYS)
    assert found["modelspec.title"] == "last"


def test_modelspec_fields_that_are_given() -> None:
    job = small_job(
        metadata_title="T",
        metadata_author="A",
        metadata_description="D",
        metadata_license="L",
        metadata_tags="x, y",
        clip_skip=2,
        min_timestep=100,
        max_timestep=900,
        v_parameterization=True,
        max_resolution="512,768",
        additional_parameters="--metadata_trigger_phrase 'a b'",
    )
    found = {
        k.removeprefix("modelspec."): v for k, v in make(job).at(step=1, epoch=1).items() if "modelspec" in k
    }
    given = {"title": "T", "author": "A", "description": "D", "license": "L", "tags": "x, y"}
    given |= {"encoder_layer": "2", "timestep_range": "100,900", "prediction_type": "v"}
    given |= {"resolution": "512x768", "trigger_phrase": "a b"}
    assert found | given == found
    plain = make(small_job(clip_skip=0, max_timestep=0)).at(step=1, epoch=1)
    assert not {"modelspec.encoder_layer", "modelspec.timestep_range", "modelspec.author"} & plain.keys()


def test_values_as_kohyas_page_sends_them() -> None:
    found = make(
        small_job(
            learning_rate=0,
            text_encoder_lr=0,
            lr_scheduler="cosine",
            lr_warmup=10,
            network_dropout=0.1,
            scale_weight_norms=1,
            min_snr_gamma=5,
            noise_offset=0.05,
            rank_dropout=0.2,
            cache_latents=False,
            cache_latents_to_disk=True,
            gradient_accumulation_steps=4,
            train_batch_size=3,
            max_grad_norm=0,
        ),
        processes=2,
    ).at(step=1, epoch=1)
    expected = {
        "ss_learning_rate": "2e-06",  # a 0 is not sent, and the engine has its own default
        "ss_text_encoder_lr": "None",
        "ss_lr_warmup_steps": "0.1",
        "ss_network_dropout": "0.1",
        "ss_scale_weight_norms": "1",
        "ss_min_snr_gamma": "5",
        "ss_noise_offset": "0.05",
        "ss_cache_latents": "True",
        "ss_max_grad_norm": "1.0",
        "ss_batch_size_per_device": "3",
        "ss_total_batch_size": "24",
        "ss_network_args": '{"rank_dropout": "0.2", "dropout": 0.1}',
    }
    assert found | expected == found
    assert (
        make(small_job(lr_warmup_steps=50, lr_scheduler="cosine")).at(step=1, epoch=1)["ss_lr_warmup_steps"]
        == "50"
    )


def test_without_buckets() -> None:
    found = make(small_job(enable_bucket=False)).at(step=1, epoch=1)
    assert found["ss_bucket_info"] == "null"
    assert [found[f"ss_{side}_bucket_reso"] for side in ("min", "max")] == ["None", "None"]
    assert found["ss_bucket_no_upscale"] == "False"
    odd = make(small_job(min_bucket_reso=300, max_bucket_reso=1000)).at(step=1, epoch=1)
    assert [odd[f"ss_{side}_bucket_reso"] for side in ("min", "max")] == ["256", "1024"]


def test_tags_are_counted_in_lower_case_by_folder() -> None:
    data = small_dataset()
    pictures = [replace(picture, caption="Cat,  cat , DOG,,") for picture in data.pictures]
    found = make(small_job(), replace(data, pictures=tuple(pictures))).at(step=1, epoch=1)
    assert json.loads(found["ss_tag_frequency"]) == {
        "2_skimage photo": {"cat": 14, "dog": 7},
        "1_surface": {"cat": 8, "dog": 4},
    }


def test_dataset_config_has_its_own_entries() -> None:
    data = dataset({(256, 256): 21}, 0.0, reg=True)
    same_name = replace(data.subsets[1], folder=Path("elsewhere") / "2_skimage photo")
    data = replace(data, subsets=(data.subsets[0], same_name, data.subsets[2]))
    found = make(small_job(dataset_config="d.toml"), data).at(step=1, epoch=1)
    assert "ss_batch_size_per_device" not in found
    assert json.loads(found["ss_dataset_dirs"]) == {
        "2_skimage photo": {"n_repeats": 2, "img_count": 7},
        "2_skimage photo (2)": {"n_repeats": 1, "img_count": 4},
    }
    (described,) = json.loads(found["ss_datasets"])
    assert [subset["image_dir"] for subset in described["subsets"]] == [
        "2_skimage photo",
        "2_skimage photo",
        "1_thing",
    ]
    assert described["num_reg_images"] == 3
