"""From the bytes of a file to a JSON object, with what people and editors add to one."""

from __future__ import annotations

import json
import re
from typing import Any

from trainer.errors import ConfigError

__all__ = ["MAX_BYTES", "MAX_DEPTH", "parse_object"]

MAX_BYTES = 10_000_000
"""The largest file that is read; Kohya's have about 10,000 bytes."""
MAX_DEPTH = 100
"""How deep lists and objects may lie in each other."""
MAX_DIGITS = 4000
"""Python refuses to turn longer numbers into text again."""

# Each pattern takes whole strings first, so that what looks like a comment inside one stays.
_STRING = r'"(?:[^"\\]|\\(?:.|\Z))*+(?:"|\Z)'
_COMMENT = re.compile(rf"{_STRING}|(?P<cut>//[^\n]*|/\*.*?(?:\*/|\Z))", re.DOTALL)
_TRAILING_COMMA = re.compile(rf"{_STRING}|(?P<cut>,(?=\s*[}}\]]))", re.DOTALL)


def parse_object(source: str | bytes, name: str) -> tuple[dict[str, Any], list[str], list[str]]:
    """Read a JSON object.

    Beyond JSON's own rules these are understood: UTF-8 with a byte order mark, UTF-16 and UTF-32,
    comments, a comma before a closing bracket, line breaks inside a text, NaN and Infinity.

    Args:
        source: Text or bytes.
        name: What messages call it, e.g. the file's path.

    Returns:
        The object; keys that stand in it more than once (the last value counts, as in Kohya);
        sentences about what was understood beyond JSON.

    Raises:
        ConfigError: Too large, no text, no JSON, no object, or nested too deeply.
    """
    if len(source) > MAX_BYTES:
        raise ConfigError(
            f"{name} is too large for a configuration ({len(source):,} bytes, at most {MAX_BYTES:,}): "
            "choose the JSON that Kohya saved"
        )
    text = _decode(source, name)
    if not text.strip():
        raise ConfigError(f"{name} is empty: choose another file, or save the configuration again")
    notes: list[str] = []
    repeated: list[str] = []

    def collect(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found: dict[str, Any] = {}
        twice: list[str] = []
        for key, value in pairs:
            if key in found and key not in twice:
                twice.append(key)
            found[key] = value
        repeated[:] = twice  # the outermost object comes last
        return found

    def whole(digits: str) -> int:
        if len(digits) > MAX_DIGITS:
            raise ConfigError(f"{name} holds a number with {len(digits):,} digits: shorten it")
        return int(digits)

    try:
        try:
            value = json.loads(text, object_pairs_hook=collect, parse_int=whole)
        except json.JSONDecodeError:
            bare = _COMMENT.sub(_blank, text)
            if bare != text:
                notes.append("its comments were left out and will not be in a saved file")
            tidy = _TRAILING_COMMA.sub(_blank, bare)
            if tidy != bare:
                notes.append("a comma before a closing bracket was left out")
            value = json.loads(tidy, object_pairs_hook=collect, parse_int=whole, strict=False)
    except json.JSONDecodeError as error:
        raise ConfigError(_explain(error, text, name)) from error
    except RecursionError as error:
        raise ConfigError(f"{name} nests lists or objects too deeply: it is no configuration") from error
    if not isinstance(value, dict):
        raise ConfigError(
            f"{name} holds {_kind(value)}, not an object of settings in curly brackets: "
            "choose the JSON that Kohya saved"
        )
    if _depth(value) > MAX_DEPTH:
        raise ConfigError(f"{name} nests lists or objects more than {MAX_DEPTH} deep: it is no configuration")
    return value, repeated, notes


def _decode(source: str | bytes, name: str) -> str:
    if isinstance(source, str):
        return source.removeprefix("\ufeff")
    try:
        return source.decode(json.detect_encoding(source)).removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        raise ConfigError(
            f"{name} is not text in UTF-8 (byte {error.start + 1}): open it in an editor and save it as UTF-8"
        ) from error


def _blank(match: re.Match[str]) -> str:
    if match["cut"] is None:
        return match[0]
    return re.sub(r"[^\n]", " ", match[0])  # lines and columns stay as they were


def _explain(error: json.JSONDecodeError, text: str, name: str) -> str:
    hint = "mend it in an editor, or save the configuration again"
    if "escape" in error.msg:
        hint = r"write each backslash of a path twice, as in C:\\models, or use /"
    elif text.lstrip()[:1] not in ("{", "["):
        hint = "choose the JSON that Kohya saved, not its TOML or another file"
    elif error.pos >= len(text.rstrip()):
        hint = "the end is missing; use another copy or save the configuration again"
    what = error.msg[0].lower() + error.msg[1:]
    return f"{name} is not valid JSON at line {error.lineno}, column {error.colno} ({what}): {hint}"


def _kind(value: Any) -> str:
    if isinstance(value, list):
        return "a list"
    if isinstance(value, str):
        return "a text"
    if value is None:
        return "null"
    return "true or false" if isinstance(value, bool) else "a number"


def _depth(value: Any) -> int:
    level, layer = 0, [value]
    while layer:
        level += 1
        layer = [
            inner
            for outer in layer
            if isinstance(outer, dict | list)
            for inner in (outer.values() if isinstance(outer, dict) else outer)
            if isinstance(inner, dict | list)
        ]
    return level
