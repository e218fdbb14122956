from __future__ import annotations

import hashlib
import os
import threading
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from tests.data.material import job, picture
from trainer.data import cache as caches
from trainer.data import images
from trainer.data.buckets import crop_ltrb
from trainer.data.cache import KEY, LatentCache, prepare
from trainer.data.folder import scan
from trainer.data.types import Dataset
from trainer.draws import Draws
from trainer.errors import DatasetError, StopTraining
from trainer.events import Event, LogLine, PhaseStarted, Progress
from trainer.families.sd import StableDiffusion
from trainer.job import Job


class Counting:
    """A family whose VAE calls are counted; everything else is the real one."""

    def __init__(self, family: StableDiffusion) -> None:
        self.family = family
        self.batches: list[tuple[int, ...]] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self.family, name)

    def encode_images(self, pixels_BCHW: Tensor, generators: Sequence[torch.Generator]) -> Tensor:
        self.batches.append(tuple(pixels_BCHW.shape))
        return self.family.encode_images(pixels_BCHW, generators)

    @property
    def pictures(self) -> int:
        return sum(batch[0] for batch in self.batches)


def build(run: Job, family: Any, **values: Any) -> tuple[LatentCache, Counting, Dataset, list[Event]]:
    counting, events = Counting(family), []  # type: tuple[Counting, list[Event]]
    dataset = scan(run)
    cache = prepare(run, dataset, counting, Draws(run.seed), emit=events.append, **values)  # type: ignore[arg-type]
    assert cache is not None
    return cache, counting, dataset, events


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for number, size in enumerate([(96, 80), (80, 96), (64, 64)]):
        picture(tmp_path / "2_x" / f"{number}.png", size, seed=number)
    return tmp_path


def test_nothing_is_cached_unless_asked_for(folder: Path, family: StableDiffusion) -> None:
    run = job(folder, cache_latents=False)
    assert prepare(run, scan(run), family, Draws(1), emit=lambda _: None) is None


def test_latents_are_the_vaes_sample_of_the_fitted_picture(folder: Path, family: StableDiffusion) -> None:
    cache, _, dataset, _ = build(job(folder, flip_aug=True), family)
    path = dataset.pictures[0].path
    with Image.open(path) as image:
        pixels = np.array(image.convert("RGB"))
    fit = dataset.fits[0]
    assert (fit.bucket, fit.resized) == ((64, 64), (77, 64))
    values = (
        torch.from_numpy(images.fit_pixels(pixels, fit).astype(np.float64) / 127.5 - 1)
        .permute(2, 0, 1)[None]
        .float()
    )
    content = int(hashlib.sha256(path.read_bytes()).hexdigest()[:15], 16)
    posterior = family.vae.encode(values).latent_dist
    noise = torch.randn(posterior.mean.shape[1:], generator=Draws(1).generator("vae", content))
    assert torch.allclose(cache.get(0).latents_CHW, (posterior.mean + posterior.std * noise)[0], atol=1e-5)
    mirrored = family.vae.encode(values.flip(3)).latent_dist
    noise = torch.randn(posterior.mean.shape[1:], generator=Draws(1).generator("vae", content, 1))
    flipped = cache.get(0).flipped_CHW
    assert flipped is not None
    assert torch.allclose(flipped, (mirrored.mean + mirrored.std * noise)[0], atol=1e-5)


def test_file_has_sd_scripts_name_arrays_and_layout(folder: Path, family: StableDiffusion) -> None:
    _, _, dataset, _ = build(job(folder, cache_latents_to_disk=True, flip_aug=True), family)
    names = sorted(path.name for path in (folder / "2_x").glob("*.npz"))
    assert names == ["0_0096x0080_sd.npz", "1_0080x0096_sd.npz", "2_0064x0064_sd.npz"]
    with np.load(folder / "2_x" / names[0], allow_pickle=False) as arrays:
        assert sorted(arrays.files) == sorted(
            ["latents", "original_size", "crop_ltrb", "latents_flipped", KEY]
        )
        assert arrays["latents"].shape == arrays["latents_flipped"].shape == (4, 8, 8)
        assert arrays["latents"].dtype == np.float32
        assert arrays["original_size"].tolist() == [96, 80]
        assert arrays["crop_ltrb"].tolist() == list(crop_ltrb(dataset.fits[0].bucket, (96, 80)))
    assert not list((folder / "2_x").glob("*.tmp"))


def test_second_start_encodes_nothing_and_gives_the_same(folder: Path, family: StableDiffusion) -> None:
    run = job(folder, cache_latents_to_disk=True, flip_aug=True)
    first, counting, _, _ = build(run, family)
    assert counting.pictures == 6
    # Another seed: latents on disk are drawn once and stay, as in sd-scripts.
    second, counting, _, events = build(replace(run, seed=99), family)
    assert counting.pictures == 0
    for index in range(3):
        assert torch.equal(first.get(index).latents_CHW, second.get(index).latents_CHW)
        assert torch.equal(first.get(index).flipped_CHW, second.get(index).flipped_CHW)  # type: ignore[arg-type]
    assert not [event for event in events if isinstance(event, LogLine)]


