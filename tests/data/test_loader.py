from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from tests.data.material import job, picture
from trainer.data.cache import prepare
from trainer.data.folder import scan
from trainer.data.images import fit_pixels
from trainer.data.loader import Loader
from trainer.data.types import Batch, Dataset
from trainer.draws import Draws
from trainer.errors import DatasetError
from trainer.families.sd import StableDiffusion
from trainer.job import Job
from trainer.plan import Plan


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for number in range(5):
        picture(tmp_path / "3_x" / f"{number}.png", (64, 64), seed=number)
        (tmp_path / "3_x" / f"{number}.txt").write_text(f"tag{number}, a, b, c, d")
    for number in range(2):
        picture(tmp_path / "3_x" / f"wide{number}.png", (256, 128), seed=10 + number)
    return tmp_path


def wide(folder: Path, **fields: Any) -> Job:
    """Two buckets: 64 x 64 without enlarging, 128 x 64."""
    values: dict[str, Any] = {
        "max_resolution": "128,64",
        "bucket_no_upscale": True,
        "train_batch_size": 2,
        "max_train_steps": 100,
    }
    return job(folder, **{**values, **fields})


def loader(run: Job, family: StableDiffusion | None = None, **values: Any) -> tuple[Loader, Dataset]:
    dataset = scan(run)
    draws = Draws(run.seed)
    cache = None if family is None else prepare(run, dataset, family, draws, emit=lambda _: None)
    plan = Plan.make(run, dataset, values.get("processes", 1))
    return Loader(run, dataset, cache, draws, plan, **values), dataset


def same(first: Batch, second: Batch) -> bool:
    for name in ("pictures", "draw_ids", "captions", "flipped", "sizes", "bucket"):
        if getattr(first, name) != getattr(second, name):
            return False
    for name in ("latents_BCHW", "pixels_BCHW", "masks_B1HW", "loss_weights_B"):
        one, other = getattr(first, name), getattr(second, name)
        if (one is None) != (other is None) or (one is not None and not torch.equal(one, other)):
            return False
    return True


