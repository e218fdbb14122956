"""Tests of the page import gradio, which makes an event loop with every lock and leaves it open."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Iterator
from pathlib import Path

import pytest


@contextlib.contextmanager
def loops_closed() -> Iterator[None]:
    """Keep the event loops that are made meanwhile, and close them at the end: warnings are errors."""
    made: list[asyncio.AbstractEventLoop] = []
    make = asyncio.new_event_loop

    def kept() -> asyncio.AbstractEventLoop:
        made.append(make())
        return made[-1]

    asyncio.new_event_loop = kept
    try:
        yield
    finally:
        asyncio.new_event_loop = make
        for loop in made:
            if not loop.is_running():
                loop.close()
        asyncio.set_event_loop(None)


with loops_closed():
    import gradio  # noqa: F401

from app.paths import Paths  # noqa: E402
from app.session import Session  # noqa: E402
from trainer.config import KohyaConfig  # noqa: E402


@pytest.fixture(autouse=True, scope="module")
def _closed() -> Iterator[None]:
    with loops_closed():
        yield


@pytest.fixture
def session(tmp_path: Path) -> Session:
    """A server's state, with no run yet."""
    paths = Paths({}, confined=False)
    return Session(paths=paths, state=tmp_path / "state", config=KohyaConfig(), base=tmp_path)
