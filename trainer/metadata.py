"""What a LoRA file says about its training: ss_* entries as sd-scripts writes them, and modelspec.*.

Other programs sort, filter and show LoRAs by these entries, so names and spellings are those of
sd-scripts (train_network.py, library/sai_model_spec.py): every value is text, an absent one is
"None". Folders and models appear by name, never with their path.
"""

from __future__ import annotations

import contextlib
import datetime
import hashlib
import json
import random
import threading
import time
import tomllib
import weakref
from collections import Counter
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import platformdirs

from trainer.files import REPOSITORY, atomic_write
from trainer.lora_file import LEGACY_HASH_OFFSET, LEGACY_HASH_SIZE_BYTES

if TYPE_CHECKING:
    from trainer.data.types import Dataset, Subset
    from trainer.families._base import Family
    from trainer.job import Job
    from trainer.networks._base import Network
    from trainer.plan import Plan

__all__ = ["MINIMUM_KEYS", "Metadata", "model_hash", "program"]

MINIMUM_KEYS = (
    "ss_v2",
    "ss_base_model_version",
    "ss_network_module",
    "ss_network_dim",
    "ss_network_alpha",
    "ss_network_args",
)
"""What no_metadata keeps (train_util.py:SS_METADATA_MINIMUM_KEYS)."""

CHUNK_BYTES = 4 << 20
CACHED_FROM_BYTES = 64 << 20
"""Smaller files are hashed in less time than a cache takes to read."""


class Metadata:
    """The metadata of one run's files. Hashes of the model files are taken on a thread beside the first steps.

    Args:
        job: The run.
        dataset: Its pictures.
        plan: Its steps.
        family: The loaded model.
        network: The network that is saved.
        optimizer: ``module.Class(k=v,k=v)``, parentheses only with arguments.
        processes: Devices that train together.
        hash_cache: File that remembers hashes of large model files; the user's cache folder if None.
    """

    def __init__(
        self,
        job: Job,
        dataset: Dataset,
        plan: Plan,
        family: Family,
        network: Network,
        optimizer: str,
        processes: int = 1,
        hash_cache: Path | None = None,
    ) -> None:
        self.job = job
        self.family = family
        entries = _training(job, dataset, plan, family, optimizer)
        if job.family == "flux":
            entries |= _flux(job)
        if job.config.dataset_config:
            entries |= _dataset_config(job, dataset)
        else:
            entries |= _folders(job, dataset, processes)
        self._entries = {name: str(value) for name, value in entries.items()} | network.metadata()
        self._hashes = _Hashes(_model_files(job), job.base, hash_cache)
        weakref.finalize(self, self._hashes.abandoned.set)

    def at(self, *, step: int, epoch: int, now: float | None = None) -> dict[str, str]:
        """The entries of a file saved now; waits for the hashes of the model files.

        Args:
            step: Completed optimizer steps.
            epoch: As sd-scripts numbers it: from 1, but from 0 in files saved at a step.
            now: Seconds since the epoch; the clock if None.
        """
        now = time.time() if now is None else now
        entries = self._entries | self._hashes.wait()
        entries |= {
            "ss_training_finished_at": str(now),
            "ss_steps": str(step),
            "ss_epoch": str(epoch),
        }
        if self.job.engine.no_metadata:
            entries = {name: entries[name] for name in MINIMUM_KEYS if name in entries}
        return entries | _modelspec(self.job, self.family, now)


@cache
def program() -> str:
    """Name and version of this program: "lora-kiln/0.1.0"."""
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    return f"{project['name']}/{project['version']}"


