"""Measuring the checkpoints of a run: weights, losses on fixed pictures, pictures.

During training `trainer.review.watch.Watch` measures the network in hand at each save and each sample; afterwards
`measure_run` measures every saved file, ours or another program's. What was measured lies beside the run's
journal (`measures.json`) and is not measured again.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trainer.errors import ConfigError, StopTraining, TrainerError
from trainer.events import Event, LogLine, PhaseStarted, Progress
from trainer.files import atomic_write
from trainer.review.run_folder import Checkpoint, RunFolder

if TYPE_CHECKING:
    from PIL import Image

    from trainer.config import KohyaConfig
    from trainer.review.probe import Figures

__all__ = ["Measure", "Measures", "measure_run", "measures_file", "read_measures"]

VERSION = 3
PICTURES = 8
"""Training pictures that a probe looks at."""
DRAWN_STEPS = 12
TOGETHER_PX = 512 * 512
"""Pictures that are drawn go through the denoiser together up to this area: small ones are slow one by one, and large
ones fill the memory."""
DRAWN_CAPTIONS = 16
"""How many captions are drawn with the base model and with each checkpoint; the first twice, by two seeds."""

Emit = Callable[[Event], None]
Drawn = Callable[[str, "Sequence[Image.Image]"], None]


@dataclass(frozen=True)
class Measure:
    """What is known of one checkpoint."""

    step: int
    file: str
    """Name of the LoRA file; "" for a point in training at which none was saved."""
    norm: float
    """Of all weight changes."""
    stable_rank: float
    blocks: Mapping[str, float] = field(default_factory=dict)
    """Norm of each block's changes."""
    ranks: Mapping[str, float] = field(default_factory=dict)
    """Stable rank of each block's layers, averaged."""
    levels: tuple[float, ...] = ()
    own: tuple[float, ...] = ()
    """Losses at each level; see `trainer.review.probe.Figures`."""
    other: tuple[float, ...] = ()
    plain: tuple[float, ...] = ()
    held: tuple[float, ...] = ()
    moved: tuple[float, ...] = ()
    drawn: tuple[float, ...] = ()
    """The base model's loss, at each level, on what was drawn with the file, with captions less the trigger word."""
    drawn_other: tuple[float, ...] = ()
    """The same with captions of other pictures."""
    drawn_own: tuple[float, ...] = ()
    """The file's own loss on what was drawn with it, with the captions that were drawn."""
    pictures: Mapping[str, float] = field(default_factory=dict)
    """Figures of its pictures: saturation, contrast, clipped, detail, diversity, nearest."""
    strengths: Mapping[str, tuple[float, ...]] = field(default_factory=dict)
    """Own loss at other strengths, by strength."""


@dataclass(frozen=True)
class Measures:
    """A run as measured."""

    base: Measure | None
    """The base model; None where no loss was measured."""
    points: tuple[Measure, ...]
    """By step."""
    training: Mapping[str, float] = field(default_factory=dict)
    """Figures of the training pictures."""
    trigger: str = ""
    cost_share: float | None = None
    """Time that measuring took, as a share of the training's; None afterwards."""
    missing: tuple[str, ...] = ()
    """What could not be measured, and why."""


def measures_file(run: RunFolder) -> Path:
    """Where a run's measures lie: beside its newest journal, or in logs/."""
    if run.journal is not None:
        return run.journal.parent / "measures.json"
    return run.folder / "logs" / f"{run.name}-measures.json"


def read_measures(path: Path) -> Measures | None:
    """What was measured before; None where there is nothing, or that of another version."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        if values.pop("version") != VERSION:
            return None
        values["base"] = _measure(values["base"]) if values["base"] else None
        values["points"] = tuple(_measure(each) for each in values["points"])
        values["missing"] = tuple(values["missing"])
        return Measures(**values)
    except (OSError, ValueError, KeyError, TypeError):
        return None


def write_measures(path: Path, measures: Measures) -> None:
    """Keep what was measured."""
    atomic_write(path, json.dumps({"version": VERSION, **asdict(measures)}, indent=1))


def _measure(values: Mapping[str, Any]) -> Measure:
    lists = ("levels", "own", "other", "plain", "held", "moved", "drawn", "drawn_other", "drawn_own")
    strengths = {key: tuple(value) for key, value in values["strengths"].items()}
    return Measure(**{**values, **{name: tuple(values[name]) for name in lists}, "strengths": strengths})


def of_figures(step: int, file: str, figures: Figures | None, **more: Any) -> Measure:
    """A measure from a probe's figures and what else is known."""
    known = {} if figures is None else {name: getattr(figures, name) for name in figures.__dataclass_fields__}
    return Measure(step=step, file=file, **known, **more)


