"""Pictures brought into a folder from files, folders and ZIP archives, each checked before it is kept.

Whatever comes in is a stranger's: names are made harmless, links and paths that lead elsewhere are
refused, archives may not unpack to more than pictures can, and every picture is decoded once. What is
refused is named with the reason; the rest comes in.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import stat
import unicodedata
import uuid
import zipfile
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import IO

from trainer.data.folder import list_pictures
from trainer.data.images import PICTURE_EXTENSIONS, inspect, read_rgb, read_rgba
from trainer.errors import DatasetError, StopTraining
from trainer.events import counted
from trainer.files import atomic_path
from trainer.pictures.edits import FOLDER

__all__ = ["Brought", "bring_in", "plain_name"]

CAPTIONS = frozenset({".txt", ".caption", ".cap", ".txt2"})
MOST_FILES = 20_000
LARGEST_FILE_BYTES = 512 * 2**20
LARGEST_CAPTION_BYTES = 2**20
LARGEST_TOTAL_BYTES = 32 * 2**30
MOST_RATIO = 100
"""Pictures are compressed already; an archive that unpacks to a hundred times its size is no album."""
FREE_BYTES = 2**30
"""Disk that is left free."""
CHUNK_BYTES = 1 << 20

JUNK = frozenset({"thumbs.db", "desktop.ini", "__macosx", "ehthumbs.db"})
RESERVED = frozenset(
    {"con", "prn", "aux", "nul"} | {f"{name}{digit}" for name in ("com", "lpt") for digit in range(1, 10)}
)
"""Names that Windows keeps for devices, with any ending."""

Advance = Callable[[int, int], None]


@dataclass
class Brought:
    """What came of it."""

    pictures: list[Path] = field(default_factory=list)
    captions: int = 0
    already: int = 0
    """Pictures whose content lies in the folder already."""
    refused: list[tuple[str, str]] = field(default_factory=list)
    """Name and reason."""

    def words(self) -> str:
        """One line for a person."""
        parts = [f"{counted(len(self.pictures))} brought in"]
        parts += [f"{self.captions} with captions"] if self.captions else []
        parts += [f"{self.already} there already"] if self.already else []
        parts += [f"{len(self.refused)} refused"] if self.refused else []
        return ", ".join(parts)


@dataclass(frozen=True)
class _Item:
    """One file that is offered."""

    name: str
    shown: str
    """As a person knows it: the path inside the archive or folder."""
    group: tuple[str, str]
    """Where it lay and its stem: a caption belongs to the picture with the same."""
    size_bytes: int
    open: Callable[[], IO[bytes]]


def plain_name(name: str) -> str:
    """A file name that every system takes, or "" where nothing is left of it."""
    text = unicodedata.normalize("NFC", name.replace("\\", "/").rsplit("/", 1)[-1])
    text = "".join("_" if unicodedata.category(letter)[0] == "C" else letter for letter in text)
    text = re.sub(r'[<>:"|?*]', "_", text).strip(" .")
    stem, dot, ending = text.rpartition(".")
    if not dot:
        stem, ending = text, ""
    stem = stem.strip(" .")[:100]
    if stem.split(".")[0].lower() in RESERVED:
        stem = f"_{stem}"
    return f"{stem}{dot}{ending[:10]}" if stem else ""


def bring_in(
    sources: Iterable[Path | tuple[Path, str]],
    target: Path,
    *,
    advance: Advance | None = None,
    stop: Callable[[], bool] = lambda: False,
) -> Brought:
    """Copy pictures and their captions into a folder.

    Args:
        sources: Files, folders (with what is in them) and ZIP archives; a file that has lost its place, as
            uploaded ones have, with the path that it had.
        target: Made where it is not there. Its own files are never replaced.
        advance: Called with files done and in all.
        stop: Asked between files; what came in so far stays.

    Raises:
        DatasetError: The folder cannot be written, or the disk is nearly full.
        StopTraining: ``stop`` said so.
    """
    brought = Brought()
    offered = [(one, one.name) if isinstance(one, Path) else one for one in sources]
    items = [item for source, shown in offered for item in _items(source, shown, brought)]
    if len(items) > MOST_FILES:
        raise DatasetError(f"{len(items):,} files are offered: bring in {MOST_FILES:,} at most at a time")
    staging = target / FOLDER / f"incoming-{uuid.uuid4().hex[:8]}"
    try:
        staging.mkdir(parents=True)
    except OSError as error:
        raise DatasetError(
            f"the folder {target} cannot be written ({error.strerror or error}): choose another"
        ) from error
    taker = _Taker(target, staging, brought)
    try:
        # Captions come last: they take the names that their pictures were given.
        items.sort(key=lambda item: PurePosixPath(item.name).suffix.lower() in CAPTIONS)
        for index, item in enumerate(items):
            if stop():
                raise StopTraining
            taker.take(item)
            if advance is not None:
                advance(index + 1, len(items))
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return brought


def _items(source: Path, shown: str, brought: Brought) -> Iterator[_Item]:
    if source.is_dir():
        yield from _in_folder(source, brought)
    elif source.is_file() and zipfile.is_zipfile(source):
        yield from _in_archive(source, brought)
    elif _is_junk(shown):
        return
    elif source.is_file():
        place = PurePosixPath(shown.replace("\\", "/"))
        group = (str(place.parent), place.stem.lower())
        yield _Item(place.name, shown, group, source.stat().st_size, _opener(source))
    else:
        brought.refused.append((shown, "it is no file: choose another"))


def _is_junk(name: str) -> bool:
    parts = name.lower().split("/")
    return any(part in JUNK or part.startswith(".") for part in parts)


def _in_folder(folder: Path, brought: Brought) -> Iterator[_Item]:
    root = folder.resolve()
    for above, folders, names in os.walk(root):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(names):
            path = Path(above) / name
            shown = path.relative_to(root).as_posix()
            if _is_junk(shown):
                continue
            if not path.resolve().is_relative_to(root):
                brought.refused.append((shown, "it is a link that leads out of the folder"))
            elif path.is_file():
                yield _Item(name, shown, (above, path.stem.lower()), path.stat().st_size, _opener(path))


def _opener(path: Path) -> Callable[[], IO[bytes]]:
    return lambda: path.open("rb")


def _in_archive(path: Path, brought: Brought) -> Iterator[_Item]:
    try:
        with zipfile.ZipFile(path) as archive:
            members = archive.infolist()
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError) as error:
        brought.refused.append((path.name, f"the ZIP is damaged ({error}): make it again"))
        return
    if len(members) > MOST_FILES:
        brought.refused.append(
            (path.name, f"the ZIP holds {len(members):,} files, {MOST_FILES:,} at most are read")
        )
        return
    total = sum(member.file_size for member in members)
    if total > MOST_RATIO * path.stat().st_size + LARGEST_CAPTION_BYTES or total > LARGEST_TOTAL_BYTES:
        brought.refused.append(
            (
                path.name,
                f"the ZIP would unpack to {total / 2**20:,.0f} MiB from {path.stat().st_size / 2**20:,.1f} MiB, "
                "which no album of pictures does: unpack it yourself if you trust it",
            )
        )
        return
    for member in members:
        name = member.filename.replace("\\", "/")
        if member.is_dir() or _is_junk(name.replace("../", "")):
            continue
        parts = name.split("/")
        if ".." in parts or name.startswith("/") or re.match(r"[A-Za-z]:", name):
            reason = "its name leads out of the ZIP"
        elif stat.S_ISLNK(member.external_attr >> 16):
            reason = "it is a link"
        elif member.flag_bits & 1:
            reason = "it is encrypted: make a ZIP without a password"
        elif name.lower().endswith(".zip"):
            reason = "it is a ZIP inside a ZIP: unpack it first"
        else:
            group = (f"{path.name}:{PurePosixPath(name).parent}", PurePosixPath(name).stem.lower())
            yield _Item(parts[-1], name, group, member.file_size, _member(path, member))
            continue
        brought.refused.append((name, reason))


def _member(path: Path, member: zipfile.ZipInfo) -> Callable[[], IO[bytes]]:
    def opened() -> IO[bytes]:
        with zipfile.ZipFile(path) as archive:  # an open member keeps the file open by itself
            return archive.open(member)

    return opened


class _Taker:
    """Takes one file after the other into the folder."""

    def __init__(self, target: Path, staging: Path, brought: Brought) -> None:
        self._target, self._staging, self._brought = target, staging, brought
        self._stems: dict[tuple[str, str], str] = {}
        """Under which stem the picture of a group was kept."""
        self._taken = {path.name.lower() for path in target.iterdir()}
        self._by_size: dict[int, list[Path]] = defaultdict(list)
        for path in list_pictures(target):
            self._by_size[path.stat().st_size].append(path)
        self._left_bytes = shutil.disk_usage(target).free - FREE_BYTES

    def take(self, item: _Item) -> None:
        """Bring one in, or note why not."""
        name = plain_name(item.name)
        if not name:
            self._refuse(item, "nothing is left of its name")
            return
        is_caption = Path(name).suffix.lower() in CAPTIONS
        if is_caption and item.group not in self._stems:
            self._refuse(item, "there is no picture of its name beside it")
            return
        if is_caption and item.size_bytes > LARGEST_CAPTION_BYTES:
            self._refuse(item, "it is too large for a caption")
            return
        if item.size_bytes > LARGEST_FILE_BYTES:
            self._refuse(
                item,
                f"it has {item.size_bytes / 2**20:,.0f} MiB, and {LARGEST_FILE_BYTES >> 20} at most are read",
            )
            return
        if item.size_bytes > self._left_bytes:
            raise DatasetError(
                f"the disk of {self._target} is nearly full: free some space, then bring in the rest"
            )
        staged = self._staging / (uuid.uuid4().hex[:12] + Path(name).suffix.lower())
        try:
            digest = _copy(item, staged)
        except DatasetError as error:
            self._refuse(item, str(error))
            return
        self._left_bytes -= item.size_bytes
        try:
            if is_caption:
                self._take_caption(item, staged, Path(name).suffix.lower())
            else:
                self._take_picture(item, staged, name, digest)
        finally:
            staged.unlink(missing_ok=True)

    def _refuse(self, item: _Item, reason: str) -> None:
        self._brought.refused.append((item.shown, reason))

    def _take_caption(self, item: _Item, staged: Path, ending: str) -> None:
        content = staged.read_bytes()
        try:
            content.decode("utf-8-sig")
        except UnicodeDecodeError:
            self._refuse(item, "it is no UTF-8 text: save it as UTF-8")
            return
        path = self._target / f"{self._stems[item.group]}{ending}"
        if path.exists():
            if path.read_bytes() != content:
                self._refuse(item, "the picture there has a caption already, which stays")
            return
        os.replace(staged, path)
        self._brought.captions += 1

    def _take_picture(self, item: _Item, staged: Path, name: str, digest: str) -> None:
        try:
            look = inspect(staged)
        except DatasetError as error:
            self._refuse(item, str(error).partition("cannot be read: ")[2] or str(error))
            return
        ending = Path(name).suffix.lower()
        if look.format in ("GIF", "TIFF"):  # the trainer would pass them over by their endings
            pixels = read_rgba(staged) if look.transparent else read_rgb(staged)
            from PIL import Image

            with atomic_path(staged) as temporary:
                Image.fromarray(pixels).save(temporary, "PNG")
            ending, digest = ".png", _digest(staged)
        elif ending not in PICTURE_EXTENSIONS:
            ending = {"JPEG": ".jpg", "MPO": ".jpg"}.get(look.format, f".{look.format.lower()}")
        for path in self._by_size[staged.stat().st_size]:
            if _digest(path) == digest:
                self._stems[item.group] = path.stem
                self._brought.already += 1
                return
        stem = Path(name).stem if Path(name).suffix else name
        kept, count = stem, 1
        # A stem of its own: pictures that share one would share a caption, too.
        while any(other.rpartition(".")[0] == kept.lower() for other in self._taken):
            count += 1
            kept = f"{stem}-{count}"
        path = self._target / f"{kept}{ending}"
        os.replace(staged, path)
        path.chmod(0o644)
        self._taken.add(path.name.lower())
        self._by_size[path.stat().st_size].append(path)
        self._stems[item.group] = kept
        self._brought.pictures.append(path)


def _copy(item: _Item, path: Path) -> str:
    """Copy an offered file, no further than the limit; its SHA-256. Raises DatasetError."""
    digest, count = hashlib.sha256(), 0
    try:
        with item.open() as source, path.open("wb") as target:
            while chunk := source.read(CHUNK_BYTES):
                count += len(chunk)
                if count > LARGEST_FILE_BYTES:
                    raise DatasetError("it is larger than it says: it is left out")
                digest.update(chunk)
                target.write(chunk)
    except (zipfile.BadZipFile, RuntimeError, NotImplementedError, EOFError, OSError) as error:
        raise DatasetError(f"it cannot be copied ({error}): make or choose it again") from error
    return digest.hexdigest()


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
