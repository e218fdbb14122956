"""What the Dataset tab gets from the server: pictures, edits, checks, projects, and nothing outside the roots."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest
from gradio.utils import get_upload_folder
from PIL import Image

from app import album
from app.paths import Paths
from app.session import Session
from tests.data.material import picture
from trainer.config import KohyaConfig
from trainer.errors import ConfigError, DatasetError, TrainerError
from trainer.pictures import edits


class Page:
    """A browser's side of the tab."""

    def __init__(self, session: Session, folder: Path) -> None:
        self.session, self.folder, self.tasks = session, str(folder), album.Tasks()
        values: dict[str, Any] = {"train_data_dir": str(folder), "caption_extension": ".txt"}
        values |= {
            "max_resolution": "64,64",
            "min_bucket_reso": 64,
            "max_bucket_reso": 128,
            "train_batch_size": 2,
            "output_dir": "out",
        }
        values |= {"bucket_no_upscale": False, "pretrained_model_name_or_path": "model.safetensors"}
        self.sent = json.dumps({"values": values, "base": "", "origin": ""})

    def ask(self, do: str, **data: Any) -> dict[str, Any]:
        sent = {"do": do, "folder": self.folder, "settings": self.sent, **data}
        found = album.answer(self.session, self.tasks, sent, "me")
        json.dumps(found)  # as it is sent
        return found

    def work(self, do: str, **data: Any) -> dict[str, Any]:
        """The result of a long task."""
        key = self.ask(do, **data)["task"]
        end = time.monotonic() + 60
        while not (found := self.ask("progress", task=key))["over"]:
            assert time.monotonic() < end
            time.sleep(0.02)
        if "error" in found:
            raise DatasetError(found["error"])
        result: dict[str, Any] = found["result"]
        return result


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Four pictures of 96 x 64 and one that is none, in Kohya's layout."""
    inner = tmp_path / "img" / "5_cat"
    for index in range(4):
        picture(inner / f"{index}.png", (96, 64), seed=index)
    (inner / "0.txt").write_text("a cat")
    (inner / "broken.png").write_bytes(b"no picture")
    return inner.parent


@pytest.fixture
def page(tmp_path: Path, folder: Path) -> Page:
    paths = Paths({}, confined=False)
    return Page(Session(paths=paths, state=tmp_path / "state", config=KohyaConfig(), base=tmp_path), folder)


@pytest.fixture
def confined(tmp_path: Path, folder: Path) -> Page:
    """On a server whose one root is the folder."""
    paths = Paths({"data": folder}, confined=True)
    return Page(Session(paths=paths, state=tmp_path / "state", config=KohyaConfig(), base=tmp_path), folder)


