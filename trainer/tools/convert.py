"""A LoRA file under other programs' layer names, doing the same."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

from trainer.tools import _lora
from trainer.tools._lora import Format

__all__ = ["FORMATS", "convert"]

FORMATS: Mapping[Format, str] = {
    "kohya": "Kohya's names (sd-scripts, A1111, Forge, ComfyUI)",
    "diffusers": "diffusers' names with PEFT's endings",
    "bfl": "FLUX.1 with Black Forest Labs' names (ComfyUI)",
}
"""Names that a file can have."""

Say = Callable[[str], None]


def convert(file: Path, output: Path, to: Format, *, precision: str | None = None, say: Say = print) -> Path:
    """Write ``file`` with other names. What it does to a model stays the same.

    Only Kohya's files have an alpha for each layer; for the others it goes into the weights. What
    diffusers has as several layers (q, k and v of FLUX.1) is taken apart or put together.

    Args:
        file: A LoRA, named by any of the programs.
        output: .safetensors.
        to: A key of `FORMATS`.
        precision: save_precision; that of the file if None.
        say: Told what is done.

    Raises:
        ModelFileError: The file is no LoRA, or has layers that the format has no name for.
    """
    _lora.check_output(output, file)
    lora = _lora.read(file)
    say(f"{file.name}: {len(lora.pairs)} layers for {lora.kind}, names of {lora.format}")
    metadata = dict(lora.metadata)
    metadata.pop("lora_adapter_metadata", None)  # PEFT's ranks and alphas of the old names
    if any(key.startswith("ss_") for key in metadata) or to == "kohya":
        described = _lora.described(lora.pairs)
        if to != "kohya":
            described["ss_network_alpha"] = described["ss_network_dim"]
        metadata |= described
    _lora.write(
        output,
        lora.pairs,
        metadata,
        precision=precision or lora.precision,
        kind=lora.kind,
        format=to,
        say=say,
    )
    return output
