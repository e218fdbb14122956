"""FLUX.1: files in every layout, forward passes against sd-scripts' own models, cached texts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from tests import tiny_flux
from tests.families.make_flux_golden import COLUMNS, PROMPTS, ROWS, TOKENS, inputs
from trainer import config as configuration
from trainer import devices, sampling
from trainer.data import folder as folders
from trainer.data.cache import KEY
from trainer.draws import Draws
from trainer.errors import ConfigError, ModelFileError, StopTraining
from trainer.events import Event, LogLine
from trainer.families import _flux_texts as texts
from trainer.families import flux as module
from trainer.families._base import Text
from trainer.families._flux_model import as_bfl, bfl_names, target_names
from trainer.families.flux import Flux, pack, placed, unpack
from trainer.job import Job
from trainer.memory.quantise import dense
from trainer.prompts import SamplePrompt

CPU = torch.device("cpu")
GOLDEN = load_file(Path(__file__).parent / "golden" / "flux.safetensors")


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with toy models and pictures."""
    world = tmp_path_factory.mktemp("flux")
    tiny_flux.settings(world)
    return world


def job(world: Path, **values: Any) -> Job:
    return Job.from_config(configuration.loads(tiny_flux.settings(world, **values)).config, base=world)


def load(world: Path, **values: Any) -> Flux:
    made = job(world, **values)
    return Flux.load(made, CPU, devices.weight_dtype(made.config.mixed_precision), lambda _: None)


# --- forward passes -------------------------------------------------------------------------------


@pytest.mark.parametrize("masked", [False, True])
def test_transformer_gives_what_sd_scripts_gives(world: Path, masked: bool) -> None:
    family = load(world, apply_t5_attn_mask=masked)
    given = inputs()
    extra = {"mask_BT": given["mask"], "guidance_B": given["guidance"]}
    with torch.no_grad():
        ours = family.predict(
            unpack(given["tokens"], 2 * ROWS, 2 * COLUMNS),
            given["times"] * 1000,
            Text(given["states"], given["pooled"], extra),
            None,
        )
    theirs = GOLDEN["masked_prediction" if masked else "prediction"]
    torch.testing.assert_close(pack(ours), theirs, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("masked", [False, True])
def test_texts_are_encoded_as_in_sd_scripts(world: Path, masked: bool) -> None:
    family = load(world, apply_t5_attn_mask=masked, t5xxl_max_token_length=TOKENS)
    ids, mask = family._texts.t5_ids(PROMPTS)
    assert torch.equal(ids, GOLDEN["t5_ids"])
    assert torch.equal(mask, GOLDEN["t5_mask"])
    text = family.encode_prompts(PROMPTS)
    states = GOLDEN["masked_states" if masked else "states"]
    torch.testing.assert_close(text.states_BTD, states, rtol=1e-4, atol=1e-5)
    assert text.pooled_BD is not None
    torch.testing.assert_close(text.pooled_BD, GOLDEN["pooled"], rtol=1e-4, atol=1e-5)
    assert ("mask_BT" in text.extra) == masked


def test_autoencoder_is_that_of_sd_scripts(world: Path) -> None:
    family = load(world)
    latents = torch.randn(1, 16, 8, 12, generator=torch.Generator().manual_seed(5))
    torch.testing.assert_close(family.decode_latents(latents), GOLDEN["decoded"], rtol=1e-4, atol=1e-4)
    pixels = torch.randn(1, 3, 64, 48, generator=torch.Generator().manual_seed(6)).clamp(-1, 1)

    samples = torch.cat([family.encode_images(pixels, [torch.Generator().manual_seed(n)]) for n in range(64)])
    error = samples.mean(0, keepdim=True) - GOLDEN["latent_mean"]
    assert float((error / samples.std(0)).abs().max()) < 5 / 8  # five standard errors
    assert torch.equal(family.to_model_latents(samples), samples)


def test_tokens_are_packed_as_in_flux() -> None:
    latents = torch.arange(2 * 3 * 4 * 6).view(2, 3, 4, 6)
    tokens = pack(latents)
    assert tokens.shape == (2, 2 * 3, 3 * 4)
    # token of row 1, column 2: channels first, then the square's rows and columns
    square = latents[1, :, 2:4, 4:6]
    assert torch.equal(tokens[1, 1 * 3 + 2], square.reshape(-1))
    assert torch.equal(unpack(tokens, 4, 6), latents)


def test_guidance_is_the_configurations_in_training_and_the_prompts_in_samples(world: Path) -> None:
    family = load(world, guidance_scale=1.0)
    text = family.encode_prompts(["x"])
    noisy, times = torch.randn(1, 16, 8, 8), torch.tensor([500.0])
    with torch.no_grad():
        trained = family.predict(noisy, times, text, None)
        one = family.predict(noisy, times, family.for_sample(text, SamplePrompt(guidance=1.0)), None)
        usual = family.predict(noisy, times, family.for_sample(text, SamplePrompt()), None)
        stronger = family.predict(noisy, times, family.for_sample(text, SamplePrompt(guidance=3.5)), None)
    assert torch.equal(trained, one)
    assert torch.equal(usual, stronger)
    assert not torch.allclose(one, usual)


@pytest.mark.parametrize("masked", [False, True])
def test_pictures_drawn_together_are_those_drawn_alone(world: Path, masked: bool) -> None:
    made = job(world, apply_t5_attn_mask=masked)
    family = Flux.load(made, CPU, torch.float32, lambda _: None)
    prompts = [
        SamplePrompt(
            prompt=words,
            negative="ugly",
            width=64,
            height=48,
            seed=seed,
            steps=2,
            cfg_scale=3,
            guidance=guidance,
        )
        for words, seed, guidance in [("a cat", 1, 1.0), ("a dog on a wall", 2, 3.5), ("a cow", 3, 7.0)]
    ]
    alone, together = (
        torch.cat([drawn.pixels_1CHW for drawn in sampling.draw(family, made, prompts, together=count)])
        for count in (1, 3)
    )
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-4)
    assert float((alone[0] - alone[1]).abs().max()) > 0.1


