"""What `run_sdscripts` does to sd-scripts for a FLUX case.

The files come from `make_flux`. sd-scripts is unmodified but for two things: it builds its models as wide and deep
as the files are (it knows FLUX.1's own sizes only), and its CLIP-L gets the activation that CLIP-L has,
quick_gelu; as shipped it runs with gelu (a dict in flux_utils.py names the setting twice).
"""

from __future__ import annotations

import dataclasses
import importlib
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor


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


def wrap(recorder: Any, trainer_class: Any, start: Path) -> None:
    """Put the notes into sd-scripts' functions."""
    train_util: Any = importlib.import_module("library.train_util")
    lora: Any = importlib.import_module("networks.lora_flux")
    models: Any = importlib.import_module("library.flux_models")
    flux_train_utils: Any = importlib.import_module("library.flux_train_utils")
    strategy = importlib.import_module("library.strategy_flux").FluxLatentsCachingStrategy

    process_batch, add_loss = trainer_class.process_batch, train_util.LossRecorder.add
    predict = trainer_class.get_noise_pred_and_target
    get_noisy = flux_train_utils.get_noisy_model_input_and_timesteps
    encode = models.AutoEncoder.encode

    def noted_encode(self: Any, pixels: Tensor) -> Tensor:
        encoded: Tensor = encode(self, pixels)
        for path, picture, latents in zip(recorder.encoding, pixels, encoded, strict=False):
            recorder.keep(f"pixels.{path}", ((picture + 1) * 127.5).round().to(torch.uint8))
            recorder.keep(f"latents.{path}", latents)
        return encoded

    def noted_process_batch(self: Any, batch: Any, *args: Any, **kwargs: Any) -> Tensor:
        recorder.begin_step(batch)
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
        recorder.end_step(epoch, loss)
        add_loss(self, epoch=epoch, step=step, loss=loss)

    importlib.import_module("run_sdscripts").note_run(recorder, train_util, strategy, lora, start)
    models.AutoEncoder.encode = noted_encode
    trainer_class.process_batch = noted_process_batch
    trainer_class.get_noise_pred_and_target = noted_predict
    flux_train_utils.get_noisy_model_input_and_timesteps = noted_noisy
    train_util.LossRecorder.add = noted_add
