"""What a data set is made of, from a file on disk to a batch on its way to the device.

Axes: B batch, C channels, H/W height and width (of pixels or latents, as the name says).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from trainer.pictures.edits import NONE, Edit

if TYPE_CHECKING:  # sizes and captions are asked for where PyTorch is not there yet
    from torch import Tensor

__all__ = ["Batch", "Dataset", "DatasetFinding", "Fit", "Picture", "Size", "Subset"]

Size = tuple[int, int]
"""(width, height) in pixels."""


@dataclass(frozen=True)
class DatasetFinding:
    """Something about the data that a person should know, with the file it is about."""

    level: Literal["info", "warning", "error"]
    message: str
    path: Path | None = None


@dataclass(frozen=True, kw_only=True)
class Subset:
    """One image folder and how its pictures and captions are treated (sd-scripts: subset)."""

    folder: Path
    repeats: int
    class_tokens: str | None
    is_reg: bool = False
    caption_extension: str = ".txt"
    caption_prefix: str = ""
    caption_suffix: str = ""
    caption_separator: str = ","
    secondary_separator: str = ""
    shuffle_caption: bool = False
    keep_tokens: int = 0
    keep_tokens_separator: str = ""
    enable_wildcard: bool = False
    caption_dropout_rate: float = 0.0
    caption_dropout_every_n_epochs: int = 0
    caption_tag_dropout_rate: float = 0.0
    token_warmup_min: int = 1
    token_warmup_step: float = 0.0
    flip_aug: bool = False
    color_aug: bool = False
    random_crop: bool = False
    alpha_mask: bool = False
    face_crop_aug_range: tuple[float, float] | None = None
    mask_folder: Path | None = None
    """Loss masks under the pictures' names, white where the loss counts (sd-scripts: conditioning_data_dir)."""
    masks_optional: bool = False
    """Whether pictures may lack a mask, and count whole: masks that were drawn on the page."""
    resize_interpolation: str = ""
    """"" leaves the choice to `images.resize`."""

    @property
    def masked(self) -> bool:
        """Whether its samples carry a loss mask."""
        return self.alpha_mask or self.mask_folder is not None


@dataclass(frozen=True, kw_only=True)
class Picture:
    """One readable picture. ``size`` is what is trained: EXIF orientation and edits are applied first."""

    path: Path
    subset: int
    """Index into `Dataset.subsets`."""
    size: Size
    caption: str
    """As stored: first line, or all lines with wildcards on, or the class tokens without a file."""
    caption_file: Path | None
    mask_file: Path | None = None
    edit: Edit = NONE
    """What a person changed about it on the page; whoever reads its pixels or mask applies it."""


@dataclass(frozen=True)
class Fit:
    """How a picture is brought into its bucket: resized to cover it, then cropped in the middle."""

    bucket: Size
    resized: Size

    def upscaled(self, size: Size) -> bool:
        """Whether a picture of ``size`` has to be enlarged."""
        return self.resized[0] > size[0] or self.resized[1] > size[1]


@dataclass(frozen=True)
class Dataset:
    """Everything known about the training pictures before any pixel is read for training."""

    subsets: tuple[Subset, ...]
    pictures: tuple[Picture, ...]
    fits: tuple[Fit, ...]
    """One for each picture."""
    repeats: tuple[int, ...]
    """How often each picture comes in an epoch, class-picture balancing included; 0 where a class
    picture is not needed."""
    buckets: tuple[Size, ...]
    """Sizes in use, ascending; batches hold pictures of one size."""
    num_train_images: int
    """Repeats included, class pictures not (the figure that sd-scripts reports)."""
    num_reg_images: int
    mean_aspect_error: float
    findings: tuple[DatasetFinding, ...] = ()
    held: tuple[tuple[Picture, Fit], ...] = ()
    """Training pictures that are not trained (hold_out): they are in none of the other fields."""

    def held_out(self) -> Dataset | None:
        """The held-out pictures as a data set of their own; None without any."""
        if not self.held:
            return None
        pictures, fits = zip(*self.held, strict=True)
        return replace(self, pictures=pictures, fits=fits, repeats=(1,) * len(pictures), held=())

    def entries(self) -> list[list[int]]:
        """For each bucket the indices of its pictures, each as often as it is repeated."""
        place = {bucket: index for index, bucket in enumerate(self.buckets)}
        entries: list[list[int]] = [[] for _ in self.buckets]
        for index, (fit, repeats) in enumerate(zip(self.fits, self.repeats, strict=True)):
            if repeats:
                entries[place[fit.bucket]] += [index] * repeats
        return entries

    def batches_per_epoch(self, batch_size: int) -> int:
        """Batches of an epoch: each bucket is rounded up to whole batches."""
        return sum(-(-len(bucket) // batch_size) for bucket in self.entries())

    def bucket_counts(self) -> Mapping[Size, int]:
        """Samples of an epoch in each bucket."""
        return {bucket: len(entries) for bucket, entries in zip(self.buckets, self.entries(), strict=True)}


@dataclass(frozen=True, kw_only=True)
class Batch:
    """One micro-batch, ready for the device. Tensors are on the CPU (pinned where that helps)."""

    pictures: tuple[int, ...]
    """Indices into `Dataset.pictures`."""
    draw_ids: tuple[int, ...]
    """Place of each sample in the run, for `Draws`."""
    latents_BCHW: Tensor | None
    """Cached latents as the VAE sampled them (SD families: unscaled), float32."""
    pixels_BCHW: Tensor | None
    """Pictures in [-1, 1] where latents are not cached."""
    captions: tuple[str, ...]
    """Captions after all processing, for this sample at this step."""
    loss_weights_B: Tensor
    """1, or prior_loss_weight for class pictures."""
    masks_B1HW: Tensor | None
    """Loss mask in [0, 1] at bucket size, where masked loss has one."""
    flipped: tuple[bool, ...]
    sizes: tuple[Size, ...]
    """Upright picture sizes before resizing (SDXL's original size)."""
    bucket: Size
    extra: Mapping[str, Tensor] = field(default_factory=dict)
    """What a family caches beside the latents (text encoder outputs)."""
