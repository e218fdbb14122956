"""FLUX.1's transformer: diffusers' model with every layer as wide as in Black Forest Labs' files.

diffusers splits two layers that the files, and every LoRA made by sd-scripts, hold as one: the
attention's qkv, and linear1 of the single blocks (qkv and the MLP's first layer). Here they stay one
layer, so that a LoRA has one pair of weights for each, as in sd-scripts, and a file's tensors are
used as they are.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from trainer.checkpoints import Renamed, TensorFile, under
from trainer.errors import ModelFileError

if TYPE_CHECKING:
    from pathlib import Path

__all__ = [
    "DOUBLE",
    "SINGLE",
    "Joined",
    "as_bfl",
    "bfl_config",
    "bfl_names",
    "build",
    "diffusers_parts",
    "swap_halves",
    "t5_config",
    "t5_names",
    "target_names",
]

# Modules inside a block: name in the files -> name here. The order is that of sd-scripts' module tree,
# which is the order of a LoRA's tensors.
DOUBLE = {
    "img_mod.lin": "norm1.linear",
    "img_attn.qkv": "attn.to_qkv",
    "img_attn.proj": "attn.to_out.0",
    "img_mlp.0": "ff.net.0.proj",
    "img_mlp.2": "ff.net.2",
    "txt_mod.lin": "norm1_context.linear",
    "txt_attn.qkv": "attn.to_added_qkv",
    "txt_attn.proj": "attn.to_add_out",
    "txt_mlp.0": "ff_context.net.0.proj",
    "txt_mlp.2": "ff_context.net.2",
}
SINGLE = {"linear1": "linear1", "linear2": "proj_out", "modulation.lin": "norm.linear"}
DOUBLE_NORMS = {
    "img_attn.norm.query_norm": "attn.norm_q",
    "img_attn.norm.key_norm": "attn.norm_k",
    "txt_attn.norm.query_norm": "attn.norm_added_q",
    "txt_attn.norm.key_norm": "attn.norm_added_k",
}
SINGLE_NORMS = {"norm.query_norm": "attn.norm_q", "norm.key_norm": "attn.norm_k"}
ENDS = {
    "img_in": "x_embedder",
    "time_in.in_layer": "time_text_embed.timestep_embedder.linear_1",
    "time_in.out_layer": "time_text_embed.timestep_embedder.linear_2",
    "vector_in.in_layer": "time_text_embed.text_embedder.linear_1",
    "vector_in.out_layer": "time_text_embed.text_embedder.linear_2",
    "guidance_in.in_layer": "time_text_embed.guidance_embedder.linear_1",
    "guidance_in.out_layer": "time_text_embed.guidance_embedder.linear_2",
    "txt_in": "context_embedder",
}
LAST = {"final_layer.linear": "proj_out", "final_layer.adaLN_modulation.1": "norm_out.linear"}
SWAPPED = "norm_out.linear"
"""The files have shift above scale, diffusers scale above shift."""

# Parts that diffusers' files hold apart, in the order of their rows.
DOUBLE_PARTS = {
    "img_attn.qkv": ("attn.to_q", "attn.to_k", "attn.to_v"),
    "txt_attn.qkv": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
}
SINGLE_PARTS = {"linear1": ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp")}
PARTS: Mapping[str, Mapping[str, tuple[str, ...]]] = {
    "double_blocks": DOUBLE_PARTS,
    "single_blocks": SINGLE_PARTS,
}


def _modules(doubles: int, singles: int) -> Iterator[tuple[str, str]]:
    """Every module with weights: name in the files, name here."""
    yield from ENDS.items()
    for start, ours, count, tables in (
        ("double_blocks", "transformer_blocks", doubles, (DOUBLE, DOUBLE_NORMS)),
        ("single_blocks", "single_transformer_blocks", singles, (SINGLE, SINGLE_NORMS)),
    ):
        for index in range(count):
            for table in tables:
                for old, new in table.items():
                    yield f"{start}.{index}.{old}", f"{ours}.{index}.{new}"
    yield from LAST.items()


def target_names(doubles: int, singles: int) -> list[tuple[str, str]]:
    """Layers that a LoRA may change, in sd-scripts' order: name in the files, name here.

    Blocks first, then the input layers, as networks/lora_flux.py makes them.
    """
    blocks = [
        (f"{start}.{index}.{old}", f"{ours}.{index}.{new}")
        for start, ours, count, table in (
            ("double_blocks", "transformer_blocks", doubles, DOUBLE),
            ("single_blocks", "single_transformer_blocks", singles, SINGLE),
        )
        for index in range(count)
        for old, new in table.items()
    ]
    return blocks + list(ENDS.items())


def diffusers_parts(old: str, new: str, module: nn.Linear) -> tuple[tuple[str, int], ...]:
    """Paths and rows of the layers that diffusers has in place of a fused one; empty for others.

    Args:
        old: Name in the files.
        new: Name here.
        module: The layer.
    """
    kind, _, rest = old.partition(".")
    index, _, inner = rest.partition(".")
    names = PARTS.get(kind, {}).get(inner, ())
    width = module.in_features
    rows = [width] * 3 + [module.out_features - 3 * width] * (len(names) - 3)
    start = f"{new.partition('.')[0]}.{index}"
    return tuple((f"{start}.{name}", count) for name, count in zip(names, rows, strict=False))


# --- the model ------------------------------------------------------------------------------------


class FusedSingleBlock(nn.Module):
    """diffusers' FluxSingleTransformerBlock with one layer in front, linear1."""

    def __init__(self, block: Any) -> None:
        super().__init__()
        dim = block.attn.inner_dim
        self.widths = [3 * dim, block.mlp_hidden_dim]
        self.norm = block.norm
        self.linear1 = nn.Linear(dim, sum(self.widths))
        self.act_mlp = block.act_mlp
        self.proj_out = block.proj_out
        self.attn = block.attn
        _drop(self.attn, "to_q", "to_k", "to_v")
        # The attention gets q, k and v ready made, and cuts them apart.
        self.attn.to_qkv = nn.Identity()
        self.attn.fused_projections = True

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        temb: Tensor,
        image_rotary_emb: tuple[Tensor, Tensor] | None = None,
        joint_attention_kwargs: dict[str, Any] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Text and picture tokens, BTD; arguments and result as of diffusers' block."""
        texts = encoder_hidden_states.shape[1]
        tokens = torch.cat([encoder_hidden_states, hidden_states], dim=1)
        normed, gate = self.norm(tokens, emb=temb)
        qkv, mlp = self.linear1(normed).split(self.widths, dim=-1)
        attended = self.attn(
            hidden_states=qkv, image_rotary_emb=image_rotary_emb, **(joint_attention_kwargs or {})
        )
        tokens = tokens + gate.unsqueeze(1) * self.proj_out(torch.cat([attended, self.act_mlp(mlp)], dim=2))
        if tokens.dtype == torch.float16:
            tokens = tokens.clip(-65504, 65504)
        return tokens[:, :texts], tokens[:, texts:]


