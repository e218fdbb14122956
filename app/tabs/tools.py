"""File tools, a part of Review: look into a LoRA, merge, resize, extract, convert.

Choices are radio buttons, whose words a language file can replace; those of a gradio list stand in an input.
"""

from __future__ import annotations

import html
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gradio as gr
from gradio.components import Component

from app.shell import LOADED, QUIET, Shell, guarded, user_of
from trainer.errors import ConfigError
from trainer.tools.work import TOOLS, ToolWork

__all__ = ["Panel", "asked", "inspected", "render", "wire"]

INSPECT = "inspect"
CHOICES = [("Look into a LoRA file", INSPECT), *((words, verb) for verb, words in TOOLS.items())]
PRECISIONS = [("as in the file", ""), ("float", "float"), ("fp16", "fp16"), ("bf16", "bf16")]
SHOWN_FOR: dict[str, tuple[str, ...]] = {
    INSPECT: ("file",),
    "merge": ("files", "ratios", "merge_method", "rank", "conv_rank", "output", "precision"),
    "merge-into": ("model", "files", "ratios", "output", "precision"),
    "resize": ("file", "rank", "conv_rank", "dynamic", "parameter", "output", "precision"),
    "extract": ("original", "tuned", "rank", "conv_rank", "output", "precision"),
    "convert-lora": ("file", "to", "output", "precision"),
}
"""Fields of each tool, in their order on the page."""


@dataclass(frozen=True)
class Panel:
    """The components."""

    tool: gr.Radio
    fields: dict[str, Component]
    go: gr.Button
    answer: gr.HTML
    settings: gr.Button
    """Puts the settings of the LoRA that was looked into onto the page."""


def render() -> Panel:
    """Lay the tools out, closed until they are asked for."""
    with gr.Accordion("File tools", open=False, elem_id="file-tools"):
        tool = gr.Radio(CHOICES, value=INSPECT, label="Tool", elem_id="tool")
        fields: dict[str, Component] = {
            "model": gr.Textbox(
                label="Model file", placeholder="SD, SDXL or FLUX.1, one .safetensors", visible=False
            ),
            "original": gr.Textbox(label="Original model", visible=False),
            "tuned": gr.Textbox(label="Tuned model", visible=False),
            "file": gr.Textbox(label="LoRA file", max_lines=1),
            "files": gr.Textbox(label="LoRA files, one in each line", lines=2, visible=False),
            "ratios": gr.Textbox(label="Ratios, in their order", placeholder="1 0.5", visible=False),
            "merge_method": gr.Radio(
                [
                    ("What each LoRA does, added", "exact"),
                    ("The same, brought to a rank", "svd"),
                    ("As Kohya's merge_lora: factors added", "sum"),
                    ("As Kohya's merge_lora with concat", "concat"),
                ],
                value="exact",
                label="How",
                visible=False,
            ),
            "rank": gr.Number(label="Rank", precision=0, minimum=0, value=None, visible=False),
            "conv_rank": gr.Number(
                label="Rank of convolutions", precision=0, minimum=0, value=None, visible=False
            ),
            "dynamic": gr.Radio(
                [("The same for all layers", ""), "sv_ratio", "sv_fro", "sv_cumulative"],
                value="",
                label="Rank of each layer",
                visible=False,
            ),
            "parameter": gr.Number(label="Parameter of the method", value=None, visible=False),
            "to": gr.Radio(
                [
                    ("Kohya (A1111, Forge, ComfyUI)", "kohya"),
                    ("diffusers and PEFT", "diffusers"),
                    ("Black Forest Labs (FLUX.1)", "bfl"),
                ],
                value="kohya",
                label="Names",
                visible=False,
            ),
            "output": gr.Textbox(
                label="Save as", placeholder="result.safetensors", max_lines=1, visible=False
            ),
            "precision": gr.Radio(PRECISIONS, value="", label="Precision", visible=False),
        }
        with gr.Row():
            go = gr.Button("Do it", variant="primary", size="md", elem_id="tool-go")
            settings = gr.Button("Open its settings", size="md", elem_id="tool-settings")
        answer = gr.HTML(elem_id="tool-answer", padding=False)
    return Panel(tool, fields, go, answer, settings)


