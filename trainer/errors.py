"""What can go wrong, as one tree; every message is a sentence for a person.

TrainerError
├── SetupError        the program's own environment (packages, disk, Python)
├── ConfigError       a JSON file, a field or a combination of fields
├── DatasetError      pictures, captions, folders
├── ModelFileError    checkpoints, LoRA files, tokenizers
├── StateError        a state folder that cannot be resumed from
├── DivergedError     NaN or infinity during training
└── OutOfMemoryError  device or host memory
StopTraining          not an error: the person asked to stop
"""

from __future__ import annotations

__all__ = [
    "ConfigError",
    "DatasetError",
    "DivergedError",
    "ModelFileError",
    "OutOfMemoryError",
    "SetupError",
    "StateError",
    "StopTraining",
    "TrainerError",
]


class TrainerError(Exception):
    """Something a person can put right: says what was found, where, and what to do."""


class SetupError(TrainerError):
    """The program's own environment is not as it must be."""


class ConfigError(TrainerError):
    """A configuration file, a field or a combination of fields cannot be used.

    Args:
        messages: A sentence for each thing that is wrong; usually one.
    """

    def __init__(self, *messages: str) -> None:
        super().__init__(*messages)
        self.messages = messages

    def __str__(self) -> str:
        """All of them, as one line."""
        return "; ".join(self.messages)


class DatasetError(TrainerError):
    """Pictures, captions or their folders cannot be used."""


class ModelFileError(TrainerError):
    """A checkpoint, LoRA or tokenizer file is missing, broken or of another kind."""


class StateError(TrainerError):
    """A state folder does not hold what a resumed run needs."""


class DivergedError(TrainerError):
    """The loss or the weights became NaN or infinite."""


class OutOfMemoryError(TrainerError):
    """The device or the host ran out of memory."""


class StopTraining(BaseException):
    """Raised inside the loop at the one place where a Stop takes effect."""
