"""What the SD family computes: text states, latents, predictions, gradients."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests import tiny
from tests.families.conftest import load
from trainer.errors import DivergedError

CAPTIONS = ["a photo of sks dog", "", "1girl, " * 60]


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("clip_skip", [0, 1, 2, 3])
@pytest.mark.parametrize("length", [75, 150, 225])
def test_text_states(clip_skip: int, length: int, file: Path, tmp_path: Path) -> None:
    """Against transformers' own hidden states, chunk by chunk (engine facts 1.6)."""
    family = load(tiny.job(file, tmp_path, clip_skip=clip_skip, max_token_length=length))
    ours = family.encode_prompts(CAPTIONS).states_BTD
    encoder = tiny.models()["text_encoder"]
    chunks = length // 75
    for caption, states in zip(CAPTIONS, ours, strict=True):
        parts = []
        for ids in family.tokens.captions([caption])[0]:
            output = encoder(ids[None], output_hidden_states=True)
            part = output.hidden_states[-max(1, clip_skip)]
            parts.append(encoder.final_layer_norm(part)[0])
        joined = [parts[0][:1], *(part[1:76] for part in parts), parts[-1][-1:]]
        assert states.shape == (75 * chunks + 2, 32)
        torch.testing.assert_close(states, torch.cat(joined), rtol=0, atol=2e-6)
        if clip_skip < 2 and chunks == 1:
            last = encoder(family.tokens.captions([caption])[0]).last_hidden_state[0]
            torch.testing.assert_close(states, last, rtol=0, atol=2e-6)


def test_sd2_text_states(shelf: Path, tmp_path: Path) -> None:
    family = load(tiny.job(tiny.sd2_file(shelf / "sd2.safetensors"), tmp_path, v2=True))
    ids = family.tokens.captions(["a photo"])[0]
    assert ids[0, 4:].tolist() == [0] * 73
    expected = tiny.models(2)["text_encoder"](ids).last_hidden_state
    torch.testing.assert_close(family.encode_prompts(["a photo"]).states_BTD, expected, rtol=0, atol=2e-6)


def test_weighted_captions_multiply_token_states(file: Path, tmp_path: Path) -> None:
    family = load(tiny.job(file, tmp_path, max_token_length=150))
    plain = family.encode_prompts(["a red cat sat"]).states_BTD
    weighted = family.encode_prompts(["a (red cat:1.5) sat"], weighted=True).states_BTD
    factors = torch.ones(1, 152, 1)
    factors[:, 2:4] = 1.5
    torch.testing.assert_close(weighted, plain * factors)
    assert torch.equal(family.encode_prompts(["a red cat sat"], weighted=True).states_BTD, plain)


def test_sample_prompts(file: Path, tmp_path: Path) -> None:
    """Two chunks keep their ends; emphasis keeps the mean of the states."""
    family = load(tiny.job(file, tmp_path))
    text = family.encode_sample_prompts(["blurry", "one " * 75 + "(two:1.3)"]).states_BTD
    assert text.shape == (2, 154, 32)
    encoder = tiny.models()["text_encoder"]
    one, two, eos = (family.tokens.plain(word)[0] for word in ("one", "two", "<|endoftext|>"))
    first = encoder(torch.tensor([[49406, *[one] * 75, eos]])).last_hidden_state[0]
    second = encoder(torch.tensor([[49406, two, *[eos] * 75]])).last_hidden_state[0]
    plain = torch.cat([first, second])
    weights = torch.ones(154, 1)
    weights[78] = 1.3
    expected = plain * weights * (plain.mean() / (plain * weights).mean())
    torch.testing.assert_close(text[1], expected, rtol=1e-4, atol=1e-5)


