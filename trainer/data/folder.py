"""From folders of pictures and captions to a `Dataset`: subsets, repeats, captions, buckets, findings.

Layouts: Kohya's (`10_token class` folders inside train_data_dir and reg_data_dir), one plain folder of
pictures, and a dataset_config file. Sources of the rules: sd-scripts, config_util.py and
train_util.py:DreamBoothDataset. Each departure from them is named where it happens.
"""

from __future__ import annotations

import hashlib
import os
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

from trainer.data.buckets import BucketRules, aspect_error
from trainer.data.dataset_config import Source, read_dataset_config
from trainer.data.images import PICTURE_EXTENSIONS, Look, inspect
from trainer.data.types import Dataset, DatasetFinding, Fit, Picture, Size, Subset
from trainer.errors import ConfigError, DatasetError
from trainer.events import counted
from trainer.job import Job
from trainer.pictures import edits

__all__ = ["MASKS", "kohya_folder", "list_pictures", "mask_file", "scan", "subset_from_job", "subsets"]

OTHER_PICTURES = frozenset(
    {".gif", ".tif", ".tiff", ".heic", ".heif", ".svg", ".jxl", ".psd", ".jfif", ".jp2"}
)
"""Endings that look like pictures to a person and that sd-scripts passes over."""

CAPTION_ENDINGS = (".txt", ".caption", ".cap")

MASKS = "masks"
"""Folder in ``.kiln`` with the masks that were drawn on the page."""

SHOWN = 5
"""How many files a message names before it only counts (as sd-scripts)."""

HELD_FROM, HELD_SHARE, HELD_MOST = 16, 8, 8
"""hold_out takes one training picture of so many (`HELD_SHARE`), at most `HELD_MOST`, from data sets of so many on."""

Advance = Callable[[int, int], None]
"""Called with pictures read so far and pictures in all."""


def kohya_folder(name: str) -> tuple[int, str] | None:
    """Repeats and class tokens of a folder name such as "10_sks cat"; None where it is no such name."""
    first, _, rest = name.partition("_")
    try:
        return int(first), rest
    except ValueError:
        return None


def list_pictures(folder: Path) -> list[Path]:
    """Pictures directly in ``folder``, sorted by path; endings in any mix of case.

    (sd-scripts finds only all-lower and all-upper case endings on a case-sensitive disk.)

    Raises:
        DatasetError: The folder cannot be read.
    """
    return [path for path in _entries(folder) if path.suffix.lower() in PICTURE_EXTENSIONS and path.is_file()]


def _entries(folder: Path) -> list[Path]:
    try:
        with os.scandir(folder) as entries:
            # Files that begin with a dot belong to the system (._photo.jpg on a Mac's disk).
            return sorted(folder / entry.name for entry in entries if not entry.name.startswith("."))
    except OSError as error:
        raise DatasetError(f"{folder} cannot be read: {error.strerror or error}") from error


def subset_from_job(
    job: Job, folder: Path, *, repeats: int, class_tokens: str | None, is_reg: bool = False
) -> Subset:
    """A subset with the treatment that the job's fields ask for."""
    config, engine = job.config, job.engine
    face_range = _face_range(engine.face_crop_aug_range)
    # A departure: sd-scripts reads masks from a dataset_config only.
    drawn = folder / edits.FOLDER / MASKS
    has_drawn = config.masked_loss and face_range is None and drawn.is_dir()
    return Subset(
        folder=folder,
        repeats=repeats,
        class_tokens=class_tokens,
        is_reg=is_reg,
        caption_extension=_extension(config.caption_extension),
        caption_prefix=engine.caption_prefix,
        caption_suffix=engine.caption_suffix,
        caption_separator=engine.caption_separator or ",",
        secondary_separator=engine.secondary_separator,
        shuffle_caption=config.shuffle_caption,
        keep_tokens=config.keep_tokens,
        keep_tokens_separator=engine.keep_tokens_separator,
        enable_wildcard=engine.enable_wildcard,
        caption_dropout_rate=config.caption_dropout_rate,
        caption_dropout_every_n_epochs=config.caption_dropout_every_n_epochs,
        caption_tag_dropout_rate=engine.caption_tag_dropout_rate,
        token_warmup_min=engine.token_warmup_min,
        token_warmup_step=engine.token_warmup_step,
        flip_aug=config.flip_aug,
        color_aug=config.color_aug,
        random_crop=config.random_crop,
        alpha_mask=engine.alpha_mask,
        face_crop_aug_range=face_range,
        mask_folder=drawn if has_drawn else None,
        masks_optional=has_drawn,
        resize_interpolation=engine.resize_interpolation,
    )


