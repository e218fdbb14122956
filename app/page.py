"""The page: one Blocks with all its tabs, and the server around it."""

from __future__ import annotations

import functools
import html
import os
import signal
import sys
import threading
import time
import traceback
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gradio as gr
from gradio.components import Component

from app import looks, presets
from app.fields import Form
from app.options import Options
from app.session import Session
from app.tabs import parameters, train
from trainer import config as configuration
from trainer.config import KohyaConfig, Loaded
from trainer.errors import ConfigError, TrainerError
from trainer.files import REPOSITORY

__all__ = ["build", "launch", "serve"]

WARM_UP_AFTER_S = 4.0
"""After the first page was opened: PyTorch takes seconds to import, and the page shall be there first."""
LARGEST_UPLOAD = "16mb"
"""Configurations are all that is uploaded; trainer.config refuses large ones with a sentence."""

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


def serve(options: Options) -> None:
    """Serve the page until the program is ended, and a run with it: Ctrl-C lets it save first.

    Args:
        options: The flags of ``python -m app``.
    """
    try:
        session = Session.open(options, *_first(options))
    except TrainerError as error:
        sys.exit(f"error: {error}")
    except OSError as error:
        sys.exit(f"error: the folder {options.state} cannot be used ({error}): choose another --state")
    try:
        page = launch(session, options)
    except OSError as error:
        sys.exit(
            f"error: port {options.port} of {options.host} cannot be used ({error}): choose another --port"
        )
    _say(f"LoRA Kiln is at {page.local_url}  (Ctrl-C ends it)")
    try:
        _wait_for_end(session)
    finally:
        page.close(verbose=False)


def launch(session: Session, options: Options, opened: Callable[[], None] | None = None) -> gr.Blocks:
    """Serve the page from a thread of its own; ``close()`` of what is returned ends that.

    Args:
        session: The server's state.
        options: Where to serve, and to whom.
        opened: As for `build`.

    Raises:
        OSError: The port is taken, or the host is none of this machine's.
    """
    page = build(session, opened)
    page.queue(default_concurrency_limit=None)
    page.launch(
        server_name=options.host,
        server_port=options.port,
        auth=options.auth,
        inbrowser=options.browser,
        allowed_paths=session.served,
        max_file_size=LARGEST_UPLOAD,
        run_history=False,
        footer_links=[],
        favicon_path=looks.ICON,
        quiet=True,
        show_error=True,
        theme=looks.theme(),
        css=looks.CSS,
        prevent_thread_lock=True,
    )
    return page


def _say(text: str) -> None:
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


def _wait_for_end(session: Session) -> None:
    """Return once the program is asked to end and no run is left; the second Ctrl-C does not wait."""

    def terminated(number: int, frame: types.FrameType | None) -> None:
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, terminated)
    try:
        while True:
            time.sleep(3600)  # unlike a lock, it is woken by Ctrl-C on Windows too
    except KeyboardInterrupt:
        pass
    try:
        if session.runner.running:
            _say("stopping: the run finishes its step and saves (Ctrl-C again: at once, unsaved)")
            session.runner.stop()
            while not session.runner.wait(0.2):
                pass
            session.view.update()
            _say(session.view.lines[-1] if session.view.lines else "stopped")
    except KeyboardInterrupt:
        _say("ended without saving")
        os._exit(130)  # the training thread would go on until its step is done


def _first(options: Options) -> tuple[KohyaConfig, Path]:
    if options.config is None:
        return KohyaConfig(), Path.cwd()
    return configuration.load(options.config).config, presets.base_of(options.config)


def _warm_up() -> None:
    import trainer.runner  # noqa: F401


class _Once:
    """Starts the warm-up when the first page is opened, and then never again."""

    def __init__(self) -> None:
        self._lock = threading.Lock()

    def __call__(self) -> None:
        if self._lock.acquire(blocking=False):
            timer = threading.Timer(WARM_UP_AFTER_S, _warm_up)
            timer.daemon = True
            timer.start()


