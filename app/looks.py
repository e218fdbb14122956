"""Theme and style sheet."""

from __future__ import annotations

import gradio as gr

from trainer.files import REPOSITORY

__all__ = ["CSS", "ICON", "SCRIPT", "theme"]

CSS = (REPOSITORY / "assets" / "page.css").read_text(encoding="utf-8")
SCRIPT = (REPOSITORY / "assets" / "page.js").read_text(encoding="utf-8")
ICON = REPOSITORY / "assets" / "icon.svg"


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
