"""A seeded toy FLUX.1 in the true file layouts: transformer, autoencoder, CLIP-L and T5, no download.

files = tiny_flux.files(tmp_path / "models")  # flux1-dev, ae, clip_l, t5xxl .safetensors
settings = tiny_flux.settings(tmp_path)  # a Kohya configuration for a toy run on them
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from tests import runs

__all__ = ["ae", "bfl", "clip_l", "files", "settings", "t5xxl"]

HEAD, HEADS = 32, 2
WIDTH = HEAD * HEADS
POOLED, TEXT = 32, 48


def _fill(shapes: Mapping[str, tuple[int, ...]], seed: int) -> dict[str, Tensor]:
    """Seeded weights: of unit gain in layers, near one in norms."""
    tensors = {}
    for index, (name, shape) in enumerate(shapes.items()):
        generator = torch.Generator().manual_seed(1000 * seed + index)
        values = torch.randn(shape, generator=generator)
        if name.endswith(".scale"):
            tensors[name] = 1 + 0.1 * values
        else:
            tensors[name] = values * (shape[1] ** -0.5 if len(shape) > 1 else 0.1)
    return tensors


def shapes(
    *, width: int, head: int, text: int, pooled: int, doubles: int, singles: int, guided: bool = True
) -> dict[str, tuple[int, ...]]:
    """Keys and shapes of a FLUX.1 file of Black Forest Labs with other sizes."""
    found: dict[str, tuple[int, ...]] = {}

    def linear(name: str, out: int, into: int) -> None:
        found[f"{name}.weight"] = (out, into)
        found[f"{name}.bias"] = (out,)

    linear("img_in", width, 64)
    for name, into in [("time_in", 256), ("vector_in", pooled)] + [("guidance_in", 256)] * guided:
        linear(f"{name}.in_layer", width, into)
        linear(f"{name}.out_layer", width, width)
    linear("txt_in", width, text)
    for index in range(doubles):
        for stream in ("img", "txt"):
            start = f"double_blocks.{index}.{stream}"
            linear(f"{start}_mod.lin", 6 * width, width)
            linear(f"{start}_attn.qkv", 3 * width, width)
            found[f"{start}_attn.norm.query_norm.scale"] = (head,)
            found[f"{start}_attn.norm.key_norm.scale"] = (head,)
            linear(f"{start}_attn.proj", width, width)
            linear(f"{start}_mlp.0", 4 * width, width)
            linear(f"{start}_mlp.2", width, 4 * width)
    for index in range(singles):
        start = f"single_blocks.{index}"
        linear(f"{start}.linear1", 7 * width, width)
        linear(f"{start}.linear2", width, 5 * width)
        found[f"{start}.norm.query_norm.scale"] = (head,)
        found[f"{start}.norm.key_norm.scale"] = (head,)
        linear(f"{start}.modulation.lin", 3 * width, width)
    linear("final_layer.linear", 64, width)
    linear("final_layer.adaLN_modulation.1", 2 * width, width)
    return found


def bfl(seed: int = 1, *, full: bool = False, **options: Any) -> dict[str, Tensor]:
    """The transformer's tensors; ``full`` has FLUX.1's widths, and two blocks of each kind like the toy."""
    sizes: dict[str, Any] = {"width": WIDTH, "head": HEAD, "text": TEXT, "pooled": POOLED}
    if full:
        sizes = {"width": 3072, "head": 128, "text": 4096, "pooled": 768}
    return _fill(shapes(**{**sizes, "doubles": 2, "singles": 2, **options}), seed)


def ae(seed: int = 2) -> dict[str, Tensor]:
    """The autoencoder's tensors: factor 8, 16 channels, no quant convolutions."""
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL

    from tests.tiny import _ldm_vae

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoencoderKL(
            block_out_channels=(32, 32, 32, 32),
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            layers_per_block=1,
            latent_channels=16,
            norm_num_groups=32,
            use_quant_conv=False,
            use_post_quant_conv=False,
        )
    tensors = {}
    for key, value in model.state_dict().items():
        name = _ldm_vae(key)
        conv = ".attn_1." in name and name.endswith("weight") and ".norm." not in name
        tensors[name] = value[:, :, None, None] if conv else value
    return tensors


def clip_l(seed: int = 3, *, width: int = POOLED) -> dict[str, Tensor]:
    """CLIP-L's tensors as in clip_l.safetensors, with the level that transformers 5 left out."""
    from transformers import CLIPTextConfig, CLIPTextModel

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        config = CLIPTextConfig(
            vocab_size=49408,
            hidden_size=width,
            intermediate_size=2 * width,
            num_hidden_layers=2,
            num_attention_heads=max(1, width // 64),
            hidden_act="quick_gelu",
            projection_dim=width,
        )
        model = CLIPTextModel(config)
        with torch.no_grad():
            torch.nn.init.normal_(model.embeddings.token_embedding.weight, 0, 0.5)
    return {f"text_model.{key}": value for key, value in model.state_dict().items()} | {
        "logit_scale": torch.tensor(4.6)
    }


def t5xxl(seed: int = 4, *, width: int = TEXT) -> dict[str, Tensor]:
    """T5's tensors as in t5xxl_fp16.safetensors."""
    from transformers import T5Config, T5EncoderModel

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        config = T5Config(
            vocab_size=32128,
            d_model=width,
            d_kv=16,
            num_heads=2,
            d_ff=64,
            num_layers=2,
            feed_forward_proj="gated-gelu",
        )
        model = T5EncoderModel(config)
    state = model.state_dict()
    return {key: value for key, value in state.items() if key != "encoder.embed_tokens.weight"}


def files(
    folder: Path, *, dtype: torch.dtype = torch.float32, full: bool = False, **options: Any
) -> dict[str, Path]:
    """Files in ``folder`` under the names of Kohya's fields; made once for a folder.

    Args:
        folder: Where.
        dtype: Of the weights.
        full: FLUX.1's widths, with few blocks and layers.
        options: For `bfl`.
    """
    names = {
        "pretrained_model_name_or_path": "flux1-dev",
        "ae": "ae",
        "clip_l": "clip_l",
        "t5xxl": "t5xxl_fp16",
    }
    found = {field: folder / f"{name}.safetensors" for field, name in names.items()}
    if not folder.exists():
        folder.mkdir(parents=True)
        makers: list[Callable[[], dict[str, Tensor]]] = [
            lambda: bfl(full=full, **options),
            ae,
            lambda: clip_l(width=768 if full else POOLED),
            lambda: t5xxl(width=4096 if full else TEXT),
        ]
        for path, make in zip(found.values(), makers, strict=True):
            tensors = {key: value.to(dtype).contiguous().clone() for key, value in make().items()}
            save_file(tensors, path)
    return found


def settings(folder: Path, **values: Any) -> dict[str, Any]:
    """A Kohya configuration for a toy FLUX run in ``folder``; models and pictures are made unless named."""
    paths = {name: str(path) for name, path in files(folder / "models").items()}
    return runs.settings(
        folder,
        **{
            **paths,
            "LoRA_type": "Flux1",
            "flux1_checkbox": True,
            "flux1_cache_text_encoder_outputs": True,
            "t5xxl_max_token_length": 24,
            "text_encoder_lr": 0,
            "model_prediction_type": "raw",
            "timestep_sampling": "sigmoid",
            "guidance_scale": 1.0,
            "cache_latents": True,
            **values,
        },
    )
