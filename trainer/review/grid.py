"""Grids: checkpoints x prompts x seeds x strengths, drawn on demand with the trainer's own sampler.

Every picture is a file of its own, named after all that decides it, so that a grid that was cut off
goes on where it ended and the next grid uses what is there. The whole is saved as one labelled
picture too, with a list of its cells beside it.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image, ImageDraw, ImageFont, PngImagePlugin

from trainer.config import KohyaConfig
from trainer.config import dumps as dump_config
from trainer.config import loads as load_config
from trainer.errors import ConfigError, ModelFileError, StopTraining
from trainer.events import Event, LogLine, PhaseStarted, Progress, SampleReady
from trainer.files import atomic_path, atomic_write
from trainer.prompts import SamplePrompt, ignored_options, parse_text
from trainer.review.run_folder import Checkpoint, RunFolder, read_header
from trainer.work import Done

if TYPE_CHECKING:
    from trainer.families._base import Family
    from trainer.job import Job
    from trainer.networks._base import Network

__all__ = ["MOST_CELLS", "Cell", "Grid", "GridList", "grid_lists", "pictures_folder"]

MOST_CELLS = 600
STRONGEST = 2.0
FOLDER = "txt2img-images"
"""Where people who follow Kohya's guides keep pictures made with a LoRA."""
SHEET_CELL_PX = 384
"""Longest side of a picture on the sheet."""
SHEET_MOST_PX = 80_000_000
FONTS = ("DejaVuSans.ttf", "arial.ttf", "Arial.ttf", "LiberationSans-Regular.ttf")


