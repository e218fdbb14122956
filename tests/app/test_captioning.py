"""What the Captioning tab gets from the server: looking, writing only what was shown, staying inside."""

from __future__ import annotations

import base64
import io
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from app import captions
from app.paths import Paths
from app.session import Session
from tests.captioning import tiny
from trainer.config import KohyaConfig
from trainer.errors import ConfigError, DatasetError, TrainerError
from trainer.files import REPOSITORY


class Page:
    """A browser's side of the tab."""

    def __init__(self, session: Session, folder: Path, **fields: Any) -> None:
        self.session = session
        values = {"train_data_dir": str(folder), "caption_extension": ".txt", "output_dir": "out", **fields}
        self.sent = json.dumps({"values": values, "base": "", "origin": ""})

    def ask(self, do: str, **data: Any) -> dict[str, Any]:
        return captions.answer(self.session, {"do": do, "sent": self.sent, **data}, "")

    def items(self) -> list[list[str]]:
        return [[entry["folder"], entry["name"]] for entry in self.ask("look")["captions"]]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    inner = tmp_path / "img" / "5_cat"
    inner.mkdir(parents=True)
    for index, text in enumerate(("cat, red", "cat holding a remote control", "<script>alert(1)</script>")):
        Image.new("RGB", (40, 30), (index * 90, 10, 10)).save(inner / f"{index}.png")
        (inner / f"{index}.txt").write_text(text + "\n")
    Image.new("RGB", (40, 30)).save(inner / "3.png")
    return inner.parent


@pytest.fixture
def page(session: Session, folder: Path) -> Page:
    return Page(session, folder)


def test_a_look_lists_every_picture_with_its_caption(page: Page) -> None:
    found = page.ask("look")
    assert [entry["exists"] for entry in found["captions"]] == [True, True, True, False]
    assert [bool(entry["habits"]) for entry in found["captions"]] == [False, True, False, False]
    assert (found["undo"], found["shipped"], found["demo"]) == ("", False, False)
    counts = page.ask("tokens")
    assert counts["limit"] == 75
    assert counts["counts"][found["folders"][0]["path"]]["0.txt"] == 3  # cat , red: of CLIP's table
    assert page.ask("count", text="a photo of sks dog")["count"] == 5  # 320 1125 539 48136 1929
    flux = Page(
        page.session, Path(found["folders"][0]["path"]).parent, flux1_checkbox=True, LoRA_type="Flux1"
    )
    assert (flux.ask("count", text="cat")["limit"], flux.ask("count", text="cat")["of"]) == (511, "T5")


def test_a_change_is_previewed_applied_and_taken_back(page: Page, folder: Path) -> None:
    operation = {"do": "replace", "find": "cat", "to": "<b>dog</b>"}
    plan = page.ask("plan", items=page.items(), operation=operation)
    assert plan["count"] == 2
    assert ["new", "<b>dog</b>"] in [list(run) for run in plan["edits"][0]["runs"]]
    assert (folder / "5_cat" / "0.txt").read_text() == "cat, red\n"
    (folder / "5_cat" / "0.txt").write_text("cat, changed meanwhile\n")
    with pytest.raises(DatasetError, match="changed since the preview"):
        page.ask("apply", items=page.items(), operation=operation, digest=plan["digest"])
    plan = page.ask("plan", items=page.items(), operation=operation)
    done = page.ask("apply", items=page.items(), operation=operation, digest=plan["digest"])
    assert (folder / "5_cat" / "0.txt").read_text() == "<b>dog</b>, changed meanwhile\n"
    assert "replaced" in done["undo"]
    back = page.ask("undo")
    assert (folder / "5_cat" / "0.txt").read_text() == "cat, changed meanwhile\n"
    assert "taken back" in back["message"]
    assert page.ask("redo")["undo"]


def test_two_folders_change_and_go_back_together(page: Page, folder: Path) -> None:
    other = folder / "2_dog"
    other.mkdir()
    Image.new("RGB", (40, 30)).save(other / "d.png")
    operation = {"do": "add", "tag": "k1ln"}
    plan = page.ask("plan", items=page.items(), operation=operation)
    assert plan["count"] == 5
    page.ask("apply", items=page.items(), operation=operation, digest=plan["digest"])
    assert (other / "d.txt").read_text() == "k1ln\n"
    assert len(page.ask("undo")["changed"]) == 5
    assert not (other / "d.txt").exists()


