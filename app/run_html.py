"""One run as Review shows it: pictures side by side, charts, and what can be done with its files."""

from __future__ import annotations

import html
import json
import math
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from app.view import make_thumbnail, row, served, thumbnail_of
from trainer.events import counted
from trainer.review.charts import charts, spark
from trainer.review.grid import GridList
from trainer.review.keep import Kept
from trainer.review.run_folder import Checkpoint, Picture, RunFolder

if TYPE_CHECKING:
    from trainer.review.verdict import Signal, Verdict

__all__ = ["Seen", "Thumbnails", "kept_html", "run_html", "verdict_html"]

THUMBNAILS_WITHIN_S = 1.5
"""So long a page waits for thumbnails; pictures without one are shown themselves, and theirs is made meanwhile."""
MOST_ROWS = 40
HOW_TO_COMPARE = (
    "Under each step stands the saved file nearest to it; click its name to choose it. "
    "Click two pictures to compare them."
)


@dataclass(frozen=True)
class Thumbnails:
    """Where thumbnails lie."""

    folder: Path

    def make(self, pictures: Sequence[Path]) -> None:
        """Make those that are missing: some now, the rest beside what follows."""
        missing = [path for path in pictures if not thumbnail_of(path, self.folder).exists()]
        end = time.monotonic() + THUMBNAILS_WITHIN_S
        while missing and time.monotonic() < end:
            self._make(missing.pop(0))
        if missing:
            threading.Thread(target=self._make_all, args=(missing,), name="thumbnails", daemon=True).start()

    def _make_all(self, paths: Sequence[Path]) -> None:
        for path in paths:
            self._make(path)

    def _make(self, path: Path) -> None:
        try:
            make_thumbnail(path, thumbnail_of(path, self.folder))
        except (OSError, ValueError):
            return  # the picture itself is shown, as far as the browser can

    def url(self, path: Path) -> str:
        """Address of a picture's thumbnail, or of the picture while there is none."""
        small = thumbnail_of(path, self.folder)
        return served(small if small.exists() else path)


@dataclass(frozen=True, kw_only=True)
class Seen:
    """What a run's page shows beside the run."""

    going: bool
    """The run is not over."""
    may_write: bool
    """The person may move its files."""
    grids: tuple[GridList, ...]
    trashed: tuple[Path, ...]
    model: str
    """Base model to draw with, as it stands in the settings."""
    verdict: Verdict | None = None


def run_html(run: RunFolder, seen: Seen, thumbnails: Thumbnails) -> str:
    """The whole of a run's part of the page."""
    parts = [_head(run, seen), verdict_html(run, seen.verdict)]
    if run.pictures:
        parts.append(_timeline(run, thumbnails))
    else:
        parts.append('<p class="kiln-empty">This run has no sample pictures.</p>')
    if seen.grids:
        parts += [_grid(grid, thumbnails, index == 0) for index, grid in enumerate(seen.grids[:5])]
    parts.append(COMPARE if run.pictures or seen.grids else "")
    drawn = "".join(f"<h5>{html.escape(title)}</h5>{chart}" for title, chart in charts(run))
    parts.append(f"<section><h4>Charts</h4>{drawn}</section>" if drawn else "")
    parts.append(_form(run, seen))
    return f'<div class="kiln-review">{"".join(parts)}</div>'


def _button(words: str, what: str, tone: str = "", **more: Any) -> str:
    data = html.escape(json.dumps({"do": what, **more}), quote=True)
    return (
        f'<button type="button" class="kiln-small {tone}" data-review="{data}">{html.escape(words)}</button>'
    )


