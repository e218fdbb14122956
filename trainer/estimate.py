"""Memory, time and disk of a run, worked out before anything is loaded.

The models are built without weights (PyTorch's meta device), stored as the configuration says, and a
training step, a sample picture and the VAE are traced on them (`trainer.memory.trace`). The
optimizer's state is measured on one layer of each shape. What cannot be traced is added and named
as an estimate: CUDA's own memory, gaps in its allocator, and every figure in seconds.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from trainer import devices, launch, memory, optimizers, plugins, prompts
from trainer.data.types import Dataset, Size
from trainer.draws import Draws, aside
from trainer.errors import TrainerError
from trainer.families._base import Family
from trainer.job import Job
from trainer.memory.quantise import parameter_count
from trainer.memory.trace import Traced, traced
from trainer.networks import plugin_for
from trainer.networks._base import Network, ParamGroup
from trainer.plan import Plan

__all__ = ["GIB", "Forecast", "forecast", "optimizer_bytes", "texts_leave"]

META = torch.device("meta")
GIB = 2**30

CONTEXT_BYTES = 600 << 20
"""An estimate: CUDA's context and the libraries' work space, which no tensor shows."""
GAPS = 0.04
"""An estimate: share of the tensors' memory that the allocator cannot use."""
PROCESS_BYTES = {"cuda": 5 * GIB // 2, "cpu": GIB}
"""An estimate: Python and the libraries in host memory."""
START_S = 15.0
"""An estimate: importing the libraries and opening the device."""
USED_SHARE = 0.5
"""An estimate: share of the speed of a large matrix product that a training step reaches."""
PICTURE_S = 0.05
"""An estimate: reading and resizing one picture."""
COPY_RATE = 12e9
"""An estimate: bytes a second from page-locked host memory to a card (PCIe 4, 8 to 16 lanes)."""


@dataclass(frozen=True, kw_only=True)
class Forecast:
    """What a run will need. Sizes in bytes, by purpose."""

    kind: str
    """Type of the device: cuda or cpu."""
    parameters: Mapping[str, int]
    device: Mapping[str, Mapping[str, int]]
    """For each phase of the run what lies on the device at its worst moment."""
    host: Mapping[str, int]
    disk: Mapping[str, int]
    first_step_s: Mapping[str, float]
    """Estimates: seconds before the first step."""
    step_s: float | None
    """An estimate; None where the device that is meant is not at hand."""
    kept_bytes: int
    """What the forward pass keeps for the backward pass."""

    @property
    def peak_phase(self) -> str:
        """The phase that needs most of the device's memory."""
        return max(self.device, key=lambda phase: sum(self.device[phase].values()))

    @property
    def peak_bytes(self) -> int:
        """Most device memory at any time."""
        return sum(self.device[self.peak_phase].values())

    @property
    def host_bytes(self) -> int:
        """Host memory; on a CPU the models and all that the phases need are part of it."""
        return sum(self.host.values())


# --- the models without weights -------------------------------------------------------------------


@dataclass(frozen=True)
class _Subject:
    """Models and network on the meta device, ready for a step."""

    job: Job
    family: Family
    network: Network
    kind: str
    texts_leave: bool
    """The text encoders are gone, or in host memory, before the first step."""
    parameters: Mapping[str, int]

    @property
    def autocast(self) -> torch.dtype | None:
        dtype = devices.weight_dtype(self.job.config.mixed_precision)
        return None if dtype == torch.float32 else dtype

    @property
    def caches_latents(self) -> bool:
        return self.job.config.cache_latents or self.job.config.cache_latents_to_disk

    def tensors(self) -> list[Tensor]:
        models = (self.family.unet, self.family.vae, *self.family.text_encoders.values())
        return [tensor for model in models for tensor in _tensors(model)] + list(self.network.parameters())

    def trace(self, forward: Callable[[], Tensor], *, backward: bool) -> Traced:
        encoders = self.family.text_encoders.values()
        return traced(
            forward,
            self.tensors(),
            kind=self.kind,
            autocast=self.autocast,
            backward=backward,
            repeated=[
                *memory.blocks_of(self.family.unet),
                *(layer for encoder in encoders for layer in memory.repeated_of(encoder)),
            ],
        )


def _tensors(model: nn.Module) -> Iterator[Tensor]:
    yield from model.parameters()
    yield from model.buffers()


def _bytes(*models: nn.Module) -> int:
    return sum(tensor.nbytes for model in models for tensor in _tensors(model))


def _load(job: Job, kind: str) -> _Subject:
    dtype = devices.weight_dtype(job.config.mixed_precision)
    family: Family = plugins.Folder("trainer.families").get(job.family).load(job, META, dtype, _silent)
    memory.store(family, job)
    parameters = {
        "UNet": parameter_count(family.unet),
        "text encoder": sum(parameter_count(model) for model in family.text_encoders.values()),
    }
    # With every layer at work most is needed; and a draw would be missing to a run that goes on beside this.
    whole = replace(job, network_args=dict(job.network_args) | {"module_dropout": "0"})
    network = plugin_for(job).create(family, whole, Draws(job.seed), _silent)
    parameters["trained"] = sum(parameter.numel() for parameter in network.parameters())
    network.attach()
    full = job.config.full_fp16 or job.config.full_bf16
    network.to(META, dtype if full else torch.float32)
    return _Subject(job, family, network, kind, texts_leave(job), parameters)


def texts_leave(job: Job) -> bool:
    """Whether the text encoders are gone, or in host memory, before the first step."""
    config = job.config
    if job.trains_text_encoder:
        return False
    if job.family == "flux":
        return config.flux1_cache_text_encoder_outputs or config.flux1_cache_text_encoder_outputs_to_disk
    if job.family == "sdxl":
        return job.caches_sdxl_text
    return False


def _silent(_: str) -> None:
    """Nothing is said while estimating."""


# --- traces ---------------------------------------------------------------------------------------


def _remembered(memo: dict[Any, Any], key: Any, make: Callable[[], Any]) -> Any:
    if key not in memo:
        memo[key] = make()
    return memo[key]


FREE = frozenset(
    [
        # figures are remembered by these
        "blocks_to_swap",
        "cache_latents",
        "cache_latents_to_disk",
        "cpu_offload_checkpointing",
        "flux1_cache_text_encoder_outputs",
        "flux1_cache_text_encoder_outputs_to_disk",
        "fp8_base",
        "fp8_base_unet",
        "gradient_checkpointing",
        "max_resolution",
        "mixed_precision",
        "optimizer",
        "quantized_base",
        "sdxl_cache_text_encoder_outputs",
        "train_batch_size",
        "vae_batch_size",
        # no figure that is remembered depends on these
        "epoch",
        "logging_dir",
        "max_train_epochs",
        "max_train_steps",
        "output_dir",
        "output_name",
        "reg_data_dir",
        "sample_every_n_epochs",
        "sample_every_n_steps",
        "sample_prompts",
        "save_every_n_epochs",
        "save_every_n_steps",
        "seed",
        "train_data_dir",
        "training_comment",
    ]
)
"""Settings that do not tell one memo from another."""
MEMOS = 4
_MEMOS: OrderedDict[Any, dict[Any, Any]] = OrderedDict()
_AT_WORK = threading.RLock()
"""Models without weights are remembered, and used by one thread at a time."""


def _memo(job: Job, kind: str) -> dict[Any, Any]:
    """What this process has worked out for runs that differ from ``job`` in `FREE` settings alone."""
    config = job.config
    paths = [*_files(job)]
    if config.network_weights.strip():
        paths.append(job.path(config.network_weights.strip()))
    key = (
        kind,
        tuple(sorted(job.network_args.items())),
        tuple((name, getattr(config, name)) for name in type(config).model_fields if name not in FREE),
        tuple((path, path.stat().st_size, path.stat().st_mtime_ns) for path in paths if path.exists()),
    )
    memo = _MEMOS.setdefault(key, {})
    _MEMOS.move_to_end(key)
    while len(_MEMOS) > MEMOS:
        _MEMOS.popitem(last=False)
    return memo


def _loaded_by(job: Job) -> tuple[Any, ...]:
    """What decides the models, among the settings that advice changes."""
    wanted = memory.choices(job)
    return job.config.mixed_precision, wanted.unet, wanted.text, texts_leave(job)


def _set_checkpointing(family: Family, on: bool) -> None:
    """Switch gradient checkpointing of a remembered family on or off."""
    if on:
        family.enable_gradient_checkpointing()
        return
    for model in (family.unet, *family.text_encoders.values()):
        model.eval()
        for module in model.modules():
            if hasattr(module, "gradient_checkpointing"):
                module.gradient_checkpointing = False


def _step(subject: _Subject, size: Size) -> tuple[Traced, int]:
    """A micro-step at a picture size, and the bytes that offloaded checkpointing moved to the host."""
    family, config = subject.family, subject.job.config
    batch = config.train_batch_size
    offload = memory.offload(family, subject.job, META)

    def forward() -> Tensor:
        text = family.encode_prompts([""] * batch, weighted=config.weighted_captions)
        return family.predict(*_inputs(family, batch, size), text, None)

    # Checkpointing sets PyTorch's generators back and forth.
    with aside() if config.gradient_checkpointing else contextlib.nullcontext():
        found = subject.trace(forward, backward=True)
    for parameter in subject.network.parameters():
        parameter.grad = None
    return found, 0 if offload is None else offload.moved_bytes


def _inputs(family: Family, batch: int, size: Size) -> tuple[Tensor, Tensor]:
    width, height = (side // family.latent_factor for side in size)
    noisy = torch.empty((batch, family.latent_channels, height, width), device=META, dtype=family.dtype)
    return noisy, torch.zeros(batch, device=META, dtype=torch.long)


def _drawing(subject: _Subject, size: Size) -> int:
    """Most that a call of the denoiser needs while a sample is drawn."""
    family = subject.family
    multiple = family.sample_multiple_px
    size = size[0] - size[0] % multiple, size[1] - size[1] % multiple
    batch = 2 if family.uses_negative(family.sample_cfg_scale) else 1

    def forward() -> Tensor:
        text = family.encode_sample_prompts([""] * batch)
        return family.predict(*_inputs(family, batch, size), text, None)

    return subject.trace(forward, backward=False).peak_bytes


def _vae(subject: _Subject, size: Size, pictures: int, *, decode: bool) -> Traced:
    vae: Any = subject.family.vae
    dtype = next(vae.parameters()).dtype
    width, height = size
    channels, factor = (subject.family.latent_channels, subject.family.latent_factor) if decode else (3, 1)
    tensor = torch.empty((pictures, channels, height // factor, width // factor), device=META, dtype=dtype)

    def forward() -> Tensor:
        found: Tensor = vae.decode(tensor).sample if decode else vae.encode(tensor).latent_dist.mean
        return found

    return traced(forward, [*subject.tensors(), tensor], kind=subject.kind, autocast=None, backward=False)


# --- the optimizer --------------------------------------------------------------------------------


def optimizer_bytes(job: Job, groups: list[ParamGroup]) -> int:
    """State of the job's optimizer over ``groups``, measured on one parameter of each shape.

    Raises:
        ConfigError: There is no such optimizer.
    """
    shapes: dict[tuple[int, ...], int] = {}
    dtype = torch.float32
    for group in groups:
        for parameter in group.params:
            shapes[tuple(parameter.shape)] = shapes.get(tuple(parameter.shape), 0) + 1
            dtype = parameter.dtype
    generator = torch.Generator().manual_seed(0)

    def small(shape: tuple[int, ...]) -> Tensor:
        return (torch.randn(shape, generator=generator) * 0.01).to(dtype)

    ones = [nn.Parameter(small(shape)) for shape in shapes]
    rate = next((group.lr for group in groups if group.lr), 1e-4)
    with aside():
        built = optimizers.create(job, [ParamGroup("unet", ones, rate)])
        for _ in range(2):
            for parameter in ones:
                parameter.grad = small(tuple(parameter.shape))
            built.optimizer.step()
    state = built.inner.state
    return sum(
        count * sum(_state_bytes(value, parameter) for value in state.get(parameter, {}).values())
        for parameter, count in zip(ones, shapes.values(), strict=True)
    )


def _state_bytes(value: Any, parameter: Tensor) -> int:
    if isinstance(value, Tensor):
        # Single numbers (step counts) stay on the host, and tables are shared by all parameters.
        return value.nbytes if value.ndim else 0
    if isinstance(value, Mapping):
        return sum(_state_bytes(part, parameter) for part in value.values())
    if isinstance(value, list | tuple):
        return sum(_state_bytes(part, parameter) for part in value)
    return 0


# --- the whole ------------------------------------------------------------------------------------


def forecast(
    job: Job,
    dataset: Dataset | None = None,
    *,
    kind: str | None = None,
    size: Size | None = None,
) -> Forecast:
    """Work out what ``job`` needs. What it is worked out from is remembered by this process.

    Args:
        job: The run.
        dataset: Its pictures, for host memory, disk and time; None leaves those parts out.
        kind: Type of the device that is meant, "cuda" or "cpu"; the present one if None.
        size: Largest picture size in pixels; that of the buckets, or the resolution, if None.

    Raises:
        TrainerError: The model file cannot be read, or the network's or optimizer's options cannot be.
    """
    kind = kind or devices.choose().type
    if size is None:
        sizes = dataset.buckets if dataset is not None and dataset.buckets else ((job.width, job.height),)
        size = max(sizes, key=lambda one: one[0] * one[1])
    with _AT_WORK, devices.DEFAULT_DTYPE:
        return _forecast(job, dataset, kind, size, _memo(job, kind))


def _forecast(job: Job, dataset: Dataset | None, kind: str, size: Size, memo: dict[Any, Any]) -> Forecast:
    subject = _remembered(memo, _loaded_by(job), lambda: _load(job, kind))
    subject = replace(subject, job=job, texts_leave=texts_leave(job))
    groups = subject.network.param_groups()
    config, family = job.config, subject.family
    wanted = memory.choices(job)

    _set_checkpointing(family, config.gradient_checkpointing)
    made_by = (*_loaded_by(job), size)
    step, offloaded = _remembered(
        memo,
        ("step", *made_by, config.train_batch_size, wanted.checkpointing, wanted.offload),
        lambda: _step(subject, size),
    )
    lora = sum(parameter.nbytes for parameter in subject.network.parameters())
    state = _remembered(
        memo,
        ("optimizer", config.optimizer, config.mixed_precision),
        lambda: optimizer_bytes(job, groups),
    )
    swapped, slots = memory.swapped_bytes(family.unet, wanted.blocks_to_swap)
    texts = _bytes(*family.text_encoders.values())
    vae = _bytes(family.vae)
    pictures = config.vae_batch_size if subject.caches_latents else config.train_batch_size
    encode = _remembered(
        memo, ("encode", *made_by, pictures), lambda: _vae(subject, size, pictures, decode=False)
    )

    base = {"frozen weights": _bytes(family.unet) - swapped}
    if swapped:
        base["slots for swapped blocks"] = slots
    # On a CPU there is nowhere else to be.
    if texts and (not subject.texts_leave or kind == "cpu"):
        base["text encoders"] = texts
    if not subject.caches_latents or kind == "cpu":
        base["VAE"] = vae
    trained = {"LoRA": lora, "optimizer state": state}
    grads = {"LoRA gradients": lora}
    working = max(step.peak_bytes - lora, 0)
    if not subject.caches_latents:
        working = max(working, encode.peak_bytes)
    phases: dict[str, dict[str, int]] = {}
    if subject.caches_latents:
        # The denoiser is loaded after the pictures are encoded, and SDXL's text encoders wait in host memory.
        waiting = kind != "cpu" and job.family == "sdxl" and wanted.text is None
        phases["encode pictures"] = {
            **({} if waiting else {"text encoders": texts}),
            "VAE": vae,
            "working memory": encode.peak_bytes,
        }
    phases["train"] = {**base, **trained, **grads, "activations": working}
    phases["update weights"] = {**base, **trained, **grads, "working memory": lora}
    wishes = _wishes(job)
    if wishes:
        largest = max(wishes, key=lambda one: one[0] * one[1])
        drawing, decoding = _remembered(
            memo,
            ("sample", *_loaded_by(job), largest),
            lambda: (_drawing(subject, largest), _vae(subject, largest, 1, decode=True).peak_bytes),
        )
        drawing += 0 if "text encoders" in base else texts
        decoding += 0 if "VAE" in base else vae
        phases["draw samples"] = {**base, **trained, "working memory": max(drawing, decoding)}
    if kind == "cuda":
        for phase in phases.values():
            phase["gaps in CUDA's allocator (estimate)"] = int(GAPS * sum(phase.values()))
            phase["CUDA context and work space (estimate)"] = CONTEXT_BYTES

    host = {"Python and libraries (estimate)": PROCESS_BYTES.get(kind, GIB)}
    if swapped:
        host["swapped blocks"] = swapped
    if subject.caches_latents and kind != "cpu":
        host["VAE"] = vae
    if subject.texts_leave and kind != "cpu" and texts:
        host["text encoders"] = texts
    host["last good LoRA"] = lora
    if offloaded:
        host["inputs of checkpointed blocks"] = offloaded
    latents = _latents_bytes(subject, dataset)
    if latents and not config.cache_latents_to_disk:
        host["latents"] = latents
    if kind == "cpu":
        host["models and working memory"] = max(sum(phase.values()) for phase in phases.values())
    return Forecast(
        kind=kind,
        parameters=subject.parameters,
        device=phases,
        host=host,
        disk=_disk(subject, dataset, lora, state, latents),
        first_step_s=_before_first_step(subject, dataset, encode, step),
        step_s=_step_s(subject, step, swapped),
        kept_bytes=step.kept_bytes,
    )


def _wishes(job: Job) -> list[Size]:
    """Sizes of the sample pictures that the run will draw."""
    config = job.config
    if not (config.sample_every_n_steps or config.sample_every_n_epochs or job.engine.sample_at_first):
        return []
    try:
        return [(prompt.width, prompt.height) for prompt in prompts.for_job(job)]
    except TrainerError:
        return []  # said elsewhere: the prompt file cannot be read


def _latents_bytes(subject: _Subject, dataset: Dataset | None) -> int:
    if dataset is None or not subject.caches_latents:
        return 0
    factor, channels = subject.family.latent_factor, subject.family.latent_channels
    total = 0
    for picture, fit in zip(dataset.pictures, dataset.fits, strict=True):
        width, height = (side // factor for side in fit.bucket)
        copies = 2 if dataset.subsets[picture.subset].flip_aug else 1
        total += copies * channels * width * height * 4
    return total


def _disk(subject: _Subject, dataset: Dataset | None, lora: int, state: int, latents: int) -> dict[str, int]:
    """Bytes that the run leaves on disk at its end, or at most in between."""
    config = subject.job.config
    found: dict[str, int] = {}
    if latents and config.cache_latents_to_disk:
        found["latent caches"] = latents
    width = {"fp16": 2, "bf16": 2, "float": 4}.get(config.save_precision, 4)
    file = subject.parameters["trained"] * width
    saves = states = 1
    if dataset is not None:
        plan = Plan.make(subject.job, dataset, launch.processes(subject.job))
        by_epoch = (plan.epochs - 1) // plan.save_every_n_epochs if plan.save_every_n_epochs else 0
        by_step = plan.max_train_steps // config.save_every_n_steps if config.save_every_n_steps else 0
        kept_epochs = min(by_epoch, config.save_last_n_epochs or by_epoch)
        kept_steps = (
            min(by_step, config.save_last_n_steps // max(config.save_every_n_steps, 1) + 1)
            if (config.save_last_n_steps)
            else by_step
        )
        saves = 1 + kept_epochs + kept_steps
        states = saves
    found["LoRA files"] = saves * file
    if config.save_state:
        found["states"] = states * (lora + state)
    elif config.save_state_on_train_end:
        found["states"] = lora + state
    return found


# --- time, as an estimate -------------------------------------------------------------------------


def _files(job: Job) -> list[Path]:
    config = job.config
    fields = [config.pretrained_model_name_or_path, config.vae]
    if job.family == "flux":
        fields = [config.pretrained_model_name_or_path, config.ae, config.clip_l, config.t5xxl]
    found: list[Path] = []
    for text in fields:
        path = job.path(str(text).strip()) if str(text).strip() else None
        if path is None:
            continue
        if path.is_file():
            found.append(path)
        elif path.is_dir():
            found += sorted(path.rglob("*.safetensors"))
    return found


@cache
def _read_rate(path: Path) -> float:
    """Bytes a second of a short read from the middle of a file."""
    size = path.stat().st_size
    began = time.perf_counter()
    with path.open("rb") as file:
        file.seek(size // 2)
        count = len(file.read(min(32 << 20, size // 2)))
    return max(count / max(time.perf_counter() - began, 1e-6), 20e6)


@cache
def _product_rate(kind: str, dtype: torch.dtype) -> float:
    """Floating-point operations a second of a matrix product on the present device."""
    device = devices.choose()
    width = 4096 if device.type == "cuda" else 512
    a = torch.ones((width, width), device=device, dtype=dtype)
    b = a @ a
    rounds = 0
    if device.type == "cuda":
        torch.cuda.synchronize()
    began = time.perf_counter()
    while rounds < 3 or (time.perf_counter() - began < 0.03 and rounds < 100):
        b = a @ a
        rounds += 1
    if device.type == "cuda":
        torch.cuda.synchronize()
    del b
    return 2 * width**3 * rounds / (time.perf_counter() - began)


def _rate(subject: _Subject) -> float | None:
    """Operations a second of the run; None where the device that is meant is not at hand."""
    if devices.choose().type != subject.kind:
        return None
    return USED_SHARE * _product_rate(subject.kind, devices.weight_dtype(subject.job.config.mixed_precision))


def _before_first_step(
    subject: _Subject, dataset: Dataset | None, encode: Traced, step: Traced
) -> dict[str, float]:
    found = {"start": START_S}
    found["read models"] = sum(path.stat().st_size / _read_rate(path) for path in _files(subject.job))
    rate = _rate(subject)
    if rate is None:
        return found
    if dataset is not None and subject.caches_latents:
        each_s = PICTURE_S + encode.flops / max(subject.job.config.vae_batch_size, 1) / rate
        found["encode pictures"] = len(dataset.pictures) * each_s
    found["first step"] = step.flops / rate
    return found


def _step_s(subject: _Subject, step: Traced, swapped: int) -> float | None:
    rate = _rate(subject)
    if rate is None:
        return None
    passes = 3 if subject.job.config.gradient_checkpointing else 2
    copies = passes * swapped / COPY_RATE if subject.kind == "cuda" else 0.0
    return max(step.flops / rate, copies) * subject.job.config.gradient_accumulation_steps
