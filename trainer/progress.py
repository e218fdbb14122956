"""What a run reports while it trains: losses without waiting for the device, and TensorBoard."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

__all__ = ["LossRecorder", "Pending", "Scalars"]


class LossRecorder:
    """avr_loss: mean loss over the last epoch's worth of micro-batches.

    In the first epoch a growing mean; from then on each new loss takes the place of the one at the
    same position of the epoch before (sd-scripts, train_util.py:LossRecorder).

    Args:
        length: Micro-batches in an epoch.
        losses: Where a resumed run left off.
    """

    def __init__(self, length: int, losses: Sequence[float] = ()) -> None:
        self.length = length
        self.losses = list(losses)[:length]
        self._sum = sum(self.losses)

    def add(self, index: int, loss: float) -> None:
        """Record the loss of the micro-batch at ``index`` of its epoch."""
        index = min(index, len(self.losses))
        if index == len(self.losses) and len(self.losses) < self.length:
            self.losses.append(loss)
        else:
            index %= len(self.losses)
            self._sum -= self.losses[index]
            self.losses[index] = loss
        self._sum += loss

    @property
    def average(self) -> float:
        """Mean of what is recorded; 0 before the first loss."""
        return self._sum / len(self.losses) if self.losses else 0.0


@dataclass
class Pending:
    """A step whose numbers are still on the device."""

    step: int
    epoch: int
    first_micro_in_epoch: int
    losses: list[Tensor]
    """0-d, one for each micro-batch."""
    lr: Mapping[str, float]
    done_at: float = field(default_factory=time.perf_counter)
    extra: Mapping[str, Tensor | float] = field(default_factory=dict)


def fetch(pending: Sequence[Pending]) -> list[list[float]]:
    """Losses of several steps in one transfer (the only device sync of the reporting)."""
    flat = [loss for item in pending for loss in item.losses]
    if not flat:
        return []
    values = torch.stack(flat).tolist()
    result = []
    for item in pending:
        result.append(values[: len(item.losses)])
        values = values[len(item.losses) :]
    return result


class Scalars:
    """TensorBoard scalars under Kohya's tags (engine facts 11.2).

    Args:
        folder: Where the event file goes, or None to write nothing.
    """

    def __init__(self, folder: Path | None) -> None:
        self.folder = folder
        self._writer: SummaryWriter | None = None
        if folder is not None:
            from torch.utils.tensorboard import SummaryWriter

            self._writer = SummaryWriter(str(folder))

    def step(self, step: int, losses: Sequence[float], average: float, values: Mapping[str, float]) -> None:
        """Scalars of one optimizer update."""
        if self._writer is None:
            return
        for loss in losses:
            self._writer.add_scalar("loss/current", loss, step)
        self._writer.add_scalar("loss/average", average, step)
        for tag, value in values.items():
            self._writer.add_scalar(tag, value, step)

    def epoch(self, epoch: int, average: float) -> None:
        """The mean loss of an epoch (from 1)."""
        if self._writer is not None:
            self._writer.add_scalar("loss/epoch_average", average, epoch)

    def flush(self) -> None:
        """Bring what was written to disk."""
        if self._writer is not None:
            self._writer.flush()

    def close(self) -> None:
        """Close the event file."""
        if self._writer is not None:
            self._writer.close()
