"""Loading SD 1.x and 2.x: every layout gives the weights that diffusers' own loaders give."""

from __future__ import annotations

import json
import shutil
import sys
import time
import types
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from tests import tiny
from tests.families.conftest import load
from trainer import checkpoints
from trainer.errors import ModelFileError
from trainer.families.sd import StableDiffusion
from trainer.files import REPOSITORY

GOLDEN = Path(__file__).parent / "golden"


def same(ours: nn.Module, theirs: nn.Module) -> None:
    a, b = ours.state_dict(), theirs.state_dict()
    assert a.keys() == b.keys()
    assert [name for name in a if not torch.equal(a[name], b[name])] == []
    assert not any(value.is_meta for value in [*ours.parameters(), *ours.buffers()])
    assert not any(value.requires_grad for value in ours.parameters())
    assert not ours.training


def same_family(ours: StableDiffusion, theirs: dict[str, Any]) -> None:
    same(ours.unet, theirs["unet"])
    same(ours.vae, theirs["vae"])
    same(ours.text_encoders["te1"], theirs["text_encoder"])


@pytest.mark.parametrize("version", [1, 2])
def test_folder_equals_from_pretrained(version: int, shelf: Path, tmp_path: Path) -> None:
    from diffusers import StableDiffusionPipeline

    folder = (tiny.sd15_folder if version == 1 else tiny.sd2_folder)(shelf / f"sd{version}-folder")
    theirs = StableDiffusionPipeline.from_pretrained(folder, local_files_only=True, safety_checker=None)
    ours = load(tiny.job(folder, tmp_path, v2=version == 2))
    same_family(ours, {"unet": theirs.unet, "vae": theirs.vae, "text_encoder": theirs.text_encoder})
    configs = [json.loads(model.to_json_string()) for model in (ours.unet, theirs.unet)]
    for config in configs:
        config.pop("_name_or_path", None)
    assert configs[0] == configs[1]
    text = "a photo of sks dog, 50% off :) ünïcode"
    padded = theirs.tokenizer(text, padding="max_length", max_length=77, return_tensors="pt").input_ids
    assert torch.equal(ours.tokens.captions([text])[0], padded)


@pytest.mark.filterwarnings("ignore")  # of diffusers, about its own configuration files
@pytest.mark.parametrize("version", [1, 2])
def test_single_file_equals_from_single_file(version: int, shelf: Path, tmp_path: Path) -> None:
    from diffusers import StableDiffusionPipeline

    make_file, make_folder = (
        (tiny.sd15_file, tiny.sd15_folder) if version == 1 else (tiny.sd2_file, tiny.sd2_folder)
    )
    file = make_file(shelf / f"sd{version}.safetensors")
    folder = make_folder(shelf / f"sd{version}-folder")
    theirs = StableDiffusionPipeline.from_single_file(
        file, config=str(folder), local_files_only=True, safety_checker=None
    )
    ours = load(tiny.job(file, tmp_path, v2=version == 2))
    same_family(ours, {"unet": theirs.unet, "vae": theirs.vae, "text_encoder": theirs.text_encoder})


@pytest.mark.parametrize("version", [1, 2])
def test_configuration_is_read_off_the_shapes(version: int, shelf: Path, tmp_path: Path) -> None:
    make = tiny.sd15_file if version == 1 else tiny.sd2_file
    ours = load(tiny.job(make(shelf / f"sd{version}.safetensors"), tmp_path, v2=version == 2))
    theirs = tiny.models(version)
    inputs = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    text = torch.randn(1, 77, 32 * version, generator=torch.Generator().manual_seed(1))
    pixels = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(2))
    ids = torch.tensor([[49406, 320, 1125, 49407]])
    with torch.no_grad():
        for a, b in (
            (ours.unet(inputs, 7, text).sample, theirs["unet"](inputs, 7, text).sample),
            (ours.vae.encode(pixels).latent_dist.mean, theirs["vae"].encode(pixels).latent_dist.mean),
            (ours.vae.decode(inputs).sample, theirs["vae"].decode(inputs).sample),
            (ours.text_encoders["te1"](ids)[0], theirs["text_encoder"](ids)[0]),
        ):
            assert torch.equal(a, b)


