"""What a run can say, and the log that carries it to any number of readers.

The worker emits; each reader keeps one number, the next event it has not seen. Nobody takes an
event from another, a reader that comes late catches up, and a slow or closed one never holds up the
worker. Every event also becomes one line of the run's journal (JSON), flushed at once, so that a
program opened later sees the whole run and a kill loses at most the line being written.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

__all__ = [
    "CheckpointRemoved",
    "CheckpointSaved",
    "EpochStarted",
    "Event",
    "EventLog",
    "JobFailed",
    "JobFinished",
    "JobStarted",
    "JobStopped",
    "LogLine",
    "MemorySampled",
    "PhaseStarted",
    "Progress",
    "SampleReady",
    "StepDone",
    "WorkFinished",
    "counted",
    "read_journal",
    "read_line",
]


def counted(number: int, noun: str = "picture") -> str:
    """A number of things, as a person is told of it: "1 epoch", "2 epochs"."""
    return f"{number} {noun}" + ("" if number == 1 else "s")


@dataclass(frozen=True, kw_only=True)
class Event:
    """Base of all events; ``time`` is seconds since the epoch."""

    kinds: ClassVar[dict[str, type[Event]]] = {}
    time: float = field(default_factory=time.time)

    def __init_subclass__(cls) -> None:
        Event.kinds[cls.__name__] = cls

    def as_json(self) -> str:
        """One line of a journal."""
        values = {name: _plain(value) for name, value in vars(self).items()}
        return json.dumps({"event": type(self).__name__, **values}, ensure_ascii=False)


@dataclass(frozen=True, kw_only=True)
class JobStarted(Event):
    """A run begins: what is trained, for how long, and where its files go."""

    name: str
    output_dir: Path
    family: str
    first_step: int
    steps: int
    epochs: int
    facts: Mapping[str, Any] = field(default_factory=dict)
    """Counts and effective values worth showing (pictures, buckets, parameters, device ...)."""


@dataclass(frozen=True, kw_only=True)
class PhaseStarted(Event):
    """A stretch of work with a bar of its own: "load model", "cache latents", "train", "sample" ..."""

    phase: str
    total: int | None = None
    unit: str = ""


@dataclass(frozen=True, kw_only=True)
class Progress(Event):
    """How far the current phase is. Training reports `StepDone` instead."""

    phase: str
    done: int
    total: int | None = None


@dataclass(frozen=True, kw_only=True)
class EpochStarted(Event):
    """Epoch ``epoch`` (from 1) of ``epochs`` begins."""

    epoch: int
    epochs: int


@dataclass(frozen=True, kw_only=True)
class StepDone(Event):
    """One optimizer update. ``step`` counts from 1 over the whole run, resumed parts included."""

    step: int
    epoch: int
    loss: float
    avr_loss: float
    """Mean loss over the last epoch's worth of micro-steps (sd-scripts, train_util.py:LossRecorder)."""
    lr: Mapping[str, float]
    """Learning rate of each parameter group, by Kohya's group names."""
    step_s: float
    """Mean wall time of a step since the last report, in seconds."""
    extra: Mapping[str, float] = field(default_factory=dict)
    """More scalars under their TensorBoard tags (max_norm/keys_scaled, lr/d*lr/unet ...)."""


@dataclass(frozen=True, kw_only=True)
class MemorySampled(Event):
    """Memory in bytes. The ``vram`` figures are None where there is no accelerator."""

    ram_bytes: int
    ram_peak_bytes: int
    ram_total_bytes: int
    vram_bytes: int | None = None
    vram_peak_bytes: int | None = None
    vram_total_bytes: int | None = None


@dataclass(frozen=True, kw_only=True)
class SampleReady(Event):
    """A sample picture was written. ``step`` is 0 for those made before training."""

    step: int
    epoch: int | None
    index: int
    prompt: str
    seed: int
    path: Path


@dataclass(frozen=True, kw_only=True)
class CheckpointSaved(Event):
    """A LoRA file or a state folder was written and verified."""

    step: int
    epoch: int
    path: Path
    kind: Literal["lora", "state"]
    size_bytes: int


@dataclass(frozen=True, kw_only=True)
class CheckpointRemoved(Event):
    """An older file or state folder was pruned by a keep-last rule."""

    path: Path


@dataclass(frozen=True, kw_only=True)
class LogLine(Event):
    """A line for the console: what a person watching the run would want to read."""

    message: str
    level: Literal["info", "warning", "error"] = "info"


