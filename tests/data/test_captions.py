from __future__ import annotations

import itertools
import random
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from trainer.data.captions import process, tag_frequency, varies
from trainer.data.types import Dataset, Fit, Picture, Subset

PLAIN = Subset(folder=Path("10_cat"), repeats=1, class_tokens="cat")


def run(
    caption: str, seed: int = 0, *, epoch: int = 1, step: int = 0, max_steps: int = 100, **rules: Any
) -> str:
    subset = replace(PLAIN, **rules)
    return process(caption, subset, random.Random(seed), epoch=epoch, step=step, max_steps=max_steps)


def many(caption: str, count: int = 400, **values: Any) -> Counter[str]:
    return Counter(run(caption, seed, **values) for seed in range(count))


def test_untouched_without_rules() -> None:
    assert run("a ,b|||c,  d") == "a ,b|||c,  d"
    assert run("first\nsecond") == "first"


def test_prefix_and_suffix() -> None:
    assert run("a", caption_prefix="pre,", caption_suffix="post") == "pre, a post"


def test_prefix_counts_as_a_kept_tag() -> None:
    found = many("a, b, c", caption_prefix="sks,", shuffle_caption=True, keep_tokens=1)
    assert all(text.startswith("sks, ") for text in found)
    assert len(found) == 6


def test_shuffle_keeps_the_first_tags_and_reaches_every_order() -> None:
    found = many("x,y, a ,b,c", shuffle_caption=True, keep_tokens=2)
    assert set(found) == {", ".join(["x", "y", *order]) for order in itertools.permutations("abc")}
    assert min(found.values()) > 35  # each order about 67 times of 400


def test_empty_tags_stay_without_a_keep_separator() -> None:
    assert run("a,,b", caption_tag_dropout_rate=1e-9) == "a, , b"


def test_keep_tokens_separator() -> None:
    rules: dict[str, Any] = {"shuffle_caption": True, "keep_tokens_separator": "|||"}
    for text in many("s, t,|||a,,b|||u,,v", **rules):
        tags = text.split(", ")
        assert tags[:2] == ["s", "t"]
        assert tags[-2:] == ["u", "v"]
        assert sorted(tags[2:-2]) == ["a", "b"]
    assert run("a|||b", keep_tokens_separator="|||") == "a|||b"  # nothing to do: stays as it is
    third = run("a|||b|||c|||d", caption_tag_dropout_rate=1e-9, keep_tokens_separator="|||")
    assert third == "a, b, c|||d"


def test_other_caption_separator_is_rejoined_with_commas() -> None:
    assert run("a; b;c", caption_separator=";", caption_tag_dropout_rate=1e-9) == "a, b, c"


def test_secondary_separator_binds_tags_while_shuffling() -> None:
    found = many("a;;;b, c", shuffle_caption=True, secondary_separator=";;;")
    assert set(found) == {"a,b, c", "c, a,b"}
    assert run("a;;;b", secondary_separator=";;;") == "a,b"


def test_caption_dropout() -> None:
    dropped = many("a", count=2000, caption_dropout_rate=0.3)[""]
    assert 0.25 < dropped / 2000 < 0.35
    assert many("a", caption_dropout_rate=1.0) == {"": 400}
    by_epoch = [run("a", epoch=epoch, caption_dropout_every_n_epochs=3) for epoch in range(1, 7)]
    assert by_epoch == ["a", "a", "", "a", "a", ""]
    # Prefix and suffix go too, and no wildcard survives.
    assert run("{a|b}", caption_prefix="p", enable_wildcard=True, caption_dropout_rate=1.0) == ""


def test_tag_dropout_spares_fixed_tags() -> None:
    found = many("k, a, b, c, d", count=1000, caption_tag_dropout_rate=0.25, keep_tokens=1)
    assert all(text.startswith("k") for text in found)
    kept = sum(len(text.split(", ")) - 1 for text in found.elements()) / 4000
    assert 0.71 < kept < 0.79
    assert all("a, b" in text or "a" not in text or "b" not in text for text in found)  # order stays
    assert many("k, a", caption_tag_dropout_rate=1.0, keep_tokens=1) == {"k": 400}


def test_wildcards() -> None:
    found = many("a {red|blue} cat", enable_wildcard=True)
    assert set(found) == {"a red cat", "a blue cat"}
    assert min(found.values()) > 150
    assert run("{{a|b}} {c}", enable_wildcard=True) == "{a|b} c"
    assert set(many("one\ntwo\nthree", enable_wildcard=True)) == {"one", "two", "three"}
    assert run("a {red|blue} cat") == "a {red|blue} cat"
    assert run("{}", enable_wildcard=True) == "{}"


@pytest.mark.parametrize(
    ("step", "expected"),
    [
        (0, "k, a"),
        (10, "k, a"),
        (34, "k, a, b"),
        (50, "k, a, b"),
        (67, "k, a, b, c"),
        (99, "k, a, b, c"),
        (100, "k, a, b, c, d"),
    ],
)
def test_token_warmup(step: int, expected: str) -> None:
    rules: dict[str, Any] = {"keep_tokens": 1, "token_warmup_min": 1, "token_warmup_step": 100.0}
    assert run("k, a, b, c, d", step=step, **rules) == expected
    # A share of the run: half of 200 steps.
    rules["token_warmup_step"] = 0.5
    assert run("k, a, b, c, d", step=step, max_steps=200, **rules) == expected


def test_the_same_generator_gives_the_same_text() -> None:
    rules: dict[str, Any] = {
        "shuffle_caption": True,
        "caption_tag_dropout_rate": 0.3,
        "enable_wildcard": True,
    }
    assert run("{a|b|c}, d, e, f, g", 7, **rules) == run("{a|b|c}, d, e, f, g", 7, **rules)
    assert varies(replace(PLAIN, **rules))
    assert not varies(replace(PLAIN, caption_prefix="x", secondary_separator=";"))


def test_tag_frequency_counts_pictures_by_folder_name() -> None:
    subsets = (replace(PLAIN, folder=Path("a/10_cat"), repeats=10), replace(PLAIN, folder=Path("b/1_dog")))
    texts = [(0, "Cat, big, , cat"), (0, "big,small"), (1, "dog")]
    pictures = tuple(
        Picture(path=Path(f"{n}.png"), subset=subset, size=(64, 64), caption=text, caption_file=None)
        for n, (subset, text) in enumerate(texts)
    )
    dataset = Dataset(
        subsets=subsets,
        pictures=pictures,
        fits=(Fit((64, 64), (64, 64)),) * 3,
        repeats=(10, 10, 1),
        buckets=((64, 64),),
        num_train_images=21,
        num_reg_images=0,
        mean_aspect_error=0.0,
    )
    expected = {"10_cat": {"cat": 2, "big": 2, "small": 1}, "1_dog": {"dog": 1}}
    assert tag_frequency(dataset) == expected