def test_full_size_configuration() -> None:
    """SD 1.5's published configuration comes out of its shapes."""
    from diffusers import UNet2DConditionModel

    with torch.device("meta"):
        unet = UNet2DConditionModel(cross_attention_dim=768)
    shapes = {f"x.{tiny._ldm_unet(key)}": tuple(value.shape) for key, value in unet.state_dict().items()}
    base = checkpoints.read_json(checkpoints.MODELS / "sd1.json")["unet"]
    found = checkpoints.ldm_unet_config(shapes, "x.", base)
    assert found["block_out_channels"] == [320, 640, 1280, 1280]
    assert found["down_block_types"] == ["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"]
    assert found["up_block_types"] == ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 3
    assert (found["layers_per_block"], found["attention_head_dim"], found["cross_attention_dim"]) == (
        2,
        8,
        768,
    )
    with torch.device("meta"):
        rebuilt = UNet2DConditionModel.from_config(found)
    assert {k: v.shape for k, v in rebuilt.state_dict().items()} == {
        k: v.shape for k, v in unet.state_dict().items()
    }


@pytest.mark.parametrize("version", [1, 2])
def test_targets_are_those_of_sd_scripts(version: int, shelf: Path, tmp_path: Path) -> None:
    """golden/*.keys.txt: module names that sd-scripts 48d368f makes, in its order, conv included."""
    make = tiny.sd15_file if version == 1 else tiny.sd2_file
    family = load(tiny.job(make(shelf / f"sd{version}.safetensors"), tmp_path, v2=version == 2))
    golden = (GOLDEN / f"sd{version}.keys.txt").read_text().split()
    targets = family.targets()
    unet = [target for target in targets if target.part == "unet"]
    assert [target.name for target in unet] == [name for name in golden if name.startswith("lora_unet_")]
    assert len([target for target in unet if not target.conv_group]) == 192
    text = [target.name for target in targets if target.part == "te1"]
    assert text == [name for name in golden if name.startswith("lora_te_")][: len(text)]
    assert len(text) == 3 * 6
    assert targets[0].part == "te1"
    assert sum(target.saved_as_conv for target in targets) == (32 if version == 2 else 0)
    modules = {id(module) for module in [*family.unet.modules(), *family.text_encoders["te1"].modules()]}
    assert all(id(target.module) in modules for target in targets)
    blocks = {target.name: target.block for target in unet}
    assert blocks["lora_unet_down_blocks_0_attentions_0_proj_in"] == 1
    assert blocks["lora_unet_down_blocks_0_downsamplers_0_conv"] == 3
    assert blocks["lora_unet_mid_block_attentions_0_proj_in"] == 12
    assert blocks["lora_unet_up_blocks_0_upsamplers_0_conv"] == 15
    assert blocks["lora_unet_up_blocks_3_attentions_2_proj_in"] == 24
    assert {*blocks.values()} == {*range(1, 25)}


def test_counts_of_full_size_text_encoders() -> None:
    from transformers import CLIPTextConfig, CLIPTextModel

    from trainer.families._latent_diffusion import TEXT_LAYERS

    for version, layers in ((1, 12), (2, 23)):
        with torch.device("meta"):
            model = CLIPTextModel(CLIPTextConfig(num_hidden_layers=layers, num_attention_heads=8))
        names = [
            f"lora_te_text_model_{name.replace('.', '_')}"
            for name, module in model.named_modules()
            if isinstance(module, nn.Linear) and TEXT_LAYERS.fullmatch(name)
        ]
        golden = (GOLDEN / f"sd{version}.keys.txt").read_text().split()
        assert names == [name for name in golden if name.startswith("lora_te_")]


