"""Latents of the training pictures, encoded once and kept in RAM or in sd-scripts' npz files.

Files lie beside the pictures under sd-scripts' names with its arrays (strategy_base.py:
LatentsCachingStrategy), so that either program reads what the other wrote. One more array holds a
key: a hash of the picture's content, the VAE, size, crop and of the latents themselves. A file
whose key does not fit is made anew, so an edited picture, another VAE or another size never gets old
latents, which sd-scripts does not notice.

Axes: C latent channels, H/W height and width (of latents, or of pixels for masks).
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import psutil
import torch
from torch import Tensor

from trainer.data.buckets import crop_ltrb
from trainer.data.images import fit_pixels, read_rgb, read_rgba, to_tensor_values, with_mask
from trainer.data.types import Dataset, Picture, Size, Subset
from trainer.draws import Draws
from trainer.errors import DatasetError, StopTraining
from trainer.events import Event, LogLine, PhaseStarted, Progress
from trainer.families._base import Family
from trainer.files import atomic_path
from trainer.job import Job

__all__ = ["KEY", "Entry", "LatentCache", "file_names", "prepare"]

KEY = "lora_kiln_key"
"""Array that says what a file's latents were made from; sd-scripts carries it along unread."""

SUFFIXED_BY_SIZE = frozenset({"_flux.npz"})
"""Caches whose array names end in _<height>x<width> of the latents, several sizes to a file."""

PHASE = "cache latents"
REPORT_EVERY_S = 0.25

Arrays = Mapping[str, npt.NDArray[Any]]
Emit = Callable[[Event], None]


@dataclass(frozen=True)
class Entry:
    """What is cached of one picture, on the CPU in float32."""

    latents_CHW: Tensor
    flipped_CHW: Tensor | None = None
    """Latents of the mirrored picture, where flip_aug is on."""
    mask_HW: Tensor | None = None
    """Loss mask in [0, 1] at bucket size, where the subset has one."""

    def size_bytes(self) -> int:
        """Memory that the tensors take."""
        tensors = (self.latents_CHW, self.flipped_CHW, self.mask_HW)
        return sum(tensor.nbytes for tensor in tensors if tensor is not None)


class LatentCache:
    """Entries by picture index: all in RAM, or read from their files and kept while RAM lasts."""

    def __init__(self, files: Mapping[int, _File] | None = None, budget_bytes: int = 0) -> None:
        self._entries: dict[int, Entry] = {}
        self._files = dict(files or {})
        self._budget_bytes = budget_bytes

    def put(self, index: int, entry: Entry) -> None:
        """Keep an entry; one that is also in a file only while there is room for it."""
        if index in self._files:
            if entry.size_bytes() > self._budget_bytes:
                return
            self._budget_bytes -= entry.size_bytes()
        self._entries[index] = entry

    def forget_file(self, index: int) -> None:
        """From now on the entry lives in RAM only (its file could not be written)."""
        self._files.pop(index, None)

    def get(self, index: int) -> Entry:
        """The entry of a picture.

        Raises:
            DatasetError: Its file was removed or changed since the run began.
        """
        entry = self._entries.get(index)
        if entry is None:
            file = self._files[index]
            entry = file.read(check=None)
            if entry is None:
                raise DatasetError(
                    f"latent cache {file.path} was removed or changed during the run: start again to rebuild it"
                )
            self.put(index, entry)
        return entry

    def __len__(self) -> int:
        return len(self._entries.keys() | self._files.keys())


