"""Every schedule of Kohya's list against its formula, written out by hand; resuming; refusals."""

from __future__ import annotations

import io
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from trainer import optimizers, schedules
from trainer.config import KohyaConfig
from trainer.errors import ConfigError
from trainer.job import Job
from trainer.networks._base import ParamGroup
from trainer.optimizers import Built
from trainer.plan import Plan
from trainer.schedules import Schedule

N, W, L = 40, 10, 1e-3
TE, UNET = 5e-5, 1e-4


def job(lr_scheduler: str, more: str = "", **fields: Any) -> Job:
    config = KohyaConfig(
        lr_scheduler=lr_scheduler,
        additional_parameters=more,
        output_dir="out",
        pretrained_model_name_or_path="base",
        train_data_dir="pictures",
        **{"optimizer": "AdamW", "learning_rate": L, "text_encoder_lr": TE, "unet_lr": UNET, **fields},
    )
    return Job.from_config(config)


def plan(steps: int = N, warmup: int = 0) -> Plan:
    return Plan(
        batches_per_epoch=steps,
        updates_per_epoch=steps,
        max_train_steps=steps,
        epochs=1,
        warmup_steps=warmup,
        save_every_n_epochs=0,
        arithmetic=(),
    )


def make(of: Job, how: Plan) -> tuple[Built, Schedule]:
    source = torch.Generator().manual_seed(0)
    groups = [
        ParamGroup(name, [nn.Parameter(torch.randn(8, 4, generator=source))], rate)
        for name, rate in (("textencoder", of.text_encoder_lr), ("unet", of.unet_lr))
    ]
    built = optimizers.create(of, groups)
    return built, schedules.create(of, built, how)


def advance(built: Built, schedule: Schedule, steps: int = 1) -> None:
    for _ in range(steps):
        for group in built.inner.param_groups:
            for parameter in group["params"]:
                parameter.grad = torch.ones_like(parameter)
        built.optimizer.step()
        schedule.step()
        built.optimizer.zero_grad(set_to_none=True)


def factors(of: Job, how: Plan, steps: int = N) -> list[float]:
    """Factor at step 0 .. steps; both groups must follow it."""
    built, schedule = make(of, how)
    found = []
    for step in range(steps + 1):
        rates = schedule.rates()
        found.append(rates["unet"] / UNET)
        assert rates["textencoder"] == pytest.approx(found[-1] * TE)
        assert [g["lr"] for g in built.inner.param_groups] == list(rates.values())
        if step < steps:
            advance(built, schedule)
    return found


def p(step: int, warmup: int = W) -> float:
    return (step - warmup) / (N - warmup)


def half_cosine(x: float) -> float:
    return 0.5 * (1 + math.cos(math.pi * x))


Curve = Callable[[int], float]
CASES: list[tuple[str, str, dict[str, Any], int, Curve]] = [
    ("constant", "", {}, 0, lambda s: 1.0),
    ("constant_with_warmup", "", {}, W, lambda s: 1.0),
    ("linear", "", {}, W, lambda s: 1 - p(s)),
    ("linear", "", {}, 0, lambda s: 1 - p(s, 0)),
    ("cosine", "", {}, W, lambda s: half_cosine(p(s))),
    ("cosine", "", {"lr_scheduler_num_cycles": 3}, W, lambda s: half_cosine(p(s))),  # cycles ignored
    (
        "cosine_with_restarts",
        "",
        {"lr_scheduler_num_cycles": 3},
        W,
        lambda s: 0.0 if p(s) >= 1 else half_cosine(math.modf(3 * p(s))[0]),
    ),
    (
        "polynomial",
        "",
        {"lr_scheduler_power": 2.0},
        W,
        lambda s: ((L - 1e-7) * (1 - p(s)) ** 2 + 1e-7) / L,
    ),
    ("polynomial", "", {}, 0, lambda s: ((L - 1e-7) * (1 - p(s, 0)) + 1e-7) / L),
    ("inverse_sqrt", "", {}, W, lambda s: 1 / math.sqrt((s + W - W) / W)),
    ("inverse_sqrt", "", {}, 0, lambda s: 1 / math.sqrt((s + 10000) / 10000)),
    ("inverse_sqrt", "--lr_scheduler_timescale 50", {}, W, lambda s: 1 / math.sqrt((s + 50 - W) / 50)),
    (
        "cosine_with_min_lr",
        "--lr_scheduler_min_lr_ratio 0.2",
        {},
        W,
        lambda s: 0.8 * half_cosine(p(s)) + 0.2,
    ),
    (
        "cosine_with_min_lr",
        "",
        {"lr_scheduler_args": "min_lr=1e-4", "lr_scheduler_num_cycles": 2},
        0,
        lambda s: 0.9 * half_cosine(2 * p(s, 0)) + 0.1,  # min_lr over the default rate L
    ),
    ("warmup_stable_decay", "", {}, W, lambda s: 1.0 if s < N else 0.0),
    (
        "warmup_stable_decay",
        "--lr_decay_steps 12",
        {},
        W,
        lambda s: 1.0 if s < 28 else half_cosine((s - 28) / 12),
    ),
    (
        "warmup_stable_decay",
        "--lr_decay_steps 0.25 --lr_scheduler_min_lr_ratio 0.1",
        {"lr_scheduler_num_cycles": 1},
        0,
        lambda s: 1.0 if s < 30 else 0.9 * half_cosine((s - 30) / 10) + 0.1,
    ),
    (
        "piecewise_constant",
        "",
        {"lr_scheduler_args": "step_rules='1:10,0.1:20,0.01'"},
        0,
        lambda s: 1.0 if s < 10 else 0.1 if s < 20 else 0.01,
    ),
]


