"""Every endpoint of the built page, asked by somebody who did not get the page from us.

The table below says how each is asked properly. A new endpoint, and a new thing that one of them does, fails
the first test until it stands there. Then every path of a proper question is replaced by those that lead out
of the roots: each question works as it stands, and with none of the replacements.
"""

from __future__ import annotations

import ast
import base64
import contextlib
import copy
import dataclasses
import inspect
import io
import json
import os
import shutil
import textwrap
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gradio as gr
import httpx
import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import save_file

from app import album, captions, page
from app.access import Users, hashed
from app.paths import PATH_FIELDS
from app.runs import Run
from app.tabs import review
from tests.app.conftest import loops_closed
from tests.app.test_server import Server, serving
from trainer import config as configuration
from trainer.config import KohyaConfig
from trainer.events import EventLog, JobStarted, StepDone

pytestmark = pytest.mark.filterwarnings("ignore:.*no_silent_downcasting")
"""gradio counts its requests with an option of pandas that is on its way out."""
EVIL = '<img src=x onerror="alert(1)">'
MINE, THEIRS = "here-33", "mark-77"
"""Texts in every file inside the roots, and in every file beside them."""
SECRETS = {
    "wandb_api_key": "hush-1",
    "huggingface_token": "hush-2",
    "additional_parameters": "--wandb_api_key hush-3",
}
RUN = {"path": "pics/out", "name": "run", "file": "run-000001.safetensors"}
PICTURES = {"train_data_dir": "pics/img"}
TRAINED = {
    **PICTURES,
    "pretrained_model_name_or_path": "pics/model.safetensors",
    "output_dir": "pics/new",
    "output_name": "x",
    "max_resolution": "64,64",
    "min_bucket_reso": 64,
    "max_bucket_reso": 128,
    "bucket_no_upscale": False,
    "caption_extension": ".txt",
}
ITEM = {"folder": "@img/5_cat", "name": "0.txt"}
ITEMS = {"items": [["@img/5_cat", "0.txt"], ["@img/5_cat", "1.txt"]]}
PLAN = {"do": "affix", "prefix": "a", "postfix": ""}


@dataclasses.dataclass(frozen=True)
class Question:
    """One thing that an endpoint is asked.

    ``{"draft": {...}}`` stands for settings as the page sends them, ``@`` in front of a text for the root's
    own path, and ``pics/`` for a path that a person typed.
    """

    endpoint: str
    data: Any
    fails: bool = False
    """It is refused as it stands, too; what is replaced must still lead nowhere."""
    silent: tuple[str, ...] = ()
    """Names of paths that it leaves unused, and without a word, where they may not be used."""

    @property
    def does(self) -> str:
        return str(self.data.get("do", "")) if isinstance(self.data, dict) else ""


def draft(**fields: Any) -> dict[str, Any]:
    return {"draft": {**SECRETS, **fields}}


def tool(name: str, **fields: Any) -> list[Any]:
    order = "model original tuned file files ratios merge_method rank conv_rank dynamic parameter to output precision"
    usual = {"merge_method": "exact", "dynamic": "", "to": "kohya", "precision": "", "rank": 2}
    return [name, *({**usual, **fields}.get(each) for each in order.split())]


def dataset(do: str, **data: Any) -> Question:
    silent = data.pop("silent", ())
    return Question(
        "dataset",
        {"do": do, "folder": "pics/img", "settings": draft(**TRAINED), **data},
        silent=(*silent, *(name for name in TRAINED if do != "buckets" or name == "train_data_dir")),
    )


def captioning(do: str, **data: Any) -> Question:
    fails = do in ("apply", "undo", "redo")  # nothing was previewed or changed
    return Question(
        "captions", {"do": do, "sent": draft(**PICTURES, caption_extension=".txt"), **data}, fails
    )


def reviewing(do: str, **data: Any) -> Question:
    return Question("review", {"do": do, **RUN, **data})


def png() -> str:
    stream = io.BytesIO()
    Image.new("L", (96, 64), 255).save(stream, "PNG")
    return "data:image/png;base64," + base64.b64encode(stream.getvalue()).decode()


