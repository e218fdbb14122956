"""A small repository that sets itself up with the real bootstrap, from wheels made here: no network."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

from trainer.files import REPOSITORY

__all__ = ["BLOCKER", "World", "make_wheel"]

PROGRAM = """\
import json, sys
from trainer import bootstrap
bootstrap.ensure({extra!r}, "{module}", sys.argv[1:])
import brick
print(json.dumps(dict(prefix=sys.prefix, argv=sys.argv[1:], brick=brick.version)))
"""

BLOCKER = """\
import os, sys

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name in os.environ["BLOCKED"].split():
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

if "BLOCKED" in os.environ:
    sys.meta_path.insert(0, Blocked())
    import importlib.util
    find_spec = importlib.util.find_spec
    importlib.util.find_spec = lambda name, package=None: (
        None if name in os.environ["BLOCKED"].split() else find_spec(name, package)
    )
"""


def make_wheel(folder: Path, name: str, version: str, extra_bytes: int = 0) -> None:
    """Write a wheel of one module that knows its version."""
    info = f"{name}-{version}.dist-info"
    with zipfile.ZipFile(folder / f"{name}-{version}-py3-none-any.whl", "w") as wheel:
        wheel.writestr(f"{name}.py", f"version = {version!r}\n")
        if extra_bytes:
            wheel.writestr(f"{name}_data.bin", os.urandom(extra_bytes))
        wheel.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
        wheel.writestr(
            f"{info}/WHEEL", "Wheel-Version: 1.0\nGenerator: x\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        wheel.writestr(f"{info}/RECORD", f"{name}.py,,\n{info}/METADATA,,\n{info}/WHEEL,,\n{info}/RECORD,,\n")


class World:
    """The repository, its shop of wheels, and ways to start its two programs."""

    def __init__(self, folder: Path) -> None:
        self.repository = folder / "repository"
        self.shop = folder / "shop"
        self.venv = self.repository / ".venv"
        self.marker = self.venv / "lora-kiln.json"
        trainer = self.repository / "trainer"
        trainer.mkdir(parents=True)
        self.shop.mkdir()
        for name in ("__init__", "bootstrap", "venv_setup", "errors", "files"):
            shutil.copy(REPOSITORY / "trainer" / f"{name}.py", trainer)
        (self.repository / "demo.py").write_text(PROGRAM.format(extra=None, module="demo"))
        (self.repository / "demo_test.py").write_text(PROGRAM.format(extra="test", module="demo_test"))
        (folder / "blocker").mkdir()
        (folder / "blocker" / "sitecustomize.py").write_text(BLOCKER)
        self.blocker = folder / "blocker"
        for version in ("1.0", "2.0"):
            make_wheel(self.shop, "brick", version)
        make_wheel(self.shop, "mortar", "1.0")
        self.wants("brick==1.0")

    def wants(self, *dependencies: str, test: str = "mortar==1.0") -> None:
        """Write pyproject.toml."""
        (self.repository / "pyproject.toml").write_text(
            f'[project]\nname = "demo"\ndependencies = {json.dumps(dependencies)}\n'
            f'[project.optional-dependencies]\ntest = ["{test}"]\n'
        )

    def environment(self, *, online: bool = True, **more: str) -> dict[str, str]:
        """What a start sees: pip finds the shop, or nothing but a port where nobody listens."""
        kept = {k: v for k, v in os.environ.items() if not k.startswith(("PIP_", "LORA_KILN_"))}
        reach = (
            {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(self.shop)}
            if online
            else {"PIP_INDEX_URL": "http://127.0.0.1:9/simple", "PIP_RETRIES": "1"}
        )
        return {**kept, "PIP_CONFIG_FILE": os.devnull, "PIP_NO_CACHE_DIR": "1", **reach, **more}

    def command(self, *argv: str, module: str = "demo") -> list[str]:
        """The command line of a start."""
        return [sys.executable, "-m", module, *argv]

    def start(
        self, *argv: str, module: str = "demo", online: bool = True, **more: str
    ) -> subprocess.CompletedProcess[str]:
        """Run a program of the repository to its end."""
        return subprocess.run(
            self.command(*argv, module=module),
            cwd=self.repository,
            env=self.environment(online=online, **more),
            capture_output=True,
            encoding="utf-8",
            check=False,
        )

    def answer(self, ended: subprocess.CompletedProcess[str]) -> dict[str, Any]:
        """What a program that ended well said about itself."""
        assert ended.returncode == 0, ended.stderr
        said: dict[str, Any] = json.loads(ended.stdout)
        assert Path(said["prefix"]).resolve() == self.venv.resolve()
        return said
