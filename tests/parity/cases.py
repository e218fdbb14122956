"""The runs that are compared with sd-scripts, each as a Kohya JSON. Standard library only.

Both programs start from the same JSON. `engine_options` is what Kohya's page makes of it for
sd-scripts: it drops every value that is empty, false or 0 and renames some.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

__all__ = ["CASES", "Case", "engine_options", "kohya_json"]

_COMMON: Mapping[str, Any] = {
    "LoRA_type": "Standard",
    "max_resolution": "256,256",
    "enable_bucket": True,
    "bucket_no_upscale": False,
    "bucket_reso_steps": 64,
    "min_bucket_reso": 128,
    "max_bucket_reso": 512,
    "caption_extension": ".txt",
    "cache_latents": True,
    "cache_latents_to_disk": False,
    "train_batch_size": 2,
    "gradient_accumulation_steps": 1,
    "gradient_checkpointing": False,
    "epoch": 1,
    "max_train_epochs": 0,
    "learning_rate": 0.001,
    "unet_lr": 0.001,
    "text_encoder_lr": 0.0005,
    "network_dim": 16,
    "network_alpha": 8,
    "optimizer": "AdamW",
    "optimizer_args": "weight_decay=0.01",
    "lr_scheduler": "constant",
    "lr_warmup": 0,
    "lr_warmup_steps": 0,
    "max_grad_norm": 1.0,
    "mixed_precision": "no",
    "save_precision": "float",
    "save_model_as": "safetensors",
    "save_every_n_epochs": 0,
    "save_every_n_steps": 0,
    "seed": 42,
    "clip_skip": 1,
    "max_token_length": 75,
    "keep_tokens": 0,
    "prior_loss_weight": 1.0,
    "loss_type": "l2",
    "huber_schedule": "snr",
    "huber_c": 0.1,
    "huber_scale": 1.0,
    "noise_offset_type": "Original",
    "noise_offset": 0,
    "min_timestep": 0,
    "max_timestep": 1000,
    "max_data_loader_n_workers": 0,
    "xformers": "sdpa",
    "output_name": "parity",
}


@dataclass(frozen=True)
class Case:
    """What a run sets beside the common values. ``reg`` gives it class pictures too."""

    about: str
    steps: int
    values: Mapping[str, Any] = field(default_factory=dict)
    reg: bool = False


_FLUX: Mapping[str, Any] = {
    "flux1_checkbox": True,
    "LoRA_type": "Flux1",
    "max_token_length": 75,
    "model_prediction_type": "raw",
    "timestep_sampling": "shift",
    "discrete_flow_shift": 3.1582,
    "guidance_scale": 1.0,
    "t5xxl_max_token_length": 64,
    "text_encoder_lr": 0,
    "train_blocks": "all",
}

_FLUX_CASES: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    "flux": ("FLUX.1, raw prediction, shift, CLIP-L too", {"text_encoder_lr": 0.0005}),
    "flux_cached": (
        "FLUX.1, cached text outputs, engine defaults (sigma, sigma_scaled), checkpointing",
        {
            "model_prediction_type": "sigma_scaled",
            "timestep_sampling": "sigma",
            "guidance_scale": 3.5,
            "flux1_cache_text_encoder_outputs": True,
            "gradient_checkpointing": True,
        },
    ),
    "flux_masked": (
        "FLUX.1, T5 mask, flux_shift, additive, huber, input perturbation, T5 trained, LoRA+",
        {
            "apply_t5_attn_mask": True,
            "timestep_sampling": "flux_shift",
            "model_prediction_type": "additive",
            "loss_type": "huber",
            "huber_schedule": "exponential",
            "ip_noise_gamma": 0.1,
            "train_t5xxl": True,
            "text_encoder_lr": 0.0005,
            "t5xxl_lr": 0.0002,
            "loraplus_unet_lr_ratio": 4,
        },
    ),
    "flux_parts": (
        "FLUX.1, ranks of parts, blocks, input layers, sigmoid, accumulation",
        {
            "timestep_sampling": "sigmoid",
            "additional_parameters": "--sigmoid_scale 1.5",
            "gradient_accumulation_steps": 2,
            "img_attn_dim": "4",
            "txt_mlp_dim": "8",
            "single_mod_dim": "0",
            "in_dims": "[2,2,2,2,2]",
            "train_double_block_indices": "1",
        },
    ),
}

CASES: Mapping[str, Case] = {
    "plain": Case("batch 2, three buckets, UNet and text encoder", 20),
    "minsnr": Case(
        "min-SNR, noise offset, gradient accumulation",
        20,
        {"min_snr_gamma": 5, "noise_offset": 0.1, "gradient_accumulation_steps": 2},
    ),
    "vpred": Case(
        "v-prediction, zero terminal SNR, min-SNR, loss scaled like noise prediction",
        4,
        {
            "v_parameterization": True,
            "min_snr_gamma": 5,
            "scale_v_pred_loss_like_noise_pred": True,
            "additional_parameters": "--zero_terminal_snr",
        },
    ),
    "multires": Case(
        "multi-resolution noise, input perturbation of random strength, bounded timesteps",
        4,
        {
            "noise_offset_type": "Multires",
            "multires_noise_iterations": 6,
            "multires_noise_discount": 0.3,
            "ip_noise_gamma": 0.1,
            "ip_noise_gamma_random_strength": True,
            "min_timestep": 100,
            "max_timestep": 900,
        },
    ),
    "huber": Case(
        "huber loss by SNR, debiased estimation, noise offset of random strength and adaptive scale",
        4,
        {
            "loss_type": "huber",
            "debiased_estimation_loss": True,
            "noise_offset": 0.1,
            "noise_offset_random_strength": True,
            "adaptive_noise_scale": 0.05,
        },
    ),
    "locon": Case(
        "Kohya LoCon, norms held down, LoRA+",
        4,
        {
            "LoRA_type": "Kohya LoCon",
            "conv_dim": 8,
            "conv_alpha": 4,
            "scale_weight_norms": 1,
            "loraplus_lr_ratio": 4,
        },
    ),
    "cosine": Case(
        "cosine schedule with warm-up, smooth L1 by an exponential schedule, v-prediction-like loss",
        8,
        {
            "lr_scheduler": "cosine",
            "lr_warmup_steps": 3,
            "loss_type": "smooth_l1",
            "huber_schedule": "exponential",
            "v_pred_like_loss": 0.5,
        },
    ),
    "tokens": Case(
        "captions of up to 150 tokens, clip skip 2, gradient checkpointing",
        3,
        {"max_token_length": 150, "clip_skip": 2, "gradient_checkpointing": True},
    ),
    "reg": Case("class pictures at half weight", 5, {"prior_loss_weight": 0.5}, reg=True),
    "unet_only": Case("UNet alone", 3, {"text_encoder_lr": 0}),
    "sdxl": Case("SDXL, both text encoders, bucket steps of 32", 6, {"sdxl": True, "bucket_reso_steps": 32}),
    "sdxl_vpred": Case(
        "SDXL, v-prediction, zero terminal SNR, min-SNR, captions of up to 150 tokens, checkpointing",
        6,
        {
            "sdxl": True,
            "v_parameterization": True,
            "min_snr_gamma": 5,
            "scale_v_pred_loss_like_noise_pred": True,
            "additional_parameters": "--zero_terminal_snr",
            "max_token_length": 150,
            "gradient_checkpointing": True,
        },
    ),
    "sdxl_cached": Case(
        "SDXL, cached text encoder outputs, Kohya LoCon, block ranks, noise offset",
        5,
        {
            "sdxl": True,
            "sdxl_cache_text_encoder_outputs": True,
            "sdxl_no_half_vae": True,
            "text_encoder_lr": 0,
            "LoRA_type": "Kohya LoCon",
            "conv_dim": 8,
            "conv_alpha": 4,
            "noise_offset": 0.0357,
            "down_lr_weight": "sine+0.25",
            "mid_lr_weight": "0.5,0,1",
            "up_lr_weight": "0,0.2,0.4,0.6,0.8,1,1,1,1",
            "block_lr_zero_threshold": "0.1",
        },
    ),
    **{name: Case(about, 10, {**_FLUX, **values}) for name, (about, values) in _FLUX_CASES.items()},
}


def kohya_json(
    name: str,
    *,
    model: Path,
    photos: Path,
    reg_photos: Path,
    output: Path,
    network_weights: Path,
    steps: int | None = None,
) -> dict[str, Any]:
    """The Kohya JSON of a case."""
    case = CASES[name]
    flux = {}
    if case.values.get("flux1_checkbox"):
        flux = {field: str(model.parent / f"{name}.safetensors") for field, name in FLUX_FILES.items()}
    return {
        **_COMMON,
        **flux,
        "pretrained_model_name_or_path": str(model),
        "train_data_dir": str(photos),
        "reg_data_dir": str(reg_photos) if case.reg else "",
        "output_dir": str(output),
        "network_weights": str(network_weights),
        "max_train_steps": steps or case.steps,
        **case.values,
    }


FLUX_FILES = {"ae": "ae", "clip_l": "clip_l", "t5xxl": "t5xxl_fp16"}
"""Fields of FLUX's other models, and the names of their files beside the base model."""

