"""What sd-scripts made of the recorded cases, against ours: LoRA keys, buckets, steps, metadata.

The golden files come from running sd-scripts (README.md); no model or photograph is needed here.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from PIL import Image

from tests import hollow
from tests.families import sdxl_full
from tests.parity.cases import CASES, kohya_json
from tests.parity.make_golden import VOLATILE, same_value
from tests.parity.make_photos import PHOTOS, REG_PHOTOS
from trainer import config as configuration
from trainer.data import folder
from trainer.data.types import Dataset
from trainer.draws import Draws
from trainer.families._base import Family
from trainer.families.flux import Flux
from trainer.families.sd import StableDiffusion
from trainer.job import Job
from trainer.metadata import Metadata
from trainer.networks import plugin_for
from trainer.networks._base import Network
from trainer.plan import Plan

GOLDEN = Path(__file__).parent / "golden"
RUNS: dict[str, Any] = {
    name: run
    for file in ("runs.json", "flux_runs.json")
    for name, run in json.loads((GOLDEN / file).read_text(encoding="utf-8")).items()
}
KEYS: dict[str, dict[str, list[str]]] = json.loads((GOLDEN / "lora_keys.json").read_text(encoding="utf-8"))

SIZES = {
    "astronaut.png": (512, 512),
    "camera.png": (512, 512),
    "chelsea.png": (451, 300),
    "coffee.png": (600, 400),
    "motorcycle_left.png": (741, 500),
    "rocket.jpg": (640, 427),
    "portrait.png": (240, 400),
    "brick.png": (512, 512),
    "gravel.png": (512, 512),
    "retina.jpg": (1411, 1411),
    "hubble_deep_field.jpg": (1000, 872),
    "coins.png": (384, 303),
    "moon.png": (512, 512),
    "ihc.png": (512, 512),
}
"""Of the photographs that were trained on; here flat pictures stand in for them."""


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with stand-ins for the photographs and for the files that a job names."""
    world = tmp_path_factory.mktemp("world")
    for data, subsets in (("photos", PHOTOS), ("reg_photos", REG_PHOTOS)):
        for subset, pictures in subsets.items():
            (world / data / subset).mkdir(parents=True)
            for name, caption in pictures.items():
                Image.new("RGB", SIZES[name]).save(world / data / subset / name)
                if caption is not None:
                    path = (world / data / subset / name).with_suffix(".txt")
                    path.write_text(caption + "\n", encoding="utf-8")
    for name in ("sd15", "sdxl", "flux1-dev"):
        (world / f"{name}.safetensors").write_bytes(bytes(100))
    return world


@pytest.fixture(scope="module")
def flux(tmp_path_factory: pytest.TempPathFactory) -> Flux:
    """FLUX.1 dev on the meta device, both text encoders included."""
    folder = tmp_path_factory.mktemp("flux")
    files = {name: str(path) for name, path in hollow.flux(folder).items()}
    values = {"LoRA_type": "Flux1", "flux1_checkbox": True, "train_t5xxl": True, "text_encoder_lr": 1e-4}
    folders = {"train_data_dir": str(folder), "output_dir": str(folder / "out")}
    job = Job.from_config(configuration.loads({**values, **files, **folders}).config, base=folder)
    return Flux.load(job, torch.device("meta"), torch.float32, lambda _: None)


def base_of(case: str) -> str:
    values = CASES[case].values
    return "sdxl" if values.get("sdxl") else "flux1-dev" if values.get("flux1_checkbox") else "sd15"


def job_of(case: str, world: Path, output: Path) -> Job:
    values = kohya_json(
        case,
        model=world / f"{base_of(case)}.safetensors",
        photos=world / "photos",
        reg_photos=world / "reg_photos",
        output=output,
        network_weights=world / "start.safetensors",
    )
    loaded = configuration.loads(json.dumps(values))
    assert not loaded.of("unknown", "invalid")
    return Job.from_config(loaded.config)


