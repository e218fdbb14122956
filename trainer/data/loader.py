"""Batches in the order of a run, made ahead of time on a thread of its own.

Everything random about a batch is a function of its place in the run, so an epoch can be entered
anywhere, and any number of devices trains the same samples with the same draws.
"""

from __future__ import annotations

import os
import queue
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from trainer.data import captions
from trainer.data.cache import LatentCache
from trainer.data.images import (
    face_crop,
    fit_pixels,
    jitter_colour,
    read_rgb,
    read_rgba,
    to_tensor_values,
    with_mask,
)
from trainer.data.types import Batch, Dataset, Subset
from trainer.draws import Draws
from trainer.job import Job
from trainer.plan import Plan

__all__ = ["Loader"]

AHEAD = 4
"""Batches made before they are asked for."""

T = TypeVar("T")


@dataclass(frozen=True)
class _Sample:
    latents_CHW: Tensor | None
    pixels_CHW: Tensor | None
    mask_HW: Tensor | None
    flipped: bool


class Loader:
    """Makes the batches of a run.

    Args:
        job: Batch size, accumulation, weight of class pictures.
        dataset: The pictures.
        latents: Their latents, or None to read pixels every time.
        draws: Order and augmentation.
        plan: Length of the run, for token warm-up.
        device: Where the batches will go; for CUDA they are put into pinned memory.
        process: Which of ``processes`` this one is: they take turns, batch by batch.
        processes: Processes that train together.
    """

    def __init__(
        self,
        job: Job,
        dataset: Dataset,
        latents: LatentCache | None,
        draws: Draws,
        plan: Plan,
        *,
        device: torch.device | None = None,
        process: int = 0,
        processes: int = 1,
    ) -> None:
        self._dataset = dataset
        self._latents = latents
        self._draws = draws
        self._entries = dataset.entries()
        self._batch_size = job.config.train_batch_size
        self._accumulation = job.config.gradient_accumulation_steps
        self._prior_loss_weight = job.config.prior_loss_weight
        self._updates_per_epoch = plan.updates_per_epoch
        self._max_train_steps = plan.max_train_steps
        self._pin = device is not None and device.type == "cuda"
        self._process, self._processes = process, processes
        self.batches_per_epoch = dataset.batches_per_epoch(self._batch_size)
        """Over all processes."""

    def epoch(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        """Batches of an epoch for this process, in order.

        Batches are made on another thread, which ends when the iterator is used up, closed or
        dropped. An error there is raised here.

        Args:
            epoch: From 0.
            start: Batches of this process to leave out, for resuming.

        Raises:
            DatasetError: A picture or cache file can no longer be read.
        """
        return _ahead(self._make(epoch, start), AHEAD)

    def epoch_with(
        self, epoch: int, start: int, prepare: Callable[[Batch, int], T]
    ) -> Iterator[tuple[Batch, T]]:
        """As `epoch`, with something made for each batch on the same thread, such as its noise.

        Args:
            epoch: From 0.
            start: Batches of this process to leave out.
            prepare: Gets the batch and its number in the epoch, of this process, from 0.
        """
        batches = enumerate(self._make(epoch, start), start)
        return _ahead(((batch, prepare(batch, number)) for number, batch in batches), AHEAD)

    def _make(self, epoch: int, start: int) -> Iterator[Batch]:
        order = self._draws.batches(epoch, self._entries, self._batch_size)
        turns = -(-len(order) // self._processes)
        # Pixels are read on threads; cached latents are at hand.
        workers = min(8, (os.cpu_count() or 1) + 1) if self._latents is None else 1
        with ThreadPoolExecutor(max_workers=workers) as pool:
            for turn in range(start, turns):
                # Where the last round is short, some processes take batches of the beginning again.
                place = (turn * self._processes + self._process) % len(order)
                step = epoch * self._updates_per_epoch + turn // self._accumulation
                yield self._batch(order[place], epoch, place, step, pool)

    def _batch(
        self, indices: Sequence[int], epoch: int, place: int, step: int, pool: ThreadPoolExecutor
    ) -> Batch:
        dataset = self._dataset
        first = (epoch * self.batches_per_epoch + place) * self._batch_size
        draw_ids = tuple(range(first, first + len(indices)))
        subsets = [dataset.subsets[dataset.pictures[index].subset] for index in indices]
        if self._latents is None:
            samples = list(pool.map(self._read, indices, draw_ids))
        else:
            samples = [self._cached(index, draw_id) for index, draw_id in zip(indices, draw_ids, strict=True)]
        texts = tuple(
            captions.process(
                dataset.pictures[index].caption,
                subset,
                self._draws.random("caption", draw_id),
                epoch=epoch + 1,
                step=step,
                max_steps=self._max_train_steps,
            )
            for index, subset, draw_id in zip(indices, subsets, draw_ids, strict=True)
        )
        bucket = dataset.fits[indices[0]].bucket
        weights = [self._prior_loss_weight if subset.is_reg else 1.0 for subset in subsets]
        return Batch(
            pictures=tuple(indices),
            draw_ids=draw_ids,
            latents_BCHW=self._stack([sample.latents_CHW for sample in samples]),
            pixels_BCHW=self._stack([sample.pixels_CHW for sample in samples]),
            captions=texts,
            loss_weights_B=self._pinned(torch.tensor(weights, dtype=torch.float32)),
            masks_B1HW=self._masks(samples, (bucket[1], bucket[0])),
            flipped=tuple(sample.flipped for sample in samples),
            sizes=tuple(dataset.pictures[index].size for index in indices),
            bucket=bucket,
        )

    def _pinned(self, tensor: Tensor) -> Tensor:
        return tensor.pin_memory() if self._pin else tensor

    def _stack(self, tensors: Sequence[Tensor | None]) -> Tensor | None:
        present = [tensor for tensor in tensors if tensor is not None]
        return self._pinned(torch.stack(present)) if present else None

    def _masks(self, samples: Sequence[_Sample], height_width: tuple[int, int]) -> Tensor | None:
        """Masks of a batch; pictures without one count whole (sd-scripts: BaseDataset.__getitem__)."""
        masks = [sample.mask_HW for sample in samples]
        if all(mask is None for mask in masks):
            return None
        whole = torch.ones(height_width)
        return self._pinned(torch.stack([whole if mask is None else mask for mask in masks])[:, None])

    def _flips(self, subset: Subset, draw_id: int) -> bool:
        return subset.flip_aug and self._draws.random("flip", draw_id).random() < 0.5

    def _cached(self, index: int, draw_id: int) -> _Sample:
        assert self._latents is not None
        entry = self._latents.get(index)
        flipped = self._flips(self._dataset.subsets[self._dataset.pictures[index].subset], draw_id)
        mask = entry.mask_HW
        if not flipped:
            return _Sample(entry.latents_CHW, None, mask, flipped)
        return _Sample(entry.flipped_CHW, None, None if mask is None else mask.flip(1), flipped)

    def _read(self, index: int, draw_id: int) -> _Sample:
        """Pixels of one sample with all its augmentations, in sd-scripts' order."""
        picture, fit = self._dataset.pictures[index], self._dataset.fits[index]
        subset = self._dataset.subsets[picture.subset]
        pixels = picture.edit.apply((read_rgba if subset.alpha_mask else read_rgb)(picture.path))
        rng = self._draws.random("crop", draw_id)
        # An edited picture's face no longer lies where the file's name says.
        is_faced = subset.face_crop_aug_range and not picture.edit.changes_pixels
        faced = face_crop(pixels, picture.path, subset, fit.bucket, rng) if is_faced else None
        if faced is None:
            start = None
            if subset.random_crop:
                excess = (fit.resized[0] - fit.bucket[0], fit.resized[1] - fit.bucket[1])
                start = rng.randint(0, excess[0]), rng.randint(0, excess[1])
            pixels = fit_pixels(pixels, fit, subset.resize_interpolation, start)
            if picture.mask_file is not None:
                pixels = with_mask(
                    pixels, picture.mask_file, fit, subset.resize_interpolation, start, picture.edit
                )
        else:
            pixels = faced
        if subset.color_aug:
            pixels = jitter_colour(pixels, self._draws.random("colour", draw_id))
        flipped = self._flips(subset, draw_id)
        if flipped:
            pixels = pixels[:, ::-1]
        mask = None
        if pixels.shape[2] == 4:
            mask = torch.from_numpy(pixels[:, :, 3].astype(np.float32) / np.float32(255))
        return _Sample(None, torch.from_numpy(to_tensor_values(pixels)), mask, flipped)


@dataclass(frozen=True)
class _End:
    error: BaseException | None


def _ahead(items: Iterator[T], depth: int) -> Iterator[T]:
    """The same items in the same order, made up to ``depth`` ahead on another thread."""
    ready: queue.Queue[T | _End] = queue.Queue(maxsize=depth)
    dropped = threading.Event()

    def put(item: T | _End) -> bool:
        while not dropped.is_set():
            try:
                ready.put(item, timeout=0.1)
            except queue.Full:
                continue
            return True
        return False

    def work() -> None:
        error: BaseException | None = None
        try:
            for item in items:
                if not put(item):
                    break
        except BaseException as raised:  # noqa: BLE001 - handed to the thread that waits for the batches
            error = raised
        put(_End(error))

    thread = threading.Thread(target=work, name="batches", daemon=True)
    thread.start()
    try:
        while True:
            item = ready.get()
            if isinstance(item, _End):
                if item.error is not None:
                    raise item.error
                return
            yield item
    finally:
        dropped.set()
        thread.join()
