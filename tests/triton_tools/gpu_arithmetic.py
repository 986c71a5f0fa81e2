"""What a GPU computes less accurately than numpy does: exponentials, quotients, and sums in tensor cores.

``sanitize(arithmetic=...)`` runs kernels with one of ``MODES``. Each is a model, not a chip. What a kernel is given
there may be worse than on any GPU, and never better than what the vendor promises.

``"approximate"`` has an error in every float32 exponential and quotient, of random size within the bounds. It is a
function of the operands and the seed, as on a chip, so equal operands give equal results. ``"worst+"`` and ``"worst-"``
have the largest error there may be, upwards or downwards in all of them. ``"truncating"`` has the sums of ``tl.dot``.

Compiled for NVIDIA, float32 ``tl.exp`` is ``ex2.approx.f32`` of a product that was rounded, ``/`` is ``div.full.f32``,
and ``tl.exp2`` is ``ex2.approx.ftz.f32``. ``tl.log`` and all of float64 are libdevice's, which is as accurate as numpy.
The gate counts such instructions. It refuses those that have no model here (``Target.approximate`` in ``aot.py``).

The bounds: ``ex2.approx`` and ``div.full`` are within 2 ulp, and ex2 of 0 is 1 (PTX ISA, "ex2" and "div"). So the
exponential of x is within ``2 + 1.173 |x|`` ulp, which is what the CUDA C++ Programming Guide says of ``__expf``.
AMD's ``v_exp_f32`` is within 1 ulp, and its quotients are rounded correctly, so these bounds hold there too.

The sums: a tensor core multiplies exactly, adds a group of products to the accumulator, and cuts the result towards
zero (Fasi, Higham, Mikaitis and Pranesh, PeerJ Computer Science 7:e330, for V100, T4 and A100; Khattak and Mikaitis,
arXiv 2512.07004, for H100 and B200). A group has 256 bits of an operand, which is 16 products of 16-bit numbers, as on
an H100. An A100 adds 8 at a time. The cut of each product to the exponent of the largest one, a few bits further down,
is left out.
"""

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
import triton.language as tl
from torch import Tensor
from triton.runtime import interpreter as stock

from tests.triton_tools.arithmetic import decode, to_tf32

SIXTEEN_BIT = (torch.bfloat16, torch.float16)
MODES = ("exact", "approximate", "worst+", "worst-", "truncating")
ULP = 2  # the largest error of ex2.approx and div.full, in units of the result's last place
GROUP_BITS = 256  # of one operand, whose products a tensor core adds before it cuts
LOG2_E = np.float32(np.log2(np.e))
SMALLEST_NORMAL = np.finfo(np.float32).tiny


def patches(mode: str, seed: int) -> Iterator[tuple[object, str, Callable]]:
    """Owner, name and replacement of what the interpreter computes by ``mode``."""
    builder = stock.InterpreterBuilder
    if mode == "truncating":
        yield builder, "create_dot", _truncating(builder.create_dot)
    elif mode != "exact":
        errors = Errors(mode, seed)
        yield builder, "create_exp", _of_float32(errors.exp, builder.create_exp)
        yield builder, "create_exp2", _of_float32(errors.exp2, builder.create_exp2)
        yield builder, "create_fdiv", _of_float32(errors.quotient, builder.create_fdiv)


