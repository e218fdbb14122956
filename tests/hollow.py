"""Model files of full size with nothing in them: keys and shapes are true, the weights are holes.

The file system keeps no block for a hole, so that a file of 24 GB takes a few kilobytes. For what
reads shapes only (the forecast); a model loaded from one is all zeros. `fill` puts weights into a
file that was made with fewer layers.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from tests import tiny, tiny_flux

__all__ = ["fill", "flux", "sd15", "sdxl", "write"]

DTYPES = {"F16": torch.float16, "BF16": torch.bfloat16}


def write(path: Path, shapes: Mapping[str, tuple[int, ...]], dtype: str = "F16") -> Path:
    """A safetensors file of 16-bit tensors."""
    header, place = {}, 0
    for key, shape in shapes.items():
        size = 2 * math.prod(shape)
        header[key] = {"dtype": dtype, "shape": list(shape), "data_offsets": [place, place + size]}
        place += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + place)
    return path


def fill(path: Path, seed: int = 0) -> Path:
    """Put seeded weights into a file of `write`: of unit gain in layers, near one in norms.

    All are cut from one pool of random numbers, which takes a second for each GB.
    """
    pool = torch.randn(1 << 20, generator=torch.Generator().manual_seed(seed))
    with path.open("r+b") as file:
        (size,) = struct.unpack("<Q", file.read(8))
        header = json.loads(file.read(size))
        for place, (key, entry) in enumerate(header.items()):
            values, shape = pool.roll(7919 * place), entry["shape"]
            if len(shape) > 1:
                values = values * math.prod(shape[1:]) ** -0.5
            else:
                values = 0.1 * values + (0 if key.endswith("bias") else 1)
            data = values.to(DTYPES[entry["dtype"]]).view(torch.uint8).numpy().tobytes()
            start, end = entry["data_offsets"]
            file.seek(8 + size + start)
            whole, rest = divmod(end - start, len(data))
            for _ in range(whole):
                file.write(data)
            file.write(data[:rest])
    return path


def sd15(folder: Path) -> dict[str, Path]:
    """A checkpoint of SD 1.5, by Kohya's field."""
    from tests.parity import make_sd15

    prefixes = {
        "unet": ("model.diffusion_model.", make_sd15.unet_to_ldm),
        "vae": ("first_stage_model.", make_sd15.vae_to_ldm),
        "text": ("cond_stage_model.transformer.", make_sd15.clip_to_ldm),
    }
    shapes = {}
    for part, name, shape in make_sd15._shapes(make_sd15.FULL):
        prefix, rename = prefixes[part]
        shapes[prefix + rename(name)] = tuple(shape)
    return {"pretrained_model_name_or_path": write(folder / "sd15.safetensors", shapes)}


def sdxl(
    folder: Path,
    *,
    depth: tuple[int, int, int] = (1, 2, 10),
    text_layers: tuple[int, int] = (12, 32),
    dtype: str = "F16",
) -> dict[str, Path]:
    """A checkpoint of SDXL, by Kohya's field; ``depth`` and ``text_layers`` as in `sdxl_full.models`."""
    from tests.families.sdxl_full import models

    unet, encoders = models(depth, text_layers)
    found = {"unet": unet, "text_encoder": encoders["te1"], "text_encoder_2": encoders["te2"]}
    tensors = tiny.sgm_layout(found | {"vae": _autoencoder(4)})
    shapes = {key: tuple(value.shape) for key, value in tensors.items()}
    return {"pretrained_model_name_or_path": write(folder / "sdxl.safetensors", shapes, dtype)}


def flux(
    folder: Path,
    *,
    doubles: int = 19,
    singles: int = 38,
    clip_layers: int = 12,
    t5_layers: int = 24,
    dtype: str = "F16",
) -> dict[str, Path]:
    """The four files of FLUX.1 dev, by Kohya's fields; with as many blocks and layers as are named."""
    from transformers import CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel

    with torch.device("meta"):
        clip = CLIPTextModel(
            CLIPTextConfig(
                hidden_size=768,
                intermediate_size=3072,
                num_hidden_layers=clip_layers,
                num_attention_heads=12,
            )
        )
        t5 = T5EncoderModel(
            T5Config(
                d_model=4096,
                d_ff=10240,
                d_kv=64,
                num_heads=64,
                num_layers=t5_layers,
                vocab_size=32128,
                feed_forward_proj="gated-gelu",
            )
        )
    sizes: dict[str, Any] = {"width": 3072, "head": 128, "text": 4096, "pooled": 768}
    shapes = {
        "pretrained_model_name_or_path": tiny_flux.shapes(**sizes, doubles=doubles, singles=singles),
        "ae": {
            tiny._ldm_vae(key): tuple(value.shape) for key, value in _autoencoder(16).state_dict().items()
        },
        "clip_l": {f"text_model.{key}": tuple(value.shape) for key, value in clip.state_dict().items()},
        "t5xxl": {key: tuple(value.shape) for key, value in t5.state_dict().items()},
    }
    return {
        field: write(folder / f"{name}.safetensors", shapes[field], dtype)
        for field, name in zip(shapes, ("flux1-dev", "ae", "clip_l", "t5xxl_fp16"), strict=True)
    }


def _autoencoder(channels: int) -> Any:
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL

    with torch.device("meta"):
        return AutoencoderKL(
            block_out_channels=(128, 256, 512, 512),
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            layers_per_block=2,
            latent_channels=channels,
            use_quant_conv=channels == 4,
            use_post_quant_conv=channels == 4,
        )