def test_text_is_encoded_once_while_the_encoder_is_frozen(file: Path, tmp_path: Path) -> None:
    calls: list[int] = []
    for text_encoder_lr, expected in ((0.0, 1), (1e-4, 3)):
        family = load(tiny.job(file, tmp_path, unet_lr=1e-4, text_encoder_lr=text_encoder_lr))
        encoder: Any = family.text_encoders["te1"]
        calls.clear()
        encoder.final_layer_norm.register_forward_hook(lambda *_: calls.append(1))
        states = [family.encode_prompts(["a", "b"]).states_BTD for _ in range(2)]
        states.append(family.encode_prompts(["b", "a"]).states_BTD.flip(0))
        assert len(calls) == expected
        for other in states[1:]:
            torch.testing.assert_close(states[0], other, rtol=0, atol=1e-6)
    # Training of the text encoder ends: its states as they are then are kept from there on.
    with torch.no_grad():
        encoder.final_layer_norm.bias.add_(1)
    family.freeze_text()
    kept = family.encode_prompts(["a", "b"]).states_BTD
    torch.testing.assert_close(kept, states[0] + 1, rtol=0, atol=1e-5)
    calls.clear()
    assert torch.equal(family.encode_prompts(["a", "b"]).states_BTD, kept)
    assert calls == []


def test_kept_text_is_bounded(file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from trainer.families import _latent_diffusion

    family = load(tiny.job(file, tmp_path, unet_lr=1e-4, text_encoder_lr=0))
    monkeypatch.setattr(_latent_diffusion, "REMEMBERED_BYTES", 3 * 77 * 32 * 4)
    for n in range(6):
        family.encode_prompts(["always", f"caption {n}"])
    assert list(family._kept) == [("caption 4", False), ("always", False), ("caption 5", False)]
    # A batch of more captions than may be kept is served whole.
    assert family.encode_prompts([str(n) for n in range(5)]).states_BTD.shape == (5, 77, 32)


def test_text_gradients(file: Path, tmp_path: Path) -> None:
    """Where the text encoder trains, its states can be differentiated, with and without checkpointing."""
    gradients = []
    for checkpointing in (False, True):
        family = load(tiny.job(file, tmp_path, text_encoder_lr=1e-4, unet_lr=1e-4, clip_skip=2))
        encoder: Any = family.text_encoders["te1"]
        weights = [layer.self_attn.q_proj.weight.requires_grad_() for layer in encoder.encoder.layers]
        if checkpointing:
            family.enable_gradient_checkpointing()
        torch.autograd.backward(family.encode_prompts(["a cat", "a dog"]).states_BTD.square().sum())
        assert weights[2].grad is None  # clip skip 2 leaves the last layer out
        gradients.append([weight.grad for weight in weights[:2]])
    assert all(a is not None and a.abs().sum() > 0 for a in gradients[0])
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b)


def test_latents(file: Path, tmp_path: Path) -> None:
    family = load(tiny.job(file, tmp_path))
    pixels = torch.rand(2, 3, 64, 96, generator=generator(0)) * 2 - 1
    latents = family.encode_images(pixels, [generator(1), generator(2)])
    posterior = tiny.models()["vae"].encode(pixels).latent_dist
    assert latents.shape == (2, 4, 8, 12)
    for index in range(2):
        noise = torch.randn(4, 8, 12, generator=generator(index + 1))
        torch.testing.assert_close(latents[index], posterior.mean[index] + posterior.std[index] * noise)
    alone = family.encode_images(pixels[1:], [generator(2)])
    torch.testing.assert_close(alone[0], latents[1], rtol=1e-4, atol=1e-5)
    scaled = family.to_model_latents(latents)
    torch.testing.assert_close(scaled, latents * 0.18215)
    decoded = tiny.models()["vae"].decode(latents).sample
    torch.testing.assert_close(family.decode_latents(scaled), decoded, rtol=1e-4, atol=1e-5)


