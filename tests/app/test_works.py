"""Work that is no training waits in the same queue, is followed alike, and outlives the server."""

from __future__ import annotations

import json
import sqlite3
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from app import works
from app.paths import Paths
from app.runs import Run, Runs
from app.session import Session
from trainer.errors import ConfigError, StopTraining
from trainer.events import Event, LogLine, PhaseStarted, Progress, read_journal
from trainer.work import Done


@dataclass(frozen=True)
class Counting:
    """Counts to a number, a file for each."""

    folder: Path
    to: int
    name: str = "counting"

    @property
    def journal(self) -> Path:
        return self.folder / "logs" / "journal.jsonl"

    @property
    def pictures(self) -> Path | None:
        return self.folder

    def run(self, emit: Callable[[Event], None], stopped: Callable[[], bool]) -> Done:
        if self.to < 0:
            raise ConfigError("nothing counts down")
        emit(PhaseStarted(phase="count", total=self.to))
        for number in range(self.to):
            if stopped():
                raise StopTraining
            (self.folder / f"{number}.txt").write_text(str(number))
            emit(Progress(phase="count", done=number + 1, total=self.to))
            time.sleep(0.01)
        emit(LogLine(message="counted"))
        return Done(f"{self.to} files were written", self.folder)


def work(settings: str, base: Path, paths: Paths) -> Counting:
    return Counting(base, json.loads(settings)["to"])


@pytest.fixture
def counting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(works.KINDS, "counting", work)


def _ended(session: Session, run: Run) -> Run:
    assert session.runner.wait(20)
    session.settle()
    found = session.queue.get(run.id)
    assert found is not None
    return found


@pytest.mark.usefixtures("counting")
def test_it_runs_and_is_shown_like_a_training(session: Session, tmp_path: Path) -> None:
    run = _ended(session, session.enqueue("counting", '{"to": 3}', tmp_path, "ann"))
    assert (run.kind, run.status, run.owner) == ("counting", "finished", "ann")
    assert [event.done for event in read_journal(Path(run.journal)) if isinstance(event, Progress)] == [
        1,
        2,
        3,
    ]
    assert "3 files were written" in session.view.notices_html()
    assert "Finished" in session.view.progress_html("idle")
    assert session.may_serve(str(tmp_path / "0.txt"))
    session.show(run)  # as a server that starts later would
    session.view.update()
    assert "3 files were written" in session.view.notices_html()


@pytest.mark.usefixtures("counting")
def test_stop_ends_it_and_resume_does_it_again(session: Session, tmp_path: Path) -> None:
    run = session.enqueue("counting", '{"to": 100000}', tmp_path)
    while not (tmp_path / "3.txt").exists():
        time.sleep(0.01)
    assert session.stop("") == ""
    run = _ended(session, run)
    assert run.status == "stopped"
    assert "Stopped" in session.view.progress_html("idle")
    again = session.resume(run.id, "")
    assert again.kind == "counting"
    session.stop("")
    assert _ended(session, again).status == "stopped"


@pytest.mark.usefixtures("counting")
def test_those_that_wait_follow_in_order(session: Session, tmp_path: Path) -> None:
    runs = [session.enqueue("counting", json.dumps({"to": number}), tmp_path) for number in (20, 2, -1)]
    for _ in runs:
        session.runner.wait(20)
        session.settle()
    assert [_ended(session, run).status for run in runs] == ["finished", "finished", "failed"]
    assert _ended(session, runs[2]).message == "nothing counts down"


def test_a_kind_that_is_not_known_is_named(session: Session, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="dancing"):
        session.enqueue("dancing", "{}", tmp_path)


def test_a_list_of_an_older_version_is_taken_over(tmp_path: Path) -> None:
    file = tmp_path / "runs.sqlite3"
    Runs(file).add(name="old", owner="", config="{}", base="/")
    with sqlite3.connect(file) as database:
        database.execute("ALTER TABLE runs DROP COLUMN kind")
    database.close()
    assert [run.kind for run in Runs(file).waiting()] == ["training"]