def _training(job: Job, dataset: Dataset, plan: Plan, family: Family, optimizer: str) -> dict[str, Any]:
    """Entries of every run. ``or None`` stands where Kohya's page does not send a 0 or an empty text."""
    config, engine = job.config, job.engine
    return {
        "ss_session_id": random.SystemRandom().randint(0, 2**32),
        "ss_training_started_at": job.started,
        "ss_output_name": job.output_name,
        "ss_learning_rate": float(config.learning_rate or 2e-6),  # the engine's default, as in Kohya
        "ss_text_encoder_lr": job.text_encoder_lr or None,
        "ss_unet_lr": job.unet_lr or None,
        "ss_num_train_images": dataset.num_train_images,
        "ss_num_validation_images": 0,
        "ss_num_reg_images": dataset.num_reg_images,
        "ss_num_batches_per_epoch": plan.batches_per_epoch,
        "ss_num_epochs": plan.epochs,
        "ss_gradient_checkpointing": config.gradient_checkpointing,
        "ss_gradient_accumulation_steps": config.gradient_accumulation_steps,
        "ss_max_train_steps": plan.max_train_steps,
        "ss_lr_warmup_steps": _warmup(job),
        "ss_lr_scheduler": config.lr_scheduler or "constant",
        "ss_mixed_precision": config.mixed_precision or "no",
        "ss_full_fp16": config.full_fp16,
        "ss_v2": config.v2,
        "ss_base_model_version": family.kohya_base_version,
        "ss_clip_skip": config.clip_skip or None,
        "ss_max_token_length": config.max_token_length or None,
        "ss_cache_latents": config.cache_latents or config.cache_latents_to_disk,
        "ss_seed": job.seed,
        "ss_lowram": False,
        "ss_noise_offset": config.noise_offset or None,
        "ss_multires_noise_iterations": config.multires_noise_iterations or None,
        "ss_multires_noise_discount": (
            config.multires_noise_discount if config.noise_offset_type == "Multires" else 0.3
        ),
        "ss_adaptive_noise_scale": config.adaptive_noise_scale or None,
        "ss_zero_terminal_snr": engine.zero_terminal_snr,
        "ss_training_comment": config.training_comment or None,
        "ss_sd_scripts_commit_hash": program(),
        "ss_optimizer": optimizer,
        "ss_max_grad_norm": config.max_grad_norm,
        "ss_caption_dropout_rate": config.caption_dropout_rate or 0.0,
        "ss_caption_dropout_every_n_epochs": config.caption_dropout_every_n_epochs or 0,
        "ss_caption_tag_dropout_rate": engine.caption_tag_dropout_rate or 0.0,
        "ss_face_crop_aug_range": engine.face_crop_aug_range or None,
        "ss_prior_loss_weight": config.prior_loss_weight,
        "ss_min_snr_gamma": config.min_snr_gamma or None,
        "ss_scale_weight_norms": config.scale_weight_norms or None,
        "ss_ip_noise_gamma": config.ip_noise_gamma or None,
        "ss_debiased_estimation": config.debiased_estimation_loss,
        "ss_noise_offset_random_strength": config.noise_offset_random_strength,
        "ss_ip_noise_gamma_random_strength": config.ip_noise_gamma_random_strength,
        "ss_loss_type": config.loss_type,
        "ss_huber_schedule": config.huber_schedule,
        "ss_huber_scale": config.huber_scale,
        "ss_huber_c": config.huber_c,
        "ss_fp8_base": config.fp8_base,
        "ss_fp8_base_unet": config.fp8_base_unet and config.flux1_checkbox,
        "ss_validation_seed": None,
        "ss_validation_split": 0.0,
        "ss_max_validation_steps": None,
        "ss_validate_every_n_epochs": None,
        "ss_validate_every_n_steps": None,
        "ss_resize_interpolation": engine.resize_interpolation or None,
    }


def _flux(job: Job) -> dict[str, Any]:
    """Entries of FLUX runs (flux_train_network.py:update_metadata); both text encoders' rates."""
    config = job.config
    rates = [job.text_encoder_lr, float(config.t5xxl_lr or job.text_encoder_lr)]
    return {
        "ss_text_encoder_lr": rates if job.trains_text_encoder else None,
        "ss_model_type": config.model_type,
        "ss_apply_t5_attn_mask": config.apply_t5_attn_mask,
        "ss_weighting_scheme": config.weighting_scheme,
        "ss_logit_mean": config.logit_mean,
        "ss_logit_std": config.logit_std,
        "ss_mode_scale": config.mode_scale,
        "ss_guidance_scale": config.guidance_scale,
        "ss_timestep_sampling": config.timestep_sampling,
        "ss_sigmoid_scale": job.engine.sigmoid_scale,
        "ss_model_prediction_type": config.model_prediction_type,
        "ss_discrete_flow_shift": config.discrete_flow_shift,
    }


def _warmup(job: Job) -> int | float:
    """As Kohya's page sends it: steps, or a percentage as a part of 1."""
    config = job.config
    return int(config.lr_warmup_steps) or config.lr_warmup / 100 or 0


def _bucket_bounds(job: Job) -> tuple[int | None, int | None]:
    """Smallest and largest bucket side, brought to multiples of the step outwards."""
    config = job.config
    if not config.enable_bucket:
        return None, None
    steps = config.bucket_reso_steps
    return config.min_bucket_reso // steps * steps, -(-config.max_bucket_reso // steps) * steps


def _bucket_info(job: Job, dataset: Dataset) -> dict[str, Any] | None:
    if not job.config.enable_bucket:
        return None
    buckets = {
        str(index): {"resolution": list(size), "count": count}
        for index, (size, count) in enumerate(dataset.bucket_counts().items())
        if count
    }
    return {"buckets": buckets, "mean_img_ar_error": dataset.mean_aspect_error}


def _counts(dataset: Dataset) -> list[int]:
    """Pictures of each subset, repeats not counted."""
    found = Counter(picture.subset for picture in dataset.pictures)
    return [found[index] for index in range(len(dataset.subsets))]


