"""What the server knows and every page shares: the running job, its view, and the configuration shown."""

from __future__ import annotations

import contextlib
import secrets
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path

from app.options import Options
from app.paths import Paths
from app.view import RunView, State
from trainer.config import KohyaConfig
from trainer.errors import ConfigError
from trainer.events import EventLog, JobFailed, JobFinished, JobStopped, StepDone, read_journal
from trainer.files import atomic_write
from trainer.job import Job
from trainer.worker import Runner

__all__ = ["Session"]

THUMBNAILS_KEPT_S = 30 * 86400
CUT_OFF = (
    "the program ended before this run did: what it had saved is in the output folder, and a state folder there "
    "can be resumed from"
)


@dataclass
class Session:
    """One server's state. The pages hold nothing that a reload would lose while a run goes on."""

    paths: Paths
    state: Path
    """Folder for what is remembered between starts."""
    config: KohyaConfig
    """What a page shows when it opens."""
    base: Path
    """Folder that the relative paths of `config` start from."""
    runner: Runner = field(default_factory=Runner)
    view: RunView = field(init=False)
    served: list[str] = field(default_factory=list)
    """Folders whose files the page may fetch: thumbnails and the sample folders of runs."""
    key: str = field(default_factory=lambda: secrets.token_hex(4))
    """Tells this server from the one before it, whose runs an open page may still show."""
    runs: int = 0
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def __post_init__(self) -> None:
        """Show the last run of the server before, as its journal tells it."""
        self.thumbnails.mkdir(parents=True, exist_ok=True)
        self.view = RunView(self._last_run(), self.thumbnails)
        self.served.append(str(self.thumbnails))
        oldest = time.time() - THUMBNAILS_KEPT_S
        for file in self.thumbnails.glob("*.webp"):
            if file.stat().st_mtime < oldest:
                file.unlink(missing_ok=True)

    @classmethod
    def open(cls, options: Options, config: KohyaConfig, base: Path) -> Session:
        """The session of a server that starts with ``options``."""
        paths = Paths(options.roots, confined=options.listen)
        return cls(paths=paths, state=options.state, config=config, base=base)

    @property
    def thumbnails(self) -> Path:
        """Folder for thumbnails of samples."""
        return self.state / "thumbnails"

    @property
    def doing(self) -> State:
        """Whether a run goes on, and whether it was asked to stop."""
        if not self.runner.running:
            return "idle"
        return "stopping" if self.runner.controls.stop.is_set() else "running"

    @property
    def _note(self) -> Path:
        """File that names the last run's journal."""
        return self.state / "last-run.txt"

    def _last_run(self) -> EventLog:
        log = EventLog()
        try:
            journal = self.paths.resolve(self._note.read_text(encoding="utf-8"))
            for event in read_journal(journal):
                log.emit(event)
        except (OSError, ValueError, ConfigError):
            return EventLog()  # never run, moved away, or outside today's roots
        events, _ = log.since(0)
        if events and not isinstance(events[-1], JobFinished | JobStopped | JobFailed):
            step = max((event.step for event in events if isinstance(event, StepDone)), default=0)
            log.emit(JobFailed(message=CUT_OFF, step=step, time=events[-1].time))
        self.served.append(str(journal.parent.parent.parent / "sample"))
        return log

    def start(self, config: KohyaConfig, base: Path) -> Job:
        """Check ``config`` and start training it.

        Raises:
            ConfigError: It cannot be trained, or a run is going on.
        """
        job = Job.from_config(self.paths.expand(config), base=base)
        self.paths.check(job)
        with self._lock:
            self.runner.start(job)
            self.config, self.base = config, base
            self.view = RunView(self.runner.events, self.thumbnails)
            self.runs += 1
            samples = str(job.output_dir / "sample")
            if samples not in self.served:
                self.served.append(samples)
            with contextlib.suppress(OSError):  # a full disk; the run itself will say so
                atomic_write(self._note, str(job.journal))
        return job
