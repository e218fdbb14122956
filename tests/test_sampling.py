"""Sample pictures against diffusers' StableDiffusionPipeline, and what sampling leaves untouched."""

from __future__ import annotations

import dataclasses
import re
import warnings
from functools import partial
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image

from tests import tiny
from trainer import sampling
from trainer.events import Event, LogLine, PhaseStarted, Progress, SampleReady
from trainer.families.sd import StableDiffusion
from trainer.job import Job
from trainer.prompts import SamplePrompt
from trainer.sampling import sample, scheduler_for

# Kohya's names -> what diffusers calls them (engine facts 10.3).
SAMPLERS: dict[str, Any] = {
    "ddim": diffusers.DDIMScheduler,
    "pndm": diffusers.PNDMScheduler,
    "lms": diffusers.LMSDiscreteScheduler,
    "euler": diffusers.EulerDiscreteScheduler,
    "euler_a": diffusers.EulerAncestralDiscreteScheduler,
    "heun": diffusers.HeunDiscreteScheduler,
    "dpm_2": diffusers.KDPM2DiscreteScheduler,
    "dpm_2_a": diffusers.KDPM2AncestralDiscreteScheduler,
    "dpmsolver++": diffusers.DPMSolverMultistepScheduler,
    "dpmsingle": diffusers.DPMSolverSinglestepScheduler,
    "no such sampler": diffusers.DDIMScheduler,
}
BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.sd15_folder(tmp_path_factory.mktemp("models") / "sd15")


