"""Blocks that are alike are traced once: the others are replayed from what the first one needed.

A denoiser of seventy transformer blocks has three or four kinds of them. Each kind is run on its own,
forward and backward, while its memory and its products are counted; every block of that kind then only
claims the same memory at the same moments, in place of the hundreds of operators that it consists of.
"""

from __future__ import annotations

import contextlib
import functools
import weakref
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

if TYPE_CHECKING:
    from trainer.memory.trace import LiveBytes

__all__ = ["replayed"]

PLAIN = (bool, int, float, str, type(None), torch.dtype)
KEPT = 256
"""Kinds of blocks that a process remembers."""


@dataclass(frozen=True)
class _Needs:
    """What one block needs beside its inputs and weights."""

    outputs: tuple[tuple[torch.Size, torch.dtype], ...]
    spec: TreeSpec
    inside_bytes: int
    """Kept for the backward pass, beside the outputs."""
    kept_inputs: tuple[int, ...]
    """Inputs that the backward pass needs."""
    forward_peak_bytes: int
    """Most that was alive in the forward pass, beyond what was there at its start."""
    backward_peak_bytes: int
    """The same of the backward pass, which starts with what is kept and the outputs' gradients."""
    held_peak_bytes: int
    """The same where the outputs' gradients are parts of larger tensors, which live on."""
    again_peak_bytes: int
    """The same of the pass that checkpointing runs again, which ends with the last tensor that is kept."""
    forward_flops: int
    again_flops: int
    backward_flops: int


_KNOWN: OrderedDict[Hashable, _Needs] = OrderedDict()


@contextlib.contextmanager
def replayed(blocks: Iterable[nn.Module], live: LiveBytes, facts: Hashable) -> Iterator[None]:
    """Let each of ``blocks`` replay what the first of its kind needs.

    Args:
        blocks: On the meta device; a block that cannot be told from others is traced as it is.
        live: What follows the memory.
        facts: What else the figures depend on: kind of device, autocast's dtype.
    """
    patched: list[Any] = []
    try:
        for block in blocks:
            kind = _kind(block)
            if kind is None or "forward" in vars(block):
                continue
            replay = _Replay(block.forward, _trained(block), (kind, facts), live)
            block.forward = functools.partial(replay.forward, block)
            patched.append(block)
        yield
    finally:
        for block in patched:
            del block.forward


def _patches(block: nn.Module) -> Iterator[object]:
    """Who took the place of a layer's forward pass inside ``block``: a network's layers."""
    for module in block.modules():
        if "forward" in vars(module):
            yield getattr(vars(module)["forward"], "__self__", None)


def _trained(block: nn.Module) -> list[nn.Parameter]:
    """Trainable parameters that the block computes with, its network's included."""
    owners = [block, *(owner for owner in _patches(block) if isinstance(owner, nn.Module))]
    found = {id(p): p for owner in owners for p in owner.parameters() if p.requires_grad}
    return list(found.values())


def _kind(block: nn.Module) -> Hashable | None:
    """Equal for blocks that compute alike; None where that cannot be told."""
    found: list[Hashable] = []
    owners = list(_patches(block))
    if not all(isinstance(owner, nn.Module) for owner in owners):
        return None
    for root in (block, *owners):
        assert isinstance(root, nn.Module)
        for name, module in root.named_modules():
            values = vars(module)
            plain = [(key, value) for key, value in values.items() if isinstance(value, PLAIN)]
            tensors = [
                (key, tuple(tensor.shape), tensor.dtype, tensor.requires_grad)
                for key, tensor in (*module._parameters.items(), *module._buffers.items())
                if tensor is not None
            ]
            found.append((name, type(module), tuple(plain), tuple(tensors), "forward" in values))
    return hash(tuple(found))  # of some thousand parts, which would be compared at every call