def _extension(text: str) -> str:
    # Kohya's page does not send an empty one, so its engine's own default holds.
    text = text.strip() or ".caption"
    return text if text.startswith(".") else f".{text}"


def _face_range(text: str) -> tuple[float, float] | None:
    if not text.strip():
        return None
    try:
        low, high = (float(part) for part in text.replace("[", "").replace("]", "").split(","))
    except ValueError as error:
        raise ConfigError(f"face_crop_aug_range is {text!r}: write two numbers, e.g. 2.0,4.0") from error
    if not 0 < low <= high:
        raise ConfigError(
            f"face_crop_aug_range is {text!r}: the first must be above 0 and not the larger one"
        )
    return low, high


@dataclass
class _Notes:
    """Findings, gathered while reading."""

    findings: list[DatasetFinding] = field(default_factory=list)

    def add(self, level: Literal["info", "warning", "error"], message: str, path: Path | None = None) -> None:
        self.findings.append(DatasetFinding(level, message, path))


def _some(paths: Sequence[Path], *, full: bool = False) -> str:
    names = ", ".join(str(path) if full else path.name for path in paths[:SHOWN])
    return names if len(paths) <= SHOWN else f"{names} and {len(paths) - SHOWN} more"


def _folder(job: Job, field_name: str, text: str) -> Path:
    folder = job.path(text.strip())
    if not folder.exists():
        raise DatasetError(
            f"{field_name} {folder} does not exist: choose the folder with the pictures (Folders)"
        )
    if not folder.is_dir():
        raise DatasetError(
            f"{field_name} {folder} is a file: choose the folder that the pictures are in (Folders)"
        )
    return folder


def _subsets_in(job: Job, folder: Path, field_name: str, notes: _Notes, *, is_reg: bool) -> list[Subset]:
    """Kohya's sub-folders, or the folder itself where the pictures lie directly in it."""
    subfolders = [path for path in _entries(folder) if path.is_dir()]
    direct = list_pictures(folder)
    found: list[Subset] = []
    unnumbered: list[Path] = []
    for path in subfolders:
        named = kohya_folder(path.name)
        if named is None:
            unnumbered.append(path)
        elif named[0] < 1:
            notes.add("warning", f"{path.name} has {named[0]} repeats and is not trained", path)
        else:
            found.append(subset_from_job(job, path, repeats=named[0], class_tokens=named[1], is_reg=is_reg))
    with_pictures = [path for path in unnumbered if list_pictures(path)]
    if found:
        if direct:
            notes.add(
                "warning",
                f"{counted(len(direct))} directly in {folder} will not be trained, as in Kohya: only those in "
                f"folders such as {found[0].folder.name} are",
                folder,
            )
        for path in with_pictures:
            notes.add(
                "warning",
                f"{path.name} holds pictures but its name does not begin with a number of repeats, so they are "
                f"not trained: rename it to 10_{path.name}",
                path,
            )
        return found
    if direct:
        return [_plain(job, folder, subfolders, with_pictures, notes, is_reg=is_reg)]
    raise _nothing_in(folder, field_name, subfolders, with_pictures)


