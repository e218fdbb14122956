"""Time the page beside kohya_ss's own, in headless Chromium on one machine, in turns.

kohya_ss (https://github.com/bmaltais/kohya_ss) needs a Python of its own. The page alone, without
training, runs with its gradio and few packages; torch, which only one of its captioners imports at
the start, may be left out, which makes its start faster:

    git clone https://github.com/bmaltais/kohya_ss $K
    python3.11 -m venv $K/venv
    $K/venv/bin/pip install gradio==6.17.3 fastapi==0.139.0 starlette==1.3.1 pydantic==2.11.7 \\
        "huggingface-hub<1" "numpy<2" easygui toml rich psutil packaging safetensors      # as in its uv.lock
    mkdir $K/stubs && echo "" > $K/stubs/torch.py                   # unless torch is installed

    python -m tests.benchmarks.page --kohya $K [--rounds 5] [--json figures.json]

Each round opens a fresh browser profile on each page: nothing is cached. *Usable* is when the field of
the base model of the LoRA settings shows and takes what is typed. Delays run from the click until the
other side shows. At last the demo is trained from the page, and what a person does meanwhile is timed.
"""

from __future__ import annotations

import argparse
import contextlib
import gzip
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from playwright.sync_api import Browser, BrowserContext, Locator, Page, sync_playwright

from tests.chromium import HOW_TO_GET_ONE, find_chromium
from trainer.files import REPOSITORY

SOON_S = 0.3
"""An interaction that takes longer is felt."""
INTERACTIONS = 100
PATIENT = """import httpx
head = httpx.head
httpx.head = lambda url, **more: head(url, **(more | {"timeout": 120}))
"""
"""When it starts, kohya_ss's gradio asks itself for its page, and ends where a busy machine takes longer than
3 s to answer. With this as its sitecustomize it waits; nothing that is timed goes through it."""


@dataclass
class Figures:
    """What was measured of one page. Times in seconds, one of each round."""

    config_bytes: int = 0
    page_bytes: int = 0
    page_gzip_bytes: int = 0
    usable_s: list[float] = field(default_factory=list)
    tab_s: list[float] = field(default_factory=list)
    preset_s: list[float] = field(default_factory=list)


def _timed(act: Callable[[], Any], shown: Callable[[], Any]) -> float:
    began = time.perf_counter()
    act()
    shown()
    return time.perf_counter() - began


def _takes(place: Locator, text: str) -> None:
    """Type into a field and see that it stays."""
    place.fill(text)
    place.page.evaluate(
        "() => new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done)))"
    )
    assert place.input_value() == text


class Ours:
    """The page of this program."""

    presets = (("SDXL 8gb", "16"), ("SD 1.5 photo", "32"))

    def usable(self, page: Page, url: str) -> None:
        page.goto(url, wait_until="commit")
        page.wait_for_function("document.body && document.body.dataset.kiln === 'ready'")
        _takes(page.locator("#field-pretrained_model_name_or_path input").first, "model.safetensors")

    def tabs(self, page: Page, name: str = "pretrained_model_name_or_path") -> list[float]:
        """To Train and back to Parameters, whose part with the field ``name`` is open."""
        train, parameters = (
            page.get_by_role("tab", name=name, exact=True) for name in ("Train", "Parameters")
        )
        field = page.locator(f"#field-{name}")
        return [
            _timed(train.click, lambda: page.locator("#start").wait_for()),
            _timed(parameters.click, lambda: field.wait_for()),
        ]

    def preset(self, page: Page, name: str, rank: str) -> float:
        page.locator("#preset input").click()
        option = page.get_by_role("option", name=name, exact=True)
        option.wait_for()
        field = "document.querySelector('#field-network_dim input')"
        return _timed(option.click, lambda: page.wait_for_function(f"{field} && {field}.value === '{rank}'"))

    def prepare(self, page: Page) -> None:
        page.locator("#kiln-all").check()
        page.get_by_role("tab", name="Basic", exact=True).click()
        page.locator("#field-network_dim").wait_for()