def test_only_the_edited_picture_is_made_anew(folder: Path, family: StableDiffusion) -> None:
    run = job(folder, cache_latents_to_disk=True)
    before, _, _, _ = build(run, family)
    path = folder / "2_x" / "1.png"
    stat = path.stat()
    picture(path, (80, 96), seed=50)
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))  # even with the old time stamp
    after, counting, _, events = build(run, family)
    assert counting.pictures == 1
    assert torch.equal(before.get(0).latents_CHW, after.get(0).latents_CHW)
    assert not torch.equal(before.get(1).latents_CHW, after.get(1).latents_CHW)
    assert any(isinstance(event, LogLine) and event.message.startswith("1 of 3") for event in events)


def test_another_vae_or_size_or_treatment_is_never_served(
    folder: Path, family: StableDiffusion, other_family: StableDiffusion
) -> None:
    run = job(folder, cache_latents_to_disk=True)
    build(run, family)
    assert family.vae_fingerprint() != other_family.vae_fingerprint()
    assert build(run, other_family)[1].pictures == 3
    assert build(run, other_family)[1].pictures == 0
    # A larger resolution: pictures of 96 x 80 now keep their size, the 64 x 64 one stays as it was.
    larger = job(folder, cache_latents_to_disk=True, max_resolution="128,128", bucket_no_upscale=True)
    dataset = build(larger, other_family)[2]
    assert dataset.fits[0].resized == (96, 80)
    assert build(larger, other_family)[1].pictures == 0
    assert build(run, other_family)[1].pictures == 2
    # Another way of resizing; flips that were not there before.
    boxed = job(folder, cache_latents_to_disk=True, additional_parameters="--resize_interpolation box")
    assert build(boxed, other_family)[1].pictures == 3
    assert build(job(folder, cache_latents_to_disk=True, flip_aug=True), other_family)[1].pictures == 6
    # What was made with flips serves without them too.
    assert build(run, other_family)[1].pictures == 0


def test_same_shape_other_crop_is_not_served(tmp_path: Path, family: StableDiffusion) -> None:
    picture(tmp_path / "1_x" / "a.png", (100, 100))
    run = job(tmp_path, cache_latents_to_disk=True, max_resolution="64,64", bucket_no_upscale=False)
    assert build(run, family)[1].pictures == 1
    dataset = scan(run)
    other = replace(dataset, fits=(replace(dataset.fits[0], resized=(80, 80)),))
    counting = Counting(family)
    prepare(run, other, counting, Draws(1), emit=lambda _: None)  # type: ignore[arg-type]
    assert counting.pictures == 1


def kohya_file(path: Path, value: float, shape: tuple[int, int, int] = (4, 8, 8)) -> None:
    np.savez(
        path,
        latents=np.full(shape, value, dtype=np.float32),
        original_size=np.array([96, 80]),
        crop_ltrb=np.array([0.0, 5.0, 64.0, 59.0]),
    )


def test_kohyas_own_files_are_taken_only_without_checking(folder: Path, family: StableDiffusion) -> None:
    path = folder / "2_x" / "0_0096x0080_sd.npz"
    kohya_file(path, 3.0)
    kohya_file(folder / "2_x" / "1_0080x0096_sd.npz", 3.0, (4, 8, 16))  # of another size
    trusted, counting, _, _ = build(job(folder, cache_latents_to_disk=True, skip_cache_check=True), family)
    assert counting.pictures == 2
    assert torch.equal(trusted.get(0).latents_CHW, torch.full((4, 8, 8), 3.0))
    checked, counting, _, _ = build(job(folder, cache_latents_to_disk=True), family)
    assert counting.pictures == 1
    assert not torch.equal(checked.get(0).latents_CHW, trusted.get(0).latents_CHW)


def test_latents_that_another_program_put_into_our_file_are_noticed(
    folder: Path, family: StableDiffusion
) -> None:
    run = job(folder, cache_latents_to_disk=True)
    build(run, family)
    path = folder / "2_x" / "0_0096x0080_sd.npz"
    with np.load(path) as arrays:
        kept = {name: arrays[name] for name in arrays.files}
    kept["latents"] = kept["latents"] + 1  # sd-scripts rewrites its arrays and copies ours
    np.savez(path, **kept)
    assert build(run, family)[1].pictures == 1


