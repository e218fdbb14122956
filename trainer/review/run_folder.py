"""Opening a run: what a results folder holds, ours by its journal, anybody's by the names of its files.

Kohya's folders have no journal: a picture's step stands in its name, a file's in its metadata, and
where only an epoch is given, the steps of an epoch come from a file that names both.
Names: sd-scripts, library/train_util.py:sample_image_inference, get_epoch_ckpt_name, get_step_ckpt_name.
"""

from __future__ import annotations

import json
import math
import re
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

from PIL import Image
from safetensors import SafetensorError, safe_open

from trainer import config as configuration
from trainer import prompts
from trainer.config import KohyaConfig
from trainer.errors import ConfigError
from trainer.events import (
    Event,
    JobFailed,
    JobFinished,
    JobStarted,
    JobStopped,
    SampleReady,
    StepDone,
    read_journal,
)

__all__ = [
    "Checkpoint",
    "Picture",
    "Point",
    "Row",
    "RunFolder",
    "SavedState",
    "open_run",
    "read_header",
]

LORA_ENDINGS = (".safetensors", ".ckpt", ".pt")
KEPT = "kept.json"
"""Beside the results: step and epoch of files whose new name does not say them."""
LARGEST_FOLDER = 20_000
"""Entries that are looked at; a folder with more is no results folder."""

SAMPLE = re.compile(
    r"(?:(?P<name>.+)_)?(?P<epoch>e)?(?P<number>\d{6,})_(?P<index>\d{2,})_(?P<stamp>\d{14})(?:_(?P<seed>-?\d+))?"
)
NUMBERED = re.compile(r"(?P<name>.+?)-(?:step(?P<step>\d{8,})|(?P<epoch>\d{6,}))(?:-last-good)?")
SETTINGS = re.compile(r"(?P<name>.+)_(?P<stamp>\d{8}-\d{6})")
RUN_LOGS = re.compile(r"(?P<name>.+)-(?P<stamp>\d{8}-\d{6})")


@dataclass(frozen=True, kw_only=True)
class Picture:
    """A sample picture."""

    path: Path
    step: int
    index: int
    """Number of its prompt."""
    seed: int | None
    prompt: str


@dataclass(frozen=True, kw_only=True)
class Row:
    """The pictures of one prompt, drawn from one seed where the prompt gives one, by step."""

    prompt: str
    seed: int | None
    pictures: Mapping[int, Picture]


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """A saved LoRA file."""

    path: Path
    step: int
    epoch: int | None
    size_bytes: int
    metadata: Mapping[str, str] = field(default_factory=dict, repr=False)


@dataclass(frozen=True, kw_only=True)
class SavedState:
    """A state folder."""

    path: Path
    step: int


