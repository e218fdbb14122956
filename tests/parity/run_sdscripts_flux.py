"""Run a FLUX case in kohya-ss/sd-scripts and record what it does, as `run_sdscripts` does for SD.

    python run_sdscripts_flux.py CASE --source sd-scripts --model FOLDER/flux1-dev.safetensors --photos PHOTOS \
        --tokenizers FOLDER --out RECORD

The files come from `make_flux`. sd-scripts is unmodified but for two things: it builds its models as wide and deep
as the files are (it knows FLUX.1's own sizes only), and its CLIP-L gets the activation that CLIP-L has,
quick_gelu; as shipped it runs with gelu (a dict in flux_utils.py names the setting twice).
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import importlib
import itertools
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent))
common: Any = importlib.import_module("run_sdscripts")


def sizes(path: Path) -> dict[str, tuple[int, ...]]:
    """Shapes of a file."""
    with safe_open(path, framework="pt") as file:
        return {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118


def fit(config: dict[str, Any]) -> None:
    """Let sd-scripts build models of the files' sizes."""
    models: Any = importlib.import_module("library.flux_models")
    utils: Any = importlib.import_module("library.flux_utils")
    flux, clip, t5 = (
        sizes(Path(config[key])) for key in ("pretrained_model_name_or_path", "clip_l", "t5xxl")
    )
    width, head = flux["img_in.weight"][0], flux["double_blocks.0.img_attn.norm.query_norm.scale"][0]
    first = 16 if head == 128 else head // 8 // 2 * 2
    dev = models.configs["dev"]
    params = dataclasses.replace(
        dev.params,
        hidden_size=width,
        num_heads=width // head,
        vec_in_dim=flux["vector_in.in_layer.weight"][1],
        context_in_dim=flux["txt_in.weight"][1],
        axes_dim=[first, (head - first) // 2, (head - first) // 2],
    )
    ae_params = dataclasses.replace(dev.ae_params, ch=32, ch_mult=[1, 1, 1, 1], num_res_blocks=1)
    models.configs["dev"] = dataclasses.replace(dev, params=params, ae_params=ae_params)
    clip_config, t5_config = utils.CLIPConfig, utils.T5Config

    def small_clip(**values: Any) -> Any:
        hidden = clip["text_model.final_layer_norm.weight"][0]
        layers = {key.split(".")[3] for key in clip if key.startswith("text_model.encoder.layers.")}
        return clip_config(
            **{
                **values,
                "hidden_size": hidden,
                "projection_dim": hidden,
                "intermediate_size": clip["text_model.encoder.layers.0.mlp.fc1.weight"][0],
                "num_attention_heads": max(1, hidden // 64),
                "num_hidden_layers": len(layers),
                "hidden_act": "quick_gelu",
            }
        )

    def small_t5(**values: Any) -> Any:
        start = "encoder.block.0.layer"
        heads = t5[f"{start}.0.SelfAttention.relative_attention_bias.weight"][1]
        return t5_config(
            **{
                **values,
                "d_model": t5["shared.weight"][1],
                "num_heads": heads,
                "d_kv": t5[f"{start}.0.SelfAttention.q.weight"][0] // heads,
                "d_ff": t5[f"{start}.1.DenseReluDense.wi_0.weight"][0],
                "num_layers": len({key.split(".")[2] for key in t5 if key.startswith("encoder.block.")}),
            }
        )

    load_t5 = utils.load_t5xxl

    def load_t5xxl(path: str, dtype: Any, device: Any, **options: Any) -> Any:
        # The file leaves out the second name of the embedding.
        state = importlib.import_module("safetensors.torch").load_file(path)
        state["encoder.embed_tokens.weight"] = state["shared.weight"]
        state = {key: value.to(dtype) if dtype else value for key, value in state.items()}
        return load_t5(path, dtype, device, state_dict=state)

    utils.CLIPConfig, utils.T5Config, utils.load_t5xxl = small_clip, small_t5, load_t5xxl


def seeded_start(network: Any, path: Path, seed: int = 11) -> None:
    """Write a LoRA with small seeded weights for the modules of ``network``, up matrices not zero."""
    generator = torch.Generator().manual_seed(seed)
    tensors: dict[str, Tensor] = {}
    for module in [*network.text_encoder_loras, *network.unet_loras]:
        down, up = module.lora_down.weight, module.lora_up.weight
        tensors[f"{module.lora_name}.lora_down.weight"] = (
            torch.rand(down.shape, generator=generator) * 2 - 1
        ) * down.shape[1] ** -0.5
        tensors[f"{module.lora_name}.lora_up.weight"] = torch.randn(up.shape, generator=generator) * 0.02
        tensors[f"{module.lora_name}.alpha"] = module.alpha.detach().clone().float()
    save_file(tensors, path)


def wrap(recorder: Any, trainer_class: Any, start: Path) -> None:
    """Put the notes into sd-scripts' functions."""
    train_util: Any = importlib.import_module("library.train_util")
    lora: Any = importlib.import_module("networks.lora_flux")
    models: Any = importlib.import_module("library.flux_models")
    flux_train_utils: Any = importlib.import_module("library.flux_train_utils")
    strategy = importlib.import_module("library.strategy_flux").FluxLatentsCachingStrategy

    process_batch, add_loss = trainer_class.process_batch, train_util.LossRecorder.add
    predict, create_network = trainer_class.get_noise_pred_and_target, lora.create_network
    get_optimizer, get_batch = train_util.get_optimizer, train_util.BaseDataset.__getitem__
    get_noisy = flux_train_utils.get_noisy_model_input_and_timesteps
    cache_batch, encode = strategy.cache_batch_latents, models.AutoEncoder.encode

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

    def noted_encode(self: Any, pixels: Tensor) -> Tensor:
        encoded: Tensor = encode(self, pixels)
        for path, picture, latents in zip(recorder.encoding, pixels, encoded, strict=False):
            recorder.keep(f"pixels.{path}", ((picture + 1) * 127.5).round().to(torch.uint8))
            recorder.keep(f"latents.{path}", latents)
        return encoded

    def noted_process_batch(self: Any, batch: Any, *args: Any, **kwargs: Any) -> Tensor:
        entry: dict[str, Any] = {
            "pictures": batch["noted_pictures"],
            "captions": list(batch["captions"]),
            "loss_weights": batch["loss_weights"].tolist(),
            "lrs": [float(group["lr"]) for group in recorder.optimizer.param_groups],
        }
        for path, latents in zip(entry["pictures"], batch["latents"], strict=True):
            recorder.keep(f"latents.{path}", latents)
        recorder.micro_steps.append(entry)
        if len(recorder.micro_steps) == 1:
            recorder.began = time.time()
        return process_batch(self, batch, *args, **kwargs)  # type: ignore[no-any-return]

    def noted_predict(
        self: Any, args: Any, accelerator: Any, scheduler: Any, latents: Tensor, *rest: Any, **kwargs: Any
    ) -> Any:
        step = len(recorder.micro_steps) - 1
        like = torch.randn_like

        def first_noise(*a: Any, **k: Any) -> Tensor:
            values = like(*a, **k)
            recorder.keep(f"step{step:03d}.noise", values)
            torch.randn_like = like
            return values

        torch.randn_like = first_noise
        found = predict(self, args, accelerator, scheduler, latents, *rest, **kwargs)
        recorder.keep(f"step{step:03d}.prediction", found[0])
        if step < 2:
            pooled, states = rest[1][:2]
            recorder.keep(f"step{step:03d}.context", states)
            recorder.keep(f"step{step:03d}.pooled", pooled)
        recorder.micro_steps[-1]["timesteps"] = found[2].tolist()
        return found

    def noted_noisy(*args: Any, **kwargs: Any) -> Any:
        step = len(recorder.micro_steps) - 1
        originals = {name: getattr(torch, name) for name in ("randn", "rand", "randn_like")}
        seen: list[str] = []

        def noting(kind: str) -> Any:
            def drawn(*a: Any, **k: Any) -> Tensor:
                values: Tensor = originals[kind](*a, **k)
                name = "ip_noise" if kind == "randn_like" else "ip_noise_strength" if seen else "sigma"
                seen.append(name)
                recorder.keep(f"step{step:03d}.{name}", values)
                return values

            return drawn

        try:
            for kind in originals:
                setattr(torch, kind, noting(kind))
            found = get_noisy(*args, **kwargs)
        finally:
            for kind, draw in originals.items():
                setattr(torch, kind, draw)
        recorder.keep(f"step{step:03d}.noisy_latents", found[0])
        return found

    def noted_add(self: Any, *, epoch: int, step: int, loss: float) -> None:
        recorder.micro_steps[-1].update(epoch=epoch, loss=loss, done_s=time.time() - common.START)
        add_loss(self, epoch=epoch, step=step, loss=loss)

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
    strategy.cache_batch_latents = noted_cache_batch
    models.AutoEncoder.encode = noted_encode
    trainer_class.process_batch = noted_process_batch
    trainer_class.get_noise_pred_and_target = noted_predict
    flux_train_utils.get_noisy_model_input_and_timesteps = noted_noisy
    train_util.LossRecorder.add = noted_add
    train_util.get_optimizer = noted_optimizer
    lora.create_network = noted_network


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("case")
    parser.add_argument("--source", type=Path, required=True, help="folder of sd-scripts")
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--photos", type=Path, required=True)
    parser.add_argument("--tokenizers", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, help="instead of the case's own number")
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=JSON", help="change the case's JSON"
    )
    options = parser.parse_args()
    cases = importlib.import_module("cases")
    out: Path = options.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    photos, start = options.photos.resolve(), out / "start.safetensors"
    config = cases.kohya_json(
        options.case,
        model=options.model.resolve(),
        photos=photos,
        reg_photos=photos,
        output=out,
        network_weights=start,
        steps=options.steps,
    )
    config.update((key, json.loads(value)) for key, _, value in (item.partition("=") for item in options.set))
    (out / "case.json").write_text(json.dumps(config, indent=2), encoding="utf-8")
    tokenizers = options.tokenizers.resolve()
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    torch.set_num_threads(1)
    common.install_torchvision_stand_in()
    os.chdir(options.source)
    sys.path.insert(0, str(options.source.resolve()))
    toml = importlib.import_module("toml")
    values, extra = cases.engine_options(config)
    values["tokenizer_cache_dir"] = str(tokenizers)
    (out / "sd-scripts.toml").write_text(toml.dumps(values), encoding="utf-8")
    script = importlib.import_module("flux_train_network")
    train_util = importlib.import_module("library.train_util")
    fit(config)
    recorder = common.Recorder([photos], everything=True)
    wrap(recorder, script.FluxNetworkTrainer, start)
    facts = common.dataset_facts(train_util)
    sys.argv = ["flux_train_network.py", "--config_file", str(out / "sd-scripts.toml"), *extra]
    arguments = script.setup_parser()
    args = arguments.parse_args()
    train_util.verify_command_line_training_args(args)
    args = train_util.read_config_from_file(args, arguments)
    with contextlib.suppress(SystemExit):
        script.FluxNetworkTrainer().train(args)
    steps = recorder.micro_steps
    report = {
        "case": options.case,
        "program": "sd-scripts",
        "threads": 1,
        "torch": torch.__version__,
        "datasets": facts,
        "micro_steps": steps,
        "step_s": [later["done_s"] - earlier["done_s"] for earlier, later in itertools.pairwise(steps)],
        "total_s": time.time() - common.START,
        "peak_memory_bytes": common.peak_memory_bytes(),
    }
    save_file(recorder.tensors, out / "record.safetensors")
    (out / "record.json").write_text(json.dumps(report, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
