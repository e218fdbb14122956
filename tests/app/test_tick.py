"""Any number of pages follow one run; each gets what it has not seen."""

from __future__ import annotations

import re
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gradio as gr
import pytest
from PIL import Image

from app.paths import Paths
from app.runs import Run
from app.session import Session
from app.tabs.train import PARTS, tick
from app.view import RunView
from trainer import config as configuration
from trainer.config import KohyaConfig
from trainer.errors import ConfigError
from trainer.events import (
    CheckpointSaved,
    Event,
    EventLog,
    JobFinished,
    JobStarted,
    LogLine,
    PhaseStarted,
    SampleReady,
    StepDone,
)

SKIPPED = gr.skip()
BUTTONS = ("start", "stop", "sample", "save")
FIRST = 1 + len(BUTTONS)


@pytest.fixture
def worker(session: Session) -> Iterator[threading.Event]:
    """A run that goes on until the event is set."""
    end = threading.Event()
    session.runner._thread = threading.Thread(target=end.wait)
    session.runner._thread.start()
    begin(session)
    yield end
    end.set()
    session.runner._thread.join()


def begin(session: Session) -> None:
    session.view = RunView(EventLog(), session.thumbnails)
    session.runs += 1
    started = JobStarted(name="x", output_dir=Path("o"), family="sd", first_step=0, steps=50, epochs=1)
    session.view.log.emit(started)


def changed(values: list[Any]) -> set[str]:
    """Names of what a tick sent."""
    return {
        name
        for name, value in zip(["cursor", *BUTTONS, *PARTS], values, strict=True)
        if not (isinstance(value, dict) and value == SKIPPED)
    }


def step(number: int) -> StepDone:
    return StepDone(step=number, epoch=1, loss=0.1, avr_loss=0.1, lr={}, step_s=1.0)


def test_a_page_gets_only_what_is_new(session: Session, worker: threading.Event, tmp_path: Path) -> None:
    emit = session.view.log.emit
    first = tick(session, None)
    assert changed(first) == {"cursor", *BUTTONS, *PARTS}
    assert changed(tick(session, first[0])) == set()
    emit(step(1))
    second = tick(session, first[0])
    assert changed(second) == {"cursor", "progress", "chart", "rates"}
    emit(LogLine(message="hm", level="warning"))
    third = tick(session, second[0])
    assert changed(third) == {"cursor", "notices", "log"}
    picture = tmp_path / "s.png"
    Image.new("RGB", (8, 8)).save(picture)
    emit(SampleReady(step=1, epoch=None, index=0, prompt="p", seed=1, path=picture))
    assert changed(tick(session, third[0])) == {"cursor", "samples", "log"}


def test_two_readers_and_a_late_one_see_the_same(session: Session, worker: threading.Event) -> None:
    ours, theirs = tick(session, None)[0], tick(session, None)[0]
    for number in range(1, 21):
        session.view.log.emit(step(number))
        ours = tick(session, ours)[0]  # the other page sleeps
    theirs = tick(session, theirs)
    late = tick(session, None)
    assert theirs[0] == late[0] == ours
    assert changed(theirs) == {"cursor", "progress", "chart", "rates", "log"}
    chart = FIRST + PARTS.index("chart")
    assert theirs[chart] == late[chart]
    for kind in ("raw", "s0"):
        line = re.search(rf'<path class="{kind}" d="M([^"]+)"><title>', late[chart])
        assert line is not None
        assert len(line[1].split()) == 20
    for index in (FIRST + PARTS.index("progress"), FIRST + PARTS.index("log")):
        assert theirs[index] == late[index]


