"""Trains the demo's base model from nothing: a VAE, then text encoder and UNet together.

    python -m assets.demo.train_base --work SCRATCH_FOLDER

Every stage continues where it stopped; all draws come from the seed and the step's number, so an interrupted
run sees the same data as an unbroken one. The base never sees the subject's traits (`draw.random_portrait`).

Letters in tensor names: B batch, C channels, H height, W width, L tokens.
"""

import argparse
import copy
import json
import math
import os
import random
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DDPMScheduler,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from diffusers.models.attention_processor import AttnProcessor
from diffusers.models.resnet import ResnetBlock2D
from PIL import Image, ImageDraw
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from assets.demo import draw, tokens

SEED: Final = 20
SD_SCALE: Final = 0.18215  # SD 1.5, vae/config.json: scaling_factor
PICTURES: Final = 8192
EMA_EVERY: Final = 4
SAVE_EVERY_S: Final = 120.0
FACE_FROM_STEP: Final = 3800
"""From this step of the UNet on, the face counts more: by then all else follows the prompt, and which way the face
looks changes so few latents that it would be learnt last."""
HERE: Final = Path(__file__).parent


def make_vae() -> AutoencoderKL:
    """SD's autoencoder, factor 8 and 4 channels, narrow."""
    return AutoencoderKL(
        block_out_channels=(16, 32, 64, 128),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=1,  # More groups would take each picture's own colours away.
        sample_size=draw.SIZE_PX,
        scaling_factor=SD_SCALE,
    )


def make_unet() -> UNet2DConditionModel:
    """SD's UNet with three levels; the lower two look at the text."""
    return UNet2DConditionModel(
        sample_size=draw.SIZE_PX // 8,
        block_out_channels=(96, 128, 176),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        layers_per_block=1,
        norm_num_groups=16,
        cross_attention_dim=192,
        attention_head_dim=2,  # diffusers reads it as the number of heads here, as in SD 1.5
    )


def make_text_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    """CLIP's text model, narrow, for the demo's own tokens."""
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=192,
            intermediate_size=768,
            num_hidden_layers=3,
            num_attention_heads=3,
            max_position_embeddings=tokens.MAX_TOKENS,
            projection_dim=192,
            hidden_act="quick_gelu",
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def make_tokenizer() -> CLIPTokenizer:
    """The tokenizer of `assets.demo.tokens`."""
    vocabulary, merges = tokens.vocabulary()
    return CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=tokens.MAX_TOKENS)


def to_tensor(pictures: Iterable[Image.Image]) -> Tensor:
    """RGB pictures as BCHW in [-1, 1]."""
    array = np.stack([np.asarray(picture, dtype=np.float32) for picture in pictures])
    return torch.from_numpy(array).permute(0, 3, 1, 2) / 127.5 - 1


def _confetti(picture: Image.Image, rng: random.Random) -> Image.Image:
    """Scatters coloured ovals and lines, and swaps colour channels: an autoencoder should know any shape."""
    if rng.random() < 0.15:
        channels = list(picture.split())
        rng.shuffle(channels)
        picture = Image.merge("RGB", channels)
    if rng.random() < 0.3:
        pen = ImageDraw.Draw(picture)
        for _ in range(rng.randint(1, 5)):
            colour = (rng.randrange(256), rng.randrange(256), rng.randrange(256))
            x, y, a, b = rng.uniform(0, 128), rng.uniform(0, 128), rng.uniform(2, 16), rng.uniform(2, 16)
            if rng.random() < 0.6:
                pen.ellipse((x - a, y - b, x + a, y + b), fill=colour)
            else:
                end = (x + rng.uniform(-60, 60), y + rng.uniform(-60, 60))
                pen.line([(x, y), end], fill=colour, width=rng.randint(1, 4))
    return picture


def _face_weight() -> Tensor:
    """1 HW weight: the face, where people look first, counts 2.5 times."""
    weight_HW = torch.ones(1, draw.SIZE_PX, draw.SIZE_PX)
    weight_HW[:, 44:86, 36:92] = 2.5
    normed_HW: Tensor = weight_HW / weight_HW.mean()
    return normed_HW