@dataclass(frozen=True)
class _File:
    """The cache file of one picture in one bucket."""

    path: Path
    ending: str
    """Added to every array name: "" or "_64x64"."""
    shape: tuple[int, int, int]
    """Of the latents."""
    bucket: Size
    flipped: bool
    masked: bool

    def read(self, check: str | None) -> Entry | None:
        """The entry, or None where the file lacks it, is damaged, or does not fit.

        Args:
            check: What the latents must have been made from; None takes any of the right shape.
        """
        try:
            with self.path.open("rb") as handle, np.load(handle) as arrays:
                return self._entry(arrays, check)
        except Exception:  # noqa: BLE001 - a damaged file raises anything from zip, zlib and numpy: it is made anew
            return None

    def _entry(self, arrays: Arrays, check: str | None) -> Entry | None:
        names = ["latents"]
        names += ["latents_flipped"] if self.flipped else []
        names += ["alpha_mask"] if self.masked else []
        if any(name + self.ending not in arrays for name in names):
            return None
        found = {name: arrays[name + self.ending] for name in names}
        if check is not None:
            signed = set(str(arrays[KEY + self.ending]).split(";")) if KEY + self.ending in arrays else set()
            if not signed.issuperset(_signed(check, found)):
                return None
        tensors = {name: torch.from_numpy(value.astype(np.float32)) for name, value in found.items()}
        for name, tensor in tensors.items():
            shape = self.bucket[::-1] if name == "alpha_mask" else self.shape
            if tuple(tensor.shape) != shape or not bool(torch.isfinite(tensor).all()):
                return None
        return Entry(tensors["latents"], tensors.get("latents_flipped"), tensors.get("alpha_mask"))

    def write(self, entry: Entry, key: str, size: Size) -> None:
        """Write or update the file; arrays of other sizes in it stay.

        Raises:
            OSError: The file cannot be written.
        """
        arrays: dict[str, npt.NDArray[Any]] = {}
        if self.ending:
            arrays |= _all_arrays(self.path)
        found = {"latents": entry.latents_CHW.numpy()}
        if entry.flipped_CHW is not None:
            found["latents_flipped"] = entry.flipped_CHW.numpy()
        if entry.mask_HW is not None:
            found["alpha_mask"] = entry.mask_HW.numpy()
        for name in ("latents", "latents_flipped", "alpha_mask", KEY):
            arrays.pop(name + self.ending, None)
        arrays |= {name + self.ending: value for name, value in found.items()}
        arrays["original_size" + self.ending] = np.array(size)
        arrays["crop_ltrb" + self.ending] = np.array(crop_ltrb(self.bucket, size))
        arrays[KEY + self.ending] = np.array(";".join(_signed(key, found)))
        with atomic_path(self.path) as temporary, temporary.open("wb") as handle:
            np.savez(handle, **arrays)  # type: ignore[arg-type]


def _all_arrays(path: Path) -> dict[str, npt.NDArray[Any]]:
    try:
        with path.open("rb") as handle, np.load(handle) as arrays:
            return {name: arrays[name] for name in arrays.files}
    except Exception:  # noqa: BLE001 - a damaged file raises anything from zip, zlib and numpy: nothing to keep
        return {}


def _signed(key: str, arrays: Arrays) -> list[str]:
    """The key and a hash of each array: a program that replaces arrays leaves their old hashes behind."""
    return [key] + [
        f"{name}={hashlib.sha256(np.ascontiguousarray(values, dtype='<f4').tobytes()).hexdigest()}"
        for name, values in arrays.items()
    ]


def file_names(pictures: Sequence[Picture], wanted: Iterable[int], suffix: str) -> dict[int, Path]:
    """Cache file of each picture: ``<stem>_<width>x<height><suffix>``, sizes with at least four digits.

    Where a.jpg and a.png of one size would share a file, the later one keeps its ending in the
    name (sd-scripts gives both the same latents).

    Args:
        pictures: All pictures.
        wanted: Which of them are cached.
        suffix: A family's ending, "_sd.npz".
    """
    owner: dict[Path, Path] = {}
    names: dict[int, Path] = {}
    for index in wanted:
        path, (width, height) = pictures[index].path, pictures[index].size
        name = path.with_name(f"{path.stem}_{width:04d}x{height:04d}{suffix}")
        if owner.setdefault(name, path) != path:
            name = path.with_name(f"{path.name}_{width:04d}x{height:04d}{suffix}")
        names[index] = name
    return names


@dataclass(frozen=True)
class _Pixels:
    """One picture, ready for the VAE."""

    index: int
    content: str
    """SHA-256 of the file."""
    values_CHW: Tensor
    mask_HW: Tensor | None


