"""Findings on pictures made to have one flaw each, against a set that has none."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageFilter, ImageFont

from assets.demo import make_subject
from assets.demo.draw import draw
from trainer.pictures import doctor, measures
from trainer.pictures.doctor import Finding, examine
from trainer.pictures.faces import Detector, Face
from trainer.pictures.measures import Measure, measure_all


def scene(seed: int, size: tuple[int, int] = (480, 400)) -> Image.Image:
    """A picture with detail and colours of its own."""
    rng = np.random.default_rng(seed)
    small = rng.integers(0, 256, (6, 7, 3), dtype=np.uint8)
    image = Image.fromarray(small).resize(size, Image.Resampling.BICUBIC)
    values = np.asarray(image).astype(np.float32) + rng.normal(0, 14, (size[1], size[0], 1))
    return Image.fromarray(values.clip(0, 255).astype(np.uint8))


@pytest.fixture
def album(tmp_path: Path) -> Path:
    for seed in range(10):
        scene(seed).save(tmp_path / f"good{seed}.jpg", quality=92)
    return tmp_path


def found_in(album: Path, **options: bool) -> list[Finding]:
    paths = sorted(path for path in album.iterdir() if path.is_file())
    found = measure_all(paths, Detector())
    return examine({path.name: one for path, one in found.items()}, person=options.get("person", False))


def about(findings: list[Finding], kind: str) -> list[tuple[str, ...]]:
    return [finding.names for finding in findings if finding.kind == kind]


def test_a_good_set_has_no_findings(album: Path) -> None:
    assert found_in(album) == []


def test_each_flaw_is_found_in_its_picture_alone(album: Path) -> None:
    (album / "copy.jpg").write_bytes((album / "good1.jpg").read_bytes())
    Image.open(album / "good2.jpg").resize((600, 500)).save(album / "near.png")
    Image.open(album / "good3.jpg").transpose(Image.Transpose.FLIP_LEFT_RIGHT).save(album / "mirror.png")
    scene(20, (200, 300)).save(album / "small.png")
    wide = scene(21, (2400, 300))
    ImageDraw.Draw(wide).rectangle((900, 60, 1500, 240), "black")  # sharp, as the others are by their noise
    wide.save(album / "wide.png")
    scene(22).filter(ImageFilter.GaussianBlur(6)).save(album / "blurred.jpg")
    boxed = Image.new("RGB", (480, 400))
    boxed.paste(scene(23, (480, 300)), (0, 50))
    boxed.save(album / "boxed.png")
    signed = scene(24)
    ImageDraw.Draw(signed).text((40, 355), "© Jane Doe Photos 2024", "white", ImageFont.load_default(26))
    signed.save(album / "signed.png")
    (album / "broken.jpg").write_bytes((album / "good4.jpg").read_bytes()[:3000])
    findings = found_in(album)
    assert about(findings, "broken") == [("broken.jpg",)]
    assert about(findings, "same") == [("copy.jpg", "good1.jpg")]
    assert sorted(map(sorted, about(findings, "near"))) == [
        ["good2.jpg", "near.png"],
        ["good3.jpg", "mirror.png"],
    ]
    assert about(findings, "small") == [("small.png",)]
    assert about(findings, "large") == [("wide.png",)]
    assert all(finding.repairs for finding in findings)  # a button for each
    assert about(findings, "blur") == [("blurred.jpg",)]
    assert about(findings, "bars") == [("boxed.png",)]
    assert about(findings, "text") == [("signed.png",)]
    assert len(findings) == 9
    crop = next(finding for finding in findings if finding.kind == "bars").repairs[0].box
    assert crop is not None
    assert crop == pytest.approx((0, 0.125, 1, 0.875), abs=0.01)
    # Of two that are nearly the same, the smaller one goes.
    near = next(finding for finding in findings if "good2.jpg" in finding.names and finding.kind == "near")
    assert near.repairs[0].names == ("good2.jpg",)


@pytest.mark.parametrize("place", [(20, 20), (300, 350), (170, 180)])
def test_a_mark_at_one_place_of_many_pictures_is_found(album: Path, place: tuple[int, int]) -> None:
    """A half transparent logo on eight of ten; writing alone would not show in the middle."""
    marked = [f"good{seed}.jpg" for seed in range(8)]
    for seed in range(10):
        flat = Image.blend(scene(seed), Image.new("RGB", (480, 400), "grey"), 0.5)
        flat.save(album / f"good{seed}.jpg", quality=92)
    for name in marked:
        image = Image.open(album / name).convert("RGBA")
        logo = Image.new("RGBA", image.size)
        ImageDraw.Draw(logo).text(
            place,
            "Photo",
            (255, 255, 255, 150),
            ImageFont.load_default(44),
            stroke_width=2,
            stroke_fill=(0, 0, 0, 150),
        )
        Image.alpha_composite(image, logo).convert("RGB").save(album / name, quality=92)
    logos = [finding for finding in found_in(album) if finding.kind == "logo"]
    assert [finding.names for finding in logos] == [tuple(marked)]
    words = {20: "at the top left", 300: "at the bottom right", 170: "at the middle"}[place[0]]
    assert words in logos[0].message
    kept = [repair.box for repair in logos[0].repairs if repair.do == "crop"]
    assert len(kept) == (place[0] != 170)  # cut off, unless too little were left
    for box in kept:
        assert box is not None
        left, top, right, bottom = (
            value * edge for value, edge in zip(box, (480, 400, 480, 400), strict=True)
        )
        assert (
            right <= place[0] + 4 or left >= place[0] + 100 or bottom <= place[1] + 12 or top >= place[1] + 40
        )


def test_one_wall_behind_all_pictures_is_no_mark(album: Path) -> None:
    wall = scene(99)
    for seed in range(10):
        image = wall.copy()
        image.paste(scene(seed, (160, 250)), (30 + 25 * seed, 150))
        image.save(album / f"good{seed}.jpg", quality=92)
    assert about(found_in(album), "logo") == []


def test_the_demo_has_no_near_duplicates_and_no_writing(tmp_path: Path) -> None:
    """Drawn portraits of one layout are not one picture, and a face that no detector knows is not missed."""
    for index, portrait in enumerate(make_subject.portraits()):
        draw(portrait, 256).save(tmp_path / f"{index:02}.png")
    findings = found_in(tmp_path, person=True)
    assert [finding.kind for finding in findings] == ["noface"]
    assert "faces are not judged here" in findings[0].message


def with_faces(*widths: float, yaw: float = 0.0, colour: float = 0.0) -> Measure:
    faces = tuple(Face(0.4, 0.3, 0.4 + width, 0.3 + width, 9, yaw) for width in widths)
    return Measure(
        size=(512, 512),
        sha256=str((widths, yaw, colour)),
        tiny=np.random.default_rng(int(colour * 100)).integers(0, 256, 768, dtype=np.uint8).tobytes().hex(),
        hashes=(int(colour * 977) ** 5 % 2**64, int(colour * 1009) ** 7 % 2**64),
        sharpness=900,
        faces=faces,
        background=(colour, 0, 0) * 3,
        clothes=(50, colour, 0),
    )


def test_faces_are_counted_where_a_person_is_trained() -> None:
    people = {f"{index}.jpg": with_faces(0.3, yaw=index % 3 - 1, colour=index * 20.0) for index in range(9)}
    assert examine(people, person=True) == []
    people["two.jpg"] = with_faces(0.3, 0.2, colour=333)
    people["passer.jpg"] = with_faces(0.3, 0.08, colour=433)
    people["none.jpg"] = with_faces(colour=533)
    findings = examine(people, person=True)
    assert about(findings, "faces") == [("two.jpg",)]
    assert about(findings, "noface") == [("none.jpg",)]
    assert examine(people, person=False) == []
    crop = next(finding for finding in findings if finding.kind == "faces").repairs[0].box
    assert crop is not None
    assert crop[0] < 0.4
    assert crop[2] > 0.7


def test_a_set_without_variety_is_told_so() -> None:
    alike = {f"{index}.jpg": with_faces(0.3, colour=40 + index / 9) for index in range(9)}
    kinds = [finding.kind for finding in examine(alike, person=True)]
    assert [kind for kind in kinds if kind in ("background", "clothes", "pose")] == [
        "background",
        "clothes",
        "pose",
    ]
    two = dict(list(alike.items())[:2])
    assert [finding.kind for finding in examine(two, person=True) if finding.kind == "few"] == ["few"]


def test_nothing_is_measured_twice_and_a_changed_file_is(
    album: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths, cache = sorted(album.iterdir()), album / "cache"
    first = measure_all(paths, Detector(), cache=cache)
    calls: list[str] = []
    real = measures.measure

    def counted(path: Path, detector: Detector) -> object:
        calls.append(path.name)
        return real(path, detector)

    monkeypatch.setattr(measures, "measure", counted)
    assert measure_all(paths, Detector(), cache=cache) == first
    assert calls == []
    scene(77).save(album / "good0.jpg")
    again = measure_all(paths, Detector(), cache=cache)
    assert calls == ["good0.jpg"]
    assert again[album / "good0.jpg"] != first[album / "good0.jpg"]
    next(cache.iterdir()).write_text('{"good0.jpg": {"key": 3}, "good1.jpg": 7}')
    assert measure_all(paths, Detector(), cache=cache) == again
    missing = measure_all([album / "gone.jpg"], Detector())
    assert "check that it exists" in missing[album / "gone.jpg"].error
    assert replace(missing[album / "gone.jpg"], error="") == Measure()


def test_the_built_in_detector_knows_where_yunet_would_lie(tmp_path: Path) -> None:
    assert Detector(tmp_path).name == "Haar"
    assert doctor.KINDS.keys() >= {"blur", "same", "near"}
