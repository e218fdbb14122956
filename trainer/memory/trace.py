"""A training step on PyTorch's meta device: what it would allocate and compute, without doing either.

Every tensor that an operator makes is followed until nothing refers to it any more, in the forward
pass and in autograd's own backward pass, so that the peak is where it would be on a device. What
autocast would cast is cast (it does not act on meta tensors itself), and attention is the fused
kernel that devices use, which keeps no matrix of all pairs. Not in the figures: the libraries' work space, and
gaps between the blocks of a device's allocator.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map
from torch.utils.flop_counter import flop_registry

from trainer.memory.replay import replayed

__all__ = ["Autocast", "LiveBytes", "Traced", "traced"]

GRANULE_BYTES = 512
"""CUDA's allocator gives memory in multiples of this."""


@dataclass(frozen=True)
class Traced:
    """What a traced pass needs beside the tensors that were there before."""

    kept_bytes: int
    """Made by the forward pass and alive after it: what the backward pass needs, and the result."""
    peak_bytes: int
    """Most that was alive at any time."""
    flops: int
    """Of matrix products, convolutions and attention."""


class LiveBytes(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Follows the memory of all tensors that are made while it is active.

    Args:
        known: Tensors that were there before.
    """

    def __init__(self, known: Iterable[Tensor] = ()) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._sizes = {tensor.untyped_storage()._cdata: 0 for tensor in known}
        self.live_bytes = 0
        self.peak_bytes = 0
        self.flops = 0
        self._paused = False

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Follow nothing for a while."""
        self._paused = True
        try:
            yield
        finally:
            self._paused = False

    def reach(self, size_bytes: int) -> None:
        """Claim memory for a moment."""
        self.peak_bytes = max(self.peak_bytes, self.live_bytes + size_bytes)

    def counted(self, storage: torch.UntypedStorage) -> int:
        """Bytes at which a storage is counted."""
        return self._sizes.get(storage._cdata, 0)

    def know(self, tensors: Iterable[Tensor]) -> None:
        """Count tensors as nothing, for as long as they live: their places may be others' later."""
        for tensor in tensors:
            storage = tensor.untyped_storage()
            self._sizes[storage._cdata] = 0
            weakref.finalize(storage, self._gone, storage._cdata)

    def forget(self, tensor: Tensor) -> None:
        """Count a tensor no more, although it is still referred to."""
        self._gone(tensor.untyped_storage()._cdata)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        options = dict(kwargs or {})
        result = func(*args, **options)
        if self._paused:
            return result
        for tensor in result if isinstance(result, tuple | list) else (result,):
            if isinstance(tensor, Tensor):
                self._note(tensor)
        count = flop_registry.get(func._overloadpacket)
        if count is not None:
            self.flops += count(*args, **options, out_val=result)
        return result

    def _note(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        place = storage._cdata
        if place in self._sizes:
            return
        # What stays on the host (positions, a scheduler's tables) is not the device's.
        size = -(-storage.nbytes() // GRANULE_BYTES) * GRANULE_BYTES if tensor.is_meta else 0
        self._sizes[place] = size
        self.live_bytes += size
        self.peak_bytes = max(self.peak_bytes, self.live_bytes)
        weakref.finalize(storage, self._gone, place)

    def _gone(self, place: int) -> None:
        self.live_bytes -= self._sizes.pop(place, 0)


LOWERED = frozenset(
    {
        functional.linear,
        functional.conv1d,
        functional.conv2d,
        torch.conv2d,
        torch.matmul,
        Tensor.matmul,
        Tensor.__matmul__,
        torch.addmm,
        torch.bmm,
        torch.mm,
        torch.baddbmm,
    }
)
"""Computed in half precision under autocast (torch docs, "CUDA Ops that can autocast to float16")."""

RAISED_ON_CUDA = frozenset(
    {
        functional.layer_norm,
        torch.layer_norm,
        functional.group_norm,
        torch.group_norm,
        functional.rms_norm,
        torch.rms_norm,
        functional.softmax,
        torch.softmax,
        Tensor.softmax,
        torch.pow,
        Tensor.pow,
        torch.rsqrt,
    }
)
"""Computed in float32 under autocast on CUDA; a CPU computes them as they come."""


class Autocast(TorchFunctionMode):
    """Does to meta tensors what autocast does on a device, and attends as a device does.

    Args:
        kind: "cuda" or "cpu".
        dtype: Half precision; None for no autocast.
    """

    def __init__(self, kind: str, dtype: torch.dtype | None) -> None:
        super().__init__()
        self.dtype = dtype
        self.raised = RAISED_ON_CUDA if kind != "cpu" else frozenset[Any]()

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        options = dict(kwargs or {})
        attention = func is functional.scaled_dot_product_attention
        if self.dtype is not None:
            wanted: torch.dtype | None = None
            if func in LOWERED or attention:
                wanted = self.dtype
            elif func in self.raised:
                wanted = torch.float32
            if wanted is not None:
                args, options = tree_map(lambda value: _cast(value, wanted), (args, options))
        if attention and _first(args, options).is_meta:
            return _attend(*args, **options)
        return func(*args, **options)


def _cast(value: Any, dtype: torch.dtype) -> Any:
    ours = isinstance(value, Tensor) and value.is_floating_point() and value.dtype != torch.float64
    return value.to(dtype) if ours else value


def _first(args: tuple[Any, ...], options: Mapping[str, Any]) -> Tensor:
    found: Tensor = args[0] if args else options["query"]
    return found


def _attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    **_: Any,
) -> Tensor:
    """Fused attention on meta tensors, which are otherwise given the plain kind."""
    if attn_mask is not None:
        if attn_mask.dtype == torch.bool:
            attn_mask = torch.zeros_like(attn_mask, dtype=query.dtype)
        shape = (*query.shape[:-1], key.shape[-2])
        attn_mask = attn_mask.to(query.dtype).expand(shape)
    result: Tensor = torch.ops.aten._scaled_dot_product_efficient_attention(
        query, key, value, attn_mask, query.requires_grad, dropout_p, is_causal, scale=scale
    )[0]
    return result


def traced(
    forward: Callable[[], Tensor],
    known: Iterable[Tensor],
    *,
    kind: str,
    autocast: torch.dtype | None,
    backward: bool,
    repeated: Iterable[nn.Module] = (),
) -> Traced:
    """Run ``forward`` and, where asked, the backward pass of its mean square.

    Args:
        forward: Works on meta tensors only.
        known: All tensors that are there already: weights, parameters, inputs.
        kind: Type of the device that is meant.
        autocast: dtype of autocast in the forward pass; None without.
        backward: Whether gradients are computed.
        repeated: Blocks of which each kind is traced once only (`trainer.memory.replay`).
    """
    live = LiveBytes(known)
    alike = replayed(repeated, live, (kind, autocast))
    with torch.set_grad_enabled(backward), alike, live:
        with Autocast(kind, autocast):
            result = forward()
        kept = live.live_bytes
        if backward:
            # The mode is on in the pass that checkpointing runs again, as autocast is.
            with Autocast(kind, autocast):
                loss = result.float().square().mean()
                # torch.autograd.backward would switch the mode off for as long as it runs.
                torch.autograd.graph._engine_run_backward(
                    (loss,),
                    (torch.ones_like(loss),),
                    False,
                    False,
                    (),
                    allow_unreachable=True,
                    accumulate_grad=True,
                )
        del result
    return Traced(kept_bytes=kept, peak_bytes=live.peak_bytes, flops=live.flops)