def shown(answer: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {one["name"]: one for part in answer["sets"] for one in part["pictures"]}


def test_a_folder_is_shown_and_edited(page: Page, folder: Path) -> None:
    first = page.ask("open")
    assert (first["sets"][0]["repeats"], first["sets"][0]["wanted"]) == (5, 80)
    pictures = shown(first)
    assert [pictures["0.png"]["caption"], pictures["1.png"]["caption"]] == [True, False]
    assert "no PNG" in pictures["broken.png"]["broken"]
    ids = ["5_cat/0.png", "5_cat/1.png"]
    assert shown(page.ask("edit", what="right", ids=ids))["0.png"]["size"] == (64, 96)
    page.ask("edit", what="flip", ids=ids[:1])
    # The crop was drawn on the picture as it is seen: turned and mirrored.
    cropped = shown(page.ask("edit", what="crop", ids=ids[:1], box=[0, 0, 0.5, 1]))
    assert cropped["0.png"]["size"] == (32, 96)
    edit = edits.load(folder / "5_cat").of("0.png")
    assert edit.crop == (0, 0, 96, 32)  # the viewer's left is the file's upper half
    assert shown(page.ask("edit", what="exclude", ids=ids[1:]))["1.png"]["excluded"]
    thumbs = page.ask("thumbs", ids=["5_cat/0.png", "5_cat/2.png", "5_cat/broken.png"])["thumbs"]
    assert thumbs["5_cat/broken.png"] == ""
    file = page.session.thumbnails / thumbs["5_cat/0.png"].rsplit("/", 1)[1]
    with Image.open(file) as thumbnail:
        assert thumbnail.size == (32, 96)
    assert page.session.may_serve(str(file))
    preview = page.ask("preview", id="5_cat/0.png")
    assert preview["crop"] == [0, 0, 0.5, 1]
    assert preview["size"] == [64, 96]
    seen = page.work("buckets")
    assert seen["pictures"]["5_cat/2.png"]["box"] == pytest.approx([0.0, 0, 1, 1], abs=0.2)
    assert set(seen["pictures"]) == {"5_cat/0.png", "5_cat/2.png", "5_cat/3.png"}
    assert (seen["samples"], seen["steps"]) == (15, 8)
    assert sum(item["samples"] for item in seen["buckets"]) == 15
    words = [page.ask("undo")["words"] for _ in range(5)]
    assert words == [
        "leave out: 1 picture",
        "crop 1 picture",
        "mirror: 1 picture",
        "turn right: 2 pictures",
        "",
    ]
    assert page.ask("redo")["words"] == "turn right: 2 pictures"


def test_enlarged_pictures_are_marked(page: Page, folder: Path) -> None:
    picture(folder / "5_cat" / "tiny.png", (40, 40), seed=9)
    seen = page.work("buckets")["pictures"]
    assert [name for name, one in seen.items() if one["upscaled"]] == ["5_cat/tiny.png"]


def test_checks_say_what_is_wrong_and_mend_it(page: Page, folder: Path) -> None:
    (folder / "5_cat" / "copy.png").write_bytes((folder / "5_cat" / "3.png").read_bytes())
    found = page.work("check", person=False)
    kinds = {finding["kind"]: finding for finding in found["findings"]}
    assert {"broken", "same", "small", "few"} <= set(kinds)
    repair = kinds["same"]["repairs"][0]
    page.ask("edit", what=repair["what"], ids=repair["ids"], box=repair["box"], file=True)
    after = {finding["kind"] for finding in page.work("check", person=False)["findings"]}
    assert "same" not in after
    with pytest.raises(ConfigError, match="no longer going on"):
        page.ask("progress", task="0")
    key = page.ask("check")["task"]
    with pytest.raises(ConfigError, match="no longer going on"):  # of somebody else
        album.answer(page.session, page.tasks, {"do": "progress", "task": key}, "other")


def test_a_project_from_uploaded_files_to_settings(page: Page, tmp_path: Path) -> None:
    named = page.ask("token", name="Jane Doe")
    assert (named["token"], named["rare"]) == ("j4n3d03", True)
    made = page.ask(
        "project", place=str(tmp_path / "lora"), token="j4n3d03", **{"class": "person"}, repeats="8"
    )
    assert made["values"]["train_data_dir"] == made["folder"]
    # Samples have the size of the settings, which name no pictures before there is a project.
    values = {"train_data_dir": "", "max_resolution": "1024,768"}
    again = page.ask(
        "project",
        place=str(tmp_path / "lora"),
        token="j4n3d03",
        **{"class": "person"},
        repeats="8",
        settings=json.dumps({"values": values, "base": "", "origin": ""}),
    )
    assert again["values"]["sample_prompts"].count("--w 1024 --h 768") == 3
    upload = Path(get_upload_folder()) / "test-dataset" / "a.png"
    picture(upload, seed=9)
    caption = upload.with_name("a.txt")
    caption.write_text("j4n3d03 smiling")
    files = [{"path": str(upload), "name": "album/a.png"}, {"path": str(caption), "name": "album/a.txt"}]
    found = page.work("bring", into=made["into"], files=files)
    assert (found["count"], found["refused"]) == (1, [])
    assert not upload.exists()
    pictures = shown(page.ask("open", folder=str(tmp_path / "lora" / "j4n3d03")))
    assert pictures["a.png"]["caption"]
    renamed = page.ask("repeats", folder=made["folder"], set="8_j4n3d03 person", repeats=400)
    assert renamed["sets"][0]["name"] == "400_j4n3d03 person"
    copies = page.work("copies", folder=made["folder"], target=str(tmp_path / "copies"))
    assert "1 picture written" in copies["words"]


def test_a_token_is_rare_where_neither_of_fluxs_tokenizers_knows_it(page: Page) -> None:
    answers = []
    for flux in (False, True):
        settings = json.dumps({"values": {"flux1_checkbox": flux}, "base": "", "origin": ""})
        answers.append(page.ask("token", token="Gesellschaft", settings=settings)["rare"])
        assert page.ask("token", token="person", settings=settings)["rare"] is False
        assert page.ask("token", name="Jane Doe", settings=settings)["rare"] is True
    assert answers == [True, False]  # a word of T5's


def test_kohyas_preparation_fills_the_fields(page: Page, folder: Path, tmp_path: Path) -> None:
    fields = {"instance": "sks", "class": "dog", "images": str(folder / "5_cat"), "repeats": "3"}
    found = page.work("prepare", **fields, destination=str(tmp_path / "kohya"))
    assert (Path(found["values"]["train_data_dir"]) / "3_sks dog" / "0.txt").read_text() == "a cat"


@pytest.mark.parametrize(
    ("do", "data"),
    [
        ("open", {"folder": "/etc"}),
        ("open", {"folder": "data/../../"}),
        ("edit", {"ids": ["5_cat/../../x.png"], "what": "flip"}),
        ("edit", {"ids": ["5_cat/0.png"], "what": "__class__"}),
        ("edit", {"ids": ["5_cat/0.png"], "what": "crop", "box": "x"}),
        ("edit", {"ids": ["5_cat/0.png"], "what": "crop", "box": [0, 0, 0.01, 1]}),
        ("thumbs", {"ids": ["img/0.png"]}),
        ("preview", {"id": "5_cat/none.png"}),
        ("project", {"place": "/tmp", "token": "x"}),
        ("project", {"place": "data", "token": "../x"}),
        ("repeats", {"set": "..", "repeats": 3}),
        ("nothing", {}),
    ],
)
def test_what_a_page_may_not_ask_is_a_sentence(confined: Page, do: str, data: dict[str, Any]) -> None:
    with pytest.raises(TrainerError):
        confined.ask(do, **data)
    assert edits.load(Path(confined.folder) / "5_cat").pictures == {}


@pytest.mark.parametrize(
    ("do", "data"),
    [
        ("bring", {"into": "data", "files": [{"path": "/etc/passwd", "name": "a.png"}]}),
        ("bring", {"into": "/tmp/elsewhere", "files": []}),
        ("bring", {"into": "data", "source": "/etc"}),
        ("copies", {"target": "/tmp/elsewhere"}),
        ("prepare", {"destination": "/tmp/elsewhere", "images": "data", "instance": "a", "class": "b"}),
    ],
)
def test_long_tasks_stay_inside_the_roots(confined: Page, do: str, data: dict[str, Any]) -> None:
    with pytest.raises(DatasetError, match=r"outside the folders|uploaded file is gone"):
        confined.work(do, **data)
