"""The pictures of a folder as the Dataset tab shows and changes them; what it asks of the server.

Nothing is kept between two questions but long tasks and thumbnails: the browser says which folder it
shows, and every path goes through `Paths`.
"""

from __future__ import annotations

import functools
import hashlib
import os
import secrets
import threading
import time
import traceback
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from app.session import Session
from app.shell import page_of
from app.view import served
from trainer.config import KohyaConfig
from trainer.data.folder import kohya_folder, list_pictures
from trainer.data.images import read_size, read_small
from trainer.errors import ConfigError, DatasetError, StopTraining, TrainerError
from trainer.events import counted
from trainer.files import atomic_path
from trainer.job import Job
from trainer.pictures import edits, project
from trainer.pictures.edits import Edit, Edits

__all__ = ["Tasks", "answer"]

THUMBNAIL_PX = 288
PREVIEW_PX = 1100
MOST_THUMBNAILS = 80
MOST_TASKS = 40
MOST_SHOWN = 5000
"""Pictures of one set that the page lists."""

Data = Mapping[str, Any]
Report = Callable[[int, int], None]


# ---- long tasks -----------------------------------------------------------------------------------------


@dataclass
class _Task:
    """One scan or copy on a thread of its own."""

    owner: str
    done: int = 0
    total: int = 0
    result: dict[str, Any] | None = None
    error: str = ""
    stop: threading.Event = field(default_factory=threading.Event)
    started: float = field(default_factory=time.monotonic)

    def report(self, done: int, total: int) -> None:
        self.done, self.total = done, total

    def shown(self) -> dict[str, Any]:
        elapsed_s = time.monotonic() - self.started
        left_s = elapsed_s / self.done * (self.total - self.done) if self.done else None
        facts = {"done": self.done, "total": self.total, "left_s": left_s, "over": self.result is not None}
        if self.error:
            return {**facts, "over": True, "error": self.error}
        return {**facts, "result": self.result} if self.result is not None else facts


class Tasks:
    """The long tasks of a server; a page asks how far its own is."""

    def __init__(self) -> None:
        self._tasks: dict[str, _Task] = {}
        self._lock = threading.Lock()

    def start(self, owner: str, work: Callable[[_Task], dict[str, Any]]) -> dict[str, Any]:
        """Begin one; ``work`` reports how far it is and looks at ``stop``."""
        task, key = _Task(owner), secrets.token_hex(8)
        with self._lock:
            while len(self._tasks) >= MOST_TASKS:
                self._tasks.pop(next(iter(self._tasks))).stop.set()
            self._tasks[key] = task

        def run() -> None:
            try:
                task.result = work(task)
            except StopTraining:
                task.result = {"stopped": True}
            except TrainerError as error:
                task.error = str(error)
            except Exception as error:  # noqa: BLE001 - a flaw of ours must not leave the bar standing
                traceback.print_exc()
                task.error = f"{type(error).__name__}: {error}"

        threading.Thread(target=run, name="pictures", daemon=True).start()
        return {"task": key}

    def ask(self, key: str, owner: str, *, stop: bool = False) -> dict[str, Any]:
        """How far a task is. Raises ConfigError where there is none of that key."""
        with self._lock:
            task = self._tasks.get(key)
        if task is None or task.owner != owner:
            raise ConfigError("this is no longer going on: start it again")
        if stop:
            task.stop.set()
        return task.shown()


# ---- folders --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Set:
    """One folder of pictures."""

    folder: Path
    names: tuple[str, ...]
    edits: Edits

    def kept(self) -> list[Path]:
        """Pictures that are not left out."""
        return [self.folder / name for name in self.names if not self.edits.of(name).excluded]


