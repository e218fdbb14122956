"""Train: Start and Stop, the queue, and the run as every open page sees it."""

from __future__ import annotations

import html
from dataclasses import dataclass
from typing import Any, cast

import gradio as gr
from gradio.components import Component

from app.session import Session
from app.tabs.review import past_html
from app.view import Part, Point, State, act_button, alert, row
from trainer.review.charts import chart as line_chart

__all__ = ["PARTS", "Panel", "buttons", "cursor", "refused", "render", "tick"]

PARTS: tuple[Part, ...] = (
    "progress",
    "notices",
    "memory",
    "chart",
    "rates",
    "samples",
    "log",
    "command",
    "queue",
    "past",
)
OF_THE_LIST: frozenset[Part] = frozenset({"queue", "past"})
"""Parts that change with the list of runs and not with the run that is shown."""
FIND = """<div class="kiln-find"><input type="search" id="kiln-log-search" aria-label="Search the log"
 placeholder="Search the log, Enter for the next"><span id="kiln-log-count" role="status"></span>
<button type="button" class="kiln-small" data-copy="log">Copy</button></div>"""


@dataclass(frozen=True)
class Panel:
    """The widgets of the tab."""

    start: gr.Button
    stop: gr.Button
    sample: gr.Button
    save: gr.Button
    progress: gr.HTML
    notices: gr.HTML
    checks: gr.HTML
    memory: gr.HTML
    chart: gr.HTML
    rates: gr.HTML
    samples: gr.HTML
    log: gr.Textbox
    command: gr.HTML
    queue: gr.HTML

    @property
    def outputs(self) -> list[Component]:
        """What `tick` returns values for, after the cursor: the buttons, then `PARTS` but the last."""
        parts = [self.progress, self.notices, self.memory, self.chart, self.rates, self.samples, self.log]
        return [self.start, self.stop, self.sample, self.save, *parts, self.command, self.queue]


BUTTONS = 4


def render() -> Panel:
    """Lay out the tab."""
    with gr.Row(elem_classes="kiln-run"):
        start = gr.Button("Start training", variant="primary", elem_id="start", min_width=150, scale=0)
        off: dict[str, Any] = {"interactive": False, "scale": 0, "min_width": 120}
        stop = gr.Button("Stop and save", variant="stop", elem_id="stop", **off)
        sample = gr.Button("Sample now", elem_id="sample-now", **off)
        save = gr.Button("Save now", elem_id="save-now", **off)
        progress = gr.HTML(elem_id="progress", padding=False, min_width=280)
    gr.HTML('<p id="kiln-answer" role="status"></p>', padding=False)
    notices = gr.HTML(elem_id="notices", padding=False)
    checks = gr.HTML(CHECKING, elem_id="checks", padding=False)
    queue = gr.HTML(elem_id="queue", padding=False)
    memory = gr.HTML(elem_id="memory", padding=False)
    with gr.Row(elem_id="run-view"):
        with gr.Column(scale=3, min_width=320):
            chart = gr.HTML(elem_id="loss", padding=False)
            with gr.Accordion("Learning rates", open=False):
                rates = gr.HTML(elem_id="rates", padding=False)
            gr.HTML(FIND, padding=False)
            log = gr.Textbox(
                label="Log",
                lines=14,
                max_lines=14,
                interactive=False,
                autoscroll=False,
                buttons=[],
                elem_id="log",
            )
            with gr.Accordion("The same from the command line", open=False):
                command = gr.HTML(elem_id="command", padding=False)
        with gr.Column(scale=2, min_width=300):
            samples = gr.HTML(elem_id="samples", padding=False)
    return Panel(
        start,
        stop,
        sample,
        save,
        progress,
        notices,
        checks,
        memory,
        chart,
        rates,
        samples,
        log,
        command,
        queue,
    )


CHECKING = '<div class="kiln-alert"><p>Checking the settings …</p></div>'


