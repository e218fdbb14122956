"""What every page shows of a run, worked out once from its events."""

from __future__ import annotations

import hashlib
import html
import json
import math
import threading
import time
from collections import Counter, deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal
from urllib.parse import quote

from PIL import Image

from app.runs import Run
from trainer.events import (
    CheckpointRemoved,
    CheckpointSaved,
    EpochStarted,
    Event,
    EventLog,
    JobFailed,
    JobFinished,
    JobStarted,
    JobStopped,
    LogLine,
    MemorySampled,
    PhaseStarted,
    Progress,
    SampleReady,
    StepDone,
    WorkFinished,
    counted,
)
from trainer.files import atomic_path
from trainer.job import Job

__all__ = [
    "Part",
    "Point",
    "RunView",
    "Sample",
    "State",
    "act_button",
    "alert",
    "duration",
    "fold",
    "make_thumbnail",
    "row",
    "served",
    "set_button",
    "thumbnail_of",
]

LOG_LINES = 500
CHART_POINTS = 200
SAMPLES_SHOWN = 200
WARNINGS_SHOWN = 100
THUMBNAIL_PX = 256

State = Literal["idle", "running", "stopping"]
Part = Literal[
    "progress", "notices", "memory", "chart", "rates", "samples", "log", "command", "queue", "past"
]


@dataclass(frozen=True)
class Point:
    """One step on the loss chart."""

    step: int
    loss: float
    avr_loss: float
    lr: Mapping[str, float]


@dataclass(frozen=True)
class Sample:
    """A sample picture and its thumbnail."""

    event: SampleReady
    thumbnail: Path


