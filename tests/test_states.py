"""State folders: complete or not there, and read with clear words when broken."""

import json
from pathlib import Path

import pytest
import torch

from trainer.errors import StateError
from trainer.states import Position, load_state, save_state, sweep


def write(folder: Path, step: int = 5) -> None:
    save_state(
        folder,
        position=Position(step=step, epoch=1, seed=3, losses=(0.1, 0.2)),
        network={"a.lora_down.weight": torch.full((2, 3), float(step))},
        optimizer={"state": {0: {"step": torch.tensor(4.0)}}, "param_groups": [{"lr": 0.1}]},
        scheduler={"last_epoch": step},
        scaler=None,
    )


def test_round_trip_and_overwrite(tmp_path: Path) -> None:
    folder = tmp_path / "x-state"
    write(folder, 5)
    write(folder, 6)
    state = load_state(folder)
    assert state.position == Position(step=6, epoch=1, seed=3, losses=(0.1, 0.2))
    assert torch.equal(state.network["a.lora_down.weight"], torch.full((2, 3), 6.0))
    assert state.optimizer["param_groups"] == [{"lr": 0.1}]
    assert state.scheduler == {"last_epoch": 6}
    assert state.scaler is None
    assert [path.name for path in tmp_path.iterdir()] == ["x-state"]
    assert json.loads((folder / "train_state.json").read_text()) == {"current_epoch": 1, "current_step": 6}


def test_a_save_that_fails_leaves_the_old_state(tmp_path: Path) -> None:
    folder = tmp_path / "x-state"
    write(folder, 5)
    with pytest.raises((RuntimeError, TypeError, AttributeError)):
        save_state(
            folder,
            position=Position(step=6, epoch=1, seed=3),
            network={"a": torch.zeros(1)},
            optimizer={"state": (_ for _ in ())},  # cannot be written
            scheduler=None,
            scaler=None,
        )
    assert load_state(folder).position.step == 5
    assert [path.name for path in tmp_path.iterdir()] == ["x-state"]


def test_what_a_kill_left_behind_is_swept(tmp_path: Path) -> None:
    (tmp_path / ".x-state.1234.tmp").mkdir()
    (tmp_path / ".x.safetensors.1234.tmp").write_bytes(b"half")
    (tmp_path / "mine.tmp").write_bytes(b"not ours")
    sweep(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.tmp"]


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.bin", "kiln_state.json", "scheduler.bin"])
@pytest.mark.parametrize("damage", ["truncate", "garbage"])
def test_broken_states_are_named(tmp_path: Path, name: str, damage: str) -> None:
    write(tmp_path / "s")
    path = tmp_path / "s" / name
    path.write_bytes(path.read_bytes()[:20] if damage == "truncate" else b"\x00garbage" * 9)
    with pytest.raises(StateError, match=name.replace(".", r"\.")):
        load_state(tmp_path / "s")


def test_missing_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(StateError, match="no folder"):
        load_state(tmp_path / "nothing")


def test_a_state_that_would_run_code_is_refused(tmp_path: Path) -> None:
    write(tmp_path / "s")
    marker = tmp_path / "ran"

    class Evil:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return (Path.touch, (str(marker),))

    torch.save({"state": Evil()}, tmp_path / "s" / "optimizer.bin")
    with pytest.raises(StateError):
        load_state(tmp_path / "s")
    assert not marker.exists()
