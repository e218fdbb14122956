"""Time our trainer and sd-scripts on the same work: step time, time to the first step, peak memory.

Both train the same Kohya JSON (a case of `tests.parity.cases`) in a process of their own, with
the same number of threads, in turns, so that whatever else the machine does hits both. Set up the
reference as tests/parity/README.md says, leave the machine alone, then:

    python -m tests.benchmarks.against_sdscripts --reference-python $S/venv/bin/python \
        --source $S/sd-scripts --model $S/sd15.safetensors --photos $S/photos --tokenizers $S/tokenizers \
        --start $S/cases/plain/start.safetensors [--threads 2] [--rounds 3] [--set mixed_precision='"bf16"']

The step time is the mean over the whole second epoch, in which both see the same batches in some
order. The time to the first step runs from the start of the process to the end of step 1: imports,
reading pictures, loading the model, encoding all latents, and the step. Memory is the largest
resident size of the process, as the system counts it.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.parity.cases import kohya_json
from trainer.events import StepDone, read_journal

BATCHES_PER_EPOCH = 9
"""Of the photographs in batches of two, bucket by bucket."""


@dataclass(frozen=True)
class Timing:
    """What one run took."""

    program: str
    first_step_s: float
    step_s: float
    total_s: float
    peak_bytes: int
    last_loss: float


def environment(threads: int) -> dict[str, str]:
    """Variables that both programs run with."""
    return {"OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1"}


def _run(command: list[str], log: Path, threads: int) -> tuple[float, float, int]:
    """Run a command; gives its start (seconds since the epoch), duration and peak memory in bytes."""
    with log.open("w", encoding="utf-8") as output:
        began = time.time()
        process = subprocess.Popen(
            command, stdout=output, stderr=subprocess.STDOUT, env={**os.environ, **environment(threads)}
        )
        peak_bytes, status = _watch(process)
    if status:
        raise SystemExit(f"{' '.join(command)} ended with {status}; see {log}:\n{log.read_text()[-2000:]}")
    return began, time.time() - began, peak_bytes


def _watch(process: subprocess.Popen[bytes]) -> tuple[int, int]:
    """Wait for a process; gives its peak memory and exit status."""
    if sys.platform != "win32":
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        unit = 1 if sys.platform == "darwin" else 1024
        return usage.ru_maxrss * unit, process.returncode
    import psutil

    watched, peak_bytes = psutil.Process(process.pid), 0
    while process.poll() is None:
        try:
            peak_bytes = max(peak_bytes, int(watched.memory_info().peak_wset))
        except psutil.Error:
            break
        time.sleep(0.2)
    return peak_bytes, process.wait()


def their_command(args: argparse.Namespace, folder: Path, steps: int) -> list[str]:
    """How sd-scripts is run in a folder that exists."""
    shutil.copy(args.start, folder / "start.safetensors")
    driver = Path(__file__).resolve().parents[1] / "parity" / "run_sdscripts.py"
    command = [str(args.reference_python), str(driver), args.case, "--timing"]
    for option in ("source", "model", "photos", "tokenizers"):
        command += [f"--{option}", str(getattr(args, option).resolve())]
    command += ["--reg-photos", str(args.photos.resolve()), "--out", str(folder)]
    command += ["--threads", str(args.threads), "--steps", str(steps)]
    for change in args.set:
        command += ["--set", change]
    return command


def theirs(args: argparse.Namespace, folder: Path) -> Timing:
    """One run of sd-scripts."""
    folder.mkdir(parents=True)
    command = their_command(args, folder, 2 * BATCHES_PER_EPOCH)
    _, total_s, peak_bytes = _run(command, folder / "log.txt", args.threads)
    report = json.loads((folder / "record.json").read_text(encoding="utf-8"))
    done = [step["done_s"] for step in report["micro_steps"]]
    return _timing("sd-scripts", done, total_s, peak_bytes, report["micro_steps"][-1]["loss"])


def write_config(args: argparse.Namespace, folder: Path, steps: int) -> Path:
    """Write the Kohya JSON of our run into a folder that exists."""
    config: dict[str, Any] = kohya_json(
        args.case,
        model=args.model.resolve(),
        photos=args.photos.resolve(),
        reg_photos=args.photos.resolve(),
        output=folder,
        network_weights=args.start.resolve(),
        steps=steps,
    )
    config.update((key, json.loads(value)) for key, _, value in (item.partition("=") for item in args.set))
    file = folder / "case.json"
    file.write_text(json.dumps(config), encoding="utf-8")
    return file


def ours(args: argparse.Namespace, folder: Path) -> Timing:
    """One run of our shell."""
    folder.mkdir(parents=True)
    file = write_config(args, folder, 2 * BATCHES_PER_EPOCH)
    command = [sys.executable, "-m", "trainer", str(file)]
    began, total_s, peak_bytes = _run(command, folder / "log.txt", args.threads)
    journal = next(folder.glob("logs/*/journal.jsonl"))
    steps = [event for event in read_journal(journal) if isinstance(event, StepDone)]
    return _timing("ours", [step.time - began for step in steps], total_s, peak_bytes, steps[-1].loss)


def _timing(program: str, done_s: list[float], total_s: float, peak_bytes: int, last_loss: float) -> Timing:
    if len(done_s) != 2 * BATCHES_PER_EPOCH:
        raise SystemExit(f"{program} made {len(done_s)} steps instead of {2 * BATCHES_PER_EPOCH}")
    step_s = (done_s[-1] - done_s[BATCHES_PER_EPOCH - 1]) / BATCHES_PER_EPOCH
    return Timing(program, done_s[0], step_s, total_s, peak_bytes, last_loss)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What is compared, and where the reference is."""
    for option in ("reference-python", "source", "model", "photos", "tokenizers", "start"):
        parser.add_argument(f"--{option}", type=Path, required=True)
    parser.add_argument("--case", default="plain")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--set", action="append", default=[], metavar="KEY=JSON", help="change both JSONs")


