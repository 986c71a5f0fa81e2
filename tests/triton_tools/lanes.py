"""Which lanes of every value are undefined, because they come from a masked load without ``other``.

The mark travels with the value: through elementwise operations lane by lane, through a selection from the branch that
is taken, through a reduction to all it sums. It becomes a finding where an undefined lane is stored, or decides an
address, a mask or a branch. So what a later mask removes is fine, whatever the value; no NaN is needed to see it.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import triton.language as tl
from triton.runtime import interpreter as stock

from tests.triton_tools.findings import UninitialisedLanes

KEY = "uninitialised"  # in a handle's ``attr``: a boolean array of the shape of its data
Handle = stock.TensorHandle

MOVING = ("reshape", "trans", "expand_dims", "broadcast", "splat", "unsplat", "cat", "join", "split", "gather")
MEMORY = ("load", "store", "masked_load", "masked_store", "assert", "assume")  # and all atomics


def undefined(handle: Any) -> np.ndarray | None:
    """The undefined lanes of a handle; None where there are none."""
    return handle.attr.get(KEY) if isinstance(handle, Handle) else None


def mark(handle: Any, lanes: np.ndarray) -> None:
    """Note that these lanes of ``handle`` are undefined, in addition to what is."""
    if lanes.any():
        before = undefined(handle)
        handle.attr[KEY] = lanes if before is None else lanes | before


def require(handle: Any, what: str, active: np.ndarray | bool = True) -> None:
    """Raise if an active lane of ``handle`` is undefined."""
    lanes = undefined(handle)
    if lanes is not None and (lanes & active).any():
        raise UninitialisedLanes(
            f"{what} depends on {int((lanes & active).sum())} lane(s) that a masked load without `other` left undefined"
        )


def nan_if_invalid(pointers: Any) -> Any:
    """Values for lanes that a load does not fill: NaN, or an integer that is hard to overlook."""
    element = pointers.get_element_ty()
    dtype = stock._get_np_dtype(element)
    if element == tl.bfloat16:
        value = 0x7FC0
    elif dtype.kind == "f":
        value = np.nan
    else:
        value = int.from_bytes(b"\x5a" * dtype.itemsize, "little") if dtype.kind in "iu" else 1
    return Handle(np.full(pointers.data.shape, value, dtype=dtype), element)


def tracked(method: Callable, name: str) -> Callable:
    """Builder operation ``create_<name>`` that passes the marks of its operands on."""
    spread = _moved if name in MOVING else _SPECIAL.get(name, _elementwise)

    def operation(self, *args, **kwargs):
        out = method(self, *args, **kwargs)
        for argument in args:
            if type(argument) is Handle and KEY in argument.attr:
                spread(self, name, method, out, args, kwargs)
                break
        return out

    return operation


def tracked_reduction(apply: Callable, scan: bool) -> Callable:
    """``apply`` of a reduction or a scan: what it goes over is undefined wherever one of its operands is."""

    def operation(self, input):
        out = apply(self, input)
        operands = input if isinstance(input, tuple) else (input,)
        marks = [lanes for operand in operands if (lanes := undefined(operand.handle)) is not None]
        if not marks:
            return out
        lanes = np.logical_or.reduce(marks)
        if not scan:
            lanes = lanes.any(axis=self.axis, keepdims=True)
        elif self.reverse:
            lanes = np.flip(np.logical_or.accumulate(np.flip(lanes, self.axis), axis=self.axis), self.axis)
        else:
            lanes = np.logical_or.accumulate(lanes, axis=self.axis)
        for result in out if isinstance(out, tuple) else (out,):
            mark(result.handle, lanes.reshape(result.handle.data.shape))
        return out

    return operation


def operations() -> dict[str, Callable]:
    """Every builder operation that ``tracked`` is for, by its full name."""
    found = {}
    for full in dir(stock.InterpreterBuilder):
        name = full.removeprefix("create_")
        if full != name and name not in MEMORY and not name.startswith("atomic"):
            found[full] = tracked(getattr(stock.InterpreterBuilder, full), name)
    return found


def _spread(out: Any, lanes: np.ndarray) -> None:
    if not isinstance(out, Handle):
        return
    try:
        lanes = np.broadcast_to(lanes, out.data.shape)
    except ValueError:  # an operation this module knows nothing of: all of it
        lanes = np.full(out.data.shape, lanes.any())
    mark(out, lanes)


def _elementwise(self, name, method, out, args, kwargs) -> None:
    for argument in args:
        if (lanes := undefined(argument)) is not None:
            _spread(out, lanes)


def _moved(self, name, method, out, args, kwargs) -> None:
    """The operation itself, done to the marks."""

    def marks(argument: Any) -> Any:
        if not isinstance(argument, Handle) or argument is indices:
            return argument
        lanes = undefined(argument)
        return Handle(np.zeros(argument.data.shape, dtype=bool) if lanes is None else lanes, tl.int1)

    indices = args[1] if name == "gather" else None
    moved = method(self, *map(marks, args), **kwargs)
    for result, lanes in zip(*((x if isinstance(x, tuple) else (x,)) for x in (out, moved)), strict=True):
        mark(result, lanes.data)
    if indices is not None and (lanes := undefined(indices)) is not None:
        _spread(out, lanes)


def _select(self, name, method, out, args, kwargs) -> None:
    condition, *branches = args
    lanes = np.zeros(out.data.shape, dtype=bool)
    for taken, branch in zip((condition.data, np.logical_not(condition.data)), branches, strict=True):
        if (marks := undefined(branch)) is not None:
            lanes |= taken.astype(bool) & marks
    if (marks := undefined(condition)) is not None:
        lanes |= marks
    mark(out, lanes)


def _logical(self, name, method, out, args, kwargs) -> None:
    """``and`` with a defined 0, or ``or`` with all bits set, is defined whatever the other operand."""
    decides = _all_bits if name == "or" else _no_bits
    left, right = args
    for one, other in ((left, right), (right, left)):
        if (lanes := undefined(one)) is not None:
            decided = decides(other.data)
            if (others := undefined(other)) is not None:
                decided = decided & ~others
            mark(out, np.broadcast_to(lanes & ~decided, out.data.shape))


def _no_bits(data: np.ndarray) -> np.ndarray:
    return data == 0


def _all_bits(data: np.ndarray) -> np.ndarray:
    return data if data.dtype == bool else np.invert(data) == 0


def _dot(self, name, method, out, args, kwargs) -> None:
    a, b, d = (undefined(argument) for argument in args[:3])
    if a is not None:
        _spread(out, a.any(axis=-1, keepdims=True))
    if b is not None:
        _spread(out, b.any(axis=-2, keepdims=True))
    if d is not None:
        _spread(out, d)


_SPECIAL: dict[str, Callable] = {"select": _select, "and": _logical, "or": _logical, "dot": _dot}