def _sets(root: Path) -> list[_Set]:
    """Kohya's numbered folders, or the folder itself."""
    if not root.is_dir():
        raise DatasetError(f"{root} is no folder: choose the one that the pictures are in")
    try:
        below = sorted(path for path in root.iterdir() if path.is_dir() and not path.name.startswith("."))
    except OSError as error:
        raise DatasetError(f"{root} cannot be read: {error.strerror or error}") from error
    numbered = [path for path in below if "_" in path.name and kohya_folder(path.name) is not None]
    if not numbered and not list_pictures(root):
        inner = [
            path
            for path in below
            if any(item.is_dir() and "_" in item.name and kohya_folder(item.name) for item in path.iterdir())
        ]
        if len(inner) == 1:  # a project's folder: its pictures are one level further down
            return _sets(inner[0])
    return [
        _Set(folder, tuple(path.name for path in list_pictures(folder)), edits.load(folder))
        for folder in (numbered or [root])
    ]


def _root(session: Session, data: Data, *, write: bool = False) -> Path:
    text = str(data.get("folder") or "")
    if text.strip():
        return session.paths.resolve(text, write=write)
    config, base = page_of(data.get("settings"))
    config = session.paths.expand(config)
    if not config.train_data_dir.strip():
        raise ConfigError("no folder is open: choose one, or make a project")
    return session.paths.resolve(config.train_data_dir, base=base, write=write)


def _picked(root: Path, data: Data) -> dict[Path, list[str]]:
    """The pictures that a page names, by folder; only those that lie in the folder that is open."""
    folders = {item.folder.name: item for item in _sets(root)}
    found: dict[Path, list[str]] = {}
    for key in data.get("ids") or []:
        part, _, name = str(key).partition("/")
        if part not in folders or name not in folders[part].names:
            raise DatasetError(f"{key} is not there any more: look at the folder again")
        found.setdefault(folders[part].folder, []).append(name)
    return found


@functools.lru_cache(maxsize=65536)
def _header(path: Path, _modified_ns: int, _size_bytes: int) -> tuple[int, int] | str:
    """Upright size of a picture, or why it has none; read once for as long as the file stays."""
    try:
        return read_size(path)
    except DatasetError as error:
        return str(error).partition("cannot be read: ")[2] or str(error)


def _entry(item: _Set, name: str, caption_ending: str) -> dict[str, Any]:
    path, edit = item.folder / name, item.edits.of(name)
    entry: dict[str, Any] = {"id": f"{item.folder.name}/{name}", "name": name}
    try:
        found = path.stat()
        size = _header(path, found.st_mtime_ns, found.st_size)
    except OSError as error:
        size = error.strerror or str(error)
    if isinstance(size, str):
        entry["broken"] = size
    else:
        entry["size"], entry["outdated"] = edit.size(size), not edit.fits(size)
    entry["excluded"], entry["words"] = edit.excluded, replace(edit, excluded=False).words()
    entry["caption"] = path.with_suffix(caption_ending).is_file()
    return entry


def _opened(session: Session, root: Path, settings: Any) -> dict[str, Any]:
    try:
        config, _ = page_of(settings)
        ending = config.caption_extension.strip() or ".caption"
    except ConfigError:
        ending = ".txt"
    ending = ending if ending.startswith(".") and "/" not in ending else ".txt"
    sets = []
    for item in _sets(root):
        named = kohya_folder(item.folder.name) if "_" in item.folder.name else None
        with ThreadPoolExecutor(max_workers=4) as pool:
            pictures = list(pool.map(lambda name, of=item: _entry(of, name, ending), item.names[:MOST_SHOWN]))
        kept = len(item.kept())
        sets.append(
            {
                "name": item.folder.name,
                "path": str(item.folder),
                "repeats": named[0] if named else None,
                "wanted": project.repeats_for(kept),
                "kept": kept,
                "pictures": pictures,
                "done": item.edits.done[-1].words if item.edits.done else "",
                "undone": item.edits.undone[0].words if item.edits.undone else "",
            }
        )
    return {"root": str(root), "sets": sets}


# ---- thumbnails -----------------------------------------------------------------------------------------


def _scaled(edit: Edit, size: tuple[int, int], small: tuple[int, int]) -> Edit:
    """The edit for a shrunk copy of a picture of upright ``size``."""
    if edit.crop is None or not edit.fits(size):
        return replace(edit, crop=None, of=None)
    across, down = small[0] / size[0], small[1] / size[1]
    left, top = min(round(edit.crop[0] * across), small[0] - 1), min(round(edit.crop[1] * down), small[1] - 1)
    right, bottom = max(left + 1, round(edit.crop[2] * across)), max(top + 1, round(edit.crop[3] * down))
    return replace(edit, crop=(left, top, min(right, small[0]), min(bottom, small[1])), of=small)


