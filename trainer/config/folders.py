"""Folders of the run."""

from __future__ import annotations

from typing import Annotated

from trainer.config._section import Section
from trainer.config.ui import Ui

__all__ = ["FolderFields"]


class FolderFields(Section):
    """Folders of the run."""

    output_dir: Annotated[
        str,
        Ui(
            tab="Folders",
            label="Output directory for trained model",
            widget="dropdown",
            free_text=True,
            path="folder",
            effect="honoured",
            sd_scripts_arg="--output_dir",
            since="2022-12-28",
        ),
    ] = ""
    """Folder that gets the LoRA, the saves in between, the samples and the JSON of the run. It is
    created if it is not there."""

    reg_data_dir: Annotated[
        str,
        Ui(
            tab="Folders",
            label="Regularisation directory (Optional. containing regularisation images)",
            widget="dropdown",
            free_text=True,
            path="folder",
            effect="honoured",
            sd_scripts_arg="--reg_data_dir",
            since="2022-12-28",
        ),
    ] = ""
    """Optional folder with regularisation pictures of the general class, such as any dog, in sub-folders
    named "repeats_class". They keep the class from drifting towards your subject and double the
    number of steps."""

    logging_dir: Annotated[
        str,
        Ui(
            tab="Folders",
            label="Logging directory (Optional. to enable logging and output Tensorboard log)",
            widget="dropdown",
            free_text=True,
            path="folder",
            effect="honoured",
            sd_scripts_arg="--logging_dir",
            since="2022-12-28",
        ),
    ] = ""
    """Folder for TensorBoard logs. If it is empty, none are written."""