class _Work:
    """What every step of the preparation needs to know."""

    def __init__(self, job: Job, dataset: Dataset, family: Family) -> None:
        self.dataset = dataset
        self.family = family
        self.wanted = [index for index, repeats in enumerate(dataset.repeats) if repeats]
        self.batch_size = max(1, job.config.vae_batch_size)

    def subset(self, index: int) -> Subset:
        return self.dataset.subsets[self.dataset.pictures[index].subset]

    def key(self, index: int, content: str) -> str:
        """Everything that the latents of a picture depend on, as a hash. The noise of the VAE is not in it."""
        fit, subset, picture = self.dataset.fits[index], self.subset(index), self.dataset.pictures[index]
        mask = picture.mask_file
        facts: dict[str, Any] = {
            "format": 1,
            "content": content,
            "vae": self.family.vae_fingerprint(),
            "bucket": fit.bucket,
            "resized": fit.resized,
            "interpolation": subset.resize_interpolation,
            "alpha": subset.alpha_mask,
            "mask": hashlib.sha256(_content(mask)).hexdigest() if mask else "",
        }
        if picture.edit.changes_pixels:  # without edits the key stays what it always was
            facts["edit"] = picture.edit.key()
        return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()

    def files(self) -> dict[int, _File]:
        names = file_names(self.dataset.pictures, self.wanted, self.family.cache_suffix)
        factor = self.family.latent_factor
        files: dict[int, _File] = {}
        claimed: set[tuple[Path, str]] = set()
        for index, path in names.items():
            bucket, subset = self.dataset.fits[index].bucket, self.subset(index)
            height, width = bucket[1] // factor, bucket[0] // factor
            ending = f"_{height}x{width}" if self.family.cache_suffix in SUFFIXED_BY_SIZE else ""
            while (path, ending) in claimed:  # one picture in two sizes or two subsets
                path = path.with_name(f"{bucket[0]}x{bucket[1]}_{index}_{path.name}")
            claimed.add((path, ending))
            files[index] = _File(
                path,
                ending,
                (self.family.latent_channels, height, width),
                bucket,
                subset.flip_aug,
                subset.masked,
            )
        return files

    def read_pixels(self, index: int) -> _Pixels:
        """Read, resize and crop one picture. Raises DatasetError."""
        picture, subset, fit = self.dataset.pictures[index], self.subset(index), self.dataset.fits[index]
        path = picture.path
        content = _content(path)
        pixels = picture.edit.apply((read_rgba if subset.alpha_mask else read_rgb)(content, path))
        if (pixels.shape[1], pixels.shape[0]) != picture.size:
            raise DatasetError(f"{path} changed its size while the run was starting: start again")
        pixels = fit_pixels(pixels, fit, subset.resize_interpolation)
        if picture.mask_file is not None:
            pixels = with_mask(pixels, picture.mask_file, fit, subset.resize_interpolation, edit=picture.edit)
        mask = None
        if subset.masked:
            whole = np.full(pixels.shape[:2], 255, np.uint8)  # no mask was drawn on this one
            alpha = pixels[:, :, 3] if pixels.shape[2] == 4 else whole
            mask = torch.from_numpy(alpha.astype(np.float32) / np.float32(255))
        values = torch.from_numpy(to_tensor_values(pixels))
        return _Pixels(index, hashlib.sha256(content).hexdigest(), values, mask)

    def batches(self, missing: Iterable[int]) -> list[list[int]]:
        """Pictures of one bucket and treatment together, small buckets first, vae_batch_size at most."""

        def sort_key(index: int) -> tuple[int, Size, bool, bool]:
            bucket, subset = self.dataset.fits[index].bucket, self.subset(index)
            return bucket[0] * bucket[1], bucket, subset.flip_aug, subset.masked

        batches: list[list[int]] = []
        for index in sorted(missing, key=sort_key):
            last = batches[-1] if batches else None
            if last and len(last) < self.batch_size and sort_key(last[0]) == sort_key(index):
                last.append(index)
            else:
                batches.append([index])
        return batches

    def encode(self, batch: Sequence[_Pixels], draws: Draws) -> list[Entry]:
        """Latents of one batch; the VAE's noise hangs on the picture's content, not on its place."""
        pixels = torch.stack([item.values_CHW for item in batch])
        seeds = [int(item.content[:15], 16) for item in batch]
        latents = self.family.encode_images(pixels, [draws.generator("vae", seed) for seed in seeds])
        flipped: Sequence[Tensor | None] = [None] * len(batch)
        if self.subset(batch[0].index).flip_aug:
            mirrored = [draws.generator("vae", seed, 1) for seed in seeds]
            flipped = list(self.family.encode_images(pixels.flip(3), mirrored))
        return [
            # A copy of its own, so that one kept picture does not keep the memory of a whole batch.
            Entry(one.float().clone(), None if other is None else other.float().clone(), item.mask_HW)
            for one, other, item in zip(latents, flipped, batch, strict=True)
        ]


