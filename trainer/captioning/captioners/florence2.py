"""Florence-2 (Xiao et al. 2023, arXiv:2311.06242), in transformers' own classes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import Field

from trainer.captioning.captioners._base import BatchSize, Captioner, Options, Say, loaded

if TYPE_CHECKING:
    import torch
    from PIL import Image

TASKS = {"short": "<CAPTION>", "detailed": "<DETAILED_CAPTION>", "most detailed": "<MORE_DETAILED_CAPTION>"}
"""What the model was taught to be asked for (its model card)."""


class Florence2Options(Options):
    """How much to write."""

    detail: Annotated[Literal["short", "detailed", "most detailed"], Field(title="Detail")] = "detailed"
    """Short is one sentence; most detailed is a paragraph, which suits FLUX."""
    batch_size: BatchSize = 1
    """Pictures at a time; more is faster on a graphics card."""
    num_beams: Annotated[int, Field(title="Beams", ge=1, le=16)] = 3
    """More beams look further for a likely caption, and take longer."""
    max_new_tokens: Annotated[int, Field(title="Longest caption (tokens)", ge=1, le=1024)] = 256
    """The model ends there."""


class Florence2(Captioner):
    """Florence-2."""

    title = "Florence-2"
    writes: ClassVar[Literal["sentences", "tags"]] = "sentences"
    models = ("florence-community/Florence-2-base", "florence-community/Florence-2-large")
    about = "Small and quick, from a sentence to a paragraph."
    options_class = Florence2Options

    def __init__(self, model: Any, processor: Any, options: Florence2Options) -> None:
        self.model, self.processor, self.options = model, processor, options
        self.batch_size = options.batch_size

    @classmethod
    def load(cls, model: Path, options: Any, device: torch.device, dtype: torch.dtype, say: Say) -> Florence2:
        """Load the model; see `Captioner.load`."""
        from trainer.libraries import transformers

        network, processor = loaded(
            model,
            transformers.Florence2ForConditionalGeneration,
            transformers.Florence2Processor,
            device,
            dtype,
        )
        return cls(network, processor, options)

    def describe(self, pictures: Sequence[Image.Image]) -> list[str]:
        """A text for each picture."""
        options, task = self.options, TASKS[self.options.detail]
        inputs = self.processor(
            images=[picture.convert("RGB") for picture in pictures],
            text=[task] * len(pictures),
            return_tensors="pt",
            padding=True,
        ).to(self.model.device, self.model.dtype)
        room = self.model.config.text_config.max_position_embeddings - 1
        found = self.model.generate(
            **inputs,
            max_new_tokens=min(options.max_new_tokens, room),
            num_beams=options.num_beams,
            do_sample=False,
        )
        texts = self.processor.batch_decode(found, skip_special_tokens=True)
        return [text.strip() for text in texts]


PLUGIN = Florence2
