"""The SD objective against golden figures, formulas in float64 and diffusers' own scheduler."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from diffusers.schedulers.scheduling_ddpm import DDPMScheduler
from diffusers.training_utils import compute_snr
from torch import Tensor
from torch.nn import functional

from trainer.data.types import Batch
from trainer.draws import Draws
from trainer.errors import ConfigError
from trainer.objectives import ddpm
from trainer.objectives.ddpm import Noised, Objective, Settings

# sd-scripts' own figures, printed by the reference to four or more digits.
GOLDEN_SNR = {
    0: 1175.4406, 1: 585.8622, 10: 103.5075, 100: 8.4539, 250: 2.0655, 500: 0.3819, 750: 0.0595,
    900: 0.0144, 999: 0.0047,
}  # fmt: skip
GOLDEN_WEIGHTS: list[tuple[dict[str, Any], list[float]]] = [
    ({"min_snr_gamma": 5}, [0.0042537, 0.591446, 1, 1]),
    ({"min_snr_gamma": 5, "v_prediction": True}, [0.0042501, 0.528884, 0.276332, 0.0046601]),
    (
        {"scale_v_pred_loss_like_noise_pred": True, "v_prediction": True},
        [0.999001, 0.894223, 0.276332, 0.0046601],
    ),
    ({"v_pred_like_loss": 0.5}, [1.5005, 1.559144, 2.809415, 108.293969]),
    ({"debiased_estimation_loss": True}, [0.0316228, 0.343932, 1.618280, 14.614648]),
]
GOLDEN_HUBER_C = {
    "exponential": [1, 0.794328, 0.316228, 0.100231],
    "snr": [0.949709, 0.598297, 0.231284, 0.103691],
}
AT = torch.tensor([0, 100, 500, 999])


def scheduler(**options: Any) -> DDPMScheduler:
    return DDPMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        num_train_timesteps=1000,
        clip_sample=False,
        **options,
    )


def batch(size: int = 3, weights: list[float] | None = None, masks: Tensor | None = None) -> Batch:
    return Batch(
        pictures=tuple(range(size)),
        draw_ids=tuple(range(10, 10 + size)),
        latents_BCHW=None,
        pixels_BCHW=None,
        captions=("",) * size,
        loss_weights_B=torch.tensor(weights or [1.0] * size),
        masks_B1HW=masks,
        flipped=(False,) * size,
        sizes=((64, 64),) * size,
        bucket=(64, 64),
    )


def latents(size: int = 3, height: int = 8, width: int = 12, seed: int = 0) -> Tensor:
    return torch.randn(size, 4, height, width, generator=torch.Generator().manual_seed(seed))


def noised(objective: Objective, latents_BCHW: Tensor, micro: int = 0, seed: int = 1) -> Noised:
    ids = range(10, 10 + len(latents_BCHW))
    return objective.noise_latents(latents_BCHW, list(ids), micro, Draws(seed))


# --- tables ---


def test_tables_equal_diffusers_to_the_last_bit() -> None:
    torch.testing.assert_close(ddpm.alphas_cumprod(), scheduler().alphas_cumprod, rtol=0, atol=0)
    rescaled = scheduler(rescale_betas_zero_snr=True).alphas_cumprod
    ours = ddpm.zero_terminal_snr(ddpm.alphas_cumprod())
    # diffusers keeps a last value of 2^-24 in place of 0, for its samplers.
    torch.testing.assert_close(ours[:-1], rescaled[:-1], rtol=0, atol=0)
    assert ours[-1] == 0


def test_zero_terminal_snr_figures() -> None:
    before = ddpm.alphas_cumprod()
    after = ddpm.zero_terminal_snr(before)
    assert before[[0, 500, 999]].tolist() == pytest.approx([0.99914998, 0.27633247, 0.00466010], abs=1e-7)
    assert after[[0, 500, 999]].tolist() == pytest.approx([0.99914998, 0.24101855, 0.0], abs=1e-7)


def test_snr_figures() -> None:
    table = ddpm.snr(ddpm.alphas_cumprod())
    for timestep, expected in GOLDEN_SNR.items():
        assert float(table[timestep]) == pytest.approx(expected, abs=6e-5)
    timesteps = torch.arange(1000)
    torch.testing.assert_close(table, compute_snr(scheduler(), timesteps), rtol=1e-6, atol=0)


@pytest.mark.parametrize(("options", "expected"), GOLDEN_WEIGHTS)
def test_weight_figures(options: dict[str, Any], expected: list[float]) -> None:
    objective = Objective.build(Settings(**options), "cpu")
    assert objective.weights_T[AT].tolist() == pytest.approx(expected, rel=2e-5)


def test_weights_multiply_in_order() -> None:
    chosen = Settings(
        min_snr_gamma=5,
        v_prediction=True,
        scale_v_pred_loss_like_noise_pred=True,
        v_pred_like_loss=0.25,
        debiased_estimation_loss=True,
    )
    table = Objective.build(chosen, "cpu").weights_T
    abar = scheduler().alphas_cumprod.double()
    ratio = abar / (1 - abar)
    bounded = torch.minimum(ratio, torch.tensor(1000.0, dtype=torch.double))
    loss = torch.ones(1000, dtype=torch.double)
    loss = loss * torch.minimum(ratio, torch.tensor(5.0, dtype=torch.double)) / (ratio + 1)
    loss = loss * bounded / (bounded + 1)
    loss = loss + loss * 0.25 * (bounded + 1) / bounded
    loss = loss / (bounded + 1)
    torch.testing.assert_close(table.double(), loss, rtol=2e-6, atol=0)


def test_weights_use_the_ratio_from_before_the_rescale() -> None:
    plain = Objective.build(Settings(min_snr_gamma=5, debiased_estimation_loss=True), "cpu")
    zero = Objective.build(
        Settings(min_snr_gamma=5, debiased_estimation_loss=True, zero_terminal_snr=True), "cpu"
    )
    torch.testing.assert_close(plain.weights_T, zero.weights_T, rtol=0, atol=0)
    assert bool(torch.isfinite(zero.weights_T).all())
    assert float(zero.signal_T[-1]) == 0


@pytest.mark.parametrize("schedule", sorted(GOLDEN_HUBER_C))
def test_huber_threshold_figures(schedule: str) -> None:
    table = ddpm.huber_thresholds(ddpm.alphas_cumprod(), schedule, 0.1, 1.0)
    assert table[AT].tolist() == pytest.approx(GOLDEN_HUBER_C[schedule], abs=1e-6)


def test_huber_scale_has_no_part_in_the_snr_schedule() -> None:
    abar = ddpm.alphas_cumprod()
    for schedule, factor in (("constant", 3.0), ("exponential", 3.0), ("snr", 1.0)):
        once = ddpm.huber_thresholds(abar, schedule, 0.2, 1.0)
        torch.testing.assert_close(ddpm.huber_thresholds(abar, schedule, 0.2, 3.0), once * factor)
    assert ddpm.huber_thresholds(abar, "constant", 0.2, 3.0)[7].item() == pytest.approx(0.6)


# --- noise ---


def test_noising_equals_diffusers() -> None:
    clean = latents()
    result = noised(Objective.build(Settings(), "cpu"), clean)
    judge = scheduler()
    expected = judge.add_noise(clean, result.noise_BCHW, result.timesteps_B)
    torch.testing.assert_close(result.noisy_BCHW, expected, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(result.target_BCHW, result.noise_BCHW, rtol=0, atol=0)
    torch.testing.assert_close(result.noise_BCHW, Draws(1).noise([10, 11, 12], (4, 8, 12)), rtol=0, atol=0)


@pytest.mark.parametrize("zero", [False, True])
def test_velocity_equals_diffusers(zero: bool) -> None:
    clean = latents()
    result = noised(Objective.build(Settings(v_prediction=True, zero_terminal_snr=zero), "cpu"), clean)
    expected = scheduler(rescale_betas_zero_snr=zero).get_velocity(
        clean, result.noise_BCHW, result.timesteps_B
    )
    torch.testing.assert_close(result.target_BCHW, expected, rtol=1e-6, atol=1e-6)


def test_draws_hang_on_the_sample_not_on_the_batch() -> None:
    chosen = Settings(noise_offset=0.1, ip_noise_gamma=0.1)
    objective = Objective.build(chosen, "cpu")
    clean = latents(4)
    together = objective.noise_latents(clean, [5, 6, 7, 8], 3, Draws(9))
    apart = [objective.noise_latents(clean[i : i + 1], [5 + i], 3, Draws(9)) for i in range(4)]
    torch.testing.assert_close(together.noisy_BCHW, torch.cat([a.noisy_BCHW for a in apart]), rtol=0, atol=0)
    assert together.timesteps_B.tolist() == [int(a.timesteps_B) for a in apart]
    other = objective.noise_latents(clean, [15, 16, 17, 18], 3, Draws(9))
    assert not torch.equal(other.noise_BCHW, together.noise_BCHW)


def test_drawn_ahead_equals_drawn_in_place() -> None:
    objective = Objective.build(
        Settings(noise_offset=0.1, adaptive_noise_scale=0.2, multires_noise_iterations=4, ip_noise_gamma=0.1),
        "cpu",
    )
    clean = latents()
    ahead = objective.mix(clean, objective.noise_on_cpu((4, 8, 12), [1, 2, 3], 5, Draws(0)))
    at_once = objective.noise_latents(clean, [1, 2, 3], 5, Draws(0))
    torch.testing.assert_close(ahead.noisy_BCHW, at_once.noisy_BCHW, rtol=0, atol=0)


class Replay(Draws):
    """Draws everything from one generator in the order of the calls, as sd-scripts does."""

    def __init__(self, seed: int) -> None:
        super().__init__(seed)
        self.source = torch.Generator().manual_seed(seed)

    def normal(self, purpose: str, draw_ids: Any, shape: Any) -> Tensor:
        return torch.randn(len(draw_ids), *shape, generator=self.source)

    def uniform(self, purpose: str, draw_ids: Any) -> Tensor:
        return torch.rand(len(draw_ids), generator=self.source)

    def timesteps(self, draw_ids: Any, low: int, high: int) -> Tensor:
        return torch.randint(low, high, (len(draw_ids),), generator=self.source)


@pytest.mark.parametrize("random_strength", [False, True])
@pytest.mark.parametrize("adaptive", [0.0, 0.5, -2.0])
@pytest.mark.parametrize("iterations", [0, 3])
def test_noise_in_reference_order(random_strength: bool, adaptive: float, iterations: int) -> None:
    """The formulas of the reference, drawn from one generator in its order, in float64."""
    chosen = Settings(
        noise_offset=0.1,
        noise_offset_random_strength=random_strength,
        adaptive_noise_scale=adaptive,
        multires_noise_iterations=iterations,
        multires_noise_discount=0.4,
        ip_noise_gamma=0.2,
        ip_noise_gamma_random_strength=random_strength,
    )
    clean = latents(2, 16, 24)
    result = Objective.build(chosen, "cpu").noise_latents(clean, [0, 1], 0, Replay(4))

    source = torch.Generator().manual_seed(4)
    noise = torch.randn(clean.shape, generator=source).double()
    strength: Any = 0.1
    if random_strength:
        strength = torch.rand(1, generator=source).double() * 0.1
    if adaptive:
        strength = strength + adaptive * clean.double().mean(dim=(2, 3), keepdim=True).abs()
        strength = strength.clamp(min=0)
    noise = noise + strength * torch.randn(2, 4, 1, 1, generator=source).double()
    if iterations:
        for level in range(iterations):
            factor = torch.rand(1, generator=source).item() * 2 + 2
            size = (max(1, int(16 / factor**level)), max(1, int(24 / factor**level)))
            coarse = torch.randn(2, 4, *size, generator=source).double()
            noise = noise + functional.interpolate(coarse, (16, 24), mode="bilinear") * 0.4**level
            if 1 in size:
                break
        noise = noise / noise.std()
    timesteps = torch.randint(0, 1000, (2,), generator=source)
    gamma: Any = torch.rand(1, generator=source).double() * 0.2 if random_strength else 0.2
    perturbed = noise + gamma * torch.randn(clean.shape, generator=source).double()
    abar = scheduler().alphas_cumprod.double()[timesteps].view(-1, 1, 1, 1)

    assert result.timesteps_B.tolist() == timesteps.tolist()
    torch.testing.assert_close(result.target_BCHW.double(), noise, rtol=1e-5, atol=1e-6)
    expected = abar.sqrt() * clean.double() + (1 - abar).sqrt() * perturbed
    torch.testing.assert_close(result.noisy_BCHW.double(), expected, rtol=1e-5, atol=1e-6)


def test_offset_shifts_whole_channels() -> None:
    """An offset of strength 0.5 adds 0.25 to the variance of each channel's mean, and nothing else."""
    plain, offset = (
        Objective.build(Settings(noise_offset=o), "cpu")
        .noise_latents(torch.zeros(400, 4, 8, 8), list(range(400)), 0, Draws(2))
        .noise_BCHW
        for o in (0.0, 0.5)
    )
    shift = offset - plain
    assert float(shift.std(dim=(2, 3)).max()) < 1e-6
    assert float(shift.mean(dim=(2, 3)).std()) == pytest.approx(0.5, rel=0.06)


