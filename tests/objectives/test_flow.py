"""Noise levels, noising and loss of FLUX.1, against formulas in float64 and diffusers' scheduler."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.objectives.test_ddpm import batch
from trainer.draws import Draws
from trainer.errors import ConfigError
from trainer.objectives.flow import (
    FlowEuler,
    Objective,
    Settings,
    flux_mu,
    schedule,
    shifted,
    sigma_weights,
    sigmas,
)

IDS = range(2000)
CPU = torch.device("cpu")


def drawn(kind: str) -> list[float]:
    """The draws behind the noise levels."""
    draws = Draws(5)
    values = draws.normal("sigma", IDS, (1,))[:, 0] if kind == "normal" else draws.uniform("sigma", IDS)
    return [float(value) for value in values]


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def table(place: float, shift: float) -> float:
    level = (1000 - int(place * 1000)) / 1000
    return shift * level / (1 + (shift - 1) * level)


def bent(u: float, scale: float) -> float:
    return 1 - u - scale * (math.cos(math.pi * u / 2) ** 2 - 1 + u)


EXPECTED: dict[str, tuple[dict[str, Any], str, Any]] = {
    "uniform": ({"timestep_sampling": "uniform"}, "uniform", lambda u: u),
    "sigmoid": (
        {"timestep_sampling": "sigmoid", "sigmoid_scale": 1.7},
        "normal",
        lambda n: sigmoid(1.7 * n),
    ),
    "shift": (
        {"timestep_sampling": "shift", "sigmoid_scale": 0.8, "discrete_flow_shift": 3.1582},
        "normal",
        lambda n: 3.1582 * sigmoid(0.8 * n) / (1 + 2.1582 * sigmoid(0.8 * n)),
    ),
    "flux_shift": (
        {"timestep_sampling": "flux_shift"},
        "normal",
        lambda n: math.exp(0.63) / (math.exp(0.63) + 1 / sigmoid(n) - 1),
    ),
    "sigma": ({"discrete_flow_shift": 3.0}, "uniform", lambda u: table(u, 3)),
    "sigma, logit_normal": (
        {"weighting_scheme": "logit_normal", "logit_mean": 0.5, "logit_std": 2.0},
        "normal",
        lambda n: table(sigmoid(0.5 + 2 * n), 3),
    ),
    "sigma, mode": (
        {"weighting_scheme": "mode", "mode_scale": 1.29},
        "uniform",
        lambda u: table(min(max(bent(u, 1.29), 0), 0.9999), 3),
    ),
}


@pytest.mark.parametrize("case", EXPECTED)
def test_noise_levels(case: str) -> None:
    values, kind, formula = EXPECTED[case]
    found = sigmas(Settings(**values), IDS, 1024, Draws(5))
    expected = torch.tensor([formula(value) for value in drawn(kind)], dtype=torch.float64)
    assert found.dtype == torch.float32
    # A table's step apart where a product of 1000 was rounded over the edge.
    off = (found.double() - expected).abs() > 1e-5
    assert int(off.sum()) <= (4 if "sigma" in case and case != "sigmoid" else 0)


def test_check_values() -> None:
    """Engine facts 13."""
    levels = torch.tensor([1000, 500, 1]) / 1000
    assert shifted(levels, 3.0).tolist() == pytest.approx([1.0, 0.75, 0.002994012])
    assert flux_mu(1024) == pytest.approx(0.63)
    assert flux_mu(256) == pytest.approx(0.5)
    assert flux_mu(4096) == pytest.approx(1.15)
    assert schedule(4, 1024).tolist() == pytest.approx([1, 0.84923, 0.65249, 0.38494, 0], abs=1e-5)


def test_euler_is_diffusers_flow_scheduler() -> None:
    from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteScheduler

    steps, tokens = 7, 24 * 32
    theirs = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, base_shift=0.5, max_shift=1.15)
    theirs.set_timesteps(sigmas=torch.linspace(1, 1 / steps, steps).tolist(), mu=flux_mu(tokens))
    ours = FlowEuler(tokens)
    ours.set_timesteps(steps)
    torch.testing.assert_close(ours.timesteps, theirs.timesteps, rtol=1e-5, atol=1e-3)
    one = other = torch.randn(1, 16, 4, 4, generator=torch.Generator().manual_seed(0))
    for a, b in zip(ours.timesteps, theirs.timesteps, strict=True):
        velocity = torch.sin(one) * a / 1000
        one = ours.step(velocity, a, ours.scale_model_input(one, a))[0]
        other = theirs.step(velocity, b, other, return_dict=False)[0]
    torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


def objective(**values: Any) -> Objective:
    settings = Settings(**values)
    settings.check()
    return Objective(settings=settings, device=CPU)


def latents() -> Tensor:
    return torch.randn(3, 16, 4, 6, generator=torch.Generator().manual_seed(1))


def test_path_and_velocity() -> None:
    made = objective(timestep_sampling="uniform", ip_noise_gamma=0.2, ip_noise_gamma_random_strength=True)
    draws, ids, clean = Draws(2), (4, 5, 6), latents()
    noised = made.mix(clean, made.noise_on_cpu((16, 4, 6), ids, 9, draws))
    noise = draws.noise(ids, (16, 4, 6)).double()
    sigma = draws.uniform("sigma", ids).double().view(-1, 1, 1, 1)
    extra = 0.2 * float(draws.uniform("ip_noise_strength", [9])) * draws.normal("ip_noise", ids, (16, 4, 6))
    expected = (1 - sigma) * clean.double() + sigma * (noise + extra.double())
    torch.testing.assert_close(noised.noisy_BCHW.double(), expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(noised.target_BCHW.double(), noise - clean.double(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(noised.timesteps_B.double(), 1000 * sigma.flatten(), rtol=1e-6, atol=1e-6)
    half = made.mix(clean.to(torch.bfloat16), made.noise_on_cpu((16, 4, 6), ids, 9, draws))
    assert half.noisy_BCHW.dtype == torch.bfloat16
    assert half.target_BCHW.dtype == torch.float32


@pytest.mark.parametrize("kind", ["raw", "additive", "sigma_scaled"])
@pytest.mark.parametrize("weighting", ["uniform", "sigma_sqrt", "cosmap"])
@pytest.mark.parametrize("loss_type", ["l2", "huber"])
def test_loss(kind: str, weighting: str, loss_type: str) -> None:
    made = objective(
        model_prediction_type=kind,
        weighting_scheme=weighting,
        loss_type=loss_type,
        huber_schedule="exponential",
        huber_scale=0.7,
    )
    clean, ids = latents(), (0, 1, 2)
    noised = made.mix(clean, made.noise_on_cpu((16, 4, 6), ids, 0, Draws(3)))
    predicted = torch.randn(clean.shape, generator=torch.Generator().manual_seed(7)).requires_grad_()
    mask = torch.zeros(3, 1, 8, 12)
    mask[:, :, :4] = 1
    weights = [1.0, 0.5, 2.0]
    loss, each = made.loss(predicted, noised, batch(weights=weights, masks=mask))

    p, x, target = (value.detach().double() for value in (predicted, noised.noisy_BCHW, noised.target_BCHW))
    sigma = noised.sigma_B.double().view(-1, 1, 1, 1)
    read = {"raw": p, "additive": p + x, "sigma_scaled": x - sigma * p}[kind]
    c = torch.exp(math.log(0.1) * sigma) * 0.7
    error = read - target
    losses = error**2 if loss_type == "l2" else 2 * c * ((error**2 + c**2).sqrt() - c)
    if kind == "sigma_scaled" and weighting == "sigma_sqrt":
        losses = losses / sigma**2
    if kind == "sigma_scaled" and weighting == "cosmap":
        losses = losses * 2 / (math.pi * (1 - 2 * sigma + 2 * sigma**2))
    losses[:, :, 2:] = 0
    expected = losses.mean(dim=(1, 2, 3)) * torch.tensor(weights, dtype=torch.float64)
    torch.testing.assert_close(each.double(), expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(loss.double(), expected.mean(), rtol=1e-5, atol=1e-6)
    (gradient,) = torch.autograd.grad(loss, [predicted])
    assert bool(gradient.any())


def test_weights_of_other_schemes_are_one() -> None:
    sigma = torch.tensor([0.1, 0.9])
    for scheme in ("uniform", "none", "logit_normal", "mode"):
        assert sigma_weights(sigma, scheme).tolist() == [1, 1]


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"timestep_sampling": "nextdit_shift"}, "timestep_sampling"),
        ({"model_prediction_type": "v"}, "model_prediction_type"),
        ({"weighting_scheme": "max"}, "weighting_scheme"),
        ({"discrete_flow_shift": -1}, "above 0"),
        ({"loss_type": "huber"}, "constant or exponential"),
        ({"loss_type": "smooth_l1", "huber_schedule": "constant", "huber_c": 0}, "huber_c"),
    ],
)
def test_what_cannot_be_is_said(values: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        Settings(**values).check()
