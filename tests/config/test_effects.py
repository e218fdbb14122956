"""What the declarations say about each setting's effect is what the trainer's source shows.

A setting that is honoured or adapted must be read somewhere in trainer/ outside the declarations: as
an attribute, or by its name as a text. One without effect must not be read from a configuration;
its name as a text is no reading, since options of sd-scripts are called the same.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator

import pytest

from trainer.config import KohyaConfig, ui_of
from trainer.files import REPOSITORY

TRAINER = REPOSITORY / "trainer"
CONFIG = TRAINER / "config"
RECORDS = {"trainer/metadata.py"}
"""Files that write every setting down, with effect or not."""
CONFIG_NAMES = {"config", "effective", "written"}
"""What variables and attributes that hold a KohyaConfig are called."""


def attributes(tree: ast.AST) -> Iterator[tuple[str, bool]]:
    """Every attribute that is read, and whether it is one of a configuration."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
            owner = node.value
            name = owner.id if isinstance(owner, ast.Name) else getattr(owner, "attr", "")
            yield node.attr, name in CONFIG_NAMES


def texts(tree: ast.AST) -> Iterator[str]:
    """Every text that stands in the source."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.value


def scan() -> tuple[dict[str, set[str]], dict[str, set[str]]]:
    """Files that mention a setting, and files that read it from a configuration."""
    mentioned: dict[str, set[str]] = {}
    read: dict[str, set[str]] = {}
    for path in sorted(TRAINER.rglob("*.py")):
        if CONFIG in path.parents:
            continue
        tree = ast.parse(path.read_text(encoding="utf-8"))
        where = path.relative_to(REPOSITORY).as_posix()
        for name in texts(tree):
            mentioned.setdefault(name, set()).add(where)
        for name, of_config in attributes(tree):
            mentioned.setdefault(name, set()).add(where)
            if of_config and where not in RECORDS:
                read.setdefault(name, set()).add(where)
    return mentioned, read


MENTIONED, READ = scan()


def test_the_scan_tells_a_configuration_from_other_things() -> None:
    tree = ast.parse('x = job.config.epoch\ny = getattr(c, "seed")\nz.config.lr_warmup = 3\na.num_processes')
    assert list(texts(tree)) == ["seed"]
    found = dict(attributes(tree))
    assert found == {"epoch": True, "config": False, "num_processes": False}


@pytest.mark.parametrize("name", [name for name in KohyaConfig.model_fields if ui_of(name).effect != "none"])
def test_setting_with_an_effect_is_read(name: str) -> None:
    known = name in MENTIONED
    assert known, f"{name} is marked {ui_of(name).effect}, but nothing in trainer/ reads it"


@pytest.mark.parametrize("name", [name for name in KohyaConfig.model_fields if ui_of(name).effect == "none"])
def test_setting_without_effect_is_not_read(name: str) -> None:
    readers = sorted(READ.get(name, ()))
    assert not readers, f"{name} is marked as without effect"
