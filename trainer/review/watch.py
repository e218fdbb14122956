"""Measuring a run while it trains: at each save and each sample, within a share of the training's time.

Weights, draws and modes are as before afterwards. What is measured lies beside the journal, where
Review finds it; saves that the budget had no room for are measured there on demand.
"""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from trainer.draws import aside
from trainer.errors import TrainerError
from trainer.events import LogLine
from trainer.lora_file import LoraFile
from trainer.review.measure import Measure, Measures, of_figures, write_measures
from trainer.review.probe import DURING_TRAINING, Probe, prepare
from trainer.review.signals import weight_figures
from trainer.tools._lora import pairs_of

if TYPE_CHECKING:
    from trainer.data.cache import LatentCache
    from trainer.data.types import Batch, Dataset
    from trainer.loop import Run

__all__ = ["BUDGET", "Watch"]

BUDGET = 0.03
"""Largest share of the training's time; the last save is measured in any case."""
PICTURES = 6


class Watch:
    """Measures the network of one run.

    Args:
        dataset: The run's pictures.
        latents: Their cache; without one, nothing is measured, since the VAE would be needed.
        file: Where the measures go.
        held: Pictures that were held out.
    """

    def __init__(
        self, dataset: Dataset, latents: LatentCache, file: Path, held: tuple[Batch, ...] = ()
    ) -> None:
        self._held = held
        self._dataset = dataset
        self._latents = latents
        self._file = file
        self._probe: Probe | None = None
        self._points: dict[int, Measure] = {}
        self._began = time.perf_counter()
        self._spent_s = self._last_s = 0.0
        self._failed = ""

    def begin(self, run: Run) -> None:
        """Measure the base model, before the first step: later, kept texts would be those of the LoRA."""
        self._began = time.perf_counter()
        self._timed(run, lambda: self._base(run))

    def look(self, run: Run, file: Path | None, *, must: bool = False) -> None:
        """Measure the network as it is.

        Args:
            run: The run.
            file: The LoRA file that was just saved, if one was.
            must: Whether the budget does not count.
        """
        step = run.counted
        if step in self._points:
            if file is not None:
                self._points[step] = replace(self._points[step], file=file.name)
                self._write()
            return
        elapsed_s = time.perf_counter() - self._began
        if self._probe is None or self._failed:
            return
        if not must and self._spent_s + self._last_s > BUDGET * elapsed_s:
            return
        self._timed(run, lambda: self._point(run, step, file))

    @property
    def share(self) -> float:
        """Time spent measuring over time spent training so far."""
        elapsed_s = time.perf_counter() - self._began
        return self._spent_s / max(elapsed_s - self._spent_s, 1e-9)

    def _timed(self, run: Run, act: Any) -> None:
        if self._failed:
            return
        began = time.perf_counter()
        run.built.eval()
        run.network.train(False)
        try:
            act()
        except (torch.OutOfMemoryError, RuntimeError, TrainerError, OSError) as error:
            # The training is worth more than a verdict on it.
            self._failed = str(error).splitlines()[0] if str(error) else type(error).__name__
            line = f"the verdict's measures end here: {self._failed}"
            run.events.emit(LogLine(message=line, level="warning"))
        finally:
            run.network.train(True)
            run.built.train()
            self._last_s = time.perf_counter() - began
            self._spent_s += self._last_s

    def _base(self, run: Run) -> None:
        family = run.family
        encoders = [next(model.parameters()).device for model in family.text_encoders.values()]
        words = bool(encoders) and all(device == family.device for device in encoders)
        # Where texts are kept, those of held-out pictures are not among them.
        held = self._held if words else ()
        material = prepare(self._dataset, family, self._latents, pictures=PICTURES, held=held)
        if not material.batches:
            return
        self._probe = Probe(
            family,
            run.objective,
            material,
            levels=DURING_TRAINING,
            autocast=run.accelerator.autocast,
            words=words,
        )
        with aside():
            self._probe.measure_base(run.network)

    def _point(self, run: Run, step: int, file: Path | None) -> None:
        assert self._probe is not None
        with aside():
            figures = self._probe.measure(run.network)
        _, pairs = pairs_of(LoraFile(run.network.state_dict()), "the network")
        weights = weight_figures(pairs)
        self._points[step] = of_figures(
            step,
            "" if file is None else file.name,
            figures,
            norm=weights.norm,
            stable_rank=weights.stable_rank,
            blocks=weights.blocks,
            ranks=weights.ranks,
        )
        self._write()

    def _write(self) -> None:
        assert self._probe is not None
        assert self._probe.base is not None
        base = of_figures(0, "", self._probe.base, norm=0.0, stable_rank=0.0)
        points = tuple(self._points[step] for step in sorted(self._points))
        write_measures(
            self._file,
            Measures(
                base=base,
                points=points,
                trigger=self._probe.material.trigger,
                cost_share=round(self.share, 4),
            ),
        )
