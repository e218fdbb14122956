"""Every optimizer of Kohya's list: the right class, the right arguments, steps, and exact resuming."""

from __future__ import annotations

import copy
import importlib
import io
import math
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from torch import Tensor, nn

from trainer import optimizers
from trainer.config import KohyaConfig
from trainer.errors import ConfigError
from trainer.job import Job
from trainer.networks._base import ParamGroup
from trainer.optimizers import Built
from trainer.optimizers import _any_class as any_class

CPU = torch.device("cpu")

# The table of sd-scripts' get_optimizer, written by hand.
KOHYA = {
    "": "torch.optim.AdamW",
    "AdamW": "torch.optim.AdamW",
    "AdamW8bit": "bitsandbytes.optim.AdamW8bit",
    "PagedAdamW": "bitsandbytes.optim.PagedAdamW",
    "PagedAdamW8bit": "bitsandbytes.optim.PagedAdamW8bit",
    "PagedAdamW32bit": "bitsandbytes.optim.PagedAdamW32bit",
    "Lion8bit": "bitsandbytes.optim.Lion8bit",
    "PagedLion8bit": "bitsandbytes.optim.PagedLion8bit",
    "SGDNesterov": "torch.optim.SGD",
    "SGDNesterov8bit": "bitsandbytes.optim.SGD8bit",
    "Lion": "lion_pytorch.Lion",
    "Prodigy": "prodigyopt.Prodigy",
    "DAdaptation": "dadaptation.experimental.DAdaptAdamPreprint",
    "DAdaptAdamPreprint": "dadaptation.experimental.DAdaptAdamPreprint",
    "DAdaptAdanIP": "dadaptation.experimental.DAdaptAdanIP",
    "DAdaptAdaGrad": "dadaptation.DAdaptAdaGrad",
    "DAdaptAdam": "dadaptation.DAdaptAdam",
    "DAdaptAdan": "dadaptation.DAdaptAdan",
    "DAdaptLion": "dadaptation.DAdaptLion",
    "DAdaptSGD": "dadaptation.DAdaptSGD",
    "Adafactor": "transformers.optimization.Adafactor",
    "AdamWScheduleFree": "schedulefree.AdamWScheduleFree",
    "RAdamScheduleFree": "schedulefree.RAdamScheduleFree",
    "SGDScheduleFree": "schedulefree.SGDScheduleFree",
    "bitsandbytes.optim.AdEMAMix8bit": "bitsandbytes.optim.AdEMAMix8bit",
    "bitsandbytes.optim.PagedAdEMAMix8bit": "bitsandbytes.optim.PagedAdEMAMix8bit",
    "prodigyplus.ProdigyPlusScheduleFree": "prodigyplus.ProdigyPlusScheduleFree",
    "pytorch_optimizer.CAME": "pytorch_optimizer.CAME",
    "came_pytorch.CAME": "came_pytorch.CAME",
    "NAdam": "torch.optim.NAdam",
    "bitsandbytes.optim.Adam8bit": "bitsandbytes.optim.Adam8bit",
    "bitsandbytes.optim.RMSprop8bit": "bitsandbytes.optim.RMSprop8bit",
    "bitsandbytes.optim.Adagrad8bit": "bitsandbytes.optim.Adagrad8bit",
    "bitsandbytes.optim.LAMB8bit": "bitsandbytes.optim.LAMB8bit",
    "pytorch_optimizer.Muon": "pytorch_optimizer.Muon",
    "pytorch_optimizer.StableAdamW": "pytorch_optimizer.StableAdamW",
    "pytorch_optimizer.SOAP": "pytorch_optimizer.SOAP",
    "pytorch_optimizer.ScheduleFreeAdamW": "pytorch_optimizer.ScheduleFreeAdamW",
}
NAMES = list(KOHYA)
SHAPES = [(16, 320), (320, 16), (16, 64, 3, 3), (64, 16, 1, 1)]