@dataclass
class RunView:
    """The picture of one run, brought up to date by whichever page asks first.

    Args:
        log: The run's events.
        thumbnails: Folder for thumbnails, which may be served.
        run: The row in the list of runs.
        job: What is trained; None for a run of an earlier server.
        quiet: Whether no thumbnails are to be made.
    """

    log: EventLog
    thumbnails: Path
    run: Run | None = None
    job: Job | None = None
    quiet: bool = False
    revisions: Counter[Part] = field(default_factory=Counter)
    """How often each part of the page has changed: a page draws again only what it has not seen."""
    lines: deque[str] = field(default_factory=lambda: deque(maxlen=LOG_LINES))
    warnings: list[str] = field(default_factory=list)
    points: list[Point] = field(default_factory=list)
    samples: list[Sample] = field(default_factory=list)
    states: list[Path] = field(default_factory=list)
    """State folders that were saved, the newest last."""
    loras: list[Path] = field(default_factory=list)
    """LoRA files that were saved, the newest last."""
    started: JobStarted | None = None
    step: StepDone | None = None
    memory: MemorySampled | None = None
    phase: str = ""
    done: int = 0
    total: int | None = None
    end: JobFinished | WorkFinished | JobStopped | JobFailed | None = None
    timed: tuple[float, int] = (0.0, 0)
    """Sum and count of the reported step times."""
    _cursor: int = 0
    _step_s: float | None = None
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def update(self) -> None:
        """Take in what is new. Cheap where nothing is; safe from many pages at once."""
        with self._lock:
            events, self._cursor = self.log.since(self._cursor)
            for event in events:
                self._take(event)

    def _take(self, event: Event) -> None:
        match event:
            case JobStarted():
                self.started = event
                self.revisions["progress"] += 1
                self.revisions["command"] += 1
            case PhaseStarted():
                self.phase, self.done, self.total = event.phase, 0, event.total
                if event.phase == "train":  # again after samples, or in a resumed run
                    self.done = (
                        self.step.step if self.step else self.started.first_step if self.started else 0
                    )
                self.revisions["progress"] += 1
                if event.phase != "train":
                    self._say(event, event.phase)
            case Progress():
                self.done, self.total = event.done, event.total or self.total
                self.revisions["progress"] += 1
            case EpochStarted():
                self._say(event, f"epoch {event.epoch}/{event.epochs}")
            case StepDone():
                self._step(event)
            case MemorySampled():
                self.memory = event
                self.revisions["memory"] += 1
            case LogLine():
                self._line(event)
            case SampleReady():
                self._sample(event)
            case CheckpointSaved():
                (self.states if event.kind == "state" else self.loras).append(event.path)
                self._say(event, f"saved {event.path.name} ({event.size_bytes / 2**20:.1f} MiB)")
            case CheckpointRemoved():
                self._say(event, f"removed {event.path.name}")
            case JobFinished():
                self._end(event, f"finished after {event.elapsed_s:.0f} s: {event.path}")
            case WorkFinished():
                self._end(event, f"finished after {event.elapsed_s:.0f} s: {event.message}")
            case JobStopped() if event.state is None:
                self._end(event, f"stopped after {event.elapsed_s:.0f} s")
            case JobStopped():
                self._end(event, f"stopped at step {event.step}; to go on, resume from {event.state}")
            case JobFailed():
                self._end(event, f"ERROR: {event.message}")

    def _say(self, event: Event, text: str) -> None:
        self.lines.append(f"{time.strftime('%H:%M:%S', time.localtime(event.time))}  {text}")
        self.revisions["log"] += 1

    def _line(self, event: LogLine) -> None:
        # What does not end the run is a warning, however grave: a picture left out, a save that failed.
        grave = event.level != "info"
        self._say(event, f"warning: {event.message}" if grave else event.message)
        if grave:
            self.warnings.append(event.message)
            self.revisions["notices"] += 1

    def _end(self, event: JobFinished | WorkFinished | JobStopped | JobFailed, text: str) -> None:
        self.end = event
        self.revisions["progress"] += 1
        self.revisions["notices"] += 1
        self._say(event, text)

    def _step(self, event: StepDone) -> None:
        self.step, self.phase, self.done = event, "train", event.step
        self.total = self.started.steps if self.started else self.total
        self._step_s = event.step_s if self._step_s is None else 0.9 * self._step_s + 0.1 * event.step_s
        self.points.append(Point(event.step, event.loss, event.avr_loss, event.lr))
        self.timed = (self.timed[0] + event.step_s, self.timed[1] + 1)
        self.revisions["progress"] += 1
        self.revisions["chart"] += 1
        self.revisions["rates"] += 1
        if self.started is not None and (event.step % 10 == 0 or event.step == self.started.steps):
            self._say(event, f"step {event.step}/{self.started.steps}  avr_loss={event.avr_loss:.3g}")

    def _sample(self, event: SampleReady) -> None:
        if self.quiet:
            return
        self._say(event, f"sample {event.path.name}")
        thumbnail = thumbnail_of(event.path, self.thumbnails)
        try:
            make_thumbnail(event.path, thumbnail)
        except OSError as error:
            self._say(event, f"no thumbnail of {event.path.name}: {error}")
            return
        self.samples.append(Sample(event, thumbnail))
        self.revisions["samples"] += 1

    @property
    def mean_step_s(self) -> float | None:
        """Mean time of a step."""
        return self.timed[0] / self.timed[1] if self.timed[1] else None

    @property
    def eta_s(self) -> float | None:
        """Seconds left in training, from the recent step time; None where there is no telling."""
        if self.step is None or self.started is None or self._step_s is None or self.end is not None:
            return None
        return (self.started.steps - self.step.step) * self._step_s

    def chart(self) -> list[Point]:
        """At most `CHART_POINTS` points with a finite loss: every n-th, the newest always among them."""
        drawn = [point for point in self.points if math.isfinite(point.loss)]
        stride = -(-len(drawn) // CHART_POINTS) or 1
        return drawn[::-1][::stride][::-1]

    def progress_html(self, state: State) -> str:
        """The bar, with phase, step, loss and ETA in words.

        Args:
            state: Whether the run goes on, and whether it was asked to stop.
        """
        if state == "idle" and self.end is None:
            return '<p class="kiln-empty">Nothing is being trained.</p>'
        share = 0.0 if not self.total else min(self.done / self.total, 1.0)
        tone = "going" if self.total else "going unknown"
        if isinstance(self.end, JobFinished | WorkFinished):
            share, words, tone = 1.0, f"Finished in {duration(self.end.elapsed_s)}", "done"
        elif isinstance(self.end, JobStopped):
            saved = self.end.path is not None or self.end.state is not None
            words, tone = f"Stopped at step {self.end.step} and saved" if saved else "Stopped", "stopped"
        elif isinstance(self.end, JobFailed):
            training = self.run is None or self.run.kind == "training"
            early = "Did not start" if training else "Failed"
            step, words, tone = self.end.step, early, "failed"
            if step and self.run is not None and self.run.status == "interrupted":
                words = f"Interrupted at step {step}"
            elif step:
                words = f"Failed at step {step}"
        elif state == "stopping":
            words, tone = "Stopping: this step is finished and saved first", f"{tone} stopped"
        else:
            words = PHASES.get(self.phase, self.phase.capitalize() or "Starting")
        facts = [f"{self.done} / {self.total}"] if self.total and self.end is None else []
        if self.step is not None:
            facts.append(f"loss {self.step.avr_loss:.4f}")
            facts.append(f"{self.step.step_s:.2f} s a step")
        if self.eta_s is not None and self.phase == "train":
            facts.append(f"{duration(self.eta_s)} left")
        if self.run is not None and self.run.owner:
            facts.append(f"started by {self.run.owner}")
        return (
            f'<div class="kiln-progress {tone}" role="progressbar" aria-label="Progress" aria-valuemin="0" '
            f'aria-valuemax="100" aria-valuenow="{share * 100:.0f}"><div class="words"><b>{html.escape(words)}</b>'
            f"<span>{' · '.join(f'<span>{html.escape(fact)}</span>' for fact in facts)}</span></div>"
            f'<div class="bar"><i style="width:{share * 100:.1f}%"></i></div></div>'
        )

    def notices_html(self) -> str:
        """How the run ended, where its files are, and what it warned of."""
        parts = []
        match self.end:
            case JobFailed(message=message, detail=detail):
                more = fold("Details for a bug report", f"<pre>{html.escape(detail)}</pre>") if detail else ""
                parts.append(alert("failed", message, self._resume_html() + more))
            case JobFinished(path=path):
                values = {"network_weights": str(path), "resume": ""}
                more = set_button("Train on with this LoRA", values) if path.exists() else ""
                where = f"<code>{html.escape(str(path))}</code>"
                parts.append(alert("done", "The LoRA is here:", f"{where}{row(more)}"))
            case WorkFinished(message=message, path=path):
                where = "" if path is None else f"<code>{html.escape(str(path))}</code>"
                parts.append(alert("done", message, where))
            case JobStopped(state=state) if state is not None:
                where = f"<code>{html.escape(str(state))}</code>"
                parts.append(
                    alert(
                        "stopped", "Everything that is needed to go on is here:", where + self._resume_html()
                    )
                )
            case JobStopped(path=path) if path is not None:
                parts.append(alert("stopped", "The LoRA is here:", f"<code>{html.escape(str(path))}</code>"))
            case JobStopped() if self.run is None or self.run.kind == "training":
                parts.append(alert("stopped", "Stopped before the first step: there was nothing to save."))
        if self.warnings:
            count = len(self.warnings)
            items = [f"<li>{html.escape(text)}</li>" for text in self.warnings[:WARNINGS_SHOWN]]
            if count > WARNINGS_SHOWN:
                items.append(f"<li>and {count - WARNINGS_SHOWN} more, in the log</li>")
            parts.append(alert("warned", "", fold(counted(count, "warning"), f"<ul>{''.join(items)}</ul>")))
        return "".join(parts)

    def _resume_html(self) -> str:
        state = next((path for path in reversed(self.states) if path.is_dir()), None)
        if state is None or self.run is None:
            return ""
        return row(act_button(f"Resume from {state.name}", {"do": "resume", "run": self.run.id}, "primary"))

    def command_html(self) -> str:
        """The command that does the same without the page."""
        if self.run is not None and self.run.kind != "training":
            return '<p class="kiln-empty">This was started on the page; it has no command.</p>'
        if self.started is None or self.run is None or self.run.started is None:
            return '<p class="kiln-empty">The command of a run stands here once it has started.</p>'
        stamp = time.strftime("%Y%m%d-%H%M%S", time.localtime(self.run.started))
        file = self.started.output_dir / f"{self.started.name}_{stamp}.json"
        command = html.escape(f'python -m trainer "{file}"')
        copy = '<button type="button" class="kiln-small" data-copy="command-line">Copy</button>'
        return (
            f"<p>In {html.escape(self.run.base)}:</p>"
            f'<pre id="command-line">{command}</pre>{row(copy)}'
            f"<details><summary>JSON</summary><pre>{html.escape(self.run.config)}</pre></details>"
        )

    def memory_html(self) -> str:
        """Gauges of device and host memory."""
        if self.memory is None:
            return ""
        memory = self.memory
        if memory.vram_bytes is not None and memory.vram_total_bytes:
            vram = gauge("VRAM", memory.vram_bytes, memory.vram_total_bytes, memory.vram_peak_bytes or 0)
        else:
            vram = '<div class="gauge"><span>VRAM</span><em>no GPU: training on the CPU</em></div>'
        ram = gauge("RAM", memory.ram_bytes, memory.ram_total_bytes, memory.ram_peak_bytes)
        return f'<div class="kiln-gauges">{vram}{ram}</div>'

    def samples_html(self) -> str:
        """Samples, newest first, one group a step."""
        if not self.samples:
            return '<p class="kiln-empty">Sample pictures appear here as they are drawn.</p>'
        groups: dict[int, list[Sample]] = {}
        for sample in self.samples[-SAMPLES_SHOWN:]:
            groups.setdefault(sample.event.step, []).append(sample)
        parts = []
        for step in sorted(groups, reverse=True):
            figures = "".join(figure(sample) for sample in groups[step])
            title = "Before training" if step == 0 else f"Step {step}"
            parts.append(f"<section><h4>{title}</h4><div>{figures}</div></section>")
        if len(self.samples) > SAMPLES_SHOWN:
            folder = html.escape(str(self.samples[0].event.path.parent))
            parts.append(f'<p class="kiln-empty">Older ones are in {folder}</p>')
        return f'<div class="kiln-samples">{"".join(parts)}</div>'


PHASES = {
    "read pictures": "Reading pictures",
    "load model": "Loading the model",
    "cache latents": "Caching latents",
    "train": "Training",
    "sample": "Drawing samples",
}


def duration(seconds: float) -> str:
    """Seconds as a person says them: 45 s, 3:20 min, 2:05 h."""
    whole = int(seconds + 0.5)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60}:{whole % 60:02d} min"
    return f"{whole // 3600}:{whole % 3600 // 60:02d} h"


