"""The Captioning tab in Chromium: the demo's captioner in the queue, then by keyboard and many at once."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from PIL import Image
from playwright.sync_api import BrowserContext, expect

from assets.demo import draw
from tests.browser.conftest import PATIENCE_MS, Served, open_page
from trainer.files import REPOSITORY

pytestmark = pytest.mark.browser

expect.set_options(timeout=PATIENCE_MS)


def test_captions_by_a_model_by_hand_and_many_at_once(
    served: Served, context: BrowserContext, tmp_path: Path
) -> None:
    folder = tmp_path / "img" / "25_k1ln person"
    shutil.copytree(next((REPOSITORY / "assets" / "demo" / "images").iterdir()), folder)
    for caption in folder.glob("*.txt"):
        if caption.stem != "02":
            caption.unlink()
    written = (folder / "02.txt").read_text()
    settings = json.loads((REPOSITORY / "presets" / "demo.json").read_text())
    model = REPOSITORY / "assets" / "demo" / "base"
    settings |= {"train_data_dir": str(folder.parent), "pretrained_model_name_or_path": str(model)}
    (tmp_path / "mine.json").write_text(json.dumps({**settings, "output_dir": str(tmp_path / "out")}))

    tab = open_page(context, served)
    page = tab.page
    tab.load(tmp_path / "mine.json")
    tab.tab("Captioning")
    expect(page.locator("#cap-summary")).to_contain_text("16 pictures, 15 without a caption file")

    # Written by the demo's own BLIP, which is proposed for the demo; what a person wrote stays.
    page.locator("#cap-writer > summary").click()
    page.locator("#cap-prefix").fill("k1ln,")
    page.locator("#cap-start").click()
    expect(page.locator("#cap-progress")).to_contain_text("15 captions written")
    expect(page.locator("#cap-summary")).to_contain_text("16 pictures, 0 without a caption file")
    assert (folder / "02.txt").read_text() == written
    first, third = ((folder / f"{stem}.txt").read_text() for stem in ("01", "03"))
    assert first.startswith("k1ln, person, ")
    assert "blue hair" in first

    # By hand: type, go on by keyboard, and it is on the disk.
    text = page.locator("#cap-text")
    expect(text).to_have_value(first.strip())
    expect(page.locator("#cap-source")).to_contain_text("BLIP")
    text.fill("k1ln, <b>bold</b>, with a microphone in his hand")
    expect(page.locator("#cap-tokens")).to_contain_text("of 75 tokens")
    text.press("Alt+ArrowDown")
    expect(page.locator("#cap-name")).to_have_text("02.png")
    expect(text).to_have_value(written.strip())
    assert (folder / "01.txt").read_text() == "k1ln, <b>bold</b>, with a microphone in his hand\n"
    text.press("Alt+ArrowUp")
    expect(text).to_have_value("k1ln, <b>bold</b>, with a microphone in his hand")
    page.locator("#cap-history > summary").click()
    expect(page.locator("#cap-versions li")).to_have_count(3)
    expect(page.locator("#cap-versions ins").first).to_be_visible()

    # A phrase that BLIP makes up is flagged, and taken out once it has been looked at.
    expect(page.locator("#cap-summary")).to_contain_text("1 with habits of a captioner")
    page.get_by_text("Habits of captioners", exact=True).click()
    page.locator("#cap-unhabit").click()
    expect(page.locator("#cap-plan del")).to_contain_text("with a microphone in his hand")
    page.locator("#cap-apply").click()
    expect(page.locator("#cap-answer")).to_contain_text("1 caption: ")
    assert (folder / "01.txt").read_text() == "k1ln, <b>bold</b>\n"

    # A tag of all pictures is taken out, seen first; then with a pattern; then everything back.
    page.locator("#cap-tags-box > summary").click()
    page.locator("#cap-tags button", has_text="person").first.click()
    expect(page.locator("#cap-count")).to_have_text("14 shown")
    page.get_by_role("button", name="Remove", exact=True).click()
    expect(page.locator("#cap-plan h4")).to_have_text("14 captions would change")
    assert (folder / "03.txt").read_text() == third
    page.locator("#cap-apply").click()
    expect(page.locator("#cap-answer")).to_contain_text("14 captions")
    assert (folder / "03.txt").read_text() == third.replace("person, ", "")
    page.get_by_text("Find and replace", exact=True).click()
    page.get_by_role("textbox", name="Find", exact=True).fill(r"^k1ln,? (\S+)")
    page.get_by_role("textbox", name="Replace with").fill(r"\1 <k1ln>")
    page.locator("#cap-replace-pattern").check()
    page.locator("#cap-replace").click()
    expect(page.locator("#cap-plan h4")).to_have_text("16 captions would change")
    page.locator("#cap-apply").click()
    expect(page.locator("#cap-answer")).to_contain_text("16 captions")
    page.locator("#cap-undo").click()
    expect(page.locator("#cap-answer")).to_contain_text("taken back")
    assert (folder / "02.txt").read_text() == written
    page.locator("#cap-undo").click()
    expect(page.locator("#cap-answer")).to_contain_text("person")
    assert (folder / "03.txt").read_text() == third

    # A mask: painted, saved as large as the picture.
    page.locator("#cap-paint").click()
    box = page.locator("#cap-mask").bounding_box()
    assert box is not None
    page.mouse.move(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
    page.mouse.down()
    page.mouse.move(box["x"] + box["width"] / 2 + 5, box["y"] + box["height"] / 2)
    page.mouse.up()
    page.get_by_role("button", name="Save the mask").click()
    expect(page.locator("#cap-mask-words")).to_contain_text("switch masked_loss on")
    with Image.open(folder / ".kiln" / "masks" / "01.png") as mask:
        assert mask.size == (draw.SIZE_PX, draw.SIZE_PX)
        assert (mask.getpixel((draw.SIZE_PX // 2, draw.SIZE_PX // 2)), mask.getpixel((2, 2))) == (255, 0)
    page.set_viewport_size({"width": 390, "height": 844})
    assert not tab.is_wider_than_the_screen()
    assert tab.errors == []