def _head(run: RunFolder, seen: Seen) -> str:
    steps = counted(run.last_step, "step")
    if run.planned_steps and run.planned_steps > run.last_step:
        steps = f"step {run.last_step} of {run.planned_steps}"
    facts = [steps, counted(len(run.checkpoints), "file"), counted(len(run.pictures))]
    if seen.going:
        facts.insert(0, "still going on")
    if run.journal is None:
        facts.append("made by another program")
    others = "".join(
        _button(name, "open", path=str(run.folder), name=name) for name in run.names[:12] if name != run.name
    )
    more = f'<p class="kiln-empty">Other runs in this folder:</p>{row(others)}' if others else ""
    buttons = _button("Save a report", "report") + _button("Load its settings", "settings")
    return (
        f'<header><h3 class="kiln-asis">{html.escape(run.name)}</h3>'
        f"{''.join(f'<span>{fact}</span>' for fact in facts)}"
        f"<code>{html.escape(str(run.folder))}</code>{row(buttons)}{more}</header>"
    )


# ---- pictures -----------------------------------------------------------------------------------------------


def _cell(path: Path, label: str, thumbnails: Thumbnails) -> str:
    """A picture that can be put on either side of the comparison."""
    words = html.escape(label, quote=True)
    data = html.escape(json.dumps({"full": served(path), "label": label}), quote=True)
    return (
        f'<td><button type="button" data-pick="{data}" aria-label="{words}" title="{words}">'
        f'<img src="{thumbnails.url(path)}" alt="" loading="lazy"></button></td>'
    )


def _timeline(run: RunFolder, thumbnails: Thumbnails) -> str:
    """A row for each prompt, a column for each step."""
    thumbnails.make([picture.path for picture in run.pictures])
    head = []
    for step in run.steps:
        near = run.nearest(step)
        title = "Before training" if step == 0 else f"Step {step}"
        label = f'<label for="{_file_id(run, near)}">{html.escape(near.path.name)}</label>' if near else ""
        head.append(f'<th scope="col"><b>{title}</b>{label}</th>')
    rows = []
    for each in run.rows[:MOST_ROWS]:
        seed = "" if each.seed is None else f"<small>seed {each.seed}</small>"
        cells = []
        for step in run.steps:
            picture: Picture | None = each.pictures.get(step)
            label = f"Step {step}: {each.prompt}" if each.prompt else f"Step {step}"
            cells.append("<td></td>" if picture is None else _cell(picture.path, label, thumbnails))
        prompt = html.escape(each.prompt or "no prompt known")
        rows.append(
            f'<tr><th scope="row"><p class="kiln-words kiln-asis">{prompt}</p>{seed}</th>{"".join(cells)}</tr>'
        )
    left_out = len(run.rows) - MOST_ROWS
    note = f'<p class="kiln-empty">{left_out} more prompts are not shown.</p>' if left_out > 0 else ""
    return (
        f'<section id="review-samples"><h4>Samples</h4><p class="kiln-empty">{HOW_TO_COMPARE}</p>'
        f'<div class="kiln-timeline"><table><thead><tr><td></td>{"".join(head)}</tr></thead>'
        f"<tbody>{''.join(rows)}</tbody></table></div>{note}</section>"
    )


def _grid(grid: GridList, thumbnails: Thumbnails, is_open: bool) -> str:
    """A grid that was drawn: a column for each file and strength."""
    folder = grid.sheet.parent
    columns: dict[tuple[str, float], dict[tuple[str, int], Path]] = {}
    steps: dict[str, int] = {}
    for cell in grid.cells:
        place = (str(cell.get("file", "")), float(cell.get("strength", 1)))
        columns.setdefault(place, {})[str(cell.get("prompt", "")), int(cell.get("seed", 0))] = folder / str(
            cell["picture"]
        )
        steps[place[0]] = int(cell.get("step", 0))
    thumbnails.make([path for column in columns.values() for path in column.values()])
    keys = list(dict.fromkeys(key for column in columns.values() for key in column))
    head = "".join(
        f'<th scope="col"><b>{_column_name(file, steps[file], strength)}</b>'
        f"<small>{html.escape(file)}</small></th>"
        for file, strength in columns
    )
    rows = []
    for prompt, seed in keys:
        cells = []
        for (file, strength), column in columns.items():
            path = column.get((prompt, seed))
            label = f"{_plain_name(file, steps[file], strength)}: {prompt}, seed {seed}"
            cells.append("<td></td>" if path is None else _cell(path, label, thumbnails))
        words = f'<p class="kiln-words kiln-asis">{html.escape(prompt)}</p><small>seed {seed}</small>'
        rows.append(f'<tr><th scope="row">{words}</th>{"".join(cells)}</tr>')
    link = f'<a href="{served(grid.sheet)}" target="_blank" rel="noopener">One picture of all</a>'
    return (
        f'<details class="kiln-grid"{" open" if is_open else ""}>'
        f"<summary>{'Grid of 1 picture' if len(grid.cells) == 1 else f'Grid of {len(grid.cells)} pictures'}</summary>"
        f"{link} "
        f"<code>{html.escape(grid.sheet.name)}</code>"
        f'<div class="kiln-timeline"><table><thead><tr><td></td>{head}</tr></thead>'
        f"<tbody>{''.join(rows)}</tbody></table></div></details>"
    )


