"""Run sd-scripts' own LoRA tools and ours on the same files, and print the largest differences.

    python -m tests.parity.compare_tools SD_SCRIPTS PYTHON [--work FOLDER]

SD_SCRIPTS is a checkout, PYTHON an interpreter with what it needs. LoRAs are seeded and of true
width, and the models are SD 1.5 and SDXL whole (--sd15, --sdxl) and a toy FLUX.1, of which sd-scripts reads any
size. A difference is that of the weight changes (or of the merged weights' changes), relative to their norm.
Ends with 1 if a target is missed.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests import tiny_flux
from tests.tools.loras import pair
from trainer.lora_file import read_metadata
from trainer.tools.convert import convert
from trainer.tools.extract import extract
from trainer.tools.merge import merge, merge_into
from trainer.tools.resize import resize

EXACT, ROUNDED, CLAMPED = 1e-4, 2e-3, 5e-2
"""Targets: float32 on both sides; half precision; factors clamped to a quantile that hangs on signs."""
TWO_ROUNDINGS = 2**-13
"""Of weights below 1/8 in half precision, in which sd-scripts then adds too."""


def lora(
    path: Path,
    layers: Mapping[str, tuple[int, ...]],
    rank: int,
    alpha: float,
    seed: int,
    version: str,
    size: float = 0.01,
) -> Path:
    """A seeded LoRA with a full set of the entries that the tools read."""
    tensors: dict[str, Tensor] = {}
    for index, (stem, shape) in enumerate(layers.items()):
        made = pair(shape, rank, alpha, 1000 * seed + index)
        tensors[f"{stem}.lora_down.weight"] = made.down * size
        tensors[f"{stem}.lora_up.weight"] = made.up * size
        tensors[f"{stem}.alpha"] = torch.tensor(alpha)
    metadata = {"ss_v2": "False", "ss_base_model_version": version, "ss_training_comment": "c"}
    save_file(tensors, path, metadata)
    return path


def deltas(path: Path, layers: Collection[str] | None = None) -> dict[str, Tensor]:
    """Every layer's weight change (or that of ``layers``), float64, of a file with Kohya's or PEFT's endings."""
    tensors, found = load_file(path), {}
    for key, down in tensors.items():
        for low, high in ((".lora_down.weight", ".lora_up.weight"), (".lora_A.weight", ".lora_B.weight")):
            if key.endswith(low):
                stem = key.removesuffix(low)
                if layers is not None and stem not in layers:
                    continue
                alpha = float(tensors.get(f"{stem}.alpha", torch.tensor(len(down))))
                up = tensors[stem + high]
                found[stem] = up.double().flatten(1) @ down.double().flatten(1) * (alpha / len(down))
    return found


def difference(ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor]) -> float:
    """The largest relative difference of a tensor; infinite where names or shapes differ."""
    if ours.keys() != theirs.keys():
        odd = sorted(ours.keys() ^ theirs.keys())
        print(f"    names differ: {len(odd)} ({odd[:3]})")
        return float("inf")
    worst = 0.0
    for name, one in ours.items():
        two = theirs[name]
        if one.shape != two.shape:
            print(f"    {name}: {tuple(one.shape)} and {tuple(two.shape)}")
            return float("inf")
        worst = max(worst, float((one - two).norm() / two.norm().clamp(min=1e-12)))
    return worst


def silent(_: str) -> None:
    """Takes what our tools say."""


