"""LoRA layers against the formula W + up @ down * alpha / r, and the network as sd-scripts builds it."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, cast

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from tests.networks.small import family, full_size, job
from trainer.draws import Draws
from trainer.errors import ConfigError, ModelFileError
from trainer.families._base import Family, Target
from trainer.lora_file import save
from trainer.networks.lora import LoraLayer, LoraNetwork

BASES: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "linear": (lambda: nn.Linear(6, 5), (3, 7, 6)),
    "linear on vectors": (lambda: nn.Linear(6, 5), (3, 6)),
    "linear on four axes": (lambda: nn.Linear(6, 5), (2, 3, 4, 6)),
    "conv 1x1": (lambda: nn.Conv2d(6, 5, 1), (3, 6, 4, 4)),
    "conv 3x3": (lambda: nn.Conv2d(6, 5, 3, padding=1), (3, 6, 4, 5)),
    "conv 3x3 stride 2": (lambda: nn.Conv2d(6, 5, 3, stride=2, padding=1), (3, 6, 8, 8)),
}


def silent(line: str) -> None:
    pass


def target(module: nn.Module, name: str = "lora_unet_x", **values: Any) -> Target:
    return Target(name=name, module=cast(nn.Linear, module), part="unet", **values)


def filled(module: nn.Module, rank: int = 3, alpha: float = 1.5, **values: Any) -> LoraLayer:
    """A layer whose up weight is not zero."""
    layer = LoraLayer(target(module), rank, alpha, generator=torch.Generator().manual_seed(0), **values)
    nn.init.normal_(layer.lora_up)
    return layer


def composed(layer: LoraLayer) -> Tensor:
    """up @ down * alpha / r in float64, for a convolution as the kernel of both in a row."""
    down, up = layer.lora_down.detach().double(), layer.lora_up.detach().double()
    scale = float(layer.alpha) / down.shape[0]
    if down.ndim == 2:
        return up @ down * scale
    return torch.einsum("or,rikl->oikl", up[:, :, 0, 0], down) * scale


def merged(module: nn.Module, layer: LoraLayer, x: Tensor) -> Tensor:
    weight = cast(Tensor, module.weight).double() + composed(layer)
    bias = cast(Tensor, module.bias).double()
    if isinstance(module, nn.Conv2d):
        return functional.conv2d(x.double(), weight, bias, module.stride, module.padding)
    return functional.linear(x.double(), weight, bias)


@pytest.mark.parametrize("kind", BASES)
def test_attached_equals_merged(kind: str) -> None:
    make, shape = BASES[kind]
    torch.manual_seed(0)
    module, x = make(), torch.randn(shape)
    before = module(x)
    layer = filled(module)
    layer.attach()
    assert torch.allclose(module(x).double(), merged(module, layer, x), atol=1e-6)
    layer.multiplier = 0
    assert torch.equal(module(x), before)
    layer.detach()
    assert torch.equal(module(x), before)
    assert "forward" not in vars(module)


@pytest.mark.parametrize("kind", BASES)
def test_gradients_are_those_of_the_merged_weight(kind: str) -> None:
    make, shape = BASES[kind]
    torch.manual_seed(0)
    module, x = make().double(), torch.randn(shape, dtype=torch.double, requires_grad=True)
    layer = filled(module).double()
    layer.attach()
    pairs = torch.autograd.grad(module(x).square().sum(), [x, layer.lora_down, layer.lora_up])
    down, up = (p.detach().clone().requires_grad_(True) for p in (layer.lora_down, layer.lora_up))
    weight = (
        cast(Tensor, module.weight)
        + (up.flatten(1) @ down.flatten(1)).view(cast(Tensor, module.weight).shape) * 0.5
    )
    bias = cast(Tensor, module.bias)
    if isinstance(module, nn.Conv2d):
        out = functional.conv2d(x, weight, bias, module.stride, module.padding)
    else:
        out = functional.linear(x, weight, bias)
    for ours, theirs in zip(pairs, torch.autograd.grad(out.square().sum(), [x, down, up]), strict=True):
        assert torch.allclose(ours, theirs)
    assert module.weight.grad is None
    assert not module.weight.requires_grad


def test_a_forward_that_was_patched_before_comes_back() -> None:
    module = nn.Linear(2, 2)
    original = module.forward
    module.forward = lambda x: original(x) + 1  # type: ignore[method-assign, assignment]
    x = torch.ones(1, 2)
    expected = module(x)
    layer = filled(module)
    layer.attach()
    layer.attach()  # a second time changes nothing
    assert not torch.equal(module(x), expected)
    layer.detach()
    assert torch.equal(module(x), expected)


def test_start_is_kaiming_uniform_and_zero() -> None:
    module = nn.Conv2d(40, 8, 3)
    layer = LoraLayer(target(module), 16, 8, generator=torch.Generator().manual_seed(0))
    bound = 1 / math.sqrt(40 * 9)
    values = layer.lora_down.detach()
    assert values.shape == (16, 40, 3, 3)
    assert values.abs().max() <= bound
    assert values.abs().max() > 0.99 * bound
    assert abs(float(values.mean())) < 0.05 * bound
    assert float(values.std()) == pytest.approx(bound / math.sqrt(3), rel=0.02)
    assert not layer.lora_up.any()


@pytest.mark.parametrize("alpha", [0, 4])
def test_alpha_zero_means_rank(alpha: float) -> None:
    layer = LoraLayer(target(nn.Linear(3, 3)), 4, alpha, generator=torch.Generator())
    assert layer.scale == 1


# --- dropouts ---------------------------------------------------------------------------------


def narrow_layer(**values: Any) -> tuple[nn.Linear, LoraLayer]:
    """down and up are the identity and the base gives 0, so that the output shows what was dropped."""
    module = nn.Linear(8, 8, bias=False)
    nn.init.zeros_(module.weight)
    layer = LoraLayer(target(module), 8, 8, generator=torch.Generator(), **values)
    nn.init.eye_(layer.lora_down)
    nn.init.eye_(layer.lora_up)
    layer.attach()
    return module, layer


def test_dropout_drops_single_values_and_rescales() -> None:
    module, layer = narrow_layer(dropout=0.25)
    torch.manual_seed(0)
    out = module(torch.ones(50, 100, 8)).detach()
    assert out.unique().tolist() == [0.0, pytest.approx(1 / 0.75)]
    assert float((out == 0).float().mean()) == pytest.approx(0.25, abs=0.01)
    layer.eval()
    assert torch.equal(module(torch.ones(2, 8)), torch.ones(2, 8))


def test_rank_dropout_is_shared_over_tokens_and_rescales() -> None:
    module, layer = narrow_layer(rank_dropout=0.25)
    torch.manual_seed(0)
    out = module(torch.ones(2000, 3, 8)).detach()
    assert torch.equal(out[:, :1].expand_as(out), out)
    assert out.unique().tolist() == [0.0, pytest.approx(1 / 0.75)]
    assert float((out == 0).float().mean()) == pytest.approx(0.25, abs=0.02)
    layer.eval()
    assert torch.equal(module(torch.ones(2, 8)), torch.ones(2, 8))


def test_rank_dropout_of_a_convolution_is_shared_over_pixels() -> None:
    module = nn.Conv2d(4, 4, 1, bias=False)
    nn.init.zeros_(module.weight)
    layer = LoraLayer(target(module), 4, 4, generator=torch.Generator(), rank_dropout=0.5)
    nn.init.dirac_(layer.lora_down)
    nn.init.dirac_(layer.lora_up)
    layer.attach()
    torch.manual_seed(0)
    out = module(torch.ones(100, 4, 3, 5)).detach()
    assert torch.equal(out[:, :, :1, :1].expand_as(out), out)
    assert float((out == 0).float().mean()) == pytest.approx(0.5, abs=0.1)


def test_module_dropout_leaves_the_layer_out_of_some_calls() -> None:
    module, layer = narrow_layer(module_dropout=0.3)
    torch.manual_seed(0)
    outs = [module(torch.ones(1, 8)).sum().item() for _ in range(2000)]
    assert set(outs) == {0.0, 8.0}  # no rescaling, as in sd-scripts
    assert outs.count(0.0) / 2000 == pytest.approx(0.3, abs=0.03)
    layer.eval()
    assert module(torch.ones(1, 8)).sum().item() == 8


def test_dropouts_draw_what_sd_scripts_draws() -> None:
    """One CPU draw for the module, then the mask of the elements, then one draw a sample and rank."""
    module, _ = narrow_layer(dropout=0.3, rank_dropout=0.4, module_dropout=0.2)
    x = torch.rand(3, 5, 8)
    for seed in range(20):
        torch.manual_seed(seed)
        found = module(x)
        torch.manual_seed(seed)
        if torch.rand(1) < 0.2:
            expected = torch.zeros_like(x)
        else:
            narrow = functional.dropout(x, 0.3)
            expected = narrow * (torch.rand((3, 8)) > 0.4)[:, None] / 0.6
        assert torch.allclose(found, expected)


def test_checkpointing_replays_the_dropouts() -> None:
    torch.manual_seed(0)
    first, second = nn.Linear(8, 8), nn.Linear(8, 8)
    layers = [filled(m, dropout=0.3, rank_dropout=0.3, module_dropout=0.3) for m in (first, second)]
    for layer in layers:
        layer.attach()
    parameters = [p for layer in layers for p in layer.parameters()]
    x = torch.randn(4, 5, 8, requires_grad=True)

    def block(x: Tensor) -> Tensor:
        return cast(Tensor, second(first(x).relu()))

    for seed in range(8):
        torch.manual_seed(seed)
        plain = block(x)
        expected = torch.autograd.grad(plain.square().sum(), parameters, allow_unused=True)
        torch.manual_seed(seed)
        found_out = cast(Tensor, checkpoint(block, x, use_reentrant=False))
        found = torch.autograd.grad(found_out.square().sum(), parameters, allow_unused=True)
        assert torch.equal(plain, found_out)
        for ours, theirs in zip(found, expected, strict=True):
            assert (ours is None) == (theirs is None)
            assert ours is None or torch.equal(ours, theirs)


# --- other ways of running --------------------------------------------------------------------


def test_autocast_runs_in_half_precision_with_float_weights() -> None:
    module = nn.Linear(8, 8).to(torch.bfloat16)
    layer = filled(module)
    layer.attach()
    with torch.autocast("cpu", torch.bfloat16):
        out = module(torch.randn(2, 8))
    assert out.dtype == torch.bfloat16
    out.float().sum().backward()
    assert layer.lora_up.grad is not None
    assert layer.lora_up.grad.dtype == torch.float32


class Block(nn.Module):
    """A block as models repeat them."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(8, 16), nn.Linear(16, 8)

    def forward(self, x: Tensor) -> Tensor:
        return x + cast(Tensor, self.second(functional.gelu(self.first(x))))


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # dynamo looks at its inputs' own
@pytest.mark.parametrize("dropouts", [{}, {"dropout": 0.3, "rank_dropout": 0.3, "module_dropout": 0.3}])
def test_repeated_blocks_share_one_compiled_graph(dropouts: dict[str, Any]) -> None:
    torch.manual_seed(0)
    blocks = nn.Sequential(*[Block() for _ in range(10)])  # more than dynamo compiles one by one
    layers = [filled(m, **dropouts) for m in blocks.modules() if isinstance(m, nn.Linear)]
    for layer in layers:
        nn.init.normal_(layer.lora_up)
        layer.attach()
    x = torch.randn(2, 3, 8, requires_grad=True)
    expected = blocks(x)
    graphs = []

    def backend(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., Any]:
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    for block in blocks:
        block.compile(backend=backend, fullgraph=True)
    found = blocks(x)
    found.sum().backward()
    assert len(graphs) == 1
    assert all(layer.lora_up.grad is not None for layer in layers)
    if not dropouts:
        assert torch.allclose(found, expected, rtol=1e-5, atol=1e-6)
        for layer in layers:
            layer.eval()  # as for samples: nothing to compile anew
        assert torch.equal(blocks(x), found)
        assert len(graphs) == 1
        for layer in layers:
            layer.multiplier = 0.0
            layer.detach()
        plain = blocks(x)
        for layer in layers:
            layer.attach()
        assert torch.allclose(blocks(x), plain)
    torch._dynamo.reset()