def test_pyramid_stops_at_one_pixel_and_has_unit_deviation() -> None:
    calls: list[tuple[str, tuple[int, ...]]] = []

    class Spy(Draws):
        def normal(self, purpose: str, draw_ids: Any, shape: Any) -> Tensor:
            calls.append((purpose, tuple(shape)))
            return super().normal(purpose, draw_ids, shape)

    objective = Objective.build(Settings(multires_noise_iterations=10), "cpu")
    result = objective.noise_latents(latents(2), [0, 1], 0, Spy(3))
    sizes = [shape for purpose, shape in calls if purpose.startswith("multires")]
    assert sizes[0] == (4, 8, 12)
    assert 1 in sizes[-1][1:]
    assert all(1 not in size[1:] for size in sizes[:-1])
    assert float(result.noise_BCHW.std()) == pytest.approx(1.0, abs=1e-5)


@pytest.mark.parametrize(
    ("low", "high", "allowed"),
    [(0, 1000, range(0, 1000)), (200, 300, range(200, 300)), (500, 500, [500]), (800, 600, [600])],
)
def test_timestep_bounds(low: int, high: int, allowed: Any) -> None:
    objective = Objective.build(Settings(min_timestep=low, max_timestep=high), "cpu")
    ids = list(range(500))
    found = objective.noise_on_cpu((1, 1, 1), ids, 0, Draws(0)).timesteps_B.tolist()
    assert set(found) <= set(allowed)
    if len(allowed) > 1:
        assert sum(found) / 500 == pytest.approx(sum(allowed) / len(allowed), rel=0.06)
    objective.noise_latents(torch.zeros(500, 1, 1, 1), ids, 0, Draws(0))


