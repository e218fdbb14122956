"""Seeded toy models in the true file layouts: small, random, made in a second, no download.

The UNet has SD 1.5's 192 (with conv 278) target layers at widths 32 to 96; the text encoder has three
layers of width 32 behind CLIP's real vocabulary; the VAE has factor 8. SDXL's has a second text encoder
of width 64 and all of SDXL's blocks, with one or two transformer layers each.

    folder = tiny.sd15_folder(tmp_path / "model")  # diffusers layout
    file = tiny.sd15_file(tmp_path / "model.safetensors")  # LDM single file, the same weights
    job = tiny.job(file, tmp_path, clip_skip=2)
"""

from __future__ import annotations

import functools
import gzip
import json
import re
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from trainer.config import KohyaConfig
from trainer.files import REPOSITORY
from trainer.job import Job

__all__ = [
    "job",
    "ldm_tensors",
    "models",
    "sd2_file",
    "sd2_folder",
    "sd15_ckpt",
    "sd15_file",
    "sd15_folder",
    "sdxl_ckpt",
    "sdxl_file",
    "sdxl_folder",
    "sdxl_models",
    "sdxl_tensors",
    "sgm_layout",
]

OPEN_CLIP = "conditioner.embedders.1.model."
BYTE_PAIRS = REPOSITORY / "assets" / "models" / "clip" / "bpe_simple_vocab_16e6.txt.gz"


def job(model: Path, folder: Path, **values: Any) -> Job:
    """A job on ``model`` with its folders under ``folder``; ``values`` are fields of KohyaConfig."""
    fields = {
        "pretrained_model_name_or_path": str(model),
        "train_data_dir": str(folder / "img"),
        "output_dir": str(folder / "out"),
        "output_name": "tiny",
        "mixed_precision": "no",
        "seed": 1,
    }
    return Job.from_config(KohyaConfig(**fields | values), base=folder)


@functools.cache
def models(version: int = 1, seed: int = 0) -> dict[str, Any]:
    """UNet, VAE and text encoder, float32, in eval mode. Shared: do not change them."""
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
    from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    width = 32 if version == 1 else 64
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        unet = UNet2DConditionModel(
            sample_size=8,
            block_out_channels=(32, 64, 96, 96),
            layers_per_block=2,
            cross_attention_dim=width,
            attention_head_dim=8 if version == 1 else [1, 1, 1, 1],
            use_linear_projection=version == 2,
        )
        vae = AutoencoderKL(
            block_out_channels=(32, 32, 32, 32),
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            layers_per_block=1,
            latent_channels=4,
            norm_num_groups=32,
        )
        text_encoder = CLIPTextModel(
            CLIPTextConfig(
                vocab_size=49408,
                hidden_size=width,
                intermediate_size=2 * width,
                num_hidden_layers=3,
                num_attention_heads=1,
                hidden_act="quick_gelu" if version == 1 else "gelu",
                projection_dim=width,
                bos_token_id=49406,
                eos_token_id=49407,
            )
        )
        # transformers' 0.02 would leave texts that hardly differ.
        with torch.no_grad():
            text_encoder.embeddings.token_embedding.weight.normal_(0, 0.5)
    found = {"unet": unet, "vae": vae, "text_encoder": text_encoder}
    for model in found.values():
        model.eval().requires_grad_(False)
    return found


def sd15_folder(path: Path, *, seed: int = 0) -> Path:
    """A diffusers folder with its own tokenizer; made once for a path."""
    return _folder(path, 1, seed)


def sd2_folder(path: Path, *, seed: int = 0) -> Path:
    """The same for SD 2.x."""
    return _folder(path, 2, seed)


def sd15_file(path: Path, *, seed: int = 0, dtype: torch.dtype = torch.float32) -> Path:
    """An LDM .safetensors file; made once for a path."""
    return _file(path, 1, seed, dtype)


def sd2_file(path: Path, *, seed: int = 0, dtype: torch.dtype = torch.float32) -> Path:
    """The same for SD 2.x, with OpenCLIP's names and its unused last layer."""
    return _file(path, 2, seed, dtype)


def sd15_ckpt(path: Path, *, seed: int = 0) -> Path:
    """An LDM .ckpt: a pickle with the tensors under "state_dict", and EMA keys beside them."""
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        tensors = ldm_tensors(1, seed)
        tensors["model_ema.decay"] = torch.tensor(0.9999)
        torch.save({"state_dict": tensors, "global_step": 1, "epoch": 0}, path)
    return path