def build(session: Session, opened: Callable[[], None] | None = None) -> gr.Blocks:
    """All tabs over one form.

    Args:
        session: The server's state.
        opened: Called whenever a page is opened; by default the first one warms the trainer up.
    """
    form = Form()
    opened = opened or _Once()
    with gr.Blocks(title="LoRA Kiln", analytics_enabled=False, delete_cache=(3600, 86400)) as page:
        with gr.Row(elem_classes="kiln-top"):
            gr.HTML(
                '<header class="kiln-head"><h1>LoRA Kiln</h1>'
                "<p>Train a LoRA from your pictures. Same settings, same files as Kohya's LoRA tab.</p></header>",
                padding=False,
            )
            demo = gr.Button("Try the demo", variant="primary", size="md", scale=0, elem_id="demo")
        # What the page does not show of the loaded file: other families' fields, unknown keys.
        rest = gr.JSON(visible=False)
        base = gr.Textbox(visible=False)
        text, name = gr.Textbox(visible=False), gr.Textbox(visible=False)
        with gr.Row(elem_classes="kiln-bar"):
            preset = gr.Dropdown(
                presets.choices(), value=None, label="Preset", min_width=170, scale=2, elem_id="preset"
            )
            path = gr.Textbox(
                label="Configuration file",
                placeholder="Path of a Kohya JSON",
                max_lines=1,
                scale=4,
                min_width=230,
                elem_id="config-path",
            )
            load = gr.Button("Load", size="md", min_width=80, scale=0, elem_id="load")
            save = gr.Button("Save", size="md", min_width=80, scale=0, elem_id="save")
            upload = gr.UploadButton(
                "Upload", file_types=[".json"], size="md", min_width=80, scale=0, elem_id="upload"
            )
            download = gr.Button("Download", size="md", min_width=80, scale=0, elem_id="download")
        report = gr.HTML(elem_id="report", padding=False)
        with gr.Tabs(elem_id="tabs") as tabs:
            with gr.Tab("Parameters", id="parameters"):
                parameters.render(form)
            with gr.Tab("Train", id="train") as train_tab:
                panel = train.render()
        cursor = gr.Textbox(visible=False)
        timer = gr.Timer(1.0)

        fields: list[Component] = list(form.widgets.values())
        outputs = [*fields, rest, base, report]
        inputs = {*fields, rest, base, path}

        def shown(loaded: Loaded, where: Path, message: str) -> list[Any]:
            config = loaded.config
            return [*form.show(config), config.model_dump(), _base_name(where), _report(loaded, message)]

        def read(values: dict[Component, Any]) -> tuple[Loaded, Path]:
            return form.read(values, values[rest]), _base_named(values[base])

        def on_open() -> list[Any]:
            opened()
            config = session.config
            place = gr.skip() if session.doing == "idle" else gr.Tabs(selected="train")
            return [*form.show(config), config.model_dump(), _base_name(session.base), "", place]

        def on_preset(values: dict[Component, Any]) -> list[Any]:
            chosen = values[preset]
            if not chosen:
                return [gr.skip()] * len(outputs)
            typed, where = read(values)
            loaded, where = presets.lay(str(chosen), typed.config, where)
            return shown(loaded, where, f"preset {presets.title(chosen)}")

        def on_demo() -> list[Any]:
            file = presets.path_of(presets.DEMO)
            loaded, where = configuration.load(file), presets.base_of(file)
            model = where / loaded.config.pretrained_model_name_or_path
            if not model.exists():
                raise ConfigError(f"the demo's model is missing ({model}): get the program's files again")
            loaded = Loaded(session.paths.writable(loaded.config), loaded.report)
            return [*shown(loaded, where, "demo: press Start"), presets.DEMO, gr.Tabs(selected="train")]

        def on_load(typed: str) -> list[Any]:
            file = session.paths.resolve(typed or "")
            return shown(configuration.load(file), presets.base_of(file), f"loaded {file}")

        def on_upload(file: str) -> list[Any]:
            return shown(configuration.load(file), Path.cwd(), f"loaded {Path(file).name}")

        def on_save(values: dict[Component, Any]) -> str:
            loaded, _ = read(values)
            typed = (values[path] or "").strip()
            file = session.paths.resolve(
                typed if typed.lower().endswith(".json") else f"{typed}.json", write=True
            )
            left_out = configuration.save(loaded.config, file)
            return _report(Loaded(loaded.config, left_out), f"saved {file}")

        def on_download(values: dict[Component, Any]) -> tuple[str, str]:
            loaded, _ = read(values)
            return configuration.dumps(loaded.config), f"{_plain_name(loaded.config.output_name)}.json"

        def on_start(values: dict[Component, Any]) -> list[Any]:
            # A run that has started is shown by the ticks alone: this answer may come after them.
            try:
                loaded, where = read(values)
                session.start(loaded.config, where)
            except TrainerError as error:
                return [*train.buttons(session.doing), train.refused(str(error))]
            except Exception as error:  # noqa: BLE001 - a flaw of ours must not leave the button pressed
                traceback.print_exc()
                words = train.refused(f"{type(error).__name__}: {error}")
                return [*train.buttons(session.doing), words]
            return [gr.skip()] * 3

        def on_stop() -> None:
            session.runner.stop()

        def guarded(act: Any) -> Any:
            """A person's mistake becomes a message on the page."""

            @functools.wraps(act)
            def wrapped(*arguments: Any) -> Any:
                try:
                    return act(*arguments)
                except TrainerError as error:
                    message = html.escape(str(error))
                    raise gr.Error(
                        message, duration=20, title="Please check", print_exception=False
                    ) from error

            return wrapped

        quiet: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private"}
        page.load(on_open, None, [*outputs, tabs], **quiet)
        preset.input(guarded(on_preset), {*fields, rest, base, preset}, outputs, **quiet)
        load.click(guarded(on_load), path, outputs, **quiet)
        path.submit(guarded(on_load), path, outputs, **quiet)
        upload.upload(guarded(on_upload), upload, outputs, **quiet)
        save.click(guarded(on_save), inputs, report, **quiet)
        download.click(guarded(on_download), inputs, [text, name], **quiet).success(
            None, [text, name], None, js=DOWNLOAD, **quiet
        )
        demo.click(guarded(on_demo), None, [*outputs, preset, tabs], **quiet)
        # The browser answers a press at once; the server may be busy with a step.
        panel.start.click(None, None, panel.start, js=STARTING, **quiet)
        panel.start.click(on_start, inputs, [panel.start, panel.stop, panel.notices], **quiet)
        panel.stop.click(None, None, panel.stop, js=STOPPING, **quiet)
        panel.stop.click(on_stop, None, None, **quiet)
        # gradio's own autoscroll stays at the top once many lines come at a time.
        gr.on([panel.log.change, train_tab.select], None, None, None, js=FOLLOW_LOG, **quiet)
        timer.tick(
            lambda seen: train.tick(session, seen),
            cursor,
            [cursor, *panel.outputs],
            concurrency_limit=None,
            **quiet,
        )
    return page


def _base_name(base: Path) -> str:
    """How the page remembers where relative paths start: a name, since a browser may send anything."""
    return "program" if base == REPOSITORY else ""


def _base_named(name: Any) -> Path:
    return REPOSITORY if name == "program" else Path.cwd()


def _plain_name(text: str) -> str:
    return "".join(letter for letter in text if letter.isalnum() or letter in "-_ ")[:80] or "lora"


def _report(loaded: Loaded, message: str) -> str:
    """What loading found, for a person."""
    groups: dict[str, list[str]] = {}
    for finding in loaded.report:
        groups.setdefault(finding.kind, []).append(finding.message)
    parts = [f"<b>{html.escape(message)}</b>"]
    for kind, messages in groups.items():
        items = "".join(f"<li>{html.escape(item)}</li>" for item in messages)
        parts.append(
            f"<details><summary>{len(messages)} {html.escape(KINDS[kind])}</summary><ul>{items}</ul></details>"
        )
    return f'<div class="kiln-report">{"".join(parts)}</div>'


KINDS = {
    "converted": "converted",
    "unknown": "unknown (kept, and written back)",
    "unsupported": "without effect here",
    "invalid": "invalid (the default is used)",
    "missing": "not in the file",
    "outside": "outside the usual range",
}