@dataclass(frozen=True, kw_only=True)
class Point:
    """What was logged at a step; NaN where it was not."""

    step: int
    loss: float = math.nan
    average: float = math.nan
    lr: Mapping[str, float] = field(default_factory=dict)
    validation: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class RunFolder:
    """A run as its results folder tells it."""

    folder: Path
    name: str
    names: tuple[str, ...]
    """All runs whose files lie in the folder, the newest first."""
    pictures: tuple[Picture, ...]
    checkpoints: tuple[Checkpoint, ...]
    """By step, the last one last."""
    states: tuple[SavedState, ...]
    points: tuple[Point, ...]
    config: KohyaConfig | None
    config_file: Path | None
    metadata: Mapping[str, str]
    """Of the last LoRA file that has any."""
    journal: Path | None
    """The newest one; None for a run of another program."""
    last_step: int
    """As far as the run is known to have come."""
    planned_steps: int | None
    end: str = ""
    """How it ended: "finished", "stopped", "failed"; "" where it goes on or nothing tells."""
    prompt_text: str = ""
    """Its sample prompts as they were written, one a line; "" where they are not known."""
    origin_step: int = 0
    """Step of the file that it went on from; 0 where it began anew."""
    earlier: tuple[Point, ...] = ()
    """What was logged up to `origin_step` by the runs that it went on from, where they are still to be found."""

    @property
    def steps(self) -> tuple[int, ...]:
        """Steps at which pictures were drawn."""
        return tuple(sorted({picture.step for picture in self.pictures}))

    @property
    def rows(self) -> tuple[Row, ...]:
        """A row for each prompt; an edited prompt, or another seed, begins a new one."""
        found: dict[tuple[int, str, int | None], dict[int, Picture]] = {}
        fixed: dict[tuple[int, str], set[int | None]] = {}
        for picture in self.pictures:
            fixed.setdefault((picture.index, picture.prompt), set()).add(picture.seed)
        counts: dict[tuple[int, str], int] = {}
        for picture in self.pictures:
            counts[picture.index, picture.prompt] = counts.get((picture.index, picture.prompt), 0) + 1
        for picture in self.pictures:
            place = picture.index, picture.prompt
            # A seed of its own for every picture: the prompt gives none.
            drawn = len(fixed[place]) > 1 and len(fixed[place]) == counts[place]
            found.setdefault((*place, None if drawn else picture.seed), {})[picture.step] = picture
        order = sorted(found.items(), key=lambda item: (item[0][0], min(item[1])))
        return tuple(Row(prompt=key[1], seed=key[2], pictures=pictures) for key, pictures in order)

    def nearest(self, step: int) -> Checkpoint | None:
        """The saved file nearest to a step; of two, the earlier one."""
        return min(self.checkpoints, key=lambda each: (abs(each.step - step), each.step), default=None)

    def checkpoint(self, name: str) -> Checkpoint:
        """The saved file of a name.

        Raises:
            ConfigError: There is none.
        """
        found = next((each for each in self.checkpoints if each.path.name == name), None)
        if found is None:
            raise ConfigError(f"{name} is no file of this run any more: open the run again")
        return found


def read_header(path: Path) -> dict[str, str]:
    """Metadata of a LoRA file; empty where it has none or cannot be read. Imports no torch."""
    if path.suffix.lower() != ".safetensors":
        return {}
    try:
        with safe_open(path, framework="numpy") as file:
            return dict(file.metadata() or {})
    except (SafetensorError, OSError, ValueError):
        return {}


def open_run(
    folder: Path, name: str = "", *, may_read: Callable[[Path], bool] = lambda path: True
) -> RunFolder:
    """Read a results folder.

    Args:
        folder: The folder, or a file in it: a LoRA, the JSON, the journal.
        name: The run's output_name, where the folder holds several; the newest if empty.
        may_read: Whether a file outside the folder that the settings name may be read.

    Raises:
        ConfigError: It is no results folder, or holds no run of that name.
    """
    folder, name = _place(folder, name)
    try:
        entries = [path for path in folder.iterdir() if not path.name.startswith(".")][:LARGEST_FOLDER]
        samples = list((folder / "sample").iterdir()) if (folder / "sample").is_dir() else []
    except OSError as error:
        raise ConfigError(f"{folder} cannot be read: {error.strerror or error}") from error
    files = [path for path in entries if path.suffix.lower() in LORA_ENDINGS and path.is_file()]
    headers = {path: read_header(path) for path in files}
    owners = _owners(folder, entries, headers, samples)
    if not owners:
        raise ConfigError(
            f"{folder} holds no run: choose the folder with the LoRA files and sample pictures (output_dir)"
        )
    names = tuple(sorted(owners, key=lambda each: (owners[each], each), reverse=True))
    if name and name not in names:
        raise ConfigError(f"{folder} holds no run called {name}: there are {', '.join(names[:10])}")
    name = name or names[0]
    config_file = _settings_file(entries, name)
    config = _read_settings(config_file)
    journals = _journals(folder, name)
    history = _History.read(journals)
    checkpoints = _checkpoints(folder, name, headers, history)
    metadata = next((each.metadata for each in reversed(checkpoints) if each.metadata), {})
    per_epoch = _steps_per_epoch(checkpoints, config)
    wanted, prompt_text = _prompts(folder, config, config_file, may_read)
    pictures = _pictures(name, samples, wanted, config, per_epoch, history)
    points = history.points or _tensorboard(folder, config, config_file, may_read)
    steps = [picture.step for picture in pictures] + [each.step for each in checkpoints]
    steps += [point.step for point in points]
    return RunFolder(
        folder=folder,
        name=name,
        names=names,
        pictures=pictures,
        checkpoints=checkpoints,
        states=_states(entries, name, config),
        points=points,
        config=config,
        config_file=config_file,
        metadata=metadata,
        journal=journals[-1] if journals else None,
        last_step=max(steps, default=0),
        planned_steps=history.planned or _whole(metadata.get("ss_max_train_steps")),
        end=history.end,
        prompt_text=prompt_text,
        origin_step=config.origin_step if config is not None and config.network_weights.strip() else 0,
        earlier=_earlier(config, config_file, may_read),
    )