def _tag_frequency(dataset: Dataset) -> dict[str, dict[str, int]]:
    """How often each tag (text between commas, in lower case) stands in the captions of each folder."""
    found: dict[str, Counter[str]] = {subset.folder.name: Counter() for subset in dataset.subsets}
    for picture in dataset.pictures:
        tags = (tag.strip().lower() for tag in picture.caption.split(","))
        found[dataset.subsets[picture.subset].folder.name].update(tag for tag in tags if tag)
    return {name: dict(tags) for name, tags in found.items()}


def _folders(job: Job, dataset: Dataset, processes: int) -> dict[str, Any]:
    """Entries of a run on folders."""
    config = job.config
    batch_size = config.train_batch_size
    smallest, largest = _bucket_bounds(job)
    dirs: dict[bool, dict[str, Any]] = {False: {}, True: {}}
    for subset, count in zip(dataset.subsets, _counts(dataset), strict=True):
        dirs[subset.is_reg][subset.folder.name] = {"n_repeats": subset.repeats, "img_count": count}
    return {
        "ss_batch_size_per_device": batch_size,
        "ss_total_batch_size": batch_size * processes * config.gradient_accumulation_steps,
        "ss_resolution": (job.width, job.height),
        "ss_color_aug": config.color_aug,
        "ss_flip_aug": config.flip_aug,
        "ss_random_crop": config.random_crop,
        "ss_shuffle_caption": config.shuffle_caption,
        "ss_enable_bucket": config.enable_bucket,
        "ss_bucket_no_upscale": config.bucket_no_upscale and config.enable_bucket,
        "ss_min_bucket_reso": smallest,
        "ss_max_bucket_reso": largest,
        "ss_keep_tokens": int(config.keep_tokens or 0),
        "ss_dataset_dirs": json.dumps(dirs[False]),
        "ss_reg_dataset_dirs": json.dumps(dirs[True]),
        "ss_tag_frequency": json.dumps(_tag_frequency(dataset)),
        "ss_bucket_info": json.dumps(_bucket_info(job, dataset)),
    }


def _dataset_config(job: Job, dataset: Dataset) -> dict[str, Any]:
    """Entries of a run on a dataset_config file, in place of those of `_folders`."""
    smallest, largest = _bucket_bounds(job)
    counts = _counts(dataset)
    frequency = _tag_frequency(dataset)
    described = {
        "is_dreambooth": True,
        "batch_size_per_device": job.config.train_batch_size,
        "num_train_images": dataset.num_train_images,
        "num_reg_images": dataset.num_reg_images,
        "resolution": (job.width, job.height),
        "enable_bucket": job.config.enable_bucket,
        "min_bucket_reso": smallest,
        "max_bucket_reso": largest,
        "tag_frequency": frequency,
        "bucket_info": _bucket_info(job, dataset),
        "resize_interpolation": job.engine.resize_interpolation or None,
        "subsets": [_subset(job, subset, n) for subset, n in zip(dataset.subsets, counts, strict=True)],
    }
    dirs: dict[str, Any] = {}
    for subset, count in zip(dataset.subsets, counts, strict=True):
        if subset.is_reg:
            continue
        name, number = subset.folder.name, 2
        while name in dirs:
            name, number = f"{subset.folder.name} ({number})", number + 1
        dirs[name] = {"n_repeats": subset.repeats, "img_count": count}
    return {
        "ss_datasets": json.dumps([described]),
        "ss_tag_frequency": json.dumps(frequency),
        "ss_dataset_dirs": json.dumps(dirs),
    }


def _subset(job: Job, subset: Subset, count: int) -> dict[str, Any]:
    return {
        "img_count": count,
        "num_repeats": subset.repeats,
        "color_aug": subset.color_aug,
        "flip_aug": subset.flip_aug,
        "random_crop": subset.random_crop,
        "shuffle_caption": subset.shuffle_caption,
        "keep_tokens": subset.keep_tokens,
        "keep_tokens_separator": subset.keep_tokens_separator,
        "secondary_separator": subset.secondary_separator or None,
        "enable_wildcard": subset.enable_wildcard,
        "caption_prefix": subset.caption_prefix or None,
        "caption_suffix": subset.caption_suffix or None,
        "resize_interpolation": job.engine.resize_interpolation or None,
        "image_dir": subset.folder.name,
        "class_tokens": subset.class_tokens,
        "is_reg": subset.is_reg,
    }