@functools.cache
def sdxl_models(seed: int = 0) -> dict[str, Any]:
    """UNet, VAE and both text encoders of a toy SDXL, float32, in eval mode. Shared: do not change them."""
    from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        unet = UNet2DConditionModel(
            sample_size=8,
            block_out_channels=(32, 64, 64),
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            layers_per_block=2,
            transformer_layers_per_block=(1, 1, 2),
            cross_attention_dim=32 + 64,
            attention_head_dim=(1, 1, 1),
            use_linear_projection=True,
            addition_embed_type="text_time",
            addition_time_embed_dim=256,
            projection_class_embeddings_input_dim=64 + 6 * 256,
        )
        encoders = [
            kind(
                CLIPTextConfig(
                    vocab_size=49408,
                    hidden_size=width,
                    intermediate_size=2 * width,
                    num_hidden_layers=3,
                    num_attention_heads=1,
                    hidden_act=act,
                    projection_dim=64,
                    bos_token_id=49406,
                    eos_token_id=49407,
                    pad_token_id=pad,
                )
            )
            for kind, width, act, pad in (
                (CLIPTextModel, 32, "quick_gelu", 49407),
                (CLIPTextModelWithProjection, 64, "gelu", 0),
            )
        ]
        with torch.no_grad():
            for encoder in encoders:
                encoder.get_input_embeddings().weight.normal_(0, 0.5)
            encoders[1].text_projection.weight.normal_(0, 0.2)
    found = {"unet": unet, "vae": models(1, seed)["vae"]}
    found |= {"text_encoder": encoders[0], "text_encoder_2": encoders[1]}
    for model in found.values():
        model.eval().requires_grad_(False)
    return found


def sdxl_folder(path: Path, *, seed: int = 0) -> Path:
    """A diffusers folder of the toy SDXL with both tokenizers; made once for a path."""
    if path.exists():
        return path
    for name, model in sdxl_models(seed).items():
        model.save_pretrained(path / name)
    scheduler = {"_class_name": "EulerDiscreteScheduler", "beta_start": 0.00085, "beta_end": 0.012}
    scheduler |= {"beta_schedule": "scaled_linear", "num_train_timesteps": 1000, "steps_offset": 1}
    _json(path / "scheduler" / "scheduler_config.json", scheduler)
    tokenizer_files(path / "tokenizer")
    tokenizer_files(path / "tokenizer_2", pad="!")
    classes = {
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "text_encoder_2": ["transformers", "CLIPTextModelWithProjection"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "tokenizer_2": ["transformers", "CLIPTokenizer"],
        "scheduler": ["diffusers", "EulerDiscreteScheduler"],
        "image_encoder": [None, None],
        "feature_extractor": [None, None],
    }
    _json(path / "model_index.json", {"_class_name": "StableDiffusionXLPipeline", **classes})
    return path


def sdxl_file(path: Path, *, seed: int = 0, dtype: torch.dtype = torch.float32) -> Path:
    """An SGM .safetensors file of the same weights; made once for a path."""
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        tensors = sdxl_tensors(seed)
        save_file(
            {key: value.to(dtype) if value.is_floating_point() else value for key, value in tensors.items()},
            path,
        )
    return path


def sdxl_ckpt(path: Path, *, seed: int = 0) -> Path:
    """The same as a pickle with the tensors under "state_dict"."""
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.save({"state_dict": sdxl_tensors(seed), "global_step": 1}, path)
    return path


def sdxl_tensors(seed: int = 0) -> dict[str, Tensor]:
    """The weights under the keys of Stability's generative-models."""
    tensors = sgm_layout(sdxl_models(seed))
    tensors["conditioner.embedders.0.transformer.text_model.embeddings.position_ids"] = torch.arange(
        77
    ).unsqueeze(0)
    tensors[f"{OPEN_CLIP}logit_scale"] = torch.tensor(4.6)
    return {key: value.contiguous().clone() for key, value in tensors.items()}


def sgm_layout(found: dict[str, Any]) -> dict[str, Tensor]:
    """Tensors of SDXL's models, by diffusers' folder names, under the keys of a single file."""
    tensors = {
        f"model.diffusion_model.{_ldm_unet(key, blocks=3)}": value
        for key, value in found["unet"].state_dict().items()
    }
    for key, value in found["vae"].state_dict().items():
        name = _ldm_vae(key)
        is_conv = re.search(r"attn_1\.(q|k|v|proj_out)\.weight", name)
        tensors[f"first_stage_model.{name}"] = value[:, :, None, None] if is_conv else value
    one = "conditioner.embedders.0.transformer.text_model."
    tensors |= {one + key: value for key, value in found["text_encoder"].state_dict().items()}
    state = found["text_encoder_2"].state_dict()
    tensors |= _open_clip_layers(
        {key.removeprefix("text_model."): value for key, value in state.items()}, OPEN_CLIP
    )
    tensors[f"{OPEN_CLIP}text_projection"] = state["text_projection.weight"].T
    return tensors


def _folder(path: Path, version: int, seed: int) -> Path:
    if path.exists():
        return path
    for name, model in models(version, seed).items():
        model.save_pretrained(path / name)
    scheduler = {"_class_name": "PNDMScheduler", "beta_start": 0.00085, "beta_end": 0.012}
    scheduler |= {"beta_schedule": "scaled_linear", "num_train_timesteps": 1000, "skip_prk_steps": True}
    _json(
        path / "scheduler" / "scheduler_config.json",
        scheduler | {"steps_offset": 1, "set_alpha_to_one": False},
    )
    tokenizer_files(path / "tokenizer", pad="<|endoftext|>" if version == 1 else "!")
    classes = {
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "scheduler": ["diffusers", "PNDMScheduler"],
        "safety_checker": [None, None],
        "feature_extractor": [None, None],
    }
    _json(path / "model_index.json", {"_class_name": "StableDiffusionPipeline", **classes})
    return path


def _json(path: Path, content: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content), encoding="utf-8")


