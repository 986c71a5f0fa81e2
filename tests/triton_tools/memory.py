"""Shadow of the memory that a launch may touch: which tensor a pointer belongs to, who wrote it and who read it.

Every tensor argument gets a number that is put into bits 48 and up of its address, which no address of a process uses
and pointer arithmetic carries along. So a pointer is judged by the tensor it was made from, not by what happens to lie
where it points. Programs run one after another, so whoever else touched a location is known by the time of a conflict.
"""

import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from tests.triton_tools.findings import OutOfBounds, Race

TAG_SHIFT = np.uint64(48)
ADDRESS = np.uint64((1 << 48) - 1)
SEVERAL = -1  # in place of one program's number


@dataclass
class Argument:
    """A tensor as the launch passed it: a view, which may be less than its storage."""

    name: str
    low: int  # bytes, as ``size``
    size: int  # from the first element to the end of the last
    itemsize: int
    described: str
    elements: np.ndarray | None  # which places of the extent belong to the view; None where all do
    region: "Region"


class Region:
    """Memory of one argument, or of several that overlap, in cells of the smallest element."""

    def __init__(self, low: int, size: int, cell_bytes: int) -> None:
        cells = -(-size // cell_bytes)
        self.low = low
        self.shift = np.uint64(cell_bytes.bit_length() - 1)
        self.cell_bytes = cell_bytes
        # Numbers of programs from 1, and 0 for none. Zeroed memory costs nothing until it is touched.
        self.writer = np.zeros(cells, dtype=np.int32)
        self.atomic = np.zeros(cells, dtype=np.int32)
        self.reader = np.zeros(cells, dtype=np.int32)  # an earlier program
        self.reading = np.zeros(cells, dtype=bool)  # by the program that runs
        self.reading_span = (cells, -1)
        self.written = self.atomics = False

    def end_program(self, program: int) -> None:
        """File what ``program`` read under what earlier programs have read."""
        first, last = self.reading_span
        if last < first:
            return
        reading = self.reading[first : last + 1]
        self.reader[first : last + 1][reading] = program
        reading[:] = False
        self.reading_span = (self.reading.size, -1)

    def touch(self, kind: str, cells: np.ndarray, program: int) -> tuple[int, str, int] | None:
        """Note an access; the conflicting cell, what was done to it and by which program, if there is one."""
        conflicts = []
        if self.written:
            conflicts.append(("written", self.writer, program))
        if kind != "load":
            conflicts.append(("read", self.reader, 0))  # holds none of this program's own
        if self.atomics and kind != "atomic":
            conflicts.append(("atomically updated", self.atomic, program))
        for what, shadow, own in conflicts:
            found = shadow[cells]
            bad = (found != 0) & (found != own)
            if bad.any():
                lane = int(bad.argmax())
                return int(cells[lane]), what, int(found[lane])
        if kind == "load":
            self.reading[cells] = True
            first, last = self.reading_span
            self.reading_span = (min(first, int(cells.min())), max(last, int(cells.max())))
        elif kind == "store":
            self.writer[cells] = program
            self.written = True
        else:
            before = self.atomic[cells]
            self.atomic[cells] = np.where((before == 0) | (before == program), program, SEVERAL)
            self.atomics = True
        return None


@dataclass
class Memory:
    """All that one launch may touch."""

    kernel: str
    names: dict[int, str]  # of arguments, by address
    grid: tuple[int, int, int] = (1, 1, 1)
    races: bool = True
    program: int = 0  # from 1
    arguments: dict[int, Argument] = field(default_factory=dict)
    regions: list[Region] = field(default_factory=list)

    def tag(self, tensor: Any) -> np.uint64:
        """Take a tensor up; what is to be added to its address."""
        number = len(self.arguments) + 1
        low, itemsize = tensor.data_ptr(), tensor.element_size()
        assert low <= int(ADDRESS), f"address {low:#x} needs more than 48 bits"
        shape, strides = tuple(tensor.shape), tuple(tensor.stride())
        extent = 0 if 0 in shape else 1 + sum((n - 1) * stride for n, stride in zip(shape, strides, strict=True))
        elements = None
        if extent and not tensor.is_contiguous():
            elements = np.zeros(extent, dtype=bool)
            np.lib.stride_tricks.as_strided(elements, shape, strides)[...] = True
        name = self.names.get(low, f"tensor {number}")
        described = f"{name} ({tensor.dtype}, shape {shape}, strides {strides})".replace("torch.", "")
        nowhere = Region(low, 0, itemsize)
        self.arguments[number] = Argument(name, low, extent * itemsize, itemsize, described, elements, nowhere)
        return np.uint64(number) << TAG_SHIFT

    def begin_program(self, program: int) -> None:
        """The ``program``-th of the grid, from 0, is what runs from here on."""
        if not self.program:
            self._lay_out()
        for region in self.regions:
            region.end_program(self.program)
        self.program = program + 1

    def access(self, kind: str, pointers: np.ndarray, active: np.ndarray, size: int) -> np.ndarray:
        """Judge ``size`` bytes at every active lane, ``kind`` load, store or atomic; the pointers without tags."""
        lanes = pointers.reshape(-1) if active.all() else pointers[active]
        if lanes.size:
            argument = self.arguments.get(int(lanes[0] >> TAG_SHIFT))
            if argument is None or not self._inside(kind, argument, lanes, size):
                self._access_apart(kind, lanes, size)
        return pointers & ADDRESS

    def where(self, program: int | None = None) -> str:
        """Kernel and program, for messages."""
        return f"kernel {self.kernel}, {self._name(self.program if program is None else program)}"

    def _name(self, program: int) -> str:
        if program == SEVERAL:
            return "several programs"
        _, y, z = self.grid
        return f"program {((program - 1) // (y * z), (program - 1) // z % y, (program - 1) % z)}"

    def _lay_out(self) -> None:
        """One region for what overlaps."""
        inside: list[Argument] = []
        end = 0
        for argument in sorted((a for a in self.arguments.values() if a.size), key=lambda a: a.low):
            if inside and argument.low >= end:
                self._lay_out_region(inside, end)
                inside = []
            inside.append(argument)
            end = max(end, argument.low + argument.size)
        if inside:
            self._lay_out_region(inside, end)

    def _lay_out_region(self, arguments: list[Argument], end: int) -> None:
        low = arguments[0].low
        cell_bytes = math.gcd(*(a.itemsize for a in arguments), *(a.low - low for a in arguments))
        region = Region(low, end - low, cell_bytes)
        self.regions.append(region)
        for argument in arguments:
            argument.region = region

    def _inside(self, kind: str, argument: Argument, lanes: np.ndarray, size: int) -> bool:
        """Whether all lanes lie in ``argument``; what is to be found about them there is raised."""
        number = lanes[0] & ~ADDRESS
        at = lanes - (number | np.uint64(argument.low)) if number else lanes - np.uint64(argument.low)
        if int(at.max()) > argument.size - size:  # what lies below wraps to the top
            return False
        if argument.elements is not None:
            foreign = ~argument.elements[(at // np.uint64(argument.itemsize)).view(np.int64)]
            if foreign.any():
                element = int(at[foreign][0]) // argument.itemsize
                raise OutOfBounds(
                    f"{self.where()}: {kind} between the rows of {argument.described}: {foreign.sum()} of "
                    f"{lanes.size} active lanes, first at offset {element}"
                )
        if self.races:
            self._touch(kind, argument, at, size)
        return True

    def _touch(self, kind: str, argument: Argument, at: np.ndarray, size: int) -> None:
        region = argument.region
        if argument.low != region.low:
            at = at + np.uint64(argument.low - region.low)
        cells = (at >> region.shift).view(np.int64)
        if size > region.cell_bytes:
            cells = (cells[:, None] + np.arange(-(-size // region.cell_bytes))).reshape(-1)
        conflict = region.touch(kind, cells, self.program)
        if conflict:
            cell, what, other = conflict
            element = (region.low + cell * region.cell_bytes - argument.low) // argument.itemsize
            raise Race(f"{self.where()}: {kind} of offset {element} of {argument.described}, {what} by "
                       f"{self._name(other)}")  # fmt: skip

    def _access_apart(self, kind: str, lanes: np.ndarray, size: int) -> None:
        """Lanes out of bounds or from several tensors; those without a tag come from addresses kept in memory."""
        for tag in np.unique(lanes >> TAG_SHIFT):
            own = lanes[lanes >> TAG_SHIFT == tag]
            argument = self.arguments.get(int(tag))
            if argument is not None:
                if not self._inside(kind, argument, own, size):
                    raise OutOfBounds(self._outside(kind, argument, own, lanes.size, size))
                continue
            for argument in self.arguments.values() if tag == 0 else ():
                here = own - np.uint64(argument.low) <= np.uint64(max(0, argument.size - size))
                if argument.size >= size and here.any():
                    self._inside(kind, argument, own[here], size)
                    own = own[~here]
            if own.size:
                raise OutOfBounds(f"{self.where()}: {kind} at {int(own[0] & ADDRESS):#x}, far from every tensor passed")

    def _outside(self, kind: str, argument: Argument, lanes: np.ndarray, active: int, size: int) -> str:
        at = (lanes & ADDRESS).view(np.int64) - argument.low
        bad = at[(at < 0) | (at > argument.size - size)]
        return (
            f"{self.where()}: {kind} outside {argument.described}: {bad.size} of {active} active lanes, first at "
            f"offset {int(bad[0]) // argument.itemsize}, of {argument.size // argument.itemsize}"
        )
