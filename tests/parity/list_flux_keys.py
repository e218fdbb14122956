"""Write the names, shapes and alphas of sd-scripts' FLUX LoRAs for each network option, without weights.

Runs in the environment of sd-scripts, its models of full size on the meta device:

    python list_flux_keys.py --source sd-scripts --out golden/flux_keys.json

The file: case -> {"args": network_args, "order": SHA-256 over the lines ``name down up alpha`` in the order of
the state dict, "modules": {"pattern down up alpha": places}}, where ``*`` in a pattern stands for the block
number and places are the numbers, as ranges. Rank 16, alpha 8.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib
import json
import os
import re
import sys
from pathlib import Path
from typing import Any

import torch

CASES: dict[str, dict[str, str]] = {
    "all": {},
    "blocks_all": {"train_double_block_indices": "all", "train_single_block_indices": "all"},
    "double": {"train_blocks": "double"},
    "single": {"train_blocks": "single"},
    "indices": {"train_double_block_indices": "0-3,7", "train_single_block_indices": "2,5-6,37"},
    "no_double": {"train_double_block_indices": "none"},
    "img_attn_dim": {"img_attn_dim": "8"},
    "txt_attn_dim": {"txt_attn_dim": "8"},
    "img_mlp_dim": {"img_mlp_dim": "8"},
    "txt_mlp_dim": {"txt_mlp_dim": "8"},
    "img_mod_dim": {"img_mod_dim": "8"},
    "txt_mod_dim": {"txt_mod_dim": "8"},
    "single_dim": {"single_dim": "8"},
    "single_mod_dim": {"single_mod_dim": "8"},
    "no_mods": {"img_mod_dim": "0", "txt_mod_dim": "0", "single_mod_dim": "0"},
    "in_dims": {"in_dims": "[4,2,2,0,6]"},
    "in_dims_plain": {"in_dims": "4,4,4,4,4", "train_blocks": "single", "single_dim": "0"},
    "regex": {"network_reg_dims": "img_attn_qkv=4,single_blocks_1_=2,te1_.*fc=0"},
    "split_qkv": {"train_blocks": "single", "split_qkv": "True"},
    "text": {},
    "t5": {"train_t5xxl": "True"},
}
"""Network options of each case; text encoders are trained in "text", "t5" and "regex" only."""
WITH_TEXT = ("text", "t5", "regex")


def places(numbers: list[int]) -> str:
    """Ascending numbers as ranges: 0-3,7."""
    parts: list[list[int]] = []
    for number in numbers:
        if parts and number == parts[-1][-1] + 1:
            parts[-1] = [parts[-1][0], number]
        else:
            parts.append([number])
    return ",".join("-".join(map(str, part)) for part in parts)


def compact(tensors: list[tuple[str, str]]) -> dict[str, Any]:
    """The entry of a case from (module, "down up alpha") in order."""
    lines = [f"{name} {facts}" for name, facts in tensors]
    modules: dict[str, list[int]] = {}
    for name, facts in tensors:
        match = re.search(r"(?<=blocks_)\d+|(?<=layers_)\d+|(?<=block_)\d+", name)
        pattern = name if match is None else f"{name[: match.start()]}*{name[match.end() :]}"
        modules.setdefault(f"{pattern} {facts}", []).append(-1 if match is None else int(match[0]))
    return {
        "count": len(lines),
        "order": hashlib.sha256("\n".join(lines).encode()).hexdigest(),
        "modules": {key: "" if numbers == [-1] else places(numbers) for key, numbers in modules.items()},
    }


def facts(state: dict[str, torch.Tensor], alphas: dict[str, float]) -> list[tuple[str, str]]:
    """(module, "down up alpha") of a state dict, in its order."""
    found = []
    for key, value in state.items():
        name, _, kind = key.partition(".")
        if kind == "lora_down.weight":
            shapes = ["x".join(map(str, each.shape)) for each in (value, state[f"{name}.lora_up.weight"])]
            found.append((name, f"{shapes[0]} {shapes[1]} {alphas[name]:g}"))
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
    models = importlib.import_module("library.flux_models")
    lora_flux = importlib.import_module("networks.lora_flux")
    transformers = importlib.import_module("transformers")

    with torch.device("meta"):
        flux = models.Flux(models.configs["dev"].params)
        clip = transformers.CLIPTextModel(
            transformers.CLIPTextConfig(
                hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12
            )
        )
        t5 = transformers.T5EncoderModel(
            transformers.T5Config(
                d_model=4096,
                d_ff=10240,
                d_kv=64,
                num_heads=64,
                num_layers=24,
                vocab_size=32128,
                feed_forward_proj="gated-gelu",
            )
        )
    found: dict[str, Any] = {}
    for case, args in CASES.items():
        with torch.device("meta"):
            network = lora_flux.create_network(1.0, 16, 8, None, [clip, t5], flux, **args)
        loras = [*(network.text_encoder_loras if case in WITH_TEXT else []), *network.unet_loras]
        alphas = {lora.lora_name: float(lora.scale * lora.lora_dim) for lora in loras}
        for lora in loras:
            network.add_module(lora.lora_name, lora)
            lora.org_module = None
        found[case] = {"args": args, **compact(facts(network.state_dict(), alphas))}
        print(case, found[case]["count"])
    out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