# --- the network ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tiny() -> Family:
    return family()


@pytest.fixture(autouse=True)
def _detached(request: pytest.FixtureRequest) -> Any:
    """No test leaves layers attached to the shared model."""
    yield
    if "tiny" in request.fixturenames:
        assert not any("forward" in vars(t.module) for t in request.getfixturevalue("tiny").targets())


def create(model: Family, say: Callable[[str], None] = silent, **values: Any) -> LoraNetwork:
    return LoraNetwork.create(model, job(**values), Draws(1), say)


def randomised(network: LoraNetwork, seed: int = 0) -> LoraNetwork:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return network


def predict(model: Family) -> Tensor:
    """The denoiser's output on a text that went through the text encoder."""
    dtype = next(model.unet.parameters()).dtype
    torch.manual_seed(3)
    x = torch.randn(2, 4, 8, 8, dtype=dtype)
    tokens = torch.arange(2 * 77).view(2, 77)
    text = model.text_encoders["te1"](tokens).last_hidden_state
    return cast(Tensor, model.unet(x, torch.tensor([10, 700]), text).sample)


def test_a_new_network_changes_nothing_and_trains_both_parts(tiny: Family) -> None:
    with torch.no_grad():
        before = predict(tiny)
    network = create(tiny, LoRA_type="Kohya LoCon", conv_dim=2)
    network.attach()
    out = predict(tiny)
    assert torch.equal(out, before)
    torch.autograd.backward(out.square().mean())
    network.detach()
    assert all(bool(p.grad.any()) for p in list(network.parameters())[1::2] if p.grad is not None)
    assert not any(p.requires_grad for p in tiny.unet.parameters())
    assert not any("lora" in name for name in tiny.unet.state_dict())