def _seen(path: Path, edit: Edit, edge: int) -> tuple[Any, tuple[int, int]]:
    """Small edited pixels of a picture, and the upright size of its file."""
    share = 1.0
    if edit.crop is not None and edit.of is not None:
        share = max(edit.crop[2] - edit.crop[0], edit.crop[3] - edit.crop[1]) / max(edit.of)
    pixels, size = read_small(path, round(edge / max(share, 0.05)))
    return _scaled(edit, size, (pixels.shape[1], pixels.shape[0])).apply(pixels), size


def _thumbnail_path(session: Session, path: Path, edit: Edit, edge: int) -> Path:
    found = path.stat()
    key = f"{path}|{found.st_mtime_ns}|{found.st_size}|{edit.key()}|{edge}"
    return session.thumbnails / f"{hashlib.sha256(key.encode()).hexdigest()[:24]}.webp"


def _write(pixels: Any, file: Path, edge: int) -> None:
    image = Image.fromarray(pixels)
    image.thumbnail((edge, edge), Image.Resampling.BILINEAR, reducing_gap=2.0)
    with atomic_path(file) as temporary:
        image.save(temporary, "WEBP", quality=82, method=1)


def _thumbnail(session: Session, path: Path, edit: Edit, edge: int = THUMBNAIL_PX) -> str:
    """Address of a picture's thumbnail, made where it is not there; "" where the picture cannot be read."""
    try:
        file = _thumbnail_path(session, path, edit, edge)
        if not file.exists():
            _write(_seen(path, edit, edge)[0], file, edge)
    except (DatasetError, OSError):
        return ""
    return served(file)


def _thumbnails(session: Session, root: Path, data: Data) -> dict[str, Any]:
    picked = _picked(root, {"ids": list(data.get("ids") or [])[:MOST_THUMBNAILS]})
    work = []
    for folder, names in picked.items():
        of_folder = edits.load(folder)
        work += [(f"{folder.name}/{name}", folder / name, of_folder.of(name)) for name in names]
    with ThreadPoolExecutor(max_workers=min(4, os.cpu_count() or 1)) as pool:
        found = pool.map(lambda item: _thumbnail(session, item[1], item[2]), work)
    return {"thumbs": {key: address for (key, _, _), address in zip(work, found, strict=True)}}


# ---- edits ----------------------------------------------------------------------------------------------

ACTS: Mapping[str, tuple[str, Callable[[Edit], Edit]]] = {
    "exclude": ("leave out", lambda edit: replace(edit, excluded=True)),
    "include": ("take in again", lambda edit: replace(edit, excluded=False)),
    "left": ("turn left", lambda edit: edits.turn(edit, -1)),
    "right": ("turn right", lambda edit: edits.turn(edit, 1)),
    "flip": ("mirror", edits.flip),
    "uncrop": ("take the crop away", lambda edit: replace(edit, crop=None, of=None)),
}


def _edit(root: Path, data: Data) -> None:
    what = str(data.get("what"))
    box = data.get("box")
    for folder, names in _picked(root, data).items():
        count = f"{len(names)} picture{'s' if len(names) > 1 else ''}"
        if what == "crop":

            def cropped(name: str, edit: Edit, folder: Path = folder) -> Edit:
                return _cropped(folder / name, edit, box, on_file=bool(data.get("file")))

            edits.change(folder, names, cropped, f"crop {count}")
        elif what in ACTS:
            words, act = ACTS[what]

            def acted(_: str, edit: Edit, act: Callable[[Edit], Edit] = act) -> Edit:
                return act(edit)

            edits.change(folder, names, acted, f"{words}: {count}")
        else:
            raise ConfigError("the page asked for something that does not exist: reload it")


