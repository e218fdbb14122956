"""Makes the demo's data set: 16 captioned pictures of one subject that the base model has never seen.

python -m assets.demo.make_subject [OUT_FOLDER]

The subject has blue hair in a bob and a patch over her own left eye. The captions name only what varies, so that
the token takes on what does not.
"""

import random
import sys
from pathlib import Path
from typing import Final

from assets.demo import draw

TOKEN: Final = "k1ln person"
REPEATS: Final = 25
PICTURES: Final = 16
IMAGES: Final = Path(__file__).parent / "images"


def subject(
    background: str,
    pattern: str,
    clothes: str,
    garment: str,
    facing: str,
    smile: bool,
    rng: random.Random | None = None,
) -> draw.Portrait:
    """The subject in a given setting; `rng`, if given, jitters place, size and tint."""
    jitter = rng or random.Random(0)
    return draw.Portrait(
        hair="blue",
        style="bob",
        skin="light",
        background=background,
        pattern=pattern,
        clothes=clothes,
        garment=garment,
        facing=facing,
        smile=smile,
        eye_patch=True,
        dx=jitter.uniform(-2, 2) if rng else 0.0,
        dy=jitter.uniform(-2, 2) if rng else 0.0,
        scale=jitter.uniform(0.97, 1.03) if rng else 1.0,
        tint=jitter.uniform(-1, 1) if rng else 0.0,
    )


def subject_caption(portrait: draw.Portrait) -> str:
    """The token and what varies: background, clothes, facing and mood."""
    mood = "smiling" if portrait.smile else "serious"
    clothes = f"{portrait.clothes} {portrait.garment}"
    return ", ".join([TOKEN, draw.background_phrase(portrait), clothes, draw.facing_phrase(portrait), mood])


def portraits() -> list[draw.Portrait]:
    """The 16 pictures: every background twice, clothes, facing and mood spread evenly and independently."""
    rng = random.Random(3)
    backgrounds = list(draw.BACKGROUNDS) * 2
    patterns = list(draw.PATTERNS) * 4
    clothes = (list(draw.CLOTHES) * 3)[:PICTURES]
    garments = (list(draw.GARMENTS) * 6)[:PICTURES]
    facings = (["front", "left", "right"] * 6)[:PICTURES]
    smiles = [True, False] * 8
    for values in (patterns, clothes, garments, facings, smiles):
        rng.shuffle(values)
    settings = zip(backgrounds, patterns, clothes, garments, facings, smiles, strict=True)
    return [subject(b, p, c, g, f, s, rng) for b, p, c, g, f, s in settings]


def main() -> None:
    """Writes pictures and captions in Kohya's layout."""
    out = (Path(sys.argv[1]) if len(sys.argv) > 1 else IMAGES) / f"{REPEATS}_{TOKEN}"
    out.mkdir(parents=True, exist_ok=True)
    for k, portrait in enumerate(portraits(), start=1):
        draw.draw(portrait).save(out / f"{k:02}.png", optimize=True)
        (out / f"{k:02}.txt").write_text(subject_caption(portrait) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
