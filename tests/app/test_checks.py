"""What the checks say of a configuration, before anything is loaded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from app.checks import Check, checks, checks_html
from app.paths import Paths
from app.runs import Runs
from tests.runs import settings
from trainer.config import KohyaConfig


@pytest.fixture
def runs(tmp_path: Path) -> Runs:
    return Runs(tmp_path / "runs.sqlite3")


def of(values: dict[str, Any], base: Path, runs: Runs) -> dict[str, Check]:
    """The checks of a configuration, by the setting that they are about; errors win."""
    found = checks(KohyaConfig(**values), base, Paths({}, confined=False), runs)
    return {check.about: check for check in sorted(found, key=lambda check: check.level == "error")}


def test_all_contradictions_are_said_at_once_and_can_be_repaired(tmp_path: Path, runs: Runs) -> None:
    values: dict[str, Any] = {
        "full_bf16": True,
        "mixed_precision": "no",
        "color_aug": True,
        "adaptive_noise_scale": 0.1,
        "noise_offset_type": "Original",
        "max_token_length": 80,
        "LoRA_type": "Flux1",
        "lr_scheduler": "wobbly",
        "loss_type": "l3",
        "min_timestep": 1001,
        "optimizer_args": "x",
        "additional_parameters": "--network_args y --network_dim many",
        "num_processes": 3,
        "num_machines": 2,
        "network_weights": "none.safetensors",
    }
    (tmp_path / "img" / "1_cat").mkdir(parents=True)
    Image.new("RGB", (300, 2100)).save(tmp_path / "img" / "1_cat" / "a.png")
    found = of({**values, "train_data_dir": "img"}, tmp_path, runs)
    expected = {"output_dir", "network_dim"} | set(values) - {
        "mixed_precision",
        "noise_offset_type",
        "num_machines",
        "min_timestep",
    }
    errors = {name for name, check in found.items() if check.level == "error"}
    assert expected - errors == set(), sorted(errors)
    # What has a button is mended by it: pressed all at once, these complaints are gone.
    repairs: dict[str, Any] = {}
    for check in found.values():
        if check.level == "error":
            repairs |= check.values or {}
    mended = of({**values, "train_data_dir": "img", **repairs}, tmp_path, runs)
    left = {name for name, check in mended.items() if check.level == "error"}
    typed = {"output_dir", "pretrained_model_name_or_path", "optimizer_args", "additional_parameters"}
    assert left <= typed | {"network_dim", "loss_type"}
    # The rest is looked at all the same.
    assert found["train_data_dir"].text == "1 picture has a side outside 256 to 2048 pixels: take better ones"


def test_everything_that_the_guide_asks_for_is_looked_at(tmp_path: Path, runs: Runs) -> None:
    """Each with a button, on a toy model that can be trained."""
    values = settings(tmp_path, max_train_steps=0, epoch=3, cache_latents=True, sample_prompts="cat")
    found = checks(KohyaConfig(**values), tmp_path, Paths({}, confined=False), runs)
    assert [check for check in found if check.level == "error"] == []
    assert [check for check in found if not check.about] == []
    words = " ".join(check.text for check in found)
    for part in (
        "Model: model.safetensors, SD 1.x",
        "4 pictures found, 8 with repeats",
        "Every picture has a caption",
        "Resolution 64 x 64: usual is",
        "Buckets with repeats: 64x64",
        "(8 pictures with repeats / 2 batch size / 1 accumulation x 3 epochs x 1) = 12 steps",
        "free on the disk",
        "Memory plan:",
        "Roughly ",
        "drawn only when asked for",
    ):
        assert part in words
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "toy.safetensors").touch()
    (tmp_path / "img" / "2_tok cat" / "0.txt").unlink()
    again = checks(KohyaConfig(**values), tmp_path, Paths({}, confined=False), runs)
    taken = next(check for check in again if check.about == "output_name")
    assert taken.values == {"output_name": "toy-2"}
    assert any("1 picture of 4" in check.text for check in again if check.about == "caption_extension")


def test_each_change_that_makes_it_fit_has_a_button(
    tmp_path: Path, runs: Runs, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a computer with next to no memory."""
    from trainer import devices
    from trainer.events import MemorySampled

    little = MemorySampled(ram_bytes=0, ram_peak_bytes=0, ram_total_bytes=1 << 20)
    monkeypatch.setattr(devices, "memory", lambda device: little)
    monkeypatch.setattr("trainer.advice.WORTH_BYTES", 1)
    found = checks(
        KohyaConfig(**settings(tmp_path, train_batch_size=16)), tmp_path, Paths({}, confined=False), runs
    )
    changes = [check for check in found if check.repair == "Do this"]
    whole = next(check for check in found if check.text.startswith("Memory plan"))
    assert whole.level == "warning"
    assert {"train_batch_size": 1} in [check.values for check in changes]
    assert whole.values == {name: value for check in changes for name, value in (check.values or {}).items()}


def test_what_lies_outside_the_roots_is_not_looked_at(tmp_path: Path, runs: Runs) -> None:
    paths = Paths({"data": tmp_path / "data"}, confined=True)
    values = {"train_data_dir": "/etc", "output_dir": "data/o", "vae": "/etc/passwd", "full_bf16": True}
    found = checks(KohyaConfig(**values), tmp_path, paths, runs)
    assert {check.level for check in found} == {"error"}
    assert {"train_data_dir", "vae", "full_bf16"} <= {check.about for check in found}
    assert not any("picture" in check.text and "found" in check.text for check in found)


def test_the_list_is_escaped_and_names_what_is_urgent_first() -> None:
    evil = "<img src=x onerror=alert(1)>"
    lines = [
        Check("good", "fine"),
        Check("error", evil, "seed", evil, {"seed": evil}),
        Check("warning", "hm"),
    ]
    text = checks_html(lines)
    assert "<img" not in text
    assert "1 to mend before it can start" in text
    assert text.index("Mend") < text.index("hm") < text.index("fine")
    assert "Ready; 1 to look at" in checks_html(lines[2:])
    assert "Ready to start" in checks_html(lines[:1])
