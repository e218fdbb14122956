"""How often the verdict agrees with a reader of pixels, on runs in the demo world.

    python -m tests.benchmarks.verdict WORK --train [--runs N]   # make and measure what is missing
    python -m tests.benchmarks.verdict WORK --prepare [--runs N] # pictures and settings, for another trainer
    python -m tests.benchmarks.verdict WORK --look-at FOLDER ... # measure runs that were made elsewhere
    python -m tests.benchmarks.verdict WORK                      # print the agreement
    python -m tests.benchmarks.verdict WORK --fit [--before N]   # limits as these runs would set them

Runs vary rank, learning rate, number of pictures, mirrored or clean pictures and batch size; each keeps several
checkpoints. The label of a checkpoint comes from samples that diffusers draws and `assets.demo.reader` judges:
the subject is shown, the prompt still followed, the picture intact. What was trained, measured and labelled is kept
file by file, so that the work can be broken off and taken up. Runs before `FRESH_FROM`, and those that were made
elsewhere, were looked at when signals were chosen and limits set; the others were made and judged afterwards.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import random
import shutil
import time
import zlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageOps
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits

from assets.demo import draw, make_subject, reader
from tests.demo import figures
from trainer import config as configuration
from trainer import runner
from trainer.config import KohyaConfig
from trainer.events import EventLog
from trainer.files import REPOSITORY, atomic_write
from trainer.job import Job
from trainer.review.measure import Measures, measure_run, read_measures, write_measures
from trainer.review.run_folder import RunFolder, open_run
from trainer.review.verdict import LIMITS, Kind, judge, kinds

PICTURES = REPOSITORY / "assets" / "demo" / "images" / "25_k1ln person"
PRESET = REPOSITORY / "presets" / "demo.json"
SETTINGS = "settings.json"
"""A Kohya JSON in the folder of a run that another trainer makes."""
RATES = (2e-3, 4e-3, 8e-3)
DOSES = (0.3, 0.9)
"""Learning rate times steps: at 0.4 the preset's LoRA shows the subject. A file is kept at each quarter of a run."""
FIRST, FRESH_FROM = 3, 85
"""Number of the first run of the grid (three of larger doses were made before it), and of the first that no limit was
set from."""
LABEL_SAMPLES = (16, 48, 96)
"""So many at first, and so many where these leave the label open."""
SHOWN, FOLLOWED, INTACT = 0.6, 0.7, 0.33
"""Shares of samples that a good checkpoint reaches. The preset itself has 94, 100 and 66 %."""


@dataclass(frozen=True)
class Spec:
    """One run."""

    number: int
    rank: int
    rate: float
    """unet_lr; the text encoder has half of it."""
    steps: int
    pictures: int
    mirrored: bool
    batch: int

    @property
    def name(self) -> str:
        """A folder's name."""
        kind = "mirrored" if self.mirrored else "clean"
        return f"{self.number:02d}_r{self.rank}_lr{self.rate:g}_s{self.steps}_n{self.pictures}_{kind}_b{self.batch}"


def specs(first: int, most: int) -> list[Spec]:
    """At most ``most`` runs from number ``first`` on, in an order that covers the ground early.

    The second half of all are those of the first with other seeds.
    """
    grid = list(itertools.product((4, 32), RATES, DOSES, (4, 16), (False, True), (2, 4)))
    order = []
    for seed in (5, 6):
        part = grid.copy()
        random.Random(seed).shuffle(part)
        order += part
    every = [
        Spec(number, rank, rate, round(dose / rate), pictures, mirrored, batch)
        for number, (rank, rate, dose, pictures, mirrored, batch) in enumerate(order, FIRST)
    ]
    return [spec for spec in every if spec.number >= first][:most]


