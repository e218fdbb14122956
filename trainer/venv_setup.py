"""Makes, mends and updates ``.venv`` for `trainer.bootstrap`, and says in one sentence what hindered it.

Like bootstrap, it uses the standard library only.
"""

from __future__ import annotations

import contextlib
import errno
import importlib.util
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO

from trainer import bootstrap
from trainer.bootstrap import MARKER, VENV, Groups, venv_python
from trainer.errors import SetupError
from trainer.files import REPOSITORY, atomic_write

__all__ = ["disk_full", "explain", "not_writable", "set_up"]

LOG = VENV / "lora-kiln-setup.log"
LOCK = REPOSITORY / ".venv.lock"
FREE_BYTES_NEEDED = 2_500_000_000  # measured: 1.9 GB installed without CUDA, 0.5 GB of downloads

PIP_INSTALL = ["install", "--no-input", "--no-user", "--disable-pip-version-check", "--progress-bar", "off"]


def set_up(wanted: Groups) -> None:
    """Bring ``.venv`` to where it holds ``wanted``; of several processes at once, one does the work.

    Raises:
        SetupError: It could not be done; the message says what to do.
        OSError: A file could not be written.
    """
    with _lock() as lock:
        if not bootstrap.is_ready(wanted):
            _set_up(wanted, lock)


def _set_up(wanted: Groups, lock: int) -> None:
    started = time.monotonic()
    sound = _is_sound()
    if not sound and bootstrap.inside_venv():
        raise SetupError(f"{VENV} is not whole: run `deactivate`, then start again to mend it")
    _say(f"LoRA Kiln: {'updating' if sound else 'setting up'} {VENV}")
    if not sound:
        _say("  this happens once, takes minutes and about 2 GB (8 GB with CUDA on Linux)")
        _clear()
    groups = {**bootstrap.requirements(bootstrap.installed() or ()), **wanted}
    before = MARKER.read_bytes() if MARKER.exists() else None
    atomic_write(MARKER, json.dumps({"state": "installing"}))

    def put_back() -> None:
        if before is None:
            MARKER.unlink()
        else:
            atomic_write(MARKER, before)

    with LOG.open("w", encoding="utf-8") as log:
        if not sound:
            _make_venv(log, lock)
        _install([line for group in groups.values() for line in group], put_back, log, lock)
    marker = {"state": "ready", "python": _venv_version(), "groups": groups}
    atomic_write(MARKER, json.dumps(marker, indent=1))
    _say(f"  ready after {time.monotonic() - started:.0f} s; pip's words are in {LOG}")


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


# The steps


def _is_sound() -> bool:
    """Whether ``.venv`` can be installed into: made to its end, and no installation was cut off in it."""
    with contextlib.suppress(OSError, ValueError, AttributeError):
        if json.loads(MARKER.read_text(encoding="utf-8")).get("state") == "installing":
            return False
    try:
        found = _ask_venv("import pip, sys; print(sys.version_info >= (3, 11))")
    except (OSError, subprocess.CalledProcessError):
        return False
    return found == "True"


def _venv_version() -> str:
    return _ask_venv("import sys; print(*sys.version_info[:2], sep='.')")


def _ask_venv(code: str) -> str:
    command = [str(venv_python()), "-I", "-c", code]
    return subprocess.run(command, capture_output=True, check=True, encoding="utf-8").stdout.strip()


def _clear() -> None:
    """Empty ``.venv``, which may be a link to a folder elsewhere, and see that there is room."""
    VENV.mkdir(parents=True, exist_ok=True)
    for entry in VENV.iterdir():
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry)
        else:
            entry.unlink()
    if shutil.disk_usage(VENV).free < FREE_BYTES_NEEDED:
        raise SetupError(disk_full())


def _make_venv(log: IO[str], lock: int) -> None:
    with_pip = importlib.util.find_spec("ensurepip") is not None
    if not with_pip and importlib.util.find_spec("pip") is None:
        raise SetupError(
            "this Python can neither make a virtual environment nor run pip: on Debian or Ubuntu run "
            "`apt install python3-venv`, elsewhere install Python from python.org, and start again"
        )
    if with_pip:
        # Not left to venv, which keeps to itself why this failed.
        add_pip = [str(venv_python()), "-I", "-m", "ensurepip", "--upgrade", "--default-pip"]
    else:
        # Debian without python3-venv: the pip outside puts another one inside.
        add_pip = [sys.executable, "-m", "pip", "--python", str(venv_python()), *PIP_INSTALL, "pip"]
    with _phase("making the virtual environment"):
        for command in ([sys.executable, "-m", "venv", "--without-pip", str(VENV)], add_pip):
            returncode, output = _run_logged(command, log, lock)
            if returncode != 0:
                raise SetupError(explain(output))


def _install(lines_wanted: list[str], put_back: Callable[[], None], log: IO[str], lock: int) -> None:
    """Install all requirements with one pip command, so that each holds for all the others.

    Args:
        lines_wanted: Requirements as pip takes them.
        put_back: Called if pip ended, or was stopped, before it changed anything in ``.venv``.
        log: Gets pip's words.
        lock: Handle of the lock.
    """
    command = [str(venv_python()), "-I", "-m", "pip", *PIP_INSTALL, *lines_wanted]
    output, fetched, untouched = [], 0, True
    try:
        with contextlib.ExitStack() as phases, _started(command, log, lock) as (process, lines):
            note = phases.enter_context(_phase("fetching packages"))
            for line in lines:
                output.append(line)
                if line.startswith(("Collecting ", "Processing ")):
                    fetched += 1
                    note(f"{fetched}")
                elif line.startswith("Installing collected packages:"):
                    untouched = False
                    phases.close()
                    note = phases.enter_context(_phase("installing packages"))
                    note(f"{line.count(',') + 1}")
        if process.returncode != 0:
            raise SetupError(explain("".join(output)))
        untouched = False
    finally:
        if untouched:
            put_back()


