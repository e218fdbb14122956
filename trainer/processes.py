"""Processes that train one run together: which of them this one is, and what they agree on.

They are started by ``accelerate launch``, ``torchrun`` or a cluster's scheduler, which leave RANK and
WORLD_SIZE behind. The first process writes all files and the journal; the others train along.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, distributed

from trainer.controls import Controls
from trainer.errors import TrainerError
from trainer.job import Job

__all__ = ["PeerLostError", "Processes", "join"]

PATIENCE = timedelta(days=2)
"""How long the others wait for one that draws samples or saves. One that died is noticed at once."""


class PeerLostError(TrainerError):
    """Another process of the run ended or cannot be reached."""


@dataclass(frozen=True)
class Processes:
    """This process among those that train a run. By default it is alone."""

    index: int = 0
    count: int = 1
    group: Any = None
    """Those that agree over the network without waiting for the devices; None where that is the usual group."""

    @property
    def is_first(self) -> bool:
        """Whether this one writes the files."""
        return self.index == 0

    def agree(self, controls: Controls) -> tuple[bool, bool, bool]:
        """Whether any process was asked to stop, to save, to draw samples: the same answer in all of them.

        Raises:
            PeerLostError: One of them is gone.
        """
        asked = [controls.stop.is_set(), controls.save.is_set(), controls.sample.is_set()]
        if self.count > 1:
            flags = torch.tensor(asked, dtype=torch.int32)
            with _reaching():
                distributed.all_reduce(flags, op=distributed.ReduceOp.MAX, group=self.group)
            asked = [bool(flag) for flag in flags.tolist()]
        return asked[0], asked[1], asked[2]

    def average(self, tensors: Sequence[Tensor]) -> None:
        """Replace each tensor by its mean over all processes, in one transfer for each dtype.

        Raises:
            PeerLostError: One of them is gone.
        """
        for dtype in dict.fromkeys(tensor.dtype for tensor in tensors):
            some = [tensor for tensor in tensors if tensor.dtype == dtype]
            flat = torch.cat([tensor.reshape(-1) for tensor in some])
            flat.div_(self.count)  # before the sum, which half precision might not hold
            with _reaching():
                distributed.all_reduce(flat)
            for tensor, part in zip(
                some, torch.split(flat, [tensor.numel() for tensor in some]), strict=True
            ):
                tensor.copy_(part.view_as(tensor))

    @contextlib.contextmanager
    def one_of_each_machine_first(self) -> Iterator[None]:
        """One process of each machine does it before the others, which then find the files that it wrote.

        Raises:
            PeerLostError: One of them is gone.
        """
        goes_first = int(os.environ.get("LOCAL_RANK", "0")) == 0
        if not goes_first:
            self._meet()
        yield
        if goes_first:
            self._meet()

    def leave(self) -> None:
        """Wait until all have done their part; afterwards nothing is agreed on any more.

        Raises:
            PeerLostError: One of them is gone.
        """
        self._meet()
        if self.count > 1:
            distributed.destroy_process_group()

    def _meet(self) -> None:
        if self.count > 1:
            with _reaching():
                distributed.barrier(group=self.group)

    def own_journal(self, job: Job) -> Path:
        """Where a process that is not the first says why it failed."""
        return job.journal.with_name(f"process-{self.index}.jsonl")


def join(job: Job, device: torch.device) -> tuple[Processes, Job]:
    """Meet the other processes, if there are any; the first one's seed and time of start hold for all.

    Args:
        job: The run.
        device: What this machine trains on.

    Raises:
        PeerLostError: The others cannot be reached.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) < 2:
        return Processes(), job
    from accelerate import PartialState

    with _reaching():
        state = PartialState(cpu=device.type == "cpu", timeout=PATIENCE)
        group = None
        if state.backend != "gloo":
            group = distributed.new_group(backend="gloo", timeout=PATIENCE)
        started, seed = torch.tensor(job.started, dtype=torch.float64), torch.tensor(job.seed)
        distributed.broadcast(started, src=0, group=group)
        distributed.broadcast(seed, src=0, group=group)
    here = Processes(state.process_index, state.num_processes, group)
    return here, replace(job, started=float(started), seed=int(seed))


@contextlib.contextmanager
def _reaching() -> Iterator[None]:
    try:
        yield
    except (RuntimeError, ValueError, OSError) as error:
        raise PeerLostError(
            "another process of this run ended or cannot be reached: look at what it printed last"
        ) from error
