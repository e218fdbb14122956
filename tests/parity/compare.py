"""Train a recorded case with our trainer, on the same draws, and compare every step and every tensor.

    python -m tests.parity.compare RECORD [RECORD ...] [--out FOLDER] [--encode] [--objective]

Losses have to agree to 1e-5 relative at every step and trained tensors to 1e-4; keys, shapes, dtypes
and metadata keys have to be the same. ``--encode`` also runs our VAE and compares pixels and
latents (slow); training uses the recorded latents in any case. ``--objective`` compares only noising
and loss, with the recorded predictions, and loads no model; ``--forward`` compares besides only the
first step's text states and prediction. Ends with 1 if a target is missed.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from tests.parity.make_golden import VOLATILE, same_value
from tests.parity.replay import Record, ReplayDraws, trained_tensors
from trainer import config as configuration
from trainer.data.types import Batch
from trainer.events import EventLog, JobStarted, LogLine, StepDone
from trainer.families.sdxl import time_ids
from trainer.job import Job
from trainer.objectives import ddpm
from trainer.plugins import Folder

LOSS_TOLERANCE = 1e-5
TENSOR_TOLERANCE = 1e-4


@dataclass
class Findings:
    """Lines of the table, and whether each met its target."""

    rows: list[tuple[str, str, bool | None]] = field(default_factory=list)

    def add(self, what: str, found: str, ok: bool | None = None) -> None:
        """Add a line; ``ok`` is None where there is no target."""
        self.rows.append((what, found, ok))

    @property
    def ok(self) -> bool:
        """Whether no target was missed."""
        return all(ok is not False for _, _, ok in self.rows)

    def print(self, title: str) -> None:
        """Print the table."""
        print(f"\n{title}")
        marks = {True: "ok", False: "MISSED", None: ""}
        for what, found, ok in self.rows:
            print(f"  {what:<34} {found:<52} {marks[ok]}")


def relative(ours: float, theirs: float) -> float:
    """|ours - theirs| / |theirs|."""
    return abs(ours - theirs) / max(abs(theirs), 1e-12)


def tensor_error(ours: Tensor, theirs: Tensor) -> float:
    """||ours - theirs|| / ||theirs||."""
    return float((ours - theirs).norm() / theirs.norm().clamp(min=1e-12))


def job_of(record: Record, out: Path, changes: dict[str, Any]) -> Job:
    """Our job for the case's JSON, writing to ``out``."""
    values = {**record.config, "output_dir": str(out), "cache_latents_to_disk": False, **changes}
    path = out / "case.json"
    out.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(values, indent=2), encoding="utf-8")
    loaded = configuration.load(path)
    complaints = loaded.of("unknown", "invalid")
    if complaints:
        raise SystemExit("our loader does not take the case's JSON: " + "; ".join(map(str, complaints)))
    return Job.from_config(loaded.config)


def recorded_batch(step: dict[str, Any], draw_ids: tuple[int, ...], latents: Tensor) -> Batch:
    """A recorded micro-batch, as far as its loss depends on it."""
    return Batch(
        pictures=(),
        draw_ids=draw_ids,
        latents_BCHW=latents,
        pixels_BCHW=None,
        captions=tuple(step["captions"]),
        loss_weights_B=torch.tensor(step["loss_weights"]),
        masks_B1HW=None,
        flipped=(False,) * len(latents),
        sizes=((0, 0),) * len(latents),
        bucket=(0, 0),
    )


def compare_objective(record: Record, job: Job, findings: Findings) -> None:
    """Noising and loss from recorded draws, latents and predictions."""
    objective = ddpm.prepare(job, "cpu")
    scale = Folder("trainer.families").get(job.family).vae_scale
    draws = ReplayDraws(0, record, [])
    worst_noisy = worst_loss = 0.0
    place = 0
    for micro, step in enumerate(record.micro_steps):
        latents = torch.stack([record.tensors[f"latents.{name}"] for name in step["pictures"]])
        draw_ids = tuple(range(place, place + len(latents)))
        place += len(latents)
        noised = objective.noise_latents(latents * scale, draw_ids, micro, draws)
        worst_noisy = max(worst_noisy, tensor_error(noised.noisy_BCHW, record.drawn(micro, "noisy_latents")))
        batch = recorded_batch(step, draw_ids, latents)
        loss, _ = objective.loss(record.drawn(micro, "prediction"), noised, batch)
        worst_loss = max(worst_loss, relative(float(loss), step["loss"]))
    findings.add("noised latents, worst step", f"{worst_noisy:.1e}", worst_noisy < 1e-6)
    findings.add("loss of recorded predictions, worst", f"{worst_loss:.1e}", worst_loss < 2e-6)


