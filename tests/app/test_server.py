"""The served page: what it gives out, to whom, and what it does with things that no page of ours sends."""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

import gradio as gr
import httpx
import pytest
from gradio_client import Client
from PIL import Image

from app import server as serving_page
from app.access import Users
from app.options import Options
from app.session import Session
from tests.app.conftest import loops_closed
from trainer import config as configuration
from trainer.config import KohyaConfig
from trainer.files import REPOSITORY


def free_port() -> int:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return int(taken.getsockname()[1])


@dataclasses.dataclass
class Server:
    """A page that is being served, and the session behind it."""

    session: Session
    blocks: gr.Blocks
    http: httpx.Client
    opened: list[int]

    def file(self, path: Path | str) -> int:
        return self.http.get(f"/gradio_api/file={quote(str(path))}").status_code

    def handlers(self, name: str) -> list[int]:
        """Numbers of the page's functions called ``name``, as a browser names them."""
        return [
            number
            for number, function in self.blocks.fns.items()
            if function.fn is not None and function.fn.__name__ == name
        ]

    def call(self, number: int, data: list[Any]) -> dict[str, Any]:
        """Do what the page's own script does for an event; returns the last message of its stream."""
        session_hash = "test" + os.urandom(4).hex()
        body = {"data": data, "fn_index": number, "session_hash": session_hash, "trigger_id": None}
        answer = self.http.post("/gradio_api/queue/join", json=body)
        if answer.status_code != 200:
            return {"success": False, "output": {"error": answer.text}}
        with self.http.stream("GET", f"/gradio_api/queue/data?session_hash={session_hash}") as stream:
            for line in stream.iter_lines():
                if line.startswith("data:"):
                    message: dict[str, Any] = json.loads(line[5:])
                    if message["msg"] in ("process_completed", "unexpected_error", "close_stream"):
                        return message
        raise AssertionError("the stream ended without an answer")


@contextlib.contextmanager
def serving(folder: Path, **flags: Any) -> Iterator[Server]:
    options = Options(
        **{
            "host": "127.0.0.1",
            "port": free_port(),
            "listen": False,
            "auth": None,
            "roots": {},
            "state": folder / "state",
            "config": None,
            "browser": False,
            **flags,
        }
    )
    opened: list[int] = []
    session = Session.open(options, KohyaConfig(), Path.cwd())
    blocks = serving_page.launch(session, options, opened=lambda: opened.append(1))
    try:
        with httpx.Client(base_url=f"http://127.0.0.1:{options.port}", timeout=60, trust_env=False) as http:
            yield Server(session, blocks, http, opened)
    finally:
        blocks.close(verbose=False)


@pytest.fixture(scope="module")
def connections() -> list[Any]:
    """Addresses that anything in this process asked for while the servers were up."""
    return []


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, connections: list[Any]) -> Iterator[Server]:
    look_up, connect = socket.getaddrinfo, socket.socket.connect

    def looked_up(host: Any, *rest: Any, **more: Any) -> Any:
        connections.append(host)
        return look_up(host, *rest, **more)

    def connected(self: socket.socket, address: Any) -> None:
        connections.append(address)
        connect(self, address)

    patch = pytest.MonkeyPatch()
    patch.setattr(socket, "getaddrinfo", looked_up)
    patch.setattr(socket.socket, "connect", connected)
    with loops_closed(), serving(tmp_path_factory.mktemp("free")) as running:
        yield running
    patch.undo()


@pytest.fixture(scope="module")
def guarded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """As with --listen: a login, and one root."""
    folder = tmp_path_factory.mktemp("guarded")
    (folder / "root").mkdir()
    (folder / "secret.json").write_text('{"network_dim": 77}')
    (folder / "root" / "mine.json").write_text('{"network_dim": 33}')
    flags = {"listen": True, "auth": Users.parse("kim:pa:ss"), "roots": {"pics": folder / "root"}}
    with loops_closed(), serving(folder, **flags) as running:
        yield running


