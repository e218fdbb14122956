"""Lay out a small data set of real photographs in Kohya's folder convention.

The pictures are those inside the scikit-image wheel: photographs of 303 to 1411 pixels, square and
oblong, colour and grey, PNG and JPEG. At a resolution of 256 (buckets from 128 to 512) they fall
into three buckets, so that batches of two come from several buckets and some are short.

    python tests/parity/make_photos.py FOLDER [--reg REG_FOLDER] [--wheel scikit_image-....whl]
"""

from __future__ import annotations

import argparse
import io
import json
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from PIL import Image

__all__ = ["PHOTOS", "REG_PHOTOS", "download_wheel", "write"]

PHOTOS: dict[str, dict[str, str | None]] = {
    "2_skimage photo": {
        "astronaut.png": "photo of an astronaut in an orange suit, a flag, a model of a shuttle",
        "camera.png": "black and white photo of a man with a camera on a tripod, grass, towers",
        "chelsea.png": "photo of a tabby cat, close up, green eyes",
        "coffee.png": "photo of a cup of coffee on a saucer, a spoon, wooden table",
        "motorcycle_left.png": "photo of a red motorcycle in a garage, tools on the wall",
        "rocket.jpg": "photo of a rocket on its launch pad, blue sky",
        "portrait.png": "portrait of an astronaut, smiling",
    },
    # Without captions in part: a picture with no caption file is captioned by its folder.
    "1_surface": {
        "brick.png": "brick wall, black and white",
        "gravel.png": None,
        "retina.jpg": "photo of a retina, dark background",
        "hubble_deep_field.jpg": None,
    },
}
"""Folder -> picture -> caption."""

REG_PHOTOS: dict[str, dict[str, str | None]] = {
    "1_thing": {
        "coins.png": "photo of ancient coins",
        "moon.png": None,
        "ihc.png": "tissue under a microscope",
    }
}
"""The same for class pictures."""

_PORTRAIT_BOX = (120, 0, 360, 400)
"""What is cut out of the astronaut to have an upright picture too."""


def download_wheel(folder: Path) -> Path:
    """The scikit-image wheel, fetched with pip into ``folder`` unless it is there."""
    found = sorted(folder.glob("scikit_image-*.whl"))
    if not found:
        command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--only-binary", ":all:"]
        subprocess.run([*command, "-d", str(folder), "scikit-image"], check=True)
        found = sorted(folder.glob("scikit_image-*.whl"))
    return found[-1]


def write(
    folder: Path, wheel: Path, photos: dict[str, dict[str, str | None]] = PHOTOS
) -> dict[str, tuple[int, int]]:
    """Write pictures and captions below ``folder``; gives the size of each picture by relative path."""
    sizes: dict[str, tuple[int, int]] = {}
    with zipfile.ZipFile(wheel) as archive:
        for subset, pictures in photos.items():
            (folder / subset).mkdir(parents=True, exist_ok=True)
            for name, caption in pictures.items():
                path = folder / subset / name
                if name == "portrait.png":
                    with Image.open(io.BytesIO(archive.read("skimage/data/astronaut.png"))) as whole:
                        whole.crop(_PORTRAIT_BOX).save(path)
                else:
                    path.write_bytes(archive.read(f"skimage/data/{name}"))
                if caption is not None:
                    path.with_suffix(".txt").write_text(caption + "\n", encoding="utf-8")
                with Image.open(path) as picture:
                    sizes[f"{subset}/{name}"] = picture.size
    return sizes


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--reg", type=Path)
    parser.add_argument("--wheel", type=Path)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        wheel = args.wheel or download_wheel(Path(scratch))
        print(json.dumps(write(args.folder, wheel), indent=1))
        if args.reg:
            print(json.dumps(write(args.reg, wheel, REG_PHOTOS), indent=1))


if __name__ == "__main__":
    main()
