from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from tests.data.material import job, picture
from trainer.data.cache import prepare
from trainer.data.dataset_config import apply_dataset_config
from trainer.data.folder import scan
from trainer.data.loader import Loader
from trainer.data.types import Dataset
from trainer.draws import Draws
from trainer.errors import ConfigError, DatasetError
from trainer.families.sd import StableDiffusion
from trainer.plan import Plan

TOML = """
[general]
shuffle_caption = true
caption_extension = "caption"
keep_tokens = 1
enable_bucket = true
bucket_no_upscale = false

[[datasets]]
resolution = [64, 128]
batch_size = 3
min_bucket_reso = 64
max_bucket_reso = 128
keep_tokens = 2

  [[datasets.subsets]]
  image_dir = "cats"
  class_tokens = "sks cat"
  num_repeats = 4
  keep_tokens = 3
  caption_prefix = "pre"

  [[datasets.subsets]]
  image_dir = "10_class"
  is_reg = true
  flip_aug = true
  keep_tokens_separator = "|||"
"""


def read(folder: Path, text: str, name: str = "data.toml", **fields: object) -> Dataset:
    (folder / name).write_text(text, encoding="utf-8")
    run = job(folder, train_data_dir="ignored", dataset_config=str(folder / name), **fields)
    return scan(apply_dataset_config(run))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    picture(tmp_path / "cats" / "a.png")
    picture(tmp_path / "10_class" / "b.png", seed=1)
    (tmp_path / "cats" / "a.caption").write_text("a caption")
    return tmp_path


def test_values_are_looked_up_from_the_inside_out(folder: Path) -> None:
    dataset = read(folder, TOML, keep_tokens=9, caption_dropout_rate=0.5)
    cats, classes = dataset.subsets
    assert (cats.folder, cats.repeats, cats.class_tokens) == (folder / "cats", 4, "sks cat")
    # The number in a folder's name says nothing here.
    assert (classes.repeats, classes.class_tokens, classes.is_reg) == (1, None, True)
    assert (cats.keep_tokens, classes.keep_tokens) == (3, 2)
    assert (cats.caption_prefix, classes.caption_prefix) == ("pre", "")
    assert (cats.flip_aug, classes.flip_aug) == (False, True)
    assert classes.keep_tokens_separator == "|||"
    assert cats.shuffle_caption
    assert classes.shuffle_caption
    assert cats.caption_dropout_rate == 0.5
    assert cats.caption_extension == ".caption"
    assert [picture.caption for picture in dataset.pictures] == ["a caption", ""]
    assert dataset.repeats == (4, 4)


def test_the_run_takes_batch_size_and_resolution(folder: Path) -> None:
    (folder / "data.toml").write_text(TOML)
    run = job(folder, dataset_config=str(folder / "data.toml"))
    applied = apply_dataset_config(run)
    assert applied.config.train_batch_size == 3
    assert (applied.width, applied.height, applied.config.max_resolution) == (64, 128, "64,128")
    with pytest.raises(ConfigError, match="batch_size 3, but train_batch_size is 1"):
        scan(run)
    plain = job(folder)
    assert apply_dataset_config(plain) is plain


def test_json_and_several_resolutions(folder: Path) -> None:
    subset = {"image_dir": str(folder / "cats"), "class_tokens": "cat"}
    config = {"datasets": [{"resolution": size, "subsets": [subset]} for size in (64, 128)]}
    dataset = read(folder, json.dumps(config), "data.json", enable_bucket=False)
    assert [fit.bucket for fit in dataset.fits] == [(64, 64), (128, 128)]
    assert dataset.pictures[0].path == dataset.pictures[1].path
    assert dataset.batches_per_epoch(1) == 2


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (("keep_tokens = 1", "keep_token = 1"), r"\[general\] has keep_token = 1"),
        (("keep_tokens = 3", 'keep_tokens = "three"'), "data set 1, subset 1 has keep_tokens = 'three'"),
        (('image_dir = "cats"', 'folder = "cats"'), "image_dir"),
        (('image_dir = "cats"', 'image_dir = "dogs"'), "dogs is no folder"),
        (('image_dir = "cats"', 'metadata_file = "m.json"'), "metadata_file"),
        (("[general]", "[special]"), "section 'special'"),
        (("[[datasets]]", "[[datasets"), "cannot be read"),
        (("batch_size = 3", "validation_split = 0.1"), "validation_split"),
        (("flip_aug = true", "color_aug = true"), "cache_latents switched off"),
        (("max_bucket_reso = 128", "max_bucket_reso = 64"), "max_bucket_reso 64 is smaller"),
    ],
)
def test_mistakes_are_named(folder: Path, change: tuple[str, str], says: str) -> None:
    assert change[0] in TOML
    with pytest.raises(ConfigError, match=says):
        read(folder, TOML.replace(*change))


def test_data_sets_of_different_batch_size_are_refused(folder: Path) -> None:
    more = TOML + '\n[[datasets]]\nbatch_size = 2\n[[datasets.subsets]]\nimage_dir = "cats"\n'
    with pytest.raises(ConfigError, match="batch size 2, 3"):
        read(folder, more)


MASKED = """
[[datasets]]
  [[datasets.subsets]]
  image_dir = "cats"
  conditioning_data_dir = "masks"
  flip_aug = true
"""


@pytest.mark.parametrize("caching", ["ram", "disk", "none"])
def test_conditioning_pictures_are_loss_masks(folder: Path, family: StableDiffusion, caching: str) -> None:
    mask = np.zeros((64, 64, 3), dtype=np.uint8)
    mask[:, :16] = (255, 7, 7)
    (folder / "masks").mkdir()
    Image.fromarray(mask).save(folder / "masks" / "a.png")
    (folder / "data.toml").write_text(MASKED)
    run = job(
        folder,
        dataset_config=str(folder / "data.toml"),
        masked_loss=True,
        cache_latents=caching == "ram",
        cache_latents_to_disk=caching == "disk",
    )
    dataset = scan(run)
    assert dataset.pictures[0].mask_file == folder / "masks" / "a.png"
    cache = prepare(run, dataset, family, Draws(1), emit=lambda _: None)
    loader = Loader(run, dataset, cache, Draws(1), Plan.make(run, dataset))
    seen = set()
    for epoch in range(12):
        (batch,) = loader.epoch(epoch)
        assert batch.masks_B1HW is not None
        expected = torch.from_numpy(mask[:, :, 0] / 255).float()
        seen.add(batch.flipped[0])
        assert torch.equal(batch.masks_B1HW[0, 0], expected.flip(1) if batch.flipped[0] else expected)
    assert seen == {True, False}


def test_masks_must_fit_their_pictures(folder: Path) -> None:
    (folder / "masks").mkdir()
    with pytest.raises(ConfigError, match="switch masked_loss on"):
        read(folder, MASKED)
    with pytest.raises(DatasetError, match=r"has no mask for a\.png"):
        read(folder, MASKED, masked_loss=True)
    picture(folder / "masks" / "a.JPG", (60, 64))
    with pytest.raises(DatasetError, match="60 x 64 pixels, but"):
        read(folder, MASKED, masked_loss=True)
    with pytest.raises(ConfigError, match="excludes face_crop_aug_range"):
        read(folder, MASKED + "  face_crop_aug_range = [1.0, 2.0]\n", masked_loss=True)