@pytest.fixture(scope="module")
def pipeline(model: Path) -> Any:
    pipe = diffusers.StableDiffusionPipeline.from_pretrained(
        model, local_files_only=True, safety_checker=None
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def load(job: Job) -> StableDiffusion:
    return StableDiffusion.load(job, torch.device("cpu"), torch.float32, lambda _: None)


def draw(family: StableDiffusion, job: Job, prompt: SamplePrompt) -> tuple[np.ndarray[Any, Any], list[Event]]:
    events: list[Event] = []
    sample(family, job, [prompt], step=3, epoch=None, stop=lambda: False, emit=events.append)
    (ready,) = [event for event in events if isinstance(event, SampleReady)]
    with Image.open(ready.path) as picture:
        return np.asarray(picture), events


def compare(ours: np.ndarray[Any, Any], theirs: Any) -> None:
    assert ours.shape == np.asarray(theirs).shape
    assert ours.std() > 5
    assert np.abs(ours.astype(int) - np.asarray(theirs).astype(int)).max() <= 1


@pytest.mark.parametrize(
    ("name", "v_prediction"),
    [*((name, False) for name in SAMPLERS), ("ddim", True), ("euler_a", True), ("dpmsolver++", True)],
)
def test_same_picture_as_the_pipeline(
    name: str, v_prediction: bool, model: Path, pipeline: Any, tmp_path: Path
) -> None:
    job = tiny.job(model, tmp_path, v_parameterization=v_prediction, sample_sampler=name)
    prompt = SamplePrompt(
        prompt="a cat", negative="blurry", width=72, height=64, seed=5, steps=4, cfg_scale=3
    )
    ours, _ = draw(load(job), job, prompt)
    kind = "v_prediction" if v_prediction else "epsilon"
    options = BETAS | {"prediction_type": kind} | ({"clip_sample": True} if name == "heun" else {})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # diffusers' schedulers do not know numpy 2 yet
        pipeline.scheduler = SAMPLERS[name](num_train_timesteps=1000, **options)
        theirs = pipeline(
            "a cat",
            negative_prompt="blurry",
            width=72,
            height=64,
            num_inference_steps=4,
            guidance_scale=3,
            generator=torch.Generator().manual_seed(5),
        ).images[0]
    compare(ours, theirs)


@pytest.mark.parametrize("name", SAMPLERS)
def test_together_as_alone(name: str, model: Path, tmp_path: Path) -> None:
    """Each picture keeps its words and its noise; one of another size, or of a longer text, goes by itself."""
    job = tiny.job(model, tmp_path, sample_sampler=name)
    family = load(job)
    prompts = [
        SamplePrompt(prompt=words, negative=negative, width=width, height=64, seed=seed, steps=4, cfg_scale=3)
        for words, negative, width, seed in [
            ("a cat", "blurry", 72, 5),
            ("a dog", "", 72, 6),
            ("a cow", "red", 72, 7),
            ("a cow", "red", 64, 7),
            ("a cow" + ", word" * 90, "red", 64, 7),
        ]
    ]
    calls: list[int] = []
    drawn = [
        [
            picture.pixels_1CHW
            for picture in sampling.draw(
                family, job, prompts, together=together, progress=partial(calls.append, together)
            )
        ]
        for together in (1, 4)
    ]
    for alone, together in zip(*drawn, strict=True):
        torch.testing.assert_close(together, alone, rtol=0, atol=1e-4)
    assert float((drawn[1][0] - drawn[1][1]).abs().max()) > 0.1
    assert calls.count(4) * 5 == calls.count(1) * 3


@pytest.mark.parametrize("name", ["lms", "euler", "euler_a", "dpm_2", "dpm_2_a"])
def test_k_names_are_the_same_samplers(name: str) -> None:
    a, b = scheduler_for(name, v_prediction=True), scheduler_for(f"k_{name}", v_prediction=True)
    assert type(a) is type(b) is SAMPLERS[name]
    assert a.config == b.config


def test_dpmsolver(model: Path, tmp_path: Path) -> None:
    """diffusers is about to drop this algorithm; it still draws, and differently from dpmsolver++."""
    job = tiny.job(model, tmp_path)
    family = load(job)
    pictures = [
        draw(family, job, SamplePrompt(prompt="a", width=64, height=64, seed=1, steps=4, sampler=name))[0]
        for name in ("dpmsolver", "dpmsolver++")
    ]
    assert pictures[0].std() > 5
    assert (pictures[0] != pictures[1]).any()


def test_without_guidance(model: Path, pipeline: Any, tmp_path: Path) -> None:
    job = tiny.job(model, tmp_path, sample_sampler="ddim")
    prompt = SamplePrompt(
        prompt="a cat", negative="ignored", width=64, height=64, seed=5, steps=3, cfg_scale=1
    )
    ours, _ = draw(load(job), job, prompt)
    pipeline.scheduler = diffusers.DDIMScheduler(**BETAS)
    theirs = pipeline(
        "a cat",
        width=64,
        height=64,
        num_inference_steps=3,
        guidance_scale=1,
        generator=torch.Generator().manual_seed(5),
    ).images[0]
    compare(ours, theirs)


def test_emphasis_and_long_prompts_reach_the_picture(model: Path, tmp_path: Path) -> None:
    job = tiny.job(model, tmp_path)
    family = load(job)
    texts = ["a cat", "a (cat:1.8)", "a cat" + ", word" * 90 + ", dog", "a cat" + ", word" * 90 + ", horse"]
    pictures = [
        draw(family, job, SamplePrompt(prompt=text, width=64, height=64, seed=1, steps=2))[0].tobytes()
        for text in texts
    ]
    assert len(set(pictures)) == len(texts)


def test_names_metadata_and_events(model: Path, tmp_path: Path) -> None:
    """Kohya's file names (engine facts 10.1) and the text that other programs read from the picture."""
    job = tiny.job(model, tmp_path, sample_sampler="euler_a")
    family = load(job)
    prompts = [
        SamplePrompt(prompt="übung", negative="bad", width=70, height=10, seed=7, steps=2),
        SamplePrompt(prompt="no seed", width=64, height=64, steps=2, cfg_scale=1, ignored=("--cn x",)),
        SamplePrompt(prompt="odd", width=64, height=64, steps=2, sampler="magic"),
    ]
    events: list[Event] = []
    sample(family, job, prompts, step=12, epoch=None, stop=lambda: False, emit=events.append)
    ready = [event for event in events if isinstance(event, SampleReady)]
    folder = tmp_path / "out" / "sample"
    assert sorted(folder.iterdir()) == sorted(event.path for event in ready)
    assert re.fullmatch(r"tiny_000012_00_\d{14}_7\.png", ready[0].path.name)
    assert re.fullmatch(r"tiny_000012_01_\d{14}\.png", ready[1].path.name)
    assert [(event.step, event.epoch, event.index) for event in ready] == [(12, None, i) for i in range(3)]
    with Image.open(ready[0].path) as picture:
        assert picture.format == "PNG"
        assert picture.size == (64, 64)
        info = dict(picture.info)
    assert info["parameters"] == (
        "übung\nNegative prompt: bad\nSteps: 2, Sampler: euler_a, CFG scale: 7.5, Seed: 7, Size: 64x64, "
        "Model: tiny, Training step: 12"
    )
    assert (info["prompt"], info["seed"], info["step"]) == ("übung", "7", "12")
    lines = [event.message for event in events if isinstance(event, LogLine)]
    assert any("--cn x" in line for line in lines)
    assert any("'magic'" in line for line in lines)
    (phase,) = [event for event in events if isinstance(event, PhaseStarted)]
    assert (phase.phase, phase.total) == ("sample", 6)
    assert [event.done for event in events if isinstance(event, Progress)] == [1, 2, 3, 4, 5, 6]

    # The seed that was drawn repeats the picture.
    again, _ = draw(family, job, dataclasses.replace(prompts[1], seed=ready[1].seed))
    with Image.open(ready[1].path) as picture:
        assert (np.asarray(picture) == again).all()

    events.clear()
    unnamed = job.with_config(output_name="")
    sample(family, unnamed, prompts[:1], step=0, epoch=0, stop=lambda: False, emit=events.append)
    assert re.fullmatch(r"e000000_00_\d{14}_7\.png", events[-1].path.name)  # type: ignore[attr-defined]


def test_sampling_touches_nothing(model: Path, tmp_path: Path) -> None:
    job = tiny.job(model, tmp_path, sample_sampler="euler_a")
    family = load(job)
    family.enable_gradient_checkpointing()
    family.unet.mid_block.eval()
    before = torch.get_rng_state(), {name: value.clone() for name, value in family.unet.state_dict().items()}
    modes = {name: module.training for name, module in family.unet.named_modules()}
    draw(family, job, SamplePrompt(prompt="x", width=64, height=64, steps=2))
    assert torch.equal(torch.get_rng_state(), before[0])
    assert all(torch.equal(value, before[1][name]) for name, value in family.unet.state_dict().items())
    assert {name: module.training for name, module in family.unet.named_modules()} == modes
    assert family.text_encoders["te1"].training
    assert torch.is_grad_enabled()


def test_models_return_to_where_they_were(model: Path, tmp_path: Path) -> None:
    """A VAE and text encoder that are off the device come for the picture and go again."""
    job = tiny.job(model, tmp_path)
    family = load(job)
    moves: list[tuple[tuple[str, ...], str]] = []
    where: dict[str, object] = {"vae": "elsewhere", "text_encoders": "elsewhere"}

    class Parameter:
        def __init__(self, part: str) -> None:
            self.part = part

        @property
        def device(self) -> object:
            return where[self.part]

    class Model:
        def __init__(self, part: str) -> None:
            self.part = part

        def parameters(self) -> Any:
            return iter([Parameter(self.part)])

        def modules(self) -> Any:
            return iter(())

        def eval(self) -> None: ...

    class Moving:
        def __getattr__(self, name: str) -> Any:
            return getattr(family, name)

        device = family.device
        latent_channels, latent_factor = 4, 8
        unet, predict = family.unet, staticmethod(family.predict)
        vae, text_encoders = Model("vae"), {"te1": Model("text_encoders")}

        def move(self, parts: Any, device: Any) -> None:
            moves.append((tuple(parts), str(device)))
            for part in parts:
                where[part] = device

        def encode_sample_prompts(self, prompts: Any) -> Any:
            assert where["text_encoders"] == family.device
            return family.encode_sample_prompts(prompts)

        def decode_latents(self, latents: Any) -> Any:
            assert where["vae"] == family.device
            return family.decode_latents(latents)

    draw(Moving(), job, SamplePrompt(prompt="x", width=64, height=64, steps=1))  # type: ignore[arg-type]
    assert moves == [
        (("text_encoders",), "cpu"),
        (("text_encoders",), "elsewhere"),
        (("vae",), "cpu"),
        (("vae",), "elsewhere"),
    ]


def test_stop_ends_in_the_middle_of_a_picture(model: Path, tmp_path: Path) -> None:
    job = tiny.job(model, tmp_path)
    events: list[Event] = []
    sample(
        load(job),
        job,
        [SamplePrompt(prompt="x", width=64, height=64, steps=5, sampler="ddim")] * 2,
        step=1,
        epoch=None,
        stop=lambda: sum(isinstance(event, Progress) for event in events) >= 7,
        emit=events.append,
    )
    assert sum(isinstance(event, Progress) for event in events) == 7
    assert len(list((tmp_path / "out" / "sample").iterdir())) == 1
