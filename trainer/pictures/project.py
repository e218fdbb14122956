"""The folders of a project: a rare token from a name, Kohya's layout, and the settings that go with it.

The layout is the guide's: ``<token>/images/<repeats>_<token> <class>/`` for the pictures,
``<token>/results_current/`` for what training writes, ``<token>/txt2img-images/`` for pictures made with
the LoRA. Kohya's own "Dataset Preparation" (kohya_ss, dreambooth_folder_creation_gui.py) gives img, reg,
log and model instead; both fill the same fields.
"""

from __future__ import annotations

import shutil
import unicodedata
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trainer.data.folder import kohya_folder, list_pictures
from trainer.errors import ConfigError, DatasetError
from trainer.pictures.importing import plain_name

__all__ = [
    "IMAGES",
    "SEEN_AN_EPOCH",
    "Token",
    "check_token",
    "fields_of",
    "make",
    "prepare",
    "propose",
    "repeats_for",
    "set_repeats",
]

SEEN_AN_EPOCH = 400
"""Pictures times repeats: the guide's distance between two epochs."""
IMAGES, RESULTS, MADE = "images", "results_current", "txt2img-images"

DIGITS: Mapping[str, str] = {"a": "4", "e": "3", "i": "1", "o": "0", "s": "5"}
MORE_DIGITS: Mapping[str, str] = {**DIGITS, "t": "7", "b": "8", "g": "9", "z": "2", "l": "1"}
TOKEN_LENGTH = 32

Pieces = Callable[[str], list[str]]
"""Splits a word as a family's tokenizer does."""


@dataclass(frozen=True)
class Token:
    """A proposal."""

    text: str
    pieces: tuple[str, ...] = ()
    """What the tokenizer makes of it; empty where none was asked."""

    @property
    def is_rare(self) -> bool | None:
        """Whether no single piece of the vocabulary is this word; None where no tokenizer was asked."""
        return len(self.pieces) > 1 if self.pieces else None

    def words(self) -> str:
        """Whether it is good, in a sentence."""
        if self.is_rare is None:
            return f"{self.text}: no tokenizer of the base model is at hand to check how rare it is."
        shown = " ".join(self.pieces)
        if self.is_rare:
            return f"{self.text} is rare: the model knows no such word and reads {len(self.pieces)} pieces ({shown})."
        return (
            f"{self.text} is a word of its own in the model, which means something to it already: "
            "put digits in the place of some letters"
        )


def _letters(name: str) -> str:
    text = unicodedata.normalize("NFKD", name.replace("đ", "d").replace("ß", "ss")).casefold()
    return "".join(letter for letter in text if letter.isascii() and letter.isalnum())[:TOKEN_LENGTH]


def check_token(text: str, pieces: Pieces | None) -> Token:
    """How rare a token is that a person typed."""
    found = pieces(text) if pieces and text else []
    # How CLIP marks the end of a word, and T5 its beginning.
    plain = (piece.replace("</w>", "").replace("▁", "") for piece in found)
    return Token(text, tuple(piece for piece in plain if piece))


def propose(name: str, pieces: Pieces | None = None) -> Token:
    """A token from a name: letters become digits, more of them until the tokenizer knows no such word.

    Args:
        name: Of the person, character or thing.
        pieces: The base model's tokenizer, where one is at hand.

    Raises:
        ConfigError: No letter or digit is left of the name.
    """
    letters = _letters(name)
    if not letters:
        raise ConfigError(f"no token can be made of {name!r}: use letters from A to Z or digits")
    tries = ["".join(table.get(letter, letter) for letter in letters) for table in (DIGITS, MORE_DIGITS)]
    # A name without such letters, or one that is still a word, gets digits of its own.
    tries += [f"{tries[-1]}{number}" for number in (7, 47, 547)]
    found = [check_token(text, pieces) for text in tries]
    usable = [token for token in found if token.text != letters] or found
    return next((token for token in usable if token.is_rare is not False), usable[-1])


def repeats_for(pictures: int) -> int:
    """Kohya's repeats for the guide's 400 pictures an epoch."""
    return max(1, round(SEEN_AN_EPOCH / pictures)) if pictures > 0 else 1


def _named(text: str, what: str) -> str:
    text = " ".join(text.split())
    if not text or plain_name(text) != text or text.startswith("."):
        raise ConfigError(f"{what} {text!r} cannot be the name of a folder: use letters, digits, - and _")
    return text


def make(parent: Path, token: str, class_word: str, repeats: int) -> Path:
    """Make the project's folders; those that are there stay.

    Args:
        parent: Where the project's folder goes.
        token: The rare word.
        class_word: What it is: person, woman, dog ...; may be empty.
        repeats: Of its pictures.

    Returns:
        The folder for the pictures.

    Raises:
        ConfigError: A name that no folder can have.
        DatasetError: The folders cannot be made.
    """
    token = _named(token, "the token")
    name = f"{token} {_named(class_word, 'the class')}" if class_word.strip() else token
    if not 1 <= repeats <= 10_000:
        raise ConfigError(f"{repeats} repeats cannot be used: give a number from 1 to 10000")
    project = parent / token
    pictures = project / IMAGES / f"{repeats}_{name}"
    try:
        existing = [
            path for path in _folders(project / IMAGES) if (kohya_folder(path.name) or (0, ""))[1] == name
        ]
        if existing and existing[0] != pictures:
            existing[0].rename(pictures)  # the same project with other repeats
        for path in (pictures, project / RESULTS, project / MADE):
            path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DatasetError(
            f"the folder {project} cannot be made ({error.strerror or error}): choose another place"
        ) from error
    return pictures


