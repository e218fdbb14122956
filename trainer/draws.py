"""Every random draw of a run, from one injectable source.

A draw is a pure function of the run's seed, its purpose and its place in the run (which sample of
which batch), never of how many draws came before. So a resumed run continues bit for bit without
stored generator states, batches can be prepared ahead of time on another thread, sampling pictures
disturbs nothing, and a global batch gets the same noise on one device or on several.

Draws are made on the CPU in float32, so that they are the same on every device.

Axes: B batch, C channels, H/W latent height and width.
"""

from __future__ import annotations

import contextlib
import hashlib
import random
import threading
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

__all__ = ["GENERATORS", "Draws", "aside"]

GENERATORS = threading.RLock()
"""PyTorch's own generators, from which dropouts draw, are one for all threads: a step holds this from its seed to its
last draw."""


@contextlib.contextmanager
def aside(*devices: torch.device) -> Iterator[None]:
    """For what may draw from PyTorch's own generators and is no step of a run, such as an optimizer's trial.

    They are left as they were, and no step draws meanwhile.

    Args:
        devices: Accelerators whose generators may be drawn from; the CPU's always may.
    """
    with GENERATORS, torch.random.fork_rng(devices=devices):
        yield


class Draws:
    """The random draws of a run with ``seed``. A subclass can replay those of another program."""

    def __init__(self, seed: int) -> None:
        self.seed = seed

    def key(self, purpose: str, *place: int) -> int:
        """64-bit seed for one draw: a hash of the run's seed, the purpose and the place."""
        text = ":".join([str(self.seed), purpose, *map(str, place)])
        return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little") >> 1

    def generator(self, purpose: str, *place: int) -> torch.Generator:
        """A CPU generator for one draw or one short series of them."""
        return torch.Generator().manual_seed(self.key(purpose, *place))

    def random(self, purpose: str, *place: int) -> random.Random:
        """A Python generator, for shuffles and choices."""
        return random.Random(self.key(purpose, *place))

    def normal(self, purpose: str, draw_ids: Sequence[int], shape: Sequence[int]) -> Tensor:
        """Standard normal, float32, (len(draw_ids), *shape): one independent draw for each sample."""
        return torch.stack([torch.randn(*shape, generator=self.generator(purpose, i)) for i in draw_ids])

    def uniform(self, purpose: str, draw_ids: Sequence[int]) -> Tensor:
        """Uniform in [0, 1), float32, (len(draw_ids),)."""
        return torch.cat([torch.rand(1, generator=self.generator(purpose, i)) for i in draw_ids])

    def noise(self, draw_ids: Sequence[int], shape: Sequence[int]) -> Tensor:
        """The noise that is mixed into the latents, BCHW.

        Args:
            draw_ids: Place of each sample in the run, counted over all epochs and devices.
            shape: C, H, W.
        """
        return self.normal("noise", draw_ids, shape)

    def timesteps(self, draw_ids: Sequence[int], low: int, high: int) -> Tensor:
        """Uniform integers in [low, high), int64, (B,)."""
        return torch.cat(
            [torch.randint(low, high, (1,), generator=self.generator("timestep", i)) for i in draw_ids]
        )

    def batches(self, epoch: int, buckets: Sequence[Sequence[int]], batch_size: int) -> list[tuple[int, ...]]:
        """Which entries form each batch of an epoch, in order.

        Entries are shuffled within their bucket, cut into batches (the last of a bucket may be
        short), and the batches are shuffled (sd-scripts, train_util.py:BucketManager.shuffle and
        the shuffling data loader).

        Args:
            epoch: From 0.
            buckets: For each bucket the indices of its entries, repeats included.
            batch_size: Samples in a full batch.
        """
        batches: list[tuple[int, ...]] = []
        for index, bucket in enumerate(buckets):
            entries = list(bucket)
            self.random("bucket", epoch, index).shuffle(entries)
            batches += [
                tuple(entries[start : start + batch_size]) for start in range(0, len(entries), batch_size)
            ]
        self.random("batches", epoch).shuffle(batches)
        return batches
