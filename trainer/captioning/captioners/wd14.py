"""WD14 taggers: networks that give each picture the tags of an image board, through onnxruntime.

Facts: sd-scripts, finetune/tag_images_by_wd14_tagger.py; the models' cards (SmilingWolf, on the hub).
"""

from __future__ import annotations

import csv
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

import numpy as np
import numpy.typing as npt
from pydantic import Field

from trainer.captioning.captioners._base import BatchSize, Captioner, Options, Say
from trainer.errors import ConfigError, ModelFileError

if TYPE_CHECKING:
    import torch
    from PIL import Image

Pixels = npt.NDArray[np.float32]

SIZE_PX = 448
"""Edge of what the taggers see, where the file does not say."""
KINDS = {"9": "rating", "0": "general", "4": "character"}
"""Column ``category`` of selected_tags.csv."""
SHORTEST_WORD = 3
"""Up to this length an underscore belongs to a face such as ^_^ (sd-scripts: remove_underscore)."""
PROVIDERS = ("CUDAExecutionProvider", "ROCMExecutionProvider", "CPUExecutionProvider")


class Wd14Options(Options):
    """Kohya's fields, with its defaults."""

    general_threshold: Annotated[float, Field(title="General threshold", ge=0, le=1)] = 0.35
    """A tag is written from this probability on; lower gives more tags."""
    character_threshold: Annotated[float, Field(title="Character threshold", ge=0, le=1)] = 0.35
    """The same for names of characters."""
    undesired_tags: Annotated[str, Field(title="Undesired tags", max_length=10_000)] = ""
    """Never written; separated by commas, spelled as they would be written."""
    remove_underscore: Annotated[bool, Field(title="Spaces for underscores")] = True
    """Writes "long hair" for long_hair."""
    character_tags_first: Annotated[bool, Field(title="Characters first")] = False
    """Names of characters before all other tags."""
    character_tag_expand: Annotated[bool, Field(title="Expand characters")] = False
    """Writes name_(series) as two tags."""
    rating: Annotated[Literal["no", "first", "last"], Field(title="Rating tag")] = "no"
    """Whether and where the likeliest rating is written (general, sensitive ...)."""
    always_first_tags: Annotated[str, Field(title="Always first", max_length=2_000)] = ""
    """Tags that are moved to the front where they were found; separated by commas."""
    tag_replacement: Annotated[str, Field(title="Tag replacement", max_length=10_000)] = ""
    """source,target;source,target; a comma or semicolon inside a tag gets a backslash."""
    caption_separator: Annotated[str, Field(title="Separator", min_length=1, max_length=10)] = ", "
    """Stands between tags."""
    batch_size: BatchSize = 1
    """Pictures at a time; more is faster on a graphics card."""


@dataclass(frozen=True)
class Tag:
    """One output of the network."""

    name: str
    kind: str
    """"rating", "general" or "character"; others are never written."""


class Wd14(Captioner):
    """A WD14 tagger of any generation."""

    title = "WD14 tagger"
    writes: ClassVar[Literal["sentences", "tags"]] = "tags"
    models = (
        "SmilingWolf/wd-v1-4-convnextv2-tagger-v2",
        "SmilingWolf/wd-v1-4-convnext-tagger-v2",
        "SmilingWolf/wd-v1-4-vit-tagger-v2",
        "SmilingWolf/wd-v1-4-swinv2-tagger-v2",
        "SmilingWolf/wd-v1-4-moat-tagger-v2",
        "SmilingWolf/wd-swinv2-tagger-v3",
        "SmilingWolf/wd-vit-tagger-v3",
        "SmilingWolf/wd-convnext-tagger-v3",
        "SmilingWolf/wd-eva02-large-tagger-v3",
    )
    about = "Tags of an image board, for anime and for models that were trained on such tags."
    options_class = Wd14Options
    files = needed = ("model.onnx", "selected_tags.csv")

    def __init__(self, session: Any, tags: Sequence[Tag], options: Wd14Options) -> None:
        self.session, self.options = session, options
        self.tags = _spelled(tags, options)
        given = session.get_inputs()[0]
        self.input = given.name
        fixed, edge = given.shape[0], given.shape[1]
        self.size_px = edge if isinstance(edge, int) and edge > 0 else SIZE_PX
        self.batch_size = fixed if isinstance(fixed, int) and fixed > 0 else options.batch_size
        self.unwanted = {tag for tag in _listed(options.undesired_tags) if tag}

    @classmethod
    def load(cls, model: Path, options: Any, device: torch.device, dtype: torch.dtype, say: Say) -> Wd14:
        """Load the model; see `Captioner.load`. The device is the best that onnxruntime has."""
        import onnxruntime

        available = onnxruntime.get_available_providers()
        provider = next((name for name in PROVIDERS if name in available), "CPUExecutionProvider")
        wishes = onnxruntime.SessionOptions()
        wishes.log_severity_level = 3  # errors; what else it says is of no use to a person
        try:
            session = onnxruntime.InferenceSession(
                str(model / "model.onnx"), sess_options=wishes, providers=[provider]
            )
        except Exception as error:  # onnxruntime raises its own kinds, none of them public
            reason = str(error).strip().splitlines() or [type(error).__name__]
            raise ModelFileError(
                f"{model / 'model.onnx'} cannot be loaded ({reason[0][:200]}): get the file again"
            ) from error
        tags = read_tags(model / "selected_tags.csv")
        outputs = session.get_outputs()[0].shape[-1]
        if isinstance(outputs, int) and outputs != len(tags):
            raise ModelFileError(
                f"{model} has {len(tags)} tags in selected_tags.csv, but its network gives {outputs}: "
                "the two files belong to different models"
            )
        say(f"tagger runs on {provider.removesuffix('ExecutionProvider')}, {len(tags)} tags")
        return cls(session, tags, options)

    def describe(self, pictures: Sequence[Image.Image]) -> list[str]:
        """The tags of each picture, the likely ones of each kind in the order of the tagger's list."""
        batch = np.stack([prepared(picture, self.size_px) for picture in pictures])
        missing = self.batch_size - len(batch) if self._is_fixed() else 0
        if missing > 0:
            batch = np.concatenate([batch, np.zeros((missing, *batch.shape[1:]), np.float32)])
        rows = self.session.run(None, {self.input: batch})[0][: len(pictures)]
        return [self.options.caption_separator.join(self.chosen(row)) for row in rows]

    def _is_fixed(self) -> bool:
        return isinstance(self.session.get_inputs()[0].shape[0], int)

    def chosen(self, probabilities: npt.NDArray[Any]) -> list[str]:
        """The tags that are written for one picture.

        Args:
            probabilities: One for each of the network's tags.
        """
        options = self.options
        found: dict[str, list[str]] = {"general": [], "character": []}
        limits = {"general": options.general_threshold, "character": options.character_threshold}
        rating, best = "", -1.0
        for tag, value in zip(self.tags, probabilities, strict=True):
            if tag.kind == "rating" and value > best:
                rating, best = tag.name, float(value)
            elif tag.kind in found and value >= limits[tag.kind] and tag.name not in self.unwanted:
                found[tag.kind].append(tag.name)
        order = ("character", "general") if options.character_tags_first else ("general", "character")
        chosen = [name for kind in order for name in found[kind]]
        if options.rating != "no" and rating and rating not in self.unwanted:
            chosen.insert(0 if options.rating == "first" else len(chosen), rating)
        first = [tag for tag in _listed(options.always_first_tags) if tag in chosen]
        return list(dict.fromkeys([*first, *chosen]))