def test_starting_weights_depend_on_seed_and_layer_only(tiny: Family) -> None:
    both, unet_only = create(tiny), create(tiny, text_encoder_lr=0)
    there = unet_only.state_dict()
    assert there.keys() < both.state_dict().keys()
    assert all(torch.equal(tensor, both.state_dict()[key]) for key, tensor in there.items())
    downs = [layer.lora_down for layer in both.layers if layer.lora_down.shape == (4, 32)]
    assert len(downs) > 2
    assert not torch.equal(downs[0], downs[1])
    other = LoraNetwork.create(tiny, job(), Draws(2), silent)
    assert not torch.equal(other.layers[0].lora_down, both.layers[0].lora_down)


@pytest.mark.parametrize("kind", ["Standard", "Kohya LoCon"])
def test_merged_model_equals_attached(kind: str, tmp_path: Path) -> None:
    network = randomised(create(family(), LoRA_type=kind, conv_dim=2, conv_alpha=3))
    file = tmp_path / "a.safetensors"
    save(file, network.state_dict(), network.metadata(), "float")
    other = family()
    for model in (other.unet, other.text_encoders["te1"]):
        model.double()
    said: list[str] = []
    LoraNetwork.merge(other, file, 0.7, said.append)
    network.to(torch.device("cpu"), torch.float64)
    attached = family()
    for model in (attached.unet, attached.text_encoders["te1"]):
        model.double()
    ours = create(attached, LoRA_type=kind, conv_dim=2, conv_alpha=3)
    ours.to(torch.device("cpu"), torch.float64)
    assert ours.load_state_dict(network.state_dict()) == []
    ours.attach()
    ours.set_multiplier(0.7)
    with torch.no_grad():
        # merge works in float32, whatever the model's dtype
        assert torch.allclose(predict(attached), predict(other), rtol=1e-4, atol=1e-5)
        ours.set_multiplier(0)
        assert not torch.allclose(predict(attached), predict(other), atol=1e-3)
    assert said == [f"base_weights: {len(network.layers)} layers of a.safetensors merged with strength 0.7"]


