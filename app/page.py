"""The page: one Blocks with all its tabs, and what its buttons do."""

from __future__ import annotations

import html
import json
import threading
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gradio as gr
from gradio.components import Component

from app import browse, looks, presets
from app.checks import Check, checks, checks_html
from app.fields import Form, read
from app.report import report_html, ways_on
from app.session import Session
from app.shell import (
    COLLECT,
    EDITED,
    LOADED,
    OPENED,
    QUIET,
    Shell,
    answered,
    base_name,
    guarded,
    page_of,
    user_of,
)
from app.tabs import captioning, dataset, parameters, review, tools, train
from trainer import config as configuration
from trainer.config import Loaded
from trainer.errors import ConfigError, TrainerError

__all__ = ["build", "head"]

WARM_UP_AFTER_S = 4.0
"""After the first page was opened: PyTorch takes seconds to import, and the page shall be there first."""

DOWNLOAD = """(text, name) => {
    const link = document.createElement("a");
    link.href = URL.createObjectURL(new Blob([text], {type: "application/json"}));
    link.download = name;
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 1000);
}"""

STARTING = '() => ({__type__: "update", value: "Starting …", interactive: false})'
STOPPING = '() => ({__type__: "update", value: "Stopping …", interactive: false})'

FOLLOW_LOG = """() => setTimeout(() => {
    const box = document.querySelector("#log textarea");
    if (!box) return;
    if (box.follows === undefined) {
        box.follows = true;
        box.addEventListener("scroll", () => {
            box.follows = box.scrollHeight - box.scrollTop - box.clientHeight < 40;
        });
    }
    if (box.follows) box.scrollTop = box.scrollHeight;
}, 50)"""
"""Keeps the end of the log in sight, unless a person has scrolled up to read."""

BAR_TOGGLE = (
    '<button type="button" class="kiln-small" id="kiln-bar-toggle" aria-expanded="false" aria-controls="bar">'
    "Preset and file</button>"
)
"""On a phone the configuration bar unfolds from it."""
STORED = "() => new Promise((done) => setTimeout(done, 20))"
CONNECT = """kiln.connect(server, trigger);
for (const name of ['apply', 'check', 'now', 'parts', 'collect', 'typed', 'preset', 'recent']) void name;"""
"""gradio finds the names of a component's own events in its script."""


class _Once:
    """Starts the warm-up when the first page is opened, and then never again."""

    def __init__(self) -> None:
        self._lock = threading.Lock()

    def __call__(self) -> None:
        if self._lock.acquire(blocking=False):
            timer = threading.Timer(WARM_UP_AFTER_S, _warm_up)
            timer.daemon = True
            timer.start()


def _warm_up() -> None:
    """Import PyTorch whole: two threads that each import a part of it would find the other's half done."""
    import trainer.runner  # noqa: F401


def head(form: Form, opened: Path | None = None) -> str:
    """The page's script and what it must know of the fields.

    Args:
        form: The fields.
        opened: A file that goes before what a browser kept, until that has seen it once as it is now.
    """
    parts: dict[str, Any] = {"parts": [label for label, _ in parameters.TABS], "simple": parameters.SIMPLE}
    parts["opened"] = "" if opened is None else f"{opened} {opened.stat().st_mtime_ns}"
    facts = json.dumps({**form.facts(), **parts}, separators=(",", ":")).replace("</", "<\\/")
    return f'<script type="application/json" id="kiln-facts">{facts}</script><script>{looks.SCRIPT}</script>'


