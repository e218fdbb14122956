"""The captions of a folder: what they say, where each text came from, and the way back.

A caption is Kohya's text file beside its picture. What it said before, and who wrote it, stands in
``<folder>/.kiln/captions.json``. A file that was changed by another program is noticed, and its text
counts as a person's.
"""

from __future__ import annotations

import contextlib
import json
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

from trainer.data.folder import list_pictures
from trainer.errors import DatasetError
from trainer.files import atomic_write
from trainer.pictures.edits import FOLDER

__all__ = ["Caption", "Captions", "Change", "Edit", "Source", "Version", "Written"]

FILE = "captions.json"
FORMAT = 1
LARGEST_BYTES = 64 * 1024
"""A caption file above this is no caption: the longest that a text encoder reads is some 2 KiB."""
VERSIONS_KEPT = 40
CHANGES_KEPT = 200

Source = Literal["file", "captioner", "edit", "outside"]
"""Who wrote a text: it was there before, a captioner, a person on the page, another program."""

_locks: dict[Path, threading.RLock] = {}
_locks_lock = threading.Lock()


@dataclass(frozen=True)
class Version:
    """What a caption said at some time."""

    text: str | None
    """None where there was no file."""
    source: Source
    by: str
    """Which captioner, or which edit."""
    time: float
    """Seconds since the epoch."""
    change: str = ""
    """Id of the `Change` that made it."""


@dataclass(frozen=True)
class Change:
    """One step that undo takes back: all captions that were written together."""

    id: str
    by: str
    time: float
    names: tuple[str, ...]
    undone: bool = False


@dataclass(frozen=True)
class Caption:
    """A caption as it stands."""

    name: str
    """Of its file."""
    picture: Path
    text: str
    exists: bool
    problem: str
    """Why the file cannot be read as it is; "" where it can."""
    source: Source
    by: str
    time: float
    versions: int

    @property
    def machine(self) -> bool:
        """Whether a captioner wrote it, and nobody has touched it since."""
        return self.source == "captioner"

    @property
    def now(self) -> str | None:
        """The text; None where there is no file."""
        return self.text if self.exists else None


@dataclass(frozen=True)
class Edit:
    """One caption before and after a change; None is no file."""

    name: str
    before: str | None
    after: str | None


@dataclass(frozen=True)
class Written:
    """What became of a change."""

    done: tuple[str, ...]
    kept: tuple[str, ...]
    """Captions that somebody had changed in the meantime, and that stayed as they were."""
    by: str = ""


@dataclass
class _Record:
    versions: list[Version] = field(default_factory=list)
    at: int = -1
    """Index of the version that holds."""

    @property
    def now(self) -> Version | None:
        return self.versions[self.at] if 0 <= self.at < len(self.versions) else None

    def add(self, version: Version) -> None:
        self.versions = [*self.versions[: self.at + 1], version][-VERSIONS_KEPT:]
        self.at = len(self.versions) - 1


@dataclass
class _History:
    captions: dict[str, _Record] = field(default_factory=dict)
    changes: list[Change] = field(default_factory=list)


