"""Tokens against CLIP's published ids and a plain restatement of the chunk rules."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests import tiny
from trainer.tokens import ClipTokens, clip_tokenizer, join_chunks, parse_emphasis

LONG = ", ".join(f"tag number {n} with blue eyes" for n in range(60))
TEXTS = [
    "",
    "a photo of sks dog",
    "1girl, (solo:1.2), ünïcode ßtraße",
    "one two " * 37 + "x",
    "one " * 75,
    LONG,
]


@pytest.fixture(scope="module", params=[49407, 0], ids=["sd1", "sd2"])
def tokenizer(request: pytest.FixtureRequest) -> Any:
    return clip_tokenizer(tiny.BYTE_PAIRS, pad_id=request.param)


def test_known_ids(tokenizer: Any) -> None:
    ids = ClipTokens(tokenizer, chunks=1).captions(["a photo of sks dog"])[0, 0]
    assert ids[:7].tolist() == [49406, 320, 1125, 539, 48136, 1929, 49407]
    assert set(ids[7:].tolist()) == {tokenizer.pad_token_id}
    assert ids.shape == (77,)


def test_equals_the_tokenizer_of_a_model_folder(tokenizer: Any, tmp_path: Path) -> None:
    from transformers import CLIPTokenizer

    pad = "<|endoftext|>" if tokenizer.pad_token_id else "!"
    theirs = CLIPTokenizer.from_pretrained(tiny.tokenizer_files(tmp_path, pad=pad))
    for text in TEXTS:
        assert tokenizer(text).input_ids == theirs(text).input_ids


def chunks_by_the_book(tokenizer: Any, text: str, count: int) -> list[list[int]]:
    """Engine facts 1.6, word for word."""
    ids = tokenizer(text, padding="max_length", truncation=True, max_length=75 * count + 2).input_ids
    if count == 1:
        return [ids]
    eos, pad = tokenizer.eos_token_id, tokenizer.pad_token_id
    found = []
    for j in range(count):
        chunk = [ids[0], *ids[1 + 75 * j : 76 + 75 * j], ids[-1]]
        if pad != eos:
            if chunk[75] != eos and chunk[75] != pad:
                chunk[76] = eos
            if chunk[1] == pad:
                chunk[1] = eos
        found.append(chunk)
    return found


@pytest.mark.parametrize("count", [1, 2, 3])
def test_chunks(tokenizer: Any, count: int) -> None:
    tokens = ClipTokens(tokenizer, chunks=count)
    ids = tokens.captions(TEXTS)
    assert ids.shape == (len(TEXTS), count, 77)
    for text, rows in zip(TEXTS, ids.tolist(), strict=True):
        assert rows == chunks_by_the_book(tokenizer, text, count)
    assert torch.equal(tokens.captions(TEXTS[::-1]), ids.flip(0))


def test_a_caption_is_tokenised_once(tokenizer: Any) -> None:
    calls = []

    class Counting:
        bos_token_id, eos_token_id, pad_token_id = 49406, 49407, tokenizer.pad_token_id

        def __call__(self, text: str, **options: Any) -> Any:
            calls.append(text)
            return tokenizer(text, **options)

    tokens = ClipTokens(Counting(), chunks=1)
    tokens.captions(["a", "b", "a"])
    tokens.captions(["b"])
    assert calls == ["a", "b"]


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        # From the documentation of AUTOMATIC1111's web UI.
        ("normal text", [("normal text", 1.0)]),
        ("an (important) word", [("an ", 1.0), ("important", 1.1), (" word", 1.0)]),
        ("(unbalanced", [("unbalanced", 1.1)]),
        (r"\(literal\]", [("(literal]", 1.0)]),
        ("(unnecessary)(parens)", [("unnecessaryparens", 1.1)]),
        (
            "a (((house:1.3)) [on] a (hill:0.5), sun, (((sky))).",
            [
                ("a ", 1.0),
                ("house", 1.573),
                (" ", 1.1),
                ("on", 1.0),
                (" a ", 1.1),
                ("hill", 0.55),
                (", sun, ", 1.1),
                ("sky", 1.4641),
                (".", 1.1),
            ],
        ),
        ("", [("", 1.0)]),
        ("a: b) c]", [("a: b) c]", 1.0)]),
        ("[[x]]", [("x", 1 / 1.21)]),
    ],
)
def test_emphasis(prompt: str, expected: list[tuple[str, float]]) -> None:
    found = parse_emphasis(prompt)
    assert [text for text, _ in found] == [text for text, _ in expected]
    assert [weight for _, weight in found] == pytest.approx([weight for _, weight in expected])


def test_weights_stand_at_their_tokens(tokenizer: Any) -> None:
    tokens = ClipTokens(tokenizer, chunks=2)
    ids, weights = tokens.weighted_captions(["a (red cat:1.5) sat", "(dog) " * 200])
    plain = tokenizer("a red cat sat").input_ids
    assert ids[0, 0, :6].tolist() == plain
    assert weights[0, :6].tolist() == pytest.approx([1, 1, 1.5, 1.5, 1, 1])
    assert weights.shape == (2, 152)
    assert weights[1, 0] == weights[1, 151] == 1
    assert weights[1, 1:151].tolist() == pytest.approx([1.1] * 150)


def test_samples_take_as_many_chunks_as_they_need(tokenizer: Any) -> None:
    tokens = ClipTokens(tokenizer, chunks=1)
    assert tokens.samples(["", "a cat"])[0].shape == (2, 1, 77)
    assert tokens.samples(["", "one " * 75])[0].shape == (2, 1, 77)
    ids, weights = tokens.samples(["", "one " * 75 + "(two:1.3)"])
    assert ids.shape == weights.shape == (2, 2, 77)
    assert weights[1, 1, :3].tolist() == pytest.approx([1, 1.3, 1])
    assert tokens.samples([LONG])[0].shape == (1, 3, 77)


def test_join_chunks() -> None:
    states = torch.arange(2 * 3 * 5).reshape(2, 3, 5, 1).float()
    joined = join_chunks(states)[0, :, 0].tolist()
    assert joined == [0, 1, 2, 3, 6, 7, 8, 11, 12, 13, 14]
    assert torch.equal(join_chunks(states[:, :1]), states[:, 0])