def pictures_folder(results: Path) -> Path:
    """The folder for pictures of a run: beside the results where it is there already, else inside them."""
    beside = results.parent / FOLDER
    return beside if beside.is_dir() else results / FOLDER


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One picture of a grid."""

    file: str
    """Name of the LoRA file; "" for the base model."""
    step: int
    strength: float
    prompt: SamplePrompt
    seed: int
    path: Path


@dataclass(frozen=True, kw_only=True)
class Grid:
    """What to draw. A `trainer.work.Work`.

    Raises:
        ConfigError: Nothing would be drawn, too much would, or a number makes no sense.
    """

    title: str
    """Name of the run, for a person."""
    config: KohyaConfig
    """Base model, sampler and precision."""
    base: Path
    """Folder that the configuration's relative paths start from."""
    files: tuple[tuple[Path, int], ...]
    """LoRA files and the steps that they are known by."""
    prompts: tuple[SamplePrompt, ...]
    seeds: tuple[int, ...]
    """For every prompt; where empty, each prompt's own, or 1."""
    strengths: tuple[float, ...] = (1.0,)
    with_base: bool = False
    """A first column without any LoRA."""
    folder: Path
    """Gets the pictures."""

    def __post_init__(self) -> None:
        if not self.prompts:
            raise ConfigError("there is no prompt to draw: write one")
        if not self.files and not self.with_base:
            raise ConfigError("no file is chosen: choose one, or the base model")
        wrong = [each for each in self.strengths if not 0 <= each <= STRONGEST or not math.isfinite(each)]
        if wrong or (self.files and not self.strengths):
            raise ConfigError(
                f"a LoRA strength is a number from 0 to {STRONGEST:g}, such as 0.6, 0.8, 1, 1.2"
            )
        count = self.columns * len(self.prompts) * max(1, len(self.seeds))
        if count > MOST_CELLS:
            raise ConfigError(f"that would be {count} pictures: choose at most {MOST_CELLS}")

    @property
    def columns(self) -> int:
        """Pictures in a row."""
        return len(self.files) * len(self.strengths) + self.with_base

    # ---- as work in the queue ----------------------------------------------------------------------

    @property
    def name(self) -> str:
        """See `trainer.work.Work`."""
        return f"{self.title}: grid of {len(self.cells)}"

    @property
    def journal(self) -> Path:
        """See `trainer.work.Work`."""
        return self.folder / "logs" / f"grid_{self.key}" / "journal.jsonl"

    @property
    def pictures(self) -> Path | None:
        """See `trainer.work.Work`."""
        return self.folder

    def as_json(self) -> str:
        """The settings, for a list that is kept."""
        return json.dumps(
            {
                "run": self.title,
                "config": json.loads(dump_config(self.config)),
                "files": [[str(path), step] for path, step in self.files],
                "prompts": [asdict(prompt) for prompt in self.prompts],
                "seeds": self.seeds,
                "strengths": self.strengths,
                "with_base": self.with_base,
                "folder": str(self.folder),
            },
            ensure_ascii=False,
        )

    @classmethod
    def from_json(cls, text: str, base: Path) -> Grid:
        """What `as_json` wrote.

        Raises:
            ConfigError: It is something else.
        """
        try:
            values: dict[str, Any] = json.loads(text)
            return cls(
                title=str(values["run"]),
                config=load_config(values["config"]).config,
                base=base,
                files=tuple((Path(path), int(step)) for path, step in values["files"]),
                prompts=tuple(
                    SamplePrompt(**{**each, "ignored": tuple(each["ignored"])}) for each in values["prompts"]
                ),
                seeds=tuple(int(each) for each in values["seeds"]),
                strengths=tuple(float(each) for each in values["strengths"]),
                with_base=bool(values["with_base"]),
                folder=Path(values["folder"]),
            )
        except (ValueError, TypeError, KeyError) as error:
            raise ConfigError(f"the grid's settings cannot be read ({error}): ask for it again") from error

    @classmethod
    def of(
        cls,
        run: RunFolder,
        config: KohyaConfig,
        base: Path,
        checkpoints: Sequence[Checkpoint],
        *,
        prompts: str,
        seeds: str = "",
        strengths: str = "1",
        with_base: bool = False,
    ) -> Grid:
        """A grid of a run's files, from what a person typed.

        Args:
            run: The run.
            config: Its settings, with the base model to draw with.
            base: Folder that their relative paths start from.
            checkpoints: The files, in the order of their columns.
            prompts: One a line, with Kohya's options; empty for the run's own.
            seeds: Whole numbers between commas or blanks; empty for those of the prompts.
            strengths: Numbers between commas or blanks.
            with_base: Whether the first column shows the base model.

        Raises:
            ConfigError: A number is none.
        """
        return cls(
            title=run.name,
            config=config,
            base=base,
            files=tuple((each.path, each.step) for each in checkpoints),
            prompts=tuple(parse_text(prompts.strip() or run.prompt_text)),
            seeds=_numbers(seeds, int, "a seed is a whole number, such as 1, 2, 3"),
            strengths=_numbers(strengths, float, "a LoRA strength is a number, such as 0.6, 0.8, 1, 1.2"),
            with_base=with_base,
            folder=pictures_folder(run.folder),
        )

    # ---- cells ------------------------------------------------------------------------------------------

    @cached_property
    def cells(self) -> tuple[Cell, ...]:
        """All pictures, column by column: a LoRA file is loaded once."""
        columns: list[tuple[Path | None, int, float]] = []
        if self.with_base:
            columns.append((None, 0, 0.0))
        columns += [(path, step, strength) for path, step in self.files for strength in self.strengths]
        marks = {path: _mark(path) for path, _ in self.files}
        found = []
        for (path, step, strength), prompt in itertools.product(columns, self.prompts):
            for seed in self.seeds or (1 if prompt.seed is None else prompt.seed,):
                # At strength 0 a file is the base model, whichever it is.
                mark = marks[path] if path is not None and strength else ""
                stem = path.stem if path is not None and strength else "base"
                key = self._cell_key(mark, strength, prompt, seed)
                name = f"{_plain(stem)}_{strength:g}_{seed}_{key}.png"
                found.append(
                    Cell(
                        file=path.name if path is not None else "",
                        step=step,
                        strength=strength,
                        prompt=prompt,
                        seed=seed,
                        path=self.folder / name,
                    )
                )
        return tuple(found)

    def _cell_key(self, mark: str, strength: float, prompt: SamplePrompt, seed: int) -> str:
        """Ten digits that stand for all that decides a picture."""
        config = self.config
        model = self.base / Path(config.pretrained_model_name_or_path.strip()).expanduser()
        size = model.stat().st_size if model.is_file() else 0
        deciding = [
            *(model.name, size, config.vae.strip(), mark, strength, seed),
            *(config.sample_sampler, config.clip_skip, config.mixed_precision, config.v_parameterization),
            {key: value for key, value in asdict(prompt).items() if key not in ("seed", "ignored")},
        ]
        return hashlib.sha256(json.dumps(deciding, sort_keys=True).encode()).hexdigest()[:10]

    @cached_property
    def key(self) -> str:
        """Ten digits that stand for the whole grid."""
        return hashlib.sha256("".join(cell.path.name for cell in self.cells).encode()).hexdigest()[:10]

    # ---- drawing ----------------------------------------------------------------------------------------

    def run(self, emit: Callable[[Event], None], stopped: Callable[[], bool]) -> Done:
        """Draw what is missing, then the sheet; see `trainer.work.Work.run`.

        Raises:
            ConfigError: The settings cannot draw.
            ModelFileError: A file is missing, broken, or of another kind of model.
            StopTraining: ``stopped`` said so; what was drawn is kept.
        """
        missing: dict[Path, Cell] = {}
        for cell in self.cells:
            if not cell.path.exists():
                missing.setdefault(cell.path, cell)
        for line in ignored_options(self.prompts):
            emit(LogLine(message=line, level="warning"))
        kept = len(self.cells) - len(missing)
        if kept and missing:
            emit(LogLine(message=f"{kept} of {len(self.cells)} pictures are there already"))
        if missing:
            self._draw(list(missing.values()), emit, stopped)
        sheet = self.folder / f"grid_{self.key}.png"
        _sheet(self, sheet)
        listed = [
            {
                "file": cell.file,
                "step": cell.step,
                "strength": cell.strength,
                "prompt": cell.prompt.prompt,
                "seed": cell.seed,
                "picture": cell.path.name,
            }
            for cell in self.cells
        ]
        described = {"run": self.title, "sheet": sheet.name, "cells": listed}
        atomic_write(sheet.with_suffix(".json"), json.dumps(described, indent=1, ensure_ascii=False))
        return Done(f"{len(self.cells)} pictures, {len(missing)} of them new, and the grid are drawn", sheet)

    def _draw(self, cells: list[Cell], emit: Callable[[Event], None], stopped: Callable[[], bool]) -> None:
        import torch

        from trainer import devices, memory, plugins, sampling
        from trainer.draws import Draws
        from trainer.networks import plugin_for

        def say(message: str) -> None:
            emit(LogLine(message=message))

        paths = {path.name: path for path, _ in self.files}
        device = devices.choose()
        plain = self.job()
        devices.check_precision(plain.config.mixed_precision, device)
        memory.check(plain, device)
        emit(PhaseStarted(phase="load model"))
        dtype = devices.weight_dtype(plain.config.mixed_precision)
        family: Family | None = (
            plugins.Folder("trainer.families").get(plain.family).load(plain, device, dtype, say)
        )
        assert family is not None
        swap = memory.prepare(family, plain, device, say)
        total = sampling.model_calls(family, plain, [_drawn_as(cell) for cell in cells])
        done = 0

        def progress() -> None:
            nonlocal done
            done += 1
            emit(Progress(phase="sample", done=done, total=total))

        try:
            emit(PhaseStarted(phase="sample", total=total, unit="steps"))
            for file, of_file in _grouped(cells):
                network: Network | None = None
                job = plain
                if file:
                    job = self.job(paths[file])
                    network = plugin_for(job).create(family, job, Draws(1), say)
                    network.attach()
                    network.to(device, torch.float32)
                    network.train(False)
                try:
                    for strength, group in itertools.groupby(of_file, key=lambda cell: cell.strength):
                        if network is not None:
                            network.set_multiplier(strength)
                        some = list(group)
                        autocast = torch.autocast(device.type, dtype, enabled=dtype != torch.float32)
                        with autocast:
                            wanted = [_drawn_as(cell) for cell in some]
                            drawn = sampling.draw(family, job, wanted, stop=stopped, progress=progress)
                            count = 0
                            for cell, picture in zip(some, drawn, strict=False):
                                count += 1
                                self._write(cell, picture.pixels_1CHW, picture.facts, emit)
                            if count < len(some):
                                raise StopTraining
                finally:
                    if network is not None:
                        network.detach()
        finally:
            if swap is not None:
                swap.close()
            family = None
            devices.free()

    def _write(self, cell: Cell, pixels_1CHW: Any, facts: str, emit: Callable[[Event], None]) -> None:
        from trainer import sampling

        stem = Path(cell.file).stem
        lora = f"<lora:{stem}:{cell.strength:g}>" if cell.file and cell.strength else "none"
        model = Path(self.config.pretrained_model_name_or_path).name
        facts += f", LoRA: {lora}, Training step: {cell.step}, Model: {model}"
        more = {
            "seed": str(cell.seed),
            "step": str(cell.step),
            "strength": f"{cell.strength:g}",
            "lora": cell.file,
        }
        try:
            sampling.write_picture(cell.path, pixels_1CHW, cell.prompt, facts, more)
        except OSError as error:
            raise ConfigError(f"{cell.path.name} cannot be written ({error}): is the disk full?") from error
        emit(
            SampleReady(
                step=cell.step, epoch=None, index=0, prompt=cell.prompt.prompt, seed=cell.seed, path=cell.path
            )
        )

    def job(self, file: Path | None = None) -> Job:
        """The run as it must be set up to draw with a file: everything that the file holds is loaded.

        Raises:
            ConfigError: The settings contradict each other.
        """
        from trainer.job import Job

        header = {} if file is None else read_header(file)
        values: dict[str, Any] = {
            "network_weights": "" if file is None else str(file),
            "dim_from_weights": file is not None,
            "resume": "",
            "unet_lr": 1e-4,
            "text_encoder_lr": 1e-4,
            "train_t5xxl": False,
            "full_fp16": False,
            "full_bf16": False,
            "sdxl_cache_text_encoder_outputs": False,
            "train_data_dir": self.config.train_data_dir.strip() or "none",
            "output_dir": self.config.output_dir.strip() or str(self.folder),
            "network_dropout": 0.0,
        }
        kind = header.get("ss_network_module", "networks.lora")
        if self.config.flux1_checkbox:
            if kind in ("networks.lora", "networks.lora_flux", "None"):
                values["LoRA_type"] = "Flux1"
        elif kind in ("networks.lora", "None"):
            values["LoRA_type"] = "Standard"
        job = Job.from_config(self.config.model_copy(update=values), base=self.base)
        return replace(job, unet_lr=1e-4, text_encoder_lr=1e-4, t5xxl_lr=0.0, network_args={})


