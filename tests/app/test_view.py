"""Events in, HTML out."""

from __future__ import annotations

import dataclasses
import math
from html.parser import HTMLParser
from pathlib import Path

import pytest
from PIL import Image

from app.view import CHART_POINTS, LOG_LINES, WARNINGS_SHOWN, RunView, duration
from trainer.events import (
    CheckpointSaved,
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
)

EVIL = "<img src=x onerror=alert(1)>\"'><script>alert(2)</script>&amp;"


@pytest.fixture
def view(tmp_path: Path) -> RunView:
    return RunView(EventLog(), tmp_path / "thumbnails")


def tell(view: RunView, *events: Event) -> None:
    for event in events:
        view.log.emit(event)
    view.update()


def started(steps: int = 100) -> JobStarted:
    return JobStarted(name="x", output_dir=Path("out"), family="sd", first_step=0, steps=steps, epochs=2)


def step(number: int, loss: float = 0.1, step_s: float = 2.0) -> StepDone:
    return StepDone(step=number, epoch=1, loss=loss, avr_loss=0.12, lr={"unet": 1e-4}, step_s=step_s)


class Tags(HTMLParser):
    """What a browser would make of a piece of HTML."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.found: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.words = ""
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append(tag)
        self.attributes += attrs

    def handle_data(self, data: str) -> None:
        self.words += data


def test_nothing_has_run(view: RunView) -> None:
    view.update()
    assert "Nothing is being trained" in view.progress_html("idle")
    assert view.notices_html() == ""
    assert view.memory_html() == ""
    assert view.chart() == []
    assert not +view.revisions


def test_phases_and_steps(view: RunView) -> None:
    assert "Starting" in view.progress_html("running")
    tell(view, PhaseStarted(phase="cache latents", total=20), Progress(phase="cache latents", done=5))
    words = Tags(view.progress_html("running")).words
    assert "Caching latents" in words
    assert "5 / 20" in words
    assert 'aria-valuenow="25"' in view.progress_html("running")
    tell(view, started(), PhaseStarted(phase="train", total=100), step(1), step(2))
    words = Tags(view.progress_html("running")).words
    assert "Training" in words
    assert "2 / 100" in words
    assert "loss 0.1200" in words
    assert view.eta_s == pytest.approx(98 * 2.0)
    assert "3:16 min left" in words
    assert "Stopping" in view.progress_html("stopping")


def test_a_sample_phase_leaves_the_step_count_right(view: RunView) -> None:
    tell(view, started(), PhaseStarted(phase="train", total=100), step(10))
    tell(view, PhaseStarted(phase="sample", total=3), Progress(phase="sample", done=2), step(11))
    assert "11 / 100" in Tags(view.progress_html("running")).words
    tell(view, PhaseStarted(phase="sample"), PhaseStarted(phase="train", total=100))
    assert "11 / 100" in Tags(view.progress_html("running")).words


def test_a_resumed_run_does_not_begin_at_nought(view: RunView) -> None:
    tell(view, dataclasses.replace(started(), first_step=40), PhaseStarted(phase="train", total=100))
    assert "40 / 100" in Tags(view.progress_html("running")).words


def test_ends(view: RunView, tmp_path: Path) -> None:
    tell(view, started(), step(3))
    tell(view, JobFinished(step=100, path=tmp_path / "x.safetensors", elapsed_s=125))
    assert "Finished in 2:05 min" in view.progress_html("idle")
    assert str(tmp_path / "x.safetensors") in Tags(view.notices_html()).words
    assert view.eta_s is None

    stopped = RunView(EventLog(), tmp_path)
    tell(stopped, JobStopped(step=7, path=None, state=tmp_path / "x-state", elapsed_s=1))
    assert "Stopped at step 7" in stopped.progress_html("idle")
    assert str(tmp_path / "x-state") in Tags(stopped.notices_html()).words

    # No state could be written (a full disk): the file is named all the same.
    half = RunView(EventLog(), tmp_path)
    tell(half, JobStopped(step=7, path=tmp_path / "x.safetensors", state=None, elapsed_s=1))
    assert f"The LoRA is here:{tmp_path / 'x.safetensors'}" in Tags(half.notices_html()).words

    early = RunView(EventLog(), tmp_path)
    tell(early, JobStopped(step=0, path=None, state=None, elapsed_s=1))
    assert "nothing to save" in Tags(early.notices_html()).words

    failed = RunView(EventLog(), tmp_path)
    tell(failed, JobFailed(message="no such model: choose another", step=0, detail="Traceback: x < y"))
    assert "Did not start" in failed.progress_html("idle")
    assert 'role="alert"' in failed.notices_html()
    words = Tags(failed.notices_html()).words
    assert "no such model: choose another" in words
    assert "Traceback: x < y" in words


def test_what_does_not_end_the_run_is_a_warning(view: RunView) -> None:
    tell(view, LogLine(message="left out: a.png", level="error"), LogLine(message="odd", level="warning"))
    tell(view, LogLine(message="plain"))
    assert [line[10:] for line in view.lines] == ["warning: left out: a.png", "warning: odd", "plain"]
    assert "2 warnings" in view.notices_html()
    tell(view, *(LogLine(message=f"w{i}", level="warning") for i in range(WARNINGS_SHOWN)))
    assert "and 2 more" in view.notices_html()


def test_nothing_that_was_read_becomes_markup(view: RunView, tmp_path: Path) -> None:
    picture = tmp_path / "a 'b' #1 & <i>.png"
    Image.new("RGB", (8, 8)).save(picture)
    tell(
        view,
        PhaseStarted(phase=EVIL, total=3),
        LogLine(message=EVIL, level="warning"),
        SampleReady(step=1, epoch=None, index=0, prompt=EVIL, seed=1, path=picture),
    )
    for text in (view.progress_html("running"), view.samples_html(), view.notices_html()):
        tags = Tags(text)
        assert "script" not in tags.found
        assert not [name for name, _ in tags.attributes if name.startswith("on")]
    for end in (
        JobFailed(message=EVIL, step=1, detail=EVIL),
        JobFinished(step=1, path=Path(EVIL), elapsed_s=1),
        JobStopped(step=1, path=None, state=Path(EVIL), elapsed_s=1),
    ):
        tell(view, end)
        tags = Tags(view.notices_html() + view.progress_html("idle"))
        assert not {"img", "script"} & set(tags.found)
        assert "onerror=alert(1)" in tags.words  # shown as text
    images = [value for name, value in Tags(view.samples_html()).attributes if name == "src"]
    assert len(images) == 1
    assert "'" not in str(images[0])


def test_thumbnails(view: RunView, tmp_path: Path) -> None:
    picture, broken = tmp_path / "big.png", tmp_path / "broken.png"
    Image.new("RGB", (1024, 512), "red").save(picture)
    broken.write_bytes(b"\x89PNG")
    for index, path in enumerate((picture, broken, tmp_path / "gone.png")):
        tell(view, SampleReady(step=5, epoch=None, index=index, prompt="p", seed=1, path=path))
    assert [sample.event.path for sample in view.samples] == [picture]
    with Image.open(view.samples[0].thumbnail) as small:
        assert small.size == (256, 128)
    assert "no thumbnail of broken.png" in view.lines[-3]
    tell(view, SampleReady(step=0, epoch=None, index=0, prompt="p", seed=1, path=picture))
    words = Tags(view.samples_html()).words
    assert words.index("Step 5") < words.index("Before training")


def test_long_runs_stay_small(view: RunView) -> None:
    tell(view, started(10_001), *(step(i, loss=i / 10) for i in range(1, 10_002)))
    points = view.chart()
    assert len(points) <= CHART_POINTS
    assert points[-1].step == 10_001
    assert [point.step for point in points] == sorted({point.step for point in points})
    assert len(view.lines) == LOG_LINES


def test_a_loss_that_is_no_number_is_not_drawn(view: RunView) -> None:
    tell(view, started(), step(1), step(2, loss=math.nan), step(3, loss=math.inf), step(4))
    assert [point.step for point in view.chart()] == [1, 4]


def test_memory(view: RunView) -> None:
    gib = 2**30
    tell(view, MemorySampled(ram_bytes=3 * gib, ram_peak_bytes=5 * gib, ram_total_bytes=16 * gib))
    assert "3.0 of 16 GiB, peak 5.0" in view.memory_html()
    assert "no GPU" in view.memory_html()
    tell(
        view,
        MemorySampled(
            ram_bytes=gib,
            ram_peak_bytes=gib,
            ram_total_bytes=4 * gib,
            vram_bytes=2 * gib,
            vram_peak_bytes=3 * gib,
            vram_total_bytes=8 * gib,
        ),
    )
    assert "2.0 of 8 GiB, peak 3.0" in view.memory_html()


def test_saves_are_told(view: RunView) -> None:
    tell(
        view, CheckpointSaved(step=1, epoch=1, path=Path("a/x.safetensors"), kind="lora", size_bytes=3 << 20)
    )
    assert view.lines[-1].endswith("saved x.safetensors (3.0 MiB)")


@pytest.mark.parametrize(
    ("seconds", "words"),
    [(0.4, "0 s"), (59.4, "59 s"), (59.6, "1:00 min"), (200, "3:20 min"), (3600, "1:00 h"), (7525, "2:05 h")],
)
def test_duration(seconds: float, words: str) -> None:
    assert duration(seconds) == words
