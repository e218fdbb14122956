"""What FLUX.1's text encoders gave for each caption, kept so that they can go from memory.

A text is looked up by itself, so captions that are shuffled or left out are kept like any other:
`texts_of_run` lists every text that a run will draw. Pictures whose caption never varies have a file
beside them in sd-scripts' layout (strategy_flux.py: FluxTextEncoderOutputsCachingStrategy), if wanted.

Axes: T text tokens, D width.
"""

from __future__ import annotations

import shutil
import tempfile
import weakref
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from trainer.data import captions
from trainer.data.cache import KEY
from trainer.data.types import Dataset, Picture
from trainer.draws import Draws
from trainer.files import atomic_path
from trainer.job import Job
from trainer.plan import Plan

__all__ = [
    "SUFFIX",
    "Encoded",
    "Recent",
    "TextStore",
    "batched",
    "file_names",
    "read_file",
    "texts_of_run",
    "write_file",
]

SUFFIX = "_flux_te.npz"


@dataclass(frozen=True)
class Encoded:
    """One text, on the CPU."""

    pooled_D: Tensor
    """CLIP-L's pooled state."""
    states_TD: Tensor
    """T5's last hidden states."""
    mask_T: Tensor
    """int64: 1 for the text's own tokens, 0 for padding."""

    def size_bytes(self) -> int:
        """Memory that the tensors take."""
        return self.pooled_D.nbytes + self.states_TD.nbytes + self.mask_T.nbytes


class TextStore:
    """Encoded texts: in RAM while there is room, the rest in a scratch folder that goes with the store.

    Args:
        budget_bytes: RAM that they may take.
        folder: Where the scratch folder is made, if it is needed.
    """

    def __init__(self, budget_bytes: int, folder: Path) -> None:
        self._budget_bytes = budget_bytes
        self._folder = folder
        self._kept: dict[str, Encoded] = {}
        self._files: dict[str, Path] = {}
        self._scratch: Path | None = None

    def __contains__(self, text: str) -> bool:
        return text in self._kept or text in self._files

    def __len__(self) -> int:
        return len(self._kept) + len(self._files)

    def put(self, text: str, encoded: Encoded) -> None:
        """Keep a text.

        Raises:
            OSError: RAM is used up and the scratch file cannot be written.
        """
        if encoded.size_bytes() <= self._budget_bytes:
            self._budget_bytes -= encoded.size_bytes()
            self._kept[text] = encoded
            return
        if self._scratch is None:
            self._folder.mkdir(parents=True, exist_ok=True)
            self._scratch = Path(tempfile.mkdtemp(prefix=".texts-", dir=self._folder))
            weakref.finalize(self, shutil.rmtree, self._scratch, ignore_errors=True)
        path = self._scratch / f"{len(self._files)}.pt"
        torch.save(vars(encoded), path)
        self._files[text] = path

    def get(self, text: str) -> Encoded:
        """A text that is in the store."""
        if text in self._kept:
            return self._kept[text]
        return Encoded(**torch.load(self._files[text], weights_only=True))

    def on_disk(self) -> int:
        """Texts that are in scratch files."""
        return len(self._files)