# --- afterwards ---------------------------------------------------------------------------------


def measure_run(
    run: RunFolder,
    config: KohyaConfig,
    base: Path,
    *,
    emit: Emit,
    stopped: Callable[[], bool] = lambda: False,
    pictures: int = PICTURES,
    draw: bool = True,
    strengths: Sequence[float] = (),
    held: str = "",
    known: Measures | None = None,
    drawn: Drawn = lambda file, pictures: None,
) -> Measures:
    """Measure every saved file of a run.

    Args:
        run: From `open_run`.
        config: Its settings.
        base: Folder that their relative paths start from.
        emit: Gets progress and what cannot be measured.
        stopped: Asked between pieces.
        pictures: Training pictures to look at.
        draw: Whether pictures of training captions are drawn of the base and of each checkpoint; where they
            are not, the run's samples are looked at.
        strengths: Other strengths at which the last file is measured.
        held: Kohya folder of pictures that were not trained, to be measured beside those that were; if empty,
            those that the run held out.
        known: From before; files in it are not measured again.
        drawn: Gets what was drawn: the file's name, "" for the base model, and the pictures.

    Raises:
        ConfigError: There are no LoRA files.
        StopTraining: ``stopped`` said so.
    """
    files = [each for each in run.checkpoints if each.path.suffix.lower() == ".safetensors"]
    if not files:
        raise ConfigError(
            f"{run.name} has no LoRA files that could be judged: keep at least one (.safetensors)"
        )
    before = _before(known)
    try:
        with _loaded(run, config, base, emit, pictures, held) as bench:
            points: list[Measure] = []
            seen: dict[str, Measure] = {}
            emit(PhaseStarted(phase="measure", total=len(files), unit="files"))
            for index, file in enumerate(files):
                if stopped():
                    raise StopTraining
                tensors = file.metadata.get("sshs_model_hash", file.path.name)
                point = before.get(file.path.name) or seen.get(tensors)
                if point is None:
                    point = bench.measure(file, run, draw, stopped, drawn)
                # The last save and the final file are often the same.
                seen[tensors] = replace(point, file=file.path.name, step=file.step)
                points.append(seen[tensors])
                emit(Progress(phase="measure", done=index + 1, total=len(files)))
            if strengths and not points[-1].strengths:
                points[-1] = replace(points[-1], strengths=bench.sweep(files[-1], strengths))
            return Measures(
                base=bench.of_base(known, draw, stopped, drawn),
                points=tuple(points),
                training=bench.training,
                trigger=bench.material.trigger,
                cost_share=None if known is None else known.cost_share,
            )
    except TrainerError as error:
        reason = str(error)
    emit(LogLine(message=f"losses cannot be measured: {reason}", level="warning"))
    points = []
    for index, file in enumerate(files):
        if stopped():
            raise StopTraining
        shown = _of_samples(run, file)
        points.append(of_figures(file.step, file.path.name, None, **_of_file(file.path), pictures=shown))
        emit(Progress(phase="measure", done=index + 1, total=len(files)))
    return Measures(base=None, points=tuple(points), missing=(f"losses: {reason}",))


def _before(known: Measures | None) -> dict[str, Measure]:
    """What was measured before in the same way, by file; not what was measured during training, more coarsely."""
    from trainer.review.probe import LEVELS

    if known is None or known.base is None or known.base.levels != LEVELS:
        return {}
    return {point.file: point for point in known.points}


