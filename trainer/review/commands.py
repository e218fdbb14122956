"""Review from the shell: ``python -m trainer report FOLDER OUT.html``."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from trainer.errors import SetupError

__all__ = ["VERBS", "add_commands"]

VERBS = ("report",)


def add_commands(commands: Any) -> None:
    """Add the verbs to argparse's sub-parsers."""
    report = commands.add_parser("report", help="a run as one HTML file that needs nothing else")
    report.add_argument("folder", type=Path, help="a results folder, or a file in it")
    report.add_argument("output", type=Path, help="the HTML file")
    report.add_argument("--name", default="", help="the run's output_name, where the folder holds several")
    report.set_defaults(run=_report)


def _report(options: argparse.Namespace) -> int:
    from trainer.review.report import write_report
    from trainer.review.run_folder import open_run

    run = open_run(options.folder, options.name)
    try:
        size_bytes = write_report(run, options.output)
    except OSError as error:
        raise SetupError(f"{options.output} cannot be written: {error.strerror or error}") from error
    sys.stdout.write(f"{options.output}: {run.name}, {size_bytes / 2**20:.1f} MiB\n")
    return 0