QUESTIONS = [
    Question("on_open", [draft(**TRAINED)], silent=tuple(TRAINED)),  # they are shown, not used
    Question("on_open", [""]),
    Question("on_preset", ["sd15_photo", draft(**TRAINED)], silent=tuple(TRAINED)),
    Question("on_demo", []),
    Question("on_load", ["pics/mine.json"]),
    Question("on_load", [f"pics/{EVIL}.json"]),
    Question("on_upload", [{"path": "pics/mine.json", "meta": {"_type": "gradio.FileData"}}], fails=True),
    Question("on_new", []),
    Question("on_save", [draft(output_name=EVIL), "pics/saved"]),
    Question("on_download", [draft(output_name=EVIL)]),
    Question("on_check", [draft(**TRAINED)]),
    Question("on_start", [draft(**TRAINED)]),
    Question("on_start", [draft(**{name: "pics/mine.json" for name in PATH_FIELDS}, max_resolution="64,64")]),
    Question("on_stop", []),
    Question("ask", []),
    Question("on_tick", ["x"]),
    Question("on_tool", ["merge"]),
    Question("on_go", tool("inspect", file="pics/lora.safetensors")),
    Question("on_go", tool("merge", files="pics/lora.safetensors", ratios="1", output="pics/o.safetensors")),
    Question(
        "on_go",
        tool(
            "merge-into",
            model="pics/model.safetensors",
            files="pics/lora.safetensors",
            ratios="1",
            output="pics/o.safetensors",
        ),
    ),
    Question("on_go", tool("resize", file="pics/lora.safetensors", output="pics/o.safetensors")),
    Question(
        "on_go",
        tool(
            "extract",
            original="pics/model.safetensors",
            tuned="pics/lora.safetensors",
            output="pics/o.safetensors",
        ),
    ),
    Question("on_go", tool("convert-lora", file="pics/lora.safetensors", output="pics/o.safetensors")),
    Question("on_settings", ["pics/lora.safetensors"]),
    *(Question("browse", {"kind": kind, "path": "pics/img"}) for kind in ("json", "model", "folder")),
    Question("words", {"code": "es"}),
    Question("news", {}),
    Question("act", {"do": "go on"}),
    *(Question("act", {"do": do, "run": 1}) for do in ("open", "show")),
    Question("act", {"do": "move", "run": 2, "by": 1}),
    Question("act", {"do": "resume", "run": 1}, fails=True),  # it saved no state
    Question("act", {"do": "remove", "run": 2}),
    dataset("open"),
    Question("dataset", {"do": "open", "folder": "", "settings": draft(**PICTURES)}),
    dataset("thumbs", ids=["5_cat/0.png"]),
    dataset("preview", id="5_cat/0.png"),
    dataset("check"),
    dataset("mirrored"),
    dataset("buckets"),
    dataset("edit", ids=["5_cat/0.png"], what="flip"),
    dataset("undo"),
    dataset("redo"),
    dataset("copies", target="pics/copies"),
    dataset("token", name="Jane Doe", silent=("folder",)),
    dataset("project", token="j4n3", name="x", place="pics", silent=("folder",), **{"class": "cat"}),
    dataset(
        "prepare",
        instance="sks",
        images="pics/img/5_cat",
        reg="pics/img/5_cat",
        destination="pics/prepared",
        silent=("folder",),
        **{"class": "cat"},
    ),
    dataset("bring", into="pics/brought", source="pics/img/5_cat", silent=("folder",)),
    dataset("repeats", set="5_cat", repeats=5),
    Question("dataset", {"do": "progress", "task": "none"}, fails=True),
    Question("dataset", {"do": "stop", "task": "none"}, fails=True),
    captioning("look"),
    captioning("tokens"),
    captioning("count", text="a cat"),
    captioning("table", **ITEMS),
    captioning("thumbnails", **ITEMS),
    captioning("open", **ITEM),
    captioning("save", **ITEM, before=f"{MINE} {EVIL}", text=f"{EVIL} {MINE}"),
    captioning("restore", **ITEM, version=0),
    captioning("plan", **ITEMS, operation=PLAN),
    captioning("apply", **ITEMS, operation=PLAN, digest="x"),
    captioning("undo"),
    captioning("redo"),
    captioning("habits", phrases=[EVIL]),
    captioning("start", values={"captioner": "blip", "model": "pics/img", "existing": "all"}, confirmed=True),
    Question("captions", {"do": "copy", "sent": draft(**PICTURES)}, fails=True),
    captioning("mask", **ITEM, png=png()),
    captioning("unmask", **ITEM),
    Question("captions", {"do": "progress"}),
    Question("captions", {"do": "stop"}),
    reviewing("open"),
    reviewing("look", signature=""),
    reviewing("settings"),
    reviewing("continue", epochs="2"),
    reviewing("again"),
    Question("review", {"do": "resume", **RUN, "state": "none"}, fails=True),
    reviewing(
        "grid", files=["run.safetensors"], prompts="a cat", strengths="1", model="pics/model.safetensors"
    ),
    reviewing("try", prompts="a cat", model="pics/model.safetensors"),
    reviewing("judge", model="pics/model.safetensors", pictures="pics/img"),
    reviewing("report"),
    reviewing("keep", final_name="best", copy_to="pics/img"),
    Question("review", {"do": "keep", **RUN, "final_name": "../x"}, fails=True),
    reviewing("restore"),
]


