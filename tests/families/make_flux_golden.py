"""Write what sd-scripts' FLUX.1 models give for the toy files of `tests.tiny_flux`.

In the environment of sd-scripts, with files that ``python -m tests.parity.make_flux FOLDER --size tiny`` made:

    python tests/families/make_flux_golden.py FOLDER --source sd-scripts --tokenizers FOLDER \
        --out tests/families/golden/flux.safetensors
"""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

PROMPTS = [
    "tok cat, number 1, red, blue",
    "a (photo:1.2) of É, sks  dog\nwith {braces} 🦊 <extra_id_0> </s> x",
    "",
]
TOKENS = 24
ROWS, COLUMNS = 4, 6


def inputs() -> dict[str, torch.Tensor]:
    """What the transformer is given: packed latents, text states, pooled state, times, guidance, text mask."""

    def draw(seed: int, *shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=torch.Generator().manual_seed(seed))

    return {
        "tokens": draw(1, 2, ROWS * COLUMNS, 64),
        "states": draw(2, 2, 10, 48),
        "pooled": draw(3, 2, 32),
        "times": torch.tensor([0.15, 0.8]),
        "guidance": torch.tensor([1.0, 3.5]),
        "mask": torch.tensor([[1] * 4 + [0] * 6, [1] * 9 + [0]]),
    }


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--source", type=Path, required=True, help="folder of sd-scripts")
    parser.add_argument("--tokenizers", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "parity"))
    runner: Any = importlib.import_module("run_sdscripts_flux")
    runner.common.install_torchvision_stand_in()
    folder, out, tokenizers = options.folder.resolve(), options.out.resolve(), options.tokenizers.resolve()
    os.chdir(options.source)
    sys.path.insert(0, str(options.source.resolve()))
    names = {"pretrained_model_name_or_path": "flux1-dev", "clip_l": "clip_l", "t5xxl": "t5xxl_fp16"}
    runner.fit({key: str(folder / f"{name}.safetensors") for key, name in names.items()})
    utils: Any = importlib.import_module("library.flux_utils")
    strategy: Any = importlib.import_module("library.strategy_flux")
    given = inputs()
    found: dict[str, torch.Tensor] = {}
    with torch.no_grad():
        _, flux = utils.load_flow_model(str(folder / "flux1-dev.safetensors"), torch.float32, "cpu")
        common = {
            "img": given["tokens"],
            "img_ids": utils.prepare_img_ids(2, ROWS, COLUMNS),
            "txt": given["states"],
            "txt_ids": torch.zeros(2, 10, 3),
            "timesteps": given["times"],
            "y": given["pooled"],
            "guidance": given["guidance"],
        }
        found["prediction"] = flux(**common)
        found["masked_prediction"] = flux(**common, txt_attention_mask=given["mask"])
        clip = utils.load_clip_l(str(folder / "clip_l.safetensors"), torch.float32, "cpu").eval()
        t5 = utils.load_t5xxl(str(folder / "t5xxl_fp16.safetensors"), torch.float32, "cpu").eval()
        tokenize = strategy.FluxTokenizeStrategy(TOKENS, str(tokenizers))
        ids = tokenize.tokenize(PROMPTS)
        found["t5_ids"], found["t5_mask"] = ids[1], ids[2]
        for masked in (False, True):
            encoded = strategy.FluxTextEncodingStrategy(masked).encode_tokens(tokenize, [clip, t5], ids)
            found["masked_states" if masked else "states"] = encoded[1]
            found["pooled"] = encoded[0]
        ae = utils.load_ae(str(folder / "ae.safetensors"), torch.float32, "cpu")
        latents = torch.randn(1, 16, 8, 12, generator=torch.Generator().manual_seed(5))
        found["decoded"] = ae.decode(latents)
        pixels = torch.randn(1, 3, 64, 48, generator=torch.Generator().manual_seed(6)).clamp(-1, 1)
        found["latent_mean"] = 0.3611 * (ae.encoder(pixels).chunk(2, dim=1)[0] - 0.1159)
    save_file({name: value.contiguous() for name, value in found.items()}, out)
    print({name: tuple(value.shape) for name, value in found.items()})


if __name__ == "__main__":
    main()