def job(optimizer: str = "AdamW", args: str = "", **fields: Any) -> Job:
    fields.setdefault("learning_rate", 1.0 if "rodigy" in optimizer or "DAdapt" in optimizer else 1e-3)
    config = KohyaConfig(
        optimizer=optimizer,
        optimizer_args=args,
        output_dir="out",
        pretrained_model_name_or_path="base",
        train_data_dir="pictures",
        text_encoder_lr=fields.pop("text_encoder_lr", fields["learning_rate"]),
        unet_lr=fields.pop("unet_lr", fields["learning_rate"]),
        **fields,
    )
    return Job.from_config(config)


def groups(of: Job, dtype: torch.dtype = torch.float32) -> list[ParamGroup]:
    """Two groups of LoRA shapes, always the same; half the layers start at zero as lora_up does."""
    source = torch.Generator().manual_seed(0)
    parameters = [nn.Parameter((torch.randn(*s, generator=source) * 0.1).to(dtype)) for s in SHAPES]
    with torch.no_grad():
        parameters[1].zero_()
    return [
        ParamGroup("textencoder", parameters[:2], of.text_encoder_lr),
        ParamGroup("unet", parameters[2:], of.unet_lr),
    ]


def parameters_of(built: Built) -> list[nn.Parameter]:
    return [p for group in built.inner.param_groups for p in group["params"]]


def train(built: Built, steps: range) -> None:
    for step in steps:
        source = torch.Generator().manual_seed(100 + step)
        torch.manual_seed(step)  # the loop seeds every step, for optimizers that round at random
        for parameter in parameters_of(built):
            parameter.grad = torch.randn(parameter.shape, generator=source).to(parameter.dtype)
        built.optimizer.step()
        built.optimizer.zero_grad(set_to_none=True)


def values(built: Built) -> list[Tensor]:
    return [parameter.detach().clone() for parameter in parameters_of(built)]


