"""The shell: ``python -m trainer CONFIG.json``, ``check`` and ``convert``.

Exit codes: 0 trained (or checked, converted); 1 an unexpected error; 2 the configuration, the data
or a model file is not usable; 3 the loss became NaN; 4 out of memory; 130 stopped and saved.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import signal
import sys
import types
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from trainer import config as configuration
from trainer.config import Finding, KohyaConfig
from trainer.controls import Controls
from trainer.errors import DivergedError, OutOfMemoryError, TrainerError
from trainer.events import (
    CheckpointRemoved,
    CheckpointSaved,
    EpochStarted,
    Event,
    EventLog,
    JobFailed,
    JobFinished,
    JobStopped,
    LogLine,
    PhaseStarted,
    SampleReady,
    StepDone,
)
from trainer.events import Progress as ProgressEvent
from trainer.files import REPOSITORY
from trainer.review import commands as review
from trainer.tools.commands import VERBS as TOOLS
from trainer.tools.commands import add_commands

if TYPE_CHECKING:
    from trainer.job import Job

__all__ = ["base_folder", "main"]

STOPPED = 130


def main(argv: Sequence[str]) -> int:
    """Run one command; returns the exit code."""
    arguments = list(argv)
    if arguments and arguments[0] not in ("train", "check", "convert", *TOOLS, *review.VERBS, "-h", "--help"):
        arguments.insert(0, "train")
    options = _parser().parse_args(arguments)
    try:
        return int(options.run(options))
    except DivergedError as error:
        return _complain(error, 3)
    except (OutOfMemoryError, MemoryError) as error:
        return _complain(error, 4)
    except TrainerError as error:
        return _complain(error, 2)
    except KeyboardInterrupt:
        return _complain("interrupted before anything was trained", STOPPED)


def _complain(error: object, code: int) -> int:
    Console(stderr=True).print(
        f"error: {error}", style="bold red", markup=False, highlight=False, soft_wrap=True
    )
    return code


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m trainer",
        description="Train a LoRA from a Kohya configuration. Ctrl-C finishes the step, saves and ends.",
        epilog=__doc__.partition("Exit codes")[2].join(("Exit codes", "")) if __doc__ else None,
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    train = commands.add_parser("train", help="train (the word may be left out)")
    check = commands.add_parser("check", help="say what would be trained, and train nothing")
    convert = commands.add_parser("convert", help="load a configuration and save it as Kohya writes it today")
    for command in (train, check):
        command.add_argument("config", type=Path, help="a Kohya JSON")
        command.add_argument(
            "--set",
            action="append",
            default=[],
            metavar="KEY=VALUE",
            dest="values",
            help="replace a field of the file; may be given any number of times",
        )
    # What a parent tells its children: see trainer.launch.
    for flag in ("--started", "--asks", "--parent"):
        train.add_argument(flag, help=argparse.SUPPRESS)
    check.add_argument("--json", action="store_true", help="print JSON")
    check.add_argument(
        "--vram",
        type=_gigabytes,
        metavar="GB",
        help="plan for a card with this much memory instead of the present device",
    )
    train.set_defaults(run=_train)
    check.set_defaults(run=_check)
    convert.add_argument("config", type=Path, help="a Kohya JSON")
    convert.add_argument("output", type=Path, help="where to save it")
    convert.set_defaults(run=_convert)
    add_commands(commands)
    review.add_commands(commands)
    return parser


def _gigabytes(text: str) -> float:
    try:
        size = float(text.lower().removesuffix("gb").removesuffix("g").strip())
    except ValueError:
        size = 0.0
    if not 0.1 <= size <= 10_000:
        raise argparse.ArgumentTypeError(f"{text!r} is no size of a card's memory in GB, e.g. 12")
    return size


def base_folder(path: Path) -> Path:
    """Where a configuration's relative paths start: the repository for its own presets, else the working folder."""
    return REPOSITORY if path.resolve().is_relative_to(REPOSITORY / "presets") else Path.cwd()


def _load(options: argparse.Namespace) -> tuple[KohyaConfig, tuple[Finding, ...]]:
    loaded = configuration.load(options.config)
    values: dict[str, str] = {}
    for text in options.values:
        name, equals, value = text.partition("=")
        if not equals:
            raise TrainerError(f"--set {text}: write it as key=value, e.g. --set max_train_steps=100")
        values[name.strip()] = value
    return configuration.with_values(loaded.config, values), tuple(loaded.report)


def _print_report(report: Sequence[Finding], console: Console) -> None:
    for finding in report:
        text = f"{finding.kind}: {finding.message}"
        console.print(text, style="yellow", markup=False, highlight=False, soft_wrap=True)