def test_vae_ignores_autocast(file: Path, tmp_path: Path) -> None:
    family = load(tiny.job(file, tmp_path))
    pixels = torch.rand(1, 3, 64, 64, generator=generator(0)) * 2 - 1
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = family.encode_images(pixels, [generator(1)])
        picture = family.decode_latents(inside)
    assert torch.equal(inside, family.encode_images(pixels, [generator(1)]))
    assert picture.dtype == torch.float32
    assert torch.equal(picture, family.decode_latents(inside))


def test_nan_latents_are_an_error(file: Path, tmp_path: Path) -> None:
    family = load(tiny.job(file, tmp_path))
    family.vae.quant_conv.bias.data[0] = float("nan")
    with pytest.raises(DivergedError, match="no_half_vae"):
        family.encode_images(torch.zeros(1, 3, 64, 64), [generator(0)])


def test_half_precision(file: Path, tmp_path: Path) -> None:
    """Half weights, full VAE on demand, and predictions near those in full precision."""
    full = load(tiny.job(file, tmp_path))
    half = load(tiny.job(file, tmp_path, additional_parameters="--no_half_vae"), torch.bfloat16)
    assert next(half.vae.parameters()).dtype == torch.float32
    assert half.vae_fingerprint() == full.vae_fingerprint()
    noisy = torch.randn(2, 4, 8, 8, generator=generator(3))
    outputs = [
        family.predict(noisy, torch.tensor([10, 900]), family.encode_prompts(["a", "b"]), None).float()
        for family in (full, half)
    ]
    error = (outputs[0] - outputs[1]).norm() / outputs[0].norm()
    assert 0 < error < 0.03
    expected = tiny.models()["unet"](
        noisy, torch.tensor([10, 900]), full.encode_prompts(["a", "b"]).states_BTD
    )
    assert torch.equal(outputs[0], expected.sample)


def test_gradient_checkpointing_gives_equal_gradients(file: Path, tmp_path: Path) -> None:
    gradients, saved = [], []
    for checkpointing in (False, True):
        family = load(tiny.job(file, tmp_path))
        if checkpointing:
            family.enable_gradient_checkpointing()
        weights = [
            target.module.weight.requires_grad_() for target in family.targets() if target.part == "unet"
        ]
        kept = [0]

        def count(tensor: torch.Tensor, kept: list[int] = kept) -> torch.Tensor:
            kept[0] += tensor.numel()
            return tensor

        noisy = torch.randn(2, 4, 8, 8, generator=generator(3))
        with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
            prediction = family.predict(
                noisy, torch.tensor([5, 500]), family.encode_prompts(["a", "b"]), None
            )
        torch.autograd.backward(prediction.square().mean())
        gradients.append([weight.grad for weight in weights])
        saved.append(kept[0])
    assert saved[1] < saved[0] / 2
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b)


def test_move(file: Path, tmp_path: Path) -> None:
    family = load(tiny.job(file, tmp_path))
    family.move(["vae"], torch.device("meta"))
    assert next(family.vae.parameters()).is_meta
    assert not next(family.unet.parameters()).is_meta
    family.move(["unet", "text_encoders"], torch.device("meta"))
    assert next(family.unet.parameters()).is_meta
    assert next(family.text_encoders["te1"].parameters()).is_meta


def test_identity_of_the_base(file: Path, shelf: Path, tmp_path: Path) -> None:
    """ss_base_model_version and modelspec.architecture (engine facts 5.5)."""
    two = tiny.sd2_file(shelf / "sd2.safetensors")
    for path, fields, expected in (
        (file, {}, ("sd_v1", "stable-diffusion-v1/lora")),
        (file, {"v_parameterization": True}, ("sd_v1_v", "stable-diffusion-v1/lora")),
        (two, {"v2": True}, ("sd_v2", "stable-diffusion-v2-512/lora")),
        (two, {"v2": True, "v_parameterization": True}, ("sd_v2_v", "stable-diffusion-v2-768-v/lora")),
    ):
        family = load(tiny.job(path, tmp_path, **fields))
        assert (family.kohya_base_version, family.architecture) == expected
        assert family.implementation == "diffusers"
