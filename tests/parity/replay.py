"""A recorded run of sd-scripts, and random draws that play it back into our trainer."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from trainer.draws import Draws

__all__ = ["Record", "ReplayDraws"]


@dataclass(frozen=True)
class Record:
    """What `run_sdscripts` noted of one case."""

    folder: Path
    config: dict[str, Any]
    report: dict[str, Any]
    tensors: dict[str, Tensor]

    @classmethod
    def load(cls, folder: Path) -> Record:
        """Read a record from its folder."""
        return cls(
            folder=folder,
            config=json.loads((folder / "case.json").read_text(encoding="utf-8")),
            report=json.loads((folder / "record.json").read_text(encoding="utf-8")),
            tensors=load_file(folder / "record.safetensors"),
        )

    @property
    def micro_steps(self) -> list[dict[str, Any]]:
        """One entry for each micro-step: pictures, captions, timesteps, lrs, epoch, loss."""
        return list(self.report["micro_steps"])

    def drawn(self, micro: int, name: str) -> Tensor:
        """A tensor of one micro-step."""
        return self.tensors[f"step{micro:03d}.{name}"]

    def updates(self) -> list[list[int]]:
        """The micro-steps of each optimizer update; an epoch's last update may have fewer."""
        accumulation = self.config["gradient_accumulation_steps"]
        groups: list[list[int]] = []
        in_epoch = 0
        for micro, step in enumerate(self.micro_steps):
            new_epoch = micro == 0 or step["epoch"] != self.micro_steps[micro - 1]["epoch"]
            in_epoch = 0 if new_epoch else in_epoch
            if in_epoch % accumulation == 0:
                groups.append([])
            groups[-1].append(micro)
            in_epoch += 1
        return groups

    def picture(self, path: Path) -> str:
        """Name that the record uses for a picture: data set folder, subset folder, file."""
        return "/".join(path.parts[-3:])


class ReplayDraws(Draws):
    """The draws of a recorded run. Whatever it did not draw (dropouts, ...) comes from ``seed``.

    Micro-batches are recognised by the places of their samples, in the order in which noise is first
    asked for.
    """

    def __init__(self, seed: int, record: Record, pictures: Sequence[str]) -> None:
        """Replay ``record``; ``pictures`` names our data set's pictures, in its order."""
        super().__init__(seed)
        self.record = record
        self.pictures = list(pictures)
        self._micro_of: dict[tuple[int, ...], int] = {}

    def _micro(self, draw_ids: Sequence[int]) -> int:
        return self._micro_of.setdefault(tuple(draw_ids), len(self._micro_of))

    def _played(self, micro: int, name: str, shape: Sequence[int]) -> Tensor:
        values = self.record.drawn(micro, name)
        if tuple(values.shape) != tuple(shape):
            raise ValueError(
                f"micro-step {micro}: {name} was recorded as {tuple(values.shape)}, asked for {tuple(shape)}"
            )
        return values.clone()

    def noise(self, draw_ids: Sequence[int], shape: Sequence[int]) -> Tensor:
        """Recorded noise."""
        return self._played(self._micro(draw_ids), "noise", (len(draw_ids), *shape))

    def normal(self, purpose: str, draw_ids: Sequence[int], shape: Sequence[int]) -> Tensor:
        """Recorded offset, multi-resolution or input noise."""
        if purpose.startswith("multires"):
            name = f"multires_noise.{purpose.removeprefix('multires')}"
        elif purpose in ("noise_offset", "ip_noise"):
            name = purpose
        elif purpose == "sigma":
            return self._played(self._micro(draw_ids), "sigma", (len(draw_ids),))[:, None]
        else:
            return super().normal(purpose, draw_ids, shape)
        return self._played(self._micro(draw_ids), name, (len(draw_ids), *shape))

    def uniform(self, purpose: str, draw_ids: Sequence[int]) -> Tensor:
        """Recorded strengths and ratios, one for a micro-batch."""
        if purpose.startswith("multires_factor"):
            name = f"multires_ratio.{purpose.removeprefix('multires_factor')}"
            return self.record.drawn(draw_ids[0], name)[None]
        if purpose in ("noise_offset_strength", "ip_noise_strength"):
            return self._played(draw_ids[0], purpose, (1,))
        if purpose == "sigma":
            return self._played(self._micro(draw_ids), "sigma", (len(draw_ids),))
        return super().uniform(purpose, draw_ids)

    def timesteps(self, draw_ids: Sequence[int], low: int, high: int) -> Tensor:
        """Recorded timesteps."""
        timesteps = self._played(self._micro(draw_ids), "timesteps", (len(draw_ids),))
        if not bool(((timesteps >= low) & (timesteps < high)).all()):
            raise ValueError(f"recorded timesteps {timesteps.tolist()} are not in [{low}, {high})")
        return timesteps

    def batches(self, epoch: int, buckets: Sequence[Sequence[int]], batch_size: int) -> list[tuple[int, ...]]:
        """Recorded batches of an epoch; those that the run did not reach are made up from what is left.

        sd-scripts shuffles the pictures of an epoch anew after its first batch was taken, so a picture
        may come once too often or too rarely in a recorded epoch.
        """
        place = {name: index for index, name in enumerate(self.pictures)}
        played = [
            tuple(place[name] for name in step["pictures"])
            for step in self.record.micro_steps
            if step["epoch"] == epoch
        ]
        used = Counter(index for batch in played for index in batch)
        rest: list[tuple[int, ...]] = []
        for bucket in buckets:
            entries = list((Counter(bucket) - used).elements())
            rest += [tuple(entries[at : at + batch_size]) for at in range(0, len(entries), batch_size)]
        total = sum(-(-len(bucket) // batch_size) for bucket in buckets)
        return (played + rest)[:total]


def trained_tensors(folder: Path) -> dict[str, Tensor]:
    """The LoRA that sd-scripts saved at the end of a recorded run, in float32."""
    return {name: value.to(torch.float32) for name, value in load_file(folder / "parity.safetensors").items()}
