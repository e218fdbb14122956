"""Train: Start and Stop, and the run as every open page sees it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import gradio as gr
import pandas as pd
from gradio.components import Component

from app.session import Session

__all__ = ["Panel", "render", "tick"]


@dataclass(frozen=True)
class Panel:
    """The widgets of the tab."""

    start: gr.Button
    stop: gr.Button
    progress: gr.HTML
    memory: gr.HTML
    chart: gr.LinePlot
    samples: gr.HTML
    log: gr.Textbox

    @property
    def outputs(self) -> list[Component]:
        """What `tick` returns values for, after the cursor."""
        return [self.start, self.stop, self.progress, self.memory, self.chart, self.samples, self.log]


def render() -> Panel:
    """Lay out the tab."""
    with gr.Row(equal_height=True):
        start = gr.Button("Start training", variant="primary", elem_id="start", min_width=160, scale=1)
        stop = gr.Button(
            "Stop and save", variant="stop", elem_id="stop", interactive=False, min_width=160, scale=1
        )
    progress = gr.HTML('<p class="kiln-empty">Nothing is being trained.</p>', elem_id="progress")
    memory = gr.HTML(elem_id="memory")
    with gr.Row():
        with gr.Column(scale=3, min_width=320):
            chart = gr.LinePlot(
                _frame([]),
                x="step",
                y="loss",
                color="series",
                color_map={"loss": "#d8b08c", "average": "#c2410c"},
                title="Loss",
                height=280,
                elem_id="loss",
            )
            log = gr.Textbox(
                label="Log",
                lines=16,
                max_lines=16,
                interactive=False,
                autoscroll=True,
                buttons=["copy"],
                elem_id="log",
            )
        with gr.Column(scale=2, min_width=280):
            samples = gr.HTML(elem_id="samples")
    return Panel(start, stop, progress, memory, chart, samples, log)


def _frame(points: list[Any]) -> pd.DataFrame:
    rows = [(point.step, point.loss, "loss") for point in points]
    rows += [(point.step, point.avr_loss, "average") for point in points]
    return pd.DataFrame(rows, columns=["step", "loss", "series"])


def tick(session: Session, seen: float | None) -> list[Any]:
    """What is new for a page that has seen version ``seen`` of the run.

    Returns:
        The new cursor, then a value for each of `Panel.outputs`.
    """
    view = session.view
    view.update()
    running = session.runner.running
    # The run's identity is part of the cursor: a new run starts at version 0 again.
    cursor = float(id(view) % 1_000_003) * 1e7 + view.version * 2 + (0 if running else 1)
    if seen == cursor:
        return [gr.skip()] * 8
    if view.version == 0 and not running:
        return [cursor, *[gr.skip()] * 7]
    return [
        cursor,
        gr.Button(interactive=not running),
        gr.Button(interactive=running and not session.runner.controls.stop.is_set()),
        view.progress_html(),
        view.memory_html(),
        _frame(view.chart()),
        view.samples_html(),
        "\n".join(view.lines),
    ]
