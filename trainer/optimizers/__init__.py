"""Optimizers by Kohya names.

Each file of this folder without a leading underscore holds `RECIPES`; a new optimizer is one new
entry or one new file. Any other class can be named by its path (`_any_class`). Libraries are imported
when an optimizer is checked or made, not before.

A Kohya name is compared without regard to case; a class name or path is not (sd-scripts
train_util.py:get_optimizer).
"""

from __future__ import annotations

import importlib
import io
import math
import pkgutil
from collections.abc import Sequence
from functools import cache
from typing import TYPE_CHECKING

from trainer.errors import ConfigError
from trainer.optimizers import _any_class
from trainer.optimizers._base import Built, Recipe, build

if TYPE_CHECKING:
    import torch

    from trainer.job import Job, Note
    from trainer.networks._base import ParamGroup

__all__ = ["Built", "check", "create", "default_rate", "names", "notes", "problems", "recipe_for"]

DEFAULT_RATE = 2e-6  # sd-scripts' own learning_rate, used where Kohya's page drops a 0


@cache
def _recipes() -> dict[str, Recipe]:
    found: dict[str, Recipe] = {}
    for module in pkgutil.iter_modules(__path__):
        if not module.name.startswith("_"):
            for recipe in importlib.import_module(f"{__name__}.{module.name}").RECIPES:
                found[recipe.name.lower()] = recipe
    return found


def names() -> list[str]:
    """Kohya's optimizer names that have a file here, sorted."""
    return sorted((recipe.name for recipe in _recipes().values()), key=str.lower)


def recipe_for(name: str) -> Recipe:
    """The recipe for a value of the ``optimizer`` field; "" means AdamW.

    Raises:
        ConfigError: No such optimizer, or one of a module that is not allowed.
    """
    name = name.strip() or "AdamW"
    return _recipes().get(name.lower()) or _any_class.recipe_for(name, names())


def default_rate(job: Job) -> float:
    """The optimizer's own default rate: learning_rate, or sd-scripts' default where it is 0."""
    return float(job.config.learning_rate) or DEFAULT_RATE


def create(job: Job, groups: Sequence[ParamGroup]) -> Built:
    """The optimizer of ``job`` over ``groups``.

    Raises:
        ConfigError: It cannot be had, or refuses its arguments.
    """
    return build(recipe_for(job.config.optimizer), groups, job.optimizer_args, default_rate(job))


def check(job: Job, device: torch.device) -> None:
    """Make sure, before a model is loaded, that the optimizer exists and works on ``device``.

    Raises:
        ConfigError: It does not; the message names the nearest equivalent. Nothing is swapped.
    """
    for problem in problems(job, device):
        raise ConfigError(problem)


def problems(job: Job, device: torch.device) -> list[str]:
    """What keeps the optimizer from training ``job`` on ``device``, as sentences.

    The optimizer makes two steps on small parameters of a LoRA's shapes, and its state goes through
    a file: that finds missing libraries, kernels and options alike.
    """
    try:
        recipe = recipe_for(job.config.optimizer)
        _try_out(job, recipe, device)
    except ConfigError as error:
        return [str(error)]
    return []


def _try_out(job: Job, recipe: Recipe, device: torch.device) -> None:
    import torch

    from trainer.draws import aside
    from trainer.networks._base import ParamGroup

    # 2-D layers throughout; SD 1.x and LoCon wrap convolutions too. Large enough for 8-bit states.
    shapes: list[tuple[int, ...]] = [(8, 640), (640, 8)]
    if (job.family == "sd" and not job.config.v2) or job.config.LoRA_type != "Standard":
        shapes += [(8, 640, 1, 1), (640, 8, 1, 1)]
    dtype = torch.float32
    if job.config.full_fp16 or job.config.full_bf16:
        dtype = torch.float16 if job.config.full_fp16 else torch.bfloat16
    generator = torch.Generator().manual_seed(0)

    def small(shape: tuple[int, ...]) -> torch.Tensor:
        return (torch.randn(shape, generator=generator) * 0.01).to(device, dtype)

    rates = {"textencoder": job.text_encoder_lr, "unet": job.unet_lr}
    with aside(*[device] * (device.type == "cuda")):
        groups = [
            ParamGroup(name, [torch.nn.Parameter(small(shape)) for shape in shapes], rate)
            for name, rate in rates.items()
            if rate
        ]
        built = build(recipe, groups, job.optimizer_args, default_rate(job))
        try:
            for _ in range(2):
                for group in groups:
                    for parameter in group.params:
                        parameter.grad = small(tuple(parameter.shape))
                built.optimizer.step()
                built.optimizer.zero_grad(set_to_none=True)
        except Exception as error:
            raise ConfigError(
                f"optimizer {recipe.name} does not work on {_spoken(device)} "
                f"({str(error) or type(error).__name__}): choose {recipe.equivalent}, the nearest equivalent"
            ) from error
        stored = io.BytesIO()
        try:
            torch.save(built.state_dict(), stored)
            stored.seek(0)
            torch.load(stored, weights_only=True, map_location="cpu")
        except Exception as error:
            raise ConfigError(
                f"optimizer {recipe.name} keeps Python objects in its state, which no state folder may "
                f"hold, so that its run could not be resumed: choose {recipe.equivalent}"
            ) from error


def _spoken(device: torch.device) -> str:
    return "this CPU" if device.type == "cpu" else f"this device ({device})"


def notes(job: Job) -> list[Note]:
    """Effective values that the choice of optimizer changes, and advice; no library is imported.

    Raises:
        ConfigError: No such optimizer.
    """
    from trainer.job import Note

    config, recipe = job.config, recipe_for(job.config.optimizer)
    found: list[Note] = []
    used = recipe.arguments(job.optimizer_args)
    rates = [rate for rate in (job.text_encoder_lr, job.unet_lr) if rate]
    if recipe.one_rate and rates:
        if rates[0] <= 0.1:
            found.append(
                Note(
                    "learning_rate",
                    rates[0],
                    rates[0],
                    f"{rates[0]:g} is low: {recipe.name} scales the rate by itself and is meant for 1",
                )
            )
        if len(set(rates)) > 1:
            found.append(
                Note(
                    "unet_lr",
                    job.unet_lr,
                    rates[0],
                    f"{recipe.name} knows one rate: that of the first group counts for all",
                )
            )
    if recipe.finds_own_rate(used):
        found.append(
            Note(
                "lr_scheduler",
                config.lr_scheduler,
                f"adafactor:{default_rate(job):g}",
                "with relative_step Adafactor sets its rate by itself; unet_lr and text_encoder_lr have no "
                "effect (optimizer_args relative_step=False brings them back)",
            )
        )
    elif recipe.path.endswith("Adafactor") and "relative_step" in used:
        if config.max_grad_norm:
            found.append(
                Note(
                    "max_grad_norm",
                    config.max_grad_norm,
                    config.max_grad_norm,
                    "Adafactor clips by itself (clip_threshold): --max_grad_norm 0 is advised",
                )
            )
        if config.lr_scheduler != "constant_with_warmup":
            found.append(
                Note(
                    "lr_scheduler",
                    config.lr_scheduler,
                    config.lr_scheduler,
                    "with relative_step=False Adafactor goes best with constant_with_warmup",
                )
            )
        if not math.isclose(used.get("clip_threshold", 1.0), 1.0):
            found.append(
                Note("optimizer_args", "clip_threshold", "clip_threshold", "1.0 is advised for Adafactor")
            )
    if recipe.schedule_free:
        found.append(
            Note("lr_scheduler", config.lr_scheduler, "none", f"{recipe.name} takes the place of a schedule")
        )
    return found