def alert(tone: str, text: str, more: str = "") -> str:
    """A box that is hard to overlook; ``text`` is escaped here, ``more`` is HTML."""
    role = "alert" if tone == "failed" else "status"
    words = f"<p>{html.escape(text)}</p>" if text else ""
    return f'<div class="kiln-alert {tone}" role="{role}">{words}{more}</div>'


def row(content: str) -> str:
    """Buttons side by side."""
    return f'<div class="kiln-buttons">{content}</div>' if content else ""


def button(words: str, attribute: str, data: Mapping[str, Any], tone: str = "") -> str:
    """A button whose press the page's script sends on as JSON."""
    value = html.escape(json.dumps(data), quote=True)
    return (
        f'<button type="button" class="kiln-small {tone}" {attribute}="{value}">{html.escape(words)}</button>'
    )


def act_button(words: str, data: Mapping[str, Any], tone: str = "") -> str:
    """A button that asks the server to do something with a run."""
    return button(words, "data-act", data, tone)


def set_button(words: str, values: Mapping[str, Any], tone: str = "") -> str:
    """A button that fills in fields."""
    return button(words, "data-set", values, tone)


def fold(title: str, content: str) -> str:
    """HTML ``content`` that opens with a click on ``title``."""
    return f"<details><summary>{html.escape(title)}</summary>{content}</details>"


