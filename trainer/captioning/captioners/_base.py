"""What a captioner is: settings of its own, a model, and a text for each picture."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, Field

from trainer.errors import ModelFileError

if TYPE_CHECKING:
    import torch
    from PIL import Image

__all__ = ["BatchSize", "Captioner", "Options", "Say", "find", "loaded"]

Say = Callable[[str], None]

HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+", re.ASCII)


class Options(BaseModel, frozen=True, extra="forbid", use_attribute_docstrings=True):
    """Settings of a captioner. Title, bounds and docstring of a field make its widget."""


BatchSize = Annotated[int, Field(title="Batch size", ge=1, le=64)]


class Captioner(ABC):
    """A loaded captioner."""

    title: ClassVar[str]
    """Its name on the page."""
    writes: ClassVar[Literal["sentences", "tags"]]
    models: ClassVar[tuple[str, ...]]
    """Names on the model hub, the usual one first."""
    about: ClassVar[str]
    """One sentence: what it is good for."""
    options_class: ClassVar[type[Options]]
    files: ClassVar[tuple[str, ...]] = ("*.json", "*.txt", "*.model", "*.jinja", "*.safetensors")
    """Patterns of what is fetched from the hub."""
    needed: ClassVar[tuple[str, ...]] = ("config.json", "*.safetensors")
    """Patterns of which a folder must hold a file each."""
    batch_size: int
    """Pictures that it is given at a time."""

    @classmethod
    @abstractmethod
    def load(cls, model: Path, options: Any, device: torch.device, dtype: torch.dtype, say: Say) -> Captioner:
        """Load the model.

        Args:
            model: Its folder.
            options: An instance of `options_class`.
            device: Where it computes.
            dtype: Precision of its weights.
            say: Takes what a person may want to know.

        Raises:
            ModelFileError: The folder holds no such model.
        """

    @abstractmethod
    def describe(self, pictures: Sequence[Image.Image]) -> list[str]:
        """A text for each picture.

        Args:
            pictures: Upright, RGBA; at most `batch_size`.
        """


def find(model: str, base: Path, captioner: type[Captioner], say: Say) -> Path:
    """The folder of a captioner's model.

    Args:
        model: A folder, or a name on the model hub: owner/name.
        base: Folder of relative paths.
        captioner: Whose model it is.
        say: Told before anything is fetched.

    Raises:
        ModelFileError: It is neither here nor on the hub, or lacks a file.
    """
    text = model.strip()
    if not text or "\0" in text:
        raise ModelFileError("no captioner model is named: give a folder or a name such as owner/name")
    path = base / Path(text).expanduser()
    if path.is_file():
        raise ModelFileError(f"{path} is a file: give the folder that holds it (Model)")
    folder = path if path.is_dir() else _from_hub(text, path, captioner.files, say)
    for pattern in captioner.needed:
        if not any(folder.glob(pattern)):
            raise ModelFileError(f"{folder} has no {pattern}: it is no model for {captioner.title}")
    return folder


def _from_hub(name: str, path: Path, files: Sequence[str], say: Say) -> Path:
    if not HUB_NAME.fullmatch(name):
        raise ModelFileError(f"{path} does not exist: give a folder, or a name on the model hub (owner/name)")
    from huggingface_hub import constants, snapshot_download

    offline = bool(constants.HF_HUB_OFFLINE)
    reason: Exception | None = None
    for local in (True,) if offline else (True, False):
        if not local:
            say(f"{name} is not on this machine: fetching it from the model hub")
        try:
            return Path(snapshot_download(name, allow_patterns=list(files), local_files_only=local))
        except Exception as error:  # noqa: BLE001 - the hub client raises its own, httpx's and OS errors
            reason = error
    raise ModelFileError(
        f"{name} is neither a folder here nor in the model cache, "
        + ("and the hub is switched off (HF_HUB_OFFLINE)" if offline else "and the hub did not give it")
        + ": download its files into a folder and give that folder as Model"
    ) from reason


def loaded(
    model: Path, model_class: Any, processor_class: Any, device: torch.device, dtype: torch.dtype
) -> tuple[Any, Any]:
    """Model and processor from a folder of the transformers library, frozen and in eval mode.

    Raises:
        ModelFileError: The folder holds another kind of model, or is incomplete.
    """
    from trainer import devices
    from trainer.libraries import transformers

    try:
        kind = transformers.AutoConfig.from_pretrained(str(model), local_files_only=True).model_type
        wanted = model_class.config_class.model_type
        if kind != wanted:
            raise ModelFileError(f"{model} holds a model of the kind {kind}: this captioner needs {wanted}")
        processor = processor_class.from_pretrained(str(model), local_files_only=True)
        with devices.DEFAULT_DTYPE:
            network, report = model_class.from_pretrained(
                str(model), local_files_only=True, dtype=dtype, output_loading_info=True
            )
    except ModelFileError:
        raise
    except Exception as error:  # damaged files raise anything
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise ModelFileError(
            f"the model in {model} cannot be loaded ({reason[0][:200]}): get its files again"
        ) from error
    if missing := sorted(report["missing_keys"]):
        raise ModelFileError(
            f"the model in {model} is incomplete: {len(missing)} tensors are missing, such as {missing[0]}"
        )
    return network.to(device).eval().requires_grad_(False), processor
