"""Whole FLUX.1 runs on toy models, and a full-width LoRA in diffusers' pipeline."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests import runs, tiny_flux
from tests.diffusers_reader import loaded_by_diffusers
from trainer import checkpoints
from trainer import config as configuration
from trainer.cli import main
from trainer.draws import Draws
from trainer.events import SampleReady, StepDone, read_journal
from trainer.families.flux import Flux, pack
from trainer.files import REPOSITORY
from trainer.job import Job
from trainer.loop import Outcome
from trainer.lora_file import read_lora, save
from trainer.networks._names import kohya_tensors
from trainer.networks.lora_flux import FluxLoraNetwork

CPU = torch.device("cpu")


def train(folder: Path, **values: Any) -> tuple[Outcome, list[Any]]:
    return runs.train(folder, **tiny_flux.settings(folder, **values))


def weights(outcome: Outcome) -> dict[str, Tensor]:
    assert outcome.path is not None
    tensors: dict[str, Tensor] = load_file(outcome.path)
    return tensors


def test_from_the_shell_to_a_file_and_on_from_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Train, sample and save by command; look at the file; go on from it."""
    config = tmp_path / "config.json"
    values = tiny_flux.settings(
        tmp_path,
        max_train_steps=4,
        text_encoder_lr=1e-3,
        sample_prompts="a cat --w 72 --h 64 --s 2 --d 7 --g 2 --l 2 --n ugly",
        sample_every_n_steps=2,
        additional_parameters="--sample_at_first",
    )
    config.write_text(json.dumps(values), encoding="utf-8")
    assert main(["check", str(config), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["errors"] == []
    assert found["family"] == "flux"
    assert found["network"]["LoRA_type"] == "Flux1"
    assert main([str(config)]) == 0

    journal = next((tmp_path / "out" / "logs").rglob("journal.jsonl"))
    events = list(read_journal(journal))
    assert [event.step for event in events if isinstance(event, StepDone)] == [1, 2, 3, 4]
    samples = [event for event in events if isinstance(event, SampleReady)]
    assert [sample.step for sample in samples] == [0, 2, 4]
    pictures = [Image.open(sample.path) for sample in samples]
    assert {picture.size for picture in pictures} == {(64, 64)}  # a multiple of 16
    assert "Sampler: euler" in pictures[0].info["parameters"]
    drawn = [np.asarray(picture) for picture in pictures]
    assert not np.array_equal(drawn[0], drawn[2])

    path = tmp_path / "out" / "toy.safetensors"
    with safe_open(path, framework="pt") as file:
        metadata, keys = file.metadata(), set(file.keys())
    names = {key.partition(".")[0] for key in keys}
    assert len(names) == 26 + 12
    assert all(name.startswith(("lora_unet_", "lora_te1_text_model_encoder_layers_")) for name in names)
    assert metadata["ss_base_model_version"] == "flux1"
    assert metadata["ss_network_module"] == "networks.lora_flux"
    assert metadata["ss_text_encoder_lr"] == "[0.001, 0.001]"
    assert metadata["modelspec.architecture"] == "flux-1-dev/lora"
    assert "modelspec.prediction_type" not in metadata

    outcome, said = train(
        tmp_path, text_encoder_lr=1e-3, network_weights=str(path), max_train_steps=1, output_name="on"
    )
    assert any(getattr(event, "message", "").startswith(f"network_weights: {len(keys)} of") for event in said)
    before, after = load_file(path), weights(outcome)
    assert before.keys() == after.keys()
    for key, value in before.items():
        assert float((after[key] - value).abs().max()) < 2e-3  # one step of AdamW


def test_it_learns(tmp_path: Path) -> None:
    """One picture over and over: the loss at fixed draws falls."""
    images = tmp_path / "img" / "1_x"
    images.mkdir(parents=True)
    rng = np.random.default_rng(1)
    Image.fromarray(rng.integers(0, 255, (64, 64, 3), dtype=np.uint8)).save(images / "a.png")

    class Fixed(Draws):
        """The same noise and level at every step."""

        def noise(self, draw_ids: Iterable[int], shape: Iterable[int]) -> Tensor:
            return super().noise([0 for _ in draw_ids], tuple(shape))

        def normal(self, purpose: str, draw_ids: Iterable[int], shape: Iterable[int]) -> Tensor:
            return super().normal(purpose, [0 for _ in draw_ids], tuple(shape))

    values = tiny_flux.settings(
        tmp_path, max_train_steps=60, train_batch_size=1, unet_lr=5e-3, lr_scheduler="constant"
    )
    _, events = runs.train(tmp_path, Fixed(1), **values)
    losses = [event.loss for event in events if isinstance(event, StepDone)]
    assert losses[-1] < 0.5 * losses[0]


def test_samples_checkpointing_and_caches_change_no_weight(tmp_path: Path) -> None:
    plain = weights(train(tmp_path, max_train_steps=3)[0])
    for values in (
        {"sample_every_n_steps": 1, "sample_prompts": "a cat --w 64 --h 64 --s 1 --d 1"},
        {"gradient_checkpointing": True},
        {"flux1_cache_text_encoder_outputs": False},
        {"flux1_cache_text_encoder_outputs_to_disk": True},
        {"cache_latents_to_disk": True},
    ):
        other = weights(train(tmp_path, max_train_steps=3, **values)[0])
        for key, value in plain.items():
            torch.testing.assert_close(other[key], value, rtol=1e-5, atol=1e-6, msg=f"{values} {key}")


def test_resumed_run_gives_the_same_weights(tmp_path: Path) -> None:
    values: dict[str, Any] = {"shuffle_caption": True, "caption_dropout_rate": 0.2, "network_dropout": 0.1}
    whole = weights(train(tmp_path, max_train_steps=6, **values)[0])
    train(tmp_path, max_train_steps=6, save_state=True, save_every_n_steps=3, output_name="part", **values)
    state = tmp_path / "out" / "part-step00000003-state"
    assert state.is_dir()
    rest = weights(train(tmp_path, max_train_steps=6, resume=str(state), output_name="rest", **values)[0])
    assert all(torch.equal(rest[key], value) for key, value in whole.items())


@pytest.mark.parametrize(
    "values",
    [
        {"fp8_base": True, "text_encoder_lr": 1e-3, "flux1_cache_text_encoder_outputs": False},
        {"blocks_to_swap": 2, "gradient_checkpointing": True},
        {"split_mode": True},
        {"train_t5xxl": True, "text_encoder_lr": 1e-3, "flux1_cache_text_encoder_outputs": False},
        {"mixed_precision": "bf16", "full_bf16": True, "apply_t5_attn_mask": True, "fp8_base_unet": True},
        {"split_qkv": True, "in_dims": "2,2,2,2,2", "scale_weight_norms": 1.0, "network_dropout": 0.1},
    ],
    ids=lambda values: next(iter(values)),
)
def test_options_train(tmp_path: Path, values: dict[str, Any]) -> None:
    prompt = {"sample_prompts": "a cat --w 64 --h 64 --s 1 --d 1", "sample_every_n_steps": 1}
    outcome, events = train(tmp_path, max_train_steps=2, **prompt, **values)
    assert sum(isinstance(event, SampleReady) for event in events) == 2
    tensors = weights(outcome)
    moved = [key for key, value in tensors.items() if "lora_up" in key and bool(value.any())]
    assert len(moved) == sum("lora_up" in key for key in tensors)


def test_merged_file_equals_attached_network(tmp_path: Path) -> None:
    outcome, _ = train(tmp_path, max_train_steps=3, unet_lr=1e-2, split_qkv=True)
    assert outcome.path is not None
    settings = tiny_flux.settings(tmp_path, split_qkv=True, network_weights=str(outcome.path))
    job = Job.from_config(configuration.loads(settings).config, base=tmp_path)
    noisy = torch.randn(1, 16, 8, 8, generator=torch.Generator().manual_seed(0))

    def predict(family: Flux) -> Tensor:
        with torch.no_grad():
            return family.predict(noisy, torch.tensor([700.0]), family.encode_prompts(["x"]), None)

    def load() -> Flux:
        return Flux.load(job, CPU, torch.float32, lambda _: None)

    merged, attached = load(), load()
    plain = predict(merged)
    FluxLoraNetwork.merge(merged, outcome.path, 1.0, lambda _: None)
    network = FluxLoraNetwork.create(attached, job, Draws(1), lambda _: None)
    network.attach()
    network.train(False)
    assert float((predict(merged) - plain).abs().max()) > 1e-2
    torch.testing.assert_close(predict(merged), predict(attached), rtol=1e-4, atol=1e-5)


# --- diffusers as a judge -------------------------------------------------------------------------


class InMemory(checkpoints.TensorFile):
    """A model file that was never written."""

    def __init__(self, path: Path, tensors: Mapping[str, Tensor]) -> None:
        self.path, self.tensors = path, tensors
        self.shapes = {key: tuple(value.shape) for key, value in tensors.items()}

    def stream(self, keys: Iterable[str]) -> Iterator[tuple[str, Tensor]]:
        for key in keys:
            yield key, self.tensors[key]


def full_width() -> dict[str, Tensor]:
    """FLUX.1's widths, one block of each kind, in bfloat16: cut from one pool of random numbers."""
    pool = torch.randn(1 << 20, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
    found = {}
    sizes: dict[str, Any] = {"width": 3072, "head": 128, "text": 4096, "pooled": 768}
    for place, (name, shape) in enumerate(tiny_flux.shapes(**sizes, doubles=1, singles=1).items()):
        count = int(np.prod(shape))
        shifted = pool.roll(7919 * place)
        value = shifted.repeat(-(-count // len(pool)))[:count].view(shape)
        if name.endswith(".scale"):
            found[name] = torch.ones(shape, dtype=torch.bfloat16)
        else:
            found[name] = value.mul_(shape[1] ** -0.5 if len(shape) > 1 else 0.1)
    return found


@pytest.mark.slow
def test_diffusers_loads_the_file_and_draws_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A LoRA on all 13 kinds of layers at full width: no key is left over, the prediction is ours."""
    from diffusers.models.transformers.transformer_flux import FluxTransformer2DModel
    from diffusers.pipelines.flux.pipeline_flux import FluxPipeline
    from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteScheduler

    tensors = full_width()
    tiny_flux.settings(tmp_path)
    opened = checkpoints.open_tensors
    monkeypatch.setattr(
        checkpoints,
        "open_tensors",
        lambda path: InMemory(path, tensors) if path.stem == "flux1-dev" else opened(path),
    )
    # Without in_dims: diffusers leaves LoRAs of the input layers out, whoever made them.
    settings = tiny_flux.settings(tmp_path, mixed_precision="bf16", network_dim=4, network_alpha=3)
    job = Job.from_config(configuration.loads(settings).config, base=tmp_path)
    family = Flux.load(job, CPU, torch.bfloat16, lambda _: None)
    network = FluxLoraNetwork.create(family, job, Draws(1), lambda _: None)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * parameter.shape[1] ** -0.5)
    path = tmp_path / "lora.safetensors"
    save(path, network.state_dict(), {}, "float")

    noisy = torch.randn(1, 16, 8, 8, generator=generator).to(torch.bfloat16)
    states = torch.randn(1, 12, 4096, generator=generator).to(torch.bfloat16)
    pooled = torch.randn(1, 768, generator=generator).to(torch.bfloat16)
    given = {
        "hidden_states": pack(noisy),
        "encoder_hidden_states": states,
        "pooled_projections": pooled,
        "timestep": torch.tensor([0.5]),
        "guidance": torch.tensor([1.0]),
        "img_ids": torch.stack([torch.tensor([0.0, n // 4, n % 4]) for n in range(16)]),
        "txt_ids": torch.zeros(12, 3),
        "return_dict": False,
    }
    network.to(CPU, torch.bfloat16)
    with torch.no_grad():
        plain = family.unet(**given)[0]
        network.attach()
        ours = family.unet(**given)[0] - plain
        network.detach()

    from tests.families.test_flux import diffusers_tensors

    monkeypatch.setattr(tiny_flux, "WIDTH", 3072)
    with torch.device("meta"):
        transformer: Any = FluxTransformer2DModel(num_layers=1, num_single_layers=1, guidance_embeds=True)
    transformer.load_state_dict(diffusers_tensors(tensors), assign=True)
    pipeline = FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=None,
        text_encoder=None,
        tokenizer=None,
        text_encoder_2=None,
        tokenizer_2=None,
        transformer=transformer,
    )
    # one for each layer of ours, where a fused one is three or four
    assert loaded_by_diffusers(pipeline, path, caplog) == len(network.layers) + 2 * 2 + 3
    transformer.to(torch.bfloat16)
    with torch.no_grad():
        changed = transformer(**given)[0]
        transformer.disable_lora()
        theirs = transformer(**given)[0]
        assert float((theirs - plain).norm() / plain.norm()) < 2e-2
        theirs = changed - theirs
    error = float((ours - theirs).norm() / theirs.norm())
    assert float(theirs.norm()) > 0.1 * float(plain.norm())
    assert error < 0.05, error

    # and what diffusers saves, we read back as the same layers
    peft = {f"transformer.{name}": value for name, value in _peft_tensors(transformer).items()}
    save_file(peft, tmp_path / "peft.safetensors")
    found = kohya_tensors(read_lora(tmp_path / "peft.safetensors"), family)
    for layer in network.layers:
        name = layer.target[0].name
        down, up = (found[f"{name}.lora_{side}.weight"].float() for side in ("down", "up"))
        ours_up, ours_down = layer.lora_up.float(), layer.lora_down.float()
        expected = ours_up @ ours_down[:, :64] * layer.scale
        torch.testing.assert_close(up @ down[:, :64], expected, rtol=0.1, atol=0.02, msg=name)


def _peft_tensors(transformer: Any) -> dict[str, Tensor]:
    """A PEFT adapter's weights by diffusers' names, its scale put into the up weights."""
    found = {}
    for name, layer in transformer.named_modules():
        if hasattr(layer, "lora_A") and len(layer.lora_A):
            (adapter,) = layer.lora_A
            found[f"{name}.lora_A.weight"] = layer.lora_A[adapter].weight.detach().clone()
            up = layer.lora_B[adapter].weight.detach()
            found[f"{name}.lora_B.weight"] = (up * layer.scaling[adapter]).clone()
    return found


PRESETS = sorted((REPOSITORY / "presets").glob("flux_*.json"))


@pytest.mark.parametrize("path", PRESETS, ids=lambda path: path.stem)
def test_presets_train(path: Path, tmp_path: Path) -> None:
    """Every FLUX preset, on toy models: its own settings but sizes, steps and paths."""
    loaded = configuration.load(path)
    assert not loaded.of("unknown", "invalid", "unsupported")
    preset = json.loads(path.read_text(encoding="utf-8"))
    toy = {
        "max_resolution": "64,64",
        "min_bucket_reso": 64,
        "max_train_steps": 2,
        "blocks_to_swap": min(2, preset.get("blocks_to_swap", 0)),
        "t5xxl_max_token_length": 24,
        "sample_prompts": "",
    }
    paths = {key: value for key, value in tiny_flux.settings(tmp_path).items() if key.endswith("_dir")}
    files = {name: str(file) for name, file in tiny_flux.files(tmp_path / "models").items()}
    outcome, _ = runs.train(tmp_path, **{**preset, **toy, **paths, **files, "output_name": "preset"})
    assert outcome.step == 2
