"""SDXL: loading, text, micro-conditioning, names, cached text outputs, whole runs, diffusers as judge."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from tests import hollow, tiny
from tests.diffusers_reader import loaded_by_diffusers
from tests.families.sdxl_full import models
from tests.runs import SIZES, settings, train, write_config
from trainer import checkpoints
from trainer import config as configuration
from trainer.cli import main
from trainer.data.types import Batch, Dataset, Fit, Picture, Subset
from trainer.draws import Draws
from trainer.errors import ConfigError, DivergedError, ModelFileError
from trainer.events import LogLine, SampleReady, StepDone
from trainer.families.sd import StableDiffusion
from trainer.families.sdxl import NAMES, StableDiffusionXL, kohya_name, texts_wait, time_ids
from trainer.files import REPOSITORY
from trainer.job import Job
from trainer.networks.lora import LoraNetwork
from trainer.prompts import SamplePrompt
from trainer.sampling import draw, sample

CAPTIONS = ["a photo of sks dog", "", "1girl, " * 60]
PARTS = ("unet", "vae", "text_encoder", "text_encoder_2")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.sdxl_folder(tmp_path_factory.mktemp("models") / "sdxl")


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.sdxl_file(tmp_path_factory.mktemp("models") / "sdxl.safetensors")


@pytest.fixture(scope="module")
def pipeline(folder: Path) -> Any:
    from diffusers import StableDiffusionXLPipeline

    pipe = StableDiffusionXLPipeline.from_pretrained(folder, local_files_only=True, add_watermarker=False)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def job(model: Path, folder: Path, **values: Any) -> Job:
    return tiny.job(model, folder, sdxl=True, **values)


def load(job: Job, dtype: torch.dtype = torch.float32) -> StableDiffusionXL:
    return StableDiffusionXL.load(job, torch.device("cpu"), dtype, lambda _: None)


def parts(family: StableDiffusionXL) -> dict[str, nn.Module]:
    encoders = family.text_encoders
    return dict(zip(PARTS, (family.unet, family.vae, encoders["te1"], encoders["te2"]), strict=True))


def batch(sizes: Sequence[tuple[int, int]], bucket: tuple[int, int], flipped: Sequence[bool]) -> Batch:
    return Batch(
        pictures=tuple(range(len(sizes))),
        draw_ids=tuple(range(len(sizes))),
        latents_BCHW=None,
        pixels_BCHW=None,
        captions=("a",) * len(sizes),
        loss_weights_B=torch.ones(len(sizes)),
        masks_B1HW=None,
        flipped=tuple(flipped),
        sizes=tuple(sizes),
        bucket=bucket,
    )


# --- loading ------------------------------------------------------------------------------------


def test_every_layout_gives_the_same_models(file: Path, folder: Path, pipeline: Any, tmp_path: Path) -> None:
    """File, pickle and folder, against what diffusers loads from the folder and from the file."""
    from diffusers import StableDiffusionXLPipeline

    single = StableDiffusionXLPipeline.from_single_file(
        file, config=str(folder), local_files_only=True, add_watermarker=False
    )
    for path in (file, tiny.sdxl_ckpt(tmp_path / "sdxl.ckpt"), folder):
        ours = parts(load(job(path, tmp_path)))
        for theirs in (pipeline, single):
            for name, model in ours.items():
                a, b = model.state_dict(), getattr(theirs, name).state_dict()
                assert a.keys() == b.keys()
                assert [key for key in a if not torch.equal(a[key], b[key])] == []
                assert not any(value.is_meta for value in [*model.parameters(), *model.buffers()])
                assert not any(value.requires_grad for value in model.parameters())


def test_configuration_of_full_size_comes_out_of_the_shapes() -> None:
    unet, _ = models()
    shapes = {
        f"x.{tiny._ldm_unet(key, blocks=3)}": tuple(value.shape) for key, value in unet.state_dict().items()
    }
    facts = checkpoints.read_json(checkpoints.MODELS / "sdxl.json")
    found = checkpoints.ldm_unet_config(shapes, "x.", facts["unet"])
    for name in (
        "down_block_types",
        "up_block_types",
        "block_out_channels",
        "layers_per_block",
        "transformer_layers_per_block",
        "attention_head_dim",
        "cross_attention_dim",
        "use_linear_projection",
        "addition_embed_type",
        "addition_time_embed_dim",
        "projection_class_embeddings_input_dim",
    ):
        theirs = unet.config[name]
        assert found[name] == (list(theirs) if isinstance(theirs, tuple) else theirs), name


def test_half_precision_files_and_vae(folder: Path, file: Path, tmp_path: Path) -> None:
    for dtype in (torch.float16, torch.bfloat16):
        half = load(job(tiny.sdxl_file(tmp_path / f"{dtype}.safetensors", dtype=dtype), tmp_path))
        whole = tiny.sdxl_models()["unet"].state_dict()
        assert all(
            torch.equal(value, whole[key].to(dtype).float()) for key, value in half.unet.state_dict().items()
        )
    for fields in ({"sdxl_no_half_vae": True}, {"additional_parameters": "--no_half_vae"}):
        family = load(job(file, tmp_path, **fields), torch.bfloat16)
        assert next(family.vae.parameters()).dtype == torch.float32
        assert next(family.unet.parameters()).dtype == torch.bfloat16
    family = load(job(file, tmp_path), torch.bfloat16)
    assert next(family.vae.parameters()).dtype == torch.bfloat16
    family.vae.quant_conv.bias.data[0] = float("nan")
    with pytest.raises(DivergedError, match="No half VAE"):
        family.encode_images(torch.zeros(1, 3, 64, 64), [torch.Generator()])


def test_a_vae_of_its_own_keeps_sdxls_scale(folder: Path, file: Path, tmp_path: Path) -> None:
    other = tiny.models(1, seed=3)["vae"]
    other.save_pretrained(tmp_path / "vae")
    family = load(job(file, tmp_path, vae=str(tmp_path / "vae")))
    assert torch.equal(family.vae.quant_conv.weight, other.quant_conv.weight)
    latents = torch.randn(1, 4, 8, 8)
    assert torch.equal(family.to_model_latents(latents), latents * 0.13025)
    decoded = other.decode(latents).sample
    torch.testing.assert_close(family.decode_latents(latents * 0.13025), decoded, rtol=1e-4, atol=1e-4)


def test_what_cannot_be_loaded_is_said(folder: Path, file: Path, tmp_path: Path) -> None:
    one = tiny.sd15_file(tmp_path / "sd15.safetensors")
    with pytest.raises(ModelFileError, match="untick SDXL"):
        load(job(one, tmp_path))
    with pytest.raises(ModelFileError, match="tick SDXL"):
        StableDiffusion.load(tiny.job(file, tmp_path), torch.device("cpu"), torch.float32, print)
    with pytest.raises(ModelFileError, match="second text encoder"):
        load(job(tiny.sd15_folder(tmp_path / "sd15"), tmp_path))
    tensors = load_file(file)
    del tensors["conditioner.embedders.1.model.text_projection"]
    save_file(tensors, tmp_path / "cut.safetensors")
    with pytest.raises(ModelFileError, match="text_projection"):
        load(job(tmp_path / "cut.safetensors", tmp_path))


def test_marks_of_v_prediction_are_noticed(file: Path, tmp_path: Path) -> None:
    marked = tmp_path / "noob.safetensors"
    save_file({**load_file(file), "v_pred": torch.tensor([]), "ztsnr": torch.tensor([])}, marked)
    said: list[str] = []
    StableDiffusionXL.load(
        job(marked, tmp_path, clip_skip=2), torch.device("cpu"), torch.float32, said.append
    )
    text = " ".join(said)
    assert "v_parameterization" in text
    assert "zero_terminal_snr" in text
    assert "clip_skip 2 has no effect" in text
    said.clear()
    fields = {"v_parameterization": True, "additional_parameters": "--zero_terminal_snr"}
    StableDiffusionXL.load(job(marked, tmp_path, **fields), torch.device("cpu"), torch.float32, said.append)
    assert not any("marked" in line for line in said)


# --- text and sizes -----------------------------------------------------------------------------


@pytest.mark.parametrize("length", [75, 150, 225])
def test_text(length: int, file: Path, tmp_path: Path) -> None:
    """Against transformers' hidden states: last layers but one, no final norm; pooled at the first end."""
    family = load(job(file, tmp_path, max_token_length=length, clip_skip=2))
    text = family.encode_prompts(CAPTIONS)
    theirs = tiny.sdxl_models()
    assert text.pooled_BD is not None
    for row, caption in enumerate(CAPTIONS):
        joined = []
        for part, name in (("te1", "text_encoder"), ("te2", "text_encoder_2")):
            ids_NL = family.tokens[cast(Any, part)].captions([caption])[0]
            outputs = [theirs[name](ids[None], output_hidden_states=True) for ids in ids_NL]
            states = [output.hidden_states[-2][0] for output in outputs]
            joined.append(torch.cat([states[0][:1], *(part[1:76] for part in states), states[-1][-1:]]))
            if part == "te2":
                end = ids_NL[0].tolist().index(49407)
                pooled = theirs[name].text_projection(outputs[0].last_hidden_state[0, end])
                torch.testing.assert_close(text.pooled_BD[row], pooled, rtol=1e-4, atol=1e-5)
        expected = torch.cat(joined, dim=-1)
        assert text.states_BTD[row].shape == (length + 2, 96)
        torch.testing.assert_close(text.states_BTD[row], expected, rtol=1e-4, atol=1e-5)