def test_what_is_typed_is_saved_unless_the_file_says_something_else(page: Page, folder: Path) -> None:
    place, name = page.items()[0]
    page.ask("save", folder=place, name=name, before="cat, red", text="a tabby")
    assert (folder / "5_cat" / "0.txt").read_text() == "a tabby\n"
    with pytest.raises(DatasetError, match="changed by somebody else"):
        page.ask("save", folder=place, name=name, before="cat, red", text="late")
    opened = page.ask("open", folder=place, name=name)
    assert [version["text"] for version in opened["history"]] == ["cat, red", "a tabby"]
    assert opened["url"].startswith("/gradio_api/file=")
    page.ask("restore", folder=place, name=name, version=0)
    assert (folder / "5_cat" / "0.txt").read_text() == "cat, red\n"


def test_ones_own_phrases_are_remembered_and_found(page: Page) -> None:
    found = page.ask("habits", phrases=["Red", "", "x" * 500])
    assert found["own"] == ["Red", "x" * 200]
    assert [habit["name"] for habit in found["captions"][0]["habits"]] == ["Red"]


def test_a_mask_is_saved_and_shown(page: Page, folder: Path) -> None:
    place, name = page.items()[0]
    assert page.ask("open", folder=place, name=name)["mask"]["kind"] == "none"
    buffer = io.BytesIO()
    Image.fromarray(np.eye(30, 40, dtype=np.uint8) * 255).save(buffer, "PNG")
    png = "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
    mask = page.ask("mask", folder=place, name=name, png=png)["mask"]
    assert (mask["kind"], mask["trained"]) == ("drawn", False)
    trained = Page(page.session, folder, masked_loss=True)
    assert trained.ask("open", folder=place, name=name)["mask"]["trained"]
    assert page.ask("unmask", folder=place, name=name)["mask"]["kind"] == "none"
    with pytest.raises(DatasetError, match="did not arrive"):
        page.ask("mask", folder=place, name=name, png="data:image/png;base64,%%%")


def test_a_mask_file_of_the_data_set_is_shown_as_it_is_trained(
    session: Session, folder: Path, tmp_path: Path
) -> None:
    values = np.zeros((30, 40), np.uint8)
    values[:, 20:] = 255
    (tmp_path / "masks").mkdir()
    for index in range(4):
        Image.fromarray(values).save(tmp_path / "masks" / f"{index}.png")
    names = {"image_dir": folder / "5_cat", "conditioning_data_dir": tmp_path / "masks"}
    lines = [f"{name} = {json.dumps(str(path))}" for name, path in names.items()]
    (tmp_path / "data.toml").write_text("\n".join(["[[datasets]]", "[[datasets.subsets]]", *lines]))
    page = Page(session, folder, dataset_config=str(tmp_path / "data.toml"), masked_loss=True)
    place, name = page.items()[0]
    mask = page.ask("open", folder=place, name=name)["mask"]
    assert (mask["kind"], mask["trained"]) == ("file", True)
    with Image.open(session.thumbnails / mask["url"].rsplit("/", 1)[1]) as shown:
        np.testing.assert_array_equal(np.asarray(shown.convert("L")), values)


def test_captions_are_written_through_the_queue(page: Page, folder: Path, tmp_path: Path) -> None:
    tiny.tagger(tmp_path / "tagger", bias=[-9, -9, -9, -9, 9, -9, -9, -9, -9], size_px=16)
    values = {"captioner": "wd14", "model": str(tmp_path / "tagger"), "prefix": "k1ln,"}
    page.ask("start", values=values, items=None)
    page.session.runner.wait(60)
    page.session.settle()
    assert (folder / "5_cat" / "3.txt").read_text() == "k1ln, long hair\n"
    assert (folder / "5_cat" / "0.txt").read_text() == "cat, red\n"
    run = page.session.queue.past()[0]
    assert (run.kind, run.status) == ("captions", "finished")
    progress = page.ask("progress")
    assert (progress["going"], progress["ended"]) == (False, True)
    assert "1 caption written" in progress["html"]
    asked = page.ask("start", values={**values, "existing": "all"}, items=page.items()[:2])
    assert asked["ask"].startswith("2 captions that no captioner wrote")
    page.ask("start", values={**values, "existing": "all"}, items=page.items()[:2], confirmed=True)
    page.session.runner.wait(60)
    page.session.settle()
    assert (folder / "5_cat" / "0.txt").read_text() == "k1ln, long hair\n"
    assert (folder / "5_cat" / "2.txt").read_text() == "<script>alert(1)</script>\n"
    with pytest.raises(DatasetError, match="is to be kept"):
        page.ask("start", values=values, items=None)
    with pytest.raises(ConfigError, match="General threshold"):
        page.ask(
            "start", values={**values, "options": {"general_threshold": "x"}, "existing": "all"}, items=None
        )