def test_many_threads_take_each_event_once(session: Session, worker: threading.Event) -> None:
    seen: list[str] = []

    def follow() -> None:
        cursor = None
        for _ in range(200):
            cursor = tick(session, cursor)[0] if cursor is None else _next(session, cursor)
        seen.append(str(cursor))

    threads = [threading.Thread(target=follow) for _ in range(4)]
    for thread in threads:
        thread.start()
    for number in range(1, 201):
        session.view.log.emit(step(number))
    for thread in threads:
        thread.join()
    tick(session, None)
    assert [point.step for point in session.view.points] == list(range(1, 201))


def _next(session: Session, cursor: str) -> str:
    found = tick(session, cursor)[0]
    return cursor if found == SKIPPED else str(found)


def test_stop_shows_on_every_page(session: Session, worker: threading.Event) -> None:
    cursor = tick(session, None)[0]
    session.runner.stop()
    values = tick(session, cursor)
    assert changed(values) == {"cursor", *BUTTONS, "progress"}
    assert values[2].value == "Stopping …"
    assert values[2].interactive is False
    assert "Stopping" in values[FIRST]


def test_the_end_of_a_run(session: Session, worker: threading.Event) -> None:
    cursor = tick(session, None)[0]
    session.view.log.emit(JobFinished(step=50, path=Path("o/x.safetensors"), elapsed_s=9))
    worker.set()
    assert session.runner.wait(5)
    values = tick(session, cursor)
    assert {"start", "stop", "progress", "notices"} <= changed(values)
    assert values[1].interactive is True
    assert "Finished" in values[FIRST]
    opened_later = tick(session, None)
    assert "Finished" in opened_later[FIRST]


def test_a_new_run_replaces_all(session: Session, worker: threading.Event) -> None:
    session.view.log.emit(PhaseStarted(phase="train", total=50))
    cursor = tick(session, None)[0]
    begin(session)
    assert changed(tick(session, cursor)) == {"cursor", *BUTTONS, *PARTS}


@pytest.mark.parametrize("cursor", ["", "junk", "a b c d e f g h i j k l", " " * 50, "☃", "0 " * 11 + "0"])
def test_any_cursor_is_answered(session: Session, worker: threading.Event, cursor: str) -> None:
    assert changed(tick(session, cursor)) == {"cursor", *BUTTONS, *PARTS}


def test_the_cursor_of_another_server_shows_this_one(session: Session, tmp_path: Path) -> None:
    other = Session(paths=session.paths, state=tmp_path / "other", config=KohyaConfig(), base=tmp_path)
    values = tick(session, tick(other, None)[0])
    assert changed(values) == {"cursor", *BUTTONS, *PARTS}
    assert "Nothing is being trained" in values[FIRST]


def test_a_config_that_cannot_be_trained_does_not_start(session: Session) -> None:
    with pytest.raises(ConfigError, match="train_data_dir"):
        session.start(KohyaConfig(output_dir="o"), session.base)
    assert session.runs == 0
    assert session.doing == "idle"


def recorded(session: Session, tmp_path: Path, *events: Event) -> Path:
    """A run that an earlier server left behind, with a picture."""
    out = tmp_path / "out"
    (out / "sample").mkdir(parents=True)
    picture = out / "sample" / "s.png"
    Image.new("RGB", (8, 8)).save(picture)
    log = EventLog(out / "logs" / "x-1" / "journal.jsonl")
    log.emit(JobStarted(name="x", output_dir=out, family="sd", first_step=0, steps=50, epochs=1))
    log.emit(step(1))
    log.emit(SampleReady(step=1, epoch=None, index=0, prompt="p", seed=1, path=picture))
    for event in events:
        log.emit(event)
    log.close()
    note(session, str(log.journal))
    return out


def note(session: Session, journal: str) -> Run:
    """A row of the list of runs, as it is while a run goes on."""
    run = session.queue.add(name="x", owner="", config=configuration.dumps(KohyaConfig()), base="/")
    session.queue.change(run.id, status="running", started=1.0, journal=journal)
    return run


def again(session: Session, **roots: Path) -> Session:
    """The next server with the same state folder."""
    paths = Paths(roots, confined=bool(roots))
    return Session(paths=paths, state=session.state, config=KohyaConfig(), base=session.base)


