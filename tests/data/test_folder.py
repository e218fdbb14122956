from __future__ import annotations

import time
from pathlib import Path

import pytest
from PIL import Image

from tests.data.material import job, picture
from trainer.data import images
from trainer.data.folder import kohya_folder, scan
from trainer.data.types import Dataset
from trainer.errors import ConfigError, DatasetError


def messages(dataset: Dataset, level: str | None = None) -> str:
    return "\n".join(f.message for f in dataset.findings if level in (None, f.level))


def test_folder_names() -> None:
    assert kohya_folder("10_sks cat") == (10, "sks cat")
    assert kohya_folder("10") == (10, "")
    assert kohya_folder("3_a_b") == (3, "a_b")
    assert kohya_folder("0_x") == (0, "x")
    assert kohya_folder("cat_10") is None
    assert kohya_folder("10cat") is None


def test_kohya_layout(tmp_path: Path) -> None:
    picture(tmp_path / "10_sks cat" / "b.png", (80, 60))
    picture(tmp_path / "10_sks cat" / "a.JPG", (60, 80), quality=95)
    picture(tmp_path / "2_dog_breed" / "c.webp", (64, 64))
    (tmp_path / "10_sks cat" / "a.txt").write_text("a photo, of it \nsecond line", encoding="utf-8")
    picture(tmp_path / "notes" / "x.png")
    picture(tmp_path / "0_never" / "x.png")
    (tmp_path / "3_nothing").mkdir()
    dataset = scan(job(tmp_path))
    assert [(s.folder.name, s.repeats, s.class_tokens) for s in dataset.subsets] == [
        ("10_sks cat", 10, "sks cat"),
        ("2_dog_breed", 2, "dog_breed"),
    ]
    assert [p.path.name for p in dataset.pictures] == ["a.JPG", "b.png", "c.webp"]
    assert [p.caption for p in dataset.pictures] == ["a photo, of it", "sks cat", "dog_breed"]
    assert [p.caption_file is not None for p in dataset.pictures] == [True, False, False]
    assert dataset.repeats == (10, 10, 2)
    assert (dataset.num_train_images, dataset.num_reg_images) == (22, 0)
    assert sum(dataset.bucket_counts().values()) == 22
    said = messages(dataset)
    assert "rename it to 10_notes" in said
    assert "0_never has 0 repeats" in said
    assert "3_nothing holds no pictures" in said
    assert "1 picture of 2 in 10_sks cat without a .txt caption" in said


def test_batches_and_buckets_follow_repeats(tmp_path: Path) -> None:
    for number in range(3):
        picture(tmp_path / "3_x" / f"{number}.png", (64, 64), seed=number)
    picture(tmp_path / "3_x" / "wide.png", (290, 100))
    dataset = scan(job(tmp_path, bucket_no_upscale=False, max_resolution="128,128", max_bucket_reso=256))
    assert dataset.buckets == ((128, 128), (192, 64))
    assert dataset.bucket_counts() == {(128, 128): 9, (192, 64): 3}
    assert dataset.batches_per_epoch(2) == 5 + 2
    assert dataset.entries() == [[0, 0, 0, 1, 1, 1, 2, 2, 2], [3, 3, 3]]
    assert dataset.mean_aspect_error == pytest.approx((3 - 2.9) / 4)
    assert "3 pictures smaller than their bucket and enlarged" in messages(dataset)
    assert "cropping" not in messages(dataset)
    picture(tmp_path / "3_x" / "long.png", (900, 128))
    run = job(tmp_path, max_resolution="128,128", max_bucket_reso=256)
    assert "cropping cuts more than a fifth off 1 picture: long.png" in messages(scan(run), "warning")