# --- files ----------------------------------------------------------------------------------------


def diffusers_tensors(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """BFL tensors under diffusers' names, written from the table of engine facts 4.4."""
    width = tiny_flux.WIDTH
    found: dict[str, Tensor] = {}
    ends = {
        "img_in": "x_embedder",
        "txt_in": "context_embedder",
        "final_layer.linear": "proj_out",
        "final_layer.adaLN_modulation.1": "norm_out.linear",
    }
    for old, new in (("time", "timestep"), ("vector", "text"), ("guidance", "guidance")):
        for a, b in (("in_layer", "linear_1"), ("out_layer", "linear_2")):
            ends[f"{old}_in.{a}"] = f"time_text_embed.{new}_embedder.{b}"
    for key, value in tensors.items():
        stem, end = key.rpartition(".")[::2]
        if stem in ends:
            if "adaLN" in stem:
                value = torch.cat([value[width:], value[:width]])
            found[f"{ends[stem]}.{end}"] = value
            continue
        kind, index, inner = stem.split(".", 2)
        start = f"{'single_' if kind == 'single_blocks' else ''}transformer_blocks.{index}"
        if inner.endswith("qkv") or inner == "linear1":
            names = {"img_attn.qkv": "to_{}", "txt_attn.qkv": "add_{}_proj", "linear1": "to_{}"}
            for place, part in enumerate("qkv"):
                rows = value[place * width : (place + 1) * width]
                found[f"{start}.attn.{names[inner].format(part)}.{end}"] = rows
            if inner == "linear1":
                found[f"{start}.proj_mlp.{end}"] = value[3 * width :]
            continue
        renamed = {
            "img_mod.lin": "norm1.linear",
            "txt_mod.lin": "norm1_context.linear",
            "img_attn.proj": "attn.to_out.0",
            "txt_attn.proj": "attn.to_add_out",
            "img_mlp.0": "ff.net.0.proj",
            "img_mlp.2": "ff.net.2",
            "txt_mlp.0": "ff_context.net.0.proj",
            "txt_mlp.2": "ff_context.net.2",
            "img_attn.norm.query_norm": "attn.norm_q",
            "img_attn.norm.key_norm": "attn.norm_k",
            "txt_attn.norm.query_norm": "attn.norm_added_q",
            "txt_attn.norm.key_norm": "attn.norm_added_k",
            "norm.query_norm": "attn.norm_q",
            "norm.key_norm": "attn.norm_k",
            "linear2": "proj_out",
            "modulation.lin": "norm.linear",
        }[inner]
        found[f"{start}.{renamed}.{'weight' if end == 'scale' else end}"] = value
    return found


def diffusers_folder(path: Path) -> Path:
    """The toy model as diffusers saves it, the transformer in two shards."""
    from diffusers.models.transformers.transformer_flux import FluxTransformer2DModel

    model = FluxTransformer2DModel(
        num_layers=2,
        num_single_layers=2,
        attention_head_dim=tiny_flux.HEAD,
        num_attention_heads=tiny_flux.HEADS,
        joint_attention_dim=tiny_flux.TEXT,
        pooled_projection_dim=tiny_flux.POOLED,
        guidance_embeds=True,
        axes_dims_rope=(4, 14, 14),
    )
    model.load_state_dict(diffusers_tensors(tiny_flux.bfl()))
    model.save_pretrained(path / "transformer", max_shard_size="1MB")
    for name, tensors in (("text_encoder", tiny_flux.clip_l()), ("text_encoder_2", tiny_flux.t5xxl())):
        (path / name).mkdir()
        save_file({k: v.clone() for k, v in tensors.items()}, path / name / "model.safetensors")
    (path / "vae").mkdir()
    tensors = {key: value.contiguous() for key, value in tiny_flux.ae().items()}
    save_file(tensors, path / "vae" / "diffusion_pytorch_model.safetensors")
    return path


def same(one: nn.Module, other: nn.Module) -> bool:
    first, second = one.state_dict(), other.state_dict()
    return first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)


