"""Gradient checkpointing whose kept inputs wait in host memory (cpu_offload_checkpointing).

A checkpointed block keeps only its inputs for the backward pass, in which it runs again (Chen et al.
2016, arXiv:1604.06174). Here these inputs are copied to host memory on a stream of their own while
the next block computes, and the one that the backward pass needs next is fetched while the present one
computes. Without an accelerator nothing is copied, since there is nowhere else to put it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

__all__ = ["Offload", "checkpoint_block"]

SMALL_BYTES = 1 << 20
"""Tensors below this stay where they are: a copy costs more than it frees."""


def checkpoint_block(block: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """Run ``block`` and keep no more of it than its inputs."""
    return checkpoint(block.__call__, *args, use_reentrant=False, **kwargs)


class Offload:
    """Checkpointing with the kept inputs in host memory; one object for a model.

    Args:
        device: Where the model computes.
        small_bytes: Tensors below this are not moved.
    """

    def __init__(self, device: torch.device, small_bytes: int = SMALL_BYTES) -> None:
        self.small_bytes = small_bytes
        self.moved_bytes = 0
        """Bytes that were copied to the host so far."""
        self._stream: torch.cuda.Stream | None = (
            torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
            if device.type == "cuda"
            else None
        )
        self._kept: list[_Kept] = []

    def __call__(self, block: nn.Module, *args: Any, **kwargs: Any) -> Any:
        """As `checkpoint_block`."""
        if not torch.is_grad_enabled():
            return block(*args, **kwargs)
        with torch.autograd.graph.saved_tensors_hooks(self._pack, self._unpack):
            return checkpoint_block(block, *args, **kwargs)

    def _pack(self, tensor: Tensor) -> Any:
        # A parameter is kept by the model anyway.
        if tensor.nbytes < self.small_bytes or isinstance(tensor, nn.Parameter):
            return tensor
        kept = _Kept(tensor, self._stream)
        self.moved_bytes += tensor.nbytes
        self._kept.append(kept)
        return kept

    def _unpack(self, packed: Any) -> Tensor:
        if not isinstance(packed, _Kept):
            return packed  # type: ignore[no-any-return]
        while self._kept and self._kept[-1] is not packed:
            self._kept.pop()
        if self._kept:
            self._kept.pop()
        if self._kept:
            self._kept[-1].fetch()  # the one that the backward pass will want next
        return packed.take()


class _Kept:
    """A tensor in host memory, with the copies to and fro."""

    def __init__(self, tensor: Tensor, stream: torch.cuda.Stream | None) -> None:
        self.device = tensor.device
        self.stream = stream
        self.fetched: Tensor | None = None
        self.like = (tensor.shape, tensor.dtype)
        if tensor.is_meta:
            return  # a traced step: the host gets nothing
        self.host = torch.empty_like(tensor, device="cpu", pin_memory=stream is not None)
        if stream is None:
            self.host.copy_(tensor)
            return
        stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(stream):
            self.host.copy_(tensor, non_blocking=True)
        # The allocator may reuse the tensor's memory only after the copy has read it.
        tensor.record_stream(stream)

    def fetch(self) -> None:
        if self.fetched is not None:
            return
        if self.device.type == "meta":
            shape, dtype = self.like
            self.fetched = torch.empty(shape, dtype=dtype, device=self.device)
            return
        if self.stream is None:
            self.fetched = self.host.to(self.device, copy=True)
            return
        with torch.cuda.stream(self.stream):
            self.fetched = self.host.to(self.device, non_blocking=True)

    def take(self) -> Tensor:
        self.fetch()
        tensor, self.fetched = self.fetched, None
        assert tensor is not None
        if self.stream is not None:
            current = torch.cuda.current_stream(self.device)
            current.wait_stream(self.stream)
            tensor.record_stream(current)
        return tensor