def family_of(*, v2: bool = False, v_parameterization: bool = False) -> StableDiffusion:
    """A family of full width whose models have shapes and no weights."""
    from diffusers import UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    width, layers = (1024, 23) if v2 else (768, 12)
    with torch.device("meta"):
        unet = UNet2DConditionModel(
            block_out_channels=(320, 640, 1280, 1280),
            cross_attention_dim=width,
            attention_head_dim=(5, 10, 20, 20) if v2 else 8,
            use_linear_projection=v2,
        )
        text_encoder = CLIPTextModel(
            CLIPTextConfig(
                hidden_size=width,
                intermediate_size=4 * width,
                num_hidden_layers=layers,
                num_attention_heads=width // 64,
            )
        )
    return StableDiffusion(
        unet=lambda: unet,
        vae=torch.nn.Identity(),
        text_encoder=text_encoder,
        tokens=cast(Any, None),
        device=torch.device("cpu"),
        dtype=torch.float32,
        v2=v2,
        v_parameterization=v_parameterization,
        clip_skip=1,
        proj_saved_as_conv=v2,
        keep_text=False,
    )


def network_of(job: Job, family: Family) -> Network:
    from_nothing = job.with_config(network_weights="")
    return plugin_for(job).create(family, from_nothing, Draws(1), lambda line: None)


@pytest.mark.parametrize(
    ("case", "families"),
    [
        ("plain", ["sd15"]),
        ("locon", ["sd15", "sd15_locon"]),
        ("sd2", ["sd2"]),
        ("sdxl", ["sdxl"]),
        ("sdxl_locon", ["sdxl", "sdxl_locon"]),
    ],
)
def test_keys_and_shapes(case: str, families: list[str], world: Path, tmp_path: Path) -> None:
    expected: dict[str, str] = {}
    for name in families:
        for shapes, modules in KEYS[name].items():
            expected |= dict.fromkeys(modules, shapes)
    job = job_of(case if case in CASES else "plain", world, tmp_path)
    if case == "sdxl_locon":
        job = job_of("locon", world, tmp_path)
    family = sdxl_full.full_size() if case.startswith("sdxl") else family_of(v2=case == "sd2")
    tensors = network_of(job, family).state_dict()
    endings = (".lora_down.weight", ".lora_up.weight", ".alpha")
    assert tensors.keys() == {module + ending for module in expected for ending in endings}
    found = {
        module: " ".join("x".join(map(str, tensors[module + ending].shape)) for ending in endings[:2])
        for module in expected
    }
    assert found == expected
    assert {tensors[module + ".alpha"].shape for module in expected} == {torch.Size([])}


@pytest.mark.parametrize("case", RUNS)
def test_batches_steps_and_captions(case: str, world: Path, tmp_path: Path) -> None:
    run, job = RUNS[case], job_of(case, world, tmp_path)
    dataset: Dataset = folder.scan(job)
    facts = run["datasets"][0]
    counts = {f"{width}x{height}": count for (width, height), count in dataset.bucket_counts().items()}
    assert counts == facts["buckets"]
    assert dataset.mean_aspect_error == pytest.approx(facts["mean_aspect_error"], rel=1e-12)
    assert dataset.batches_per_epoch(job.config.train_batch_size) == facts["batches"]
    assert {picture.caption for picture in dataset.pictures} >= set(run["captions"])
    plan = Plan.make(job, dataset)
    assert plan.max_train_steps == CASES[case].steps
    # The recorded batches fit our plan: they hold pictures of one bucket, as often as repeats allow.
    sizes = {
        "/".join(picture.path.parts[-3:]): fit.bucket
        for picture, fit in zip(dataset.pictures, dataset.fits, strict=True)
    }
    for batch in run["pictures"]:
        assert len({sizes[name] for name in batch}) == 1


@pytest.mark.parametrize("case", RUNS)
def test_metadata(case: str, world: Path, flux: Flux, tmp_path: Path) -> None:
    run, job = RUNS[case], job_of(case, world, tmp_path)
    dataset = folder.scan(job)
    plan = Plan.make(job, dataset)
    family: Family = flux if job.family == "flux" else sdxl_full.full_size()
    if job.family == "sd":
        family = family_of(v_parameterization=job.config.v_parameterization)
    metadata = Metadata(
        job,
        dataset,
        plan,
        family,
        network_of(job, family),
        run["metadata"]["ss_optimizer"],
        hash_cache=tmp_path / "hashes.json",
    )
    entries = metadata.at(step=plan.max_train_steps, epoch=plan.epochs)
    # The two hashes of the LoRA itself are added when it is written.
    assert entries.keys() | {"sshs_model_hash", "sshs_legacy_hash"} == run["metadata"].keys()
    expected = {key: value for key, value in run["metadata"].items() if key not in VOLATILE}
    different = {
        key: (entries[key], value) for key, value in expected.items() if not same_value(entries[key], value)
    }
    assert not different
