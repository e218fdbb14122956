"""The declarations agree with an independent catalogue of Kohya's page, and each is complete."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
from pydantic import ValidationError

from tests.config.eras import BY_KEY, CATALOGUE
from trainer.config import KohyaConfig, help_of, ui_of
from trainer.config.kiln import KilnFields
from trainer.config.ui import LORA_TYPES

NAMES = list(KohyaConfig.model_fields)
TABS = ["Model", "Folders", "Metadata", "Accelerate launch", "Basic", "Advanced", "Samples", "HuggingFace"]
KINDS = {
    "boolean": "boolean",
    "string": "string",
    "string|null": "string",
    "integer": "integer",
    "number": "number",
}
FREE_LISTS = {
    "pretrained_model_name_or_path",
    "optimizer",
    "lr_scheduler_type",
    "LyCORIS_preset",
    "caption_extension",
}


def test_all_287_settings_are_there_and_those_of_our_own() -> None:
    assert sorted(set(NAMES) - set(KilnFields.model_fields)) == sorted(BY_KEY)
    assert len(BY_KEY) == 287
    assert set(KilnFields.model_fields) == {
        "quantized_base",
        "origin_step",
        "origin_epoch",
        "skip_verdict",
        "hold_out",
    }
    for name in KilnFields.model_fields:
        ui = ui_of(name)
        assert (ui.section, ui.sd_scripts_arg) == ("LoRA Kiln", None)
        assert "Kohya" in ui.reason


@pytest.mark.parametrize("row", CATALOGUE, ids=lambda row: str(row["key"]))
def test_declaration_agrees_with_the_catalogue(row: dict[str, Any]) -> None:
    setting = KohyaConfig.setting(row["key"])
    ui = setting.ui
    assert setting.kind == KINDS[row["type"]]
    assert setting.default == row["default"]
    assert isinstance(setting.default, bool) == isinstance(row["default"], bool)
    assert (ui.label, ui.widget, ui.since) == (row["label"], row["widget"], row["since"])
    assert list(ui.choices) == (row["choices"] or [])
    assert (ui.min, ui.max) == (row["min"], row["max"])
    assert set(ui.families) == (set() if row["families"] == "all" else set(row["families"]))
    assert set(ui.lora_types) == (set() if row["lora_types"] == "all" else set(row["lora_types"]))
    place = row["tab"].split(" > ")
    if place[0] == "Parameters":
        place = place[1:] if place[1] in TABS else ["Basic", *place[1:]]
    assert [ui.tab, ui.section] == [place[0], " > ".join(place[1:])]


@pytest.mark.parametrize("name", NAMES)
def test_setting_is_described_and_its_effect_explained(name: str) -> None:
    ui, text = ui_of(name), help_of(name)
    assert 20 <= len(text) <= 260
    assert text.endswith(".")
    assert "\n" not in text
    assert ui.effect in ("honoured", "adapted", "none")
    if ui.effect != "honoured":
        assert ui.reason.endswith(".")
    if ui.shown_with:
        other, value = ui.shown_with
        assert isinstance(getattr(KohyaConfig(), other), type(value))
    if ui.widget == "slider":
        assert ui.min is not None
    assert ui.free_text == (name in FREE_LISTS or (ui.widget == "dropdown" and not ui.choices)), (
        "a list without choices shows files, so any text must do"
    )
    assert bool(ui.path) <= (KohyaConfig.setting(name).kind == "string")
    if ui.trained_choices is not None:
        assert set(ui.trained_choices) < set(ui.choices)
        assert KohyaConfig.setting(name).default in ui.trained_choices


def test_helps_differ_from_each_other() -> None:
    same_words_for_several_families = (
        "cache_text",
        "attn",
        "flow_shift",
        "sigmoid",
        "timestep",
        "prediction",
    )
    own = [
        help_of(name) for name in NAMES if not any(part in name for part in same_words_for_several_families)
    ]
    dynamic = {text for text in own if own.count(text) > 1}
    assert len(dynamic) <= 2, dynamic


def test_order_is_that_of_the_page() -> None:
    tabs = [ui_of(name).tab for name in NAMES]
    assert list(dict.fromkeys(tabs)) == TABS
    assert sorted(tabs, key=TABS.index) == tabs
    for earlier, later in [
        ("LoRA_type", "network_dim"),
        ("train_batch_size", "epoch"),
        ("epoch", "max_train_steps"),
    ]:
        assert NAMES.index(earlier) < NAMES.index(later)


def test_only_tokens_are_secret() -> None:
    assert {name for name in NAMES if ui_of(name).secret} == {"huggingface_token", "wandb_api_key"}


def test_lora_types_are_the_choices_of_lora_type() -> None:
    assert ui_of("LoRA_type").choices == LORA_TYPES
    for name in NAMES:
        assert set(ui_of(name).lora_types) <= set(LORA_TYPES)


def test_rank_slider_grows_for_some_lycoris_types() -> None:
    rank = ui_of("network_dim")
    assert rank.outside(1024, "Standard") == "at most 512"
    assert rank.outside(100_000, "LyCORIS/LoKr") == ""
    assert rank.outside(0, "Standard") == "at least 1"


def test_config_is_frozen() -> None:
    config = KohyaConfig()
    with pytest.raises(ValidationError, match="frozen"):
        config.epoch = 3  # type: ignore[misc]


def test_unknown_names_are_an_error() -> None:
    with pytest.raises(KeyError):
        ui_of("rank")
    with pytest.raises(KeyError):
        help_of("rank")


def test_model_converts_as_files_do_and_refuses_what_cannot_be() -> None:
    config = KohyaConfig.model_validate(
        {
            "epoch": "10",
            "flip_aug": 1,
            "learning_rate": "1e-5",
            "seed": "",
            "max_resolution": None,
            "mine": [1],
        }
    )
    assert (config.epoch, config.flip_aug, config.learning_rate, config.seed) == (10, True, 1e-5, 0)
    assert config.max_resolution == "512,512"
    assert config.model_extra == {"mine": [1]}
    with pytest.raises(ValidationError, match="allowed is a whole number"):
        KohyaConfig.model_validate({"epoch": "ten"})


@pytest.mark.parametrize("value", [16, 16.0, "16", "16.0"])
def test_whole_numbers_are_integers_as_from_a_browser(value: Any) -> None:
    alpha = KohyaConfig.model_validate({"network_alpha": value}).network_alpha
    assert (alpha, type(alpha)) == (16, int)
    assert str(alpha) == "16"  # what ss_network_alpha says


def test_fractions_stay_floats() -> None:
    assert KohyaConfig(network_alpha=0.5).network_alpha == 0.5
    assert KohyaConfig(learning_rate=1e-4).learning_rate == 1e-4


def test_importing_the_configuration_loads_neither_torch_nor_gradio() -> None:
    code = (
        "import sys, trainer.config; print(*{'torch', 'gradio', 'numpy', 'transformers'} & set(sys.modules))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120
    )
    assert done.stdout.strip() == ""