class Bench:
    """Runs both sides and keeps the table."""

    def __init__(self, scripts: Path, python: str, work: Path) -> None:
        self.scripts, self.python, self.work = scripts, python, work
        self.missed = 0
        stand_in = work / "stand_in" / "torchvision"
        stand_in.mkdir(parents=True, exist_ok=True)
        # sd-scripts imports torchvision, which its tools do not use.
        (stand_in / "__init__.py").write_text("from . import transforms\n", encoding="utf-8")
        (stand_in / "transforms.py").write_text(
            "class _Any:\n"
            "    def __init__(self, *a, **k): pass\n"
            "    def __getattr__(self, name): return _Any\n"
            "ToTensor = Normalize = Compose = Resize = CenterCrop = RandomCrop = _Any\n"
            "functional = _Any()\n"
            "class InterpolationMode:\n"
            "    BILINEAR = BICUBIC = LANCZOS = NEAREST = 0\n",
            encoding="utf-8",
        )

        # Its tools ask for whole decompositions of whole models and use a few columns: this gives those alone.
        (work / "stand_in" / "sitecustomize.py").write_text(
            "import sys, importlib.abc, importlib.util\n"
            "class Finder(importlib.abc.MetaPathFinder):\n"
            "    def find_spec(self, name, path, target=None):\n"
            "        if name != 'cv2': return None\n"
            "        import torch\n"
            "        if not hasattr(torch.linalg, 'whole_svd'):\n"
            "            torch.linalg.whole_svd = torch.linalg.svd\n"
            "            def svd(m, full_matrices=True):\n"
            "                if not m.any():\n"
            "                    n = min(m.shape)\n"
            "                    return torch.eye(m.shape[0], n), torch.zeros(n), torch.eye(n, m.shape[1])\n"
            "                return torch.linalg.whole_svd(m, full_matrices=False)\n"
            "            torch.linalg.svd = svd\n"
            "        return None\n"
            "sys.meta_path.insert(0, Finder())\n",
            encoding="utf-8",
        )

    def theirs(self, *arguments: object) -> None:
        """One of their tools."""
        # Freed memory goes back at once: it would not be enough for a whole SDXL otherwise.
        environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "131072", "MALLOC_ARENA_MAX": "1"}
        folders = [self.scripts, self.scripts / "networks", self.work / "stand_in"]
        environment["PYTHONPATH"] = os.pathsep.join(map(str, folders))
        script, *rest = map(str, arguments)
        command = [self.python, str(self.scripts / "networks" / f"{script}.py"), *rest]
        done = subprocess.run(command, env=environment, cwd=self.scripts, capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(f"{script} failed:\n{done.stderr[-3000:]}")

    def row(self, what: str, found: float, target: float) -> None:
        """A line of the table."""
        ok = found <= target
        self.missed += not ok
        print(f"  {what:<58} {found:10.2e}  target {target:.0e}  {'ok' if ok else 'MISSED'}", flush=True)

    def same(self, what: str, ours: Path, theirs: Path, keys: tuple[str, ...]) -> None:
        """Entries of the metadata that have to be equal."""
        one, two = read_metadata(ours), read_metadata(theirs)
        wrong = [
            f"{key}: {one.get(key)!r} and {two.get(key)!r}" for key in keys if one.get(key) != two.get(key)
        ]
        self.missed += bool(wrong)
        print(f"  {what:<58} {'metadata equal' if not wrong else 'MISSED ' + '; '.join(wrong)}", flush=True)


SD1 = {
    "lora_te_text_model_encoder_layers_3_self_attn_q_proj": (768, 768),
    "lora_te_text_model_encoder_layers_11_mlp_fc1": (3072, 768),
    "lora_unet_down_blocks_0_attentions_0_proj_in": (320, 320, 1, 1),
    "lora_unet_down_blocks_1_attentions_1_transformer_blocks_0_attn2_to_k": (640, 768),
    "lora_unet_down_blocks_0_attentions_1_transformer_blocks_0_ff_net_0_proj": (2560, 320),
    "lora_unet_up_blocks_3_resnets_2_conv1": (320, 640, 3, 3),
    "lora_unet_up_blocks_2_upsamplers_0_conv": (640, 640, 3, 3),
}
SDXL = {
    "lora_te2_text_model_encoder_layers_3_self_attn_q_proj": (1280, 1280),
    "lora_unet_input_blocks_4_1_transformer_blocks_0_attn2_to_k": (640, 2048),
    "lora_unet_output_blocks_8_0_in_layers_2": (320, 640, 3, 3),
}
FLUX = {
    "lora_unet_double_blocks_0_img_attn_qkv": (9216, 3072),
    "lora_unet_double_blocks_1_txt_mlp_0": (12288, 3072),
    "lora_unet_double_blocks_1_img_mod_lin": (18432, 3072),
    "lora_unet_single_blocks_0_linear1": (21504, 3072),
    "lora_unet_single_blocks_1_linear2": (3072, 15360),
}
TOY_FLUX = {
    "lora_unet_double_blocks_0_img_attn_qkv": (192, 64),
    "lora_unet_double_blocks_1_txt_mlp_0": (256, 64),
    "lora_unet_single_blocks_0_linear1": (448, 64),
    "lora_unet_single_blocks_1_linear2": (64, 320),
}
VERSIONS = {"sd1": "sd_v1", "sdxl": "sdxl_base_v1-0", "flux": "flux1"}
MINIMUM = ("ss_v2", "ss_base_model_version", "ss_network_dim", "ss_network_alpha")


def resizing(bench: Bench) -> None:
    """resize_lora.py."""
    print("resize")
    work = bench.work
    for kind, layers in (("sd1", SD1), ("sdxl", SDXL)):
        file = lora(work / f"{kind}_r.safetensors", layers, 16, 8.0, 1, VERSIONS[kind])
        chosen: tuple[tuple[Any, float | None], ...] = (
            (None, None),
            ("sv_ratio", 5.0),
            ("sv_fro", 0.9),
            ("sv_cumulative", 0.7),
        )
        for method, value in chosen:
            ours, theirs = work / "r_ours.safetensors", work / "r_theirs.safetensors"
            given = ["--dynamic_method", method, "--dynamic_param", value] if method else []
            bench.theirs(
                *("resize_lora", "--model", file, "--save_to", theirs, "--new_rank", 6, "--new_conv_rank", 4),
                *("--save_precision", "float", "--device", "cpu", *given),
            )
            resize(file, ours, 6, conv_rank=4, method=method, parameter=value, precision="float", say=silent)
            bench.row(f"{kind} {method or 'fixed rank'}", difference(deltas(ours), deltas(theirs)), EXACT)
            shapes = [{k: t.shape for k, t in load_file(path).items()} for path in (ours, theirs)]
            if shapes[0] != shapes[1]:
                bench.row(f"{kind} {method}: shapes", float("inf"), 0.0)
            keys = ("ss_training_comment",) + (("ss_network_dim",) if method else ())
            bench.same(f"{kind} {method or 'fixed rank'}", ours, theirs, keys)


def merging(bench: Bench) -> None:
    """merge_lora.py, sdxl_merge_lora.py, flux_merge_lora.py, svd_merge_lora.py without a model."""
    print("merge LoRAs")
    work = bench.work
    for kind, layers, script in (
        ("sd1", SD1, "merge_lora"),
        ("sdxl", SDXL, "sdxl_merge_lora"),
        ("flux", FLUX, "flux_merge_lora"),
    ):
        files = [
            lora(work / f"{kind}_a.safetensors", layers, 8, 4.0, 1, VERSIONS[kind]),
            lora(work / f"{kind}_b.safetensors", layers, 8, 1.0, 2, VERSIONS[kind]),
        ]
        ours, theirs = work / "m_ours.safetensors", work / "m_theirs.safetensors"
        for method in ("sum", "concat"):
            flags = ["--concat"] if method == "concat" else []
            bench.theirs(
                *(script, "--models", *files, "--ratios", 0.7, -0.4, "--save_to", theirs),
                *("--precision", "float", "--save_precision", "float", *flags),
            )
            merge(files, [0.7, -0.4], ours, method=method, precision="float", say=silent)
            bench.row(f"{kind} {method}", difference(deltas(ours), deltas(theirs)), EXACT)
            keys = (
                MINIMUM if method == "sum" else MINIMUM[:2]
            )  # theirs names the first file's dim when joined
            bench.same(f"{kind} {method}", ours, theirs, keys)
        if kind == "flux":
            continue
        bench.theirs(
            *("svd_merge_lora", "--models", *files, "--ratios", 0.7, -0.4, "--save_to", theirs),
            *("--precision", "float", "--save_precision", "float", "--new_rank", 6, "--new_conv_rank", 4),
        )
        merge(files, [0.7, -0.4], ours, method="svd", rank=6, conv_rank=4, precision="float", say=silent)
        bench.row(f"{kind} svd (clamped at a quantile)", difference(deltas(ours), deltas(theirs)), CLAMPED)


def changes(before: Mapping[str, Tensor], path: Path, keys: set[str]) -> dict[str, Tensor]:
    """What a tool added to the weights of ``keys``."""
    with safe_open(path, framework="pt") as file:
        return {key: file.get_tensor(key).double() - before[key].double() for key in keys}


def models(bench: Bench, sd15: Path | None, sdxl: Path | None) -> None:
    """Merging into a model, and extracting from two."""
    work = bench.work
    flux = tiny_flux.files(work / "flux")["pretrained_model_name_or_path"]
    for kind, model, layers, script, precision, size in (
        ("sd1", sd15, SD1, "merge_lora", "float", 0.01),
        ("sdxl", sdxl, SDXL, "sdxl_merge_lora", "fp16", 0.03),  # in full precision sd-scripts needs 21 GB
        ("flux", flux, TOY_FLUX, "flux_merge_lora", "float", 0.01),
    ):
        if model is None:
            continue
        print(f"into a model and out of it: {kind}")
        file = lora(work / f"{kind}_i.safetensors", layers, 8, 4.0, 3, VERSIONS[kind], size)
        ours, theirs = work / f"i_{kind}_ours.safetensors", work / f"i_{kind}_theirs.safetensors"
        flag = "--flux_model" if kind == "flux" else "--sd_model"
        bench.theirs(
            *(script, flag, model, "--models", file, "--ratios", 0.8, "--save_to", theirs),
            *("--precision", precision, "--save_precision", precision),
        )
        merge_into(model, [file], [0.8], ours, precision=precision, say=silent)
        with safe_open(ours, framework="pt") as one, safe_open(theirs, framework="pt") as two:
            common = set(one.keys()) & set(two.keys())
            worst = max(
                float((one.get_tensor(k).double() - two.get_tensor(k).double()).abs().max()) for k in common
            )
            alone = len(set(one.keys()) ^ set(two.keys()))
        target = TWO_ROUNDINGS if precision == "fp16" else 1e-5
        bench.row(f"merged weights, {len(common)} tensors, {alone} in one file only", worst, target)
        ext = work / "e_ours.safetensors", work / "e_theirs.safetensors"
        if kind != "flux":
            whole = ["--sdxl", "--load_precision", precision] if kind == "sdxl" else []
            bench.theirs(
                *(
                    "extract_lora_from_models",
                    "--model_org",
                    model,
                    "--model_tuned",
                    ours,
                    "--save_to",
                    ext[1],
                ),
                *("--dim", 8, "--conv_dim", 8, "--save_precision", "float", "--min_diff", 1e-6, *whole),
            )
            extract(model, ours, ext[0], 8, conv_rank=8, precision="float", min_diff=1e-6, say=silent)
        else:
            bench.theirs(
                *("flux_extract_lora", "--model_org", model, "--model_tuned", ours, "--save_to", ext[1]),
                *("--dim", 8, "--save_precision", "float"),
            )
            extract(model, ours, ext[0], 8, precision="float", say=silent)
        shapes = [{k: t.shape for k, t in load_file(path).items()} for path in ext]
        if shapes[0] != shapes[1]:
            bench.row("extracted: names and shapes", float("inf"), 0.0)
        # Layers that do not differ are noise on both sides.
        one, two = (deltas(path, layers) for path in ext)
        bench.row(
            "extracted (clamped at a quantile)", difference(one, two), CLAMPED if kind == "flux" else EXACT
        )
        bench.same("extracted", *ext, (*MINIMUM, "ss_network_args"))


def converting(bench: Bench) -> None:
    """convert_flux_lora.py."""
    print("convert FLUX.1 names")
    work = bench.work
    file = lora(work / "flux_c.safetensors", FLUX, 8, 1.0, 4, VERSIONS["flux"])
    ours, theirs = work / "c_ours.safetensors", work / "c_theirs.safetensors"
    bench.theirs(
        "convert_flux_lora",
        "--src",
        "sd-scripts",
        "--dst",
        "ai-toolkit",
        "--src_path",
        file,
        "--dst_path",
        theirs,
    )
    convert(file, ours, "diffusers", say=silent)
    bench.row("to diffusers' names", difference(deltas(ours), deltas(theirs)), EXACT)
    back = work / "c_back.safetensors"
    bench.theirs(
        "convert_flux_lora",
        "--src",
        "ai-toolkit",
        "--dst",
        "sd-scripts",
        "--src_path",
        theirs,
        "--dst_path",
        back,
    )
    convert(theirs, ours, "kohya", say=silent)
    bench.row("back to Kohya's", difference(deltas(ours), deltas(back)), EXACT)


def main() -> None:
    """See the module's text."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("scripts", type=Path)
    parser.add_argument("python")
    parser.add_argument("--work", type=Path)
    parser.add_argument("--sd15", type=Path, help="a whole SD 1.5 file (tests.parity.make_sd15)")
    parser.add_argument("--sdxl", type=Path, help="a whole SDXL file (tests.parity.make_sdxl)")
    parser.add_argument("--only", choices=("resize", "merge", "models", "convert"))
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        work = (options.work or Path(temporary)).resolve()
        work.mkdir(parents=True, exist_ok=True)
        bench = Bench(options.scripts.resolve(), options.python, work)
        parts: dict[str, Callable[[], None]] = {
            "resize": lambda: resizing(bench),
            "merge": lambda: merging(bench),
            "convert": lambda: converting(bench),
            "models": lambda: models(bench, options.sd15, options.sdxl),
        }
        for name, part in parts.items():
            if options.only in (None, name):
                part()
    sys.exit(1 if bench.missed else 0)


if __name__ == "__main__":
    main()
