"""A report needs nothing else, tells what there is, and keeps folders to itself."""

from __future__ import annotations

import html.parser
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from trainer import config as configuration
from trainer.cli import main
from trainer.config import KohyaConfig
from trainer.review.charts import smoothed
from trainer.review.report import without_folders, write_report
from trainer.review.run_folder import open_run
from trainer.review.verdict import Signal, Verdict

EVIL = '<script>alert("x")</script>'


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A results folder in a place that is nobody's business, with HTML in all its texts."""
    out = tmp_path / "private person" / "out"
    (out / "sample").mkdir(parents=True)
    entries = {
        "ss_output_name": "run",
        "ss_network_module": "networks.lora",
        "ss_steps": "10",
        "ss_dataset_dirs": f'{{"5_{EVIL.replace(chr(34), "")}": {{"n_repeats": 5, "img_count": 7}}}}',
        "ss_tag_frequency": '{"5_x": {"red hair": 7, "smile": 3}}',
    }
    save_file({"x.alpha": torch.ones(1)}, out / "run.safetensors", entries)
    for step in (0, 10):
        name = f"run_{step:06d}_00_20260101000000_4.png"
        Image.new("RGB", (64, 48), (step * 20, 0, 0)).save(out / "sample" / name)
    config = KohyaConfig(
        output_name="run",
        output_dir=str(out),
        pretrained_model_name_or_path=str(tmp_path / "private person" / "base.safetensors"),
        training_comment=f"from {tmp_path}/private person/notes.txt {EVIL}",
        sample_prompts=f"a cat {EVIL} --w 64 --h 48 --d 4",
        unet_lr=0.00031,
    )
    configuration.save(config, out / "run_20260101-000000.json")
    return out


class Parsed(html.parser.HTMLParser):
    """Tags and addresses of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.sources: list[str] = []
        self.words: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.sources += [value or "" for name, value in attrs if name in ("src", "href")]
        assert not [name for name, _ in attrs if name.startswith("on")]

    def handle_data(self, data: str) -> None:
        self.words.append(data)


def test_a_report_stands_alone_and_names_no_folder(folder: Path, tmp_path: Path) -> None:
    target = tmp_path / "report.html"
    assert main(["report", str(folder), str(target)]) == 0
    text = target.read_text(encoding="utf-8")
    page = Parsed(text)
    assert "script" not in page.tags
    assert page.tags.count("img") == 2
    assert all(source.startswith("data:image/webp;base64,") for source in page.sources)
    said = " ".join(page.words)
    for words in (
        EVIL,
        "before training",
        "step 10",
        "0.00031",
        "base.safetensors",
        "7 pictures x 5 repeats",
        "red hair",
    ):
        assert words in said
    assert "private" not in text.replace("private person/notes", "")
    assert str(tmp_path) not in text


def test_a_verdict_is_told(folder: Path, tmp_path: Path) -> None:
    signal = Signal("own", f"Own {EVIL}", {5: 0.5, 10: 0.25}, 0.4, "lower is better", "good", "fine")
    verdict = Verdict("good", f"Keep {folder}/run.safetensors <now>.", (10, 10), "run.safetensors", (signal,))
    write_report(open_run(folder), tmp_path / "report.html", verdict)
    page = Parsed((tmp_path / "report.html").read_text(encoding="utf-8"))
    said = " ".join(page.words)
    assert "Keep run.safetensors <now>." in said
    # What it rests on, at the file to keep.
    assert f"Own {EVIL} 0.25 limit 0.4 fine" in said
    assert "script" not in page.tags


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("C:\\Users\\My Name\\pic.png", "pic.png"),
        ("/home/ana/loras/x.safetensors, and more", "x.safetensors, and more"),
        ("--foo=~/data/x.txt", "--foo=x.txt"),
        ("file:///C:/a b/c.png", "c.png"),
        ("see https://example.org/a/b", "see https://example.org/a/b"),
        ("1/2 cup, face/body, a / b", "1/2 cup, face/body, a / b"),
    ],
)
def test_folders_are_cut_off_and_other_slashes_stay(text: str, told: str) -> None:
    assert without_folders(text) == told


def test_smoothing_starts_at_the_first_value_and_stays_among_them() -> None:
    assert smoothed([(1, 3.0)])[0][1] == pytest.approx(3.0)
    flat = smoothed([(step, 0.5) for step in range(100)])
    assert all(value == pytest.approx(0.5) for _, value in flat)
    weight = 0.9
    two = smoothed([(1, 1.0), (2, 0.0)], weight)
    assert two[1][1] == pytest.approx(weight * (1 - weight) / (1 - weight**2))
