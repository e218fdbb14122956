"""Block swap: blocks of the frozen denoiser live in host memory and visit the device when they compute.

Each swapped block has a master copy in host memory, in one piece and page-locked, which is never
written again: frozen weights need no copying back (sd-scripts copies both ways). Two slots on the
device take turns: while a block computes in one, the next swapped block is copied into the other on a
stream of its own. The forward pass walks up the blocks and the backward pass walks down.

With gradient checkpointing a block runs again in the backward pass, which brings it back by itself.
Without it, what autograd keeps of a swapped block's weights is a reference to the block, and the
block is brought back when the backward pass asks for the tensor.
"""

from __future__ import annotations

import contextlib
import functools
import weakref
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["SLOTS", "BlockSwap", "piece_bytes"]

ALIGNMENT = 64
"""Bytes at which each tensor starts in its block's piece of memory."""
SLOTS = 2


@dataclass(frozen=True)
class _Place:
    """Where a tensor lies in its block's piece of memory."""

    owner: nn.Module
    name: str
    is_parameter: bool
    offset: int
    shape: torch.Size
    dtype: torch.dtype

    def view(self, piece: Tensor) -> Tensor:
        size = self.shape.numel() * self.dtype.itemsize
        return piece[self.offset : self.offset + size].view(self.dtype).view(self.shape)

    def made(self, tensor: Tensor) -> Tensor:
        """``tensor`` as the module holds it."""
        return nn.Parameter(tensor, requires_grad=False) if self.is_parameter else tensor

    def put(self, tensor: Any) -> None:
        """Give the module what `made` gave."""
        (self.owner._parameters if self.is_parameter else self.owner._buffers)[self.name] = tensor