def test_merge_refuses_a_file_of_another_model(tiny: Family, tmp_path: Path) -> None:
    file = tmp_path / "other.safetensors"
    save_file({"lora_unet_double_blocks_0_img_attn_qkv.lora_down.weight": torch.zeros(1, 2)}, file)
    with pytest.raises(ModelFileError, match="no layer"):
        LoraNetwork.merge(tiny, file, 1.0, silent)


def test_which_part_is_in_the_file(tiny: Family) -> None:
    def parts(**values: Any) -> set[str]:
        return {key.split("_")[1] for key in create(tiny, **values).state_dict()}

    assert parts() == {"unet", "te"}
    assert parts(text_encoder_lr=0) == {"unet"}
    assert parts(unet_lr=0) == {"te"}


def test_conv_ranks_go_to_3x3_kernels_only(tiny: Family) -> None:
    network = create(tiny, LoRA_type="Kohya LoCon", conv_dim=2, conv_alpha=3)
    assert any("time_emb_proj" in layer.target[0].name for layer in network.layers)
    for layer in network.layers:
        wide = layer.is_conv and layer.lora_down.shape[2:] == (3, 3)
        assert (layer.rank, layer.alpha) == ((2, 3.0) if wide else (4, 2))
        assert layer.lora_up.shape[2:] in ((), (1, 1))
    standard = {layer.target[0].name for layer in create(tiny).layers}
    assert not any("resnets" in name or "samplers" in name for name in standard)


