"""Phrases that captioners like to add whatever the picture shows, and how to take them out again.

BLIP was trained on pictures from shops and news pages, and repeats what stood under those: things in
hands, ties, words about the picture itself. `HABITS` is the one list of them; a person adds phrases of
their own on the page.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import regex

from trainer.errors import ConfigError

__all__ = ["HABITS", "Habit", "found", "own_pattern", "remover"]

_WHO = r"(?:a|an|the|his|her|their|its|one|two|some)"
_IS = r"(?:who |that |which )?(?:is|are) "
_HAND = (
    rf"(?: (?:in|on|up to|to|near|next to|against) {_WHO}(?: (?:left|right|other))?"
    r" (?:hands?|ear|mouth|face|head))?"
)
_THINGS = (
    r"(?:wii |nintendo wii |nintendo |game |video game |tv |television |cell |mobile |smart ?|micro|hair ?|tooth|"
    r"coffee |wine |beer |banana |blue |black |white |red )*"
    r"(?:remote controls?|remotes?|controllers?|phones?|telephones?|cellphones?|smartphones?|microphones?|mics?|"
    r"cameras?|cups?|mugs?|glass(?: of \w+)?|bottles?|cigarettes?|toothbrush(?:es)?|brush(?:es)?|dryers?|"
    r"pens?|umbrellas?|frisbees?|bananas?|donuts?|doughnuts?|sandwich(?:es)?|guns?|swords?|kni(?:fe|ves)|"
    r"tablets?|laptops?|books?|balls?|bats?|rackets?|skateboards?|wands?|signs?|teddy bears?)"
)


@dataclass(frozen=True)
class Habit:
    """One kind of phrase."""

    name: str
    """Its key, and what the page calls it."""
    pattern: str
    """What is taken out, as the regex library reads it; case does not count."""


HABITS: tuple[Habit, ...] = (
    Habit(
        "holding things",
        rf"(?:{_IS}|while |and )?(?:holding|using|carrying|playing with)(?: up| out)?"
        rf"(?: {_WHO})? {_THINGS}{_HAND}",
    ),
    Habit("things in hands", rf"(?:and )?with {_WHO} {_THINGS}{_HAND}"),
    Habit(
        "on the phone",
        rf"(?:{_IS}|while |and )?(?:talking|speaking|looking) (?:on|at|into) {_WHO} {_THINGS}",
    ),
    Habit(
        "taking a selfie",
        rf"(?:{_IS}|while |and )?taking {_WHO} (?:selfie|picture of (?:himself|herself|themselves|itself))"
        rf"(?: with {_WHO} {_THINGS})?(?: in {_WHO} mirror)?",
    ),
    Habit("there is", r"^there (?:is|are|'s) (?=\w)"),
    Habit("arafed", r"\b(?:arafed|araffe|arafe|araffes|arafed image of)\b"),
    Habit(
        "words about the picture",
        r"^(?:this is )?(?:an?|the) (?:close[- ]?up |blurry |black and white |high quality |stock )?"
        r"(?:picture|photo|photograph|image|shot|view|close[- ]?up)(?: shot| view| picture| photo| image)? of ",
    ),
    Habit(
        "empty backgrounds",
        rf"(?:(?:and|with|in front of|against|on) )+{_WHO} (?:\w+ )?(?:background|backdrop)(?: behind \w+)?"
        r"(?= *(?:$|[.,;]))",
    ),
)
"""What is offered. "Empty backgrounds" are "with a white background" and the like."""

OWN_S = 0.5
"""Time that patterns may take for all captions."""
OFTEN = 200
"""Own phrases at most."""


def _compiled(habit: Habit) -> regex.Pattern[str]:
    pattern: regex.Pattern[str] = regex.compile(
        rf"\b{habit.pattern}\b" if habit.pattern[0] not in "^\\" else habit.pattern, regex.IGNORECASE
    )
    return pattern


_PATTERNS = {habit.name: _compiled(habit) for habit in HABITS}


def own_pattern(phrase: str) -> regex.Pattern[str]:
    """A person's phrase as a pattern: whole words, and any number of spaces between them."""
    parts = [regex.escape(word) for word in phrase.split()]
    body = r"\s+".join(parts)
    start = r"\b" if phrase.strip()[:1].isalnum() else ""
    end = r"\b" if phrase.strip()[-1:].isalnum() else ""
    pattern: regex.Pattern[str] = regex.compile(f"{start}{body}{end}", regex.IGNORECASE)
    return pattern


def found(text: str, own: Sequence[str] = ()) -> list[tuple[str, str]]:
    """The habits in a caption: each one's name and the words that it was found by.

    Args:
        text: The caption.
        own: A person's phrases; their name is the phrase itself.
    """
    line = text.split("\n")[0]
    hits = [
        (name, match[0].strip()) for name, pattern in _PATTERNS.items() if (match := pattern.search(line))
    ]
    for phrase in own[:OFTEN]:
        if phrase.strip() and (match := own_pattern(phrase).search(line)):
            hits.append((phrase, match[0]))
    return hits


def remover(names: Sequence[str], own: Sequence[str] = ()) -> Callable[[str], str]:
    """A function that takes habits out of a caption and mends the commas and spaces around them.

    Args:
        names: Of `HABITS`.
        own: A person's phrases.

    Raises:
        ConfigError: A name that is none. The function raises it where patterns take too long.
    """
    if unknown := [name for name in names if name not in _PATTERNS]:
        raise ConfigError(f"there is no habit {unknown[0]!r}: it has {', '.join(_PATTERNS)}")
    patterns = [_PATTERNS[name] for name in names]
    patterns += [own_pattern(phrase) for phrase in own[:OFTEN] if phrase.strip()]
    until = time.monotonic() + OWN_S

    def removed(text: str) -> str:
        after = text
        try:
            for pattern in patterns:
                after = pattern.sub(" ", after, timeout=max(0.001, until - time.monotonic()))
        except TimeoutError as error:
            raise ConfigError("taking the phrases out takes too long: choose fewer pictures") from error
        return text if after == text else _mended(after)

    return removed


def _mended(text: str) -> str:
    """A caption after words were cut out of it."""
    text = regex.sub(r"[ \t]+", " ", text)
    text = regex.sub(r"(?: ?,)+", ",", text)
    text = regex.sub(r"(?<=^|\n)[ ,;]+|[ ,;]+(?=$|\n)", "", text)
    text = regex.sub(r"(?:,? (?:and|with|while|that is|who is|in front of))+ ?(?=$|[.\n,])", "", text)
    return str(regex.sub(r" +(?=[.,;])", "", text)).strip()
