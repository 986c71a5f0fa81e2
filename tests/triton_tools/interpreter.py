"""Triton's interpreter made trustworthy, and a sanitizer for the kernels that run in it.

    from tests.triton_tools.interpreter import sanitize

    with sanitize():
        kernel[grid](x, out, n, BLOCK=64)  # or whatever launches it

raises a ``Finding`` (``findings.py``) at the first

* ``OutOfBounds``: load, store or atomic outside the tensor (the *view*) that the pointer was made from, unless its lane
  is masked off. Another tensor's memory, and what lies between the rows of a strided view, count as outside;
* ``Race``: a location that one program writes and another reads or writes, unless both are atomic; two lanes of a store
  that write different values to one location;
* ``UninitialisedLanes``: a masked load has no ``other``, and one of its masked-off lanes decides what is stored, an
  address, a mask or a branch. Lanes that a later mask or ``tl.where`` removes are fine;
* ``IntegerOverflow``, ``AssertionFired``: arithmetic that does not fit 32 bits, ``tl.device_assert``, ``tl.assume``.

Programs run in an order shuffled by ``sanitize(seed=...)``; ``order="forward"`` or ``"backward"`` are the others.
``sanitize(arithmetic=...)`` computes with the errors of a GPU (``gpu_arithmetic.py``), by default ``arithmetic_mode``.
``sanitize(races=False)`` is for kernels whose programs wait for one another through atomics, which is not understood.
``with sanitize() as seen`` counts launches in ``seen``, so that a test can tell that its kernel ran at all.
``check_orders(run)`` raises ``OrderDependence`` if what ``run()`` returns depends on the order of programs, for kernels
whose atomics, which are no race, hide that.

``install()`` alone, which ``sanitize`` calls and tests/interpreted/conftest.py, too, repairs for good what the stock
interpreter computes wrongly (``arithmetic.py``), has integer overflow and ``tl.device_assert`` raise, and drops numpy's
warnings. All of this needs ``TRITON_INTERPRET=1`` before triton is imported. Written for triton 3.6 to 3.9.

Not seen: races and missing barriers inside one program, lanes lost in ``T`` or in descriptors' offsets (their NaN is
still there), overflow where a kernel narrows an integer by a cast. Overflow is found in masked-off lanes, too.
"""

import os
import random
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
import triton
from triton.runtime import interpreter as stock

from tests.triton_tools import arithmetic, gpu_arithmetic, lanes
from tests.triton_tools.findings import (
    AssertionFired,
    Finding,
    IntegerOverflow,
    OrderDependence,
    OutOfBounds,
    Race,
    UninitialisedLanes,
)
from tests.triton_tools.memory import Memory

__all__ = [
    "AssertionFired",
    "Finding",
    "IntegerOverflow",
    "OrderDependence",
    "OutOfBounds",
    "Race",
    "UninitialisedLanes",
    "check_orders",
    "install",
    "sanitize",
]

# Private names of triton that are patched or used; where one is gone, install() says so.
NEEDED = {
    "": "GridExecutor InterpreterBuilder InterpreterOptions ReduceOps ScanOps TensorHandle interpreter_builder "
    "_get_np_dtype _implicit_cvt _interpreter _ir _patch_lang _patch_lang_tensor _unwrap_tensor",
    "GridExecutor": "__call__",
    "InterpreterBuilder": "binary_op unary_op cast_impl set_grid_idx create_and create_assert create_assume "
    "create_atomic_cas create_atomic_rmw create_clampf create_dot create_erf create_fma create_fp_to_fp "
    "create_exp create_exp2 create_fdiv create_gather create_masked_load create_masked_store create_maxnumf "
    "create_minnumf create_or create_rsqrt create_select",
    "InterpreterOptions": "debug",
    "ReduceOps": "apply min_max sum",
    "ScanOps": "apply cumprod cumsum",
    "_interpreter": "load store",
    "_ir": "ATOMIC_OP INPUT_PRECISION ROUNDING_MODE",
}

_active: "_Sanitizer | None" = None
_installed = False
arithmetic_mode = "exact"  # of sanitize(), where it is told no other
_patched: set[int] = set()  # modules, by their globals, for which the launch in progress has patched the language


