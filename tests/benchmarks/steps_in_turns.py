"""Compare the step time of our trainer and sd-scripts, step by step in turns on the same machine.

Arguments are those of `tests.benchmarks.against_sdscripts`, whose step times only mean something on a
machine that nothing else uses, and that no neighbour slows down. Here both programs are loaded at the
same time and make their steps in turns (`tests.parity.turns`); what is compared is the sum over whole
epochs, in which both see the same batches. Needs the memory of both at once.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from tests.benchmarks import against_sdscripts as reference
from tests.parity import turns

EPOCHS = 3


def our_run(file: Path) -> None:
    """One run of ours that waits for its turn after each step."""
    from trainer import config as configuration
    from trainer.events import Event, EventLog, StepDone
    from trainer.job import Job
    from trainer.runner import run

    class Waiting(EventLog):
        def emit(self, event: Event) -> None:
            super().emit(event)
            if isinstance(event, StepDone):
                turns.wait()

    run(Job.from_config(configuration.load(file).config, base=file.parent), Waiting())


def main() -> int:
    """Command line; ends with 1 where ours is slower."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    reference.add_arguments(parser)
    parser.add_argument("--epochs", type=int, default=EPOCHS)
    args = parser.parse_args()
    batches = reference.BATCHES_PER_EPOCH
    steps = batches * (args.epochs + 1)
    names = ["sd-scripts", "ours"]
    with tempfile.TemporaryDirectory() as scratch:
        folders = {name: Path(scratch) / name for name in names}
        for folder in folders.values():
            folder.mkdir()
        file = reference.write_config(args, folders["ours"], steps)
        commands = {
            "sd-scripts": reference.their_command(args, folders["sd-scripts"], steps),
            "ours": [sys.executable, "-m", "tests.benchmarks.steps_in_turns", "--run", str(file)],
        }
        umpire, running = turns.Umpire(), []
        for name, command in commands.items():
            environment = {**os.environ, **reference.environment(args.threads), **umpire.environment(name)}
            with (folders[name] / "log.txt").open("w", encoding="utf-8") as log:
                running.append(
                    subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=environment)
                )
        try:
            took = umpire.referee(names, steps - 1)
        except OSError as error:
            logs = "\n".join((folder / "log.txt").read_text()[-2000:] for folder in folders.values())
            raise SystemExit(f"{error}\n{logs}") from error
        finally:
            for process in running:
                process.kill()
                process.wait()
    sums = {
        name: [
            sum(seconds[first : first + batches])
            for first in range(batches - 1, len(seconds) - batches + 1, batches)
        ]
        for name, seconds in took.items()
    }
    for epoch, (theirs, ours) in enumerate(zip(sums["sd-scripts"], sums["ours"], strict=True), 2):
        print(
            f"epoch {epoch}: sd-scripts {theirs / batches:6.2f} s a step, ours {ours / batches:6.2f} s, "
            f"ratio {ours / theirs:.3f}"
        )
    ratio = sum(sums["ours"]) / sum(sums["sd-scripts"])
    pairs = sorted(ours / theirs for theirs, ours in zip(took["sd-scripts"], took["ours"], strict=True))
    print(
        f"whole: ratio {ratio:.3f}; fastest step of each, ratio {min(took['ours']) / min(took['sd-scripts']):.3f};"
    )
    print(f"pairs of steps (not the same batch): median ratio {statistics.median(pairs):.3f}")
    return int(ratio > 1)


if __name__ == "__main__":
    if len(sys.argv) == 3 and sys.argv[1] == "--run":
        our_run(Path(sys.argv[2]))
    else:
        sys.exit(main())