def test_ckpt_with_nested_weights_and_ema(shelf: Path, tmp_path: Path) -> None:
    ours = load(tiny.job(tiny.sd15_ckpt(shelf / "sd15.ckpt"), tmp_path))
    same_family(ours, tiny.models())
    old = shelf / "old.ckpt"
    torch.save({"state_dict": tiny.ldm_tensors()}, old, _use_new_zipfile_serialization=False)
    same_family(load(tiny.job(old, tmp_path)), tiny.models())


@pytest.fixture
def lightning(shelf: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A checkpoint that names a callback's class and a number of numpy's, as SD 1.4's own does."""
    name = "pytorch_lightning.callbacks.model_checkpoint"
    module = types.ModuleType(name)

    class ModelCheckpoint:
        def __setstate__(self, state: Any) -> None:
            raise AssertionError("code of the checkpoint was run")

    ModelCheckpoint.__module__, ModelCheckpoint.__qualname__ = module.__name__, "ModelCheckpoint"
    module.ModelCheckpoint = ModelCheckpoint  # type: ignore[attr-defined]
    left = ModelCheckpoint()
    left.best = 1  # type: ignore[attr-defined]
    path = shelf / "lightning.ckpt"
    callbacks = {ModelCheckpoint: left, "best": np.float64(0.5)}
    content = {"state_dict": tiny.ldm_tensors(), "callbacks": callbacks}
    with monkeypatch.context() as patch:
        for parent in ("pytorch_lightning", "pytorch_lightning.callbacks"):
            patch.setitem(sys.modules, parent, types.ModuleType(parent))
        patch.setitem(sys.modules, name, module)
        torch.save(content, path)
    return path


def test_ckpt_with_what_a_training_program_left(lightning: Path, tmp_path: Path) -> None:
    """It is read, and nothing of it is run."""
    same_family(load(tiny.job(lightning, tmp_path)), tiny.models())


def test_ckpt_is_read_by_two_threads_at_once(lightning: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By a check and a start: what the reader was told to allow stays allowed until both are done."""
    read, times = torch.load, [0.1, 0.4]

    def slowly(*args: Any, **options: Any) -> Any:
        time.sleep(times.pop(0))
        return read(*args, **options)

    monkeypatch.setattr(torch, "load", slowly)
    with ThreadPoolExecutor() as threads:
        first, second = (threads.submit(checkpoints.open_tensors, lightning) for _ in range(2))
    assert first.result().shapes == second.result().shapes


class Attack:
    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> Any:
        return Path.touch, (self.trace,)


@pytest.mark.parametrize("zipped", [True, False])
def test_ckpt_that_would_run_code_is_refused(tmp_path: Path, zipped: bool) -> None:
    trace, path = tmp_path / "ran", tmp_path / "bad.ckpt"
    content = {"state_dict": tiny.ldm_tensors() | {"x": Attack(trace)}}
    torch.save(content, path, _use_new_zipfile_serialization=zipped)
    with pytest.raises(ModelFileError, match=r"bad\.ckpt .*(run code|safely)"):
        load(tiny.job(path, tmp_path))
    assert not trace.exists()


def changed(path: Path, change: dict[str, Tensor | None], start: Path) -> Path:
    tensors: dict[str, Tensor] = load_file(start)
    for key, value in change.items():
        if value is None:
            tensors = {k: v for k, v in tensors.items() if not k.startswith(key)}
        else:
            tensors[key] = value
    save_file(tensors, path)
    return path


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        (["conditioner.embedders.1.model.ln_final.weight", "model.diffusion_model.out.0.bias"], "tick SDXL"),
        (["double_blocks.0.img_mod.lin.weight"], "tick Flux"),
        (["model.diffusion_model.joint_blocks.0.x"], "SD3"),
        (["lora_unet_mid_block_attentions_0_proj_in.lora_down.weight"], "LoRA network weights"),
        (["first_stage_model.decoder.conv_in.weight"], "VAE only"),
        (["model.diffusion_model.out.0.bias", "first_stage_model.x"], "no text encoder"),
        (["something.else"], "no model family"),
    ],
)
def test_file_of_another_family(keys: list[str], message: str, tmp_path: Path) -> None:
    save_file({key: torch.zeros(1) for key in keys}, tmp_path / "x.safetensors")
    with pytest.raises(ModelFileError, match=message):
        load(tiny.job(tmp_path / "x.safetensors", tmp_path))


def test_v2_must_be_ticked_for_sd2_only(shelf: Path, file: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelFileError, match="tick v2"):
        load(tiny.job(tiny.sd2_file(shelf / "sd2.safetensors"), tmp_path))
    with pytest.raises(ModelFileError, match="untick v2"):
        load(tiny.job(file, tmp_path, v2=True))


@pytest.mark.parametrize(("channels", "message"), [(9, "inpainting"), (5, "depth")])
def test_other_unets_are_named(channels: int, message: str, file: Path, tmp_path: Path) -> None:
    key = "model.diffusion_model.input_blocks.0.0.weight"
    path = changed(tmp_path / "x.safetensors", {key: torch.zeros(32, channels, 3, 3)}, file)
    with pytest.raises(ModelFileError, match=message):
        load(tiny.job(path, tmp_path))


def test_incomplete_files(file: Path, tmp_path: Path) -> None:
    without = {
        "cond_stage_model.": "no text encoder",
        "first_stage_model.": "no VAE",
        "model.diffusion_model.": "no UNet",
        "model.diffusion_model.middle_block.1.transformer_blocks.0.ff.": "lacks 4 of",
        "cond_stage_model.transformer.text_model.encoder.layers.0.mlp.fc1.": "fc1",
    }
    for key, message in without.items():
        path = changed(tmp_path / "x.safetensors", {key: None}, file)
        with pytest.raises(ModelFileError, match=message):
            load(tiny.job(path, tmp_path))
    data = file.read_bytes()
    for size in (0, 5, len(data) // 2):
        (tmp_path / "cut.safetensors").write_bytes(data[:size])
        with pytest.raises(ModelFileError, match="not a whole safetensors file"):
            load(tiny.job(tmp_path / "cut.safetensors", tmp_path))
    (tmp_path / "cut.ckpt").write_bytes(data[:1000])
    with pytest.raises(ModelFileError, match="opened safely"):
        load(tiny.job(tmp_path / "cut.ckpt", tmp_path))


def test_both_key_layouts_of_the_text_encoder(folder: Path, file: Path, tmp_path: Path) -> None:
    """With and without the text_model level, in folders and in files."""
    copy = tmp_path / "folder"
    shutil.copytree(folder, copy)
    weights = copy / "text_encoder" / "model.safetensors"
    tensors = {f"text_model.{key}": value for key, value in load_file(weights).items()}
    save_file(tensors | {"text_model.embeddings.position_ids": torch.arange(77)[None]}, weights)
    same_family(load(tiny.job(copy, tmp_path)), tiny.models())
    flat = {key.replace("transformer.text_model.", "transformer."): v for key, v in load_file(file).items()}
    save_file(flat, tmp_path / "flat.safetensors")
    same_family(load(tiny.job(tmp_path / "flat.safetensors", tmp_path)), tiny.models())


def test_folder_variants(folder: Path, tmp_path: Path) -> None:
    """fp16 files, pickles, shards, the old names in a VAE, no tokenizer."""
    copy = tmp_path / "folder"
    shutil.copytree(folder, copy)
    shutil.rmtree(copy / "tokenizer")
    unet = copy / "unet" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(unet)
    half = list(tensors)[: len(tensors) // 2]
    unet.unlink()
    shards = {"a.safetensors": half, "b.safetensors": [key for key in tensors if key not in half]}
    for name, keys in shards.items():
        save_file({key: tensors[key] for key in keys}, copy / "unet" / name)
    places = {key: name for name, keys in shards.items() for key in keys}
    index = copy / "unet" / "diffusion_pytorch_model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": places}))
    text = copy / "text_encoder" / "model.safetensors"
    torch.save(load_file(text), copy / "text_encoder" / "pytorch_model.bin")
    text.unlink()
    vae = copy / "vae" / "diffusion_pytorch_model.safetensors"
    names = {".to_q.": ".query.", ".to_k.": ".key.", ".to_v.": ".value.", ".to_out.0.": ".proj_attn."}
    old = {}
    for key, value in load_file(vae).items():
        for new, before in names.items():
            key = key.replace(new, before)
        old[key] = value
    save_file(old, vae.with_name("diffusion_pytorch_model.fp16.safetensors"))
    vae.unlink()
    ours = load(tiny.job(copy, tmp_path))
    same_family(ours, tiny.models())
    assert ours.tokens.captions(["a photo"])[0, 0, :4].tolist() == [49406, 320, 1125, 49407]


def test_vae_of_its_own(shelf: Path, file: Path, folder: Path, tmp_path: Path) -> None:
    from diffusers import AutoencoderKL

    other = tiny.sd15_file(shelf / "other.safetensors", seed=9)
    vae = tiny.models(1, 9)["vae"]
    vae.save_pretrained(tmp_path / "root")
    vae.save_pretrained(tmp_path / "model" / "vae")
    weights = tmp_path / "root" / "diffusion_pytorch_model.safetensors"
    torch.save(load_file(weights), tmp_path / "bare.bin")
    bare = {
        k.removeprefix("first_stage_model."): v for k, v in load_file(other).items() if "first_stage" in k
    }
    save_file(bare, tmp_path / "ldm.vae.safetensors")
    torch.save({"state_dict": bare}, tmp_path / "ldm.vae.pt")
    places = ["root", "model", "bare.bin", "ldm.vae.safetensors", "ldm.vae.pt"]
    prints = set()
    for place in [other, weights, *(tmp_path / name for name in places)]:
        ours = load(tiny.job(file, tmp_path, vae=str(place)))
        same(ours.vae, vae)
        same(ours.unet, tiny.models()["unet"])
        prints.add(ours.vae_fingerprint())
    assert len(prints) == 1
    prints.add(load(tiny.job(file, tmp_path)).vae_fingerprint())
    prints.add(load(tiny.job(file, tmp_path), torch.float16).vae_fingerprint())
    assert len(prints) == 3
    assert load(tiny.job(folder, tmp_path)).vae_fingerprint() in prints
    with pytest.raises(ModelFileError, match=r"nowhere\.safetensors does not exist.*vae"):
        load(tiny.job(file, tmp_path, vae=str(tmp_path / "nowhere.safetensors")))
    AutoencoderKL(latent_channels=16, norm_num_groups=1, block_out_channels=(8,)).save_pretrained(
        tmp_path / "flux"
    )
    with pytest.raises(ModelFileError, match="16 latent channels"):
        load(tiny.job(file, tmp_path, vae=str(tmp_path / "flux")))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_weights_are_cast_once_and_correctly(dtype: torch.dtype, file: Path, tmp_path: Path) -> None:
    ours = load(tiny.job(file, tmp_path), dtype)
    theirs = tiny.models()
    for a, b in (
        (ours.unet, theirs["unet"]),
        (ours.vae, theirs["vae"]),
        (ours.text_encoders["te1"], theirs["text_encoder"]),
    ):
        expected = b.state_dict()
        assert all(torch.equal(value, expected[name].to(dtype)) for name, value in a.state_dict().items())
    half_file = tiny.sd15_file(tmp_path / "half.safetensors", dtype=dtype)
    again = load(tiny.job(half_file, tmp_path), dtype)
    same(again.unet, ours.unet)


def test_names_that_are_nowhere(tmp_path: Path) -> None:
    with pytest.raises(ModelFileError, match=r"hub is switched off.*download the checkpoint file"):
        load(tiny.job(Path("somebody/some-model"), tmp_path))
    with pytest.raises(ModelFileError, match=r"gone\.safetensors does not exist"):
        load(tiny.job(tmp_path / "gone.safetensors", tmp_path))
    with pytest.raises(ModelFileError, match="no diffusers folder"):
        load(tiny.job(tmp_path, tmp_path))


def test_model_from_the_hub_cache(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A name finds what another program has fetched; a name that moved finds the old copy."""
    from huggingface_hub import constants

    cache = tmp_path / "hub"
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    for name in ("models--runwayml--stable-diffusion-v1-5", "models--owner--files"):
        (cache / name / "refs").mkdir(parents=True)
        (cache / name / "refs" / "main").write_text("f" * 40)
    snapshots = [cache / name / "snapshots" / ("f" * 40) for name in sorted(p.name for p in cache.iterdir())]
    tiny.sd15_file(snapshots[0] / "v1.safetensors")
    shutil.copytree(folder, snapshots[1])
    same_family(load(tiny.job(Path("runwayml/stable-diffusion-v1-5"), tmp_path)), tiny.models())
    job = tiny.job(Path("x"), tmp_path).with_config(pretrained_model_name_or_path="owner/files/blob/main/v1")
    same_family(load(job), tiny.models())


def test_model_that_has_to_be_fetched(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only what is needed is asked for; a repository of pickles is asked for its pickles."""
    import huggingface_hub
    from huggingface_hub import constants
    from huggingface_hub.errors import LocalEntryNotFoundError
    from huggingface_hub.utils._paths import filter_repo_objects

    hub, local = tmp_path / "hub", tmp_path / "local"
    shutil.copytree(folder, hub)
    text = hub / "text_encoder" / "model.safetensors"
    torch.save(load_file(text), text.with_name("pytorch_model.bin"))
    for part in ("unet", "vae"):
        weights = hub / part / "diffusion_pytorch_model.safetensors"
        torch.save(load_file(weights), weights.with_suffix(".bin"))
        weights.unlink()
        weights.with_name("diffusion_pytorch_model.fp16.bin").write_bytes(b"not wanted")
    (hub / "safety_checker").mkdir()
    (hub / "safety_checker" / "model.safetensors").write_bytes(b"not wanted")
    said: list[str] = []

    def fetch(
        repo: str, *, allow_patterns: list[str], ignore_patterns: list[str], local_files_only: bool
    ) -> str:
        if local_files_only:
            raise LocalEntryNotFoundError(f"{repo} is not cached")
        assert said[:1] == ["owner/model is not on this machine: fetching it from the model hub"]
        names = [path.relative_to(hub).as_posix() for path in hub.rglob("*") if path.is_file()]
        for name in filter_repo_objects(
            names, allow_patterns=allow_patterns, ignore_patterns=ignore_patterns
        ):
            (local / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(hub / name, local / name)
        return str(local)

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", fetch)
    job = tiny.job(Path("owner/model"), tmp_path)
    ours = StableDiffusion.load(job, torch.device("cpu"), torch.float32, said.append)
    same_family(ours, tiny.models())
    assert b"not wanted" not in [path.read_bytes() for path in local.rglob("*") if path.is_file()]


def test_the_shipped_token_table_is_whole() -> None:
    from trainer.tokens import clip_tokenizer

    table = REPOSITORY / "assets" / "models" / "clip" / "bpe_simple_vocab_16e6.txt.gz"
    assert len(clip_tokenizer(table)) == 49408
    assert (table.parent / "LICENSE").read_text().startswith("MIT License")
