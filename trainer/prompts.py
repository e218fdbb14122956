"""Sample prompts: the text of the page, or a .txt, .json or .toml file, as Kohya reads them.

Facts: sd-scripts, library/train_util.py:load_prompts and line_to_prompt_dict.
"""

from __future__ import annotations

import json
import re
import tomllib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trainer.errors import ConfigError
from trainer.files import atomic_write

if TYPE_CHECKING:
    from trainer.job import Job

__all__ = [
    "SamplePrompt",
    "for_job",
    "named_file",
    "parse_line",
    "parse_text",
    "read_prompts",
    "write_prompt_file",
]


@dataclass(frozen=True, kw_only=True)
class SamplePrompt:
    """One picture to draw. None stands for the family's own default."""

    prompt: str = ""
    negative: str = ""
    width: int = 512
    height: int = 512
    seed: int | None = None
    """None draws a new one each time."""
    steps: int | None = None
    cfg_scale: float | None = None
    guidance: float | None = None
    """FLUX's embedded guidance."""
    sampler: str | None = None
    """None: the sampler of the configuration."""
    flow_shift: float | None = None
    ignored: tuple[str, ...] = ()
    """Options that nothing here reads, as written."""


def _steps(text: Any) -> int:
    return max(1, min(1000, _whole(text)))


def _whole(value: Any) -> int:
    if isinstance(value, bool) or (isinstance(value, float) and value != int(value)):
        raise ValueError(value)
    return int(value)


def _number(value: Any) -> float:
    if isinstance(value, bool):
        raise ValueError(value)
    return float(value)


# Letter on a line, key in a JSON or TOML file, field, reader.
OPTIONS: tuple[tuple[str, str, str, Callable[[Any], Any]], ...] = (
    ("n", "negative_prompt", "negative", str),
    ("w", "width", "width", _whole),
    ("h", "height", "height", _whole),
    ("d", "seed", "seed", _whole),
    ("s", "sample_steps", "steps", _steps),
    ("l", "scale", "cfg_scale", _number),
    ("g", "guidance_scale", "guidance", _number),
    ("ss", "sample_sampler", "sampler", str),
    ("fs", "flow_shift", "flow_shift", _number),
)
BY_LETTER = {letter: (field, read) for letter, _, field, read in OPTIONS}
BY_KEY = {key: (field, read) for _, key, field, read in OPTIONS} | {"prompt": ("prompt", str)}
OPTION = re.compile(r"(\w+)\s+(.+)", re.DOTALL)
NUMBER = re.compile(r"[+-]?(?:\d+\.?\d*|\.\d+)")


def parse_line(line: str) -> SamplePrompt:
    """Read ``a cat --w 512 --h 768 --d 1 --s 30 --l 7 --n blurry --ss euler_a``."""
    text, *parts = line.strip().split(" --")
    values: dict[str, Any] = {"prompt": text}
    ignored = []
    for part in parts:
        match = OPTION.fullmatch(part.strip())
        known = BY_LETTER.get(match[1].lower()) if match else None
        try:
            if match is None or known is None:
                raise ValueError(part)
            field, read = known
            value = match[2].strip()
            if read is not str:
                # "--w 512," is read as 512, as there.
                number = NUMBER.match(value)
                if number is None:
                    raise ValueError(part)
                value = number[0]
            values[field] = read(value)
        except ValueError:
            ignored.append(f"--{part.strip()}")
    return SamplePrompt(**values, ignored=tuple(ignored))


def parse_text(text: str) -> list[SamplePrompt]:
    """One prompt a line; blank lines and lines that start with # are passed over."""
    lines = (line.strip() for line in text.splitlines())
    return [parse_line(line) for line in lines if line and not line.startswith("#")]


def read_prompts(path: Path) -> list[SamplePrompt]:
    """Prompts of a .txt, .json or .toml file.

    Raises:
        ConfigError: The file is missing or cannot be read as what its ending says.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise ConfigError(f"sample prompts: {path} cannot be read: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"sample prompts: {path} is not UTF-8 text: save it as UTF-8") from error
    suffix = path.suffix.lower()
    try:
        if suffix == ".json":
            return _entries(path, json.loads(text))
        if suffix == ".toml":
            table = tomllib.loads(text).get("prompt", {})
            common = {key: value for key, value in table.items() if key != "subset"}
            subsets = table.get("subset", [])
            twice = sorted({key for subset in subsets for key in subset if key in common})
            if twice:
                raise ConfigError(
                    f"sample prompts: {path} gives {', '.join(twice)} in [prompt] and again in a subset"
                )
            return _entries(path, [common | subset for subset in subsets])
    except (ValueError, AttributeError, TypeError) as error:
        raise ConfigError(f"sample prompts: {path} is not valid {suffix[1:].upper()}: {error}") from error
    return parse_text(text)


def _entries(path: Path, entries: Any) -> list[SamplePrompt]:
    if not isinstance(entries, list) or not all(isinstance(entry, str | dict) for entry in entries):
        raise ConfigError(f"sample prompts: {path} must hold a list of prompts (texts or objects)")
    return [parse_line(entry) if isinstance(entry, str) else _entry(path, entry) for entry in entries]


def _entry(path: Path, entry: Mapping[str, Any]) -> SamplePrompt:
    values: dict[str, Any] = {}
    ignored = []
    for key, value in entry.items():
        if key not in BY_KEY:
            ignored.append(f"{key}={value}")
            continue
        field, read = BY_KEY[key]
        if value is None:
            continue
        try:
            values[field] = read(value)
        except (ValueError, TypeError) as error:
            raise ConfigError(
                f"sample prompts: {path} has {key} = {value!r}, which is not a number"
            ) from error
    return SamplePrompt(**values, ignored=tuple(ignored))


def named_file(job: Job) -> Path | None:
    """The file that sample_prompts names, if it is a path and not prompts (--sample_prompts FILE)."""
    text = job.config.sample_prompts.strip()
    if "\n" in text or not text.lower().endswith((".txt", ".json", ".toml")):
        return None
    return job.path(text)


def _prompt_file(job: Job) -> Path:
    return job.output_dir / "sample" / "prompt.txt"


def write_prompt_file(job: Job) -> Path | None:
    """Put the configured prompts into ``<output_dir>/sample/prompt.txt``, where Kohya leaves them.

    The file may be edited during the run. Nothing is written where the configuration names a file of
    its own; without prompts an older run's file is removed.

    Returns:
        The file that the prompts are read from, or None without prompts.

    Raises:
        ConfigError: The named file is not there or cannot be read.
    """
    named = named_file(job)
    if named is not None:
        read_prompts(named)
        return named
    path = _prompt_file(job)
    if not parse_text(job.config.sample_prompts):
        path.unlink(missing_ok=True)
        return None
    atomic_write(path, job.config.sample_prompts.strip() + "\n")
    return path


def for_job(job: Job) -> list[SamplePrompt]:
    """The prompts to draw now, read again each time.

    Raises:
        ConfigError: The prompt file cannot be read.
    """
    named = named_file(job)
    if named is not None:
        return read_prompts(named)
    path = _prompt_file(job)
    return read_prompts(path) if path.is_file() else parse_text(job.config.sample_prompts)


def ignored_options(prompts: Iterable[SamplePrompt]) -> list[str]:
    """A line for each prompt with options that have no effect."""
    return [
        f"sample prompt {index}: {', '.join(prompt.ignored)} has no effect"
        for index, prompt in enumerate(prompts)
        if prompt.ignored
    ]
