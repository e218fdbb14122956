"""Tools in the queue: from the page's fields to a file, inside the roots."""

from __future__ import annotations

from pathlib import Path

import pytest
from safetensors.torch import load_file

from app import works
from app.fields import Form
from app.paths import Paths
from app.session import Session
from app.shell import Shell
from app.tabs.tools import SHOWN_FOR, Panel, asked, inspected, render, wire
from tests.tools.loras import SD1, write
from trainer.controls import Controls
from trainer.errors import ConfigError
from trainer.events import EventLog, WorkFinished
from trainer.tools.work import TOOLS, ToolWork
from trainer.work import perform


def test_fields_become_a_file(tmp_path: Path) -> None:
    write(tmp_path / "a.safetensors", SD1, 8, 4.0, 1)
    write(tmp_path / "b.safetensors", SD1, 4, 4.0, 2)
    paths = Paths({"out": tmp_path}, confined=True)
    wanted = asked(
        "merge",
        {
            "files": "out/a.safetensors\n out/b.safetensors\n",
            "ratios": "0.5, 1",
            "merge_method": "svd",
            "rank": 3,
            "conv_rank": None,
            "output": "out/c.safetensors",
            "precision": "fp16",
        },
    )
    work = works.load("tool", wanted.as_json(), tmp_path, paths)
    events = EventLog()
    perform(work, events, Controls())
    said = events.since(0)[0]
    assert any(isinstance(event, WorkFinished) and event.path == tmp_path / "c.safetensors" for event in said)
    assert (
        load_file(tmp_path / "c.safetensors")[
            "lora_unet_down_blocks_1_resnets_0_conv1.lora_down.weight"
        ].shape[0]
        == 3
    )
    assert work.journal.is_file()


def test_a_stop_leaves_nothing_half_written(tmp_path: Path) -> None:
    write(tmp_path / "a.safetensors", SD1, 8, 4.0, 1)
    work = ToolWork(
        "resize",
        {"file": str(tmp_path / "a.safetensors"), "rank": 2, "output": str(tmp_path / "b.safetensors")},
    )
    controls = Controls()
    controls.stop.set()
    perform(work, EventLog(), controls)
    assert sorted(path.name for path in tmp_path.glob("*.safetensors")) == ["a.safetensors"]


def test_what_is_missing_or_outside_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="the LoRA file is empty"):
        asked("resize", {"file": " ", "rank": 4, "output": "b.safetensors"})
    with pytest.raises(ConfigError, match="ratios are numbers"):
        asked("merge", {"files": "a", "ratios": "half", "output": "b.safetensors"})
    with pytest.raises(ConfigError, match="no tool"):
        ToolWork("burn", {"output": "x"})
    with pytest.raises(ConfigError, match="cannot be read"):
        ToolWork.from_json("[]")
    paths = Paths({"out": tmp_path}, confined=True)
    wanted = asked("resize", {"file": "/etc/passwd", "rank": 4, "output": "out/b.safetensors"})
    with pytest.raises(ConfigError, match="outside the folders"):
        works.load("tool", wanted.as_json(), tmp_path, paths)


def test_every_tool_has_its_fields() -> None:
    assert set(SHOWN_FOR) == {"inspect", *TOOLS}


def test_a_file_is_shown_escaped(tmp_path: Path) -> None:
    path = write(tmp_path / "a.safetensors", SD1, 8, 4.0, 1, {"ss_training_comment": "<script>"})
    shown = inspected(path)
    assert "&lt;script&gt;" in shown
    assert "<script>" not in shown
    assert "dim: 8; alpha: 4" in shown


def test_the_buttons_are_wired(session: Session, tmp_path: Path) -> None:
    """What the page's own functions answer, called as gradio calls them."""
    import gradio as gr
    from gradio.helpers import special_args

    panels: list[Panel] = []
    with gr.Blocks() as page:
        panels.append(render())
        draft, everything = gr.Textbox(), [gr.Textbox()]
        with gr.Tabs() as tabs, gr.Tab("Parameters", id="parameters"):
            pass
        wire(panels[0], Shell(session, Form(), everything, draft, everything, tabs))
    functions = {function.name: function.fn for function in page.fns.values()}
    names = list(panels[0].fields)
    path = write(tmp_path / "a.safetensors", SD1, 8, 4.0, 1)
    values = [str(path) if name == "file" else "" for name in names]
    asked_by = gr.Request(username=None)
    arguments = special_args(functions["on_go"], ["inspect", *values], asked_by)[0]
    assert "dim: 8" in functions["on_go"](*arguments)
    shown = functions["on_tool"]("resize")
    visible = [name for name, update in zip(names, shown, strict=False) if update["visible"]]
    assert sorted(visible) == sorted(SHOWN_FOR["resize"])
