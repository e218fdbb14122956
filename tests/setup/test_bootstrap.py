"""The set-up, with real virtual environments, real pip and real failures."""

from __future__ import annotations

import ast
import json
import os
import runpy
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.setup.world import World, make_wheel
from trainer import bootstrap, venv_setup
from trainer.files import REPOSITORY

posix_only = pytest.mark.skipif(os.name == "nt", reason="sends POSIX signals or sets POSIX limits")


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path)


@pytest.fixture(scope="session")
def bare_venv(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A virtual environment with pip and nothing else, to be copied: the making takes seconds."""
    folder = tmp_path_factory.mktemp("bare") / ".venv"
    subprocess.run([sys.executable, "-m", "venv", folder], check=True)
    return folder


@pytest.fixture
def world_with_venv(world: World, bare_venv: Path) -> World:
    shutil.copytree(bare_venv, world.venv, symlinks=True)
    return world


def one_sentence(ended: subprocess.CompletedProcess[str]) -> str:
    """The last line of stderr, after checking that the start failed without a traceback."""
    assert ended.returncode not in (0, None), ended.stdout
    assert "Traceback" not in ended.stderr
    last = ended.stderr.rstrip().splitlines()[-1]
    assert last.startswith("LoRA Kiln: ")
    assert last.endswith(".")
    return last


@pytest.mark.slow
def test_life_of_an_environment(world: World) -> None:
    first = world.start("--flag", "two words", module="demo_test")
    said = world.answer(first)
    assert said["argv"] == ["--flag", "two words"]
    assert said["brick"] == "1.0"
    assert [line.split(" ...")[0].strip() for line in first.stderr.splitlines()[2:5]] == [
        "making the virtual environment",
        "fetching packages",
        "installing packages",
    ]

    # A second start, of either program, needs no network, says nothing and writes nothing.
    written = {path: path.stat().st_mtime_ns for path in world.venv.iterdir()}
    for module in ("demo", "demo_test"):
        started = time.monotonic()
        again = world.start(module=module, online=False)
        assert world.answer(again)["brick"] == "1.0"
        assert again.stderr == ""
        assert time.monotonic() - started < 5
    assert {path: path.stat().st_mtime_ns for path in world.venv.iterdir()} == written

    # A changed requirement that cannot be fetched leaves the environment to the older checkout.
    world.wants("brick==2.0")
    assert "network" in one_sentence(world.start(online=False))
    world.wants("brick==1.0")
    assert world.answer(world.start(online=False))["brick"] == "1.0"

    # It is installed over the environment, not into a new one; the test extra stays installed.
    (world.venv / "canary").touch()
    world.wants("brick==2.0")
    assert world.answer(world.start())["brick"] == "2.0"
    assert (world.venv / "canary").exists()
    assert world.answer(world.start(module="demo_test", online=False))["brick"] == "2.0"

    # The Python that it was made from is gone.
    if os.name != "nt":
        python = world.venv / "bin" / "python"
        python.unlink()
        python.symlink_to("/nowhere/python3")
        assert world.answer(world.start())["brick"] == "2.0"
        assert not (world.venv / "canary").exists()

    # The Python that it was made from is another one now.
    marker = json.loads(world.marker.read_text())
    world.marker.write_text(json.dumps({**marker, "python": "3.4"}))
    assert "was made with Python 3.4" in one_sentence(world.start())


@pytest.mark.slow
@posix_only
@pytest.mark.parametrize("phase", ["making the virtual environment", "fetching packages"])
def test_a_killed_set_up_is_mended(world: World, phase: str) -> None:
    process = subprocess.Popen(
        world.command(),
        cwd=world.repository,
        env=world.environment(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        start_new_session=True,
    )
    assert process.stderr is not None
    said = b""
    while phase.encode() not in said:
        more = os.read(process.stderr.fileno(), 4096)
        assert more, said.decode()
        said += more
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    process.stderr.close()
    (world.venv / "canary").touch()
    mended = world.start()
    assert world.answer(mended)["brick"] == "1.0"
    assert "setting up" in mended.stderr
    assert not (world.venv / "canary").exists()


@pytest.mark.slow
def test_two_starts_at_once(world_with_venv: World) -> None:
    processes = [
        subprocess.Popen(
            world_with_venv.command(),
            cwd=world_with_venv.repository,
            env=world_with_venv.environment(),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            encoding="utf-8",
        )
        for _ in range(2)
    ]
    ended = [process.communicate() for process in processes]
    assert [process.returncode for process in processes] == [0, 0], ended
    assert all(json.loads(stdout)["brick"] == "1.0" for stdout, _ in ended)
    said = sorted(stderr for _, stderr in ended)
    assert "waiting for it" in said[0]
    assert "installing" not in said[0]
    assert "installing packages" in said[1]


@pytest.mark.slow
def test_no_network(world_with_venv: World) -> None:
    assert "check the network" in one_sentence(world_with_venv.start(online=False))
    (world_with_venv.venv / "canary").touch()
    assert world_with_venv.answer(world_with_venv.start())["brick"] == "1.0"
    assert (world_with_venv.venv / "canary").exists()  # what was made before pip failed is still good


@pytest.mark.slow
def test_package_that_does_not_exist(world_with_venv: World) -> None:
    world_with_venv.wants("brick==3.0")
    assert "there is no brick==3.0 for this Python" in one_sentence(world_with_venv.start())


@pytest.mark.slow
@posix_only
@pytest.mark.parametrize(("limit_bytes", "made"), [(100_000, False), (4_000_000, True)], ids=["venv", "pip"])
def test_full_disk(world: World, bare_venv: Path, limit_bytes: int, made: bool) -> None:
    """A file that may not grow fails like one on a full disk: in the making of .venv, or in pip."""
    if made:
        shutil.copytree(bare_venv, world.venv, symlinks=True)
    make_wheel(world.shop, "brick", "3.0", extra_bytes=6_000_000)
    world.wants("brick==3.0")
    limited = (
        "import os, resource, sys\n"
        f"resource.setrlimit(resource.RLIMIT_FSIZE, ({limit_bytes}, {limit_bytes}))\n"
        "os.execv(sys.argv[1], sys.argv[1:])"
    )
    ended = subprocess.run(
        [sys.executable, "-c", limited, *world.command()],
        cwd=world.repository,
        env=world.environment(),
        capture_output=True,
        encoding="utf-8",
        check=False,
    )
    assert "disk is full" in one_sentence(ended)
    assert json.loads(world.marker.read_text()) == {"state": "installing"}  # so the next start mends it


@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt" or os.geteuid() == 0, reason="nothing is forbidden to root")
def test_no_permission(world: World) -> None:
    world.repository.chmod(0o555)
    try:
        assert "cannot be written" in one_sentence(world.start())
    finally:
        world.repository.chmod(0o755)


def test_python_without_venv_and_pip(world: World) -> None:
    ended = world.start(BLOCKED="ensurepip pip", PYTHONPATH=str(world.blocker))
    assert "apt install python3-venv" in one_sentence(ended)


@pytest.mark.slow
def test_python_without_venv_but_with_pip(world: World) -> None:
    """Debian without python3-venv, with python3-pip."""
    import ensurepip

    folders = [Path(ensurepip.__file__).parent / "_bundled", Path("/usr/share/python-wheels")]
    wheels = [wheel for folder in folders for wheel in folder.glob("pip-*.whl")]
    assert wheels
    (world.shop / wheels[0].name).write_bytes(wheels[0].read_bytes())
    ended = world.start(BLOCKED="ensurepip", PYTHONPATH=str(world.blocker))
    assert world.answer(ended)["brick"] == "1.0"


def test_current_python(world: World) -> None:
    make_wheel(world.shop, "pytest", "0.1")
    refused = one_sentence(world.start(LORA_KILN_ENV="current"))
    assert "lacks 1 of 1 packages" in refused
    assert '"brick==1.0"' in refused
    world.wants("pytest>=8", "packaging>=20", "pytest<8.0.1")
    assert "lacks 1 of 3 packages: run `" in one_sentence(world.start(LORA_KILN_ENV="current"))
    assert "may only be" in one_sentence(world.start(LORA_KILN_ENV="conda"))

    world.wants("pytest>=8", "packaging>=20")
    (world.repository / "brick.py").write_text("version = 'mine'\n")
    ended = world.start(LORA_KILN_ENV="current")
    said = json.loads(ended.stdout)
    assert said["brick"] == "mine"
    assert Path(said["prefix"]) == Path(sys.prefix)
    assert not world.venv.exists()


BEFORE_THE_CHECK = [
    "trainer/__init__.py",
    "trainer/bootstrap.py",
    "app/__init__.py",
    "app/__main__.py",
    "tests/__init__.py",
    "tests/__main__.py",
    "trainer/__main__.py",
]


@pytest.mark.parametrize("name", BEFORE_THE_CHECK)
def test_old_pythons_can_read_as_far_as_the_check(name: str) -> None:
    source = (REPOSITORY / name).read_text(encoding="utf-8")
    tree = ast.parse(source, feature_version=(3, 6))
    future = [node for node in tree.body if isinstance(node, ast.ImportFrom) and node.module == "__future__"]
    assert not future, "Python 3.6 does not know this future"


@pytest.mark.parametrize("module", ["app", "tests", "trainer"])
def test_old_python_is_told(module: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.startswith(("trainer", "app"))]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(sys, "version_info", (3, 8, 18, "final", 0))
    with pytest.raises(SystemExit, match=r"needs Python 3\.11 or newer and this is Python 3\.8"):
        runpy.run_module(module, run_name="__main__")


def test_cuda_is_read_from_torch_as_torch_says_it() -> None:
    import torch

    file = Path(torch.__file__).with_name("version.py")
    assert bootstrap.is_built_without_cuda(file) == (torch.version.cuda is None)


def test_cuda_build_is_recognised(tmp_path: Path) -> None:
    file = tmp_path / "version.py"
    file.write_text("__version__ = '2.13.0+cu130'\ncuda: Optional[str] = '13.0'\nhip: Optional[str] = None\n")
    assert not bootstrap.is_built_without_cuda(file)


def test_waiting_passes_the_exit_code_on() -> None:
    assert bootstrap.wait_for([sys.executable, "-c", "raise SystemExit(7)"]) == 7


@posix_only
def test_waiting_leaves_ctrl_c_to_the_program() -> None:
    child = (
        "import time\n"
        "try:\n  print('up', flush=True)\n  time.sleep(60)\nexcept KeyboardInterrupt: raise SystemExit(7)"
    )
    parent = (
        "import sys\nfrom trainer import bootstrap\n"
        f"sys.exit(bootstrap.wait_for([sys.executable, '-c', {child!r}]))"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", parent], cwd=REPOSITORY, stdout=subprocess.PIPE, start_new_session=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == b"up\n"
    os.killpg(process.pid, signal.SIGINT)
    assert process.wait(20) == 7
    process.stdout.close()


@pytest.mark.parametrize(
    ("output", "words"),
    [
        ("OSError: [WinError 112] There is not enough space on the disk", "disk is full"),
        (
            "ERROR: Could not install packages due to an OSError: [WinError 5] Access is denied: 'x'",
            "written",
        ),
        ("Read timed out. ReadTimeoutError(HTTPSConnectionPool)", "network"),
        ("some\nodd thing\n", "(odd thing)"),
        ("", "without a word"),
    ],
)
def test_what_pip_says_elsewhere(output: str, words: str) -> None:
    assert words in venv_setup.explain(output)
