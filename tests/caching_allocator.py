"""What torch's caching allocator of CUDA does with a step's memory, without a GPU: a recording and a replay of it.

``CachingAllocator`` has the rules of ``c10/cuda/CUDACachingAllocator.cpp`` in torch 2.11 to 2.13 for one stream and the
default settings: sizes are rounded, the smallest free block that fits is taken and split, and neighbours of one segment
are joined when they are free. ``Recording`` notes what torch's operations allocate and free.
"""

import math
import weakref
from bisect import bisect_left, insort
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

MIB = 2**20
LEAST_BLOCK = 512  # bytes; sizes are multiples of it
SMALL = MIB  # at most so many bytes come from the pool of small blocks
SMALL_SEGMENT, LARGE_SEGMENT = 2 * MIB, 20 * MIB  # what is asked of the driver for small and for middling blocks
LEAST_OWN_SEGMENT = 10 * MIB  # from here on a segment is as large as its block, in multiples of the next number
SEGMENT_STEP = 2 * MIB
# Arithmetic on more elements than this is left out of a recording: it says nothing about memory.
MOST_COMPUTED = 2**22


@dataclass(eq=False)
class Block:
    """A piece of a segment."""

    size: int
    small: bool
    free: bool = False
    before: "Block | None" = None
    after: "Block | None" = None


@dataclass
class CachingAllocator:
    """The bytes that torch would hold: ``allocated`` in use, ``reserved`` of the GPU, and the most of each."""

    allocated: int = 0
    reserved: int = 0
    most_allocated: int = 0
    most_reserved: int = 0
    segments: int = 0  # that were asked of the driver
    _free: dict[bool, list[tuple[int, int, Block]]] = field(default_factory=lambda: {True: [], False: []})
    _number: int = 0

    def allocate(self, size: int) -> Block:
        """Return a block for ``size`` bytes."""
        size = max(LEAST_BLOCK, -(-size // LEAST_BLOCK) * LEAST_BLOCK)
        block = self._taken(size) or self._new_segment(size)
        rest = block.size - size
        if rest >= LEAST_BLOCK if block.small else rest > SMALL:
            other = Block(rest, block.small, before=block, after=block.after)
            if block.after is not None:
                block.after.before = other
            block.after, block.size = other, size
            self._keep(other)
        self.allocated += block.size
        self.most_allocated = max(self.most_allocated, self.allocated)
        return block

    def free(self, block: Block) -> None:
        """Take a block back, and join it with its free neighbours."""
        self.allocated -= block.size
        for other in (block.before, block.after):
            if other is None or not other.free:
                continue
            self._free[other.small] = [entry for entry in self._free[other.small] if entry[2] is not other]
            block.size += other.size
            if other is block.before:
                block.before = other.before
                if other.before is not None:
                    other.before.after = block
            else:
                block.after = other.after
                if other.after is not None:
                    other.after.before = block
        self._keep(block)

    def _taken(self, size: int) -> Block | None:
        free = self._free[size <= SMALL]
        place = bisect_left(free, (size, 0))
        if place == len(free):
            return None
        block = free.pop(place)[2]
        block.free = False
        return block

    def _new_segment(self, size: int) -> Block:
        if size <= SMALL:
            whole = SMALL_SEGMENT
        elif size < LEAST_OWN_SEGMENT:
            whole = LARGE_SEGMENT
        else:
            whole = -(-size // SEGMENT_STEP) * SEGMENT_STEP
        self.segments += 1
        self.reserved += whole
        self.most_reserved = max(self.most_reserved, self.reserved)
        return Block(whole, size <= SMALL)

    def _keep(self, block: Block) -> None:
        block.free = True
        self._number += 1  # stands for the address, which decides between blocks of one size
        insort(self._free[block.small], (block.size, self._number, block))


class Event(NamedTuple):
    """An allocation of ``size`` bytes, or with 0 the end of an earlier one."""

    storage: int
    size: int


class Recording(TorchDispatchMode):
    """Notes the storages that operations make, and when they end, in ``events``. Large arithmetic is left out."""

    def __init__(self) -> None:
        super().__init__()
        self.events: list[Event] = []
        self._known: dict[int, int] = {}  # number of a storage by its address
        self._made = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = func._schema.name.removeprefix("aten::")
        written = kwargs.get("out", args[0] if name.endswith("_") and not name.startswith("_") else None)
        if isinstance(written, torch.Tensor) and written.numel() > MOST_COMPUTED:
            return written
        if name == "new_zeros" and math.prod(args[1]) > MOST_COMPUTED:
            out = args[0].new_empty(args[1], **kwargs)
        elif name == "index_select" and args[0].shape[1:].numel() * args[2].numel() > MOST_COMPUTED:
            out = args[0].new_empty(args[2].numel(), *args[0].shape[1:])
        else:
            out = func(*args, **kwargs)
        for leaf in tree_leaves(out):
            if isinstance(leaf, torch.Tensor):
                self._note(leaf.untyped_storage())
        return out

    def known(self, tensor: torch.Tensor) -> None:
        """Leave out a tensor that was there before."""
        self._known[tensor.untyped_storage()._cdata] = 0

    def _note(self, storage: torch.UntypedStorage) -> None:
        if storage._cdata in self._known or not storage.nbytes():
            return
        self._made += 1
        self._known[storage._cdata] = self._made
        self.events.append(Event(self._made, storage.nbytes()))
        weakref.finalize(storage, self._ended, storage._cdata)

    def _ended(self, address: int) -> None:
        self.events.append(Event(self._known.pop(address), 0))


def replay(
    events: list[Event], allocator: CachingAllocator, before: dict[int, Block] | None = None
) -> dict[int, Block]:
    """Let the allocator serve what was recorded.

    What has not ended is returned, by the numbers of the storages. ``before`` is that of an earlier part.
    """
    blocks = dict(before or {})
    for storage, size in events:
        if size:
            blocks[storage] = allocator.allocate(size)
        else:
            allocator.free(blocks.pop(storage))
    return blocks