def equal(first: list[Tensor], second: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def through_a_file(state: dict[str, Any]) -> dict[str, Any]:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    loaded: dict[str, Any] = torch.load(file, weights_only=True, map_location="cpu")
    return loaded


# --- names ---


@pytest.mark.parametrize("name", NAMES)
def test_name_gives_kohyas_class(name: str) -> None:
    module, _, class_name = KOHYA[name].rpartition(".")
    expected = getattr(importlib.import_module(module), class_name)
    built = optimizers.create(job(name), groups(job(name)))
    assert type(built.inner) is expected
    assert built.description.startswith(f"{expected.__module__}.{class_name}")


def test_every_choice_of_the_page_is_here() -> None:
    choices = {name for name in NAMES if name and not name.startswith(("came", "pytorch_optimizer.S"))}
    assert set(optimizers.names()) <= choices


def test_names_are_compared_without_case_but_classes_are_not() -> None:
    assert optimizers.recipe_for("adamw8BIT").path == "bitsandbytes.optim.AdamW8bit"
    assert optimizers.recipe_for(" prodigy ").path == "prodigyopt.Prodigy"
    with pytest.raises(ConfigError, match="nadam"):
        optimizers.recipe_for("nadam")


def test_listing_names_imports_no_library() -> None:
    script = (
        "import sys; from trainer import optimizers; optimizers.names();"
        "print([m for m in ('torch','bitsandbytes','transformers','prodigyopt') if m in sys.modules])"
    )
    import subprocess

    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("adamw8bt", "did you mean AdamW8bit"),
        ("os.path.join", "not allowed"),
        ("torchvision.ops.MLP", "not allowed"),
        ("torch.load", "not allowed"),
        ("torch.optim.lr_scheduler.StepLR", "no optimizer 'StepLR'"),
        ("torch.optim.Optimizer", "no optimizer 'Optimizer'"),
        ("pytorch_optimizer.Adan2", "it has .*Adan"),
        ("pytorch_optimizer.load_optimizer", "no optimizer"),
        ("pytorch_optimizer.AdamMini", "wants the whole model"),
        ("pytorch_optimizer.SophiaH", "second derivatives"),
        ("pytorch_optimizer.SAM", "computed again"),
        ("pytorch_optimizer.Lookahead", "wraps another optimizer"),
        ("LBFGS", "computed again"),
        ("pytorch_optimizer.Ranger21", "needs num_iterations"),
        ("pytorch_optimizer.SCION", "Python objects in its state"),
        ("Muon", "2D parameters.*choose pytorch_optimizer.Muon"),
        ("pytorch_optimizer.Magma", "wraps another optimizer"),
        ("bitsandbytes.optim.AdEMAMix32bit", "does not work.*choose bitsandbytes.optim.AdEMAMix,"),
        ("schedulefree.Nope", "no optimizer 'Nope'"),
    ],
)
def test_what_cannot_train_is_refused_with_a_reason(name: str, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        optimizers.check(job(name), CPU)


def test_ranger21_works_with_its_argument() -> None:
    assert optimizers.problems(job("pytorch_optimizer.Ranger21", "num_iterations=100"), CPU) == []


def test_owner_can_allow_more(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match=any_class.ALLOW):
        optimizers.recipe_for("accelerate.optimizer.AcceleratedOptimizer")
    monkeypatch.setenv(any_class.ALLOW, "somewhere, accelerate.optimizer")
    assert optimizers.recipe_for("accelerate.optimizer.AcceleratedOptimizer").path


# --- arguments ---


@pytest.mark.parametrize(
    ("name", "args", "description"),
    [
        ("AdamW", "", "torch.optim.adamw.AdamW"),
        (
            "AdamW",
            "weight_decay=0.1 betas=0.9,0.99",
            "torch.optim.adamw.AdamW(weight_decay=0.1,betas=(0.9, 0.99))",
        ),
        ("SGDNesterov", "", "torch.optim.sgd.SGD(momentum=0.9)"),
        (
            "SGDNesterov8bit",
            "momentum=0.5",
            "bitsandbytes.optim.sgd.SGD8bit(momentum=0.5)",
        ),
        ("Adafactor", "", "transformers.optimization.Adafactor(relative_step=True)"),
        (
            "Adafactor",
            "relative_step=False warmup_init=True",
            "transformers.optimization.Adafactor(relative_step=True,warmup_init=True)",
        ),
        (
            "adafactor",
            "scale_parameter=False relative_step=False",
            "transformers.optimization.Adafactor(scale_parameter=False,relative_step=False)",
        ),
    ],
)
def test_arguments_are_recorded_as_sd_scripts_does(name: str, args: str, description: str) -> None:
    assert optimizers.create(job(name, args), groups(job(name))).description == description


@pytest.mark.parametrize(
    ("name", "args", "says"),
    [
        ("AdamW", "weight_decy=0.1", "AdamW has no option 'weight_decy'; it has .*weight_decay"),
        ("AdamW", "lr=0.1", "learning_rate"),
        ("AdamW", "betas=0.9,2.0", "cannot be made with betas"),
        ("AdamW", "params=1", "no option 'params'"),
        ("SGDNesterov", "nesterov=False", "nesterov cannot be set"),
        ("pytorch_optimizer.CAME", "betes=1", "no option 'betes'"),
        ("Prodigy", "d0=-1.0", "d0"),
    ],
)
def test_wrong_arguments_are_refused(name: str, args: str, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        optimizers.check(job(name, args), CPU)


def test_groups_keep_their_rates() -> None:
    made = job("AdamW", learning_rate=3e-4, unet_lr=1e-4, text_encoder_lr=5e-5)
    built = optimizers.create(made, groups(made))
    assert [group["lr"] for group in built.inner.param_groups] == [5e-5, 1e-4]
    assert built.inner.defaults["lr"] == 3e-4
    assert built.names == ("textencoder", "unet")


@pytest.mark.parametrize("name", [n for n in NAMES if n == "Prodigy" or n.startswith("DAdapt")])
def test_adaptive_optimizers_take_the_first_rate(name: str) -> None:
    made = job(name, text_encoder_lr=0.5, unet_lr=1.0)
    built = optimizers.create(made, groups(made))
    train(built, range(2))  # the libraries raise on two rates
    assert {group["lr"] for group in built.inner.param_groups} == {0.5}
    assert "first group" in " ".join(map(str, optimizers.notes(made)))


def test_notes() -> None:
    def said(*arguments: Any, **fields: Any) -> str:
        return " ".join(map(str, optimizers.notes(job(*arguments, **fields))))

    assert said("AdamW") == ""
    assert "is low" in said("Prodigy", learning_rate=1e-4)
    assert said("Prodigy") == ""
    assert "adafactor:0.001" in said("Adafactor")
    assert "max_grad_norm" in said("Adafactor", "relative_step=False")
    assert "constant_with_warmup" in said("Adafactor", "relative_step=False", lr_scheduler="cosine")
    assert "takes the place" in said("AdamWScheduleFree")
    assert "takes the place" in said("prodigyplus.ProdigyPlusScheduleFree")


def test_rate_zero_falls_back_to_the_engine_default() -> None:
    made = job("AdamW", learning_rate=0, unet_lr=1e-4, text_encoder_lr=1e-5)
    assert optimizers.create(made, groups(made)).inner.defaults["lr"] == 2e-6


# --- checking the device ---


@pytest.mark.parametrize("name", NAMES)
def test_all_of_them_run_on_this_device(name: str) -> None:
    made = job(name)
    before = torch.get_rng_state()
    assert optimizers.problems(made, CPU) == []
    assert torch.equal(before, torch.get_rng_state())


def test_missing_library_names_the_equivalent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes.optim", None)
    for name, equivalent in (
        ("AdamW8bit", "AdamW"),
        ("PagedLion8bit", "Lion"),
        ("SGDNesterov8bit", "SGDNesterov"),
        ("bitsandbytes.optim.AdEMAMix8bit", "pytorch_optimizer.AdEMAMix"),
    ):
        (problem,) = optimizers.problems(job(name), CPU)
        assert f"choose {equivalent}," in problem
        assert "bitsandbytes" in problem


def test_what_fails_in_a_step_is_found_before_training() -> None:
    (problem,) = optimizers.problems(job("AdamW", "capturable=True"), CPU)  # needs an accelerator
    assert "optimizer AdamW does not work on this CPU (If capturable=True" in problem
    (problem,) = optimizers.problems(job("pytorch_optimizer.LoRARite"), CPU)
    assert "choose AdamW, the nearest equivalent" in problem


# --- steps ---


def reference_adamw(p: Tensor, grads: list[Tensor], lr: float) -> Tensor:
    m = v = torch.zeros_like(p)
    for step, g in enumerate(grads, 1):
        p = p * (1 - lr * 0.01)
        m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g**2
        p = p - lr * (m / (1 - 0.9**step)) / ((v / (1 - 0.999**step)).sqrt() + 1e-8)
    return p


def reference_lion(p: Tensor, grads: list[Tensor], lr: float) -> Tensor:
    m = torch.zeros_like(p)
    for g in grads:
        p = p - lr * (0.9 * m + 0.1 * g).sign()
        m = 0.99 * m + 0.01 * g
    return p


def reference_nesterov(p: Tensor, grads: list[Tensor], lr: float) -> Tensor:
    buffer: Tensor | None = None
    for g in grads:
        buffer = g.clone() if buffer is None else 0.9 * buffer + g
        p = p - lr * (g + 0.9 * buffer)
    return p


@pytest.mark.parametrize(
    ("name", "reference", "tolerance"),
    [
        ("AdamW", reference_adamw, 1e-4),
        ("PagedAdamW32bit", reference_adamw, 1e-4),
        ("AdamW8bit", reference_adamw, 0.03),  # its states have 8 bits
        ("Lion", reference_lion, 1e-4),
        ("SGDNesterov", reference_nesterov, 1e-4),
    ],
)
def test_steps_follow_the_formula(
    name: str, reference: Callable[[Tensor, list[Tensor], float], Tensor], tolerance: float
) -> None:
    decay = "weight_decay=0.01" if "AdamW" in name else ""
    made = job(name, decay, unet_lr=2e-3)
    built = optimizers.create(made, groups(made))
    start = [value.double() for value in values(built)]
    grads: list[list[Tensor]] = [[] for _ in start]
    for step in range(4):
        source = torch.Generator().manual_seed(100 + step)
        for found, parameter in zip(grads, start, strict=True):
            found.append(torch.randn(parameter.shape, generator=source).double())
    train(built, range(4))
    for index, (value, first) in enumerate(zip(values(built), start, strict=True)):
        expected = reference(first, grads[index], 1e-3 if index < 2 else 2e-3)
        assert float((value.double() - expected).norm() / (expected - first).norm()) < tolerance


def test_adafactor_with_its_own_rate_follows_the_formula() -> None:
    made = job("Adafactor", learning_rate=5e-2)
    built = optimizers.create(made, groups(made))
    index = 0
    p = values(built)[index].double()
    train(built, range(2))
    row = col = None
    for step in (1, 2):
        g = torch.randn(SHAPES[0], generator=torch.Generator().manual_seed(100 + step - 1)).double()
        beta = 1 - step**-0.8
        square = g**2 + 1e-30
        row = square.mean(1) if row is None else beta * row + (1 - beta) * square.mean(1)
        col = square.mean(0) if col is None else beta * col + (1 - beta) * square.mean(0)
        update = g / (row / row.mean()).sqrt()[:, None] / col.sqrt()[None, :]
        update = update / max(1.0, float((update**2).mean().sqrt()))
        rate = min(1e-2, 1 / math.sqrt(step)) * max(1e-3, float((p**2).mean().sqrt()))
        p = p - rate * update
    torch.testing.assert_close(values(built)[index].double(), p, rtol=1e-5, atol=1e-7)
    assert built.finds_own_rate


def test_effective_rates_are_logged_under_kohyas_tags() -> None:
    made = job("Prodigy")
    built = optimizers.create(made, groups(made))
    for _ in range(5):  # the same gradient each time: the estimate of d grows
        train(built, range(1))
    found = built.scalars()
    assert set(found) == {"lr/d*lr/textencoder", "lr/d*lr/unet"}
    d = built.inner.param_groups[0]["d"]
    assert d > 1e-6  # it has grown
    assert float(found["lr/d*lr/unet"]) == pytest.approx(d * 1.0)
    plus = job("prodigyplus.ProdigyPlusScheduleFree")
    assert set(optimizers.create(plus, groups(plus)).scalars()) == {"lr/d*lr"}
    assert optimizers.create(job(), groups(job())).scalars() == {}


# --- resuming ---


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("name", NAMES)
def test_resumed_run_is_equal_to_the_last_bit(name: str, dtype: torch.dtype) -> None:
    """3 steps, a file, 3 steps, as 6 steps in one go; the file holds no code."""
    made = job(name)
    whole = optimizers.create(made, groups(made, dtype))
    start = values(whole)
    train(whole, range(3))
    state, weights = through_a_file(whole.state_dict()), values(whole)
    train(whole, range(3, 6))

    resumed = optimizers.create(made, groups(made, dtype))
    with torch.no_grad():
        for parameter, weight in zip(parameters_of(resumed), weights, strict=True):
            parameter.copy_(weight)
    resumed.load_state_dict(copy.deepcopy(state))
    train(resumed, range(3, 6))

    assert equal(values(whole), values(resumed))
    assert all(bool(torch.isfinite(value).all()) for value in values(whole))
    if not (name == "DAdaptSGD" and dtype == torch.bfloat16):  # its first steps are below bf16's grain
        assert not equal(values(whole), start)


@pytest.mark.parametrize("name", NAMES)
def test_looking_at_the_weights_changes_nothing(name: str) -> None:
    """eval, as before a sample, and train again: schedule-free optimizers compute there and back."""
    made = job(name)
    plain, looked = (optimizers.create(made, groups(made)) for _ in range(2))
    for step in range(6):
        train(plain, range(step, step + 1))
        train(looked, range(step, step + 1))
        looked.eval()
        looked.eval()
        looked.train()
        looked.train()
    assert equal(values(plain), values(looked))


@pytest.mark.parametrize("name", ["AdamWScheduleFree", "prodigyplus.ProdigyPlusScheduleFree"])
def test_saved_weights_are_the_average(name: str) -> None:
    made = job(name)
    built = optimizers.create(made, groups(made))
    train(built, range(4))
    trained = values(built)
    beta = built.inner.param_groups[0]["betas"][0]
    z = [built.inner.state[p]["z"].double() for p in parameters_of(built)]
    built.eval()
    for y, x, base in zip(trained, values(built), z, strict=True):  # y = beta x + (1 - beta) z
        torch.testing.assert_close(beta * x.double() + (1 - beta) * base, y.double(), rtol=1e-5, atol=1e-6)
        assert not torch.equal(x, y)
    with pytest.raises(RuntimeError, match="train"):
        built.state_dict()
    built.train()
    assert equal(values(built), trained)


@pytest.mark.parametrize("name", NAMES)
def test_accelerates_wrapper_changes_nothing(name: str) -> None:
    accelerator = Accelerator(cpu=True)
    made = job(name)
    plain, wrapped = (optimizers.create(made, groups(made)) for _ in range(2))
    wrapped.optimizer = accelerator.prepare(wrapped.optimizer)
    assert wrapped.optimizer is not wrapped.inner
    train(plain, range(3))
    train(wrapped, range(3))
    assert equal(values(plain), values(wrapped))
    state = through_a_file(wrapped.state_dict())
    wrapped.load_state_dict(state)
    train(plain, range(3, 5))
    train(wrapped, range(3, 5))
    assert equal(values(plain), values(wrapped))


def test_state_of_other_parameters_is_refused() -> None:
    made = job()
    built = optimizers.create(made, groups(made))
    train(built, range(1))
    other = optimizers.create(made, groups(made)[:1])
    with pytest.raises(ValueError, match="group"):
        other.load_state_dict(built.state_dict())


@pytest.mark.gpu
@pytest.mark.parametrize("name", NAMES)
def test_resumed_run_on_a_gpu(name: str) -> None:
    made = job(name)

    def fresh() -> Built:
        found = groups(made)
        large = nn.Parameter(torch.full((128, 1280), 0.01))  # large enough for bitsandbytes to page
        found[1].params.append(large)
        for group in found:
            group.params[:] = [nn.Parameter(p.detach().cuda()) for p in group.params]
        return optimizers.create(made, found)

    def advance(built: Built, steps: range) -> None:
        for step in steps:
            source = torch.Generator().manual_seed(100 + step)
            torch.manual_seed(step)
            for parameter in parameters_of(built):
                parameter.grad = torch.randn(parameter.shape, generator=source).cuda()
            built.optimizer.step()
            built.optimizer.zero_grad(set_to_none=True)

    assert optimizers.problems(made, torch.device("cuda")) == []
    whole = fresh()
    advance(whole, range(3))
    state, weights = through_a_file(whole.state_dict()), values(whole)
    advance(whole, range(3, 6))
    resumed = fresh()
    with torch.no_grad():
        for parameter, weight in zip(parameters_of(resumed), weights, strict=True):
            parameter.copy_(weight)
    resumed.load_state_dict(state)
    advance(resumed, range(3, 6))
    assert equal(values(whole), values(resumed))
