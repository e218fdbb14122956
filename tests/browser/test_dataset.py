"""The Dataset tab in Chromium: from dropped files to a project that trains, by mouse and by keyboard."""

from __future__ import annotations

import io
import json
import zipfile
from pathlib import Path

import pytest
from PIL import Image
from playwright.sync_api import BrowserContext, expect

from assets.demo import draw, make_subject
from tests.browser.conftest import PATIENCE_MS, Served, open_page

pytestmark = pytest.mark.browser

expect.set_options(timeout=PATIENCE_MS)


def album(path: Path, mirrored: set[int]) -> Path:
    """A ZIP of the demo's subject, some mirrored, with two strangers among them."""
    with zipfile.ZipFile(path, "w") as made:
        for index, portrait in enumerate(make_subject.portraits()):
            image = draw.draw(portrait, 320)
            if index in mirrored:
                image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
            file = io.BytesIO()
            image.save(file, "PNG")
            made.writestr(f"album/{index:02}.png", file.getvalue())
            made.writestr(f"album/{index:02}.txt", f"picture {index}")
        made.writestr("../outside.png", file.getvalue())
        made.writestr("album/drawing.svg", "<svg/>")
    return path


def test_from_an_album_to_a_project(served: Served, context: BrowserContext, tmp_path: Path) -> None:
    tab = open_page(context, served)
    page = tab.page
    tab.load(served.folder / "tiny.json")
    tab.tab("Dataset")
    expect(page.locator("#dataset-grid figure")).to_have_count(4)  # the folder of the settings
    page.locator("#dataset-new summary").click()
    form = page.locator("#dataset-project")
    form.locator("[name=name]").fill("Jane Doe")
    form.get_by_role("button", name="Propose a token").click()
    expect(form.locator("[name=token]")).to_have_value("j4n3d03")
    expect(page.locator("#dataset-token-words")).to_contain_text("is rare")
    form.locator("[name=class]").fill("person")
    form.locator("[name=repeats]").fill("25")
    form.locator("[name=place]").fill(str(tmp_path))
    form.get_by_role("button", name="Make the project").click()
    expect(page.locator("#dataset-answer")).to_contain_text("settings are filled in")
    tab.tab("Train")
    expect(page.locator("#checks .kiln-ready")).to_contain_text("no pictures in")
    tab.tab("Dataset")
    (tmp_path / "more" / "inner").mkdir(parents=True)
    (tmp_path / "more" / "inner" / "empty.png").write_bytes(b"")
    tab.drop("#dataset-drop", [album(tmp_path / "album.zip", {3, 8}), tmp_path / "more"])
    expect(page.locator("#dataset-answer")).to_contain_text(
        "16 pictures brought in, 16 with captions, 3 refused"
    )
    expect(page.locator("#dataset-refused")).to_contain_text("more/inner/empty.png")
    expect(page.locator("#dataset-refused")).to_contain_text("leads out of the ZIP")
    figures = page.locator("#dataset-grid figure")
    expect(figures).to_have_count(16)
    expect(figures.first.locator("img[src]")).to_be_visible()
    # Left out and taken in again by keyboard, undone by keyboard.
    figures.first.click()
    page.keyboard.press("x")
    expect(figures.first).to_have_class("out")
    expect(page.locator("#dataset-grid .kiln-set").first).to_contain_text("15 pictures, 1 left out")
    page.keyboard.press("Control+z")
    expect(figures.first).not_to_have_class("out")
    # Cropped with the mouse.
    figures.nth(1).dblclick()
    stage = page.locator("#dataset-crop .stage")
    box = stage.bounding_box()
    assert box is not None
    page.mouse.move(box["x"] + 0.25 * box["width"], box["y"] + 0.25 * box["height"])
    page.mouse.down()
    page.mouse.move(box["x"] + 0.75 * box["width"], box["y"] + 0.75 * box["height"], steps=4)
    page.mouse.up()
    expect(page.locator("#dataset-crop-size")).to_contain_text("160 x 160")
    page.locator("#dataset-crop").get_by_role("button", name="Crop", exact=True).click()
    expect(figures.nth(1)).to_contain_text("cropped")
    page.get_by_role("button", name="Undo").click()
    expect(figures.nth(1)).not_to_contain_text("cropped")
    # Checks, and the mirrored ones, which are turned back with one click each.
    page.get_by_role("button", name="Check the pictures").click()
    expect(page.locator("#dataset-findings")).to_contain_text("16 pictures checked")
    page.get_by_role("button", name="Is one mirrored?").click()
    expect(page.locator("#dataset-mirrored li")).to_have_count(2)
    expect(page.locator("#dataset-mirrored")).to_contain_text("2 look mirrored")
    for _ in range(2):
        page.locator("#dataset-mirrored button:has-text('Mirror it'):enabled").first.click()
        expect(page.locator("#dataset-progress")).to_be_empty()
    page.get_by_role("button", name="What will training see?").click()
    expect(page.locator("#dataset-buckets")).to_contain_text("64 x 64")
    expect(page.locator("#dataset-buckets")).to_contain_text("400 steps an epoch")
    pictures = tmp_path / "j4n3d03" / "images" / "25_j4n3d03 person"
    kept = json.loads((pictures / ".kiln" / "edits.json").read_text())["pictures"]
    assert kept == {"03.png": {"flipped": True}, "08.png": {"flipped": True}}
    assert not (tmp_path / "outside.png").exists()
    tab.tab("Parameters")
    assert tab.value("train_data_dir") == str(pictures.parent)
    assert tab.value("output_name") == "j4n3d03"
    page.set_viewport_size({"width": 390, "height": 844})
    tab.tab("Dataset")
    assert not tab.is_wider_than_the_screen()
    # What was dropped trains.
    page.set_viewport_size({"width": 1280, "height": 900})
    tab.tab("Train")
    expect(page.locator("#checks .kiln-ready")).to_contain_text("Ready")
    page.locator("#start").click()
    expect(page.locator("#progress")).to_contain_text("/ 5000")
    page.locator("#stop").click()
    expect(page.locator("#progress")).to_contain_text("Stopped at step")
    assert tab.errors == []
