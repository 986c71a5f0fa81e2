"""Row kernels over a tile of logits: bias, scale and cap; online log-sum-exp with statistics; the gradient.

A program of ``reduce_rows`` or ``softmax_grad_rows`` owns a row, and a program of the others a stretch of one. No other
program writes there. Strides are in elements, and offsets that multiply a row are 64-bit.
"""

import triton
import triton.language as tl


@triton.jit
def _reach(cols, PADDED: tl.constexpr):
    """The column where accesses to a row end: the end of its padding, or of the row if it has none.

    One access that ends at an odd column would make the compiler narrow all of them. The kernels neither use nor keep
    what the padding holds.
    """
    if PADDED:
        return (cols + 15) // 16 * 16
    else:
        return cols


@triton.jit
def _capped(z, scale, softcap, HAS_SOFTCAP: tl.constexpr, NEAR_ZERO: tl.constexpr):
    """``softcap * tanh(scale * z / softcap)``, or ``scale * z``.

    The difference of exponentials loses digits of a small logit: up to ``softcap * 2.4e-7`` of it on a GPU, whose
    exponential is right to 2 ulp. NEAR_ZERO takes an odd polynomial there (relative error 1.4e-8 up to 0.5), and is
    the cap itself where the tanh rounds to 1, although a GPU's quotient is off by up to 2 ulp. The matmul kernels have
    no registers for either.
    """
    if HAS_SOFTCAP:
        y = z * (scale / softcap)
        t = tl.exp(-2.0 * tl.abs(y))
        size = (1.0 - t) / (1.0 + t)
        if NEAR_ZERO:
            size = tl.where(t < 2.0**-25, 1.0, size)
        far = tl.where(y < 0, -size, size)
        if NEAR_ZERO:
            small = tl.where(tl.abs(y) < 0.5, y, 0.0)
            u = small * small
            near = small * (1.0 + u * (-0.33333069 + u * (0.13324779 + u * (-0.05298607 + u * 0.017135001))))
            return softcap * tl.where(tl.abs(y) < 0.5, near, far)
        else:
            return softcap * far
    else:
        return z * scale


@triton.jit
def _cap_slope(z, softcap):
    """``1 - (z / softcap)^2``, the derivative of the cap by its argument: exactly 0 where it is saturated.

    A saturated logit and the quotient may each be off by 2 ulp, which is 9e-7 here. So whatever is less counts as 0.
    """
    capped = z / softcap
    slope = 1.0 - capped * capped
    return tl.where(slope < 2.0**-20, 0.0, slope)