@pytest.mark.parametrize(
    "options",
    [
        {"min_timestep": 1000},
        {"max_timestep": 1001},
        {"min_timestep": -1},
        {"loss_type": "l3"},
        {"loss_type": "huber", "huber_schedule": "linear"},
        {"loss_type": "huber", "huber_c": -0.1},
    ],
)
def test_impossible_settings_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=next(iter(set(options) - {"loss_type"}), "loss_type")):
        Settings(**options).check()


def test_half_precision_latents() -> None:
    clean = latents()
    full = noised(Objective.build(Settings(v_prediction=True), "cpu"), clean.bfloat16().float())
    half = noised(Objective.build(Settings(v_prediction=True), "cpu"), clean.bfloat16())
    assert half.noisy_BCHW.dtype == torch.bfloat16
    assert half.target_BCHW.dtype == torch.float32
    torch.testing.assert_close(half.noise_BCHW, full.noise_BCHW.bfloat16(), rtol=0, atol=0)
    torch.testing.assert_close(half.noisy_BCHW.float(), full.noisy_BCHW, rtol=2e-2, atol=2e-2)


# --- loss ---


def test_elementwise_figures() -> None:
    error = torch.tensor([[[[1.0]]]])
    c = torch.tensor([0.1])
    found = {
        name: float(ddpm.elementwise_loss(error, torch.zeros_like(error), name, c))
        for name in ("l2", "l1", "huber", "smooth_l1")
    }
    assert found == pytest.approx({"l2": 1, "l1": 1, "huber": 0.180998, "smooth_l1": 1.809975}, abs=1e-6)