class Captions:
    """The captions of one folder; any number of these may look at the same folder.

    Args:
        folder: Where pictures and captions lie.
        extension: Of the caption files, with its dot.
    """

    def __init__(self, folder: Path, extension: str = ".txt") -> None:
        self.folder = folder
        self.extension = extension
        with _locks_lock:
            self._lock = _locks.setdefault(folder.resolve(), threading.RLock())
        self._read: tuple[tuple[int, int], _History] | None = None

    @property
    def file(self) -> Path:
        """Where the history is kept."""
        return self.folder / FOLDER / FILE

    # ---- reading -----------------------------------------------------------------------------------

    def all(self) -> list[Caption]:
        """The caption of each picture, by file name; one for pictures that share a stem.

        Raises:
            DatasetError: The folder cannot be read.
        """
        with self._lock:
            history = self._load()
            found: dict[str, Caption] = {}
            for picture in list_pictures(self.folder):
                name = picture.stem + self.extension
                if name not in found:
                    found[name] = self._one(name, picture, history)
            return list(found.values())

    def get(self, name: str) -> Caption:
        """One caption.

        Raises:
            DatasetError: There is no picture of that stem.
        """
        with self._lock:
            return self._one(name, self._picture(name), self._load())

    def history(self, name: str) -> list[Version]:
        """What a caption has said, oldest first; the last one is what it says now."""
        with self._lock:
            record = self._seen(name, self._load())
            return list(record.versions[: record.at + 1])

    def changes(self) -> tuple[Change | None, Change | None]:
        """What undo and what redo would be about; None where there is nothing."""
        with self._lock:
            changes = self._load().changes
            done = next((change for change in reversed(changes) if not change.undone), None)
            undone = next((change for change in changes if change.undone), None)
            return done, undone

    def _picture(self, name: str) -> Path:
        self._check(name)
        stem = name.removesuffix(self.extension)
        for picture in list_pictures(self.folder):
            if picture.stem == stem:
                return picture
        raise DatasetError(f"there is no picture for the caption {name!r} in {self.folder}: look again")

    def _check(self, name: str) -> None:
        """Names come from a browser: nothing may lead out of the folder."""
        if not name.endswith(self.extension) or Path(name).name != name or "\0" in name or name[:1] == ".":
            raise DatasetError(f"{name!r} is no caption of {self.folder}")

    def _one(self, name: str, picture: Path, history: _History) -> Caption:
        text, problem = self._text(name)
        record = self._seen(name, history, text)
        now = record.now
        assert now is not None
        return Caption(
            name=name,
            picture=picture,
            text=text or "",
            exists=text is not None,
            problem=problem,
            source=now.source,
            by=now.by,
            time=now.time,
            versions=record.at + 1,
        )

    def _text(self, name: str) -> tuple[str | None, str]:
        """The text of a file as far as it can be shown, and what is wrong with it."""
        path = self.folder / name
        try:
            size = path.stat().st_size
            if not path.is_file():
                return None, f"{name} is no file"
            with path.open("rb") as file:
                data = file.read(LARGEST_BYTES + 1)
        except FileNotFoundError:
            return None, ""
        except OSError as error:
            raise DatasetError(f"caption {path} cannot be read: {error.strerror or error}") from error
        problem = ""
        if len(data) > LARGEST_BYTES:
            problem = f"the file is {size:,} bytes: that is no caption. Only its beginning is shown."
            data = data[:2000]
        try:
            text = data.decode("utf-8-sig")
        except UnicodeDecodeError:
            if not problem:
                problem = "the file is not UTF-8, and training could not read it. Saving writes it as UTF-8."
            text = data.decode("cp1252", errors="replace")
        if "\0" in text:
            text = text.replace("\0", "")
            problem = problem or "the file holds zero bytes. Saving takes them out."
        return text.replace("\r\n", "\n").replace("\r", "\n").strip("\n"), problem

    def _seen(self, name: str, history: _History, text: str | None = None) -> _Record:
        """The record of a caption, with the text on disk as its last version. Nothing is written."""
        if text is None:
            text, _ = self._text(name)
        record = history.captions.get(name)
        if record is None or record.now is None:
            when = self._modified(name)
            record = _Record()
            record.add(Version(text, "file", "" if text is None else "there before", when))
            return record
        if record.now.text == text:
            return record
        noticed = _Record(list(record.versions), record.at)
        noticed.add(Version(text, "outside", "changed by another program", self._modified(name)))
        return noticed

    def _modified(self, name: str) -> float:
        try:
            return (self.folder / name).stat().st_mtime
        except OSError:
            return time.time()

    # ---- writing -----------------------------------------------------------------------------------

    def write(self, edits: Sequence[Edit], by: str, source: Source = "edit", change: str = "") -> Written:
        """Write captions as one step that `undo` takes back.

        A caption that no longer says what an edit began with is left as it is.

        Args:
            edits: Before and after of each.
            by: Which captioner or which edit, for the history.
            source: Who writes.
            change: Id to share with other folders or with an earlier part of the same step; drawn if "".

        Raises:
            DatasetError: A name that is no caption here, or a file that cannot be written.
        """
        with self._lock:
            history = self._load()
            change = change or uuid.uuid4().hex[:12]
            now = time.time()
            done: list[str] = []
            kept: list[str] = []
            try:
                for edit in edits:
                    self._check(edit.name)
                    text, _ = self._text(edit.name)
                    after = None if edit.after is None else clean(edit.after)
                    if text != edit.before:
                        kept.append(edit.name)
                        continue
                    if text == after:
                        continue
                    record = self._seen(edit.name, history, text)
                    self._put(edit.name, after)
                    record.add(Version(after, source, by, now, change))
                    history.captions[edit.name] = record
                    done.append(edit.name)
            finally:
                if done:
                    history.changes = _with(history.changes, Change(change, by, now, tuple(done)))
                    self._save(history)
            return Written(tuple(done), tuple(kept), by)

    @contextlib.contextmanager
    def batch(self) -> Iterator[None]:
        """Inside, nobody else writes to these captions."""
        with self._lock:
            yield

    def undo(self) -> Written | None:
        """Take the last change back; None where there is none."""
        return self._step(lambda changes: next((c for c in reversed(changes) if not c.undone), None), -1)

    def redo(self) -> Written | None:
        """Make the change again that was taken back last; None where there is none."""
        return self._step(lambda changes: next((c for c in changes if c.undone), None), +1)

    def _step(self, choose: Callable[[Sequence[Change]], Change | None], by: int) -> Written | None:
        with self._lock:
            history = self._load()
            change = choose(history.changes)
            if change is None:
                return None
            done: list[str] = []
            kept: list[str] = []
            for name in change.names:
                record = history.captions.get(name)
                target = None if record is None else record.at + by
                if record is None or target is None or not 0 <= target < len(record.versions):
                    kept.append(name)
                    continue
                text, _ = self._text(name)
                of_change = record.versions[record.at if by < 0 else target]
                if record.now is None or record.now.text != text or of_change.change != change.id:
                    kept.append(name)
                    continue
                self._put(name, record.versions[target].text)
                record.at = target
                done.append(name)
            flipped = Change(change.id, change.by, change.time, change.names, undone=by < 0)
            history.changes = [flipped if item.id == change.id else item for item in history.changes]
            self._save(history)
            return Written(tuple(done), tuple(kept), change.by)

    def _put(self, name: str, text: str | None) -> None:
        path = self.folder / name
        try:
            if text is None:
                path.unlink(missing_ok=True)
            else:
                atomic_write(path, f"{text}\n")
        except OSError as error:
            raise DatasetError(f"caption {path} cannot be written: {error.strerror or error}") from error

    # ---- the history's file ------------------------------------------------------------------------

    def _load(self) -> _History:
        try:
            stat = self.file.stat()
            stamp = stat.st_mtime_ns, stat.st_size
            if self._read is not None and self._read[0] == stamp:
                return self._read[1]
            data = json.loads(self.file.read_text(encoding="utf-8"))
            history = _History(
                {str(name): _record(item) for name, item in data["captions"].items()},
                [Change(**{**item, "names": tuple(item["names"])}) for item in data["changes"]],
            )
        except FileNotFoundError:
            return _History()
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
            # The captions themselves are safe: only the way back is lost, and the damaged file is kept.
            with contextlib.suppress(OSError):
                self.file.replace(self.file.with_suffix(".damaged.json"))
            return _History()
        self._read = stamp, history
        return history

    def _save(self, history: _History) -> None:
        data = {
            "format": FORMAT,
            "captions": {
                name: {"at": record.at, "versions": [asdict(version) for version in record.versions]}
                for name, record in history.captions.items()
            },
            "changes": [asdict(change) for change in history.changes],
        }
        self._read = None
        try:
            atomic_write(self.file, json.dumps(data, ensure_ascii=False, separators=(",", ":")))
        except OSError as error:
            raise DatasetError(
                f"the captions' history cannot be saved to {self.file} ({error.strerror or error}): make the "
                "folder writable"
            ) from error