def test_diffusers_folder_is_the_same_model(world: Path, tmp_path: Path) -> None:
    folder = diffusers_folder(tmp_path / "diffusers")
    assert len(list((folder / "transformer").glob("*.safetensors"))) > 1
    whole, parts = (
        load(world),
        load(world, pretrained_model_name_or_path=str(folder), ae="", clip_l="", t5xxl=""),
    )
    assert same(whole.unet, parts.unet)
    assert same(whole.vae, parts.vae)
    shard = sorted((folder / "transformer").glob("*-00001-of-*"))[0]
    assert same(whole.unet, load(world, pretrained_model_name_or_path=str(shard)).unet)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float8_e4m3fn])
def test_files_of_other_precision(world: Path, tmp_path: Path, dtype: torch.dtype) -> None:
    tensors = {f"model.diffusion_model.{key}": value.to(dtype) for key, value in tiny_flux.bfl().items()}
    save_file(tensors, tmp_path / "flux.safetensors")
    save_file({k: v.to(dtype) for k, v in tiny_flux.t5xxl().items()}, tmp_path / "t5xxl_fp8.safetensors")
    family = load(
        world,
        mixed_precision="bf16",
        pretrained_model_name_or_path=str(tmp_path / "flux.safetensors"),
        t5xxl=str(tmp_path / "t5xxl_fp8.safetensors"),
    )
    assert {value.dtype for value in family.unet.state_dict().values()} == {torch.bfloat16}
    layer = family.unet.single_transformer_blocks[1].linear1
    expected = tiny_flux.bfl()["single_blocks.1.linear1.weight"].to(dtype).to(torch.bfloat16)
    assert torch.equal(layer.weight, expected)
    # T5 waits as it is in the file, and works in the run's precision.
    waiting: Any = family.text_encoders["te3"]
    assert waiting.shared.weight.dtype == dtype
    text = family.encode_prompts(["a cat"])
    assert text.states_BTD.dtype == torch.bfloat16
    assert waiting.shared.weight.dtype == dtype
    close = load(world).encode_prompts(["a cat"]).states_BTD
    error = (text.states_BTD.float() - close).norm() / close.norm()
    assert float(error) < (0.1 if dtype == torch.float8_e4m3fn else 0.02)