def test_text_is_the_pipelines_own(file: Path, tmp_path: Path, pipeline: Any) -> None:
    text = load(job(file, tmp_path)).encode_prompts(CAPTIONS[:2])
    with torch.no_grad():
        states, _, pooled, _ = pipeline.encode_prompt(CAPTIONS[:2], do_classifier_free_guidance=False)
    torch.testing.assert_close(text.states_BTD, states, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(text.pooled_BD, pooled, rtol=1e-4, atol=1e-5)


def test_the_second_tokenizer_is_padded_with_zero(folder: Path, file: Path, tmp_path: Path) -> None:
    for path in (file, folder):
        tokens = load(job(path, tmp_path)).tokens
        one, two = (tokens[cast(Any, part)].captions(["a cat"])[0, 0].tolist() for part in ("te1", "te2"))
        assert one == [49406, 320, 2368, 49407, *[49407] * 73]
        assert two == [49406, 320, 2368, 49407, *[0] * 73]


def test_emphasis_multiplies_both_encoders(file: Path, tmp_path: Path) -> None:
    family = load(job(file, tmp_path))
    plain, weighted = (
        family.encode_prompts(["a red cat sat"]),
        family.encode_prompts(["a (red cat:1.5) sat"], weighted=True),
    )
    factors = torch.ones(1, 77, 1)
    factors[:, 2:4] = 1.5
    torch.testing.assert_close(weighted.states_BTD, plain.states_BTD * factors)
    torch.testing.assert_close(weighted.pooled_BD, plain.pooled_BD)
    # Samples are conditioned as captions are (sd-scripts, sdxl_lpw_stable_diffusion.py).
    assert torch.equal(family.encode_sample_prompts(["a (red cat:1.5) sat"]).states_BTD, weighted.states_BTD)


def test_sizes_that_the_unet_is_told() -> None:
    """Engine facts 13: 1200x1600 in bucket 896x1152 lies at left 16; a mirrored one too."""
    found = time_ids(batch([(1200, 1600), (1200, 1600), (900, 500)], (896, 1152), [False, True, True]))
    assert found[:2].tolist() == [[1600, 1200, 0, 16, 1152, 896]] * 2
    assert found[2].tolist() == [500, 900, int((1152 - 896 / 1.8) // 2), 0, 1152, 896]


def test_prediction_is_the_unets_with_exact_sizes(file: Path, tmp_path: Path) -> None:
    family = load(job(file, tmp_path))
    sizes = batch([(1023, 1025), (600, 800)], (1024, 1024), [False, False])
    text = family.encode_prompts(["a", "b"])
    noisy, timesteps = torch.randn(2, 4, 8, 8), torch.tensor([10, 900])
    unet = tiny.sdxl_models()["unet"]
    for given, ids in (
        (sizes, [[1025, 1023, 0, 0, 1024, 1024], [800, 600, 0, 128, 1024, 1024]]),
        (None, [[64, 64, 0, 0, 64, 64]] * 2),
    ):
        added = {"text_embeds": text.pooled_BD, "time_ids": torch.tensor(ids)}
        with torch.no_grad():
            expected = unet(noisy, timesteps, text.states_BTD, added_cond_kwargs=added).sample
        assert torch.equal(family.predict(noisy, timesteps, text, given), expected)


def test_pictures_drawn_together_are_those_drawn_alone(file: Path, tmp_path: Path) -> None:
    made = job(file, tmp_path)
    family = load(made)
    prompts = [
        SamplePrompt(prompt=words, negative="ugly", width=64, height=96, seed=seed, steps=2, cfg_scale=3)
        for words, seed in [("a cat", 1), ("a dog on a wall", 2), ("a cow", 3)]
    ]
    alone, together = (
        torch.cat([drawn.pixels_1CHW for drawn in draw(family, made, prompts, together=count)])
        for count in (1, 3)
    )
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-4)
    assert float((alone[0] - alone[1]).abs().max()) > 0.1


def test_text_gradients_reach_all_layers_that_count(file: Path, tmp_path: Path) -> None:
    """CLIP-L's last layer has no part in SDXL; OpenCLIP's has one in the pooled text."""
    gradients = []
    for checkpointing in (False, True):
        family = load(job(file, tmp_path, text_encoder_lr=1e-4, unet_lr=1e-4, max_token_length=150))
        weights = [
            target.module.weight.requires_grad_()
            for target in family.targets()
            if target.part != "unet" and target.name.endswith("q_proj")
        ]
        if checkpointing:
            family.enable_gradient_checkpointing()
        text = family.encode_prompts(["a cat", "a dog"])
        assert text.pooled_BD is not None
        torch.autograd.backward(text.states_BTD.square().sum() + text.pooled_BD.square().sum())
        assert [weight.grad is not None for weight in weights] == [True, True, False, True, True, True]
        gradients.append([weight.grad for weight in weights if weight.grad is not None])
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b)


# --- names --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def full(tmp_path_factory: pytest.TempPathFactory) -> StableDiffusionXL:
    """SDXL at full size from a single file, on the meta device."""
    folder = tmp_path_factory.mktemp("full")
    run = job(hollow.sdxl(folder)["pretrained_model_name_or_path"], folder)
    return StableDiffusionXL.load(run, torch.device("meta"), torch.float32, lambda _: None)


def network(family: StableDiffusionXL, **values: Any) -> LoraNetwork:
    fields = {"network_dim": 16, "network_alpha": 8, "unet_lr": 1e-3, "text_encoder_lr": 1e-4, **values}
    return LoraNetwork.create(family, job(Path("x"), Path.cwd(), **fields), Draws(1), lambda _: None)


def digest(lines: Sequence[str]) -> str:
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


GOLDEN: dict[str, Any] = json.loads(
    (Path(__file__).parent / "golden" / "sdxl.json").read_text(encoding="utf-8")
)
"""What sd-scripts' networks.lora gives for the full-size models on the meta device (make_sdxl_golden.py)."""


@pytest.mark.parametrize("case", GOLDEN)
def test_network_is_sd_scripts_own(case: str, full: StableDiffusionXL) -> None:
    """Modules in order, shapes, alphas and optimizer groups, for each set of options."""
    golden = GOLDEN[case]
    ours = network(full, **golden["fields"])
    lines = []
    for layer in ours.layers:
        (target,) = layer.target
        down, up = ("x".join(map(str, weight.shape)) for weight in (layer.lora_down, layer.lora_up))
        lines.append(f"{target.name} {down} {up} {float(layer.alpha):g}")
    assert len(lines) == golden["modules"]
    assert lines[:: max(1, len(lines) // 8)] == golden["some"]
    assert digest(lines) == golden["sha256"]
    groups = [[group.name, group.lr, len(group.params)] for group in ours.param_groups()]
    assert [[name, pytest.approx(rate, rel=1e-12), count] for name, rate, count in golden["groups"]] == groups


def test_names_of_the_saved_tensors(full: StableDiffusionXL) -> None:
    assert kohya_name("down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_k") == (
        "input_blocks_4_1_transformer_blocks_0_attn2_to_k"
    )
    assert kohya_name("up_blocks.0.upsamplers.0.conv") == "output_blocks_2_2_conv"
    assert kohya_name("mid_block.resnets.1.conv_shortcut") == "middle_block_2_skip_connection"
    names = [target.name for target in full.targets()]
    assert len(names) == len(set(names))
    assert (full.kohya_base_version, full.architecture) == (
        "sdxl_base_v1-0",
        "stable-diffusion-xl-v1-base/lora",
    )


# --- cached text outputs ------------------------------------------------------------------------

CACHED: dict[str, Any] = {
    "sdxl": True,
    "text_encoder_lr": 0,
    "unet_lr": 1e-3,
    "sdxl_cache_text_encoder_outputs": True,
    "max_train_steps": 4,
}


def test_cached_text_trains_the_same(file: Path, tmp_path: Path) -> None:
    """In RAM, on disk, from disk again, and after one caption was edited."""
    model = {"pretrained_model_name_or_path": str(file)}
    settings(tmp_path, **model)  # makes the pictures
    disk = {"additional_parameters": "--cache_text_encoder_outputs_to_disk"}
    made = sorted((tmp_path / "img" / "2_tok cat").glob("*.png"))
    files = [path.with_name(f"{path.stem}_te_outputs.npz") for path in made]

    def weights(**values: Any) -> dict[str, Tensor]:
        outcome, _ = train(tmp_path, **CACHED | model | values)
        assert outcome.path is not None
        found: dict[str, Tensor] = load_file(outcome.path)
        return found

    plain = weights(sdxl_cache_text_encoder_outputs=False)
    assert any(key.startswith("lora_unet_input_blocks_4_1_") for key in plain)
    in_ram = weights()
    assert not any(path.exists() for path in files)
    on_disk = weights(**disk)
    for other in (in_ram, on_disk):
        for key, value in plain.items():
            torch.testing.assert_close(other[key], value, rtol=1e-3, atol=2e-5)
    text = load(job(file, tmp_path)).encode_prompts(["tok cat, number 2, red, blue"])
    with np.load(files[2]) as arrays:
        assert [(name, arrays[name].shape) for name in NAMES] == [
            ("hidden_state1", (77, 32)),
            ("hidden_state2", (77, 64)),
            ("pool2", (64,)),
        ]
        states = np.concatenate([arrays["hidden_state1"], arrays["hidden_state2"]], axis=1)
        np.testing.assert_allclose(states, text.states_BTD[0].numpy(), rtol=1e-4, atol=1e-5)
    before = [path.stat().st_mtime_ns for path in files]
    again = weights(**disk)
    assert all(torch.equal(again[key], value) for key, value in on_disk.items())
    assert [path.stat().st_mtime_ns for path in files] == before
    made[1].with_suffix(".txt").write_text("something else", encoding="utf-8")
    edited = weights(**disk)
    assert [path.stat().st_mtime_ns == old for path, old in zip(files, before, strict=True)] == [
        True,
        False,
        True,
        True,
    ]
    assert any(not torch.equal(edited[key], value) for key, value in on_disk.items())


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"text_encoder_lr": 1e-4}, "text_encoder_lr"),
        ({"shuffle_caption": True}, "shuffle_caption"),
        ({"caption_dropout_rate": 0.1}, "caption_dropout_rate"),
        ({"additional_parameters": "--caption_tag_dropout_rate 0.1"}, "caption_tag_dropout_rate"),
        ({"additional_parameters": "--token_warmup_step 2"}, "token_warmup_step"),
        ({"v2": True}, "v2"),
        ({"bucket_reso_steps": 48}, "32"),
    ],
)
def test_what_sd_scripts_refuses_is_refused(
    values: dict[str, Any], words: str, file: Path, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=words):
        train(tmp_path, **CACHED | {"pretrained_model_name_or_path": str(file)} | values)


