import random
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageChops

from assets.demo import draw, make_subject, tokens


def test_the_same_portrait_gives_the_same_pixels() -> None:
    portrait = draw.random_portrait(random.Random(3))
    assert draw.draw(portrait).tobytes() == draw.draw(replace(portrait)).tobytes()


def test_the_base_world_never_shows_the_subject() -> None:
    rng = random.Random(4)
    portraits = [draw.random_portrait(rng) for _ in range(3000)]
    assert not any(p.eye_patch or p.hair in draw.UNSEEN_HAIR for p in portraits)
    texts = [draw.caption(p, rng) for p in portraits]
    assert not any("blue hair" in text or "patch" in text for text in texts)


def test_captions_say_only_what_is_shown() -> None:
    rng = random.Random(5)
    for _ in range(500):
        portrait = draw.random_portrait(rng)
        text = draw.caption(portrait, rng)
        for name in draw.BACKGROUNDS:
            if f"{name} background" in text:
                assert name == portrait.background
        for facing in ("left", "right"):
            if f"facing {facing}" in text:
                assert facing == portrait.facing
        assert ("glasses" not in text) or portrait.glasses


def test_shipped_pictures_are_what_the_script_makes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["make_subject", str(tmp_path)])
    make_subject.main()
    shipped = make_subject.IMAGES / "25_k1ln person"
    made = tmp_path / "25_k1ln person"
    assert sorted(f.name for f in made.iterdir()) == sorted(f.name for f in shipped.iterdir())
    for file in made.glob("*.png"):
        with Image.open(file) as a, Image.open(shipped / file.name) as b:
            # A rasteriser may round an edge pixel otherwise from one version to the next.
            difference = ImageChops.difference(a.convert("RGB"), b.convert("RGB"))
            assert np.asarray(difference).max() <= 48
        assert file.with_suffix(".txt").read_text() == (shipped / file.name).with_suffix(".txt").read_text()


def test_data_set_varies_what_its_captions_name() -> None:
    portraits = make_subject.portraits()
    assert len(portraits) == 16
    assert {p.background for p in portraits} == set(draw.BACKGROUNDS)
    assert {p.facing for p in portraits} == set(draw.FACINGS)
    assert {p.clothes for p in portraits} == set(draw.CLOTHES)
    assert all("hair" not in c and "patch" not in c for c in map(make_subject.subject_caption, portraits))


def test_every_caption_word_is_one_token_and_any_text_has_tokens() -> None:
    from transformers import CLIPTokenizer

    vocabulary, merges = tokens.vocabulary()
    tokenizer = CLIPTokenizer(vocab=vocabulary, merges=merges)
    text = "portrait of a person, short ginger hair, blue background with stripes, facing the viewer"
    pieces = tokenizer.convert_ids_to_tokens(tokenizer(text).input_ids)
    assert [p.removesuffix("</w>") for p in pieces[1:-1]] == text.replace(",", " ,").split()
    rare = tokenizer("k1ln Ünïcode 漢字 🙂").input_ids
    assert rare[0] == tokenizer.bos_token_id
    assert rare[-1] == tokenizer.eos_token_id
    assert rare.count(tokenizer.eos_token_id) == 1