def compare_forward(record: Record, job: Job, findings: Findings) -> None:
    """Text encoder and UNet with the starting LoRA, on the inputs of the first micro-step."""
    family = Folder("trainer.families").get(job.family).load(job, torch.device("cpu"), torch.float32, print)
    network = (
        Folder("trainer.networks").get("lora").create(family, job, ReplayDraws(job.seed, record, []), print)
    )
    network.attach()
    network.to(torch.device("cpu"), torch.float32)
    network.train(True)
    with torch.no_grad():
        text = family.encode_prompts(record.micro_steps[0]["captions"])
        conditions = [name for name in record.tensors if name.startswith("step000.context")]
        context = torch.cat([record.tensors[name] for name in sorted(conditions)[:2]], dim=-1)
        error = tensor_error(text.states_BTD, context)
        findings.add("text states, first step", f"{error:.1e}", error < 1e-5)
        batch = None
        if text.pooled_BD is not None:
            error = tensor_error(text.pooled_BD, record.drawn(0, "context2"))
            findings.add("pooled text, first step", f"{error:.1e}", error < 1e-5)
            batch = _first_batch(record, job)
            same = torch.equal(time_ids(batch), record.drawn(0, "time_ids"))
            findings.add("sizes and crops, first step", "equal" if same else "differ", same)
        timesteps_B = torch.tensor(record.micro_steps[0]["timesteps"])
        ours = family.predict(record.drawn(0, "noisy_latents"), timesteps_B, text, batch)
    error = tensor_error(ours, record.drawn(0, "prediction"))
    findings.add("prediction, first step", f"{error:.1e}", error < 1e-5)


def _first_batch(record: Record, job: Job) -> Batch:
    """The first micro-batch with our sizes of its pictures."""
    from trainer.data import folder

    dataset = folder.scan(job)
    place = {record.picture(picture.path): index for index, picture in enumerate(dataset.pictures)}
    indices = [place[name] for name in record.micro_steps[0]["pictures"]]
    return Batch(
        pictures=tuple(indices),
        draw_ids=tuple(range(len(indices))),
        latents_BCHW=None,
        pixels_BCHW=None,
        captions=tuple(record.micro_steps[0]["captions"]),
        loss_weights_B=torch.ones(len(indices)),
        masks_B1HW=None,
        flipped=(False,) * len(indices),
        sizes=tuple(dataset.pictures[index].size for index in indices),
        bucket=dataset.fits[indices[0]].bucket,
    )


class KnownLatents:
    """Stands in for a family's `encode_images`: finds each picture in the record by its pixels."""

    def __init__(
        self, records: Sequence[Record], record: Record, encode: Callable[..., Tensor] | None
    ) -> None:
        self.pixels = {
            name.removeprefix("pixels."): value
            for other in (*records, record)  # its own last: others may have other buckets
            for name, value in other.tensors.items()
            if name.startswith("pixels.")
        }
        self.means = {
            name.removeprefix("latent_mean."): value
            for other in (*records, record)  # its own last: others may have other buckets
            for name, value in other.tensors.items()
            if name.startswith("latent_mean.")
        }
        self.record, self.encode = record, encode
        self.worst_pixel = 0
        self.worst_latent = 0.0

    def __call__(self, pixels_BCHW: Tensor, generators: Sequence[torch.Generator]) -> Tensor:
        """Recorded latents of the pictures in a batch."""
        names = []
        for picture in ((pixels_BCHW.float() + 1) * 127.5).round():
            found = {
                name: (known.float() - picture).abs()
                for name, known in self.pixels.items()
                if known.shape == picture.shape
            }
            name = min(found, key=lambda name: float(found[name].mean()))
            if found[name].mean() > 2:
                raise ValueError(f"a picture of {tuple(picture.shape)} is like none that sd-scripts saw")
            self.worst_pixel = max(self.worst_pixel, int(found[name].max()))
            names.append(name)
        if self.encode is not None:
            for name, ours in zip(names, self.encode(pixels_BCHW, generators), strict=True):
                self.worst_latent = max(self.worst_latent, tensor_error(ours.cpu(), self.means[name]))
        # What a short run did not come to is not trained on here either.
        tensors = self.record.tensors
        keys = [f"latents.{name}" for name in names]
        return torch.stack(
            [
                tensors[key] if key in tensors else self.means[name]
                for key, name in zip(keys, names, strict=True)
            ]
        )


