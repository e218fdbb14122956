"""Review: the runs that are over, and the way back into each."""

from __future__ import annotations

import html
import time

import gradio as gr

from app.runs import Run
from app.session import Session
from app.view import act_button, duration, row

__all__ = ["past_html", "render"]

STATUS = {"finished": "Finished", "stopped": "Stopped", "failed": "Failed", "interrupted": "Interrupted"}


def render() -> gr.HTML:
    """Lay out the tab."""
    gr.HTML(
        '<h3>Runs</h3><p class="kiln-empty">Samples, charts and log of a run that you show are on Train.</p>',
        padding=False,
    )
    return gr.HTML(elem_id="runs", padding=False)


def past_html(session: Session) -> str:
    """The runs that are over, newest first."""
    past = session.queue.past()
    if not past:
        return '<p class="kiln-empty">No run has ended yet.</p>'
    return f'<ul class="kiln-runs">{"".join(_item(run) for run in past)}</ul>'


def _item(run: Run) -> str:
    when = time.strftime("%Y-%m-%d %H:%M", time.localtime(run.started or run.created))
    facts = [when]
    if run.steps:
        facts.append(f"step {run.step} of {run.steps}")
    if run.started and run.ended and run.status != "interrupted":
        facts.append(duration(run.ended - run.started))
    if run.owner:
        facts.append(run.owner)
    words = f"<b>{html.escape(run.name)}</b> <em>{STATUS.get(run.status, run.status)}</em>"
    message = f"<p>{html.escape(run.message)}</p>" if run.message else ""
    actions = act_button("Show", {"do": "show", "run": run.id})
    if run.kind == "training":
        actions += act_button("Open", {"do": "open", "run": run.id})
    if run.status in ("stopped", "interrupted", "failed"):
        actions += act_button("Resume", {"do": "resume", "run": run.id}, "primary")
    ask = f"Take {run.name} off the list? Its files stay."
    actions += act_button("Remove", {"do": "remove", "run": run.id, "ask": ask})
    return (
        f'<li class="{run.status}"><div>{words}<span>{html.escape(" · ".join(facts))}</span>{message}</div>'
        f"{row(actions)}</li>"
    )