def _drop(module: nn.Module, *names: str) -> None:
    for name in names:
        delattr(module, name)


def build(config: Mapping[str, Any]) -> Any:
    """The transformer on the meta device, its split layers made one.

    Args:
        config: Of FluxTransformer2DModel.
    """
    from trainer.libraries import FluxTransformer2DModel

    with torch.device("meta"):
        model: Any = FluxTransformer2DModel.from_config(dict(config))
        for block in model.transformer_blocks:
            attention, dim = block.attn, block.attn.inner_dim
            attention.to_qkv = nn.Linear(dim, 3 * dim)
            attention.to_added_qkv = nn.Linear(dim, 3 * dim)
            _drop(attention, "to_q", "to_k", "to_v", "add_q_proj", "add_k_proj", "add_v_proj")
            attention.fused_projections = True
        model.single_transformer_blocks = nn.ModuleList(
            [FusedSingleBlock(block) for block in model.single_transformer_blocks]
        )
    model._repeated_blocks = ["FluxTransformerBlock", "FusedSingleBlock"]
    return model


def swap_halves(model: Any) -> None:
    """Bring the last modulation from the files' row order (shift, scale) to diffusers' (scale, shift)."""
    layer = model.get_submodule(SWAPPED)
    for name, value in list(layer.named_parameters()):
        swapped = torch.cat(value.detach().chunk(2)[::-1])
        setattr(layer, name, nn.Parameter(swapped, requires_grad=False))


# --- files ----------------------------------------------------------------------------------------


def bfl_config(shapes: Mapping[str, tuple[int, ...]], base: Mapping[str, Any]) -> dict[str, Any]:
    """Configuration of FluxTransformer2DModel from the shapes of a file in the BFL layout.

    Args:
        shapes: Of all tensors, without a prefix.
        base: What shapes cannot tell.

    Raises:
        ModelFileError: The file holds no FLUX transformer.
    """

    def count(start: str) -> int:
        return len({key.split(".")[1] for key in shapes if key.startswith(f"{start}.")})

    try:
        width = shapes["img_in.weight"][0]
        head = shapes["double_blocks.0.img_attn.norm.query_norm.scale"][0]
        return dict(base) | {
            "in_channels": shapes["img_in.weight"][1],
            "out_channels": shapes["final_layer.linear.weight"][0],
            "num_layers": count("double_blocks"),
            "num_single_layers": count("single_blocks"),
            "attention_head_dim": head,
            "num_attention_heads": width // head,
            "joint_attention_dim": shapes["txt_in.weight"][1],
            "pooled_projection_dim": shapes["vector_in.in_layer.weight"][1],
            "guidance_embeds": "guidance_in.in_layer.weight" in shapes,
            "axes_dims_rope": _axes(head, base["axes_dims_rope"]),
        }
    except KeyError as error:
        raise ModelFileError(f"it is no FLUX.1 transformer, or incomplete: no tensor {error}") from error