_FLUX_SAME = [
    *FLUX_FILES,
    "model_prediction_type",
    "timestep_sampling",
    "discrete_flow_shift",
    "guidance_scale",
    "apply_t5_attn_mask",
    "t5xxl_max_token_length",
]
_FLUX_ARGS = [
    "img_attn_dim",
    "txt_mlp_dim",
    "single_mod_dim",
    "in_dims",
    "train_double_block_indices",
    "train_single_block_indices",
    "split_qkv",
    "train_t5xxl",
]

_SAME = [
    "pretrained_model_name_or_path",
    "train_data_dir",
    "reg_data_dir",
    "output_dir",
    "output_name",
    "network_weights",
    "enable_bucket",
    "bucket_no_upscale",
    "bucket_reso_steps",
    "min_bucket_reso",
    "max_bucket_reso",
    "caption_extension",
    "cache_latents",
    "cache_latents_to_disk",
    "train_batch_size",
    "gradient_accumulation_steps",
    "gradient_checkpointing",
    "max_train_epochs",
    "max_train_steps",
    "learning_rate",
    "network_dim",
    "network_alpha",
    "lr_scheduler",
    "max_grad_norm",
    "mixed_precision",
    "save_precision",
    "save_model_as",
    "save_every_n_epochs",
    "save_every_n_steps",
    "seed",
    "clip_skip",
    "max_token_length",
    "keep_tokens",
    "prior_loss_weight",
    "loss_type",
    "huber_schedule",
    "huber_c",
    "huber_scale",
    "min_timestep",
    "max_timestep",
    "min_snr_gamma",
    "v_parameterization",
    "scale_v_pred_loss_like_noise_pred",
    "v_pred_like_loss",
    "debiased_estimation_loss",
    "ip_noise_gamma",
    "ip_noise_gamma_random_strength",
    "scale_weight_norms",
]


