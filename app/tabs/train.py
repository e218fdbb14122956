"""Train: Start and Stop, and the run as every open page sees it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import gradio as gr
import pandas as pd
from gradio.components import Component

from app.session import Session
from app.view import Part, Point, State, alert

__all__ = ["Panel", "buttons", "refused", "render", "tick"]

PARTS: tuple[Part, ...] = ("progress", "notices", "memory", "chart", "samples", "log")
RAW, AVERAGE = "#e2ad85", "#c2410c"
"""Colours of the two lines; assets/page.css knows them by these, to draw one thin and one bold."""


@dataclass(frozen=True)
class Panel:
    """The widgets of the tab."""

    start: gr.Button
    stop: gr.Button
    progress: gr.HTML
    notices: gr.HTML
    memory: gr.HTML
    chart: gr.LinePlot
    samples: gr.HTML
    log: gr.Textbox

    @property
    def outputs(self) -> list[Component]:
        """What `tick` returns values for, after the cursor: the buttons, then `PARTS`."""
        parts = [self.progress, self.notices, self.memory, self.chart, self.samples, self.log]
        return [self.start, self.stop, *parts]


def render() -> Panel:
    """Lay out the tab."""
    with gr.Row(elem_classes="kiln-run"):
        start = gr.Button("Start training", variant="primary", elem_id="start", min_width=160, scale=0)
        stop = gr.Button(
            "Stop and save", variant="stop", elem_id="stop", interactive=False, min_width=160, scale=0
        )
        progress = gr.HTML(elem_id="progress", padding=False, min_width=280)
    notices = gr.HTML(elem_id="notices", padding=False)
    memory = gr.HTML(elem_id="memory", padding=False)
    with gr.Row():
        with gr.Column(scale=3, min_width=320):
            chart = gr.LinePlot(
                x="step",
                y="loss",
                color="series",
                color_map={"each step": RAW, "average": AVERAGE},
                x_title="Step",
                y_title="Loss",
                colors_in_legend=[],  # gradio cuts the legend off; the label says the same
                label="Loss: each step (thin) and average (bold)",
                height=280,
                buttons=[],
                elem_id="loss",
            )
            log = gr.Textbox(
                label="Log",
                lines=14,
                max_lines=14,
                interactive=False,
                autoscroll=False,
                buttons=["copy"],
                elem_id="log",
            )
        with gr.Column(scale=2, min_width=300):
            samples = gr.HTML(elem_id="samples", padding=False)
    return Panel(start, stop, progress, notices, memory, chart, samples, log)


def _frame(points: list[Point]) -> pd.DataFrame | None:
    """Both lines in the long form that the chart takes; None, which it shows as empty, without points."""
    if not points:
        return None
    steps = [float(point.step) for point in points]
    losses = [point.loss for point in points] + [point.avr_loss for point in points]
    series = ["each step"] * len(points) + ["average"] * len(points)
    return pd.DataFrame({"step": steps * 2, "loss": losses, "series": series})


def buttons(state: State) -> tuple[gr.Button, gr.Button]:
    """Start and Stop, as they stand in a state of the run."""
    start = gr.Button("Start training" if state == "idle" else "Training …", interactive=state == "idle")
    words = "Stopping …" if state == "stopping" else "Stop and save"
    return start, gr.Button(words, interactive=state == "running")


def refused(message: str) -> str:
    """What stands in the place of the notices when a run did not start."""
    return alert("failed", message)


def tick(session: Session, seen: str | None) -> list[Any]:
    """What is new for a page.

    Args:
        session: The server's state.
        seen: The cursor that the page got last: server and run, state, and the revision of each part.

    Returns:
        The new cursor, then a value for each of `Panel.outputs`; those that have not changed are skipped.
    """
    state = session.doing  # asked before the events are read: the last ones then belong to what it says
    view, run = session.view, f"{session.key}-{session.runs}"
    view.update()
    revisions = [view.revisions[part] for part in PARTS]
    cursor = " ".join([run, state, *map(str, revisions)])
    if seen == cursor:
        return [gr.skip()] * (3 + len(PARTS))
    before = (seen or "").split(" ")
    if len(before) != 2 + len(PARTS) or before[0] != run:
        before = [""] * (2 + len(PARTS))
    has_turned = before[1] != state
    values: list[Any] = [cursor, *(buttons(state) if has_turned else (gr.skip(), gr.skip()))]
    for part, old, new in zip(PARTS, before[2:], revisions, strict=True):
        is_old = old == str(new) and not (has_turned and part == "progress")
        values.append(gr.skip() if is_old else _drawn(session, part, state))
    return values


def _drawn(session: Session, part: Part, state: State) -> Any:
    view = session.view
    match part:
        case "progress":
            return view.progress_html(state)
        case "notices":
            return view.notices_html()
        case "memory":
            return view.memory_html()
        case "chart":
            return _frame(view.chart())
        case "samples":
            return view.samples_html()
        case "log":
            return "\n".join(view.lines)
