"""A served page on a tiny model, and a browser that looks at it."""

from __future__ import annotations

import contextlib
import json
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from playwright.sync_api import Browser, BrowserContext, Page, sync_playwright

from trainer.files import REPOSITORY

PATIENCE_MS = 240_000  # on a machine that has much else to do

USABLE = {"button", "checkbox", "combobox", "link", "listbox", "radio", "searchbox", "slider", "spinbutton"}
USABLE |= {"switch", "tab", "textbox"}
"""Roles of what a person operates, as a screen reader hears of it."""


@dataclass
class Served:
    """A server in a process of its own."""

    process: subprocess.Popen[str]
    url: str
    folder: Path
    output: Path

    def interrupt(self) -> int:
        """What Ctrl-C does."""
        self.process.send_signal(signal.SIGINT)
        return self.process.wait(PATIENCE_MS / 1000)


@dataclass
class Tab:
    """A page in a browser, and what its console complained of."""

    page: Page
    errors: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.page.set_default_timeout(PATIENCE_MS)
        self.page.on("console", lambda line: self.errors.append(line.text) if line.type == "error" else None)
        self.page.on("pageerror", lambda error: self.errors.append(str(error)))
        self.page.on("dialog", lambda dialog: dialog.accept())
        self.page.on("request", self._asked)

    def _asked(self, request: Any) -> None:
        if not request.url.startswith(("http://127.0.0.1:", "data:", "blob:")):
            self.errors.append(f"asked for {request.url}")

    def value(self, name: str) -> str:
        """What stands in the field of a setting, which must be on the sub-tab that is shown."""
        return self.page.locator(f"#field-{name} input, #field-{name} textarea").first.input_value()

    def fill(self, name: str, text: str) -> None:
        self.page.locator(f"#field-{name} input, #field-{name} textarea").first.fill(text)

    def all_settings(self) -> None:
        """Leave the beginner's view."""
        self.page.locator("#kiln-all").check()

    def tab(self, name: str) -> None:
        self.page.get_by_role("tab", name=name, exact=True).click()

    def load(self, file: Path) -> None:
        """Load a configuration by its path."""
        self.name(file)
        self.page.locator("#load").click()
        self.page.locator("#report", has_text=f"loaded {file}").wait_for()

    def nameless(self) -> list[str]:
        """What can be used on the screen and has no name for a screen reader."""
        session = self.page.context.new_cdp_session(self.page)
        nodes = session.send("Accessibility.getFullAXTree")["nodes"]
        session.detach()
        return [
            str(node.get("backendDOMNodeId"))
            for node in nodes
            if not node.get("ignored")
            and node.get("role", {}).get("value") in USABLE
            and not str(node.get("name", {}).get("value", "")).strip()
        ]

    def name(self, file: Path | str) -> None:
        """Type the path of a configuration."""
        self.page.locator("#config-path input, #config-path textarea").fill(str(file))

    def save(self, file: Path) -> dict[str, Any]:
        """Save under a path, and read what was written."""
        self.name(file)
        self.page.locator("#save").click()
        self.page.locator("#report", has_text=f"saved {file}").wait_for()
        found: dict[str, Any] = json.loads(file.read_text())
        return found

    def drop(self, selector: str, files: list[Path]) -> None:
        """Drop files and folders from the desktop on an element, as the browser itself would be told of it."""
        box = self.page.locator(selector).bounding_box()
        assert box is not None
        session = self.page.context.new_cdp_session(self.page)
        at = {"x": box["x"] + 20, "y": box["y"] + box["height"] / 2}
        data = {"items": [], "files": [str(file) for file in files], "dragOperationsMask": 1}
        for kind in ("dragEnter", "dragOver", "drop"):
            session.send("Input.dispatchDragEvent", {"type": kind, **at, "data": data})
        session.detach()

    def is_wider_than_the_screen(self) -> bool:
        return bool(self.page.evaluate("document.documentElement.scrollWidth > window.innerWidth"))


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model, pictures, and configurations: tiny.json and odd.json."""
    from tests import tiny  # imports the engine

    folder = tmp_path_factory.mktemp("world")
    model = tiny.sd15_file(folder / "model.safetensors")
    pictures = folder / "img" / "5_cat"
    pictures.mkdir(parents=True)
    noise = np.random.default_rng(0)
    for index in range(3):
        pixels = noise.integers(0, 255, (64, 64, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(pictures / f"{index}.png")
        (pictures / f"{index}.txt").write_text(f"cat {index}")
    (pictures / "broken.png").write_bytes(b"no picture")
    config = {
        "pretrained_model_name_or_path": str(model),
        "train_data_dir": str(folder / "img"),
        "output_dir": str(folder / "out"),
        "output_name": "tiny",
        "caption_extension": ".txt",
        "max_resolution": "64,64",
        "min_bucket_reso": 64,
        "max_bucket_reso": 128,
        "cache_latents": True,
        "max_train_steps": 5000,
        "save_every_n_epochs": 0,
        "mixed_precision": "no",
        "network_dim": 2,
        "optimizer": "AdamW",
        "learning_rate": 1e-4,
        "unet_lr": 1e-4,
        "lr_warmup": 0,
        "seed": 1,
        "max_data_loader_n_workers": 0,
        # One picture at the start and the next when "Sample now" asks for it, however fast the run is.
        "sample_every_n_steps": 5000,
        "additional_parameters": "--sample_at_first",
        "sample_sampler": "ddim",
        "sample_prompts": "a <b>bold</b> cat --w 64 --h 64 --s 1 --d 1",
    }
    odd = {"caption_extension": ".txt2", "network_dim": 1024, "lr_scheduler": "wobbly", "clip_skip": 99}
    odd["mystery"] = "<img src=x onerror=alert(1)>"
    (folder / "tiny.json").write_text(json.dumps(config))
    (folder / "odd.json").write_text(json.dumps(config | odd))
    return folder


@pytest.fixture(scope="module")
def served(world: Path) -> Iterator[Served]:
    with serving(world) as running:
        yield running


@contextlib.contextmanager
def serving(world: Path, *flags: str, state: str = "state", port: int = 0) -> Iterator[Served]:
    """A server on a state folder of the world: the next one goes on where the one before ended."""
    if not port:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
    command = [
        sys.executable,
        "-m",
        "app",
        "--no-browser",
        "--port",
        str(port),
        "--state",
        str(world / state),
        *flags,
    ]
    output = world / f"{state}.txt"
    with (
        output.open("w") as lines,
        subprocess.Popen(
            command, cwd=REPOSITORY, stdout=lines, stderr=subprocess.STDOUT, text=True
        ) as process,
    ):
        try:
            end = time.monotonic() + PATIENCE_MS / 1000
            while "LoRA Kiln is at" not in output.read_text():
                assert process.poll() is None, output.read_text()
                assert time.monotonic() < end
                time.sleep(0.1)
            yield Served(process, f"http://127.0.0.1:{port}/", world, output)
        finally:  # leaving the block of a process waits for its end
            if process.poll() is None:
                process.kill()


@pytest.fixture(scope="session")
def browser(chromium: Path) -> Iterator[Browser]:
    with sync_playwright() as playwright:
        # Chromium's sandbox does not start for root, as whom containers run.
        running = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        yield running
        running.close()


@pytest.fixture
def context(browser: Browser) -> Iterator[BrowserContext]:
    made = browser.new_context(viewport={"width": 1280, "height": 900}, accept_downloads=True)
    yield made
    made.close()


def open_page(context: BrowserContext, served: Served, login: tuple[str, str] | None = None) -> Tab:
    """The page in a new tab, usable."""
    tab = Tab(context.new_page())
    tab.page.goto(served.url)
    if login is not None:
        for label, text in zip(("username", "password"), login, strict=True):
            tab.page.get_by_label(label, exact=False).fill(text)
        tab.page.get_by_role("button", name="Login").click()
    tab.page.wait_for_function("document.body.dataset.kiln === 'ready'")
    return tab