@pytest.mark.parametrize("damage", ["empty", "cut", "text", "bits", "nan", "missing array", "huge header"])
def test_broken_files_are_made_anew(folder: Path, family: StableDiffusion, damage: str) -> None:
    for trust in (False, True):
        run = job(folder, cache_latents_to_disk=True, skip_cache_check=trust)
        good, _, _, _ = build(run, family)
        path = folder / "2_x" / "2_0064x0064_sd.npz"
        data = bytearray(path.read_bytes())
        if damage == "empty":
            path.write_bytes(b"")
        elif damage == "cut":
            path.write_bytes(bytes(data[: len(data) // 2]))
        elif damage == "text":
            path.write_text("hello")
        elif damage == "bits":
            data[400] ^= 0x40
            path.write_bytes(bytes(data))
        elif damage == "nan":
            kohya_file(path, float("nan"))
        elif damage == "missing array":
            np.savez(path, original_size=np.array([64, 64]))
        else:
            path.write_bytes(bytes(data).replace(b"(4, 8, 8)", b"(4,8888)"[:9].ljust(9)))
        again, counting, _, _ = build(run, family)
        assert counting.pictures == 1
        assert torch.equal(good.get(2).latents_CHW, again.get(2).latents_CHW)


def test_ram_cache_leaves_no_files_and_batches_by_bucket(folder: Path, family: StableDiffusion) -> None:
    for number in range(5):
        picture(folder / "2_x" / f"more{number}.png", (64, 64), seed=20 + number)
    picture(folder / "2_x" / "wide.png", (192, 64))
    run = job(folder, vae_batch_size=4, bucket_no_upscale=False, max_resolution="64,64", max_bucket_reso=128)
    dataset = scan(run)
    dataset = replace(
        dataset, fits=(*dataset.fits[:-1], replace(dataset.fits[-1], bucket=(128, 64), resized=(192, 64)))
    )
    counting = Counting(family)
    cache = prepare(run, dataset, counting, Draws(1), emit=lambda _: None)  # type: ignore[arg-type]
    assert cache is not None
    assert [batch[0] for batch in counting.batches] == [4, 4, 1]
    assert counting.batches[-1] == (1, 3, 64, 128)
    assert not list(folder.rglob("*.npz"))
    assert len(cache) == 9


def test_vae_noise_does_not_hang_on_the_other_pictures(folder: Path, family: StableDiffusion) -> None:
    before, _, _, _ = build(job(folder), family)
    picture(folder / "2_x" / "000.png", seed=77)
    after, _, dataset, _ = build(job(folder), family)
    assert [p.path.name for p in dataset.pictures] == ["0.png", "000.png", "1.png", "2.png"]
    assert torch.allclose(before.get(0).latents_CHW, after.get(0).latents_CHW, atol=1e-6)
    assert torch.allclose(before.get(2).latents_CHW, after.get(3).latents_CHW, atol=1e-6)


def test_alpha_mask_is_cached_at_bucket_size(tmp_path: Path, family: StableDiffusion) -> None:
    picture(tmp_path / "1_x" / "a.png", (128, 128), mode="RGBA")
    picture(tmp_path / "1_x" / "b.png", (64, 64))
    for disk in (False, True, True):
        run = job(tmp_path, additional_parameters="--alpha_mask", cache_latents_to_disk=disk)
        cache, _, _, _ = build(run, family)
        mask = cache.get(0).mask_HW
        assert mask is not None
        assert mask.shape == (64, 64)
        with Image.open(tmp_path / "1_x" / "a.png") as image:
            alpha = np.array(image)[:, :, 3].astype(float)
        expected = alpha.reshape(64, 2, 64, 2).mean((1, 3)) / 255
        assert np.abs(mask.numpy() - expected).max() < 0.003
        assert torch.equal(cache.get(1).mask_HW, torch.ones(64, 64))  # type: ignore[arg-type]


def test_pictures_that_share_a_stem_do_not_share_latents(tmp_path: Path, family: StableDiffusion) -> None:
    picture(tmp_path / "1_x" / "a.jpg", seed=1)
    picture(tmp_path / "1_x" / "a.png", seed=2)
    run = job(tmp_path, cache_latents_to_disk=True)
    first, counting, _, _ = build(run, family)
    assert counting.pictures == 2
    assert sorted(p.name for p in tmp_path.rglob("*.npz")) == ["a.png_0064x0064_sd.npz", "a_0064x0064_sd.npz"]
    second, counting, _, _ = build(run, family)
    assert counting.pictures == 0
    assert not torch.equal(second.get(0).latents_CHW, second.get(1).latents_CHW)
    assert torch.equal(first.get(1).latents_CHW, second.get(1).latents_CHW)


def test_flux_files_hold_several_sizes(tmp_path: Path, family: StableDiffusion) -> None:
    class Flux(Counting):
        cache_suffix = "_flux.npz"

    picture(tmp_path / "1_x" / "a.png", (128, 128))
    for resolution, expected in (("64,64", 1), ("128,128", 1), ("64,64", 0), ("128,128", 0)):
        run = job(tmp_path, cache_latents_to_disk=True, max_resolution=resolution)
        flux = Flux(family)
        assert prepare(run, scan(run), flux, Draws(1), emit=lambda _: None) is not None  # type: ignore[arg-type]
        assert flux.pictures == expected
    with np.load(tmp_path / "1_x" / "a_0128x0128_flux.npz") as arrays:
        stems = ("latents", "original_size", "crop_ltrb", KEY)
        assert sorted(arrays.files) == sorted(f"{stem}_{size}" for stem in stems for size in ("8x8", "16x16"))
        assert arrays["latents_16x16"].shape == (4, 16, 16)


def test_unused_class_pictures_are_not_encoded(tmp_path: Path, family: StableDiffusion) -> None:
    picture(tmp_path / "img" / "1_x" / "a.png")
    for number in range(4):
        picture(tmp_path / "reg" / "1_y" / f"{number}.png", seed=number)
    _, counting, dataset, _ = build(job(tmp_path / "img", reg_data_dir=str(tmp_path / "reg")), family)
    assert dataset.repeats == (1, 1, 0, 0, 0)
    assert counting.pictures == 2


def test_progress_and_stop(folder: Path, family: StableDiffusion) -> None:
    _, _, _, events = build(job(folder, cache_latents_to_disk=True), family)
    phases = [event for event in events if isinstance(event, PhaseStarted)]
    assert [(event.phase, event.total) for event in phases] == [
        ("check latent cache", 3),
        ("cache latents", 3),
    ]
    last = [event for event in events if isinstance(event, Progress)][-1]
    assert (last.phase, last.done, last.total) == ("cache latents", 3, 3)
    for disk in (False, True):
        with pytest.raises(StopTraining):
            build(job(folder, cache_latents_to_disk=disk), family, stop=lambda: True)


def test_a_folder_that_cannot_be_written_is_said_once(
    folder: Path, family: StableDiffusion, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(_: Path) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(caches, "atomic_path", refuse)
    cache, _, _, events = build(job(folder, cache_latents_to_disk=True), family)
    said = [event for event in events if isinstance(event, LogLine)]
    assert len(said) == 1
    assert said[0].level == "warning"
    assert "No space left" in said[0].message
    assert cache.get(2).latents_CHW.shape == (4, 8, 8)


def test_entries_beyond_the_memory_budget_come_from_their_files(
    folder: Path, family: StableDiffusion, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = job(folder, cache_latents_to_disk=True)
    rich, _, _, _ = build(run, family)

    class Poor:
        available = 0

    monkeypatch.setattr("trainer.data.cache.psutil.virtual_memory", Poor)
    poor, _, _, _ = build(run, family)
    assert torch.equal(poor.get(1).latents_CHW, rich.get(1).latents_CHW)
    (folder / "2_x" / "1_0080x0096_sd.npz").unlink()
    with pytest.raises(DatasetError, match="removed or changed during the run"):
        poor.get(1)
    assert rich.get(1).latents_CHW.shape == (4, 8, 8)


def test_a_picture_that_vanishes_or_breaks_stops_with_its_name(folder: Path, family: StableDiffusion) -> None:
    run = job(folder)
    dataset = scan(run)
    (folder / "2_x" / "1.png").unlink()
    with pytest.raises(DatasetError, match=r"1\.png"):
        prepare(run, dataset, family, Draws(1), emit=lambda _: None)
    picture(folder / "2_x" / "1.png", (70, 70))
    with pytest.raises(DatasetError, match="changed its size"):
        prepare(run, dataset, family, Draws(1), emit=lambda _: None)


def test_pictures_are_decoded_while_the_vae_works(
    folder: Path, family: StableDiffusion, monkeypatch: pytest.MonkeyPatch
) -> None:
    decoded, seen, lock = 0, [], threading.Lock()
    read = images.read_rgb

    def counting_read(*args: Any) -> Any:
        nonlocal decoded
        with lock:
            decoded += 1
        return read(*args)

    class Slow(Counting):
        def encode_images(self, pixels_BCHW: Tensor, generators: Sequence[torch.Generator]) -> Tensor:
            time.sleep(0.3)
            seen.append(decoded)
            return self.family.encode_images(pixels_BCHW, generators)

    monkeypatch.setattr(caches, "read_rgb", counting_read)
    for number in range(9):
        picture(folder / "2_x" / f"more{number}.png", (64, 64), seed=20 + number)
    run = job(folder)
    prepare(run, scan(run), Slow(family), Draws(1), emit=lambda _: None)  # type: ignore[arg-type]
    assert seen[0] > 1  # more than the picture that is being encoded
