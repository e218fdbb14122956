"""Uploads to Hugging Face."""

from __future__ import annotations

from typing import Annotated

from trainer.config._section import Section
from trainer.config.ui import Ui

__all__ = ["HuggingFaceFields"]


class HuggingFaceFields(Section):
    """Uploads to Hugging Face."""

    huggingface_repo_id: Annotated[
        str,
        Ui(
            tab="HuggingFace",
            label="Huggingface repo id",
            widget="textbox",
            effect="none",
            reason="Nothing is uploaded: the files stay on this machine.",
            sd_scripts_arg="--huggingface_repo_id",
            since="2024-04-14",
            rare=True,
        ),
    ] = ""
    """Repository at Hugging Face that gets the saved files."""

    huggingface_token: Annotated[
        str,
        Ui(
            tab="HuggingFace",
            label="Huggingface token",
            widget="textbox",
            secret=True,
            effect="none",
            reason="Nothing is uploaded: the files stay on this machine. Tokens are never stored in a file.",
            sd_scripts_arg="--huggingface_token",
            since="2024-04-14",
            rare=True,
        ),
    ] = ""
    """Access token for Hugging Face."""

    huggingface_repo_type: Annotated[
        str,
        Ui(
            tab="HuggingFace",
            label="Huggingface repo type",
            widget="textbox",
            effect="none",
            reason="Nothing is uploaded: the files stay on this machine.",
            sd_scripts_arg="--huggingface_repo_type",
            since="2024-04-14",
            rare=True,
        ),
    ] = ""
    """Kind of repository: model or dataset."""

    huggingface_repo_visibility: Annotated[
        str,
        Ui(
            tab="HuggingFace",
            label="Huggingface repo visibility",
            widget="textbox",
            effect="none",
            reason="Nothing is uploaded: the files stay on this machine.",
            sd_scripts_arg="--huggingface_repo_visibility",
            since="2024-04-14",
            rare=True,
        ),
    ] = ""
    """Whether the repository is public or private."""

    huggingface_path_in_repo: Annotated[
        str,
        Ui(
            tab="HuggingFace",
            label="Huggingface path in repo",
            widget="textbox",
            effect="none",
            reason="Nothing is uploaded: the files stay on this machine.",
            sd_scripts_arg="--huggingface_path_in_repo",
            since="2024-04-14",
            rare=True,
        ),
    ] = ""
    """Folder inside the repository."""

    save_state_to_huggingface: Annotated[
        bool,
        Ui(
            tab="HuggingFace",
            label="Save state to huggingface",
            widget="checkbox",
            effect="none",
            reason="Nothing is uploaded: the files stay on this machine.",
            sd_scripts_arg="--save_state_to_huggingface",
            since="2024-04-14",
            rare=True,
        ),
    ] = False
    """Upload state folders too."""

    resume_from_huggingface: Annotated[
        str,
        Ui(
            tab="HuggingFace",
            label="Resume from huggingface",
            widget="textbox",
            effect="none",
            reason="Nothing is uploaded: the files stay on this machine.",
            sd_scripts_arg="--resume_from_huggingface",
            since="2024-04-14",
            rare=True,
        ),
    ] = ""
    """Resume from a state that lies at Hugging Face."""

    async_upload: Annotated[
        bool,
        Ui(
            tab="HuggingFace",
            label="Async upload",
            widget="checkbox",
            effect="none",
            reason="Nothing is uploaded: the files stay on this machine.",
            sd_scripts_arg="--async_upload",
            since="2024-04-14",
            rare=True,
        ),
    ] = False
    """Upload while the training goes on."""