def install() -> None:
    """Repair the interpreter for good; again does nothing."""
    global _installed
    if _installed:
        return
    if os.environ.get("TRITON_INTERPRET") != "1":
        raise RuntimeError("set TRITON_INTERPRET=1 before triton is imported: its kernels are not interpreted now")
    missing = _missing()
    if missing:
        raise RuntimeError(
            f"triton {triton.__version__} has no {', '.join(missing)} in triton.runtime.interpreter: "
            "tests/triton_tools is written for triton 3.6 to 3.9 and has to be taught this version"
        )
    _installed = True
    arithmetic.repair()
    builder = stock.InterpreterBuilder
    stock.interpreter_builder.options = replace(stock.interpreter_builder.options, debug=True)
    builder.create_assert = _assert
    builder.create_assume = lambda self, condition: _assert(self, condition, "tl.assume does not hold")
    stock._patch_lang_tensor = _patch_tensor(stock._patch_lang_tensor)
    stock._patch_lang = _patch_once(stock._patch_lang)
    stock._get_np_dtype = _by_name(stock._get_np_dtype)
    stock.GridExecutor.__call__ = _launch(stock.GridExecutor.__call__)


@contextmanager
def sanitize(
    *, seed: int = 0, order: str = "shuffled", races: bool = True, arithmetic: str | None = None
) -> Iterator[Counter[str]]:
    """Raise a ``Finding`` at the first bug of a kernel launched in this context; see the module's docstring.

    ``order`` is "shuffled" (by ``seed``), "forward" or "backward", and ``arithmetic`` one of ``gpu_arithmetic.MODES``
    (random errors are functions of ``seed``, too). Yields how often each kernel was launched.
    """
    global _active
    install()
    if _active is not None:
        raise RuntimeError("sanitize() does not nest")
    if order not in ("shuffled", "forward", "backward"):
        raise ValueError(f'order must be "shuffled", "forward" or "backward", not {order!r}')
    arithmetic = arithmetic or arithmetic_mode
    if arithmetic not in gpu_arithmetic.MODES:
        raise ValueError(f"arithmetic must be one of {', '.join(gpu_arithmetic.MODES)}, not {arithmetic!r}")
    _active = sanitizer = _Sanitizer(random.Random(seed), order, races)
    try:
        with ExitStack() as patches:
            for owner, name, method in gpu_arithmetic.patches(arithmetic, seed):
                patches.enter_context(patch.object(owner, name, method))
            # After those: marks of undefined lanes are passed on around whatever computes.
            for owner, name, value in sanitizer.patches():
                patches.enter_context(patch.object(owner, name, value))
            yield sanitizer.launches
    finally:
        _active = None


def check_orders(run: Callable[[], Any], *, seeds: Sequence[int] = (0, 1), races: bool = True) -> Any:
    """Result of ``run`` (a tensor or several), after it came out the same, bit for bit, in several orders.

    ``run`` must make its outputs afresh each time. Sums of floats by atomics do differ.
    """
    orders: list[dict[str, Any]] = [{"order": "forward"}, {"order": "backward"}, *({"seed": seed} for seed in seeds)]
    first = None
    for order in orders:
        with sanitize(races=races, **order):
            result = run()
        tensors = [result] if isinstance(result, torch.Tensor) else list(result)
        bits = [tensor.detach().contiguous().view(-1).view(torch.uint8) for tensor in tensors]
        first = bits if first is None else first
        for number, (got, expected) in enumerate(zip(bits, first, strict=True)):
            if not torch.equal(got, expected):
                raise OrderDependence(
                    f"result {number} with programs in order {order} is not that of the forward order"
                )
    return result


