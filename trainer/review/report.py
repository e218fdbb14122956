"""A run as one HTML file that needs nothing else: to keep, or to show to others.

Folders are private: a file appears by its name alone, and everything that a person or a file says is
escaped.
"""

from __future__ import annotations

import base64
import html
import io
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image

from trainer.config import KohyaConfig, ui_of
from trainer.events import counted
from trainer.files import atomic_write
from trainer.review.charts import STYLE, charts
from trainer.review.run_folder import Picture, RunFolder

if TYPE_CHECKING:
    from trainer.review.verdict import Verdict

__all__ = ["report", "without_folders", "write_report"]

PICTURE_PX = 320
MOST_COLUMNS = 12
MOST_TAGS = 30

PAGE_STYLE = """
:root { color-scheme: light dark; }
body { font: 15px/1.5 system-ui, "Segoe UI", Roboto, sans-serif; margin: 0 auto; padding: 1.2rem; max-width: 70rem; }
h1 { font-size: 1.5rem; margin: 0; } h2 { font-size: 1.1rem; margin: 1.8rem 0 0.5rem; }
.quiet { opacity: 0.7; } .scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: 0.9rem; }
th, td { text-align: left; vertical-align: top; padding: 0.25rem 0.9rem 0.25rem 0; overflow-wrap: break-word; }
tr + tr { border-top: 1px solid color-mix(in srgb, currentColor 15%, transparent); }
.samples td, .samples th { padding: 0.25rem; min-width: 7rem; font-weight: normal; }
.samples th:first-child { min-width: 11rem; max-width: 15rem; }
.samples img { display: block; width: 100%; max-width: 12rem; border-radius: 6px; }
.verdict { border-left: 4px solid #c2410c; padding: 0.5rem 0.9rem; margin: 1rem 0;
  background: color-mix(in srgb, #c2410c 8%, transparent); }
.verdict.good { border-color: #4d7c0f; background: color-mix(in srgb, #4d7c0f 8%, transparent); }
summary { cursor: pointer; margin-bottom: 0.4rem; }
"""
FOLDERS = re.compile(
    r"""(?:file:/+|(?<![A-Za-z])[A-Za-z]:[\\/]|\\\\|~[\\/]|(?<![\w/<.:])\.{0,2}/(?=[^\s/"'<>]+/))(?:[^\\/\n"'<>|,;]*[\\/])*"""
)
"""The folders of a path inside a text: everything up to its last slash."""


def without_folders(text: str) -> str:
    """``text`` with each path in it cut down to its last part."""
    return FOLDERS.sub("", text)


def write_report(run: RunFolder, path: Path, verdict: Verdict | None = None) -> int:
    """Write the report of a run.

    Args:
        run: The run.
        path: The HTML file.
        verdict: What Review thinks of the run; left out if None.

    Returns:
        Its size in bytes.

    Raises:
        OSError: It cannot be written.
    """
    data = report(run, verdict).encode()
    atomic_write(path, data)
    return len(data)


def report(run: RunFolder, verdict: Verdict | None = None) -> str:
    """The HTML of `write_report`."""
    parts = [f"<h1>{_text(run.name)}</h1>", f'<p class="quiet">{_text(_summary(run))}</p>']
    if verdict is not None:
        words = f"<b>{_text(verdict.kind.capitalize())}.</b> {_text(verdict.sentence)}"
        parts.append(f'<div class="verdict {_text(verdict.kind)}">{words}</div>')
        parts.append(
            f"<details><summary>What it rests on</summary>{_table(_signals(run, verdict))}</details>"
        )
    if run.pictures:
        parts += ["<h2>Samples</h2>", _samples(run)]
    for title, chart in charts(run):
        parts += [f"<h2>{_text(title)}</h2>", chart]
    if run.checkpoints:
        rows = [
            (each.path.name, f"step {each.step}", f"{each.size_bytes / 2**20:.1f} MiB")
            for each in run.checkpoints
        ]
        parts += ["<h2>Files</h2>", _table(rows)]
    data = _data_set(run.metadata)
    if data:
        parts += ["<h2>Data set</h2>", _table(data)]
    if run.config is not None:
        parts += ["<h2>Settings</h2>", _table(_settings(run.config))]
    elif run.metadata:
        known = [
            (name.removeprefix("ss_"), value)
            for name, value in sorted(run.metadata.items())
            if _is_short(name, value)
        ]
        parts += ["<h2>Settings</h2>", _table(known)]
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<meta http-equiv="Content-Security-Policy" '
        "content=\"default-src 'none'; style-src 'unsafe-inline'; img-src data:\">"
        f"<title>{_text(run.name)}</title><style>{PAGE_STYLE}{STYLE}</style></head>"
        f"<body>{''.join(parts)}</body></html>\n"
    )


def _text(value: Any) -> str:
    return html.escape(without_folders(str(value)), quote=True)


def _summary(run: RunFolder) -> str:
    steps = counted(run.last_step, "step")
    if run.planned_steps and run.planned_steps != run.last_step:
        steps = f"{run.last_step} of {run.planned_steps} steps"
    facts = [steps, counted(len(run.checkpoints), "file"), counted(len(run.pictures), "sample picture")]
    base = run.metadata.get("ss_sd_model_name") or (
        Path(run.config.pretrained_model_name_or_path).name if run.config else ""
    )
    return " · ".join([*facts, f"base model {base}"] if base and base != "None" else facts)