def test_block_dims_choose_ranks_by_block(tiny: Family) -> None:
    dims = ["0"] * 25
    dims[5], dims[12], dims[24] = (
        "3",
        "6",
        "1",
    )  # down_blocks.1.attentions.1, mid block, up_blocks.3.attentions.2
    network = create(tiny, block_dims=",".join(dims), block_alphas=",".join(["0.5"] * 25))
    unet = [layer for layer in network.layers if layer.target[0].part == "unet"]
    places = {name.split("_transformer")[0].split("_proj")[0] for name in (x.target[0].name for x in unet)}
    assert places == {
        "lora_unet_down_blocks_1_attentions_1",
        "lora_unet_mid_block_attentions_0",
        "lora_unet_up_blocks_3_attentions_2",
    }
    assert {(layer.rank, layer.alpha) for layer in unet} == {(3, 0.5), (6, 0.5), (1, 0.5)}
    text = [layer for layer in network.layers if layer.target[0].part == "te1"]
    assert {(layer.rank, layer.alpha) for layer in text} == {(4, 2)}


def test_checkpointed_models_train_alike(tiny: Family) -> None:
    """Gradients with and without recomputing, all dropouts on, in diffusers' and transformers' own way."""
    found: list[list[Tensor | None]] = []
    for model in (tiny, family()):
        network = randomised(create(model, network_dropout=0.2, rank_dropout=0.2, module_dropout=0.2))
        if model is not tiny:
            model.enable_gradient_checkpointing()
        network.attach()
        network.train(True)
        calls: list[int] = []
        inside = model.unet.get_submodule("mid_block.attentions.0.transformer_blocks.0.attn1.to_q")
        handle = inside.register_forward_pre_hook(lambda *_, calls=calls: calls.append(1))
        out = predict(model)
        torch.autograd.backward(out.square().mean())
        network.detach()
        handle.remove()
        assert len(calls) == (1 if model is tiny else 2)
        found.append([parameter.grad for parameter in network.parameters()])
    for plain, recomputed in zip(*found, strict=True):
        assert (plain is None) == (recomputed is None)
        assert plain is None or torch.equal(plain, cast(Tensor, recomputed))


def test_param_groups_of_a_plain_network(tiny: Family) -> None:
    network = create(tiny)
    groups = network.param_groups()
    assert [(group.name, group.lr) for group in groups] == [("textencoder", 5e-5), ("unet", 1e-4)]
    assert [p for group in groups for p in group.params] == list(network.parameters())


def test_lora_plus_gives_up_weights_their_own_rate(tiny: Family) -> None:
    network = create(tiny, loraplus_lr_ratio=4, loraplus_unet_lr_ratio=16)
    groups = network.param_groups()
    assert [(group.name, group.lr) for group in groups] == [
        ("textencoder", 5e-5),
        ("textencoder plus", pytest.approx(2e-4)),
        ("unet", 1e-4),
        ("unet plus", pytest.approx(1.6e-3)),
    ]
    ups = {id(layer.lora_up) for layer in network.layers}
    assert [all((id(p) in ups) == group.name.endswith("plus") for p in group.params) for group in groups] == [
        True
    ] * 4
    assert sum(len(group.params) for group in groups) == 2 * len(network.layers)


def test_block_weights_give_one_group_a_block(tiny: Family) -> None:
    network = create(tiny, down_lr_weight="1,0,0.5", mid_lr_weight="2", up_lr_weight="zeros+0.25")
    groups = network.param_groups()
    rates = {group.name: group.lr for group in groups}
    assert groups[0].name == "textencoder"
    # Only blocks with attention have layers: down 1 2 4 5 7 8, mid 12, up 16..24.
    # Block 0 is conv_in, which has none; block 1 has weight 0.
    blocks = [2, 4, 5, 7, 8, 12, *range(16, 25)]
    assert set(rates) == {"textencoder", *(f"unet_block{block}" for block in blocks)}
    assert rates["unet_block2"] == pytest.approx(0.5e-4)
    assert rates["unet_block4"] == pytest.approx(1e-4)
    assert rates["unet_block12"] == pytest.approx(2e-4)
    assert rates["unet_block24"] == pytest.approx(0.25e-4)
    assert not any("down_blocks_0_attentions_0" in key for key in network.state_dict())


