from __future__ import annotations

import errno
import json
import os
from pathlib import Path
from typing import Any

import pytest

from tests.config.eras import written_on
from trainer.config import KohyaConfig, dumps, load, loads, save
from trainer.errors import ConfigError

TODAY = written_on("2026-07-10")
DAYS = [
    "2022-12-31",
    "2023-01-15",
    "2023-01-25",
    "2023-03-02",
    "2023-04-20",
    "2023-06-15",
    "2023-07-20",
    "2024-01-15",
    "2024-03-20",
    "2024-08-20",
    "2025-06-01",
    "2026-07-10",
]


def kohya_writes(values: dict[str, Any]) -> str:
    """Sorted by key, indent 2, as the page's save button does it; a browser sends 1.0 as 1."""
    plain = {
        key: int(value) if isinstance(value, float) and value.is_integer() else value
        for key, value in values.items()
    }
    return json.dumps(dict(sorted(plain.items())), indent=2)


def test_file_of_today_is_written_back_byte_for_byte() -> None:
    changed = TODAY | {
        "output_name": "größe",
        "network_alpha": 0.5,
        "learning_rate": 1e-05,
        "zzz": [1, {"a": None}],
    }
    for raw in (TODAY, changed):
        text = kohya_writes(raw)
        assert dumps(loads(text).config) == text


def test_all_settings_are_written_with_todays_defaults() -> None:
    written = json.loads(dumps(KohyaConfig()))
    assert written == {key: value for key, value in TODAY.items() if key != "save_as_bool"}
    assert len(written) == 287


def test_text_is_plain_ascii_sorted_and_indented() -> None:
    text = dumps(KohyaConfig.model_validate({"output_name": "猫", "Ä": "\ud800", "a": 1}))
    assert text.isascii()
    keys = list(json.loads(text))
    assert keys == sorted(keys)
    assert text.splitlines()[1].startswith('  "LoRA_type": ')
    assert r'"\u732b"' in text


@pytest.mark.parametrize("day", DAYS)
def test_load_save_load_changes_nothing(day: str, tmp_path: Path) -> None:
    first = loads(written_on(day) | {"my_key": "mine"})
    path = tmp_path / "config.json"
    assert save(first.config, path) == ()
    second = load(path)
    assert second.config == first.config
    assert path.read_text(encoding="utf-8") == dumps(second.config)
    assert not second.of("converted", "missing", "invalid")  # all was settled the first time
    assert {finding.key for finding in second.report} <= {finding.key for finding in first.report}


def test_whole_floats_become_integers_and_fractions_stay() -> None:
    written = json.loads(
        dumps(loads({"network_alpha": 16.0, "max_grad_norm": 0.3, "noise_offset": "0.0"}).config)
    )
    assert (written["network_alpha"], written["max_grad_norm"], written["noise_offset"]) == (16, 0.3, 0)
    assert type(written["network_alpha"]) is int
    replaced = KohyaConfig().model_copy(update={"noise_offset": 0.0, "network_alpha": 4.0})
    assert '"network_alpha": 4,' in dumps(replaced)


def test_values_outside_the_page_and_unknown_keys_are_written_back() -> None:
    raw = TODAY | {
        "network_dim": 1024,
        "LoRA_type": "Mine",
        "x": {"y": [1.5, None]},
        "no_token_padding": False,
    }
    written = json.loads(dumps(loads(raw).config))
    assert written == raw


def test_infinity_under_an_unknown_key_survives() -> None:
    text = dumps(loads('{"mine": [NaN, -Infinity, 1e999]}').config)
    assert dumps(loads(text).config) == text
    assert "NaN" in text


def test_tokens_never_reach_a_file(tmp_path: Path) -> None:
    config = KohyaConfig(
        huggingface_token="hf_secret",
        wandb_api_key="secret",
        additional_parameters="--sample_at_first --huggingface_token hf_secret",
    )
    path = tmp_path / "config.json"
    findings = save(config, path)
    assert "secret" not in path.read_text(encoding="utf-8")
    assert "secret" not in repr(findings)
    assert {finding.key for finding in findings} == {
        "huggingface_token",
        "wandb_api_key",
        "additional_parameters",
    }
    assert load(path).config.additional_parameters == "--sample_at_first"


def test_folder_is_made_and_nothing_else_left(tmp_path: Path) -> None:
    path = tmp_path / "new" / "deep" / "config.json"
    save(KohyaConfig(epoch=3), str(path))
    assert load(path).config.epoch == 3
    assert [entry.name for entry in path.parent.iterdir()] == ["config.json"]


def test_config_that_would_not_load_back_never_replaces_a_file(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    save(KohyaConfig(epoch=3), path)
    good = path.read_bytes()
    for broken in (
        KohyaConfig().model_copy(update={"epoch": "three"}),
        KohyaConfig().model_copy(update={"learning_rate": float("nan")}),
        KohyaConfig().model_copy(update={"train_data_dir": Path("x")}),
        KohyaConfig.model_validate({"mine": {1, 2}}),
    ):
        with pytest.raises(ConfigError):
            save(broken, path)
        assert path.read_bytes() == good
    assert [entry.name for entry in tmp_path.iterdir()] == ["config.json"]


def test_full_disk_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "config.json"
    save(KohyaConfig(epoch=3), path)

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(ConfigError, match="No space left on device"):
        save(KohyaConfig(epoch=4), path)
    assert load(path).config.epoch == 3
    assert [entry.name for entry in tmp_path.iterdir()] == ["config.json"]


def test_path_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="cannot be written"):
        save(KohyaConfig(), tmp_path / "file" / "config.json")
    with pytest.raises(ConfigError, match="cannot be written"):
        save(KohyaConfig(), tmp_path)
    with pytest.raises(ConfigError, match="cannot be written"):
        save(KohyaConfig(), "a\0b.json")
