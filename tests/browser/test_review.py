"""From a finished run to a kept file and a continued run, in Chromium, on a tiny model."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest
from playwright.sync_api import BrowserContext, expect

from tests.browser.conftest import PATIENCE_MS, Served, Tab, open_page
from tests.review.test_verdict import BASE, point
from trainer.files import REPOSITORY
from trainer.review.measure import Measures, measures_file, write_measures
from trainer.review.run_folder import open_run, read_header

pytestmark = pytest.mark.browser

expect.set_options(timeout=PATIENCE_MS)


def train(tab: Tab, result: Path) -> None:
    """Train what the page holds to its end, which leaves a file behind."""
    page = tab.page
    expect(page.locator("#checks .kiln-checks, #checks .kiln-ready").first).to_be_visible()
    page.locator("#start").click()
    end = time.monotonic() + PATIENCE_MS / 1000
    while not result.exists():
        assert time.monotonic() < end
        page.wait_for_timeout(200)
    expect(page.locator("#progress")).to_contain_text("Finished in")


def judged(folder: Path, learnt: Mapping[str, float]) -> None:
    """As if the run had been measured: the share of the base model's loss that each file took away."""
    run = open_run(folder)
    points = (
        replace(point(run.checkpoint(name).step, share), file=name, pictures={})
        for name, share in learnt.items()
    )
    write_measures(measures_file(run), Measures(base=BASE, points=tuple(points), trigger="cat"))