class Theirs:
    """kohya_ss's page. The LoRA settings are behind its second tab."""

    # Its SDXL presets bring a caption extension after which it takes no other preset.
    presets = (("sd15 - EDG_LoraOptiSettings", "64"), ("SDXL - LoRA adafactor v1.0", "128"))

    def usable(self, page: Page, url: str) -> None:
        page.goto(url, wait_until="commit")
        page.get_by_role("tab", name="LoRA", exact=True).first.click()
        shown = page.get_by_label("Pretrained model name or path", exact=False).locator("visible=true")
        _takes(shown.first, "model.safetensors")

    def tabs(self, page: Page) -> list[float]:
        training = page.get_by_role("tab", name="Training", exact=True).locator("visible=true").first
        tools = page.get_by_role("tab", name="Tools", exact=True).locator("visible=true").first
        model = page.get_by_label("Pretrained model name or path", exact=False).locator("visible=true").first
        lora = page.get_by_role("tab", name="Merge LoRA", exact=False).locator("visible=true").first
        return [
            _timed(tools.click, lambda: lora.wait_for()),
            _timed(training.click, lambda: model.wait_for()),
        ]

    def preset(self, page: Page, name: str, rank: str) -> float:
        page.get_by_label("Presets", exact=True).locator("visible=true").first.click()
        option = page.get_by_role("option", name=name, exact=True)
        option.wait_for()
        number = "number input for Network Rank (Dimension)"
        script = f"""() => [...document.querySelectorAll('[aria-label="{number}"]')]
            .some((item) => item.checkVisibility() && item.value === '{rank}')"""
        return _timed(option.click, lambda: page.wait_for_function(script))

    def prepare(self, page: Page) -> None:
        page.get_by_role("button", name="Parameters").locator("visible=true").first.click()
        page.get_by_label("Presets", exact=True).locator("visible=true").first.wait_for()


