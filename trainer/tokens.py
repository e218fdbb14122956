"""Captions and prompts to CLIP token ids: chunks of 75 tokens, emphasis, padding.

Rules: sd-scripts, library/strategy_base.py and library/lpw_stable_diffusion.py.

Axes: B batch, N chunks, L tokens of a chunk (77 with start and end), T tokens after joining.
"""

from __future__ import annotations

import gzip
import re
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from trainer.errors import ModelFileError

__all__ = ["ClipTokens", "clip_tokenizer", "join_chunks", "parse_emphasis"]

MOST_SAMPLE_CHUNKS = 3
"""Sample prompts are cut after 3 x 75 tokens (sd-scripts: max_embeddings_multiples)."""

REMEMBERED = 1 << 16
"""Captions whose ids are kept. Shuffled captions hardly repeat, so there must be an end."""


@cache
def _byte_pairs(path: Path) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Vocabulary and merges of CLIP's byte-pair file."""
    try:
        lines = gzip.decompress(path.read_bytes()).decode("utf-8").split("\n")
    except (OSError, EOFError, ValueError) as error:
        raise ModelFileError(f"CLIP's token table {path} cannot be read: {error}") from error
    # 49,152 entries less 256 bytes, 256 word-ending bytes; the first line is a heading.
    merges = [(left, right) for left, right in (line.split() for line in lines[1 : 49152 - 256 - 2 + 1])]
    printable = [
        *range(ord("!"), ord("~") + 1),
        *range(ord("¡"), ord("¬") + 1),
        *range(ord("®"), ord("ÿ") + 1),
    ]
    other = [byte for byte in range(256) if byte not in printable]
    # Bytes that have no printable character get one from 256 on.
    letters = [chr(byte) for byte in printable] + [chr(256 + place) for place in range(len(other))]
    words = [*letters, *(f"{letter}</w>" for letter in letters), *(left + right for left, right in merges)]
    words += ["<|startoftext|>", "<|endoftext|>"]
    return {word: index for index, word in enumerate(words)}, merges


def clip_tokenizer(table: Path, *, pad_id: int = 49407) -> Any:
    """CLIP's tokenizer from its byte-pair file alone.

    Args:
        table: ``bpe_simple_vocab_16e6.txt.gz``.
        pad_id: 49407 (end of text) for CLIP-L, 0 ("!") for the OpenCLIP encoders.

    Returns:
        A transformers CLIPTokenizer.

    Raises:
        ModelFileError: The file is missing or broken.
    """
    from trainer.libraries import CLIPTokenizer

    vocabulary, merges = _byte_pairs(table)
    return CLIPTokenizer(
        vocab=dict(vocabulary),
        merges=list(merges),
        pad_token="<|endoftext|>" if pad_id == vocabulary["<|endoftext|>"] else "!",
        model_max_length=77,
    )


EMPHASIS = re.compile(
    r"""
    (?P<escape>\\)(?P<literal>[\\()\[\]]?)  # a bracket or backslash that stands for itself
    | :\s*(?P<weight>[+-]?(?:\d+\.?\d*|\.\d+))\s*\)
    | (?P<mark>[()\[\]])
    | (?P<text>[^\\()\[\]:]+ | :)
    """,
    re.VERBOSE,
)


def parse_emphasis(prompt: str) -> list[tuple[str, float]]:
    """Split a prompt into stretches of equal weight.

    The syntax of AUTOMATIC1111's web UI: ``(x)`` times 1.1, ``[x]`` divided by 1.1, ``(x:1.3)`` times
    1.3, nested brackets multiply, a backslash makes a bracket literal. A bracket that is never
    closed counts to the end.
    """
    pieces: list[str] = []
    weights: list[float] = []
    opened: dict[str, list[int]] = {"(": [], "[": []}

    def scale(start: int, factor: float) -> None:
        for index in range(start, len(weights)):
            weights[index] *= factor

    def add(text: str) -> None:
        pieces.append(text)
        weights.append(1.0)

    for match in EMPHASIS.finditer(prompt):
        whole, mark = match[0], match["mark"]
        if match["escape"]:
            add(match["literal"])
        elif mark in ("(", "["):
            opened[mark].append(len(pieces))
        elif match["weight"] is not None and opened["("]:
            scale(opened["("].pop(), float(match["weight"]))
        elif mark == ")" and opened["("]:
            scale(opened["("].pop(), 1.1)
        elif mark == "]" and opened["["]:
            scale(opened["["].pop(), 1 / 1.1)
        else:
            add(whole)
    for start in opened["("]:
        scale(start, 1.1)
    for start in opened["["]:
        scale(start, 1 / 1.1)

    merged: list[tuple[str, float]] = []
    for text, weight in zip(pieces, weights, strict=True):
        if merged and merged[-1][1] == weight:
            merged[-1] = (merged[-1][0] + text, weight)
        else:
            merged.append((text, weight))
    return merged or [("", 1.0)]


