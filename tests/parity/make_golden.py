"""Turn records of sd-scripts into the small golden files that the tests read.

    python tests/parity/make_golden.py RECORDS [--out tests/parity/golden]

Writes ``golden/runs.json`` and, of FLUX cases, ``golden/flux_runs.json``: for each recorded case the
Kohya JSON without paths, buckets, batches, learning rates and losses of each micro-step, and the LoRA
file's metadata. Values that differ from run to run (times, ids, hashes) are null there; their keys
still have to be present. A file whose family has no record in the folder stays as it is.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from safetensors import safe_open

__all__ = ["VOLATILE", "golden", "same_value"]

VOLATILE = frozenset(
    [
        "ss_session_id",
        "ss_training_started_at",
        "ss_training_finished_at",
        "ss_sd_scripts_commit_hash",
        "ss_sd_model_hash",
        "ss_new_sd_model_hash",
        "modelspec.date",
        "modelspec.implementation_version",
        "sshs_model_hash",
        "sshs_legacy_hash",
    ]
)
"""Metadata that differs from run to run or from program to program."""

_PATHS = (
    "pretrained_model_name_or_path",
    "train_data_dir",
    "reg_data_dir",
    "output_dir",
    "network_weights",
    "ae",
    "clip_l",
    "t5xxl",
)


def same_value(ours: str, theirs: str) -> bool:
    """Whether two metadata values say the same.

    sd-scripts lists folders in the order of the file system, and spells a whole number 1 or 1.0
    as the JSON did; Kohya's page makes it 1 on its way through the browser, as our loader does.
    """
    if ours == theirs:
        return True
    try:
        return bool(json.loads(ours) == json.loads(theirs))
    except json.JSONDecodeError:
        return False


def golden(folder: Path) -> dict[str, Any]:
    """What is kept of one recorded case."""
    record = json.loads((folder / "record.json").read_text(encoding="utf-8"))
    config = json.loads((folder / "case.json").read_text(encoding="utf-8"))
    for key in _PATHS:
        if key in config:
            config[key] = Path(config[key]).name
    with safe_open(folder / "parity.safetensors", framework="pt") as file:
        metadata = dict(file.metadata())
        dtypes = sorted({file.get_slice(key).get_dtype() for key in file.keys()})  # noqa: SIM118
        count = len(file.keys())
    return {
        "config": config,
        "datasets": record["datasets"],
        "pictures": [step["pictures"] for step in record["micro_steps"]],
        "captions": sorted({caption for step in record["micro_steps"] for caption in step["captions"]}),
        "lrs": [step["lrs"] for step in record["micro_steps"]],
        "losses": [step["loss"] for step in record["micro_steps"]],
        "tensors": {"count": count, "dtypes": dtypes},
        "metadata": {key: None if key in VOLATILE else value for key, value in sorted(metadata.items())},
    }


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("records", type=Path, help="folder with one folder per case")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "golden")
    args = parser.parse_args()
    runs = {path.parent.name: golden(path.parent) for path in sorted(args.records.glob("*/record.json"))}
    args.out.mkdir(parents=True, exist_ok=True)
    flux = {name: run for name, run in runs.items() if run["config"].get("flux1_checkbox")}
    others = {name: run for name, run in runs.items() if name not in flux}
    for name, found in (("runs.json", others), ("flux_runs.json", flux)):
        if found:
            (args.out / name).write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    print({name: len(run["losses"]) for name, run in runs.items()})


if __name__ == "__main__":
    main()
