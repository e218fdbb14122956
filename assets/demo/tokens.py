"""Makes the demo's CLIP tokenizer: byte-level pairs, merged until every caption word is one token.

Any other text still has tokens, since single bytes are in the vocabulary (Sennrich et al. 2016 for the merges,
Radford et al. 2019 for working on bytes).
"""

import itertools
import random
from collections import Counter
from typing import Final

from assets.demo import draw

START: Final = "<|startoftext|>"
END: Final = "<|endoftext|>"
WORD_END: Final = "</w>"
MAX_TOKENS: Final = 77


def byte_letters() -> list[str]:
    """A printable letter for each of the 256 bytes, as byte-level tokenizers write them."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    letters = {byte: chr(byte) for byte in plain}
    others = (byte for byte in range(256) if byte not in letters)
    letters |= {byte: chr(256 + k) for k, byte in enumerate(others)}
    return [letters[byte] for byte in [*plain, *(b for b in range(256) if b not in plain)]]


def caption_words(pictures: int = 4000) -> Counter[str]:
    """How often each word occurs in the captions; words that mean nothing are left out."""
    rng = random.Random(7)
    words: Counter[str] = Counter()
    for _ in range(pictures):
        text = draw.caption(draw.random_portrait(rng), rng, drop=0.0)
        words.update(text.replace(",", " , ").split())
    return Counter({word: count for word, count in words.items() if count > pictures // 200})


def merges_for(words: Counter[str]) -> list[tuple[str, str]]:
    """Merges the most frequent pair again and again until each word is a single piece."""
    pieces = {word: (*word[:-1], word[-1] + WORD_END) for word in words}
    merges: list[tuple[str, str]] = []
    while True:
        pairs: Counter[tuple[str, str]] = Counter()
        for word, split in pieces.items():
            for pair in itertools.pairwise(split):
                pairs[pair] += words[word]
        if not pairs:
            return merges
        best = min(pairs, key=lambda pair: (-pairs[pair], pair))
        merges.append(best)
        pieces = {word: _merged(split, best) for word, split in pieces.items()}


def _merged(split: tuple[str, ...], pair: tuple[str, str]) -> tuple[str, ...]:
    out: list[str] = []
    for piece in split:
        if out and (out[-1], piece) == pair:
            out[-1] += piece
        else:
            out.append(piece)
    return tuple(out)


def vocabulary() -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Token to id, and the merges in order; the start and end tokens come last, as in CLIP."""
    letters = byte_letters()
    merges = merges_for(caption_words())
    tokens = [*letters, *(letter + WORD_END for letter in letters), *(a + b for a, b in merges), START, END]
    return {token: k for k, token in enumerate(tokens)}, merges
