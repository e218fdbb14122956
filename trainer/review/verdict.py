"""Undertrained, good or overtrained: from the measures of a run's checkpoints, with reasons.

Each signal is a number per checkpoint with a limit. The limits were set from 93 runs of the demo world and measured on
31 that were made afterwards: 103 of 124 files were called what a reader of pixels found in samples of them, and 82 of
the 91 whose samples leave no doubt (tests/benchmarks/README.md).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from trainer.errors import ConfigError
from trainer.review.measure import Measure, Measures

__all__ = ["LIMITS", "Kind", "Signal", "Verdict", "judge", "kinds", "lines"]

Kind = Literal["undertrained", "good", "overtrained"]
Direction = Literal["higher is better", "lower is better", "informs"]

UPPER = (0.3, 0.95)
"""Noise levels at which shapes and layout are decided; below, only grain is."""
SHAPES = (0.6, 0.8)
"""Of these, the level at which it hardly shows whether a picture is a photograph or was drawn by a model."""
GRAIN, LAYOUT = (0.0, 0.2), (0.8, 1.0)
"""Levels at which what is spoilt shows most: between them, what is merely new does too."""


@dataclass(frozen=True)
class Limit:
    """When a signal speaks against a checkpoint."""

    label: str
    direction: Direction
    value: float
    kind: Kind
    """What a checkpoint beyond it is."""
    why: str
    """What it means to be beyond it, for a sentence."""
    fine: str
    """What it means not to be."""
    unless: str = ""
    """A signal that decides in its place where it was measured."""
    scale: float = 0.0
    """How far beyond is as bad as other signals' 1; 0 stands for the value."""


LIMITS: Mapping[str, Limit] = {
    "learnt": Limit(
        "Learnt from the training pictures",
        "higher is better",
        0.75,
        "undertrained",
        "its training pictures could still become easier to it",
        "its training pictures have become easy to it",
        unless="new",
    ),
    "new": Limit(
        "What is new to the base model, against the training pictures",
        "higher is better",
        -0.19,
        "undertrained",
        "its pictures show less that is new to the base model than the training pictures do",
        "its pictures are as new to the base model as the training pictures",
        scale=0.2,
    ),
    "flaws": Limit(
        "What it would mend in its own pictures",
        "lower is better",
        0.94,
        "overtrained",
        "its pictures are flawed (with noise over them, it would draw them otherwise)",
        "its pictures are sound (with noise over them, it draws them again as they are)",
    ),
    "aimless": Limit(
        "Change that taught nothing",
        "lower is better",
        0.1,
        "overtrained",
        "it changes more in the model than it has learnt from the training pictures",
        "what it changes in the model, it has learnt from the training pictures",
        unless="flaws",
    ),
    "contrast": Limit(
        "Contrast against the training pictures",
        "lower is better",
        0.5,
        "overtrained",
        "the contrast of its pictures is not that of the training pictures",
        "its pictures have the contrast of the training pictures",
    ),
    "detail": Limit(
        "Fine detail against the training pictures",
        "lower is better",
        0.5,
        "overtrained",
        "its pictures are much coarser or smoother than the training pictures",
        "its pictures are as detailed as the training pictures",
    ),
}
"""In the order in which they are shown. A checkpoint beyond a limit is what the limit says; overtrained goes first."""


@dataclass(frozen=True)
class Signal:
    """One thing that was looked at, checkpoint by checkpoint."""

    name: str
    label: str
    values: Mapping[int, float]
    """By step; at 0 that of the base model, where it has one."""
    limit: float | None
    """Where it speaks against a checkpoint; None where it only informs."""
    direction: Direction
    says: Kind | None
    """What its value at the file to keep says; None where it only informs."""
    reason: str
    """One sentence about that value."""


@dataclass(frozen=True)
class Verdict:
    """What is to be said of a run."""

    kind: Kind
    """Of its last checkpoint."""
    sentence: str
    steps: tuple[int, int] | None
    """First and last step of the good checkpoints; None where none is."""
    file: str | None
    """Name of the file to keep."""
    signals: tuple[Signal, ...]
    kinds: Mapping[str, Kind] = field(default_factory=dict)
    """What each file is, by name."""
    blocks: tuple[Signal, ...] = ()
    """Size of the weights of each block, which only informs."""


# --- numbers ------------------------------------------------------------------------------------


def _mean(levels: Sequence[float], values: Sequence[float], between: tuple[float, float] = UPPER) -> float:
    low, high = between
    kept = [value for level, value in zip(levels, values, strict=True) if low <= level <= high]
    return sum(kept) / len(kept) if kept else math.nan


def _learnt(point: Measure, measures: Measures) -> float:
    """Share of the base model's loss on training pictures that is gone."""
    base = measures.base
    if base is None or not point.own:
        return math.nan
    return _mean(base.levels, [1 - mine / was for mine, was in zip(point.own, base.own, strict=True)])