def _place(path: Path, name: str) -> tuple[Path, str]:
    """The results folder of whatever was named, and the run's name where the file tells it."""
    if path.name == "journal.jsonl":
        match = RUN_LOGS.fullmatch(path.parent.name)
        return path.parent.parent.parent, name or (match["name"] if match else "")
    if path.is_file():
        found = name
        if path.suffix.lower() == ".json" and (match := SETTINGS.fullmatch(path.stem)):
            found = name or match["name"]
        elif path.suffix.lower() in LORA_ENDINGS:
            found = name or _name_of(path, read_header(path))
        return path.parent, found
    if path.name == "sample" and path.is_dir():
        return path.parent, name
    if not path.is_dir():
        raise ConfigError(f"there is no folder {path}: check the path")
    return path, name


def _name_of(path: Path, header: Mapping[str, str]) -> str:
    written = header.get("ss_output_name", "")
    if written and written != "None":
        return written
    match = NUMBERED.fullmatch(path.stem)
    return match["name"] if match else path.stem


def _owners(
    folder: Path, entries: Iterable[Path], headers: Mapping[Path, Mapping[str, str]], samples: Iterable[Path]
) -> dict[str, float]:
    """Names of the runs in a folder, and when each last wrote something."""
    found: dict[str, float] = {}

    def note(name: str, path: Path) -> None:
        try:
            found[name] = max(found.get(name, 0.0), path.stat().st_mtime)
        except OSError:
            return

    for path, header in headers.items():
        # A file without Kohya's entries may be any model, unless it is named as Kohya names LoRA files.
        if header.get("ss_network_module") or NUMBERED.fullmatch(path.stem):
            note(_name_of(path, header), path)
    for path in entries:
        match = SETTINGS.fullmatch(path.stem) if path.suffix.lower() == ".json" else None
        if match:
            note(match["name"], path)
    for path in samples:
        match = SAMPLE.fullmatch(path.stem)
        if match and path.suffix.lower() == ".png":
            note(match["name"] or "last", path)
    for path in (folder / "logs").glob("*/journal.jsonl"):
        match = RUN_LOGS.fullmatch(path.parent.name)
        if match:
            note(match["name"], path)
    return found


def _settings_file(entries: Iterable[Path], name: str) -> Path | None:
    """The newest JSON that Kohya's page or ours left for a run."""
    stamped = []
    for path in entries:
        match = SETTINGS.fullmatch(path.stem) if path.suffix.lower() == ".json" else None
        if match and match["name"] == name:
            stamped.append((match["stamp"], path))
    return max(stamped)[1] if stamped else None


def _read_settings(path: Path | None) -> KohyaConfig | None:
    if path is None:
        return None
    try:
        return configuration.load(path).config
    except ConfigError:
        return None  # the rest of the run can be shown all the same


# ---- the journal -------------------------------------------------------------------------------


def _journals(folder: Path, name: str) -> list[Path]:
    found = []
    for path in (folder / "logs").glob("*/journal.jsonl"):
        match = RUN_LOGS.fullmatch(path.parent.name)
        if match and match["name"] == name:
            found.append((match["stamp"], path))
    return [path for _, path in sorted(found)]


