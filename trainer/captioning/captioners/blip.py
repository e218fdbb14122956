"""BLIP (Li et al. 2022, arXiv:2201.12086), with the settings of Kohya's BLIP captioning.

Facts: sd-scripts, finetune/make_captions.py and finetune/blip/blip.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import Field

from trainer.captioning.captioners._base import BatchSize, Captioner, Options, Say, loaded

if TYPE_CHECKING:
    import torch
    from PIL import Image

PROMPT = "a picture of"
"""What BLIP was taught to begin with; it is cut off again."""
NUCLEUS_PENALTY = 1.1
"""Repetition penalty of nucleus sampling; with beams there is none."""


class BlipOptions(Options):
    """Kohya's fields, with its defaults."""

    batch_size: BatchSize = 1
    """Pictures at a time; more is faster on a graphics card."""
    beam_search: Annotated[bool, Field(title="Beam search")] = True
    """Takes the likeliest caption. Off: each word is drawn at random, within Top p."""
    num_beams: Annotated[int, Field(title="Beams", ge=1, le=16)] = 1
    """More beams look further for a likely caption, and take longer."""
    top_p: Annotated[float, Field(title="Top p", ge=0.05, le=1)] = 0.9
    """Share of the probability that words are drawn from, without beam search."""
    max_length: Annotated[int, Field(title="Longest caption (tokens)", ge=5, le=150)] = 75
    """Counted with the beginning "a picture of", as Kohya counts."""
    min_length: Annotated[int, Field(title="Shortest caption (tokens)", ge=0, le=150)] = 5
    """Counted like the longest."""


class Blip(Captioner):
    """BLIP's caption model."""

    title = "BLIP"
    writes: ClassVar[Literal["sentences", "tags"]] = "sentences"
    models = ("Salesforce/blip-image-captioning-large", "Salesforce/blip-image-captioning-base")
    about = "One short sentence for each picture, as Kohya's BLIP captioning writes it."
    options_class = BlipOptions

    def __init__(self, model: Any, processor: Any, options: BlipOptions) -> None:
        self.model, self.processor, self.options = model, processor, options
        self.batch_size = options.batch_size

    @classmethod
    def load(cls, model: Path, options: Any, device: torch.device, dtype: torch.dtype, say: Say) -> Blip:
        """Load the model; see `Captioner.load`."""
        from trainer.libraries import transformers

        network, processor = loaded(
            model, transformers.BlipForConditionalGeneration, transformers.BlipProcessor, device, dtype
        )
        return cls(network, processor, options)

    def describe(self, pictures: Sequence[Image.Image]) -> list[str]:
        """A sentence for each picture."""
        options, tokenizer = self.options, self.processor.tokenizer
        device, dtype = self.model.device, self.model.dtype
        pixels = self.processor.image_processor(
            [picture.convert("RGB") for picture in pictures], return_tensors="pt"
        ).pixel_values
        ids = tokenizer([PROMPT] * len(pictures), return_tensors="pt").input_ids
        if options.beam_search:
            how: dict[str, Any] = {"num_beams": options.num_beams, "do_sample": False}
        else:
            how = {"do_sample": True, "top_p": options.top_p, "repetition_penalty": NUCLEUS_PENALTY}
        longest = min(options.max_length, self.model.config.text_config.max_position_embeddings)
        found = self.model.generate(
            pixel_values=pixels.to(device, dtype),
            input_ids=ids.to(device),
            max_length=longest,
            min_length=min(options.min_length, longest),
            **how,
        )
        texts = tokenizer.batch_decode(found, skip_special_tokens=True)
        return [text.strip().removeprefix(PROMPT).strip() for text in texts]


PLUGIN = Blip