def test_the_page_is_there_and_asks_nobody_else(server: Server, connections: list[Any]) -> None:
    answer = server.http.get("/")
    assert answer.status_code == 200
    assert "LoRA Kiln" in answer.text
    hosts = {address[0] if isinstance(address, tuple) else address for address in connections}
    assert hosts <= {"127.0.0.1", "localhost", "0.0.0.0", None}, hosts
    assert len(connections) > 0


def test_the_page_names_no_other_host(server: Server) -> None:
    text = server.http.get("/").text
    for mark in ("fonts.googleapis", "fonts.gstatic", "cdn.", "google-analytics", "huggingface.co/front"):
        assert mark not in text.replace("cdn.jsdelivr.net/npm/iframe-resizer", ""), mark


@pytest.mark.parametrize(
    "path",
    [
        "/etc/passwd",
        str(REPOSITORY / "pyproject.toml"),
        str(REPOSITORY / "app" / "page.py"),
        str(REPOSITORY / ".git" / "config"),
        str(REPOSITORY / "assets" / "page.css"),
        "pyproject.toml",
        "../pyproject.toml",
        str(Path.home()),
        "C:\\Windows\\win.ini",
        "\\\\server\\share\\x",
    ],
)
def test_other_files_are_not_given_out(server: Server, path: str) -> None:
    assert server.file(path) in (403, 404)
    assert server.file(path) == 403 or not Path(path).exists()


def test_served_folders_grow_with_the_runs_and_hold_nothing_else(server: Server, tmp_path: Path) -> None:
    samples = tmp_path / "out" / "sample"
    samples.mkdir(parents=True)
    picture, beside = samples / "a b.png", tmp_path / "out" / "x.json"
    Image.new("RGB", (8, 8)).save(picture)
    beside.write_text("{}")
    assert server.file(picture) == 403
    server.session.served.append(str(samples))
    assert server.file(picture) == 200
    assert server.file(beside) == 403
    assert server.file(f"{samples}/../x.json") == 403
    assert server.http.get(f"/gradio_api/file={samples}/%2e%2e/x.json").status_code == 403
    thumbnail = server.session.thumbnails / "t.webp"
    Image.new("RGB", (8, 8)).save(thumbnail)
    assert server.file(thumbnail) == 200


def test_unknown_endpoints(server: Server) -> None:
    for path in ("/gradio_api/call/anything", "/gradio_api/run/predict/x", "/gradio_api/nothing", "/admin"):
        # The server closes a connection on which it failed: each request gets its own.
        answer = server.http.post(path, json={"data": []}, headers={"Connection": "close"})
        assert answer.status_code >= 400, path
    assert server.call(9999, [])["success"] is False


def test_clients_are_offered_nothing(server: Server) -> None:
    with contextlib.closing(Client(str(server.http.base_url), verbose=False)) as client:
        offered = client.view_api(print_info=False, return_format="dict")
    assert offered["named_endpoints"] == {}
    assert offered["unnamed_endpoints"] == {}


def test_two_pages_open_with_the_same_values(server: Server) -> None:
    before = len(server.opened)
    (number,) = server.handlers("on_open")
    first, second = server.call(number, [""]), server.call(number, [""])
    assert first["success"] is True
    assert first["output"]["data"] == second["output"]["data"]
    assert len(server.opened) == before + 2


def test_without_a_login_nothing_is_given_out(guarded: Server) -> None:
    http = guarded.http
    http.cookies.clear()
    for path in (
        "/config",
        "/gradio_api/info",
        "/gradio_api/file=/etc/passwd",
        "/gradio_api/queue/data?session_hash=x",
    ):
        assert http.get(path).status_code == (403 if "file=" in path else 401), path
    body = {"data": [], "fn_index": guarded.handlers("on_stop")[0], "session_hash": "x"}
    assert http.post("/gradio_api/queue/join", json=body).status_code == 401
    assert http.post("/gradio_api/run/predict", json=body).status_code in (401, 404)
    asked = {
        "component_id": bridge(guarded),
        "fn_name": "browse",
        "session_hash": "x",
        "data": {"kind": "json"},
    }
    assert http.post("/gradio_api/component_server", json=asked).status_code == 401
    assert http.post("/gradio_api/upload", files={"files": ("a.json", b"{}")}).status_code == 401
    assert http.post("/login", data={"username": "kim", "password": "pa"}).status_code == 400
    assert http.post("/login", data={"username": "", "password": ""}).status_code in (400, 422)
    assert "network_dim" not in http.get("/").text


