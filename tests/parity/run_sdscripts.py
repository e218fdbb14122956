"""Run a case in kohya-ss/sd-scripts, unmodified, and record what it does.

Runs in the environment of sd-scripts (see README.md), not in ours, and imports nothing of ours but
`cases`. Functions of sd-scripts are wrapped while it runs, to note what goes in and comes out:

    python run_sdscripts.py CASE --source sd-scripts --model sd15.safetensors --photos PHOTOS \
        --reg-photos REG --tokenizers FOLDER --out RECORD

``RECORD`` then holds ``case.json`` (the Kohya JSON), ``start.safetensors`` (the LoRA both programs
start from), ``record.safetensors`` and ``record.json`` (draws, latents, order, losses, times), and
``parity.safetensors`` (the trained LoRA, as sd-scripts saved it). With ``--timing`` nothing but
times and losses is noted, and an existing ``start.safetensors`` is required.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import itertools
import json
import os
import random
import re
import sys
import time
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

START = psutil.Process().create_time()
"""When this process started, seconds since the epoch."""


def install_torchvision_stand_in() -> None:
    """Give sd-scripts the four torchvision functions that it calls; there is no CPU build for every torch."""
    import numpy as np

    class ToTensor:
        def __call__(self, picture: Any) -> Tensor:
            pixels = torch.from_numpy(np.array(picture, copy=True))
            pixels = pixels[:, :, None] if pixels.ndim == 2 else pixels
            return pixels.permute(2, 0, 1).contiguous().to(torch.float32).div(255)

    class Normalize:
        def __init__(self, mean: list[float], std: list[float]) -> None:
            self.mean, self.std = torch.tensor(mean)[:, None, None], torch.tensor(std)[:, None, None]

        def __call__(self, tensor: Tensor) -> Tensor:
            return (tensor - self.mean) / self.std

    class Compose:
        def __init__(self, steps: list[Callable[[Any], Any]]) -> None:
            self.steps = steps

        def __call__(self, value: Any) -> Any:
            for step in self.steps:
                value = step(value)
            return value

    def pil_to_tensor(picture: Any) -> Tensor:
        return torch.from_numpy(np.array(picture, copy=True)).permute(2, 0, 1)

    root, transforms = types.ModuleType("torchvision"), types.ModuleType("torchvision.transforms")
    functional = types.ModuleType("torchvision.transforms.functional")
    transforms.__dict__.update(ToTensor=ToTensor, Normalize=Normalize, Compose=Compose, functional=functional)
    functional.__dict__.update(pil_to_tensor=pil_to_tensor)
    root.__dict__.update(transforms=transforms)
    # These look for torchvision when they are imported, and must not find the stand-in.
    importlib.import_module("transformers")
    importlib.import_module("diffusers")
    for module in (root, transforms, functional):
        sys.modules[module.__name__] = module


class Recorder:
    """What was noted of the run: tensors by name, and one JSON entry for each micro-step."""

    def __init__(self, photos: list[Path], everything: bool) -> None:
        self.everything = everything
        self.photos = photos
        self.tensors: dict[str, Tensor] = {}
        self.micro_steps: list[dict[str, Any]] = []
        self.began = 0.0
        self.optimizer: Any = None
        self.network: Any = None
        self.encoding: list[str] = []

    def keep(self, name: str, tensor: Tensor) -> None:
        """Note a tensor as it is now."""
        if self.everything:
            self.tensors[name] = tensor.detach().clone().cpu().contiguous()

    def picture(self, path: str) -> str:
        """Path of a picture relative to the data set that it is in."""
        for folder in self.photos:
            with contextlib.suppress(ValueError):
                return f"{folder.name}/{Path(path).relative_to(folder).as_posix()}"
        raise ValueError(f"{path} is in none of the data sets")

    def begin_step(self, batch: Any) -> None:
        """Note what a micro-batch consists of."""
        entry: dict[str, Any] = {
            "pictures": batch["noted_pictures"],
            "captions": list(batch["captions"]),
            "loss_weights": batch["loss_weights"].tolist(),
            "lrs": [float(group["lr"]) for group in self.optimizer.param_groups],
        }
        if batch["latents"] is not None:
            for path, latents in zip(entry["pictures"], batch["latents"], strict=True):
                self.keep(f"latents.{path}", latents)
        self.micro_steps.append(entry)
        if len(self.micro_steps) == 1:
            self.began = time.time()

    def end_step(self, epoch: int, loss: float) -> None:
        """Note what the micro-batch came to."""
        self.micro_steps[-1].update(epoch=epoch, loss=loss, done_s=time.time() - START)

    @contextlib.contextmanager
    def draws(self, step: int) -> Iterator[None]:
        """Note every random draw made inside, under the name of what it is for."""
        counts: dict[str, int] = {}

        def name(kind: str, shape: tuple[int, ...]) -> str:
            timesteps_drawn = counts.get("timesteps", 0) > 0
            if kind == "randn_like":
                label = "ip_noise" if counts.get("noise") else "noise"
            elif kind == "rand":
                label = "ip_noise_strength" if timesteps_drawn else "noise_offset_strength"
            elif kind == "randint":
                label = "timesteps"
            elif kind == "random":
                label = "multires_ratio"
            else:
                # Offset noise is one value for each channel; it comes before any multi-resolution noise.
                offset = shape[2:] == (1, 1) and not counts.get("multires_ratio")
                label = "noise_offset" if offset else "multires_noise"
            place = counts[label] = counts.get(label, 0) + 1
            many = label.startswith("multires")
            return f"step{step:03d}.{label}.{place - 1}" if many else f"step{step:03d}.{label}"

        def noting(kind: str, draw: Callable[..., Tensor]) -> Callable[..., Tensor]:
            def drawn(*args: Any, **kwargs: Any) -> Tensor:
                values = draw(*args, **kwargs)
                self.keep(name(kind, tuple(values.shape)), values)
                return values

            return drawn

        plain_random = random.random

        def drawn_random() -> float:
            value = plain_random()
            self.keep(name("random", ()), torch.tensor(value, dtype=torch.float64))
            return value

        originals = {kind: getattr(torch, kind) for kind in ("randn_like", "randn", "rand", "randint")}
        try:
            for kind, draw in originals.items():
                setattr(torch, kind, noting(kind, draw))
            random.random = drawn_random
            yield
        finally:
            for kind, draw in originals.items():
                setattr(torch, kind, draw)
            random.random = plain_random


def seeded_start(network: Any, path: Path, seed: int = 11) -> None:
    """Write a LoRA with small seeded weights for the modules of ``network``, up matrices not zero."""
    generator = torch.Generator().manual_seed(seed)
    tensors: dict[str, Tensor] = {}
    for module in [*network.text_encoder_loras, *network.unet_loras]:
        down, up = module.lora_down.weight, module.lora_up.weight
        bound = down[0].numel() ** -0.5
        tensors[f"{module.lora_name}.lora_down.weight"] = (
            torch.rand(down.shape, generator=generator) * 2 - 1
        ) * bound
        tensors[f"{module.lora_name}.lora_up.weight"] = torch.randn(up.shape, generator=generator) * 0.02
        tensors[f"{module.lora_name}.alpha"] = module.alpha.detach().clone().float()
    save_file(tensors, path)


def shrink_sdxl(model: Path) -> None:
    """Let sd-scripts build SDXL with as few layers as the file ``model`` has; it knows one size only."""
    unets: Any = importlib.import_module("library.sdxl_original_unet")
    model_util: Any = importlib.import_module("library.sdxl_model_util")
    with safe_open(model, framework="pt") as file:
        keys = list(file.keys())

    def count(pattern: str) -> int:
        return len({match[1] for match in (re.match(pattern, key) for key in keys) if match})

    depth = count(r"model\.diffusion_model\.middle_block\.1\.transformer_blocks\.(\d+)\.")
    text_layers = count(r"conditioner\.embedders\.1\.model\.transformer\.resblocks\.(\d+)\.")
    make_transformer, text_config = unets.Transformer2DModel.__init__, model_util.CLIPTextConfig

    def shallow(self: Any, *args: Any, num_transformer_layers: int = 1, **kwargs: Any) -> None:
        make_transformer(self, *args, num_transformer_layers=min(num_transformer_layers, depth), **kwargs)

    def shallow_text(**kwargs: Any) -> Any:
        if kwargs["hidden_size"] == 1280:
            kwargs["num_hidden_layers"] = text_layers
        return text_config(**kwargs)

    unets.Transformer2DModel.__init__ = shallow
    model_util.CLIPTextConfig = shallow_text


def note_run(
    recorder: Recorder,
    train_util: Any,
    strategy: Any,
    lora: Any,
    start: Path,
) -> None:
    """Put the notes that every family has into sd-scripts: pictures, optimizer and network of a run.

    Args:
        recorder: Takes the notes.
        train_util: sd-scripts' module.
        strategy: Class that caches latents.
        lora: The network's module.
        start: The LoRA that the network starts from; made if it is not there.
    """
    get_batch, cache_batch = train_util.BaseDataset.__getitem__, strategy.cache_batch_latents
    get_optimizer, create_network = train_util.get_optimizer, lora.create_network

    def noted_get_batch(self: Any, index: int) -> Any:
        batch = get_batch(self, index)
        if self.caching_mode is None:
            place = self.buckets_indices[index]
            keys = self.bucket_manager.buckets[place.bucket_index]
            first = place.batch_index * place.bucket_batch_size
            batch["noted_pictures"] = [
                recorder.picture(self.image_data[key].absolute_path)
                for key in keys[first : first + place.bucket_batch_size]
            ]
        return batch

    def noted_cache_batch(self: Any, vae: Any, infos: Any, *args: Any, **kwargs: Any) -> None:
        recorder.encoding = [recorder.picture(info.absolute_path) for info in infos]
        cache_batch(self, vae, infos, *args, **kwargs)
        recorder.encoding = []

    def noted_optimizer(args: Any, parameters: Any) -> Any:
        found = get_optimizer(args, parameters)
        recorder.optimizer = found[2]
        return found

    def noted_network(*args: Any, **kwargs: Any) -> Any:
        network = create_network(*args, **kwargs)
        if not start.exists():
            seeded_start(network, start)
        recorder.network = network
        return network

    train_util.BaseDataset.__getitem__ = noted_get_batch
    if recorder.everything:
        strategy.cache_batch_latents = noted_cache_batch
    train_util.get_optimizer = noted_optimizer
    lora.create_network = noted_network


def wrap(recorder: Recorder, trainer_class: Any, start: Path) -> None:
    """Put the notes into sd-scripts' functions."""
    wait_for_turn = importlib.import_module("turns").wait
    train_util: Any = importlib.import_module("library.train_util")
    lora: Any = importlib.import_module("networks.lora")
    strategy = importlib.import_module("library.strategy_sd").SdSdxlLatentsCachingStrategy
    autoencoder = importlib.import_module("diffusers").AutoencoderKL

    process_batch, add_loss = trainer_class.process_batch, train_util.LossRecorder.add
    get_noise = train_util.get_noise_noisy_latents_and_timesteps
    call_unet = trainer_class.call_unet

    encode = autoencoder.encode

    def noted_encode(self: Any, pixels: Tensor, *args: Any, **kwargs: Any) -> Any:
        encoded = encode(self, pixels, *args, **kwargs)
        for path, picture, mean in zip(recorder.encoding, pixels, encoded.latent_dist.mean, strict=False):
            recorder.keep(f"pixels.{path}", ((picture + 1) * 127.5).round().to(torch.uint8))
            recorder.keep(f"latent_mean.{path}", mean)
        return encoded

    def noted_process_batch(self: Any, batch: Any, *args: Any, **kwargs: Any) -> Tensor:
        step = len(recorder.micro_steps)
        recorder.begin_step(batch)
        if batch.get("input_ids_list") is not None:
            recorder.keep(f"step{step:03d}.input_ids", batch["input_ids_list"][0])
        return process_batch(self, batch, *args, **kwargs)  # type: ignore[no-any-return]

    def noted_noise(args: Any, scheduler: Any, latents: Tensor) -> Any:
        step = len(recorder.micro_steps) - 1
        with recorder.draws(step) if recorder.everything else contextlib.nullcontext():
            noise, noisy_latents, timesteps = get_noise(args, scheduler, latents)
        recorder.keep(f"step{step:03d}.target_noise", noise)
        recorder.keep(f"step{step:03d}.noisy_latents", noisy_latents)
        recorder.micro_steps[-1]["timesteps"] = timesteps.tolist()
        return noise, noisy_latents, timesteps

    def noted_call_unet(
        self: Any, args: Any, accelerator: Any, unet: Any, *rest: Any, **kwargs: Any
    ) -> Tensor:
        prediction: Tensor = call_unet(self, args, accelerator, unet, *rest, **kwargs)
        step = len(recorder.micro_steps) - 1
        recorder.keep(f"step{step:03d}.prediction", prediction)
        if step < 2:
            for place, condition in enumerate(rest[2]):
                recorder.keep(f"step{step:03d}.context{place or ''}", condition)
            sizes = [rest[3][key] for key in ("original_sizes_hw", "crop_top_lefts", "target_sizes_hw")]
            recorder.keep(f"step{step:03d}.time_ids", torch.cat(sizes, dim=1))
        return prediction

    def noted_add(self: Any, *, epoch: int, step: int, loss: float) -> None:
        recorder.end_step(epoch, loss)
        if len(recorder.micro_steps) == 1:
            for name, value in recorder.network.state_dict().items():
                recorder.keep(f"after1.{name}", value)
        add_loss(self, epoch=epoch, step=step, loss=loss)
        wait_for_turn()

    note_run(recorder, train_util, strategy, lora, start)
    if recorder.everything:
        autoencoder.encode = noted_encode
    trainer_class.process_batch = noted_process_batch
    trainer_class.call_unet = noted_call_unet
    train_util.LossRecorder.add = noted_add
    train_util.get_noise_noisy_latents_and_timesteps = noted_noise


