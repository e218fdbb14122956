"""A page's worker in a process of its own: a run that the system gives no more memory, then a smaller one.

    python -m tests.faults.little_memory big.json small.json

When the first run begins to train, the process may have little more memory than it holds at that moment,
for good. Prints how each run ended. Linux only: others do not enforce the limit.
"""

from __future__ import annotations

import resource
import sys
import time
from pathlib import Path

from trainer import config as configuration
from trainer.events import JobFailed, JobFinished, PhaseStarted
from trainer.job import Job
from trainer.worker import Runner

LEFT_BYTES = 96 << 20
"""Less than a whole run on the toy model needs (about 130 MiB): what the first one had must have been given back."""


def trains(runner: Runner) -> bool:
    """Whether the run has come to its first step."""
    found = runner.events.since(0)[0]
    return any(isinstance(event, PhaseStarted) and event.phase == "train" for event in found)


def limit() -> None:
    """Allow this process what it holds and `LEFT_BYTES`."""
    status = Path("/proc/self/status").read_text(encoding="ascii").split()
    held_bytes = int(status[status.index("VmData:") + 1]) << 10
    resource.setrlimit(resource.RLIMIT_DATA, (held_bytes + LEFT_BYTES, resource.RLIM_INFINITY))


def main(big: Path, small: Path) -> None:
    """Run both, one after the other."""
    runner = Runner()
    for file in (big, small):
        runner.start(Job.from_config(configuration.load(file).config, base=file.parent))
        if file == big:
            while not trains(runner) and runner.running:
                time.sleep(0.001)
            limit()
        runner.wait()
        for event in runner.events.since(0)[0]:
            if isinstance(event, JobFailed):
                print("failed:", event.message)
            if isinstance(event, JobFinished):
                print("finished:", event.step)


if __name__ == "__main__":
    main(*(Path(argument) for argument in sys.argv[1:]))