@pytest.fixture
def inside(guarded: Server) -> Server:
    answer = guarded.http.post("/login", data={"username": "kim", "password": "pa:ss"})
    assert answer.status_code == 200
    return guarded


def bridge(server: Server) -> int:
    return int(next(number for number, block in server.blocks.blocks.items() if block.elem_id == "bridge"))


def ask(server: Server, name: str, data: Any) -> Any:
    """What the page's script does with a function of the bridge."""
    body = {"component_id": bridge(server), "fn_name": name, "session_hash": "x", "data": data}
    answer = server.http.post("/gradio_api/component_server", json=body)
    assert answer.status_code == 200, answer.text
    return answer.json()


@pytest.mark.parametrize(
    "path",
    ["..", "/etc", "pics/../..", "C:\\", "\\\\server\\share", "pics/link", "~", "\0", "pics/sub/../../.."],
)
def test_browsing_stays_in_the_roots(inside: Server, path: str) -> None:
    root = inside.session.paths.roots["pics"]
    link = root / "link"
    if not link.exists():
        link.symlink_to(root.parent)
        (root / "inner").mkdir()
    answer = ask(inside, "browse", {"kind": "json", "path": path})
    assert answer["path"] == ""
    assert answer["error"]
    assert [entry["name"] for entry in answer["entries"]] == ["pics/"]
    here = ask(inside, "browse", {"kind": "json", "path": "pics"})
    assert [entry["name"] for entry in here["entries"]][:2] == ["↑ all folders", "inner/"]
    assert "link/" not in [entry["name"] for entry in here["entries"]]
    assert "mine.json" in [entry["name"] for entry in here["entries"]]


@pytest.mark.parametrize(
    "data", [None, 5, [], {"do": "stop"}, {"do": "open", "run": "1; DROP"}, {"do": "move", "run": 99}]
)
def test_strange_requests_of_a_page_are_answered(inside: Server, data: Any) -> None:
    assert "reload" in ask(inside, "act", data)["error"]


def test_a_run_of_somebody_else(inside: Server) -> None:
    session = inside.session
    config = configuration.dumps(KohyaConfig(network_dim=19))
    run = session.queue.add(name="theirs", owner="lee", config=config, base=str(Path.cwd()))
    session.held = True
    try:
        assert "error" not in ask(inside, "act", {"do": "move", "run": run.id, "by": 1})  # kim is the admin
        session.admin = "lee"
        for what in ({"do": "remove"}, {"do": "move", "by": 1}):
            assert "only they and the admin" in ask(inside, "act", {**what, "run": run.id})["error"]
        assert ask(inside, "act", {"do": "open", "run": run.id})["values"]["network_dim"] == 19
    finally:
        session.admin = "kim"
        assert ask(inside, "act", {"do": "remove", "run": run.id}) == {"message": ""}
    assert session.queue.waiting() == []


def test_a_link_in_a_served_folder_leads_nowhere(server: Server, tmp_path: Path) -> None:
    samples = tmp_path / "sample"
    samples.mkdir()
    (tmp_path / "key.txt").write_text("secret")
    (samples / "a.png").symlink_to(tmp_path / "key.txt")
    server.session.served.append(str(samples))
    assert server.file(samples / "a.png") == 403


def test_other_sites_and_rebound_names_are_refused(server: Server) -> None:
    body = {"data": [], "fn_index": server.handlers("on_stop")[0], "session_hash": "x"}
    evil = {"Origin": "https://evil.example"}
    assert server.http.post("/gradio_api/queue/join", json=body, headers=evil).status_code == 403
    assert server.http.get("/", headers={"Host": "evil.example:7860"}).status_code == 403
    for path in ("/gradio_api/proxy=http://127.0.0.1/x", "/monitoring", "/gradio_api/deep_link"):
        assert server.http.get(path).status_code == 404
    headers = server.http.get("/").headers
    assert headers["x-content-type-options"] == "nosniff"
    assert headers["x-frame-options"] == "SAMEORIGIN"


