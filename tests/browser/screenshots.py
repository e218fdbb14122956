"""Take the pictures of the README: every tab, with a real run of the demo on Train.

    python -m tests.browser.screenshots [--folder assets/screenshots] [--steps 120] [--all]

With ``--all`` every tab is taken at desktop and phone width, in light and dark, to look for what is crude.
"""

from __future__ import annotations

import argparse
import io
import json
import sys
import tempfile
from pathlib import Path

from PIL import Image
from playwright.sync_api import Browser, Page, sync_playwright

from tests.browser.conftest import Served, open_page, serving
from tests.chromium import HOW_TO_GET_ONE, find_chromium
from trainer.files import REPOSITORY

DESKTOP, PHONE = (1280, 860), (390, 844)
TABS = ("Dataset", "Captioning", "Parameters", "Train", "Review", "Tools")


def shoot(page: Page, file: Path, *, whole: bool = False) -> None:
    """Save what is seen as WebP."""
    page.wait_for_timeout(700)  # pictures and charts are drawn
    with Image.open(io.BytesIO(page.screenshot(full_page=whole))) as picture:
        picture.convert("RGB").save(file, "WEBP", quality=82, method=6)
    print(file.name, f"{file.stat().st_size / 1e3:.0f} KB", flush=True)


def show(page: Page, tab: str) -> bool:
    """Turn to a tab, on a phone through its menu; False where there is none of that name."""
    found = page.locator("#tabs > .tab-wrapper .tab-container:not(.visually-hidden) button", has_text=tab)
    if not (found.count() and found.first.is_visible()):
        menu = page.locator("#tabs > .tab-wrapper .overflow-menu > button")
        if not (menu.count() and menu.is_visible()):
            return False
        menu.click()
        found = page.locator("#tabs > .tab-wrapper .overflow-dropdown button", has_text=tab)
        if not found.count():
            page.keyboard.press("Escape")
            return False
    found.first.click()
    page.mouse.move(5, 5)
    page.evaluate("scrollTo(0, 0)")
    return True


def walk(
    browser: Browser, served: Served, folder: Path, *, scheme: str, size: tuple[int, int], mark: str
) -> None:
    """All tabs as one kind of screen shows them."""
    context = browser.new_context(
        viewport={"width": size[0], "height": size[1]},
        color_scheme="dark" if scheme == "dark" else "light",
        device_scale_factor=1 if size == DESKTOP else 2,
    )
    page = open_page(context, served).page
    if scheme == "dark":
        page.goto(f"{served.url}?__theme=dark")
        page.wait_for_function("document.body.dataset.kiln === 'ready'")
    for tab in TABS:
        if show(page, tab):
            page.wait_for_timeout(1500)
            shoot(page, folder / f"{tab.lower()}{mark}.webp", whole=bool(mark))
            if tab == "Parameters" and mark:
                page.locator("#kiln-all").check()
                for part in ("Basic", "Advanced", "More"):
                    page.get_by_role("tab", name=part, exact=True).click()
                    page.wait_for_timeout(500)
                    shoot(page, folder / f"parameters-{part.lower()}{mark}.webp", whole=True)
                page.locator("#kiln-all").uncheck()
    context.close()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--folder", type=Path, default=REPOSITORY / "assets" / "screenshots")
    parser.add_argument("--steps", type=int, default=120, help="wait for this step of the demo")
    parser.add_argument("--all", action="store_true")
    options = parser.parse_args()
    chromium = find_chromium()
    if chromium is None:
        sys.exit(HOW_TO_GET_ONE)
    options.folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch, sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        config = json.loads((REPOSITORY / "presets" / "demo.json").read_text(encoding="utf-8"))
        every = max(options.steps // 3, 1)
        config |= {"output_dir": f"{scratch}/results", "logging_dir": "", "sample_every_n_steps": every}
        config |= {"additional_parameters": "--sample_at_first", "save_every_n_steps": every}
        for name in ("pretrained_model_name_or_path", "train_data_dir"):
            config[name] = str(REPOSITORY / config[name])
        file = Path(scratch) / "k1ln.json"
        file.write_text(json.dumps(config), encoding="utf-8")
        with serving(Path(scratch), "--config", str(file)) as served:
            context = browser.new_context(viewport={"width": DESKTOP[0], "height": DESKTOP[1]})
            tab = open_page(context, served)
            tab.tab("Train")
            tab.page.locator("#checks .kiln-ready").wait_for()
            tab.page.locator("#start").click()
            step = "Number((document.querySelector('#progress').innerText.match(/(\\d+) \\/ /) || [])[1])"
            tab.page.wait_for_function(f"(wanted) => {step} >= wanted", arg=options.steps, timeout=540_000)
            walk(browser, served, options.folder, scheme="light", size=DESKTOP, mark="")
            if options.all:
                for scheme in ("light", "dark"):
                    for size, kind in ((DESKTOP, "desktop"), (PHONE, "phone")):
                        walk(
                            browser,
                            served,
                            options.folder,
                            scheme=scheme,
                            size=size,
                            mark=f"-{kind}-{scheme}",
                        )
            tab.page.locator("#stop").click()
            tab.page.locator(".kiln-alert.stopped, .kiln-alert.done").first.wait_for()
            context.close()
        browser.close()


if __name__ == "__main__":
    main()
