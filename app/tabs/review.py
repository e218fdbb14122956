"""Review: open a run, look at it, keep a file of it, or go on from one."""

from __future__ import annotations

import html
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gradio as gr

from app.fields import Form
from app.run_html import Seen, Thumbnails, kept_html, run_html
from app.runs import Run
from app.session import Session
from app.shell import answered, base_name, user_of
from app.view import act_button, duration, row, served
from trainer.config import KohyaConfig
from trainer.errors import ConfigError
from trainer.review import keep as keeping
from trainer.review.grid import Grid, grid_lists, pictures_folder
from trainer.review.judging import Judging, verdict_of
from trainer.review.report import write_report
from trainer.review.run_folder import Checkpoint, RunFolder, open_run

__all__ = ["Opened", "answer", "past_html", "render"]

STATUS = {
    "running": "Running",
    "finished": "Finished",
    "stopped": "Stopped",
    "failed": "Failed",
    "interrupted": "Interrupted",
}
CONNECT = "kiln.review.connect(server);"
OPEN = """<form id="review-open" class="kiln-row" onsubmit="return false">
<label class="kiln-field"><span>Open a results folder</span><input type="text" name="path" spellcheck="false"
 placeholder="A folder with LoRA files and samples, of this program or of Kohya's"></label>
<button type="button" class="kiln-small" data-browse-into="path">Browse</button>
<button type="button" class="kiln-small primary" data-review-open="">Open it</button></form>
<p id="review-answer" role="status"></p><div id="review-run"></div>"""


def render(session: Session, form: Form) -> gr.HTML:
    """Lay out the tab; returns the list of runs, which the ticks keep fresh."""

    def review(data: Any, request: gr.Request) -> dict[str, Any]:
        asked = data if isinstance(data, dict) else {}
        return answered(lambda: answer(session, form, asked, user_of(request)))

    gr.HTML("<h3>Runs</h3>", padding=False)
    past = gr.HTML(elem_id="runs", padding=False)
    gr.HTML(OPEN, js_on_load=CONNECT, server_functions=[review], elem_id="review", padding=False)
    return past


# ---- the list of runs -------------------------------------------------------------------------------------


def past_html(session: Session) -> str:
    """The run that goes on, and those that are over, newest first."""
    going = session.queue.running()
    runs = [*([going] if going is not None and going.kind == "training" else []), *session.queue.past()]
    if not runs:
        return '<p class="kiln-empty">No run has ended yet.</p>'
    return f'<ul class="kiln-runs">{"".join(_item(run) for run in runs)}</ul>'


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
    actions = ""
    if run.kind == "training":
        actions += (
            f'<button type="button" class="kiln-small primary" data-review-run="{run.id}">Look at it</button>'
        )
    if run.status != "running":
        actions += act_button("Show on Train", {"do": "show", "run": run.id})
        if run.kind == "training":
            actions += act_button("Open its settings", {"do": "open", "run": run.id})
        if run.status in ("stopped", "interrupted", "failed"):
            actions += act_button("Resume", {"do": "resume", "run": run.id})
        ask = f"Take {run.name} off the list? Its files stay."
        actions += act_button("Remove", {"do": "remove", "run": run.id, "ask": ask})
    return (
        f'<li class="{run.status}"><div>{words}<span>{html.escape(" · ".join(facts))}</span>{message}</div>'
        f"{row(actions)}</li>"
    )


# ---- one run ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Opened:
    """A run, and what the list of runs knows of it."""

    run: RunFolder
    listed: Run | None
    base: Path
    """Folder that relative paths of its settings start from."""

    @property
    def going(self) -> bool:
        """Whether it is not over."""
        return self.listed is not None and self.listed.status == "running"


def opened(session: Session, data: Mapping[str, Any]) -> Opened:
    """The run that a page names: by its number in the list, or by its folder.

    Raises:
        ConfigError: There is none, or it lies outside the roots.
    """
    listed: Run | None = None
    if isinstance(data.get("run"), int):
        listed = session.queue.get(data["run"])
        if listed is None or not listed.journal or listed.kind != "training":
            raise ConfigError("there is no such run any more: reload the page")
        where, name = session.paths.resolve(listed.journal), listed.name
    else:
        where, name = session.paths.resolve(str(data.get("path") or "")), str(data.get("name") or "")

    def may_read(path: Path) -> bool:
        try:
            session.paths.resolve(str(path))
        except ConfigError:
            return False
        return True

    run = open_run(where, name, may_read=may_read)
    session.paths.resolve(str(run.folder))
    if listed is None or run.journal is None or Path(listed.journal) != run.journal:
        listed = _listed(session, run)
    base = Path(listed.base) if listed is not None else Path.cwd()
    return Opened(run, listed, base)


