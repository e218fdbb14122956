"""What loading a configuration found, for a person."""

from __future__ import annotations

import html
from pathlib import Path

from app.view import row, set_button
from trainer.config import Loaded

__all__ = ["report_html", "ways_on"]

KINDS = {
    "converted": "converted",
    "unknown": "unknown (kept, and written back)",
    "unsupported": "without effect here",
    "invalid": "invalid (the default is used)",
    "missing": "not in the file",
    "outside": "outside the usual range",
}


def report_html(loaded: Loaded, message: str, more: str = "") -> str:
    """The findings by kind, folded; ``message`` is escaped here, ``more`` is HTML."""
    groups: dict[str, list[str]] = {}
    for finding in loaded.report:
        groups.setdefault(finding.kind, []).append(finding.message)
    parts = [f"<b>{html.escape(message)}</b>", more]
    for kind, messages in groups.items():
        items = "".join(f"<li>{html.escape(item)}</li>" for item in messages)
        parts.append(
            f"<details><summary>{len(messages)} {html.escape(KINDS[kind])}</summary><ul>{items}</ul></details>"
        )
    return f'<div class="kiln-report" role="status">{"".join(parts)}</div>'


def ways_on(folder: Path, name: str) -> str:
    """Buttons that resume or continue what lies in a results folder, as HTML; "" where nothing does.

    Args:
        folder: Where the configuration lies.
        name: Its output name, with which the files of its run begin.
    """
    try:
        entries = sorted(folder.iterdir(), key=lambda path: path.stat().st_mtime, reverse=True)
    except OSError:
        return ""
    mine = [path for path in entries if path.name.startswith(name)]
    state = next((path for path in mine if path.name.endswith("-state") and path.is_dir()), None)
    lora = next((path for path in mine if path.suffix == ".safetensors"), None)
    buttons = ""
    if state is not None:
        buttons += set_button(f"Resume from {state.name}", {"resume": str(state)})
    if lora is not None:
        buttons += set_button(f"Train on with {lora.name}", {"network_weights": str(lora), "resume": ""})
    return row(buttons)
