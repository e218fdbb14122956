"""The guide as a person walks it, and two people at one server."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from playwright.sync_api import Browser, BrowserContext, expect

from tests.browser.conftest import PATIENCE_MS, Served, open_page, serving

pytestmark = pytest.mark.browser

expect.set_options(timeout=PATIENCE_MS)


def test_the_guide_from_an_empty_page_to_a_resumed_run(served: Served, context: BrowserContext) -> None:
    """The demo's model and pictures, the settings that must be set, samples, and on from the results folder."""
    results = served.folder / "guide"
    tab = open_page(context, served)
    page = tab.page
    page.locator("#demo").click()
    expect(page.get_by_role("tab", name="Train", exact=True)).to_have_attribute("aria-selected", "true")
    expect(page.locator("#preset input")).to_have_value("Demo")
    tab.tab("Parameters")
    assert tab.value("train_data_dir") == "assets/demo/images"
    tab.fill("output_dir", str(results))
    tab.fill("output_name", "guide")
    tab.fill("sample_prompts", "k1ln person --w 64 --h 64 --s 2 --d 1")
    tab.all_settings()
    tab.fill("logging_dir", "")
    page.locator("#kiln-search").fill("sample every n steps")
    page.locator("#kiln-found button").first.click()
    expect(page.locator("#field-sample_every_n_steps input")).to_be_focused()
    tab.fill("sample_every_n_steps", "2")
    tab.tab("Train")
    expect(page.locator("#checks .kiln-ready")).to_contain_text("Ready")
    page.locator("#start").click()
    expect(page.locator(".kiln-samples img").first).to_be_visible()
    page.locator("#stop").click()
    expect(page.locator("#progress")).to_contain_text("Stopped at step")
    # Undertrained; the program was closed. The JSON in the results folder brings everything back.
    page.locator("#new").click()
    page.locator("#report", has_text="new: every setting").wait_for()
    tab.name(results)
    page.locator("#open").click()
    page.locator("#kiln-dialog").get_by_role("button", name=re.compile(r"^guide_.*\.json$")).click()
    page.locator("#report").get_by_role("button", name=re.compile("Resume from guide-step.*-state")).click()
    tab.tab("Model")
    assert tab.value("train_data_dir") == "assets/demo/images"
    tab.tab("Train")
    expect(page.locator("#checks .kiln-ready")).to_contain_text("Ready")
    page.locator("#start").click()
    expect(page.locator("#log textarea")).to_have_value(re.compile(r"resumed at step \d+ of 600"))
    expect(page.locator("#progress")).to_contain_text("/ 600")
    page.locator("#stop").click()
    expect(page.locator("#progress")).to_contain_text("Stopped at step")
    assert tab.errors == []


def test_two_people_see_one_run_which_its_owner_stops(world: Path, browser: Browser) -> None:
    users = world / "users.txt"
    users.write_text("root:one\nann:two\nbob:three\n")
    flags = ("--listen", "--auth", f"@{users}", "--root", f"w={world}")
    with serving(world, *flags, state="lan") as lan:
        contexts = [browser.new_context(viewport={"width": 1280, "height": 900}) for _ in range(2)]
        ann = open_page(contexts[0], lan, ("ann", "two"))
        bob = open_page(contexts[1], lan, ("bob", "three"))
        ann.name("w/tiny.json")
        ann.page.locator("#load").click()
        ann.page.locator("#report", has_text="loaded").wait_for()
        ann.tab("Train")
        ann.page.locator("#start").click()
        bob.tab("Train")
        for tab in (ann, bob):
            expect(tab.page.locator("#progress")).to_contain_text("started by ann")
            expect(tab.page.locator("#progress")).to_contain_text("/ 5000")
        bob.page.locator("#stop").click()
        expect(bob.page.locator("#notices")).to_contain_text("this run was started by ann")
        expect(bob.page.locator("#stop")).to_be_enabled()
        expect(ann.page.locator("#progress")).to_contain_text("/ 5000")
        # Bob's wait in the same queue; nothing outside the root is opened for him.
        bob.name("/etc/passwd")
        bob.page.locator("#load").click()
        expect(bob.page.get_by_text("/etc/passwd is outside the folders of this server")).to_be_visible()
        # What is said covers nothing of the page's head.
        assert bob.page.locator("#logout").evaluate(
            """link => {
                const { x, y, width, height } = link.getBoundingClientRect();
                return document.elementFromPoint(x + width / 2, y + height / 2) === link;
            }"""
        )
        ann.page.locator("#stop").click()
        for tab in (ann, bob):
            expect(tab.page.locator("#progress")).to_contain_text("Stopped at step")
            assert tab.errors == []
        # Log and command can be copied, by browsers that give a clipboard and by those that give a LAN's pages none.
        contexts[0].grant_permissions(["clipboard-read", "clipboard-write"])
        bob.page.evaluate("delete Navigator.prototype.clipboard")
        assert bob.page.evaluate("navigator.clipboard") is None
        for tab in (ann, bob):
            search = tab.page.locator("#kiln-log-search")
            copy = tab.page.locator("[data-copy=log]")
            copy.click()
            expect(copy).to_have_text("Copied")
            expect(copy).to_have_text("Copy")
            search.press("Control+V")
            expect(search).to_have_value(re.compile("bucket 64x64: 15 with repeats.*stopped at step"))
        bob.page.locator("#logout").click()
        expect(bob.page.get_by_role("button", name="Login")).to_be_visible()
        for context in contexts:
            context.close()