def _plain_name(file: str, step: int, strength: float) -> str:
    if not file or not strength:
        return "Base model"
    return f"Step {step}, strength {strength:g}" if step else f"{Path(file).stem}, strength {strength:g}"


def _column_name(file: str, step: int, strength: float) -> str:
    return html.escape(_plain_name(file, step, strength))


COMPARE = """<section class="kiln-compare" hidden><h4>Compare</h4>
<div class="stage" style="--cut:50%;--zoom:1;--x:0px;--y:0px"><div class="side right"><img alt=""></div>
<div class="side left"><img alt=""></div><i class="line" aria-hidden="true"></i></div>
<div class="captions"><button type="button" class="kiln-small" data-side="left" aria-pressed="false">Left</button>
<span class="kiln-asis" data-label="left"></span>
<button type="button" class="kiln-small" data-side="right" aria-pressed="false">Right</button>
<span class="kiln-asis" data-label="right"></span></div><div class="sliders">
<label>Border between the two <input type="range" data-compare="cut" min="0" max="100" value="50"></label>
<label>Zoom <input type="range" data-compare="zoom" min="1" max="8" step="0.1" value="1"></label></div></section>"""


# ---- what can be done ---------------------------------------------------------------------------------------


def _file_id(run: RunFolder, checkpoint: Checkpoint) -> str:
    return f"review-file-{run.checkpoints.index(checkpoint)}"


def _size(size_bytes: int) -> str:
    return f"{size_bytes / 2**20:.1f} MiB"


def _form(run: RunFolder, seen: Seen) -> str:
    if not run.checkpoints:
        return '<p class="kiln-empty">No LoRA file has been saved yet.</p>'
    names = [each.path.name for each in run.checkpoints]
    advised = "" if seen.verdict is None else seen.verdict.file
    chosen = advised if advised in names else names[-1]
    kinds = {} if seen.verdict is None else seen.verdict.kinds
    files = []
    for each in run.checkpoints:
        name, value = html.escape(each.path.name), html.escape(each.path.name, quote=True)
        checked = " checked" if each.path.name == chosen else ""
        files.append(
            f'<tr><td><label><input type="radio" name="file" id="{_file_id(run, each)}" value="{value}"{checked}> '
            f"{name}</label></td><td>step {each.step}</td><td>{_size(each.size_bytes)}</td>"
            f"<td>{SAYS.get(kinds.get(each.path.name, ''), '')}</td>"
            f'<td><label><input type="checkbox" name="files" value="{value}" checked> in the grid</label></td></tr>'
        )
    table = f'<div class="kiln-timeline"><table class="kiln-files">{"".join(files)}</table></div>'
    parts = [f"<section><h4>Files</h4>{table}</section>"]
    if seen.may_write:
        parts.append(_keep(run, seen))
    parts += [_draw(run, seen), _go_on(run)]
    advice = html.escape(advised or "", quote=True)
    return f'<form id="review-form" data-advised="{advice}" onsubmit="return false">{"".join(parts)}</form>'