@pytest.mark.parametrize(("name", "more", "fields", "warmup", "curve"), CASES)
def test_curve_follows_its_formula(
    name: str, more: str, fields: dict[str, Any], warmup: int, curve: Curve
) -> None:
    made, how = job(name, more, **fields), plan(warmup=warmup)
    schedules.check(made, how)
    expected = [step / warmup if step < warmup else curve(step) for step in range(N + 1)]
    assert factors(made, how) == pytest.approx(expected, abs=1e-9)


def test_every_choice_of_the_page_is_here() -> None:
    assert {case[0] for case in CASES} | {"adafactor"} == set(schedules.NAMES)


@pytest.mark.parametrize(
    ("kind", "args", "curve"),
    [
        ("CosineAnnealingLR", "T_max=20 eta_min=0.0", lambda s: half_cosine(s / 20)),
        ("torch.optim.lr_scheduler.ExponentialLR", "gamma=0.9", lambda s: 0.9**s),
        (
            "MultiStepLR",
            "milestones=[5,15] gamma=0.5",
            lambda s: 1.0 if s < 5 else 0.5 if s < 15 else 0.25,
        ),
        ("CosineAnnealingWarmRestarts", "T_0=8", lambda s: half_cosine((s % 8) / 8)),
    ],
)
def test_custom_class_takes_the_place_of_the_named_schedule(kind: str, args: str, curve: Curve) -> None:
    made = job("cosine", lr_scheduler_type=kind, lr_scheduler_args=args)
    schedules.check(made, plan())
    assert factors(made, plan()) == pytest.approx([curve(step) for step in range(N + 1)], abs=1e-9)


@pytest.mark.parametrize(
    ("name", "more", "fields", "warmup", "says"),
    [
        ("constant", "", {}, 5, "constant has no warm-up.*constant_with_warmup"),
        ("cosinus", "", {}, 0, "'cosinus': allowed are adafactor, constant"),
        ("adafactor", "", {}, 0, "goes with optimizer Adafactor"),
        (
            "adafactor",
            "",
            {"optimizer": "Adafactor", "optimizer_args": "relative_step=False"},
            0,
            "goes with optimizer Adafactor and its relative_step",
        ),
        ("cosine", "", {"optimizer": "Adafactor"}, 5, "adafactor schedule has no warm-up"),
        (
            "cosine",
            "",
            {"optimizer": "Adafactor", "lr_scheduler_type": "ExponentialLR"},
            0,
            "relative_step=False",
        ),
        ("cosine_with_min_lr", "", {}, 0, "lr_scheduler_min_lr_ratio"),
        (
            "cosine_with_min_lr",
            "--lr_scheduler_min_lr_ratio 0.1",
            {"lr_scheduler_args": "min_lr=1e-6"},
            0,
            "Only one of min_lr",
        ),
        ("piecewise_constant", "", {}, 0, "step_rules"),
        ("piecewise_constant", "", {"lr_scheduler_args": "step_rules='a:b'"}, 0, "piecewise_constant"),
        ("cosine", "", {"lr_scheduler_args": "gamma=1"}, 0, "cosine has no option 'gamma'"),
        ("cosine", "", {"lr_scheduler_args": "num_warmup_steps=1"}, 0, "no option 'num_warmup_steps'"),
        ("polynomial", "", {"learning_rate": 1e-8}, 0, "lr_end"),
        ("polynomial", "", {}, N, "warm-up of 40 steps leaves none"),
        ("cosine", "", {"lr_scheduler_type": "ExponentialLR"}, 0, "gamma"),
        (
            "cosine",
            "",
            {"lr_scheduler_type": "ExponentialLR", "lr_scheduler_args": "gamma=1.0"},
            5,
            "has no warm-up",
        ),
        ("cosine", "", {"lr_scheduler_type": "ReduceLROnPlateau"}, 0, "ReduceLROnPlateau"),
        ("cosine", "", {"lr_scheduler_type": "os.path.join"}, 0, "not allowed"),
        ("cosine", "", {"lr_scheduler_type": "Nope"}, 0, "no schedule 'Nope'"),
        ("cosine", "", {"lr_scheduler_type": "torch.optim.lr_scheduler.partial"}, 0, "no schedule"),
    ],
)
def test_what_cannot_run_is_refused_before_training(
    name: str, more: str, fields: dict[str, Any], warmup: int, says: str
) -> None:
    with pytest.raises(ConfigError, match=says):
        schedules.check(job(name, more, **fields), plan(warmup=warmup))