def test_caption_options_that_the_cache_passes_over_are_named(file: Path, tmp_path: Path) -> None:
    picture = Picture(path=tmp_path / "a.png", subset=0, size=(64, 64), caption="a", caption_file=None)
    subset = Subset(folder=tmp_path, repeats=1, class_tokens="", caption_prefix="style")
    dataset = Dataset(
        subsets=(subset,),
        pictures=(picture,),
        fits=(Fit((64, 64), (64, 64)),),
        repeats=(1,),
        buckets=((64, 64),),
        num_train_images=1,
        num_reg_images=0,
        mean_aspect_error=0.0,
    )
    cached = {key: value for key, value in CACHED.items() if key not in ("sdxl", "max_train_steps")}
    family, events = load(job(file, tmp_path, **cached)), list[Any]()
    family.prepare_text(
        job(file, tmp_path, **cached, weighted_captions=True), dataset, emit=events.append, stop=lambda: False
    )
    assert any(isinstance(event, LogLine) and "caption_prefix" in event.message for event in events)
    text = family.encode_batch(batch([(64, 64)], (64, 64), [False]))
    expected = family.encode_prompts(["a"])
    torch.testing.assert_close(text.states_BTD, expected.states_BTD)
    torch.testing.assert_close(text.pooled_BD, expected.pooled_BD)