def dataset_facts(train_util: Any) -> list[dict[str, Any]]:
    """A list that fills with what each bucketed data set of the run came to."""
    facts: list[dict[str, Any]] = []
    make_buckets = train_util.BaseDataset.make_buckets

    def noted(self: Any) -> None:
        make_buckets(self)
        info = self.bucket_info or {"buckets": {}, "mean_img_ar_error": 0.0}
        facts.append(
            {
                "buckets": {
                    "x".join(map(str, bucket["resolution"])): bucket["count"]
                    for bucket in info["buckets"].values()
                },
                "mean_aspect_error": float(info["mean_img_ar_error"]),
                "batches": len(self.buckets_indices),
            }
        )

    train_util.BaseDataset.make_buckets = noted
    return facts


def peak_memory_bytes() -> int:
    """Largest resident size of this process so far."""
    info = psutil.Process().memory_info()
    if hasattr(info, "peak_wset"):  # Windows
        return int(info.peak_wset)
    import resource

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("case")
    parser.add_argument("--source", type=Path, required=True, help="folder of sd-scripts")
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--photos", type=Path, required=True)
    parser.add_argument("--reg-photos", type=Path, help="those of --photos, if not given")
    parser.add_argument("--tokenizers", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--steps", type=int, help="instead of the case's own number")
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=JSON", help="change the case's JSON"
    )
    parser.add_argument("--timing", action="store_true", help="note times and losses only")
    options = parser.parse_args()

    sys.path.insert(0, str(Path(__file__).resolve().parent))
    cases = importlib.import_module("cases")
    out: Path = options.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    photos, reg_photos = options.photos.resolve(), (options.reg_photos or options.photos).resolve()
    start = out / "start.safetensors"
    if options.timing and not start.exists():
        raise SystemExit(f"{start}: copy the starting LoRA of the recorded case here first")
    config = cases.kohya_json(
        options.case,
        model=options.model.resolve(),
        photos=photos,
        reg_photos=reg_photos,
        output=out,
        network_weights=start,
        steps=options.steps,
    )
    config.update((key, json.loads(value)) for key, _, value in (item.partition("=") for item in options.set))
    (out / "case.json").write_text(json.dumps(config, indent=2), encoding="utf-8")
    tokenizers = options.tokenizers.resolve()

    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    torch.set_num_threads(options.threads)
    install_torchvision_stand_in()
    os.chdir(options.source)
    sys.path.insert(0, str(options.source.resolve()))
    toml = importlib.import_module("toml")
    values, extra = cases.engine_options(config)
    values["tokenizer_cache_dir"] = str(tokenizers)
    (out / "sd-scripts.toml").write_text(toml.dumps(values), encoding="utf-8")

    family = "flux" if config.get("flux1_checkbox") else "sdxl" if config.get("sdxl") else "sd"
    name, trainer = {
        "sd": ("train_network", "NetworkTrainer"),
        "sdxl": ("sdxl_train_network", "SdxlNetworkTrainer"),
        "flux": ("flux_train_network", "FluxNetworkTrainer"),
    }[family]
    script = importlib.import_module(name)
    trainer_class = getattr(script, trainer)
    train_util = importlib.import_module("library.train_util")
    recorder = Recorder([photos, reg_photos], everything=not options.timing)
    notes = wrap
    if family == "sdxl":
        shrink_sdxl(Path(config["pretrained_model_name_or_path"]))
    elif family == "flux":
        flux = importlib.import_module("run_sdscripts_flux")
        flux.fit(config)
        notes = flux.wrap
    notes(recorder, trainer_class, start)
    facts = dataset_facts(train_util)

    sys.argv = [f"{name}.py", "--config_file", str(out / "sd-scripts.toml"), *extra]
    arguments = script.setup_parser()
    args = arguments.parse_args()
    train_util.verify_command_line_training_args(args)
    args = train_util.read_config_from_file(args, arguments)
    trainer_class().train(args)

    steps = recorder.micro_steps
    report = {
        "case": options.case,
        "program": "sd-scripts",
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "datasets": facts,
        "micro_steps": steps,
        "first_step_began_s": recorder.began - START,
        "first_step_done_s": steps[0]["done_s"],
        "step_s": [later["done_s"] - earlier["done_s"] for earlier, later in itertools.pairwise(steps)],
        "total_s": time.time() - START,
        "peak_memory_bytes": peak_memory_bytes(),
    }
    if recorder.everything:
        save_file(recorder.tensors, out / "record.safetensors")
    (out / "record.json").write_text(json.dumps(report, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
