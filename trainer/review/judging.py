"""A verdict as work for the queue, and the verdict of what was measured before."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trainer.config import KohyaConfig
from trainer.config import dumps as dump_config
from trainer.config import loads as load_config
from trainer.errors import ConfigError
from trainer.events import Event
from trainer.review.run_folder import RunFolder, open_run
from trainer.work import Done

if TYPE_CHECKING:
    from trainer.job import Job
    from trainer.review.verdict import Verdict

__all__ = ["Judging", "verdict_of"]

STRENGTHS = (0.6, 0.8, 1.2)
"""LoRA strengths, beside 1, at which the last file is measured."""


def verdict_of(run: RunFolder) -> Verdict | None:
    """The verdict on what was measured of a run, during training or afterwards; None where that was too little."""
    from trainer.review.measure import measures_file, read_measures
    from trainer.review.verdict import judge

    measures = read_measures(measures_file(run))
    if measures is None or not measures.points:
        return None
    try:
        return judge(measures)
    except ConfigError:  # only weights could be measured
        return None


@dataclass(frozen=True, kw_only=True)
class Judging:
    """Measures a run's files. A `trainer.work.Work`."""

    title: str
    """Name of the run."""
    folder: Path
    """Its results."""
    config: KohyaConfig
    base: Path
    """Folder that the configuration's relative paths start from."""

    @property
    def name(self) -> str:
        """See `trainer.work.Work`."""
        return f"{self.title}: verdict"

    @property
    def journal(self) -> Path:
        """See `trainer.work.Work`."""
        return self.folder / "logs" / f"{self.title}-verdict" / "journal.jsonl"

    @property
    def pictures(self) -> Path | None:
        """See `trainer.work.Work`."""
        return None

    def as_json(self) -> str:
        """The settings, for a list that is kept."""
        values = {
            "title": self.title,
            "folder": str(self.folder),
            "config": json.loads(dump_config(self.config)),
        }
        return json.dumps(values, ensure_ascii=False)

    @classmethod
    def from_json(cls, text: str, base: Path) -> Judging:
        """What `as_json` wrote.

        Raises:
            ConfigError: It is something else.
        """
        try:
            values: dict[str, Any] = json.loads(text)
            config = load_config(values["config"]).config
            return cls(title=str(values["title"]), folder=Path(values["folder"]), config=config, base=base)
        except (ValueError, TypeError, KeyError) as error:
            raise ConfigError(f"what is to be judged cannot be read ({error}): ask for it again") from error

    def job(self) -> Job:
        """The run that is judged, for a check of its paths.

        Raises:
            ConfigError: Its settings contradict each other.
        """
        from trainer.job import Job

        return Job.from_config(self.config, base=self.base)

    def run(self, emit: Callable[[Event], None], stopped: Callable[[], bool]) -> Done:
        """Measure what has not been measured before; see `trainer.work.Work.run`.

        Raises:
            ConfigError: There are no files, or nothing that they can be judged by.
            StopTraining: ``stopped`` said so.
        """
        from trainer.review.measure import measure_run, measures_file, read_measures, write_measures
        from trainer.review.verdict import judge

        run = open_run(self.folder, self.title)
        file = measures_file(run)
        measures = measure_run(
            run,
            self.config,
            self.base,
            emit=emit,
            stopped=stopped,
            strengths=STRENGTHS,
            known=read_measures(file),
        )
        write_measures(file, measures)
        return Done(judge(measures).sentence, file)