def test_the_next_server_shows_the_last_run(session: Session, tmp_path: Path) -> None:
    end = JobFinished(step=50, path=Path("o/x.safetensors"), elapsed_s=9)
    out = recorded(session, tmp_path, end)
    later = again(session)
    values = tick(later, None)
    assert "Finished" in values[FIRST]
    assert "<img" in values[FIRST + PARTS.index("samples")]
    assert str(out / "sample") in later.served
    assert later.doing == "idle"


def test_a_run_that_was_cut_off_is_named_so(session: Session, tmp_path: Path) -> None:
    recorded(session, tmp_path)
    values = tick(again(session), None)
    assert "Interrupted at step 1" in values[FIRST]
    assert "the program ended before this run did" in values[FIRST + 1]


def test_a_last_run_outside_the_roots_is_not_shown(session: Session, tmp_path: Path) -> None:
    out = recorded(session, tmp_path, JobFinished(step=50, path=Path("x"), elapsed_s=9))
    (tmp_path / "root").mkdir()
    later = again(session, pics=tmp_path / "root")
    assert "Nothing is being trained" in tick(later, None)[FIRST]
    assert str(out / "sample") not in later.served


@pytest.mark.parametrize("journal", ["", "gone/journal.jsonl", "\0", "x" * 5000])
def test_a_journal_that_leads_nowhere(session: Session, journal: str) -> None:
    note(session, journal)
    assert "Nothing is being trained" in tick(again(session), None)[FIRST]


def test_what_ran_is_interrupted_and_what_waits_is_held(session: Session, tmp_path: Path) -> None:
    out = recorded(session, tmp_path)
    state = out / "x-step00000001-state"
    state.mkdir()
    journal = next(out.glob("logs/*/journal.jsonl"))
    saved = CheckpointSaved(step=1, epoch=1, path=state, kind="state", size_bytes=1)
    with journal.open("a") as lines:
        lines.write(saved.as_json() + "\n" + '{"event": "StepDo')  # torn where the power went
    session.queue.add(name="next", owner="", config="{}", base="/")
    later = again(session)
    values = tick(later, None)
    assert [run.status for run in later.queue.past()] == ["interrupted"]
    assert f"Resume from {state.name}" in values[FIRST + PARTS.index("notices")]
    assert "Interrupted" in values[FIRST + PARTS.index("past")]
    assert "1 run waits since the program was started again" in values[FIRST + PARTS.index("queue")]
    later.advance()
    assert later.doing == "idle"
    (run,) = later.queue.past()
    assert later.newest_state(run) == state
    state.rmdir()
    with pytest.raises(ConfigError, match="saved no state"):
        later.resume(run.id, "")


def test_the_queue_keeps_its_order(session: Session) -> None:
    first, second, third = (
        session.queue.add(name=name, owner="", config="{}", base="/") for name in ("a", "b", "c")
    )
    session.queue.move(third.id, -1)
    session.queue.move(first.id, -1)
    session.queue.move(first.id, 1)
    assert [run.name for run in session.queue.waiting()] == ["c", "a", "b"]
    session.queue.remove(second.id)
    front = session.queue.add(name="d", owner="", config="{}", base="/", first=True)
    session.queue.move(999, 1)
    assert [run.name for run in again(session).queue.waiting()] == ["d", "c", "a"]
    assert front.place < third.place


def test_only_the_owner_and_the_admin_may_stop(session: Session, worker: threading.Event) -> None:
    session.admin = "kim"
    run = note(session, "")
    session.queue.change(run.id, owner="lee")
    assert "only they and the admin" in session.stop("max")
    assert not session.runner.controls.stop.is_set()
    assert session.stop("lee") == ""
    assert session.runner.controls.stop.is_set()
    assert session.may("kim", session.queue.running())
