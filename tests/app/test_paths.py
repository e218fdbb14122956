"""What may be named on a page that other machines can reach."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from app.paths import Paths
from trainer.config import KohyaConfig
from trainer.errors import ConfigError
from trainer.files import REPOSITORY
from trainer.job import Job


@pytest.fixture
def world(tmp_path: Path) -> Path:
    """A root with a file, and a secret beside it."""
    (tmp_path / "root" / "sub").mkdir(parents=True)
    (tmp_path / "root" / "sub" / "a.json").write_text("{}")
    (tmp_path / "secret").mkdir()
    (tmp_path / "secret" / "b.json").write_text("{}")
    return tmp_path


@pytest.fixture
def paths(world: Path) -> Paths:
    return Paths({"pics": world / "root"}, confined=True)


def test_inside_a_root(paths: Paths, world: Path) -> None:
    file = world / "root" / "sub" / "a.json"
    assert paths.resolve("pics/sub/a.json") == file
    assert paths.resolve("pics\\sub\\a.json") == file
    assert paths.resolve(str(file)) == file
    assert paths.resolve("pics") == world / "root"
    assert paths.resolve("pics/new/x.json", write=True) == world / "root" / "new" / "x.json"
    assert paths.resolve("pics//etc/passwd") == world / "root" / "etc" / "passwd"


@pytest.mark.parametrize(
    "text",
    [
        "",
        "  ",
        "a\0b",
        "/etc/passwd",
        "pics/../secret/b.json",
        "pics/sub/../../secret/b.json",
        "pics\\..\\secret\\b.json",
        "{world}/secret/b.json",
        "{world}/root/../secret/b.json",
        "{world}/root2",
        "~",
        "~/x",
        "~nobody-is-called-this/x",
        "other/sub",
        "../x",
        "x.json",
        "C:\\Windows\\win.ini",
        "C:/Windows/win.ini",
        "c:relative",
        "\\\\server\\share\\x",
        "//server/share/x",
        "\\\\?\\C:\\x",
        "file:///etc/passwd",
        "pics/sub/a.json:stream",
    ],
)
def test_outside_is_refused(paths: Paths, world: Path, text: str) -> None:
    (world / "root2").mkdir()
    with pytest.raises(ConfigError):
        paths.resolve(text.replace("{world}", str(world)))


def test_links_are_followed_before_they_are_judged(paths: Paths, world: Path) -> None:
    link = world / "root" / "link"
    try:
        link.symlink_to(world / "secret")
        (world / "root" / "ring").symlink_to(world / "root" / "ring")
    except OSError:
        pytest.skip("this system makes no links")
    with pytest.raises(ConfigError, match="outside"):
        paths.resolve("pics/link/b.json")
    with pytest.raises(ConfigError):
        paths.resolve("pics/ring/x", write=True)
    inner = world / "root" / "inner"
    inner.symlink_to(world / "root" / "sub")
    assert paths.resolve("pics/inner/a.json") == world / "root" / "sub" / "a.json"


def test_the_programs_own_files_are_read_only(paths: Paths) -> None:
    preset = REPOSITORY / "presets" / "demo.json"
    assert paths.resolve(str(preset)) == preset
    with pytest.raises(ConfigError, match="outside"):
        paths.resolve(str(preset), write=True)
    with pytest.raises(ConfigError, match="outside"):
        paths.resolve(str(REPOSITORY / "pyproject.toml"))


def test_on_loopback_paths_are_free(world: Path) -> None:
    free = Paths({"pics": world / "root"}, confined=False)
    assert free.resolve(str(world / "secret" / "b.json")) == world / "secret" / "b.json"
    assert free.resolve("x/../y") == (Path.cwd() / "y").resolve()
    assert free.resolve("pics/sub") == world / "root" / "sub"
    with pytest.raises(ConfigError, match="empty"):
        free.resolve(" ")


def job(paths: Paths, world: Path, **values: object) -> Job:
    fields = {
        "pretrained_model_name_or_path": "pics/model.safetensors",
        "train_data_dir": "pics/sub",
        "output_dir": "pics/out",
        "max_resolution": "64,64",
    }
    config = paths.expand(KohyaConfig(**{**fields, **values}))
    return Job.from_config(config, base=world)


def test_a_run_inside_the_roots(paths: Paths, world: Path) -> None:
    made = job(paths, world)
    paths.check(made)
    assert made.output_dir == world / "root" / "out"
    paths.check(job(paths, world, pretrained_model_name_or_path="owner/model"))  # a name on the hub
    paths.check(job(paths, world, train_data_dir=str(REPOSITORY / "assets" / "demo" / "images")))


@pytest.mark.parametrize(
    ("field", "text"),
    [
        ("pretrained_model_name_or_path", "secret/b.json"),  # looks like a hub name, and is a file
        ("pretrained_model_name_or_path", "/etc/passwd"),
        ("pretrained_model_name_or_path", "../model.safetensors"),  # nor is this one
        ("vae", "{world}/secret/b.json"),
        ("train_data_dir", "{world}/secret"),
        ("reg_data_dir", "secret"),
        ("output_dir", "{world}/secret"),
        ("output_dir", "{repository}/assets"),
        ("logging_dir", "../x"),
        ("resume", "{world}/root/../secret"),
        ("network_weights", "\\\\server\\share\\x.safetensors"),
        ("sample_prompts", "{world}/secret/prompts.txt"),
        ("additional_parameters", "--base_weights {world}/secret/b.safetensors"),
        ("additional_parameters", "--log_prefix ../../x"),
        ("additional_parameters", "--output_name ../../x"),
        ("output_name", "../x"),
        ("output_name", "..\\x"),
        ("log_tracker_name", "/tmp/x"),
        ("dataset_config", "pics/outside.toml"),
        ("dataset_config", "pics/outside.json"),
        ("dataset_config", "pics/broken.toml"),
    ],
)
def test_a_run_that_leaves_the_roots_is_refused(paths: Paths, world: Path, field: str, text: str) -> None:
    subset = {"image_dir": str(world / "secret")}
    (world / "root" / "outside.json").write_text(json.dumps({"datasets": [{"subsets": [subset]}]}))
    (world / "root" / "outside.toml").write_text(
        f"[[datasets]]\n[[datasets.subsets]]\nimage_dir = {json.dumps(subset['image_dir'])}\n"
    )
    (world / "root" / "broken.toml").write_text("[[[")
    text = text.replace("{world}", str(world)).replace("{repository}", str(REPOSITORY))
    with pytest.raises(ConfigError):
        paths.check(job(paths, world, **{field: text}))


def test_the_demo_writes_into_a_root(paths: Paths, world: Path) -> None:
    config = KohyaConfig(output_dir="results/demo", output_name="k1ln")
    assert Path(paths.writable(config).output_dir) == world / "root" / "k1ln"
    free = Paths({}, confined=False)
    assert free.writable(config) == config


def test_names_without_roots_say_how_to_get_one() -> None:
    with pytest.raises(ConfigError, match="--root"):
        Paths({}, confined=True).resolve(os.sep + "x")
