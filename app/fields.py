"""From config fields to widgets and back. What a field is stands in `trainer.config` alone."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import gradio as gr
from gradio.components import Component

from trainer import config as configuration
from trainer.config import KohyaConfig, Loaded, Ui, help_of, ui_of

__all__ = ["Form", "trained_here"]

FAMILIES = {"sd15", "sd2"}
LORA_TYPES = {"Standard", "Kohya LoCon"}
"""What this version trains: fields of other families and types ride along unseen and are written back."""


def trained_here(name: str) -> bool:
    """Whether a field belongs to a family and LoRA type that this version trains, and Kohya shows it."""
    ui = ui_of(name)
    family = not ui.families or FAMILIES & set(ui.families)
    kind = not ui.lora_types or LORA_TYPES & set(ui.lora_types)
    return bool(family and kind) and not ui.hidden and not ui.secret


class Form:
    """The widgets of all shown fields, made once, and the values they stand for."""

    def __init__(self) -> None:
        self.widgets: dict[str, Component] = {}

    def sections(self, tab: str) -> dict[str, list[str]]:
        """Names of the shown fields of a tab, by section, in Kohya's order."""
        found: dict[str, list[str]] = {}
        for name in KohyaConfig.model_fields:
            ui = ui_of(name)
            if ui.tab == tab and trained_here(name):
                found.setdefault(ui.section, []).append(name)
        return found

    def render(self, names: Iterable[str]) -> None:
        """Put the widgets of some fields onto the page, here."""
        texts: list[str] = []
        with gr.Row(elem_classes="kiln-fields"):
            for name in names:
                if ui_of(name).lines > 1:
                    texts.append(name)
                else:
                    self.widgets[name] = widget(name)
        for name in texts:
            self.widgets[name] = widget(name)

    def show(self, config: KohyaConfig) -> list[Any]:
        """Values for all widgets, in their order."""
        return [_shown(getattr(config, name)) for name in self.widgets]

    def read(self, values: Mapping[Component, Any], rest: Any) -> Loaded:
        """What the page holds, as a configuration; nothing that a browser sends is trusted.

        Args:
            values: By widget, as gradio hands them over for a set of inputs.
            rest: The loaded configuration: fields without a widget and unknown keys come from it.

        Raises:
            ConfigError: ``rest`` is too large, or holds what JSON cannot.
        """
        # An emptied number box sends None; as in a file, an empty text is what it reads as.
        given = {name: "" if values[item] is None else values[item] for name, item in self.widgets.items()}
        return configuration.loads({**(rest if isinstance(rest, Mapping) else {}), **given})


def widget(name: str) -> Component:
    """The widget for one field."""
    ui = ui_of(name)
    default = _shown(KohyaConfig.model_fields[name].default)
    common: dict[str, Any] = {"label": ui.label, "info": explain(name, ui), "elem_id": f"field-{name}"}
    if ui.widget == "checkbox":
        return gr.Checkbox(value=default, **common)
    if ui.widget in ("slider", "number"):
        # No bounds: gradio refuses every event of the page while one value lies outside its bounds.
        return gr.Number(value=default, step=ui.step or 1, min_width=200, **common)
    if ui.widget == "dropdown" and ui.choices:
        choices = list(ui.choices)
        return gr.Dropdown(choices, value=default, allow_custom_value=True, min_width=200, **common)
    lines = max(ui.lines, 1)
    return gr.Textbox(value=default, lines=lines, max_lines=max(lines, 8), min_width=280, **common)


def explain(name: str, ui: Ui) -> str:
    """Help text, with what is different here."""
    text = " ".join(help_of(name).split())
    if ui.effect == "none":
        return f"No effect here: {ui.reason} {text}"
    if ui.effect == "adapted":
        return f"{text} Here: {ui.reason}"
    return text


def _shown(value: Any) -> Any:
    return "" if value is None else value