def _content(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise DatasetError(
            f"{path} cannot be read: {error.strerror or error}: check that it is still there"
        ) from error


def _threads() -> int:
    return min(8, (os.cpu_count() or 1) + 1)


def _in_order(
    pool: ThreadPoolExecutor, work: Callable[[int], _Pixels], indices: Iterable[int], ahead: int
) -> Iterator[_Pixels]:
    """Results of ``work`` in order, with at most ``ahead`` pictures decoded before they are needed."""
    pending: deque[Future[_Pixels]] = deque()
    for index in indices:
        pending.append(pool.submit(work, index))
        if len(pending) > ahead:
            yield pending.popleft().result()
    while pending:
        yield pending.popleft().result()


class _Bar:
    """Progress of a phase, said at most a few times a second."""

    def __init__(self, emit: Emit, phase: str, total: int) -> None:
        self._emit, self._phase, self._total = emit, phase, total
        self._done, self._said = 0, 0.0
        emit(PhaseStarted(phase=phase, total=total, unit="pictures"))

    def advance(self, count: int) -> None:
        self._done += count
        now = time.monotonic()
        if self._done == self._total or now - self._said >= REPORT_EVERY_S:
            self._said = now
            self._emit(Progress(phase=self._phase, done=self._done, total=self._total))


def prepare(
    job: Job,
    dataset: Dataset,
    family: Family,
    draws: Draws,
    *,
    emit: Emit,
    stop: Callable[[], bool] = lambda: False,
) -> LatentCache | None:
    """Encode what is not in a usable cache yet.

    Pictures are decoded on threads ahead of the VAE. A file that cannot be written is said once and
    its latents are kept in RAM.

    Args:
        job: Says whether latents are cached, and where.
        dataset: The pictures.
        family: Its VAE encodes.
        draws: Source of the VAE's noise.
        emit: Gets the progress.
        stop: Asked between batches.

    Returns:
        The cache, or None where the job caches nothing.

    Raises:
        DatasetError: A picture can no longer be read.
        DivergedError: The VAE gave NaN.
        StopTraining: ``stop`` said so.
    """
    config = job.config
    if not (config.cache_latents or config.cache_latents_to_disk):
        return None
    work = _Work(job, dataset, family)
    files = work.files() if config.cache_latents_to_disk else {}
    cache = LatentCache(files, psutil.virtual_memory().available // 4)
    missing = work.wanted
    with ThreadPoolExecutor(max_workers=_threads()) as pool:
        try:
            if files:
                missing = _check_files(work, files, cache, pool, emit, stop, trust=config.skip_cache_check)
            _encode_missing(work, files, cache, pool, draws, missing, emit, stop)
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    return cache


def _check_files(
    work: _Work,
    files: Mapping[int, _File],
    cache: LatentCache,
    pool: ThreadPoolExecutor,
    emit: Emit,
    stop: Callable[[], bool],
    *,
    trust: bool,
) -> list[int]:
    """Take over the entries of all usable files; the indices of the others."""

    def look(index: int) -> Entry | None:
        if stop():
            return None
        file = files[index]
        if not file.path.exists():
            return None
        path = work.dataset.pictures[index].path
        return file.read(None if trust else work.key(index, hashlib.sha256(_content(path)).hexdigest()))

    work.family.vae_fingerprint()  # worked out once, before the threads ask for it
    missing, outdated = [], 0
    bar = _Bar(emit, "check latent cache", len(files))
    for index, entry in zip(files, pool.map(look, files), strict=True):
        if entry is None:
            missing.append(index)
            outdated += files[index].path.exists()
        else:
            cache.put(index, entry)
        bar.advance(1)
    if stop():
        raise StopTraining
    if outdated:
        emit(
            LogLine(
                message=f"{outdated} of {len(files)} latent cache files were made from other pictures, another VAE, "
                "other sizes, or by another program: they are made anew"
                + ("" if trust else " (skip_cache_check takes them as they are)")
            )
        )
    return missing


def _encode_missing(
    work: _Work,
    files: Mapping[int, _File],
    cache: LatentCache,
    pool: ThreadPoolExecutor,
    draws: Draws,
    missing: Sequence[int],
    emit: Emit,
    stop: Callable[[], bool],
) -> None:
    batches = work.batches(missing)
    bar = _Bar(emit, PHASE, len(missing))
    ahead = max(2 * work.batch_size, _threads())
    pictures = _in_order(pool, work.read_pixels, (index for batch in batches for index in batch), ahead)
    told = False
    for batch in batches:
        if stop():
            raise StopTraining
        loaded = [next(pictures) for _ in batch]
        for item, entry in zip(loaded, work.encode(loaded, draws), strict=True):
            if item.index in files:
                try:
                    picture = work.dataset.pictures[item.index]
                    files[item.index].write(entry, work.key(item.index, item.content), picture.size)
                except OSError as error:
                    cache.forget_file(item.index)
                    if not told:
                        emit(LogLine(message=_not_written(files[item.index].path, error), level="warning"))
                    told = True
            cache.put(item.index, entry)
        bar.advance(len(batch))


def _not_written(path: Path, error: OSError) -> str:
    return (
        f"latents cannot be saved to {path} ({error.strerror or error}): they stay in memory and are made again "
        "at the next start"
    )