def tokenizer_files(folder: Path, *, pad: str = "<|endoftext|>") -> Path:
    """vocab.json, merges.txt and tokenizer_config.json, as the SD 1.5 repository has them."""
    lines = gzip.decompress(BYTE_PAIRS.read_bytes()).decode("utf-8").split("\n")[1:48895]
    codes = [*range(33, 127), *range(161, 173), *range(174, 256)]
    codes += [256 + n for n in range(256 - len(codes))]
    words = [chr(code) for code in codes]
    words += [word + "</w>" for word in words] + [line.replace(" ", "") for line in lines]
    words += ["<|startoftext|>", "<|endoftext|>"]
    _json(folder / "vocab.json", {word: index for index, word in enumerate(words)})
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *lines]) + "\n", encoding="utf-8")
    config = {"tokenizer_class": "CLIPTokenizer", "model_max_length": 77, "pad_token": pad}
    config |= {"bos_token": "<|startoftext|>", "eos_token": "<|endoftext|>", "unk_token": "<|endoftext|>"}
    _json(folder / "tokenizer_config.json", config)
    return folder


def _file(path: Path, version: int, seed: int, dtype: torch.dtype) -> Path:
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        tensors = ldm_tensors(version, seed)
        save_file(
            {key: value.to(dtype) if value.is_floating_point() else value for key, value in tensors.items()},
            path,
        )
    return path


def ldm_tensors(version: int = 1, seed: int = 0) -> dict[str, Tensor]:
    """The models' weights under the keys of CompVis' and Stability's checkpoints."""
    found = models(version, seed)
    tensors = {
        f"model.diffusion_model.{_ldm_unet(key)}": value for key, value in found["unet"].state_dict().items()
    }
    for key, value in found["vae"].state_dict().items():
        name = _ldm_vae(key)
        is_conv = re.search(r"attn_1\.(q|k|v|proj_out)\.weight", name)
        tensors[f"first_stage_model.{name}"] = value[:, :, None, None] if is_conv else value
    tensors |= (_clip if version == 1 else _open_clip)(found["text_encoder"].state_dict())
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    tensors |= {"betas": betas.float(), "alphas_cumprod": (1 - betas).cumprod(0).float()}
    return {key: value.contiguous().clone() for key, value in tensors.items()}


def _clip(state: dict[str, Tensor]) -> dict[str, Tensor]:
    start = "cond_stage_model.transformer.text_model."
    tensors = {start + key: value for key, value in state.items()}
    return tensors | {f"{start}embeddings.position_ids": torch.arange(77).unsqueeze(0)}


def _open_clip(state: dict[str, Tensor]) -> dict[str, Tensor]:
    start = "cond_stage_model.model."
    tensors = {f"{start}text_projection": torch.eye(64), f"{start}logit_scale": torch.tensor(4.6)}
    # The last layer is in the files although nothing uses it.
    last = {
        key.replace("layers.2.", "layers.3."): value for key, value in state.items() if ".layers.2." in key
    }
    return tensors | _open_clip_layers(state | last, start)