def _cropped(path: Path, edit: Edit, box: Any, *, on_file: bool) -> Edit:
    """Crop to a box in fractions: of the upright file, or of the edited picture without its crop."""
    size = read_size(path)
    try:
        left, top, right, bottom = (min(1.0, max(0.0, float(value))) for value in box)
    except (TypeError, ValueError) as error:
        raise ConfigError("the page sent no box to crop to: draw one") from error
    whole = replace(edit, crop=None, of=None)
    if on_file:
        whole = replace(whole, turns=0, flipped=False)
    width, height = whole.size(size)
    pixels = round(left * width), round(top * height), round(right * width), round(bottom * height)
    found = edits.crop_seen(whole, pixels, size)
    return replace(edit, crop=found.crop, of=found.of)


def _back(root: Path, act: Callable[[Path], str], latest: Callable[[Edits], float]) -> str:
    """Undo or redo in the set whose turn it is."""
    sets = [item for item in _sets(root) if latest(item.edits)]
    return act(max(sets, key=lambda item: latest(item.edits)).folder) if sets else ""


def _undo(root: Path) -> str:
    return _back(root, edits.undo, lambda found: found.done[-1].time if found.done else 0.0)


def _redo(root: Path) -> str:
    return _back(root, edits.redo, lambda found: 1 / found.undone[0].time if found.undone else 0.0)


def _preview(session: Session, root: Path, data: Data) -> dict[str, Any]:
    """The whole picture, turned and mirrored as it is, for drawing a crop on it."""
    ((folder, names),) = _picked(root, {"ids": [data.get("id")]}).items()
    path, edit = folder / names[0], edits.load(folder).of(names[0])
    size = read_size(path)
    whole = replace(edit, crop=None, of=None)
    width, height = whole.size(size)
    answered: dict[str, Any] = {
        "src": _thumbnail(session, path, whole, PREVIEW_PX),
        "size": [width, height],
        "crop": None,
        "face": None,
        "ratios": _ratios(session, data),
    }
    if edit.crop is not None and edit.fits(size):
        left, top, right, bottom = whole.seen(edit.crop, size)
        answered["crop"] = [left / width, top / height, right / width, bottom / height]
    pixels, _ = _seen(path, whole, 640)
    from trainer.pictures.doctor import around
    from trainer.pictures.measures import Measure

    faces = _detector(session).find(pixels)
    box = around(Measure(faces=tuple(faces)))
    answered["face"] = list(box) if box else None
    return answered


def _ratios(session: Session, data: Data) -> list[float]:
    """Width to height of the buckets that the settings give."""
    from trainer.data.buckets import BucketRules, make_buckets

    try:
        config, base = page_of(data.get("settings"))
        job, _ = Job.draft(config, base=base)
        rules = BucketRules.from_job(job)
        sizes = rules.sizes or tuple(
            make_buckets(rules.resolution, rules.step, 4 * max(rules.resolution), rules.step)
        )
        sizes = sizes if rules.enabled else (rules.resolution,)
    except TrainerError:
        sizes = tuple(make_buckets((512, 512), 256, 1024, 64))  # Kohya's defaults
    return sorted({width / height for width, height in sizes})


# ---- checks ---------------------------------------------------------------------------------------------


def _detector(session: Session) -> Any:
    from trainer.pictures.faces import Detector

    return Detector(session.state / "models")