def test_blocks_need_a_family_with_blocks(tiny: Family, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(type(tiny), "kohya_blocks", (0, 0, 0, 0, 0))
    with pytest.raises(ConfigError, match="block"):
        create(tiny, mid_lr_weight="1")


def test_nothing_to_train_is_an_error(tiny: Family) -> None:
    with pytest.raises(ConfigError, match="no layer"):
        create(tiny, text_encoder_lr=0, block_dims=",".join(["0"] * 25))


def test_freezing_the_text_encoder_keeps_it_working(tiny: Family) -> None:
    network = randomised(create(tiny))
    network.attach()
    before = predict(tiny)
    network.freeze_text_encoder()
    out = predict(tiny)
    torch.autograd.backward(out.square().mean())
    network.detach()
    assert torch.equal(out, before)
    for layer in network.layers:
        assert (layer.lora_up.grad is None) == (layer.target[0].part == "te1")
    assert len([key for key in network.state_dict() if key.startswith("lora_te_")]) == 54


def test_state_dict_has_kohyas_tensors(tiny: Family) -> None:
    tensors = create(tiny, network_alpha=3).state_dict()
    name = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_q"
    assert tensors[f"{name}.lora_down.weight"].shape == (4, 96)
    assert tensors[f"{name}.lora_up.weight"].shape == (96, 4)
    assert tensors[f"{name}.alpha"].shape == ()
    # Kohya keeps the number type of the JSON where save_precision does not say otherwise.
    assert tensors[f"{name}.alpha"].dtype == torch.int64
    assert create(tiny, network_alpha=3.5).state_dict()[f"{name}.alpha"].dtype == torch.float32


def test_linear_saved_as_convolution() -> None:
    module = nn.Linear(6, 5)
    layer = LoraLayer(target(module, saved_as_conv=True), 2, 1, generator=torch.Generator())
    tensors = layer.tensors()
    assert tensors["lora_unet_x.lora_down.weight"].shape == (2, 6, 1, 1)
    assert tensors["lora_unet_x.lora_up.weight"].shape == (5, 2, 1, 1)
    other = filled(module, rank=2)
    assert len(other.load(tensors)) == 3
    assert torch.equal(other.lora_down, layer.lora_down)


def test_load_state_dict_names_what_is_left_over_and_missing(tiny: Family) -> None:
    network = create(tiny)
    tensors = network.state_dict()
    gone = next(iter(tensors))
    tensors.pop(gone)
    tensors["lora_unet_elsewhere.alpha"] = torch.tensor(1)
    assert network.load_state_dict(tensors) == [
        "lora_unet_elsewhere.alpha is in the file and not in the network",
        f"{gone} is in the network and not in the file",
    ]


# --- the same modules as sd-scripts ------------------------------------------------------------

GOLDEN = json.loads((Path(__file__).parents[1] / "parity" / "golden" / "lora_keys.json").read_text("utf-8"))
"""Names and shapes of sd-scripts' own network on the full-size models."""


def listed(*names: str) -> dict[str, str]:
    """Module -> shapes of down and up."""
    return {
        module: shapes for name in names for shapes, modules in GOLDEN[name].items() for module in modules
    }


def modules_of(network: LoraNetwork) -> dict[str, str]:
    tensors = network.state_dict()

    def shape(key: str) -> str:
        return "x".join(map(str, tensors[key].shape))

    names = dict.fromkeys(key.partition(".")[0] for key in tensors)
    return {n: f"{shape(f'{n}.lora_down.weight')} {shape(f'{n}.lora_up.weight')}" for n in names}


@pytest.mark.parametrize(
    ("version", "kind", "golden", "unet", "text"),
    [
        (1, "Standard", ["sd15"], 192, 72),
        (1, "Kohya LoCon", ["sd15", "sd15_locon"], 278, 72),
        (2, "Standard", ["sd2"], 192, 138),
    ],
)
def test_modules_of_the_full_size_models(
    version: Literal[1, 2], kind: str, golden: list[str], unet: int, text: int
) -> None:
    network = create(
        full_size(version), LoRA_type=kind, network_dim=16, network_alpha=8, conv_dim=8, conv_alpha=1
    )
    found = modules_of(network)
    assert found == listed(*golden)
    for shapes, modules in GOLDEN[golden[-1]].items():  # in the same order, on which optimizer states rest
        there = set(modules)
        assert [name for name in found if name in there] == modules, shapes
    parts = [layer.target[0].part for layer in network.layers]
    assert (parts.count("unet"), parts.count("te1")) == (unet, text)
    assert len(network.state_dict()) == 3 * (unet + text)


# --- starting from a file ---------------------------------------------------------------------


def written(path: Path, network: LoraNetwork) -> str:
    save(path, network.state_dict(), network.metadata(), "fp16")
    return str(path)


def test_network_weights_continue_a_file(tiny: Family, tmp_path: Path) -> None:
    first = randomised(create(tiny))
    file = written(tmp_path / "first.safetensors", first)
    said: list[str] = []
    second = create(tiny, said.append, network_weights=file)
    for ours, theirs in zip(second.parameters(), first.parameters(), strict=True):
        assert torch.equal(ours, theirs.half().float())
    assert (
        said[-1]
        == f"network_weights: {3 * len(first.layers)} of {3 * len(first.layers)} tensors taken from first.safetensors"
    )


def test_network_weights_keep_the_strength_they_were_trained_with(tiny: Family, tmp_path: Path) -> None:
    file = written(tmp_path / "a.safetensors", randomised(create(tiny, network_alpha=1)))
    said: list[str] = []
    network = create(tiny, said.append, network_weights=file, network_alpha=4)
    assert {layer.scale for layer in network.layers} == {0.25}
    assert "alpha 1 comes from the file" in said[-1]
    assert float(network.state_dict()[f"{network.layers[0].target[0].name}.alpha"]) == 1


def test_network_weights_of_another_rank_are_refused(tiny: Family, tmp_path: Path) -> None:
    file = written(tmp_path / "a.safetensors", create(tiny, network_dim=3))
    with pytest.raises(ModelFileError, match="network_dim"):
        create(tiny, network_weights=file)


def test_network_weights_of_another_model_are_refused(tiny: Family, tmp_path: Path) -> None:
    file = tmp_path / "a.safetensors"
    save_file({"lora_unet_input_blocks_4_1_proj_in.lora_up.weight": torch.zeros(4, 4)}, file)
    with pytest.raises(ModelFileError, match="none of the 1 tensors"):
        create(tiny, network_weights=str(file))


def test_network_weights_with_nan_are_refused(tiny: Family, tmp_path: Path) -> None:
    network = create(tiny)
    network.layers[0].lora_up.data.fill_(math.nan)
    with pytest.raises(ModelFileError, match="NaN"):
        create(tiny, network_weights=written(tmp_path / "a.safetensors", network))


def test_missing_network_weights_are_named(tiny: Family, tmp_path: Path) -> None:
    with pytest.raises(ModelFileError, match=r"gone\.safetensors does not exist"):
        create(tiny, network_weights=str(tmp_path / "gone.safetensors"))


def test_dim_from_weights_takes_ranks_alphas_and_modules(tiny: Family, tmp_path: Path) -> None:
    source = randomised(create(tiny, LoRA_type="Kohya LoCon", network_dim=3, conv_dim=2, conv_alpha=5))
    keep = {layer.target[0].name for layer in source.layers[::3]}
    tensors = {key: t for key, t in source.state_dict().items() if key.split(".")[0] in keep}
    without_alpha = source.layers[0].target[0].name
    del tensors[f"{without_alpha}.alpha"]
    file = tmp_path / "a.safetensors"
    save_file(tensors, file)
    network = create(
        tiny, network_weights=str(file), dim_from_weights=True, network_dropout=0.5, loraplus_lr_ratio=4
    )
    assert {layer.target[0].name for layer in network.layers} == keep
    for layer, theirs in zip(network.layers, source.layers[::3], strict=True):
        alpha = theirs.rank if theirs.target[0].name == without_alpha else theirs.alpha
        assert (layer.rank, layer.alpha) == (theirs.rank, alpha)
        assert torch.equal(layer.lora_up, theirs.lora_up)
        assert layer.dropout == 0  # sd-scripts makes this network without them
    assert [group.name for group in network.param_groups()] == ["textencoder", "unet"]


def test_peft_names_are_understood(tiny: Family, tmp_path: Path) -> None:
    source = randomised(create(tiny))
    paths = {id(m): f"unet.{path}" for path, m in tiny.unet.named_modules()}
    # Files name the text encoder's layers with the level that transformers 5 left out.
    paths |= {
        id(m): f"text_encoder.text_model.{path.removeprefix('text_model.')}"
        for path, m in tiny.text_encoders["te1"].named_modules()
    }
    tensors = {}
    for layer in source.layers:
        stem = paths[id(layer.target[0].module)]
        tensors[f"{stem}.lora_A.weight"] = layer.lora_down.detach()
        tensors[f"{stem}.lora_B.weight"] = layer.lora_up.detach()
    file = tmp_path / "peft.safetensors"
    settings = '{"unet.lora_alpha": 2, "unet.r": 4, "text_encoder.lora_alpha": 8, "text_encoder.r": 4}'
    save_file(tensors, file, {"lora_adapter_metadata": settings})
    network = create(tiny, network_weights=str(file), dim_from_weights=True)
    assert len(network.layers) == len(source.layers)
    for ours, theirs in zip(network.layers, source.layers, strict=True):
        assert torch.equal(ours.lora_down, theirs.lora_down)
        assert torch.equal(ours.lora_up, theirs.lora_up)
        assert ours.alpha == (2 if ours.target[0].part == "unet" else 8)


# --- max norm ---------------------------------------------------------------------------------


def test_max_norm_against_explicit_matrices(tiny: Family) -> None:
    network = randomised(create(tiny, LoRA_type="Kohya LoCon", conv_dim=2, conv_alpha=3))
    before = [composed(layer) for layer in network.layers]
    pairs = [(layer.lora_down.detach().clone(), layer.lora_up.detach().clone()) for layer in network.layers]
    norms = [float(change.norm()) for change in before]
    limit = sorted(norms)[len(norms) // 2]
    tags = network.apply_max_norm(limit)
    scaled = 0
    for layer, change, norm, (down, up) in zip(network.layers, before, norms, pairs, strict=True):
        after = composed(layer)
        if norm > limit * (1 + 1e-6):
            scaled += 1
            assert float(after.norm()) == pytest.approx(limit, rel=1e-5)
            assert torch.allclose(after, change * (limit / norm), rtol=1e-4, atol=1e-7)
            root = math.sqrt(limit / norm)
            assert torch.allclose(layer.lora_down, down * root)
            assert torch.allclose(layer.lora_up, up * root)
        elif norm < limit * (1 - 1e-6):
            assert torch.equal(layer.lora_down, down)
            assert torch.equal(layer.lora_up, up)
    assert abs(int(tags["max_norm/keys_scaled"]) - scaled) <= 1  # the middle one lies on the limit
    expected = [min(norm, limit) for norm in norms]
    assert float(tags["norm/avg_key_norm"]) == pytest.approx(sum(expected) / len(expected), rel=1e-4)
    assert float(tags["max_norm/max_key_norm"]) == pytest.approx(limit, rel=1e-4)


def test_max_norm_leaves_a_new_network_alone(tiny: Family) -> None:
    network = create(tiny)
    before = [parameter.detach().clone() for parameter in network.parameters()]
    tags = network.apply_max_norm(1.0)
    assert all(torch.equal(a, b) for a, b in zip(before, network.parameters(), strict=True))
    assert int(tags["max_norm/keys_scaled"]) == 0
    assert float(tags["norm/avg_key_norm"]) == 0


def test_composed_kernel_is_the_two_convolutions_in_a_row() -> None:
    """The reference of the tests above, itself checked by running both convolutions."""
    layer = filled(nn.Conv2d(6, 5, 3, padding=1)).double()
    x = torch.randn(1, 6, 7, 7, dtype=torch.double)
    both = functional.conv2d(functional.conv2d(x, layer.lora_down, padding=1), layer.lora_up) * layer.scale
    assert torch.allclose(functional.conv2d(x, composed(layer), padding=1), both)