def _open_clip_layers(state: dict[str, Tensor], start: str) -> dict[str, Tensor]:
    tensors = {
        f"{start}positional_embedding": state["embeddings.position_embedding.weight"],
        f"{start}token_embedding.weight": state["embeddings.token_embedding.weight"],
        f"{start}ln_final.weight": state["final_layer_norm.weight"],
        f"{start}ln_final.bias": state["final_layer_norm.bias"],
    }
    layers = len({key.split(".")[2] for key in state if key.startswith("encoder.layers.")})
    for layer in range(layers):
        old, new = f"encoder.layers.{layer}", f"{start}transformer.resblocks.{layer}"
        for end in ("weight", "bias"):
            rows = [state[f"{old}.self_attn.{part}_proj.{end}"] for part in "qkv"]
            tensors[f"{new}.attn.in_proj_{end}"] = torch.cat(rows)
            tensors[f"{new}.attn.out_proj.{end}"] = state[f"{old}.self_attn.out_proj.{end}"]
            tensors[f"{new}.ln_1.{end}"] = state[f"{old}.layer_norm1.{end}"]
            tensors[f"{new}.ln_2.{end}"] = state[f"{old}.layer_norm2.{end}"]
            tensors[f"{new}.mlp.c_fc.{end}"] = state[f"{old}.mlp.fc1.{end}"]
            tensors[f"{new}.mlp.c_proj.{end}"] = state[f"{old}.mlp.fc2.{end}"]
    return tensors


def _ldm_unet(key: str, blocks: int = 4) -> str:
    """Names of four blocks with two layers each, as in SD 1.x and 2.x, or of SDXL's three."""
    for old, new in {
        "time_embedding.linear_1": "time_embed.0",
        "time_embedding.linear_2": "time_embed.2",
        "conv_in": "input_blocks.0.0",
        "conv_norm_out": "out.0",
        "conv_out": "out.2",
        "mid_block.resnets.0": "middle_block.0",
        "mid_block.attentions.0": "middle_block.1",
        "mid_block.resnets.1": "middle_block.2",
        "add_embedding.linear_1": "label_emb.0.0",
        "add_embedding.linear_2": "label_emb.0.2",
    }.items():
        key = re.sub(rf"^{re.escape(old)}\.", f"{new}.", key)
    for i in range(blocks):
        key = key.replace(f"down_blocks.{i}.downsamplers.0.conv.", f"input_blocks.{3 * i + 3}.0.op.")
        # SD's first up block has no attention, so its upsampler comes second, elsewhere third.
        place = 1 if i == 0 and blocks == 4 else 2
        key = key.replace(f"up_blocks.{i}.upsamplers.0.", f"output_blocks.{3 * i + 2}.{place}.")
        for j in range(3):
            key = key.replace(f"down_blocks.{i}.resnets.{j}.", f"input_blocks.{3 * i + j + 1}.0.")
            key = key.replace(f"down_blocks.{i}.attentions.{j}.", f"input_blocks.{3 * i + j + 1}.1.")
            key = key.replace(f"up_blocks.{i}.resnets.{j}.", f"output_blocks.{3 * i + j}.0.")
            key = key.replace(f"up_blocks.{i}.attentions.{j}.", f"output_blocks.{3 * i + j}.1.")
    if "transformer_blocks" not in key and ".1.norm." not in key and ".1.proj_" not in key:
        for old, new in {
            ".norm1.": ".in_layers.0.",
            ".conv1.": ".in_layers.2.",
            ".time_emb_proj.": ".emb_layers.1.",
            ".norm2.": ".out_layers.0.",
            ".conv2.": ".out_layers.3.",
            ".conv_shortcut.": ".skip_connection.",
        }.items():
            key = key.replace(old, new)
    return key


def _ldm_vae(key: str) -> str:
    for i in range(4):
        key = key.replace(f"encoder.down_blocks.{i}.resnets.", f"encoder.down.{i}.block.")
        key = key.replace(f"encoder.down_blocks.{i}.downsamplers.0.", f"encoder.down.{i}.downsample.")
        key = key.replace(f"decoder.up_blocks.{i}.resnets.", f"decoder.up.{3 - i}.block.")
        key = key.replace(f"decoder.up_blocks.{i}.upsamplers.0.", f"decoder.up.{3 - i}.upsample.")
    for old, new in {
        "mid_block.resnets.0.": "mid.block_1.",
        "mid_block.resnets.1.": "mid.block_2.",
        "mid_block.attentions.0.group_norm.": "mid.attn_1.norm.",
        "mid_block.attentions.0.to_q.": "mid.attn_1.q.",
        "mid_block.attentions.0.to_k.": "mid.attn_1.k.",
        "mid_block.attentions.0.to_v.": "mid.attn_1.v.",
        "mid_block.attentions.0.to_out.0.": "mid.attn_1.proj_out.",
        "conv_norm_out.": "norm_out.",
        "conv_shortcut.": "nin_shortcut.",
    }.items():
        key = key.replace(old, new)
    return key