def _check(session: Session, root: Path, person: bool, task: _Task) -> dict[str, Any]:
    from trainer.pictures.doctor import KINDS, examine
    from trainer.pictures.measures import measure_all

    sets = _sets(root)
    by_path = {item.folder / name: item.edits.of(name) for item in sets for name in item.names}
    kept = [path for path, edit in by_path.items() if not edit.excluded]
    if not kept:
        raise DatasetError(f"there are no pictures in {root}: bring some in first")
    detector = _detector(session)

    def thumbnail(path: Path, pixels: Any) -> None:
        edit = by_path[path]
        if edit.crop is None:
            file = _thumbnail_path(session, path, edit, THUMBNAIL_PX)
            if not file.exists():
                _write(edit.apply(pixels), file, THUMBNAIL_PX)

    measures = measure_all(
        kept,
        detector,
        cache=session.state / "measures",
        advance=task.report,
        stop=task.stop.is_set,
        each=thumbnail,
    )
    names = {path: f"{path.parent.name}/{path.name}" for path in kept}
    single = len(sets) == 1
    shown = {path: path.name if single else names[path] for path in kept}
    ids = {shown[path]: names[path] for path in kept}
    findings = examine(
        {shown[path]: _after(measure, by_path[path]) for path, measure in measures.items()}, person=person
    )
    return {
        "checked": len(kept),
        "detector": detector.name,
        "kinds": dict(KINDS),
        "findings": [
            {
                "kind": finding.kind,
                "level": finding.level,
                "message": finding.message,
                "ids": [ids[name] for name in finding.names],
                "repairs": [
                    {
                        "what": repair.do,
                        "ids": [ids[name] for name in repair.names],
                        "box": repair.box,
                        "label": repair.label,
                    }
                    for repair in finding.repairs
                ],
            }
            for finding in findings
        ],
    }


def _after(measure: Any, edit: Edit) -> Any:
    """The measures as they hold after the edit: a crop has dealt with borders and with who is beside."""
    if measure.error:
        return measure
    changed = replace(measure, size=edit.size(measure.size))
    if edit.crop is None or not edit.fits(measure.size):
        return changed
    width, height = measure.size
    left, top, right, bottom = edit.crop

    def is_inside(face: Any) -> bool:
        x, y = (face.left + face.right) / 2 * width, (face.top + face.bottom) / 2 * height
        return bool(left <= x <= right and top <= y <= bottom)

    faces = tuple(face for face in measure.faces if is_inside(face))
    return replace(changed, bars=(0.0,) * 4, texts=(), faces=faces)


def _mirrored(session: Session, root: Path, task: _Task) -> dict[str, Any]:
    from trainer.pictures.orientation import FEWEST, compare, look

    kept = [(item, path) for item in _sets(root) for path in item.kept()]
    if len(kept) < FEWEST:
        raise DatasetError(f"{len(kept)} pictures are too few to compare: there must be {FEWEST} or more")
    detector = _detector(session)

    def read(found: tuple[_Set, Path]) -> tuple[str, Any, Any] | None:
        if task.stop.is_set():
            raise StopTraining
        item, path = found
        try:
            pixels, _ = _seen(path, item.edits.of(path.name), 480)
        except DatasetError:
            return None
        faces = detector.find(pixels)
        return f"{path.parent.name}/{path.name}", np.ascontiguousarray(pixels), faces[0] if faces else None

    readable = []
    with ThreadPoolExecutor(max_workers=os.cpu_count() or 1) as pool:
        for place, one in enumerate(pool.map(read, kept)):
            readable += [one] if one is not None else []
            task.report(place + 1, 2 * len(kept))
    has_faces = sum(face is not None for _, _, face in readable) >= 0.6 * len(readable)
    looks = [look(pixels, face if has_faces else None) for _, pixels, face in readable]
    found = compare(
        looks,
        advance=lambda done, total: task.report(len(kept) + done, len(kept) + total),
        stop=task.stop.is_set,
    )
    return {
        "words": found.words(),
        "clear": found.is_clear,
        "compared": len(readable),
        "by": "faces" if has_faces else "whole pictures",
        "reference": readable[found.reference][0],
        "suspects": [
            {"id": readable[index][0], "percent": round(100 * found.confidences[index])}
            for index in found.suspects
        ],
    }


