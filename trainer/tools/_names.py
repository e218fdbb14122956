"""Layer names in LoRA files: Kohya's, diffusers' (PEFT) and Black Forest Labs', from the names alone.

Kohya writes a path with "_" for every dot, so going back needs to know which names have an underscore
of their own (`_WORDS`). SDXL's UNet layers bear the original (SGM) paths in Kohya's files, FLUX's those
of Black Forest Labs, where q, k and v are one layer (engine facts 5.2 and 5.3).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Literal

from trainer.checkpoints import unet_name
from trainer.errors import ModelFileError
from trainer.families import _flux_model as flux
from trainer.families.sdxl import LAYERS, kohya_name

__all__ = ["Format", "Kind", "from_kohya", "kind_of", "part_count", "to_kohya"]

Kind = Literal["sd1", "sd2", "sdxl", "flux"]
Format = Literal["kohya", "diffusers", "bfl"]

_WORDS = (
    *("down_blocks", "up_blocks", "mid_block", "transformer_blocks", "time_emb_proj", "conv_shortcut"),
    *("proj_in", "proj_out", "to_q", "to_k", "to_v", "to_out", "conv_in", "conv_out"),
    *("input_blocks", "output_blocks", "middle_block", "in_layers", "out_layers", "emb_layers"),
    *("skip_connection", "text_model", "self_attn", "q_proj", "k_proj", "v_proj", "out_proj"),
    *("time_embedding", "add_embedding", "linear_1", "linear_2", "wi_0", "wi_1", "text_projection"),
    *("double_blocks", "single_blocks", "img_mod", "img_attn", "img_mlp", "txt_mod", "txt_attn", "txt_mlp"),
    *("img_in", "time_in", "vector_in", "guidance_in", "txt_in", "in_layer", "out_layer"),
    *("single_transformer_blocks", "final_layer", "adaLN_modulation"),
)
_TOKEN = re.compile("|".join(sorted(_WORDS, key=len, reverse=True)) + "|[^_]+")

_WIDTHS: Mapping[int, Kind] = {768: "sd1", 1024: "sd2", 2048: "sdxl"}
"""Width of the text that a cross-attention's keys are made from."""

_BFL_PREFIXES = ("base_model.model.", "model.diffusion_model.", "diffusion_model.")


def dotted(underscored: str) -> str:
    """A path again of what Kohya wrote with underscores.

    >>> dotted("down_blocks_0_attentions_1_transformer_blocks_0_attn1_to_out_0")
    'down_blocks.0.attentions.1.transformer_blocks.0.attn1.to_out.0'
    """
    return ".".join(_TOKEN.findall(underscored))


def kind_of(stems: Iterable[str], widths: Mapping[str, int], metadata: Mapping[str, str]) -> Kind:
    """The model family that a LoRA file is for.

    Args:
        stems: Its layers, under whatever names.
        widths: Input width of each.
        metadata: Its entries; ss_base_model_version decides where it is there.

    Raises:
        ModelFileError: The names fit no family.
    """
    version = metadata.get("ss_base_model_version", "")
    for start, kind in (("sdxl", "sdxl"), ("flux", "flux"), ("sd_v2", "sd2"), ("sd_v1", "sd1")):
        if version.startswith(start):
            return kind  # type: ignore[return-value]
    names = list(stems)
    text = " ".join(names)
    if re.search(r"(double|single)_blocks[._]|(^| )transformer\.|single_transformer_blocks|lora_te3_", text):
        return "flux"
    if re.search(r"(input|output)_blocks[._]|middle_block[._]|lora_te2_|text_encoder_2\.", text):
        return "sdxl"
    for name in names:
        if re.search(r"attn2[._]to_[kv]$", name) and widths[name] in _WIDTHS:
            return _WIDTHS[widths[name]]
    # Only SDXL has attention in its first level of the way up, and none in the first of the way down.
    if re.search(r"up_blocks[._]0[._]attentions", text):
        return "sdxl"
    if re.search(r"(down|up)_blocks[._]|mid_block[._]|lora_te_|text_encoder\.", text):
        return "sd1"
    raise ModelFileError(
        f"these layers ({names[0]} ...) are of no model family that is known here: SD 1.x, SD 2.x, SDXL, FLUX.1"
    )


