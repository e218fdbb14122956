from __future__ import annotations

from pathlib import Path

import pytest

from trainer.errors import ConfigError
from trainer.plugins import Folder


def test_a_new_file_is_a_new_plugin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "some_plugins"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "_base.py").write_text("raise AssertionError('not a plugin')")
    (package / "one.py").write_text("PLUGIN = 1")
    (package / "broken.py").write_text("raise AssertionError('listing imports nothing')")
    monkeypatch.syspath_prepend(tmp_path)
    folder = Folder("some_plugins")
    assert folder.names() == ["broken", "one"]
    assert folder.get("one") == 1
    with pytest.raises(ConfigError, match="'two' is not one of some_plugins: broken, one"):
        folder.get("two")


def test_families() -> None:
    from trainer.families.sd import StableDiffusion

    assert "sd" in Folder("trainer.families").names()
    assert Folder("trainer.families").get("sd") is StableDiffusion
