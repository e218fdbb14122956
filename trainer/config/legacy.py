"""Keys that earlier versions of Kohya wrote, or that its other tabs write, and what a missing key meant.

Dates are those of the page's own history; the days are the last on which the old way was written.
"""

from __future__ import annotations

from typing import Any

__all__ = [
    "ALPHA_SINCE",
    "DREAMBOOTH_KEYS",
    "FINETUNE_KEYS",
    "LATER_ADDED",
    "LORA_KEYS",
    "MISSING_MEANT",
    "REMOVED",
    "RENAMED",
    "RENAMED_FOR_FAMILY",
    "TEXTUAL_INVERSION_KEYS",
    "TOLERATED",
]

RENAMED = {
    "cache_latent": "cache_latents",
    "cache_text_encoder_outputs": "sdxl_cache_text_encoder_outputs",
    "caption_extention": "caption_extension",
    "conv_alphas": "conv_block_alphas",
    "conv_dims": "conv_block_dims",
    "flux1_clip_l": "clip_l",
    "flux1_t5xxl": "t5xxl",
    "learning_rate_te": "text_encoder_lr",
    "lora_network_weights": "network_weights",
    "no_half_vae": "sdxl_no_half_vae",
    "sdxl_checkbox": "sdxl",
    "sdxl_max_timestep": "max_timestep",
    "sdxl_min_timestep": "min_timestep",
    "stop_text_encoder_training_pct": "stop_text_encoder_training",
    "toml_file": "dataset_config",
    "wandb_api_key_textbox": "wandb_api_key",
}
"""Keys whose setting has another name today. The old one counts where the new one is missing or empty."""

RENAMED_FOR_FAMILY = {
    "anima_blocks_to_swap": ("blocks_to_swap", "anima_checkbox"),
    "disable_mmap_load_safetensors": ("sd3_disable_mmap_load_safetensors", "sd3_checkbox"),
    "fused_backward_pass": ("sd3_fused_backward_pass", "sd3_checkbox"),
}
"""Keys that mean a setting only if a family's switch is on."""

_FINE_TUNE = "belongs to Kohya's fine-tuning tab"
_FULL = "belongs to the training of whole models"
_TEXTUAL_INVERSION = "belongs to Kohya's textual inversion tab"
_LUMINA = "was an option of Lumina for a few days in February 2026"

REMOVED = {
    "anima_disable_mmap_load_safetensors": "was an option of Anima for a day in February 2026",
    "anima_train_llm_adapter": "was an option of Anima for two days in February 2026",
    "batch_size": _FINE_TUNE,
    "block_lr": "belongs to the fine-tuning of SDXL",
    "blockwise_fused_optimizers": _FULL,
    "caption_metadata_filename": _FINE_TUNE,
    "create_buckets": _FINE_TUNE,
    "create_caption": _FINE_TUNE,
    "dataset_repeats": _FINE_TUNE,
    "file_path": "was the place of the file itself, written until January 2023",
    "flux_fused_backward_pass": _FULL,
    "full_path": _FINE_TUNE,
    "fused_optimizer_groups": _FULL,
    "image_folder": _FINE_TUNE,
    "init_word": _TEXTUAL_INVERSION,
    "latent_metadata_filename": _FINE_TUNE,
    "learning_rate_te1": _FULL,
    "learning_rate_te2": _FULL,
    "lumina_attn_dim": _LUMINA,
    "lumina_embedder_dims": _LUMINA,
    "lumina_mlp_dim": _LUMINA,
    "lumina_mod_dim": _LUMINA,
    "lumina_refiner_dim": _LUMINA,
    "lumina_sample_batch_size": _LUMINA,
    "lumina_split_qkv": _LUMINA,
    "lumina_train_blocks": _LUMINA,
    "lumina_verbose": _LUMINA,
    "network_train": "chose the part to train in December 2022; the learning rates of the parts decide now",
    "no_token_padding": "was an option of DreamBooth until February 2024",
    "num_vectors_per_token": _TEXTUAL_INVERSION,
    "save_as": "was a mark of the save button until January 2023",
    "stable_cascade": "was an option for a day in February 2024",
    "template": _TEXTUAL_INVERSION,
    "token_string": _TEXTUAL_INVERSION,
    "train_dir": _FINE_TUNE,
    "train_text_encoder": _FINE_TUNE,
    "use_latent_files": _FINE_TUNE,
    "weights": _TEXTUAL_INVERSION,
}
"""Keys that no LoRA setting stands for today, and why. They are kept in the file."""

TOLERATED = frozenset(["save_as_bool"])
"""By-products of Kohya's save button, kept without a word."""

TEXTUAL_INVERSION_KEYS = frozenset(["num_vectors_per_token", "token_string", "init_word"])
FINETUNE_KEYS = frozenset(
    [
        "caption_metadata_filename",
        "create_buckets",
        "create_caption",
        "dataset_repeats",
        "full_path",
        "image_folder",
        "latent_metadata_filename",
        "train_dir",
        "train_text_encoder",
        "use_latent_files",
    ]
)
DREAMBOOTH_KEYS = frozenset(["learning_rate_te", "learning_rate_te1", "learning_rate_te2"])
LORA_KEYS = frozenset(
    [
        "LoRA_type",
        "locon",
        "lora_network_weights",
        "network_alpha",
        "network_dim",
        "network_train",
        "network_weights",
        "unet_lr",
    ]
)
"""Keys that only the LoRA tab writes."""

LATER_ADDED = frozenset(["log_with"])
"""Keys that a conversion added to much older files, so they say nothing about a file's age."""

ALPHA_SINCE = "2023-01-22"
"""Before this day nothing was scaled, which is what an alpha equal to the rank does."""

MISSING_MEANT: dict[str, tuple[str, Any]] = {
    "bucket_no_upscale": ("2023-02-05", False),
    "max_bucket_reso": ("2023-07-16", 1024),
    "max_train_steps": ("2024-04-19", 0),
    "text_encoder_lr": ("2022-12-29", 0),
    "unet_lr": ("2022-12-29", 0),
}
"""What Kohya trained with before a day on which it got another default, by setting.

A file is as old as the youngest key in it. Before these days small pictures were enlarged, buckets
ended at 1024 pixels, the number of steps came from the epochs, and both parts of the network
learned at learning_rate.
"""