def test_text_encoders_wait_on_the_cpu_while_a_card_encodes_pictures(file: Path, tmp_path: Path) -> None:
    cuda = torch.device("cuda")
    for values, device, expected in (
        ({"cache_latents": True}, cuda, True),
        ({"cache_latents": True}, torch.device("cpu"), False),
        ({"cache_latents": False}, cuda, False),
        ({"cache_latents_to_disk": True, "fp8_base": True}, cuda, False),
        ({"cache_latents": True, "fp8_base_unet": True}, cuda, True),
    ):
        assert texts_wait(job(file, tmp_path, **values), device) == expected
    run = job(file, tmp_path)
    family = load(run)
    family.texts_wait, family.device = True, torch.device("meta")
    nothing = cast("Dataset", None)
    family.prepare_text(run, nothing, emit=lambda _: None, stop=lambda: False)
    assert all(next(family_part.parameters()).is_meta for family_part in family.text_encoders.values())
    assert not next(family.vae.parameters()).is_meta
    assert "unet" not in vars(family)


def test_the_unet_is_read_after_the_pictures_are_encoded(
    file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The memory never holds it beside the VAE at work; a file that lacks a part of it is refused at once."""
    there: list[bool] = []
    encode = StableDiffusionXL.encode_images

    def noted(self: StableDiffusionXL, *args: Any) -> Tensor:
        there.append("unet" in vars(self))
        return encode(self, *args)

    monkeypatch.setattr(StableDiffusionXL, "encode_images", noted)
    fields: dict[str, Any] = {"pretrained_model_name_or_path": str(file), "sdxl": True}
    train(tmp_path, **fields, cache_latents=True, max_train_steps=1)
    assert there
    assert not any(there)
    tensors = {key: value for key, value in load_file(file).items() if "middle_block.2" not in key}
    save_file(tensors, tmp_path / "part.safetensors")
    with pytest.raises(ModelFileError, match="tensors of the UNet"):
        load(job(tmp_path / "part.safetensors", tmp_path))


def test_vae_and_text_encoders_leave_once_their_work_is_cached(
    file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[str] = []

    def noted(name: str, say: Any) -> None:
        whole = getattr(StableDiffusionXL, name)

        def method(self: StableDiffusionXL, *args: Any, **values: Any) -> Any:
            done.append(say(*args))
            return whole(self, *args, **values)

        monkeypatch.setattr(StableDiffusionXL, name, method)

    noted("encode_images", lambda *_: "encode")
    noted("move", lambda parts, device: f"{' '.join(parts)} to {device}")
    noted("predict", lambda *_: "predict")
    train(
        tmp_path,
        **CACHED | {"pretrained_model_name_or_path": str(file), "max_train_steps": 1},
        cache_latents=True,
    )
    order = [name for name, before in zip(done, ["", *done], strict=False) if name != before]
    assert order == ["encode", "vae to cpu", "text_encoders to cpu", "predict"]


# --- whole runs ---------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:__array__")  # of diffusers' schedulers on numpy 2
def test_a_run_through_the_shell_and_diffusers_reads_the_result(
    file: Path,
    folder: Path,
    pipeline: Any,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Trained by the CLI, drawn by us; `load_lora_weights` leaves no key over and draws the same."""
    from diffusers import EulerDiscreteScheduler
    from PIL import Image

    path = write_config(
        tmp_path,
        pretrained_model_name_or_path=str(file),
        sdxl=True,
        LoRA_type="Kohya LoCon",
        conv_dim=2,
        conv_alpha=1,
        learning_rate=0.02,
        unet_lr=0.02,
        text_encoder_lr=0.02,
        flip_aug=True,
        max_train_steps=4,
        sample_every_n_steps=4,
        sample_prompts="tok cat --w 64 --h 72 --s 4 --l 3 --d 5 --n blurry",
        sample_sampler="euler",
        bucket_reso_steps=32,
    )
    assert main([str(path)]) == 0
    lora = tmp_path / "out" / "toy.safetensors"
    tensors = load_file(lora)
    assert {key.split("_")[1] for key in tensors} == {"te1", "te2", "unet"}
    (picture,) = (tmp_path / "out" / "sample").glob("*.png")
    pipeline.scheduler = EulerDiscreteScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear"
    )

    pipeline.vae.register_to_config(scaling_factor=0.13025)

    def draw() -> Any:
        generator = torch.Generator().manual_seed(5)
        size = {"width": 64, "height": 72, "num_inference_steps": 4, "guidance_scale": 3}
        drawn = pipeline("tok cat", negative_prompt="blurry", generator=generator, **size).images[0]
        return np.asarray(drawn).astype(int)

    without = draw()
    assert loaded_by_diffusers(pipeline, lora, caplog) == len(tensors) // 3
    with Image.open(picture) as image:
        ours = np.asarray(image).astype(int)
    theirs = draw()
    pipeline.unload_lora_weights()
    assert np.abs(ours - theirs).max() <= 2
    assert np.abs(ours - theirs).mean() < 0.2
    assert np.abs(ours - without).mean() > 2
    assert main(["check", str(path), "--json"]) == 0