RESUMED: list[tuple[str, dict[str, Any]]] = [
    *((case[0], {"more": case[1], **case[2]}) for case in CASES),
    ("cosine", {"lr_scheduler_type": "OneCycleLR", "lr_scheduler_args": "max_lr=0.01 total_steps=40"}),
    ("cosine", {"lr_scheduler_type": "MultiStepLR", "lr_scheduler_args": "milestones=[4,12]"}),
    ("cosine", {"lr_scheduler_type": "CyclicLR", "lr_scheduler_args": "base_lr=1e-5 max_lr=1e-3"}),
    ("cosine", {"optimizer": "Adafactor"}),
    ("cosine", {"optimizer": "AdamWScheduleFree"}),
    ("cosine", {"optimizer": "Prodigy"}),
]


@pytest.mark.parametrize(("name", "fields"), RESUMED)
def test_resumed_schedule_goes_on_where_it_stopped(name: str, fields: dict[str, Any]) -> None:
    made = job(name, **fields)
    built, schedule = make(made, plan())
    advance(built, schedule, 13)
    file = io.BytesIO()
    weights = [p.detach().clone() for g in built.inner.param_groups for p in g["params"]]
    torch.save([built.state_dict(), schedule.state_dict()], file)
    file.seek(0)
    optimizer_state, schedule_state = torch.load(file, weights_only=True)

    resumed, resumed_schedule = make(made, plan())
    resumed.load_state_dict(optimizer_state)
    resumed_schedule.load_state_dict(schedule_state)
    parameters = [p for g in resumed.inner.param_groups for p in g["params"]]
    with torch.no_grad():
        for parameter, weight in zip(parameters, weights, strict=True):
            parameter.copy_(weight)
    assert resumed_schedule.rates() == schedule.rates()
    for _ in range(12):
        advance(built, schedule)
        advance(resumed, resumed_schedule)
        assert resumed_schedule.rates() == schedule.rates()
    for group, again in zip(built.inner.param_groups, resumed.inner.param_groups, strict=True):
        for first, second in zip(group["params"], again["params"], strict=True):
            assert torch.equal(first, second)


def test_state_of_sd_scripts_is_taken() -> None:
    """scheduler.bin of accelerate is torch's own state dict, with entries of lambdas."""
    made = job("cosine")
    built, schedule = make(made, plan(warmup=W))
    advance(built, schedule, 7)
    assert schedule._scheduler is not None
    foreign = schedule._scheduler.state_dict()
    again, resumed = make(made, plan(warmup=W))
    resumed.load_state_dict(foreign)
    advance(built, schedule)
    advance(again, resumed)
    assert resumed.rates() == schedule.rates()
    with pytest.raises(KeyError):
        resumed.load_state_dict({"nothing": 1})


def test_adafactors_own_rate_is_logged() -> None:
    made = job("constant", optimizer="Adafactor", learning_rate=3e-3)
    built, schedule = make(made, plan())
    assert schedule.rates() == {"textencoder": 3e-3, "unet": 3e-3}
    before = [float(g["params"][0].detach().norm()) / math.sqrt(32) for g in built.inner.param_groups]
    advance(built, schedule, 1)
    # relative step: min(1e-2, 1/sqrt(1)) times the root mean square of the parameter before the step
    expected = [1e-2 * max(1e-3, rms) for rms in before]
    assert list(schedule.rates().values()) == pytest.approx(expected, rel=1e-5)


def test_adafactor_survives_a_group_without_gradient() -> None:
    made = job("constant", optimizer="Adafactor")
    built, schedule = make(made, plan())
    built.inner.param_groups[1]["params"][0].grad = torch.ones(8, 4)
    built.optimizer.step()
    schedule.step()
    assert schedule.rates()["textencoder"] == L
    assert schedule.rates()["unet"] != L


def test_schedule_free_optimizer_keeps_its_rate() -> None:
    made = job("cosine", optimizer="AdamWScheduleFree")
    schedules.check(made, plan(warmup=W))
    built, schedule = make(made, plan(warmup=W))
    advance(built, schedule, 20)
    assert schedule.rates() == {"textencoder": TE, "unet": UNET}


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_schedule_of_accelerates_wrapper(precision: str) -> None:
    """The loop hands accelerate's wrapper on: no warning about the order of steps, same rates."""
    from accelerate import Accelerator

    made = job("cosine", mixed_precision=precision)
    built, _ = make(made, plan())
    built.optimizer = Accelerator(cpu=True).prepare(built.optimizer)
    schedule = schedules.create(made, built, plan())
    advance(built, schedule, 10)
    assert schedule.rates()["unet"] == pytest.approx(UNET * half_cosine(10 / N))