def _listed(session: Session, run: RunFolder) -> Run | None:
    """The run's newest entry in the list."""
    going = session.queue.running()
    for each in [*([going] if going is not None else []), *session.queue.past(500)]:
        if each.kind == "training" and each.name == run.name and each.journal:
            journal = Path(each.journal)
            if journal == run.journal or journal.parent.parent.parent == run.folder:
                return each
    return None


def _signature(session: Session, folder: Path) -> str:
    """Changes whenever a folder has something new to show; cheap, as a page asks for it again and again."""
    going = session.queue.running()
    is_here = going is not None and going.journal and Path(going.journal).is_relative_to(folder)
    places = [folder, folder / "sample", pictures_folder(folder), folder / keeping.TRASH]
    places += sorted([*(folder / "logs").glob("*/measures.json"), *(folder / "logs").glob("*-measures.json")])
    marks: list[Any] = [going.id if going is not None and is_here else ""]
    for path in places:
        try:
            marks.append(path.stat().st_mtime_ns)
        except OSError:
            marks.append(0)
    return " ".join(map(str, marks))


def _shown(session: Session, found: Opened, user: str) -> dict[str, Any]:
    """What a page needs to draw the run."""
    run = found.run
    # Links may lead anywhere: what is given out is checked after they are followed.
    for place in (run.folder / "sample", pictures_folder(run.folder)):
        if place.is_dir():
            session.paths.resolve(str(place))
            session.serve(place)
    seen = Seen(
        going=found.going,
        may_write=session.may(user, found.listed) and _writable(session, run),
        grids=grid_lists(pictures_folder(run.folder), run.name),
        trashed=keeping.trashed(run.folder),
        model=run.config.pretrained_model_name_or_path if run.config else "",
        verdict=verdict_of(run),
    )
    content = run_html(run, seen, Thumbnails(session.thumbnails))
    return {
        "html": content,
        "path": str(run.folder),
        "name": run.name,
        "signature": _signature(session, run.folder),
        "going": found.going,
        "busy": _is_busy(session, run),
    }


def _is_busy(session: Session, run: RunFolder) -> bool:
    """Whether a grid or a verdict of the run is being made, or waits."""
    going = session.queue.running()
    works = [*([going] if going is not None else []), *session.queue.waiting()]
    return any(each.kind in ("grid", "verdict") and each.name.startswith(f"{run.name}: ") for each in works)


def _writable(session: Session, run: RunFolder) -> bool:
    try:
        session.paths.resolve(str(run.folder), write=True)
    except ConfigError:
        return False
    return True


# ---- what a person asks for ---------------------------------------------------------------------------------


def answer(session: Session, form: Form, data: Mapping[str, Any], user: str) -> dict[str, Any]:
    """Do what a button of the tab asks for.

    Args:
        session: The server's state.
        form: The settings' widgets, which some answers fill.
        data: ``do``, the run (``run``, or ``path`` and ``name``), and the values of the run's form.
        user: Who asks.

    Raises:
        TrainerError: It cannot be done.
    """
    what = data.get("do")
    if what == "look":
        folder = session.paths.resolve(str(data.get("path") or ""))
        if data.get("signature") == _signature(session, folder):
            return {}
    found = opened(session, data)
    run = found.run
    if what in ("open", "look"):
        return _shown(session, found, user)
    if what in ("grid", "try"):
        queued = _draw(session, found, data, user, is_try=what == "try")
        return {"message": f"{queued.name}: in the queue, and shown here once it is drawn", "now": True}
    if what == "judge":
        config = session.paths.expand(_drawing_config(run, data))
        judging = Judging(title=run.name, folder=run.folder, config=config, base=found.base)
        queued = session.enqueue("verdict", judging.as_json(), found.base, user)
        return {"message": f"{queued.name}: in the queue, and shown here once it is there", "now": True}
    if what in ("continue", "again", "resume", "settings"):
        return _settings(form, found, data)
    if not session.may(user, found.listed):
        raise ConfigError(
            "this run was started by somebody else: only they and the admin may change its files"
        )
    session.paths.resolve(str(run.folder), write=True)
    if what == "report":
        path = run.folder / f"{run.name}_report.html"
        size_bytes = write_report(run, path, verdict_of(run))
        session.serve(path)
        return {"message": f"{path} ({size_bytes / 2**20:.1f} MiB)", "fetch": served(path)}
    if what == "keep":
        return _keep(session, found, data, user)
    if what == "restore":
        back = keeping.restore(run.folder)
        message = f"{len(back)} files are back"
        return {"message": message, **_shown(session, opened(session, _named(run)), user)}
    raise ConfigError("the page asked for something that does not exist: reload it")


