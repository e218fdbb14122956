"""Libraries' remarks on the console that say nothing to a person who trains a LoRA."""

from __future__ import annotations

import logging

__all__ = ["hush"]

QUIET = {
    # On a CPU it tells at import to install a package for 4-bit matrix products, which no run here makes.
    "bitsandbytes.backends.cpu.ops": logging.ERROR,
}


def hush() -> None:
    """Raise the level of the loggers in `QUIET`; called before models are imported."""
    for name, level in QUIET.items():
        logging.getLogger(name).setLevel(level)