def join_chunks(states_BNLD: Tensor) -> Tensor:
    """Make one sequence of separately encoded chunks: BTD with T = N (L - 2) + 2.

    The start state of the first chunk, the inner states of each, the end state of the last.
    """
    inner = states_BNLD[:, :, 1:-1].flatten(1, 2)
    return torch.cat([states_BNLD[:, 0, :1], inner, states_BNLD[:, -1, -1:]], dim=1)


class ClipTokens:
    """Token ids for one CLIP text encoder; the ids of a caption are worked out once.

    Args:
        tokenizer: A transformers tokenizer with start, end and padding tokens.
        chunks: Chunks of a caption: max_token_length / 75.
        length: Positions of the text encoder, start and end included (77).
        pad: Id that fills up; the tokenizer's own if None.
    """

    def __init__(self, tokenizer: Any, *, chunks: int, length: int = 77, pad: int | None = None) -> None:
        self.tokenizer = tokenizer
        self.chunks = chunks
        self.length = length
        self.bos: int = tokenizer.bos_token_id
        self.eos: int = tokenizer.eos_token_id
        self.pad: int = tokenizer.pad_token_id if pad is None else pad
        self._ids: dict[str, Tensor] = {}
        self._weighted: dict[str, tuple[Tensor, Tensor]] = {}

    def plain(self, text: str) -> list[int]:
        """Ids of ``text`` without start, end and padding."""
        ids: list[int] = self.tokenizer(text, add_special_tokens=False).input_ids
        return ids

    def emphasised(self, prompt: str) -> tuple[list[int], list[float]]:
        """Ids and the weight of each, without start, end and padding."""
        ids: list[int] = []
        weights: list[float] = []
        for text, weight in parse_emphasis(prompt):
            part = self.plain(text)
            ids += part
            weights += [weight] * len(part)
        return ids, weights

    def captions(self, texts: Sequence[str]) -> Tensor:
        """Ids of captions, BNL, int64 on the CPU; cut and padded to the same number of chunks."""
        for text in texts:
            if text not in self._ids:
                if len(self._ids) >= REMEMBERED:
                    self._ids.clear()
                self._ids[text] = torch.tensor(self._chunked(self.plain(text), self.chunks))
        return torch.stack([self._ids[text] for text in texts])

    def weighted_captions(self, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Ids (BNL) and weights (BT) of captions with emphasis, cut and padded as `captions` does."""
        for text in texts:
            if text not in self._weighted:
                if len(self._weighted) >= REMEMBERED:
                    self._weighted.clear()
                ids, weights = self.emphasised(text)
                room = self.chunks * (self.length - 2)
                weights = [1.0, *weights[:room]]
                weights += [1.0] * (room + 2 - len(weights))
                self._weighted[text] = (
                    torch.tensor(self._chunked(ids, self.chunks)),
                    torch.tensor(weights),
                )
        ids_BNL, weights_BT = zip(*(self._weighted[text] for text in texts), strict=True)
        return torch.stack(ids_BNL), torch.stack(weights_BT)

    def samples(self, prompts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Ids and weights of sample prompts, both BNL: as many chunks as the longest needs, up to 3."""
        parsed = [self.emphasised(prompt) for prompt in prompts]
        room = self.length - 2
        chunks = min(MOST_SAMPLE_CHUNKS, max(1, *(-(-len(ids) // room) for ids, _ in parsed)))
        ids_BNL = torch.tensor([self._chunked(ids, chunks) for ids, _ in parsed])
        weights_BNL = torch.ones(ids_BNL.shape)
        for row, (_, weights) in enumerate(parsed):
            for place, weight in enumerate(weights[: chunks * room]):
                weights_BNL[row, place // room, 1 + place % room] = weight
        return ids_BNL, weights_BNL

    def _chunked(self, ids: list[int], chunks: int) -> list[list[int]]:
        """Cut into ``chunks`` sequences that each start with BOS and end with EOS or padding."""
        room = self.length - 2
        ids = ids[: chunks * room]
        flat = [*ids, self.eos, *[self.pad] * (chunks * room - len(ids))]
        last = flat[-1]
        found = []
        for start in range(0, chunks * room, room):
            chunk = [self.bos, *flat[start : start + room], last]
            if chunks > 1 and self.pad != self.eos:
                if chunk[-2] not in (self.eos, self.pad):
                    chunk[-1] = self.eos
                if chunk[1] == self.pad:
                    chunk[1] = self.eos
            found.append(chunk)
        return found