def _field(label: str, name: str, value: str = "", hint: str = "", more: str = "") -> str:
    return (
        f'<label class="kiln-field"><span>{html.escape(label)}</span><input type="text" name="{name}" '
        f'value="{html.escape(value, quote=True)}" placeholder="{html.escape(hint, quote=True)}" '
        f'spellcheck="false"></label>{more}'
    )


def _keep(run: RunFolder, seen: Seen) -> str:
    browse = '<button type="button" class="kiln-small" data-browse-into="copy_to">Browse</button>'
    away = '<label class="kiln-switch"><input type="checkbox" name="alone"> Move the other files to the trash</label>'
    if seen.going:
        away = ""
    trash = ""
    if seen.trashed:
        count = len(seen.trashed)
        words = "1 file is in the trash." if count == 1 else f"{count} files are in the trash."
        trash = f'<p class="kiln-empty">{words}</p>' + row(_button("Bring them back", "restore"))
    return (
        '<section><h4>Keep the chosen file</h4><div class="kiln-row">'
        + _field("Final name", "final_name", run.name)
        + _field("Copy it to", "copy_to", "", "models/Lora of a WebUI, models/loras of ComfyUI", browse)
        + away
        + "</div>"
        + row(_button("Keep", "keep", "primary"))
        + f"{trash}</section>"
    )


def _draw(run: RunFolder, seen: Seen) -> str:
    prompts = run.prompt_text or "\n".join(dict.fromkeys(each.prompt for each in run.rows if each.prompt))
    area = html.escape(prompts)
    count = min(6, prompts.count("\n") + 2)
    return (
        '<section><h4>Draw more pictures</h4><div class="kiln-row">'
        '<label class="kiln-field wide"><span>Prompts, one a line, with the options of Samples</span>'
        f'<textarea name="prompts" rows="{count}" spellcheck="false">{area}</textarea></label>'
        + _field("LoRA strengths", "strengths", "0.6, 0.8, 1, 1.2")
        + _field("Seeds", "seeds", "", "those of the prompts")
        + _field("Base model", "model", seen.model)
        + '<label class="kiln-switch"><input type="checkbox" name="with_base" checked> '
        + "Show the base model too</label></div>"
        + row(
            _button("Draw the grid", "grid", "primary")
            + _button("Try the first prompt with the chosen file", "try")
        )
        + "</section>"
    )


def _go_on(run: RunFolder) -> str:
    states = "".join(
        _button(f"Resume from {state.path.name} (step {state.step})", "resume", state=state.path.name)
        for state in run.states[::-1][:6]
        if run.planned_steps is None or state.step < run.planned_steps
    )
    rates = (
        '<label class="kiln-field"><span>Learning rate</span><select name="rate">'
        '<option value="good">as it is</option><option value="overtrained">half as high</option>'
        '<option value="undertrained">twice as high</option></select></label>'
    )
    return (
        '<section><h4>Go on</h4><div class="kiln-row">'
        '<label class="kiln-field"><span>Epochs to add</span>'
        '<input type="number" name="epochs" min="1" max="1000" value="2"></label>'
        + rates
        + "</div>"
        + row(
            _button("Train the chosen file on", "continue", "primary")
            + _button("Train again from the start", "again")
            + states
        )
        + "</section>"
    )


SAYS = {"undertrained": "Undertrained", "good": "Good", "overtrained": "Overtrained"}


PICTURES = (
    '<div class="kiln-row"><label class="kiln-field"><span>Training pictures</span>'
    '<input type="text" name="pictures" form="review-form" spellcheck="false" '
    'placeholder="The folder that holds folders such as 10_name"></label></div>'
)
MEASURED = (
    "Of files of the demo that its limits were not set from, 83 in 100 were what this says, and 89 in 100 of those "
    "whose pictures leave no doubt. Other models were not measured: look at the samples too."
)
BY_LOSSES = (
    "This rests on losses alone, which were right about the end of 68 of 93 runs of the demo. "
    "Judge again: then pictures are drawn, which decide better."
)
BY_PICTURES = "How often this is right without losses was not measured: look at the samples too."
"""See tests/benchmarks/README.md. While a run trains, no pictures are drawn for a verdict."""


