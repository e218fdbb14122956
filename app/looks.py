"""Theme and style sheet."""

from __future__ import annotations

import json

import gradio as gr

from trainer.files import REPOSITORY
from trainer.review import charts

__all__ = ["CSS", "ICON", "LANGUAGES", "SCRIPT", "theme", "words"]

CSS = "\n".join(
    [
        *((REPOSITORY / "assets" / name).read_text(encoding="utf-8") for name in ("page.css", "review.css")),
        charts.STYLE,
    ]
)
SCRIPT = "\n".join(
    (REPOSITORY / "assets" / name).read_text(encoding="utf-8") for name in ("page.js", "review.js")
)
ICON = REPOSITORY / "assets" / "icon.svg"
LANGUAGES = {"en": "English", "es": "Español", "vi": "Tiếng Việt"}
"""Languages of the page by code. English stands in the code; assets/languages has a file for each other."""


def words(code: str) -> dict[str, str]:
    """English texts of the page and what they are in another language; numbers stand as ``{}``."""
    if code not in LANGUAGES or code == "en":
        return {}
    file = REPOSITORY / "assets" / "languages" / f"{code}.json"
    found: dict[str, str] = json.loads(file.read_text(encoding="utf-8"))
    return found


def theme() -> gr.themes.Base:
    """A calm, warm theme; fonts are the system's own, so that no page fetches any."""
    return gr.themes.Base(
        primary_hue=gr.themes.colors.orange,
        neutral_hue=gr.themes.colors.stone,
        radius_size=gr.themes.sizes.radius_md,
        spacing_size=gr.themes.sizes.spacing_md,
        font=["system-ui", "Segoe UI", "Roboto", "sans-serif"],
        font_mono=["ui-monospace", "Consolas", "monospace"],
    )