def _moved(point: Measure, measures: Measures) -> float:
    """How far predictions without the trigger word went, against the base model's error."""
    if not point.moved:
        return math.nan
    return math.sqrt(max(0.0, _mean(point.levels, point.moved)))


def _follows(point: Measure, measures: Measures) -> float:
    """What a wrong caption costs, against what it costs the base model."""
    base = measures.base
    if base is None or not point.other:
        return math.nan
    now = [wrong / own - 1 for wrong, own in zip(point.other, point.own, strict=True)]
    was = [wrong / own - 1 for wrong, own in zip(base.other, base.own, strict=True)]
    usual = _mean(base.levels, was)
    return _mean(base.levels, now) / usual if usual > 0.01 else math.nan


def _new(point: Measure, measures: Measures) -> float:
    """How unlikely its pictures are to the base model, as the logarithm of that of the training pictures.

    Both with captions less the trigger word. What it draws as the base model would is likely to it; the subject, which
    the base model does not know, is not.
    """
    base = measures.base
    if base is None or not point.drawn:
        return math.nan
    taught = base.plain or base.own
    ratios = [math.log(drawn / own) for drawn, own in zip(point.drawn, taught, strict=True)]
    return _mean(base.levels, ratios, SHAPES)


def _flaws(point: Measure, measures: Measures) -> float:
    """Its loss on pictures of its own, as the logarithm of the base model's on those that the base model drew."""
    base = measures.base
    if base is None or not point.drawn_own or not base.drawn_own:
        return math.nan
    ratios = [math.log(mine / theirs) for mine, theirs in zip(point.drawn_own, base.drawn_own, strict=True)]
    return (_mean(base.levels, ratios, GRAIN) + _mean(base.levels, ratios, LAYOUT)) / 2


def _shows(point: Measure, measures: Measures) -> float:
    """What a wrong caption costs the base model on its pictures, against what it costs on the base model's own."""
    base = measures.base
    if base is None or not point.drawn_other or not base.drawn_other:
        return math.nan
    costs = [
        _mean(
            base.levels,
            [wrong / right - 1 for wrong, right in zip(each.drawn_other, each.drawn, strict=True)],
        )
        for each in (point, base)
    ]
    return costs[0] / costs[1] if costs[1] > 0.01 else math.nan


def _against(name: str) -> Callable[[Measure, Measures], float]:
    def compare(point: Measure, measures: Measures) -> float:
        mine, theirs = point.pictures.get(name), measures.training.get(name)
        if mine is None or theirs is None:
            return math.nan
        return abs(math.log((mine + 0.004) / (theirs + 0.004)))

    return compare


def _aimless(point: Measure, measures: Measures) -> float:
    """What predictions changed beyond what was learnt, both as shares of the base model's error.

    With b the base model's prediction, p that of the LoRA and t the target, learnt is 1 - |p - t|^2 / |b - t|^2, and
    the change is |p - b|^2 / |b - t|^2. On the straight way from b to t the change is the smaller one; what goes
    astray adds to the change and takes from the other.
    """
    if not point.plain:  # changes were measured with other captions, and do not compare
        return math.nan
    return _mean(point.levels, point.moved) - _learnt(point, measures) if point.moved else math.nan


_NUMBERS: Mapping[str, Callable[[Measure, Measures], float]] = {
    "learnt": _learnt,
    "new": _new,
    "flaws": _flaws,
    "aimless": _aimless,
    "contrast": _against("contrast"),
    "detail": _against("detail"),
}


def _decides(name: str, values: Mapping[str, Sequence[float]], place: int) -> bool:
    other = LIMITS[name].unless
    return not other or math.isnan(values[other][place])


def _is_beyond(name: str, value: float) -> bool:
    limit = LIMITS[name]
    if math.isnan(value):
        return False
    return value < limit.value if limit.direction == "higher is better" else value > limit.value


def _speaking(values: Mapping[str, Sequence[float]], place: int) -> list[str]:
    """The signals that speak against a checkpoint."""
    return [
        name for name in LIMITS if _decides(name, values, place) and _is_beyond(name, values[name][place])
    ]


def _excess(name: str, value: float) -> float:
    """How far a value lies on the wrong side of its limit, as a share; negative on the right side."""
    limit = LIMITS[name]
    if math.isnan(value):  # it says nothing, neither for nor against
        return -math.inf
    away = limit.value - value if limit.direction == "higher is better" else value - limit.value
    return away / (limit.scale or limit.value)


# --- verdicts -----------------------------------------------------------------------------------


def _values(measures: Measures) -> dict[str, list[float]]:
    return {name: [number(point, measures) for point in measures.points] for name, number in _NUMBERS.items()}