@dataclass(frozen=True, kw_only=True)
class _History:
    """What the journals of a run tell: the last one that began anew, and those that went on from it."""

    points: tuple[Point, ...] = ()
    samples: Mapping[str, SampleReady] = field(default_factory=dict)
    """By file name: a folder may have been moved since."""
    since: str = ""
    """Stamp of the run's beginning, YYYYmmddHHMMSS; pictures before it belong to a run before."""
    started: float = 0.0
    planned: int | None = None
    end: str = ""

    @classmethod
    def read(cls, journals: Sequence[Path]) -> _History:
        points: dict[int, Point] = {}
        samples: dict[str, SampleReady] = {}
        since, started, planned, end = "", 0.0, None, ""
        for path in journals:
            try:
                events = list(read_journal(path))
            except OSError:
                continue
            begun = next((event for event in events if isinstance(event, JobStarted)), None)
            if begun is None:  # it failed before its first step
                end = end or _end_of(events)
                continue
            end, planned = _end_of(events), begun.steps
            goes_on = begun.first_step > 0 and bool(points)
            points = {step: each for step, each in points.items() if goes_on and step <= begun.first_step}
            if not goes_on:
                match = RUN_LOGS.fullmatch(path.parent.name)
                since = match["stamp"].replace("-", "") if match else ""
                started = events[0].time
                samples = {}
            for event in events:
                if isinstance(event, SampleReady):
                    samples[event.path.name] = event
                elif isinstance(event, StepDone):
                    points[event.step] = _point(event)
        ordered = tuple(points[step] for step in sorted(points))
        return cls(points=ordered, samples=samples, since=since, started=started, planned=planned, end=end)


def _end_of(events: Sequence[Event]) -> str:
    ends = {JobFinished: "finished", JobStopped: "stopped", JobFailed: "failed"}
    return next((ends[type(event)] for event in reversed(events) if type(event) in ends), "")


def _point(event: StepDone) -> Point:
    validation = {name: value for name, value in event.extra.items() if "validation" in name}
    return Point(step=event.step, loss=event.loss, average=event.avr_loss, lr=event.lr, validation=validation)


def _earlier(
    config: KohyaConfig | None,
    config_file: Path | None,
    may_read: Callable[[Path], bool],
    seen: frozenset[tuple[Path, str]] = frozenset(),
) -> tuple[Point, ...]:
    """What the run logged whose file a run went on from, and the runs before that one."""
    if config is None or config_file is None or not (config.origin_step and config.network_weights.strip()):
        return ()
    file = Path(config.network_weights.strip()).expanduser()
    file = file if file.is_absolute() else config_file.parent / file
    folder = file.parent
    if not may_read(file) or not may_read(folder):
        return ()
    noted = _kept(folder).get(file.name)
    # A file may have been renamed, or put into the trash, since.
    name = (
        str(noted["run"]) if isinstance(noted, dict) and "run" in noted else _name_of(file, read_header(file))
    )
    if (folder, name) in seen:
        return ()
    try:
        before_file = _settings_file(list(folder.iterdir()), name)
    except OSError:
        return ()
    before = _read_settings(before_file)
    points = _History.read(_journals(folder, name)).points
    points = points or _tensorboard(folder, before, before_file, may_read)
    first = _earlier(before, before_file, may_read, seen | {(folder, name)})
    return tuple(point for point in (*first, *points) if point.step <= config.origin_step)


# ---- files -----------------------------------------------------------------------------------------


def _whole(value: Any) -> int | None:
    try:
        return int(str(value))
    except ValueError:
        return None


