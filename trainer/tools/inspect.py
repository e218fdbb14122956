"""What a LoRA file says of itself: layers, ranks, hashes, data set, and its settings as a configuration."""

from __future__ import annotations

import ast
import hashlib
import json
import re
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from trainer import config as configuration
from trainer.config import KohyaConfig
from trainer.errors import ModelFileError
from trainer.lora_file import LoraFile, model_hashes, read_lora
from trainer.tools import _lora
from trainer.tools._names import Kind

__all__ = ["Inspection", "Recovered", "inspect", "lines", "recovered_config", "save_config"]

KIND_NAMES: Mapping[str, str] = {"sd1": "SD 1.x", "sd2": "SD 2.x", "sdxl": "SDXL", "flux": "FLUX.1"}
SHOWN_TAGS = 20


@dataclass(frozen=True)
class Recovered:
    """Settings read back from a file's metadata."""

    config: KohyaConfig
    taken: dict[str, Any]
    """Fields that the file tells, with their values."""
    lost: tuple[str, ...]
    """Fields that are needed to train and that no file tells."""


@dataclass(frozen=True)
class Inspection:
    """What a file holds."""

    path: Path
    size_bytes: int
    kind: Kind | None
    """Model family; None where the file is no plain LoRA."""
    format: str
    layers: Mapping[str, int] = field(default_factory=dict)
    """Number of layers of each model: "unet", "text encoder 1" ..."""
    dims: Mapping[int, int] = field(default_factory=dict)
    """Rank to number of layers."""
    alphas: Mapping[float, int] = field(default_factory=dict)
    dtypes: Mapping[str, int] = field(default_factory=dict)
    """dtype to number of tensors."""
    convolutions: int = 0
    """Layers that are convolutions wider than 1x1."""
    norm: float = 0.0
    """Frobenius norm of all weight changes together, at strength 1."""
    metadata: Mapping[str, str] = field(default_factory=dict)
    folders: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """Training folders: n_repeats, img_count."""
    tags: Mapping[str, int] = field(default_factory=dict)
    """How often each tag stood in the captions, most frequent first."""
    hashes: Mapping[str, str] = field(default_factory=dict)
    """Hashes worked out from the file, and "sha256" of the whole."""
    hash_matches: bool | None = None
    """Whether the tensors are those that sshs_model_hash was taken of; None where there is none."""


def inspect(path: Path) -> Inspection:
    """Look into a LoRA file.

    Raises:
        ModelFileError: Missing or broken.
    """
    file = read_lora(path)
    metadata = dict(file.metadata)
    hashes = {"sha256": _sha256(path)} | model_hashes(file.tensors, metadata)
    told = metadata.get("sshs_model_hash")
    common = Inspection(
        path=path,
        size_bytes=path.stat().st_size,
        kind=None,
        format=_lora.format_of(file.tensors),
        dtypes=dict(Counter(str(each.dtype).removeprefix("torch.") for each in file.tensors.values())),
        metadata=metadata,
        folders=_json(metadata.get("ss_dataset_dirs")),
        tags=_tags(metadata),
        hashes=hashes,
        hash_matches=None if told is None or told.startswith("0x") else told == hashes["sshs_model_hash"],
    )
    return _with_layers(common, file)


def _with_layers(found: Inspection, file: LoraFile) -> Inspection:
    try:
        kind, pairs = _lora.pairs_of(file, found.path.name)
    except ModelFileError:
        return found  # LyCORIS and the like: metadata and hashes are all that can be told
    squares = 0.0
    for pair in pairs.values():
        up, down = pair.matrices()
        # ||U D||^2 is the sum of the elements of (U^T U) * (D D^T).
        squares += float(((up.T @ up) * (down @ down.T)).sum()) * pair.scale**2
    return replace(
        found,
        kind=kind,
        layers=dict(Counter(_part(name) for name in pairs)),
        dims=dict(sorted(Counter(pair.rank for pair in pairs.values()).items())),
        alphas=dict(sorted(Counter(pair.alpha for pair in pairs.values()).items())),
        convolutions=sum(pair.is_wide for pair in pairs.values()),
        norm=max(squares, 0.0) ** 0.5,
    )