# ---- the world -------------------------------------------------------------------------------------------------


def make_world(root: Path, text: str) -> None:
    """Files of every kind that the page reads, each with ``text`` in it."""
    (root / "img" / "5_cat").mkdir(parents=True)
    for index in range(4):
        Image.effect_noise((96, 64), 40 + index).save(root / "img" / "5_cat" / f"{index}.png")
        (root / "img" / "5_cat" / f"{index}.txt").write_text(f"{text} {EVIL}\n", encoding="utf-8")
    settings = json.dumps({"training_comment": f"{text} {EVIL}", EVIL: 1, **SECRETS})
    (root / "mine.json").write_text(settings, encoding="utf-8")
    if os.name != "nt":
        (root / f"{EVIL}.json").write_text(settings, encoding="utf-8")
    for name in ("lora", "model"):
        lora_file(root / f"{name}.safetensors", {"ss_training_comment": f"{text} {EVIL}"})
    results(root / "out")


def lora_file(path: Path, metadata: dict[str, str]) -> None:
    stem = "lora_unet_down_blocks_0_attentions_0_proj_in"
    parts = {"lora_up.weight": (32, 2, 1, 1), "lora_down.weight": (2, 32, 1, 1), "alpha": ()}
    tensors = {f"{stem}.{part}": np.ones(shape, np.float32) for part, shape in parts.items()}
    save_file(tensors, path, {"ss_network_module": "networks.lora", "ss_unet_lr": "0.0001", **metadata})


