"""The server around the page: its start, its guards and its end."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import time
import types
from collections.abc import Callable
from pathlib import Path

import gradio as gr
from starlette.middleware import Middleware

from app import looks, page, presets
from app.access import ONCE, Guard
from app.options import Options
from app.session import Session
from trainer import config as configuration
from trainer.config import KohyaConfig
from trainer.errors import TrainerError

__all__ = ["launch", "serve"]

LARGEST_UPLOAD = "4gb"
"""Of one file: a ZIP of pictures. trainer.config refuses large configurations with a sentence."""


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
        blocks = launch(session, options)
    except OSError as error:
        sys.exit(
            f"error: port {options.port} of {options.host} cannot be used ({error}): choose another --port"
        )
    _say(f"LoRA Kiln is at {blocks.local_url}  (Ctrl-C ends it)")
    if options.auth is not None and options.auth.once is not None:
        _say(f"For one login: user {ONCE}, password {options.auth.renew()}")
    try:
        _wait_for_end(session)
    finally:
        with contextlib.suppress(KeyboardInterrupt):  # pressed once more: nothing is left to save
            blocks.close(verbose=False)


def launch(session: Session, options: Options, opened: Callable[[], None] | None = None) -> gr.Blocks:
    """Serve the page from a thread of its own; ``close()`` of what is returned ends that.

    Args:
        session: The server's state.
        options: Where to serve, and to whom.
        opened: As for `page.build`.

    Raises:
        OSError: The port is taken, or the host is none of this machine's.
    """
    blocks, form = page.build(session, opened)
    blocks.queue(default_concurrency_limit=None)
    guard = Middleware(Guard, may_serve=session.may_serve, loopback=not options.listen)
    blocks.launch(
        server_name=options.host,
        server_port=options.port,
        auth=None if options.auth is None else options.auth.login,
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
        head=page.head(form, session.opened),
        app_kwargs={"middleware": [guard]},
        prevent_thread_lock=True,
        _frontend=False,  # no request to itself first, which a busy machine answers too late for gradio
    )
    return blocks


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
            session.held = True  # those that wait do so until the next start
            session.runner.stop()
            while not session.runner.wait(0.2):
                pass
            session.settle()
            session.view.update()
            _say(session.view.lines[-1] if session.view.lines else "stopped")
    except KeyboardInterrupt:
        _say("ended without saving")
        os._exit(130)  # the training thread would go on until its step is done


def _first(options: Options) -> tuple[KohyaConfig, Path]:
    if options.config is None:
        return presets.NEW, Path.cwd()
    return configuration.load(options.config).config, presets.base_of(options.config)