def main() -> int:
    """Command line; ends with 1 where ours is slower or larger in any of the three."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_arguments(parser)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument(
        "--only", choices=("ours", "theirs"), help="run one program (to find out what it takes)"
    )
    args = parser.parse_args()
    timings: list[Timing] = []
    with tempfile.TemporaryDirectory() as scratch:
        for turn in range(args.rounds):
            order = [ours, theirs] if turn % 2 else [theirs, ours]
            for program in order:
                if args.only and program.__name__ != args.only:
                    continue
                timing = program(args, Path(scratch) / f"{program.__name__}{turn}")
                timings.append(timing)
                print(
                    f"{timing.program:<11} first step {timing.first_step_s:6.1f} s, step {timing.step_s:6.2f} s, "
                    f"peak {timing.peak_bytes / 2**30:5.2f} GiB, total {timing.total_s:6.1f} s, "
                    f"load {os.getloadavg()[0] if hasattr(os, 'getloadavg') else float('nan'):.1f}",
                    flush=True,
                )
    print(f"\n{'median of ' + str(args.rounds):<26} {'sd-scripts':>12} {'ours':>12} {'ratio':>8}")
    worse = False
    for label, name, unit in (
        ("time to the first step, s", "first_step_s", 1.0),
        ("step, s", "step_s", 1.0),
        ("peak memory, GiB", "peak_bytes", 2.0**30),
    ):
        medians = {
            program: statistics.median(getattr(timing, name) / unit for timing in chosen)
            for program in ("sd-scripts", "ours")
            if (chosen := [timing for timing in timings if timing.program == program])
        }
        if len(medians) == 2:
            ratio = medians["ours"] / medians["sd-scripts"]
            worse |= ratio > 1
            print(f"{label:<26} {medians['sd-scripts']:>12.2f} {medians['ours']:>12.2f} {ratio:>8.2f}")
        else:
            print(f"{label:<26} {medians}")
    return int(worse)


if __name__ == "__main__":
    sys.exit(main())
