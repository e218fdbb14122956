"""Names in LoRA files of other programs, brought to Kohya's."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from trainer.families._base import Family
    from trainer.lora_file import LoraFile

__all__ = ["ENDINGS", "kohya_tensors", "peft_alpha"]

ENDINGS = {
    ".lora_A.weight": ".lora_down.weight",
    ".lora_B.weight": ".lora_up.weight",
    ".lora_A.default.weight": ".lora_down.weight",
    ".lora_B.default.weight": ".lora_up.weight",
    ".lora.down.weight": ".lora_down.weight",
    ".lora.up.weight": ".lora_up.weight",
    ".lora_linear_layer.down.weight": ".lora_down.weight",
    ".lora_linear_layer.up.weight": ".lora_up.weight",
}
"""PEFT's and diffusers' endings."""

_PREFIXES = {"te1": ("text_encoder",), "te2": ("text_encoder_2",), "unet": ("unet", "transformer")}
"""What diffusers puts before the path of a layer."""


def _aliases(family: Family) -> dict[str, str]:
    """Other names of a family's layers: diffusers' dotted path, and that path in Kohya's spelling."""
    targets = {id(target.module): target.name for target in family.targets()}
    models = {"unet": family.unet, **family.text_encoders}
    found: dict[str, str] = {}
    for part, model in models.items():
        for path, module in model.named_modules():
            name = targets.get(id(module))
            if name is None:
                continue
            # transformers 5 left out a level of CLIPTextModel that files still have.
            paths = {path, f"text_model.{path}" if part != "unet" else path}
            for each in paths:
                found |= {f"{prefix}.{each}": name for prefix in _PREFIXES.get(part, ())}
            if part == "unet":
                found.setdefault("lora_unet_" + path.replace(".", "_"), name)
    return found


def peft_alpha(stem: str, metadata: Mapping[str, str]) -> float | None:
    """Alpha that PEFT keeps in a file's metadata, if it is there."""
    try:
        settings = json.loads(metadata.get("lora_adapter_metadata", "{}"))
        prefix, _, path = stem.partition(".")
        if f"{prefix}.lora_alpha" not in settings:
            return None
        pattern = settings.get(f"{prefix}.alpha_pattern") or {}
        return float(pattern.get(path, settings[f"{prefix}.lora_alpha"]))
    except (ValueError, TypeError, AttributeError):
        return None


def kohya_tensors(file: LoraFile, family: Family) -> dict[str, Tensor]:
    """The tensors of ``file`` under Kohya's keys; keys that nothing is known about stay as they are.

    Files of sd-scripts pass through. PEFT and diffusers names are looked up by layer, and so are
    diffusers paths in Kohya's spelling for a family that Kohya names otherwise (SDXL).
    """
    aliases = _aliases(family)
    parts = _parts(family)
    split: dict[str, dict[str, Tensor]] = {}
    found: dict[str, Tensor] = {}
    for key, tensor in file.tensors.items():
        for ending, ours in ENDINGS.items():
            if key.endswith(ending):
                stem = key.removesuffix(ending)
                if stem in parts:
                    split.setdefault(stem, {})[ours] = tensor
                    alpha = peft_alpha(stem, file.metadata)
                    if alpha is not None:
                        split[stem][".alpha"] = torch.tensor(alpha)
                    break
                name = aliases.get(stem, stem)
                found[name + ours] = tensor
                alpha = peft_alpha(stem, file.metadata)
                if alpha is not None:
                    found[name + ".alpha"] = torch.tensor(alpha)
                break
        else:
            stem, dot, rest = key.rpartition(".") if key.endswith(".alpha") else key.partition(".")
            if stem in parts:
                split.setdefault(stem, {})[".alpha"] = tensor
            else:
                found[aliases.get(stem, stem) + dot + rest] = tensor
    return found | _joined(split, family)


def _parts(family: Family) -> set[str]:
    """Paths, with diffusers' prefixes, of layers that are a part of one layer here."""
    return {
        f"{prefix}.{path}"
        for target in family.targets()
        for path, _ in target.parts
        for prefix in _PREFIXES["unet"]
    }


def _joined(split: Mapping[str, Mapping[str, Tensor]], family: Family) -> dict[str, Tensor]:
    """Pairs of parts as one pair: down weights stacked, up weights on the block diagonal.

    Each part's strength goes into its up weight, so that alpha is the joined rank.
    """
    found: dict[str, Tensor] = {}
    if not split:
        return found
    for target in family.targets():
        downs: list[Tensor] = []
        ups: list[tuple[int, Tensor]] = []  # first row, weight
        row = 0
        for path, rows in target.parts:
            pair = next((split[f"{p}.{path}"] for p in _PREFIXES["unet"] if f"{p}.{path}" in split), {})
            down, up = pair.get(".lora_down.weight"), pair.get(".lora_up.weight")
            if down is not None and up is not None:
                strength = float(pair.get(".alpha", torch.tensor(len(down)))) / len(down)
                downs.append(down)
                ups.append((row, up * strength))
            row += rows
        if not downs:
            continue
        rank, column = sum(map(len, downs)), 0
        whole = downs[0].new_zeros((row, rank))
        for first, up in ups:
            whole[first : first + len(up), column : column + up.shape[1]] = up
            column += up.shape[1]
        found[f"{target.name}.lora_down.weight"] = torch.cat(downs)
        found[f"{target.name}.lora_up.weight"] = whole
        found[f"{target.name}.alpha"] = torch.tensor(float(rank))
    return found
