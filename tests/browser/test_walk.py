"""A person's way through the page, in Chromium, on a tiny model. One server; the tests go on from each other."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

import pytest
from playwright.sync_api import BrowserContext, expect

from tests.browser.conftest import PATIENCE_MS, Served, Tab, open_page
from trainer.files import REPOSITORY

pytestmark = pytest.mark.browser

expect.set_options(timeout=PATIENCE_MS)


def steps_done(tab: Tab) -> int:
    """The step that the bar names, once it does: between steps it tells of samples."""
    bar = tab.page.locator("#progress")
    expect(bar).to_contain_text("/ 5000")
    found = re.search(r"(\d+) / 5000", bar.inner_text())
    return int(found[1]) if found else steps_done(tab)


def test_settings_are_loaded_changed_saved_and_downloaded(served: Served, context: BrowserContext) -> None:
    tab = open_page(context, served)
    tab.load(served.folder / "tiny.json")
    assert tab.value("output_name") == "tiny"
    assert tab.value("train_data_dir") == str(served.folder / "img")
    tab.tab("Basic")
    assert tab.value("network_dim") == "2"
    tab.fill("network_dim", "3")
    saved = served.folder / "saved.json"
    tab.page.locator("#config-path input, #config-path textarea").fill(str(saved))
    tab.page.locator("#save").click()
    tab.page.locator("#report", has_text=f"saved {saved}").wait_for()
    config = json.loads(saved.read_text())
    assert config["network_dim"] == 3
    assert config["output_name"] == "tiny"
    with tab.page.expect_download() as download:
        tab.page.locator("#download").click()
    assert download.value.suggested_filename == "tiny.json"
    assert json.loads(download.value.path().read_text()) == config
    tab.page.locator("#upload input[type=file], input[type=file]").first.set_input_files(saved)
    tab.page.locator("#report", has_text="loaded saved.json").wait_for()
    assert tab.errors == []


def test_values_outside_the_lists_do_not_kill_the_page(served: Served, context: BrowserContext) -> None:
    tab = open_page(context, served)
    tab.load(served.folder / "odd.json")
    tab.page.locator("#report summary", has_text="unknown").click()
    assert "<img src=x" not in tab.page.locator("#report").inner_html()
    tab.tab("Basic")
    for name, value in (("caption_extension", ".txt2"), ("lr_scheduler", "wobbly"), ("network_dim", "1024")):
        assert tab.value(name) == value
    saved = served.folder / "odd-saved.json"
    tab.page.locator("#config-path input, #config-path textarea").fill(str(saved))
    tab.page.locator("#save").click()
    tab.page.locator("#report", has_text=f"saved {saved}").wait_for()
    written, given = json.loads(saved.read_text()), json.loads((served.folder / "odd.json").read_text())
    assert {name: written[name] for name in given} == given
    tab.tab("Train")
    tab.page.locator("#start").click()
    expect(tab.page.locator(".kiln-alert.failed")).to_contain_text("wobbly")
    none = str(served.folder / "<b>none</b> & 'x'.json")
    tab.page.locator("#config-path input, #config-path textarea").fill(none)
    tab.page.locator("#load").click()
    expect(tab.page.get_by_text(f"there is no file {none}")).to_be_visible()
    assert tab.errors == []


def test_a_preset_keeps_what_was_typed(served: Served, context: BrowserContext) -> None:
    tab = open_page(context, served)
    tab.load(served.folder / "tiny.json")
    tab.page.locator("#preset input").click()
    tab.page.get_by_role("option", name="SD 1.5 photo").click()
    tab.page.locator("#report", has_text="preset SD 1.5 photo").wait_for()
    assert tab.value("output_name") == "tiny"
    assert tab.value("train_data_dir") == str(served.folder / "img")
    assert tab.value("pretrained_model_name_or_path") == str(served.folder / "model.safetensors")
    tab.tab("Basic")
    photo = json.loads((REPOSITORY / "presets" / "sd15_photo.json").read_text())
    assert tab.value("network_dim") == str(photo["network_dim"]) != "2"
    assert tab.value("optimizer") == photo["optimizer"]
    assert tab.errors == []


def test_the_demo_is_filled_in(served: Served, context: BrowserContext) -> None:
    tab = open_page(context, served)
    tab.page.locator("#demo").click()
    expect(tab.page.get_by_role("tab", name="Train", exact=True)).to_have_attribute("aria-selected", "true")
    expect(tab.page.locator("#preset input")).to_have_value("Demo")
    tab.tab("Parameters")
    assert tab.value("train_data_dir") == "assets/demo/images"
    assert tab.errors == []


def test_a_run_from_start_to_stop(served: Served, context: BrowserContext) -> None:
    tab = open_page(context, served)
    page = tab.page
    tab.load(served.folder / "tiny.json")
    tab.tab("Train")
    expect(page.locator("#stop")).to_be_disabled()
    page.locator("#start").click()
    expect(page.locator("#start")).to_be_disabled()
    expect(page.locator(".kiln-progress")).to_be_visible()
    # Progress, log, chart, memory and a sample come by themselves.
    expect(page.locator("#progress")).to_contain_text("s a step")
    expect(page.locator("#log textarea")).to_have_value(re.compile(r"bucket 64x64: 15 with repeats"))
    expect(page.locator("#memory")).to_contain_text("GiB")
    expect(page.locator('#loss svg path[stroke="#c2410c"]').first).to_be_attached()
    expect(page.locator(".kiln-alert.warned")).to_contain_text("1 warning")
    picture = page.locator(".kiln-samples img").first
    expect(picture).to_be_visible()
    page.wait_for_function("document.querySelector('.kiln-samples img').naturalWidth === 64")
    assert picture.get_attribute("title") == "a <b>bold</b> cat"
    full = page.locator(".kiln-samples a").first.get_attribute("href")
    assert page.request.get(served.url.rstrip("/") + str(full)).headers["content-type"] == "image/png"
    assert tab.errors == []

    # A second page sees the same run, and a reload shows it again, on the tab where it is.
    before = steps_done(tab)
    second = open_page(context, served)
    for shown in (second, tab):
        if shown is tab:
            page.reload()
        expect(shown.page.locator(".kiln-progress")).to_be_visible()
        expect(shown.page.locator("#progress")).to_contain_text("/ 5000")
        expect(shown.page.locator(".kiln-samples img").first).to_be_visible()
        assert steps_done(shown) >= before > 0
        expect(shown.page.locator("#stop")).to_be_enabled()
    tab.errors.clear()  # of the connection that the reload cut

    page.locator("#stop").click()
    expect(page.locator("#stop")).to_have_text("Stopping …", timeout=10_000)
    for shown in (tab, second):
        expect(shown.page.locator(".kiln-alert.stopped")).to_contain_text("-state")
        expect(shown.page.locator("#progress")).to_contain_text("Stopped at step")
        expect(shown.page.locator("#start")).to_be_enabled()
        assert shown.errors == []
    out = served.folder / "out"
    assert len(list(out.glob("tiny-step*.safetensors"))) == 1
    assert len(list(out.glob("tiny-step*-state"))) == 1

    # Opened after the end, a page shows the end.
    late = open_page(context, served)
    late.tab("Train")
    expect(late.page.locator("#progress")).to_contain_text("Stopped at step")
    expect(late.page.locator(".kiln-samples img").first).to_be_visible()
    assert late.errors == []


def test_a_run_that_fails_says_why(served: Served, context: BrowserContext) -> None:
    tab = open_page(context, served)
    tab.load(served.folder / "tiny.json")
    missing = str(served.folder / "missing.safetensors")
    tab.fill("pretrained_model_name_or_path", missing)
    tab.page.keyboard.press("Enter")
    tab.tab("Train")
    tab.page.locator("#start").click()
    alert = tab.page.locator(".kiln-alert.failed")
    expect(alert).to_contain_text(f"{missing} does not exist")
    expect(tab.page.locator("#progress")).to_contain_text("Did not start")
    expect(tab.page.locator("#start")).to_be_enabled()
    assert tab.errors == []


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_phone_needs_no_scrolling_sideways(served: Served, context: BrowserContext, scheme: str) -> None:
    tab = open_page(context, served)
    tab.page.emulate_media(color_scheme=scheme)  # type: ignore[arg-type]
    tab.page.set_viewport_size({"width": 390, "height": 844})
    assert not tab.is_wider_than_the_screen()
    tab.tab("Train")
    expect(tab.page.locator("#start")).to_be_visible()
    assert not tab.is_wider_than_the_screen()
    assert tab.errors == []


@pytest.mark.skipif(os.name == "nt", reason="another process cannot be sent Ctrl-C there")
def test_an_interrupted_server_saves_the_run_first(served: Served, context: BrowserContext) -> None:
    tab = open_page(context, served)
    tab.load(served.folder / "tiny.json")
    tab.tab("Basic")
    tab.tab("Train")
    tab.page.locator("#start").click()
    expect(tab.page.locator("#progress")).to_contain_text("/ 5000")
    tab.page.goto("about:blank")
    assert served.interrupt() == 0
    output = served.output.read_text().splitlines()
    assert "(Ctrl-C ends it)" in output[0]
    assert output[1].startswith("stopping: the run finishes its step and saves")
    assert "stopped at step" in output[2]
    assert Path(output[2].partition("resume from ")[2]).is_dir()
    assert len(output) == 3, output