def _of_file(path: Path) -> dict[str, Any]:
    from trainer.review.signals import weight_figures
    from trainer.tools import _lora

    figures = weight_figures(_lora.read(path).pairs)
    return asdict(figures)


def _of_samples(run: RunFolder, file: Checkpoint, training: Sequence[Path] = ()) -> dict[str, float]:
    """Figures of the samples that were drawn at a file's step."""
    return _of_pictures([each.path for each in run.pictures if each.step == file.step], training)


def _of_pictures(
    shown: Sequence[Path | Image.Image],
    training: Sequence[Path],
    one_prompt: Sequence[Path | Image.Image] = (),
) -> dict[str, float]:
    from trainer.review import signals

    if not shown:
        return {}
    try:
        found = dict(asdict(signals.picture_figures(shown)))
        if len(one_prompt) > 1:
            found["diversity"] = signals.diversity(one_prompt)
        if training:
            found["nearest"] = signals.nearest(shown, training)
    except OSError:
        return {}
    return found


class _Bench:
    """The base model with everything that a run's files are measured on."""

    def __init__(
        self, run: RunFolder, config: KohyaConfig, base: Path, emit: Emit, pictures: int, held: str
    ) -> None:
        from trainer import devices, memory, plugins
        from trainer.data import folder
        from trainer.data.dataset_config import apply_dataset_config
        from trainer.objectives import objective_for
        from trainer.prompts import SamplePrompt, parse_text
        from trainer.review import probe
        from trainer.review.grid import Grid

        def say(message: str) -> None:
            emit(LogLine(message=message))

        # A grid knows how a run must be set up so that all of a file is loaded.
        self.grid = Grid(
            title=run.name,
            config=config,
            base=base,
            files=((run.folder, 0),),
            prompts=(SamplePrompt(),),
            seeds=(),
            folder=run.folder,
        )
        job = apply_dataset_config(self.grid.job())
        self.job = job.with_config(cache_latents=False, cache_latents_to_disk=False)
        dataset = folder.scan(self.job)
        self.device = devices.choose()
        devices.check_precision(config.mixed_precision, self.device)
        memory.check(self.job, self.device)
        emit(PhaseStarted(phase="load model"))
        self.dtype = devices.weight_dtype(config.mixed_precision)
        self.family: Any = (
            plugins.Folder("trainer.families").get(job.family).load(self.job, self.device, self.dtype, say)
        )
        beside = dataset.held_out()
        if held:
            beside = folder.scan(
                self.job.with_config(train_data_dir=held, reg_data_dir="", dataset_config="")
            )
        self.material = probe.prepare(
            dataset,
            self.family,
            None,
            pictures=pictures,
            held=probe.held_batches(beside, self.family, pictures),
        )
        self.swap = memory.prepare(self.family, self.job, self.device, say)
        objective = objective_for(self.job).prepare(self.job, self.device)
        self.probe: Any = probe.Probe(self.family, objective, self.material, autocast=self.autocast)
        indices = [index for batch in self.material.batches for index in batch.pictures]
        self.training_files = [dataset.pictures[index].path for index in indices]
        captions = probe.recombined([dataset.pictures[index].caption for index in indices], DRAWN_CAPTIONS)
        self.captions = [*captions, captions[0]]
        self.plain = [probe.without_trigger(each, self.material.trigger) for each in self.captions]
        # Drawn as a person draws: a guidance of 7 burns what one of 4 does not.
        self.like = next(iter(parse_text(run.prompt_text or config.sample_prompts)), SamplePrompt())
        self.training = _of_pictures(self.training_files, ())

    def autocast(self) -> Any:
        """Context of a forward pass."""
        import torch

        return torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32)

    def of_base(
        self, known: Measures | None, draw: bool, stopped: Callable[[], bool], drawn: Drawn
    ) -> Measure:
        figures = self.probe.measure(None)
        made: dict[str, Any] = {}
        if known is not None and known.base is not None and known.base.levels == figures.levels:
            kept = ("drawn", "drawn_other", "drawn_own", "pictures")
            made = {name: getattr(known.base, name) for name in kept}
        if draw and not made.get("drawn"):
            made = self.of_drawing("", None, stopped, drawn)
        return of_figures(0, "", figures, norm=0.0, stable_rank=0.0, **made)

    def of_drawing(
        self, file: str, network: Any, stopped: Callable[[], bool], drawn: Drawn
    ) -> dict[str, Any]:
        """Draw with what is attached, look at it, and ask the base model how it finds it.

        A diffusion model's loss on a picture says how likely the picture is to it (Li et al. 2023, arXiv:2303.16203).
        """
        from trainer.review import probe

        captions = self.plain if network is None else self.captions
        shown = self.draw(captions, stopped)
        drawn(file, shown)
        half = len(self.plain) // 2
        batches = probe.drawn_batches(self.family, shown)
        other = [*self.plain[half:], *self.plain[:half]]

        def losses(words: Sequence[str]) -> tuple[float, ...]:
            found: tuple[float, ...] = self.probe.losses(probe.captioned(batches, words))
            return found

        found: dict[str, Any] = {"drawn_own": losses(captions)}
        if network is not None:
            network.set_multiplier(0.0)
        try:
            found |= {"drawn": losses(self.plain), "drawn_other": losses(other)}
        finally:
            if network is not None:
                network.set_multiplier(1.0)
        return {**found, "pictures": _of_pictures(shown, self.training_files, [shown[0], shown[-1]])}

    @contextlib.contextmanager
    def attached(self, file: Path) -> Iterator[Any]:
        import torch

        from trainer.draws import Draws
        from trainer.networks import plugin_for

        job = self.grid.job(file)
        network = plugin_for(job).create(self.family, job, Draws(1), lambda message: None)
        network.attach()
        try:
            network.to(self.device, torch.float32)
            network.train(False)
            yield network
        finally:
            network.detach()

    def measure(
        self, file: Checkpoint, run: RunFolder, draw: bool, stopped: Callable[[], bool], drawn: Drawn
    ) -> Measure:
        self.probe.measure(None)
        with self.attached(file.path) as network:
            figures = self.probe.measure(network)
            made: dict[str, Any] = {"pictures": _of_samples(run, file, self.training_files)}
            if draw:
                made = self.of_drawing(file.path.name, network, stopped, drawn)
        return of_figures(file.step, file.path.name, figures, **_of_file(file.path), **made)

    def sweep(self, file: Checkpoint, strengths: Sequence[float]) -> dict[str, tuple[float, ...]]:
        found = {}
        with self.attached(file.path) as network:
            for strength in strengths:
                network.set_multiplier(strength)
                found[f"{strength:g}"] = self.probe.losses(self.material.batches)
        return found

    def draw(self, captions: Sequence[str], stopped: Callable[[], bool]) -> list[Any]:
        """A small picture of each caption, each by a seed of its own."""
        from PIL import Image

        from trainer import sampling
        from trainer.prompts import SamplePrompt

        width, height = self.material.batches[0].bucket
        wanted = [
            SamplePrompt(
                prompt=caption,
                width=width,
                height=height,
                seed=place + 1,
                steps=DRAWN_STEPS,
                cfg_scale=self.like.cfg_scale,
                guidance=self.like.guidance,
                sampler=self.like.sampler,
            )
            for place, caption in enumerate(captions)
        ]
        pictures = []
        with self.autocast():
            together = max(1, TOGETHER_PX // (width * height))
            for drawn in sampling.draw(self.family, self.job, wanted, together=together, stop=stopped):
                levels = ((drawn.pixels_1CHW[0].float() / 2 + 0.5).clamp(0, 1) * 255).round().byte()
                pictures.append(Image.fromarray(levels.permute(1, 2, 0).contiguous().cpu().numpy()))
        return pictures

    def close(self) -> None:
        from trainer import devices

        if self.swap is not None:
            self.swap.close()
        self.family = self.probe = None
        devices.free()


@contextlib.contextmanager
def _loaded(
    run: RunFolder,
    config: KohyaConfig,
    base: Path,
    emit: Emit,
    pictures: int,
    held: str,
) -> Iterator[_Bench]:
    bench = _Bench(run, config, base, emit, pictures, held)
    try:
        yield bench
    finally:
        bench.close()