def prepared(picture: Image.Image, size_px: int) -> Pixels:
    """A picture as the taggers want it: HWC, blue-green-red, 0 to 255, padded with white to a square."""
    from PIL import Image

    from trainer.data.images import resize  # imports PyTorch, which the page's list of settings shall not

    canvas = Image.new("RGBA", picture.size, "white")
    canvas.alpha_composite(picture.convert("RGBA"))
    pixels = np.asarray(canvas.convert("RGB"))
    height, width = pixels.shape[:2]
    edge = max(height, width)
    top, left = (edge - height) // 2, (edge - width) // 2
    square = np.full((edge, edge, 3), 255, np.uint8)
    square[top : top + height, left : left + width] = pixels
    return resize(square, (size_px, size_px))[:, :, ::-1].astype(np.float32)


def read_tags(file: Path) -> list[Tag]:
    """The tags of ``selected_tags.csv``, one for each output of the network.

    Raises:
        ModelFileError: The file is missing or has other columns.
    """
    try:
        with file.open(encoding="utf-8", newline="") as lines:
            rows = list(csv.DictReader(lines))
        return [Tag(row["name"], KINDS.get(row["category"], "")) for row in rows]
    except (OSError, UnicodeDecodeError, KeyError, csv.Error) as error:
        raise ModelFileError(
            f"{file} cannot be read as a tagger's list (tag_id, name, category, count): {error}"
        ) from error


def _listed(text: str) -> list[str]:
    return [tag.strip() for tag in text.split(",") if tag.strip()]


def _spelled(tags: Sequence[Tag], options: Wd14Options) -> list[Tag]:
    """The tags as they are written."""
    replaced = _replacements(options.tag_replacement)
    found = []
    for tag in tags:
        name = tag.name
        if options.character_tag_expand and tag.kind == "character" and name.endswith(")") and "(" in name:
            own, _, series = name.removesuffix(")").rpartition("(")
            name = f"{own.removesuffix('_')}{options.caption_separator}{series}"
        if options.remove_underscore and len(tag.name) > SHORTEST_WORD:
            name = name.replace("_", " ")
        found.append(Tag(replaced.get(name, name), tag.kind))
    return found


def _replacements(text: str) -> dict[str, str]:
    """What "a,b;c,d" asks for (Kohya's page documents it; its own code does not carry it out).

    Raises:
        ConfigError: A part is not source,target.
    """
    hidden = text.replace("\\,", "\ue000").replace("\\;", "\ue001")
    found = {}
    for part in filter(None, (part.strip() for part in hidden.split(";"))):
        source, comma, target = part.partition(",")
        if not comma or "," in target or not source.strip():
            shown = part.replace("\ue000", "\\,").replace("\ue001", "\\;")
            raise ConfigError(f"tag replacement {shown!r} is not source,target")
        found[_shown(source)] = _shown(target)
    return found


def _shown(text: str) -> str:
    return text.strip().replace("\ue000", ",").replace("\ue001", ";")


PLUGIN = Wd14