def _buckets(session: Session, root: Path, data: Data) -> dict[str, Any]:
    """What the trainer would see, from its own code."""
    from trainer.data import folder
    from trainer.data.dataset_config import apply_dataset_config

    config, base = page_of(data.get("settings"))
    config = session.paths.expand(config)
    typed = config.train_data_dir.strip()
    if not config.dataset_config.strip() and (not typed or session.paths.resolve(typed, base=base) != root):
        config = config.model_copy(update={"train_data_dir": str(root)})
    job = apply_dataset_config(_job(session, config, base))
    found = folder.scan(job)
    pictures = {}
    for picture, fit, repeats in zip(found.pictures, found.fits, found.repeats, strict=True):
        width, height = fit.resized
        across, down = (width - fit.bucket[0]) / 2 / width, (height - fit.bucket[1]) / 2 / height
        pictures[f"{picture.path.parent.name}/{picture.path.name}"] = {
            "bucket": fit.bucket,
            "box": [across, down, 1 - across, 1 - down],
            "upscaled": fit.upscaled(picture.size),
            "repeats": repeats,
        }
    batches = found.batches_per_epoch(max(1, job.config.train_batch_size))
    return {
        "pictures": pictures,
        "buckets": [
            {"size": size, "samples": samples, "pictures": sum(fit.bucket == size for fit in found.fits)}
            for size, samples in found.bucket_counts().items()
        ],
        "samples": found.num_train_images,
        "classes": found.num_reg_images,
        "batch": job.config.train_batch_size,
        "steps": -(-batches // max(1, job.config.gradient_accumulation_steps)),
        "findings": [{"level": item.level, "message": item.message} for item in found.findings],
    }


def _job(session: Session, config: KohyaConfig, base: Path) -> Job:
    job = Job.from_config(config, base=base)
    session.paths.check(job)
    return job


# ---- projects, copies, bringing in ----------------------------------------------------------------------


def _pieces(session: Session, data: Data) -> project.Pieces:
    """What the base model's tokenizers make of a word; of two, as FLUX has, the one that knows it best."""
    from trainer.captioning.lengths import ruler

    try:
        config, base = page_of(data.get("settings"))
        config = session.paths.expand(config)
    except ConfigError:
        config, base = KohyaConfig(), session.base
    try:
        if model := config.pretrained_model_name_or_path.strip():
            session.paths.resolve(model, base=base)
    except ConfigError:
        config = config.model_copy(update={"pretrained_model_name_or_path": ""})  # CLIP's own, then
    job, _ = Job.draft(config, base=base)
    tokenizers = [ruler(job).tokenizer]
    if job.family == "flux":
        tokenizers.append(ruler(Job.draft(KohyaConfig(), base=base)[0]).tokenizer)
    return lambda text: min(([str(piece) for piece in one.tokenize(text)] for one in tokenizers), key=len)


def _token(session: Session, data: Data) -> dict[str, Any]:
    pieces = _pieces(session, data)
    typed = str(data.get("token") or "").strip()
    token = (
        project.check_token(typed, pieces) if typed else project.propose(str(data.get("name") or ""), pieces)
    )
    return {"token": token.text, "rare": token.is_rare, "words": token.words()}


def _number(data: Data, name: str, usual: int) -> int:
    try:
        return int(data.get(name) or usual)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{data.get(name)!r} is no number: write one such as {usual}") from error


def _project(session: Session, data: Data) -> dict[str, Any]:
    place = str(data.get("place") or "")
    parent = session.paths.resolve(place, write=True) if place.strip() else _first_root(session)
    token, class_word = str(data.get("token") or "").strip(), str(data.get("class") or "").strip()
    pictures = project.make(parent, token, class_word, _number(data, "repeats", 10))
    size = (512, 512)
    try:
        config, base = page_of(data.get("settings"))
        job, _ = Job.draft(config, base=base)  # a new project's settings are not complete yet
        size = job.width, job.height
    except TrainerError:
        pass  # settings that cannot be read: the usual size will do
    values = project.fields_of(parent / token, token, class_word, size=size)
    return {"folder": str(parent / token / project.IMAGES), "into": str(pictures), "values": values}


def _first_root(session: Session) -> Path:
    roots = list(session.paths.roots.values())
    return roots[0] if roots else session.paths.resolve("projects", write=True)


def _prepare(session: Session, data: Data, task: _Task) -> dict[str, Any]:
    reg = str(data.get("reg") or "").strip()
    fields = project.prepare(
        session.paths.resolve(str(data.get("destination") or ""), write=True),
        session.paths.resolve(str(data.get("images") or "")),
        str(data.get("instance") or ""),
        str(data.get("class") or ""),
        _number(data, "repeats", 40),
        session.paths.resolve(reg) if reg else None,
        _number(data, "reg_repeats", 1),
        task.report,
    )
    return {"folder": fields["train_data_dir"], "values": fields}


def _bring(session: Session, data: Data, task: _Task) -> dict[str, Any]:
    from gradio.utils import get_upload_folder

    from trainer.pictures.importing import bring_in

    target = session.paths.resolve(str(data.get("into") or ""), write=True)
    uploads = Path(get_upload_folder()).resolve()
    sources: list[Path | tuple[Path, str]] = []
    uploaded: list[Path] = []
    for item in data.get("files") or []:
        path = Path(str(item.get("path"))).resolve()
        if not path.is_relative_to(uploads) or not path.is_file():
            raise ConfigError("an uploaded file is gone: choose the files again")
        sources.append((path, str(item.get("name") or path.name)))
        uploaded.append(path)
    if text := str(data.get("source") or "").strip():
        sources.append(session.paths.resolve(text))
    try:
        found = bring_in(sources, target, advance=task.report, stop=task.stop.is_set)
    finally:
        for path in uploaded:
            path.unlink(missing_ok=True)
    return {
        "words": found.words(),
        "refused": found.refused[:200],
        "into": str(target),
        "count": len(found.pictures),
    }


def _copies(session: Session, root: Path, data: Data, task: _Task) -> dict[str, Any]:
    target = session.paths.resolve(str(data.get("target") or ""), write=True)
    sets = _sets(root)
    written = changed = 0
    for item in sets:
        place = target if item.folder == root else target / item.folder.name
        before = written

        def report(done: int, total: int, before: int = before) -> None:
            task.report(before + done, sum(len(one.kept()) for one in sets))
            if task.stop.is_set():
                raise StopTraining

        count, edited = edits.write_copies(item.folder, place, report)
        written, changed = written + count, changed + edited
    return {"words": f"{counted(written)} written to {target}, {changed} of them edited"}


# ---- what the page asks -----------------------------------------------------------------------------------


def answer(session: Session, tasks: Tasks, data: Data, user: str) -> dict[str, Any]:
    """Answer one question of the Dataset tab.

    Args:
        session: The server's state.
        tasks: Its long tasks.
        data: ``do`` and what belongs to it, as a browser sent it: nothing of it is trusted.
        user: Who asks.

    Raises:
        TrainerError: One sentence.
    """
    match data.get("do"):
        case "progress" | "stop":
            return tasks.ask(str(data.get("task")), user, stop=data.get("do") == "stop")
        case "token":
            return _token(session, data)
        case "project":
            return _project(session, data)
        case "prepare":
            return tasks.start(user, lambda task: _prepare(session, data, task))
        case "bring":
            return tasks.start(user, lambda task: _bring(session, data, task))
    changes = data.get("do") in ("edit", "undo", "redo", "repeats")
    root = _root(session, data, write=changes)
    match data.get("do"):
        case "open":
            return _opened(session, root, data.get("settings"))
        case "thumbs":
            return _thumbnails(session, root, data)
        case "preview":
            return _preview(session, root, data)
        case "edit":
            _edit(root, data)
            return _opened(session, root, data.get("settings"))
        case "undo" | "redo":
            words = _undo(root) if data.get("do") == "undo" else _redo(root)
            return {**_opened(session, root, data.get("settings")), "words": words}
        case "repeats":
            folders = {item.folder.name: item.folder for item in _sets(root)}
            if data.get("set") not in folders:
                raise DatasetError("this folder is not there any more: look at the folder again")
            renamed = project.set_repeats(folders[data["set"]], _number(data, "repeats", 10))
            root = renamed if folders[data["set"]] == root else root
            return _opened(session, root, data.get("settings"))
        case "check":
            return tasks.start(user, lambda task: _check(session, root, bool(data.get("person")), task))
        case "mirrored":
            return tasks.start(user, lambda task: _mirrored(session, root, task))
        case "buckets":
            return tasks.start(user, lambda task: _buckets(session, root, data))
        case "copies":
            return tasks.start(user, lambda task: _copies(session, root, data, task))
    raise ConfigError("the page asked for something that does not exist: reload it")