def clean(text: str) -> str:
    """A caption as it is written: no zero bytes, plain line ends, nothing blank around it.

    Raises:
        DatasetError: It is too long to be a caption.
    """
    text = text.replace("\0", "").replace("\r\n", "\n").replace("\r", "\n").strip()
    text = text.encode("utf-8", errors="replace").decode("utf-8")  # a browser may send half of a pair
    if len(text.encode()) > LARGEST_BYTES:
        raise DatasetError(
            f"a caption of {len(text):,} letters is too long: the limit is {LARGEST_BYTES:,} bytes"
        )
    return text


def _with(changes: Sequence[Change], change: Change) -> list[Change]:
    """The changes with one more, or with more captions in one that is there; what was undone is gone."""
    kept = [item for item in changes if not item.undone]
    before = next((item for item in kept if item.id == change.id), None)
    if before is not None:
        names = tuple(dict.fromkeys((*before.names, *change.names)))
        kept.remove(before)
        change = Change(change.id, change.by, change.time, names)
    return [*kept, change][-CHANGES_KEPT:]


def _record(data: Mapping[str, Any]) -> _Record:
    versions = [Version(**item) for item in data["versions"]]
    at = data["at"]
    sound = all(
        item.source in get_args(Source) and (item.text is None or isinstance(item.text, str))
        for item in versions
    )
    if not sound or type(at) is not int or not -1 <= at < len(versions):
        raise ValueError("damaged")
    return _Record(versions, at)
