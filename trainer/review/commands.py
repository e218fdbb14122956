"""Review from the shell: ``python -m trainer report FOLDER OUT.html``."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from trainer.errors import SetupError

__all__ = ["VERBS", "add_commands"]

VERBS = ("report", "verdict")


def add_commands(commands: Any) -> None:
    """Add the verbs to argparse's sub-parsers."""
    report = commands.add_parser("report", help="a run as one HTML file that needs nothing else")
    report.add_argument("folder", type=Path, help="a results folder, or a file in it")
    report.add_argument("output", type=Path, help="the HTML file")
    report.add_argument("--name", default="", help="the run's output_name, where the folder holds several")
    report.set_defaults(run=_report)
    verdict = commands.add_parser("verdict", help="undertrained, good or overtrained, and which file to keep")
    verdict.add_argument("folder", type=Path, help="a results folder, or a file in it")
    verdict.add_argument("--name", default="", help="the run's output_name, where the folder holds several")
    verdict.add_argument(
        "--base", type=Path, help="where relative paths of its settings start; here if left out"
    )
    verdict.add_argument(
        "--held", default="", help="a Kohya folder of pictures that were not trained, to compare"
    )
    verdict.add_argument("--model", type=Path, help="base model, where the run has no JSON that names it")
    verdict.add_argument(
        "--pictures", type=Path, help="training pictures (train_data_dir), where the run has no JSON"
    )
    verdict.add_argument("--again", action="store_true", help="measure also what was measured before")
    verdict.set_defaults(run=_verdict)


def _report(options: argparse.Namespace) -> int:
    from trainer.review.judging import verdict_of
    from trainer.review.report import write_report
    from trainer.review.run_folder import open_run

    run = open_run(options.folder, options.name)
    try:
        size_bytes = write_report(run, options.output, verdict_of(run))
    except OSError as error:
        raise SetupError(f"{options.output} cannot be written: {error.strerror or error}") from error
    sys.stdout.write(f"{options.output}: {run.name}, {size_bytes / 2**20:.1f} MiB\n")
    return 0


def _verdict(options: argparse.Namespace) -> int:
    from trainer.events import Event, LogLine
    from trainer.files import REPOSITORY
    from trainer.quiet import hush
    from trainer.review.judging import STRENGTHS
    from trainer.review.keep import settings_of
    from trainer.review.measure import measure_run, measures_file, read_measures, write_measures
    from trainer.review.run_folder import open_run
    from trainer.review.verdict import judge, lines

    def emit(event: Event) -> None:
        if isinstance(event, LogLine) and event.level != "info":
            sys.stderr.write(f"{event.message}\n")

    hush()
    run = open_run(options.folder, options.name)
    named = {"pretrained_model_name_or_path": options.model, "train_data_dir": options.pictures}
    config = settings_of(run).model_copy(
        update={name: str(path.resolve()) for name, path in named.items() if path is not None}
    )
    base = options.base or Path.cwd()
    # A run of one of the program's own presets: its paths start at the program's folder.
    model = config.pretrained_model_name_or_path.strip()
    if options.base is None and not (base / model).exists() and (REPOSITORY / model).exists():
        base = REPOSITORY
    file = measures_file(run)
    known = None if options.again else read_measures(file)
    measures = measure_run(run, config, base, emit=emit, strengths=STRENGTHS, held=options.held, known=known)
    write_measures(file, measures)
    for line in lines(measures, judge(measures)):
        sys.stdout.write(f"{line}\n")
    return 0