class Recent:
    """The texts that came last, up to a size."""

    def __init__(self, budget_bytes: int) -> None:
        self._budget_bytes = budget_bytes
        self._kept: OrderedDict[str, Encoded] = OrderedDict()

    def __contains__(self, text: str) -> bool:
        return text in self._kept

    def get(self, text: str) -> Encoded:
        """A text that is kept."""
        self._kept.move_to_end(text)
        return self._kept[text]

    def put(self, text: str, encoded: Encoded) -> None:
        """Keep a text; the one that was not asked for longest goes."""
        self._kept[text] = encoded
        while len(self._kept) > max(1, self._budget_bytes // encoded.size_bytes()):
            self._kept.popitem(last=False)


def texts_of_run(job: Job, dataset: Dataset, draws: Draws) -> list[str]:
    """Every text that the run will train with, each once, in the order of their first use.

    Captions are a function of the run's seed and the place of a sample, so they are known beforehand
    (the same calls as in trainer.data.loader.Loader).
    """
    plan = Plan.make(job, dataset)
    wanted = [index for index, repeats in enumerate(dataset.repeats) if repeats]

    def text(index: int, draw_id: int, epoch: int, step: int) -> str:
        return captions.process(
            dataset.pictures[index].caption,
            dataset.subsets[dataset.pictures[index].subset],
            draws.random("caption", draw_id),
            epoch=epoch + 1,
            step=step,
            max_steps=plan.max_train_steps,
        )

    if not any(captions.varies(subset) for subset in dataset.subsets):
        return list(dict.fromkeys(text(index, 0, 0, 0) for index in wanted))
    batch_size = job.config.train_batch_size
    accumulation = job.config.gradient_accumulation_steps
    found: dict[str, None] = {}
    for epoch in range(plan.epochs):
        order = draws.batches(epoch, dataset.entries(), batch_size)
        for place, indices in enumerate(order):
            step = epoch * plan.updates_per_epoch + place // accumulation
            if step >= plan.max_train_steps:
                break
            first = (epoch * plan.batches_per_epoch + place) * batch_size
            for offset, index in enumerate(indices):
                found[text(index, first + offset, epoch, step)] = None
    return list(found)


# --- sd-scripts' files ----------------------------------------------------------------------------


def file_names(pictures: Sequence[Picture], wanted: Sequence[int]) -> dict[int, Path]:
    """``<stem>_flux_te.npz`` beside each picture.

    Where a.jpg and a.png would share a file, the later one keeps its ending in the name.
    """
    owner: dict[Path, Path] = {}
    names: dict[int, Path] = {}
    for index in wanted:
        path = pictures[index].path
        name = path.with_name(path.stem + SUFFIX)
        if owner.setdefault(name, path) != path:
            name = path.with_name(path.name + SUFFIX)
        names[index] = name
    return names


def read_file(
    path: Path, key: str | None, *, length: int, masked: bool, dtype: torch.dtype
) -> Encoded | None:
    """The text in a cache file, or None where it is missing, damaged, or made from something else.

    Args:
        path: The file.
        key: What it must have been made from; None takes any that has the right shape.
        length: T5 tokens.
        masked: apply_t5_attn_mask.
        dtype: Wanted.
    """
    try:
        with path.open("rb") as handle, np.load(handle) as arrays:
            if key is not None and (KEY not in arrays or str(arrays[KEY]) != key):
                return None
            if bool(arrays["apply_t5_attn_mask"]) != masked:
                return None
            pooled, states = (torch.from_numpy(arrays[name]).to(dtype) for name in ("l_pooled", "t5_out"))
            mask = torch.from_numpy(arrays["t5_attn_mask"]).to(torch.int64)
    except Exception:  # noqa: BLE001 - a damaged file raises anything from zip, zlib and numpy: it is made anew
        return None
    if states.ndim != 2 or pooled.ndim != 1 or len(states) != length or mask.shape != (length,):
        return None
    if not (bool(torch.isfinite(states).all()) and bool(torch.isfinite(pooled).all())):
        return None
    return Encoded(pooled, states, mask)


def write_file(path: Path, encoded: Encoded, key: str, *, masked: bool) -> None:
    """Write a cache file; bfloat16, which numpy lacks, as float32.

    Raises:
        OSError: It cannot be written.
    """

    def array(tensor: Tensor) -> npt.NDArray[Any]:
        return (tensor.float() if tensor.dtype == torch.bfloat16 else tensor).numpy()

    arrays: dict[str, Any] = {
        "l_pooled": array(encoded.pooled_D),
        "t5_out": array(encoded.states_TD),
        "txt_ids": np.zeros((len(encoded.states_TD), 3), dtype=np.float32),
        "t5_attn_mask": encoded.mask_T.numpy(),
        "apply_t5_attn_mask": np.array(masked),
        KEY: np.array(key),
    }
    with atomic_path(path) as temporary, temporary.open("wb") as handle:
        np.savez(handle, **arrays)


def batched(texts: Sequence[str], size: int) -> Iterator[Sequence[str]]:
    """Cut into batches."""
    for start in range(0, len(texts), size):
        yield texts[start : start + size]
