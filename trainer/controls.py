"""What a person can ask of a run that is going: stop, a save, samples."""

from __future__ import annotations

import threading
from dataclasses import dataclass, field

__all__ = ["Controls"]


@dataclass(frozen=True)
class Controls:
    """Flags that any thread may set; the loop looks at them once a step."""

    stop: threading.Event = field(default_factory=threading.Event)
    """Finish the step, save the LoRA and a state, end the run."""
    save: threading.Event = field(default_factory=threading.Event)
    """Save the LoRA (and a state where save_state is on) after this step."""
    sample: threading.Event = field(default_factory=threading.Event)
    """Draw the sample prompts after this step."""
