"""From measures to a verdict: which signal speaks, which file is kept, what is said."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from app.run_html import MEASURED
from trainer.errors import ConfigError
from trainer.review.measure import Measure, Measures, read_measures, write_measures
from trainer.review.probe import choose, recombined, trigger_of, without_trigger
from trainer.review.verdict import LIMITS, judge, kinds, lines

LEVELS = (0.1, 0.4, 0.75, 0.9)
"""Not those of the program: what is written with them counts as measured more coarsely, and is measured again."""
BASE = Measure(
    step=0,
    file="",
    norm=0,
    stable_rank=0,
    levels=LEVELS,
    own=(0.4, 0.2, 0.15, 0.1),
    other=(0.5, 0.3, 0.25, 0.2),
    plain=(0.4, 0.2, 0.15, 0.1),
    moved=(0, 0, 0, 0),
    drawn=(0.1, 0.05, 0.03, 0.02),
    drawn_other=(0.1, 0.1, 0.09, 0.08),
    drawn_own=(0.1, 0.05, 0.03, 0.02),
)
TRAINING = {"saturation": 0.4, "contrast": 0.2, "clipped": 0.01, "detail": 0.02}


def point(step: int, learnt: float, astray: float = -0.1, gap: float = 1.0, **figures: float) -> Measure:
    """A checkpoint that took this share of the base's loss away.

    Its predictions changed by as much, and by ``astray`` more; ``gap`` is what a wrong caption costs it, as a
    multiple of what it costs the base.
    """
    own = tuple(loss * (1 - learnt) for loss in BASE.own)
    usual = [wrong / right - 1 for wrong, right in zip(BASE.other, BASE.own, strict=True)]
    other = tuple(loss * (1 + gap * each) for loss, each in zip(own, usual, strict=True))
    return Measure(
        step=step,
        file=f"run-step{step:08d}.safetensors",
        norm=float(step),
        stable_rank=2.0,
        levels=LEVELS,
        own=own,
        other=other,
        plain=own,
        moved=(learnt + astray,) * 4,
        pictures={**TRAINING, **figures},
    )


def shown(before: Measure, new: float = 0.0, flaws: float = 0.3) -> Measure:
    """The checkpoint with pictures that were drawn: how new to the base model, and how much it would mend in them.

    What is new counts at the level of 0.75, what it would mend at 0.1 and 0.9; elsewhere both are as large as can be.
    """
    new_at, mends_at = (9, 9, new, 9), (flaws - 0.1, 9, 9, flaws + 0.1)
    drawn = tuple(loss * math.exp(each) for loss, each in zip(BASE.plain, new_at, strict=True))
    return replace(
        before,
        drawn=drawn,
        drawn_other=tuple(loss * 1.5 for loss in drawn),
        drawn_own=tuple(loss * math.exp(each) for loss, each in zip(BASE.drawn_own, mends_at, strict=True)),
    )


def of(*points: Measure) -> Measures:
    """A run."""
    return Measures(base=BASE, points=points, training=TRAINING, trigger="tok")


def test_a_run_from_raw_to_burnt() -> None:
    limit, far = LIMITS["learnt"].value, LIMITS["aimless"].value * 2
    run = of(
        point(100, limit / 2),
        point(200, limit * 1.2),
        point(300, limit * 1.3, 0.0),
        point(400, limit * 1.3, far),
    )
    assert kinds(run) == ["undertrained", "good", "good", "overtrained"]
    found = judge(run)
    assert found.kind == "overtrained"
    assert found.steps == (200, 300)
    assert found.file == "run-step00000300.safetensors"
    assert found.sentence.startswith(
        "Overtrained at step 400, because it changes more in the model than it has"
    )
    assert "good from step 200 to 300: keep run-step00000300.safetensors" in found.sentence
    assert list(found.kinds.values()) == kinds(run)
    signal = next(each for each in found.signals if each.name == "aimless")
    assert signal.values == pytest.approx({100: -0.1, 200: -0.1, 300: 0.0, 400: far})
    assert signal.says == "good"
    assert signal.limit == LIMITS["aimless"].value
    # Every level, colours and blocks are told too, so that a person can disagree.
    told = {each.name: each for each in found.signals}
    assert told["level 0.75"].values == pytest.approx(
        {100: limit / 2, 200: limit * 1.2, 300: limit * 1.3, 400: limit * 1.3}
    )
    assert told["saturation"].values == {100: 0, 200: 0, 300: 0, 400: 0}
    text = "\n".join(lines(run, found))
    assert "step    400  overtrained   run-step00000400.safetensors" in text


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("learnt", {"learnt": 0.0}),
        ("aimless", {"astray": 0.5}),
        ("contrast", {"contrast": 0.5}),
        ("contrast", {"contrast": 0.01}),
        ("detail", {"detail": 0.001}),
        ("detail", {"detail": 0.3}),
    ],
)
def test_each_signal_speaks_alone(name: str, values: dict[str, float]) -> None:
    settings: dict[str, Any] = {"learnt": 0.9, **values}
    run = of(point(100, **settings))
    found = judge(run)
    assert found.kind == LIMITS[name].kind
    assert LIMITS[name].why in found.sentence
    assert next(each for each in found.signals if each.name == name).says == LIMITS[name].kind


def test_what_was_drawn_decides_in_place_of_the_losses() -> None:
    """A file that learnt little by its losses and went astray shows the subject, and one that learnt much does not."""
    raw, done = shown(point(100, 0.9), new=-2.0), shown(point(200, 0.5, 9.0), new=0.05)
    burnt = shown(point(300, 0.9), flaws=LIMITS["flaws"].value + 0.1)
    run = of(raw, done, burnt)
    assert kinds(run) == ["undertrained", "good", "overtrained"]
    found = judge(run)
    assert found.file == "run-step00000200.safetensors"
    assert LIMITS["flaws"].why in found.sentence
    told = {each.name: each for each in found.signals}
    # By hand; a wrong caption costs 0.5 here, and 1, 2 and 3 there at the levels that count.
    assert told["new"].values == pytest.approx({0: math.log(0.03 / 0.15), 100: -2.0, 200: 0.05, 300: 0.0})
    assert told["flaws"].values == pytest.approx({0: 0, 100: 0.3, 200: 0.3, 300: LIMITS["flaws"].value + 0.1})
    assert told["shows"].values == pytest.approx({100: 1 / 4, 200: 1 / 4, 300: 1 / 4})
    assert (told["new"].says, told["flaws"].says) == ("good", "good")
    for losses_alone in ("learnt", "aimless"):
        assert (told[losses_alone].says, told[losses_alone].limit) == (None, None)
    assert judge(of(raw)).sentence.startswith(f"Undertrained at step 100, because {LIMITS['new'].why}")


def test_captions_that_were_not_trained() -> None:
    """Phrases keep their places, every one of the data set is used, and a caption of one phrase stays."""
    trained = ["k1ln, red, hat, smiling, day", "k1ln, blue, coat, serious, night", "k1ln, green, scarf"]
    made = recombined(trained, 6)
    assert len(made) == 6
    assert not set(made) & set(trained)
    assert {caption.split(", ")[1] for caption in made} == {"red", "blue", "green"}
    assert {caption.split(", ")[2] for caption in made} == {"hat", "coat", "scarf"}
    assert made[0] == "k1ln, red, coat, smiling, night"
    assert made[2] == "k1ln, green, hat"
    assert recombined(["a cat"], 2) == ["a cat", "a cat"]


def test_pictures_of_the_base_model_and_blocks_are_told() -> None:
    first, last = (
        replace(point(step, 0.9), blocks={"down 1": step / 100}, ranks={"down 1": 1.25})
        for step in (100, 200)
    )
    base = replace(BASE, pictures={**TRAINING, "contrast": 0.1, "clipped": 0.5})
    found = judge(Measures(base=base, points=(first, last), training=TRAINING, trigger="tok"))
    told = {each.name: each.values for each in found.signals}
    assert told["contrast"] == pytest.approx({0: math.log(0.204 / 0.104), 100: 0, 200: 0})
    assert told["clipped"] == {0: 0.5, 100: 0.01, 200: 0.01}
    (block,) = found.blocks
    assert (block.label, block.values, block.reason) == (
        "down 1",
        {100: 1, 200: 2},
        "1.2 directions in use",
    )
    assert (block.limit, block.says) == (None, None)
    assert "  down 1  100: 1, 200: 2; 1.2 directions in use" in lines(
        Measures(base=base, points=(first, last), training=TRAINING), found
    )


def test_recorded_runs_are_called_what_their_pictures_show(tmp_path: Path) -> None:
    """Runs of the demo world as they were measured, and what the reader of pixels found in samples of their files.

    All of them: those that limits were set from, those that were made afterwards, and those that sd-scripts itself
    trained then. The page says the share of the latter two.
    """
    recorded = json.loads((Path(__file__).parent / "golden" / "verdicts.json").read_text(encoding="utf-8"))
    right: dict[str, list[bool]] = {"set": [], "afterwards": [], "sd-scripts": []}
    ends: dict[str, list[bool]] = {part: [] for part in right}
    kept: dict[str, list[bool]] = {part: [] for part in right}
    for run in recorded:
        (tmp_path / "measures.json").write_text(json.dumps(run["measures"]), encoding="utf-8")
        measures = read_measures(tmp_path / "measures.json")
        assert measures is not None
        part = run.get("by", "afterwards") if run["fresh"] else "set"
        right[part] += [told == read for told, read in zip(kinds(measures), run["read"], strict=True)]
        found = judge(measures)
        ends[part].append(found.kind == run["read"][-1])
        if "good" in run["read"]:
            kept[part].append(
                "good"
                in {
                    read
                    for point, read in zip(measures.points, run["read"], strict=True)
                    if point.file == found.file
                }
            )
    assert {part: len(each) for part, each in ends.items()} == {"set": 93, "afterwards": 31, "sd-scripts": 24}
    assert sum(right["set"]) / len(right["set"]) > 0.85
    assert sum(right["afterwards"]) / len(right["afterwards"]) > 0.83
    assert (sum(ends["afterwards"]), sum(kept["afterwards"]), len(kept["afterwards"])) == (25, 7, 9)
    assert (sum(right["sd-scripts"]), len(right["sd-scripts"])) == (79, 96)
    assert (sum(ends["sd-scripts"]), sum(kept["sd-scripts"]), len(kept["sd-scripts"])) == (21, 3, 5)
    unseen = right["afterwards"] + right["sd-scripts"]
    assert f"{round(100 * sum(unseen) / len(unseen))} in 100" in MEASURED


def test_what_a_person_is_told() -> None:
    assert judge(of(point(100, 0.9), point(200, 0.9))).sentence == (
        "Good from step 100 on: keep run-step00000100.safetensors."
    )
    raw = judge(of(point(100, 0.0)))
    assert raw.sentence.endswith("Go on training: go on from run-step00000100.safetensors.")
    assert raw.steps is None
    burnt = judge(of(point(100, 0.8, 5.0), point(200, 0.8, 9.0)))
    assert "lower learning rate" in burnt.sentence
    assert burnt.file == "run-step00000100.safetensors"


def test_without_losses_pictures_decide_and_without_both_nothing_does() -> None:
    bare = Measure(step=1, file="a", norm=1, stable_rank=1)
    with pytest.raises(ConfigError, match="nothing to judge"):
        judge(Measures(base=None, points=(bare,), missing=("losses: no pictures",)))
    shown = Measure(step=1, file="a", norm=1, stable_rank=1, pictures={**TRAINING, "detail": 0.001})
    assert judge(Measures(base=None, points=(shown,), training=TRAINING)).kind == "overtrained"


def test_measures_are_kept(tmp_path: Path) -> None:
    run = of(point(100, 0.5), point(200, 0.6))
    write_measures(tmp_path / "measures.json", run)
    assert read_measures(tmp_path / "measures.json") == run
    (tmp_path / "measures.json").write_text('{"version": 0}', encoding="utf-8")
    assert read_measures(tmp_path / "measures.json") is None
    assert read_measures(tmp_path / "no.json") is None


def test_the_trigger_is_found_and_taken_out() -> None:
    captions = ["k1ln person, blue background", "a photo of K1LN person in red"]
    assert trigger_of(captions, "k1ln person") == "k1ln"
    assert trigger_of(captions, None) == "k1ln"
    assert trigger_of(["red", "blue"], "k1ln") == ""
    assert without_trigger(captions[0], "k1ln") == "person, blue background"
    assert without_trigger(captions[1], "k1ln") == "a photo of person in red"
    assert choose(5, 8) == [0, 1, 2, 3, 4]
    assert choose(100, 3) == [0, 50, 99]
    assert choose(9, 1) == [0]
