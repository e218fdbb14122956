"""Model files of full size with nothing in them: keys and shapes are true, the weights are holes.

The file system keeps no block for a hole, so that a file of 24 GB takes a few kilobytes. For what
reads shapes only (the forecast); a model loaded from one is all zeros.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Mapping
from pathlib import Path

__all__ = ["write"]


def write(path: Path, shapes: Mapping[str, tuple[int, ...]], dtype: str = "F16") -> Path:
    """A safetensors file of 16-bit tensors."""
    header, place = {}, 0
    for key, shape in shapes.items():
        size = 2 * math.prod(shape)
        header[key] = {"dtype": dtype, "shape": list(shape), "data_offsets": [place, place + size]}
        place += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + place)
    return path
