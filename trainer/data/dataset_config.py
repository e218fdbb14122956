"""sd-scripts' dataset_config files (TOML or JSON): data sets written out instead of read off folder names.

Rules: sd-scripts, config_util.py (ConfigSanitizer, BlueprintGenerator). A value is looked up in the
subset, then its data set, then [general], then the job's own fields.
"""

from __future__ import annotations

import json
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

from pydantic import BaseModel, ConfigDict, ValidationError

from trainer.data.buckets import BucketRules
from trainer.data.types import Size, Subset
from trainer.errors import ConfigError
from trainer.job import Job

__all__ = ["Source", "apply_dataset_config", "read_dataset_config"]


@dataclass(frozen=True)
class Source:
    """A subset and the rules by which its pictures are put into buckets."""

    subset: Subset
    rules: BucketRules


class _MakeSubset(Protocol):
    def __call__(self, job: Job, folder: Path, *, repeats: int, class_tokens: str | None) -> Subset: ...


class _DatasetOptions(BaseModel):
    """Keys allowed in [general] and [[datasets]]; None where the file says nothing."""

    model_config = ConfigDict(extra="forbid")

    batch_size: int | None = None
    resolution: int | tuple[int, int] | None = None
    enable_bucket: bool | None = None
    min_bucket_reso: int | None = None
    max_bucket_reso: int | None = None
    bucket_reso_steps: int | None = None
    bucket_no_upscale: bool | None = None
    network_multiplier: float | None = None
    """Has no effect on a LoRA run in sd-scripts either."""
    validation_seed: int | None = None
    validation_split: float | None = None


class _SubsetOptions(BaseModel):
    """Keys allowed at every level; None where the file says nothing."""

    model_config = ConfigDict(extra="forbid")

    num_repeats: int | None = None
    class_tokens: str | None = None
    caption_extension: str | None = None
    shuffle_caption: bool | None = None
    caption_separator: str | None = None
    secondary_separator: str | None = None
    keep_tokens: int | None = None
    keep_tokens_separator: str | None = None
    enable_wildcard: bool | None = None
    caption_prefix: str | None = None
    caption_suffix: str | None = None
    caption_dropout_rate: float | None = None
    caption_dropout_every_n_epochs: int | None = None
    caption_tag_dropout_rate: float | None = None
    token_warmup_min: int | None = None
    token_warmup_step: float | None = None
    color_aug: bool | None = None
    flip_aug: bool | None = None
    random_crop: bool | None = None
    face_crop_aug_range: tuple[float, float] | None = None
    resize_interpolation: str | None = None
    cache_info: bool | None = None
    """Saves sd-scripts a look at the files; not needed here."""
    custom_attributes: dict[str, Any] | None = None
    """Carried by sd-scripts for other scripts; says nothing to a LoRA run."""


class _OnlySubset(_SubsetOptions):
    """Keys of [[datasets.subsets]]."""

    image_dir: str
    is_reg: bool = False
    alpha_mask: bool | None = None
    conditioning_data_dir: str | None = None
    """Folder of loss masks; only with masked_loss."""


class _AnyLevel(_DatasetOptions, _SubsetOptions):
    pass


NO_EFFECT = {"cache_info", "custom_attributes"}


def _load(path: Path) -> dict[str, Any]:
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"dataset_config {path} cannot be read: {error}") from error
    try:
        found = json.loads(text) if path.suffix.lower() == ".json" else tomllib.loads(text)
    except ValueError as error:
        raise ConfigError(f"dataset_config {path} cannot be read: {error}") from error
    if not isinstance(found, dict) or not isinstance(found.get("datasets"), list) or not found["datasets"]:
        raise ConfigError(f"dataset_config {path} has no [[datasets]]")
    unknown = set(found) - {"general", "datasets"}
    if unknown:
        raise ConfigError(
            f"dataset_config {path} has a section {sorted(unknown)[0]!r}: known are general and datasets"
        )
    return found


def _check(path: Path, place: str, kind: type[BaseModel], values: Any) -> dict[str, Any]:
    """Values of one level, checked; only those that the file sets."""
    if not isinstance(values, Mapping):
        raise ConfigError(f"dataset_config {path}: {place} must be a table")
    if "metadata_file" in values:
        raise ConfigError(
            f"dataset_config {path}: {place} uses metadata_file, but fine-tuning data sets are not supported: "
            "give image_dir and caption files"
        )
    try:
        return kind.model_validate(dict(values)).model_dump(exclude_none=True, exclude_unset=True)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(map(str, first["loc"]))
        raise ConfigError(
            f"dataset_config {path}: {place} has {key} = {first['input']!r}: {first['msg']}"
        ) from error


@dataclass(frozen=True)
class _Dataset:
    values: dict[str, Any]
    subsets: list[dict[str, Any]]