def train(record: Record, others: Sequence[Record], job: Job, encode: bool, findings: Findings) -> None:
    """Train the case with our trainer, replaying; compare losses, rates and the file."""
    from trainer import runner
    from trainer.data import folder

    pictures = [record.picture(picture.path) for picture in folder.scan(job).pictures]
    draws = ReplayDraws(job.seed, record, pictures)
    family = Folder("trainer.families").get(job.family)
    original = family.encode_images
    known: list[KnownLatents] = []

    def encode_images(self: Any, pixels_BCHW: Tensor, generators: Sequence[torch.Generator]) -> Tensor:
        if not known:
            bound = original.__get__(self) if encode else None
            known.append(KnownLatents(others, record, bound))
        return known[0](pixels_BCHW, generators)

    events = EventLog()
    family.encode_images = encode_images
    began = time.perf_counter()
    try:
        outcome = runner.run(job, events, draws=draws)
    except BaseException:
        for event in events.since(0)[0]:
            if isinstance(event, LogLine):
                print(f"    {event.level}: {event.message}")
        raise
    finally:
        family.encode_images = original
    elapsed_s = time.perf_counter() - began
    assert outcome.path is not None

    if known:
        findings.add("pixels, worst difference of 255", str(known[0].worst_pixel), known[0].worst_pixel <= 1)
        if encode:
            findings.add(
                "VAE latents, worst picture", f"{known[0].worst_latent:.1e}", known[0].worst_latent < 5e-3
            )
    log = events.since(0)[0]
    started = next(event for event in log if isinstance(event, JobStarted))
    theirs = record.report["datasets"][0]
    buckets = started.facts["buckets"]
    findings.add("buckets", json.dumps(buckets), buckets == theirs["buckets"])
    _compare_steps(record, [event for event in log if isinstance(event, StepDone)], findings)
    _compare_file(record, outcome.path, findings)
    findings.add("our run", f"{elapsed_s:.0f} s in all")


def _compare_steps(record: Record, steps: Sequence[StepDone], findings: Findings) -> None:
    updates = record.updates()
    micro_steps = record.micro_steps
    findings.add("steps", f"{len(steps)} of {len(updates)}", len(steps) == len(updates))
    errors, rates = [], []
    for ours, micros in zip(steps, updates, strict=False):
        loss = sum(micro_steps[micro]["loss"] for micro in micros) / len(micros)
        errors.append(relative(ours.loss, loss))
        rates.append(list(ours.lr.values()) == micro_steps[micros[-1]]["lrs"])
    for at in range(0, len(errors), 5):
        shown = " ".join(f"{error:.1e}" for error in errors[at : at + 5])
        findings.add(f"loss error, steps {at + 1}-{at + len(errors[at : at + 5])}", shown)
    findings.add("loss error, worst step", f"{max(errors):.1e}", max(errors) < LOSS_TOLERANCE)
    first, last = micro_steps[0]["loss"], micro_steps[-1]["loss"]
    findings.add("their loss, first and last", f"{first:.4f} {last:.4f}")
    findings.add("learning rates", f"equal at {sum(rates)} of {len(rates)} steps", all(rates))