def _picture_loss(out_BCHW: Tensor, pictures_BCHW: Tensor, weight_HW: Tensor) -> Tensor:
    error_BCHW = out_BCHW.float() - pictures_BCHW
    loss: Tensor = (error_BCHW.abs() * weight_HW).mean()
    loss = loss + 0.5 * (error_BCHW.diff(dim=2).abs().mean() + error_BCHW.diff(dim=3).abs().mean())
    loss = loss + 0.5 * F.avg_pool2d(error_BCHW, 4).abs().mean()
    return loss


def _vae_loss(vae: AutoencoderKL, pictures_BCHW: Tensor, weight_HW: Tensor, kl_weight: float) -> Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        posterior = vae.encode(pictures_BCHW).latent_dist
        out_BCHW = vae.decode(posterior.sample()).sample
    loss = _picture_loss(out_BCHW, pictures_BCHW, weight_HW)
    mean, logvar = posterior.mean.float(), posterior.logvar.float()
    kl = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).mean()
    total: Tensor = loss + kl_weight * kl
    return total


class Muon(torch.optim.Optimizer):
    """Momentum whose update is made orthogonal (Jordan et al. 2024, kellerjordan.github.io/posts/muon).

    For weights of two or more dimensions; a convolution counts as the matrix of its output channels. It needs far
    fewer steps than AdamW here, and steps are what a CPU is short of.
    """

    def __init__(self, params: list[Tensor], lr: float, momentum: float = 0.95) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Updates all parameters once; a closure is not supported."""
        for group in self.param_groups:
            for param in group["params"]:
                state = self.state[param]
                if "average" not in state:
                    state["average"] = torch.zeros_like(param)
                average = state["average"]
                average.lerp_(param.grad, 1 - group["momentum"])
                update = param.grad.lerp(average, group["momentum"]).flatten(1)  # Nesterov's
                rows, columns = update.shape
                change: Tensor = _orthogonal(update).reshape(param.shape).to(param.dtype)
                param.add_(change, alpha=-group["lr"] * max(1.0, rows / columns) ** 0.5)


def _orthogonal(matrix: Tensor) -> Tensor:
    """About U V^T of the matrix's singular value decomposition, by five quintic Newton-Schulz steps.

    Long matrices are iterated through their small Gram matrix: all factors are polynomials of it, so they can be
    gathered first and the long matrix is multiplied once.
    """
    a, b, c = 3.4445, -4.7750, 2.0315
    tall = matrix.shape[0] > matrix.shape[1]
    x = matrix.T if tall else matrix
    if x.shape[1] < 3 * x.shape[0]:
        x = (x / (x.norm() + 1e-7)).bfloat16()
        for _ in range(5):
            gram = x @ x.T
            x = a * x + (b * gram + c * gram @ gram) @ x
    else:
        gram = x @ x.T  # In fp32: it holds the squares of the singular values.
        scale = 1 / (gram.trace() + 1e-14)
        gram = gram * scale
        factors: Tensor | None = None
        for _ in range(5):
            factor = torch.addmm(gram, gram, gram, beta=b, alpha=c)
            factor.diagonal().add_(a)
            factors = factor if factors is None else factor @ factors
            gram = factor @ (gram @ factor)
        assert factors is not None
        x = (factors * scale.sqrt()).bfloat16() @ x.bfloat16()
    out: Tensor = x.T if tall else x
    return out


def _optimizers(models: dict[str, nn.Module], lr: float, muon_lr: float) -> list[torch.optim.Optimizer]:
    """Muon for the inner weights, AdamW for biases, norms, embeddings, first and last layers."""
    outer = ("conv_in.", "conv_out.", "embedding", "quant_conv")
    inner: list[Tensor] = []
    rest: list[Tensor] = []
    for model in models.values():
        for name, param in model.named_parameters():
            is_outer = param.ndim < 2 or any(part in name for part in outer)
            (rest if is_outer else inner).append(param)
    return [Muon(inner, muon_lr), torch.optim.AdamW(rest, lr=lr, betas=(0.9, 0.99), fused=True)]


def _lr_factor(step: int, steps: int, warmup: int) -> float:
    """Linear warm-up, then half a cosine down to 1 %."""
    if step < warmup:
        return (step + 1) / warmup
    return 0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * min(1.0, (step - warmup) / (steps - warmup))))


def run_steps(
    name: str,
    models: dict[str, nn.Module],
    loss_of: Callable[[int], Tensor],
    work: Path,
    steps: int,
    lr: float,
    muon_lr: float,
    ema_decay: float,
) -> dict[str, nn.Module]:
    """Trains `models` in place, with checkpoints in `work`, and returns their averaged copies."""
    params: list[Tensor] = [p for model in models.values() for p in model.parameters()]
    optimizers = _optimizers(models, lr, muon_lr)
    full_lrs = [optimizer.param_groups[0]["lr"] for optimizer in optimizers]
    averaged = {key: copy.deepcopy(model).requires_grad_(False) for key, model in models.items()}
    ema_params: list[Tensor] = [p for model in averaged.values() for p in model.parameters()]
    file = work / f"{name}.pt"
    first = 0
    if file.exists():
        state = torch.load(file, weights_only=True)
        first = state["step"]
        for optimizer, saved in zip(optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        for key, model in models.items():
            model.load_state_dict(state["models"][key])
            averaged[key].load_state_dict(state["averaged"][key])

    def save(step: int) -> None:
        torch.save(
            {
                "step": step,
                "optimizers": [optimizer.state_dict() for optimizer in optimizers],
                "models": {key: model.state_dict() for key, model in models.items()},
                "averaged": {key: model.state_dict() for key, model in averaged.items()},
            },
            file.with_suffix(".tmp"),
        )
        os.replace(file.with_suffix(".tmp"), file)

    saved_s = started_s = time.monotonic()
    mean_loss = 0.0
    for step in range(first, steps):
        for optimizer, full_lr in zip(optimizers, full_lrs, strict=True):
            optimizer.param_groups[0]["lr"] = full_lr * _lr_factor(step, steps, warmup=30)
        torch.manual_seed(SEED * 1_000_003 + step)
        loss = loss_of(step)
        torch.autograd.backward(loss)
        nn.utils.clip_grad_norm_(params, 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        if step % EMA_EVERY == 0:
            decay = min(ema_decay, (1 + step) / (10 + step)) ** EMA_EVERY
            with torch.no_grad():
                torch._foreach_lerp_(ema_params, params, 1 - decay)
        mean_loss = loss.item() if step == first else 0.98 * mean_loss + 0.02 * loss.item()
        if step % 50 == 0:
            elapsed_s = time.monotonic() - started_s
            rate = (step - first + 1) / elapsed_s
            print(f"{name} {step}/{steps} loss {mean_loss:.4f} {rate:.2f} steps/s", flush=True)
        if time.monotonic() - saved_s > SAVE_EVERY_S:
            save(step + 1)
            saved_s = time.monotonic()
    save(max(first, steps))
    return averaged


@torch.no_grad()
def start_near_linear(vae: AutoencoderKL) -> None:
    """Lets residual branches start at zero and the latents' noise small, so that learning starts at once."""
    for module in vae.modules():
        if isinstance(module, ResnetBlock2D):
            nn.init.zeros_(module.conv2.weight)
            nn.init.zeros_(module.conv2.bias)
    vae.quant_conv.bias[4:] -= 6  # log variance