def build(session: Session, opened: Callable[[], None] | None = None) -> tuple[gr.Blocks, Form]:
    """All tabs over one form.

    Args:
        session: The server's state.
        opened: Called whenever a page is opened; by default the first one warms the trainer up.
    """
    form = Form()
    opened = opened or _Once()

    def browse_files(data: Any, request: gr.Request) -> dict[str, Any]:
        asked = data if isinstance(data, dict) else {}
        kind, path = str(asked.get("kind", "")), str(asked.get("path", ""))
        return answered(lambda: browse.listing(session.paths, kind, path))

    def act_on_run(data: Any, request: gr.Request) -> dict[str, Any]:
        return answered(lambda: _act(session, form, data if isinstance(data, dict) else {}, user_of(request)))

    def news(data: Any) -> str:
        return train.cursor(session)

    def words_of(data: Any) -> dict[str, str]:
        code = str(data.get("code", "")) if isinstance(data, dict) else ""
        return {**looks.helps(code), **looks.words(code)}

    # As the page's script calls them.
    browse_files.__name__, act_on_run.__name__, words_of.__name__ = "browse", "act", "words"
    with gr.Blocks(title="LoRA Kiln", analytics_enabled=False, delete_cache=(3600, 86400)) as page:
        with gr.Row(elem_classes="kiln-top"):
            logout = '<a href="/logout" id="logout">Log out</a>' if session.admin else ""
            gr.HTML(
                '<header class="kiln-head"><h1>LoRA Kiln</h1>'
                "<p>Train a LoRA from your pictures. Same settings, same files as Kohya's LoRA tab.</p>"
                f"{BAR_TOGGLE}{_languages()}{logout}</header>",
                padding=False,
            )
            demo = gr.Button("Try the demo", variant="primary", size="md", scale=0, elem_id="demo")
        # What the page does not show of the loaded file: hidden fields, unknown keys; and where it came from.
        rest = gr.JSON(visible=False)
        base, origin = gr.Textbox(visible=False), gr.Textbox(visible=False)
        draft = gr.Textbox(visible=False)
        text, name = gr.Textbox(visible=False), gr.Textbox(visible=False)
        bridge = gr.HTML(
            "",
            js_on_load=CONNECT,
            server_functions=[browse_files, act_on_run, words_of, news],
            elem_id="bridge",
            padding=False,
        )
        with gr.Row(elem_classes="kiln-bar", elem_id="bar"):
            preset = gr.Dropdown(
                presets.choices(), value=None, label="Preset", min_width=150, scale=2, elem_id="preset"
            )
            recent = gr.Dropdown([], value=None, label="Recent", min_width=150, scale=2, elem_id="recent")
            path = gr.Textbox(
                label="Configuration file",
                placeholder="Path of a Kohya JSON",
                max_lines=1,
                scale=4,
                min_width=220,
                elem_id="config-path",
            )
            small: dict[str, Any] = {"size": "md", "min_width": 76, "scale": 0}
            load = gr.Button("Load", elem_id="load", **small)
            gr.Button("Open …", elem_id="open", **small)
            save = gr.Button("Save", elem_id="save", **small)
            gr.Button("Save as …", elem_id="save-as", **small)
            new = gr.Button("New", elem_id="new", **small)
            upload = gr.UploadButton("Upload", file_types=[".json"], elem_id="upload", **small)
            download = gr.Button("Download", elem_id="download", **small)
        report = gr.HTML(elem_id="report", padding=False)
        with gr.Tabs(elem_id="tabs", selected="parameters", overflow_behavior="wrap") as tabs:
            with gr.Tab("Dataset", id="dataset"):
                dataset.render(session)
            with gr.Tab("Captioning", id="captioning") as captioning_tab:
                captioning.render(session)
            with gr.Tab("Parameters", id="parameters"):
                parts = parameters.render(form)
            with gr.Tab("Train", id="train") as train_tab:
                panel = train.render()
            with gr.Tab("Review", id="review"):
                past = review.render(session, form)
                tool_panel = tools.render()
        cursor = gr.Textbox(visible=False)

        fields: list[Component] = list(form.widgets.values())
        everything = [*fields, rest, base, origin]
        outputs = [*everything, report]

        shell = Shell(session, form, everything, draft, outputs, tabs)
        tools.wire(tool_panel, shell)
        shown = shell.shown

        def on_open(kept: Any, request: gr.Request) -> list[Any]:
            opened()
            place = gr.skip() if session.doing == "idle" else gr.Tabs(selected="train")
            recents, file = gr.Dropdown(session.recent()), None
            try:
                loaded, named = read(kept)
                mine = json.loads(kept).get("origin", "")
            except ConfigError:  # no draft: what the server shows
                loaded, named, file = Loaded(session.config), base_name(session.base), session.opened
                mine = "" if file is None else file.name
            since = mine if isinstance(mine, str) else ""
            values = [*form.show(loaded.config), loaded.config.model_dump(), named, since[:200]]
            return [*values, "", recents, place, gr.skip() if file is None else str(file)]

        def on_preset(chosen: Any, sent: Any) -> list[Any]:
            typed, where = page_of(sent)
            loaded, where = presets.lay(str(chosen), typed, where)
            title = presets.title(str(chosen))
            return shown(loaded, where, f"preset {title}", f"preset {title}")

        def on_demo() -> list[Any]:
            file = presets.path_of(presets.DEMO)
            loaded, where = configuration.load(file), presets.base_of(file)
            model = where / loaded.config.pretrained_model_name_or_path
            if not model.exists():
                raise ConfigError(f"the demo's model is missing ({model}): get the program's files again")
            loaded = Loaded(
                session.paths.writable(loaded.config)
            )  # what is to be said of our own file is for us
            return [
                *shown(loaded, where, "The demo is loaded", "the demo"),
                presets.DEMO,
                gr.Tabs(selected="train"),
            ]

        def on_load(typed: Any) -> list[Any]:
            file = session.paths.resolve(str(typed or ""))
            loaded, where = configuration.load(file), presets.base_of(file)
            for run in session.queue.past():
                written = Path(run.journal).parent
                named = f"{run.name}_{written.name.removeprefix(f'{run.name}-')}"
                if file.stem == named and file.parent == written.parent.parent:
                    where = Path(run.base)  # written by a run: its relative paths start where they did
            session.remember(file)
            more = ways_on(file.parent, loaded.config.output_name)
            answer = shown(loaded, where, f"loaded {file}", file.name, more)
            return [*answer, str(file), gr.Dropdown(session.recent(), value=None)]

        def on_upload(file: str) -> list[Any]:
            name = Path(file).name
            return shown(configuration.load(file), Path.cwd(), f"loaded {name}", name)

        def on_new() -> list[Any]:
            return shown(
                Loaded(presets.NEW), Path.cwd(), "new: every setting has its default", "the defaults"
            )

        def on_save(sent: Any, typed: Any) -> list[Any]:
            config, _ = page_of(sent)
            named = str(typed or "").strip()
            file = session.paths.resolve(
                named if named.lower().endswith(".json") else f"{named}.json", write=True
            )
            left_out = configuration.save(config, file)
            session.remember(file)
            said = report_html(Loaded(config, left_out), f"saved {file}")
            return [file.name, said, str(file), gr.Dropdown(session.recent(), value=None)]

        def on_download(sent: Any) -> tuple[str, str]:
            config, _ = page_of(sent)
            return configuration.dumps(config), f"{_plain_name(config.output_name)}.json"

        def on_start(sent: Any, request: gr.Request) -> list[Any]:
            # A run that has started is shown by the ticks alone: this answer may come after them.
            try:
                config, where = page_of(sent)
                session.start(config, where, user_of(request))
            except TrainerError as error:
                return [*train.buttons(session.doing), train.refused(str(error))]
            except Exception as error:  # noqa: BLE001 - a flaw of ours must not leave the button pressed
                traceback.print_exc()
                words = train.refused(f"{type(error).__name__}: {error}")
                return [*train.buttons(session.doing), words]
            return [*train.buttons(session.doing), gr.skip()] if session.queue.waiting() else [gr.skip()] * 5

        def on_stop(request: gr.Request) -> list[Any]:
            if refusal := session.stop(user_of(request)):
                return [*train.buttons(session.doing), train.refused(refusal)]
            return [gr.skip()] * 5

        def on_ask(what: str) -> Callable[[gr.Request], None]:
            def ask(request: gr.Request) -> None:
                run = session.queue.running()
                if not session.may(user_of(request), run):
                    raise ConfigError(
                        "this run was started by somebody else: only they and the admin may do that"
                    )
                if what == "sample" and session.view.job is not None:
                    from trainer import prompts

                    if not prompts.for_job(session.view.job):
                        raise ConfigError(
                            "there is nothing to draw: write a prompt into Samples before the start"
                        )
                getattr(session.runner.controls, what).set()

            return ask

        def on_check(sent: Any) -> str:
            _warm_up()  # the first check waits for it; the page does not
            config, where = page_of(sent)
            try:
                return checks_html(checks(config, where, session.paths, session.queue))
            except Exception as error:  # noqa: BLE001 - a flaw of ours must not hide behind an old answer
                traceback.print_exc()
                return checks_html([Check("warning", f"The checks failed ({type(error).__name__}: {error})")])

        def on_tick(seen: Any) -> list[Any]:
            return train.tick(session, seen if isinstance(seen, str) else None)

        page.load(on_open, draft, [*outputs, recent, tabs, path], js="() => kiln.opening()", **QUIET).then(
            None, everything, draft, **OPENED
        )
        # What is typed or ticked the page's script hears of itself. gradio tells of a choice before it has stored it.
        lists = [item.input for item in fields if isinstance(item, gr.Dropdown)]
        gr.on(lists, None, None, None, js=STORED, trigger_mode="multiple", **QUIET).then(
            None, everything, draft, **EDITED
        )
        switches = [form.widgets[item] for item in form.facts()["switches"]]
        gr.on([item.input for item in switches], None, switches, switches, js="kiln.family", **QUIET).then(
            None, everything, draft, **COLLECT
        )
        bridge.apply(None, None, everything, js="() => kiln.pending()", **QUIET).then(
            None, everything, draft, **COLLECT
        )
        bridge.check(
            guarded(on_check), draft, panel.checks, trigger_mode="always_last", concurrency_limit=2, **QUIET
        ).then(None, None, None, js="() => kiln.checked()", **QUIET)
        bridge.collect(None, everything, draft, **EDITED)
        bridge.typed(None, None, draft, js="() => kiln.typed()", **QUIET)
        bridge.parts(None, None, parts, js="() => kiln.parts()", **QUIET)
        # One at a time all the same: the page's script waits for what it drew, but not for ever.
        bridge.now(
            on_tick,
            cursor,
            [cursor, *panel.outputs, past],
            trigger_mode="multiple",
            concurrency_limit=None,
            **QUIET,
        ).then(None, None, None, js="() => kiln.drawn()", **QUIET)
        # gradio tells that its lists were left, not whether something was chosen; the page's script knows.
        bridge.preset(None, everything, draft, **COLLECT).then(
            guarded(on_preset), [preset, draft], outputs, **QUIET
        ).success(None, everything, draft, **LOADED)
        for event, source in ((load.click, path), (path.submit, path), (bridge.recent, recent)):
            event(guarded(on_load), source, [*outputs, path, recent], **QUIET).success(
                None, everything, draft, **LOADED
            )
        upload.upload(guarded(on_upload), upload, outputs, **QUIET).success(None, everything, draft, **LOADED)
        new.click(guarded(on_new), None, outputs, **QUIET).success(None, everything, draft, **LOADED)
        save.click(None, everything, draft, **COLLECT).then(
            guarded(on_save), [draft, path], [origin, report, path, recent], **QUIET
        ).success(None, everything, draft, **LOADED)
        download.click(None, everything, draft, **COLLECT).then(
            guarded(on_download), draft, [text, name], **QUIET
        ).success(None, [text, name], None, js=DOWNLOAD, **QUIET)
        demo.click(guarded(on_demo), None, [*outputs, preset, tabs], **QUIET).success(
            None, everything, draft, **LOADED
        )
        # The browser answers a press at once; the server may be busy with a step.
        changed = [panel.start, panel.stop, panel.sample, panel.save, panel.notices]
        panel.start.click(None, None, panel.start, js=STARTING, **QUIET)
        panel.start.click(None, everything, draft, **COLLECT).then(on_start, draft, changed, **QUIET)
        panel.stop.click(None, None, panel.stop, js=STOPPING, **QUIET)
        panel.stop.click(on_stop, None, changed, **QUIET)
        panel.sample.click(guarded(on_ask("sample")), None, None, **QUIET)
        panel.save.click(guarded(on_ask("save")), None, None, **QUIET)
        # gradio's own autoscroll stays at the top once many lines come at a time.
        gr.on([panel.log.change, train_tab.select], None, None, None, js=FOLLOW_LOG, **QUIET)
        train_tab.select(None, None, None, js="() => kiln.check()", **QUIET)  # the pictures may have changed
        captioning.wire(captioning_tab)
        # gradio's page looks for each component that ever showed an event's progress, through the whole page,
        # at every turn of every event: with all fields among them, a tick of a run took a third of a second.
        for function in page.fns.values():
            function.show_progress_on = [cursor]
    return page, form


