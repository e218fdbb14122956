"""Dataset: the pictures as training will see them."""

from __future__ import annotations

import html
from collections.abc import Sequence
from pathlib import Path

import gradio as gr

from app.paths import Paths
from trainer.config import KohyaConfig
from trainer.job import Job

__all__ = ["pictures_html", "render"]



def render(words: str, button: str, name: str) -> tuple[gr.Button, gr.HTML]:
    """A sentence, a button and the place for its answer."""
    gr.HTML(f'<p class="kiln-empty">{html.escape(words)}</p>', padding=False)
    look = gr.Button(button, size="md", elem_id=f"look-{name}", scale=0)
    return look, gr.HTML(elem_id=f"found-{name}", padding=False)


def _job(config: KohyaConfig, base: Path, paths: Paths) -> Job:
    from trainer.data.dataset_config import apply_dataset_config

    job = Job.from_config(paths.expand(config), base=base)
    paths.check(job)
    return apply_dataset_config(job)


def pictures_html(config: KohyaConfig, base: Path, paths: Paths) -> str:
    """Folders, buckets and what is odd about the pictures.

    Raises:
        TrainerError: There are none, or the settings contradict each other.
    """
    from trainer.data import folder

    data = folder.scan(_job(config, base, paths))
    folders = [
        (str(part.folder), sum(picture.subset == index for picture in data.pictures), part.repeats)
        for index, part in enumerate(data.subsets)
    ]
    sizes = [(f"{width} x {height}", count) for (width, height), count in data.bucket_counts().items()]
    odd = "".join(f"<li>{html.escape(finding.message)}</li>" for finding in data.findings)
    return (
        _table(("Folder", "Pictures", "Repeats"), folders)
        + _table(("Bucket", "Pictures with repeats"), sizes)
        + (f"<ul class='kiln-checks'>{odd}</ul>" if odd else "")
    )


def _table(heads: tuple[str, ...], rows: Sequence[tuple[object, ...]]) -> str:
    head = "".join(f"<th scope='col'>{title}</th>" for title in heads)
    body = "".join(
        "<tr>" + "".join(f"<td>{html.escape(str(cell))}</td>" for cell in item) + "</tr>" for item in rows
    )
    return f"<table class='kiln-table'><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"
