"""The checks of ``python -m tests``, one after the other, and what came of them."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Sequence

from tests.chromium import HOW_TO_GET_ONE, find_chromium, install_chromium
from trainer.files import REPOSITORY

__all__ = ["run"]

LINTERS = {
    "ruff check": ("ruff", "check", "."),
    "ruff format": ("ruff", "format", "--check", "."),
    "mypy": ("mypy",),
}
# Two workers, as many as the smallest machine that the suite is meant for has cores.
PYTEST = ("pytest", "-n", "2")


def run(pytest_arguments: Sequence[str]) -> int:
    """Run everything, or pytest alone if it is given arguments; 0 if all went well."""
    if pytest_arguments:
        return _call(["pytest", *pytest_arguments])[0]
    chromium = find_chromium() or install_chromium()
    if chromium is None:
        print(f"{HOW_TO_GET_ONE}; or leave these tests out: python -m tests -m 'not browser'.", flush=True)
        return 2
    os.environ["CHROMIUM"] = str(chromium)
    results = []
    for name, module in LINTERS.items():
        results.append((name, *_timed(module)))
    results.append(("pytest", *_timed(PYTEST)))
    print()
    for name, returncode, last_line, elapsed_s in results:
        verdict = "ok" if returncode == 0 else f"FAILED (exit code {returncode})"
        print(f"{name:<12} {elapsed_s:6.1f} s  {verdict}  {last_line if name != 'pytest' else ''}".rstrip())
    print(results[-1][2], flush=True)  # pytest's own closing line
    return 0 if all(returncode == 0 for _, returncode, _, _ in results) else 1


def _timed(module: Sequence[str]) -> tuple[int, str, float]:
    print(f"\n== {' '.join(module)}", flush=True)
    started = time.monotonic()
    returncode, last_line = _call(module)
    return returncode, last_line, time.monotonic() - started


def _call(module: Sequence[str]) -> tuple[int, str]:
    """Run a Python module in the repository; pass its output on as it comes, and return its last line."""
    command = [sys.executable, "-m", *module]
    environment = dict(os.environ)
    if sys.stdout.isatty():
        environment.update(FORCE_COLOR="1", MYPY_FORCE_COLOR="1")
    last_bytes = b""
    with subprocess.Popen(
        command, cwd=REPOSITORY, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    ) as process:
        assert process.stdout is not None
        while chunk := os.read(process.stdout.fileno(), 65536):
            sys.stdout.buffer.write(chunk)
            sys.stdout.flush()
            last_bytes = (last_bytes + chunk)[-4096:]
    lines = last_bytes.decode("utf-8", "replace").strip().splitlines()
    return process.returncode, lines[-1] if lines else ""