def _languages() -> str:
    options = "".join(
        f'<option value="{code}" lang="{code}">{html.escape(name)}</option>'
        for code, name in looks.LANGUAGES.items()
    )
    return f'<select id="kiln-language" aria-label="Language">{options}</select>'


def _act(session: Session, form: Form, data: dict[str, Any], user: str) -> dict[str, Any]:
    """What the buttons of a run in a list ask for."""
    what, number = data.get("do"), data.get("run")
    if what == "go on":
        session.held = False
        session.advance()
        return {"message": ""}
    run = session.queue.get(number) if isinstance(number, int) else None
    if run is None:
        raise ConfigError("there is no such run any more: reload the page")
    if what == "open" and run.kind == "training":
        config = configuration.loads(run.config).config
        values = dict(zip(form.widgets, form.show(config), strict=True))
        where = base_name(Path(run.base))
        return {"values": values, "rest": config.model_dump(), "base": where, "origin": run.name}
    if what == "show":
        if session.doing != "idle":
            raise ConfigError("a run is going on and is what every page shows: wait until it has ended")
        session.show(run)
        return {"message": f"{run.name} is shown on Train"}
    if what == "resume":
        resumed = session.resume(run.id, user)
        return {"message": f"{resumed.name} goes on" if session.runner.running else ""}
    if not session.may(user, run):
        raise ConfigError(f"this run is {run.owner}'s: only they and the admin may change it")
    if what == "move" and data.get("by") in (1, -1):
        session.queue.move(run.id, data["by"])
    elif what == "remove":
        session.queue.remove(run.id)
    else:
        raise ConfigError("the page asked for something that does not exist: reload it")
    return {"message": ""}


def _plain_name(text: str) -> str:
    return "".join(letter for letter in text if letter.isalnum() or letter in "-_ ")[:80] or "lora"