def test_guessing_a_password_soon_has_to_wait(tmp_path: Path) -> None:
    (tmp_path / "root").mkdir()
    flags = {"listen": True, "auth": Users.parse("kim:pa:ss"), "roots": {"pics": tmp_path / "root"}}
    with loops_closed(), serving(tmp_path, **flags) as running:
        right = {"username": "kim", "password": "pa:ss"}
        for _ in range(5):
            assert running.http.post("/login", data={**right, "password": "x"}).status_code == 400
        answer = running.http.post("/login", data=right)
        assert answer.status_code == 429
        assert "wrong logins" in answer.json()["detail"]


def test_secrets_never_come_back(inside: Server) -> None:
    """Neither in what the page is shown, nor in a saved file, the list of runs or a download."""
    root = inside.session.paths.roots["pics"]
    sent = page_of(
        wandb_api_key="hush-1", huggingface_token="hush-2", additional_parameters="--wandb_api_key hush-3"
    )
    answers = [
        inside.call(inside.handlers("on_open")[0], [sent]),
        inside.call(inside.handlers("on_preset")[0], ["sd15_photo", sent]),
        inside.call(inside.handlers("on_save")[0], [sent, "pics/quiet"]),
        inside.call(inside.handlers("on_download")[0], [sent]),
    ]
    assert all(answer["success"] for answer in answers)
    assert "hush" not in json.dumps(answers)
    assert "hush" not in (root / "quiet.json").read_text()


def values_of(answer: dict[str, Any]) -> str:
    return json.dumps(answer["output"].get("data", []))


def test_a_root_can_be_loaded_from_and_nothing_beside_it(inside: Server) -> None:
    root = inside.session.paths.roots["pics"]
    number = inside.handlers("on_load")[0]
    answer = inside.call(number, ["pics/mine.json"])
    assert answer["success"] is True
    assert '"network_dim": 33' in values_of(answer)
    outside = [str(root.parent / "secret.json"), "pics/../secret.json", "/etc/passwd", "\0", ""]
    for text in [*outside, 5, None, ["x"], {"a": 1}]:
        answer = inside.call(number, [text])
        assert answer["success"] is False, text
        assert "77" not in values_of(answer)


def test_an_upload_is_read_and_a_path_posing_as_one_is_not(inside: Server) -> None:
    number = inside.handlers("on_upload")[0]
    secret = str(inside.session.paths.roots["pics"].parent / "secret.json")
    for path in (secret, "/etc/passwd", "pics/mine.json"):
        answer = inside.call(number, [{"path": path, "meta": {"_type": "gradio.FileData"}}])
        assert answer["success"] is False
        assert "77" not in values_of(answer)
    sent = inside.http.post("/gradio_api/upload", files={"files": ("a.json", b'{"network_dim": 55}')})
    answer = inside.call(number, [{"path": sent.json()[0], "meta": {"_type": "gradio.FileData"}}])
    assert '"network_dim": 55' in values_of(answer)


def test_presets_are_named_and_nothing_else(inside: Server) -> None:
    number = inside.handlers("on_preset")[0]
    assert inside.call(number, ["sd15_photo", page_of()])["success"] is True
    for name in ("../pyproject", "/etc/passwd", "nothing", 7, ["demo"], {"a": "b"}):
        assert inside.call(number, [name, page_of()])["success"] is False, name


def page_of(**changed: Any) -> str:
    """What the page's script sends as its configuration."""
    return json.dumps({"values": {**KohyaConfig().model_dump(), **changed}, "base": ""})


def test_saving_stays_in_the_roots(inside: Server) -> None:
    (number,) = inside.handlers("on_save")
    root = inside.session.paths.roots["pics"]
    answer = inside.call(number, [page_of(network_dim=21), "pics/new"])
    assert answer["success"] is True
    assert json.loads((root / "new.json").read_text())["network_dim"] == 21
    for path in (str(root.parent / "x.json"), "pics/../x", str(REPOSITORY / "presets" / "x.json"), "", None):
        answer = inside.call(number, [page_of(), path])
        assert answer["success"] is False, path
    assert not (root.parent / "x.json").exists()
    assert not (REPOSITORY / "presets" / "x.json").exists()