def _flux_paths() -> dict[str, tuple[str, int | None]]:
    """Diffusers' path inside a block -> path in the files, and which part of a fused layer it is."""
    found: dict[str, tuple[str, int | None]] = {}
    for ours, table in (("transformer_blocks", flux.DOUBLE), ("single_transformer_blocks", flux.SINGLE)):
        kind = "double_blocks" if table is flux.DOUBLE else "single_blocks"
        for old, new in table.items():
            parts = flux.PARTS[kind].get(old)
            if parts is None:
                found[f"{ours}.{new}"] = (f"{kind}.{old}", None)
            else:
                found |= {f"{ours}.{part}": (f"{kind}.{old}", index) for index, part in enumerate(parts)}
    return found


_FLUX = _flux_paths()
_FLUX_ENDS = {new: old for old, new in flux.ENDS.items()}


def to_kohya(stem: str, kind: Kind) -> tuple[str, int | None]:
    """Kohya's stem for a layer under any name, and which part of that layer it is (FLUX; else None).

    Raises:
        ModelFileError: A name that is not known.
    """
    if stem.startswith("lora_"):
        if kind == "sdxl" and re.match(r"lora_unet_(down|up)_blocks_|lora_unet_mid_block_", stem):
            return _unet(dotted(stem.removeprefix("lora_unet_")), kind), None
        return stem, None
    for prefix in _BFL_PREFIXES:
        stem = stem.removeprefix(prefix)
    prefix, _, path = stem.partition(".")
    if prefix == "text_encoder":
        path = path if path.startswith("text_model.") else f"text_model.{path}"
        return f"lora_te{'' if kind in ('sd1', 'sd2') else '1'}_{path.replace('.', '_')}", None
    if prefix == "text_encoder_2":
        if kind == "sdxl":
            path = path if path.startswith("text_model.") else f"text_model.{path}"
            return f"lora_te2_{path.replace('.', '_')}", None
        return f"lora_te3_{path.replace('.', '_')}", None
    if prefix == "unet":
        return _unet(path, kind), None
    if kind == "flux":
        if prefix in ("double_blocks", "single_blocks") or stem in flux.ENDS:
            return f"lora_unet_{stem.replace('.', '_')}", None
        path = path if prefix == "transformer" else stem
        if path in _FLUX_ENDS:
            return f"lora_unet_{_FLUX_ENDS[path].replace('.', '_')}", None
        block = re.fullmatch(r"((?:single_)?transformer_blocks)\.(\d+)\.(.+)", path)
        if block and (known := _FLUX.get(f"{block[1]}.{block[3]}")):
            start, _, inner = known[0].partition(".")
            return f"lora_unet_{start}_{block[2]}_{inner.replace('.', '_')}", known[1]
    raise ModelFileError(f"the layer {stem} is not known: the file is of another model family or program")


def _unet(path: str, kind: Kind) -> str:
    if kind != "sdxl":
        return f"lora_unet_{path.replace('.', '_')}"
    try:
        return f"lora_unet_{kohya_name(path)}"
    except (ValueError, KeyError) as error:
        raise ModelFileError(f"the layer unet.{path} is not one of SDXL's") from error


def part_count(stem: str) -> int:
    """Parts of a fused FLUX layer: q, k and v, and the MLP's first layer in a single block."""
    return 4 if stem.endswith("_linear1") else 3


def from_kohya(stem: str, kind: Kind, format: Format) -> tuple[str, ...]:
    """The layer's name in another format; several for a layer that diffusers has in parts.

    Raises:
        ModelFileError: The format has no name for it.
    """
    part, _, rest = stem.partition("_")[2].partition("_")
    path = dotted(rest)
    if part != "unet":
        if format == "bfl":
            raise ModelFileError(
                f"{stem} belongs to a text encoder, for which Black Forest Labs' files have no names: "
                "convert to diffusers' names instead"
            )
        second = part == "te2" or part == "te3"
        return (f"text_encoder{'_2' if second else ''}.{path}",)
    if kind == "flux":
        if format == "bfl":
            return (f"diffusion_model.{path}",)
        if path in flux.ENDS:
            return (f"transformer.{flux.ENDS[path]}",)
        start, index, inner = path.split(".", 2)
        ours = "transformer_blocks" if start == "double_blocks" else "single_transformer_blocks"
        table = flux.DOUBLE if start == "double_blocks" else flux.SINGLE
        parts = flux.PARTS.get(start, {}).get(inner) or ((table[inner],) if inner in table else ())
        if not parts:
            raise ModelFileError(f"the layer {stem} is not one of FLUX.1's")
        return tuple(f"transformer.{ours}.{index}.{name}" for name in parts)
    if format == "bfl":
        raise ModelFileError("Black Forest Labs' names are for FLUX.1 files: choose diffusers' names")
    if kind == "sdxl":
        path = unet_name(f"{path}.weight", LAYERS).removesuffix(".weight")
    return (f"unet.{path}",)
