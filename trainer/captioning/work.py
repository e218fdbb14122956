"""Captioning as a piece of work for the queue: pictures in, text files out, with progress and Stop."""

from __future__ import annotations

import random
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field, ValidationError

from trainer.captioning.captioners import CAPTIONERS
from trainer.captioning.captions import Caption, Captions, Edit
from trainer.errors import ConfigError, DatasetError, StopTraining
from trainer.events import Event, LogLine, PhaseStarted, Progress, counted
from trainer.pictures import edits
from trainer.work import Done

__all__ = ["CaptionSettings", "CaptionWork", "caption_extension"]

SEED = 42
"""Of captioners that draw words at random (sd-scripts, make_captions.py)."""
WRITE_S = 1.0
"""Captions are written about so often, those of a batch together."""

Existing = Literal["keep", "machine", "all"]


class CaptionSettings(BaseModel, frozen=True, extra="forbid"):
    """What is to be captioned, how, and what happens to captions that are there."""

    captioner: str
    """File in `trainer.captioning.captioners`."""
    model: str
    """Folder, or name on the model hub."""
    options: dict[str, Any] = {}
    folders: Annotated[tuple[str, ...], Field(min_length=1)]
    """Folders with pictures directly in them."""
    names: dict[str, tuple[str, ...]] | None = None
    """Caption files to write, by folder as in ``folders``; None for all."""
    extension: str = ".txt"
    prefix: Annotated[str, Field(max_length=2000)] = ""
    postfix: Annotated[str, Field(max_length=2000)] = ""
    existing: Existing = "keep"
    """Leave captions as they are; replace those that a captioner wrote; replace all."""
    append: bool = False
    """Put tags that are new behind a caption that is there, instead of replacing it."""
    stamp: str = ""
    """Names the journal's folder."""


def caption_extension(text: str) -> str:
    """The ending of caption files, with its dot; Kohya's page says .txt, .caption and the like.

    Raises:
        ConfigError: It is no ending of a text file.
    """
    ending = text.strip() or ".caption"
    ending = ending if ending.startswith(".") else f".{ending}"
    if not all(letter.isalnum() or letter in "._-" for letter in ending) or len(ending) > 20:
        raise ConfigError(f"caption extension {text!r} is none: write .txt or .caption")
    from trainer.data.images import PICTURE_EXTENSIONS

    if ending.lower() in PICTURE_EXTENSIONS or ending.lower() in (".npz", ".json", ".safetensors"):
        raise ConfigError(f"caption extension {ending} would overwrite other files: write .txt or .caption")
    return ending