@pytest.mark.parametrize(
    ("train", "reg", "expected"),
    [
        # (repeats, pictures) of each; expected repeats of the class pictures
        ((10, 2), (1, 3), [7, 7, 6]),
        ((1, 4), (3, 4), [3, 3, 0, 0]),
        ((2, 3), (2, 3), [2, 2, 2]),
        ((5, 1), (4, 2), [4, 4]),
        ((1, 1), (7, 1), [7]),
    ],
)
def test_class_pictures_are_balanced(
    tmp_path: Path, train: tuple[int, int], reg: tuple[int, int], expected: list[int]
) -> None:
    for number in range(train[1]):
        picture(tmp_path / "img" / f"{train[0]}_sks cat" / f"{number}.png", seed=number)
    for number in range(reg[1]):
        picture(tmp_path / "reg" / f"{reg[0]}_cat" / f"{number}.png", seed=100 + number)
    dataset = scan(job(tmp_path / "img", reg_data_dir=str(tmp_path / "reg")))
    assert list(dataset.repeats[train[1] :]) == expected
    assert dataset.num_train_images == train[0] * train[1]
    assert dataset.num_reg_images == reg[0] * reg[1]
    assert [s.is_reg for s in dataset.subsets] == [False, True]
    assert sum(dataset.bucket_counts().values()) == train[0] * train[1] + sum(expected)
    assert ("not used" in messages(dataset)) == (0 in expected)


def test_plain_folder_is_one_subset(tmp_path: Path) -> None:
    picture(tmp_path / "a.png")
    picture(tmp_path / "b.png", seed=1)
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfein M\xc3\xa4dchen\r\n")
    dataset = scan(job(tmp_path))
    assert len(dataset.subsets) == 1
    assert dataset.subsets[0].class_tokens is None
    assert [p.caption for p in dataset.pictures] == ["ein Mädchen", ""]
    assert dataset.repeats == (1, 1)
    assert "trained with an empty caption: b.png" in messages(dataset, "warning")
    repeated = scan(job(tmp_path, additional_parameters="--dataset_repeats 5"))
    assert repeated.num_train_images == 10


