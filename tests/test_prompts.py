"""Prompt lines and files, as engine facts 10.2 describe them."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests import tiny
from trainer.errors import ConfigError
from trainer.prompts import (
    SamplePrompt,
    for_job,
    ignored_options,
    parse_line,
    parse_text,
    read_prompts,
    write_prompt_file,
)

LINE = "a cat -- well, a dog --n blurry, low res --W 768 --h 512 --d 42 --s 20 --l 7.5 --g 3.5 --ss k_euler_a --fs 3.1"
FULL = SamplePrompt(
    prompt="a cat -- well, a dog",
    negative="blurry, low res",
    width=768,
    height=512,
    seed=42,
    steps=20,
    cfg_scale=7.5,
    guidance=3.5,
    sampler="k_euler_a",
    flow_shift=3.1,
)


def test_line() -> None:
    # " -- " with a space after it is no option, but Kohya cuts there too.
    assert parse_line(LINE.replace("-- well", "- well")) == SamplePrompt(
        **{**vars(FULL), "prompt": "a cat - well, a dog"}
    )
    assert parse_line("a cat") == SamplePrompt(prompt="a cat")
    assert parse_line("--n x") == SamplePrompt(prompt="--n x")


@pytest.mark.parametrize(
    ("text", "steps"), [("--s 0", 1), ("--s 5000", 1000), ("--s 30", 30), ("--S 12,", 12), ("", None)]
)
def test_steps_are_kept_in_range(text: str, steps: int | None) -> None:
    assert parse_line(f"x {text}").steps == steps


def test_what_nothing_reads_is_reported() -> None:
    prompts = parse_text("one --cn edges.png --w wide --zz 1\ntwo --w 64\n")
    assert prompts[0].ignored == ("--cn edges.png", "--w wide", "--zz 1")
    assert prompts[0].width == 512
    assert ignored_options(prompts) == ["sample prompt 0: --cn edges.png, --w wide, --zz 1 has no effect"]


def test_text_file(tmp_path: Path) -> None:
    path = tmp_path / "prompts.txt"
    path.write_text("\ufeff# heading\n\n  a cat --w 64  \n#no\nübung\r\n", encoding="utf-8")
    assert read_prompts(path) == [SamplePrompt(prompt="a cat", width=64), SamplePrompt(prompt="übung")]


def test_json_file(tmp_path: Path) -> None:
    path = tmp_path / "prompts.json"
    path.write_text(
        '["a cat --d 1", {"prompt": "b", "negative_prompt": "n", "width": "640", "sample_steps": 5, "scale": 3,'
        ' "seed": null, "sample_sampler": "ddim", "guidance_scale": 1.5, "flow_shift": "2", "controlnet_image": "x"}]'
    )
    assert read_prompts(path) == [
        SamplePrompt(prompt="a cat", seed=1),
        SamplePrompt(
            prompt="b",
            negative="n",
            width=640,
            steps=5,
            cfg_scale=3.0,
            sampler="ddim",
            guidance=1.5,
            flow_shift=2.0,
            ignored=("controlnet_image=x",),
        ),
    ]


def test_toml_file(tmp_path: Path) -> None:
    path = tmp_path / "prompts.toml"
    path.write_text(
        '[prompt]\nwidth = 256\nscale = 5\n[[prompt.subset]]\nprompt = "a"\n[[prompt.subset]]\nprompt = "b"\nseed = 7\n'
    )
    assert read_prompts(path) == [
        SamplePrompt(prompt="a", width=256, cfg_scale=5.0),
        SamplePrompt(prompt="b", width=256, cfg_scale=5.0, seed=7),
    ]


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("x.json", "{", "not valid JSON"),
        ("x.json", "{}", "list of prompts"),
        ("x.json", '[{"width": "wide"}]', "width = 'wide'"),
        ("x.json", '[{"width": true}]', "width = True"),
        ("x.toml", "[prompt", "not valid TOML"),
        ("x.toml", "prompt = 3", "not valid TOML"),
        ("x.toml", '[prompt]\nseed = 1\n[[prompt.subset]]\nseed = 2\nprompt = "a"', "gives seed in"),
    ],
)
def test_broken_files(name: str, text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(ConfigError, match=message):
        read_prompts(tmp_path / name)


def test_broken_encoding_and_missing_file(tmp_path: Path) -> None:
    (tmp_path / "x.txt").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match="UTF-8"):
        read_prompts(tmp_path / "x.txt")
    with pytest.raises(ConfigError, match=r"y\.txt cannot be read"):
        read_prompts(tmp_path / "y.txt")


def test_prompt_file_of_a_run(tmp_path: Path) -> None:
    """It is written at the start, may be edited during the run, and goes where no prompts are left."""
    text = "a cat --w 64\n# not this\n\na dog"
    job = tiny.job(Path("m"), tmp_path, sample_prompts=text)
    both = [SamplePrompt(prompt="a cat", width=64), SamplePrompt(prompt="a dog")]
    assert for_job(job) == both
    path = write_prompt_file(job)
    assert path == tmp_path / "out" / "sample" / "prompt.txt"
    assert path.read_text() == text + "\n"
    assert for_job(job) == both
    path.write_text("a horse\n")
    assert for_job(job) == [SamplePrompt(prompt="a horse")]
    assert write_prompt_file(tiny.job(Path("m"), tmp_path, sample_prompts=" \n")) is None
    assert not path.exists()


def test_prompts_in_a_file_of_their_own(tmp_path: Path) -> None:
    (tmp_path / "my prompts.txt").write_text("a cat\n")
    for job in (
        tiny.job(Path("m"), tmp_path, sample_prompts="my prompts.txt"),
        tiny.job(Path("m"), tmp_path, additional_parameters='--sample_prompts "my prompts.txt"'),
    ):
        assert write_prompt_file(job) == tmp_path / "my prompts.txt"
        assert for_job(job) == [SamplePrompt(prompt="a cat")]
    assert not (tmp_path / "out" / "sample").exists()
    with pytest.raises(ConfigError, match=r"gone\.toml cannot be read"):
        write_prompt_file(tiny.job(Path("m"), tmp_path, sample_prompts="gone.toml"))