@dataclass(frozen=True)
class CaptionWork:
    """One captioning of one or more folders.

    Args:
        settings: What to do.
        base: Folder that relative paths start from.
    """

    settings: CaptionSettings
    base: Path

    @classmethod
    def from_json(cls, text: str, base: Path) -> CaptionWork:
        """The work that `settings_json` described.

        Raises:
            ConfigError: The settings cannot be used.
        """
        try:
            settings = CaptionSettings.model_validate_json(text)
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(map(str, first["loc"])) or "captioning"
            raise ConfigError(f"{where}: {first['msg'][:1].lower()}{first['msg'][1:]}") from error
        work = cls(settings, base)
        caption_extension(settings.extension)
        work.options()
        return work

    @staticmethod
    def settings_json(settings: CaptionSettings) -> str:
        """The settings as they stand in the list of runs, with a stamp for the journal."""
        stamp = settings.stamp or f"{time.strftime('%Y%m%d-%H%M%S')}-{uuid.uuid4().hex[:4]}"
        return settings.model_copy(update={"stamp": stamp}).model_dump_json(exclude_none=True)

    @property
    def folders(self) -> list[Path]:
        """Folders with pictures."""
        return [(self.base / Path(folder).expanduser()).resolve() for folder in self.settings.folders]

    @property
    def name(self) -> str:
        """Shown in the list of runs."""
        return f"Captions by {CAPTIONERS.get(self.settings.captioner).title}: {self.folders[0].name}"

    @property
    def journal(self) -> Path:
        """In the first folder's own ``.kiln``."""
        return self.folders[0] / edits.FOLDER / "logs" / f"captions-{self.settings.stamp}" / "journal.jsonl"

    @property
    def pictures(self) -> Path | None:
        """It makes no pictures."""
        return None

    def options(self) -> Any:
        """The captioner's own settings, checked.

        Raises:
            ConfigError: One of them cannot be used.
        """
        plugin = CAPTIONERS.get(self.settings.captioner)
        try:
            return plugin.options_class(**self.settings.options)
        except ValidationError as error:
            first = error.errors()[0]
            name = str(first["loc"][0]) if first["loc"] else ""
            known = plugin.options_class.model_fields.get(name)
            title = known.title if known is not None and known.title else name
            raise ConfigError(
                f"{plugin.title}, {title}: {first['msg'][:1].lower()}{first['msg'][1:]}"
            ) from error

    def wanted(self) -> list[tuple[Captions, list[Caption]]]:
        """The captions that will be written, by folder."""
        found = []
        for text, folder in zip(self.settings.folders, self.folders, strict=True):
            captions = Captions(folder, caption_extension(self.settings.extension))
            chosen = captions.all()
            if self.settings.names is not None:
                names = set(self.settings.names.get(text, ()))
                chosen = [caption for caption in chosen if caption.name in names]
            excluded = edits.load(folder)
            chosen = [item for item in chosen if not excluded.of(item.picture.name).excluded]
            if not self.settings.append:
                chosen = [item for item in chosen if _may_replace(item, self.settings.existing)]
            found.append((captions, chosen))
        return found

    def run(self, emit: Callable[[Event], None], stopped: Callable[[], bool]) -> Done:
        """Caption; see `trainer.work.Work.run`."""
        import torch

        from trainer import devices
        from trainer.captioning.captioners._base import find

        def say(message: str) -> None:
            emit(LogLine(message=message))

        def warn(message: str) -> None:
            emit(LogLine(message=message, level="warning"))

        settings = self.settings
        plugin, options = CAPTIONERS.get(settings.captioner), self.options()
        emit(PhaseStarted(phase="read pictures"))
        jobs = self.wanted()
        total = sum(len(chosen) for _, chosen in jobs)
        if total == 0:
            raise DatasetError(
                "there is nothing to caption: every picture has a caption that is to be kept "
                "(If there is a caption)"
            )
        emit(PhaseStarted(phase="load captioner"))
        device = devices.choose()
        dtype = devices.inference_dtype(device)
        say(f"device: {devices.describe(device)}; precision: {str(dtype).removeprefix('torch.')}")
        model = find(settings.model, self.base, plugin, say)
        torch.manual_seed(SEED)
        random.seed(SEED)
        captioner = plugin.load(model, options, device, dtype, say)
        emit(PhaseStarted(phase="caption", total=total, unit="pictures"))
        change, by = uuid.uuid4().hex[:12], f"{plugin.title} ({Path(settings.model).name})"
        tally = _Tally()
        began = written_s = time.monotonic()

        def write(captions: Captions, ready: list[Edit]) -> None:
            written = captions.write(ready, by, "captioner", change)
            for name in written.kept:
                warn(f"{name} was changed while the captioner looked at its picture, and stays as it is")
            for edit in ready:
                if edit.name not in written.kept:
                    say(f"{edit.name}: {edit.after}")
            tally.done += len(ready) - len(written.kept)
            tally.kept += len(written.kept)
            ready.clear()
            emit(Progress(phase="caption", done=tally.done + tally.kept + tally.failed, total=total))

        try:
            for captions, chosen in jobs:
                ready: list[Edit] = []
                try:
                    for part in _parts(chosen, captioner.batch_size):
                        if stopped():
                            raise StopTraining
                        read = [
                            (item, picture) for item in part if (picture := _read(item, warn)) is not None
                        ]
                        tally.failed += len(part) - len(read)
                        texts = captioner.describe([picture for _, picture in read]) if read else []
                        ready += [
                            Edit(item.name, item.now, self._text(text, item))
                            for (item, _), text in zip(read, texts, strict=True)
                        ]
                        if time.monotonic() - written_s > WRITE_S:
                            write(captions, ready)
                            written_s = time.monotonic()
                finally:
                    write(captions, ready)
        except StopTraining:
            say(f"stopped: {tally.done} of {total} captions are written")
            raise
        finally:
            del captioner
            devices.free()
        elapsed_s = time.monotonic() - began
        parts = [f"{counted(tally.done, 'caption')} written in {elapsed_s:.1f} s"]
        parts += [f"{tally.kept} kept that were edited meanwhile"] if tally.kept else []
        parts += [f"{counted(tally.failed)} could not be read"] if tally.failed else []
        return Done("; ".join(parts), self.folders[0])

    def _text(self, text: str, caption: Caption) -> str:
        """What is written for a captioner's text: prefix and postfix as Kohya puts them."""
        settings = self.settings
        if settings.append and caption.exists and caption.text.strip():
            before = [tag.strip() for tag in caption.text.split("\n")[0].split(",") if tag.strip()]
            new = [tag.strip() for tag in text.split(",") if tag.strip() and tag.strip() not in before]
            return ", ".join([*before, *new])
        # kohya_ss, common_gui.py:add_pre_postfix
        parts = (settings.prefix.strip(), text.strip(), settings.postfix.strip())
        return " ".join(part for part in parts if part)


@dataclass
class _Tally:
    done: int = 0
    kept: int = 0
    failed: int = 0


def _may_replace(caption: Caption, existing: Existing) -> bool:
    if not caption.exists or (not caption.text.strip() and not caption.problem):
        return True
    return existing == "all" or (existing == "machine" and caption.machine)


def _parts(items: Sequence[Caption], size: int) -> Iterator[Sequence[Caption]]:
    for start in range(0, len(items), size):
        yield items[start : start + size]


def _read(caption: Caption, warn: Callable[[str], None]) -> Any:
    """The picture as training sees it, or None where it cannot be read."""
    from PIL import Image

    from trainer.data.images import read_rgba

    try:
        edit = edits.load(caption.picture.parent).of(caption.picture.name)
        return Image.fromarray(edit.apply(read_rgba(caption.picture)))
    except DatasetError as error:
        warn(f"left out: {error}")
        return None
