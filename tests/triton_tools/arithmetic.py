"""Arithmetic of Triton's interpreter made that of the hardware: bfloat16, tf32, and NaN in minima and maxima.

The interpreter keeps bfloat16 as ``uint16`` and mostly computes with those bits. Here every operation on bfloat16 is
done in float32 and rounded to nearest even once, as the compiler's code does it.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import triton.language as tl
from triton.runtime import interpreter as stock

Handle = stock.TensorHandle

# Operations that compute with the values of their operands; selections and the like only move bits.
VALUE_OPERATIONS = ("binary_op", "unary_op", "create_fma", "create_clampf", "create_erf", "create_rsqrt")
NATIVE_FLOATS = (tl.bfloat16, tl.float16, tl.float32, tl.float64)


def decode(bits: np.ndarray) -> np.ndarray:
    """Float32 values of bfloat16 bits."""
    return (np.asarray(bits).astype(np.uint32) << np.uint32(16)).view(np.float32)


def encode(values: np.ndarray) -> np.ndarray:
    """Bfloat16 bits of float32 values, rounded to nearest even; NaN stays NaN."""
    values = np.asarray(values, dtype=np.float32)
    bits = values.view(np.uint32)
    odd = (bits >> np.uint32(16)) & np.uint32(1)
    with np.errstate(over="ignore"):  # a NaN's bits may wrap; they are not used
        rounded = (bits + odd + np.uint32(0x7FFF)) >> np.uint32(16)
    quiet = (bits >> np.uint32(16)) | np.uint32(0x40)
    return np.where(np.isnan(values), quiet, rounded).astype(np.uint16)


def to_tf32(values: np.ndarray) -> np.ndarray:
    """Float32 values cut to the 10 bits of mantissa that a tensor core reads."""
    return (np.ascontiguousarray(values).view(np.uint32) & np.uint32(0xFFFFE000)).view(np.float32)


def repair() -> None:
    """Patch the interpreter's arithmetic, for good; ``interpreter.install`` calls it once."""
    builder = stock.InterpreterBuilder
    for name in VALUE_OPERATIONS:
        setattr(builder, name, _in_float32(getattr(builder, name)))
    # What tl.maximum and tl.minimum mean unless told otherwise: the operand that is a number (right since 3.8).
    builder.create_maxnumf = lambda self, a, b: self.binary_op(a, b, np.fmax)
    builder.create_minnumf = lambda self, a, b: self.binary_op(a, b, np.fmin)
    builder.get_bf16 = lambda self, value: Handle(encode(np.array([value])), tl.bfloat16)
    builder.cast_impl = _cast(builder.cast_impl)
    builder.create_fp_to_fp = _fp_to_fp(builder.create_fp_to_fp)
    builder.create_dot = _dot(builder.create_dot)
    builder.create_atomic_rmw = _atomic_rmw(builder.create_atomic_rmw)
    stock.ReduceOps.min_max = _reduction(_min_max(stock.ReduceOps.min_max))
    stock.ReduceOps.sum = _reduction(stock.ReduceOps.sum)
    for name in ("cumsum", "cumprod"):
        setattr(stock.ScanOps, name, _reduction(getattr(stock.ScanOps, name)))


def _is_bf16(handle: object) -> bool:
    return isinstance(handle, Handle) and handle.dtype.scalar == tl.bfloat16 and handle.data.dtype == np.uint16


def _widened(argument: Any) -> Any:
    return Handle(decode(argument.data), tl.float32) if _is_bf16(argument) else argument


def _narrowed(handle: Any) -> Any:
    return Handle(encode(handle.data), tl.bfloat16) if handle.data.dtype == np.float32 else handle


def _in_float32(method: Callable) -> Callable:
    def operation(self, *args):
        if not any(map(_is_bf16, args)):
            return method(self, *args)
        return _narrowed(method(self, *map(_widened, args)))  # a comparison's result is no float: left as it is

    return operation


