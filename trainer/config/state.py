"""States to resume from, workers and logs."""

from __future__ import annotations

from typing import Annotated

from trainer.config._section import Section
from trainer.config.ui import Ui

__all__ = ["StateFields"]


class StateFields(Section):
    """States to resume from, workers and logs."""

    save_state: Annotated[
        bool,
        Ui(
            tab="Advanced",
            label="Save training state",
            widget="checkbox",
            effect="honoured",
            sd_scripts_arg="--save_state",
            since="2022-12-28",
        ),
    ] = False
    """Save the whole state of the training with each save, so that the run can be resumed from there.
    The folders are large."""

    save_state_on_train_end: Annotated[
        bool,
        Ui(
            tab="Advanced",
            label="Save training state at end of training",
            widget="checkbox",
            effect="honoured",
            sd_scripts_arg="--save_state_on_train_end",
            since="2024-03-26",
        ),
    ] = False
    """Save the whole state once, at the end."""

    resume: Annotated[
        str,
        Ui(
            tab="Advanced",
            label='Resume from saved training state (path to "last-state" state folder)',
            widget="dropdown",
            free_text=True,
            path="folder",
            effect="adapted",
            reason="The run goes on at the step at which the state was saved; Kohya starts counting at 0 again.",
            sd_scripts_arg="--resume",
            since="2022-12-28",
        ),
    ] = ""
    """A state folder from an earlier run to resume from."""

    max_data_loader_n_workers: Annotated[
        int,
        Ui(
            tab="Advanced",
            label="Max num workers for DataLoader",
            widget="number",
            min=0,
            step=1,
            effect="none",
            reason="A thread of this program prepares the batches ahead.",
            sd_scripts_arg="--max_data_loader_n_workers",
            since="2023-01-15",
            rare=True,
        ),
    ] = 0
    """Number of processes that load pictures ahead."""

    log_with: Annotated[
        str,
        Ui(
            tab="Advanced",
            label="Logging",
            widget="dropdown",
            choices=("", "wandb", "tensorboard", "all"),
            trained_choices=("", "tensorboard"),
            effect="none",
            reason="A logging folder alone brings TensorBoard logs; Weights & Biases is not supported.",
            sd_scripts_arg="--log_with",
            since="2024-04-19",
        ),
    ] = ""
    """Where the curves of the run are recorded. If it is empty, TensorBoard is used when a logging
    folder is given."""

    wandb_api_key: Annotated[
        str,
        Ui(
            tab="Advanced",
            label="WANDB API Key",
            widget="textbox",
            secret=True,
            effect="none",
            reason="Weights & Biases is not supported, and keys are never stored in a file.",
            sd_scripts_arg="--wandb_api_key",
            since="2023-05-05",
            rare=True,
        ),
    ] = ""
    """Key for the web service Weights & Biases."""

    wandb_run_name: Annotated[
        str,
        Ui(
            tab="Advanced",
            label="WANDB run name",
            widget="textbox",
            effect="none",
            reason="Weights & Biases is not supported.",
            sd_scripts_arg="--wandb_run_name",
            since="2024-03-14",
            rare=True,
        ),
    ] = ""
    """Name of the run at Weights & Biases. If it is empty, the output name is used."""

    log_tracker_name: Annotated[
        str,
        Ui(
            tab="Advanced",
            label="Log tracker name",
            widget="textbox",
            effect="honoured",
            sd_scripts_arg="--log_tracker_name",
            since="2024-03-14",
            rare=True,
        ),
    ] = ""
    """Name of the folder or project that the logged curves belong to."""

    log_tracker_config: Annotated[
        str,
        Ui(
            tab="Advanced",
            label="Log tracker config",
            widget="dropdown",
            free_text=True,
            path="file",
            effect="none",
            reason="TensorBoard, the only logger here, takes no options from a file.",
            sd_scripts_arg="--log_tracker_config",
            since="2024-03-14",
            rare=True,
        ),
    ] = ""
    """A TOML file with options for the logger."""

    log_config: Annotated[
        bool,
        Ui(
            tab="Advanced",
            label="Log config",
            widget="checkbox",
            effect="none",
            reason="The JSON beside the results always holds the whole configuration.",
            sd_scripts_arg="--log_config",
            since="2024-05-24",
            rare=True,
        ),
    ] = False
    """Also write the settings of the run to the logger."""
