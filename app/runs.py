"""The list of runs: what waits, what goes on and what has been, in one SQLite file that a restart keeps."""

from __future__ import annotations

import sqlite3
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

__all__ = ["Run", "Runs", "Status"]

Status = Literal["waiting", "running", "finished", "stopped", "failed", "interrupted"]

TABLE = """CREATE TABLE IF NOT EXISTS runs (
    id INTEGER PRIMARY KEY AUTOINCREMENT, name TEXT NOT NULL, owner TEXT NOT NULL, config TEXT NOT NULL,
    base TEXT NOT NULL, status TEXT NOT NULL, place REAL NOT NULL, created REAL NOT NULL, started REAL, ended REAL,
    journal TEXT NOT NULL DEFAULT '', message TEXT NOT NULL DEFAULT '', step INTEGER NOT NULL DEFAULT 0,
    steps INTEGER NOT NULL DEFAULT 0, step_s REAL, work TEXT NOT NULL DEFAULT '',
    kind TEXT NOT NULL DEFAULT 'training')"""


@dataclass(frozen=True, kw_only=True)
class Run:
    """One row. Times are seconds since the epoch."""

    id: int
    name: str
    owner: str
    """Who started it; "" where nobody logs in."""
    config: str
    """Kohya's JSON, without secrets; for other work what `app.works` makes it from."""
    base: str
    """Folder that relative paths start from."""
    status: Status
    place: float
    """Order of those that wait."""
    created: float
    started: float | None
    ended: float | None
    journal: str
    message: str
    step: int
    steps: int
    step_s: float | None
    """Mean time of a step."""
    work: str
    """What decides the time of a step: family, size, batch, precision, device."""
    kind: str
    """"training", or a name in `app.works.KINDS`."""


class Runs:
    """The runs of a state folder. Safe from many threads.

    Args:
        file: The database; made where there is none.
    """

    def __init__(self, file: Path) -> None:
        file.parent.mkdir(parents=True, exist_ok=True)
        self._file = file
        self._lock = threading.Lock()
        self.revision = 0
        """Grows with every change."""
        with self._open() as database:
            database.execute(TABLE)
            if "kind" not in [row["name"] for row in database.execute("PRAGMA table_info(runs)")]:
                database.execute("ALTER TABLE runs ADD COLUMN kind TEXT NOT NULL DEFAULT 'training'")

    @contextmanager
    def _open(self) -> Iterator[sqlite3.Connection]:
        with self._lock:
            database = sqlite3.connect(self._file, timeout=10)
            database.row_factory = sqlite3.Row
            try:
                with database:
                    yield database
            finally:
                database.close()

    def _read(self, where: str, *values: Any) -> list[Run]:
        with self._open() as database:
            return [Run(**dict(row)) for row in database.execute(f"SELECT * FROM runs {where}", values)]

    def get(self, number: int) -> Run | None:
        """The run of an id."""
        return next(iter(self._read("WHERE id = ?", number)), None)

    def waiting(self) -> list[Run]:
        """Those that wait, the next one first."""
        return self._read("WHERE status = 'waiting' ORDER BY place, id")

    def running(self) -> Run | None:
        """The one that goes on."""
        return next(iter(self._read("WHERE status = 'running'")), None)

    def past(self, limit: int = 50) -> list[Run]:
        """Those that are over, the newest first."""
        return self._read(
            "WHERE status NOT IN ('waiting', 'running') ORDER BY started DESC, id DESC LIMIT ?", limit
        )

    def last_step_s(self, work: str) -> float | None:
        """Mean step time of the newest run that did the same work."""
        found = self._read("WHERE work = ? AND step_s IS NOT NULL ORDER BY started DESC LIMIT 1", work)
        return found[0].step_s if found else None

    def add(
        self, *, name: str, owner: str, config: str, base: str, first: bool = False, kind: str = "training"
    ) -> Run:
        """Put a run at the end of those that wait, or before them."""
        with self._open() as database:
            edge = "MIN(place) - 1" if first else "MAX(place) + 1"
            row = database.execute(f"SELECT {edge} AS place FROM runs WHERE status = 'waiting'").fetchone()
            values = (name, owner, config, base, "waiting", row["place"] or 0.0, time.time(), kind)
            number = database.execute(
                "INSERT INTO runs (name, owner, config, base, status, place, created, kind) "
                "VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
                values,
            ).lastrowid
            self.revision += 1
        found = self.get(int(number or 0))
        assert found is not None
        return found

    def change(self, number: int, **values: Any) -> None:
        """Set columns of a run."""
        names = ", ".join(f"{name} = ?" for name in values)
        with self._open() as database:
            database.execute(f"UPDATE runs SET {names} WHERE id = ?", (*values.values(), number))
            self.revision += 1

    def remove(self, number: int) -> None:
        """Take a run that does not go on off the list; its files stay."""
        with self._open() as database:
            database.execute("DELETE FROM runs WHERE id = ? AND status != 'running'", (number,))
            self.revision += 1

    def move(self, number: int, by: int) -> None:
        """Let a waiting run change places with the one before (-1) or after it (1)."""
        order = [run.id for run in self.waiting()]
        if number not in order:
            return
        here = order.index(number)
        there = min(max(here + by, 0), len(order) - 1)
        order.insert(there, order.pop(here))
        with self._open() as database:
            database.executemany(
                "UPDATE runs SET place = ? WHERE id = ?", [(place, one) for place, one in enumerate(order)]
            )
            self.revision += 1

    def interrupt(self) -> list[Run]:
        """At the start of a server nothing can be running: what was, is interrupted. Returns those."""
        cut = self._read("WHERE status = 'running'")
        for run in cut:
            self.change(run.id, status="interrupted", ended=time.time())
        return cut