def gauge(name: str, used_bytes: int, total_bytes: int, peak_bytes: int) -> str:
    """One memory gauge: used, peak mark, total."""
    used, peak = used_bytes / total_bytes, min(peak_bytes / total_bytes, 1.0)
    gib = 2**30
    return (
        f'<div class="gauge"><span>{name}</span><div class="bar"><i style="width:{used * 100:.1f}%"></i>'
        f'<u style="left:{peak * 100:.1f}%"></u></div><em>{used_bytes / gib:.1f} of {total_bytes / gib:.0f} GiB, '
        f"peak {peak_bytes / gib:.1f}</em></div>"
    )


def figure(sample: Sample) -> str:
    """A thumbnail that opens the full picture."""
    prompt = html.escape(sample.event.prompt, quote=True)
    full, small = served(sample.event.path), served(sample.thumbnail)
    return (
        f'<figure><a href="{full}" target="_blank" rel="noopener"><img src="{small}" alt="{prompt}" '
        f'title="{prompt}" loading="lazy"></a><figcaption>{prompt}</figcaption></figure>'
    )


def thumbnail_of(path: Path, folder: Path) -> Path:
    """Where the thumbnail of a picture lies, once it is made."""
    return folder / (hashlib.sha256(str(path).encode()).hexdigest()[:24] + ".webp")


def make_thumbnail(path: Path, thumbnail: Path) -> None:
    """Make the thumbnail of a picture, if it is not there from before.

    Raises:
        OSError: The picture cannot be read, or the thumbnail not be written.
    """
    if thumbnail.exists():
        return
    with Image.open(path) as picture, atomic_path(thumbnail) as temporary:
        picture.thumbnail((THUMBNAIL_PX, THUMBNAIL_PX))
        picture.save(temporary, "WEBP", quality=90)


def served(path: Path) -> str:
    """Address under which the page serves a file of its allowed folders."""
    return f"/gradio_api/file={quote(path.as_posix())}"
