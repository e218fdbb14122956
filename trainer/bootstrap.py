"""Sets the program up: sees to a ``.venv`` that holds what pyproject.toml names, and runs there.

Only the standard library is used, since nothing else is installed when this runs, and the syntax of
this file is old enough for any Python from 3.6 on to get as far as the check below.

``.venv/lora-kiln.json``, the marker, says what is installed. It is written before pip starts (state
"installing") and after pip ended well (state "ready"), so that a start can tell a finished
environment from one whose making was cut off. The variable ``LORA_KILN_ENV=current`` makes the
program use the Python that it was started with, once every requirement is found in it.
"""

import sys

if sys.version_info < (3, 11):  # noqa: UP036 - this is what an older Python gets to see
    sys.exit(
        "LoRA Kiln needs Python 3.11 or newer and this is Python {}.{}: install a newer one and start "
        "with it, for example `python3.12 -m app` (on Windows `py -3.12 -m app`).".format(*sys.version_info)
    )

import errno
import json
import os
import re
import tomllib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NoReturn

from trainer.errors import SetupError
from trainer.files import REPOSITORY

__all__ = ["MARKER", "VENV", "Groups", "ensure", "inside_venv", "installed", "requirements", "venv_python"]

VENV = REPOSITORY / ".venv"
MARKER = VENV / "lora-kiln.json"

SWITCH = "LORA_KILN_ENV"
# Set for the process that is started in .venv, and removed there: a start that does not arrive where
# it was sent must not be sent again for ever.
SENT = "LORA_KILN_SENT_TO_VENV"

Groups = dict[str, list[str]]
"""Requirement lines by group: "" is what the program needs, other names are extras of pyproject.toml."""


def ensure(extra: str | None, module: str, argv: Sequence[str]) -> None:
    """Return only in a Python that has everything installed; otherwise run ``module`` in one and exit.

    What is shown goes to stderr, so that a program's own output stays clean. A failure ends the
    process with one sentence and exit code 1.

    Args:
        extra: Optional-dependencies group of pyproject.toml that is needed too, or None.
        module: What to run in ``.venv``, as in ``python -m module``.
        argv: Its arguments, without the program's name.
    """
    sent = os.environ.pop(SENT, None) is not None
    try:
        wanted = requirements([] if extra is None else [extra])
        if _chooses_current_python():
            _check_current_python(wanted)
            return
        if not is_ready(wanted):
            from trainer import venv_setup  # costs time that a later start need not spend

            venv_setup.set_up(wanted)
        elif inside_venv():
            _check_version()
            _hint_at_cuda()
            return
        if sent and not inside_venv():
            raise SetupError(f"{venv_python()} does not run in {VENV}: delete that folder and start again")
    except (SetupError, OSError) as error:
        sys.exit(f"LoRA Kiln: {_sentence(error)}.")
    except KeyboardInterrupt:
        print("\nLoRA Kiln: stopped; the next start goes on setting up.", file=sys.stderr)
        sys.exit(130)
    _run_in_venv(module, argv)


def venv_python() -> Path:
    """The interpreter of ``.venv``, whether it exists or not."""
    return VENV / ("Scripts/python.exe" if os.name == "nt" else "bin/python")


def inside_venv() -> bool:
    """Whether the running Python is that of ``.venv``."""
    return Path(sys.prefix).resolve() == VENV.resolve()


def requirements(extras: Iterable[str]) -> Groups:
    """What pyproject.toml asks for, with those of the extras that it has."""
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    offered: Groups = project.get("optional-dependencies", {})
    return {"": project["dependencies"], **{name: offered[name] for name in extras if name in offered}}


def installed() -> Groups | None:
    """What a finished set-up put into ``.venv``, or None where none was finished."""
    try:
        marker = json.loads(MARKER.read_text(encoding="utf-8"))
        groups: Groups = marker["groups"]
        return groups if marker["state"] == "ready" else None
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return None


def is_ready(wanted: Groups) -> bool:
    """Whether ``.venv`` holds exactly these requirement lines, with whatever other groups."""
    there = installed()
    return (
        there is not None
        and all(there.get(name) == lines for name, lines in wanted.items())
        and venv_python().exists()  # follows the link: False once the Python it was made from is gone
    )