def engine_options(values: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """What Kohya's page gives sd-scripts for a JSON: the TOML's values, and arguments after it.

    Covers the keys that the cases use.
    """
    options = {key: values[key] for key in _SAME if key in values}
    options["resolution"] = values["max_resolution"]
    options["optimizer_type"] = values["optimizer"]
    options["optimizer_args"] = values["optimizer_args"].split()
    options["network_module"] = "networks.lora"
    options["sdpa"] = values["xformers"] == "sdpa"
    options["cache_text_encoder_outputs"] = values.get("sdxl_cache_text_encoder_outputs")
    if values.get("flux1_checkbox"):
        options |= {key: values.get(key) for key in _FLUX_SAME}
        options["network_module"] = "networks.lora_flux"
        options["cache_text_encoder_outputs"] = values.get("flux1_cache_text_encoder_outputs")
    options["no_half_vae"] = values.get("sdxl_no_half_vae")
    if values["noise_offset_type"] == "Original":
        for key in ("noise_offset", "noise_offset_random_strength", "adaptive_noise_scale"):
            options[key] = values.get(key)
    else:
        for key in ("multires_noise_iterations", "multires_noise_discount"):
            options[key] = values.get(key)
    unet_lr, text_encoder_lr = values["unet_lr"], values["text_encoder_lr"]
    options["unet_lr"] = unet_lr
    if math.isclose(text_encoder_lr, 0):
        options["network_train_unet_only"] = True
    else:
        options["text_encoder_lr"] = [text_encoder_lr, values.get("t5xxl_lr") or text_encoder_lr]
    options["lr_warmup_steps"] = values["lr_warmup_steps"] or values["lr_warmup"] / 100
    network_args = []
    if values["LoRA_type"] == "Kohya LoCon":
        network_args += [f"conv_dim={values['conv_dim']}", f"conv_alpha={values['conv_alpha']}"]
    for key in (
        "down_lr_weight",
        "mid_lr_weight",
        "up_lr_weight",
        "block_lr_zero_threshold",
        "loraplus_lr_ratio",
        "loraplus_unet_lr_ratio",
        "loraplus_text_encoder_lr_ratio",
    ):
        if values.get(key):
            network_args.append(f"{key}={values[key]}")
    if values["LoRA_type"] == "Flux1":
        # Kohya's page always sends both kinds of block numbers.
        sent = {"train_double_block_indices": "all", "train_single_block_indices": "all", **values}
        network_args += [f"{key}={sent[key]}" for key in _FLUX_ARGS if sent.get(key)]
    options["network_args"] = network_args
    options = {key: value for key, value in options.items() if value not in ("", False, None, [])}
    # The one value that is sent although it is 0.
    options["max_data_loader_n_workers"] = values["max_data_loader_n_workers"]
    return options, values.get("additional_parameters", "").split()
