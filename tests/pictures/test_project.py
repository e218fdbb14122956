"""Tokens that a tokenizer has no word for, and folders that the trainer opens."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.data.material import job, picture
from trainer.data import folder
from trainer.errors import ConfigError, DatasetError
from trainer.files import REPOSITORY
from trainer.pictures import project

TABLE = REPOSITORY / "assets" / "models" / "clip" / "bpe_simple_vocab_16e6.txt.gz"


@pytest.fixture(scope="module")
def pieces() -> project.Pieces:
    """CLIP's own tokenizer."""
    from trainer.tokens import clip_tokenizer

    tokenizer = clip_tokenizer(TABLE)
    return lambda text: list(tokenizer.tokenize(text))


def test_a_name_becomes_a_token_that_clip_has_no_word_for(pieces: project.Pieces) -> None:
    vocabulary = set(pieces("jane doe"))
    assert vocabulary == {"jane</w>", "doe</w>"}  # the names themselves are words
    for name in ("Jane Doe", "Marie Curie", "Zoë", "Nguyễn Văn Đạt", "Bo", "sks", "Li"):
        token = project.propose(name, pieces)
        assert token.is_rare, token
        assert "".join(token.pieces) == token.text
        assert any(letter.isdigit() for letter in token.text)
    assert project.propose("Marie Curie", pieces).text == "m4r13cur13"
    assert project.check_token("person", pieces).is_rare is False
    assert "means something" in project.check_token("person", pieces).words()


def test_without_a_tokenizer_it_says_so() -> None:
    token = project.propose("Jane Doe")
    assert (token.text, token.is_rare) == ("j4n3d03", None)
    assert "no tokenizer" in token.words()
    with pytest.raises(ConfigError, match="letters from A to Z"):
        project.propose("!?")


@pytest.mark.parametrize(("count", "repeats"), [(0, 1), (1, 400), (16, 25), (26, 15), (399, 1), (1000, 1)])
def test_repeats_are_400_over_the_pictures(count: int, repeats: int) -> None:
    assert project.repeats_for(count) == repeats


def test_the_guides_folders_train_as_they_are(tmp_path: Path) -> None:
    pictures = project.make(tmp_path, "j4n3", "person", 25)
    assert sorted(path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*")) == [
        "j4n3",
        "j4n3/images",
        "j4n3/images/25_j4n3 person",
        "j4n3/results_current",
        "j4n3/txt2img-images",
    ]
    picture(pictures / "a.png")
    assert project.make(tmp_path, "j4n3", "person", 40).name == "40_j4n3 person"
    renamed = project.set_repeats(tmp_path / "j4n3" / "images" / "40_j4n3 person", 7)
    fields = project.fields_of(tmp_path / "j4n3", "j4n3", "person")
    found = folder.scan(job(fields["train_data_dir"]))
    assert (found.num_train_images, found.pictures[0].caption) == (7, "j4n3 person")
    assert found.subsets[0].folder == renamed
    assert fields["output_name"] == "j4n3"
    assert all("j4n3" in line or line.startswith("person") for line in fields["sample_prompts"].splitlines())


@pytest.mark.parametrize("token", ["", "../up", "a/b", "con", "x" * 200, ".hidden", "a:b"])
def test_a_token_that_no_folder_can_have_is_refused(tmp_path: Path, token: str) -> None:
    with pytest.raises(ConfigError, match="cannot be the name of a folder"):
        project.make(tmp_path / "root", token, "", 1)
    assert not (tmp_path / "root").exists()


def test_kohyas_preparation_copies_replaces_and_fills_the_fields(tmp_path: Path) -> None:
    photos, classes = tmp_path / "photos", tmp_path / "classes"
    picture(photos / "a.png")
    (photos / "a.txt").write_text("sks dog on grass")
    picture(classes / "c.png", seed=1)
    place = tmp_path / "dest"
    for _ in range(2):
        fields = project.prepare(place, photos, " sks ", "dog", 40, classes, 1)
    assert sorted(path.relative_to(place).as_posix() for path in place.rglob("*")) == [
        "img",
        "img/40_sks dog",
        "img/40_sks dog/a.png",
        "img/40_sks dog/a.txt",
        "log",
        "model",
        "reg",
        "reg/1_dog",
        "reg/1_dog/c.png",
    ]
    found = folder.scan(
        job(fields["train_data_dir"], reg_data_dir=fields["reg_data_dir"], caption_extension=".txt")
    )
    assert (found.num_train_images, found.num_reg_images) == (40, 1)
    assert fields["output_dir"] == str(place / "model")
    with pytest.raises(DatasetError, match="inside each other"):
        project.prepare(place, place / "img" / "40_sks dog", "sks", "dog", 40)
    with pytest.raises(DatasetError, match="there are no pictures"):
        project.prepare(place, tmp_path, "sks", "dog", 40)
