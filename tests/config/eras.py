"""Configuration files as Kohya's page wrote them over the years, made from the catalogue of its fields.

Only the shape is theirs: which keys existed on a day, which were text boxes then, and what the
switches of that year looked like.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

CATALOGUE: list[dict[str, Any]] = json.loads(
    Path(__file__).with_name("catalogue.json").read_text(encoding="utf-8")
)
BY_KEY = {row["key"]: row for row in CATALOGUE}

TEXT_BOXES = {
    # key: (last day on which the page saved a text, what it held)
    "seed": ("2024-04-19", "1234"),
    "max_train_epochs": ("2024-04-19", ""),
    "max_train_steps": ("2024-04-19", ""),
    "max_data_loader_n_workers": ("2024-04-19", "0"),
    "keep_tokens": ("2024-04-19", "0"),
    "clip_skip": ("2024-04-19", "1"),
    "max_token_length": ("2024-04-19", "75"),
    "lr_scheduler_num_cycles": ("2024-04-19", ""),
    "lr_scheduler_power": ("2024-04-19", ""),
    "learning_rate": ("2023-05-01", "0.0001"),
    "unet_lr": ("2023-05-01", "0.0001"),
    "text_encoder_lr": ("2023-05-01", "5e-5"),
    "noise_offset": ("2023-05-01", ""),
    "epoch": ("2023-03-10", "3"),
    "save_every_n_epochs": ("2023-03-10", "1"),
    "gradient_accumulation_steps": ("2023-03-10", "1"),
    "lr_warmup": ("2023-03-10", "0"),
}


def written_on(day: str) -> dict[str, Any]:
    """What the save button wrote on a day, with the page's defaults of then."""
    raw = {row["key"]: row["default"] for row in CATALOGUE if row["since"] <= day}
    for key, (until, text) in TEXT_BOXES.items():
        if key in raw and day < until:
            raw[key] = text
    if day < "2023-07-25":
        raw["xformers"] = True
    if day < "2024-04-20":
        raw["lora_network_weights"] = ""
    if day < "2024-02-04":
        raw["no_token_padding"] = False
    if "2023-05-05" <= day < "2024-04-19":
        raw["use_wandb"] = False
    if day < "2023-03-04":
        raw["use_8bit_adam"] = True
    if "2023-04-05" <= day < "2023-09-20":
        raw |= {"conv_dims": "", "conv_alphas": ""}
    if day >= "2024-04-10":
        raw["save_as_bool"] = False
    return raw
