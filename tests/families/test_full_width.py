"""Files of true width and layout, few layers deep: loaded, trained, saved, loaded again; diffusers as a judge."""

from __future__ import annotations

import gc
import json
import math
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

from tests import hollow, runs, tiny_flux
from tests.diffusers_reader import loaded_by_diffusers
from tests.families import sdxl_full
from tests.parity.list_flux_keys import compact
from trainer import config as configuration
from trainer.draws import Draws
from trainer.events import Event, SampleReady, StepDone
from trainer.families.flux import Flux
from trainer.families.sdxl import StableDiffusionXL
from trainer.job import Job
from trainer.lora_file import save
from trainer.networks.lora import LoraNetwork
from trainer.networks.lora_flux import FluxLoraNetwork

pytestmark = pytest.mark.slow

CPU = torch.device("cpu")
GOLDEN = Path(__file__).parents[1] / "parity" / "golden"
"""Names and shapes of sd-scripts' own networks on the full-size models, rank 16 and 8 in convolutions."""
LORA: dict[str, Any] = {"network_dim": 16, "network_alpha": 8, "save_precision": "float"}
SHORT: dict[str, Any] = {"max_train_steps": 2, "cache_latents": True, "skip_verdict": True}


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    """Models of one to two GB, which must not stay where pytest keeps the folders of three runs."""
    models = tmp_path / "models"
    models.mkdir()
    yield tmp_path
    gc.collect()
    shutil.rmtree(models, ignore_errors=True)


def losses(events: list[Event]) -> list[float]:
    return [event.loss for event in events if isinstance(event, StepDone)]


def module(key: str) -> str:
    return key.partition(".")[0]


def test_sdxl(folder: Path) -> None:
    """SDXL's widths with one transformer layer where SDXL has one, two or ten, both text encoders, LoCon."""
    file = hollow.sdxl(folder / "models", depth=(1, 1, 1), text_layers=(2, 2), dtype="BF16")
    model = hollow.fill(file["pretrained_model_name_or_path"])
    values: dict[str, Any] = {
        **SHORT,
        **LORA,
        "pretrained_model_name_or_path": str(model),
        "sdxl": True,
        "LoRA_type": "Kohya LoCon",
        "conv_dim": 8,
        "conv_alpha": 4,
        "mixed_precision": "bf16",
        "train_batch_size": 1,
    }
    outcome, events = runs.train(folder, **values)
    assert outcome.path is not None
    assert len(losses(events)) == 2
    assert all(0 < loss < math.inf for loss in losses(events))

    saved: dict[str, Tensor] = load_file(outcome.path)
    golden = json.loads((GOLDEN / "lora_keys.json").read_text(encoding="utf-8"))
    expected = {
        name: shapes
        for part in ("sdxl", "sdxl_locon")
        for shapes, names in golden[part].items()
        for name in names
        if not re.search(r"transformer_blocks_[1-9]_|encoder_layers_([2-9]|\d\d)_", name)
    }
    found = {}
    for name in {module(key) for key in saved}:
        down, up = (saved[f"{name}.lora_{side}.weight"].shape for side in ("down", "up"))
        found[name] = f"{'x'.join(map(str, down))} {'x'.join(map(str, up))}"
    assert found == expected
    still = {module(key) for key, value in saved.items() if "lora_up" in key and not value.any()}
    # SDXL reads CLIP-L before its last layer.
    assert still == {name for name in expected if name.startswith("lora_te1_text_model_encoder_layers_1_")}

    again = {**values, "network_weights": str(outcome.path)}
    job = Job.from_config(configuration.loads(runs.settings(folder, **again)).config, base=folder)
    family = StableDiffusionXL.load(job, CPU, torch.bfloat16, lambda _: None)
    network = LoraNetwork.create(family, job, Draws(1), lambda _: None)
    loaded = network.state_dict()
    assert loaded.keys() == saved.keys()
    assert all(torch.equal(loaded[key].float(), value) for key, value in saved.items())

    def predict() -> Tensor:
        noisy = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            return family.predict(noisy, torch.tensor([700]), family.encode_prompts(["a cat"]), None).float()

    plain = predict()
    network.attach()
    network.train(False)
    assert float((predict() - plain).norm() / plain.norm()) > 0.01