def test_an_epoch_holds_every_picture_as_often_as_it_is_repeated(
    folder: Path, family: StableDiffusion
) -> None:
    made, dataset = loader(wide(folder), family)
    batches = list(made.epoch(0))
    assert len(batches) == made.batches_per_epoch == 8 + 3
    assert Counter(index for batch in batches for index in batch.pictures) == dict.fromkeys(range(7), 3)
    for batch in batches:
        assert {dataset.fits[index].bucket for index in batch.pictures} == {batch.bucket}
        assert batch.latents_BCHW is not None
        width, height = batch.bucket
        assert batch.latents_BCHW.shape == (len(batch.pictures), 4, height // 8, width // 8)
        assert batch.pixels_BCHW is None
        assert batch.sizes == tuple(dataset.pictures[index].size for index in batch.pictures)
        assert batch.loss_weights_B.tolist() == [1.0] * len(batch.pictures)
    assert sorted(len(batch.pictures) for batch in batches)[0] == 1  # 15 samples in twos


def test_order_is_that_of_the_draws_and_changes_with_the_epoch(folder: Path) -> None:
    run = wide(folder, cache_latents=False)
    made, dataset = loader(run)
    for epoch in range(2):
        order = Draws(run.seed).batches(epoch, dataset.entries(), 2)
        assert [batch.pictures for batch in made.epoch(epoch)] == order
    assert Draws(1).batches(0, dataset.entries(), 2) != Draws(1).batches(1, dataset.entries(), 2)


def test_draw_ids_are_places_in_the_run(folder: Path, family: StableDiffusion) -> None:
    made, _ = loader(wide(folder), family)
    for epoch in range(3):
        for place, batch in enumerate(made.epoch(epoch)):
            first = (epoch * 11 + place) * 2
            assert batch.draw_ids == tuple(range(first, first + len(batch.pictures)))


def test_resuming_anywhere_gives_the_same_batches(folder: Path, family: StableDiffusion) -> None:
    rules = "--caption_tag_dropout_rate 0.3 --token_warmup_step 0.5"
    for cached in (family, None):
        run = wide(
            folder,
            shuffle_caption=True,
            flip_aug=True,
            cache_latents=cached is not None,
            color_aug=cached is None,
            random_crop=cached is None,
            additional_parameters=rules,
        )
        made, _ = loader(run, cached)
        whole = list(made.epoch(2))
        again, _ = loader(run, cached)
        rest = list(again.epoch(2, start=4))
        assert len(rest) == len(whole) - 4
        assert all(same(one, other) for one, other in zip(whole[4:], rest, strict=True))


def test_several_processes_share_the_batches_of_one(folder: Path, family: StableDiffusion) -> None:
    run = wide(folder, flip_aug=True, shuffle_caption=True)
    whole = list(loader(run, family)[0].epoch(1))
    parts = [list(loader(run, family, process=rank, processes=3)[0].epoch(1)) for rank in range(3)]
    assert [len(part) for part in parts] == [4, 4, 4]
    merged = [batch for turn in zip(*parts, strict=True) for batch in turn]
    assert all(same(one, other) for one, other in zip(whole, merged[:11], strict=True))
    assert same(merged[11], whole[0])  # the last round is filled from the beginning


def test_flips_use_the_mirrored_latents_and_masks(folder: Path, family: StableDiffusion) -> None:
    picture(folder / "3_x" / "clear.png", (64, 64), mode="RGBA")
    run = wide(folder, flip_aug=True, additional_parameters="--alpha_mask")
    dataset = scan(run)
    cache = prepare(run, dataset, family, Draws(1), emit=lambda _: None)
    assert cache is not None
    made = Loader(run, dataset, cache, Draws(1), Plan.make(run, dataset))
    flips = 0
    for epoch in range(6):
        for batch in made.epoch(epoch):
            assert batch.latents_BCHW is not None
            assert batch.masks_B1HW is not None
            assert batch.masks_B1HW.shape == (len(batch.pictures), 1, batch.bucket[1], batch.bucket[0])
            for row, (index, flipped) in enumerate(zip(batch.pictures, batch.flipped, strict=True)):
                entry = cache.get(index)
                wanted = entry.flipped_CHW if flipped else entry.latents_CHW
                assert wanted is not None
                assert torch.equal(batch.latents_BCHW[row], wanted)
                assert entry.mask_HW is not None
                mask = entry.mask_HW.flip(1) if flipped else entry.mask_HW
                assert torch.equal(batch.masks_B1HW[row, 0], mask)
                flips += flipped
    assert 0.3 < flips / (6 * 24) < 0.7


def test_batches_without_any_mask_have_none(folder: Path, family: StableDiffusion) -> None:
    assert all(batch.masks_B1HW is None for batch in loader(wide(folder), family)[0].epoch(0))


def test_pixels_are_fitted_augmented_pictures(folder: Path) -> None:
    run = wide(folder, cache_latents=False, flip_aug=True)
    made, dataset = loader(run)
    for batch in made.epoch(0):
        assert batch.latents_BCHW is None
        assert batch.pixels_BCHW is not None
        for row, (index, flipped) in enumerate(zip(batch.pictures, batch.flipped, strict=True)):
            with Image.open(dataset.pictures[index].path) as image:
                pixels = fit_pixels(np.array(image.convert("RGB")), dataset.fits[index])
            expected = torch.from_numpy(pixels.astype(np.float64) / 127.5 - 1).permute(2, 0, 1)
            expected = expected.flip(2) if flipped else expected
            assert torch.allclose(batch.pixels_BCHW[row].double(), expected, atol=1e-6)


def test_random_crop_moves_within_the_excess(tmp_path: Path) -> None:
    picture(tmp_path / "1_x" / "a.png", (160, 64))
    run = job(
        tmp_path,
        cache_latents=False,
        random_crop=True,
        bucket_no_upscale=True,
        max_resolution="256,64",
        max_bucket_reso=256,
    )
    made, dataset = loader(run)
    assert dataset.fits[0].bucket == (128, 64)
    with Image.open(tmp_path / "1_x" / "a.png") as image:
        whole = np.array(image.convert("RGB"))
    starts = set()
    for epoch in range(40):
        batch = next(iter(made.epoch(epoch)))
        assert batch.pixels_BCHW is not None
        found = ((batch.pixels_BCHW[0].permute(1, 2, 0) + 1) * 127.5).round().numpy().astype(np.uint8)
        places = [x for x in range(33) if np.array_equal(whole[:, x : x + 128], found)]
        assert len(places) == 1
        starts.add(places[0])
    assert len(starts) > 15


def test_captions_are_processed_for_the_place_in_the_run(folder: Path, family: StableDiffusion) -> None:
    run = wide(
        folder,
        keep_tokens=1,
        gradient_accumulation_steps=2,
        additional_parameters="--token_warmup_step 100 --token_warmup_min 0",
    )
    made, _ = loader(run, family)
    # 11 batches in twos are 6 updates an epoch: epoch 10, batch 8 comes after 64 updates, 2 of 4 tags.
    batches = list(made.epoch(10))
    for place, batch in enumerate(batches):
        tags = (60 + place // 2) * 4 // 100
        for text in batch.captions:
            if text.startswith("tag"):
                assert len(text.split(", ")) == 1 + tags
    dropping = wide(folder, caption_dropout_every_n_epochs=2)
    for epoch, empty in ((0, False), (1, True), (2, False)):
        texts = [text for batch in loader(dropping, family)[0].epoch(epoch) for text in batch.captions]
        assert all((text == "") == empty for text in texts)


def test_class_pictures_weigh_prior_loss_weight(tmp_path: Path, family: StableDiffusion) -> None:
    picture(tmp_path / "img" / "2_x" / "a.png")
    picture(tmp_path / "reg" / "1_y" / "b.png", seed=1)
    run = job(
        tmp_path / "img", reg_data_dir=str(tmp_path / "reg"), prior_loss_weight=0.25, train_batch_size=4
    )
    (batch,) = loader(run, family)[0].epoch(0)
    assert sorted(zip(batch.pictures, batch.loss_weights_B.tolist(), strict=True)) == [
        (0, 1.0),
        (0, 1.0),
        (1, 0.25),
        (1, 0.25),
    ]


def threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "batches"]


def test_threads_end_with_the_epoch_a_break_and_an_error(folder: Path, family: StableDiffusion) -> None:
    made, dataset = loader(wide(folder), family)
    list(made.epoch(0))
    assert not threads()
    for _ in made.epoch(0):
        break
    assert not threads()
    iterator = made.epoch(0)
    next(iterator)
    assert isinstance(iterator, Iterator)
    del iterator
    deadline = time.monotonic() + 5
    while threads() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not threads()
    uncached = wide(folder, cache_latents=False)
    made, dataset = loader(uncached)
    dataset.pictures[3].path.unlink()
    with pytest.raises(DatasetError, match=r"3\.png"):
        list(made.epoch(0))
    assert not threads()


def test_batches_are_made_ahead_but_not_without_bound(folder: Path, family: StableDiffusion) -> None:
    run = wide(folder)
    made, dataset = loader(run, family)
    asked: list[int] = []
    cached = made._cached

    def noted(index: int, draw_id: int) -> Any:
        asked.append(draw_id)
        return cached(index, draw_id)

    made._cached = noted  # type: ignore[method-assign]
    big = replace(dataset, repeats=tuple(50 for _ in dataset.repeats))
    made._entries = big.entries()
    iterator = made.epoch(0)
    next(iterator)
    deadline = time.monotonic() + 5
    while len(asked) < 10 and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(0.2)
    assert 8 <= len(asked) <= 14  # one taken, four waiting, one in hand, of two samples each
    iterator.close()  # type: ignore[attr-defined]


def test_a_cached_batch_is_cheap(
    folder: Path, family: StableDiffusion, capsys: pytest.CaptureFixture[str]
) -> None:
    made, dataset = loader(wide(folder, shuffle_caption=True, flip_aug=True, train_batch_size=4), family)
    made._entries = replace(dataset, repeats=tuple(300 for _ in dataset.repeats)).entries()
    began = time.perf_counter()
    count = sum(1 for _ in made.epoch(0))
    each_ms = (time.perf_counter() - began) / count * 1000
    with capsys.disabled():
        print(f"\na cached batch of 4 takes {each_ms:.2f} ms")
    assert each_ms < 20


@pytest.mark.gpu
def test_batches_for_cuda_are_pinned(folder: Path, family: StableDiffusion) -> None:
    made, _ = loader(wide(folder), family, device=torch.device("cuda"))
    batch = next(iter(made.epoch(0)))
    assert batch.latents_BCHW is not None
    assert batch.latents_BCHW.is_pinned()
    assert batch.loss_weights_B.is_pinned()