@dataclass(frozen=True, kw_only=True)
class JobFinished(Event):
    """The run reached its last step; ``path`` is the final LoRA."""

    step: int
    path: Path
    elapsed_s: float


@dataclass(frozen=True, kw_only=True)
class WorkFinished(Event):
    """Work that is no training is done; ``message`` is one sentence that says what was made."""

    message: str
    path: Path | None
    elapsed_s: float


@dataclass(frozen=True, kw_only=True)
class JobStopped(Event):
    """The run was stopped by a person, after finishing a step and saving."""

    step: int
    path: Path | None
    state: Path | None
    elapsed_s: float


@dataclass(frozen=True, kw_only=True)
class JobFailed(Event):
    """The run ended early; ``message`` is one sentence for a person."""

    message: str
    step: int
    detail: str = ""
    """Traceback for a bug report; empty where the sentence says all."""


def _plain(value: Any) -> Any:
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, float) and not math.isfinite(value):
        return None  # JSON has no NaN
    if isinstance(value, Mapping):
        return {str(name): _plain(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value


class EventLog:
    """Append-only log of one run: any thread emits, any number of readers follow.

    Args:
        journal: File that gets every event as a JSON line (appended to, so that a resumed run
            continues its journal), or None to keep events in memory only.
    """

    def __init__(self, journal: Path | None = None) -> None:
        self._events: list[Event] = []
        self._lock = threading.Lock()
        self._file: int | None = None
        self._unwritten: list[str] = []
        self._refused = False
        self.journal = journal
        if journal is not None:
            self.open(journal)

    def open(self, journal: Path) -> None:
        """Start writing ``journal``; what was emitted before is written first."""
        journal.parent.mkdir(parents=True, exist_ok=True)
        with self._lock:
            self.journal = journal
            self._refused = journal.exists() and journal.read_bytes()[-1:] not in (b"", b"\n")
            flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | getattr(os, "O_BINARY", 0)
            self._file = os.open(journal, flags, 0o644)
            self._write([])

    def _write(self, lines: list[str]) -> None:
        """Append lines; what a full disk refuses is kept and tried again with the next event."""
        self._unwritten += lines
        if self._file is None or not self._unwritten:
            return
        try:
            # A refused write may have left half a line: it is closed by the empty one before it.
            start = "\n" if self._refused else ""
            data = (start + "\n".join(self._unwritten) + "\n").encode()
            if os.write(self._file, data) < len(data):
                raise OSError("written in part")
            self._unwritten, self._refused = [], False
        except OSError:
            self._refused = True

    def emit(self, event: Event) -> None:
        """Append ``event``; never waits for a reader."""
        with self._lock:
            self._events.append(event)
            self._write([event.as_json()])

    def relay(self, event: Event) -> None:
        """Append an event whose journal another process writes."""
        with self._lock:
            self._events.append(event)

    def since(self, cursor: int) -> tuple[list[Event], int]:
        """Events from position ``cursor`` on, and the position to ask from next time."""
        with self._lock:
            return self._events[max(cursor, 0) :], len(self._events)

    def close(self) -> None:
        """Close the journal; the events stay readable."""
        with self._lock:
            if self._file is not None:
                os.close(self._file)
                self._file = None


def read_journal(path: Path) -> Iterator[Event]:
    """Events of a journal file. Lines that are torn or of an unknown kind are passed over.

    Args:
        path: A ``journal.jsonl``.

    Raises:
        OSError: The file cannot be read.
    """
    with path.open(encoding="utf-8", errors="replace") as lines:
        for line in lines:
            event = read_line(line)
            if event is not None:
                yield event


def read_line(line: str) -> Event | None:
    """The event of one line of a journal; None where it is torn or of an unknown kind."""
    try:
        values = json.loads(line)
        kind = Event.kinds[values.pop("event")]
        known = {item.name: item for item in dataclasses.fields(kind)}
        return kind(
            **{name: _typed(known[name].type, value) for name, value in values.items() if name in known}
        )
    except (ValueError, KeyError, TypeError, AttributeError):
        return None


def _typed(annotation: Any, value: Any) -> Any:
    """Undo `_plain` for one field: paths come back as paths, and a lost NaN as NaN."""
    if isinstance(value, str) and "Path" in str(annotation):
        return Path(value)
    if value is None and str(annotation) == "float":
        return math.nan
    return value