def results(folder: Path) -> None:
    """What a run leaves behind."""
    (folder / "sample").mkdir(parents=True)
    log = EventLog(folder / "logs" / "run-20260101-000000" / "journal.jsonl")
    log.emit(JobStarted(name="run", output_dir=folder, family="sd", first_step=0, steps=20, epochs=2))
    log.emit(StepDone(step=20, epoch=1, loss=0.1, avr_loss=0.1, lr={EVIL: 1e-4}, step_s=0.1))
    log.close()
    for step, stem in ((10, "run-000001"), (20, "run")):
        lora_file(folder / f"{stem}.safetensors", {"ss_output_name": "run", "ss_steps": str(step)})
        Image.new("RGB", (30, 20)).save(folder / "sample" / f"run_{step:06d}_00_20260102000000_7.png")
    config = KohyaConfig(
        output_name="run",
        output_dir=str(folder),
        sample_prompts=f"a cat {EVIL} --d 7",
        pretrained_model_name_or_path=str(folder.parent / "model.safetensors"),
        train_data_dir=str(folder.parent / "img"),
    )
    configuration.save(config, folder / "run_20260101-000000.json")


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@dataclasses.dataclass
class World:
    """A page that two people use, its root, and the folder beside that."""

    server: Server
    lee: httpx.Client
    root: Path
    beside: Path
    keep: Path
    """A copy of the root, to begin each question anew."""
    answers: list[str] = dataclasses.field(default_factory=list)
    """All that the page ever answered."""

    def renew(self) -> None:
        for path in self.root.iterdir():
            if path.name != "link":
                shutil.rmtree(path) if path.is_dir() else path.unlink()
        shutil.copytree(self.keep, self.root, dirs_exist_ok=True)
        queue = self.server.session.queue
        for run in [*queue.waiting(), *queue.past()]:
            queue.remove(run.id)
        with queue._open() as database:
            database.execute("DELETE FROM sqlite_sequence")
        first = queue.add(name=EVIL, owner="kim", config=KohyaConfig().model_dump_json(), base=str(self.root))
        journal = self.root / "out" / "logs" / "run-20260101-000000" / "journal.jsonl"
        queue.change(first.id, status="stopped", journal=str(journal), started=1.0, ended=2.0, message=EVIL)
        queue.add(name=EVIL, owner="kim", config=KohyaConfig().model_dump_json(), base=str(self.root))
        self.server.session.held = True

    def sent(self, data: Any) -> Any:
        """A question's data as a browser sends it."""
        if isinstance(data, dict) and "draft" in data:
            values = {**KohyaConfig().model_dump(), **self.sent(data["draft"])}
            return json.dumps({"values": values, "base": "", "origin": EVIL})
        if isinstance(data, dict):
            return {name: self.sent(value) for name, value in data.items()}
        if isinstance(data, list):
            return [self.sent(value) for value in data]
        if isinstance(data, str) and data.startswith("@"):
            return str(self.root / data[1:])
        return data

    def ask(self, question: Question, data: Any, http: httpx.Client | None = None) -> tuple[bool, Any]:
        """Whether it was done, and the answer."""
        server = dataclasses.replace(self.server, http=http or self.server.http)
        sent = self.sent(data)
        if question.endpoint in servers(server.blocks):
            body = {"component_id": servers(server.blocks)[question.endpoint], "fn_name": question.endpoint}
            answer = server.http.post(
                "/gradio_api/component_server", json={**body, "session_hash": "x", "data": sent}
            )
            assert answer.status_code == 200, answer.text
            found = answer.json()
            end = time.monotonic() + 60
            while isinstance(found, dict) and (key := found.get("task")):
                assert time.monotonic() < end
                poll = {**body, "session_hash": "x", "data": {"do": "progress", "task": key}}
                told = server.http.post("/gradio_api/component_server", json=poll).json()
                if told["over"]:
                    found = told if "error" in told else told["result"]
                time.sleep(0.01)
            self.answers.append(json.dumps(found))
            return not (isinstance(found, dict) and found.get("error")), found
        number = server.handlers(question.endpoint)[0]
        message = server.call(number, sent)
        self.answers.append(json.dumps(message))
        shown = json.dumps(message["output"])
        words = ("outside the folders", "is not allowed", "does not use", "no path here")
        refused = {
            "on_start": "kiln-alert failed" in shown,
            "on_check": any(each in shown for each in words),
        }.get(question.endpoint, False)
        return bool(message["success"]) and not refused, message["output"]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    folder = tmp_path_factory.mktemp("endpoints")
    root, beside, keep = folder / "root", folder / "beside", folder / "keep"
    make_world(root, MINE)
    make_world(beside, THEIRS)
    shutil.copytree(root, keep)
    (root / "link").symlink_to(beside, target_is_directory=True)
    users = Users({name: hashed(f"{name}-pass") for name in ("kim", "lee")})
    with loops_closed(), serving(folder, listen=True, auth=users, roots={"pics": root}) as server:
        session = server.session

        def begin(run: Run, job: Any) -> None:  # nothing is to be trained
            session.queue.change(run.id, status="stopped", started=1.0, ended=2.0)

        session._begin = begin  # type: ignore[method-assign]
        with httpx.Client(base_url=server.http.base_url, timeout=60, trust_env=False) as lee:
            for http, name in ((server.http, "kim"), (lee, "lee")):
                http.post("/login", data={"username": name, "password": f"{name}-pass"}).raise_for_status()
            made = World(server, lee, root, beside, keep)
            made.renew()
            yield made


def servers(blocks: gr.Blocks) -> dict[str, int]:
    """Functions that components offer to the page's script, and the component of each."""
    return {
        function.__name__: number
        for number, block in blocks.blocks.items()
        for function in getattr(block, "server_fns", [])
    }


# ---- the tests ----------------------------------------------------------------------------------------------------


def done_by(function: Callable[..., Any]) -> set[str]:
    """What a server function knows to do: texts that its code compares ``do`` with."""
    found: set[str] = set()

    def take(*nodes: ast.AST | None) -> None:
        found.update(str(node.value) for node in nodes if isinstance(node, ast.Constant))

    for node in ast.walk(ast.parse(textwrap.dedent(inspect.getsource(function)))):
        if isinstance(node, ast.MatchValue):
            take(node.value)
        elif isinstance(node, ast.AnnAssign) and isinstance(node.value, ast.Dict):  # a table of what is done
            take(*node.value.keys)
        elif isinstance(node, ast.Compare) and isinstance(node.left, ast.Name) and node.left.id == "what":
            take(*ast.walk(node))
    return found - {"training"}


