"""Take pictures of every tab, with a real run of the demo, to look for what is crude.

    python -m tests.browser.screenshots FOLDER [--steps 450] [--only phone] [--docs]

Every tab at desktop and phone width, in light and dark, goes into FOLDER: Train while the run goes on, the
others once it has been stopped and judged. With ``--docs`` the few pictures of the README are written to assets/docs.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from PIL import Image
from playwright.sync_api import Browser, Page, sync_playwright

from tests.browser.conftest import Served, open_page, serving
from tests.chromium import HOW_TO_GET_ONE, find_chromium
from trainer.files import REPOSITORY

SCREENS = {"desktop": (1440, 900), "phone": (390, 844)}
SCHEMES = ("light", "dark")
PARTS = ("Model", "Basic", "Advanced", "Samples", "More")
DOCS = {
    "dataset-desktop-light": "page-dataset",
    "captioning-desktop-light": "page-captioning",
    "parameters-desktop-light": "page-parameters",
    "parameters-basic-desktop-light": "page-all-settings",
    "train-desktop-light": "page-train",
    "review-desktop-light": "page-review",
    "train-desktop-dark": "page-dark",
    "train-phone-light": "page-phone",
}
"""Pictures of the README by the shots that they are."""
LONGEST = {"desktop": 1100, "phone": 1700}
"""Height in px where a picture of the README is cut."""


def show(page: Page, tab: str) -> None:
    """Turn to a tab."""
    page.locator("#tabs > .tab-wrapper .tab-container:not(.visually-hidden) button", has_text=tab).click()
    page.mouse.move(5, 5)
    page.evaluate("scrollTo(0, 0)")


def shoot(page: Page, file: Path) -> None:
    """Save the whole page, and say so where it is wider than the screen."""
    page.wait_for_timeout(900)  # pictures and charts are drawn
    page.screenshot(path=file, full_page=True)
    wide = page.evaluate("document.documentElement.scrollWidth - window.innerWidth")
    print(file.name, f"is {wide} px too wide" if wide > 0 else "", flush=True)


@contextlib.contextmanager
def screen(browser: Browser, served: Served, kind: str, scheme: str) -> Iterator[Page]:
    """The page on one kind of screen; nothing that its console complains of goes unheard."""
    width, height = SCREENS[kind]
    context = browser.new_context(
        viewport={"width": width, "height": height},
        color_scheme="dark" if scheme == "dark" else "light",
    )
    tab = open_page(context, served)
    if scheme == "dark":
        tab.page.goto(f"{served.url}?__theme=dark")
        tab.page.wait_for_function("document.body.dataset.kiln === 'ready'")
    yield tab.page
    for error in tab.errors:
        print(f"console, {kind} {scheme}: {error}", flush=True)
    context.close()


def during(page: Page, folder: Path, mark: str) -> None:
    """What is shown while the run goes on."""
    show(page, "Train")
    page.locator("#samples img").first.wait_for()
    page.wait_for_timeout(2500)
    shoot(page, folder / f"train-{mark}.png")


def judge(page: Page) -> None:
    """Have the run judged by pictures that are drawn with each of its files."""
    show(page, "Review")
    page.locator("#runs [data-review-run]").first.click()
    page.locator("#review-run").get_by_role("button", name="Judge").click()
    signals = page.locator(".kiln-verdict", has_text="What is new to the base model")
    signals.wait_for(state="attached", timeout=540_000)
    print(page.locator(".kiln-verdict > p").first.inner_text(), flush=True)


def after(page: Page, folder: Path, mark: str) -> None:
    """The other tabs, with the pictures and the run in them."""
    show(page, "Dataset")
    page.locator("#dataset-grid figure img[src]").first.wait_for()
    page.wait_for_timeout(1500)
    shoot(page, folder / f"dataset-{mark}.png")
    show(page, "Captioning")
    look = page.locator("#look-captions")
    if look.is_visible() and page.locator("#cap-work").is_hidden():
        look.click()
    page.locator("#cap-list li").first.wait_for()
    page.wait_for_timeout(1000)
    shoot(page, folder / f"captioning-{mark}.png")
    show(page, "Parameters")
    shoot(page, folder / f"parameters-{mark}.png")
    page.locator("#kiln-all").check()
    for part in PARTS:
        page.get_by_role("tab", name=part, exact=True).click()
        shoot(page, folder / f"parameters-{part.lower()}-{mark}.png")
    page.locator("#kiln-all").uncheck()
    show(page, "Train")
    shoot(page, folder / f"train-stopped-{mark}.png")
    show(page, "Review")
    page.locator("#runs [data-review-run]").first.click()
    page.locator("#review-run [data-pick]").first.wait_for()
    page.evaluate("scrollTo(0, 0)")
    page.wait_for_timeout(1500)
    shoot(page, folder / f"review-{mark}.png")
    tools = page.locator("#file-tools > button")
    tools.click()
    page.locator("#tool-go").wait_for()
    shoot(page, folder / f"tools-{mark}.png")


def documented(folder: Path) -> None:
    """The pictures of the README, cut to a size that is read."""
    for shot, name in DOCS.items():
        if not (folder / f"{shot}.png").exists():
            sys.exit(f"error: {shot}.png is not there: take the pictures without --only")
        with Image.open(folder / f"{shot}.png") as picture:
            height = min(picture.height, LONGEST["phone" if "phone" in shot else "desktop"])
            file = REPOSITORY / "assets" / "docs" / f"{name}.webp"
            cut = picture.convert("RGB").crop((0, 0, picture.width, height))
            cut.save(file, "WEBP", quality=82, method=6)
        print(file.name, f"{file.stat().st_size / 1e3:.0f} KB", flush=True)


def settings(scratch: Path, steps: int) -> Path:
    """The demo's settings over a copy of its pictures, which a person may edit."""
    pictures = scratch / "pictures"
    shutil.copytree(REPOSITORY / "assets" / "demo" / "images", pictures)
    config = json.loads((REPOSITORY / "presets" / "demo.json").read_text(encoding="utf-8"))
    every = max(steps // 3, 1)
    config |= {"output_dir": str(scratch / "results"), "logging_dir": "", "train_data_dir": str(pictures)}
    config |= {"sample_every_n_steps": every, "save_every_n_steps": every}
    config |= {"additional_parameters": "--sample_at_first"}
    config["pretrained_model_name_or_path"] = str(REPOSITORY / config["pretrained_model_name_or_path"])
    file = scratch / "k1ln.json"
    file.write_text(json.dumps(config), encoding="utf-8")
    return file


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--steps", type=int, default=450, help="wait for this step of the demo")
    parser.add_argument(
        "--only", default="", help="part of desktop-light, phone-light, desktop-dark, phone-dark"
    )
    parser.add_argument("--docs", action="store_true", help="write the pictures of the README too")
    options = parser.parse_args()
    chromium = find_chromium()
    if chromium is None:
        sys.exit(HOW_TO_GET_ONE)
    options.folder.mkdir(parents=True, exist_ok=True)
    kinds = [(kind, scheme) for scheme in SCHEMES for kind in SCREENS if options.only in f"{kind}-{scheme}"]
    with tempfile.TemporaryDirectory() as scratch, sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        file = settings(Path(scratch), options.steps)
        with serving(Path(scratch), "--config", str(file)) as served:
            with screen(browser, served, "desktop", "light") as page:
                show(page, "Train")
                page.locator("#checks .kiln-ready").wait_for()
                shoot(page, options.folder / "train-ready-desktop-light.png")
                page.locator("#start").click()
                step = "Number((document.querySelector('#progress').innerText.match(/(\\d+) \\/ /) || [])[1])"
                page.wait_for_function(f"(wanted) => {step} >= wanted", arg=options.steps, timeout=540_000)
            for kind, scheme in kinds:
                with screen(browser, served, kind, scheme) as page:
                    during(page, options.folder, f"{kind}-{scheme}")
            with screen(browser, served, "desktop", "light") as page:
                show(page, "Train")
                page.locator("#stop").click()
                page.locator(".kiln-alert.stopped, .kiln-alert.done").first.wait_for()
                judge(page)
            for kind, scheme in kinds:
                with screen(browser, served, kind, scheme) as page:
                    after(page, options.folder, f"{kind}-{scheme}")
        browser.close()
    if options.docs:
        documented(options.folder)


if __name__ == "__main__":
    main()