def _train(options: argparse.Namespace) -> int:
    config, report = _load(options)
    console = Console(stderr=True)
    _print_report(report, console)
    from trainer import launch
    from trainer.job import Job
    from trainer.runner import run

    logging.getLogger("accelerate").setLevel(logging.ERROR)
    started = float(options.started) if options.started else None
    base = Path.cwd() if options.asks else base_folder(options.config)
    job = Job.from_config(config, base=base, started=started)
    controls = Controls()
    if launch.is_child():
        return _train_along(options, job, controls, console)

    def stop(number: int, frame: types.FrameType | None) -> None:
        if controls.stop.is_set():
            raise KeyboardInterrupt
        controls.stop.set()
        console.print(
            "stopping: the step is finished and saved (Ctrl-C again: at once, unsaved)", style="bold"
        )

    signal.signal(signal.SIGINT, stop)
    with _Screen(console) as screen:
        outcome = run(job, screen, controls)
    return STOPPED if outcome.stopped else 0


def _train_along(options: argparse.Namespace, job: Job, controls: Controls, console: Console) -> int:
    """One of several processes, which a launcher started: the first of them says how it goes."""
    from trainer import launch
    from trainer.runner import run

    is_first = os.environ.get("RANK", "0") == "0"

    def stop(number: int, frame: types.FrameType | None) -> None:
        controls.stop.set()  # however often it is said: terminal, launcher and scheduler all do

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, stop)
    if options.asks:
        launch.obey(controls, Path(options.asks), options.parent, is_first=is_first)
    console.quiet = not is_first
    with _Screen(console) as screen:
        run(job, screen, controls)
    return 0  # after a stop too: launchers end the other processes when one does not end with 0


class _Screen(EventLog):
    """Prints events as they come: lines, and a bar where the output is a terminal."""

    def __init__(self, console: Console) -> None:
        super().__init__()
        self.console = console
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=None),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("ETA"),
            TimeRemainingColumn(),
            TextColumn("{task.fields[facts]}"),
            console=console,
            transient=True,
            disable=not console.is_terminal,
        )
        self._task: TaskID | None = None
        self._phase = ""
        self._total: int | None = None
        self._spoken = -1.0

    def __enter__(self) -> _Screen:
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def emit(self, event: Event) -> None:
        super().emit(event)
        self._show(event)

    def relay(self, event: Event) -> None:
        super().relay(event)
        self._show(event)

    def _show(self, event: Event) -> None:
        match event:
            case PhaseStarted():
                self._start(event)
            case ProgressEvent():
                self._advance(event.done, event.total, "")
            case StepDone():
                facts = f"avr_loss={event.avr_loss:.3g}  {_speed(event.step_s)}"
                self._advance(event.step, None, facts)
            case EpochStarted():
                self._line(f"epoch {event.epoch}/{event.epochs}")
            case LogLine():
                self._line(event.message, {"warning": "yellow", "error": "bold red"}.get(event.level, ""))
            case CheckpointSaved():
                self._line(f"saved {event.path} ({event.size_bytes / 2**20:.1f} MiB)", "green")
            case CheckpointRemoved():
                self._line(f"removed {event.path}")
            case SampleReady():
                self._line(f"sample {event.path}")
            case JobFinished():
                self._line(f"finished: {event.path} ({event.elapsed_s:.0f} s)", "bold green")
            case JobStopped():
                on = f"; to go on, resume from {event.state}" if event.state else ""
                self._line(f"stopped at step {event.step}{on}", "bold")
            case JobFailed() if event.detail:
                self._line(event.detail, "red")

    def _start(self, event: PhaseStarted) -> None:
        if self._task is not None:
            self._bar.remove_task(self._task)
        self._phase, self._total, self._spoken = event.phase, event.total, -1.0
        self._task = self._bar.add_task(event.phase, total=event.total, facts="")
        if not self.console.is_terminal:
            self._line(f"{event.phase} ...")

    def _advance(self, done: int, total: int | None, facts: str) -> None:
        total = total or self._total
        if self._task is not None:
            self._bar.update(self._task, completed=done, total=total, facts=facts)
        if self.console.is_terminal or not total:
            return
        share = done / total
        # A log file gets a line every 5 %.
        if share >= 1 or share - self._spoken >= 0.05:
            self._spoken = share
            self._line(f"{self._phase}: {done}/{total}  {facts}".rstrip())

    def _line(self, text: str, style: str = "") -> None:
        self.console.print(text, style=style, markup=False, highlight=False, soft_wrap=True)


def _speed(step_s: float) -> str:
    return f"{step_s:.2f} s/it" if step_s >= 1 else f"{1 / max(step_s, 1e-9):.2f} it/s"


def _check(options: argparse.Namespace) -> int:
    from trainer.check import check, lines

    config, report = _load(options)
    found = check(config, report, base=base_folder(options.config), vram_gb=options.vram)
    if options.json:
        sys.stdout.write(json.dumps(found, indent=2, ensure_ascii=False, default=str) + "\n")
    else:
        console = Console()
        for line in lines(found):
            console.print(line, markup=False, highlight=False, soft_wrap=True)
    return 2 if found["errors"] else 0


def _convert(options: argparse.Namespace) -> int:
    loaded = configuration.load(options.config)
    _print_report(tuple(loaded.report), Console())
    configuration.save(loaded.config, options.output)
    Console().print(f"saved {options.output}", markup=False, highlight=False, soft_wrap=True)
    return 0