def test_schnell_has_no_guidance_and_fewer_tokens(world: Path, tmp_path: Path) -> None:
    save_file(tiny_flux.bfl(guided=False), tmp_path / "schnell.safetensors")
    family = load(
        world,
        pretrained_model_name_or_path=str(tmp_path / "schnell.safetensors"),
        t5xxl_max_token_length=0,
    )
    assert family.architecture == "flux-1-schnell/lora"
    assert load(world).architecture == "flux-1-dev/lora"
    assert family._texts.t5_tokens == 256
    assert not any("guidance" in target.name for target in family.targets())
    with torch.no_grad():
        text = family.for_sample(family.encode_prompts(["x"]), SamplePrompt(guidance=2))
        family.predict(torch.randn(1, 16, 4, 4), torch.tensor([500.0]), text, None)


def test_a_model_is_never_in_memory_twice(world: Path) -> None:
    """In the file's own precision on a CPU, weights stay mapped; the transformer comes when it is needed."""
    family = load(world)
    assert "unet" not in vars(family)
    family.targets()
    assert "unet" in vars(family)
    stack: Any = family.text_encoders["te3"]
    before = [value.data_ptr() for value in stack.encoder.state_dict().values()]
    family.encode_prompts(["x"])
    assert [value.data_ptr() for value in stack.encoder.state_dict().values()] == before


def test_placed_pieces_work_elsewhere_and_come_back() -> None:
    layers = [nn.Linear(4, 4).requires_grad_(False).to(torch.bfloat16) for _ in range(2)]
    kept = [layer.weight.data_ptr() for layer in layers]
    seen: list[list[torch.dtype]] = []
    layers[1].register_forward_hook(lambda *_: seen.append([layer.weight.dtype for layer in layers]))
    for whole in (False, True):
        with placed(layers, CPU, torch.float32, whole=whole):
            out = layers[1](layers[0](torch.ones(1, 4)))
        assert out.dtype == torch.float32
        assert [layer.weight.data_ptr() for layer in layers] == kept
    # one by one, the first has left when the second works
    assert seen == [[torch.bfloat16, torch.float32], [torch.float32, torch.float32]]


def test_clip_l_runs_with_its_own_activation(world: Path) -> None:
    """quick_gelu (Radford et al. 2021, their code); sd-scripts runs FLUX's CLIP-L with gelu, which we list."""
    encoder: Any = load(world).text_encoders["te1"]
    mlp = encoder.encoder.layers[0].mlp
    x = torch.randn(3, tiny_flux.POOLED, generator=torch.Generator().manual_seed(0))
    inner = (x @ mlp.fc1.weight.T + mlp.fc1.bias).double()
    inner = inner / (1 + torch.exp(-1.702 * inner))
    expected = inner @ mlp.fc2.weight.double().T + mlp.fc2.bias
    torch.testing.assert_close(mlp(x).double(), expected, rtol=1e-5, atol=1e-6)
    assert configuration.ui_of("clip_l").effect == "adapted"
    assert "quick_gelu" in configuration.ui_of("clip_l").reason


def _text(text: str) -> Tensor:
    return torch.tensor(list(text.encode()), dtype=torch.uint8)