def test_file_and_folder_train_the_same_and_a_run_resumes(file: Path, folder: Path, tmp_path: Path) -> None:
    fields: dict[str, Any] = {
        "sdxl": True,
        "v_parameterization": True,
        "additional_parameters": "--zero_terminal_snr",
        "gradient_checkpointing": True,
        "cache_latents_to_disk": True,
        "max_train_steps": 4,
        "save_every_n_steps": 2,
        "save_state": True,
    }
    results = []
    for name, model in (("file", file), ("folder", folder)):
        outcome, events = train(
            tmp_path, **fields, pretrained_model_name_or_path=str(model), output_dir=str(tmp_path / name)
        )
        assert outcome.path is not None
        losses = [event.loss for event in events if isinstance(event, StepDone)]
        assert len(losses) == 4
        results.append((losses, load_file(outcome.path)))
    assert results[0][0] == results[1][0]
    assert all(torch.equal(results[1][1][key], value) for key, value in results[0][1].items())
    made = sorted(path.name for path in (tmp_path / "img" / "2_tok cat").glob("*.npz"))
    assert made == [f"{i}_{w:04d}x{h:04d}_sdxl.npz" for i, (w, h) in enumerate(SIZES)]
    state = tmp_path / "file" / "toy-step00000002-state"
    outcome, _ = train(
        tmp_path,
        **fields,
        pretrained_model_name_or_path=str(file),
        output_dir=str(tmp_path / "resumed"),
        resume=str(state),
    )
    assert outcome.path is not None
    resumed = load_file(outcome.path)
    assert all(torch.equal(resumed[key], value) for key, value in results[0][1].items())
    # Going on from a LoRA of one text encoder with its own ranks trains that one alone.
    only = {key: value for key, value in resumed.items() if key.startswith("lora_te2_")}
    save_file(only, tmp_path / "te2.safetensors")
    outcome, _ = train(
        tmp_path,
        **fields | {"max_train_steps": 1, "dim_from_weights": True},
        pretrained_model_name_or_path=str(file),
        output_dir=str(tmp_path / "te2"),
        network_weights=str(tmp_path / "te2.safetensors"),
    )
    assert outcome.path is not None
    assert load_file(outcome.path).keys() == only.keys()


