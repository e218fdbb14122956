"""What becomes of a caption each time its sample is drawn, in sd-scripts' order.

Source of order and rules: sd-scripts, train_util.py:BaseDataset.process_caption.
"""

from __future__ import annotations

import math
import random
import re
from collections.abc import Mapping

from trainer.data.types import Dataset, Subset

__all__ = ["drops_captions", "process", "tag_frequency", "varies"]

# Private-use characters stand for literal braces while wildcards are resolved.
OPEN, CLOSE = "\ue000", "\ue001"


def _wildcards(caption: str, rng: random.Random) -> str:
    """One of several lines, then one option of each ``{a|b|c}``; doubled braces are literal ones."""
    if "\n" in caption:
        caption = rng.choice(caption.split("\n"))
    caption = caption.replace("{{", OPEN).replace("}}", CLOSE)
    caption = re.sub(r"\{([^}]+)\}", lambda match: rng.choice(match.group(1).split("|")), caption)
    return caption.replace(OPEN, "{").replace(CLOSE, "}")


def _tags(text: str, separator: str) -> list[str]:
    return [tag.strip() for tag in text.split(separator)]


def _parts(caption: str, subset: Subset) -> tuple[list[str], list[str], list[str]]:
    """Tags that stay in front, tags that may move or go, tags that stay at the end."""
    separator, keep = subset.caption_separator, subset.keep_tokens_separator
    if keep and keep in caption:
        front, _, rest = caption.partition(keep)
        middle, _, end = rest.partition(keep)
        fixed, flexible, tail = (list(filter(None, _tags(part, separator))) for part in (front, middle, end))
        return fixed, flexible, tail
    tags = _tags(caption.strip(), separator)
    count = max(subset.keep_tokens, 0)
    return tags[:count], tags[count:], []


def _warmed_up(tags: list[str], subset: Subset, step: int, max_steps: int) -> list[str]:
    """The tags that token warm-up allows so far; a warm-up below 1 is a share of the run."""
    warmup = subset.token_warmup_step
    if warmup < 1:
        warmup = math.floor(warmup * max_steps)
    if not warmup or step >= warmup:
        return tags
    slope = (len(tags) - subset.token_warmup_min) / warmup
    return tags[: math.floor(step * slope) + subset.token_warmup_min]


def process(
    caption: str,
    subset: Subset,
    rng: random.Random,
    *,
    epoch: int,
    step: int,
    max_steps: int,
) -> str:
    """The text that one sample is trained with.

    Args:
        caption: As stored with the picture, several lines with wildcards on.
        subset: Its rules.
        rng: The sample's own random generator.
        epoch: From 1.
        step: Optimizer updates done so far.
        max_steps: Optimizer updates of the whole run.
    """
    if subset.caption_prefix:
        caption = f"{subset.caption_prefix} {caption}"
    if subset.caption_suffix:
        caption = f"{caption} {subset.caption_suffix}"
    if subset.caption_dropout_rate > 0 and rng.random() < subset.caption_dropout_rate:
        return ""
    if subset.caption_dropout_every_n_epochs > 0 and epoch % subset.caption_dropout_every_n_epochs == 0:
        return ""
    caption = _wildcards(caption, rng) if subset.enable_wildcard else caption.split("\n")[0]
    if subset.shuffle_caption or subset.token_warmup_step > 0 or subset.caption_tag_dropout_rate > 0:
        fixed, flexible, tail = _parts(caption, subset)
        flexible = _warmed_up(flexible, subset, step, max_steps)
        if subset.shuffle_caption:
            rng.shuffle(flexible)
        if subset.caption_tag_dropout_rate > 0:
            flexible = [tag for tag in flexible if rng.random() >= subset.caption_tag_dropout_rate]
        caption = ", ".join(fixed + flexible + tail)
    if subset.secondary_separator:
        caption = caption.replace(subset.secondary_separator, subset.caption_separator)
    return caption


def varies(subset: Subset) -> bool:
    """Whether the same picture may get another caption from one draw to the next."""
    return bool(
        drops_captions(subset)
        or subset.shuffle_caption
        or subset.token_warmup_step > 0
        or subset.caption_tag_dropout_rate > 0
        or subset.enable_wildcard
    )


def drops_captions(subset: Subset) -> bool:
    """Whether a sample may be trained with an empty caption."""
    return subset.caption_dropout_rate > 0 or subset.caption_dropout_every_n_epochs > 0


def tag_frequency(dataset: Dataset) -> Mapping[str, Mapping[str, int]]:
    """How many pictures of each folder have each tag (metadata ss_tag_frequency).

    Folders by their name; tags are split at commas, stripped and in lower case, and a picture
    counts once whatever its repeats (sd-scripts, train_util.py:BaseDataset.set_tag_frequency).
    """
    frequency: dict[str, dict[str, int]] = {}
    for picture in dataset.pictures:
        counts = frequency.setdefault(dataset.subsets[picture.subset].folder.name, {})
        for tag in picture.caption.split(","):
            if name := tag.strip().lower():
                counts[name] = counts.get(name, 0) + 1
    return frequency
