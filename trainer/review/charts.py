"""Charts of a run as SVG, on one step axis: the page and the report show the same.

Colours are classes, so that light and dark pages give their own; `STYLE` holds them for the report.
"""

from __future__ import annotations

import html
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from trainer.review.measure import measures_file, read_measures
from trainer.review.run_folder import Point, RunFolder

__all__ = ["STYLE", "chart", "charts", "smoothed", "spark"]

WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 760, 190, 56, 10, 10, 24
LIVE_HEIGHT = 260
"""Of a chart beside a run that goes on, which stands alone."""
MOST_POINTS = 600
SERIES = 6

STYLE = """
.kiln-chart { display: block; width: 100%; height: auto; max-width: 62rem; }
.kiln-chart text { font: 11px system-ui, sans-serif; fill: currentColor; opacity: 0.75; }
.kiln-chart line, .kiln-chart path { fill: none; vector-effect: non-scaling-stroke; }
.kiln-chart .grid { stroke: currentColor; opacity: 0.14; }
.kiln-chart .mark { stroke: currentColor; opacity: 0.35; stroke-dasharray: 2 3; }
.kiln-chart .origin { stroke: currentColor; opacity: 0.6; stroke-width: 1.5; }
.kiln-chart .raw { stroke: #e2ad85; stroke-width: 1; opacity: 0.8; }
.kiln-chart .s0 { stroke: #c2410c; stroke-width: 2; } .kiln-chart .s1 { stroke: #0f766e; stroke-width: 2; }
.kiln-chart .s2 { stroke: #6d28d9; stroke-width: 2; } .kiln-chart .s3 { stroke: #a16207; stroke-width: 2; }
.kiln-chart .s4 { stroke: #be185d; stroke-width: 2; } .kiln-chart .s5 { stroke: #1d4ed8; stroke-width: 2; }
.kiln-legend { display: flex; flex-wrap: wrap; gap: 0.1rem 1rem; margin: 0 0 0.3rem; font-size: 0.85rem; }
.kiln-legend svg.kiln-chart { display: inline-block; width: 18px; height: 8px; min-width: 0;
  margin-right: 0.35rem; vertical-align: middle; }
.kiln-chart.kiln-spark { width: 120px; height: 28px; }
.kiln-wide { overflow-x: auto; } .kiln-wide > .kiln-chart { min-width: 32rem; }
"""


@dataclass(frozen=True)
class _Series:
    """One line: its name, its class, and its points."""

    name: str
    kind: str
    points: Sequence[tuple[int, float]]


@dataclass(frozen=True)
class _Mark:
    """A line across the chart at a step."""

    step: int
    name: str
    kind: str = "mark"


def smoothed(values: Sequence[tuple[int, float]], weight: float | None = None) -> list[tuple[int, float]]:
    """Exponential mean with its start corrected (Kingma & Ba 2014, arXiv:1412.6980, section 3).

    Args:
        values: Step and value, in order.
        weight: Of the mean so far; if None, so much that it reaches over an eighth of a short run, and
            over 50 values of a long one.
    """
    weight = 1 - 1 / max(4.0, min(50.0, len(values) / 8)) if weight is None else weight
    mean, correction, found = 0.0, 1.0, []
    for step, value in values:
        mean = weight * mean + (1 - weight) * value
        correction *= weight
        found.append((step, mean / (1 - correction)))
    return found


def charts(run: RunFolder) -> list[tuple[str, str]]:
    """Title and HTML of each chart that the run has data for: loss, validation, learning rates.

    A run that went on from a file of another shows what that one logged before, up to a mark.
    """
    every = [*run.earlier, *run.points]
    raw = [(point.step, point.loss) for point in every if math.isfinite(point.loss)]
    average = [(point.step, point.average) for point in every if math.isfinite(point.average)]
    marks = [_Mark(each.step, each.path.name) for each in run.checkpoints]
    if run.origin_step:
        marks.append(_Mark(run.origin_step, f"goes on from step {run.origin_step}", "origin"))
    held = _held_out(run)
    span = (min((point.step for point in every), default=0), run.last_step)
    if held and not run.origin_step:
        span = (0, run.last_step)  # the base model stands at 0
    found = []
    if raw or average:
        lines = [_Series("each step", "raw", raw)] if raw else []
        lines.append(_Series("smoothed", "s0", smoothed(raw) if raw else average))
        found.append(("Loss", _chart(lines, span, marks)))
    for title, values in (
        ("Validation loss", {**_by_name(every, [point.validation for point in every]), **held}),
        ("Learning rate", _by_name(every, [point.lr for point in every])),
    ):
        lines = [
            _Series(name, f"s{index % SERIES}", points) for index, (name, points) in enumerate(values.items())
        ]
        if lines:
            found.append((title, _chart(lines, span, marks)))
    return found


def chart(lines: Mapping[str, Sequence[tuple[int, float]]], raw: str = "") -> str:
    """A chart of lines by name, each of steps and values; "" where none has a point.

    Args:
        lines: In the order of their legend.
        raw: Name of a line that is drawn thin, behind the others.
    """
    known = {name: points for name, points in lines.items() if points}
    if not known:
        return ""
    kinds = iter(f"s{index % SERIES}" for index in range(len(known)))
    drawn = [_Series(name, "raw" if name == raw else next(kinds), points) for name, points in known.items()]
    steps = [step for points in known.values() for step, _ in points]
    return _chart(drawn, (min(steps), max(steps)), (), height=LIVE_HEIGHT)