def _modelspec(job: Job, family: Family, now: float) -> dict[str, str]:
    """ModelSpec 1.0.1 (Stability-AI/ModelSpec), with the fields that sd-scripts fills."""
    config, engine = job.config, job.engine
    found: dict[str, Any] = {
        "sai_model_spec": "1.0.1",
        "architecture": family.architecture,
        "implementation": family.implementation,
        "title": config.metadata_title or job.output_name,
        "resolution": f"{job.width}x{job.height}",
        "date": datetime.datetime.fromtimestamp(int(now)).isoformat(),
        "description": config.metadata_description or None,
        "author": config.metadata_author or None,
        "license": config.metadata_license or None,
        "tags": config.metadata_tags or None,
        "usage_hint": engine.metadata_usage_hint or None,
        "trigger_phrase": engine.metadata_trigger_phrase or None,
        "prediction_type": None if config.flux1_checkbox else "v" if config.v_parameterization else "epsilon",
        "timestep_range": _timestep_range(job),
        "encoder_layer": config.clip_skip or None,
        "implementation_version": program(),
    }
    return {f"modelspec.{name}": str(value) for name, value in found.items() if value is not None}


def _timestep_range(job: Job) -> str | None:
    low, high = job.config.min_timestep or 0, job.config.max_timestep
    sent = low or job.written.max_timestep or high != 1000
    return f"{low},{high}" if sent else None


def _model_files(job: Job) -> dict[str, str]:
    """Base model and VAE as written, under the part of their entries' names that differs."""
    found = {"sd_model": job.config.pretrained_model_name_or_path.strip(), "vae": job.config.vae.strip()}
    return {kind: text for kind, text in found.items() if text}


def model_hash(path: Path) -> str:
    """The first web UI's hash of a model file: 8 digits over 64 KiB from 1 MiB on.

    Texts take the place of a hash where there is none to take, as in sd-scripts.
    """
    if path.is_dir():
        return "IsADirectory"
    try:
        with path.open("rb") as file:
            file.seek(LEGACY_HASH_OFFSET)
            return hashlib.sha256(file.read(LEGACY_HASH_SIZE_BYTES)).hexdigest()[:8]
    except OSError:
        return "NOFILE"


class _Hashes:
    """Names and hashes of model files, read slowly on a thread until somebody waits for them."""

    def __init__(self, files: Mapping[str, str], base: Path, cache_file: Path | None) -> None:
        self.urgent = threading.Event()
        self.abandoned = threading.Event()
        self.entries: dict[str, str] = {}
        self._cache_file = cache_file
        # A daemon: a program that ends does not wait for it.
        self._thread = threading.Thread(target=self._run, args=(files, base), name="hashes", daemon=True)
        self._thread.start()

    def wait(self) -> dict[str, str]:
        """The entries, at full speed from now on."""
        self.urgent.set()
        self._thread.join()
        return self.entries

    def _run(self, files: Mapping[str, str], base: Path) -> None:
        for kind, text in files.items():
            path = base / Path(text).expanduser()
            if path.exists():
                # Where there is no memory left the training says so; its files go without the hashes.
                with contextlib.suppress(MemoryError):
                    self.entries[f"ss_{kind}_hash"] = model_hash(path)
                    self.entries[f"ss_new_{kind}_hash"] = self._sha256(path)
            # The name on the hub is told as it is, a path only by its last part.
            on_disk = path.exists() or Path(text).is_absolute() or text.startswith(("~", "."))
            self.entries[f"ss_{kind}_name"] = path.name if on_disk else text

    def _sha256(self, path: Path) -> str:
        if path.is_dir():
            return "IsADirectory"
        try:
            info = path.stat()
            key = f"{path.resolve()}|{info.st_size}|{info.st_mtime_ns}"
            known = self._known() if info.st_size >= CACHED_FROM_BYTES else {}
            if key in known:
                return known[key]
            found = self._digest(path)
        except OSError:
            return "NOFILE"
        if info.st_size >= CACHED_FROM_BYTES and not self.abandoned.is_set():
            self._remember(known | {key: found})
        return found

    def _digest(self, path: Path) -> str:
        digest = hashlib.sha256()
        with path.open("rb") as file:
            began = time.perf_counter()
            while (chunk := file.read(CHUNK_BYTES)) and not self.abandoned.is_set():
                digest.update(chunk)
                # Three quarters of a core stay with the training until a file is to be saved.
                self.urgent.wait(3 * (time.perf_counter() - began))
                began = time.perf_counter()
        return digest.hexdigest()

    def _cache_path(self) -> Path:
        if self._cache_file is not None:
            return self._cache_file
        return platformdirs.user_cache_path("lora-kiln", appauthor=False) / "model_hashes.json"

    def _known(self) -> dict[str, str]:
        try:
            found = json.loads(self._cache_path().read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return {}
        return found if isinstance(found, dict) else {}

    def _remember(self, known: Mapping[str, str]) -> None:
        try:
            atomic_write(self._cache_path(), json.dumps(known, indent=1))
        except OSError:
            return  # a cache that cannot be written only costs time next time