class _Replay:
    """One block in the place of its forward pass."""

    def __init__(
        self, own: Callable[..., Any], trained: Sequence[nn.Parameter], kind: Hashable, live: LiveBytes
    ) -> None:
        self.own, self.trained, self.kind, self.live = own, trained, kind, live

    def forward(self, block: nn.Module, *args: Any, **kwargs: Any) -> Any:
        flat, spec = tree_flatten((args, kwargs))
        tensors = [value for value in flat if isinstance(value, Tensor)]
        others = [value for value in flat if not isinstance(value, Tensor)]
        if not all(isinstance(value, PLAIN) for value in others) or not all(one.is_meta for one in tensors):
            return self.own(*args, **kwargs)
        grad = torch.is_grad_enabled()
        shapes = tuple((one.shape, one.stride(), one.dtype, grad and one.requires_grad) for one in tensors)
        places = tuple(isinstance(value, Tensor) for value in flat)
        key = (self.kind, str(spec), places, shapes, tuple(others), grad)
        needs = _KNOWN.get(key)
        if needs is None:
            with self.live.paused():
                needs = _measured(self.own, flat, spec, self.trained, [*block.parameters(), *block.buffers()])
            _KNOWN[key] = needs
            while len(_KNOWN) > KEPT:
                _KNOWN.popitem(last=False)
        if grad and (self.trained or any(one.requires_grad for one in tensors)):
            outputs: Sequence[Tensor] = _Replayed.apply(  # type: ignore[no-untyped-call]
                self.live, needs, *tensors, *self.trained
            )
        else:
            outputs = _claim(self.live, needs)
        return tree_unflatten(list(outputs), needs.spec)


def _claim(live: LiveBytes, needs: _Needs) -> tuple[Tensor, ...]:
    again = torch._C._current_graph_task_id() != -1  # run again by the backward pass
    live.reach(needs.again_peak_bytes if again else needs.forward_peak_bytes)
    live.flops += needs.again_flops if again else needs.forward_flops
    return tuple(torch.empty(shape, dtype=dtype, device="meta") for shape, dtype in needs.outputs)


