"""KohyaConfig: every setting of Kohya's LoRA tab, under Kohya's names."""

from __future__ import annotations

from trainer.config.accelerate import AccelerateFields
from trainer.config.advanced import AdvancedFields
from trainer.config.anima import AnimaFields
from trainer.config.blocks import BlockFields
from trainer.config.compute import ComputeFields
from trainer.config.flux import FluxFields
from trainer.config.folders import FolderFields
from trainer.config.huggingface import HuggingFaceFields
from trainer.config.hunyuan import HunyuanFields
from trainer.config.kiln import KilnFields
from trainer.config.loss import LossFields
from trainer.config.lumina import LuminaFields
from trainer.config.lycoris import LycorisFields
from trainer.config.metadata import MetadataFields
from trainer.config.model import ModelFields
from trainer.config.network import NetworkFields
from trainer.config.network_type import NetworkTypeFields
from trainer.config.noise import NoiseFields
from trainer.config.rates import RateFields
from trainer.config.samples import SampleFields
from trainer.config.saving import SavingFields
from trainer.config.sd3 import Sd3Fields
from trainer.config.sdxl import SdxlFields
from trainer.config.state import StateFields
from trainer.config.training import TrainingFields
from trainer.config.ui import Ui

__all__ = ["KohyaConfig", "help_of", "ui_of"]


# pydantic lists the fields of the last base first, so the bases stand in the reverse of the page's order.
class KohyaConfig(
    HuggingFaceFields,
    SampleFields,
    KilnFields,
    StateFields,
    NoiseFields,
    LossFields,
    ComputeFields,
    SavingFields,
    AdvancedFields,
    BlockFields,
    LuminaFields,
    AnimaFields,
    HunyuanFields,
    Sd3Fields,
    FluxFields,
    SdxlFields,
    NetworkFields,
    LycorisFields,
    RateFields,
    TrainingFields,
    NetworkTypeFields,
    AccelerateFields,
    MetadataFields,
    FolderFields,
    ModelFields,
):
    """A checked configuration, as in Kohya's JSON, with the settings of our own.

    Values keep Kohya's types; a value outside a setting's choices or bounds is taken as it is, as
    files hold such values (`trainer.config.load` reports them). Keys that are no settings stay in
    ``model_extra`` and are written back.
    """


def ui_of(name: str) -> Ui:
    """Place, looks and effect of a setting.

    Raises:
        KeyError: There is no setting of that name.
    """
    return KohyaConfig.setting(name).ui


def help_of(name: str) -> str:
    """What a setting does, in a sentence or two for a newcomer.

    Raises:
        KeyError: There is no setting of that name.
    """
    return " ".join((KohyaConfig.model_fields[name].description or "").split())
