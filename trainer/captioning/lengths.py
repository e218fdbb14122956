"""How many tokens a caption has, and how many the text encoder reads."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trainer.files import REPOSITORY

if TYPE_CHECKING:
    from trainer.job import Job

__all__ = ["Ruler", "ruler"]

MODELS = REPOSITORY / "assets" / "models"
T5_TOKENS = 512
"""What T5 reads of a caption where the settings leave it open (FLUX.1-dev; schnell reads 256)."""


@dataclass(frozen=True)
class Ruler:
    """Counts tokens of captions."""

    tokenizer: Any
    limit: int
    """Tokens that training reads, without those for start and end."""
    name: str
    """Whose tokens these are: CLIP or T5."""

    def count(self, texts: Sequence[str]) -> list[int]:
        """Tokens of each text's first line, without those for start and end."""
        if not texts:
            return []
        lines = [text.split("\n")[0] for text in texts]
        return [len(ids) for ids in self.tokenizer(lines, add_special_tokens=False).input_ids]


def ruler(job: Job) -> Ruler:
    """The ruler of a run: T5's tokens for FLUX, else CLIP's, or those of the model's own folder."""
    if job.family == "flux":
        # T5 ends every text with one token.
        limit = (job.config.t5xxl_max_token_length or T5_TOKENS) - 1
        return Ruler(_t5(), limit, "T5")
    model = job.config.pretrained_model_name_or_path.strip()
    own = job.path(model) / "tokenizer" if model else None
    tokenizer = _of_folder(own) if own is not None and own.is_dir() else _clip()
    return Ruler(tokenizer, job.config.max_token_length // 75 * 75 or 75, "CLIP")


@cache
def _clip() -> Any:
    from trainer.tokens import clip_tokenizer

    return _unlimited(clip_tokenizer(MODELS / "clip" / "bpe_simple_vocab_16e6.txt.gz"))


@cache
def _t5() -> Any:
    from trainer.libraries import T5Tokenizer

    return _unlimited(T5Tokenizer.from_pretrained(str(MODELS / "t5"), local_files_only=True))


@cache
def _of_folder(folder: Path) -> Any:
    from trainer.libraries import CLIPTokenizer

    try:
        return _unlimited(CLIPTokenizer.from_pretrained(str(folder), local_files_only=True))
    except (OSError, ValueError):
        return _clip()  # the start of training says what is wrong with the folder


def _unlimited(tokenizer: Any) -> Any:
    """Long captions are what is looked for: no warning about them."""
    tokenizer.model_max_length = 1 << 30
    return tokenizer
