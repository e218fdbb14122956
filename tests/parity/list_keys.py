"""Write the names and shapes of sd-scripts' LoRA tensors for each model family, without any weights.

Runs in the environment of sd-scripts, its models on the meta device:

    python list_keys.py --source sd-scripts --out golden/lora_keys.json

The file: family -> shapes ("down up", sizes joined by x) -> modules. Rank 16, rank 8 for 3x3
convolutions. Each module has ``.lora_down.weight``, ``.lora_up.weight`` and a scalar ``.alpha``.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import sys
from pathlib import Path
from typing import Any

import torch


def _shape(tensor: torch.Tensor) -> str:
    return "x".join(map(str, tensor.shape))


def _modules(network: Any) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for module in [*network.text_encoder_loras, *network.unet_loras]:
        shapes = f"{_shape(module.lora_down.weight)} {_shape(module.lora_up.weight)}"
        found.setdefault(shapes, []).append(module.lora_name)
    return found


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--source", type=Path, required=True, help="folder of sd-scripts")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    sys.path.insert(0, str(Path(__file__).resolve().parent))
    importlib.import_module("run_sdscripts").install_torchvision_stand_in()
    out = options.out.resolve()
    os.chdir(options.source)
    sys.path.insert(0, str(options.source.resolve()))

    model_util = importlib.import_module("library.model_util")
    unets = importlib.import_module("library.original_unet")
    sdxl_unets = importlib.import_module("library.sdxl_original_unet")
    lora = importlib.import_module("networks.lora")
    transformers = importlib.import_module("transformers")

    def text(width: int, mlp: int, layers: int, projected: bool = False) -> Any:
        config = transformers.CLIPTextConfig(
            hidden_size=width,
            intermediate_size=mlp,
            num_hidden_layers=layers,
            num_attention_heads=width // 64,
        )
        kind = transformers.CLIPTextModelWithProjection if projected else transformers.CLIPTextModel
        return kind(config)

    with torch.device("meta"):
        clip_l = text(768, 3072, 12)
        sd1 = (clip_l, unets.UNet2DConditionModel(**model_util.create_unet_diffusers_config(False)))
        sd2 = (
            text(1024, 4096, 23),
            unets.UNet2DConditionModel(**model_util.create_unet_diffusers_config(True)),
        )
        sdxl = ([clip_l, text(1280, 5120, 32, True)], sdxl_unets.SdxlUNet2DConditionModel())
        keys: dict[str, dict[str, list[str]]] = {}
        # Networks with convolutions last: making one changes the modules of every later one.
        for name, (text_encoder, unet) in {"sd15": sd1, "sd2": sd2, "sdxl": sdxl}.items():
            keys[name] = _modules(lora.create_network(1.0, 16, 8, None, text_encoder, unet))
        for name, (text_encoder, unet) in {"sd15_locon": sd1, "sdxl_locon": sdxl}.items():
            network = lora.create_network(1.0, 16, 8, None, text_encoder, unet, conv_dim="8", conv_alpha="4")
            found = _modules(network)
            # Only what the convolutions add, to keep the file small.
            known = {module for modules in keys[name.removesuffix("_locon")].values() for module in modules}
            keys[name] = {
                shapes: added
                for shapes, modules in found.items()
                if (added := [m for m in modules if m not in known])
            }
    out.write_text(json.dumps(keys, indent=0, separators=(",", ":")) + "\n", encoding="utf-8")
    print({name: sum(map(len, found.values())) for name, found in keys.items()})


if __name__ == "__main__":
    main()
