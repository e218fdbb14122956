"""What loading a configuration found: one `Finding` for everything that is not as it was written."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from trainer.config.kohya import KohyaConfig

__all__ = ["FileKind", "Finding", "FindingKind", "Loaded", "shown"]

FindingKind = Literal["converted", "unknown", "unsupported", "invalid", "missing", "outside"]
"""converted: of another type, spelling or name than today's.
unknown: no setting; kept and written back.
unsupported: has no effect here, or only a refused run.
invalid: could not be read; the default is used and is what a save writes.
missing: not in the file, and Kohya read that as something else than today's default.
outside: not among the choices or bounds of Kohya's page; taken and written back.
"""

FileKind = Literal["LoRA", "DreamBooth", "fine-tuning", "textual inversion", "other"]


@dataclass(frozen=True)
class Finding:
    """One thing that a person should know about a loaded or saved file."""

    kind: FindingKind
    key: str
    """The key in the file; "" if it is about the file as a whole."""
    found: Any
    """What the file holds; None if nothing."""
    used: Any
    """What counts now; None if nothing does."""
    message: str
    """The whole of it as a sentence part without a full stop, starting with the key."""

    def __str__(self) -> str:
        """The message."""
        return self.message


@dataclass(frozen=True)
class Loaded:
    """A configuration as read from a file, and the report about it."""

    config: KohyaConfig
    report: tuple[Finding, ...] = ()
    kind: FileKind = "LoRA"
    """Which of Kohya's tabs wrote the file."""
    path: Path | None = None

    def of(self, *kinds: FindingKind) -> tuple[Finding, ...]:
        """The findings of some kinds."""
        return tuple(finding for finding in self.report if finding.kind in kinds)


def shown(value: Any) -> str:
    """A value as a message shows it: as in JSON, in one line, cut where it is long."""
    if isinstance(value, str):
        text = json.dumps(value, ensure_ascii=False).encode("utf-8", "replace").decode("utf-8")
    elif isinstance(value, bool) or value is None:
        text = {True: "true", False: "false", None: "null"}[value]
    elif isinstance(value, dict):
        text = "an object" if value else "{}"
    elif isinstance(value, list):
        text = f"a list of {len(value)}" if len(value) > 4 else f"[{', '.join(map(shown, value))}]"
    else:
        text = str(value)
    return text if len(text) <= 80 else text[:77] + "..."