class _Sanitizer:
    """What is patched while the context is open, and what it keeps from program to program."""

    def __init__(self, rng: random.Random, order: str, races: bool) -> None:
        self.rng = rng
        self.order = order
        self.races = races
        self.launches: Counter[str] = Counter()
        self.memory: Memory | None = None  # of the launch in progress
        self.programs: list[int] = []
        self.atomic = False  # an atomic load or store, which triton 3.9 makes of plain ones

    def patches(self) -> Iterator[tuple[object, str, object]]:
        """Owner, name and replacement of each patch."""
        builder = stock.InterpreterBuilder
        yield stock.GridExecutor, "__call__", self.launch(stock.GridExecutor.__call__)
        yield stock, "_implicit_cvt", self.argument(stock._implicit_cvt)
        yield builder, "set_grid_idx", self.place(builder.set_grid_idx)
        yield builder, "create_masked_load", self.load(builder.create_masked_load)
        yield builder, "create_masked_store", self.store(builder.create_masked_store)
        yield builder, "create_atomic_rmw", self.atomic_rmw(builder.create_atomic_rmw)
        yield builder, "create_atomic_cas", self.atomic_cas(builder.create_atomic_cas)
        for name in ("create_atomic_load", "create_atomic_store", "create_atomic_poll"):
            if hasattr(builder, name):
                yield builder, name, self.atomically(getattr(builder, name))
        for name, operation in lanes.operations().items():
            yield builder, name, operation
        yield stock.ReduceOps, "apply", lanes.tracked_reduction(stock.ReduceOps.apply, scan=False)
        yield stock.ScanOps, "apply", lanes.tracked_reduction(stock.ScanOps.apply, scan=True)

    def launch(self, method: Callable) -> Callable:
        def __call__(executor, *args, **kwargs):
            names: dict[int, str] = {}
            for name, value in {**dict(zip(executor.arg_names, args, strict=False)), **kwargs}.items():
                if hasattr(value, "data_ptr"):
                    at = value.data_ptr()
                    names[at] = f"{names[at]}/{name}" if at in names else name
            kernel = executor.fn.__name__
            self.launches[kernel] += 1
            self.memory, self.programs = Memory(kernel, names, races=self.races), []
            try:
                return method(executor, *args, **kwargs)
            finally:
                self.memory = None

        return __call__

    def argument(self, convert: Callable) -> Callable:
        def _implicit_cvt(arg):
            value = convert(arg)
            if hasattr(arg, "data_ptr"):
                value.handle.data = value.handle.data + self.memory.tag(stock._unwrap_tensor(arg))
            return value

        return _implicit_cvt

    def place(self, method: Callable) -> Callable:
        def set_grid_idx(builder, x, y, z):
            nx, ny, nz = self.memory.grid = builder.grid_dim
            if not self.programs:
                self.programs = list(range(nx * ny * nz))
                if self.order == "shuffled":
                    self.rng.shuffle(self.programs)
                elif self.order == "backward":
                    self.programs.reverse()
            program = self.programs[(x * ny + y) * nz + z]
            self.memory.begin_program(program)
            return method(builder, program // (ny * nz), program // nz % ny, program % nz)

        return set_grid_idx

    def load(self, method: Callable) -> Callable:
        def create_masked_load(builder, ptrs, mask, other, *args, **kwargs):
            active = self.active(ptrs, mask, "load")
            real = self.access("load", ptrs, active)
            absent = other is None and not active.all()
            out = method(builder, real, mask, lanes.nan_if_invalid(ptrs) if absent else other, *args, **kwargs)
            if absent:
                lanes.mark(out, ~active)
            elif (undefined := lanes.undefined(other)) is not None:
                lanes.mark(out, undefined & ~active)
            return out

        return create_masked_load

    def store(self, method: Callable) -> Callable:
        def create_masked_store(builder, ptrs, value, mask, *args, **kwargs):
            active = self.active(ptrs, mask, "store")
            self.defined(value, "the value of a store", active)
            real = self.access("store", ptrs, active, value.data.itemsize)
            out = method(builder, real, value, mask, *args, **kwargs)
            if self.races and active.size > 1:
                kept = stock._interpreter.load(real.data, active, np.zeros_like(value.data), value.data.dtype)
                bits = f"u{kept.dtype.itemsize}"
                if ((kept.view(bits) != np.ascontiguousarray(value.data).view(bits)) & active).any():
                    raise Race(f"{self.memory.where()}: lanes of a store write different values to one location")
            return out

        return create_masked_store

    def atomic_rmw(self, method: Callable) -> Callable:
        def create_atomic_rmw(builder, operation, ptr, val, mask, *args, **kwargs):
            active = self.active(ptr, mask, "atomic")
            self.defined(val, "the value of an atomic", active)
            return method(builder, operation, self.access("atomic", ptr, active), val, mask, *args, **kwargs)

        return create_atomic_rmw

    def atomic_cas(self, method: Callable) -> Callable:
        def create_atomic_cas(builder, ptr, cmp, val, *args, **kwargs):
            active = self.active(ptr, np.True_, "atomic")
            for operand in (cmp, val):
                self.defined(operand, "an operand of an atomic")
            return method(builder, self.access("atomic", ptr, active), cmp, val, *args, **kwargs)

        return create_atomic_cas

    def atomically(self, method: Callable) -> Callable:
        def operation(*args, **kwargs):
            self.atomic = True
            try:
                return method(*args, **kwargs)
            finally:
                self.atomic = False

        return operation

    def active(self, ptrs: Any, mask: Any, kind: str) -> np.ndarray:
        """Lanes that touch memory; neither which they are nor where they point may be undefined."""
        self.defined(mask, f"the mask of a {kind}")
        data = mask.data if isinstance(mask, stock.TensorHandle) else mask  # descriptors' are bare up to 3.8
        active = np.broadcast_to(data, ptrs.data.shape)
        self.defined(ptrs, f"the address of a {kind}", active)
        return active

    def defined(self, handle: Any, what: str, active: np.ndarray | bool = True) -> None:
        """Raise if an active lane of ``handle`` is undefined."""
        if lanes.undefined(handle) is not None:
            lanes.require(handle, f"{self.memory.where()}: {what}", active)

    def access(self, kind: str, ptrs: Any, active: np.ndarray, itemsize: int = 1) -> Any:
        """The pointers, checked and without the tensor's number."""
        size = max(itemsize, ptrs.get_element_ty().primitive_bitwidth // 8)
        real = self.memory.access("atomic" if self.atomic else kind, ptrs.data, active, size)
        return stock.TensorHandle(real, ptrs.dtype)


def _missing() -> list[str]:
    missing = []
    for owner, names in NEEDED.items():
        found = getattr(stock, owner, None) if owner else stock
        absent = [name for name in names.split() if not hasattr(found, name)]
        missing += [f"{owner}.{name}".lstrip(".") for name in absent] if found is not None else []
    return missing


def _assert(self, condition, message):
    """Like the compiled kernel's; undefined lanes assert nothing."""
    holds = condition.data.astype(bool)
    undefined = lanes.undefined(condition)
    if not (holds if undefined is None else holds | undefined).all():
        program = f"program {tuple(self.grid_idx)}: {message}"
        raise (IntegerOverflow if "overflow detected for operation" in str(message) else AssertionFired)(program)


def _patch_tensor(method: Callable) -> Callable:
    """No branch on undefined lanes; and 3.6 takes no integer from an array of one element with numpy 2.4."""

    def _patch_lang_tensor(tensor, scope):
        method(tensor, scope)
        truth = tensor.__bool__

        def __bool__(self):
            lanes.require(self.handle, "a branch")
            return truth(self)

        def __index__(self):
            lanes.require(self.handle, "the bound of a loop")
            return int(self.handle.data.squeeze())

        scope.set_attr(tensor, "__bool__", __bool__)
        scope.set_attr(tensor, "__index__", __index__)

    return _patch_lang_tensor


def _by_name(method: Callable) -> Callable:
    """The answer of the first time: the stock interpreter makes a table of every dtype for each value."""
    known: dict[str, np.dtype] = {}

    def _get_np_dtype(kind):
        name = kind.scalar.name
        if name not in known:
            known[name] = method(kind)
        return known[name]

    return _get_np_dtype


def _patch_once(method: Callable) -> Callable:
    """Once for each module in a launch: the stock interpreter does it again at every call of a device function.

    That takes half the time of our kernels, and nothing undoes what such a call has patched.
    """

    def _patch_lang(fn):
        module = id(fn.__globals__)
        if module in _patched:
            return None  # only a launch, which begins with none, uses the result
        _patched.add(module)
        return method(fn)

    return _patch_lang


def _launch(method: Callable) -> Callable:
    """Without numpy's warnings, which no GPU gives, and with a finding as itself instead of triton's wrapping of it."""

    def __call__(executor, *args, **kwargs):
        _patched.clear()
        try:
            with np.errstate(all="ignore"):
                return method(executor, *args, **kwargs)
        except Exception as error:
            cause: BaseException = error
            while cause.__cause__ is not None:
                cause = cause.__cause__
            if not isinstance(cause, Finding):
                raise
        raise cause

    return __call__
