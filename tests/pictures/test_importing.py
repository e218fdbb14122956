"""Files of strangers: what is a picture comes in, the rest is refused with a sentence, nothing lies outside."""

from __future__ import annotations

import io
import os
import struct
import zipfile
import zlib
from pathlib import Path

import pytest
from PIL import Image

from tests.data.material import picture
from trainer.data.folder import list_pictures
from trainer.errors import DatasetError, StopTraining
from trainer.pictures import importing
from trainer.pictures.importing import bring_in, plain_name


def content(width: int = 40, height: int = 30, kind: str = "PNG", colour: int = 0) -> bytes:
    file = io.BytesIO()
    image = Image.effect_noise((width, height), 60 + colour).convert("RGB")
    image.save(file, kind)
    return file.getvalue()


def huge_png() -> bytes:
    """A valid PNG of 300 megapixels in a few kilobytes of rows that never come."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    head = struct.pack(">IIBBBBB", 20_000, 15_000, 8, 2, 0, 0, 0)
    rows = zlib.compress(bytes(20_000 * 3 + 1))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


def everything_under(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*")}


def test_files_folders_and_captions_come_in(tmp_path: Path) -> None:
    album = tmp_path / "album"
    picture(album / "deep" / "a.jpg", seed=1)
    (album / "deep" / "a.txt").write_text("first", encoding="utf-8")
    picture(album / "a.jpg", seed=2)  # another picture of the same name
    (album / "a.txt").write_text("second", encoding="utf-8")
    picture(album / "scan.tif", seed=3)
    picture(tmp_path / "photo.jfif", seed=4, format="JPEG")
    (album / ".DS_Store").write_bytes(b"junk")
    target = tmp_path / "target"
    found = bring_in([album, tmp_path / "photo.jfif"], target)
    assert sorted(path.name for path in list_pictures(target)) == [
        "a-2.jpg",
        "a.jpg",
        "photo.jpg",
        "scan.png",
    ]
    assert found.refused == []
    assert found.words() == "4 pictures brought in, 2 with captions"
    for stem in ("a", "a-2"):  # each caption went along with its picture
        wanted = (
            "second" if (target / f"{stem}.jpg").read_bytes() == (album / "a.jpg").read_bytes() else "first"
        )
        assert (target / f"{stem}.txt").read_text() == wanted
    again = bring_in([album], target)
    assert (again.already, again.pictures, again.refused) == (3, [], [])
    assert not [path for path in (target / ".kiln").iterdir()]


def test_hostile_files_are_refused_one_by_one(tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    secret = picture(outside / "secret.png")
    album = tmp_path / "album"
    album.mkdir()
    (album / "drawing.svg").write_text("<svg xmlns='http://www.w3.org/2000/svg'/>")
    (album / "empty.png").write_bytes(b"")
    (album / "cut.jpg").write_bytes(content(200, 200, "JPEG")[:2000])
    (album / "renamed.png").write_bytes(b"MZ\x90 a program")
    (album / "page.jpg").write_text("<!doctype html><p>not found")
    (album / "huge.png").write_bytes(huge_png())
    (album / "alone.txt").write_text("no picture")
    os.symlink(secret, album / "link.png")
    (album / "good.png").write_bytes(content())
    target = tmp_path / "target"
    found = bring_in([album], target)
    assert [path.name for path in found.pictures] == ["good.png"]
    reasons = dict(found.refused)
    for name, words in (
        ("drawing.svg", "SVG"),
        ("empty.png", "empty"),
        ("cut.jpg", "damaged or incomplete"),
        ("renamed.png", "no PNG, JPEG"),
        ("page.jpg", "web page"),
        ("huge.png", "million pixels"),
        ("alone.txt", "no picture of its name"),
        ("link.png", "leads out"),
    ):
        assert words in reasons.pop(name)
    assert reasons == {}
    assert everything_under(target) == {".kiln", "good.png"}


def test_an_archive_cannot_write_outside(tmp_path: Path) -> None:
    archive = tmp_path / "album.zip"
    with zipfile.ZipFile(archive, "w") as made:
        made.writestr("../../escape.png", content(colour=1))
        made.writestr("/absolute.png", content(colour=2))
        made.writestr("..\\windows.png", content(colour=3))
        made.writestr("C:/drive.png", content(colour=4))
        made.writestr("inner.zip", b"PK")
        link = zipfile.ZipInfo("link.png")
        link.external_attr = 0o120777 << 16
        made.writestr(link, "/etc/passwd")
        made.writestr("fine/con.png", content(colour=5))
        made.writestr("fine/con.txt", "a reserved name")
    target = tmp_path / "root" / "target"
    before = everything_under(tmp_path)
    found = bring_in([archive], target)
    assert len(found.refused) == 6
    assert all(
        "leads out" in reason or "ZIP inside" in reason or "link" in reason for _, reason in found.refused
    )
    assert everything_under(tmp_path) - before == {
        "root",
        "root/target",
        "root/target/.kiln",
        "root/target/_con.png",
        "root/target/_con.txt",
    }


def test_a_bomb_is_not_unpacked(tmp_path: Path) -> None:
    archive = tmp_path / "bomb.zip"
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as made:
        made.writestr("a.png", bytes(64 * 2**20))
    found = bring_in([archive], tmp_path / "target")
    assert "which no album of pictures does" in found.refused[0][1]
    # One that lies about its size is cut off by the checks of its own directory.
    data = bytearray(archive.read_bytes())
    place = data.rindex(b"PK\x01\x02")
    data[place + 24 : place + 28] = struct.pack("<I", 1000)
    archive.write_bytes(data)
    found = bring_in([archive], tmp_path / "target")
    assert found.pictures == []
    assert "cannot be copied" in found.refused[0][1]
    archive.write_bytes(bytes(data)[:200] + b"PK\x05\x06" + bytes(18))
    assert bring_in([archive], tmp_path / "target").pictures == []


def test_a_full_disk_and_too_many_files_are_sentences(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    picture(tmp_path / "album" / "a.png")
    monkeypatch.setattr(importing, "FREE_BYTES", 1 << 60)
    with pytest.raises(DatasetError, match="nearly full"):
        bring_in([tmp_path / "album"], tmp_path / "target")
    monkeypatch.setattr(importing, "MOST_FILES", 0)
    with pytest.raises(DatasetError, match="at most at a time"):
        bring_in([tmp_path / "album"], tmp_path / "target")


def test_stop_leaves_what_came_in(tmp_path: Path) -> None:
    for index in range(3):
        picture(tmp_path / "album" / f"{index}.png", seed=index)
    done: list[int] = []
    with pytest.raises(StopTraining):
        bring_in(
            [tmp_path / "album"],
            tmp_path / "target",
            advance=lambda count, _: done.append(count),
            stop=lambda: len(done) >= 2,
        )
    assert everything_under(tmp_path / "target") == {".kiln", "0.png", "1.png"}


@pytest.mark.parametrize(
    ("name", "plain"),
    [
        ("a/b\\c.png", "c.png"),
        ("..", ""),
        ("CON.png", "_CON.png"),
        ("nul.tar.png", "_nul.tar.png"),
        ('x<y>:"|?*.jpg', "x_y______.jpg"),
        ("tab\tand\u202eturn.png", "tab_and_turn.png"),
        ("a" * 300 + ".png", "a" * 100 + ".png"),
        (" dots. .png", "dots.png"),
    ],
)
def test_names_are_made_harmless(name: str, plain: str) -> None:
    assert plain_name(name) == plain