def verdict_html(run: RunFolder, verdict: Verdict | None) -> str:
    """The verdict and every signal behind it; without one, the button that asks for it."""
    if not run.checkpoints:
        return ""
    if verdict is None:
        words = "Is it over-cooked, and which file is the one? The files are measured, which takes a while."
        button = row(_button("Judge this run", "judge"))
        # Kohya's engine writes neither path into a LoRA file; without a JSON nobody knows them.
        has_pictures = run.config is not None and run.config.train_data_dir.strip()
        asks = "" if has_pictures else PICTURES
        return f'<section><h4>Verdict</h4><p class="kiln-empty">{words}</p>{asks}{button}</section>'
    buttons = ""
    named = next((each for each in run.checkpoints if each.path.name == verdict.file), None)
    if named is not None:
        words = f"Choose {html.escape(named.path.name)}"
        buttons += f'<label class="kiln-small" for="{_file_id(run, named)}">{words}</label>'
    if verdict.kind == "undertrained":
        last = run.checkpoints[-1].path.name
        buttons += _button("Train the last file on", "continue", file=last, rate="good")
        buttons += _button("Train again, learning rate twice as high", "again", rate="undertrained")
    if verdict.kind == "overtrained":
        buttons += _button("Train again, learning rate half as high", "again", rate="overtrained")
    buttons += _button("Judge again", "judge")
    step = None if named is None else named.step
    known = {signal.name for signal in verdict.signals}
    measured = MEASURED if "new" in known else BY_LOSSES if "learnt" in known else BY_PICTURES
    table = _signals(verdict.signals, step)
    if verdict.blocks:
        table += (
            f"<details><summary>Weights, block by block</summary>{_signals(verdict.blocks, step)}</details>"
        )
    return (
        f'<section class="kiln-verdict {html.escape(verdict.kind)}">'
        f"<h4><span>Verdict</span> · <span>{SAYS.get(verdict.kind, '')}</span></h4>"
        f'<p>{html.escape(verdict.sentence)}</p><p class="kiln-empty">{measured}</p>{row(buttons)}'
        f"<details><summary>What it rests on</summary>{table}</details></section>"
    )


def _signals(signals: Sequence[Signal], step: int | None) -> str:
    """A row for each signal, with its value at a step, or at the last one."""
    rows = []
    for signal in signals:
        known = {at: each for at, each in signal.values.items() if math.isfinite(each)}
        place = step if step in known else max(known, default=None)
        value = "" if place is None else f"{known[place]:.3g}"
        limit = "" if signal.limit is None else f"<small>limit {signal.limit:.3g}</small>"
        base = f"<small>base model {known[0]:.3g}</small>" if 0 in known else ""
        says = SAYS.get(signal.says or "", "")
        rows.append(
            f'<tr><th scope="row">{html.escape(signal.label)}</th><td>{spark(signal.values, signal.limit)}</td>'
            f"<td>{value}{limit}{base}</td><td>{says}</td><td>{html.escape(signal.reason)}</td></tr>"
        )
    return f'<div class="kiln-timeline kiln-signals"><table>{"".join(rows)}</table></div>'


def kept_html(kept: Kept) -> str:
    """Where the kept file is, and how it is used."""
    place = html.escape(str(kept.copy or kept.path))
    lines = []
    for number, (program, line) in enumerate(kept.lines):
        copy = f'<button type="button" class="kiln-small" data-copy="use-{number}">Copy</button>'
        lines.append(
            f'<li><b>{html.escape(program)}</b> <code id="use-{number}">{html.escape(line)}</code> {copy}</li>'
        )
    count = len(kept.moved)
    moved = f"<p>{count} files went to the trash.</p>" if count != 1 else "<p>1 file went to the trash.</p>"
    return (
        f'<div class="kiln-alert done" role="status"><p>The LoRA is here:</p><code>{place}</code>'
        f'<ul class="kiln-use">{"".join(lines)}</ul>{moved if count else ""}</div>'
    )