def test_classic_mistakes_are_named(tmp_path: Path) -> None:
    picture(tmp_path / "img" / "10_cat" / "a.png")
    with pytest.raises(DatasetError, match=r"one folder too high: choose .*img, which holds 10_cat"):
        scan(job(tmp_path))
    inside = scan(job(tmp_path / "img" / "10_cat"))
    assert inside.num_train_images == 10
    assert inside.pictures[0].caption == "cat"
    assert "numbered folders: it is trained with 10 repeats" in messages(inside, "info")
    picture(tmp_path / "img" / "5_dog" / "a.png")
    assert "neighbours (5_dog) are not" in messages(scan(job(tmp_path / "img" / "10_cat")), "warning")
    picture(tmp_path / "img" / "loose.png")
    both = scan(job(tmp_path / "img"))
    assert len(both.pictures) == 2
    assert "1 picture directly in" in messages(both, "warning")
    picture(tmp_path / "flat" / "cats" / "a.png")
    with pytest.raises(DatasetError, match="rename cats to 10_cats"):
        scan(job(tmp_path / "flat"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(DatasetError, match="no pictures in train_data_dir"):
        scan(job(tmp_path / "empty"))
    (tmp_path / "file").write_text("x")
    with pytest.raises(DatasetError, match="is a file"):
        scan(job(tmp_path, train_data_dir=str(tmp_path / "file")))
    with pytest.raises(DatasetError, match="does not exist"):
        scan(job(tmp_path, train_data_dir=str(tmp_path / "none")))


def test_broken_pictures_are_named_and_left_out(tmp_path: Path) -> None:
    folder = tmp_path / "1_x"
    good = picture(folder / "good.png")
    whole = picture(folder / "whole.jpg", (200, 200), seed=4).read_bytes()
    (folder / "cut.jpg").write_bytes(whole[:3000])
    (folder / "empty.png").write_bytes(b"")
    (folder / "text.webp").write_text("hello")
    picture(folder / "tiny.png", (63, 200))
    (folder / "logo.svg").write_text("<svg/>")
    (folder / "anim.gif").write_bytes(b"GIF89a")
    (folder / "._good.png").write_bytes(b"from a Mac")
    run = job(tmp_path, bucket_no_upscale=True, max_resolution="256,256", max_bucket_reso=256)
    dataset = scan(run)
    assert [p.path.name for p in dataset.pictures] == ["good.png", "whole.jpg"]
    errors = [f for f in dataset.findings if f.level == "error"]
    assert sorted(f.path.name for f in errors if f.path) == ["cut.jpg", "empty.png", "text.webp", "tiny.png"]
    assert all(str(f.path) in f.message for f in errors)
    assert "anim.gif, logo.svg" in messages(dataset, "warning")
    for path in (good, folder / "whole.jpg"):
        path.unlink()
    with pytest.raises(DatasetError, match="none of the 4 pictures"):
        scan(run)


def test_captions(tmp_path: Path) -> None:
    folder = tmp_path / "1_cls"
    for number, name in enumerate(["a", "b", "c", "d", "girl_10_20_30_40"]):
        picture(folder / f"{name}.png", seed=number)
    (folder / "a.caption").write_text("from a")
    (folder / "b.caption").write_bytes(b"")
    (folder / "c.caption").write_text("\n")
    (folder / "d.txt").write_text("not this one")
    (folder / "girl.caption").write_text("shared")
    for extension in (".caption", "caption"):
        dataset = scan(job(tmp_path, caption_extension=extension))
        assert [p.caption for p in dataset.pictures] == ["from a", "cls", "", "cls", "shared"]
        assert "empty caption files" in messages(dataset, "warning")
        assert "set caption_extension to .txt" in messages(dataset, "warning")
    # Kohya's page does not send an empty extension; its engine then reads .caption.
    assert scan(job(tmp_path, caption_extension="")).pictures[0].caption == "from a"


def test_all_lines_are_kept_for_wildcards(tmp_path: Path) -> None:
    picture(tmp_path / "1_x" / "a.png")
    (tmp_path / "1_x" / "a.txt").write_text(" one \n\n two\nthree", encoding="utf-8")
    assert scan(job(tmp_path)).pictures[0].caption == "one"
    wild = scan(job(tmp_path, additional_parameters="--enable_wildcard"))
    assert wild.pictures[0].caption == "one\ntwo\nthree"


@pytest.mark.parametrize(
    ("content", "says"), [("café".encode("latin-1"), "not UTF-8"), ("cat".encode("utf-16"), "UTF-16")]
)
def test_caption_in_another_encoding_names_the_file(tmp_path: Path, content: bytes, says: str) -> None:
    picture(tmp_path / "1_x" / "a.png")
    (tmp_path / "1_x" / "a.txt").write_bytes(content)
    with pytest.raises(DatasetError, match=says) as caught:
        scan(job(tmp_path))
    assert str(tmp_path / "1_x" / "a.txt") in str(caught.value)


def test_same_stem_and_same_content_are_reported(tmp_path: Path) -> None:
    folder = tmp_path / "1_x"
    picture(folder / "a.png")
    picture(folder / "a.jpg", seed=2)
    (folder / "copy.png").write_bytes((folder / "a.png").read_bytes())
    said = messages(scan(job(tmp_path)), "warning")
    assert "a.jpg and a.png" in said
    assert "the same picture, trained 2 times" in said


def test_orientation_decides_the_bucket(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[images.ORIENTATION_TAG] = 6
    picture(tmp_path / "1_x" / "a.jpg", (192, 128), exif=exif)
    dataset = scan(job(tmp_path, max_resolution="256,256", max_bucket_reso=256, bucket_no_upscale=True))
    assert dataset.pictures[0].size == (128, 192)
    assert dataset.fits[0].bucket == (128, 192)
    assert "turned upright" in messages(dataset, "info")


def test_job_settings_reach_the_subset(tmp_path: Path) -> None:
    picture(tmp_path / "1_x" / "a.png", mode="RGBA")
    run = job(
        tmp_path,
        shuffle_caption=True,
        keep_tokens=2,
        flip_aug=True,
        caption_dropout_rate=0.1,
        caption_dropout_every_n_epochs=3,
        additional_parameters=(
            "--caption_prefix pre --caption_suffix post --caption_separator ; --secondary_separator ;;; "
            "--keep_tokens_separator ||| --caption_tag_dropout_rate 0.2 --token_warmup_min 2 --token_warmup_step 0.5 "
            "--alpha_mask --resize_interpolation box --face_crop_aug_range 1.0,3.0"
        ),
    )
    dataset = scan(run)
    subset = dataset.subsets[0]
    assert (subset.shuffle_caption, subset.keep_tokens, subset.flip_aug, subset.alpha_mask) == (
        True,
        2,
        True,
        True,
    )
    assert (subset.caption_prefix, subset.caption_suffix) == ("pre", "post")
    assert (subset.caption_separator, subset.secondary_separator, subset.keep_tokens_separator) == (
        ";",
        ";;;",
        "|||",
    )
    assert (subset.caption_dropout_rate, subset.caption_dropout_every_n_epochs) == (0.1, 3)
    assert (subset.caption_tag_dropout_rate, subset.token_warmup_min, subset.token_warmup_step) == (
        0.2,
        2,
        0.5,
    )
    assert subset.resize_interpolation == "box"
    assert subset.face_crop_aug_range is None
    assert "face_crop_aug_range has no effect" in messages(dataset, "warning")
    assert "transparency" in messages(scan(job(tmp_path)), "info")
    with pytest.raises(ConfigError, match="face_crop_aug_range"):
        scan(job(tmp_path, additional_parameters="--face_crop_aug_range 3,1"))


def test_progress_and_speed_for_a_thousand_pictures(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = picture(tmp_path / "one.jpg", (512, 512), quality=90).read_bytes()
    folder = tmp_path / "set" / "1_x"
    folder.mkdir(parents=True)
    for number in range(1000):
        (folder / f"{number:04d}.jpg").write_bytes(data + bytes([number % 256, number // 256]))
        (folder / f"{number:04d}.txt").write_text(f"caption {number}")
    seen: list[tuple[int, int]] = []
    began = time.perf_counter()
    dataset = scan(job(tmp_path / "set"), lambda done, total: seen.append((done, total)))
    first = time.perf_counter() - began
    began = time.perf_counter()
    scan(job(tmp_path / "set"))
    again = time.perf_counter() - began
    with capsys.disabled():
        print(f"\n1,000 JPEGs of 512 x 512 scanned in {first:.2f} s, again in {again:.2f} s")
    assert len(dataset.pictures) == 1000
    assert seen == [(number + 1, 1000) for number in range(1000)]
    assert first < 60
    assert again < first


def test_some_pictures_are_held_out_where_it_is_asked_for_and_there_are_enough(tmp_path: Path) -> None:
    for number in range(16):
        picture(tmp_path / "3_x" / f"{number:02}.png", (64, 64), seed=number)
    everything = scan(job(tmp_path))
    assert (len(everything.pictures), everything.num_train_images, everything.held) == (16, 48, ())
    dataset = scan(job(tmp_path, hold_out=True))
    assert [each.path.name for each, _ in dataset.held] == ["04.png", "12.png"]
    assert (len(dataset.pictures), dataset.num_train_images) == (14, 42)
    assert not {each.path for each, _ in dataset.held} & {each.path for each in dataset.pictures}
    assert "held out for the verdict and not trained: 04.png, 12.png" in messages(dataset, "info")
    beside = dataset.held_out()
    assert beside is not None
    assert [each.path.name for each in beside.pictures] == ["04.png", "12.png"]
    for number in range(5):
        (tmp_path / "3_x" / f"{number:02}.png").unlink()
    few = scan(job(tmp_path, hold_out=True))
    assert (few.num_train_images, few.held_out()) == (33, None)
    assert "no picture is held out: 11 pictures are few" in messages(few, "info")