def _kept(folder: Path) -> Mapping[str, Any]:
    try:
        found = json.loads((folder / KEPT).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _checkpoints(
    folder: Path, name: str, headers: Mapping[Path, Mapping[str, str]], history: _History
) -> tuple[Checkpoint, ...]:
    """The run's LoRA files; their steps are told by metadata, then by names."""
    kept = _kept(folder)
    mine: list[tuple[Path, Mapping[str, str], int | None, int | None]] = []
    for path, header in headers.items():
        match = NUMBERED.fullmatch(path.stem)
        noted = kept.get(path.name) if isinstance(kept.get(path.name), dict) else {}
        is_mine = _name_of(path, header) == name or (noted or {}).get("run") == name
        if not is_mine:
            continue
        begun = header.get("ss_training_started_at", "")
        if history.started and _number(begun) and _number(begun) < history.started - 60:
            continue  # left by a run of the same name before this one
        step = _whole(header.get("ss_steps")) or _whole((noted or {}).get("step"))
        epoch = _whole((noted or {}).get("epoch"))
        if match and match["name"] == name:
            step = step or _whole(match["step"])
            epoch = _whole(match["epoch"]) if match["epoch"] else epoch
        mine.append((path, header, step, epoch))
    found = []
    per_epoch = [step / epoch for _, _, step, epoch in mine if step and epoch]
    last = max((step or 0 for _, _, step, _ in mine), default=0)
    if history.points:
        last = max(last, history.points[-1].step)
    for path, header, step, epoch in mine:
        if not step:
            step = round(epoch * median(per_epoch)) if epoch and per_epoch else last
        # sd-scripts counts the epochs of files saved at a step from 0.
        if epoch is None and not re.search(r"-step\d{8,}", path.stem):
            epoch = _whole(header.get("ss_epoch"))
        try:
            size_bytes = path.stat().st_size
        except OSError:
            continue  # pruned meanwhile
        found.append(
            Checkpoint(path=path, step=step, epoch=epoch, size_bytes=size_bytes, metadata=dict(header))
        )
    return tuple(
        sorted(found, key=lambda each: (each.step, each.path.name == f"{name}.safetensors", each.path.name))
    )


def _number(text: Any) -> float:
    try:
        return float(text)
    except (TypeError, ValueError):
        return 0.0


def _states(entries: Iterable[Path], name: str, config: KohyaConfig | None) -> tuple[SavedState, ...]:
    origin = config.origin_step if config else 0
    found = []
    for path in entries:
        stem = path.name.removesuffix("-state")
        match = NUMBERED.fullmatch(stem)
        if stem == path.name or (match["name"] if match else stem) != name or not path.is_dir():
            continue
        step: int | None = None
        for file, key in (("kiln_state.json", "step"), ("train_state.json", "current_step")):
            try:
                values = json.loads((path / file).read_text(encoding="utf-8"))
                step = _whole(values.get(key)) if step is None else step
            except (OSError, ValueError, AttributeError):
                continue
        if step is not None:
            found.append(SavedState(path=path, step=step + origin))
    return tuple(sorted(found, key=lambda each: each.step))


def _steps_per_epoch(checkpoints: Sequence[Checkpoint], config: KohyaConfig | None) -> float:
    """Optimizer steps of an epoch; 0 where nothing tells."""
    first_step = config.origin_step if config else 0
    first_epoch = config.origin_epoch if config else 0
    rates = []
    for each in checkpoints:
        match = NUMBERED.fullmatch(each.path.stem)
        if match and match["epoch"] and each.epoch is not None and each.epoch > first_epoch:
            rates.append((each.step - first_step) / (each.epoch - first_epoch))
    if rates:
        return median(rates)
    for each in reversed(checkpoints):
        batches = _whole(each.metadata.get("ss_num_batches_per_epoch"))
        accumulation = _whole(each.metadata.get("ss_gradient_accumulation_steps")) or 1
        if batches:
            return max(1, math.ceil(batches / accumulation))
    return 0.0


# ---- pictures -----------------------------------------------------------------------------------------


def _prompts(
    folder: Path, config: KohyaConfig | None, config_file: Path | None, may_read: Callable[[Path], bool]
) -> tuple[list[prompts.SamplePrompt], str]:
    """The sample prompts, by number: of the file that training read, else of the settings; and their text."""
    written = config.sample_prompts.strip() if config else ""
    file = folder / "sample" / "prompt.txt"
    if written and "\n" not in written and written.lower().endswith((".txt", ".json", ".toml")):
        named = Path(written).expanduser()
        named = named if named.is_absolute() else (config_file or folder).parent / named
        if named.is_file() and may_read(named):
            file = named
        written = ""
    try:
        found = prompts.read_prompts(file) if file.is_file() else prompts.parse_text(written)
        if file.is_file() and file.suffix.lower() == ".txt":
            written = file.read_text(encoding="utf-8-sig").strip()
        return found, written
    except (ConfigError, OSError):
        return [], written


def _pictures(
    name: str,
    samples: Iterable[Path],
    wanted: Sequence[prompts.SamplePrompt],
    config: KohyaConfig | None,
    per_epoch: float,
    history: _History,
) -> tuple[Picture, ...]:
    first_step = config.origin_step if config else 0
    first_epoch = config.origin_epoch if config else 0
    found: dict[tuple[int, int], tuple[str, Picture]] = {}
    for path in samples:
        match = SAMPLE.fullmatch(path.stem)
        if not match or path.suffix.lower() != ".png" or (match["name"] or "last") != name:
            continue
        if match["stamp"] < history.since:
            continue
        index, number = int(match["index"]), int(match["number"])
        seed = int(match["seed"]) if match["seed"] else None
        prompt = wanted[index].prompt if index < len(wanted) else ""
        step: int | None = None if match["epoch"] else number
        if (event := history.samples.get(path.name)) is not None:
            step, prompt, seed = event.step, event.prompt, event.seed
        else:
            said = _said(path)
            prompt, seed = said.get("prompt", prompt), seed if seed is not None else _whole(said.get("seed"))
            if match["epoch"]:
                step = _whole(said.get("step"))
        if step is None:
            epochs = max(0, number - first_epoch)
            if epochs and not per_epoch:
                continue  # at some epoch, and no file tells which step that is
            step = first_step + round(epochs * per_epoch)
        picture = Picture(path=path, step=step, index=index, seed=seed, prompt=prompt)
        older = found.get((step, index))
        if older is None or older[0] <= match["stamp"]:
            found[step, index] = match["stamp"], picture
    return tuple(found[key][1] for key in sorted(found))


def _said(path: Path) -> dict[str, str]:
    """Texts that stand in a PNG."""
    try:
        with Image.open(path) as picture:
            return {str(key): str(value) for key, value in picture.info.items() if isinstance(value, str)}
    except (OSError, ValueError, Image.DecompressionBombError):
        return {}


# ---- logs of Kohya's engine ---------------------------------------------------------------------------


def _tensorboard(
    folder: Path, config: KohyaConfig | None, config_file: Path | None, may_read: Callable[[Path], bool]
) -> tuple[Point, ...]:
    """Loss and rates from the newest TensorBoard log of a run that has no journal."""
    places = [folder / "logs", folder / "log"]
    if config is not None and config.logging_dir.strip():
        named = Path(config.logging_dir).expanduser()
        named = named if named.is_absolute() else (config_file or folder).parent / named
        if may_read(named):
            places.append(named)
    stamp = SETTINGS.fullmatch(config_file.stem) if config_file else None
    found: dict[float, Path] = {}
    for place in places:
        for pattern in ("events.out.tfevents.*", "*/events.out.tfevents.*", "*/*/events.out.tfevents.*"):
            for path in list(place.glob(pattern))[:1000]:
                found[path.stat().st_mtime] = path.parent
    if not found:
        return ()
    if stamp:  # the run's own log, where one began within the minutes after its settings were written
        began = time.mktime(time.strptime(stamp["stamp"], "%Y%m%d-%H%M%S"))
        later = {moment: path for moment, path in found.items() if moment >= began}
        if not later:
            return ()
        return _scalars(later[min(later)])
    return _scalars(found[max(found)])


def _scalars(folder: Path) -> tuple[Point, ...]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    log = EventAccumulator(str(folder), size_guidance={"scalars": 0})
    log.Reload()
    values: dict[int, dict[str, float]] = {}
    for tag in log.Tags()["scalars"]:
        if tag in ("loss/current", "loss/average") or tag.startswith("lr/") or "validation" in tag:
            if "epoch" in tag or re.fullmatch(r"lr/group\d+", tag):
                continue  # counted in epochs; the same rate under a second name
            for scalar in log.Scalars(tag):
                values.setdefault(int(scalar.step), {})[tag] = float(scalar.value)
    return tuple(
        Point(
            step=step,
            loss=each.get("loss/current", math.nan),
            average=each.get("loss/average", math.nan),
            lr={tag.removeprefix("lr/"): value for tag, value in each.items() if tag.startswith("lr/")},
            validation={tag: value for tag, value in each.items() if "validation" in tag},
        )
        for step, each in sorted(values.items())
    )
