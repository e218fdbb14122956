"""What is written into the LoRA file about itself."""

from __future__ import annotations

from typing import Annotated

from trainer.config._section import Section
from trainer.config.ui import Ui

__all__ = ["MetadataFields"]


class MetadataFields(Section):
    """What is written into the LoRA file about itself."""

    metadata_title: Annotated[
        str,
        Ui(
            tab="Metadata",
            label="Metadata title",
            widget="textbox",
            effect="honoured",
            sd_scripts_arg="--metadata_title",
            since="2024-04-15",
            rare=True,
        ),
    ] = ""
    """Title stored in the LoRA file. If it is empty, the output name is used."""

    metadata_author: Annotated[
        str,
        Ui(
            tab="Metadata",
            label="Metadata author",
            widget="textbox",
            effect="honoured",
            sd_scripts_arg="--metadata_author",
            since="2024-04-15",
            rare=True,
        ),
    ] = ""
    """Author stored in the LoRA file."""

    metadata_description: Annotated[
        str,
        Ui(
            tab="Metadata",
            label="Metadata description",
            widget="textbox",
            effect="honoured",
            sd_scripts_arg="--metadata_description",
            since="2024-04-15",
            rare=True,
        ),
    ] = ""
    """Description stored in the LoRA file, for example what it shows and how to prompt it."""

    metadata_license: Annotated[
        str,
        Ui(
            tab="Metadata",
            label="Metadata license",
            widget="textbox",
            effect="honoured",
            sd_scripts_arg="--metadata_license",
            since="2024-04-15",
            rare=True,
        ),
    ] = ""
    """Licence stored in the LoRA file."""

    metadata_tags: Annotated[
        str,
        Ui(
            tab="Metadata",
            label="Metadata tags",
            widget="textbox",
            effect="honoured",
            sd_scripts_arg="--metadata_tags",
            since="2024-04-15",
            rare=True,
        ),
    ] = ""
    """Search words stored in the LoRA file, separated by commas."""