def _datasets(path: Path) -> list[_Dataset]:
    found = _load(path)
    general = _check(path, "[general]", _AnyLevel, found.get("general", {}))
    datasets = []
    for number, entry in enumerate(found["datasets"], 1):
        place = f"data set {number}"
        if not isinstance(entry, Mapping):
            raise ConfigError(f"dataset_config {path}: {place} must be a table")
        subsets = entry.get("subsets")
        if not isinstance(subsets, list) or not subsets:
            raise ConfigError(f"dataset_config {path}: {place} has no [[datasets.subsets]]")
        own = _check(path, place, _AnyLevel, {key: value for key, value in entry.items() if key != "subsets"})
        values = general | own
        if values.get("validation_split"):
            raise ConfigError(f"dataset_config {path}: {place} sets validation_split, which is not supported")
        checked = [
            _check(path, f"{place}, subset {index}", _OnlySubset, subset)
            for index, subset in enumerate(subsets, 1)
        ]
        shared = {key: value for key, value in values.items() if key in _SubsetOptions.model_fields}
        datasets.append(_Dataset(values, [shared | subset for subset in checked]))
    return datasets


def _resolution(values: Mapping[str, Any], job: Job) -> Size:
    resolution = values.get("resolution", (job.width, job.height))
    return (resolution, resolution) if isinstance(resolution, int) else (resolution[0], resolution[1])


def apply_dataset_config(job: Job) -> Job:
    """The job with what its dataset_config says for the whole run: batch size, resolution, augmentation.

    The job is returned as it is where it names no such file.

    Raises:
        ConfigError: The file cannot be used, or its data sets differ in batch size.
    """
    if not job.config.dataset_config.strip():
        return job
    path = job.path(job.config.dataset_config.strip())
    datasets = _datasets(path)
    sizes = {dataset.values.get("batch_size", job.config.train_batch_size) for dataset in datasets}
    if len(sizes) > 1:
        raise ConfigError(
            f"dataset_config {path} has data sets of batch size {', '.join(map(str, sorted(sizes)))}: "
            "all must have the same"
        )
    largest = max(
        (_resolution(dataset.values, job) for dataset in datasets), key=lambda size: size[0] * size[1]
    )
    applied = job.with_config(train_batch_size=sizes.pop(), max_resolution=f"{largest[0]},{largest[1]}")
    return replace(applied, width=largest[0], height=largest[1])


def read_dataset_config(job: Job, make_subset: _MakeSubset) -> list[Source]:
    """Subsets and bucket rules of the job's dataset_config.

    Args:
        job: Names the file; its fields are what the file leaves open.
        make_subset: Builds a subset from the job's fields (`folder.subset_from_job`).

    Raises:
        ConfigError: The file cannot be read, a key is unknown or of the wrong type, or it asks for
            another batch size than the job has (`apply_dataset_config` was not called).
    """
    path = job.path(job.config.dataset_config.strip())
    sources: list[Source] = []
    for dataset in _datasets(path):
        values = dataset.values
        if values.get("batch_size", job.config.train_batch_size) != job.config.train_batch_size:
            raise ConfigError(
                f"dataset_config {path} sets batch_size {values['batch_size']}, "
                f"but train_batch_size is {job.config.train_batch_size}"
            )
        config = job.config
        rules = BucketRules.make(
            resolution=_resolution(values, job),
            enabled=values.get("enable_bucket", config.enable_bucket),
            minimum=values.get("min_bucket_reso", config.min_bucket_reso),
            maximum=values.get("max_bucket_reso", config.max_bucket_reso),
            step=values.get("bucket_reso_steps", config.bucket_reso_steps),
            no_upscale=values.get("bucket_no_upscale", config.bucket_no_upscale),
            family=job.family,
        )
        seen: set[Path] = set()
        for options in dataset.subsets:
            folder = job.path(options["image_dir"])
            if not folder.is_dir():
                raise ConfigError(f"dataset_config {path}: image_dir {folder} is no folder")
            repeats = options.get("num_repeats", job.engine.dataset_repeats)
            if folder in seen or repeats < 1:
                continue  # as sd-scripts: the first of two equal folders counts
            seen.add(folder)
            subset = make_subset(job, folder, repeats=repeats, class_tokens=options.get("class_tokens"))
            fields = {
                key: value
                for key, value in options.items()
                if key not in NO_EFFECT | {"image_dir", "num_repeats", "class_tokens"}
            }
            if "caption_extension" in fields and not fields["caption_extension"].startswith("."):
                fields["caption_extension"] = f".{fields['caption_extension']}"
            if "conditioning_data_dir" in fields:
                fields["mask_folder"] = _mask_folder(job, path, fields.pop("conditioning_data_dir"))
                fields["masks_optional"] = False
            subset = replace(subset, **fields)
            is_faced = subset.face_crop_aug_range is not None
            if is_faced and subset.masks_optional:  # drawn on the page; nobody asked for them here
                subset = replace(subset, mask_folder=None, masks_optional=False)
            if subset.mask_folder is not None and is_faced:
                raise ConfigError(
                    f"dataset_config {path}: conditioning_data_dir excludes face_crop_aug_range"
                )
            sources.append(Source(subset, rules))
    caching = job.config.cache_latents or job.config.cache_latents_to_disk
    if caching and any(source.subset.color_aug or source.subset.random_crop for source in sources):
        raise ConfigError(
            f"dataset_config {path}: color_aug and random_crop change the picture every time, "
            "so they need cache_latents switched off"
        )
    return sources


def _mask_folder(job: Job, path: Path, text: str) -> Path:
    folder = job.path(text)
    if not job.config.masked_loss:
        raise ConfigError(
            f"dataset_config {path}: conditioning_data_dir holds loss masks: switch masked_loss on"
        )
    if not folder.is_dir():
        raise ConfigError(f"dataset_config {path}: conditioning_data_dir {folder} is no folder")
    return folder