def test_from_a_finished_run_to_a_kept_file_and_a_continued_run(
    served: Served, context: BrowserContext
) -> None:
    config = json.loads((served.folder / "tiny.json").read_text())
    out = served.folder / "review"
    config |= {
        "max_train_steps": 8,
        "sample_every_n_steps": 4,
        "save_every_n_steps": 4,
        "output_dir": str(out),
    }
    config["sample_prompts"] = "a <b>bold</b> cat --w 64 --h 64 --s 1 --d 1\na dog --w 64 --h 64 --s 1 --d 2"
    (served.folder / "review.json").write_text(json.dumps(config))
    models = served.folder / "models" / "Lora"
    models.mkdir(parents=True)
    tab = open_page(context, served)
    page = tab.page
    tab.load(served.folder / "review.json")
    tab.tab("Train")
    train(tab, out / "tiny.safetensors")

    # The checks hear of its file when it ends, and of what other programs do when the window comes back.
    taken = "a run under this name replaces it"
    expect(page.locator("#checks")).to_contain_text(taken)
    elsewhere = (out / "tiny.safetensors").rename(served.folder / "elsewhere.safetensors")
    page.evaluate("window.dispatchEvent(new Event('focus'))")
    expect(page.locator("#checks")).not_to_contain_text(taken)
    elsewhere.rename(out / "tiny.safetensors")

    # The run is looked at: a row for each prompt, a column for each step.
    tab.tab("Review")
    page.locator("#runs [data-review-run]").first.click()
    pictures = page.locator(".kiln-timeline [data-pick]")
    expect(pictures).to_have_count(6)
    expect(page.locator("#review-samples thead th")).to_contain_text(["Before training", "Step 4", "Step 8"])
    expect(page.locator("#review-samples tbody th").first).to_contain_text("a <b>bold</b> cat")
    for image in page.locator(".kiln-timeline img").all():
        expect(image).to_have_js_property("complete", True)
        assert image.evaluate("image => image.naturalWidth") == 64
    expect(page.locator("#review-run .kiln-chart[role=img]")).to_have_count(2)

    # Two pictures are compared: by mouse, by keyboard, by the sliders.
    left, right = page.locator("[data-label=left]"), page.locator("[data-label=right]")
    expect(left).to_contain_text("Step 0: a <b>bold</b> cat")
    expect(right).to_contain_text("Step 8")
    pictures.nth(1).click()
    expect(left).to_contain_text("Step 4")
    page.keyboard.press("ArrowDown")
    expect(pictures.nth(4)).to_be_focused()
    page.keyboard.press("Enter")
    expect(right).to_contain_text("Step 4: a dog")
    stage = page.locator(".kiln-compare .stage")
    page.locator("[data-compare=cut]").press("End")
    expect(stage).to_have_css("--cut", "100%")
    page.locator("[data-compare=zoom]").fill("3")
    scales = page.locator(".kiln-compare .side img").evaluate_all(
        "images => images.map((image) => new DOMMatrix(getComputedStyle(image).transform).a)"
    )
    assert scales == [3, 3]

    # The verdict's file is chosen, and follows a new verdict until a person has chosen.
    chosen = page.locator("#review-form [name=file]:checked")
    judged(out, {"tiny-step00000004.safetensors": 0.9, "tiny.safetensors": 0.0})
    expect(page.locator(".kiln-verdict h4")).to_contain_text("Undertrained")
    expect(chosen).to_have_value("tiny-step00000004.safetensors")
    judged(out, {"tiny-step00000004.safetensors": 0.0, "tiny.safetensors": 0.9})
    expect(page.locator(".kiln-verdict h4")).to_contain_text("Good")
    expect(chosen).to_have_value("tiny.safetensors")
    page.locator("#review-samples thead label", has_text="tiny-step00000004").first.click()
    judged(out, {"tiny-step00000004.safetensors": 0.9, "tiny.safetensors": 0.0})
    expect(page.locator(".kiln-verdict h4")).to_contain_text("Undertrained")
    judged(out, {"tiny-step00000004.safetensors": 0.0, "tiny.safetensors": 0.9})
    expect(page.locator(".kiln-verdict h4")).to_contain_text("Good")
    expect(chosen).to_have_value("tiny-step00000004.safetensors")

    # It is judged on the page: what is said of the queue goes when the verdict is there.
    page.get_by_role("button", name="Judge again").click()
    expect(page.locator("#review-answer")).to_contain_text("queue")
    expect(page.locator(".kiln-verdict")).to_contain_text("What is new to the base model")
    expect(page.locator("#review-answer")).to_have_text("")

    # A prompt is tried with the chosen file.
    form = page.locator("#review-form")
    form.locator("[name=prompts]").fill("a cow --w 64 --h 64 --s 1\na horse")
    page.get_by_role("button", name="Try the first prompt with the chosen file").click()
    tried = page.locator(".kiln-grid")
    expect(tried.locator("[data-pick]")).to_have_count(1)
    expect(tried).to_contain_text("a cow")
    expect(tried.locator("thead")).to_contain_text("tiny-step00000004")

    # A grid, as a job of the queue: the base model and one file at two strengths.
    for box in form.locator("[name=files]").all():
        box.set_checked(box.get_attribute("value") == "tiny.safetensors")
    form.locator("[name=prompts]").fill("a bird --w 64 --h 64 --s 1")
    form.locator("[name=strengths]").fill("0.6, 1.2")
    form.locator("[name=seeds]").fill("3 4")
    page.get_by_role("button", name="Draw the grid").click()
    grid = page.locator(".kiln-grid", has_text="Grid of 6 pictures")
    expect(grid.locator("[data-pick]")).to_have_count(6)
    expect(grid.locator("thead")).to_contain_text("Base model")
    # Two grids' pictures, and each whole with its labels.
    assert len(list((out / "txt2img-images").glob("*.png"))) == 9
    # What had been typed is still there.
    expect(form.locator("[name=strengths]")).to_have_value("0.6, 1.2")

    # The file of step 4 is chosen by its name under the step, kept, and copied.
    page.locator("#review-samples thead label", has_text="tiny-step00000004").first.click()
    form.locator("[name=final_name]").fill("cat lora")
    form.locator("[name=copy_to]").fill(str(models))
    form.locator("[name=alone]").check()
    page.get_by_role("button", name="Keep", exact=True).click()
    expect(page.locator(".kiln-alert.done", has_text="<lora:cat lora:0.8>")).to_be_visible()
    assert [path.name for path in out.glob("*.safetensors")] == ["cat lora.safetensors"]
    assert read_header(models / "cat lora.safetensors")["ss_steps"] == "4"
    # The others lie in the trash; once they are back, the step of each is known as before.
    assert "tiny.safetensors" in [path.name for path in (out / "trash").iterdir()]
    page.get_by_role("button", name="Bring them back").click()
    expect(page.locator(".kiln-files tr", has_text="tiny.safetensors")).to_contain_text("step 8")
    assert list((out / "trash").iterdir()) == []
    expect(page.locator(".kiln-files tr")).to_have_count(len(list(out.glob("*.safetensors"))))
    page.locator(".kiln-files label", has_text="cat lora").first.click()

    with page.expect_download() as download:
        page.get_by_role("button", name="Save a report").click()
    assert str(served.folder) not in Path(download.value.path()).read_text(encoding="utf-8")

    # It is trained on: settings are filled in, steps are counted on.
    form.locator("[name=epochs]").fill("1")
    page.get_by_role("button", name="Train the chosen file on").click()
    expect(page.locator("#kiln-answer")).to_contain_text("goes on from cat lora.safetensors, step 4")
    expect(page.get_by_role("tab", name="Train", exact=True)).to_have_attribute("aria-selected", "true")
    train(tab, out / "tiny-2.safetensors")
    expect(page.locator("#log textarea")).to_have_value(re.compile(r"steps are counted on from 4"))
    last = read_header(out / "tiny-2.safetensors")
    assert int(last["ss_steps"]) == 4 + int(last["ss_max_train_steps"])
    tab.tab("Review")
    page.locator("#runs [data-review-run]").first.click()
    expect(page.locator(".kiln-review h3")).to_have_text("tiny-2")
    expect(page.locator("#review-samples thead th b").first).to_have_text("Step 4")
    # Its charts show what was trained before, too.
    loss = page.locator("#review-run .kiln-chart[role=img]").first
    expect(loss).to_have_attribute("data-first", "1")
    expect(loss).to_contain_text("goes on from step 4")

    # Another window, in which Train was never open: what is said comes to where a person looks.
    other = open_page(context, served)
    other.tab("Review")
    other.page.locator("#runs [data-act]", has_text="Show on Train").first.click()
    expect(other.page.locator("#review-answer")).to_contain_text("tiny-2 is shown on Train")
    other.page.locator("#review-open [name=path]").fill(str(out))
    other.page.locator("[data-review-open]").click()
    other.page.get_by_role("button", name="Train again from the start").click()
    expect(other.page.locator("#kiln-answer")).to_contain_text("begins again: press Start")
    assert other.errors == []
    other.page.close()

    # On a phone, in another language, in the dark.
    page.set_viewport_size({"width": 390, "height": 844})
    assert not tab.is_wider_than_the_screen()
    spanish = json.loads((REPOSITORY / "assets" / "languages" / "es.json").read_text(encoding="utf-8"))
    page.locator("#kiln-language").select_option("es")
    expect(page.locator(".kiln-review h4", has_text=spanish["Charts"])).to_be_visible()
    assert tab.errors == []