def _numbers(text: str, read: Callable[[str], Any], says: str) -> tuple[Any, ...]:
    try:
        found = [read(part) for part in text.replace(",", " ").replace(";", " ").split()]
    except ValueError as error:
        raise ConfigError(f"{text!r}: {says}") from error
    return tuple(dict.fromkeys(found))


def _drawn_as(cell: Cell) -> SamplePrompt:
    return replace(cell.prompt, seed=cell.seed)


def _grouped(cells: Sequence[Cell]) -> Iterator[tuple[str, list[Cell]]]:
    """Cells by the file that must be loaded for them, none for strength 0."""
    for file, group in itertools.groupby(cells, key=lambda cell: cell.file if cell.strength else ""):
        yield file, list(group)


def _mark(path: Path) -> str:
    """What tells a LoRA file from another of the same name."""
    known = read_header(path).get("sshs_model_hash", "")
    if known:
        return known
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise ModelFileError(
            f"the LoRA file {path.name} cannot be read: {error.strerror or error}"
        ) from error


def _plain(stem: str) -> str:
    return "".join(letter if letter.isalnum() or letter in "-._" else "-" for letter in stem)[:80]


# ---- the sheet -------------------------------------------------------------------------------------------


def _font(size_px: int) -> Any:
    for name in FONTS:
        try:
            return ImageFont.truetype(name, size_px)
        except OSError:
            continue
    return ImageFont.load_default(size_px)