def _plain(
    job: Job,
    folder: Path,
    subfolders: Sequence[Path],
    with_pictures: Sequence[Path],
    notes: _Notes,
    *,
    is_reg: bool,
) -> Subset:
    """The folder itself as one subset (a departure: Kohya stops here)."""
    if with_pictures:
        notes.add(
            "warning",
            f"only the pictures directly in {folder} are trained, not those in "
            f"{', '.join(path.name for path in with_pictures[:SHOWN])}: to train these, put every folder into "
            "Kohya's layout (10_name)",
            folder,
        )
    named = kohya_folder(folder.name)
    if named is not None and named[0] >= 1 and "_" in folder.name:
        siblings = [
            path.name
            for path in _entries(folder.parent)
            if path.is_dir() and path != folder and "_" in path.name and kohya_folder(path.name)
        ]
        notes.add(
            "warning" if siblings else "info",
            f"{folder.name} is itself one of Kohya's numbered folders: it is trained with {named[0]} repeats"
            + (
                f", its neighbours ({', '.join(siblings[:SHOWN])}) are not: choose {folder.parent}"
                if siblings
                else ""
            ),
            folder,
        )
        return subset_from_job(job, folder, repeats=named[0], class_tokens=named[1], is_reg=is_reg)
    repeats = max(1, job.engine.dataset_repeats)
    notes.add(
        "info",
        f"{folder} has no numbered sub-folders: its pictures are trained as one set, "
        f"{repeats} time{'s' if repeats > 1 else ''} an epoch",
        folder,
    )
    return subset_from_job(job, folder, repeats=repeats, class_tokens=None, is_reg=is_reg)


def _nothing_in(
    folder: Path, field_name: str, subfolders: Sequence[Path], with_pictures: Sequence[Path]
) -> DatasetError:
    for path in subfolders:
        inner = [item.name for item in _entries(path) if item.is_dir() and kohya_folder(item.name)]
        if inner:
            return DatasetError(
                f"{field_name} {folder} is one folder too high: choose {path}, which holds {inner[0]}"
            )
    if with_pictures:
        name = with_pictures[0].name
        return DatasetError(
            f"{field_name} {folder} has no numbered folder with pictures: rename {name} to 10_{name} "
            f"(10 repeats), or choose {with_pictures[0]} itself"
        )
    endings = ", ".join(sorted(PICTURE_EXTENSIONS))
    return DatasetError(
        f"no pictures in {field_name} {folder}: expected {endings} there, or in folders named like 10_sks cat"
    )


@dataclass(frozen=True)
class _File:
    """One picture file and what was found in it and beside it."""

    path: Path
    look: Look | None
    refusal: str
    caption: str | None
    caption_file: Path | None
    caption_problem: Literal["", "missing", "empty", "encoding"]


def _caption_file(path: Path, extension: str) -> Path | None:
    """The picture's caption file; names with a face position may share one (sd-scripts: read_caption)."""
    own = path.with_name(path.stem + extension)
    if own.is_file():
        return own
    parts = path.stem.split("_")
    if len(parts) >= 5:
        shared = path.with_name("_".join(parts[:-4]) + extension)
        if shared.is_file():
            return shared
    return None


def _read_file(path: Path, subset: Subset) -> _File:
    look, refusal = None, ""
    try:
        look = inspect(path)
    except DatasetError as error:
        refusal = str(error)
    caption_file = _caption_file(path, subset.caption_extension)
    if caption_file is None:
        return _File(path, look, refusal, None, None, "missing")
    try:
        text = caption_file.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError:
        return _File(path, look, refusal, None, caption_file, "encoding")
    except OSError as error:
        raise DatasetError(f"caption {caption_file} cannot be read: {error.strerror or error}") from error
    lines = text.replace("\r\n", "\n").replace("\r", "\n").split("\n")
    if not subset.enable_wildcard:
        del lines[1:]
    caption = "\n".join(line.strip() for line in lines if line.strip())
    if not text:
        # sd-scripts stops at an empty file; here it is as if there were none.
        return _File(path, look, refusal, None, caption_file, "empty")
    return _File(path, look, refusal, caption, caption_file, "" if caption else "empty")


