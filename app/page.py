"""The page: one Blocks with all its tabs, and the server around it."""

from __future__ import annotations

import html
import sys
import tempfile
import threading
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
from trainer.errors import TrainerError
from trainer.files import REPOSITORY

__all__ = ["build", "serve"]

Updates = dict[Component, Any]


def serve(options: Options) -> None:
    """Serve the page until the program is ended.

    Args:
        options: The flags of ``python -m app``.
    """
    try:
        session = Session.open(options, *_first(options))
    except TrainerError as error:
        sys.exit(f"error: {error}")
    page = build(session)
    # PyTorch takes seconds to import; the page need not wait for it.
    threading.Thread(target=_warm_up, name="warm-up", daemon=True).start()
    try:
        page.queue(default_concurrency_limit=None)
        page.launch(
            server_name=options.host,
            server_port=options.port,
            auth=options.auth,
            inbrowser=options.browser,
            allowed_paths=session.served,
            footer_links=[],
            quiet=True,
            show_error=True,
            theme=looks.theme(),
            css=looks.CSS,
            prevent_thread_lock=True,
        )
    except OSError as error:
        sys.exit(
            f"error: port {options.port} of {options.host} cannot be used ({error}): choose another --port"
        )
    # gradio copies the list; it must see the folders of later runs.
    page.allowed_paths = session.served
    sys.stdout.write(f"LoRA Kiln is at {page.local_url}  (Ctrl-C ends it)\n")
    sys.stdout.flush()
    page.block_thread()


def _first(options: Options) -> tuple[KohyaConfig, Path]:
    if options.config is None:
        return KohyaConfig(), Path.cwd()
    return configuration.load(options.config).config, presets.base_of(options.config)


def _warm_up() -> None:
    import trainer.runner  # noqa: F401


def build(session: Session) -> gr.Blocks:
    """All tabs over one form."""
    form = Form()
    with gr.Blocks(title="LoRA Kiln", analytics_enabled=False, delete_cache=(3600, 86400)) as page:
        gr.HTML(
            '<header class="kiln-head"><h1>LoRA Kiln</h1>'
            "<p>Train a LoRA from your pictures. Same settings, same files as Kohya's LoRA tab.</p></header>"
        )
        # What the page does not show of the loaded file: other families' fields, unknown keys.
        rest = gr.JSON(visible=False)
        base = gr.Textbox(visible=False)
        with gr.Row(elem_classes="kiln-bar", equal_height=True):
            preset = gr.Dropdown(
                presets.names(), value=None, label="Preset", info="Fills all fields", min_width=180, scale=2
            )
            path = gr.Textbox(
                label="Configuration file", info="A Kohya JSON on this machine", scale=4, min_width=240
            )
            with gr.Column(scale=2, min_width=200):
                with gr.Row():
                    load = gr.Button("Load", size="sm", min_width=80)
                    save = gr.Button("Save", size="sm", min_width=80)
                with gr.Row():
                    upload = gr.UploadButton("Open …", file_types=[".json"], size="sm", min_width=80)
                    download = gr.DownloadButton("Download", size="sm", min_width=80)
            demo = gr.Button("Try the demo", variant="primary", min_width=140, scale=1, elem_id="demo")
        report = gr.HTML(elem_id="report")
        with gr.Tabs(elem_id="tabs") as tabs:
            with gr.Tab("Parameters", id="parameters"):
                parameters.render(form)
            with gr.Tab("Train", id="train"):
                panel = train.render()
        cursor = gr.Number(-1, visible=False)
        timer = gr.Timer(1.0)

        fields: list[Component] = list(form.widgets.values())
        outputs = [*fields, rest, base, report]
        inputs = {*fields, rest, base, path}

        def shown(loaded: Loaded, where: Path, message: str) -> list[Any]:
            return [
                *form.show(loaded.config),
                loaded.config.model_dump(),
                str(where),
                _report(loaded, message),
            ]

        def read(values: dict[Component, Any]) -> tuple[Loaded, Path]:
            where = Path(values[base]) if values[base] else session.base
            if session.paths.confined:
                # A browser may send any base; only the repository and the roots' own count.
                where = REPOSITORY if where.resolve() == REPOSITORY else session.base
            return form.read(values, values[rest] or {}), where

        def on_open() -> list[Any]:
            return [*form.show(session.config), session.config.model_dump(), str(session.base), ""]

        def on_preset(name: str | None) -> list[Any]:
            if not name:
                return [gr.skip()] * len(outputs)
            file = presets.path_of(name)
            return shown(configuration.load(file), presets.base_of(file), f"preset {name}")

        def on_load(text: str) -> list[Any]:
            file = session.paths.resolve(text)
            return shown(configuration.load(file), presets.base_of(file), f"loaded {file}")

        def on_upload(file: str) -> list[Any]:
            return shown(configuration.load(file), session.base, "opened the uploaded file")

        def on_save(values: dict[Component, Any]) -> str:
            loaded, _ = read(values)
            file = session.paths.resolve(values[path], write=True)
            left_out = configuration.save(loaded.config, file if file.suffix else file.with_suffix(".json"))
            return _report(Loaded(loaded.config, left_out), f"saved {file}")

        def on_download(values: dict[Component, Any]) -> str:
            loaded, _ = read(values)
            folder = Path(tempfile.mkdtemp())
            file = folder / f"{_plain_name(loaded.config.output_name)}.json"
            configuration.save(loaded.config, file)
            return str(file)

        def on_start(values: dict[Component, Any]) -> tuple[Any, str]:
            loaded, where = read(values)
            session.start(loaded.config, where)
            return gr.Tabs(selected="train"), ""

        def guarded(act: Any) -> Any:
            """A person's mistake becomes a message on the page."""

            def wrapped(*arguments: Any) -> Any:
                try:
                    return act(*arguments)
                except TrainerError as error:
                    raise gr.Error(html.escape(str(error)), duration=20, title="Please check") from error

            return wrapped

        quiet: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private"}
        page.load(on_open, None, outputs, **quiet)
        preset.input(guarded(on_preset), preset, outputs, **quiet)
        load.click(guarded(on_load), path, outputs, **quiet)
        path.submit(guarded(on_load), path, outputs, **quiet)
        upload.upload(guarded(on_upload), upload, outputs, **quiet)
        save.click(guarded(on_save), inputs, report, **quiet)
        download.click(guarded(on_download), inputs, download, **quiet)
        demo.click(lambda: "demo", None, preset, **quiet).then(
            guarded(lambda: on_preset("demo")), None, outputs, **quiet
        ).then(lambda: gr.Tabs(selected="train"), None, tabs, **quiet)
        panel.start.click(guarded(on_start), inputs, [tabs, report], **quiet)
        panel.stop.click(session.runner.stop, None, None, **quiet)
        timer.tick(
            lambda seen: train.tick(session, seen),
            cursor,
            [cursor, *panel.outputs],
            concurrency_limit=None,
            **quiet,
        )
    return page


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