def _table(rows: Iterable[Sequence[object]]) -> str:
    lines = "".join(f"<tr>{''.join(f'<td>{_text(cell)}</td>' for cell in row)}</tr>" for row in rows)
    return f'<div class="scroll"><table>{lines}</table></div>'


def _signals(run: RunFolder, verdict: Verdict) -> list[tuple[str, str, str, str]]:
    """Label, value at the file to keep, limit, and what it says."""
    kept = next((each.step for each in run.checkpoints if each.path.name == verdict.file), None)
    rows = []
    for signal in verdict.signals:
        step = kept if kept is not None and kept in signal.values else max(signal.values)
        limit = "" if signal.limit is None else f"limit {signal.limit:g}"
        rows.append((signal.label, f"{signal.values[step]:.3g}", limit, signal.reason))
    return rows


def _shown_steps(steps: Sequence[int]) -> list[int]:
    """At most `MOST_COLUMNS` steps: the first, the last, and some between."""
    if len(steps) <= MOST_COLUMNS:
        return list(steps)
    last = len(steps) - 1
    return [steps[round(index * last / (MOST_COLUMNS - 1))] for index in range(MOST_COLUMNS)]


def _samples(run: RunFolder) -> str:
    steps = _shown_steps(run.steps)
    head = "".join(f"<th>{'before training' if step == 0 else f'step {step}'}</th>" for step in steps)
    rows = []
    for row in run.rows:
        seed = "" if row.seed is None else f'<br><span class="quiet">seed {row.seed}</span>'
        cells = "".join(f"<td>{_picture(row.pictures.get(step))}</td>" for step in steps)
        rows.append(f"<tr><th>{_text(row.prompt)}{seed}</th>{cells}</tr>")
    left_out = len(run.steps) - len(steps)
    note = f'<p class="quiet">{left_out} more steps are not shown.</p>' if left_out else ""
    return f'<div class="scroll"><table class="samples"><tr><th></th>{head}</tr>{"".join(rows)}</table></div>{note}'


def _picture(picture: Picture | None) -> str:
    if picture is None:
        return ""
    try:
        with Image.open(picture.path) as opened:
            small = opened.convert("RGB")
            small.thumbnail((PICTURE_PX, PICTURE_PX))
            data = io.BytesIO()
            small.save(data, "WEBP", quality=82)
    except (OSError, ValueError, Image.DecompressionBombError):
        return "not readable"
    encoded = base64.b64encode(data.getvalue()).decode()
    return f'<img src="data:image/webp;base64,{encoded}" alt="{_text(picture.prompt)}">'


def _is_short(name: str, value: str) -> bool:
    return name.startswith("ss_") and value != "None" and len(value) <= 200


def _settings(config: KohyaConfig) -> list[tuple[str, str]]:
    """What differs from the defaults, and the few settings that decide most."""
    always = {"unet_lr", "text_encoder_lr", "network_dim", "network_alpha", "optimizer", "lr_scheduler"}
    rows = []
    for name in KohyaConfig.model_fields:
        ui, value = ui_of(name), getattr(config, name)
        if ui.secret or value in ("", None) or name == "sample_prompts":
            continue
        if value == KohyaConfig.model_fields[name].default and name not in always:
            continue
        shown = re.split(r"[\\/]", str(value).rstrip("\\/"))[-1] if ui.path else str(value)
        rows.append((ui.label or name, shown))
    return rows


def _data_set(metadata: Mapping[str, str]) -> list[tuple[str, str]]:
    """Folders, counts, buckets and tags, as the LoRA's metadata tells them."""
    rows: list[tuple[str, str]] = []
    for name, repeats, count in _folders(metadata):
        rows.append((name, f"{count} pictures x {repeats} repeats"))
    for label, key in (
        ("Pictures with repeats", "ss_num_train_images"),
        ("Class pictures", "ss_num_reg_images"),
    ):
        if metadata.get(key, "0") not in ("0", "None", ""):
            rows.append((label, metadata[key]))
    if metadata.get("ss_resolution", "None") != "None":
        rows.append(("Resolution", metadata["ss_resolution"].strip("()")))
    buckets = _json(metadata.get("ss_bucket_info"))
    sizes = buckets.get("buckets") if isinstance(buckets, dict) else None
    if isinstance(sizes, dict):
        said = [
            f"{'x'.join(map(str, each.get('resolution', [])))}: {each.get('count')}"
            for each in sizes.values()
            if isinstance(each, dict)
        ]
        rows.append(("Buckets", ", ".join(said)))
    counts: dict[str, int] = {}
    tags = _json(metadata.get("ss_tag_frequency"))
    for each in tags.values() if isinstance(tags, dict) else ():
        for tag, number in each.items() if isinstance(each, dict) else ():
            if isinstance(number, int):
                counts[str(tag).strip()] = counts.get(str(tag).strip(), 0) + number
    if counts:
        often = sorted(counts.items(), key=lambda item: (-item[1], item[0]))[:MOST_TAGS]
        rows.append(("Most frequent tags", ", ".join(f"{tag} ({number})" for tag, number in often)))
    return rows


def _folders(metadata: Mapping[str, str]) -> list[tuple[str, Any, Any]]:
    found = _json(metadata.get("ss_dataset_dirs"))
    if not isinstance(found, dict):
        return []
    return [
        (str(name), each.get("n_repeats"), each.get("img_count"))
        for name, each in found.items()
        if isinstance(each, dict)
    ]


def _json(text: str | None) -> Any:
    try:
        return json.loads(text or "null")
    except ValueError:
        return None