def test_starting_outside_the_roots_is_refused(inside: Server) -> None:
    (number,) = inside.handlers("on_start")
    fields = {"train_data_dir": "pics", "output_dir": "/tmp/elsewhere"}
    answer = inside.call(number, [page_of(**fields)])
    assert "output_dir" in values_of(answer)
    assert "outside the folders of this server" in values_of(answer)
    assert inside.session.doing == "idle"
    assert inside.session.runs == 0


def test_no_endpoint_of_any_tab_reaches_outside_the_roots(inside: Server) -> None:
    """Every function of the page, with what no page of ours sends: paths beside the roots, and junk."""
    beside = inside.session.paths.roots["pics"].parent / "beside"
    pictures = beside / "1_cat"
    pictures.mkdir(parents=True)
    Image.new("RGB", (64, 64)).save(pictures / "mark-77.png")
    (pictures / "mark-77.txt").write_text("mark-77")
    (beside / "mark.json").write_text('{"training_comment": "mark-77"}')
    paths = {"train_data_dir": str(beside), "output_dir": str(beside / "out"), "network_weights": str(beside)}
    named = {
        **paths,
        "dataset_config": str(beside / "mark.json"),
        "sample_prompts": str(beside / "mark.json"),
    }
    file = {"path": str(beside / "mark.json"), "meta": {"_type": "gradio.FileData"}}
    before = sorted(beside.rglob("*"))
    called = 0
    for number, function in inside.blocks.fns.items():
        if function.fn is None:
            continue
        for value in (
            page_of(**paths),
            page_of(**named),
            str(beside),
            str(pictures),
            file,
            ["x", {}],
            7,
            None,
        ):
            answer = json.dumps(inside.call(number, [value] * len(function.inputs))["output"])
            # What was sent may come back in a sentence; what is in the files may not.
            assert "mark-77" not in answer, (function.fn.__qualname__, value)
            called += 1
    assert called > 100
    assert sorted(beside.rglob("*")) == before
    assert inside.session.doing == "idle"
    assert inside.http.get("/").status_code == 200


def test_downloading_gives_what_the_form_holds(server: Server) -> None:
    (number,) = server.handlers("on_download")
    answer = server.call(number, [page_of(output_name="../my <b>", network_dim="12")])
    text, name = answer["output"]["data"]
    assert json.loads(text)["network_dim"] == 12
    assert name == "my b.json"


def test_the_log_stays_quiet(tmp_path: Path) -> None:
    """A start prints one line, and an interrupt ends it with 0."""
    port = free_port()
    command = [sys.executable, "-m", "app", "--no-browser", "--port", str(port), "--state", str(tmp_path)]
    with subprocess.Popen(
        command, cwd=REPOSITORY, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as process:
        assert process.stdout is not None
        first = process.stdout.readline()
        assert first == f"LoRA Kiln is at http://127.0.0.1:{port}/  (Ctrl-C ends it)\n"
        assert httpx.get(f"http://127.0.0.1:{port}/", trust_env=False, timeout=60).status_code == 200
        process.terminate()
        rest = process.stdout.read()
    assert process.returncode == 0
    assert rest == ""


@pytest.mark.filterwarnings("ignore::ResourceWarning")  # gradio leaves the socket open that it tries with
def test_a_taken_port_is_a_sentence(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        options = Options(
            host="127.0.0.1",
            port=port,
            listen=False,
            auth=None,
            roots={},
            state=tmp_path,
            config=None,
            browser=False,
        )
        with pytest.raises(SystemExit, match="choose another --port"):
            serving_page.serve(options)
        gc.collect()


def test_opening_the_page_needs_no_torch() -> None:
    code = "import sys, app.server; print([m for m in ('torch', 'transformers', 'diffusers') if m in sys.modules])"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"
    assert done.stderr == ""
