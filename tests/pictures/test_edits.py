"""Edits: applied by the trainer's own reader, taken back one by one, and never written into a picture."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.data.material import job as job_for
from tests.data.material import picture
from trainer.data import folder
from trainer.data.cache import _Work
from trainer.data.images import fit_pixels, read_rgb
from trainer.errors import DatasetError
from trainer.pictures import edits
from trainer.pictures.edits import NONE, Edit


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """Three pictures of 96 x 64 in Kohya's layout."""
    made = tmp_path / "img" / "2_cat"
    made.mkdir(parents=True)
    for index in range(3):
        picture(made / f"{index}.png", (96, 64), seed=index)
        (made / f"{index}.txt").write_text(f"cat {index}")
    return made


def test_turns_mirrors_and_crops_as_pillow_does(pictures: Path) -> None:
    """Whatever is done to what is seen gives what Pillow gives when it does the same, step after step."""
    pixels, size = read_rgb(pictures / "0.png"), (96, 64)
    image, edit = Image.fromarray(pixels), NONE
    rng = np.random.default_rng(0)
    for turn in range(40):
        kind = int(rng.integers(0, 3))
        width, height = image.size
        if kind == 0:
            image, edit = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT), edits.flip(edit)
        elif kind == 1:
            image, edit = image.transpose(Image.Transpose.ROTATE_270), edits.turn(edit, 1)
        elif turn % 4 == 0 and min(width, height) > 20:
            box = (1, 2, width - 1, height - 1)
            image, edit = image.crop(box), edits.crop_seen(edit, box, size)
        assert edit.size(size) == image.size
        assert np.array_equal(edit.apply(pixels), np.asarray(image)), (turn, edit)
        assert Edit.from_json(json.loads(json.dumps(edit.to_json()))) == edit
    assert edit.crop is not None
    box = (3, 5, 9, 17)
    assert edit.unseen(edit.seen(box, size), size) == box


def test_a_crop_of_nothing_is_refused_and_of_everything_is_none() -> None:
    with pytest.raises(DatasetError, match="draw a larger one"):
        edits.crop_seen(NONE, (90, 0, 96, 64), (96, 64))
    assert edits.crop_seen(NONE, (-5, 0, 200, 64), (96, 64)) == NONE


def test_changes_are_taken_back_and_made_again(pictures: Path) -> None:
    originals = {path.name: path.read_bytes() for path in pictures.glob("?.*")}
    edits.change(pictures, ["0.png", "1.png"], lambda _, edit: edits.flip(edit), "mirror 2")
    edits.change(pictures, ["1.png"], lambda _, edit: edits.turn(edit, 1), "turn 1")
    edits.change(pictures, ["2.png"], lambda _, edit: replace(edit, excluded=True), "leave out 1")
    assert edits.load(pictures).of("1.png") == Edit(flipped=True, turns=3)
    assert [edits.undo(pictures) for _ in range(4)] == ["leave out 1", "turn 1", "mirror 2", ""]
    assert all(edit == NONE for edit in edits.load(pictures).pictures.values())
    assert [edits.redo(pictures) for _ in range(4)] == ["mirror 2", "turn 1", "leave out 1", ""]
    assert edits.load(pictures).of("2.png").excluded
    edits.undo(pictures)
    edits.change(pictures, ["0.png"], lambda _, edit: edits.flip(edit), "mirror back")
    assert edits.redo(pictures) == ""  # a new change ends what could come again
    assert {path.name: path.read_bytes() for path in pictures.glob("?.*")} == originals


@pytest.mark.parametrize("name", ["../0.png", "", "nothing.png", "/etc/passwd"])
def test_only_pictures_of_the_folder_are_edited(pictures: Path, name: str) -> None:
    with pytest.raises(DatasetError, match="there is no picture"):
        edits.change(pictures, [name], lambda _, edit: edits.flip(edit), "mirror")


@pytest.mark.parametrize(
    "text",
    ["", "[]", '{"format": 2}', '{"format": 1, "pictures": {"a": {"crop": [0, 0, 9, 9], "of": [8, 8]}}}'],
)
def test_damaged_edits_stop_rather_than_train_something_else(pictures: Path, text: str) -> None:
    (pictures / ".kiln").mkdir()
    (pictures / ".kiln" / "edits.json").write_text(text)
    with pytest.raises(DatasetError, match=r"damaged.*remove that file"):
        folder.scan(job_for(pictures.parent))


