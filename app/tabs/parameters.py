"""Parameters: every field, where Kohya has it."""

from __future__ import annotations

import html

import gradio as gr

from app.fields import Form, section_id

__all__ = ["SIMPLE", "TABS", "render"]

TABS = (
    ("Model", ("Model", "Folders")),
    ("Basic", ("Basic",)),
    ("Advanced", ("Advanced",)),
    ("Samples", ("Samples",)),
    ("More", ("Metadata", "Accelerate launch", "HuggingFace")),
)
SIMPLE = ("Model", "Basic", "Samples")
"""Parts with fields of the beginner's view, which shows them together."""

TOOLS = """<section id="kiln-welcome"><p><b>Your first LoRA</b></p><ul>
<li>The demo has everything with it: press "Try the demo" above, then "Start training".</li>
<li>
<span>With your own pictures: bring them in, describe them, choose a preset above and a model below, and start:</span>
<button type="button" class="kiln-link" data-tab="Dataset">Dataset</button> →
<button type="button" class="kiln-link" data-tab="Captioning">Captioning</button> →
<button type="button" class="kiln-link" data-tab="Parameters">Parameters</button> →
<button type="button" class="kiln-link" data-tab="Train">Train</button></li></ul></section>
<div class="kiln-find" role="search">
<input type="search" id="kiln-search" placeholder="Find a setting by name, label or help" autocomplete="off"
 aria-label="Find a setting" aria-controls="kiln-found">
<label class="kiln-switch"><input type="checkbox" id="kiln-all"> <span>All settings</span></label>
</div><div id="kiln-found" hidden></div><details id="kiln-changes" hidden></details>"""


def render(form: Form) -> list[gr.Column]:
    """Search, then the parts with their sections; the main section of a part is open, the others fold.

    The parts are columns and no gradio tabs, since the beginner's view shows several at once; gradio
    mounts those that are visible alone. The page's script turns them.

    Returns:
        The parts, in the order of `TABS`.
    """
    gr.HTML(TOOLS, padding=False, elem_id="find")
    buttons = "".join(
        f'<button type="button" role="tab" id="part-{label}" data-part="{label}" aria-controls="panel-{label}" '
        f'aria-selected="{"true" if label == "Model" else "false"}">{label}</button>'
        for label, _ in TABS
    )
    gr.HTML(f'<div role="tablist" aria-label="Parameters">{buttons}</div>', padding=False, elem_id="parts")
    columns = []
    for label, places in TABS:
        with gr.Column(visible=label == "Model", elem_id=f"panel-{label}") as column:
            for place in places:
                _place(form, place, label)
        columns.append(column)
    return columns


def _place(form: Form, place: str, label: str) -> None:
    sections = form.sections(place)
    main = sections.pop("", {})
    titled = label in ("Model", "More")
    for heading, names in main.items():
        part = section_id(place, heading or "main")
        form.groups[part] = names
        with gr.Column(elem_id=part, elem_classes="kiln-part"):
            title = heading or (place if titled else "")
            if title:
                gr.HTML(f"<h3>{html.escape(title)}</h3>", padding=False, elem_classes="kiln-heading")
            form.render(names, label)
    for section, headings in sections.items():
        names = [name for part in headings.values() for name in part]
        if " > " not in section:
            nested = {other: group for other, group in sections.items() if other.startswith(f"{section} > ")}
            inside = [name for group in nested.values() for part in group.values() for name in part]
            form.groups[section_id(place, section)] = names + inside
            with gr.Accordion(section, open=False, elem_id=section_id(place, section)):
                form.render(names, label)
                for other, group in nested.items():
                    some = [name for part in group.values() for name in part]
                    form.groups[section_id(place, other)] = some
                    title = other.rpartition(" > ")[2]
                    with gr.Accordion(title, open=False, elem_id=section_id(place, other)):
                        form.render(some, label)