def test_flux(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    """FLUX.1's widths with a block of each kind; diffusers' pipeline draws our sample from the saved file."""
    files = hollow.flux(folder / "models", doubles=1, singles=1, clip_layers=2, t5_layers=1, dtype="BF16")
    for seed, path in enumerate(files.values()):
        hollow.fill(path, seed)
    values = tiny_flux.settings(
        folder,
        **SHORT,
        **LORA,
        unet_lr=0.02,
        text_encoder_lr=0.02,
        train_batch_size=1,
        sample_prompts="a cat --w 64 --h 64 --s 2 --d 7 --g 2",
        sample_every_n_steps=2,
    )
    outcome, events = runs.train(folder, **values)
    assert outcome.path is not None
    assert len(losses(events)) == 2
    assert all(0 < loss < math.inf for loss in losses(events))
    (sample,) = [event.path for event in events if isinstance(event, SampleReady)]
    with Image.open(sample) as image:
        ours = np.asarray(image).astype(int)

    saved: dict[str, Tensor] = load_file(outcome.path)
    assert all(value.any() for key, value in saved.items() if "lora_up" in key)
    shapes = {}
    for name in dict.fromkeys(module(key) for key in saved):
        down, up = (saved[f"{name}.lora_{side}.weight"].shape for side in ("down", "up"))
        shapes[name] = f"{'x'.join(map(str, down))} {'x'.join(map(str, up))} {saved[f'{name}.alpha']:g}"
    golden = json.loads((GOLDEN / "flux_keys.json").read_text(encoding="utf-8"))
    assert compact(list(shapes.items()))["modules"].keys() == golden["text"]["modules"].keys()

    again = {**values, "network_weights": str(outcome.path)}
    job = Job.from_config(configuration.loads(again).config, base=folder)
    family = Flux.load(job, CPU, torch.float32, lambda _: None)
    network = FluxLoraNetwork.create(family, job, Draws(1), lambda _: None)
    loaded = network.state_dict()
    assert loaded.keys() == saved.keys()
    assert all(torch.equal(loaded[key], value) for key, value in saved.items())
    states = family.encode_prompts(["a cat"]).states_BTD
    ids = family._texts._tokens.captions(["a cat"])[:, 0]
    noise = torch.randn((1, 4 * 4, 64), generator=torch.Generator().manual_seed(7))
    vae = family.vae
    vae.register_to_config(scaling_factor=0.3611, shift_factor=0.1159)
    del family, network
    gc.collect()

    pipeline = flux_pipeline(files, vae)

    def draw() -> Any:
        with torch.no_grad():
            pooled = pipeline.text_encoder(ids).pooler_output
        picture = pipeline(
            prompt_embeds=states,
            pooled_prompt_embeds=pooled,
            latents=noise,
            height=64,
            width=64,
            num_inference_steps=2,
            guidance_scale=2.0,
            output_type="np",
        ).images[0]
        return (picture * 255).round().astype(int)

    without = draw()
    # A fused layer of ours is three or four of diffusers'.
    assert loaded_by_diffusers(pipeline, outcome.path, caplog) == len(shapes) + 2 * 2 + 3
    theirs = draw()
    assert np.abs(ours - theirs).max() <= 2
    assert np.abs(ours - theirs).mean() < 0.2
    assert np.abs(ours - without).mean() > 2


def test_diffusers_reads_every_key_of_sdxl_at_full_size(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The models have no weights here, the LoRA has."""
    from diffusers import EulerDiscreteScheduler, StableDiffusionXLPipeline

    values = runs.settings(
        tmp_path, sdxl=True, LoRA_type="Kohya LoCon", conv_dim=1, conv_alpha=1, network_dim=1
    )
    job = Job.from_config(configuration.loads(values).config, base=tmp_path)
    network = LoraNetwork.create(sdxl_full.full_size(), job, Draws(1), lambda _: None)
    save(tmp_path / "lora.safetensors", network.state_dict(), {}, "float")
    unet, encoders = sdxl_full.models()
    pipeline = StableDiffusionXLPipeline(
        vae=None,
        text_encoder=encoders["te1"],
        text_encoder_2=encoders["te2"],
        tokenizer=None,
        tokenizer_2=None,
        unet=unet,
        scheduler=EulerDiscreteScheduler(),
        add_watermarker=False,
    )
    assert loaded_by_diffusers(pipeline, tmp_path / "lora.safetensors", caplog) == len(network.layers)
    golden = json.loads((GOLDEN / "lora_keys.json").read_text(encoding="utf-8"))
    assert len(network.layers) == sum(
        len(names) for part in ("sdxl", "sdxl_locon") for names in golden[part].values()
    )


def test_diffusers_reads_every_key_of_flux_at_full_size(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    from diffusers.models.transformers.transformer_flux import FluxTransformer2DModel
    from diffusers.pipelines.flux.pipeline_flux import FluxPipeline
    from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteScheduler
    from transformers import CLIPTextConfig, CLIPTextModel

    (tmp_path / "models").mkdir()
    hollow.flux(tmp_path / "models")
    values = tiny_flux.settings(tmp_path, text_encoder_lr=1e-4, network_dim=1, network_alpha=1)
    job = Job.from_config(configuration.loads(values).config, base=tmp_path)
    family = Flux.load(job, torch.device("meta"), torch.float32, lambda _: None)
    network = FluxLoraNetwork.create(family, job, Draws(1), lambda _: None)
    save(tmp_path / "lora.safetensors", network.state_dict(), {}, "float")
    with torch.device("meta"):
        transformer = FluxTransformer2DModel(guidance_embeds=True)
        encoder = CLIPTextModel(
            CLIPTextConfig(
                hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12
            )
        )
    pipeline = FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=None,
        text_encoder=encoder,
        tokenizer=None,
        text_encoder_2=None,
        tokenizer_2=None,
        transformer=transformer,
    )
    # CLIP-L's six of each layer, ten of a double and three of a single block; fused ones come apart.
    assert len(network.layers) == 12 * 6 + 19 * 10 + 38 * 3
    found = loaded_by_diffusers(pipeline, tmp_path / "lora.safetensors", caplog)
    assert found == 12 * 6 + 19 * 14 + 38 * 6


def flux_pipeline(files: dict[str, Path], vae: Any) -> Any:
    """diffusers' pipeline with its own reader of the transformer's file, in float32; texts come from outside."""
    from diffusers.loaders.single_file_utils import convert_flux_transformer_checkpoint_to_diffusers
    from diffusers.models.transformers.transformer_flux import FluxTransformer2DModel
    from diffusers.pipelines.flux.pipeline_flux import FluxPipeline
    from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteScheduler
    from transformers import CLIPTextConfig, CLIPTextModel

    with torch.device("meta"):
        transformer: Any = FluxTransformer2DModel(num_layers=1, num_single_layers=1, guidance_embeds=True)
    weights = convert_flux_transformer_checkpoint_to_diffusers(
        load_file(files["pretrained_model_name_or_path"])
    )
    for key in list(weights):
        weights[key] = weights[key].float()
    transformer.load_state_dict(weights, assign=True)
    encoder: Any = CLIPTextModel(
        CLIPTextConfig(
            hidden_size=768,
            intermediate_size=3072,
            num_hidden_layers=2,
            num_attention_heads=12,
            hidden_act="quick_gelu",
        )
    )
    texts = {
        key.removeprefix("text_model."): value.float() for key, value in load_file(files["clip_l"]).items()
    }
    encoder.load_state_dict(texts)
    pipeline: Any = FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
        vae=vae,
        text_encoder=encoder.eval(),
        tokenizer=None,
        text_encoder_2=None,
        tokenizer_2=None,
        transformer=transformer.eval(),
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline
