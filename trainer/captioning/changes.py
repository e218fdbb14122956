"""Changes to many captions at once, worked out before anything is written.

`plan` gives the captions before and after, for a preview; `Captions.write` writes them.
"""

from __future__ import annotations

import difflib
import time
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Annotated, Literal

import regex
from pydantic import BaseModel, Field, TypeAdapter, ValidationError

from trainer.captioning import habits
from trainer.captioning.captions import LARGEST_BYTES, Caption, Edit
from trainer.errors import ConfigError

__all__ = ["Operation", "diff", "parse", "plan", "table", "tags_of", "words"]

PATTERN_S = 1.0
"""Time that a pattern may take for all captions; one that backtracks without end is stopped there."""

Text = Annotated[str, Field(max_length=4000)]
Tag = Annotated[str, Field(min_length=1, max_length=1000)]


class _Operation(BaseModel, frozen=True, extra="forbid"):
    pass


class AddTag(_Operation):
    """A tag at the beginning or end of those that lack it."""

    do: Literal["add"]
    tag: Tag
    place: Literal["first", "last"] = "first"


class RemoveTags(_Operation):
    """Tags taken out."""

    do: Literal["remove"]
    tags: tuple[Tag, ...]


class RenameTag(_Operation):
    """A tag replaced by another, once."""

    do: Literal["rename"]
    tag: Tag
    to: Tag


class MoveTag(_Operation):
    """A tag moved to the beginning or end of those that have it."""

    do: Literal["move"]
    tag: Tag
    place: Literal["first", "last"] = "first"


class SortTags(_Operation):
    """The tags in alphabetical order, or the frequent ones first; the first ``keep`` stay where they are."""

    do: Literal["sort"]
    by: Literal["name", "count"] = "count"
    keep: Annotated[int, Field(ge=0, le=100)] = 1


class Replace(_Operation):
    """Text found and replaced, everywhere."""

    do: Literal["replace"]
    find: Annotated[str, Field(min_length=1, max_length=1000)]
    to: Text = ""
    is_pattern: bool = False
    match_case: bool = True


class Affix(_Operation):
    """Text before and behind, with a space between as in Kohya; who has it already is left out."""

    do: Literal["affix"]
    prefix: Text = ""
    postfix: Text = ""


class Unhabit(_Operation):
    """Phrases of captioners taken out."""

    do: Literal["unhabit"]
    habits: tuple[str, ...]
    own: tuple[Text, ...] = ()


Operation = Annotated[
    AddTag | RemoveTags | RenameTag | MoveTag | SortTags | Replace | Affix | Unhabit,
    Field(discriminator="do"),
]
_ADAPTER: TypeAdapter[Operation] = TypeAdapter(Operation)


def parse(data: object) -> Operation:
    """An operation as a page sends it.

    Raises:
        ConfigError: Something is missing or out of bounds.
    """
    try:
        return _ADAPTER.validate_python(data)
    except ValidationError as error:
        first = error.errors()[0]
        where = str(first["loc"][-1]) if first["loc"] else "the change"
        raise ConfigError(f"{where}: {first['msg'][:1].lower()}{first['msg'][1:]}") from error


def words(operation: Operation) -> str:
    """What is done, for the history."""
    match operation:
        case AddTag(tag=tag, place=place):
            return f'tag "{_short(tag)}" added {"in front" if place == "first" else "at the end"}'
        case RemoveTags(tags=tags):
            return "tag " + ", ".join(f'"{_short(tag)}"' for tag in tags[:3]) + " removed"
        case RenameTag(tag=tag, to=to):
            return f'tag "{_short(tag)}" renamed "{_short(to)}"'
        case MoveTag(tag=tag, place=place):
            return f'tag "{_short(tag)}" moved {"to the front" if place == "first" else "to the end"}'
        case SortTags():
            return "tags sorted"
        case Replace(find=find, to=to):
            return f'"{_short(find)}" replaced by "{_short(to)}"'
        case Affix(prefix=prefix, postfix=postfix):
            parts = [f'"{_short(prefix)}" put in front'] if prefix else []
            return " and ".join([*parts, *([f'"{_short(postfix)}" put behind'] if postfix else [])])
        case Unhabit():
            return "habits of the captioner removed"


def _short(text: str) -> str:
    return text if len(text) <= 40 else f"{text[:39]}…"


def plan(captions: Sequence[Caption], operation: Operation) -> list[Edit]:
    """What an operation would change.

    Args:
        captions: Those that it is about. Files that cannot be read as they are, and pictures without a
            caption, are passed over; only a prefix or a tag is put where there is none.
        operation: From `parse`.

    Raises:
        ConfigError: A pattern that is none, takes too long, or makes captions too long.
    """
    sound = [caption for caption in captions if not caption.problem]
    new = _function(operation, sound)
    creates = isinstance(operation, AddTag | Affix)
    edits = []
    for caption in sound:
        if not caption.exists and not creates:
            continue
        after = new(caption.text)
        if after != caption.text:
            if len(after) > LARGEST_BYTES // 4:
                raise ConfigError(f"{caption.name} would have {len(after):,} letters: nothing was changed")
            edits.append(Edit(caption.name, caption.now, after))
    return edits


def _function(operation: Operation, captions: Sequence[Caption]) -> Callable[[str], str]:
    match operation:
        case Replace():
            return _replace(operation)
        case Affix(prefix=prefix, postfix=postfix):
            return lambda text: _affixed(text, prefix.strip(), postfix.strip())
        case Unhabit(habits=names, own=own):
            return habits.remover(names, own)
        case AddTag(tag=tag, place=place):
            tag = tag.strip(" ,")
            return lambda text: _joined(_added(tags_of(text), tag, place))
        case RemoveTags(tags=gone):
            names = tuple(tag.casefold() for tag in gone)
            return _on_tags(lambda tags: [tag for tag in tags if tag.casefold() not in names])
        case RenameTag(tag=tag, to=to):
            return _on_tags(lambda tags: _unique([to.strip() if _same(item, tag) else item for item in tags]))
        case MoveTag(tag=tag, place=place):
            return _on_tags(lambda tags: _moved(tags, tag, place))
        case SortTags(by=by, keep=keep):
            counts = Counter(item.casefold() for caption in captions for item in set(tags_of(caption.text)))

            def order(tag: str) -> tuple[int, str]:
                return (-counts[tag.casefold()] if by == "count" else 0, tag.casefold())

            return _on_tags(lambda tags: [*tags[:keep], *sorted(tags[keep:], key=order)])


def _on_tags(change: Callable[[list[str]], list[str]]) -> Callable[[str], str]:
    """A change of tags; a text whose tags stay the same keeps its spaces."""

    def changed(text: str) -> str:
        tags = tags_of(text)
        after = change(tags)
        return text if after == tags else _joined(after)

    return changed


def tags_of(text: str) -> list[str]:
    """The parts between commas of a caption's first line, which is what training reads."""
    return [tag for tag in (part.strip() for part in text.split("\n")[0].split(",")) if tag]


def _joined(tags: Sequence[str]) -> str:
    return ", ".join(tags)


def _same(one: str, other: str) -> bool:
    return one.strip().casefold() == other.strip().casefold()


def _unique(tags: Sequence[str]) -> list[str]:
    return list({tag.casefold(): tag for tag in reversed(tags)}.values())[::-1]


def _added(tags: list[str], tag: str, place: str) -> list[str]:
    if not tag or any(_same(item, tag) for item in tags):
        return tags
    return [tag, *tags] if place == "first" else [*tags, tag]


def _moved(tags: list[str], tag: str, place: str) -> list[str]:
    mine = [item for item in tags if _same(item, tag)]
    others = [item for item in tags if not _same(item, tag)]
    return [*mine, *others] if place == "first" else [*others, *mine]


def _affixed(text: str, prefix: str, postfix: str) -> str:
    if prefix and not text.startswith(prefix):
        text = f"{prefix} {text}"
    if postfix and not text.endswith(postfix):
        text = f"{text} {postfix}"
    return text.strip()


def _replace(operation: Replace) -> Callable[[str], str]:
    flags = regex.VERSION1 | (0 if operation.match_case else regex.IGNORECASE)
    source = operation.find if operation.is_pattern else regex.escape(operation.find)
    try:
        pattern = regex.compile(source, flags)
    except regex.error as error:
        raise ConfigError(f"the pattern {operation.find!r} is none: {error}") from error
    until = time.monotonic() + PATTERN_S

    def changed(text: str) -> str:
        left_s = until - time.monotonic()
        try:
            if left_s <= 0:
                raise TimeoutError
            to = operation.to if operation.is_pattern else _literal(operation.to)
            return str(pattern.sub(to, text, concurrent=True, timeout=left_s))
        except TimeoutError as error:
            raise ConfigError(
                f"the pattern {operation.find!r} takes more than {PATTERN_S:g} s, so nothing was changed: "
                "write it without a repetition inside a repetition"
            ) from error
        except (regex.error, IndexError) as error:
            raise ConfigError(
                f"the replacement {operation.to!r} does not fit the pattern: {error}"
            ) from error

    return changed


def _literal(text: str) -> str:
    return text.replace("\\", "\\\\")


def table(captions: Sequence[Caption]) -> list[tuple[str, int]]:
    """All tags and in how many captions each stands, the frequent ones first.

    Spellings that differ in case count as one, under the most frequent of them.
    """
    spellings: dict[str, Counter[str]] = {}
    for caption in captions:
        for tag in {tag.casefold(): tag for tag in tags_of(caption.text)}.values():
            spellings.setdefault(tag.casefold(), Counter())[tag] += 1
    found = [(names.most_common(1)[0][0], names.total()) for names in spellings.values()]
    return sorted(found, key=lambda item: (-item[1], item[0].casefold()))


def diff(before: str, after: str) -> list[tuple[Literal["same", "gone", "new"], str]]:
    """The difference of two texts, word by word, as runs of what stayed, went and came."""
    old, new = (regex.findall(r"\w+|\s+|[^\w\s]", text) for text in (before, after))
    runs: list[tuple[Literal["same", "gone", "new"], str]] = []
    matcher = difflib.SequenceMatcher(None, old, new, autojunk=False)
    for kind, i1, i2, j1, j2 in matcher.get_opcodes():
        if kind == "equal":
            runs.append(("same", "".join(old[i1:i2])))
            continue
        if i2 > i1:
            runs.append(("gone", "".join(old[i1:i2])))
        if j2 > j1:
            runs.append(("new", "".join(new[j1:j2])))
    return runs