def test_the_trainer_sees_what_the_page_shows(pictures: Path) -> None:
    job = job_for(pictures.parent)
    assert len(folder.scan(job).pictures) == 3
    edits.change(pictures, ["0.png"], lambda _, edit: replace(edit, excluded=True), "leave out")
    edits.change(pictures, ["1.png"], lambda _, edit: edits.crop_seen(edit, (0, 0, 64, 64), (96, 64)), "crop")
    edits.change(pictures, ["2.png"], lambda _, edit: edits.turn(edits.flip(edit), 1), "turn")
    found = folder.scan(job)
    assert [(picture.path.name, picture.size) for picture in found.pictures] == [
        ("1.png", (64, 64)),
        ("2.png", (64, 96)),
    ]
    said = [finding.message for finding in found.findings]
    assert "1 picture of 2_cat left out, as chosen on the Dataset tab" in said
    assert "edits of the Dataset tab in 2_cat: 1 cropped, 1 turned, 1 mirrored" in said
    assert found.num_train_images == 4

    class Vae:
        cache_suffix, latent_factor, latent_channels = "_sd.npz", 8, 4

        def vae_fingerprint(self) -> str:
            return "v"

    work = _Work(job, found, Vae())  # type: ignore[arg-type]
    expected = Image.open(pictures / "2.png").transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    expected = expected.transpose(Image.Transpose.ROTATE_270)
    fitted = fit_pixels(np.asarray(expected), found.fits[1])
    got = (work.read_pixels(1).values_CHW.permute(1, 2, 0).numpy() * 127.5 + 127.5).round()
    assert np.array_equal(got, fitted)
    before = work.key(1, "content")
    edits.change(pictures, ["2.png"], lambda _, edit: edits.flip(edit), "mirror")
    assert _Work(job, folder.scan(job), Vae()).key(1, "content") != before  # type: ignore[arg-type]


def test_a_crop_of_a_replaced_file_is_not_used_and_said(pictures: Path) -> None:
    edits.change(pictures, ["1.png"], lambda _, edit: edits.crop_seen(edit, (0, 0, 64, 64), (96, 64)), "crop")
    picture(pictures / "1.png", (80, 80), seed=9)
    found = folder.scan(job_for(pictures.parent))
    assert found.pictures[1].size == (80, 80)
    assert any("Crop again" in finding.message for finding in found.findings)


def test_all_left_out_is_a_sentence(pictures: Path) -> None:
    names = ["0.png", "1.png", "2.png"]
    edits.change(pictures, names, lambda _, edit: replace(edit, excluded=True), "leave out")
    with pytest.raises(DatasetError, match=r"all 3 pictures .* are left out on the Dataset tab"):
        folder.scan(job_for(pictures.parent))


def test_edited_copies_hold_the_edited_pixels(pictures: Path, tmp_path: Path) -> None:
    edits.change(pictures, ["0.png"], lambda _, edit: replace(edit, excluded=True), "leave out")
    edits.change(pictures, ["1.png"], lambda _, edit: edits.flip(edit), "mirror")
    target = tmp_path / "copies"
    assert edits.write_copies(pictures, target) == (2, 1)
    assert sorted(path.name for path in target.iterdir()) == ["1.png", "1.txt", "2.png", "2.txt"]
    assert np.array_equal(read_rgb(target / "1.png"), read_rgb(pictures / "1.png")[:, ::-1])
    assert (target / "2.png").read_bytes() == (pictures / "2.png").read_bytes()
    with pytest.raises(DatasetError, match="is not empty"):
        edits.write_copies(pictures, target)


def test_a_drawn_mask_is_edited_like_its_picture(pictures: Path) -> None:
    shade = np.linspace(0, 255, 96, dtype=np.uint8)[None, :].repeat(64, axis=0)
    shade[:20] = 0
    (pictures / ".kiln" / "masks").mkdir(parents=True)
    Image.fromarray(shade).save(pictures / ".kiln" / "masks" / "2.png")
    edits.change(pictures, ["2.png"], lambda _, edit: edits.crop_seen(edit, (0, 0, 64, 64), (96, 64)), "crop")
    edits.change(pictures, ["2.png"], lambda _, edit: edits.flip(edit), "mirror")
    job = job_for(pictures.parent, masked_loss=True)
    found = folder.scan(job)

    class Vae:
        cache_suffix, latent_factor, latent_channels = "_sd.npz", 8, 4

    mask = _Work(job, found, Vae()).read_pixels(2).mask_HW  # type: ignore[arg-type]
    assert mask is not None
    assert np.array_equal((mask.numpy() * 255).round(), shade[:64, :64][:, ::-1])