def _named(run: RunFolder) -> dict[str, Any]:
    return {"path": str(run.folder), "name": run.name}


def _chosen(run: RunFolder, data: Mapping[str, Any]) -> Checkpoint:
    return run.checkpoint(str(data.get("file") or ""))


def _keep(session: Session, found: Opened, data: Mapping[str, Any], user: str) -> dict[str, Any]:
    run, alone = found.run, bool(data.get("alone"))
    if alone and found.going:
        raise ConfigError("this run still goes on: its other files cannot be put away before it has ended")
    typed = str(data.get("copy_to") or "").strip()
    copy_to = session.paths.resolve(typed, write=True) if typed else None
    if copy_to is not None and not copy_to.is_dir():
        raise ConfigError(f"there is no folder {copy_to}: choose one that exists")
    kept = keeping.keep(
        run, _chosen(run, data), str(data.get("final_name") or ""), copy_to=copy_to, alone=alone
    )
    return {"said": kept_html(kept), **_shown(session, opened(session, _named(run)), user)}


def _drawing_config(run: RunFolder, data: Mapping[str, Any]) -> KohyaConfig:
    """The run's settings with the base model and the pictures that a person named."""
    config = keeping.settings_of(run)
    for typed, name in (("model", "pretrained_model_name_or_path"), ("pictures", "train_data_dir")):
        if value := str(data.get(typed) or "").strip():
            config = config.model_copy(update={name: value})
    if not config.pretrained_model_name_or_path.strip():
        raise ConfigError("no base model is known for this run: name it under Base model")
    return config


def _draw(session: Session, found: Opened, data: Mapping[str, Any], user: str, *, is_try: bool) -> Run:
    run = found.run
    config = session.paths.expand(_drawing_config(run, data))
    prompts = str(data.get("prompts") or "")
    if is_try:
        lines = [line for line in prompts.splitlines() if line.strip() and not line.startswith("#")]
        grid = Grid.of(run, config, found.base, [_chosen(run, data)], prompts="\n".join(lines[:1]))
    else:
        names = data.get("files")
        files = [run.checkpoint(str(name)) for name in (names if isinstance(names, list) else [])]
        grid = Grid.of(
            run,
            config,
            found.base,
            files,
            prompts=prompts,
            seeds=str(data.get("seeds") or ""),
            strengths=str(data.get("strengths") or ""),
            with_base=bool(data.get("with_base")),
        )
    return session.enqueue("grid", grid.as_json(), found.base, user)


@dataclass(frozen=True)
class _Wanted:
    """What a person says of a run, in the words of a verdict."""

    kind: str


def _settings(form: Form, found: Opened, data: Mapping[str, Any]) -> dict[str, Any]:
    """Settings that go onto the page."""
    run, what = found.run, data.get("do")
    wanted = _Wanted(str(data.get("rate") or "good"))
    config: KohyaConfig
    if what == "continue":
        epochs = str(data.get("epochs") or "")
        if not epochs.isdigit():
            raise ConfigError("say how many epochs are to be added: 2 or 3 are usual")
        checkpoint = _chosen(run, data)
        config = keeping.continue_config(run, checkpoint, int(epochs), judged=wanted)
        message = (
            f"{config.output_name} goes on from {checkpoint.path.name}, step {checkpoint.step}: press Start"
        )
    elif what == "again":
        config = keeping.retrain_config(run, wanted)
        message = f"{config.output_name} begins again: press Start"
    elif what == "resume":
        state = next((each for each in run.states if each.path.name == data.get("state")), None)
        if state is None:
            raise ConfigError("this state is not there any more: open the run again")
        config = keeping.resume_config(run, state)
        message = f"{config.output_name} goes on from step {state.step}: press Start"
    else:
        config = keeping.settings_of(run)
        message = f"the settings of {run.name} are on the page"
    values = dict(zip(form.widgets, form.show(config), strict=True))
    return {
        "values": values,
        "rest": config.model_dump(),
        "base": base_name(found.base),
        "origin": run.name,
        "tab": "Parameters" if what == "settings" else "Train",
        "message": message,
    }