def test_every_endpoint_stands_in_the_table(world: World) -> None:
    blocks = world.server.blocks
    offered = {function.fn.__name__ for function in blocks.fns.values() if function.fn is not None}
    assert offered | set(servers(blocks)) == {question.endpoint for question in QUESTIONS}
    assert all(function.api_visibility != "public" for function in blocks.fns.values())
    doing: dict[str, Callable[..., Any]] = {
        "dataset": album.answer,
        "captions": captions.answer,
        "review": review.answer,
        "act": page._act,
    }
    for name, function in doing.items():
        known = done_by(function)
        assert len(known) > 5
        assert {question.does for question in QUESTIONS if question.endpoint == name} == known, name


def spots(data: Any, at: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Where paths of the root stand in a question."""
    if isinstance(data, str) and data.startswith(("pics", "@")):
        yield at
    elif isinstance(data, dict | list):
        for key, value in data.items() if isinstance(data, dict) else enumerate(data):
            yield from spots(value, (*at, key))


def moved(prefix: str) -> Callable[[str], str]:
    """The same path, but below ``prefix`` instead of the root."""
    return lambda path: prefix + path.removeprefix("@").removeprefix("pics")


def given(value: Any) -> Callable[[Any], Any]:
    return lambda _: value


def replaced(data: Any, at: tuple[Any, ...], text: Callable[[Any], Any]) -> Any:
    data = copy.deepcopy(data)
    inner = data
    for key in at[:-1]:
        inner = inner[key]
    inner[at[-1]] = text(inner[at[-1]])
    return data


OUTSIDE = ("{beside}", "..", "pics/../beside", "pics/link", "C:\\beside", "\\\\server\\beside")
"""Every way out is tried in test_paths; here it is seen that no endpoint has a way around that."""


def html_of(world: World, question: Question, answer: Any) -> str:
    """What of an answer a page shows as HTML."""
    if question.endpoint in servers(world.server.blocks):
        return "" if not isinstance(answer, dict) else f"{answer.get('html', '')}{answer.get('said', '')}"
    function = world.server.blocks.fns[world.server.handlers(question.endpoint)[0]]
    values = answer.get("data") or []
    shown = [
        str(value) for value, part in zip(values, function.outputs, strict=False) if isinstance(part, gr.HTML)
    ]
    return "".join(shown) + str(answer.get("error") or "")


def name_of(question: Question) -> str:
    return f"{question.endpoint}-{question.does}" if question.does else question.endpoint


@pytest.mark.parametrize("question", QUESTIONS, ids=name_of)
def test_paths_lead_nowhere_but_into_the_roots(world: World, question: Question) -> None:
    world.renew()
    was_done, answer = world.ask(question, question.data)
    assert was_done is not question.fails, answer
    assert EVIL not in html_of(world, question, answer)
    before = contents(world.beside)
    places = list(spots(question.data))
    for at in places:
        is_silent = at[-1] in question.silent
        for text in OUTSIDE[: 1 if is_silent else 2 if len(places) > 8 else None]:
            prefix = text.format(beside=world.beside, root=world.root)
            wrong = replaced(question.data, at, moved(prefix))
            was_done, answer = world.ask(question, wrong)
            assert THEIRS not in json.dumps(answer), (at, text)
            assert EVIL not in html_of(world, question, answer)
            if not is_silent:
                assert not was_done, (at, text, answer)
    assert contents(world.beside) == before
    assert world.server.session.doing == "idle"


def test_what_a_list_does_not_offer_is_refused(world: World) -> None:
    """A browser may send anything: gradio's lists and radio buttons are asked as well as our own lists."""
    world.renew()
    asked = 0
    for question in {each.endpoint: each for each in QUESTIONS if not each.fails}.values():
        if question.endpoint in servers(world.server.blocks):
            continue
        function = world.server.blocks.fns[world.server.handlers(question.endpoint)[0]]
        for place, part in enumerate(function.inputs):
            if not isinstance(part, gr.Dropdown | gr.Radio) or question.endpoint == "on_load":
                continue
            if isinstance(part, gr.Dropdown) and part.allow_custom_value:
                continue
            for value in ("not offered", "../pyproject", 7, ["merge"], {"a": "b"}):
                was_done, answer = world.ask(question, replaced(question.data, (place,), given(value)))
                assert not was_done, (question, place, value, answer)
                asked += 1
    assert asked >= 30
    for name in ("dataset", "captions", "review", "act"):
        for do in ("nothing", "__class__", "", None, 7, ["open"], {"open": 1}):
            data = {"do": do, **RUN, "folder": "pics/img", "sent": draft(**PICTURES), "run": 1}
            was_done, answer = world.ask(Question(name, data), data)
            assert not was_done, (name, do, answer)
    recent = next(
        number
        for number in world.server.handlers("on_load")
        if isinstance(world.server.blocks.fns[number].inputs[0], gr.Dropdown)
    )
    assert world.server.call(recent, [str(world.root / "mine.json")])["success"] is False


def test_others_runs_are_left_alone(world: World) -> None:
    """Kim's run goes on, and Lee asks; Kim is the admin, and may."""
    world.renew()
    session = world.server.session
    config = KohyaConfig().model_dump_json()
    journal = str(world.root / "out" / "logs" / "run-20260101-000000" / "journal.jsonl")
    for kind in ("training", "captions"):
        going = session.queue.add(name="run", owner="kim", config=config, base=str(world.root), kind=kind)
        session.queue.change(going.id, status="running", started=time.time(), journal=journal)
        named = [question for question in QUESTIONS if question.endpoint in ("ask", "on_stop")]
        if kind == "captions":
            named = [
                question
                for question in QUESTIONS
                if (question.endpoint, question.does) == ("captions", "stop")
            ]
        for question in named:
            was_done, answer = world.ask(question, question.data, world.lee)
            assert not was_done or "only they and the admin" in json.dumps(answer), question
        session.queue.change(going.id, status="stopped")
    before = contents(world.root)
    for question in QUESTIONS:
        if (question.endpoint, question.does) in {
            ("act", "move"),
            ("act", "remove"),
            ("review", "report"),
            ("review", "keep"),
            ("review", "restore"),
        }:
            was_done, answer = world.ask(question, question.data, world.lee)
            assert not was_done, question
            assert "only they and the admin" in json.dumps(answer)
    assert contents(world.root) == before
    started = Question("dataset", {"do": "check", "folder": "pics/img", "settings": draft(**TRAINED)})
    body = {
        "component_id": servers(world.server.blocks)["dataset"],
        "fn_name": "dataset",
        "session_hash": "x",
    }
    sent = {**body, "data": world.sent(started.data)}
    key = world.server.http.post("/gradio_api/component_server", json=sent).json()["task"]
    for do in ("progress", "stop"):
        told = world.lee.post(
            "/gradio_api/component_server", json={**body, "data": {"do": do, "task": key}}
        ).json()
        assert "error" in told
        assert "result" not in told


def test_secrets_are_nowhere(world: World) -> None:
    """Every question above sent some, and every file that was loaded holds some."""
    world.renew()
    for question in QUESTIONS:
        if question.endpoint in ("on_open", "on_load", "on_save", "on_start", "on_download"):
            world.ask(question, question.data)
    was_done, seen = world.ask(Question("on_open", [""]), [""], world.lee)
    assert was_done
    assert "hush-" not in json.dumps(seen)
    assert "hush-" not in "".join(world.answers)
    written = {**contents(world.server.session.state), **contents(world.root)}
    given = contents(world.keep)
    known = {str(world.root / Path(path).relative_to(world.keep)) for path in given}
    held = [path for path, content in written.items() if b"hush-" in content and path not in known]
    assert held == []
    assert len(written) > len(given)


def test_nobody_asks_without_a_login(world: World) -> None:
    with contextlib.closing(httpx.Client(base_url=world.server.http.base_url, trust_env=False)) as stranger:
        for question in QUESTIONS:
            if question.endpoint in servers(world.server.blocks):
                body = {"component_id": servers(world.server.blocks)[question.endpoint], "session_hash": "x"}
                body |= {"fn_name": question.endpoint, "data": world.sent(question.data)}
                answer = stranger.post("/gradio_api/component_server", json=body)
            else:
                number = world.server.handlers(question.endpoint)[0]
                body = {"data": world.sent(question.data), "fn_index": number, "session_hash": "x"}
                answer = stranger.post("/gradio_api/queue/join", json=body)
            assert answer.status_code == 401, question
