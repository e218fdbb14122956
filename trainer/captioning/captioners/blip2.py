"""BLIP-2 (Li et al. 2023, arXiv:2301.12597), with the settings of Kohya's BLIP2 captioning.

Facts: kohya_ss, kohya_gui/blip2_caption_gui.py.
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


class Blip2Options(Options):
    """Kohya's fields, with its defaults."""

    batch_size: BatchSize = 1
    """Pictures at a time; more is faster on a graphics card."""
    beam_search: Annotated[bool, Field(title="Beam search")] = True
    """Takes the likeliest caption. Off: each word is drawn at random, within Top p."""
    num_beams: Annotated[int, Field(title="Beams", ge=1, le=16)] = 16
    """More beams look further for a likely caption, and take longer."""
    length_penalty: Annotated[float, Field(title="Length penalty", ge=-1, le=2)] = 1.0
    """Above 0 beams favour longer captions."""
    repetition_penalty: Annotated[float, Field(title="Repetition penalty", ge=1, le=5)] = 1.5
    """Above 1 words are repeated less."""
    temperature: Annotated[float, Field(title="Temperature", ge=0.1, le=2)] = 1.0
    """Without beam search: higher is more varied and less true."""
    top_p: Annotated[float, Field(title="Top p", ge=0.05, le=1)] = 0.9
    """Share of the probability that words are drawn from, without beam search."""
    max_new_tokens: Annotated[int, Field(title="Longest caption (tokens)", ge=1, le=256)] = 40
    """The model ends there."""
    min_new_tokens: Annotated[int, Field(title="Shortest caption (tokens)", ge=0, le=256)] = 20
    """The model goes on until there."""
    prompt: Annotated[str, Field(title="Question or beginning", max_length=500)] = ""
    """Such as "Question: what is the man wearing? Answer:"; empty for a plain caption."""


class Blip2(Captioner):
    """BLIP-2 with OPT or T5 behind it."""

    title = "BLIP-2"
    writes: ClassVar[Literal["sentences", "tags"]] = "sentences"
    models = ("Salesforce/blip2-opt-2.7b", "Salesforce/blip2-flan-t5-xl")
    about = "Longer sentences than BLIP's; needs about 8 GB of memory."
    options_class = Blip2Options

    def __init__(self, model: Any, processor: Any, options: Blip2Options) -> None:
        self.model, self.processor, self.options = model, processor, options
        self.batch_size = options.batch_size

    @classmethod
    def load(cls, model: Path, options: Any, device: torch.device, dtype: torch.dtype, say: Say) -> Blip2:
        """Load the model; see `Captioner.load`."""
        from trainer.libraries import transformers

        network, processor = loaded(
            model, transformers.Blip2ForConditionalGeneration, transformers.Blip2Processor, device, dtype
        )
        return cls(network, processor, options)

    def describe(self, pictures: Sequence[Image.Image]) -> list[str]:
        """A sentence for each picture."""
        options = self.options
        inputs = self.processor(
            images=[picture.convert("RGB") for picture in pictures],
            text=[options.prompt] * len(pictures),
            return_tensors="pt",
            padding=True,
        ).to(self.model.device, self.model.dtype)
        if options.beam_search:
            how: dict[str, Any] = {
                "do_sample": False,
                "num_beams": options.num_beams,
                "length_penalty": options.length_penalty,
                "repetition_penalty": options.repetition_penalty,
            }
        else:
            how = {"do_sample": True, "top_p": options.top_p, "temperature": options.temperature}
        found = self.model.generate(
            **inputs,
            max_new_tokens=options.max_new_tokens,
            min_new_tokens=min(options.min_new_tokens, options.max_new_tokens),
            **how,
        )
        texts = self.processor.batch_decode(found, skip_special_tokens=True)
        return [text.strip().removeprefix(options.prompt.strip()).strip() for text in texts]


PLUGIN = Blip2