class _Replayed(torch.autograd.Function):
    """A block's claims on memory, in both passes."""

    @staticmethod
    def forward(ctx: Any, live: LiveBytes, needs: _Needs, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        ctx.live, ctx.needs = live, needs
        ctx.like = [(one.shape, one.dtype) for one in tensors]
        outputs = _claim(live, needs)
        inside = torch.empty(needs.inside_bytes, dtype=torch.uint8, device="meta")
        ctx.save_for_backward(*(tensors[place] for place in needs.kept_inputs), inside)
        return outputs

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        inside = ctx.saved_tensors[-1]
        held = any(grad is not None and grad.untyped_storage().nbytes() > grad.nbytes for grad in grads)
        ctx.live.reach(ctx.needs.held_peak_bytes if held else ctx.needs.backward_peak_bytes)
        ctx.live.flops += ctx.needs.backward_flops
        # A real block has let go of it by the time when its last gradients are made.
        ctx.live.forget(inside)
        made = [
            torch.empty(shape, dtype=dtype, device="meta") if wanted else None
            for (shape, dtype), wanted in zip(ctx.like, ctx.needs_input_grad[2:], strict=True)
        ]
        return (None, None, *made)


@dataclass
class _Peaks:
    """Peaks of a backward pass: the outputs' gradients let go when they are used up, or held to the end."""

    live: LiveBytes
    start_bytes: int = 0
    free_bytes: int = 0
    held_bytes: int = 0
    gone_bytes: int = 0

    def begin(self, grads: Sequence[Tensor]) -> None:
        """The pass begins with these gradients."""
        self.start_bytes = self.live.peak_bytes = self.live.live_bytes
        for grad in grads:
            storage = grad.untyped_storage()
            weakref.finalize(storage, self._gone, self.live.counted(storage))

    def _gone(self, size_bytes: int) -> None:
        self.look()
        self.gone_bytes += size_bytes
        self.live.peak_bytes = 0

    def look(self) -> None:
        """Take in what was the most since the last gradient was let go."""
        self.free_bytes = max(self.free_bytes, self.live.peak_bytes)
        self.held_bytes = max(self.held_bytes, self.live.peak_bytes + self.gone_bytes)


class _Seed(torch.autograd.Function):
    """Gives a block's outputs gradients that nothing but the backward pass refers to."""

    @staticmethod
    def forward(ctx: Any, peaks: _Peaks, *outputs: Tensor) -> Tensor:
        ctx.peaks = peaks
        ctx.like = [(one.shape, one.dtype) for one in outputs]
        return torch.empty((), device="meta")

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> tuple[Tensor | None, ...]:
        grads = [torch.empty(shape, dtype=dtype, device="meta") for shape, dtype in ctx.like]
        ctx.peaks.begin(grads)
        return (None, *grads)


def _measured(
    forward: Callable[..., Any],
    values: Sequence[Any],
    spec: TreeSpec,
    trained: Sequence[nn.Parameter],
    weights: Sequence[Tensor],
) -> _Needs:
    """Run a block by itself, on inputs like ``values``."""
    from trainer.memory.trace import LiveBytes

    grad = torch.is_grad_enabled()
    fresh = [_like(value, grad) if isinstance(value, Tensor) else value for value in values]
    inputs = [value for value in fresh if isinstance(value, Tensor)]
    gone: set[int] = set()
    _watch(inputs, gone)
    count = len(inputs)
    before = [parameter.grad for parameter in trained]
    for parameter in trained:
        parameter.grad = None
    live = LiveBytes([*weights, *trained])
    live.know(inputs)
    again = [0, 0]

    def kept(tensor: Tensor) -> Tensor:
        again[:] = live.peak_bytes, live.flops
        return tensor

    # These hooks also keep checkpointing around the block from seeing what happens here.
    with torch.autograd.graph.saved_tensors_hooks(kept, lambda tensor: tensor), live:
        args, kwargs = tree_unflatten(fresh, spec)
        del fresh, inputs
        result = forward(*args, **kwargs)
        del args, kwargs
        kept_inputs = tuple(place for place in range(count) if place not in gone) if grad else ()
        outputs, result_spec = tree_flatten(result)
        del result
        storages = {one.untyped_storage()._cdata: one.untyped_storage() for one in outputs}
        inside = live.live_bytes - sum(live.counted(storage) for storage in storages.values())
        del storages
        peak, flops = live.peak_bytes, live.flops
        shapes = tuple((one.shape, one.dtype) for one in outputs)
        peaks, back_flops = _Peaks(live), 0
        followed = [one for one in outputs if one.requires_grad]
        del outputs
        if followed:
            seed = _Seed.apply(peaks, *followed)  # type: ignore[no-untyped-call]
            del followed
            torch.autograd.graph._engine_run_backward(
                (seed,),
                (torch.empty_like(seed),),
                False,
                False,
                (),
                allow_unreachable=True,
                accumulate_grad=True,
            )
            peaks.look()
            back_flops = live.flops - flops
            del seed
    for parameter, grad_before in zip(trained, before, strict=True):
        parameter.grad = grad_before
    return _Needs(
        outputs=shapes,
        spec=result_spec,
        inside_bytes=max(inside, 0),
        kept_inputs=kept_inputs,
        forward_peak_bytes=peak,
        backward_peak_bytes=peaks.free_bytes - peaks.start_bytes,
        held_peak_bytes=peaks.held_bytes - peaks.start_bytes,
        again_peak_bytes=again[0],
        forward_flops=flops,
        again_flops=again[1],
        backward_flops=back_flops,
    )


def _watch(tensors: Sequence[Tensor], gone: set[int]) -> None:
    """Add to ``gone`` the place of each tensor whose memory is let go."""
    for place, tensor in enumerate(tensors):
        weakref.finalize(tensor.untyped_storage(), gone.add, place)


class _Made(torch.autograd.Function):
    """Makes an input that the graph does not hold, as it would a leaf for the sake of its gradient."""

    @staticmethod
    def forward(ctx: Any, leaf: Tensor, like: Tensor) -> Tensor:
        return _empty_like(like)

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> tuple[None, None]:
        return None, None


def _empty_like(tensor: Tensor) -> Tensor:
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="meta")


def _like(tensor: Tensor, grad: bool) -> Tensor:
    if not (grad and tensor.requires_grad):
        return _empty_like(tensor)
    leaf = torch.empty((), device="meta", requires_grad=True)
    made: Tensor = _Made.apply(leaf, tensor.detach())  # type: ignore[no-untyped-call]
    return made
