"""The browser that tests of the page drive: one that is installed, or Debian's."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

__all__ = ["HOW_TO_GET_ONE", "find_chromium", "install_chromium"]

HOW_TO_GET_ONE = (
    "no Chromium, Chrome or Edge was found for the tests of the page: install one, or name its program in the "
    "variable CHROMIUM"
)

_NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "microsoft-edge")
_ON_WINDOWS = (
    "Google/Chrome/Application/chrome.exe",
    "Chromium/Application/chrome.exe",
    "Microsoft/Edge/Application/msedge.exe",
)
_ON_MACOS = (
    "Google Chrome.app/Contents/MacOS/Google Chrome",
    "Chromium.app/Contents/MacOS/Chromium",
    "Microsoft Edge.app/Contents/MacOS/Microsoft Edge",
)


def find_chromium() -> Path | None:
    """The program named by ``CHROMIUM``, else one on the path, else one in its system's usual place."""
    if named := os.environ.get("CHROMIUM"):
        return Path(found) if (found := shutil.which(named)) else None
    for name in _NAMES:
        if found := shutil.which(name):
            return Path(found)
    places: list[Path] = []
    if sys.platform == "win32":
        folders = [os.environ.get(name) for name in ("PROGRAMFILES", "PROGRAMFILES(X86)", "LOCALAPPDATA")]
        places = [Path(folder, program) for folder in folders if folder for program in _ON_WINDOWS]
    elif sys.platform == "darwin":
        folders_mac = (Path("/Applications"), Path.home() / "Applications")
        places = [folder / program for folder in folders_mac for program in _ON_MACOS]
    return next((place for place in places if place.is_file()), None)


def install_chromium() -> Path | None:
    """Install Debian's Chromium where that is possible without asking (as root); None where it is not."""
    if sys.platform == "win32" or os.geteuid() != 0:
        return None
    if not (Path("/etc/debian_version").exists() and shutil.which("apt-get")):
        return None
    print("installing Chromium with apt-get", flush=True)
    environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    for command in (["apt-get", "update", "-q"], ["apt-get", "install", "-y", "-q", "chromium"]):
        ended = subprocess.run(
            command,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            encoding="utf-8",
            errors="replace",
            check=False,
        )
        if ended.returncode != 0:
            print(ended.stdout[-2000:], flush=True)
            print(f"`{' '.join(command)}` failed", flush=True)
            return None
    return find_chromium()
