"""Config -> widgets -> config, as a browser carries it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gradio as gr
import pytest

from app import presets
from app.fields import ESSENTIAL, Form, read
from app.tabs import parameters
from trainer import config as configuration
from trainer.config import KohyaConfig, Loaded, ui_of
from trainer.errors import ConfigError
from trainer.files import REPOSITORY


@pytest.fixture(scope="module")
def form() -> Form:
    made = Form()
    with gr.Blocks(analytics_enabled=False):
        parameters.render(made)
    return made


def sent(form: Form, config: KohyaConfig) -> dict[str, Any]:
    """What the page's script collects after the widgets showed ``config``: JSON in both directions."""
    values = config.model_dump()
    for (name, widget), value in zip(form.widgets.items(), form.show(config), strict=True):
        values[name] = json.loads(json.dumps(widget.postprocess(value)))
    return values


def back(values: Any) -> Loaded:
    """As the server reads it."""
    return read(json.dumps({"values": values, "base": ""}))[0]


def test_every_field_that_kohya_shows_has_a_widget(form: Form) -> None:
    shown = {name for name in KohyaConfig.model_fields if not ui_of(name).hidden}
    assert set(form.places) == shown
    assert shown - set(form.widgets) == {"wandb_api_key", "huggingface_token"}
    for name, item in form.widgets.items():
        assert item.label == ui_of(name).label
        assert (ui_of(name).effect == "none") == str(item.info).startswith("No effect here")


def test_every_field_is_in_a_part_that_goes_when_its_fields_go(form: Form) -> None:
    grouped = {name for id_, names in form.groups.items() if id_.startswith("section-") for name in names}
    assert grouped == set(form.places)
    facts = json.loads(json.dumps(form.facts()))
    assert facts["order"] == list(form.widgets)
    assert set(ESSENTIAL) <= set(facts["order"])
    assert facts["fields"]["t5xxl"]["with"] == ["flux1_checkbox", True]
    assert facts["fields"]["conv_dim"]["types"] == list(ui_of("conv_dim").lora_types)


def test_no_secret_reaches_the_page(form: Form) -> None:
    assert not [name for name in form.widgets if ui_of(name).secret]


@pytest.mark.parametrize("name", presets.names())
def test_presets_come_back_as_they_were(form: Form, name: str) -> None:
    loaded = configuration.load(presets.path_of(name)).config
    assert back(sent(form, loaded)).config == loaded


def test_defaults_come_back_as_they_were(form: Form) -> None:
    assert back(sent(form, KohyaConfig())).config == KohyaConfig()


ODD: dict[str, Any] = {
    "caption_extension": ".txt2",
    "network_dim": 1024,
    "lr_scheduler": "wobbly",
    "optimizer": "torch.optim.Adamax",
    "clip_skip": 99,
    "max_resolution": "a,b",
    "learning_rate": 1e-9,
    "noise_offset": -3.5,
    "seed": 2**53 - 1,
    "train_data_dir": 'C:\\cats & <b>"dogs"</b>\\Ünï',
    "sample_prompts": "one --w 64\ntwo\n\n# three",
}


def test_values_outside_the_lists_come_back_and_kill_nothing(form: Form) -> None:
    odd = KohyaConfig(**ODD, mystery={"kept": [1, 2.5, None]})
    loaded = back(sent(form, odd))
    assert loaded.config == odd
    assert {"clip_skip", "network_dim", "lr_scheduler"} <= {item.key for item in loaded.of("outside")}


def test_every_field_can_be_changed(form: Form) -> None:
    """A value that differs from the default, for each widget by itself."""
    shown = sent(form, KohyaConfig())
    for name in form.widgets:
        value = shown[name]
        if isinstance(value, bool):
            changed: Any = not value
        elif isinstance(value, int | float):
            changed = value + 1
        else:
            changed = f"{value}x"
        loaded = back({**shown, name: changed})
        assert loaded.config == KohyaConfig(**{name: changed}), name


def test_an_emptied_number_reads_as_in_kohyas_files(form: Form) -> None:
    shown = sent(form, KohyaConfig(seed=5, train_batch_size=7))
    for name in ("seed", "train_batch_size"):
        shown[name] = ""
    config = back(shown).config
    assert config.seed == 0
    assert config.train_batch_size == KohyaConfig().train_batch_size


@pytest.mark.parametrize("junk", [None, True, -1, 1e308, "x" * 500, "", [], [1, "a"], {"a": 1}, "\ud800"])
def test_whatever_a_browser_sends_becomes_a_configuration(form: Form, junk: Any) -> None:
    loaded = back({**dict.fromkeys(form.widgets, junk), "mystery": junk})
    defaults = KohyaConfig()
    for name in KohyaConfig.model_fields:
        value, default = getattr(loaded.config, name), getattr(defaults, name)
        kinds = (
            (int, float)
            if isinstance(default, int | float) and not isinstance(default, bool)
            else type(default)
        )
        assert isinstance(value, kinds), name


@pytest.mark.parametrize("text", [None, 5, "", "[]", "{}", '{"values": 3}', "{" * 10**5, "x" * 5_000_000])
def test_what_is_no_configuration_is_refused(text: Any) -> None:
    with pytest.raises(ConfigError, match="reload"):
        read(text)


def test_pictures_are_held_out_where_a_person_begins_and_never_from_a_file_of_kohyas() -> None:
    assert presets.NEW.hold_out
    for name in presets.names():
        assert configuration.load(presets.path_of(name)).config.hold_out == (name != presets.DEMO)
    assert presets.NEW.model_copy(update={"hold_out": False}) == KohyaConfig()
    kohyas = json.loads(configuration.dumps(KohyaConfig()))
    assert not configuration.loads(kohyas).config.hold_out
    assert configuration.loads(json.loads(configuration.dumps(presets.NEW))).config == presets.NEW


def test_presets_have_titles(tmp_path: Path) -> None:
    assert presets.title("sd15_photo") == "SD 1.5 photo"
    assert presets.title("sdxl-anime_lora") == "SDXL anime LoRA"
    assert presets.title("demo") == "Demo"
    assert presets.names()[-1] == presets.DEMO
    with pytest.raises(ConfigError, match="no preset"):
        presets.path_of("../pyproject")
    assert presets.base_of(presets.path_of("demo")) == REPOSITORY
    assert presets.base_of(tmp_path / "x.json") == Path.cwd()
