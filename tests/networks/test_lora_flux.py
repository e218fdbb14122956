"""The Flux1 network: names, shapes and alphas of sd-scripts for every option, and split_qkv's file."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from tests import hollow, tiny_flux
from tests.parity.list_flux_keys import CASES, WITH_TEXT, compact
from trainer import config as configuration
from trainer.draws import Draws
from trainer.errors import ConfigError, ModelFileError
from trainer.families.flux import Flux
from trainer.job import Job
from trainer.lora_file import LoraFile
from trainer.networks._names import kohya_tensors
from trainer.networks.lora_flux import FluxLoraNetwork, PerturbedLoraLayer, SplitLoraLayer

GOLDEN: dict[str, Any] = json.loads(
    (Path(__file__).parents[1] / "parity" / "golden" / "flux_keys.json").read_text(encoding="utf-8")
)
FIELDS = configuration.KohyaConfig.model_fields


@pytest.fixture(scope="module")
def full(tmp_path_factory: pytest.TempPathFactory) -> tuple[Flux, Path]:
    """FLUX.1 dev on the meta device, text encoders included."""
    folder = tmp_path_factory.mktemp("full")
    files = {field: str(path) for field, path in hollow.flux(folder).items()}
    run = job(folder, train_t5xxl=True, **files)
    return Flux.load(run, torch.device("meta"), torch.float32, lambda _: None), folder


def job(folder: Path, **values: Any) -> Job:
    settings = tiny_flux.settings(
        folder,
        **{
            "network_dim": 16,
            "network_alpha": 8,
            "text_encoder_lr": 1e-4,
            "flux1_cache_text_encoder_outputs": False,
            **values,
        },
    )
    return Job.from_config(configuration.loads(settings).config, base=folder)


def options(args: Mapping[str, str]) -> dict[str, Any]:
    """Network options as fields of the configuration, or as additional parameters where there is none."""
    fields: dict[str, Any] = {name: value for name, value in args.items() if name in FIELDS}
    fields |= {name: value == "True" for name, value in fields.items() if value in ("True", "False")}
    rest = [f'"{name}={value}"' for name, value in args.items() if name not in FIELDS]
    return fields | ({"additional_parameters": f"--network_args {' '.join(rest)}"} if rest else {})


def listed(network: FluxLoraNetwork, *, split: bool = False) -> list[tuple[str, str]]:
    found = []
    for layer in network.layers:
        tensors = layer.tensors() if split else None
        name = layer.target[0].name
        down = tensors[f"{name}.lora_down.weight"] if tensors else layer.lora_down
        up = tensors[f"{name}.lora_up.weight"] if tensors else layer.lora_up
        shapes = ["x".join(map(str, each.shape)) for each in (down, up)]
        found.append((name, f"{shapes[0]} {shapes[1]} {layer.alpha:g}"))
    return found


@pytest.mark.parametrize("case", CASES)
def test_modules_are_those_of_sd_scripts(case: str, full: tuple[Flux, Path]) -> None:
    family, folder = full
    values = options(CASES[case])
    if case not in WITH_TEXT:
        values["text_encoder_lr"] = 0
    network = FluxLoraNetwork.create(family, job(folder, **values), Draws(1), lambda _: None)
    assert isinstance(network, FluxLoraNetwork)
    assert GOLDEN[case]["args"] == CASES[case]
    ours = compact(listed(network, split=case == "split_qkv"))
    assert ours["modules"] == GOLDEN[case]["modules"]
    assert ours["order"] == GOLDEN[case]["order"]


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> tuple[Flux, Path]:
    folder = tmp_path_factory.mktemp("small")
    loaded = Flux.load(job(folder), torch.device("cpu"), torch.float32, lambda _: None)
    return loaded, folder


def network_of(small: tuple[Flux, Path], **values: Any) -> FluxLoraNetwork:
    family, folder = small
    made = FluxLoraNetwork.create(family, job(folder, **values), Draws(1), lambda _: None)
    assert isinstance(made, FluxLoraNetwork)
    return made


def randomise(network: FluxLoraNetwork, seed: int = 0) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)


def test_split_qkv_file_has_the_strength_that_was_trained(small: tuple[Flux, Path]) -> None:
    network = network_of(small, split_qkv=True, network_dim=4, network_alpha=3, text_encoder_lr=0)
    randomise(network)
    split = [layer for layer in network.layers if isinstance(layer, SplitLoraLayer)]
    assert len(split) == 2 * 2 + 2
    for layer in split:
        base = layer.target[0].module
        x = torch.randn(2, 5, base.weight.shape[1], generator=torch.Generator().manual_seed(1))
        plain = base(x)
        layer.attach()
        change = base(x) - plain
        layer.detach()
        name = layer.target[0].name
        saved = layer.tensors()
        down, up = saved[f"{name}.lora_down.weight"], saved[f"{name}.lora_up.weight"]
        scale = float(saved[f"{name}.alpha"]) / len(down)
        torch.testing.assert_close(change, x @ down.T @ up.T * scale, rtol=1e-4, atol=1e-5)
        norm = torch.linalg.norm(up @ down * scale)
        torch.testing.assert_close(layer.product_norm(), norm, rtol=1e-5, atol=1e-6)


def test_split_qkv_goes_on_from_its_own_file_and_from_a_plain_one(small: tuple[Flux, Path]) -> None:
    values: dict[str, Any] = {"network_dim": 4, "network_alpha": 3, "text_encoder_lr": 0}
    first = network_of(small, split_qkv=True, **values)
    randomise(first)
    again = network_of(small, split_qkv=True, **values)
    assert again.load_state_dict(first.state_dict()) == []
    for one, other in zip(first.parameters(), again.parameters(), strict=True):
        assert torch.equal(one, other)
    assert [layer.alpha for layer in again.layers] == [3] * len(again.layers)

    plain = network_of(small, **values)
    randomise(plain)
    assert again.load_state_dict(plain.state_dict()) == []
    for whole, parts in zip(plain.layers, again.layers, strict=True):
        torch.testing.assert_close(parts.product_norm(), whole.product_norm(), rtol=1e-5, atol=1e-6)
    with pytest.raises(ModelFileError, match=r"set network_dim to the file.s rank"):
        network_of(small, split_qkv=True, network_dim=8).load_state_dict(plain.state_dict())


def test_groups_and_rates(small: tuple[Flux, Path]) -> None:
    values: dict[str, Any] = {"text_encoder_lr": 1e-4, "unet_lr": 2e-4, "train_t5xxl": True}
    groups = network_of(small, **values, t5xxl_lr=5e-5, loraplus_unet_lr_ratio=4).param_groups()
    assert [(group.name, group.lr) for group in groups] == [
        ("textencoder 1 ", 1e-4),
        ("textencoder 2 ", 5e-5),
        ("unet", 2e-4),
        ("unet plus", 8e-4),
    ]
    groups = network_of(small, **values).param_groups()
    assert [(group.name, group.lr) for group in groups][1] == ("textencoder 2 ", 1e-4)
    extra = '--network_args "network_reg_lrs=single_blocks_1_=0.5,te1_=0.25"'
    groups = network_of(small, text_encoder_lr=1e-4, additional_parameters=extra).param_groups()
    assert [(group.name, group.lr, len(group.params)) for group in groups] == [
        ("textencoder 1  reg_lr_1", 0.25, 2 * 12),
        ("unet reg_lr_0", 0.5, 2 * 3),
        ("unet", 1e-3, 2 * (2 * 10 + 3)),
    ]


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"train_double_block_indices": "3-19"}, "from 0 to 18"),
        ({"train_single_block_indices": "5-2"}, "from 0 to 37"),
        ({"in_dims": "1,2"}, "five ranks"),
        ({"img_attn_dim": "four"}, "expected a number"),
        ({"additional_parameters": "--network_args train_blocks=some"}, "all, double and single"),
        ({"additional_parameters": "--network_args network_reg_dims=abc"}, "regex=number"),
        ({"train_lora_ggpo": True, "split_qkv": True}, "exclude each other"),
    ],
)
def test_what_cannot_be_is_said(small: tuple[Flux, Path], values: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        network_of(small, **values)


def test_ggpo_adds_the_noise_of_its_formula(small: tuple[Flux, Path]) -> None:
    """LoRA-GGPO as sd-scripts has it, beside dense matrices in float64."""
    values = {
        "train_lora_ggpo": True,
        "ggpo_sigma": 0.3,
        "ggpo_beta": 0.1,
        "network_alpha": 2,
        "network_dim": 4,
    }
    network = network_of(small, **values)
    randomise(network)
    assert all(isinstance(layer, PerturbedLoraLayer) for layer in network.layers)
    said = json.loads(network.metadata()["ss_network_args"])
    assert {name: said[name] for name in ("ggpo_sigma", "ggpo_beta")} == {
        "ggpo_sigma": "0.3",
        "ggpo_beta": "0.1",
    }
    layer = next(layer for layer in network.layers if layer.target[0].name.endswith("1_linear1"))
    assert isinstance(layer, PerturbedLoraLayer)
    base = layer.target[0].module
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(2, 5, base.weight.shape[1], generator=generator, requires_grad=True)
    network.attach()
    network.train()
    plain = base(x)
    plain.square().sum().backward()
    assert x.grad is not None
    slope, x.grad = x.grad.clone(), None
    network.before_update()
    torch.manual_seed(11)
    out = base(x)
    torch.manual_seed(11)
    noise = torch.randn(base.weight.shape).double()

    weight, up, down = base.weight.double(), layer.lora_up.double(), layer.lora_down.double()
    assert layer.lora_up.grad is not None
    assert layer.lora_down.grad is not None
    grad = 2 / 4 * (up @ layer.lora_down.grad.double() + layer.lora_up.grad.double() @ down)
    norms = (weight.norm(dim=1).mean() ** 2 + (up @ down).square().sum(1, keepdim=True)).sqrt()
    spread = (0.3 * norms + 0.1 * grad.norm(dim=1, keepdim=True) ** 2) / len(weight) ** 0.5
    torch.testing.assert_close(out - plain, (x.double() @ (noise * spread).T).float(), rtol=1e-3, atol=1e-4)
    # the noise has no gradient: only the weights' own path to x is there
    (out * (2 * plain.detach())).sum().backward()
    torch.testing.assert_close(x.grad, slope)
    network.train(False)
    assert torch.equal(base(x), plain)
    network.detach()
    none = network_of(
        small, train_lora_ggpo=True, ggpo_beta=0
    )  # Kohya drops a zero, and one alone does nothing
    assert not any(isinstance(layer, PerturbedLoraLayer) for layer in none.layers)


def test_diffusers_files_are_read_as_fused_layers(small: tuple[Flux, Path]) -> None:
    """PEFT names: to_q, to_k, to_v (and proj_mlp) become the fused layer, with their own ranks."""
    family, _ = small
    width, generator = tiny_flux.WIDTH, torch.Generator().manual_seed(3)
    parts = {"attn.to_q": width, "attn.to_k": width, "attn.to_v": width, "proj_mlp": 4 * width}
    tensors = {}
    for part, rows in parts.items():
        start = f"transformer.single_transformer_blocks.1.{part}"
        tensors[f"{start}.lora_A.weight"] = torch.randn(2, width, generator=generator)
        tensors[f"{start}.lora_B.weight"] = torch.randn(rows, 2, generator=generator)
    expected = torch.cat(
        [
            tensors[f"transformer.single_transformer_blocks.1.{part}.lora_B.weight"]
            @ tensors[f"transformer.single_transformer_blocks.1.{part}.lora_A.weight"]
            for part in parts
        ]
    )
    start = "transformer.transformer_blocks.0.attn.to_out.0"
    tensors[f"{start}.lora_A.weight"] = torch.randn(2, width, generator=generator)
    tensors[f"{start}.lora_B.weight"] = torch.randn(width, 2, generator=generator)
    found = kohya_tensors(LoraFile(tensors), family)
    name = "lora_unet_single_blocks_1_linear1"
    assert {key.partition(".")[0] for key in found} == {name, "lora_unet_double_blocks_0_img_attn_proj"}
    down, up = found[f"{name}.lora_down.weight"], found[f"{name}.lora_up.weight"]
    scale = float(found.get(f"{name}.alpha", torch.tensor(len(down)))) / len(down)
    torch.testing.assert_close(up @ down * scale, expected)
