"""What an optimizer by a Kohya name is, and how any of them is built, checked, saved and resumed."""

from __future__ import annotations

import difflib
import importlib
import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from trainer.errors import ConfigError

if TYPE_CHECKING:
    from torch import Tensor, nn
    from torch.optim import Optimizer

    from trainer.networks._base import ParamGroup

__all__ = ["Built", "Recipe", "accepted_arguments", "build", "load_class"]


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How one Kohya name becomes an optimizer. Libraries are imported by `load_class` only."""

    name: str
    """As in Kohya's dropdown; compared without regard to case."""
    path: str
    """module.Class."""
    equivalent: str = "AdamW"
    """Nearest optimizer, offered where this one does not run."""
    fixed: Mapping[str, Any] = field(default_factory=dict)
    """Arguments that belong to the name and that nobody may set."""
    defaults: Mapping[str, Any] = field(default_factory=dict)
    """Arguments that are added, and recorded, unless optimizer_args has them."""
    group_options: Mapping[str, Any] = field(default_factory=dict)
    """Entries that the class wants in each parameter group."""
    schedule_free: bool = False
    """Takes the place of the learning-rate schedule."""

    def arguments(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """The arguments that are used, as they are recorded in the LoRA's metadata."""
        return {**given, **{name: value for name, value in self.defaults.items() if name not in given}}

    def finds_own_rate(self, arguments: Mapping[str, Any]) -> bool:
        """Whether the optimizer takes no learning rate and no schedule at all (Adafactor)."""
        return False

    @property
    def one_rate(self) -> bool:
        """Whether all groups must share one learning rate (D-Adaptation and Prodigy)."""
        name = self.path.rpartition(".")[2]
        return name == "Prodigy" or name.startswith("DAdapt")


def load_class(recipe: Recipe) -> type[Optimizer]:
    """Import the optimizer class of ``recipe``.

    Raises:
        ConfigError: The package is not installed, cannot be loaded, or has no such optimizer.
    """
    from torch.optim import Optimizer

    module_name, _, class_name = recipe.path.rpartition(".")
    package = module_name.partition(".")[0]
    try:
        module = importlib.import_module(module_name)
    except (ImportError, OSError, RuntimeError) as error:
        raise ConfigError(
            f"optimizer {recipe.name} needs {module_name}, which cannot be loaded here ({error}): "
            f"install the package {package.replace('_', '-')}, or choose {recipe.equivalent}, the nearest "
            "equivalent"
        ) from error
    found = getattr(module, class_name, None)
    if not isinstance(found, type) or not issubclass(found, Optimizer) or found is Optimizer:
        names = sorted(name for name, value in vars(module).items() if _is_optimizer(value))
        close = difflib.get_close_matches(class_name, names, 5, 0.4) or names[:10]
        raise ConfigError(
            f"optimizer {recipe.name}: {module_name} has no optimizer {class_name!r}; it has "
            f"{', '.join(close) or 'none'}{' and others' if len(close) < len(names) else ''}"
        )
    return found


def _is_optimizer(value: object) -> bool:
    from torch.optim import Optimizer

    return isinstance(value, type) and issubclass(value, Optimizer) and value is not Optimizer


def accepted_arguments(optimizer_class: type[Optimizer]) -> dict[str, bool]:
    """Names that the constructor takes beside parameters and rate, and whether each must be given."""
    accepted = {}
    for name, parameter in inspect.signature(optimizer_class).parameters.items():
        variadic = parameter.kind in (parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL)
        if name not in ("params", "lr") and not variadic:
            accepted[name] = parameter.default is parameter.empty
    return accepted


def _check_arguments(recipe: Recipe, optimizer_class: type[Optimizer], used: Mapping[str, Any]) -> None:
    accepted = accepted_arguments(optimizer_class)
    for name in used:
        if name == "lr":
            raise ConfigError(
                "optimizer_args: lr is not set here but in learning_rate, unet_lr, text_encoder_lr"
            )
        if name in recipe.fixed:
            raise ConfigError(
                f"optimizer_args: {name} cannot be set, {recipe.name} always has {recipe.fixed[name]}"
            )
        if name not in accepted:
            raise ConfigError(
                f"optimizer_args: {optimizer_class.__name__} has no option {name!r}; it has "
                f"{', '.join(sorted(set(accepted) - set(recipe.fixed)))}"
            )
    for name, needed in accepted.items():
        if needed and name not in used and name not in recipe.fixed:
            raise ConfigError(
                f"optimizer {recipe.name} needs {name}: add {name}=VALUE to optimizer_args, or choose "
                f"{recipe.equivalent}"
            )


def build(
    recipe: Recipe, groups: Sequence[ParamGroup], given: Mapping[str, Any], learning_rate: float
) -> Built:
    """Make the optimizer for ``groups``.

    Args:
        recipe: Which one.
        groups: Parameters and their rates, none of them 0.
        given: optimizer_args.
        learning_rate: The optimizer's own default rate, which some schedules are measured by.

    Raises:
        ConfigError: The class is not there, or refuses the arguments.
    """
    optimizer_class = load_class(recipe)
    used = recipe.arguments(given)
    _check_arguments(recipe, optimizer_class, used)
    own_rate = recipe.finds_own_rate(used)
    entries: list[dict[str, Any]] = []
    for group in groups:
        entry: dict[str, Any] = {"params": list(group.params), **recipe.group_options}
        if not own_rate:
            entry["lr"] = groups[0].lr if recipe.one_rate else group.lr
        entries.append(entry)
    rate: dict[str, Any] = {"lr": None if own_rate else learning_rate}
    try:
        optimizer = optimizer_class(entries, **rate, **recipe.fixed, **used)
    except Exception as error:
        raise ConfigError(
            f"optimizer {recipe.name} cannot be made with {_listed(used) or 'its defaults'}: "
            f"{str(error) or type(error).__name__}{'' if given else f'; choose {recipe.equivalent}'}"
        ) from error
    if getattr(optimizer, "is_paged", False) and all(
        parameter.device.type == "cpu" for group in groups for parameter in group.params
    ):
        # bitsandbytes pages from GPU to host memory: on a CPU there is nothing to page, as it warns.
        optimizer.is_paged = False  # type: ignore[attr-defined]
    built = Built(
        optimizer=optimizer,
        description=f"{optimizer_class.__module__}.{optimizer_class.__name__}"
        + (f"({_listed(used)})" if used else ""),
        names=tuple(group.name for group in groups),
        schedule_free=recipe.schedule_free,
        finds_own_rate=own_rate,
    )
    built.train()
    return built


def _listed(arguments: Mapping[str, Any]) -> str:
    return ",".join(f"{name}={value}" for name, value in arguments.items())


class Built:
    """An optimizer at work.

    Attributes:
        optimizer: What the loop steps; may be replaced by a wrapper around it (accelerate's).
        inner: The optimizer itself.
        description: module.Class(k=v,...), as recorded in ss_optimizer.
        names: Names of the parameter groups, for logs.
        schedule_free: No learning-rate schedule runs beside it.
        finds_own_rate: It has no learning rate of its own to schedule (Adafactor with relative_step).
    """

    def __init__(
        self,
        *,
        optimizer: Optimizer,
        description: str,
        names: tuple[str, ...],
        schedule_free: bool = False,
        finds_own_rate: bool = False,
    ) -> None:
        self.optimizer = optimizer
        self.inner = optimizer
        self.description = description
        self.names = names
        self.schedule_free = schedule_free
        self.finds_own_rate = finds_own_rate
        self._trained: list[Tensor] | None = None

    def train(self) -> None:
        """Weights as they are trained. Optimizers that keep averaged weights start in this mode.

        After `eval`, the weights come back to the last bit (the libraries compute them back, with
        rounding), so that sampling and saving change nothing in the training.
        """
        if not self._has_modes():
            return
        self.inner.train()  # type: ignore[attr-defined]
        if self._trained is not None:
            import torch

            with torch.no_grad():
                for parameter, trained in zip(self._parameters(), self._trained, strict=True):
                    parameter.copy_(trained)
            self._trained = None

    def eval(self) -> None:
        """Weights as they are sampled and saved: schedule-free optimizers put their average there."""
        if not self._has_modes() or self._trained is not None:
            return
        self._trained = [parameter.detach().clone() for parameter in self._parameters()]
        self.inner.eval()  # type: ignore[attr-defined]

    def scalars(self) -> dict[str, Tensor | float]:
        """The effective rates that D-Adaptation and Prodigy have found, under Kohya's tags; no sync."""
        groups = self.inner.param_groups
        if type(self.inner).__name__ == "ProdigyPlusScheduleFree":
            return {"lr/d*lr": groups[0]["d"] * groups[0]["lr"]}
        return {
            f"lr/d*lr/{name}": group["d"] * group["lr"]
            for name, group in zip(self.names, groups, strict=True)
            if "d" in group
        }

    def state_dict(self) -> dict[str, Any]:
        """Everything that a resumed run needs, in the form of torch (sd-scripts: optimizer.bin).

        Raises:
            RuntimeError: Called between `eval` and `train`, when the weights are not the trained ones.
        """
        if self._trained is not None:
            raise RuntimeError("the optimizer's state belongs to the trained weights: call train() first")
        return self.inner.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from `state_dict`, exactly: torch rounds states to the parameters' dtype, this does not.

        Raises:
            ValueError: The state is of other parameters.
            KeyError: It is no optimizer state.
        """
        self.inner.load_state_dict(dict(state))
        saved = state["state"]
        for index, parameter in enumerate(self._parameters()):
            mine = self.inner.state.get(parameter)
            if mine is not None and index in saved:
                _restore_precision(mine, saved[index])

    def _has_modes(self) -> bool:
        return callable(getattr(self.inner, "train", None)) and callable(getattr(self.inner, "eval", None))

    def _parameters(self) -> list[nn.Parameter]:
        return [parameter for group in self.inner.param_groups for parameter in group["params"]]


def _restore_precision(mine: Any, saved: Any) -> None:
    """Put back tensors of ``saved`` that torch cast when it loaded them into the container ``mine``."""
    from torch import Tensor

    pairs = saved.items() if isinstance(saved, Mapping) else enumerate(saved)
    for key, value in pairs:
        if isinstance(mine, Mapping) and key not in mine:
            continue  # bitsandbytes unwraps one level on loading, and casts nothing in there
        if isinstance(value, Tensor) and isinstance(mine[key], Tensor):
            if mine[key].dtype != value.dtype:
                mine[key] = value.to(mine[key].device, copy=True)
        elif isinstance(value, (Mapping, list)):
            _restore_precision(mine[key], value)