def train_vae(work: Path, steps: int) -> AutoencoderKL:
    """Trains the autoencoder and scales it so that SD_SCALE x latents have mean 0 and deviation 1."""
    done = work / "vae"
    if done.exists():
        return AutoencoderKL.from_pretrained(done)
    torch.manual_seed(SEED)
    vae = make_vae()
    start_near_linear(vae)
    weight_HW = _face_weight()

    def loss_of(step: int) -> Tensor:
        rng = random.Random(f"vae {SEED} {step}")
        pictures = [_confetti(draw.draw(draw.random_portrait(rng)), rng) for _ in range(4)]
        # Little KL at the start, or channels close before they carry anything.
        return _vae_loss(vae, to_tensor(pictures), weight_HW, kl_weight=1e-5 + 2e-4 * step / steps)

    averaged = run_steps("vae-training", {"vae": vae}, loss_of, work, steps, 2e-3, 0.01, ema_decay=0.995)[
        "vae"
    ]
    assert isinstance(averaged, AutoencoderKL)
    standardise(averaged)
    averaged.save_pretrained(done.with_suffix(".tmp"))
    os.replace(done.with_suffix(".tmp"), done)
    return averaged


@torch.no_grad()
def standardise(vae: AutoencoderKL) -> None:
    """Folds a shift and a factor per channel into the two 1x1 convolutions around the latents.

    Trainers and samplers multiply latents by the constant SD_SCALE, whatever the VAE; after this, what they get
    has mean 0 and standard deviation 1 on drawn portraits, as diffusion wants it.
    """
    rng = random.Random(f"standardise {SEED}")
    batches = []
    for _ in range(16):
        pictures_BCHW = to_tensor(draw.draw(draw.random_portrait(rng)) for _ in range(16))
        batches.append(vae.encode(pictures_BCHW).latent_dist.sample())
    latents_BCHW = torch.cat(batches)
    mean_C = latents_BCHW.mean((0, 2, 3))
    factor_C = 1 / (latents_BCHW.std((0, 2, 3)) * SD_SCALE)
    before, after = vae.quant_conv, vae.post_quant_conv
    after.bias += (after.weight[:, :, 0, 0] * mean_C).sum(1)
    after.weight /= factor_C.reshape(1, 4, 1, 1)
    before.bias[:4] = (before.bias[:4] - mean_C) * factor_C
    before.weight[:4] *= factor_C.reshape(4, 1, 1, 1)
    before.bias[4:] += 2 * factor_C.log()  # log variance