def _cast(method: Callable) -> Callable:
    def cast_impl(self, src, dst_type):
        target = dst_type.scalar
        if _is_bf16(src) and target == tl.bfloat16:
            return src
        src = _widened(src)
        # From float64 by way of float32: rounds twice, which matters to one value in 2^29.
        return Handle(encode(src.data), tl.bfloat16) if target == tl.bfloat16 else method(self, src, dst_type)

    return cast_impl


def _fp_to_fp(method: Callable) -> Callable:
    def create_fp_to_fp(self, src, dst_type, rounding):
        source, target = src.dtype.scalar, dst_type.scalar
        if source not in NATIVE_FLOATS or target not in NATIVE_FLOATS:
            return method(self, src, dst_type, rounding)
        if rounding != stock._ir.ROUNDING_MODE.RTZ:
            return self.cast_impl(src, dst_type)
        if target == tl.bfloat16:
            bits = np.ascontiguousarray(_widened(src).data.astype(np.float32)).view(np.uint32) >> np.uint32(16)
            return Handle(bits.astype(np.uint16), tl.bfloat16)
        return method(self, _widened(src), dst_type, rounding)

    return create_fp_to_fp


def _dot(method: Callable) -> Callable:
    def create_dot(self, a, b, d, input_precision, *rest):
        if a.dtype.scalar == tl.float32 and input_precision == stock._ir.INPUT_PRECISION.TF32:
            a, b = (Handle(to_tf32(operand.data), tl.float32) for operand in (a, b))
        out = method(self, _widened(a), _widened(b), _widened(d), input_precision, *rest)
        return _narrowed(out) if _is_bf16(d) else out

    return create_dot


def _atomic_rmw(method: Callable) -> Callable:
    def create_atomic_rmw(self, operation, ptr, val, mask, *rest):
        if not _is_bf16(val):
            return method(self, operation, ptr, val, mask, *rest)
        if operation != stock._ir.ATOMIC_OP.FADD:
            raise NotImplementedError(f"of bfloat16 atomics only the addition is interpreted, not {operation}")
        old = np.zeros(val.data.shape, dtype=np.uint16)
        one, zero = np.ones(1, dtype=bool), np.zeros(1, dtype=np.uint16)
        for lane in zip(*np.nonzero(np.broadcast_to(mask.data, old.shape)), strict=True):  # lanes may meet
            at = ptr.data[lane].reshape(1)
            found = stock._interpreter.load(at, one, zero, zero.dtype)
            old[lane] = found[0]
            stock._interpreter.store(at, encode(decode(found) + decode(val.data[lane])), one)
        return Handle(old, tl.bfloat16)

    return create_atomic_rmw


def _narrowed_tensor(tensor: Any) -> Any:
    if tensor.dtype != tl.float32:
        return tensor
    kind = tl.block_type(tl.bfloat16, tensor.type.shape) if tensor.type.is_block() else tl.bfloat16
    return tl.core.tensor(_narrowed(tensor.handle), kind)


def _reduction(method: Callable) -> Callable:
    """Widen one-tensor reductions and scans of bfloat16; the index among their results stays."""

    def reduction(self, input, *args, **kwargs):
        value = input[0] if isinstance(input, tuple) else input
        if not _is_bf16(value.handle):
            return method(self, input, *args, **kwargs)
        out = method(self, self.to_tensor(decode(value.handle.data), tl.float32), *args, **kwargs)
        if isinstance(out, tuple | list):
            return type(out)(map(_narrowed_tensor, out))
        return _narrowed_tensor(out)

    return reduction


def _min_max(method: Callable) -> Callable:
    """NaN is passed over without numpy's warning, nor its exception where there is nothing else."""
    quiet = {
        np.nanmax: np.fmax.reduce,
        np.nanmin: np.fmin.reduce,
        np.nanargmax: lambda x, **axes: np.argmax(np.where(np.isnan(x), -np.inf, x), **axes),
        np.nanargmin: lambda x, **axes: np.argmin(np.where(np.isnan(x), np.inf, x), **axes),
    }

    def min_max(self, input, val_reduce_op, idx_reduce_op=None):
        value, index = (quiet.get(operation, operation) for operation in (val_reduce_op, idx_reduce_op))
        return method(self, input, value, index)

    return min_max