def prepare(spec: Spec, folder: Path, *, watched: bool = False) -> KohyaConfig:
    """Make the pictures, and the settings to train them with.

    Args:
        spec: What to train.
        folder: The run's; emptied first.
        watched: With samples at each save and a log, as a person's run has them.
    """
    images = folder / "img" / f"{400 // spec.pictures}_k1ln person"
    shutil.rmtree(folder, ignore_errors=True)
    images.mkdir(parents=True)
    for index, path in enumerate(sorted(PICTURES.glob("*.png"))[: spec.pictures]):
        with Image.open(path) as picture:
            (ImageOps.mirror(picture) if spec.mirrored and index % 2 else picture).save(images / path.name)
        words = path.with_suffix(".txt").read_text(encoding="utf-8")
        if spec.mirrored and index % 2:  # the caption says what the picture shows
            swap = {"facing left": "facing right", "facing right": "facing left"}
            words = next((words.replace(a, b) for a, b in swap.items() if a in words), words)
        (images / path.with_suffix(".txt").name).write_text(words, encoding="utf-8")
    values = json.loads(PRESET.read_text(encoding="utf-8"))
    values |= {
        "output_dir": str(folder / "out"),
        "output_name": "run",
        "logging_dir": str(folder / "log") if watched else "",
        "train_data_dir": str(folder / "img"),
        "network_dim": spec.rank,
        "network_alpha": spec.rank,
        "learning_rate": spec.rate,
        "unet_lr": spec.rate,
        "text_encoder_lr": spec.rate / 2,
        "lr_scheduler": "constant",
        "lr_warmup": 0,
        "max_train_steps": spec.steps,
        "train_batch_size": spec.batch,
        "save_every_n_epochs": 0,
        "save_every_n_steps": -(-spec.steps // 4),
        "sample_every_n_steps": -(-spec.steps // 4) if watched else 0,
        "seed": 100 + spec.number,
    }
    return configuration.loads(json.dumps(values)).config


def label(file: Path, mirrored: bool, known: dict[str, float] | None = None) -> dict[str, float]:
    """Rates of a checkpoint, by diffusers' pictures and the reader.

    Where so few samples leave it open what the checkpoint is, more are drawn. Mirrored pictures teach an eye patch
    on either side, so with them either side counts as shown.

    Args:
        file: The checkpoint.
        mirrored: Whether its pictures were.
        known: What the first samples gave, if they were drawn before.
    """
    pipeline, rates = None, dict(known or {})
    for start, stop in zip((0, *LABEL_SAMPLES), LABEL_SAMPLES, strict=False):
        if rates and (rates["samples"] >= stop or is_settled(rates)):
            continue
        pipeline = pipeline or figures.load_pipeline(lora=file)
        portraits = figures.subject_portraits(stop)[start:]
        prompts = [make_subject.subject_caption(p) for p in portraits]
        pictures = figures.sample(pipeline, prompts, first_seed=7000 + start, batch=16)
        found = [
            (reader.read(picture), portrait) for picture, portrait in zip(pictures, portraits, strict=True)
        ]
        true_side = [r.subject_shown for r, _ in found]
        either = [r.patch is not None and r.hair in draw.UNSEEN_HAIR for r, _ in found]
        followed = [((r.background == p.background) + (r.clothes == p.clothes)) / 2 for r, p in found]
        hits: dict[str, Sequence[float]] = {
            "shown": either if mirrored else true_side,
            "true_side": true_side,
            "followed": followed,
            "intact": [r.intact for r, _ in found],
        }
        rates = {
            **{name: (rates.get(name, 0.0) * start + sum(each)) / stop for name, each in hits.items()},
            "samples": stop,
        }
    return rates


def is_settled(rates: dict[str, float]) -> bool:
    """Whether two standard errors lie between the rates and what would be another label."""

    def away(name: str, limit: float, answers: int) -> float:
        return (rates[name] - limit) / math.sqrt(limit * (1 - limit) / (answers * rates["samples"]))

    followed, intact = away("followed", FOLLOWED, 2), away("intact", INTACT, 1)
    if min(followed, intact) < -2:
        return True
    return min(followed, intact) > 2 and abs(away("shown", SHOWN, 1)) > 2


def kind_of(rates: dict[str, float]) -> Kind:
    """The label that rates stand for."""
    if rates["followed"] < FOLLOWED or rates["intact"] < INTACT:
        return "overtrained"
    return "good" if rates["shown"] >= SHOWN else "undertrained"


def measure(run: RunFolder, config: KohyaConfig, file: Path) -> None:
    """As the page measures; what it draws is kept beside, so that its figures can be looked into."""

    def keep(name: str, pictures: Sequence[Image.Image]) -> None:
        for index, picture in enumerate(pictures):
            folder = file.parent / file.stem
            folder.mkdir(parents=True, exist_ok=True)
            picture.save(folder / f"{Path(name or 'base').stem}_{index}.png")

    write_measures(file, measure_run(run, config, REPOSITORY, emit=lambda event: None, drawn=keep))


def make(work: Path, most: int, first: int) -> None:
    """Train, measure and label what has not been."""
    torch.set_num_threads(1)
    for spec in specs(first, most):
        folder = work / "runs" / spec.name
        result, measured = (work / part / f"{spec.name}.json" for part in ("results", "measures"))
        began = time.perf_counter()

        def told(what: str, name: str = spec.name, began: float = began) -> None:
            print(f"{name}: {what}, {time.perf_counter() - began:.0f} s", flush=True)

        if not (folder / "out" / "run.safetensors").exists():
            if (folder / SETTINGS).exists():
                told("prepared for another trainer, which has not made it yet")
                continue
            config = prepare(spec, folder)
            runner.run(Job.from_config(config, base=REPOSITORY), EventLog())
            told("trained")
        run = open_run(folder / "out")
        assert run.config is not None
        if read_measures(measured) is None:
            measure(run, run.config, measured)
            told("measured")
        if result.exists():
            continue
        labels: dict[str, dict[str, float]] = {}
        for file in run.checkpoints:
            # The save at the last step and the final file are the same.
            alike = [each for each in run.checkpoints if each.step == file.step and each.path.name in labels]
            labels[file.path.name] = labels[alike[0].path.name] if alike else label(file.path, spec.mirrored)
        atomic_write(result, json.dumps({"spec": asdict(spec), "labels": labels}, indent=1))
        told("labelled")


def look_at(work: Path, folders: list[Path]) -> None:
    """Measure and label runs that were made elsewhere with the demo's model and pictures."""
    torch.set_num_threads(1)
    for folder in folders:
        run = open_run(folder)
        told = run.metadata
        spec = Spec(
            number=1000 + zlib.crc32(folder.name.encode()) % 1000,
            rank=int(told["ss_network_dim"]),
            rate=float(told["ss_unet_lr"]),
            steps=run.last_step,
            pictures=16,
            mirrored=False,
            batch=int(told["ss_batch_size_per_device"]),
        )
        result, measured = (work / part / f"{folder.name}.json" for part in ("results", "measures"))
        values = json.loads(PRESET.read_text(encoding="utf-8"))
        config = configuration.loads(json.dumps(values | {"cache_latents": False})).config
        began = time.perf_counter()
        if read_measures(measured) is None:
            measure(run, config, measured)
            print(f"{folder.name}: measured in {time.perf_counter() - began:.0f} s", flush=True)
        labels = json.loads(result.read_text(encoding="utf-8"))["labels"] if result.exists() else {}
        for file in run.checkpoints:
            if file.path.name not in labels:
                labels[file.path.name] = label(file.path, mirrored=False)
                print(f"{folder.name} {file.path.name}: {labels[file.path.name]}", flush=True)
                atomic_write(result, json.dumps({"spec": asdict(spec), "labels": labels}, indent=1))


def results(work: Path) -> list[tuple[dict[str, Any], dict[str, dict[str, float]], Measures]]:
    """Everything that is done: the run, its labels, its measures."""
    found = []
    for path in sorted((work / "results").glob("*.json")):
        values = json.loads(path.read_text(encoding="utf-8"))
        measures = read_measures(work / "measures" / path.name)
        if measures is not None:
            found.append((values["spec"], values["labels"], measures))
    return found


def report(work: Path) -> None:
    """Agreement, run by run and checkpoint by checkpoint."""
    parts = {0: "that limits were set from", 1: "made afterwards"}
    tables: dict[int, Counter[tuple[str, str]]] = {part: Counter() for part in parts}
    counts: dict[tuple[int, str], list[bool]] = {}
    for spec, labels, measures in results(work):
        part, name = int(FRESH_FROM <= spec["number"] < 1000), Spec(**spec).name
        # The save at the last step and the final file are the same.
        steps = {point.step: point for point in measures.points if point.file in labels}
        points = list(steps.values())
        told = dict(zip((point.file for point in measures.points), kinds(measures), strict=True))
        true = {file: kind_of(rates) for file, rates in labels.items()}
        for point in points:
            tables[part][true[point.file], told[point.file]] += 1
            if is_settled({"samples": LABEL_SAMPLES[0], **labels[point.file]}):
                counts.setdefault((part, "files whose samples leave no doubt"), []).append(
                    true[point.file] == told[point.file]
                )
        verdict, last = judge(measures), points[-1].file
        counts.setdefault((part, "kind at the end of the run"), []).append(verdict.kind == true[last])
        if "good" in true.values():
            counts.setdefault((part, "the file to keep is a good one, where one is"), []).append(
                verdict.file is not None and true.get(verdict.file) == "good"
            )
        for path in (work / "runs" / name).glob("out/logs/*/measures.json"):
            during = read_measures(path)
            if during is not None and during.points and during.points[-1].step == points[-1].step:
                kind = kinds(during)[-1]
                counts.setdefault((part, "kind at the end, measured while training"), []).append(
                    kind == true[last]
                )
        line = " ".join(f"{true[p.file][:5]}/{told[p.file][:5]}" for p in points)
        print(f"{name:<46} {line}")
    for part, title in parts.items():
        total = sum(tables[part].values())
        if not total:
            continue
        right = sum(count for (labelled, said), count in tables[part].items() if labelled == said)
        print(f"\nruns {title}: {len(counts[part, 'kind at the end of the run'])}")
        print(f"  checkpoints: {right} of {total} ({right / total:.0%})")
        for (where, what), found in counts.items():
            if where == part:
                print(f"  {what}: {sum(found)} of {len(found)}")
        for (labelled, said), count in sorted(tables[part].items()):
            print(f"    reader {labelled:<13} verdict {said:<13} {count}")


def fit(work: Path, before: int) -> None:
    """Limits by logistic regression on one signal each, and the agreement with each run left out of its limits in turn.

    ``flaws`` parts overtrained files from the others, ``new`` undertrained files from good ones.
    """
    runs = []
    for spec, labels, measures in results(work):
        if before <= spec["number"] < 1000:
            continue
        told = {signal.name: signal.values for signal in judge(measures).signals}
        steps = {point.step: kind_of(labels[point.file]) for point in measures.points if point.file in labels}
        runs.append(
            [({name: each[step] for name, each in told.items()}, kind) for step, kind in steps.items()]
        )

    def limits(some: Sequence[list[tuple[dict[str, float], Kind]]]) -> tuple[float, float]:
        files = [file for run in some for file in run]
        return (
            border([(values["flaws"], kind == "overtrained") for values, kind in files]),
            border([(values["new"], kind == "good") for values, kind in files if kind != "overtrained"]),
        )

    right = total = 0
    for place, run in enumerate(runs):
        flaws, new = limits(runs[:place] + runs[place + 1 :])
        for values, kind in run:
            spoilt = values["flaws"] > flaws
            spoilt |= any(values[name] > LIMITS[name].value for name in ("contrast", "detail"))
            right += kind == ("overtrained" if spoilt else "undertrained" if values["new"] < new else "good")
            total += 1
    flaws, new = limits(runs)
    print(f"of {len(runs)} runs: flaws {flaws:.3f}, new {new:.3f}")
    print(f"each run left out in turn: {right} of {total} ({right / total:.0%})")


def border(answers: Sequence[tuple[float, bool]]) -> float:
    """Where yes and no are as likely as each other, by logistic regression."""
    values, yes = (torch.tensor(each, dtype=torch.float64) for each in zip(*answers, strict=True))
    line = torch.zeros(2, dtype=torch.float64, requires_grad=True)
    search = torch.optim.LBFGS([line], max_iter=500, line_search_fn="strong_wolfe")

    def misfit() -> Tensor:
        search.zero_grad()
        found = binary_cross_entropy_with_logits(line[0] * values + line[1], yes)
        found.backward()  # type: ignore[no-untyped-call]
        return found

    search.step(misfit)  # type: ignore[no-untyped-call]
    return float(-line[1] / line[0])


def main() -> None:
    """See the module's text."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("work", type=Path)
    parser.add_argument("--train", action="store_true", help="make and measure runs")
    parser.add_argument(
        "--prepare",
        action="store_true",
        help="write pictures and a Kohya JSON only; --train takes what another trainer made of them",
    )
    parser.add_argument(
        "--look-at", type=Path, nargs="*", help="results folders of runs that were made elsewhere"
    )
    parser.add_argument("--runs", type=int, default=10**6, help="at most so many")
    parser.add_argument("--first", type=int, default=FIRST, help="number of the first run")
    parser.add_argument("--fit", action="store_true", help="print the limits that these runs would set")
    parser.add_argument(
        "--before", type=int, default=FRESH_FROM, help="with --fit: of runs before this number"
    )
    options = parser.parse_args()
    if options.fit:
        fit(options.work, options.before)
    elif options.look_at:
        look_at(options.work, options.look_at)
    elif options.prepare:
        for spec in specs(options.first, options.runs):
            folder = options.work / "runs" / spec.name
            configuration.save(prepare(spec, folder, watched=True), folder / SETTINGS)
    elif options.train:
        make(options.work, options.runs, options.first)
    else:
        report(options.work)


if __name__ == "__main__":
    main()
