"""A person's way through the page, in Chromium, on a tiny model. One server; the tests go on from each other."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from playwright.sync_api import Browser, BrowserContext, expect

from tests.browser.conftest import PATIENCE_MS, Served, Tab, open_page, serving
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
    page = tab.page
    tab.load(served.folder / "tiny.json")
    assert tab.value("output_name") == "tiny"
    assert tab.value("train_data_dir") == str(served.folder / "img")
    # The beginner's view has the few fields that one must look at, from all parts.
    expect(page.locator("#field-sample_prompts textarea")).to_be_visible()
    expect(page.locator("#field-network_dim")).to_be_hidden()
    tab.all_settings()
    tab.tab("Basic")
    assert tab.value("network_dim") == "2"
    tab.fill("network_dim", "3")
    config = tab.save(served.folder / "saved.json")
    assert config["network_dim"] == 3
    assert config["output_name"] == "tiny"
    with page.expect_download() as download:
        page.locator("#download").click()
    assert download.value.suggested_filename == "tiny.json"
    assert json.loads(download.value.path().read_text()) == config
    page.locator("#upload input[type=file], input[type=file]").first.set_input_files(
        served.folder / "saved.json"
    )
    page.locator("#report", has_text="loaded saved.json").wait_for()
    page.locator("#new").click()
    page.locator("#report", has_text="new: every setting").wait_for()
    assert tab.value("network_dim") == "8"
    # Opened by choosing on the server.
    tab.name(served.folder)
    page.locator("#open").click()
    page.locator("#kiln-dialog").get_by_role("button", name="saved.json").click()
    page.locator("#report", has_text="loaded").wait_for()
    expect(page.locator("#field-network_dim input").first).to_have_value("3")
    # Saved under a name of one's own, in a folder that is looked into first.
    page.locator("#save-as").click()
    dialog = page.locator("#kiln-dialog")
    dialog.get_by_label("File name").fill("other")
    dialog.get_by_role("button", name="Save", exact=True).click()
    page.locator("#report", has_text="other.json").wait_for()
    assert json.loads((served.folder / "other.json").read_text()) == config
    assert tab.errors == []


def test_changes_are_marked_reset_and_survive_a_reload(served: Served, context: BrowserContext) -> None:
    tab = open_page(context, served)
    page = tab.page
    tab.load(served.folder / "tiny.json")
    page.locator("#kiln-search").fill("min snr")
    page.locator("#kiln-found button").first.click()
    gamma = page.locator("#field-min_snr_gamma input")
    expect(gamma).to_be_focused()
    # By a name, by a label, and by words of the help alone.
    for words, name in (
        ("network_dim", "network_dim"),
        ("Network Rank", "network_dim"),
        ("counted from the end", "clip_skip"),
    ):
        page.locator("#kiln-search").fill(words)
        expect(page.locator("#kiln-found code", has_text=re.compile(f"^{name}$"))).to_be_visible()
    page.locator("#kiln-search").press("Escape")
    gamma.fill("5")
    expect(page.locator("#kiln-changes")).to_contain_text("1 change since tiny.json")
    tab.tab("Basic")
    tab.fill("epoch", "7")
    tab.fill("epoch", "8")
    expect(page.locator("#kiln-changes")).to_contain_text("2 changes")
    page.reload()
    page.wait_for_function("document.body.dataset.kiln === 'ready'")
    expect(page.locator("#kiln-changes")).to_contain_text("2 changes since tiny.json")
    tab.tab("Basic")
    assert tab.value("epoch") == "8"
    page.locator("#field-epoch .kiln-reset").click()
    expect(page.locator("#field-epoch input").first).to_have_value("1")
    page.locator("#kiln-changes summary").click()
    page.locator("#kiln-changes [data-reset=min_snr_gamma]").click()
    expect(page.locator("#kiln-changes")).to_be_hidden()
    # Fields come and go with family and LoRA type.
    expect(page.locator("#field-conv_dim")).to_be_hidden()
    kind = page.locator("#field-LoRA_type input").first
    kind.fill("Kohya LoCon")
    kind.press("Enter")
    expect(page.locator("#field-conv_dim")).to_be_visible()
    expect(page.locator("#section-basic-flux-1")).to_be_hidden()
    tab.tab("Model")
    page.locator("#field-v2 input").check()
    page.locator("#field-flux1_checkbox input").check()
    expect(page.locator("#field-v2 input")).not_to_be_checked()
    tab.tab("Basic")
    expect(page.locator("#section-basic-flux-1")).to_be_visible()
    tab.errors.clear()  # of the connection that the reload cut


def test_values_outside_the_lists_do_not_kill_the_page(served: Served, context: BrowserContext) -> None:
    tab = open_page(context, served)
    tab.load(served.folder / "odd.json")
    for kind in ("1 unknown (kept, and written back)", "3 outside the usual range", "not in the file"):
        expect(tab.page.locator("#report")).to_contain_text(kind)
    tab.page.locator("#report summary", has_text="unknown").click()
    assert "<img src=x" not in tab.page.locator("#report").inner_html()
    tab.all_settings()
    tab.tab("Basic")
    for name, value in (("caption_extension", ".txt2"), ("lr_scheduler", "wobbly"), ("network_dim", "1024")):
        assert tab.value(name) == value
    expect(tab.page.locator("#field-network_dim .kiln-outside")).to_be_visible()
    written = tab.save(served.folder / "odd-saved.json")
    given = json.loads((served.folder / "odd.json").read_text())
    assert {name: written[name] for name in given} == given
    old = {"caption_extention": ".txt", "use_8bit_adam": True, "epoch": "three", "block_lr": ""}
    (served.folder / "old.json").write_text(json.dumps(old))
    tab.load(served.folder / "old.json")
    for words in (
        "2 converted",
        "caption_extention is called caption_extension today",
        "1 invalid (the default is used)",
        'epoch cannot be "three"',
        "1 without effect here",
    ):
        expect(tab.page.locator("#report")).to_contain_text(words)
    tab.load(served.folder / "odd.json")
    # The checks say so before Start does.
    tab.tab("Train")
    expect(tab.page.locator("#checks .error")).to_contain_text(["wobbly"])
    tab.page.locator("#start").click()
    expect(tab.page.locator("#notices .kiln-alert.failed")).to_contain_text("wobbly")
    none = str(served.folder / "<b>none</b> & 'x'.json")
    tab.name(none)
    tab.page.locator("#load").click()
    expect(tab.page.get_by_text(f"there is no file {none}")).to_be_visible()
    assert tab.errors == []


def test_a_preset_of_each_family_keeps_what_was_typed(served: Served, context: BrowserContext) -> None:
    """Saved through the page, it is equal to its file, but for what was typed."""
    tab = open_page(context, served)
    tab.load(served.folder / "tiny.json")
    mine = json.loads((served.folder / "tiny.json").read_text())
    typed = {"output_name", "output_dir", "train_data_dir", "pretrained_model_name_or_path"}
    for title, name in (
        ("SD 1.5 photo", "sd15_photo"),
        ("SDXL 10gb", "sdxl_10gb"),
        ("FLUX 12gb", "flux_12gb"),
    ):
        tab.page.locator("#preset input").click()
        tab.page.get_by_role("option", name=title).click()
        tab.page.locator("#report", has_text=f"preset {title}").wait_for()
        assert tab.value("output_name") == "tiny"
        saved = tab.save(served.folder / f"laid-{name}.json")
        written = json.loads((REPOSITORY / "presets" / f"{name}.json").read_text())
        kept = {field for field in written if saved[field] != written[field]}
        assert kept == typed
        assert {field: saved[field] for field in kept} == {field: mine[field] for field in kept}
    assert tab.errors == []


def test_a_file_named_at_the_start_goes_before_an_older_draft(world: Path, context: BrowserContext) -> None:
    file = world / "named.json"
    file.write_text((world / "tiny.json").read_text())
    with serving(world, "--config", str(file), state="named") as named:
        first = open_page(context, named)
        expect(first.page.locator("#config-path input, #config-path textarea")).to_have_value(str(file))
        first.all_settings()
        first.tab("Basic")
        assert first.value("network_dim") == "2"
        first.fill("network_dim", "7")
        expect(first.page.locator("#kiln-changes")).to_contain_text("1 change since named.json")
        second = open_page(context, named)
        second.tab("Basic")
        assert second.value("network_dim") == "7"
        # What was kept when the server had not been told of the file, or when the file was another.
        older = "const kept = JSON.parse(localStorage['kiln-draft-']); kept.opened = 'an older one';"
        second.page.evaluate(f"() => {{ {older} localStorage['kiln-draft-'] = JSON.stringify(kept); }}")
        third = open_page(context, named)
        third.tab("Basic")
        assert third.value("network_dim") == "2"
        expect(third.page.locator("#kiln-changes")).not_to_contain_text("change since")
        third.fill("network_dim", "5")
        third.page.locator("#save").click()
        third.page.locator("#report", has_text=f"saved {file}").wait_for()
        assert json.loads(file.read_text())["network_dim"] == 5
        assert first.errors + second.errors + third.errors == []


def test_a_list_that_is_only_passed_changes_nothing(served: Served, context: BrowserContext) -> None:
    """gradio calls leaving a list its input; laid again, the preset would take back what was typed since.

    And Chromium's Tab key goes into an open list that scrolls, which then closes.
    """
    tab = open_page(context, served)
    page = tab.page
    for number in range(10):  # so many that the list of recent files scrolls
        tab.load(served.folder / "tiny.json")
        tab.save(served.folder / f"recent-{number}.json")
    tab.load(served.folder / "tiny.json")
    preset, recent = page.locator("#preset input"), page.locator("#recent input")
    preset.click()
    page.get_by_role("option", name="FLUX 8gb").click()
    page.locator("#report", has_text="preset FLUX 8gb").wait_for()
    tab.fill("sample_prompts", "abc")
    expect(page.locator("#kiln-changes")).to_contain_text("1 change since preset FLUX 8gb")
    preset.focus()
    page.keyboard.press("Tab")
    expect(recent).to_be_focused()
    page.keyboard.press("Tab")
    expect(page.locator("#config-path input, #config-path textarea")).to_be_focused()
    page.wait_for_timeout(1500)
    assert tab.value("sample_prompts") == "abc"
    # Chosen by the keys alone.
    recent.focus()
    page.keyboard.press("ArrowDown")
    page.keyboard.press("Enter")
    page.locator("#report", has_text="tiny.json").wait_for()
    expect(page.locator(".toast-body")).to_have_count(0)
    assert tab.value("sample_prompts") != "abc"
    preset.fill("SD 1.5 photo")
    page.keyboard.press("ArrowDown")
    page.keyboard.press("Enter")
    page.locator("#report", has_text="preset SD 1.5 photo").wait_for()
    assert tab.errors == []


def test_checks_lead_to_the_field_and_repair_it(served: Served, context: BrowserContext) -> None:
    tab = open_page(context, served)
    page = tab.page
    tab.load(served.folder / "tiny.json")
    tab.all_settings()
    page.locator("#field-sdxl input").check()
    tab.fill("train_data_dir", str(served.folder / "nowhere"))
    tab.tab("Train")
    expect(page.locator("#checks .error")).to_contain_text(["SD 1.x, but another", "nowhere"])
    page.locator("#checks").get_by_role("button", name="Set to SD 1.x").click()
    expect(page.locator("#field-sdxl input")).not_to_be_checked()
    tab.tab("Train")
    expect(page.locator("#checks .error")).to_have_count(1)
    page.locator("#checks .error [data-go]").click()
    expect(page.locator("#field-train_data_dir textarea, #field-train_data_dir input").first).to_be_focused()
    tab.fill("train_data_dir", str(served.folder / "img"))
    tab.tab("Train")
    expect(page.locator("#checks .kiln-ready")).to_contain_text("Ready")
    page.locator("#checks summary").click()
    expect(page.locator("#checks")).to_contain_text("3 pictures found, 15 with repeats")
    expect(page.locator("#checks")).to_contain_text("Buckets with repeats: 64x64: 15")
    expect(page.locator("#checks")).to_contain_text("max_train_steps = 5000")
    expect(page.locator("#checks")).to_contain_text("Memory plan")
    tab.tab("Captioning")
    expect(page.locator("#cap-summary")).to_contain_text("4 pictures, 1 without a caption file")
    tab.tab("Dataset")
    expect(page.locator("#dataset-grid figure")).to_have_count(4)  # the broken one is shown, as in Captioning
    page.get_by_role("button", name="What will training see?").click()
    expect(page.locator("#dataset-buckets")).to_contain_text("64 x 64")
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
    expect(page.locator("#start")).to_have_text("Add to the queue")
    expect(page.locator(".kiln-progress")).to_be_visible()
    # Progress, log, chart, memory and a sample come by themselves.
    expect(page.locator("#progress")).to_contain_text("s a step")
    expect(page.locator("#log textarea")).to_have_value(re.compile(r"bucket 64x64: 15 with repeats"))
    expect(page.locator("#memory")).to_contain_text("GiB")
    expect(page.locator("#loss .kiln-wide path.s0").first).to_be_attached()
    expect(page.locator(".kiln-alert.warned:not(.kiln-ready)")).to_contain_text("1 warning")
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

    # The network goes away for a while: the page says so, and goes on where it was.
    before = steps_done(tab)
    context.set_offline(True)
    expect(page.locator("#kiln-away")).to_contain_text("The program does not answer")
    context.set_offline(False)
    expect(page.locator("#kiln-away")).to_be_hidden()
    # Where an event was on its way, gradio loads the page again.
    expect(page.get_by_text("Connection to the server was lost")).to_have_count(0)
    expect(page.locator("#progress")).not_to_contain_text(f"{before} / 5000")
    tab.errors.clear()  # of the questions that the network lost
    second.errors.clear()

    # Save and Sample at once; the log can be searched; the command is shown.
    page.locator("#save-now").click()
    expect(page.locator("#log textarea")).to_have_value(re.compile(r"saved tiny-step\d+\.safetensors"))
    shown_before = page.locator(".kiln-samples img").count()
    page.locator("#sample-now").click()
    page.wait_for_function(f"document.querySelectorAll('.kiln-samples img').length > {shown_before}")
    page.locator("#kiln-log-search").fill("bucket")
    expect(page.locator("#kiln-log-count")).to_contain_text("hit")
    page.get_by_role("button", name="The same from the command line").click()
    expect(page.locator("#command-line")).to_contain_text("python -m trainer")

    page.locator("#stop").click()
    expect(page.locator("#stop")).to_have_text("Stopping …", timeout=10_000)
    for shown in (tab, second):
        expect(shown.page.locator(".kiln-alert.stopped")).to_contain_text("-state")
        expect(shown.page.locator("#progress")).to_contain_text("Stopped at step")
        expect(shown.page.locator("#start")).to_have_text("Start training")
        assert shown.errors == []
    out = served.folder / "out"
    assert len(list(out.glob("tiny-step*.safetensors"))) >= 1
    assert len(list(out.glob("tiny-step*-state"))) == 1

    # Opened after the end, a page shows the end.
    late = open_page(context, served)
    late.tab("Train")
    expect(late.page.locator("#progress")).to_contain_text("Stopped at step")
    expect(late.page.locator(".kiln-samples img").first).to_be_visible()
    late.tab("Review")
    expect(late.page.locator(".kiln-runs .stopped")).to_contain_text("tiny")
    assert late.errors == []


def test_a_run_that_fails_says_why(served: Served, context: BrowserContext) -> None:
    tab = open_page(context, served)
    tab.load(served.folder / "tiny.json")
    missing = str(served.folder / "missing.safetensors")
    tab.fill("pretrained_model_name_or_path", missing)
    tab.page.keyboard.press("Enter")
    tab.tab("Train")
    tab.page.locator("#start").click()
    alert = tab.page.locator("#notices .kiln-alert.failed")
    expect(alert).to_contain_text(f"{missing} does not exist")
    expect(tab.page.locator("#progress")).to_contain_text("Did not start")
    expect(tab.page.locator("#start")).to_be_enabled()
    assert tab.errors == []


def test_a_phone_needs_no_scrolling_sideways(served: Served, context: BrowserContext) -> None:
    """On any tab, light or dark; nor does anything that can be used lack a name for a screen reader."""
    tab = open_page(context, served)
    page = tab.page
    page.set_viewport_size({"width": 390, "height": 844})
    expect(page.locator("#bar")).to_be_hidden()
    page.locator("#kiln-bar-toggle").click()
    tab.load(served.folder / "tiny.json")

    def look(name: str, place: str) -> None:
        expect(page.locator(place).first).to_be_visible()
        for scheme in ("light", "dark"):
            page.emulate_media(color_scheme=scheme)
            assert not tab.is_wider_than_the_screen(), (name, scheme)
            assert tab.nameless() == [], (name, scheme)

    shown = {
        "Parameters": "#field-epoch",
        "Dataset": "#dataset-grid figure",
        "Captioning": "#cap-list li",
        "Train": "#start",
    }
    for name, place in shown.items():
        tab.tab(name)
        look(name, place)
    page.locator("#start").click()
    # Until the page hears of this run, it shows the samples of the one before.
    expect(page.locator("#progress")).to_contain_text("/ 5000")
    look("Train with a run", ".kiln-samples img")
    page.locator("#stop").click()
    expect(page.locator(".kiln-alert.stopped")).to_be_visible()
    tab.tab("Review")
    page.locator("#runs .stopped [data-review-run]").first.click()
    look("Review", "#review-run [data-pick]")
    assert tab.errors == []


@pytest.mark.skipif(os.name == "nt", reason="another process cannot be killed like that there")
def test_a_killed_server_comes_back_with_its_runs(
    served: Served, context: BrowserContext, browser: Browser
) -> None:
    """The next server names the run interrupted, resumes it from its state, and keeps what waited."""
    config = json.loads((served.folder / "tiny.json").read_text())
    often = {"save_every_n_steps": 3, "save_state": True, "output_name": "cut", "sample_every_n_steps": 0}
    (served.folder / "cut.json").write_text(json.dumps(config | often))
    tab = open_page(context, served)
    tab.load(served.folder / "cut.json")
    tab.tab("Train")
    tab.page.locator("#start").click()
    expect(tab.page.locator("#log textarea")).to_have_value(re.compile(r"saved cut-step\d+-state"))
    tab.page.locator("#start").click()
    expect(tab.page.locator("#queue")).to_contain_text("1 run waits")
    tab.load(served.folder / "tiny.json")
    tab.page.locator("#start").click()
    names = tab.page.locator("#queue li b")
    expect(names).to_have_text(["cut", "tiny"])
    tab.page.locator("#queue").get_by_role("button", name="Up", exact=True).click()
    expect(names).to_have_text(["tiny", "cut"])
    served.process.kill()
    served.process.wait()
    # The page that is open says so by itself, and is loaded again once the program is back.
    away = tab.page.locator("#kiln-away")
    expect(away).to_contain_text("The program does not answer")
    tab.tab("Review")
    tab.page.locator("#review-open [name=path]").fill(str(served.folder / "out"))
    tab.page.locator("[data-review-open]").click()
    expect(tab.page.locator("#review-answer")).to_contain_text("The program did not answer")
    with serving(served.folder, port=urlsplit(served.url).port or 0) as again:
        expect(away).to_be_hidden()
        tab.tab("Train")
        expect(tab.page.locator("#queue")).to_contain_text("2 runs wait since the program was started again")
        later = browser.new_context(viewport={"width": 1280, "height": 900})
        tab = open_page(later, again)
        page = tab.page
        tab.tab("Train")
        expect(page.locator("#notices")).to_contain_text("the program ended before this run did")
        expect(page.locator("#queue")).to_contain_text("2 runs wait since the program was started again")
        expect(page.locator("#queue li b")).to_have_text(["tiny", "cut"])
        page.locator("#notices [data-act]").click()
        expect(page.locator("#log textarea")).to_have_value(re.compile(r"resumed at step \d+ of 5000"))
        expect(page.locator("#progress")).to_contain_text("/ 5000")
        for left in ("cut", None):
            page.locator("#queue").get_by_role("button", name="Remove").first.click()
            expect(page.locator("#queue li b")).to_have_text([left] if left else [])
        assert tab.errors == []
        later.close()
        # Ctrl-C saves the run first.
        assert again.interrupt() == 0
        output = again.output.read_text().splitlines()
    assert "(Ctrl-C ends it)" in output[0]
    assert output[1].startswith("stopping: the run finishes its step and saves")
    assert "stopped at step" in output[2]
    assert Path(output[2].partition("resume from ")[2]).is_dir()
    assert len(output) == 3, output
