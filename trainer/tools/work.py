"""The tools by name, with values as a shell, a page or a list gives them; and as work for the queue."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trainer.errors import ConfigError, StopTraining
from trainer.events import Event, LogLine, PhaseStarted
from trainer.work import Done

__all__ = ["READS", "TOOLS", "ToolWork", "use"]

TOOLS: Mapping[str, str] = {
    "merge": "Merge LoRA files into one",
    "merge-into": "Add LoRAs to a model file",
    "resize": "Bring a LoRA to another rank",
    "extract": "Make a LoRA from two models",
    "convert-lora": "Write a LoRA with other programs' layer names",
}
"""Verb to what it does."""

READS = ("file", "files", "model", "original", "tuned")
"""Values that name files which are read; "output" is written."""


@dataclass(frozen=True)
class ToolWork:
    """One use of a tool. A `trainer.work.Work`.

    Raises:
        ConfigError: No such tool, or a value is missing.
    """

    tool: str
    values: Mapping[str, Any]
    """Paths as text under the names of `READS` and "output"; the rest as the tool takes it."""

    def __post_init__(self) -> None:
        if self.tool not in TOOLS:
            raise ConfigError(f"there is no tool {self.tool!r}: it is a newer version's, or was removed")
        for name in ("output", *_NEEDED[self.tool]):
            if not self.values.get(name):
                raise ConfigError(f"{_CALLED.get(name, name)} is empty: fill it in")

    @property
    def output(self) -> Path:
        """The file that is made."""
        return Path(self.values["output"])

    @property
    def name(self) -> str:
        """See `trainer.work.Work`."""
        return f"{self.tool}: {self.output.name}"

    @property
    def journal(self) -> Path:
        """See `trainer.work.Work`."""
        return self.output.parent / "logs" / f"{self.tool}_{self.output.stem}" / "journal.jsonl"

    @property
    def pictures(self) -> Path | None:
        """See `trainer.work.Work`."""
        return None

    def as_json(self) -> str:
        """The settings, for a list that is kept."""
        return json.dumps({"tool": self.tool, "values": dict(self.values)}, ensure_ascii=False)

    @classmethod
    def from_json(cls, text: str) -> ToolWork:
        """What `as_json` wrote.

        Raises:
            ConfigError: It is something else.
        """
        try:
            values = json.loads(text)
            return cls(str(values["tool"]), dict(values["values"]))
        except (ValueError, TypeError, KeyError) as error:
            raise ConfigError(f"the tool's settings cannot be read ({error}): ask for it again") from error

    def run(self, emit: Callable[[Event], None], stopped: Callable[[], bool]) -> Done:
        """See `trainer.work.Work`."""

        def say(message: str) -> None:
            if stopped():  # what was half written goes with it
                raise StopTraining
            emit(LogLine(message=message))

        emit(PhaseStarted(phase=self.tool))
        say(TOOLS[self.tool])
        use(self.tool, self.values, say)
        return Done(f"{self.output.name} is written", self.output)


_NEEDED: Mapping[str, tuple[str, ...]] = {
    "merge": ("files",),
    "merge-into": ("model", "files"),
    "resize": ("file", "rank"),
    "extract": ("original", "tuned", "rank"),
    "convert-lora": ("file", "to"),
}
_CALLED = {
    "output": "the name of the result",
    "file": "the LoRA file",
    "files": "the list of LoRA files",
    "model": "the model file",
    "original": "the original model",
    "tuned": "the tuned model",
    "to": "the kind of names",
}

Say = Callable[[str], None]


def use(tool: str, values: Mapping[str, Any], say: Say) -> None:
    """Use a tool.

    Args:
        tool: A key of `TOOLS`.
        values: Under the names of the tool's own arguments, and "output"; what is missing, None or empty is as if
            it were not given.
        say: Gets what a person wants to know.
    """
    given = {name: value for name, value in values.items() if value not in (None, "")}
    _USE[tool](given, Path(given["output"]), say)


def _some(values: Mapping[str, Any], *names: str) -> dict[str, Any]:
    return {name: values[name] for name in names if name in values}


def _ratios(values: Mapping[str, Any]) -> list[float]:
    return list(values.get("ratios") or [1.0] * len(values["files"]))


def _merge(values: Mapping[str, Any], output: Path, say: Say) -> None:
    from trainer.tools.merge import merge

    files = [Path(path) for path in values["files"]]
    more = _some(values, "method", "rank", "conv_rank", "shuffle", "precision")
    merge(files, _ratios(values), output, **more, say=say)


def _merge_into(values: Mapping[str, Any], output: Path, say: Say) -> None:
    from trainer.tools.merge import merge_into

    files = [Path(path) for path in values["files"]]
    merge_into(Path(values["model"]), files, _ratios(values), output, **_some(values, "precision"), say=say)


def _resize(values: Mapping[str, Any], output: Path, say: Say) -> None:
    from trainer.tools.resize import resize

    more = _some(values, "conv_rank", "method", "parameter", "precision")
    resize(Path(values["file"]), output, int(values["rank"]), **more, say=say)


def _extract(values: Mapping[str, Any], output: Path, say: Say) -> None:
    from trainer.tools.extract import extract

    more = {
        "precision": "fp16",
        **_some(values, "conv_rank", "clamp_quantile", "min_diff", "precision", "device"),
    }
    extract(Path(values["original"]), Path(values["tuned"]), output, int(values["rank"]), **more, say=say)


def _convert(values: Mapping[str, Any], output: Path, say: Say) -> None:
    from trainer.tools.convert import convert

    convert(Path(values["file"]), output, values["to"], **_some(values, "precision"), say=say)


_USE: Mapping[str, Callable[[Mapping[str, Any], Path, Say], None]] = {
    "merge": _merge,
    "merge-into": _merge_into,
    "resize": _resize,
    "extract": _extract,
    "convert-lora": _convert,
}
