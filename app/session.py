"""What the server knows and every page shares: the running job, its view, and the configuration shown."""

from __future__ import annotations

import threading
from dataclasses import dataclass, field
from pathlib import Path

from app.options import Options
from app.paths import Paths
from app.view import RunView
from trainer.config import KohyaConfig
from trainer.events import EventLog
from trainer.job import Job
from trainer.worker import Runner

__all__ = ["Session"]


@dataclass
class Session:
    """One server's state. The pages hold nothing that a reload would lose while a run goes on."""

    paths: Paths
    thumbnails: Path
    config: KohyaConfig
    """What a page shows when it opens."""
    base: Path
    """Folder that the relative paths of `config` start from."""
    runner: Runner = field(default_factory=Runner)
    view: RunView = field(init=False)
    served: list[str] = field(default_factory=list)
    """Folders whose files the page may fetch: thumbnails and the sample folders of runs."""
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def __post_init__(self) -> None:
        """Nothing has run yet."""
        self.view = RunView(EventLog(), self.thumbnails)
        self.thumbnails.mkdir(parents=True, exist_ok=True)
        self.served.append(str(self.thumbnails))

    @classmethod
    def open(cls, options: Options, config: KohyaConfig, base: Path) -> Session:
        """The session of a server that starts with ``options``."""
        paths = Paths(options.roots, confined=options.listen)
        return cls(paths=paths, thumbnails=options.state / "thumbnails", config=config, base=base)

    def start(self, config: KohyaConfig, base: Path) -> Job:
        """Check ``config`` and start training it.

        Raises:
            ConfigError: It cannot be trained, or a run is going on.
        """
        job = Job.from_config(config, base=base)
        self.paths.check(job)
        with self._lock:
            self.runner.start(job)
            self.config, self.base = config, base
            self.view = RunView(self.runner.events, self.thumbnails)
            samples = str(job.output_dir / "sample")
            if samples not in self.served:
                self.served.append(samples)
        return job
