"""Losses on fixed pictures, noise and noise levels: what a LoRA has learnt, and what else it moved.

The same pictures are noised in the same way for every checkpoint and predicted with their own caption, with
a caption that does not belong to them, and with their caption less the trigger word. Each loss is compared
with that of the base model, the LoRA being off. Nothing is trained and no draw of a run is touched.

Axes: B batch, C channels, H/W latent height and width.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from trainer.data.images import fit_pixels, read_rgb, to_tensor_values
from trainer.data.types import Batch
from trainer.draws import Draws

if TYPE_CHECKING:
    import numpy.typing as npt
    from PIL import Image

    from trainer.data.cache import LatentCache
    from trainer.data.types import Dataset
    from trainer.families._base import Family
    from trainer.networks._base import Network
    from trainer.objectives._base import Objective

__all__ = [
    "LEVELS",
    "Figures",
    "Material",
    "Probe",
    "captioned",
    "choose",
    "drawn_batches",
    "held_batches",
    "prepare",
    "recombined",
    "trigger_of",
    "without_trigger",
]

LEVELS = (0.1, 0.4, 0.7, 0.9)
"""Shares of the way from a clean picture to noise: fine structure, detail, shapes, layout."""
DURING_TRAINING = (0.4, 0.8)
"""Levels that are measured while a run trains, where every forward pass costs."""

SEED = 60_209  # fixed, so that figures of several runs on one data set compare
BATCH = 8


@dataclass(frozen=True)
class Figures:
    """One checkpoint, or the base model, as measured; a value for each noise level."""

    levels: tuple[float, ...]
    own: tuple[float, ...]
    """Loss on training pictures with their own captions."""
    other: tuple[float, ...]
    """The same with captions of other pictures."""
    plain: tuple[float, ...]
    """The same with captions less the trigger word; empty where there is none, or no text encoder any more."""
    held: tuple[float, ...]
    """As ``own``, on pictures that were not trained; empty without any."""
    moved: tuple[float, ...]
    """||p - p_base||^2 / ||p_base - target||^2 of predictions without the trigger word (or with other captions)."""


@dataclass(frozen=True)
class Material:
    """Pictures and words of a probe."""

    batches: tuple[Batch, ...]
    """Training pictures with latents, by size."""
    held: tuple[Batch, ...]
    trigger: str
    other: tuple[tuple[str, ...], ...]
    """For each batch, captions of other pictures."""


def trigger_of(captions: Sequence[str], class_tokens: str | None) -> str:
    """The word that stands for the subject: the first of the folder's name if captions have it, else of captions.

    "" where no word stands in nearly all captions.
    """
    counts: Counter[str] = Counter()
    for caption in captions:
        counts.update(set(re.findall(r"\w+", caption.lower())))
    wanted = 0.9 * len(captions)
    for word in re.findall(r"\w+", (class_tokens or "").lower()):
        if counts[word] >= wanted:
            return str(word)
    first = re.findall(r"\w+", captions[0].lower()) if captions else []
    return str(next((word for word in first if counts[word] >= wanted), ""))


def without_trigger(caption: str, trigger: str) -> str:
    """The caption less that word."""
    found = re.sub(rf"(?i)\b{re.escape(trigger)}\b", "", caption)
    return re.sub(r"\s+", " ", re.sub(r"^[\s,]+", "", found)).strip()


def recombined(captions: Sequence[str], count: int) -> list[str]:
    """Captions that are new and still of the data set: every other phrase of one is that of another.

    Pictures of captions that were trained can be learnt by heart. A caption without commas stays as it is.

    >>> recombined(["k1ln, red wall, coat", "k1ln, sea, hat"], 2)
    ['k1ln, red wall, hat', 'k1ln, sea, coat']
    """
    distinct = list(dict.fromkeys(captions))
    found = []
    for number in range(count):
        place = number * len(distinct) // count if len(distinct) >= count else number % len(distinct)
        away = max(1, len(distinct) // 2) + number // len(distinct)
        own, other = (
            [phrase.strip() for phrase in distinct[each % len(distinct)].split(",")]
            for each in (place, place + away)
        )
        own[2::2] = [mine if at >= len(other) else other[at] for at, mine in list(enumerate(own))[2::2]]
        found.append(", ".join(own))
    return found


def choose(count: int, wanted: int) -> list[int]:
    """So many places, evenly over a list."""
    if count <= wanted:
        return list(range(count))
    return (
        sorted({round(place * (count - 1) / (wanted - 1)) for place in range(wanted)}) if wanted > 1 else [0]
    )


def prepare(
    dataset: Dataset,
    family: Family,
    latents: LatentCache | None,
    *,
    pictures: int,
    held: tuple[Batch, ...] = (),
) -> Material:
    """Choose pictures, and bring their latents to memory.

    Args:
        dataset: The run's pictures.
        family: Encodes where ``latents`` has none.
        latents: The run's cache.
        pictures: How many training pictures.
        held: Pictures that were not trained, from `held_batches`.
    """
    trained = [
        index
        for index, picture in enumerate(dataset.pictures)
        if dataset.repeats[index] and not dataset.subsets[picture.subset].is_reg
    ]
    chosen = [trained[place] for place in choose(len(trained), pictures)]
    captions = [dataset.pictures[index].caption for index in trained]
    tokens = dataset.subsets[dataset.pictures[trained[0]].subset].class_tokens if trained else None
    batches = tuple(_batches(dataset, family, latents, chosen))
    others = []
    for batch in batches:
        words = []
        for index in batch.pictures:
            own = dataset.pictures[index].caption
            # The one half a list away is the least like it in a sorted set; it must not be the same words.
            start = trained.index(index) + len(trained) // 2
            around = (captions[(start + step) % len(captions)] for step in range(len(captions)))
            words.append(next((each for each in around if each != own), ""))
        others.append(tuple(words))
    return Material(batches, held, trigger_of(captions, tokens), tuple(others))


def held_batches(held: Dataset | None, family: Family, pictures: int) -> tuple[Batch, ...]:
    """Pictures that were not trained, as a probe takes them; the VAE encodes them.

    Args:
        held: From `Dataset.held_out`, or of another folder.
        family: The loaded models.
        pictures: At most so many.
    """
    if held is None:
        return ()
    return tuple(_batches(held, family, None, choose(len(held.pictures), pictures)))


def _batches(
    dataset: Dataset, family: Family, latents: LatentCache | None, indices: Sequence[int]
) -> list[Batch]:
    by_size: dict[tuple[int, int], list[int]] = {}
    for index in indices:
        by_size.setdefault(dataset.fits[index].bucket, []).append(index)
    found = []
    for bucket, group in by_size.items():
        for start in range(0, len(group), BATCH):
            part = group[start : start + BATCH]
            found.append(
                _batch(
                    part,
                    torch.stack([_latents(dataset, family, latents, index) for index in part]),
                    [dataset.pictures[index].caption for index in part],
                    [dataset.pictures[index].size for index in part],
                    bucket,
                )
            )
    return found


def drawn_batches(family: Family, pictures: Sequence[Image.Image]) -> tuple[Batch, ...]:
    """Pictures that were drawn, all of one size, as a probe takes them, without captions; the VAE encodes them."""
    found = []
    for start in range(0, len(pictures), BATCH):
        part = range(start, min(start + BATCH, len(pictures)))
        latents = [_encoded(family, np.asarray(pictures[place].convert("RGB")), place) for place in part]
        size = pictures[start].size
        found.append(_batch(part, torch.stack(latents), [""] * len(part), [size] * len(part), size))
    return tuple(found)


def captioned(batches: Sequence[Batch], captions: Sequence[str]) -> tuple[Batch, ...]:
    """The same pictures with these captions, in their order."""
    left = iter(captions)
    return tuple(replace(batch, captions=tuple(next(left) for _ in batch.pictures)) for batch in batches)


def _batch(
    places: Sequence[int],
    latents_BCHW: Tensor,
    captions: Sequence[str],
    sizes: Sequence[tuple[int, int]],
    bucket: tuple[int, int],
) -> Batch:
    return Batch(
        pictures=tuple(places),
        draw_ids=tuple(places),
        latents_BCHW=latents_BCHW,
        pixels_BCHW=None,
        captions=tuple(captions),
        loss_weights_B=torch.ones(len(places)),
        masks_B1HW=None,
        flipped=(False,) * len(places),
        sizes=tuple(sizes),
        bucket=bucket,
    )


def _latents(dataset: Dataset, family: Family, latents: LatentCache | None, index: int) -> Tensor:
    if latents is not None:
        return latents.get(index).latents_CHW
    picture, fit = dataset.pictures[index], dataset.fits[index]
    subset = dataset.subsets[picture.subset]
    pixels = fit_pixels(picture.edit.apply(read_rgb(picture.path)), fit, subset.resize_interpolation, None)
    return _encoded(family, pixels, index)


def _encoded(family: Family, pixels_HWC: npt.NDArray[np.uint8], index: int) -> Tensor:
    pixels_BCHW = torch.from_numpy(to_tensor_values(pixels_HWC))[None]
    with torch.no_grad():
        return family.encode_images(pixels_BCHW, [Draws(SEED).generator("vae", index)])[0]


class Probe:
    """Measures one network after another on the same material.

    Args:
        family: The loaded models; the network is attached by the caller.
        objective: The run's noise and loss.
        material: From `prepare`.
        levels: Noise levels.
        autocast: Makes the context of a forward pass.
        words: Whether captions can still be encoded that are none of the data set's.
    """

    def __init__(
        self,
        family: Family,
        objective: Objective[Any, Any],
        material: Material,
        *,
        levels: Sequence[float] = LEVELS,
        autocast: Callable[[], Any],
        words: bool = True,
    ) -> None:
        self.family = family
        self.objective = objective
        self.material = material
        self.levels = tuple(levels)
        self.autocast = autocast
        self.words = words and bool(material.trigger)
        self._base: dict[tuple[str, int, int], Tensor] = {}
        self.base: Figures | None = None

    @torch.no_grad()
    def measure(self, network: Network | None) -> Figures:
        """Losses with the network at its strength; None stands for the base model.

        The base is measured first, once. The caller has dropouts off and, for the base, the multiplier at 1.
        """
        base = self.measure_base(network)
        return base if network is None else self._measure(is_base=False)

    @torch.no_grad()
    def measure_base(self, network: Network | None) -> Figures:
        """Losses of the base model: those with ``network``, if one is attached, switched off."""
        if self.base is None:
            if network is not None:
                network.set_multiplier(0.0)
            try:
                self.base = self._measure(is_base=True)
            finally:
                if network is not None:
                    network.set_multiplier(1.0)
        return self.base

    @torch.no_grad()
    def losses(self, batches: Sequence[Batch]) -> tuple[float, ...]:
        """Losses with the batches' captions at each level, at whatever strength the network has now."""
        count = sum(len(batch.pictures) for batch in batches)
        found = [0.0] * len(self.levels)
        for batch in batches:
            text = self._encode(batch, batch.captions)
            for place, level in enumerate(self.levels):
                noised = self._noised(batch, level)
                loss_B = self.objective.loss(self._predict(noised, text, batch), noised, batch)[1]
                found[place] += float(loss_B.sum()) / count
        return tuple(found)

    def _measure(self, *, is_base: bool) -> Figures:
        own, other, plain, moved = ([0.0] * len(self.levels) for _ in range(4))
        count = sum(len(batch.pictures) for batch in self.material.batches)
        for number, batch in enumerate(self.material.batches):
            texts = self._texts(batch, self.material.other[number])
            for place, level in enumerate(self.levels):
                noised = self._noised(batch, level)
                for kind, text in texts.items():
                    prediction = self._predict(noised, text, batch)
                    loss_B = self.objective.loss(prediction, noised, batch)[1]
                    {"own": own, "other": other, "plain": plain}[kind][place] += float(loss_B.sum()) / count
                    if kind != ("plain" if self.words else "other"):
                        continue
                    key = ("moved", number, place)
                    if is_base:
                        self._base[key] = prediction.float().cpu()
                    else:
                        base = self._base[key].to(prediction.device)
                        error_B = (prediction.float() - base).square().mean((1, 2, 3))
                        usual_B = (base - noised.target_BCHW).square().mean((1, 2, 3))
                        moved[place] += float((error_B / usual_B.clamp(min=1e-9)).sum()) / count
        return Figures(
            levels=self.levels,
            own=tuple(own),
            other=tuple(other),
            plain=tuple(plain) if self.words else (),
            held=self.losses(self.material.held) if self.material.held else (),
            moved=tuple(moved),
        )

    def _texts(self, batch: Batch, others: tuple[str, ...]) -> dict[str, Any]:
        found = {"own": self._encode(batch, batch.captions), "other": self._encode(batch, others)}
        if self.words:
            trigger = self.material.trigger
            words = tuple(without_trigger(caption, trigger) for caption in batch.captions)
            found["plain"] = self._encode(batch, words)
        return found

    def _encode(self, batch: Batch, captions: tuple[str, ...]) -> Any:
        with self.autocast():
            return self.family.encode_batch(replace(batch, captions=captions))

    def _noised(self, batch: Batch, level: float) -> Any:
        assert batch.latents_BCHW is not None
        latents = self.family.to_model_latents(batch.latents_BCHW.to(self.family.device))
        shape = (latents.shape[1], latents.shape[2], latents.shape[3])
        drawn = self.objective.noise_on_cpu(shape, batch.draw_ids, 0, Draws(SEED))
        return self.objective.mix(latents, self.objective.at_level(drawn, level))

    def _predict(self, noised: Any, text: Any, batch: Batch) -> Tensor:
        with self.autocast():
            return self.family.predict(
                noised.noisy_BCHW.to(self.family.dtype), noised.timesteps_B, text, batch
            )
