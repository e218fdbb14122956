"""``python -m tests`` itself."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from tests import checks, chromium


def test_a_failing_check_fails_the_run(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("CHROMIUM", sys.executable)
    monkeypatch.setattr(checks, "LINTERS", {"one": ("platform",), "two": ("no_such_module",)})
    monkeypatch.setattr(checks, "PYTEST", ("pytest", "--version"))
    assert checks.run([]) == 1
    said = capfd.readouterr().out.splitlines()
    assert said[-4].split()[3] == "ok"
    assert "FAILED (exit code 1)" in said[-3]
    assert "No module named no_such_module" in said[-3]
    assert said[-2].startswith("pytest ")
    assert said[-1].startswith("pytest 9")
    monkeypatch.setattr(checks, "LINTERS", {"one": ("platform",)})
    assert checks.run([]) == 0


def test_arguments_run_pytest_alone(capfd: pytest.CaptureFixture[str]) -> None:
    assert checks.run(["--version"]) == 0
    assert capfd.readouterr().out.startswith("pytest ")


def test_named_browser_is_taken_or_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CHROMIUM", sys.executable)
    assert chromium.find_chromium() == Path(sys.executable)
    monkeypatch.setenv("CHROMIUM", "no-such-browser")
    assert chromium.find_chromium() is None


def test_browser_on_the_path(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("CHROMIUM", raising=False)
    program = tmp_path / ("google-chrome.exe" if sys.platform == "win32" else "google-chrome")
    program.touch(mode=0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert chromium.find_chromium() == program
