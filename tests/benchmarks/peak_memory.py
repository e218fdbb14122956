"""Peak memory of a run in each of its phases, beside the planner's forecast.

    python -m tests.benchmarks.peak_memory CONFIG.json [--set KEY=VALUE ...] [--no-forecast]

The run is a process of its own, on the CPU; what is counted is its own memory, without pages of model files
that are only mapped. The forecast leaves Python and the libraries out, and so does the last column.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil

from trainer import config as configuration
from trainer.events import JobFailed, PhaseStarted, read_journal
from trainer.files import REPOSITORY
from trainer.job import Job

GIB = 2**30


def own_bytes(process: psutil.Process) -> int:
    """Memory that is the process's own: neither shared nor mapped from a file."""
    info = process.memory_info()
    return int(info.rss - getattr(info, "shared", 0))


def measure(command: list[str], out: Path) -> dict[str, int]:
    """Run a training and follow its memory; the largest in each phase, "start" being before the first."""
    child = subprocess.Popen(
        command, cwd=REPOSITORY, env={**os.environ, "LORA_KILN_ENV": "current"}, stdout=subprocess.DEVNULL
    )
    process = psutil.Process(child.pid)
    peaks: dict[str, int] = {}
    while child.poll() is None:
        phase = "start"
        for journal in out.glob("logs/*/journal.jsonl"):
            # A phase may come twice: the model is loaded in two parts.
            started = [event.phase for event in read_journal(journal) if isinstance(event, PhaseStarted)]
            if started:
                phase = f"{started[-1]} ({started.count(started[-1])})"
        try:
            peaks[phase] = max(peaks.get(phase, 0), own_bytes(process))
        except psutil.NoSuchProcess:
            break
        time.sleep(0.05)
    for journal in out.glob("logs/*/journal.jsonl"):
        for event in read_journal(journal):
            if isinstance(event, JobFailed):
                raise SystemExit(event.message)
    return peaks


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("config", type=Path)
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--no-forecast", action="store_true", help="measure only")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        changes = [*options.set, f"output_dir={scratch}/out", "logging_dir="]
        command = [sys.executable, "-m", "trainer", str(options.config.resolve())]
        for change in changes:
            command += ["--set", change]
        peaks = measure(command, Path(scratch) / "out")
        for phase, size in peaks.items():
            print(f"{phase:24} {size / GIB:6.2f} GiB")
        top = max(peaks.values())
        print(f"{'most':24} {top / GIB:6.2f} GiB; without start {(top - peaks['start']) / GIB:.2f}")
        if options.no_forecast:
            return
        from trainer.data import folder
        from trainer.estimate import forecast

        loaded = configuration.load(options.config).config
        values = dict(item.split("=", 1) for item in changes)
        job = Job.from_config(configuration.with_values(loaded, values), base=options.config.parent)
        found = forecast(job, folder.scan(job), kind="cpu")
        for name, parts in found.device.items():
            print(f"forecast: {name:16} {sum(parts.values()) / GIB:6.2f} GiB")


if __name__ == "__main__":
    main()