@triton.jit
def apply_bias_scale_cap(
    tile_ptr,  # (C, Vt) float32, raw products; overwritten by final logits
    b_ptr,  # (Vt,), padded as far as the rows are
    cols,
    row_stride,
    scale,
    softcap,
    HAS_BIAS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    PADDED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Turn raw products into final logits, ``cap(scale * (z + bias))``; grid (C, ceil(Vt / BLOCK))."""
    base = tile_ptr + tl.program_id(0).to(tl.int64) * row_stride
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    reach = _reach(cols, PADDED)
    z = tl.load(base + at, mask=at < reach, other=0.0)
    if HAS_BIAS:
        z += tl.load(b_ptr + at, mask=at < reach, other=0.0).to(tl.float32)
    tl.store(base + at, _capped(z, scale, softcap, HAS_SOFTCAP, True), mask=at < reach)


@triton.jit
def _label_logp(target, highest, others):
    """``(z_y - max) - log(others + exp(z_y - max))``, in float64 so that a nearly certain label keeps its digits."""
    shifted = target.to(tl.float64) - highest.to(tl.float64)
    # ``x`` is the sum less 1. Where the label's logit is the largest, x is the sum of the others.
    x = others.to(tl.float64) + tl.where(shifted == 0.0, 0.0, tl.exp(shifted) - 1.0)
    total = 1.0 + x
    gone = total - 1.0  # what is left of x in the total: log(total) / gone * x has the digits of a small x
    log_total = tl.where(gone == 0.0, x, tl.log(total) * (x / tl.where(gone == 0.0, 1.0, gone)))
    return (shifted - log_total).to(tl.float32)


@triton.jit(do_not_specialize_on_alignment=["labels_ptr", "logp_ptr"])
def reduce_rows(
    tile_ptr,  # (C, Vt) float32, final logits of columns start..start+Vt-1
    labels_ptr,  # (C,) int64
    max_ptr,  # (C,) float32, as all that follow; read and written
    others_ptr,  # sum of exp(z - max) without the label's, which the sums that follow leave out as well
    target_ptr,
    entropy_ptr,
    logit_sum_ptr,
    argmax_ptr,  # (C,) int64
    square_sum_ptr,  # (C,) float32
    logp_ptr,  # (C,) float32, written with FRESH: the labels' log-probs
    cols,
    row_stride,
    start,
    FRESH: tl.constexpr,
    HAS_ENTROPY: tl.constexpr,
    HAS_LOGIT_SUM: tl.constexpr,
    HAS_ARGMAX: tl.constexpr,
    HAS_SQUARE_SUM: tl.constexpr,
    PADDED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Fold the tile into the running state of each row; grid (C,).

    FRESH: the tile has every column, and what the state holds is not read. There are no statistics then.
    """
    row = tl.program_id(0).to(tl.int64)
    base = tile_ptr + row * row_stride
    reach = _reach(cols, PADDED)
    column = tl.load(labels_ptr + row) - start
    if FRESH:
        running = -float("inf")
        others = 0.0
    else:
        running = tl.load(max_ptr + row)
        others = tl.load(others_ptr + row)
    entropy = tl.load(entropy_ptr + row) if HAS_ENTROPY else 0.0
    logit_sum = tl.load(logit_sum_ptr + row) if HAS_LOGIT_SUM else 0.0
    first = tl.load(argmax_ptr + row) if HAS_ARGMAX else column
    square_sum = tl.load(square_sum_ptr + row) if HAS_SQUARE_SUM else 0.0
    for left in range(0, cols, BLOCK):
        at = left + tl.arange(0, BLOCK)
        inside = at < cols
        z = tl.load(base + at, mask=at < reach, other=-float("inf"))
        z = tl.where(inside, z, -float("inf"))
        block_max = tl.max(z, axis=0)
        highest = tl.maximum(running, block_max)
        # A row of -inf so far (unreachable tokens) is shifted by 0, or -inf - -inf would be NaN.
        shift = tl.where(highest == -float("inf"), 0.0, highest)
        kept = tl.where(running == highest, 1.0, tl.exp(running - shift))
        if HAS_LOGIT_SUM:
            logit_sum += tl.sum(tl.where(inside, z, 0.0), axis=0)
        if HAS_ARGMAX:
            place = tl.argmax(z, axis=0, tie_break_left=True).to(tl.int64) + left + start
            first = tl.where(block_max > running, place, first)
        z = tl.where(tl.arange(0, BLOCK) == (column - left).to(tl.int32), -float("inf"), z)  # the label's own
        e = tl.exp(z - shift)
        if HAS_ENTROPY:
            # Moving the shift by d adds d * exp to every -e * log e.
            drop = tl.where(others > 0, (highest - running) * others, 0.0)
            own = tl.where(e > 0, e * (z - shift), 0.0)
            entropy = (entropy + drop) * kept - tl.sum(own, axis=0)
        if HAS_SQUARE_SUM:
            square_sum = square_sum * kept * kept + tl.sum(e * e, axis=0)
        others = others * kept + tl.sum(e, axis=0)
        running = highest
    tl.store(max_ptr + row, running)
    tl.store(others_ptr + row, others)
    if (column >= 0) & (column < cols):
        tl.store(target_ptr + row, tl.load(base + column))
    if FRESH:
        tl.store(logp_ptr + row, _label_logp(tl.load(base + column), running, others))
    if HAS_ENTROPY:
        tl.store(entropy_ptr + row, entropy)
    if HAS_LOGIT_SUM:
        tl.store(logit_sum_ptr + row, logit_sum)
    if HAS_ARGMAX:
        tl.store(argmax_ptr + row, first)
    if HAS_SQUARE_SUM:
        tl.store(square_sum_ptr + row, square_sum)


@triton.jit
def _exp_row(base, out, reach, cols, column, shift, BLOCK: tl.constexpr):
    """Write the row's ``exp(z - shift)``, 0 for the label's column; returns their sum and the largest logit."""
    highest = -float("inf")
    total = 0.0
    for left in range(0, cols, BLOCK):
        at = left + tl.arange(0, BLOCK)
        z = tl.load(base + at, mask=at < reach, other=-float("inf"))
        z = tl.where(at < cols, z, -float("inf"))
        highest = tl.maximum(highest, tl.max(z, axis=0))
        z = tl.where(tl.arange(0, BLOCK) == (column - left).to(tl.int32), -float("inf"), z)
        e = tl.exp(z - shift)
        tl.store(out + at, e.to(out.dtype.element_ty), mask=at < reach)
        total += tl.sum(e, axis=0)
    return total, highest


@triton.jit(do_not_specialize_on_alignment=["labels_ptr"])
def softmax_grad_rows(
    tile_ptr,  # (C, V) float32, final logits of whole rows
    out_ptr,  # (C, V) bfloat16, written: exp(z - shift), 0 for the label
    labels_ptr,  # (C,) int64
    max_ptr,  # (C,) float32, as all that follow; written
    others_ptr,
    target_ptr,
    factor_ptr,  # exp(shift - max), which turns the row into the gradient under its maximum
    residual_ptr,  # the label's own value: minus the sum of the others
    cols,
    row_stride,
    out_stride,
    SAFE: tl.constexpr,
    PADDED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The log-sum-exp of whole rows and their gradient, from one reading of the logits; grid (C,).

    The rounding of bfloat16 is relative, so any shift near the row's maximum gives the same accuracy. The first block's
    maximum is the shift. A row whose maximum is more than SAFE away from it is done again.
    """
    row = tl.program_id(0).to(tl.int64)
    base = tile_ptr + row * row_stride
    out = out_ptr + row * out_stride
    reach = _reach(cols, PADDED)
    at = tl.arange(0, BLOCK)
    z = tl.load(base + at, mask=at < reach, other=-float("inf"))
    shift = tl.max(tl.where(at < cols, z, -float("inf")), axis=0)
    shift = tl.where(shift == -float("inf"), 0.0, shift)
    column = tl.load(labels_ptr + row)
    total, highest = _exp_row(base, out, reach, cols, column, shift, BLOCK)
    if (highest > shift + SAFE) | ((highest < shift - SAFE) & (highest > -float("inf"))):
        shift = highest
        total, highest = _exp_row(base, out, reach, cols, column, shift, BLOCK)
    factor = tl.where(highest == -float("inf"), 1.0, tl.exp(shift - highest))
    tl.store(max_ptr + row, highest)
    tl.store(others_ptr + row, total * factor)
    tl.store(target_ptr + row, tl.load(base + column))
    tl.store(factor_ptr + row, factor)
    tl.store(residual_ptr + row, -total)


@triton.jit(do_not_specialize_on_alignment=["scale_ptr", "others_ptr"])
def float16_scales(
    scale_ptr,  # (C,) float32 coefficient of each row over its sum of exponentials
    others_ptr,  # (C,) float32 minus the label's value of each row; where it is 0 the largest value is about 1
    applied_ptr,  # (C,) float32, written: scale times a power of two
    left_ptr,  # (C,) float32, written: the inverse of the power
    rows,
    expected,
    HAS_SCALE: tl.constexpr,
    TOP: tl.constexpr,
    SLACK: tl.constexpr,
    LEAST: tl.constexpr,
    MOST: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """See ``float16_range.row_scales``; grid (ceil(C / BLOCK),). ``expected`` is the exponent."""
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = row < rows
    others = tl.load(others_ptr + row, mask=inside, other=1.0)
    largest = tl.where(others > 0, others, 1.0)
    scale = tl.load(scale_ptr + row, mask=inside, other=1.0) if HAS_SCALE else 1.0
    largest = largest * tl.abs(scale)
    largest = tl.minimum(tl.maximum(largest, LEAST), MOST)
    exponent = (largest.to(tl.int32, bitcast=True) >> 23) - 126  # the mantissa is in [1/2, 1)
    slack = tl.minimum(tl.maximum(expected - exponent, 0), SLACK)
    power = TOP - slack - exponent
    tl.store(applied_ptr + row, scale * ((127 + power) << 23).to(tl.float32, bitcast=True), mask=inside)
    tl.store(left_ptr + row, ((127 - power) << 23).to(tl.float32, bitcast=True), mask=inside)


@triton.jit(do_not_specialize_on_alignment=["labels_ptr", "max_ptr", "others_ptr", "scale_ptr", "residual_ptr"])
def dlogits_rows(
    flag_ptr,  # () int32, read with CONDITIONAL: nothing is written where it is 0
    tile_ptr,  # (C, Vt) float32, final logits; overwritten unless out_ptr is another tensor
    out_ptr,  # (C, Vt) float32 (the tile itself) or the dtype of the GEMM operands
    labels_ptr,  # (C,) int64
    max_ptr,  # (C,) float32
    others_ptr,  # (C,) float32
    scale_ptr,  # (C,) float32
    residual_ptr,  # (C,) float32, written: 0 where the label is not among the columns
    cols,
    row_stride,
    out_stride,
    start,
    softcap,
    HAS_SCALE: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    CONDITIONAL: tl.constexpr,
    PADDED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Write ``sumexp * (softmax - onehot) * (1 - (z / softcap)^2) * scale``; grid (C, ceil(Vt / BLOCK)).

    For the label the first two factors are minus the sum of the others.
    """
    if CONDITIONAL:  # noqa: SIM102 (the compiler takes no constant and a tensor with "and")
        if tl.load(flag_ptr) == 0:
            return
    row = tl.program_id(0).to(tl.int64)
    first = tl.program_id(1) * BLOCK
    at = first + tl.arange(0, BLOCK)
    reach = _reach(cols, PADDED)
    z = tl.load(tile_ptr + row * row_stride + at, mask=at < reach, other=0.0)
    d = tl.exp(z - tl.load(max_ptr + row))
    column = tl.load(labels_ptr + row) - start
    d = tl.where(at == column, -tl.load(others_ptr + row), d)
    if HAS_SOFTCAP:
        d = d * _cap_slope(z, softcap)
    if HAS_SCALE:
        d = d * tl.load(scale_ptr + row)
    rounded = d.to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + row * out_stride + at, rounded, mask=at < reach)
    if HAS_RESIDUAL:
        own = (at == column) & (at < cols)
        lost = tl.sum(tl.where(own, d - rounded.to(tl.float32), 0.0), axis=0)
        # One program writes: the one that has the label, or the row's first.
        absent = (column < 0) | (column >= cols)
        if ((column >= first) & (column < tl.minimum(first + BLOCK, cols))) | (absent & (first == 0)):
            tl.store(residual_ptr + row, lost)
