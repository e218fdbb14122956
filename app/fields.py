"""From config fields to widgets and back. What a field is stands in `trainer.config` alone."""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable, Sequence
from typing import Any

import gradio as gr
from gradio.components import Component

from trainer import config as configuration
from trainer.config import KohyaConfig, Loaded, Ui, help_of, ui_of
from trainer.config.load import FAMILY_SWITCHES
from trainer.errors import ConfigError

__all__ = ["ESSENTIAL", "Form", "read", "section_id"]

ESSENTIAL = (
    "pretrained_model_name_or_path",
    "train_data_dir",
    "output_dir",
    "output_name",
    "network_weights",
    "epoch",
    "sample_prompts",
)
"""What a person must look at before a first LoRA; the beginner's view shows these alone."""

SWITCHES = ("v2", *FAMILY_SWITCHES)
"""Family switches, which exclude each other; none of them is SD 1.x."""

HEADINGS = {
    "NetworkTypeFields": "LoRA",
    "TrainingFields": "Training",
    "RateFields": "Learning rates",
    "NetworkFields": "Network",
    "AdvancedFields": "General",
    "SavingFields": "Saving in between",
    "ComputeFields": "Captions, precision and memory",
    "LossFields": "Loss, buckets and augmentation",
    "NoiseFields": "Noise and dropout",
    "StateFields": "State and logging",
}
"""Titles of the stretches of a tab's main part, by the class that declares their fields."""

LARGEST_DRAFT = 4_000_000
"""Characters of a page's configuration; Kohya's has 10,000."""


def section_id(tab: str, section: str) -> str:
    """Id of the element that holds a section of a tab."""
    return "section-" + "".join(letter if letter.isalnum() else "-" for letter in f"{tab}-{section}".lower())


class Form:
    """The widgets of all fields, made once, and the values they stand for."""

    def __init__(self) -> None:
        self.widgets: dict[str, Component] = {}
        self.places: dict[str, tuple[str, str]] = {}
        """Sub-tab and section of each field that is on the page."""
        self.groups: dict[str, list[str]] = {}
        """Names of the fields in each part of the page that disappears with them, by the part's id."""

    def sections(self, tab: str) -> dict[str, dict[str, list[str]]]:
        """Names of a tab's fields by section and heading, in Kohya's order."""
        found: dict[str, dict[str, list[str]]] = {}
        for name in KohyaConfig.model_fields:
            ui = ui_of(name)
            if ui.tab == tab and not ui.hidden:
                heading = "" if ui.section else HEADINGS.get(_declared_in(name), "")
                found.setdefault(ui.section, {}).setdefault(heading, []).append(name)
        return found

    def render(self, names: Sequence[str], sub_tab: str) -> None:
        """Put the widgets of some fields onto the page, here."""
        texts: list[str] = []
        row = f"row-{len(self.groups)}"
        self.groups[row] = [name for name in names if ui_of(name).lines == 1]
        with gr.Row(elem_classes="kiln-fields", elem_id=row):
            for name in names:
                self.places[name] = (sub_tab, ui_of(name).section)
                if ui_of(name).lines > 1:
                    texts.append(name)
                else:
                    self._add(name)
        for name in texts:
            self._add(name)

    def _add(self, name: str) -> None:
        if ui_of(name).secret:
            locked(name)
        else:
            self.widgets[name] = widget(name)

    def show(self, config: KohyaConfig) -> list[Any]:
        """Values for all widgets, in their order."""
        return [_shown(getattr(config, name)) for name in self.widgets]

    def facts(self) -> dict[str, Any]:
        """What the page's script knows of each field, and of the rules that show and hide them."""
        fields = {}
        for name, (tab, section) in self.places.items():
            ui = ui_of(name)
            fact: dict[str, Any] = {"tab": tab}
            if section:
                parts = section.split(" > ")
                fact["section"] = section
                fact["sections"] = [section_id(ui.tab, " > ".join(parts[: n + 1])) for n in range(len(parts))]
            if ui.families:
                fact["families"] = ui.families
            if ui.lora_types:
                fact["types"] = ui.lora_types
            if ui.shown_with:
                fact["with"] = ui.shown_with
            if ui.path:
                fact["path"] = ui.path
            for key in ("min", "max"):
                if (bound := getattr(ui, key)) is not None:
                    fact[key] = bound
            fields[name] = fact
        return {
            "fields": fields,
            "order": list(self.widgets),
            "essential": ESSENTIAL,
            "switches": SWITCHES,
            "families": dict(FAMILY_SWITCHES),
            "groups": self.groups,
        }


def read(text: Any) -> tuple[Loaded, str]:
    """What a page holds, as a configuration; nothing that a browser sends is trusted.

    Args:
        text: JSON of the page's script: ``values`` by field (unknown keys too), and ``base``.

    Returns:
        The configuration, and the name of the folder that its relative paths start from.

    Raises:
        ConfigError: It is too large, or no such JSON.
    """
    if not isinstance(text, str) or len(text) > LARGEST_DRAFT:
        raise ConfigError("the page sent no configuration: reload it")
    try:
        draft = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ConfigError("the page sent no configuration: reload it") from error
    if not isinstance(draft, dict) or not isinstance(draft.get("values"), dict):
        raise ConfigError("the page sent no configuration: reload it")
    base = draft.get("base")
    return configuration.loads(draft["values"]), base if isinstance(base, str) else ""


def widget(name: str) -> Component:
    """The widget for one field."""
    ui = ui_of(name)
    default = _shown(KohyaConfig.model_fields[name].default)
    marks = [f"kiln-{ui.effect}"] if ui.effect != "honoured" else []
    common: dict[str, Any] = {
        "label": ui.label,
        "info": explain(name, ui),
        "elem_id": f"field-{name}",
        "elem_classes": marks,
    }
    if ui.widget == "checkbox":
        return gr.Checkbox(value=default, **common)
    if ui.widget in ("slider", "number"):
        # A slider would cut what a file holds to its ends; the page's script marks what lies outside.
        return gr.Number(value=default, step=ui.step or 1, min_width=200, **common)
    if ui.widget == "dropdown" and ui.choices:
        choices = list(ui.choices)
        return gr.Dropdown(choices, value=default, allow_custom_value=True, min_width=200, **common)
    lines = max(ui.lines, 1)
    return gr.Textbox(value=default, lines=lines, max_lines=max(lines, 8), min_width=280, **common)


def locked(name: str) -> Component:
    """In the place of a secret: its label and why it is not taken."""
    ui = ui_of(name)
    return gr.Textbox(
        value="",
        label=ui.label,
        info=explain(name, ui),
        interactive=False,
        placeholder="not taken here",
        elem_id=f"field-{name}",
        elem_classes=["kiln-none"],
    )


def explain(name: str, ui: Ui, say: Callable[[str], str] = str) -> str:
    """Help text, with what is different here, and the bounds; ``say`` translates its parts."""
    text = say(" ".join(help_of(name).split()))
    if ui.effect == "none":
        text = f"{say('No effect here:')} {say(ui.reason)} {text}"
    elif ui.effect == "adapted":
        text = f"{text} {say('Here:')} {say(ui.reason)}"
    if ui.min is not None and ui.max is not None:
        text = f"{text} ({ui.min:g} {say('to')} {ui.max:g})"
    return text


def _declared_in(name: str) -> str:
    return next(base.__name__ for base in KohyaConfig.__mro__ if name in inspect.get_annotations(base))


def _shown(value: Any) -> Any:
    return "" if value is None else value