def _check_version() -> None:
    """Raise SetupError if the packages in ``.venv`` were installed for another Python than this one."""
    made_with = json.loads(MARKER.read_text(encoding="utf-8"))["python"]
    running = f"{sys.version_info[0]}.{sys.version_info[1]}"
    if made_with != running:
        raise SetupError(
            f"{VENV} was made with Python {made_with}, in whose place there now is Python {running}: "
            "delete that folder and start again"
        )


def _chooses_current_python() -> bool:
    choice = os.environ.get(SWITCH, "")
    if choice not in ("", "current"):
        raise SetupError(f'the variable {SWITCH} is "{choice}" and may only be "current": change or unset it')
    return choice == "current"


def _check_current_python(wanted: Groups) -> None:
    """Raise SetupError naming the requirements that the running Python does not meet."""
    from importlib import metadata

    lines = [line for group in wanted.values() for line in group]
    missing = []
    try:
        from packaging.requirements import Requirement
    except ImportError:  # several of the requirements need it, so they cannot be here either
        missing = lines
    else:
        for line in lines:
            requirement = Requirement(line)
            try:
                fits = requirement.specifier.contains(metadata.version(requirement.name), prereleases=True)
            except metadata.PackageNotFoundError:
                fits = False
            if not fits:
                missing.append(line)
    if missing:
        quoted = " ".join(f'"{line}"' for line in missing)
        raise SetupError(
            f"{SWITCH}=current chooses this Python, which lacks {len(missing)} of {len(lines)} packages: run "
            f"`{sys.executable} -m pip install {quoted}`, or unset {SWITCH} to have a .venv made"
        )


def _sentence(error: SetupError | OSError) -> str:
    if isinstance(error, SetupError):
        return str(error)
    from trainer import venv_setup

    if error.errno in (errno.ENOSPC, errno.EFBIG, errno.EDQUOT):
        return venv_setup.disk_full()
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return venv_setup.not_writable()
    return f"the set-up failed: {error}"


def _hint_at_cuda() -> None:
    """On Windows, where the usual torch is built without CUDA, say how an NVIDIA card comes to be used."""
    if sys.platform != "win32":
        return
    driver = Path(os.environ.get("SYSTEMROOT", r"C:\Windows"), "System32", "nvcuda.dll")
    torch_version = VENV / "Lib" / "site-packages" / "torch" / "version.py"
    if driver.exists() and is_built_without_cuda(torch_version):
        print(
            "LoRA Kiln: this machine has an NVIDIA card, but the installed torch cannot use it: set the "
            'variable PIP_EXTRA_INDEX_URL to the address that "Get started" on pytorch.org shows for CUDA, '
            "delete the folder .venv and start again.",
            file=sys.stderr,
        )


def is_built_without_cuda(torch_version: Path) -> bool:
    """Read torch/version.py (``cuda: Optional[str] = None``), which costs less than importing torch."""
    found = re.search(r"^cuda\b[^=]*=\s*(\S+)", torch_version.read_text(encoding="utf-8"), re.MULTILINE)
    return found is not None and found[1] == "None"


def _run_in_venv(module: str, argv: Sequence[str]) -> NoReturn:
    command = [str(venv_python()), "-m", module, *argv]
    os.environ[SENT] = "1"
    if os.name != "nt":
        sys.stdout.flush()
        sys.stderr.flush()
        os.execv(command[0], command)
    # Windows cannot replace a running program: wait for the other one and pass on its exit code.
    sys.exit(wait_for(command))


def wait_for(command: list[str]) -> int:
    """Run ``command`` to its end and return its exit code; what Ctrl-C means is left to it alone."""
    import signal
    import subprocess

    # A handler that does nothing, unlike SIG_IGN, is not handed on to the other program.
    before = signal.signal(signal.SIGINT, lambda *_: None)
    try:
        return subprocess.call(command)
    finally:
        signal.signal(signal.SIGINT, before)
