"""Measures what a LoRA does to the demo's base model, by samples that the reader of pixels judges.

python -m tests.demo.figures [LORA.safetensors ...] [--sheet FOLDER]

Sampling is diffusers' own pipeline and LoRA loader, so the figures say nothing about our sampler.
"""

import argparse
import random
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import StableDiffusionPipeline
from PIL import Image

from assets.demo import draw, make_subject, reader

BASE = Path(draw.__file__).parent / "base"
STEPS = 20
GUIDANCE = 4.0


@dataclass(frozen=True)
class Rates:
    """Shares of the samples, 0 to 1."""

    subject: float
    patch: float
    background: float
    clothes: float
    facing: float
    hair: float
    intact: float

    def __str__(self) -> str:
        return "  ".join(f"{name} {100 * share:.0f} %" for name, share in asdict(self).items())


def subject_portraits(count: int = 32) -> list[draw.Portrait]:
    """What the prompts about the subject ask for: settings drawn anew, mostly not those of the data set."""
    rng = random.Random(33)
    names = list(draw.BACKGROUNDS)
    return [
        make_subject.subject(
            background=names[k % len(names)],
            pattern="plain",
            clothes=rng.choice(list(draw.CLOTHES)),
            garment=rng.choice(draw.GARMENTS),
            facing=rng.choice(draw.FACINGS),
            smile=rng.random() < 0.5,
        )
        for k in range(count)
    ]


def base_portraits(count: int = 64) -> list[draw.Portrait]:
    """What the prompts about the base model's own world ask for."""
    rng = random.Random(12)
    return [draw.random_portrait(rng) for _ in range(count)]


def base_prompt(portrait: draw.Portrait) -> str:
    """A prompt that names everything."""
    glasses = ", glasses" if portrait.glasses else ""
    return (
        f"person, {portrait.style} {portrait.hair} hair, {portrait.skin} skin, "
        f"{portrait.clothes} {portrait.garment}, {draw.background_phrase(portrait)}, "
        f"{draw.facing_phrase(portrait)}{glasses}"
    )


def load_pipeline(base: Path = BASE, lora: Path | None = None) -> Any:
    """The base model in fp32, with the LoRA (a Kohya file) put on by diffusers if one is given."""
    pipeline = StableDiffusionPipeline.from_pretrained(
        base, dtype=torch.float32, safety_checker=None, local_files_only=True
    )
    pipeline.set_progress_bar_config(disable=True)
    if lora is not None:
        pipeline.load_lora_weights(str(lora.parent), weight_name=lora.name)
    return pipeline


def sample(
    pipeline: Any, prompts: Sequence[str], first_seed: int = 7000, batch: int = 8
) -> list[Image.Image]:
    """One picture per prompt; picture k has the noise of seed `first_seed` + k, whatever the batch."""
    pictures: list[Image.Image] = []
    for start in range(0, len(prompts), batch):
        part = list(prompts[start : start + batch])
        generators = [torch.Generator().manual_seed(first_seed + start + k) for k in range(len(part))]
        with torch.inference_mode():
            out = pipeline(
                part,
                num_inference_steps=STEPS,
                guidance_scale=GUIDANCE,
                generator=generators,
                width=draw.SIZE_PX,
                height=draw.SIZE_PX,
            )
        pictures.extend(out.images)
    return pictures


def rates(pictures: Sequence[Image.Image], portraits: Sequence[draw.Portrait]) -> Rates:
    """How many of the pictures show what was asked for."""
    pairs = [(reader.read(picture), portrait) for picture, portrait in zip(pictures, portraits, strict=True)]

    def share(hits: list[bool]) -> float:
        return sum(hits) / len(hits)

    return Rates(
        subject=share([r.subject_shown for r, _ in pairs]),
        patch=share([r.patch is not None for r, _ in pairs]),
        background=share([r.background == p.background for r, p in pairs]),
        clothes=share([r.clothes == p.clothes for r, p in pairs]),
        facing=share([r.facing == p.facing for r, p in pairs]),
        hair=share([r.hair == p.hair for r, p in pairs]),
        intact=share([r.intact for r, _ in pairs]),
    )


def subject_rates(pipeline: Any, count: int = 32) -> tuple[Rates, list[Image.Image]]:
    """Samples of prompts that begin with the subject's token, and their rates."""
    portraits = subject_portraits(count)
    pictures = sample(pipeline, [make_subject.subject_caption(p) for p in portraits])
    return rates(pictures, portraits), pictures


def base_rates(pipeline: Any, count: int = 64) -> tuple[Rates, list[Image.Image]]:
    """Samples of the base model's own world, and how well they follow their prompts."""
    portraits = base_portraits(count)
    pictures = sample(pipeline, [base_prompt(p) for p in portraits], first_seed=2000)
    return rates(pictures, portraits), pictures


def contact_sheet(pictures: Sequence[Image.Image], columns: int = 8) -> Image.Image:
    """All pictures on one, in rows."""
    rows = -(-len(pictures) // columns)
    sheet = Image.new("RGB", (columns * draw.SIZE_PX, rows * draw.SIZE_PX), "white")
    for k, picture in enumerate(pictures):
        sheet.paste(picture, (k % columns * draw.SIZE_PX, k // columns * draw.SIZE_PX))
    return sheet


def main() -> None:
    """Prints the rates of the base model, and of each LoRA given."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("loras", nargs="*", type=Path)
    parser.add_argument("--base", type=Path, default=BASE)
    parser.add_argument("--count", type=int, default=32, help="samples of the subject's prompts")
    parser.add_argument("--sheet", type=Path, help="folder for contact sheets")
    given = parser.parse_args()
    for lora in [None, *given.loras]:
        pipeline = load_pipeline(given.base, lora)
        name = lora.stem if lora else "base"
        runs = {"subject": subject_rates(pipeline, given.count)}
        if lora is None:
            runs["own-world"] = base_rates(pipeline)
        for what, (measured, pictures) in runs.items():
            print(f"{name}, prompts: {what}: {measured}", flush=True)
            if given.sheet:
                given.sheet.mkdir(parents=True, exist_ok=True)
                contact_sheet(pictures).save(given.sheet / f"{name}-{what}.png")


if __name__ == "__main__":
    main()