def _part(name: str) -> str:
    part = name.split("_")[1]
    return {"te": "text encoder", "te1": "text encoder 1", "te2": "text encoder 2", "te3": "T5"}.get(
        part, part
    )


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(4 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def _json(text: str | None) -> dict[str, Any]:
    try:
        found = json.loads(text or "{}")
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def _tags(metadata: Mapping[str, str]) -> dict[str, int]:
    total: Counter[str] = Counter()
    for tags in _json(metadata.get("ss_tag_frequency")).values():
        if isinstance(tags, dict):
            total.update({tag.strip(): count for tag, count in tags.items() if isinstance(count, int)})
    return dict(total.most_common())


def lines(found: Inspection) -> list[str]:
    """The inspection as text, one fact a line."""
    meta = found.metadata
    text = [f"{found.path.name}: {found.size_bytes / 2**20:.1f} MiB"]
    if found.kind is None:
        text.append("type: no plain LoRA (LyCORIS or another network); layers are not told")
    else:
        text.append(f"family: {KIND_NAMES[found.kind]}, names: {found.format}")
        text.append("layers: " + ", ".join(f"{part} {count}" for part, count in found.layers.items()))
        if found.convolutions:
            text.append(f"3x3 convolutions: {found.convolutions}")
        text.append("dim: " + _counted(found.dims) + "; alpha: " + _counted(found.alphas))
        text.append(f"size of the weight changes (Frobenius norm): {found.norm:.4g}")
    text.append("tensors: " + ", ".join(f"{count} {name}" for name, count in found.dtypes.items()))
    for label, key in (
        ("title", "modelspec.title"),
        ("trained on", "ss_sd_model_name"),
        ("model hash", "ss_sd_model_hash"),
        ("network", "ss_network_module"),
        ("steps", "ss_steps"),
        ("epoch", "ss_epoch"),
        ("resolution", "ss_resolution"),
        ("learning rate", "ss_learning_rate"),
        ("unet_lr", "ss_unet_lr"),
        ("text_encoder_lr", "ss_text_encoder_lr"),
        ("optimizer", "ss_optimizer"),
        ("scheduler", "ss_lr_scheduler"),
        ("seed", "ss_seed"),
        ("comment", "ss_training_comment"),
        ("merged from", "modelspec.merged_from"),
    ):
        if meta.get(key) not in (None, "", "None", "NOFILE", "IsADirectory"):
            text.append(f"{label}: {meta[key]}")
    for name, facts in found.folders.items():
        if isinstance(facts, dict):
            text.append(f"folder {name}: {facts.get('img_count')} pictures x {facts.get('n_repeats')}")
    if found.tags:
        shown = list(found.tags.items())[:SHOWN_TAGS]
        more = f" and {len(found.tags) - len(shown)} more" if len(found.tags) > len(shown) else ""
        text.append("tags: " + ", ".join(f"{tag} ({count})" for tag, count in shown) + more)
    text.append(f"sha256: {found.hashes['sha256']}")
    text.append(f"hash of the tensors: {found.hashes['sshs_model_hash']}")
    if found.hash_matches is not None:
        text.append(
            "the tensors are those that the file's hash was taken of"
            if found.hash_matches
            else "the tensors are NOT those that the file's hash was taken of: it was changed after it was saved"
        )
    if not meta:
        text.append("no metadata")
    return text


def _counted(values: Mapping[Any, int]) -> str:
    if len(values) == 1:
        return f"{next(iter(values)):g}"
    return ", ".join(f"{value:g} ({count})" for value, count in values.items())


# --- settings back ------------------------------------------------------------------------------

SAME_NAME = (
    *("learning_rate", "text_encoder_lr", "unet_lr", "gradient_checkpointing", "gradient_accumulation_steps"),
    *("max_train_steps", "network_dropout", "mixed_precision", "full_fp16", "v2", "clip_skip"),
    *("max_token_length", "cache_latents", "seed", "noise_offset", "multires_noise_iterations"),
    *("multires_noise_discount", "adaptive_noise_scale", "training_comment", "max_grad_norm"),
    *("caption_dropout_rate", "caption_dropout_every_n_epochs", "prior_loss_weight", "min_snr_gamma"),
    *("scale_weight_norms", "ip_noise_gamma", "noise_offset_random_strength"),
    *("ip_noise_gamma_random_strength", "loss_type", "huber_schedule", "huber_scale", "huber_c", "fp8_base"),
    *("fp8_base_unet", "output_name", "lr_scheduler", "color_aug", "flip_aug", "random_crop"),
    *("shuffle_caption", "enable_bucket", "bucket_no_upscale", "min_bucket_reso", "max_bucket_reso"),
    *("keep_tokens", "network_dim", "network_alpha", "model_type", "apply_t5_attn_mask"),
    *("guidance_scale", "timestep_sampling", "model_prediction_type", "discrete_flow_shift"),
)
"""ss_ entries under the name of their field."""

OTHER_NAME: Mapping[str, str] = {
    "ss_num_epochs": "epoch",
    "ss_batch_size_per_device": "train_batch_size",
    "ss_debiased_estimation": "debiased_estimation_loss",
    "ss_sd_model_name": "pretrained_model_name_or_path",
    "ss_vae_name": "vae",
    "modelspec.title": "metadata_title",
    "modelspec.author": "metadata_author",
    "modelspec.description": "metadata_description",
    "modelspec.license": "metadata_license",
    "modelspec.tags": "metadata_tags",
}

LOST = ("train_data_dir", "output_dir", "sample_prompts", "save_every_n_epochs")
"""Fields without which nothing can be trained as before, and which no file tells."""

LYCORIS: Mapping[str, str] = {
    "loha": "LyCORIS/LoHa",
    "lokr": "LyCORIS/LoKr",
    "locon": "LyCORIS/LoCon",
    "lora": "LyCORIS/LoCon",
    "ia3": "LyCORIS/iA3",
    "dylora": "LyCORIS/DyLoRA",
    "full": "LyCORIS/Native Fine-Tuning",
    "diag-oft": "LyCORIS/Diag-OFT",
    "glora": "LyCORIS/GLoRA",
}


def recovered_config(metadata: Mapping[str, str]) -> Recovered:
    """The settings that a file was trained with, as far as its metadata tells them.

    Models appear by name, without their folders, and the data set not at all.

    Args:
        metadata: ss_* and modelspec.* entries.

    Raises:
        ModelFileError: There are no training settings in it.
    """
    if not any(key in metadata for key in ("ss_learning_rate", "ss_unet_lr", "ss_max_train_steps")):
        raise ModelFileError(
            "the file tells no training settings: it was saved with no_metadata, or not by Kohya"
        )
    values: dict[str, Any] = {}
    for name in SAME_NAME:
        _take(values, name, metadata.get(f"ss_{name}"))
    for key, name in OTHER_NAME.items():
        _take(values, name, metadata.get(key))
    version = metadata.get("ss_base_model_version", "")
    values["v_parameterization"] = version.endswith("_v") or metadata.get("modelspec.prediction_type") == "v"
    values["sdxl"] = version.startswith("sdxl")
    values["flux1_checkbox"] = version.startswith("flux")
    values |= _network(metadata)
    values |= _optimizer(metadata.get("ss_optimizer", ""))
    values |= _warmup(metadata.get("ss_lr_warmup_steps", ""))
    if match := re.fullmatch(r"\(?(\d+), ?(\d+)\)?", metadata.get("ss_resolution", "")):
        values["max_resolution"] = f"{match[1]},{match[2]}"
    if values.get("multires_noise_iterations"):
        values["noise_offset_type"] = "Multires"
    if values.get("network_dim") == "Dynamic":
        values.pop("network_dim")
        values.pop("network_alpha", None)
    # sd-scripts writes FLUX's two rates as a list.
    if isinstance(rates := _literal(values.get("text_encoder_lr", "")), list) and rates:
        values["text_encoder_lr"] = rates[0]
        if len(rates) > 1:
            values["t5xxl_lr"] = rates[1]
    for name in ("unet_lr", "text_encoder_lr"):
        if f"ss_{name}" in metadata:
            values.setdefault(name, 0)
    known = {name: value for name, value in values.items() if name in KohyaConfig.model_fields}
    loaded = configuration.loads({**KohyaConfig().model_dump(), "LoRA_type": "Standard", **known})
    taken = {name: getattr(loaded.config, name) for name in known}
    return Recovered(loaded.config, taken, LOST)


def _take(values: dict[str, Any], name: str, text: str | None) -> None:
    if text is None or text in ("None", ""):
        return
    values[name] = {"True": True, "False": False}.get(text, text)


def _literal(text: Any) -> Any:
    try:
        return ast.literal_eval(text) if isinstance(text, str) else text
    except (ValueError, SyntaxError):
        return text


def _network(metadata: Mapping[str, str]) -> dict[str, Any]:
    """LoRA_type and the fields that went into network_args."""
    module, args = metadata.get("ss_network_module", ""), _json(metadata.get("ss_network_args"))
    values: dict[str, Any] = {}
    for name in ("conv_dim", "conv_alpha", "rank_dropout", "module_dropout", "factor", "train_norm"):
        _take(values, name, None if name not in args else str(args[name]))
    for name in KohyaConfig.model_fields:
        if name in args and name not in values:
            _take(values, name, str(args[name]))
    if "flux" in module:
        values["LoRA_type"] = "Flux1"
    elif "lycoris" in module:
        values["LoRA_type"] = LYCORIS.get(str(args.get("algo", "lora")).lower(), "LyCORIS/LoCon")
    elif "conv_dim" in args:
        values["LoRA_type"] = "Kohya LoCon"
    else:
        values["LoRA_type"] = "Standard"
    return values


def _optimizer(text: str) -> dict[str, Any]:
    """Optimizer and optimizer_args from ``module.Class(k=v,k=v)``."""
    path, _, rest = text.partition("(")
    if not path or path == "None":
        return {}
    name = path.rpartition(".")[2]
    choices = {choice.lower(): choice for choice in map(str, configuration.ui_of("optimizer").choices)}
    # A comma inside parentheses belongs to a value: betas=(0.9, 0.99).
    args = re.split(r",(?![^(]*\))", rest.removesuffix(")")) if rest else []
    return {
        "optimizer": choices.get(name.lower(), path),
        "optimizer_args": " ".join(arg.strip().replace(" ", "") for arg in args if arg.strip()),
    }


def _warmup(text: str) -> dict[str, Any]:
    """lr_warmup_steps from a number of steps, lr_warmup (percent) from a share."""
    try:
        value = float(text)
    except ValueError:
        return {}
    if 0 < value < 1:
        return {"lr_warmup": round(value * 100, 4), "lr_warmup_steps": 0}
    return {"lr_warmup_steps": int(value), "lr_warmup": 0}


def save_config(path: Path, output: Path, say: Callable[[str], None] = print) -> Recovered:
    """Write the settings that a LoRA file tells as a Kohya JSON.

    Raises:
        ModelFileError: The file tells none.
        ConfigError: The JSON cannot be written.
    """
    found = recovered_config(read_lora(path).metadata)
    configuration.save(found.config, output)
    say(f"saved {output}: {len(found.taken)} settings; to be filled in: {', '.join(found.lost)}")
    return found