def _held_out(run: RunFolder) -> dict[str, list[tuple[int, float]]]:
    """Losses on pictures that were held out of the training, with those on trained ones: mean of the noise levels."""
    measures = read_measures(measures_file(run))
    if measures is None or measures.base is None or not measures.base.held:
        return {}
    known = {point.step: point for point in measures.points if point.held and point.own}
    if not run.origin_step:  # a run that went on from a file did not begin as the base model
        known = {0: measures.base, **known}
    return {
        "held-out pictures": [(step, sum(each.held) / len(each.held)) for step, each in known.items()],
        "trained pictures": [(step, sum(each.own) / len(each.own)) for step, each in known.items()],
    }


def spark(values: Mapping[int, float], limit: float | None = None) -> str:
    """A small line of values by step, with a limit where there is one; "" for fewer than two values."""
    points = [(step, value) for step, value in sorted(values.items()) if math.isfinite(value)]
    if len(points) < 2:
        return ""
    every = [value for _, value in points] + ([limit] if limit is not None and math.isfinite(limit) else [])
    low, high = min(every), max(every)
    first, last = points[0][0], points[-1][0]

    def place(step: float, value: float) -> str:
        across = (step - first) / ((last - first) or 1)
        return f"{2 + across * 116:.1f},{26 - (value - low) / ((high - low) or 1) * 24:.1f}"

    path = " ".join(place(step, value) for step, value in points)
    line = "" if limit is None else f'<path class="mark" d="M{place(first, limit)} {place(last, limit)}"/>'
    return (
        f'<svg class="kiln-chart kiln-spark" viewBox="0 0 120 28" aria-hidden="true">{line}'
        f'<path class="s0" d="M{path}"/></svg>'
    )


def _by_name(
    points: Sequence[Point], values: Sequence[Mapping[str, float]]
) -> dict[str, list[tuple[int, float]]]:
    found: dict[str, list[tuple[int, float]]] = {}
    for point, each in zip(points, values, strict=True):
        for name, value in each.items():
            if math.isfinite(value):
                found.setdefault(name.strip(), []).append((point.step, value))
    return found


def _chart(
    lines: Sequence[_Series], span: tuple[int, int], marks: Iterable[_Mark], height: int = HEIGHT
) -> str:
    """Legend and SVG."""
    first, last = span[0], max(span[1], span[0] + 1)
    thinned = [_Series(line.name, line.kind, _thin(line.points)) for line in lines]
    # Single wild steps must not flatten the rest: the axis ends where nearly all values do.
    every = sorted(value for line in thinned for _, value in line.points)
    top = every[min(len(every) - 1, int(len(every) * 0.995))] if len(every) > 50 else every[-1]
    low = min(0.0, every[0]) if every[0] > -1 else every[0]
    high = top if top > low else low + (abs(low) or 1.0)

    def x(step: float) -> float:
        return LEFT + (step - first) / (last - first) * (WIDTH - LEFT - RIGHT)

    def y(value: float) -> float:
        share = (min(value, high) - low) / (high - low)
        return height - BOTTOM - share * (height - TOP - BOTTOM)

    parts = []
    for value in _ticks(low, high, 4):
        parts.append(
            f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y(value):.1f}" y2="{y(value):.1f}"/>'
        )
        parts.append(f'<text x="{LEFT - 6}" y="{y(value) + 4:.1f}" text-anchor="end">{value:.3g}</text>')
    for value in _ticks(first, last, 8):
        place = x(value)
        anchor = "end" if place > WIDTH - 40 else "middle"
        parts.append(f'<text x="{place:.1f}" y="{height - 6}" text-anchor="{anchor}">{value:g}</text>')
    for mark in marks:
        place = x(mark.step)
        if not first <= mark.step <= last:
            continue
        parts.append(
            f'<line class="{mark.kind}" x1="{place:.1f}" x2="{place:.1f}" y1="{TOP}" y2="{height - BOTTOM}">'
            f"<title>{html.escape(mark.name)}</title></line>"
        )
        if mark.kind == "origin":
            anchor, away = ("end", -4) if place > WIDTH / 2 else ("start", 4)
            parts.append(
                f'<text x="{place + away:.1f}" y="{TOP + 10}" text-anchor="{anchor}">{html.escape(mark.name)}</text>'
            )
    for line in thinned:
        path = " ".join(f"{x(step):.1f},{y(value):.1f}" for step, value in line.points)
        if len(line.points) == 1:
            path += f" {x(line.points[0][0]) + 3:.1f},{y(line.points[0][1]):.1f}"
        parts.append(f'<path class="{line.kind}" d="M{path}"><title>{html.escape(line.name)}</title></path>')
    keys = "".join(
        f'<span><svg class="kiln-chart" viewBox="0 0 18 8" aria-hidden="true"><path class="{line.kind}" d="M0,4 18,4"/>'
        f"</svg>{html.escape(line.name)}</span>"
        for line in thinned
    )
    name = html.escape(", ".join(line.name for line in thinned), quote=True)
    return (
        f'<p class="kiln-legend">{keys}</p><div class="kiln-wide">'
        f'<svg class="kiln-chart" viewBox="0 0 {WIDTH} {height}" role="img" '
        f'aria-label="{name}" data-first="{first}" data-last="{last}">{"".join(parts)}</svg></div>'
    )


def _thin(points: Sequence[tuple[int, float]]) -> list[tuple[int, float]]:
    """At most `MOST_POINTS`, the last one among them."""
    stride = -(-len(points) // MOST_POINTS) or 1
    return list(points)[::-1][::stride][::-1]


def _ticks(low: float, high: float, count: int) -> list[float]:
    """Round numbers between two values, about ``count`` of them."""
    if not high > low:
        return [low]
    raw = (high - low) / count
    scale = 10 ** math.floor(math.log10(raw))
    step = next(scale * factor for factor in (1, 2, 5, 10) if scale * factor >= raw)
    start = math.ceil(low / step)
    return [number * step for number in range(start, math.floor(high / step) + 1)]