def test_samplers_draw(file: Path, tmp_path: Path) -> None:
    """Kohya's sampler names reach SDXL; each draws something else."""
    run = job(file, tmp_path)
    family, events = load(run), list[Any]()
    names = ["ddim", "k_euler_a", "dpmsolver++", "heun"]
    prompts = [
        SamplePrompt(prompt="a (cat:1.2)", width=64, height=64, seed=1, steps=3, sampler=name)
        for name in names
    ]
    sample(family, run, prompts, step=1, epoch=None, stop=lambda: False, emit=events.append)
    files = [event.path for event in events if isinstance(event, SampleReady)]
    assert len({path.read_bytes() for path in files}) == len(names)


PRESETS = sorted(
    path
    for path in (REPOSITORY / "presets").glob("*.json")
    if json.loads(path.read_text(encoding="utf-8")).get("sdxl")
)


@pytest.mark.parametrize("path", PRESETS, ids=lambda path: path.stem)
def test_presets_train(path: Path, file: Path, tmp_path: Path) -> None:
    """Every SDXL preset, on toy models: its own settings but sizes, steps and paths."""
    loaded = configuration.load(path)
    assert not loaded.of("unknown", "invalid", "unsupported")
    toy = {
        "max_resolution": "64,64",
        "min_bucket_reso": 64,
        "max_train_steps": 2,
        "sample_prompts": "",
        "pretrained_model_name_or_path": str(file),
        "output_name": "preset",
    }
    paths = {key: value for key, value in settings(tmp_path, **toy).items() if key.endswith("_dir")}
    outcome, _ = train(tmp_path, **{**json.loads(path.read_text(encoding="utf-8")), **toy, **paths})
    assert outcome.step == 2
    assert outcome.path is not None
    trained = {key.split("_")[1] for key in load_file(outcome.path)}
    assert trained == ({"te1", "te2", "unet"} if loaded.config.text_encoder_lr else {"unet"})
