"""Each captioner on a tiny model of its real classes, against the library's own way of asking it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from tests.captioning import tiny
from trainer.captioning.captioners import CAPTIONERS
from trainer.captioning.captioners._base import find
from trainer.captioning.captioners.wd14 import prepared
from trainer.errors import ConfigError, ModelFileError

CPU = torch.device("cpu")
MAKERS: dict[str, Callable[[Path], Path]] = {
    "blip": tiny.blip,
    "blip2": tiny.blip2,
    "florence2": tiny.florence2,
    "wd14": tiny.tagger,
}


def pictures(count: int = 2) -> list[Image.Image]:
    noise = np.random.default_rng(3)
    return [Image.fromarray(noise.integers(0, 255, (20, 30, 4), dtype=np.uint8)) for _ in range(count)]


def load(name: str, folder: Path, **options: Any) -> Any:
    plugin = CAPTIONERS.get(name)
    said: list[str] = []
    return plugin.load(folder, plugin.options_class(**options), CPU, torch.float32, said.append)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {name: make(tmp_path_factory.mktemp("models") / name) for name, make in MAKERS.items()}


def test_every_captioner_is_tested_and_says_what_it_is() -> None:
    assert set(CAPTIONERS.names()) == set(MAKERS)
    for name in CAPTIONERS.names():
        plugin = CAPTIONERS.get(name)
        assert plugin.title
        assert plugin.about.endswith(".")
        assert plugin.models
        for field in plugin.options_class.model_fields.values():
            assert field.title
            assert field.description


@pytest.mark.parametrize("name", MAKERS)
def test_the_same_texts_one_by_one_and_together(name: str, models: dict[str, Path]) -> None:
    captioner = load(name, models[name], batch_size=2)
    together = captioner.describe(pictures())
    assert len(together) == 2
    assert [captioner.describe([picture])[0] for picture in pictures()] == together


def test_blip_writes_what_transformers_writes_without_the_prompt(models: dict[str, Path]) -> None:
    from transformers import AutoModelForImageTextToText, AutoProcessor

    network = AutoModelForImageTextToText.from_pretrained(models["blip"])
    processor = AutoProcessor.from_pretrained(models["blip"])
    inputs = processor(images=pictures(1)[0].convert("RGB"), text="a picture of", return_tensors="pt")
    ids = network.generate(**inputs, max_length=20, min_length=5, num_beams=3)
    whole = processor.decode(ids[0], skip_special_tokens=True)
    assert whole.startswith("a picture of")
    mine = load("blip", models["blip"], num_beams=3, max_length=20).describe(pictures(1))
    assert mine == [whole.removeprefix("a picture of").strip()]


@pytest.mark.parametrize("name", ["blip", "blip2"])
def test_nucleus_sampling_follows_the_seed(name: str, models: dict[str, Path]) -> None:
    captioner = load(name, models[name], beam_search=False, top_p=1.0)
    found = []
    for seed in (1, 1, 2, 3, 4):
        torch.manual_seed(seed)
        found.append(captioner.describe(pictures(1)))
    assert found[0] == found[1]
    assert any(other != found[0] for other in found[2:])


def test_a_model_of_another_kind_is_refused_by_name(models: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(ModelFileError, match=r"kind blip: this captioner needs florence2"):
        load("florence2", models["blip"])
    with pytest.raises(ModelFileError, match="no model"):
        find(str(models["wd14"]), tmp_path, CAPTIONERS.get("blip"), lambda _: None)
    with pytest.raises(ModelFileError, match=r"switched off \(HF_HUB_OFFLINE\)"):
        find("nobody/nothing", tmp_path, CAPTIONERS.get("blip"), lambda _: None)
    with pytest.raises(ModelFileError, match="does not exist"):
        find("no such folder", tmp_path, CAPTIONERS.get("blip"), lambda _: None)
    assert find("blip", models["blip"].parent, CAPTIONERS.get("blip"), lambda _: None) == models["blip"]


def test_a_damaged_model_is_a_sentence(models: dict[str, Path], tmp_path: Path) -> None:
    folder = tiny.blip(tmp_path / "blip")
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:200])
    with pytest.raises(ModelFileError, match="cannot be loaded"):
        load("blip", folder)
    folder = tiny.tagger(tmp_path / "tagger")
    (folder / "model.onnx").write_bytes(b"no network")
    with pytest.raises(ModelFileError, match="cannot be loaded"):
        load("wd14", folder)


# --- taggers --------------------------------------------------------------------------------------------


def logit(share: float) -> float:
    return float(np.log(share / (1 - share)))


def tags_of(folder: Path, shares: list[float], **options: Any) -> str:
    """What a tagger with these probabilities writes."""
    tiny.tagger(folder, bias=[logit(share) for share in shares])
    text: str = load("wd14", folder, **options).describe(pictures(1))[0]
    return text


SHARES = [0.2, 0.9, 0.1, 0.1, 0.4, 0.3, 0.9, 0.6, 0.5]
"""sensitive 0.9; long_hair 0.4, blue_sky 0.3, ^_^ 0.9, "a,b" 0.6; rei_(eva) 0.5."""


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({}, "long hair, ^_^, a,b, rei (eva)"),
        ({"general_threshold": 0.25}, "long hair, blue sky, ^_^, a,b, rei (eva)"),
        ({"general_threshold": 0.5, "character_threshold": 0.6}, "^_^, a,b"),
        ({"remove_underscore": False}, "long_hair, ^_^, a,b, rei_(eva)"),
        ({"undesired_tags": "long hair,^_^"}, "a,b, rei (eva)"),
        ({"character_tags_first": True}, "rei (eva), long hair, ^_^, a,b"),
        ({"character_tag_expand": True}, "long hair, ^_^, a,b, rei, eva"),
        ({"rating": "first"}, "sensitive, long hair, ^_^, a,b, rei (eva)"),
        ({"rating": "last"}, "long hair, ^_^, a,b, rei (eva), sensitive"),
        ({"always_first_tags": "rei (eva), absent"}, "rei (eva), long hair, ^_^, a,b"),
        ({"tag_replacement": r"long hair,hair;a\,b,c\;d"}, "hair, ^_^, c;d, rei (eva)"),
        ({"caption_separator": " | "}, "long hair | ^_^ | a,b | rei (eva)"),
    ],
)
def test_tags_are_written_as_kohya_writes_them(options: dict[str, Any], text: str, tmp_path: Path) -> None:
    assert tags_of(tmp_path, SHARES, **options) == text


def test_taggers_see_blue_green_red_on_white(tmp_path: Path) -> None:
    # Of a picture of 2 x 1, half of the square is padding.
    red = Image.new("RGBA", (64, 32), (200, 10, 30, 255))
    values = prepared(red, 16)
    assert values.shape == (16, 16, 3)
    assert values.dtype == np.float32
    assert values[8, 8].tolist() == [30, 10, 200]
    assert values[0, 0].tolist() == values[15, 0].tolist() == [255, 255, 255]
    clear = Image.new("RGBA", (4, 4), (200, 10, 30, 0))
    assert (prepared(clear, 16) == 255).all()
    # The network gets these values: the weight of red alone decides.
    weights = np.zeros((3, len(tiny.TAGS)), np.float32)
    weights[2, 4] = 1
    tiny.tagger(tmp_path, weights, bias=[-150] * len(tiny.TAGS), size_px=16)
    square = Image.new("RGBA", (8, 8), (200, 10, 30, 255))
    blue = Image.new("RGBA", (8, 8), (30, 10, 200, 255))
    assert load("wd14", tmp_path, batch_size=2).describe([square, blue]) == ["long hair", ""]


def test_a_network_of_a_fixed_batch_gets_it_filled_up(tmp_path: Path) -> None:
    tiny.tagger(tmp_path, bias=[logit(share) for share in SHARES], batch=4)
    captioner = load("wd14", tmp_path, batch_size=1)
    assert captioner.batch_size == 4
    assert captioner.describe(pictures(3)) == ["long hair, ^_^, a,b, rei (eva)"] * 3


def test_lists_and_replacements_that_do_not_fit_are_sentences(tmp_path: Path) -> None:
    tiny.tagger(tmp_path)
    with pytest.raises(ConfigError, match="not source,target"):
        load("wd14", tmp_path, tag_replacement="only one")
    (tmp_path / "selected_tags.csv").write_text("tag_id,name,category,count\n0,a,0,1\n")
    with pytest.raises(ModelFileError, match="different models"):
        load("wd14", tmp_path)
    (tmp_path / "selected_tags.csv").write_text("<html>")
    with pytest.raises(ModelFileError, match=r"different models|tagger's list"):
        load("wd14", tmp_path)
