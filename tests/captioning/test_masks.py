"""Masks: drawn on what the page shows, saved where training reads them, shown as training reads them."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from trainer.captioning import masks
from trainer.config import KohyaConfig
from trainer.data import folder as scanner
from trainer.data.cache import _Work
from trainer.data.types import Dataset
from trainer.errors import DatasetError
from trainer.job import Job
from trainer.pictures import edits


def png(values_HW: np.ndarray[Any, Any]) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(values_HW.astype(np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    path = tmp_path / "img" / "1_cat" / "a.png"
    path.parent.mkdir(parents=True)
    noise = np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(noise).save(path)
    Image.fromarray(noise).save(path.with_name("b.png"))
    return path


def scan(picture: Path, **fields: Any) -> tuple[Job, Dataset]:
    values = {"max_resolution": "64,64", "min_bucket_reso": 64, "max_bucket_reso": 128, **fields}
    job = Job.from_config(
        KohyaConfig(train_data_dir=str(picture.parent.parent), output_dir="out", **values), base=Path.cwd()
    )
    return job, scanner.scan(job)


def trained(picture: Path, **fields: Any) -> dict[str, Any]:
    """The masks that the cache of latents reads, by picture."""
    _, dataset = scan(picture, **fields)

    class NoFamily:
        cache_suffix = ".npz"

    work = object.__new__(_Work)
    work.dataset, work.family = dataset, NoFamily()  # type: ignore[assignment]
    return {
        item.path.name: None if (mask := work.read_pixels(index).mask_HW) is None else mask.numpy()
        for index, item in enumerate(dataset.pictures)
    }


def test_a_drawn_mask_is_trained_and_other_pictures_count_whole(picture: Path) -> None:
    half = np.zeros((64, 64))
    half[:, 32:] = 255
    file = masks.save(picture, png(half))
    found = trained(picture, masked_loss=True)
    np.testing.assert_array_equal(found["a.png"], half / 255)
    np.testing.assert_array_equal(found["b.png"], np.ones((64, 64)))
    assert trained(picture) == {"a.png": None, "b.png": None}
    _, dataset = scan(picture, masked_loss=True)
    shown = masks.read(picture, dataset.pictures[0].mask_file, dataset.subsets[0], masked_loss=True)
    assert (shown.kind, shown.trained) == ("drawn", True)
    assert shown.values_HW is not None
    np.testing.assert_array_equal(shown.values_HW, half)
    assert not masks.read(picture, None, None, masked_loss=False).trained
    masks.remove(picture)
    assert not file.exists()
    assert masks.read(picture, None, None, masked_loss=True).kind == "none"


def test_a_mask_drawn_on_an_edited_picture_comes_to_lie_right(picture: Path) -> None:
    def edit(_: str, old: edits.Edit) -> edits.Edit:
        cut = edits.crop_seen(old, (8, 16, 64, 64), (64, 64))
        return edits.flip(edits.turn(cut, 1))

    edits.change(picture.parent, ["a.png"], edit, "edited")
    shown_size = (48, 56)
    drawn = np.zeros(shown_size[::-1])
    drawn[:20, :10] = 255
    masks.save(picture, png(drawn))
    again = masks.read(picture, None, None, masked_loss=True)
    assert again.values_HW is not None
    np.testing.assert_array_equal(again.values_HW, drawn)
    whole = np.asarray(Image.open(masks.drawn_file(picture)))
    assert whole.shape == (64, 64)
    assert (whole[:16] == 255).all()  # what was cropped away


def test_alpha_is_shown_as_the_settings_use_it(picture: Path) -> None:
    pixels = np.zeros((64, 64, 4), np.uint8)
    pixels[:, :10, 3] = 200
    Image.fromarray(pixels).save(picture)
    options = {"masked_loss": True, "additional_parameters": "--alpha_mask"}
    _, dataset = scan(picture, **options)
    mask = masks.read(picture, None, dataset.subsets[0], masked_loss=True)
    assert (mask.kind, mask.trained) == ("alpha", True)
    assert mask.values_HW is not None
    np.testing.assert_array_equal(mask.values_HW, pixels[:, :, 3])
    np.testing.assert_allclose(trained(picture, **options)["a.png"], pixels[:, :, 3] / 255, atol=1e-6)
    _, dataset = scan(picture)
    unused = masks.read(picture, None, dataset.subsets[0], masked_loss=False)
    assert (unused.kind, unused.trained) == ("alpha", False)
    assert "--alpha_mask" in unused.words


@pytest.mark.parametrize("data", [b"", b"<svg onload=alert(1)>", b"x" * (masks.LARGEST_BYTES + 1)])
def test_what_is_no_mask_is_a_sentence(picture: Path, data: bytes) -> None:
    with pytest.raises(DatasetError, match="mask"):
        masks.save(picture, data)
    assert not masks.drawn_file(picture).exists()
