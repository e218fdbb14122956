"""Theme and style sheet."""

from __future__ import annotations

import json

import gradio as gr

from app.fields import explain
from trainer.config import KohyaConfig, ui_of
from trainer.files import REPOSITORY
from trainer.review import charts

__all__ = ["CSS", "ICON", "LANGUAGES", "SCRIPT", "helps", "theme", "words"]

CSS = "\n".join(
    [
        *(
            (REPOSITORY / "assets" / name).read_text(encoding="utf-8")
            for name in ("page.css", "review.css", "captioning.css", "dataset.css")
        ),
        charts.STYLE,
    ]
)
SCRIPT = "\n".join(
    (REPOSITORY / "assets" / name).read_text(encoding="utf-8")
    for name in ("page.js", "review.js", "captioning.js", "dataset.js")
)
ICON = REPOSITORY / "assets" / "icon.svg"
LANGUAGES = {"en": "English", "es": "Español", "vi": "Tiếng Việt"}
"""Languages of the page by code. English stands in the code; assets/languages has a file for each other."""


def words(code: str) -> dict[str, str]:
    """English texts of the page and what they are in another language.

    Numbers stand as ``{}``, names and whatever else is not translated as ``{*}``.
    """
    return {} if code not in LANGUAGES or code == "en" else _file(f"{code}.json")


def helps(code: str) -> dict[str, str]:
    """The help texts of all settings, as the page shows them, and what they are in another language.

    Labels and sections keep Kohya's words in every language: that is how guides name them.
    """
    if code not in LANGUAGES or code == "en":
        return {}
    parts = _file(f"help.{code}.json")
    names = [name for name in KohyaConfig.model_fields if not ui_of(name).hidden]
    return {
        explain(name, ui_of(name)): explain(name, ui_of(name), lambda text: parts.get(text, text))
        for name in names
    }


def _file(name: str) -> dict[str, str]:
    file = REPOSITORY / "assets" / "languages" / name
    found: dict[str, str] = json.loads(file.read_text(encoding="utf-8"))
    return found


def theme() -> gr.themes.Base:
    """A calm, warm theme; fonts are the system's own, so that no page fetches any.

    Words have a contrast of 4.5 or more to what they stand on, in light and in dark.
    """
    base = gr.themes.Base(
        primary_hue=gr.themes.colors.orange,
        neutral_hue=gr.themes.colors.stone,
        radius_size=gr.themes.sizes.radius_md,
        spacing_size=gr.themes.sizes.spacing_md,
        font=["system-ui", "Segoe UI", "Roboto", "sans-serif"],
        font_mono=["ui-monospace", "Consolas", "monospace"],
    )
    return base.set(
        body_background_fill="*neutral_50",
        body_text_color_subdued="*neutral_600",
        body_text_color_subdued_dark="*neutral_400",
        block_info_text_color="*neutral_600",
        block_info_text_color_dark="*neutral_400",
        block_title_text_color="*neutral_800",
        block_title_text_color_dark="*neutral_200",
        input_placeholder_color="*neutral_500",
        input_placeholder_color_dark="*neutral_400",
        input_background_fill="*neutral_50",
        input_border_color="*neutral_300",
        input_border_color_dark="*neutral_600",
        input_border_width="1px",
        checkbox_border_color="*neutral_500",
        checkbox_border_color_dark="*neutral_500",
        button_primary_background_fill="*primary_700",
        button_primary_background_fill_hover="*primary_800",
        button_primary_background_fill_dark="*primary_700",
        button_primary_background_fill_hover_dark="*primary_600",
        button_primary_border_color="*primary_700",
        button_primary_border_color_dark="*primary_700",
        button_secondary_background_fill="white",
        button_secondary_background_fill_hover="*neutral_100",
        button_secondary_border_color="*neutral_300",
        button_secondary_border_color_dark="*neutral_700",
        button_border_width="1px",
    )
