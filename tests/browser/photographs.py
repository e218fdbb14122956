"""Walk the guide in a browser on real photographs, from dropped files to a run that trains, with pictures of each step.

    python -m tests.browser.photographs SHOTS --photos FOLDER --tagger FOLDER [--face astronaut.png] [--cutouts FOLDER]

FOLDER of ``--photos`` holds photographs, such as ``skimage/data`` of the package scikit-image and the samples of
Debian's opencv-doc; ``--face`` names one with a face. The tagger is one in WD14's layout:
`tests.benchmarks.captioner_tagger` makes one of a real classifier. ``--cutouts`` names PNG files with transparency
and captions beside them, such as the birds of Debian's tuxpaint-stamps-default: a second project trains their opaque
part. What trains is the demo's model at 128 px. Every step is asserted; what the page says is printed.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import sys
import tempfile
import zipfile
from pathlib import Path

from playwright.sync_api import expect, sync_playwright

from tests.browser.conftest import PATIENCE_MS, Tab, open_page, serving
from tests.chromium import HOW_TO_GET_ONE, find_chromium
from tests.pictures.test_importing import huge_png
from trainer.files import REPOSITORY

NAME, CLASS = "My Album", "things"
REFUSED = {
    "drawing.svg": "SVG",
    "empty.png": "empty",
    "half.jpg": "damaged or incomplete",
    "program.png": "no PNG, JPEG",
    "huge.png": "million pixels",
    "bomb.zip": "which no album of pictures does",
    "../outside.png": "leads out of the ZIP",
}
"""Files of strangers that are dropped along, and a part of what is said of each."""


def strangers(folder: Path, photo: Path) -> list[Path]:
    """The files of `REFUSED`."""
    folder.mkdir()
    content = photo.read_bytes()
    (folder / "drawing.svg").write_text("<svg xmlns='http://www.w3.org/2000/svg'/>")
    (folder / "empty.png").write_bytes(b"")
    (folder / "half.jpg").write_bytes(content[: len(content) // 2])
    (folder / "program.png").write_bytes(b"MZ\x90 a program")
    (folder / "huge.png").write_bytes(huge_png())
    with zipfile.ZipFile(folder / "bomb.zip", "w", zipfile.ZIP_DEFLATED) as made:
        made.writestr("a.png", bytes(64 * 2**20))
    with zipfile.ZipFile(folder / "album.zip", "w") as made:
        made.writestr("../outside.png", content)
    return sorted(folder.iterdir())


class Walk:
    """A tab, and where its pictures go."""

    def __init__(self, tab: Tab, shots: Path) -> None:
        self.tab, self.page, self.shots, self.count = tab, tab.page, shots, 0

    def say(self, *words: object) -> None:
        print("   ", *(" | ".join(str(word).split("\n")) for word in words), flush=True)

    def shot(self, name: str) -> None:
        """Take a picture of the whole page, which must not be wider than the screen."""
        self.count += 1
        self.page.wait_for_timeout(900)
        self.page.screenshot(path=self.shots / f"{self.count:02}-{name}.png", full_page=True)
        print(f"{self.count:02}-{name}", flush=True)
        assert not self.tab.is_wider_than_the_screen(), name

    def press(self, name: str) -> None:
        self.page.get_by_role("button", name=name, exact=True).click()


def dataset(walk: Walk, place: Path, dropped: list[Path], face: str) -> None:
    """A project, the drop, checks, a crop around the face, what training sees."""
    page, answer = walk.page, walk.page.locator("#dataset-answer")
    walk.tab.tab("Dataset")
    page.locator("#dataset-new summary").click()
    form = page.locator("#dataset-project")
    form.locator("[name=name]").fill(NAME)
    walk.press("Propose a token")
    expect(page.locator("#dataset-token-words")).to_contain_text("is rare")
    walk.say(page.locator("#dataset-token-words").inner_text())
    form.locator("[name=class]").fill(CLASS)
    form.locator("[name=place]").fill(str(place))
    walk.shot("new-project")
    walk.press("Make the project")
    expect(answer).to_contain_text("settings are filled in")
    walk.tab.drop("#dataset-drop", dropped)
    expect(answer).to_contain_text("brought in")
    walk.say(answer.inner_text(), page.locator("#dataset-refused").inner_text())
    for name, words in REFUSED.items():
        expect(page.locator("#dataset-refused li").filter(has_text=name)).to_contain_text(words)
    expect(page.locator("#dataset-grid figure img[src]").first).to_be_visible()
    walk.shot("brought-in")
    page.locator("#dataset-grid .kiln-set button").click()  # the repeats for 400 an epoch
    expect(page.locator("#dataset-grid .kiln-set button")).to_have_count(0)
    walk.say(page.locator("#dataset-grid .kiln-set").inner_text())
    page.locator("#dataset-person").uncheck()
    walk.press("Check the pictures")
    expect(page.locator("#dataset-findings")).to_contain_text("pictures checked")
    walk.say(page.locator("#dataset-findings").inner_text())
    walk.press("Is one mirrored?")
    expect(page.locator("#dataset-mirrored")).not_to_be_empty()
    walk.say(page.locator("#dataset-mirrored").inner_text())
    walk.shot("checked")
    page.locator("#dataset-grid figure", has_text=face).dblclick()
    expect(page.locator("#dataset-crop .stage img")).to_be_visible()
    walk.press("Around the face")
    size = page.locator("#dataset-crop-size").inner_text()
    walk.press("Nearest bucket")
    walk.say(
        "around the face", size, "in the shape of a bucket", page.locator("#dataset-crop-size").inner_text()
    )
    walk.shot("crop")
    page.locator("#dataset-crop").get_by_role("button", name="Crop", exact=True).click()
    expect(page.locator("#dataset-grid figure", has_text=face)).to_contain_text("cropped")
    walk.press("What will training see?")
    expect(page.locator("#dataset-buckets")).to_contain_text("an epoch")
    walk.say(page.locator("#dataset-buckets").inner_text())
    walk.shot("buckets")


def captioning(walk: Walk, tagger: Path) -> None:
    """The tagger in the queue, a caption by hand, a change of many, a mask."""
    page = walk.page
    walk.tab.tab("Captioning")
    expect(page.locator("#cap-summary")).to_contain_text("without a caption file")
    if page.locator("#cap-writer").get_attribute("open") is None:
        page.locator("#cap-writer > summary").click()
    page.locator("#cap-captioner").select_option("wd14")
    page.locator("#cap-model").fill(str(tagger))
    page.get_by_label("General threshold").fill("0.1")
    page.locator("#cap-prefix").fill("my4lbum,")
    walk.shot("tagger")
    page.locator("#cap-start").click()
    expect(page.locator("#cap-summary")).to_contain_text(" 0 without")
    expect(page.locator("#cap-progress")).to_contain_text("captions written")
    walk.say(page.locator("#cap-progress").inner_text())
    for row in page.locator("#cap-list li").all():
        walk.say(row.inner_text())
    walk.shot("tagged")
    page.locator("#cap-writer > summary").click()
    text = page.locator("#cap-text")
    name = page.locator("#cap-name").inner_text()
    text.fill(f"{text.input_value()} with a microphone in his hand")
    text.press("Alt+ArrowDown")
    expect(page.locator("#cap-name")).not_to_have_text(name)
    text.press("Alt+ArrowUp")
    expect(page.locator("#cap-name")).to_have_text(name)
    expect(page.locator("#cap-flags")).to_contain_text("microphone")
    page.locator("#cap-history > summary").click()
    for title in ("Tags", "Find and replace", "Habits of captioners"):
        page.locator("#cap-tools summary").get_by_text(title, exact=True).click()
    walk.shot("caption-edited")
    page.locator("#cap-unhabit").click()
    expect(page.locator("#cap-plan del")).to_contain_text("microphone")
    page.locator("#cap-apply").click()
    expect(page.locator("#cap-answer")).to_contain_text("caption")
    page.get_by_role("textbox", name="Find", exact=True).fill("my4lbum,")
    page.get_by_role("textbox", name="Replace with").fill("my4lbum things,")
    page.locator("#cap-replace").click()
    expect(page.locator("#cap-plan h4")).to_contain_text("captions would change")
    walk.shot("caption-preview")
    page.locator("#cap-apply").click()
    expect(page.locator("#cap-answer")).to_contain_text("replaced")
    page.locator("#cap-paint").click()
    box = page.locator("#cap-mask").bounding_box()
    assert box is not None
    page.locator("#cap-brush-size").fill("120")
    page.mouse.move(box["x"] + 0.5 * box["width"], box["y"] + 0.3 * box["height"])
    page.mouse.down()
    page.mouse.move(box["x"] + 0.5 * box["width"], box["y"] + 0.7 * box["height"], steps=8)
    page.mouse.up()
    walk.shot("mask")
    walk.press("Save the mask")
    expect(page.locator("#cap-mask-words")).to_contain_text("switch masked_loss on")
    walk.press("Switch it on")
    expect(page.locator("#cap-mask-words")).to_contain_text("Training counts the bright part only")
    walk.shot("masked")


def train(walk: Walk) -> None:
    """The settings that the project filled in, Ready, Start, a sample, Stop."""
    page = walk.page
    walk.tab.tab("Parameters")
    walk.say(walk.tab.value("train_data_dir"), walk.tab.value("output_name"))
    walk.shot("parameters")
    walk.tab.tab("Train")
    expect(page.locator("#checks .kiln-ready")).to_contain_text("Ready")
    walk.say(page.locator("#checks").inner_text())
    walk.shot("ready")
    page.locator("#start").click()
    expect(page.locator(".kiln-samples img").first).to_be_visible()
    expect(page.locator("#progress")).to_contain_text(re.compile(r"[1-9]\d* / 600"))
    page.wait_for_timeout(8000)
    walk.say(page.locator("#progress").inner_text())
    walk.shot("training")
    page.locator("#stop").click()
    expect(page.locator("#progress")).to_contain_text("Stopped at step")
    walk.say(page.locator("#notices").inner_text())
    walk.shot("stopped")


def cutouts(walk: Walk, place: Path, folder: Path) -> None:
    """A project of pictures that bring captions and transparency along, which becomes their loss mask."""
    page, answer = walk.page, walk.page.locator("#dataset-answer")
    count = len(list(folder.glob("*.png")))
    walk.tab.tab("Dataset")
    page.locator("#dataset-new summary").click()
    form = page.locator("#dataset-project")
    for name, text in (("token", "b1rd5"), ("class", "bird"), ("place", str(place)), ("repeats", "11")):
        form.locator(f"[name={name}]").fill(text)
    walk.press("Make the project")
    expect(answer).to_contain_text("settings are filled in")
    walk.tab.drop("#dataset-drop", [folder])
    expect(answer).to_contain_text(f"{count} pictures brought in, {count} with captions")
    walk.say(answer.inner_text(), page.locator("#dataset-refused").inner_text())
    walk.press("Check the pictures")
    expect(page.locator("#dataset-findings")).to_contain_text(f"{count} pictures checked")
    walk.say(page.locator("#dataset-findings").inner_text()[:600])
    walk.shot("cutouts")
    walk.tab.tab("Parameters")
    page.locator("#kiln-search").fill("additional parameters")
    page.locator("#kiln-found button").first.click()
    walk.tab.fill("additional_parameters", "--alpha_mask --sample_at_first")
    walk.tab.tab("Captioning")
    expect(page.locator("#cap-summary")).to_contain_text(f"{count} pictures, 0 without")
    expect(page.locator("#cap-mask-words")).to_contain_text("Training counts the opaque part only.")
    walk.shot("cutouts-captions")
    walk.tab.tab("Train")
    expect(page.locator("#checks .kiln-ready")).to_contain_text("Ready")
    page.locator("#start").click()
    expect(page.locator("#progress")).to_contain_text(re.compile(r"[1-9]\d* / 600"))
    page.locator("#stop").click()
    expect(page.locator("#progress")).to_contain_text("Stopped at step")
    walk.say(page.locator("#progress").inner_text())


def on_a_phone(walk: Walk) -> None:
    """Both tabs as they are now, 390 px wide."""
    walk.page.set_viewport_size({"width": 390, "height": 844})
    for name in ("Dataset", "Captioning"):
        walk.page.locator(
            "#tabs > .tab-wrapper .tab-container:not(.visually-hidden) button", has_text=name
        ).click()
        walk.page.evaluate("scrollTo(0, 0)")
        walk.page.wait_for_timeout(1500)
        walk.shot(f"phone-{name.lower()}")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("shots", type=Path)
    parser.add_argument("--photos", type=Path, required=True)
    parser.add_argument("--tagger", type=Path, required=True)
    parser.add_argument("--face", default="astronaut.png", help="a photograph with a face")
    parser.add_argument("--cutouts", type=Path, help="PNG files with transparency, captions beside them")
    options = parser.parse_args()
    chromium = find_chromium()
    if chromium is None:
        sys.exit(HOW_TO_GET_ONE)
    options.shots.mkdir(parents=True, exist_ok=True)
    expect.set_options(timeout=PATIENCE_MS)
    with tempfile.TemporaryDirectory() as scratch, sync_playwright() as playwright:
        here = Path(scratch)
        album = here / "album" / "holiday"
        album.parent.mkdir()
        shutil.copytree(options.photos, album)
        config = json.loads((REPOSITORY / "presets" / "demo.json").read_text(encoding="utf-8"))
        config |= {"pretrained_model_name_or_path": str(REPOSITORY / "assets" / "demo" / "base")}
        config |= {"train_data_dir": "", "additional_parameters": "--sample_at_first", "logging_dir": ""}
        (here / "mine.json").write_text(json.dumps(config), encoding="utf-8")
        dropped = [album.parent, *strangers(here / "strangers", next(iter(sorted(album.glob("*.jpg")))))]
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        with serving(here) as served:
            context = browser.new_context(viewport={"width": 1280, "height": 900})
            walk = Walk(open_page(context, served), options.shots)
            walk.tab.load(here / "mine.json")
            try:
                dataset(walk, here / "projects", dropped, options.face)
                captioning(walk, options.tagger.resolve())
                train(walk)
                on_a_phone(walk)
                if options.cutouts is not None:
                    walk.page.set_viewport_size({"width": 1280, "height": 900})
                    cutouts(walk, here / "projects", options.cutouts.resolve())
            except BaseException:
                walk.page.screenshot(path=options.shots / "failed.png", full_page=True)
                raise
            kept = sorted(
                path.name for path in (here / "projects").rglob("*.png") if ".kiln" not in path.parts
            )
            assert not set(kept) & set(REFUSED), kept
            assert walk.tab.errors == []
        browser.close()
    print("walked to its end", flush=True)


if __name__ == "__main__":
    main()
