"""What the Captioning tab asks of the server: look, edit, preview, write, caption, mask.

The browser is not trusted: folders are those of the settings, inside what may be named; names are checked
where they are used; nothing is written before `_writable` has agreed.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import json
import shutil
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from app.paths import HUB_NAME, Paths
from app.session import Session
from app.shell import page_of
from app.view import alert, served
from trainer.errors import ConfigError, DatasetError, TrainerError
from trainer.events import counted
from trainer.files import REPOSITORY, atomic_path, atomic_write

if TYPE_CHECKING:
    from trainer.captioning.captions import Caption, Captions, Change, Edit
    from trainer.captioning.work import CaptionWork
    from trainer.data.types import Subset
    from trainer.job import Job

__all__ = ["DEMO_CAPTIONER", "KIND", "answer", "captioner_facts", "work"]

KIND = "captions"
DEMO_CAPTIONER = REPOSITORY / "assets" / "demo" / "captioner" / "blip"
SHIPPED = REPOSITORY / "assets"
THUMBNAIL_PX, PREVIEW_PX = 160, 900
THUMBNAILS_AT_ONCE = 60
SHOWN_EDITS = 200
OWN_HABITS = 100


def captioner_facts() -> list[dict[str, Any]]:
    """What the page needs to lay the captioners' settings out: from their own classes."""
    from trainer.captioning.captioners import CAPTIONERS

    found = []
    for name in CAPTIONERS.names():
        plugin = CAPTIONERS.get(name)
        schema = plugin.options_class.model_json_schema()
        found.append(
            {
                "name": name,
                "title": plugin.title,
                "about": plugin.about,
                "writes": plugin.writes,
                "models": list(plugin.models),
                "fields": [{"name": key, **value} for key, value in schema["properties"].items()],
            }
        )
    return sorted(found, key=lambda item: item["title"] != "BLIP")  # what the guide uses comes first


def work(settings: str, base: Path, paths: Paths) -> CaptionWork:
    """The captioning that stands in the list of runs; see `app.works`.

    Raises:
        ConfigError: It cannot be used, or names files that may not be.
    """
    from trainer.captioning.work import CaptionWork

    found = CaptionWork.from_json(settings, base)
    for folder in found.folders:
        paths.resolve(str(folder), write=True)
    model = found.settings.model.strip()
    if HUB_NAME.fullmatch(model) is None or (base / model).exists():
        paths.resolve(model, base=base)
    return found


def answer(session: Session, data: Mapping[str, Any], user: str) -> dict[str, Any]:
    """What the tab's script gets for what it asks.

    Args:
        session: The server's state.
        data: ``do`` says what; ``sent`` holds the settings as they stand in the browser.
        user: Who is logged in.

    Raises:
        TrainerError: One sentence for the page.
    """
    what = data.get("do")
    if what == "progress":
        return _progress(session)
    if what == "stop":
        return _stop(session, user)
    acts: dict[Any, Callable[[_Set], dict[str, Any]]] = {
        "look": lambda found: found.look(),
        "tokens": lambda found: found.tokens(),
        "count": lambda found: found.count(_text(data, "text")),
        "table": lambda found: found.table(_items(data)),
        "thumbnails": lambda found: found.thumbnails(_items(data)),
        "open": lambda found: found.open(*_item(data)),
        "save": lambda found: found.save(*_item(data), data.get("before"), _text(data, "text")),
        "restore": lambda found: found.restore(*_item(data), data.get("version")),
        "plan": lambda found: found.plan(_items(data), data.get("operation")),
        "apply": lambda found: found.apply(_items(data), data.get("operation"), data.get("digest")),
        "undo": lambda found: found.step(-1),
        "redo": lambda found: found.step(+1),
        "habits": lambda found: found.keep_habits(data.get("phrases")),
        "start": lambda found: found.start(data, user),
        "copy": lambda found: found.copy(),
        "mask": lambda found: found.save_mask(*_item(data), _text(data, "png", 16_000_000)),
        "unmask": lambda found: found.remove_mask(*_item(data)),
    }
    if what not in acts:
        raise ConfigError("the page asked for something that does not exist: reload it")
    return acts[what](_Set(session, data.get("sent")))