def sharpen_decoder(work: Path, vae: AutoencoderKL, steps: int) -> AutoencoderKL:
    """Trains the decoder on, for latents a little off, as samples are; the encoder, and so all latents, stay."""
    done = work / "vae-sharp"
    if done.exists():
        return AutoencoderKL.from_pretrained(done)
    torch.manual_seed(SEED + 1)
    weight_HW = _face_weight()
    half: dict[str, nn.Module] = {"decoder": vae.decoder, "post_quant_conv": vae.post_quant_conv}

    def loss_of(step: int) -> Tensor:
        rng = random.Random(f"decoder {SEED} {step}")
        pictures = [_confetti(draw.draw(draw.random_portrait(rng)), rng) for _ in range(4)]
        pictures_BCHW = to_tensor(pictures)
        with torch.autocast("cpu", torch.bfloat16):
            with torch.no_grad():
                latents_BCHW = vae.encode(pictures_BCHW).latent_dist.sample()
            off_BCHW = torch.randn_like(latents_BCHW) * (0.04 / SD_SCALE)
            out_BCHW = vae.decode(latents_BCHW + off_BCHW).sample
        return _picture_loss(out_BCHW, pictures_BCHW, weight_HW)

    averaged = run_steps("decoder-training", half, loss_of, work, steps, 1e-3, 0.005, ema_decay=0.995)
    vae.decoder.load_state_dict(averaged["decoder"].state_dict())
    vae.post_quant_conv.load_state_dict(averaged["post_quant_conv"].state_dict())
    vae.save_pretrained(done.with_suffix(".tmp"))
    os.replace(done.with_suffix(".tmp"), done)
    return vae


@torch.no_grad()
def cache_latents(work: Path, vae: AutoencoderKL) -> tuple[list[draw.Portrait], Tensor, Tensor]:
    """Portraits of the training set with mean and deviation of their latents, already scaled."""
    rng = random.Random(f"pictures {SEED}")
    portraits = [draw.random_portrait(rng) for _ in range(PICTURES)]
    file = work / "latents.pt"
    if not file.exists():
        means, deviations = [], []
        for k in range(0, PICTURES, 32):
            pictures_BCHW = to_tensor(draw.draw(p) for p in portraits[k : k + 32])
            with torch.autocast("cpu", torch.bfloat16):
                posterior = vae.encode(pictures_BCHW).latent_dist
            means.append(posterior.mean.float() * SD_SCALE)
            deviations.append(posterior.std.float() * SD_SCALE)
        torch.save([torch.cat(means), torch.cat(deviations)], file)
        print(
            f"latents: deviation {torch.cat(means).std():.3f}, of which noise {torch.cat(deviations).mean():.3f}"
        )
    mean_BCHW, deviation_BCHW = torch.load(file, weights_only=True)
    return portraits, mean_BCHW, deviation_BCHW