@contextlib.contextmanager
def _started(
    command: list[str], log: IO[str], lock: int
) -> Iterator[tuple[subprocess.Popen[str], Iterator[str]]]:
    """Start ``command``; yield it and the lines it says, which are copied to ``log`` as they are read."""
    log.write(f"$ {' '.join(command)}\n")
    log.flush()
    with subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        encoding="utf-8",
        errors="replace",
        # Its own hold on the lock: should this process be killed, the lock lasts until pip has ended.
        pass_fds=() if os.name == "nt" else (lock,),
    ) as process:

        def lines() -> Iterator[str]:
            assert process.stdout is not None
            for line in process.stdout:
                log.write(line)
                log.flush()
                yield line

        yield process, lines()


def _run_logged(command: list[str], log: IO[str], lock: int) -> tuple[int, str]:
    with _started(command, log, lock) as (process, lines):
        output = "".join(lines)
    return process.returncode, output


@contextlib.contextmanager
def _lock() -> Iterator[int]:
    """Hold the one lock on ``.venv``; the system frees it when its holders end, however they end."""
    handle = os.open(LOCK, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        if not _locked(handle):
            _say(f"LoRA Kiln: another start is setting up {VENV}; waiting for it")
            while not _locked(handle):
                time.sleep(0.3)
        yield handle
    finally:
        os.close(handle)


if sys.platform == "win32":
    import msvcrt

    def _locked(handle: int) -> bool:
        try:
            msvcrt.locking(handle, msvcrt.LK_NBLCK, 1)
        except OSError as error:
            if error.errno in (errno.EACCES, errno.EDEADLK):
                return False
            raise
        return True
else:
    import fcntl

    def _locked(handle: int) -> bool:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True


# What is said


@contextlib.contextmanager
def _phase(title: str) -> Iterator[Callable[[str], None]]:
    """Show one line for a phase, with a running clock on a terminal; yield a setter for its detail."""
    started, ended, detail = time.monotonic(), threading.Event(), ""
    live = sys.stderr.isatty()

    def note(text: str) -> None:
        nonlocal detail
        detail = f"{text}, "

    def show() -> None:
        line = f"  {title} ... {detail}{time.monotonic() - started:.0f} s"
        print(f"\r{line:<60}", end="", file=sys.stderr, flush=True)

    def tick() -> None:
        while not ended.wait(0.5):
            show()

    clock = threading.Thread(target=tick, daemon=True)
    if live:
        clock.start()
    else:
        print(f"  {title} ... ", end="", file=sys.stderr, flush=True)
    try:
        yield note
    finally:
        ended.set()
        if live:
            clock.join()
            show()
            print(file=sys.stderr, flush=True)
        else:
            _say(f"{detail}{time.monotonic() - started:.0f} s")


_FULL = r"No space left on device|not enough space on the disk|Disk quota|\[Errno (27|28|122)\]"
_DENIED = r"Permission denied|Access is denied|\[Errno (1|13|30)\]|Read-only file system"
_OFFLINE = (
    r"NewConnectionError|ConnectTimeout|ReadTimeout|ConnectionError|Max retries|name resolution|"
    r"Connection ?(refused|reset|broken|aborted)|ProxyError|SSLError|IncompleteRead"
)


def explain(output: str) -> str:
    """One sentence for what pip or venv said before it failed."""
    if re.search(_FULL, output):
        return disk_full()
    if re.search(_DENIED, output):
        return not_writable()
    if re.search(_OFFLINE, output):
        return (
            "the packages could not be downloaded: check the network connection (behind a proxy, the "
            f"variable HTTPS_PROXY) and start again; pip's words are in {LOG}"
        )
    if missing := re.search(r"No matching distribution found for (\S+)", output):
        return (
            f"there is no {missing[1]} for this Python ({platform.python_version()}, "
            f"{platform.architecture()[0]}, {platform.system()} {platform.machine()}): start with a 64-bit "
            "Python 3.11, 3.12 or 3.13"
        )
    last = [line.strip() for line in output.splitlines() if line.strip()]
    return f"the set-up failed ({last[-1] if last else 'without a word'}): all of its words are in {LOG}"


def disk_full() -> str:
    """The sentence for a full disk."""

    def free(folder: Path) -> str:
        return f"{shutil.disk_usage(folder).free / 1e9:.1f} GB free"

    temporary = Path(tempfile.gettempdir())
    return (
        f"the disk is full or nearly so: about {FREE_BYTES_NEEDED / 1e9:.1f} GB are needed (8 GB with CUDA "
        f"on Linux), so make room in {REPOSITORY} ({free(REPOSITORY)}) and in {temporary} "
        f"({free(temporary)}, or set TMPDIR to another folder) and start again"
    )


def not_writable() -> str:
    """The sentence for files that may not be written."""
    return (
        f"{VENV} cannot be written: start as the owner of {REPOSITORY}, and close other programs that use "
        "that folder"
    )