def _note_captions(subset: Subset, files: Sequence[_File], notes: _Notes) -> None:
    folder = subset.folder
    instead = (
        f'trained with "{subset.class_tokens}"' if subset.class_tokens else "trained with an empty caption"
    )
    level: Literal["info", "warning"] = "info" if subset.class_tokens else "warning"
    missing = [file.path for file in files if file.caption_problem == "missing"]
    if missing:
        others = [
            ending
            for ending in CAPTION_ENDINGS
            if ending != subset.caption_extension
            and any(path.with_name(path.stem + ending).is_file() for path in missing)
        ]
        hint = f" There are {others[0]} files: set caption_extension to {others[0]}." if others else ""
        notes.add(
            "warning" if others else level,
            f"{counted(len(missing))} of {len(files)} in {folder.name} without a {subset.caption_extension} caption "
            f"file, {instead}: {_some(missing)}.{hint}",
            folder,
        )
    empty = [file.caption_file for file in files if file.caption_problem == "empty" and file.caption_file]
    if empty:
        blank = any(file.caption is None for file in files if file.caption_problem == "empty")
        notes.add(
            "warning",
            f"empty caption {'file' if len(empty) == 1 else 'files'} in {folder.name}, "
            f"{instead if blank else 'trained with an empty caption'}: {_some(empty)}",
            empty[0],
        )


def _raise_undecodable(files: Iterable[_File]) -> None:
    undecodable = [
        file.caption_file for file in files if file.caption_problem == "encoding" and file.caption_file
    ]
    if undecodable:
        more = f" (and {len(undecodable) - 1} more)" if len(undecodable) > 1 else ""
        kind = (
            "it is UTF-16"
            if undecodable[0].read_bytes()[:2] in (b"\xff\xfe", b"\xfe\xff")
            else "it is not UTF-8"
        )
        raise DatasetError(f"caption {undecodable[0]}{more} cannot be read, {kind}: save it as UTF-8")


def _note_files(subset: Subset, paths: Sequence[Path], notes: _Notes) -> None:
    """Same stems, and pictures of kinds that are not trained."""
    stems: dict[str, list[Path]] = defaultdict(list)
    for path in paths:
        stems[path.stem].append(path)
    same = [group for group in stems.values() if len(group) > 1]
    if same:
        shown = "; ".join(" and ".join(path.name for path in group) for group in same[:SHOWN])
        notes.add(
            "warning",
            f"in {subset.folder.name}, pictures that differ only in their ending share one caption, and all are "
            f"trained: {shown}" + (f" and {len(same) - SHOWN} more" if len(same) > SHOWN else ""),
            same[0][0],
        )
    passed_over = [path for path in _entries(subset.folder) if path.suffix.lower() in OTHER_PICTURES]
    if passed_over:
        notes.add(
            "warning",
            f"{counted(len(passed_over))} in {subset.folder.name} of a kind that is not trained: "
            f"{_some(passed_over)}. Convert to PNG, JPEG or WebP.",
            passed_over[0],
        )


def _note_duplicates(paths: Sequence[Path], notes: _Notes) -> None:
    """Files with the same content, found by size first so that few are read."""
    by_size: dict[int, list[Path]] = defaultdict(list)
    for path in paths:
        by_size[path.stat().st_size].append(path)
    by_content: dict[str, list[Path]] = defaultdict(list)
    for group in by_size.values():
        if len(group) > 1:
            for path in group:
                by_content[hashlib.sha256(path.read_bytes()).hexdigest()].append(path)
    same = [group for group in by_content.values() if len(group) > 1]
    for group in same[:SHOWN]:
        notes.add(
            "warning", f"the same picture, trained {len(group)} times: {_some(group, full=True)}", group[0]
        )
    if len(same) > SHOWN:
        notes.add("warning", f"{len(same) - SHOWN} more pictures lie there more than once")


