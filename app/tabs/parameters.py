"""Parameters: every field, where Kohya has it."""

from __future__ import annotations

import gradio as gr

from app.fields import Form

__all__ = ["render"]

TABS = (
    ("Model", ("Model", "Folders")),
    ("Basic", ("Basic",)),
    ("Advanced", ("Advanced",)),
    ("Samples", ("Samples",)),
    ("More", ("Metadata", "Accelerate launch", "HuggingFace")),
)


def render(form: Form) -> None:
    """Sub-tabs with their sections; the main part of a tab is open, the others fold."""
    with gr.Tabs():
        for label, places in TABS:
            with gr.Tab(label):
                for place in places:
                    for section, names in form.sections(place).items():
                        if len(places) > 1 or section:
                            with gr.Accordion(section or place, open=not section and len(places) < 3):
                                form.render(names)
                        else:
                            form.render(names)
