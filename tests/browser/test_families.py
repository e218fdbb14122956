"""SDXL and FLUX.1 through the page: their configurations loaded, trained on toy models, sampled, saved."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from playwright.sync_api import BrowserContext, expect
from safetensors import safe_open

from tests.browser.conftest import PATIENCE_MS, Served, open_page

pytestmark = pytest.mark.browser

expect.set_options(timeout=PATIENCE_MS)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Toy models of both families, pictures, and a configuration for each."""
    from tests import runs, tiny, tiny_flux  # imports the engine

    folder = tmp_path_factory.mktemp("families")

    def common(name: str) -> dict[str, object]:
        return {
            "output_dir": str(folder / name),
            "output_name": name,
            "max_train_steps": 2,
            "sample_every_n_steps": 2,
            "sample_prompts": f"a cat of {name} --w 64 --h 64 --s 1 --d 1",
            "cache_latents": True,
            "text_encoder_lr": 0,
            "skip_verdict": True,
        }

    sdxl = runs.settings(
        folder,
        pretrained_model_name_or_path=str(tiny.sdxl_file(folder / "sdxl.safetensors")),
        sdxl=True,
        sdxl_cache_text_encoder_outputs=True,
        **common("sdxl"),
    )
    flux = tiny_flux.settings(folder, **common("flux"))
    for name, config in (("sdxl", sdxl), ("flux", flux)):
        (folder / f"{name}.json").write_text(json.dumps(config), encoding="utf-8")
    return folder


def test_sdxl_and_flux_train_through_the_page(served: Served, context: BrowserContext) -> None:
    tab = open_page(context, served)
    page = tab.page
    for name, family, layer in (
        ("sdxl", "sdxl_base_v1-0", "lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q"),
        ("flux", "flux1", "lora_unet_double_blocks_0_img_attn_qkv"),
    ):
        tab.tab("Parameters")
        tab.load(served.folder / f"{name}.json")
        tab.tab("Train")
        page.locator("#start").click()
        picture = page.locator(f'.kiln-samples img[title="a cat of {name}"]')
        expect(picture).to_be_visible()
        assert picture.evaluate("image => image.decode().then(() => image.naturalWidth)") == 64
        expect(page.locator("#notices")).to_contain_text(f"{name}.safetensors")
        expect(page.locator("#progress")).to_contain_text("Finished")
        expect(page.locator("#log textarea")).to_have_value(re.compile(f"saved {name}.safetensors"))
        with safe_open(served.folder / name / f"{name}.safetensors", framework="pt") as file:
            found, metadata = set(file.keys()), file.metadata()
        assert metadata["ss_steps"] == "2"
        assert metadata["ss_base_model_version"] == family
        assert f"{layer}.lora_up.weight" in found
        assert len({key.partition(".")[0] for key in found}) == len(found) / 3
        assert len(list((served.folder / name / "sample").glob("*.png"))) == 1
    assert tab.errors == []