def _compare_file(record: Record, path: Path, findings: Findings) -> None:
    theirs = trained_tensors(record.folder)
    start = record.folder / "start.safetensors"
    with safe_open(path, framework="pt") as file:
        ours = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        our_metadata = dict(file.metadata())
    with safe_open(record.folder / "parity.safetensors", framework="pt") as file:
        their_metadata = dict(file.metadata())
        their_dtypes = {key: file.get_tensor(key).dtype for key in file.keys()}  # noqa: SIM118
    with safe_open(start, framework="pt") as file:
        moved = [tensor_error(file.get_tensor(key), theirs[key]) for key in theirs if key.endswith(".weight")]
    missing, extra = sorted(theirs.keys() - ours.keys()), sorted(ours.keys() - theirs.keys())
    found = (
        f"{len(ours)}; missing {missing[:2]}, extra {extra[:2]}"
        if missing or extra
        else f"{len(ours)}, equal"
    )
    findings.add("keys", found, not missing and not extra)
    common = sorted(theirs.keys() & ours.keys())
    shapes = [key for key in common if ours[key].shape != theirs[key].shape]
    findings.add("shapes", f"{len(shapes)} differ {shapes[:1]}", not shapes)
    dtypes = [key for key in common if ours[key].dtype != their_dtypes[key]]
    findings.add("dtypes", f"{len(dtypes)} differ {dtypes[:1]}", not dtypes)
    errors = {key: tensor_error(ours[key].float(), theirs[key]) for key in common if key not in shapes}
    worst = max(errors, key=lambda key: errors[key])
    findings.add(
        "trained tensors, worst", f"{errors[worst]:.1e} ({worst[-44:]})", errors[worst] < TENSOR_TOLERANCE
    )
    largest = max(float((ours[key].float() - theirs[key]).abs().max()) for key in errors)
    findings.add("trained tensors, largest difference", f"{largest:.1e}")
    findings.add("training moved tensors by", f"{min(moved):.2f} to {max(moved):.2f} of their norm")
    missing = sorted(their_metadata.keys() - our_metadata.keys())
    extra = sorted(our_metadata.keys() - their_metadata.keys())
    findings.add(
        "metadata keys",
        f"{len(our_metadata)} / {len(their_metadata)}; missing {missing}, extra {extra}",
        not missing and not extra,
    )
    values = {
        key: (our_metadata[key], their_metadata[key])
        for key in our_metadata.keys() & their_metadata.keys() - VOLATILE
        if not same_value(our_metadata[key], their_metadata[key])
    }
    findings.add("metadata values", f"{len(values)} differ", not values)
    for key, (mine, other) in sorted(values.items()):
        findings.add(f"  {key}", f"{mine} / {other}"[:160])


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("records", type=Path, nargs="+")
    parser.add_argument("--out", type=Path, help="keep what our trainer writes here")
    parser.add_argument("--encode", action="store_true")
    parser.add_argument("--objective", action="store_true")
    parser.add_argument("--forward", action="store_true")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--set", action="append", default=[], metavar="KEY=JSON", help="change our JSON only")
    args = parser.parse_args()
    if len(args.records) > 1:
        # One process a case, as each loads a whole model.
        rest = [argument for argument in sys.argv[1:] if Path(argument) not in args.records]
        commands = [[sys.executable, "-m", "tests.parity.compare", str(path), *rest] for path in args.records]
        return max(subprocess.run(command, check=False).returncode for command in commands)
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    torch.set_num_threads(args.threads)
    record = Record.load(args.records[0])
    changes = {key: json.loads(value) for key, _, value in (item.partition("=") for item in args.set)}
    findings = Findings()
    with tempfile.TemporaryDirectory() as scratch:
        out = (args.out / record.folder.name) if args.out else Path(scratch)
        job = job_of(record, out, changes)
        compare_objective(record, job, findings)
        if args.forward:
            compare_forward(record, job, findings)
        elif not args.objective:
            siblings = sorted(path.parent for path in record.folder.parent.glob("*/record.safetensors"))
            others = [record if path == record.folder else Record.load(path) for path in siblings]
            train(record, others, job, args.encode, findings)
    findings.print(f"{record.folder.name}: {record.report['program']} and ours, {args.threads} thread(s)")
    return 0 if findings.ok else 1


if __name__ == "__main__":
    sys.exit(main())
