"""What the server knows and every page shares: the runs, the view of one of them, and the configuration shown."""

from __future__ import annotations

import json
import secrets
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote

from app import works
from app.options import Options
from app.paths import Paths
from app.runs import Run, Runs, Status
from app.view import RunView, State
from trainer import config as configuration
from trainer.config import KohyaConfig
from trainer.errors import ConfigError, TrainerError
from trainer.events import (
    EventLog,
    JobFailed,
    JobFinished,
    JobStopped,
    StepDone,
    WorkFinished,
    read_journal,
)
from trainer.files import atomic_write
from trainer.job import Job
from trainer.worker import Runner

if TYPE_CHECKING:
    from trainer.work import Work

__all__ = ["Session", "work_of"]

THUMBNAILS_KEPT_S = 30 * 86400
RECENT = 12
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
    opened: Path | None = None
    """The file that `config` is of, where the server was told to open one."""
    admin: str = ""
    """Who may stop everybody's runs; "" where nobody logs in, and everybody is that."""
    runner: Runner = field(default_factory=Runner)
    view: RunView = field(init=False)
    queue: Runs = field(init=False)
    held: bool = False
    """Whether those that wait stay waiting: after a restart a person says when they go on."""
    served: list[str] = field(default_factory=list)
    """Folders whose files the page may fetch: thumbnails and the sample folders of runs."""
    key: str = field(default_factory=lambda: secrets.token_hex(4))
    """Tells this server from the one before it, whose runs an open page may still show."""
    runs: int = 0
    _follower: threading.Thread | None = None
    _lock: threading.RLock = field(default_factory=threading.RLock)

    def __post_init__(self) -> None:
        """Find the runs of the server before; show the last one as its journal tells it."""
        self.thumbnails.mkdir(parents=True, exist_ok=True)
        self.served.append(str(self.thumbnails))
        self.queue = Runs(self.state / "runs.sqlite3")
        self.queue.interrupt()
        self.held = bool(self.queue.waiting())
        past = self.queue.past(1)
        self.view = RunView(EventLog(), self.thumbnails)
        if past:
            self.show(past[0])
        oldest = time.time() - THUMBNAILS_KEPT_S
        for file in self.thumbnails.glob("*.webp"):
            if file.stat().st_mtime < oldest:
                file.unlink(missing_ok=True)

    @classmethod
    def open(cls, options: Options, config: KohyaConfig, base: Path) -> Session:
        """The session of a server that starts with ``options``."""
        paths = Paths(options.roots, confined=options.listen)
        admin = options.auth.admin if options.auth else ""
        # On a server for many, nobody's draft gives way to a file that the owner of the machine named.
        opened = None if options.listen or options.auth else options.config
        return cls(paths=paths, state=options.state, config=config, base=base, opened=opened, admin=admin)

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

    def may(self, user: str, run: Run | None) -> bool:
        """Whether ``user`` may stop, move or remove a run: its owner and the admin may."""
        return run is None or not self.admin or user in (self.admin, run.owner)

    def may_serve(self, text: str) -> bool:
        """Whether a file may be given out, after all links are followed."""
        try:
            path = Path(unquote(text)).resolve()
        except (OSError, RuntimeError, ValueError):
            return False
        return any(path.is_relative_to(Path(folder).resolve()) for folder in self.served)

    # ---- what is shown ---------------------------------------------------------------------------

    def show(self, run: Run) -> None:
        """Show a run that is over, on every page, as its journal tells it."""
        log = EventLog()
        try:
            journal = self.paths.resolve(run.journal)
            for event in read_journal(journal):
                log.emit(event)
            if run.kind == "training":
                self.serve(journal.parent.parent.parent / "sample")
            elif (
                pictures := works.load(run.kind, run.config, Path(run.base), self.paths).pictures
            ) is not None:
                self.serve(pictures)
        except (OSError, ValueError, ConfigError):  # never begun, moved away, or outside today's roots
            log = EventLog()
        events, _ = log.since(0)
        if events and not isinstance(events[-1], JobFinished | WorkFinished | JobStopped | JobFailed):
            step = max((event.step for event in events if isinstance(event, StepDone)), default=0)
            message = CUT_OFF if run.status == "interrupted" else run.message or CUT_OFF
            log.emit(JobFailed(message=message, step=step, time=events[-1].time))
        elif not events and run.message:
            log.emit(JobFailed(message=run.message, step=run.step))
        with self._lock:
            self.view = RunView(log, self.thumbnails, run=run)
            self.runs += 1

    def serve(self, folder: Path) -> None:
        """Let pages fetch the files of a folder that the server itself chose or checked."""
        if str(folder) not in self.served:
            self.served.append(str(folder))

    # ---- starting -----------------------------------------------------------------------------------

    def start(self, config: KohyaConfig, base: Path, owner: str = "") -> Run:
        """Check ``config`` and train it: now, or after those that wait where a run goes on.

        Raises:
            ConfigError: It cannot be trained.
        """
        config = self.paths.expand(config)
        job = Job.from_config(config, base=base)
        self.paths.check(job)
        with self._lock:
            self.config, self.base, self.opened = config, base, None
            going = self.runner.running
            run = self.queue.add(
                name=job.output_name,
                owner=owner,
                config=configuration.dumps(config),
                base=str(base),
                first=not going,
            )
            if not going:
                self._begin(run, job)
            return run

    def enqueue(self, kind: str, settings: str, base: Path, owner: str = "") -> Run:
        """Let the queue do work that is no training: now, or after those that wait.

        Args:
            kind: A key of `app.works.KINDS`.
            settings: What that kind's module makes the work from.
            base: Folder that relative paths start from.
            owner: Who asked for it; "" where nobody logs in.

        Raises:
            ConfigError: It cannot be done.
        """
        work = works.load(kind, settings, base, self.paths)
        with self._lock:
            going = self.runner.running
            run = self.queue.add(
                name=work.name, owner=owner, config=settings, base=str(base), first=not going, kind=kind
            )
            if not going:
                self._begin(run, work)
            return run

    def advance(self) -> None:
        """Start the next of those that wait, where nothing goes on and nobody holds them."""
        with self._lock:
            while not self.held and not self.runner.running and (waiting := self.queue.waiting()):
                run = waiting[0]
                try:
                    self._begin(run, self._load(run))
                except TrainerError as error:
                    now = time.time()
                    self.queue.change(run.id, status="failed", message=str(error), started=now, ended=now)

    def _load(self, run: Run) -> Job | Work:
        """What a run in the list does."""
        base = Path(run.base)
        if run.kind != "training":
            return works.load(run.kind, run.config, base, self.paths)
        job = Job.from_config(configuration.loads(run.config).config, base=base)
        self.paths.check(job)
        return job

    def _begin(self, run: Run, job: Job | Work) -> None:
        self.runner.start(job)
        training = job if isinstance(job, Job) else None
        values = {
            "status": "running",
            "started": training.started if training else time.time(),
            "journal": str(job.journal),
            "work": work_of(training) if training else "",
        }
        self.queue.change(run.id, **values)
        run = self.queue.get(run.id) or run
        self.view = RunView(self.runner.events, self.thumbnails, run=run, job=training)
        self.runs += 1
        pictures = job.output_dir / "sample" if isinstance(job, Job) else job.pictures
        if pictures is not None:
            self.serve(pictures)
        self._follower = threading.Thread(
            target=self._follow, args=(run, self.view), name="follow", daemon=True
        )
        self._follower.start()

    def _follow(self, run: Run, view: RunView) -> None:
        """Wait for the end of a run, note it, and start the next one."""
        self.runner.wait()
        view.update()
        ends: dict[type, Status] = {
            JobFinished: "finished",
            WorkFinished: "finished",
            JobStopped: "stopped",
        }
        status = ends.get(type(view.end), "failed")
        message = view.end.message if isinstance(view.end, JobFailed) else ""
        steps = view.started.steps if view.started else 0
        step = view.step.step if view.step else 0
        self.queue.change(
            run.id,
            status=status,
            ended=time.time(),
            message=message,
            step=step,
            steps=steps,
            step_s=view.mean_step_s,
        )
        self.advance()

    def settle(self, timeout_s: float = 10.0) -> None:
        """Wait until the end of the last run stands in the list."""
        if self._follower is not None:
            self._follower.join(timeout_s)

    # ---- what a person asks of a run -----------------------------------------------------------------

    def stop(self, user: str) -> str:
        """Stop and save; a sentence if that is not allowed."""
        run = self.queue.running()
        if not self.may(user, run):
            return f"this run was started by {run.owner if run else '?'}: only they and the admin may stop it"
        self.runner.stop()
        return ""

    def resume(self, number: int, user: str) -> Run:
        """Go on with a run that was stopped or interrupted, from its newest state.

        Raises:
            ConfigError: There is no such run, or no state of it.
        """
        run = self.queue.get(number)
        if run is None:
            raise ConfigError("there is no such run any more: reload the page")
        if run.kind != "training":
            return self.enqueue(run.kind, run.config, Path(run.base), user)
        state = self.newest_state(run)
        if state is None:
            raise ConfigError(
                f"{run.name} saved no state to resume from: start it again, or continue from its last LoRA file "
                "(network_weights)"
            )
        config = configuration.loads(run.config).config
        return self.start(config.model_copy(update={"resume": str(state)}), Path(run.base), user)

    def newest_state(self, run: Run) -> Path | None:
        """The last state folder that a run saved and that is still there."""
        shown = self.view if self.view.run is not None and self.view.run.id == run.id else None
        if shown is None:
            try:
                log = EventLog()
                for event in read_journal(self.paths.resolve(run.journal)):
                    log.emit(event)
            except (OSError, ValueError, ConfigError):
                return None
            shown = RunView(log, self.thumbnails, quiet=True)
            shown.update()
        return next((path for path in reversed(shown.states) if path.is_dir()), None)

    # ---- files used before -----------------------------------------------------------------------------

    def recent(self) -> list[str]:
        """Configuration files that were opened or saved, the last one first."""
        try:
            found = json.loads((self.state / "recent.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return []
        return [item for item in found if isinstance(item, str)][:RECENT] if isinstance(found, list) else []

    def remember(self, file: Path) -> None:
        """Note a configuration file for `recent`."""
        with self._lock:
            kept: Sequence[Any] = [item for item in self.recent() if item != str(file)]
            atomic_write(self.state / "recent.json", json.dumps([str(file), *kept][:RECENT], indent=2))


def work_of(job: Job) -> str:
    """What decides the time of a step, as a text to compare."""
    config = job.config
    parts = [job.family, job.width, job.height, config.train_batch_size, config.gradient_accumulation_steps]
    parts += [config.mixed_precision, config.gradient_checkpointing, config.LoRA_type, config.network_dim]
    parts += [config.pretrained_model_name_or_path, job.trains_text_encoder, config.cache_latents]
    return " ".join(map(str, parts))
