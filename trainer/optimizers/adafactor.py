"""Adafactor (Shazeer and Stern 2018, arXiv:1804.04235) with sd-scripts' rules about its own rate."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from trainer.optimizers._base import Recipe


@dataclass(frozen=True, kw_only=True)
class _Adafactor(Recipe):
    def arguments(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """relative_step is on unless it is given; warmup_init turns it on in any case."""
        used = super().arguments(given)
        if used.get("warmup_init"):
            used["relative_step"] = True
        return used

    def finds_own_rate(self, arguments: Mapping[str, Any]) -> bool:
        return bool(arguments["relative_step"])


RECIPES = (
    _Adafactor(
        name="Adafactor", path="transformers.optimization.Adafactor", defaults={"relative_step": True}
    ),
)