@pytest.mark.parametrize("loss_type", ["l2", "l1", "huber", "smooth_l1"])
@pytest.mark.parametrize("schedule", ["constant", "exponential", "snr"])
def test_loss_against_float64(loss_type: str, schedule: str) -> None:
    chosen = Settings(
        loss_type=loss_type, huber_schedule=schedule, huber_c=0.15, huber_scale=1.5, min_snr_gamma=5
    )
    objective = Objective.build(chosen, "cpu")
    result = noised(objective, latents())
    prediction = latents(seed=5)
    masks = torch.rand(3, 1, 64, 96, generator=torch.Generator().manual_seed(6))
    loss, each = objective.loss(prediction, result, batch(weights=[1.0, 0.5, 1.0], masks=masks))

    abar = scheduler().alphas_cumprod.double()
    expected = []
    for i, t in enumerate(result.timesteps_B.tolist()):
        error = prediction[i].double() - result.target_BCHW[i].double()
        c = {
            "constant": 0.15 * 1.5,
            "exponential": math.exp(math.log(0.15) * t / 1000) * 1.5,
            "snr": (1 - 0.15) / (1 + math.sqrt((1 - abar[t]) / abar[t])) ** 2 + 0.15,
        }[schedule]
        per_element = {
            "l2": error**2,
            "l1": error.abs(),
            "huber": 2 * c * ((error**2 + c**2).sqrt() - c),
            "smooth_l1": 2 * ((error**2 + c**2).sqrt() - c),
        }[loss_type]
        mask = masks[i].double().reshape(1, 8, 8, 12, 8).mean(dim=(2, 4))  # area: mean of 8x8 pixels
        ratio = float(abar[t] / (1 - abar[t]))
        weight = [1.0, 0.5, 1.0][i] * min(ratio, 5) / ratio
        expected.append(float((per_element * mask).mean()) * weight)
    assert each.tolist() == pytest.approx(expected, rel=1e-5)
    assert float(loss) == pytest.approx(sum(expected) / 3, rel=1e-5)


