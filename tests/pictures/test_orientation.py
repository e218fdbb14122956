"""Mirrored pictures of the demo's subject are found, and nothing is claimed where nothing can be known."""

from __future__ import annotations

import random

import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageFont

from assets.demo import draw, make_subject
from trainer.errors import StopTraining
from trainer.pictures import orientation
from trainer.pictures.faces import Face
from trainer.pictures.orientation import Look, compare, look, yaw


@pytest.fixture(scope="module")
def subject() -> list[Look]:
    """The demo's 16 pictures: the same person with a patch over one eye, looking left, right and ahead."""
    return [look(np.asarray(draw.draw(portrait)), None) for portrait in make_subject.portraits()]


def test_no_picture_of_a_consistent_set_is_named(subject: list[Look]) -> None:
    found = compare(subject)
    assert found.is_clear
    assert found.suspects == []
    assert found.words() == "No picture looks mirrored against the others."


@pytest.mark.parametrize("mirrored", [{4}, {0, 7, 11}, {1, 2, 5, 9, 14}])
def test_the_mirrored_ones_are_named_and_only_they(subject: list[Look], mirrored: set[int]) -> None:
    found = compare([one.mirror() if index in mirrored else one for index, one in enumerate(subject)])
    assert set(found.suspects) == mirrored
    assert found.reference not in mirrored
    assert all(found.confidences[index] > 0.75 for index in mirrored)
    assert f"{len(mirrored)} look" in found.words()


def test_the_look_of_a_mirrored_picture_is_the_mirrored_look() -> None:
    pixels = np.asarray(draw.draw(make_subject.portraits()[0], 256))
    one, other = look(pixels, None).mirror(), look(np.ascontiguousarray(pixels[:, ::-1]), None)
    for name in ("cells_KD", "mirrored_KD", "points", "descriptors"):
        assert np.allclose(getattr(one, name), getattr(other, name), atol=1e-4), name


def test_a_symmetric_set_is_called_so() -> None:
    rng = random.Random(0)
    looks = []
    for _ in range(10):
        half = np.asarray(draw.draw(draw.random_portrait(rng)))[:, :64]
        looks.append(look(np.concatenate([half, half[:, ::-1]], axis=1), None))
    found = compare(looks)
    assert not found.is_clear
    assert found.suspects == []
    assert "too symmetric" in found.words()


def test_features_decide_where_a_scene_comes_again(subject: list[Look]) -> None:
    """Shifted cuts of one scene full of detail: the cells barely help, the features do."""
    rng = np.random.default_rng(3)
    scene = Image.fromarray(rng.integers(0, 256, (40, 60, 3), dtype=np.uint8)).resize((600, 400), 3)
    looks = []
    for index in range(8):
        left, top = 12 * index, 7 * (index % 3)
        looks.append(look(np.asarray(scene.crop((left, top, left + 420, top + 320))), None))
    looks[2], looks[5] = looks[2].mirror(), looks[5].mirror()
    assert sorted(compare(looks).suspects) == [2, 5]


def test_many_pictures_are_compared_with_some(subject: list[Look], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(orientation, "MOST", 12)
    steps: list[tuple[int, int]] = []
    found = compare(
        [one.mirror() if index in (3, 8) else one for index, one in enumerate(subject)],
        advance=lambda done, total: steps.append((done, total)),
    )
    assert sum((sign < 0) == (index in (3, 8)) for index, sign in enumerate(found.signs)) >= 15
    assert steps[-1] == (16, 16)


def test_few_pictures_say_nothing_and_stop_stops(subject: list[Look]) -> None:
    assert not compare(subject[:3]).is_clear
    with pytest.raises(StopTraining):
        compare(subject, stop=lambda: True)


def test_writing_tells_though_nothing_else_comes_again() -> None:
    rng = np.random.default_rng(5)
    looks = []
    for index in range(10):
        colours = rng.integers(40, 216, (4, 5, 3), dtype=np.uint8)
        image = Image.fromarray(colours).resize((400, 300), Image.Resampling.BICUBIC)
        font = ImageFont.load_default(int(rng.integers(34, 50)))
        place = int(rng.integers(0, 120)), int(rng.integers(0, 230))
        ImageDraw.Draw(image).text(place, "Kiln Street", "white", font, stroke_width=1, stroke_fill="black")
        one = look(np.asarray(image), None)
        looks.append(one.mirror() if index in (2, 7) else one)
    found = compare(looks)
    assert found.is_clear
    assert sorted(found.suspects) == [2, 7]


def test_a_mirrored_face_looks_the_other_way_and_a_symmetric_one_straight() -> None:
    face = Face(0.25, 0.2, 0.75, 0.8, 1.0)
    turned = next(portrait for portrait in make_subject.portraits() if portrait.facing == "left")
    pixels = np.asarray(draw.draw(turned, 256))
    here, there = yaw(pixels, face), yaw(np.ascontiguousarray(pixels[:, ::-1]), face)
    assert here == pytest.approx(-there, abs=1e-3)
    assert abs(here) > 0.01
    half = pixels[:, :128]
    assert yaw(np.concatenate([half, half[:, ::-1]], axis=1), face) == pytest.approx(0, abs=1e-3)