def wire(panel: Panel, shell: Shell) -> None:
    """Connect the tools; everything but looking into a file waits in the queue."""
    names, session = list(panel.fields), shell.session

    def on_tool(tool: Any) -> list[Any]:
        shown = _fields_of(tool)
        return [*(gr.update(visible=name in shown) for name in names), gr.update(visible=tool == INSPECT), ""]

    def on_go(request: gr.Request, tool: Any, *sent: Any) -> str:
        # gradio puts the request where its parameter stands, so it comes before the rest.
        values = dict(zip(names, sent, strict=True))
        _fields_of(tool)
        if tool == INSPECT:
            return inspected(session.paths.resolve(str(values["file"] or "")))
        work = asked(str(tool), values)
        queued = session.enqueue("tool", work.as_json(), Path.cwd(), user_of(request))
        return f'<p role="status">{html.escape(queued.name)}: in the queue, see Train.</p>'

    def on_settings(file: Any) -> list[Any]:
        from trainer.config import Loaded
        from trainer.lora_file import read_metadata
        from trainer.tools.inspect import recovered_config

        path = session.paths.resolve(str(file or ""))
        found = recovered_config(read_metadata(path))
        message = f"settings of {path.name}; to be filled in: {', '.join(found.lost)}"
        return [
            *shell.shown(Loaded(found.config), Path.cwd(), message, path.name),
            gr.Tabs(selected="parameters"),
        ]

    panel.tool.change(
        guarded(on_tool), panel.tool, [*panel.fields.values(), panel.settings, panel.answer], **QUIET
    )
    panel.go.click(guarded(on_go), [panel.tool, *panel.fields.values()], panel.answer, **QUIET)
    panel.settings.click(
        guarded(on_settings), panel.fields["file"], [*shell.outputs, shell.tabs], **QUIET
    ).success(None, shell.everything, shell.draft, **LOADED)


def _fields_of(tool: Any) -> tuple[str, ...]:
    """Fields of a tool that the page names; gradio lets a list of choices through."""
    if not isinstance(tool, str) or tool not in SHOWN_FOR:
        raise ConfigError("the page asked for something that does not exist: reload it")
    return SHOWN_FOR[tool]


def asked(tool: str, values: dict[str, Any]) -> ToolWork:
    """The work that a person asks for.

    Args:
        tool: A key of `trainer.tools.work.TOOLS`.
        values: What stands in the fields, by their names here.

    Raises:
        ConfigError: A field that the tool needs is empty, or cannot be read.
    """
    shown = SHOWN_FOR.get(tool, ())
    found: dict[str, Any] = {}
    for name in shown:
        value = values.get(name)
        if name == "files":
            found[name] = [line.strip() for line in str(value or "").splitlines() if line.strip()]
        elif name == "ratios":
            found[name] = _numbers(str(value or ""))
        elif name in ("merge_method", "dynamic"):
            found["method"] = value
        elif isinstance(value, str):
            found[name] = value.strip()
        else:
            found[name] = value or None  # 0 stands for an empty field
    if found.get("method") != "svd" and tool == "merge":
        found["rank"] = found["conv_rank"] = None
    if tool == "resize" and not found.get("method"):
        found["parameter"] = None
    return ToolWork(tool, found)


def _numbers(text: str) -> list[float]:
    try:
        return [float(part) for part in text.replace(",", " ").split()]
    except ValueError as error:
        raise ConfigError(f"{text!r}: ratios are numbers, such as 1 0.5") from error


def inspected(path: Path) -> str:
    """What a LoRA file holds, as HTML."""
    from trainer.tools.inspect import inspect, lines

    first, *rest = lines(inspect(path))
    items = "".join(f"<li>{html.escape(line)}</li>" for line in rest)
    return f"<p><b>{html.escape(first)}</b></p><ul>{items}</ul>"