class Errors:
    """Float32 functions of float32 arrays, with the errors of ``mode``."""

    def __init__(self, mode: str, seed: int) -> None:
        self.mode = mode
        self.seed = seed

    def exp(self, x: np.ndarray) -> np.ndarray:
        """``ex2.approx.f32`` of x times log2(e), a product that is rounded to float32."""
        return self._ex2(x * LOG2_E)

    def exp2(self, x: np.ndarray) -> np.ndarray:
        """``ex2.approx.ftz.f32``, which has 0 for subnormal results."""
        result = self._ex2(x)
        return np.where(result < SMALLEST_NORMAL, np.float32(0), result)

    def quotient(self, x: np.ndarray, y: np.ndarray) -> np.ndarray:
        """``div.full.f32``."""
        x, y = np.broadcast_arrays(x, y)
        return self._off(x.astype(np.float64) / y, x, y)

    def _ex2(self, y: np.ndarray) -> np.ndarray:
        return np.where(y == 0, np.float32(1), self._off(np.exp2(y.astype(np.float64)), y))

    def _off(self, exact: np.ndarray, *operands: np.ndarray) -> np.ndarray:
        """Float32 values at most ULP away from ``exact``; 0, infinities and NaN as they are."""
        nearest = exact.astype(np.float32)
        ulp = np.spacing(np.abs(nearest)).astype(np.float64)
        if self.mode == "approximate":
            # The rounding that follows is half a unit.
            off = (exact + self._signed(operands) * (ULP - 0.5) * ulp).astype(np.float32)
        else:
            sign = 1 if self.mode == "worst+" else -1
            bound = exact + sign * ULP * ulp
            off = bound.astype(np.float32)
            beyond = (off - bound) * sign > 0
            off = np.where(beyond, np.nextafter(off, np.float32(-sign * np.inf)), off)
        off = np.where(off * np.sign(exact) < 0, np.float32(0), off)  # no subnormal result changes its sign
        return np.where(np.isfinite(nearest) & (nearest != 0), off, nearest).astype(np.float32)

    def _signed(self, operands: tuple[np.ndarray, ...]) -> np.ndarray:
        """Numbers between -1 and 1, of which each is a function of the operands' bits and the seed."""
        hashed = np.full(operands[0].shape, self.seed * 0x9E3779B97F4A7C15 % 2**64, np.uint64)
        for operand in operands:
            hashed = hashed ^ np.ascontiguousarray(operand, np.float32).view(np.uint32).astype(np.uint64)
            for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):  # splitmix64's
                hashed = (hashed ^ (hashed >> np.uint64(shift))) * np.uint64(factor)
            hashed = hashed ^ (hashed >> np.uint64(31))
        return hashed.astype(np.float64) * 2.0**-63 - 1


@np.errstate(all="ignore")  # operands may be memory that nobody has written
def truncating_product(x: np.ndarray, w: np.ndarray, sums: np.ndarray, group: int) -> np.ndarray:
    """Float32 ``sums + x @ w``, where every ``group`` of exact products is added to the sums and cut towards zero."""
    x, w = x.astype(np.float64), w.astype(np.float64)
    for first in range(0, x.shape[-1], group):
        exact = x[..., first : first + group] @ w[..., first : first + group, :] + sums
        sums = exact.astype(np.float32)
        sums = np.where(np.abs(sums) > np.abs(exact), np.nextafter(sums, np.float32(0)), sums)
    return sums


def truncating_matmul_into(a: Tensor, b: Tensor, out: Tensor, accumulate: bool, alpha: float = 1.0) -> None:
    """``out (+)= alpha * a @ b`` as the library's GEMM of 16-bit operands sums it; torch multiplies float32 operands.

    ``alpha`` is a power of two.
    """
    if a.dtype in SIXTEEN_BIT:
        sums = out.numpy() / np.float32(alpha) if accumulate else np.zeros(out.shape, np.float32)
        product = truncating_product(a.float().numpy(), b.float().numpy(), sums, GROUP_BITS // 16)
        out.copy_(torch.from_numpy(product)).mul_(alpha)
    elif accumulate or alpha != 1.0:
        torch.addmm(out, a, b, beta=float(accumulate), alpha=alpha, out=out)
    else:
        torch.mm(a, b, out=out)


def _of_float32(function: Callable, method: Callable) -> Callable:
    def operation(self, *operands):
        if any(operand.dtype.scalar != tl.float32 for operand in operands):
            return method(self, *operands)
        return stock.TensorHandle(function(*(operand.data for operand in operands)), tl.float32)

    return operation


def _truncating(method: Callable) -> Callable:
    def create_dot(self, a, b, d, input_precision, *rest):
        tf32 = a.dtype.scalar == tl.float32 and input_precision == stock._ir.INPUT_PRECISION.TF32
        if d.dtype.scalar != tl.float32 or not (tf32 or a.dtype.scalar.primitive_bitwidth == 16):
            return method(self, a, b, d, input_precision, *rest)  # no tensor core, or none that cuts
        x, w = (_values(operand, tf32) for operand in (a, b))
        group = GROUP_BITS // a.dtype.scalar.primitive_bitwidth
        return stock.TensorHandle(truncating_product(x, w, d.data, group), tl.float32)

    return create_dot


def _values(operand: Any, tf32: bool) -> np.ndarray:
    if tf32:
        return to_tf32(operand.data)
    return decode(operand.data) if operand.dtype.scalar == tl.bfloat16 else operand.data
