"""Any other optimizer: a class of torch.optim, or a dotted path into a package that is allowed."""

from __future__ import annotations

import difflib
import os
from collections.abc import Iterable

from trainer.errors import ConfigError
from trainer.optimizers._base import Recipe

__all__ = ["ALLOW", "PACKAGES", "recipe_for"]

PACKAGES = (
    "bitsandbytes.optim",
    "came_pytorch",
    "dadaptation",
    "lion_pytorch",
    "prodigyopt",
    "prodigyplus",
    "pytorch_optimizer",
    "schedulefree",
    "torch.optim",
    "transformers.optimization",
)
"""Modules whose optimizers a configuration may name; what lies below them is included."""

ALLOW = "LORA_KILN_OPTIMIZERS"
"""Environment variable with which the owner of the machine allows more modules, separated by commas."""

_WRAPPERS = "it wraps another optimizer, which a configuration cannot give it"
_TWICE = "it needs the loss computed again within a step"
_MODEL = "it wants the whole model and not the parameters of a LoRA"
_SECOND_ORDER = "it needs second derivatives, which a training step does not compute"
_GROUP = "it only works on several devices"

REFUSED: dict[str, str] = {
    "torch.optim.LBFGS": _TWICE,
    "torch.optim.SparseAdam": "it only takes sparse gradients, and those of a LoRA are dense",
    **{
        f"pytorch_optimizer.{name}": reason
        for reason, names in {
            _WRAPPERS: (
                "Lookahead", "Magma", "OrthoGrad", "PCGrad", "SafeFP16Optimizer", "ScheduleFreeWrapper", "TRAC",
            ),
            _TWICE: ("AliG", "BSAM", "FriendlySAM", "GSAM", "LBFGS", "LookSAM", "SAM", "WSAM"),
            _MODEL: ("AdaLOMO", "AdamMini", "LOMO"),
            _SECOND_ORDER: ("AdaHessian", "SophiaH"),
            _GROUP: ("DeMo", "DistributedMuon"),
        }.items()
        for name in names
    },
}  # fmt: skip
"""Optimizers that a plain training step cannot drive, and why."""

NEAREST = {
    "bitsandbytes.optim.AdEMAMix32bit": "bitsandbytes.optim.AdEMAMix",
    "bitsandbytes.optim.PagedAdEMAMix32bit": "bitsandbytes.optim.PagedAdEMAMix",
    "bitsandbytes.optim.AdEMAMix8bit": "pytorch_optimizer.AdEMAMix",
    "bitsandbytes.optim.PagedAdEMAMix8bit": "pytorch_optimizer.AdEMAMix",
    "prodigyplus.ProdigyPlusScheduleFree": "Prodigy",
    "pytorch_optimizer.CAME": "Adafactor",
    "came_pytorch.CAME": "Adafactor",
    "torch.optim.Muon": "pytorch_optimizer.Muon",
}

MUONS = frozenset(f"pytorch_optimizer.{name}" for name in ("AdaGO", "AdaMuon", "Muon", "NorMuon"))
"""Classes that ask of each group whether its parameters are matrices; those of a LoRA are."""


def recipe_for(name: str, known: Iterable[str]) -> Recipe:
    """A recipe for a class name or dotted path, as sd-scripts resolves it (case counts).

    Args:
        name: What the configuration says.
        known: Kohya's names, for a hint.

    Raises:
        ConfigError: The module is not allowed, or the class cannot be driven by a training step.
    """
    path = name if "." in name else f"torch.optim.{name}"
    module = path.rpartition(".")[0]
    allowed = (*PACKAGES, *(part.strip() for part in os.environ.get(ALLOW, "").split(",") if part.strip()))
    if "." not in name:
        import torch.optim

        if not hasattr(torch.optim, name):
            close = difflib.get_close_matches(name.lower(), [known_name.lower() for known_name in known], 1)
            spelled = {known_name.lower(): known_name for known_name in known}
            hint = f"did you mean {spelled[close[0]]}?" if close else "see the list of optimizers"
            raise ConfigError(f"optimizer {name!r} is not known: {hint} (or give module.Class)")
    if not any(module == entry or module.startswith(entry + ".") for entry in allowed):
        raise ConfigError(
            f"optimizer {name}: classes of {module} are not allowed here; allowed are those of "
            f"{', '.join(allowed)} (the environment variable {ALLOW} adds to them)"
        )
    if path in REFUSED:
        raise ConfigError(f"optimizer {name} cannot train a LoRA: {REFUSED[path]}; choose AdamW or Prodigy")
    return Recipe(
        name=name,
        path=path,
        equivalent=NEAREST.get(path, "AdamW"),
        group_options={"use_muon": True} if path in MUONS else {},
        schedule_free=name.lower().endswith("schedulefree"),
    )