@contextlib.contextmanager
def _serving(command: list[str], folder: Path, environment: dict[str, str], log: Path) -> Iterator[str]:
    """Run a server until the block ends; gives its address."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    url = f"http://127.0.0.1:{port}/"
    command = [part.format(port=port) for part in command]
    with (
        log.open("w", encoding="utf-8") as output,
        subprocess.Popen(
            command, cwd=folder, env=environment, stdout=output, stderr=subprocess.STDOUT
        ) as process,
    ):
        try:
            end = time.monotonic() + 300
            while True:
                if process.poll() is not None or time.monotonic() > end:
                    sys.exit(f"error: {' '.join(command)} does not serve:\n{log.read_text()[-3000:]}")
                try:
                    urllib.request.urlopen(url, timeout=60).close()
                    break
                except OSError:
                    time.sleep(0.5)
            yield url
        finally:
            process.kill()


def _fresh(browser: Browser) -> BrowserContext:
    context = browser.new_context(viewport={"width": 1280, "height": 900})
    context.set_default_timeout(120_000)
    return context


def _sizes(url: str, figures: Figures) -> None:
    page = urllib.request.urlopen(url, timeout=120).read()
    figures.page_bytes, figures.page_gzip_bytes = len(page), len(gzip.compress(page))
    figures.config_bytes = len(urllib.request.urlopen(f"{url}config", timeout=120).read())


def _round(gui: Ours | Theirs, browser: Browser, url: str, figures: Figures) -> None:
    context = _fresh(browser)
    page = context.new_page()
    figures.usable_s.append(_timed(lambda: None, lambda: gui.usable(page, url)))
    for _ in range(3):
        figures.tab_s += gui.tabs(page)
    gui.prepare(page)
    for name, rank in gui.presets:
        figures.preset_s.append(gui.preset(page, name, rank))
    context.close()


def _while_training(browser: Browser, url: str) -> tuple[list[float], int]:
    """What a person does while the demo is trained: the time of each, and the step that it had come to."""
    context = _fresh(browser)
    page = context.new_page()
    gui = Ours()
    gui.usable(page, url)
    page.locator("#demo").click()
    page.locator("#checks .kiln-ready").wait_for()
    page.locator("#start").click()
    page.locator("#progress", has_text="s a step").wait_for()
    page.get_by_role("tab", name="Parameters", exact=True).click()
    gui.prepare(page)
    times: list[float] = []
    search, found = page.locator("#kiln-search"), page.locator("#kiln-found")
    epoch, dialog = page.locator("#field-epoch input").first, page.locator("#kiln-dialog")
    turn = 0
    while len(times) < INTERACTIONS:
        turn += 1
        times += gui.tabs(page, "epoch")
        for part, name in (("Advanced", "prior_loss_weight"), ("Basic", "epoch")):
            tab = page.get_by_role("tab", name=part, exact=True)
            times.append(_timed(tab.click, page.locator(f"#field-{name}").wait_for))
        epochs = str(turn + 10)  # never the demo's own, which would be no change
        marked = page.locator("#kiln-changes", has_text=f"→ {epochs}")
        times.append(_timed(partial(epoch.fill, epochs), partial(marked.wait_for, state="attached")))
        word = ("seed", "bucket", "noise", "snr")[turn % 4]
        hit = found.locator("button", has_text=word).first
        times.append(_timed(partial(search.fill, word), hit.wait_for))
        times.append(_timed(partial(search.fill, ""), partial(found.wait_for, state="hidden")))
        times.append(_timed(page.locator("#open").click, dialog.wait_for))
        page.keyboard.press("Escape")
        dialog.wait_for(state="hidden")
    page.get_by_role("tab", name="Train", exact=True).click()
    words = page.locator("#progress").inner_text()
    page.locator("#stop").click()
    page.locator(".kiln-alert.stopped, .kiln-alert.done").first.wait_for()
    context.close()
    step = words.partition(" / ")[0].split()[-1] if " / " in words else "0"
    return times, int(step) if step.isdigit() else 0


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--kohya", type=Path, help="kohya_ss's folder, with a venv; without it ours alone is timed"
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path, help="write all figures there")
    options = parser.parse_args()
    chromium = find_chromium()
    if chromium is None:
        sys.exit(HOW_TO_GET_ONE)
    quiet = {**os.environ, "GRADIO_ANALYTICS_ENABLED": "False", "HF_HUB_OFFLINE": "1", "DO_NOT_TRACK": "1"}
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        guis: dict[str, tuple[Ours | Theirs, str]] = {}
        ours = [
            sys.executable,
            "-m",
            "app",
            "--no-browser",
            "--port",
            "{port}",
            "--state",
            str(folder / "state"),
        ]
        log = folder / "ours.txt"
        guis["LoRA Kiln"] = Ours(), stack.enter_context(_serving(ours, REPOSITORY, quiet, log))
        if options.kohya:
            kohya = options.kohya.resolve()
            python = next(kohya.glob("venv/bin/python*"), kohya / "venv" / "Scripts" / "python.exe")
            theirs = [str(python), "kohya_gui.py", "--noverify", "--headless", "--server_port", "{port}"]
            (folder / "sitecustomize.py").write_text(PATIENT, encoding="utf-8")
            its = {**quiet, "PYTHONPATH": os.pathsep.join([str(folder), str(kohya / "stubs")])}
            url = stack.enter_context(_serving(theirs, kohya, its, folder / "kohya.txt"))
            guis["kohya_ss"] = Theirs(), url
        figures = {name: Figures() for name in guis}
        with sync_playwright() as playwright:
            browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
            for name, (_, url) in guis.items():
                _sizes(url, figures[name])
            for number in range(options.rounds):
                for name, (gui, url) in guis.items():
                    _round(gui, browser, url, figures[name])
                    print(
                        f"round {number + 1}, {name}: usable in {figures[name].usable_s[-1]:.2f} s",
                        flush=True,
                    )
            _print(figures)
            times, step = _while_training(browser, guis["LoRA Kiln"][1])
            browser.close()
    soon = sum(one < SOON_S for one in times) / len(times)
    print(
        f"\nwhile the demo is trained (step {step} at the end): {soon:.0%} of {len(times)} interactions under "
        f"{SOON_S * 1e3:.0f} ms, median {statistics.median(times) * 1e3:.0f} ms, "
        f"95th percentile {sorted(times)[int(0.95 * len(times))] * 1e3:.0f} ms"
    )
    if options.json:
        found = {name: asdict(one) for name, one in figures.items()} | {"while training": times}
        options.json.write_text(json.dumps(found, indent=1), encoding="utf-8")


def _print(figures: dict[str, Figures]) -> None:
    rows: dict[str, Callable[[Figures], str]] = {
        "from request to usable, s": lambda one: f"{statistics.median(one.usable_s):.2f}",
        "page, KB (compressed)": lambda one: f"{one.page_bytes / 1e3:.0f} ({one.page_gzip_bytes / 1e3:.0f})",
        "its configuration, KB": lambda one: f"{one.config_bytes / 1e3:.0f}",
        "another tab, s": lambda one: f"{statistics.median(one.tab_s):.2f}",
        "another preset, s": lambda one: f"{statistics.median(one.preset_s):.2f}",
    }
    print("\n| median | " + " | ".join(figures) + " |\n| --- |" + " --- |" * len(figures))
    for title, row in rows.items():
        print(f"| {title} | " + " | ".join(row(one) for one in figures.values()) + " |", flush=True)


if __name__ == "__main__":
    main()
