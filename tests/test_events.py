"""The event log: many readers, one journal, torn lines."""

import math
import threading
from pathlib import Path

from trainer.events import CheckpointSaved, EventLog, LogLine, StepDone, read_journal


def step(number: int, loss: float = 0.5) -> StepDone:
    return StepDone(step=number, epoch=1, loss=loss, avr_loss=loss, lr={"unet": 1e-4}, step_s=0.1)


def test_readers_see_the_same_events_and_late_ones_catch_up() -> None:
    log = EventLog()
    log.emit(step(1))
    first, cursor = log.since(0)
    log.emit(step(2))
    late, _ = log.since(0)
    again, end = log.since(cursor)
    assert first + again == late
    assert log.since(end) == ([], 2)


def test_journal_holds_what_was_emitted_before_and_after_it_was_opened(tmp_path: Path) -> None:
    log = EventLog()
    log.emit(LogLine(message="early ä"))
    log.open(tmp_path / "runs" / "journal.jsonl")
    log.emit(CheckpointSaved(step=3, epoch=1, path=tmp_path / "a.safetensors", kind="lora", size_bytes=7))
    log.close()
    events = list(read_journal(tmp_path / "runs" / "journal.jsonl"))
    assert events == log.since(0)[0]


def test_a_torn_last_line_costs_only_itself(tmp_path: Path) -> None:
    journal = tmp_path / "journal.jsonl"
    log = EventLog(journal)
    log.emit(step(1))
    log.emit(step(2))
    log.close()
    journal.write_bytes(journal.read_bytes()[:-20])
    resumed = EventLog(journal)
    resumed.emit(step(3))
    resumed.close()
    steps = [event.step for event in read_journal(journal) if isinstance(event, StepDone)]
    assert steps == [1, 3]


def test_nan_survives_the_journal(tmp_path: Path) -> None:
    log = EventLog(tmp_path / "j.jsonl")
    log.emit(step(1, math.nan))
    log.close()
    (event,) = read_journal(tmp_path / "j.jsonl")
    assert isinstance(event, StepDone)
    assert math.isnan(event.loss)


def test_unknown_and_foreign_lines_are_passed_over(tmp_path: Path) -> None:
    journal = tmp_path / "j.jsonl"
    journal.write_text(
        '{"event": "FromTheFuture"}\n[]\nnull\n\n{"event": "LogLine", "message": "ok", "x": 1}\n'
    )
    assert [event.message for event in read_journal(journal) if isinstance(event, LogLine)] == ["ok"]


def test_many_threads_emit_without_loss(tmp_path: Path) -> None:
    log = EventLog(tmp_path / "j.jsonl")

    def emit_many() -> None:
        for _ in range(200):
            log.emit(LogLine(message="x"))

    threads = [threading.Thread(target=emit_many) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    log.close()
    assert len(log.since(0)[0]) == 1600
    assert len(list(read_journal(tmp_path / "j.jsonl"))) == 1600