def scaled_file(path: Path, tensors: dict[str, Tensor], end: str) -> tuple[Path, dict[str, Tensor]]:
    """ComfyUI's scaled fp8 file of ``tensors`` (names of today or of before), and what it stands for."""
    file: dict[str, Tensor] = {}
    whole: dict[str, Tensor] = {}
    place = 0
    for key, value in tensors.items():
        whole[key] = file[key] = value.contiguous().clone()
        if value.ndim < 2 or "embed" in key or "relative" in key or key == "shared.weight":
            continue
        # Not every program takes the largest number of fp8 for the largest weight.
        place += 1
        scale = value.abs().amax() / (448 if place % 2 else 320)
        file[key] = (value / scale).to(torch.float8_e4m3fn)
        whole[key] = file[key].float() * scale
        stem = key.removesuffix(".weight")
        file[f"{stem}.{end}"] = scale.reshape(()) if place % 3 else scale.reshape(1)
        if end == "weight_scale":
            file[f"{stem}.comfy_quant"] = _text('{"format": "float8_e4m3fn"}')
            file[f"{stem}.input_scale"] = torch.ones(())
    if end == "scale_weight":
        file["scaled_fp8"] = torch.zeros(2, dtype=torch.float8_e4m3fn)
    save_file(file, path)
    return path, whole


@pytest.mark.parametrize("end", ["scale_weight", "weight_scale"])
def test_scaled_fp8_files_are_read(world: Path, tmp_path: Path, end: str) -> None:
    flux, whole = scaled_file(tmp_path / "flux.safetensors", tiny_flux.bfl(), end)
    t5, texts_whole = scaled_file(tmp_path / "t5.safetensors", tiny_flux.t5xxl(), end)
    paths = {"pretrained_model_name_or_path": str(flux), "t5xxl": str(t5)}
    key = "single_blocks.1.linear1.weight"
    family = load(world, **paths)
    assert torch.equal(family.unet.single_transformer_blocks[1].linear1.weight, whole[key])
    save_file(
        {name: value.contiguous() for name, value in texts_whole.items()}, tmp_path / "plain.safetensors"
    )
    plain = load(world, t5xxl=str(tmp_path / "plain.safetensors"))
    torch.testing.assert_close(
        family.encode_prompts(["a cat"]).states_BTD, plain.encode_prompts(["a cat"]).states_BTD
    )
    # As fp8 base, the weights keep a scale: no more is lost than the file lost already.
    family = load(
        world, fp8_base=True, mixed_precision="bf16", flux1_cache_text_encoder_outputs=False, **paths
    )
    for place, block in enumerate(family.unet.single_transformer_blocks):
        assert block.linear1.weight.dtype == torch.float8_e4m3fn
        expected = whole[f"single_blocks.{place}.linear1.weight"]
        error = (dense(block.linear1) - expected).norm() / expected.norm()
        assert float(error) < 0.03
    exact = 0
    for old, new in target_names(2, 2):
        expected = whole[f"{old}.weight"]
        if "_blocks." in old and abs(expected.abs().amax() / 448 / _scale(flux, f"{old}.{end}") - 1) < 1e-5:
            exact += 1
            torch.testing.assert_close(
                dense(family.unet.get_submodule(new)), expected, rtol=1e-6, atol=0, msg=old
            )
    assert exact > 5
    stack: Any = family.text_encoders["te3"]
    layer = stack.encoder.block[0].layer[0].SelfAttention.q
    expected = texts_whole["encoder.block.0.layer.0.SelfAttention.q.weight"]
    assert float((dense(layer) - expected).norm() / expected.norm()) < 0.03


def _scale(path: Path, key: str) -> float:
    with safe_open(path, framework="pt") as file:
        return float(file.get_tensor(key))


def _without(tensors: dict[str, Tensor], *ends: str) -> dict[str, Tensor]:
    return {key: value for key, value in tensors.items() if not key.endswith(ends)}