class _Master:
    """One block's frozen tensors in host memory."""

    def __init__(self, block: nn.Module, pin: bool) -> None:
        self.block = block
        self.was_patched = "forward" in vars(block)
        self.forward = block.forward
        self.places: list[_Place] = []
        size = 0
        sources: list[Tensor] = []
        for owner in block.modules():
            for name, tensor in (*owner._parameters.items(), *owner._buffers.items()):
                if tensor is None:
                    continue
                self.places.append(
                    _Place(owner, name, name in owner._parameters, size, tensor.shape, tensor.dtype)
                )
                sources.append(tensor.detach())
                size += -(-tensor.nbytes // ALIGNMENT) * ALIGNMENT
        self.piece = torch.empty(size, dtype=torch.uint8)
        self.unlock = weakref.finalize(self, _unlock, self.piece.data_ptr()) if pin else None
        self.pinned = pin and _lock(self.piece)
        if self.unlock is not None and not self.pinned:
            self.unlock.detach()
        self.home = self.on(self.piece)
        for index, place in enumerate(self.places):
            self.home[index].copy_(sources[index])
            sources[index] = self.home[index]  # each source goes as soon as it is copied
            place.put(self.home[index])
        self.away: dict[int, list[Tensor]] = {}
        """The block's tensors in each slot, by its number."""

    def on(self, piece: Tensor) -> list[Tensor]:
        """The block's tensors on a piece of memory, as its modules hold them."""
        return [place.made(place.view(piece)) for place in self.places]

    def give(self, tensors: list[Tensor]) -> None:
        """Let the block compute with ``tensors``."""
        for place, tensor in zip(self.places, tensors, strict=True):
            place.put(tensor)

    def end(self) -> None:
        """Leave the block as it was, in host memory."""
        self.give(self.home)
        block: Any = self.block
        if self.was_patched:
            block.forward = self.forward
        else:
            del block.forward
        if self.unlock is not None:
            self.unlock()


def piece_bytes(block: nn.Module) -> int:
    """Memory of a block's tensors in one piece."""
    return sum(
        -(-tensor.nbytes // ALIGNMENT) * ALIGNMENT for tensor in (*block.parameters(), *block.buffers())
    )


def _lock(piece: Tensor) -> bool:
    """Page-lock memory in place (torch's own pinned memory takes the next power of two)."""
    runtime: Any = torch.cuda.cudart()  # type: ignore[no-untyped-call]
    if int(runtime.cudaHostRegister(piece.data_ptr(), piece.nbytes, 0)) == 0:
        return True
    # The refusal would be reported by whatever the device is asked next.
    with contextlib.suppress(RuntimeError):
        torch.zeros(1, device="cuda").add_(1)
    return False


def _unlock(address: int) -> None:
    runtime: Any = torch.cuda.cudart()  # type: ignore[no-untyped-call]
    runtime.cudaHostUnregister(address)


class _Slot:
    """A piece of device memory that holds one swapped block at a time."""

    def __init__(self, size_bytes: int, device: torch.device) -> None:
        self.piece = torch.empty(size_bytes, dtype=torch.uint8, device=device)
        self.holds: int | None = None
        self.arrived: torch.cuda.Event | None = None
        self.awaited = True
        """Whether the computing stream waits for the copy already."""


@dataclass(frozen=True)
class _Reference:
    """What autograd keeps in place of a swapped block's tensor."""

    block: int
    dtype: torch.dtype
    size: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int
    """In elements of ``dtype``, from the start of the block's piece."""


class BlockSwap:
    """Swapping for the blocks of one model; `close` ends it and leaves the blocks in host memory.

    Args:
        blocks: In the order of the forward pass, frozen.
        swapped: Which of them live in host memory.
        device: Where they compute. On the CPU everything is copied and fetched just the same.

    Attributes:
        host_bytes: Memory of the masters.
        device_bytes: Memory of the slots.
        pinned: Whether all masters could be page-locked (copies then overlap with computing).
        fetches: Copies to the device so far.
    """

    def __init__(
        self,
        blocks: Sequence[nn.Module],
        swapped: Sequence[int],
        device: torch.device,
    ) -> None:
        self.device = device
        self.fetches = 0
        on_cuda = device.type == "cuda"
        self._masters = [_Master(blocks[index], on_cuda) for index in sorted(set(swapped))]
        self.pinned = on_cuda and all(master.pinned for master in self._masters)
        self.host_bytes = sum(master.piece.nbytes for master in self._masters)
        largest = max((master.piece.nbytes for master in self._masters), default=0)
        self._slots = [_Slot(largest, device) for _ in range(min(SLOTS, len(self._masters)))]
        self.device_bytes = largest * len(self._slots)
        self._stream: torch.cuda.Stream | None = (
            torch.cuda.Stream(device) if on_cuda else None  # type: ignore[no-untyped-call]
        )
        for index, master in enumerate(self._masters):
            block: Any = master.block
            block.forward = functools.partial(self._forward, index, master.forward)

    def close(self) -> None:
        """Take the swapping out of the blocks and free the slots; the blocks stay in host memory."""
        if self._stream is not None:
            torch.cuda.synchronize(self.device)
        for master in self._masters:
            master.end()
        self._masters.clear()
        self._slots.clear()

    # --- passes -------------------------------------------------------------------------------

    def _forward(self, index: int, forward: Any, *args: Any, **kwargs: Any) -> Any:
        again = torch._C._current_graph_task_id() != -1  # run again by the backward pass
        self._bring(index, ahead=-1 if again else 1)
        with self._references():
            return forward(*args, **kwargs)

    @contextlib.contextmanager
    def _references(self) -> Iterator[None]:
        """Let autograd keep references to swapped tensors, where nobody else decides what it keeps."""
        # Hooks that are there already are those of gradient checkpointing: it keeps nothing of the
        # block, and in the pass that runs it again the block stays until its gradients are done.
        # Only the innermost hooks are called, so that ours would switch it off.
        others = torch._C._autograd._top_saved_tensors_default_hooks(False)
        if others is not None or not torch.is_grad_enabled():
            yield
            return
        with torch.autograd.graph.saved_tensors_hooks(self._pack, self._unpack):
            yield

    def _pack(self, tensor: Tensor) -> Any:
        place = tensor.untyped_storage().data_ptr()
        for slot in self._slots:
            if slot.piece.untyped_storage().data_ptr() == place and slot.holds is not None:
                return _Reference(
                    slot.holds,
                    tensor.dtype,
                    tuple(tensor.shape),
                    tensor.stride(),
                    int(tensor.storage_offset()),
                )
        return tensor

    def _unpack(self, packed: Any) -> Tensor:
        if not isinstance(packed, _Reference):
            return packed  # type: ignore[no-any-return]
        slot = self._bring(packed.block, ahead=-1)
        whole = slot.piece[: slot.piece.nbytes // packed.dtype.itemsize * packed.dtype.itemsize]
        return torch.as_strided(whole.view(packed.dtype), packed.size, packed.stride, packed.offset)

    # --- copies -------------------------------------------------------------------------------

    def _bring(self, index: int, ahead: int) -> _Slot:
        """Have a block on the device, and the one that will be wanted next on its way."""
        slot = self._find(index) or self._start(index, spare=None)
        if not slot.awaited:
            assert slot.arrived is not None
            torch.cuda.current_stream(self.device).wait_event(slot.arrived)
            slot.awaited = True
        following = index + ahead
        if 0 <= following < len(self._masters) and len(self._slots) > 1 and self._find(following) is None:
            self._start(following, spare=slot)
        return slot

    def _find(self, index: int) -> _Slot | None:
        return next((slot for slot in self._slots if slot.holds == index), None)

    def _start(self, index: int, spare: _Slot | None) -> _Slot:
        """Copy a block into a slot other than ``spare``, whose block goes home."""
        number = next(number for number, slot in enumerate(self._slots) if slot is not spare)
        slot, master = self._slots[number], self._masters[index]
        if slot.holds is not None:
            gone = self._masters[slot.holds]
            gone.give(gone.home)
        target = slot.piece[: master.piece.nbytes]
        self.fetches += 1
        if self._stream is None:
            target.copy_(master.piece)
        else:
            # What was launched so far may still read the slot.
            self._stream.wait_stream(torch.cuda.current_stream(self.device))
            with torch.cuda.stream(self._stream):
                target.copy_(master.piece, non_blocking=True)
                slot.arrived = torch.cuda.Event()  # type: ignore[no-untyped-call]
                slot.arrived.record(self._stream)
            slot.awaited = False
        slot.holds = index
        if number not in master.away:
            master.away[number] = master.on(slot.piece)
        master.give(master.away[number])
        return slot