def test_loss_without_mask_is_the_mean_square() -> None:
    objective = Objective.build(Settings(), "cpu")
    result = noised(objective, latents())
    prediction = latents(seed=5).requires_grad_()
    loss, each = objective.loss(prediction, result, batch())
    judge = functional.mse_loss(prediction, result.target_BCHW)
    torch.testing.assert_close(loss, judge)
    (grad,) = torch.autograd.grad(loss, prediction)
    (expected,) = torch.autograd.grad(judge, prediction)
    torch.testing.assert_close(grad, expected)
    assert not each.requires_grad


def test_half_precision_prediction_is_judged_in_float32() -> None:
    objective = Objective.build(Settings(), "cpu")
    result = noised(objective, latents())
    loss, _ = objective.loss(result.target_BCHW.bfloat16(), result, batch())
    rounding = (result.target_BCHW.bfloat16().float() - result.target_BCHW).double()
    assert loss.dtype == torch.float32
    assert float(loss) == pytest.approx(float((rounding**2).mean()), rel=1e-5)


@pytest.mark.gpu
def test_step_on_the_gpu_never_waits() -> None:
    """Noising and loss issue no device-to-host copy; the result is that of the CPU."""
    chosen = Settings(
        noise_offset=0.1,
        adaptive_noise_scale=0.1,
        multires_noise_iterations=3,
        ip_noise_gamma=0.1,
        loss_type="huber",
        min_snr_gamma=5,
    )
    clean, prediction = latents(), latents(seed=5)
    here, there = Objective.build(chosen, "cpu"), Objective.build(chosen, "cuda")
    clean_gpu, prediction_gpu = clean.cuda(), prediction.cuda()
    given = batch()
    given_gpu = replace(given, loss_weights_B=given.loss_weights_B.pin_memory())
    torch.cuda.set_sync_debug_mode("error")
    try:
        result = noised(there, clean_gpu)
        loss, _ = there.loss(prediction_gpu, result, given_gpu)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    expected, _ = here.loss(prediction, noised(here, clean), given)
    assert float(loss) == pytest.approx(float(expected), rel=1e-5)