def _folders(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.is_dir()) if folder.is_dir() else []


def set_repeats(folder: Path, repeats: int) -> Path:
    """Rename a folder such as ``10_sks cat`` for other repeats; its new path.

    Raises:
        ConfigError: The number cannot be used.
        DatasetError: It is no such folder, or cannot be renamed.
    """
    named = kohya_folder(folder.name)
    if named is None or "_" not in folder.name:
        raise DatasetError(
            f"{folder.name} is no folder of Kohya's such as 10_sks cat: it has no repeats to change"
        )
    if not 1 <= repeats <= 10_000:
        raise ConfigError(f"{repeats} repeats cannot be used: give a number from 1 to 10000")
    renamed = folder.with_name(f"{repeats}_{named[1]}")
    if renamed == folder:
        return folder
    if renamed.exists():
        raise DatasetError(f"{renamed} is there already: move its pictures first")
    try:
        return folder.rename(renamed)
    except OSError as error:
        raise DatasetError(
            f"{folder} cannot be renamed ({error.strerror or error}): close programs that use it"
        ) from error


def fields_of(
    project: Path, token: str, class_word: str, *, size: tuple[int, int] = (512, 512), reg: Path | None = None
) -> dict[str, Any]:
    """The settings that a project of `make` fills in.

    Args:
        project: Its folder, ``<parent>/<token>``.
        token: The rare word.
        class_word: What it is.
        size: (width, height) of the sample pictures.
        reg: Folder of class pictures.
    """
    subject = " ".join(f"{token} {class_word}".split())
    ending = f"--w {size[0]} --h {size[1]}"
    prompts = [
        f"{subject}, close-up, plain background {ending} --d 1",
        f"{subject} in a park, afternoon light {ending} --d 2",
        f"{class_word.strip() or 'portrait'} {ending} --d 3",
    ]
    return {
        "train_data_dir": str(project / IMAGES),
        "reg_data_dir": str(reg) if reg else "",
        "output_dir": str(project / RESULTS),
        "logging_dir": str(project / RESULTS / "logs"),
        "output_name": token,
        "caption_extension": ".txt",
        "sample_prompts": "\n".join(prompts),
    }


def prepare(
    destination: Path,
    pictures: Path,
    instance: str,
    class_word: str,
    repeats: int,
    reg: Path | None = None,
    reg_repeats: int = 1,
    advance: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """Kohya's "Dataset Preparation": copies into img, reg, log and model of a destination folder.

    An existing target folder is replaced once the copy is complete.

    Args:
        destination: Made where it is not there.
        pictures: Folder with the training pictures and their captions.
        instance: Instance prompt: the token.
        class_word: Class prompt.
        repeats: Of the training pictures.
        reg: Folder with class pictures.
        reg_repeats: Of those.
        advance: Called with files copied and in all.

    Returns:
        The fields that Kohya's "Copy info to respective fields" fills.

    Raises:
        ConfigError: A field is missing or cannot be used.
        DatasetError: No pictures, folders inside each other, or a copy that fails.
    """
    instance, class_word = _named(instance, "the instance prompt"), _named(class_word, "the class prompt")
    work = [(pictures, destination / "img" / f"{repeats}_{instance} {class_word}", repeats)]
    if reg is not None:
        work.append((reg, destination / "reg" / f"{reg_repeats}_{class_word}", reg_repeats))
    total = 0
    for source, target, count in work:
        if not 1 <= count <= 10_000:
            raise ConfigError(f"{count} repeats cannot be used: give a number from 1 to 10000")
        if not source.is_dir() or not list_pictures(source):
            raise DatasetError(f"there are no pictures in {source}: choose the folder that they are in")
        one, other = source.resolve(), target.resolve()
        if one == other or one.is_relative_to(other) or other.is_relative_to(one):
            raise DatasetError(
                f"{source} and the destination {target} lie inside each other: choose another destination"
            )
        total += sum(path.is_file() for path in source.iterdir())
    done = 0
    for source, target, _ in work:
        staging = target.with_name(f".{target.name}.{uuid.uuid4().hex[:8]}")
        try:
            staging.mkdir(parents=True)
            for path in sorted(source.iterdir()):
                if path.is_file() and not path.name.startswith("."):
                    shutil.copy2(path, staging / path.name)
                    done += 1
                    if advance is not None:
                        advance(done, total)
            if target.exists():
                old = target.with_name(f".{target.name}.old-{uuid.uuid4().hex[:8]}")
                target.rename(old)
                staging.rename(target)
                shutil.rmtree(old)
            else:
                staging.rename(target)
        except OSError as error:
            raise DatasetError(
                f"{source} cannot be copied to {target} ({error.strerror or error}): free some space, or choose "
                "another destination"
            ) from error
        finally:
            shutil.rmtree(staging, ignore_errors=True)
    for name in ("log", "model"):
        (destination / name).mkdir(exist_ok=True)
    return {
        "train_data_dir": str(destination / "img"),
        "reg_data_dir": str(destination / "reg") if reg is not None else "",
        "output_dir": str(destination / "model"),
        "logging_dir": str(destination / "log"),
    }
