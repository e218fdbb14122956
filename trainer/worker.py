"""The worker thread: one run at a time, followed by any number of pages.

PyTorch is imported with the first run, so that a page is there at once.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from trainer.controls import Controls
from trainer.errors import ConfigError
from trainer.events import EventLog, JobFailed

if TYPE_CHECKING:
    from trainer.job import Job
    from trainer.work import Work

__all__ = ["Runner"]


@dataclass
class Runner:
    """Runs one job or other work at a time on a worker thread; any number of pages follow `events`."""

    events: EventLog = field(default_factory=EventLog)
    controls: Controls = field(default_factory=Controls)
    _thread: threading.Thread | None = None
    _lock: threading.Lock = field(default_factory=threading.Lock)

    @property
    def running(self) -> bool:
        """Whether a run is going on."""
        return self._thread is not None and self._thread.is_alive()

    def start(self, job: Job | Work) -> None:
        """Start ``job`` on the worker thread.

        Raises:
            ConfigError: A run is going on already.
        """
        with self._lock:
            if self.running:
                raise ConfigError("a run is going on: stop it first, or wait until it has finished")
            self.events, self.controls = EventLog(), Controls()
            self._thread = threading.Thread(
                target=self._work, args=(job, self.events, self.controls), name="trainer", daemon=True
            )
            self._thread.start()

    @staticmethod
    def _work(job: Job | Work, events: EventLog, controls: Controls) -> None:
        from trainer.job import Job
        from trainer.work import perform

        try:
            # Whole and first, whatever the work needs of it: a page's checks import it too, and two threads that
            # each import a part find the other's half done.
            from trainer.runner import run

            if isinstance(job, Job):
                run(job, events, controls)
            else:
                perform(job, events, controls)
        except BaseException as error:  # noqa: BLE001 - the page lives on
            said = any(isinstance(event, JobFailed) for event in events.since(0)[0])
            if not said:  # the engine itself could not be imported
                events.emit(JobFailed(message=f"{type(error).__name__}: {error}", step=0))

    def stop(self) -> None:
        """Ask the run to finish its step, save and end."""
        self.controls.stop.set()

    def wait(self, timeout_s: float | None = None) -> bool:
        """Wait for the run to end; True once it has."""
        if self._thread is not None:
            self._thread.join(timeout_s)
        return not self.running