def _axes(head: int, usual: Sequence[int]) -> list[int]:
    """Rotary widths of a head: those of FLUX.1, or the same shares (1 : 3.5 : 3.5) of a narrower head."""
    if sum(usual) == head:
        return list(usual)
    first = head // 8 // 2 * 2
    return [first, (head - first) // 2, (head - first) // 2]


def bfl_names(shapes: Mapping[str, tuple[int, ...]], prefix: str) -> Renamed:
    """Keys under ``prefix`` -> names in the model of `build`."""
    inner = under(shapes, prefix)
    blocks = [
        1 + max((int(key.split(".")[1]) for key in inner if key.startswith(f"{start}.")), default=-1)
        for start in ("double_blocks", "single_blocks")
    ]
    names: dict[str, tuple[str, ...]] = {}
    for old, new in _modules(*blocks):
        for end, ours in (("weight", "weight"), ("bias", "bias"), ("scale", "weight")):
            if f"{old}.{end}" in inner:
                names[f"{prefix}{old}.{end}"] = (f"{new}.{ours}",)
    return names


class Joined(TensorFile):
    """A diffusers file seen in the BFL layout: parts of one layer are joined as they are read."""

    def __init__(self, file: TensorFile, parts: Mapping[str, tuple[str, ...]]) -> None:
        self.path = file.path
        self.scaled = file.scaled
        self._file = file
        self._parts = parts
        self.shapes = {
            key: (sum(file.shapes[part][0] for part in found), *file.shapes[found[0]][1:])
            for key, found in parts.items()
        }

    def stream(self, keys: Iterable[str]) -> Iterator[tuple[str, Tensor]]:
        wanted = [key for key in self._parts if key in set(keys)]
        place = {part: key for key in wanted for part in self._parts[key]}
        waiting: dict[str, dict[str, Tensor]] = {}
        for part, tensor in self._file.stream(place):
            key = place[part]
            found = waiting.setdefault(key, {})
            found[part] = tensor
            if len(found) == len(self._parts[key]):
                del waiting[key]
                yield key, torch.cat([found[each] for each in self._parts[key]]) if len(found) > 1 else tensor


def as_bfl(file: TensorFile) -> TensorFile:
    """A file of diffusers' FluxTransformer2DModel, seen in the BFL layout (except for `swap_halves`).

    Raises:
        ModelFileError: Parts of a layer are missing.
    """
    doubles, singles = (
        1 + max((int(key.split(".")[1]) for key in file.shapes if key.startswith(f"{start}.")), default=-1)
        for start in ("transformer_blocks", "single_transformer_blocks")
    )
    parts: dict[str, tuple[str, ...]] = {}
    for old, new in _modules(doubles, singles):
        kind, _, rest = old.partition(".")
        index, _, inner = rest.partition(".")
        table = PARTS.get(kind, {})
        start = f"{'single_' if kind == 'single_blocks' else ''}transformer_blocks.{index}."
        theirs = [start + part for part in table[inner]] if inner in table else [new]
        for end in ("weight", "bias"):
            keys = tuple(f"{name}.{end}" for name in theirs)
            if all(key in file.shapes for key in keys):
                norm = old.endswith("_norm")
                parts[f"{old}.{'scale' if norm else end}"] = keys
            elif any(key in file.shapes for key in keys):
                raise ModelFileError(f"{file.path} is incomplete: it lacks a part of {', '.join(keys)}")
    return Joined(file, parts)


# --- T5 -------------------------------------------------------------------------------------------


def t5_names(keys: Iterable[str]) -> Renamed:
    """Keys of a T5 encoder's file -> names in transformers' T5Stack; a decoder is left out."""
    names: dict[str, tuple[str, ...]] = {}
    found = set(keys)
    for key in found:
        if key.startswith("encoder.") and key != "encoder.embed_tokens.weight":
            names[key] = (key.removeprefix("encoder."),)
    embedding = "shared.weight" if "shared.weight" in found else "encoder.embed_tokens.weight"
    if embedding in found:
        names[embedding] = ("embed_tokens.weight",)
    return names


def t5_config(
    shapes: Mapping[str, tuple[int, ...]], base: Mapping[str, Any], path: Path | None = None
) -> dict[str, Any]:
    """T5Config values from the shapes of a file.

    Raises:
        ModelFileError: The file holds no T5 encoder.
    """
    names = {new: shapes[key] for key, (new,) in t5_names(shapes).items()}
    try:
        vocab, width = names["embed_tokens.weight"]
        inner = names["block.0.layer.0.SelfAttention.q.weight"][0]
        buckets, heads = names["block.0.layer.0.SelfAttention.relative_attention_bias.weight"]
        layers = 1 + max(int(name.split(".")[1]) for name in names if name.startswith("block."))
        return dict(base) | {
            "vocab_size": vocab,
            "d_model": width,
            "d_kv": inner // heads,
            "num_heads": heads,
            "d_ff": names["block.0.layer.1.DenseReluDense.wi_0.weight"][0],
            "num_layers": layers,
            "num_decoder_layers": layers,
            "relative_attention_num_buckets": buckets,
        }
    except KeyError as error:
        raise ModelFileError(
            f"{path or 'the file'} is no T5 v1.1 encoder (no tensor {error}): give t5xxl_fp16.safetensors or "
            "t5xxl_fp8_e4m3fn.safetensors in T5-XXL Path"
        ) from error
