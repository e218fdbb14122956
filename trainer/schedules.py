"""Learning-rate schedules by Kohya names (sd-scripts train_util.py:get_scheduler_fix).

The curves are those of transformers and diffusers. A schedule makes one step for each optimizer
update; all group rates are multiplied by the same factor.
"""

from __future__ import annotations

import importlib
import inspect
import warnings
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from trainer import optimizers
from trainer.errors import ConfigError

if TYPE_CHECKING:
    from torch.optim import Optimizer
    from torch.optim.lr_scheduler import LRScheduler

    from trainer.job import Job
    from trainer.optimizers import Built
    from trainer.plan import Plan

__all__ = ["NAMES", "Schedule", "check", "create"]

NAMES = (
    "adafactor",
    "constant",
    "constant_with_warmup",
    "cosine",
    "cosine_with_min_lr",
    "cosine_with_restarts",
    "inverse_sqrt",
    "linear",
    "piecewise_constant",
    "polynomial",
    "warmup_stable_decay",
)

PACKAGES = (
    "torch.optim.lr_scheduler",
    "transformers.optimization",
    "diffusers.optimization",
    "pytorch_optimizer",
)
"""Modules whose classes lr_scheduler_type may name."""


class Schedule:
    """A schedule at work; also where the rates for the logs come from.

    Args:
        built: The optimizer.
        scheduler: None where the optimizer finds its rate by itself.
        initial_rate: What is logged for an optimizer with a rate of its own before its first step.
    """

    def __init__(self, built: Built, scheduler: LRScheduler | None, initial_rate: float = 0.0) -> None:
        self._built = built
        self._scheduler = scheduler
        self._own_rates = [initial_rate] * len(built.names) if built.finds_own_rate else None

    def rates(self) -> dict[str, float]:
        """The rate of each parameter group, by its name."""
        if self._own_rates is not None:
            rates = self._own_rates
        else:
            rates = [float(group["lr"]) for group in self._built.inner.param_groups]
        return dict(zip(self._built.names, rates, strict=True))

    def step(self) -> None:
        """After each optimizer update, except one that a gradient scaler skipped."""
        if self._scheduler is not None:
            self._scheduler.step()
        elif self._own_rates is not None:
            self._own_rates = self._read_rates(self._own_rates)

    def _read_rates(self, before: list[float]) -> list[float]:
        """What Adafactor used for the first parameter of each group (transformers: AdafactorSchedule).

        The library's own proxy fails as soon as one group has no gradient.
        """
        optimizer: Any = self._built.inner
        rates = list(before)
        for index, group in enumerate(optimizer.param_groups):
            state = optimizer.state.get(group["params"][0])
            if state:
                rates[index] = float(optimizer._get_lr(group, state))
        return rates

    def state_dict(self) -> dict[str, Any]:
        """What changes while it runs, as plain values; the rest follows from the configuration."""
        if self._scheduler is not None:
            return {name: value for name, value in vars(self._scheduler).items() if _is_plain(value)}
        return {} if self._own_rates is None else {"_last_lr": list(self._own_rates)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from `state_dict`, ours or torch's; the rates themselves are in the optimizer's state.

        Raises:
            KeyError: It is no state of a schedule.
        """
        if self._scheduler is not None:
            if "last_epoch" not in state:
                raise KeyError("last_epoch")
            mine = self.state_dict()
            vars(self._scheduler).update({name: value for name, value in state.items() if name in mine})
        elif self._own_rates is not None and len(state.get("_last_lr", ())) == len(self._own_rates):
            self._own_rates = [float(rate) for rate in state["_last_lr"]]


def _is_plain(value: Any) -> bool:
    if isinstance(value, (list, tuple)):
        return all(_is_plain(item) for item in value)
    if type(value) is dict:
        return all(_is_plain(key) and _is_plain(item) for key, item in value.items())
    return value is None or isinstance(value, (bool, int, float, str))


def create(job: Job, built: Built, plan: Plan) -> Schedule:
    """The schedule of ``job`` for its optimizer.

    Raises:
        ConfigError: No such schedule, wrong arguments, or a warm-up where there is none.
    """
    config = job.config
    name, kind = config.lr_scheduler.strip() or "constant", config.lr_scheduler_type.strip()
    warmup = plan.warmup_steps
    if built.schedule_free:
        return Schedule(built, None)
    if built.finds_own_rate:
        if kind:
            raise ConfigError(
                f"lr_scheduler_type {kind} needs a learning rate to schedule, and Adafactor with "
                "relative_step has none: add relative_step=False to optimizer_args"
            )
        _no_warmup("the adafactor schedule", warmup)
        return Schedule(built, None, initial_rate=optimizers.default_rate(job))
    if kind:
        _no_warmup(f"lr_scheduler_type {kind}", warmup)
        return Schedule(built, _made(kind, _custom_class(kind), built.optimizer, {}, job.lr_scheduler_args))
    if name == "adafactor":
        raise ConfigError(
            "lr_scheduler adafactor goes with optimizer Adafactor and its relative_step only: choose "
            "another lr_scheduler"
        )
    if name not in NAMES:
        raise ConfigError(f"lr_scheduler is {name!r}: allowed are {', '.join(NAMES)}")
    if name == "constant":
        _no_warmup("lr_scheduler constant", warmup, " or choose constant_with_warmup")
    if name == "cosine_with_min_lr" and not (
        job.engine.lr_scheduler_min_lr_ratio is not None
        or {"min_lr", "min_lr_rate"} & set(job.lr_scheduler_args)
    ):
        raise ConfigError(
            "lr_scheduler cosine_with_min_lr needs its lowest rate: min_lr=1e-6 in lr_scheduler_args, or "
            "--lr_scheduler_min_lr_ratio 0.1 in additional_parameters"
        )
    function, fixed = _curve(job, name, plan.max_train_steps, warmup)
    return Schedule(built, _made(name, function, built.optimizer, fixed, job.lr_scheduler_args))


def _no_warmup(what: str, warmup: int, otherwise: str = "") -> None:
    if warmup:
        raise ConfigError(
            f"{what} has no warm-up, and {warmup} warm-up steps are set: set lr_warmup and "
            f"lr_warmup_steps to 0{otherwise}"
        )


def _steps(value: float, total: int) -> int:
    """An option that is a number of steps from 1 on, and a share of the run below (sd-scripts)."""
    return int(value) if value >= 1 else int(value * total)


def _curve(job: Job, name: str, total: int, warmup: int) -> tuple[Callable[..., LRScheduler], dict[str, Any]]:
    """The library's function for a schedule, and what sd-scripts gives it (cosine: no num_cycles)."""
    from trainer.libraries import diffusers, transformers

    if name == "piecewise_constant":
        return diffusers.optimization.get_piecewise_constant_schedule, {}

    config, engine = job.config, job.engine
    cycles = config.lr_scheduler_num_cycles
    run = {"num_warmup_steps": warmup, "num_training_steps": total}
    decay = _steps(engine.lr_decay_steps, total)
    given: dict[str, dict[str, Any]] = {
        "constant": {},
        "constant_with_warmup": {"num_warmup_steps": warmup},
        "inverse_sqrt": {"num_warmup_steps": warmup, "timescale": engine.lr_scheduler_timescale},
        "linear": run,
        "cosine": run,
        "cosine_with_restarts": {**run, "num_cycles": cycles},
        "polynomial": {**run, "power": config.lr_scheduler_power},
        "cosine_with_min_lr": {
            **run,
            "num_cycles": cycles / 2,
            "min_lr_rate": engine.lr_scheduler_min_lr_ratio,
        },
        "warmup_stable_decay": {
            "num_warmup_steps": warmup,
            "num_stable_steps": total - warmup - decay,
            "num_decay_steps": decay,
            "num_cycles": cycles / 2,
            "min_lr_ratio": engine.lr_scheduler_min_lr_ratio or 0.0,
        },
    }
    known = transformers.optimization
    return known.TYPE_TO_SCHEDULER_FUNCTION[known.SchedulerType(name)], given[name]


def _custom_class(kind: str) -> type[LRScheduler]:
    from torch.optim.lr_scheduler import LRScheduler

    path = kind if "." in kind else f"torch.optim.lr_scheduler.{kind}"
    module_name, _, class_name = path.rpartition(".")
    if not any(module_name == entry or module_name.startswith(entry + ".") for entry in PACKAGES):
        raise ConfigError(
            f"lr_scheduler_type {kind}: classes of {module_name} are not allowed; allowed are those of "
            f"{', '.join(PACKAGES)}"
        )
    try:
        module = importlib.import_module(module_name)
    except ImportError as error:
        raise ConfigError(f"lr_scheduler_type {kind} cannot be loaded: {error}") from error
    found = getattr(module, class_name, None)
    if not isinstance(found, type) or not issubclass(found, LRScheduler) or found is LRScheduler:
        raise ConfigError(f"lr_scheduler_type {kind}: {module_name} has no schedule {class_name!r}")
    return found


def _made(
    name: str,
    function: Callable[..., LRScheduler],
    optimizer: Optimizer,
    fixed: Mapping[str, Any],
    given: Mapping[str, Any],
) -> LRScheduler:
    accepted = {
        key
        for key, parameter in inspect.signature(function).parameters.items()
        if key not in fixed and key != "optimizer" and parameter.kind is not parameter.VAR_KEYWORD
    }
    for key in given:
        if key not in accepted:
            raise ConfigError(
                f"lr_scheduler_args: {name} has no option {key!r}; it has "
                f"{', '.join(sorted(accepted)) or 'none'}"
            )
    try:
        return function(optimizer, **fixed, **given)
    except Exception as error:
        raise ConfigError(f"the schedule {name} cannot be made: {error}") from error


def check(job: Job, plan: Plan) -> None:
    """Make sure, before a model is loaded, that the schedule can run to the end.

    Raises:
        ConfigError: It cannot; the message says why.
    """
    import torch
    from torch.optim.lr_scheduler import LambdaLR

    recipe = optimizers.recipe_for(job.config.optimizer)
    parameter = torch.nn.Parameter(torch.zeros(1))
    stand_in = torch.optim.SGD([{"params": [parameter], "lr": 1.0}], lr=optimizers.default_rate(job))
    built = optimizers.Built(
        optimizer=stand_in,
        description="",
        names=("",),
        schedule_free=recipe.schedule_free,
        finds_own_rate=recipe.finds_own_rate(recipe.arguments(job.optimizer_args)),
    )
    schedule = create(job, built, plan)
    name = job.config.lr_scheduler_type or job.config.lr_scheduler
    try:
        if isinstance(schedule._scheduler, LambdaLR):
            for step in (plan.warmup_steps, plan.max_train_steps):
                schedule._scheduler.lr_lambdas[0](step)
        elif schedule._scheduler is not None:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                stand_in.step()
                schedule.step()
    except ZeroDivisionError as error:
        raise ConfigError(
            f"lr_scheduler {name}: the warm-up of {plan.warmup_steps} steps leaves none of the "
            f"{plan.max_train_steps} steps for the rest: set lr_warmup lower"
        ) from error
    except Exception as error:
        raise ConfigError(f"the schedule {name} cannot run: {error}") from error
