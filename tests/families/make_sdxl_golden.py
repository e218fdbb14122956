"""Write golden/sdxl.json: what sd-scripts' networks.lora makes of SDXL, for several sets of options.

Runs in the environment of sd-scripts (tests/parity/README.md), its models on the meta device:

    python tests/families/make_sdxl_golden.py --source sd-scripts --out tests/families/golden/sdxl.json

Of each network the file holds the number of modules, some of their lines "name down up alpha", a
hash of all lines, and the optimizer's groups. Each case runs in a process of its own, since a network
with convolutions changes the modules of every later one.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

CASES: dict[str, dict[str, Any]] = {
    "standard": {},
    "unet only": {"text_encoder_lr": 0},
    "locon": {"LoRA_type": "Kohya LoCon", "conv_dim": 8, "conv_alpha": 4},
    "blocks": {
        "block_dims": ",".join(str(4 + i) for i in range(23)),
        "block_alphas": ",".join(str(1 + i) for i in range(23)),
    },
    "conv blocks": {
        "LoRA_type": "Kohya LoCon",
        "conv_dim": 8,
        "conv_alpha": 4,
        "block_dims": ",".join(str(4 + i) for i in range(23)),
        "conv_block_dims": ",".join(str(1 + i % 5) for i in range(23)),
        "conv_block_alphas": ",".join(str(i % 3 + 1) for i in range(23)),
    },
    "block rates": {
        "down_lr_weight": "sine+0.25",
        "mid_lr_weight": "0.5,0,1",
        "up_lr_weight": "0,0.2,0.4,0.6,0.8,1,1,1,1",
        "block_lr_zero_threshold": "0.1",
    },
    "LoRA+": {"loraplus_lr_ratio": 4.0, "loraplus_text_encoder_lr_ratio": 2.0},
}
RATES = {"unet_lr": 1e-3, "text_encoder_lr": 1e-4}


def network_args(fields: dict[str, Any]) -> dict[str, str]:
    """Options of the network as Kohya's page sends them."""
    return {
        name: str(value) for name, value in fields.items() if name not in ("LoRA_type", "text_encoder_lr")
    }


def describe(fields: dict[str, Any], source: Path) -> dict[str, Any]:
    """Make one network and describe it."""
    sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "parity"))
    importlib.import_module("run_sdscripts").install_torchvision_stand_in()
    os.chdir(source)
    sys.path.insert(0, str(source))
    unets: Any = importlib.import_module("library.sdxl_original_unet")
    lora: Any = importlib.import_module("networks.lora")
    transformers: Any = importlib.import_module("transformers")

    def text(kind: Any, width: int, layers: int) -> Any:
        sizes = {"hidden_size": width, "intermediate_size": 4 * width, "num_attention_heads": width // 64}
        return kind(transformers.CLIPTextConfig(**sizes, num_hidden_layers=layers))

    with torch.device("meta"):
        encoders = [
            text(transformers.CLIPTextModel, 768, 12),
            text(transformers.CLIPTextModelWithProjection, 1280, 32),
        ]
        unet = unets.SdxlUNet2DConditionModel()
    network = lora.create_network(1.0, 16, 8, None, encoders, unet, **network_args(fields))
    trains_text = fields.get("text_encoder_lr", RATES["text_encoder_lr"]) != 0
    if not trains_text:
        network.text_encoder_loras = []
    lines = []
    for module in [*network.text_encoder_loras, *network.unet_loras]:
        down, up = (
            "x".join(map(str, weight.shape)) for weight in (module.lora_down.weight, module.lora_up.weight)
        )
        lines.append(f"{module.lora_name} {down} {up} {module.scale * module.lora_dim:g}")
    if any(name.startswith("loraplus") for name in fields):
        network.set_loraplus_lr_ratio(4.0, None, 2.0)
    rate = RATES["text_encoder_lr"] if trains_text else None
    # Until a network is applied, its modules hold the frozen layers too.
    trained = {
        id(weight)
        for module in [*network.text_encoder_loras, *network.unet_loras]
        for weight in (module.lora_down.weight, module.lora_up.weight)
    }
    groups, names = network.prepare_optimizer_params(rate, RATES["unet_lr"], 1e-3)
    return {
        "fields": fields,
        "modules": len(lines),
        "some": lines[:: max(1, len(lines) // 8)],
        "sha256": hashlib.sha256("\n".join(lines).encode()).hexdigest(),
        "groups": [
            [name, group["lr"], sum(id(weight) in trained for weight in group["params"])]
            for name, group in zip(names, groups, strict=True)
        ],
    }


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--source", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--case", help="one case, to the output as it is")
    args = parser.parse_args()
    source, out = args.source.resolve(), args.out.resolve()
    if args.case:
        out.write_text(json.dumps(describe(CASES[args.case], source)), encoding="utf-8")
        return
    found = {}
    for case in CASES:
        command = [sys.executable, __file__, "--source", str(source), "--out", str(out), "--case", case]
        subprocess.run(command, check=True)
        found[case] = json.loads(out.read_text(encoding="utf-8"))
    out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    print({case: values["modules"] for case, values in found.items()})


if __name__ == "__main__":
    main()