def _class_repeats(counts: Sequence[int], goal: int) -> list[int]:
    """Repeats of class pictures so that they come as often as the training pictures.

    Args:
        counts: Each class picture's own repeats, in order.
        goal: Training pictures, repeats included.

    Returns:
        Repeats for each; 0 for those that are not needed (sd-scripts: DreamBoothDataset.__init__).
    """
    repeats = [0] * len(counts)
    total = 0
    for index, count in enumerate(counts):
        if total >= goal:
            break
        repeats[index] = count
        total += count
    while counts and total < goal:
        for index in range(len(counts)):
            if total >= goal:
                break
            repeats[index] += 1
            total += 1
    return repeats


def _sources(job: Job, notes: _Notes) -> list[Source]:
    config = job.config
    sources = _all_sources(job, notes)
    caching = config.cache_latents or config.cache_latents_to_disk
    found = []
    for source in sources:
        if source.subset.face_crop_aug_range is not None and (caching or source.rules.enabled):
            which = "cached latents" if caching else "buckets"
            notes.add(
                "warning",
                f"face_crop_aug_range has no effect on {source.subset.folder.name} with {which}, as in Kohya",
                source.subset.folder,
            )
            source = replace(source, subset=replace(source.subset, face_crop_aug_range=None))
        found.append(source)
    return found


def _all_sources(job: Job, notes: _Notes) -> list[Source]:
    config = job.config
    if config.dataset_config.strip():
        return read_dataset_config(job, subset_from_job)
    rules = BucketRules.from_job(job)
    folders: list[tuple[str, str, bool]] = [("train_data_dir", config.train_data_dir, False)]
    if config.reg_data_dir.strip():
        folders.append(("reg_data_dir", config.reg_data_dir, True))
    return [
        Source(subset, rules)
        for name, text, is_reg in folders
        for subset in _subsets_in(job, _folder(job, name, text), name, notes, is_reg=is_reg)
    ]


def subsets(job: Job) -> list[Subset]:
    """The picture folders of a job and their treatment, without a look at the pictures.

    Raises:
        DatasetError: A folder is missing, or holds no pictures.
        ConfigError: The dataset_config cannot be used.
    """
    return [source.subset for source in _sources(job, _Notes())]


def scan(job: Job, advance: Advance | None = None) -> Dataset:
    """Read the folders of a job: every picture's size and caption, its bucket and its repeats.

    Pictures are checked (`images.inspect`) on several threads; those that cannot be read are left
    out and named in the findings.

    Args:
        job: Says where the pictures are and how they are treated.
        advance: Called as pictures are read.

    Raises:
        DatasetError: A folder or a caption cannot be read, or no usable training picture is left.
        ConfigError: Bucket settings that cannot be met.
    """
    notes = _Notes()
    sources = _sources(job, notes)
    edited = [edits.load(source.subset.folder) for source in sources]
    listed, left_out = [], 0
    for source, of_folder in zip(sources, edited, strict=True):
        paths = list_pictures(source.subset.folder)
        listed.append([path for path in paths if not of_folder.of(path.name).excluded])
        if missing := len(paths) - len(listed[-1]):
            left_out += missing
            notes.add(
                "info",
                f"{counted(missing)} of {source.subset.folder.name} left out, as chosen on the Dataset tab",
                source.subset.folder,
            )
    work = [(path, source.subset) for source, paths in zip(sources, listed, strict=True) for path in paths]
    files: list[_File] = []
    with ThreadPoolExecutor(max_workers=min(8, (os.cpu_count() or 1) + 1)) as pool:
        for file in pool.map(lambda item: _read_file(*item), work):
            files.append(file)
            if advance is not None:
                advance(len(files), len(work))
    _raise_undecodable(files)
    start = 0
    kept_sources: list[Source] = []
    pictures: list[Picture] = []
    fits: list[Fit] = []
    for source, paths, of_folder in zip(sources, listed, edited, strict=True):
        part = files[start : start + len(paths)]
        start += len(paths)
        usable = _usable(source, part, of_folder, notes, index=len(kept_sources))
        if not usable:
            if not part:
                notes.add(
                    "warning",
                    f"{source.subset.folder} holds no pictures and is passed over",
                    source.subset.folder,
                )
            continue
        _note_captions(source.subset, [file for file in part if file.look], notes)
        _note_files(source.subset, paths, notes)
        kept_sources.append(source)
        pictures += [picture for picture, _ in usable]
        fits += [fit for _, fit in usable]
    if not any(not source.subset.is_reg for source in kept_sources):
        broken = [finding.message for finding in notes.findings if finding.level == "error"]
        where = ", ".join(str(source.subset.folder) for source in sources if not source.subset.is_reg)
        if broken:
            raise DatasetError(
                f"none of the {counted(len(broken))} in {where} can be used; the first: {broken[0]}"
            )
        if left_out:
            raise DatasetError(
                f"all {counted(left_out)} in {where} are left out on the Dataset tab: take some in again"
            )
        raise DatasetError(f"no pictures in {where}: expected {', '.join(sorted(PICTURE_EXTENSIONS))}")
    _note_duplicates([picture.path for picture in pictures], notes)
    held: list[int] = []
    if job.config.hold_out:
        own = [i for i, p in enumerate(pictures) if not kept_sources[p.subset].subset.is_reg]
        held = _held_out(own, notes, pictures)
    trained = [i for i in range(len(pictures)) if i not in held]
    dataset = _assemble(job, kept_sources, [pictures[i] for i in trained], [fits[i] for i in trained], notes)
    return replace(dataset, held=tuple((pictures[i], fits[i]) for i in held))


