"""Kernels over rows of H elements: gradients on their way to the caller's rows and to the parameters' dtypes.

A program owns a stretch of one row, or of a whole matrix. Offsets that multiply a row are 64-bit.
"""

import triton
import triton.language as tl


@triton.jit(do_not_specialize_on_alignment=["labels_ptr", "residual_ptr"])
def add_label_rows(
    flag_ptr,  # () int32, read with CONDITIONAL: nothing is added where it is 0
    out_ptr,  # (C, H) float32, added to
    weight_ptr,  # (V, H), rows of the head in the dtype of the operands
    labels_ptr,  # (C,) int64
    residual_ptr,  # (C,) float32
    width,
    vocab,
    out_stride,
    weight_stride,
    weight_col_stride,
    CONDITIONAL: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Add to each row ``residual`` times the head's row of its label; grid (C, ceil(H / BLOCK))."""
    if CONDITIONAL:  # noqa: SIM102 (the compiler takes no constant and a tensor with "and")
        if tl.load(flag_ptr) == 0:
            return
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = at < width
    label = tl.minimum(tl.maximum(tl.load(labels_ptr + row), 0), vocab - 1)
    own = tl.load(weight_ptr + label * weight_stride + at.to(tl.int64) * weight_col_stride, mask=inside, other=0.0)
    place = out_ptr + row * out_stride + at
    total = tl.load(place, mask=inside, other=0.0) + own.to(tl.float32) * tl.load(residual_ptr + row)
    tl.store(place, total, mask=inside)


@triton.jit
def to_input_rows(
    dx_ptr,  # (N + 1, H) float32 packed rows, the last one 0
    slot_ptr,  # (R,) int64 packed place of each input row, N where it is not scored
    factor_ptr,  # () upstream gradient
    out_ptr,  # (R, H) in any dtype, written
    width,
    dx_stride,
    BLOCK: tl.constexpr,
):
    """Write packed rows times a factor to their places in the input; grid (R, ceil(H / BLOCK))."""
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = at < width
    value = tl.load(dx_ptr + tl.load(slot_ptr + row) * dx_stride + at, mask=inside, other=0.0)
    value = value * tl.load(factor_ptr).to(tl.float32)
    tl.store(out_ptr + row * width + at, value.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def scale_and_round(
    grad_ptr,  # (elements,) float32
    factor_ptr,  # () float32
    out_ptr,  # (elements,) in any dtype, written
    elements,
    BLOCK: tl.constexpr,
):
    """Write a matrix times a factor, rounded once; grid (ceil(elements / BLOCK),)."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < elements
    value = tl.load(grad_ptr + at, mask=inside, other=0.0) * tl.load(factor_ptr)
    tl.store(out_ptr + at, value.to(out_ptr.dtype.element_ty), mask=inside)
