"""The device at hand: which one, what it can do, and how much memory is in use."""

from __future__ import annotations

import gc
import os
import threading

import psutil
import torch

from trainer.errors import ConfigError
from trainer.events import MemorySampled

__all__ = [
    "DEFAULT_DTYPE",
    "check_precision",
    "choose",
    "describe",
    "free",
    "inference_dtype",
    "memory",
    "weight_dtype",
]

DEFAULT_DTYPE = threading.RLock()
"""Held by whoever makes PyTorch's default dtype, which all threads share, another than float32, as transformers does
while it makes a model; and by whoever computes beside that. No run goes on meanwhile."""

_PROCESS = psutil.Process(os.getpid())
_peak_lock = threading.Lock()
_ram_peak_bytes = 0


def choose() -> torch.device:
    """The accelerator that PyTorch sees (CUDA, ROCm, XPU, MPS), or the CPU."""
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    return torch.device("cpu") if accelerator is None else torch.device(accelerator.type, 0)


def describe(device: torch.device) -> str:
    """The device in words, for the log."""
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        return f"{properties.name}, {properties.total_memory / 2**30:.1f} GiB"
    return f"CPU, {torch.get_num_threads()} threads" if device.type == "cpu" else device.type.upper()


def weight_dtype(mixed_precision: str) -> torch.dtype:
    """The frozen weights' dtype (sd-scripts, train_util.py:prepare_dtype)."""
    return {"fp16": torch.float16, "bf16": torch.bfloat16}.get(mixed_precision, torch.float32)


def inference_dtype(device: torch.device) -> torch.dtype:
    """Precision for models that are only looked through: 16 bits on a card, else 32."""
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float16
    return torch.bfloat16 if device.type == "xpu" else torch.float32


def check_precision(mixed_precision: str, device: torch.device) -> None:
    """Refuse a precision that the device cannot train in.

    Raises:
        ConfigError: With what to choose instead.
    """
    if mixed_precision == "fp16" and device.type in ("cpu", "mps"):
        raise ConfigError(
            f"mixed_precision fp16 needs a GPU and this run would use the {device.type.upper()}: "
            'choose "bf16" (nearest, fast on recent CPUs) or "no"'
        )
    if mixed_precision == "bf16" and device.type == "cuda" and not torch.cuda.is_bf16_supported():
        name = torch.cuda.get_device_name(device)
        raise ConfigError(f'mixed_precision bf16 is not supported by {name}: choose "fp16"')
    if mixed_precision not in ("no", "fp16", "bf16"):
        raise ConfigError(f"mixed_precision is {mixed_precision!r}: allowed are no, fp16, bf16")


def memory(device: torch.device) -> MemorySampled:
    """Memory in use now and at most so far (host figures: at most among the moments sampled)."""
    global _ram_peak_bytes
    ram = int(_PROCESS.memory_info().rss)
    with _peak_lock:
        _ram_peak_bytes = max(_ram_peak_bytes, ram)
        peak = _ram_peak_bytes
    total = int(psutil.virtual_memory().total)
    if device.type != "cuda":
        return MemorySampled(ram_bytes=ram, ram_peak_bytes=peak, ram_total_bytes=total)
    free_bytes, vram_total = torch.cuda.mem_get_info(device)
    return MemorySampled(
        ram_bytes=ram,
        ram_peak_bytes=peak,
        ram_total_bytes=total,
        vram_bytes=vram_total - free_bytes,
        vram_peak_bytes=torch.cuda.max_memory_reserved(device),
        vram_total_bytes=vram_total,
    )


def free() -> None:
    """Give back what nothing refers to any more; call after dropping a run's models."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
