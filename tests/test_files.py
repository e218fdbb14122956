"""Files appear whole or not at all."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from trainer.files import atomic_path, atomic_write


def test_the_old_file_stays_when_the_writer_fails(tmp_path: Path) -> None:
    target = tmp_path / "a.txt"
    atomic_write(target, "old")

    def fail() -> None:
        with atomic_path(target) as temporary:
            temporary.write_text("half")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert target.read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["a.txt"]


def test_text_is_utf8_with_its_own_line_ends(tmp_path: Path) -> None:
    atomic_write(tmp_path / "sub" / "a.txt", "ä\r\nb\n")
    assert (tmp_path / "sub" / "a.txt").read_bytes() == "ä\r\nb\n".encode()


@pytest.mark.skipif(os.name == "nt", reason="POSIX permissions")
def test_whoever_may_read_a_persons_files_may_read_these(tmp_path: Path) -> None:
    (tmp_path / "usual").touch()
    with atomic_path(tmp_path / "a.safetensors") as temporary:
        save_file({"a": torch.zeros(1)}, temporary)
    assert (tmp_path / "a.safetensors").stat().st_mode == (tmp_path / "usual").stat().st_mode