def _lines(draw: ImageDraw.ImageDraw, text: str, font: Any, width_px: int, most: int) -> list[str]:
    """``text`` in at most ``most`` lines that fit; what is too long ends in an ellipsis."""
    lines: list[str] = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if lines[-1] and draw.textlength(longer, font=font) > width_px:
            lines.append(word)
        else:
            lines[-1] = longer
    cut = lines[:most]
    if len(lines) > most:
        cut[-1] += " …"
    for index, line in enumerate(cut):
        while draw.textlength(line, font=font) > width_px and len(line) > 2:
            line = f"{line[:-2]}…"
        cut[index] = line
    return cut


def _sheet(grid: Grid, path: Path) -> None:
    """All pictures in one, labelled: a column for each file and strength, a row for each prompt and seed."""
    rows = len(grid.cells) // grid.columns
    sizes = []
    for cell in grid.cells[:rows]:
        with Image.open(cell.path) as picture:
            sizes.append(picture.size)
    widest, highest = max(width for width, _ in sizes), max(height for _, height in sizes)
    scale = min(1.0, SHEET_CELL_PX / max(widest, highest))
    room = widest * highest * scale**2 * len(grid.cells)
    scale *= min(1.0, math.sqrt(SHEET_MOST_PX / room))
    width, height = max(1, round(widest * scale)), max(1, round(highest * scale))
    text_px = max(11, min(16, width // 12))
    gap, left, top = 6, max(150, width), text_px * 4
    font = _font(text_px)
    size = (left + grid.columns * (width + gap) + gap, top + rows * (height + gap) + gap)
    sheet = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(sheet)
    for index, cell in enumerate(grid.cells):
        column, row = divmod(index, rows)
        x, y = left + gap + column * (width + gap), top + row * (height + gap)
        if row == 0:
            for number, line in enumerate(_heading(cell)):
                shown = _lines(draw, line, font, width, 1)[0]
                draw.text((x, 4 + number * (text_px + 4)), shown, fill="black", font=font)
        if column == 0:
            most = max(1, height // (text_px + 4) - 1)
            words = _lines(draw, cell.prompt.prompt, font, left - 3 * gap, most)
            for number, line in enumerate([*words, f"seed {cell.seed}"]):
                fill = "black" if number < len(words) else "#666666"
                draw.text((gap, y + number * (text_px + 4)), line, fill=fill, font=font)
        with Image.open(cell.path) as picture:
            small = picture.convert("RGB")
            small.thumbnail((width, height), Image.Resampling.LANCZOS)
            sheet.paste(small, (x, y))
    text = PngImagePlugin.PngInfo()
    text.add_itxt("parameters", _description(grid))
    with atomic_path(path) as temporary:
        sheet.save(temporary, format="PNG", pnginfo=text)


def _heading(cell: Cell) -> tuple[str, ...]:
    if not cell.file:
        return ("base model", "no LoRA")
    return (
        f"step {cell.step}" if cell.step else Path(cell.file).stem,
        f"strength {cell.strength:g}",
        cell.file,
    )


def _description(grid: Grid) -> str:
    """What the sheet shows, as text in its PNG."""
    lines = [prompt.prompt for prompt in grid.prompts]
    lines.append(f"Files: {', '.join(path.name for path, _ in grid.files)}")
    lines.append(f"Strengths: {', '.join(f'{each:g}' for each in grid.strengths)}")
    lines.append(f"Seeds: {', '.join(str(seed) for seed in dict.fromkeys(cell.seed for cell in grid.cells))}")
    lines.append(f"Model: {Path(grid.config.pretrained_model_name_or_path).name}")
    return "\n".join(lines)


# ---- grids that were drawn -------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class GridList:
    """A grid that lies in a folder."""

    sheet: Path
    cells: tuple[Mapping[str, Any], ...]
    """file, step, strength, prompt, seed, picture (a name in the same folder)."""


def grid_lists(folder: Path, run: str) -> tuple[GridList, ...]:
    """The grids of a run that were drawn into ``folder``, the newest first."""
    found = []
    for path in folder.glob("grid_*.json"):
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
            cells = tuple(
                cell
                for cell in values["cells"]
                if isinstance(cell, dict) and Path(str(cell.get("picture", ""))).name == cell.get("picture")
            )
            sheet = path.with_suffix(".png")
            if values["run"] == run and cells and sheet.is_file():
                found.append((path.stat().st_mtime, GridList(sheet=sheet, cells=cells)))
        except (OSError, ValueError, KeyError, TypeError):
            continue
    return tuple(grid for _, grid in sorted(found, key=lambda item: item[0], reverse=True))
