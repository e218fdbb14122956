"""Write CLIP's tokenizer (vocab.json, merges.txt) from the merge table inside the open_clip wheel.

python tests/parity/make_tokenizer.py FOLDER [--wheel open_clip_torch-....whl]
"""

from __future__ import annotations

import argparse
import gzip
import json
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

__all__ = ["download_wheel", "write"]

_MERGES = 49152 - 256 - 2
"""Of the table's merges, those that CLIP uses."""


def download_wheel(folder: Path) -> Path:
    """The open_clip wheel, fetched with pip into ``folder`` unless it is there."""
    found = sorted(folder.glob("open_clip_torch-*.whl"))
    if not found:
        command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", str(folder)]
        subprocess.run([*command, "open_clip_torch==3.3.0"], check=True)
        found = sorted(folder.glob("open_clip_torch-*.whl"))
    return found[-1]


def _byte_letters() -> list[str]:
    """The 256 letters that stand for bytes, in the order of the vocabulary (GPT-2's byte-level BPE)."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in set(printable)]
    return [chr(byte) for byte in printable] + [chr(256 + place) for place in range(len(others))]


def write(folder: Path, wheel: Path) -> None:
    """Write ``vocab.json`` (49408 entries), ``merges.txt`` and ``tokenizer_config.json``."""
    with zipfile.ZipFile(wheel) as archive:
        table = gzip.decompress(archive.read("open_clip/bpe_simple_vocab_16e6.txt.gz")).decode("utf-8")
    merges = table.split("\n")[1 : _MERGES + 1]
    letters = _byte_letters()
    words = [*letters, *(letter + "</w>" for letter in letters)]
    words += ["".join(merge.split()) for merge in merges] + ["<|startoftext|>", "<|endoftext|>"]
    if len(set(words)) != 49408:
        raise ValueError(f"{wheel}: expected 49408 different tokens, found {len(set(words))}")
    folder.mkdir(parents=True, exist_ok=True)
    vocabulary = {word: place for place, word in enumerate(words)}
    (folder / "vocab.json").write_text(json.dumps(vocabulary, ensure_ascii=False), encoding="utf-8")
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges) + "\n", encoding="utf-8")
    settings = {
        "tokenizer_class": "CLIPTokenizer",
        "model_max_length": 77,
        "bos_token": "<|startoftext|>",
        "eos_token": "<|endoftext|>",
        "unk_token": "<|endoftext|>",
        "pad_token": "<|endoftext|>",
        "do_lower_case": True,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--wheel", type=Path)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        write(args.folder, args.wheel or download_wheel(Path(scratch)))


if __name__ == "__main__":
    main()