def test_the_programs_own_pictures_stay_and_can_be_copied(session: Session) -> None:
    page = Page(session, REPOSITORY / "assets" / "demo" / "images")
    found = page.ask("look")
    assert found["shipped"]
    place, name = page.items()[0]
    with pytest.raises(DatasetError, match="work on a copy"):
        page.ask("save", folder=place, name=name, before=found["captions"][0]["text"], text="x")
    with pytest.raises(DatasetError, match="work on a copy"):
        page.ask("start", values={"captioner": "blip", "model": "x"}, items=None)
    copied = Path(page.ask("copy")["set"]["train_data_dir"])
    mine = Page(session, copied)
    assert len(mine.items()) == 16
    assert not mine.ask("look")["shipped"]


@pytest.mark.parametrize(
    ("data", "said"),
    [
        ({"do": "explode"}, "does not exist"),
        ({"do": None}, "does not exist"),
        ({"do": "open", "folder": "/etc", "name": "passwd"}, "other folders"),
        ({"do": "open", "folder": 3, "name": "0.txt"}, "missing"),
        ({"do": "thumbnails", "items": [["/etc", "passwd"]]}, "other folders"),
        ({"do": "plan", "items": "all", "operation": {}}, "which captions"),
        ({"do": "look", "sent": None}, "settings|configuration|page"),
        ({"do": "start", "values": [], "items": None}, "settings are missing"),
        ({"do": "save", "folder": "", "name": "", "text": "x" * 200_000}, "other folders|too long|missing"),
    ],
)
def test_nonsense_from_a_browser_is_a_sentence(page: Page, data: dict[str, Any], said: str) -> None:
    sent = {"sent": page.sent, **data}
    with pytest.raises(TrainerError, match=said):
        captions.answer(page.session, sent, "")


def test_names_cannot_lead_out_of_the_folder(page: Page, folder: Path) -> None:
    place = page.items()[0][0]
    (folder / "secret.txt").write_text("secret")
    for name in ("../secret.txt", "..\\secret.txt", "/etc/passwd", "0.png"):
        for do in ("open", "save", "restore"):
            with pytest.raises(TrainerError):
                page.ask(do, folder=place, name=name, before="secret", text="x", version=0)
    assert (folder / "secret.txt").read_text() == "secret"


def test_other_machines_stay_inside_the_roots(tmp_path: Path, folder: Path) -> None:
    roots = {"mine": tmp_path / "mine"}
    roots["mine"].mkdir()
    session = Session(
        paths=Paths(roots, confined=True),
        state=tmp_path / "state2",
        config=KohyaConfig(),
        base=tmp_path,
    )
    model = str(REPOSITORY / "assets" / "demo" / "base")
    with pytest.raises(ConfigError, match="outside"):
        Page(session, folder, pretrained_model_name_or_path=model, output_dir="mine/out").ask("look")
    settings = json.dumps({"captioner": "wd14", "model": str(tmp_path), "folders": [str(roots["mine"])]})
    with pytest.raises(ConfigError, match="outside"):
        captions.work(settings, tmp_path, session.paths)
    settings = json.dumps({"captioner": "wd14", "model": "a/b", "folders": [str(folder / "5_cat")]})
    with pytest.raises(ConfigError, match="outside"):
        captions.work(settings, tmp_path, session.paths)


def test_a_thousand_captions_are_looked_at_quickly(session: Session, tmp_path: Path) -> None:
    inner = tmp_path / "many" / "1_cat"
    inner.mkdir(parents=True)
    for index in range(1000):
        (inner / f"{index}.png").write_bytes(b"not looked into")
        (inner / f"{index}.txt").write_text(f"cat {index}, with a microphone in his hand, red hair, outdoors")
    page = Page(session, tmp_path / "many")
    began = time.process_time()
    assert len(page.items()) == 1000
    assert time.process_time() - began < 2
    operation = {"do": "unhabit", "habits": ["things in hands"]}
    assert page.ask("plan", items=page.items(), operation=operation)["count"] == 1000