def _text(data: Mapping[str, Any], name: str, limit: int = 100_000) -> str:
    found = data.get(name)
    if not isinstance(found, str) or len(found) > limit:
        raise ConfigError(f"{name} is missing or too long: reload the page")
    return found


def _item(data: Mapping[str, Any]) -> tuple[str, str]:
    return _text(data, "folder"), _text(data, "name")


def _items(data: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The captions that something is about: pairs of folder and name."""
    found = data.get("items")
    if not isinstance(found, list) or not all(
        isinstance(pair, list) and len(pair) == 2 and all(isinstance(part, str) for part in pair)
        for pair in found
    ):
        raise ConfigError("the page did not say which captions it means: reload it")
    return [(pair[0], pair[1]) for pair in found]


class _Set:
    """The data set of the settings that a page sent."""

    def __init__(self, session: Session, sent: Any) -> None:
        from trainer.captioning.captions import Captions
        from trainer.captioning.work import caption_extension
        from trainer.data import folder
        from trainer.data.dataset_config import apply_dataset_config
        from trainer.job import Job

        config, self.base = page_of(sent)
        self.session = session
        if not config.train_data_dir.strip() and not config.dataset_config.strip():
            raise DatasetError("no pictures are chosen yet: bring some in on the Dataset tab")
        # What is wrong with other settings is no reason to hide the captions.
        job, _ = Job.draft(session.paths.expand(config), base=self.base)
        session.paths.check(job)
        self.job: Job = apply_dataset_config(job)
        self.extension = caption_extension(config.caption_extension)
        self.subsets: dict[str, Subset] = {}
        for subset in folder.subsets(self.job):
            session.paths.resolve(str(subset.folder))
            self.subsets.setdefault(str(subset.folder.resolve()), subset)
        self.captions: dict[str, Captions] = {
            text: Captions(Path(text), caption_extension(subset.caption_extension))
            for text, subset in self.subsets.items()
        }

    # ---- looking ---------------------------------------------------------------------------------------

    def look(self) -> dict[str, Any]:
        """All captions, and what can be undone."""
        own = _own_habits(self.session)
        folders, entries = [], []
        for text, captions in self.captions.items():
            subset = self.subsets[text]
            folders.append({"path": text, "name": subset.folder.name, "tokens": subset.class_tokens or ""})
            entries += [self._entry(text, caption, own) for caption in captions.all()]
        undo, redo = self._steps()
        demo = self.job.path(self.job.config.pretrained_model_name_or_path.strip() or ".")
        return {
            "folders": folders,
            "captions": entries,
            "undo": undo.by if undo else "",
            "redo": redo.by if redo else "",
            "own": own,
            "extension": self.extension,
            "shipped": self._shipped(),
            "demo": demo.resolve().is_relative_to(SHIPPED / "demo"),
        }

    def _entry(self, folder: str, caption: Caption, own: Sequence[str]) -> dict[str, Any]:
        from trainer.captioning import habits

        return {
            "folder": folder,
            "name": caption.name,
            "picture": caption.picture.name,
            "text": caption.text,
            "exists": caption.exists,
            "problem": caption.problem,
            "source": caption.source,
            "by": caption.by,
            "time": caption.time,
            "habits": [{"name": name, "words": words} for name, words in habits.found(caption.text, own)]
            if caption.exists and not caption.problem
            else [],
        }

    def tokens(self) -> dict[str, Any]:
        """The length of every caption in the text encoder's tokens."""
        from trainer.captioning.lengths import ruler

        measure = ruler(self.job)
        counts = {}
        for text, captions in self.captions.items():
            found = captions.all()
            lengths = measure.count([caption.text for caption in found])
            counts[text] = {caption.name: length for caption, length in zip(found, lengths, strict=True)}
        return {"counts": counts, "limit": measure.limit, "of": measure.name}

    def count(self, text: str) -> dict[str, Any]:
        """The length of one text."""
        from trainer.captioning.lengths import ruler

        measure = ruler(self.job)
        return {"count": measure.count([text])[0], "limit": measure.limit, "of": measure.name}

    def _chosen(self, items: Sequence[tuple[str, str]]) -> dict[str, list[Caption]]:
        """Captions by folder; those that are gone are left out."""
        wanted: dict[str, set[str]] = {}
        for folder, name in items:
            wanted.setdefault(self._folder(folder), set()).add(name)
        return {
            folder: [caption for caption in self.captions[folder].all() if caption.name in names]
            for folder, names in wanted.items()
        }

    def _folder(self, text: str) -> str:
        if text not in self.captions:
            raise DatasetError("the settings name other folders now: look at the captions again")
        return text

    def table(self, items: Sequence[tuple[str, str]]) -> dict[str, Any]:
        """The tags of some captions."""
        from trainer.captioning.changes import table

        found = [caption for captions in self._chosen(items).values() for caption in captions]
        return {"tags": table(found), "of": len(found)}

    def thumbnails(self, items: Sequence[tuple[str, str]]) -> dict[str, Any]:
        """Addresses of small pictures; "" where one cannot be read."""
        return {
            "urls": [
                self._small(self._picture(folder, name), THUMBNAIL_PX)
                for folder, name in items[:THUMBNAILS_AT_ONCE]
            ]
        }

    def _picture(self, folder: str, name: str) -> Path:
        return self.captions[self._folder(folder)].get(name).picture

    def _small(self, picture: Path, longest_px: int) -> str:
        from PIL import Image

        from trainer.data.images import read_rgb
        from trainer.pictures import edits

        try:
            edit, stat = edits.load(picture.parent).of(picture.name), picture.stat()
            key = json.dumps([str(picture), stat.st_mtime_ns, stat.st_size, edit.key(), longest_px])
            target = self.session.thumbnails / f"{hashlib.sha256(key.encode()).hexdigest()[:32]}.webp"
            if not target.exists():
                small = Image.fromarray(edit.apply(read_rgb(picture)))
                small.thumbnail((longest_px, longest_px))
                with atomic_path(target) as temporary:
                    small.save(temporary, "WEBP", quality=85)
            return served(target)
        except (TrainerError, OSError):
            return ""

    def open(self, folder: str, name: str) -> dict[str, Any]:
        """One picture large, its caption's history, and its mask."""
        from trainer.captioning.changes import diff

        captions = self.captions[self._folder(folder)]
        caption = captions.get(name)
        story, history = captions.history(name), []
        for index, version in enumerate(story):
            before = story[index - 1].text if index else None
            history.append(
                {
                    "text": version.text,
                    "source": version.source,
                    "by": version.by,
                    "time": version.time,
                    "runs": diff(before or "", version.text or "") if index else [],
                }
            )
        return {
            "url": self._small(caption.picture, PREVIEW_PX),
            "caption": self._entry(folder, caption, _own_habits(self.session)),
            "history": history,
            "mask": self._mask(folder, caption.picture),
        }

    # ---- writing ---------------------------------------------------------------------------------------

    def _writable(self, folder: str) -> Captions:
        captions = self.captions[self._folder(folder)]
        if self._shipped():
            raise DatasetError("these pictures belong to the program: work on a copy of them")
        self.session.paths.resolve(folder, write=True)
        return captions

    def _shipped(self) -> bool:
        return any(Path(folder).is_relative_to(SHIPPED) for folder in self.captions)

    def save(self, folder: str, name: str, before: Any, text: str) -> dict[str, Any]:
        """Write what a person typed, unless the file says something else by now."""
        from trainer.captioning.captions import Edit

        captions = self._writable(folder)
        captions.get(name)
        written = captions.write([Edit(name, before if isinstance(before, str) else None, text)], "edited")
        if written.kept:
            raise DatasetError(
                f"{name} was changed by somebody else in the meantime: it is shown as it is now; type again"
            )
        return self._changed([(folder, name)])

    def restore(self, folder: str, name: str, index: Any) -> dict[str, Any]:
        """Write an older version of a caption again."""
        from trainer.captioning.captions import Edit

        captions = self._writable(folder)
        story = captions.history(name)
        if type(index) is not int or not 0 <= index < len(story):
            raise DatasetError("that version is gone: open the caption again")
        when = time.strftime("%Y-%m-%d %H:%M", time.localtime(story[index].time))
        captions.write([Edit(name, story[-1].text, story[index].text)], f"back to {when}")
        return self._changed([(folder, name)])

    def _changed(self, items: Sequence[tuple[str, str]], **more: Any) -> dict[str, Any]:
        """Captions as they are after a change, for the page."""
        own = _own_habits(self.session)
        undo, redo = self._steps()
        return {
            "changed": [
                self._entry(folder, caption, own)
                for folder, found in self._chosen(items).items()
                for caption in found
            ],
            "undo": undo.by if undo else "",
            "redo": redo.by if redo else "",
            **more,
        }

    def plan(self, items: Sequence[tuple[str, str]], data: Any) -> dict[str, Any]:
        """What an operation would do, to be looked at before it is done."""
        from trainer.captioning import changes

        operation = changes.parse(data)
        edits = self._edits(items, operation)
        shown = [
            {
                "folder": folder,
                "name": edit.name,
                "runs": changes.diff(edit.before or "", edit.after or ""),
            }
            for folder, found in edits.items()
            for edit in found
        ]
        return {
            "edits": shown[:SHOWN_EDITS],
            "count": len(shown),
            "of": len(items),
            "words": changes.words(operation),
            "digest": _digest(edits),
        }

    def _edits(self, items: Sequence[tuple[str, str]], operation: Any) -> dict[str, list[Edit]]:
        from trainer.captioning.changes import plan

        return {folder: plan(found, operation) for folder, found in self._chosen(items).items()}

    def apply(self, items: Sequence[tuple[str, str]], data: Any, digest: Any) -> dict[str, Any]:
        """Do what was previewed, and nothing else."""
        from trainer.captioning import changes

        operation = changes.parse(data)
        edits = self._edits(items, operation)
        if _digest(edits) != digest:
            raise DatasetError("captions have changed since the preview: look at it again")
        change, by = uuid.uuid4().hex[:12], changes.words(operation)
        touched: list[tuple[str, str]] = []
        for folder, found in edits.items():
            written = self._writable(folder).write(found, by, "edit", change)
            touched += [(folder, name) for name in (*written.done, *written.kept)]
        return self._changed(touched, message=f"{counted(len(touched), 'caption')}: {by}")

    def _steps(self) -> tuple[Change | None, Change | None]:
        """The newest change of all folders, and the oldest that was taken back."""
        steps = [captions.changes() for captions in self.captions.values()]
        done = [step[0] for step in steps if step[0] is not None]
        undone = [step[1] for step in steps if step[1] is not None]
        return (
            max(done, key=lambda change: change.time) if done else None,
            min(undone, key=lambda change: change.time) if undone else None,
        )

    def step(self, by: int) -> dict[str, Any]:
        """Undo, or redo, in all folders that the change was about."""
        change = self._steps()[0 if by < 0 else 1]
        if change is None:
            raise DatasetError(f"there is nothing to {'undo' if by < 0 else 'do again'}")
        touched: list[tuple[str, str]] = []
        kept = 0
        for folder, captions in self.captions.items():
            mine = captions.changes()[0 if by < 0 else 1]
            if mine is None or mine.id != change.id:
                continue
            writable = self._writable(folder)
            written = writable.undo() if by < 0 else writable.redo()
            if written is not None:
                touched += [(folder, name) for name in (*written.done, *written.kept)]
                kept += len(written.kept)
        message = f"{'taken back' if by < 0 else 'done again'}: {change.by} ({len(touched) - kept})"
        if kept:
            message += f"; {counted(kept, 'caption')} changed since, which stay as they are"
        return self._changed(touched, message=message)

    def keep_habits(self, phrases: Any) -> dict[str, Any]:
        """Remember a person's own phrases."""
        if not isinstance(phrases, list) or not all(isinstance(phrase, str) for phrase in phrases):
            raise ConfigError("the phrases are missing: reload the page")
        kept = list(dict.fromkeys(phrase.strip()[:200] for phrase in phrases if phrase.strip()))[:OWN_HABITS]
        atomic_write(_habits_file(self.session), json.dumps(kept, ensure_ascii=False, indent=1))
        return self.look()

    # ---- masks ----------------------------------------------------------------------------------------

    def _mask(self, folder: str, picture: Path) -> dict[str, Any]:
        from PIL import Image

        from trainer.captioning import masks
        from trainer.data.folder import mask_file
        from trainer.data.images import read_size

        subset, problem = self.subsets[folder], ""
        try:
            file = mask_file(subset, picture, read_size(picture))
            mask = masks.read(picture, file, subset, masked_loss=self.job.config.masked_loss)
        except TrainerError as error:
            problem = str(error)
            return {"kind": "none", "trained": False, "words": problem, "url": "", "problem": problem}
        url = ""
        if mask.values_HW is not None:
            small = Image.fromarray(mask.values_HW)
            small.thumbnail((PREVIEW_PX, PREVIEW_PX))
            name = hashlib.sha256(small.tobytes() + str(small.size).encode()).hexdigest()[:32]
            target = self.session.thumbnails / f"mask-{name}.webp"
            if not target.exists():
                with atomic_path(target) as temporary:
                    small.save(temporary, "WEBP", lossless=True)
            url = served(target)
        return {"kind": mask.kind, "trained": mask.trained, "words": mask.words, "url": url, "problem": ""}

    def save_mask(self, folder: str, name: str, data: str) -> dict[str, Any]:
        """Keep a mask that was drawn on the page."""
        from trainer.captioning import masks

        self._writable(folder)
        picture = self._picture(folder, name)
        try:
            content = base64.b64decode(data.partition(",")[2], validate=True)
        except (binascii.Error, ValueError) as error:
            raise DatasetError("the mask did not arrive as a picture: draw it again") from error
        masks.save(picture, content)
        return self._masked(folder, picture)

    def remove_mask(self, folder: str, name: str) -> dict[str, Any]:
        """Take a drawn mask away."""
        from trainer.captioning import masks

        self._writable(folder)
        picture = self._picture(folder, name)
        masks.remove(picture)
        return self._masked(folder, picture)

    def _masked(self, folder: str, picture: Path) -> dict[str, Any]:
        return {"mask": self._mask(folder, picture)}

    # ---- captioning -----------------------------------------------------------------------------------

    def start(self, data: Mapping[str, Any], user: str) -> dict[str, Any]:
        """Put a captioning into the queue; asks back where a person's captions would be replaced."""
        from trainer.captioning.work import CaptionSettings, CaptionWork

        values = data.get("values")
        if not isinstance(values, dict):
            raise ConfigError("the captioner's settings are missing: reload the page")
        for folder in self.captions:
            self._writable(folder)
        names: dict[str, tuple[str, ...]] | None = None
        if data.get("items") is not None:
            chosen = self._chosen(_items(data))
            names = {folder: tuple(caption.name for caption in found) for folder, found in chosen.items()}
        try:
            settings = CaptionSettings.model_validate(
                {
                    **values,
                    "folders": tuple(self.captions) if names is None else tuple(names),
                    "names": names,
                    "extension": self.extension,
                }
            )
        except ValueError as error:
            raise ConfigError(f"the captioner's settings cannot be used: {error}") from error
        text = CaptionWork.settings_json(settings)
        found = work(text, self.base, self.session.paths)
        wanted = [caption for _, chosen in found.wanted() for caption in chosen]
        if not wanted:
            raise DatasetError(
                "every picture has a caption that is to be kept: choose what happens to captions that are there"
            )
        own = sum(1 for item in wanted if item.exists and item.text.strip() and not item.machine)
        if own and not settings.append and data.get("confirmed") is not True:
            return {
                "ask": f"{counted(own, 'caption')} that no captioner wrote will be replaced. Undo brings them back."
            }
        run = self.session.enqueue(KIND, text, self.base, user)
        waits = self.session.queue.get(run.id)
        waiting = waits is not None and waits.status == "waiting"
        return {"message": "waits for the run before it" if waiting else "", "count": len(wanted)}

    def copy(self) -> dict[str, Any]:
        """A copy of the program's own pictures that may be written to; its folder goes into the settings."""
        paths = self.session.paths
        if paths.confined and not paths.roots:
            raise ConfigError("this server has no folder to copy to: start it with --root NAME=PATH")
        place = next(iter(paths.roots.values())) if paths.confined else self.session.state
        source = self.job.path(self.job.config.train_data_dir.strip())
        if not source.resolve().is_relative_to(SHIPPED):
            raise ConfigError("these pictures are no part of the program: there is no need for a copy")
        target = (
            paths.resolve(str(place / "demo pictures"), write=True)
            if paths.confined
            else place / "demo pictures"
        )
        if not target.exists():
            unfinished = target.with_name(f"{target.name}.tmp")
            shutil.rmtree(unfinished, ignore_errors=True)
            try:
                shutil.copytree(source, unfinished, ignore=shutil.ignore_patterns("*.npz", ".kiln"))
                unfinished.replace(target)
            except OSError as error:
                raise DatasetError(f"the pictures cannot be copied to {target}: {error}") from error
        return {"set": {"train_data_dir": str(target)}, "message": f"the pictures are copied to {target}"}


def _digest(edits: Mapping[str, Sequence[Edit]]) -> str:
    plain = [
        [folder, edit.name, edit.before, edit.after] for folder, found in edits.items() for edit in found
    ]
    return hashlib.sha256(json.dumps(plain).encode()).hexdigest()


def _habits_file(session: Session) -> Path:
    return session.state / "habits.json"


def _own_habits(session: Session) -> list[str]:
    try:
        found = json.loads(_habits_file(session).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return []
    return [item for item in found if isinstance(item, str)][:OWN_HABITS] if isinstance(found, list) else []


def _progress(session: Session) -> dict[str, Any]:
    """How far the captioning is that goes on or was the last."""
    waiting = [run for run in session.queue.waiting() if run.kind == KIND]
    view = session.view
    if view.run is None or view.run.kind != KIND:
        message = "waits for the run before it" if waiting else ""
        return {
            "going": bool(waiting),
            "html": alert("", message) if message else "",
            "run": 0,
            "stops": True,
        }
    view.update()
    going = view.end is None
    return {
        "going": going or bool(waiting),
        "html": view.progress_html(session.doing if going else "idle") + view.notices_html(),
        "run": view.run.id,
        "done": view.done,
        "ended": not going,
        "stops": session.doing != "stopping",
    }


def _stop(session: Session, user: str) -> dict[str, Any]:
    run = session.queue.running()
    if run is not None and run.kind == KIND:
        if refusal := session.stop(user):
            raise ConfigError(refusal)
        return {"message": "stops after this picture"}
    mine = [item for item in session.queue.waiting() if item.kind == KIND and session.may(user, item)]
    for item in mine:
        session.queue.remove(item.id)
    return {"message": "taken off the list" if mine else "no captioning goes on"}
