"""Long work that is no training but waits in the same queue: captions, grids of samples, verdicts.

It speaks the same events, keeps the same kind of journal and obeys the same Stop as a training run,
so that a page follows it like one.
"""

from __future__ import annotations

import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from trainer.controls import Controls
from trainer.errors import StopTraining, TrainerError
from trainer.events import Event, EventLog, JobFailed, JobStopped, WorkFinished

__all__ = ["Done", "Work", "perform"]


@dataclass(frozen=True)
class Done:
    """What was made."""

    message: str
    """One sentence for a person."""
    path: Path | None = None
    """The file or folder that matters most."""


class Work(Protocol):
    """One piece of work, ready to run."""

    @property
    def name(self) -> str:
        """What a person calls it in a list of runs."""

    @property
    def journal(self) -> Path:
        """File for its events; its folder is made."""

    @property
    def pictures(self) -> Path | None:
        """Folder of the pictures that it makes, which a page may show; None where it makes none."""

    def run(self, emit: Callable[[Event], None], stopped: Callable[[], bool]) -> Done:
        """Do it, in this thread.

        Args:
            emit: Takes `PhaseStarted`, `Progress`, `LogLine`, `SampleReady` and the like.
            stopped: Whether a person wants it to end. Look at it between pieces; once it is True,
                raise `trainer.errors.StopTraining` with all that was done kept.

        Raises:
            TrainerError: One sentence: what, where, what to do.
        """


def perform(work: Work, events: EventLog, controls: Controls) -> None:
    """Run ``work`` to its end and say how it ended.

    Args:
        work: What to do.
        events: Gets everything that happens; its journal is opened at `Work.journal`.
        controls: Its ``stop`` ends the work early.

    Raises:
        TrainerError: Said as `JobFailed` too.
    """
    started = time.time()
    try:
        work.journal.parent.mkdir(parents=True, exist_ok=True)
        events.open(work.journal)
        done = work.run(events.emit, controls.stop.is_set)
        elapsed_s = time.time() - started
        events.emit(WorkFinished(message=done.message, path=done.path, elapsed_s=elapsed_s))
    except StopTraining:
        events.emit(JobStopped(step=0, path=None, state=None, elapsed_s=time.time() - started))
    except BaseException as error:
        known = isinstance(error, TrainerError)
        message = str(error) if known else f"{type(error).__name__}: {error}"
        events.emit(JobFailed(message=message, step=0, detail="" if known else traceback.format_exc()))
        raise
    finally:
        events.close()