def _losses(points: list[Point]) -> str:
    each = [(point.step, point.loss) for point in points]
    average = [(point.step, point.avr_loss) for point in points]
    drawn = line_chart({"each step": each, "average": average}, raw="each step")
    return drawn and f"<h4>Loss</h4>{drawn}"


def _rates(points: list[Point]) -> str:
    lines: dict[str, list[tuple[int, float]]] = {}
    for point in points:
        for name, rate in point.lr.items():
            lines.setdefault(name, []).append((point.step, rate))
    return line_chart(lines)


def buttons(state: State) -> list[gr.Button]:
    """Start, Stop, Sample and Save, as they stand in a state of the run."""
    idle, running = state == "idle", state == "running"
    words = "Stopping …" if state == "stopping" else "Stop and save"
    return [
        gr.Button("Start training" if idle else "Add to the queue", interactive=True),
        gr.Button(words, interactive=running),
        gr.Button(interactive=running),
        gr.Button(interactive=running),
    ]


def refused(message: str) -> str:
    """What stands in the place of the notices when a run did not start."""
    return alert("failed", message)


def tick(session: Session, seen: str | None) -> list[Any]:
    """What is new for a page.

    Args:
        session: The server's state.
        seen: The cursor that the page got last: server and run, state, and the revision of each part.

    Returns:
        The new cursor, then a value for each of `Panel.outputs` and for the runs of Review; those that
        have not changed are skipped.
    """
    now = cursor(session)
    if seen == now:
        return [gr.skip()] * (1 + BUTTONS + len(PARTS))
    run, doing, *revisions = now.split(" ")
    state = cast("State", doing)
    before = (seen or "").split(" ")
    if len(before) != 2 + len(PARTS) or before[0] != run:
        before = [""] * (2 + len(PARTS))
    has_turned = before[1] != state
    values: list[Any] = [now, *(buttons(state) if has_turned else [gr.skip()] * BUTTONS)]
    for part, old, new in zip(PARTS, before[2:], revisions, strict=True):
        is_old = old == new and not (has_turned and part == "progress")
        values.append(gr.skip() if is_old else _drawn(session, part, state))
    return values


def cursor(session: Session) -> str:
    """What there is to see: server and run, state, and the revision of each part."""
    state = session.doing  # asked before the events are read: the last ones then belong to what it says
    view, run = session.view, f"{session.key}-{session.runs}"
    view.update()
    of_list = session.queue.revision
    revisions = [of_list if part in OF_THE_LIST else view.revisions[part] for part in PARTS]
    return " ".join([run, state, *map(str, revisions)])


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
            return _losses(view.chart())
        case "rates":
            return _rates(view.chart())
        case "samples":
            return view.samples_html()
        case "log":
            return "\n".join(view.lines)
        case "command":
            return view.command_html()
        case "queue":
            return queue_html(session)
        case "past":
            return past_html(session)


def queue_html(session: Session) -> str:
    """The runs that wait, in order, and what can be done with each."""
    waiting = session.queue.waiting()
    if not waiting:
        return ""
    items = []
    for index, run in enumerate(waiting):
        actions = act_button("Open", {"do": "open", "run": run.id}) if run.kind == "training" else ""
        if index:
            actions += act_button("Up", {"do": "move", "run": run.id, "by": -1})
        if index < len(waiting) - 1:
            actions += act_button("Down", {"do": "move", "run": run.id, "by": 1})
        ask = f"Take {run.name} out of the queue?"
        actions += act_button("Remove", {"do": "remove", "run": run.id, "ask": ask})
        owner = f" <small>{html.escape(run.owner)}</small>" if run.owner else ""
        items.append(f"<li><span><b>{html.escape(run.name)}</b>{owner}</span>{row(actions)}</li>")
    count = "1 run waits" if len(waiting) == 1 else f"{len(waiting)} runs wait"
    go_on = ""
    if session.held:
        count += " since the program was started again"
        go_on = row(act_button("Start the queue", {"do": "go on"}, "primary"))
    return f'<section class="kiln-queue"><h4>{count}</h4>{go_on}<ol>{"".join(items)}</ol></section>'