BROKEN: dict[str, tuple[str, Callable[[], dict[str, Tensor]], str]] = {
    "transformer incomplete": (
        "pretrained_model_name_or_path",
        lambda: _without(tiny_flux.bfl(), "1.linear2.bias"),
        "lacks 1 tensors of the FLUX.1 transformer",
    ),
    "not a transformer": ("pretrained_model_name_or_path", tiny_flux.ae, "autoencoder only"),
    "SD": (
        "pretrained_model_name_or_path",
        lambda: {"cond_stage_model.transformer.x": torch.zeros(1)},
        "untick Flux.1",
    ),
    "no T5": ("t5xxl", tiny_flux.clip_l, "no T5 v1.1 encoder"),
    "T5 in another scaled format": (
        "t5xxl",
        lambda: (
            tiny_flux.t5xxl()
            | {
                "encoder.block.0.layer.0.SelfAttention.q.weight_scale": torch.ones(()),
                "encoder.block.0.layer.0.SelfAttention.q.comfy_quant": _text('{"format": "nvfp4"}'),
            }
        ),
        "stored as nvfp4",
    ),
    "no CLIP": ("clip_l", tiny_flux.t5xxl, "no CLIP-L"),
    "no autoencoder": ("ae", tiny_flux.t5xxl, "no autoencoder"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_wrong_files_are_named(world: Path, tmp_path: Path, case: str) -> None:
    field, make, words = BROKEN[case]
    path = tmp_path / "wrong.safetensors"
    save_file({key: value.contiguous().clone() for key, value in make().items()}, path)
    with pytest.raises(ModelFileError, match=words):
        load(world, **{field: str(path)})


def test_missing_files_are_named(world: Path, tmp_path: Path) -> None:
    for field, words in (
        ("ae", "VAE Path"),
        ("clip_l", "CLIP-L Path"),
        ("t5xxl", "T5-XXL Path"),
    ):
        with pytest.raises(ModelFileError, match=words):
            load(world, **{field: ""})
        with pytest.raises(ModelFileError, match="does not exist"):
            load(world, **{field: str(tmp_path / "none.safetensors")})
    with pytest.raises(ModelFileError, match="does not exist"):
        load(world, pretrained_model_name_or_path=str(tmp_path / "none.safetensors"))


def test_parts_of_a_diffusers_layer_may_not_be_missing(tmp_path: Path) -> None:
    from trainer.checkpoints import open_tensors

    tensors = diffusers_tensors(tiny_flux.bfl())
    del tensors["single_transformer_blocks.0.proj_mlp.weight"]
    save_file({key: value.contiguous() for key, value in tensors.items()}, tmp_path / "parts.safetensors")
    with pytest.raises(ModelFileError, match="lacks a part"):
        as_bfl(open_tensors(tmp_path / "parts.safetensors"))


def test_every_tensor_of_a_file_is_used() -> None:
    shapes = {key: tuple(value.shape) for key, value in tiny_flux.bfl().items()}
    assert bfl_names(shapes, "").keys() == shapes.keys()


# --- cached texts ---------------------------------------------------------------------------------


def cached(world: Path, **values: Any) -> tuple[Flux, Job, list[Event]]:
    """A family that has cached the texts of its job, with T5 forbidden from then on."""
    events: list[Event] = []
    made = job(world, **values)
    family = Flux.load(made, CPU, torch.float32, lambda _: None)
    dataset = folders.scan(made)
    family.prepare_text(made, dataset, emit=events.append, stop=lambda: False)
    return family, made, events


def run_texts(made: Job) -> list[str]:
    return texts.texts_of_run(made, folders.scan(made), Draws(made.seed))


def test_encoders_are_gone_and_texts_are_there(world: Path) -> None:
    family, made, _ = cached(world, sample_prompts="a horse --n ugly --l 3")
    assert family.text_encoders == {}
    wanted = [*run_texts(made), "a horse", "ugly"]
    assert len(wanted) == 6
    plain = load(world, flux1_cache_text_encoder_outputs=False)
    assert plain.text_encoders.keys() == {"te1", "te3"}
    ours, theirs = family.encode_prompts(wanted), plain.encode_prompts(wanted)
    assert family.text_encoders == {}
    assert torch.equal(ours.states_BTD, theirs.states_BTD)
    assert ours.pooled_BD is not None
    assert theirs.pooled_BD is not None
    assert torch.equal(ours.pooled_BD, theirs.pooled_BD)
    # one that nobody foresaw brings them back for a moment
    late, now = family.encode_prompts(["never seen"]), plain.encode_prompts(["never seen"])
    assert torch.equal(late.states_BTD, now.states_BTD)
    assert family.text_encoders == {}


def test_clip_stays_where_it_trains(world: Path) -> None:
    family, made, _ = cached(world, text_encoder_lr=1e-4)
    assert family.text_encoders.keys() == {"te1"}
    assert {target.part for target in family.targets()} == {"te1", "unet"}
    first = run_texts(made)[:1]
    before = family.encode_prompts(first)
    with torch.no_grad():
        family.text_encoders["te1"].get_submodule("final_layer_norm").weight.mul_(2)  # type: ignore[operator]
    after = family.encode_prompts(first)
    assert torch.equal(before.states_BTD, after.states_BTD)
    assert before.pooled_BD is not None
    assert after.pooled_BD is not None
    assert not torch.equal(before.pooled_BD, after.pooled_BD)


def test_captions_that_vary_are_all_foreseen(world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    values: dict[str, Any] = {"shuffle_caption": True, "caption_dropout_rate": 0.3, "max_train_steps": 11}
    family, made, _ = cached(world, **values)
    foreseen = run_texts(made)
    assert "" in foreseen
    assert len(foreseen) > 8
    from trainer.data.loader import Loader
    from trainer.plan import Plan

    dataset = folders.scan(made)
    plan = Plan.make(made, dataset)
    loader = Loader(made, dataset, None, Draws(made.seed), plan)
    steps = 0
    drawn: dict[str, None] = {}
    for epoch in range(plan.epochs):
        for batch in loader.epoch(epoch):
            if steps < plan.max_train_steps:
                drawn |= dict.fromkeys(batch.captions)
            steps += 1
    assert list(drawn) == foreseen
    monkeypatch.setattr(module._TextEncoders, "at_work", None)  # nothing may be encoded any more
    family.encode_prompts(foreseen)


def files_of(world: Path) -> list[Path]:
    return sorted((world / "img").rglob("*_flux_te.npz"))


def test_files_are_sd_scripts_and_only_what_changed_is_made_anew(tmp_path: Path) -> None:
    values = {"flux1_cache_text_encoder_outputs_to_disk": True}
    family, _, _ = cached(tmp_path, **values)
    files = files_of(tmp_path)
    assert [path.name for path in files] == [f"{n}_flux_te.npz" for n in range(4)]
    with np.load(files[0]) as arrays:
        names = {"l_pooled", "t5_out", "txt_ids", "t5_attn_mask", "apply_t5_attn_mask", KEY}
        assert set(arrays.files) == names
        assert arrays["t5_out"].shape == (24, tiny_flux.TEXT)
        assert arrays["l_pooled"].shape == (tiny_flux.POOLED,)
        assert arrays["txt_ids"].shape == (24, 3)
        assert arrays["t5_attn_mask"].tolist() == GOLDEN["t5_mask"][0].tolist()
        assert not arrays["apply_t5_attn_mask"]
        text = family.encode_prompts(["tok cat, number 0, red, blue"])
        assert np.array_equal(arrays["t5_out"], text.states_BTD[0].numpy())
    stamps = [path.stat().st_mtime_ns for path in files]

    def made_anew(**changed: Any) -> list[int]:
        cached(tmp_path, **values, **changed)
        now = [path.stat().st_mtime_ns for path in files_of(tmp_path)]
        found = [n for n, (one, other) in enumerate(zip(stamps, now, strict=True)) if one != other]
        stamps[:] = now
        return found

    assert made_anew() == []
    (tmp_path / "img" / "2_tok cat" / "2.txt").write_text("something else", encoding="utf-8")
    assert made_anew() == [2]
    files[1].write_bytes(b"broken")
    assert made_anew() == [1]
    assert made_anew(apply_t5_attn_mask=True) == [0, 1, 2, 3]
    assert made_anew(apply_t5_attn_mask=True, t5xxl_max_token_length=16) == [0, 1, 2, 3]
    other = tmp_path / "other.safetensors"
    save_file({key: value.contiguous() for key, value in tiny_flux.t5xxl(seed=9).items()}, other)
    assert made_anew(t5xxl=str(other)) == [0, 1, 2, 3]
    assert made_anew(t5xxl=str(other), shuffle_caption=True) == []
    # a file of sd-scripts has no key: it is trusted only where files are not checked
    with np.load(files[0]) as arrays:
        plain = {name: arrays[name] for name in arrays.files if name != KEY}
    np.savez(files[0], **plain)
    stamps[0] = files[0].stat().st_mtime_ns
    assert made_anew(t5xxl=str(other), skip_cache_check=True) == []
    assert made_anew(t5xxl=str(other)) == [0]


def test_texts_that_do_not_fit_into_memory_wait_on_disk(tmp_path: Path) -> None:
    encoded = texts.Encoded(torch.ones(4), torch.ones(3, 5), torch.ones(3, dtype=torch.int64))
    store = texts.TextStore(encoded.size_bytes(), tmp_path / "out")
    store.put("a", encoded)
    store.put("b", replace(encoded, pooled_D=torch.zeros(4)))
    assert store.on_disk() == 1
    assert len(store) == 2
    assert "b" in store
    assert torch.equal(store.get("b").pooled_D, torch.zeros(4))
    scratch = next((tmp_path / "out").iterdir())
    assert scratch.is_dir()
    del store
    assert not scratch.exists()


def test_stop_while_texts_are_encoded(world: Path) -> None:
    made = job(world)
    family = Flux.load(made, CPU, torch.float32, lambda _: None)
    with pytest.raises(StopTraining):
        family.prepare_text(made, folders.scan(made), emit=lambda _: None, stop=lambda: True)


def test_what_is_said_about_the_cache(world: Path) -> None:
    _, _, events = cached(world)
    said = [event.message for event in events if isinstance(event, LogLine)]
    assert said == ["4 texts encoded; T5-XXL and CLIP-L freed"]


# --- jobs -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"LoRA_type": "Standard"}, "choose Flux1"),
        ({"flux1_checkbox": False}, "tick Flux.1"),
        ({"model_type": "chroma"}, "not Chroma"),
        ({"train_t5xxl": True, "text_encoder_lr": 1e-4}, "switch one of the two off"),
        ({"weighted_captions": True}, "reads no emphasis"),
        ({"t5xxl_lr": 1e-4}, "text_encoder_lr above 0"),
    ],
)
def test_what_flux_cannot_train_is_said_first(world: Path, values: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        job(world, **values)


def test_effective_values(world: Path) -> None:
    made = job(world, guidance_scale=0, discrete_flow_shift=0, timestep_sampling="flux_shift ")
    config = made.config
    assert (config.guidance_scale, config.discrete_flow_shift) == (3.5, 3.0)
    assert config.timestep_sampling == "flux_shift"
    # fields of Kohya's SD3 tab do not reach a FLUX run, additional parameters do
    assert job(world, weighting_scheme="mode").config.weighting_scheme == "uniform"
    extra = "--weighting_scheme mode --mode_scale 0.5 --sigmoid_scale 2 --cache_text_encoder_outputs"
    made = job(world, additional_parameters=extra, flux1_cache_text_encoder_outputs=False)
    assert (made.config.weighting_scheme, made.config.mode_scale) == ("mode", 0.5)
    assert made.engine.sigmoid_scale == 2
    assert made.config.flux1_cache_text_encoder_outputs
    assert job(world, train_blocks="double").network_args["train_blocks"] == "double"
    assert job(world, split_mode=True).network_args["train_blocks"] == "single"
    notes = [str(note) for note in job(world, model_prediction_type="sigma_scaled").notes]
    assert any(note.startswith("model_prediction_type") for note in notes)
