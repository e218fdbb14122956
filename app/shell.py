"""What a tab needs of the page around it to wire its own events.

A tab is a module with ``render() -> Panel`` (its components, inside its ``gr.Tab``) and
``wire(panel, shell)`` (its events, once the whole page is laid out).

To read the settings as they stand in the browser, let an event collect them first::

    button.click(None, shell.everything, shell.draft, **COLLECT).then(
        guarded(on_click), [shell.draft, ...], [...], **QUIET
    )

and in ``on_click`` call ``page_of(sent)``. To fill the settings in, answer with ``shell.shown(...)`` into
``shell.outputs``, followed by ``.success(None, shell.everything, shell.draft, **LOADED)``.
"""

from __future__ import annotations

import functools
import html
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gradio as gr
from gradio.components import Component

from app.fields import Form, read
from app.report import report_html
from app.session import Session
from trainer.config import KohyaConfig, Loaded
from trainer.errors import TrainerError
from trainer.files import REPOSITORY

__all__ = [
    "COLLECT",
    "EDITED",
    "LOADED",
    "OPENED",
    "QUIET",
    "Shell",
    "answered",
    "base_name",
    "guarded",
    "page_of",
    "user_of",
]

QUIET: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private"}
"""For every event: no veil over the page, no entry in a public API."""
EDITED: dict[str, Any] = {"js": "(...values) => kiln.edited(values, false)", **QUIET}
COLLECT: dict[str, Any] = {"js": "(...values) => kiln.edited(values, true)", **QUIET}
LOADED: dict[str, Any] = {"js": "(...values) => kiln.loaded(values, false)", **QUIET}
OPENED: dict[str, Any] = {"js": "(...values) => kiln.loaded(values, true)", **QUIET}


@dataclass(frozen=True)
class Shell:
    """The page's shared parts."""

    session: Session
    form: Form
    everything: list[Component]
    """The components that make up the settings."""
    draft: gr.Textbox
    """The settings as the browser sent them last; see `page_of`."""
    outputs: list[Component]
    """What `shown` fills."""
    tabs: gr.Tabs
    """To go to another tab: answer ``gr.Tabs(selected=...)`` into it."""

    def shown(self, loaded: Loaded, where: Path, message: str, since: str, more: str = "") -> list[Any]:
        """Values for `outputs` that put a configuration on the page.

        Args:
            loaded: The configuration and what there is to say of it.
            where: Folder that its relative paths start from.
            message: What has happened, for the report.
            since: What changed fields are compared with, by name.
            more: HTML that goes under the report.
        """
        config = loaded.config
        said = report_html(loaded, message, more)
        return [*self.form.show(config), config.model_dump(), base_name(where), since, said]


def page_of(sent: Any) -> tuple[KohyaConfig, Path]:
    """The settings that a page sent, and the folder that their relative paths start from.

    Raises:
        ConfigError: That is no configuration.
    """
    loaded, named = read(sent)
    return loaded.config, base_named(named)


def base_name(base: Path) -> str:
    """How the page remembers where relative paths start: a name, since a browser may send anything."""
    return "program" if base == REPOSITORY else ""


def base_named(name: Any) -> Path:
    """The folder of a `base_name`."""
    return REPOSITORY if name == "program" else Path.cwd()


def user_of(request: Any) -> str:
    """Who is logged in; "" where nobody logs in."""
    name = getattr(request, "username", None)
    if isinstance(name, str):
        return name
    app, cookies = getattr(request, "app", None), getattr(request, "cookies", {})
    tokens = getattr(app, "tokens", {})
    for kind in ("access-token", "access-token-unsecure"):
        found = tokens.get(cookies.get(f"{kind}-{getattr(app, 'cookie_id', '')}"))
        if isinstance(found, str):
            return found
    return ""


def guarded(act: Any) -> Any:
    """A person's mistake becomes a message on the page."""

    @functools.wraps(act)
    def wrapped(*arguments: Any) -> Any:
        try:
            return act(*arguments)
        except TrainerError as error:
            message = html.escape(str(error))
            raise gr.Error(message, duration=20, title="Please check", print_exception=False) from error

    return wrapped


def answered(act: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What a component's own function sends to the page's script: an answer, or ``error`` with a sentence."""
    try:
        return act()
    except TrainerError as error:
        return {"error": str(error)}
    except Exception as error:  # noqa: BLE001 - a flaw of ours must not leave the page waiting
        traceback.print_exc()
        return {"error": f"{type(error).__name__}: {error}"}