def _held_out(own: Sequence[int], notes: _Notes, pictures: Sequence[Picture]) -> list[int]:
    """Which of the training pictures to keep for comparison: some, evenly over the list."""
    if len(own) < HELD_FROM:
        notes.add(
            "info", f"no picture is held out: {counted(len(own))} are few, and from {HELD_FROM} on some are"
        )
        return []
    number = min(HELD_MOST, len(own) // HELD_SHARE)
    held = [own[(2 * place + 1) * len(own) // (2 * number)] for place in range(number)]
    names = _some([pictures[index].path for index in held])
    notes.add("info", f"held out for the verdict and not trained: {names}", pictures[held[0]].path)
    return held


def _usable(
    source: Source, files: Sequence[_File], edited: edits.Edits, notes: _Notes, index: int
) -> list[tuple[Picture, Fit]]:
    """The readable pictures of a subset with their buckets; the others become findings."""
    found: list[tuple[Picture, Fit]] = []
    outdated: list[Path] = []
    for file in files:
        if file.look is None:
            notes.add("error", f"left out: {file.refusal}", file.path)
            continue
        edit = edited.of(file.path.name)
        if not edit.fits(file.look.size):
            outdated.append(file.path)
        size = edit.size(file.look.size)
        try:
            fit = source.rules.fit(size)
        except DatasetError as error:
            notes.add("error", f"left out: {file.path}: {error}", file.path)
            continue
        caption = file.caption if file.caption is not None else (source.subset.class_tokens or "")
        caption_file = file.caption_file if file.caption is not None else None
        picture = Picture(
            path=file.path,
            subset=index,
            size=size,
            caption=caption,
            caption_file=caption_file,
            mask_file=mask_file(source.subset, file.path, file.look.size),
            edit=edit,
        )
        found.append((picture, fit))
    if said := edits.summary([picture.edit for picture, _ in found]):
        notes.add(
            "info", f"edits of the Dataset tab in {source.subset.folder.name}: {said}", source.subset.folder
        )
    if outdated:
        notes.add(
            "warning",
            f"{counted(len(outdated))} of another size than when cropped on the Dataset tab, and not cropped: "
            f"{_some(outdated)}. Crop again.",
            outdated[0],
        )
    looks = [file.look for file in files if file.look]
    transparent = sum(look.transparent for look in looks)
    if transparent and not source.subset.masked:
        notes.add(
            "info",
            f"{counted(transparent)} in {source.subset.folder.name} with transparency, which is ignored: hidden "
            "colours are trained too (alpha_mask uses it as a loss mask)",
            source.subset.folder,
        )
    turned = sum(look.turned for look in looks)
    if turned:
        notes.add(
            "info",
            f"{counted(turned)} in {source.subset.folder.name} turned upright as the camera recorded it "
            "(Kohya would train them lying)",
            source.subset.folder,
        )
    return found


def mask_file(subset: Subset, path: Path, size: Size) -> Path | None:
    """The picture's loss mask: the file of the same stem in the subset's mask folder; None without one.

    Raises:
        DatasetError: It has another size, or the picture needs one and has none.
    """
    if subset.mask_folder is None:
        return None
    for ending in sorted(PICTURE_EXTENSIONS):
        for mask in (
            subset.mask_folder / (path.stem + ending),
            subset.mask_folder / (path.stem + ending.upper()),
        ):
            if mask.is_file():
                found = inspect(mask).size
                if found != size:
                    raise DatasetError(
                        f"mask {mask} has {found[0]} x {found[1]} pixels, but {path} has {size[0]} x {size[1]}: "
                        "they must be equal"
                    )
                return mask
    if subset.masks_optional:
        return None
    raise DatasetError(
        f"{subset.mask_folder} has no mask for {path.name}: every picture needs one of its name"
    )


def _assemble(
    job: Job, sources: Sequence[Source], pictures: list[Picture], fits: list[Fit], notes: _Notes
) -> Dataset:
    # Training pictures come first, as sd-scripts registers them.
    order = sorted(range(len(pictures)), key=lambda i: sources[pictures[i].subset].subset.is_reg)
    pictures, fits = [pictures[i] for i in order], [fits[i] for i in order]
    subsets = tuple(source.subset for source in sources)
    own = [subsets[picture.subset].repeats for picture in pictures]
    is_reg = [subsets[picture.subset].is_reg for picture in pictures]
    num_train = sum(count for count, reg in zip(own, is_reg, strict=True) if not reg)
    num_reg = sum(count for count, reg in zip(own, is_reg, strict=True) if reg)
    repeats = [count for count, reg in zip(own, is_reg, strict=True) if not reg]
    class_counts = [count for count, reg in zip(own, is_reg, strict=True) if reg]
    balanced = _class_repeats(class_counts, num_train)
    if unused := balanced.count(0):
        notes.add(
            "warning",
            f"{counted(unused)} of {len(balanced)} class pictures are not used: {num_reg} with repeats are more "
            f"than the {num_train} training pictures",
        )
    repeats += balanced
    used = [index for index, count in enumerate(repeats) if count]
    errors = [aspect_error(fits[index].bucket, pictures[index].size) for index in used]
    _note_sizes([pictures[i] for i in used], [fits[i] for i in used], notes)
    return Dataset(
        subsets=subsets,
        pictures=tuple(pictures),
        fits=tuple(fits),
        repeats=tuple(repeats),
        buckets=tuple(sorted({fits[index].bucket for index in used})),
        num_train_images=num_train,
        num_reg_images=num_reg,
        mean_aspect_error=sum(errors) / len(errors) if errors else 0.0,
        findings=tuple(notes.findings),
    )


def _note_sizes(pictures: Sequence[Picture], fits: Sequence[Fit], notes: _Notes) -> None:
    enlarged = [p.path for p, fit in zip(pictures, fits, strict=True) if fit.upscaled(p.size)]
    if enlarged:
        notes.add(
            "info",
            f"{counted(len(enlarged))} smaller than their bucket and enlarged: {_some(enlarged)}",
            enlarged[0],
        )
    cut: list[Path] = []
    for picture, fit in zip(pictures, fits, strict=True):
        kept = fit.bucket[0] * fit.bucket[1] / (fit.resized[0] * fit.resized[1])
        if kept < 0.8:
            cut.append(picture.path)
    if cut:
        notes.add(
            "warning",
            f"cropping cuts more than a fifth off {counted(len(cut))}: {_some(cut)}",
            cut[0],
        )