def kinds(measures: Measures) -> list[Kind]:
    """What each checkpoint is."""
    values = _values(measures)
    found: list[Kind] = []
    for place in range(len(measures.points)):
        beyond = {LIMITS[name].kind for name in _speaking(values, place)}
        found.append(next((kind for kind in ("overtrained", "undertrained") if kind in beyond), "good"))
    return found


def judge(measures: Measures) -> Verdict:
    """The verdict on a run.

    Raises:
        ConfigError: Too little is known: neither losses nor pictures.
    """
    values = _values(measures)
    points = measures.points
    if not points or all(math.isnan(value) for each in values.values() for value in each):
        why = f" ({'; '.join(measures.missing)})" if measures.missing else ""
        raise ConfigError(
            "there is nothing to judge this run by: its base model and training pictures are needed, "
            f"or samples at the steps of its files{why}"
        )
    told = kinds(measures)
    good = [place for place, kind in enumerate(told) if kind == "good"]
    steps = (points[good[0]].step, points[good[-1]].step) if good else None
    chosen = _chosen(values, told, good)
    kept = points[chosen].file or None
    return Verdict(
        kind=told[-1],
        sentence=_sentence(measures, told, steps, chosen, values),
        steps=steps,
        file=kept,
        signals=_signals(measures, values, chosen),
        kinds={point.file: kind for point, kind in zip(points, told, strict=True) if point.file},
        blocks=_blocks(points, points[chosen]),
    )


def _chosen(values: Mapping[str, Sequence[float]], told: Sequence[Kind], good: Sequence[int]) -> int:
    """The checkpoint to keep: of the good ones the one farthest from every limit; else the least wrong."""

    def worst(place: int) -> float:
        return max(_excess(name, values[name][place]) for name in LIMITS if _decides(name, values, place))

    return min(good or range(len(told)), key=worst)


def _sentence(
    measures: Measures,
    told: Sequence[Kind],
    steps: tuple[int, int] | None,
    chosen: int,
    values: Mapping[str, Sequence[float]],
) -> str:
    points = measures.points
    file = points[chosen].file
    keep = f": keep {file}" if file else ""
    why = [LIMITS[name].why for name in _speaking(values, len(points) - 1) if LIMITS[name].kind == told[-1]]
    reason = f", because {' and '.join(why[:2])}" if why else ""
    last = points[-1].step
    if told[-1] == "good":
        if steps is not None and steps[0] != steps[1]:
            return f"Good from step {steps[0]} on{keep}."
        return f"Good at step {last}{keep}."
    if told[-1] == "undertrained":
        if steps is not None:
            return f"Undertrained at step {last}{reason}. It was good at step {steps[1]}{keep}."
        going_on = f": go on from {file}" if file else ""
        return f"Undertrained at step {last}{reason}. Go on training{going_on}."
    if steps is None:
        return (
            f"Overtrained at step {last}{reason}, and no file is good: train again with a lower "
            f"learning rate, or save more often. The least wrong is {file or f'step {points[chosen].step}'}."
        )
    if steps[0] == steps[1]:
        return f"Overtrained at step {last}{reason}. It was good at step {steps[0]}{keep}."
    return f"Overtrained at step {last}{reason}. It was good from step {steps[0]} to {steps[1]}{keep}."


def _signals(measures: Measures, values: Mapping[str, Sequence[float]], chosen: int) -> tuple[Signal, ...]:
    points = measures.points
    found = []
    for name, limit in LIMITS.items():
        known = {
            point.step: value
            for point, value in zip(points, values[name], strict=True)
            if not math.isnan(value)
        }
        if not known:
            continue
        if measures.base is not None and name in ("new", "flaws", *measures.base.pictures):
            first = _NUMBERS[name](measures.base, measures)
            known = known if math.isnan(first) else {0: first, **known}
        value, decides = values[name][chosen], _decides(name, values, chosen)
        beyond = _is_beyond(name, value)
        reason = (limit.why if beyond else limit.fine) + f" ({value:.2f}, limit {limit.value:g})"
        found.append(
            Signal(
                name=name,
                label=limit.label,
                values=known,
                limit=limit.value if decides else None,
                direction=limit.direction if decides else "informs",
                says=None if math.isnan(value) or not decides else limit.kind if beyond else "good",
                reason=reason if decides else "decides only where no pictures were drawn to measure them",
            )
        )
    return (*found, *_informing(measures))


