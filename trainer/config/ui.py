"""What a setting looks like and what it does here, as plain data: no widgets, no trainer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import AfterValidator

__all__ = [
    "ANIMA",
    "BLOCK_TYPES",
    "CONVOLUTION_TYPES",
    "DROPOUT_TYPES",
    "DYLORA_TYPES",
    "FLUX",
    "HUNYUAN",
    "LOKR_TYPES",
    "LORA_PLUS_TYPES",
    "LORA_TYPES",
    "LUMINA",
    "LYCORIS_TYPES",
    "NETWORK_DROPOUT_TYPES",
    "NORM_SCALE_TYPES",
    "NORM_TYPES",
    "RAISED_RANK",
    "RAISED_RANK_TYPES",
    "RANKED_TYPES",
    "RANK_MAX",
    "RANK_SCALE_TYPES",
    "SD",
    "SD3",
    "SDXL",
    "TUCKER_TYPES",
    "WEIGHT_TYPES",
    "Effect",
    "Number",
    "PathKind",
    "Tab",
    "Ui",
    "Widget",
]

Effect = Literal["honoured", "adapted", "none"]
"""honoured: as sd-scripts; adapted: our way, `Ui.reason` says how; none: `Ui.reason` says why."""

Tab = Literal[
    "Model", "Folders", "Metadata", "Accelerate launch", "Basic", "Advanced", "Samples", "HuggingFace"
]
Widget = Literal["checkbox", "slider", "number", "textbox", "dropdown"]
PathKind = Literal["", "model", "file", "folder"]


def _whole(value: int | float) -> int | float:
    """A float without a fraction as an integer.

    A browser knows one number type only, so on Kohya's page 16.0 has always become 16 before it
    was saved or trained with (it then reads "16" in a LoRA's metadata).
    """
    if isinstance(value, float) and value.is_integer() and abs(value) < 2**53:
        return int(value)
    return value


Number = Annotated[int | float, AfterValidator(_whole)]
"""A number box: a whole value is an int, anything else a float."""


@dataclass(frozen=True, kw_only=True)
class Ui:
    """Place, looks and effect of one setting.

    The setting's type and default are those of its field, its help text is the field's docstring.
    """

    tab: Tab
    label: str
    """As on Kohya's page."""
    widget: Widget
    effect: Effect
    """What our trainer does with the setting."""
    since: str
    """Day on which the key first appeared in a saved LoRA configuration, YYYY-MM-DD."""
    sd_scripts_arg: str | None
    """How the value reaches sd-scripts; None where it never does."""
    section: str = ""
    """Part of the tab, "" for its main part; nested parts are separated by " > "."""
    reason: str = ""
    """How an adapted setting differs, or why one has no effect."""
    choices: tuple[str | int, ...] = ()
    """Values of a dropdown; () where it lists files or folders of the machine."""
    free_text: bool = False
    """Whether values outside `choices` are as good as those in it."""
    trained_choices: tuple[str | int, ...] | None = None
    """The choices that this version trains; None if all."""
    min: float | None = None
    max: float | None = None
    step: float | None = None
    families: tuple[str, ...] = ()
    """Model families in which the setting has an effect in Kohya; () means all."""
    lora_types: tuple[str, ...] = ()
    """Values of LoRA_type for which Kohya's page shows the setting; () means all."""
    shown_with: tuple[str, str | bool] | None = None
    """Another setting and the value it must have for this one to be shown."""
    hidden: bool = False
    """Kohya never shows it."""
    rare: bool = False
    """Few people would miss it."""
    path: PathKind = ""
    """What the text names on disk, "" if nothing."""
    secret: bool = False
    """Must never reach a file, a log or another page."""
    lines: int = 1
    """Height of a text box."""

    def max_for(self, lora_type: str) -> float | None:
        """The upper bound, which some LyCORIS types raise for ranks."""
        if self.max is not None and self.max == RANK_MAX and lora_type in RAISED_RANK_TYPES:
            return RAISED_RANK
        return self.max

    def outside(self, value: Any, lora_type: str = "Standard") -> str:
        """What is allowed, as a sentence part, if ``value`` lies outside choices or bounds; else ""."""
        if self.choices and not self.free_text:
            return "" if value in self.choices else "one of " + ", ".join(map(_quoted, self.choices))
        if isinstance(value, bool) or not isinstance(value, int | float):
            return ""
        upper = self.max_for(lora_type)
        if self.min is not None and value < self.min:
            return f"at least {self.min:g}"
        if upper is not None and value > upper:
            return f"at most {upper:g}"
        return ""


def _quoted(choice: str | int) -> str:
    return f'"{choice}"' if choice == "" else str(choice)


SD = ("sd15", "sd2", "sdxl")
SDXL = ("sdxl",)
FLUX = ("flux1",)
SD3 = ("sd3",)
HUNYUAN = ("hunyuan",)
ANIMA = ("anima",)
LUMINA = ("lumina",)

LORA_TYPES = (
    "Anima",
    "Flux1",
    "Flux1 OFT",
    "HunyuanImage-2.1",
    "Kohya DyLoRA",
    "Kohya LoCon",
    "Kohya LoHa",
    "Kohya LoKr",
    "LoRA-FA",
    "Lumina",
    "LyCORIS/iA3",
    "LyCORIS/BOFT",
    "LyCORIS/Diag-OFT",
    "LyCORIS/DyLoRA",
    "LyCORIS/GLoRA",
    "LyCORIS/LoCon",
    "LyCORIS/LoHa",
    "LyCORIS/LoKr",
    "LyCORIS/Native Fine-Tuning",
    "Standard",
)
"""Every LoRA_type, in the order of Kohya's list."""

RANK_MAX = 512
RAISED_RANK = 100_000
RAISED_RANK_TYPES = ("LyCORIS/LoHa", "LyCORIS/LoKr", "LyCORIS/BOFT", "LyCORIS/Diag-OFT")
"""Types for which Kohya's rank sliders go up to `RAISED_RANK` (a huge LoKr rank means a full matrix)."""

_WITHOUT_RANK = ("Lumina", "LyCORIS/iA3", "LyCORIS/Native Fine-Tuning")
_LYCORIS_CONVOLUTION = (
    "LyCORIS/BOFT",
    "LyCORIS/Diag-OFT",
    "LyCORIS/DyLoRA",
    "LyCORIS/GLoRA",
    "LyCORIS/LoCon",
    "LyCORIS/LoHa",
    "LyCORIS/LoKr",
)


def _except(*types: str) -> tuple[str, ...]:
    return tuple(name for name in LORA_TYPES if name not in types)


RANKED_TYPES = _except(*_WITHOUT_RANK)
CONVOLUTION_TYPES = (
    "Kohya DyLoRA",
    "Kohya LoCon",
    "Kohya LoHa",
    "Kohya LoKr",
    "LoRA-FA",
    *_LYCORIS_CONVOLUTION,
)
LYCORIS_TYPES = tuple(name for name in LORA_TYPES if name.startswith("LyCORIS/"))
TUCKER_TYPES = ("Kohya LoHa", "Kohya LoKr", *_LYCORIS_CONVOLUTION)
NORM_TYPES = (*_LYCORIS_CONVOLUTION, "LyCORIS/Native Fine-Tuning")
RANK_SCALE_TYPES = tuple(name for name in NORM_TYPES if name != "LyCORIS/DyLoRA")
WEIGHT_TYPES = ("LyCORIS/LoCon", "LyCORIS/LoHa", "LyCORIS/LoKr")
BLOCK_TYPES = (
    "Anima",
    "Flux1",
    "Flux1 OFT",
    "HunyuanImage-2.1",
    "Kohya DyLoRA",
    "Kohya LoCon",
    "LoRA-FA",
    "Standard",
)
NORM_SCALE_TYPES = _except(
    "Flux1 OFT",
    "Kohya LoHa",
    "Kohya LoKr",
    "LyCORIS/iA3",
    "LyCORIS/BOFT",
    "LyCORIS/Diag-OFT",
    "LyCORIS/Native Fine-Tuning",
)
NETWORK_DROPOUT_TYPES = _except("Flux1 OFT", "Kohya LoHa", "Kohya LoKr", "LyCORIS/iA3")
DROPOUT_TYPES = _except("Flux1 OFT", "LyCORIS/iA3", "LyCORIS/DyLoRA")
LORA_PLUS_TYPES = _except(
    "Anima", "Flux1", "Flux1 OFT", "HunyuanImage-2.1", "Lumina", "LyCORIS/iA3", "LyCORIS/DyLoRA"
)
DYLORA_TYPES = ("Kohya DyLoRA", "LyCORIS/DyLoRA")
LOKR_TYPES = ("Kohya LoKr", "LyCORIS/LoKr")
