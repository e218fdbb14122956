"""Write FLUX.1 files of two double and two single blocks with seeded weights (our environment).

    python -m tests.parity.make_flux FOLDER [--size tiny]

The full size has FLUX.1's widths (4 GB in fp32, 1.0 GB of it the T5 embedding and text encoders, which have few
layers); tiny has the same keys in 12 MB.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from tests import tiny_flux


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--size", choices=("full", "tiny"), default="full")
    args = parser.parse_args()
    for path in tiny_flux.files(args.folder, full=args.size == "full").values():
        print(f"{path} {path.stat().st_size:,}")


if __name__ == "__main__":
    main()