def _informing(measures: Measures) -> list[Signal]:
    """What is shown and decides nothing."""
    points, base = measures.points, measures.base
    rows: list[tuple[str, str, dict[int, float], str]] = [
        ("norm", "Size of the weights", {p.step: p.norm for p in points}, "grows as long as the run learns"),
        (
            "stable_rank",
            "Directions in use",
            {p.step: p.stable_rank for p in points},
            "how many directions of its rank a layer uses, on average",
        ),
    ]
    if base is not None:
        for place, level in enumerate(base.levels):
            learnt = {p.step: 1 - p.own[place] / base.own[place] for p in points if p.own}
            reason = (
                "low levels decide fine structure" if level < 0.5 else "high levels decide shapes and layout"
            )
            rows.append((f"level {level:g}", f"Learnt at noise level {level:g}", learnt, reason))
        for name, label, number, reason in (
            (
                "follows",
                "Captions still matter",
                _follows,
                "what a wrong caption costs it, against what it costs the base model (1)",
            ),
            (
                "shows",
                "Its pictures show what captions say",
                _shows,
                "what a wrong caption costs the base model on them, against what it costs on its own (1)",
            ),
            (
                "moved",
                "Change without the trigger word",
                _moved,
                "how far predictions went from the base model's, against its error (1)",
            ),
        ):
            numbers = {p.step: number(p, measures) for p in points}
            rows.append((name, label, {k: v for k, v in numbers.items() if not math.isnan(v)}, reason))
        if base.plain:
            rows.append(
                (
                    "token",
                    "What the trigger word adds",
                    {
                        p.step: _mean(base.levels, [a / b - 1 for a, b in zip(p.plain, p.own, strict=True)])
                        for p in points
                        if p.plain
                    },
                    "loss without the trigger word over that with it: above 0 the word has been learnt",
                )
            )
        if base.held:
            rows.append(
                (
                    "held",
                    "Learnt on pictures that were not trained",
                    {
                        p.step: _mean(
                            base.levels, [1 - a / b for a, b in zip(p.held, base.held, strict=True)]
                        )
                        for p in points
                        if p.held
                    },
                    "falls where training pictures are learnt by heart",
                )
            )
    saturation, drawn = _against("saturation"), [*([base] if base is not None else []), *points]
    strong = {p.step: saturation(p, measures) for p in drawn}
    rows.append(
        (
            "saturation",
            "Saturation against the training pictures",
            {step: value for step, value in strong.items() if not math.isnan(value)},
            "0 where colours are as strong as theirs",
        )
    )
    for name, label, reason in (
        ("diversity", "Difference between seeds", "near 0, every seed gives the same picture"),
        ("nearest", "Distance to the nearest training picture", "far below 1, pictures are copied"),
        ("clipped", "Clipped values", "share of the pictures that is black or burnt out"),
    ):
        rows.append((name, label, {p.step: p.pictures[name] for p in drawn if name in p.pictures}, reason))
    strengths = points[-1].strengths
    if strengths and base is not None:
        rows.append(
            (
                "strengths",
                "Learnt at other strengths, in percent of full strength",
                {
                    round(float(text) * 100): _mean(
                        base.levels, [1 - a / b for a, b in zip(own, base.own, strict=True)]
                    )
                    for text, own in strengths.items()
                },
                "more at a lower strength than at full strength says that the LoRA is too strong",
            )
        )
    return [
        Signal(name, label, values, None, "informs", None, reason)
        for name, label, values, reason in rows
        if any(values)  # the base model's alone say nothing
    ]


def _blocks(points: Sequence[Measure], chosen: Measure) -> tuple[Signal, ...]:
    """Sizes of each block's weights, with the directions that the file to keep uses there."""
    names = dict.fromkeys(name for point in points for name in point.blocks)
    return tuple(
        Signal(
            name=f"block {name}",
            label=name,
            values={point.step: point.blocks[name] for point in points if name in point.blocks},
            limit=None,
            direction="informs",
            says=None,
            reason=f"{chosen.ranks[name]:.1f} directions in use" if name in chosen.ranks else "",
        )
        for name in names
    )


def lines(measures: Measures, verdict: Verdict) -> list[str]:
    """The verdict as text: the sentence, what each checkpoint is, the signals with their values."""
    found = [verdict.sentence, ""]
    for point, kind in zip(measures.points, kinds(measures), strict=True):
        found.append(f"step {point.step:>6}  {kind:<13} {point.file}")
    for signal in verdict.signals:
        values = _by_step(signal)
        limit = "" if signal.limit is None else f" (limit {signal.limit:g}, {signal.direction})"
        found += ["", f"{signal.label}{limit}", f"  {values}", f"  {signal.reason}"]
    if verdict.blocks:
        found += ["", "Weights, block by block"]
        found += [f"  {each.label}  {_by_step(each)}; {each.reason}".rstrip("; ") for each in verdict.blocks]
    return [*found, *(f"not measured: {each}" for each in measures.missing)]


def _by_step(signal: Signal) -> str:
    return ", ".join(f"{step}: {value:.3g}" for step, value in signal.values.items())