def make_noise_schedule() -> DDPMScheduler:
    """SD 1.5's noise schedule."""
    return DDPMScheduler(
        num_train_timesteps=1000,
        beta_schedule="scaled_linear",
        beta_start=0.00085,
        beta_end=0.012,
        clip_sample=False,
    )


NOISY_FROM_STEP: Final = 5500
"""From this step of the UNet on, half of each batch is at high noise, where alone the caption decides which way the
face looks: with less noise the latents show it already."""


def _timesteps(batch_size: int, noisy: bool) -> Tensor:
    """B timesteps, stratified to calm the loss: over all 1000, or half of them over the last 400 if `noisy`."""
    if noisy:
        half = batch_size // 2
        return torch.cat([_strata(half, 600, 1000), _strata(batch_size - half, 0, 1000)])
    return _strata(batch_size, 0, 1000)


def _strata(count: int, low: int, high: int) -> Tensor:
    """One draw from each of `count` equal parts of [low, high)."""
    t_B = low + (torch.arange(count) + torch.rand(count)) / count * (high - low)
    return t_B.long().clamp(max=high - 1)


def _face_weight_of_latents() -> Tensor:
    """1 hw weight with mean 1 over the latents, three times as high on the face."""
    weight_hw = torch.ones(1, draw.SIZE_PX // 8, draw.SIZE_PX // 8)
    weight_hw[:, 5:11, 4:12] = 3
    return weight_hw / weight_hw.mean()


def train_unet(
    work: Path, vae: AutoencoderKL, tokenizer: CLIPTokenizer, steps: int, batch_size: int
) -> tuple[UNet2DConditionModel, CLIPTextModel]:
    """Trains UNet and text encoder together to predict the noise, with min-SNR weights (arXiv:2303.09556)."""
    portraits, mean_BCHW, deviation_BCHW = cache_latents(work, vae)
    torch.manual_seed(SEED)
    unet, text_encoder = make_unet(), make_text_encoder(tokenizer)
    # Plain attention: at these sizes it is a fifth faster on a CPU than the fused one.
    unet.set_attn_processor(AttnProcessor())
    schedule = make_noise_schedule()
    alphas = schedule.alphas_cumprod
    face_weight_hw = _face_weight_of_latents()
    inverse_snr = (1 - alphas) / alphas
    snr_weight = (5 * inverse_snr).clamp(max=1)
    # Errors of the noise shrink with the signal; this keeps the picture's errors at one weight down to SNR 0.015.
    noisy_snr_weight = snr_weight * (0.3 * inverse_snr).clamp(1, 20)

    def loss_of(step: int) -> Tensor:
        rng = random.Random(f"unet {SEED} {step}")
        chosen = [rng.randrange(PICTURES) for _ in range(batch_size)]
        texts = ["" if rng.random() < 0.1 else draw.caption(portraits[k], rng) for k in chosen]
        ids_BL = tokenizer(texts, padding="max_length", truncation=True, return_tensors="pt").input_ids
        latents_BCHW = mean_BCHW[chosen] + deviation_BCHW[chosen] * torch.randn(
            batch_size, *mean_BCHW.shape[1:]
        )
        noise_BCHW = torch.randn_like(latents_BCHW)
        noisy = step >= NOISY_FROM_STEP
        t_B = _timesteps(batch_size, noisy)
        noisy_BCHW = schedule.add_noise(latents_BCHW, noise_BCHW, t_B)
        with torch.autocast("cpu", torch.bfloat16):
            states_BLC = text_encoder(ids_BL).last_hidden_state
            predicted_BCHW = unet(noisy_BCHW, t_B, states_BLC).sample
        error_BCHW = (predicted_BCHW.float() - noise_BCHW).square()
        if step >= FACE_FROM_STEP:
            error_BCHW = error_BCHW * face_weight_hw
        error_B = error_BCHW.mean((1, 2, 3))
        loss: Tensor = (error_B * (noisy_snr_weight if noisy else snr_weight)[t_B]).mean()
        return loss

    models: dict[str, nn.Module] = {"unet": unet, "text_encoder": text_encoder}
    averaged = run_steps("unet-training", models, loss_of, work, steps, 1e-3, 0.01, ema_decay=0.999)
    unet_ema, text_ema = averaged["unet"], averaged["text_encoder"]
    assert isinstance(unet_ema, UNet2DConditionModel)
    assert isinstance(text_ema, CLIPTextModel)
    return unet_ema, text_ema


def export(
    out: Path,
    vae: AutoencoderKL,
    unet: UNet2DConditionModel,
    text_encoder: CLIPTextModel,
    tokenizer: CLIPTokenizer,
) -> None:
    """Writes the model as a diffusers folder in fp16, with vocab.json and merges.txt beside tokenizer.json."""
    pipeline = StableDiffusionPipeline(
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        unet=unet,
        scheduler=DDIMScheduler(
            num_train_timesteps=1000,
            beta_schedule="scaled_linear",
            beta_start=0.00085,
            beta_end=0.012,
            clip_sample=False,
            set_alpha_to_one=False,
            steps_offset=1,
        ),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.to(torch.float16).save_pretrained(out)
    for file in out.glob("*/config.json"):  # diffusers notes the folder that a part was loaded from
        config = json.loads(file.read_text(encoding="utf-8"))
        config.pop("_name_or_path", None)
        file.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    vocabulary, merges = tokens.vocabulary()
    folder = out / "tokenizer"
    (folder / "vocab.json").write_text(json.dumps(vocabulary, ensure_ascii=False), encoding="utf-8")
    lines = ["#version: 0.2", *(" ".join(pair) for pair in merges)]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")


def main(arguments: list[str] | None = None) -> None:
    """Runs all stages, or with --export-now writes the model from the newest checkpoint."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--work", type=Path, required=True, help="folder for checkpoints")
    parser.add_argument("--out", type=Path, default=HERE / "base", help="where the finished model goes")
    parser.add_argument("--vae-steps", type=int, default=1800)
    parser.add_argument("--decoder-steps", type=int, default=900)
    parser.add_argument("--unet-steps", type=int, default=3800)
    parser.add_argument("--batch-size", type=int, default=24)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument(
        "--export-now", action="store_true", help="no training: write what the checkpoints hold"
    )
    given = parser.parse_args(arguments)
    torch.set_num_threads(given.threads)
    given.work.mkdir(parents=True, exist_ok=True)
    tokenizer = make_tokenizer()
    if given.export_now:
        vae, unet, text_encoder = _from_checkpoints(given.work, tokenizer)
    else:
        vae = train_vae(given.work, given.vae_steps)
        unet, text_encoder = train_unet(given.work, vae, tokenizer, given.unet_steps, given.batch_size)
        vae = sharpen_decoder(given.work, vae, given.decoder_steps)
    # A new tokenizer: the one used above would be written with its last call's padding.
    export(given.out, vae, unet, text_encoder, make_tokenizer())


def _from_checkpoints(
    work: Path, tokenizer: CLIPTokenizer
) -> tuple[AutoencoderKL, UNet2DConditionModel, CLIPTextModel]:
    vae, unet, text_encoder = make_vae(), make_unet(), make_text_encoder(tokenizer)
    if (work / "vae-sharp").exists():
        vae = AutoencoderKL.from_pretrained(work / "vae-sharp")
    elif (work / "vae").exists():
        vae = AutoencoderKL.from_pretrained(work / "vae")
    elif (work / "vae-training.pt").exists():
        vae.load_state_dict(_averaged(work / "vae-training.pt")["vae"])
        standardise(vae)
    if (work / "unet-training.pt").exists():
        state = _averaged(work / "unet-training.pt")
        unet.load_state_dict(state["unet"])
        text_encoder.load_state_dict(state["text_encoder"])
    return vae, unet, text_encoder


def _averaged(file: Path) -> dict[str, Any]:
    averaged: dict[str, Any] = torch.load(file, weights_only=True)["averaged"]
    return averaged


if __name__ == "__main__":
    main()
