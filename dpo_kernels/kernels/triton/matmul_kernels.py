"""Matmul kernels that keep logits in registers: the log-sum-exp of ``X W^T``, and a tile of its gradient.

``linear_logps`` folds each tile of logits into a running maximum and sum of exponentials. A program does a block of
rows over one split of the vocabulary, and the launch merges the splits. ``linear_dlogits`` forms the logits of a tile
again and writes ``sumexp * (softmax - onehot)`` in the dtype of the GEMMs that follow. Strides are in elements.

Triton recompiles when an argument's alignment or divisibility changes. Row counts and slices by rows change with every
batch, so they are excluded from specialisation.
"""

import triton
import triton.language as tl

from dpo_kernels.kernels.triton.row_kernels import _cap_slope, _capped


@triton.jit
def _logits(
    x_ptr,  # or, with TMA, a descriptor of (N, H) in blocks (BLOCK_N, BLOCK_H)
    w_ptr,  # or one of (V, H) in blocks (BLOCK_V, BLOCK_H)
    b_ptr,
    first_row,
    rows,  # (BLOCK_N,) int64
    row_inside,
    first_col,
    cols,  # (BLOCK_V,) int64, columns of the whole vocabulary
    col_inside,
    width,
    x_stride,
    w_stride,
    scale,
    softcap,
    HAS_BIAS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_H: tl.constexpr,
    TMA: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Final float32 logits of a block of rows and columns; the caller masks what lies outside."""
    z = tl.zeros([BLOCK_N, BLOCK_V], tl.float32)
    if TMA:
        # The copy engine knows the extents of the matrices and reads 0 outside of them.
        for h in range(0, width, BLOCK_H):
            x = x_ptr.load([first_row, h])
            w = w_ptr.load([first_col, h])
            z = tl.dot(x, w.T, z, input_precision=PRECISION)
    else:
        # Strides and widths are multiples of 16 bytes (launch_matmul.aligned_rows). A launch specialises on multiples
        # of 16 elements only. This tells the compiler, which would otherwise use neither wide copies nor a pipeline.
        WIDE: tl.constexpr = 128 // x_ptr.dtype.element_ty.primitive_bitwidth
        width = width // WIDE * WIDE
        x_stride = x_stride // WIDE * WIDE
        w_stride = w_stride // WIDE * WIDE
        at = tl.arange(0, BLOCK_H)
        x_rows = x_ptr + rows[:, None] * x_stride
        w_rows = w_ptr + cols[None, :] * w_stride
        for h in range(0, width, BLOCK_H):
            inside = h + at < width
            x = tl.load(x_rows + (h + at)[None, :], mask=row_inside[:, None] & inside[None, :], other=0.0)
            w = tl.load(w_rows + (h + at)[:, None], mask=col_inside[None, :] & inside[:, None], other=0.0)
            z = tl.dot(x, w, z, input_precision=PRECISION)
    if HAS_BIAS:
        z += tl.load(b_ptr + cols, mask=col_inside, other=0.0).to(tl.float32)[None, :]
    return _capped(z, scale, softcap, HAS_SOFTCAP, False)


@triton.jit(do_not_specialize=["total_rows"], do_not_specialize_on_alignment=["labels_ptr"])
def linear_logps(
    x_ptr,  # (N, H), with TMA its descriptor
    w_ptr,  # (V, H), with TMA its descriptor
    b_ptr,  # (V,)
    labels_ptr,  # (N,) int64
    max_ptr,  # (splits, N) float32, written, as all that follow
    others_ptr,  # sum of exp(z - max) without the label's, which the sums that follow leave out as well
    target_ptr,
    entropy_ptr,
    logit_sum_ptr,
    square_sum_ptr,
    argmax_ptr,  # (splits, N) int64
    total_rows,
    vocab,
    width,
    x_stride,
    w_stride,
    split,  # columns of each split, a multiple of BLOCK_V
    scale,
    softcap,
    HAS_BIAS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    HAS_STATS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_H: tl.constexpr,
    TMA: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Write the state of each row over one split of the vocabulary; grid (splits, ceil(N / BLOCK_N)).

    Programs that run at once share few rows of X, which stay in the cache.
    """
    first_row = tl.program_id(1) * BLOCK_N
    rows = first_row.to(tl.int64) + tl.arange(0, BLOCK_N)
    row_inside = rows < total_rows
    labels = tl.load(labels_ptr + rows, mask=row_inside, other=-1)
    running = tl.full([BLOCK_N], -float("inf"), tl.float32)
    target = tl.full([BLOCK_N], -float("inf"), tl.float32)
    others = tl.zeros([BLOCK_N], tl.float32)
    entropy = tl.zeros([BLOCK_N], tl.float32)
    logit_sum = tl.zeros([BLOCK_N], tl.float32)
    square_sum = tl.zeros([BLOCK_N], tl.float32)
    first = tl.zeros([BLOCK_N], tl.int64)
    begin = tl.program_id(0) * split
    end = tl.minimum(begin + split, vocab)
    for left in range(begin, end, BLOCK_V):
        cols = left + tl.arange(0, BLOCK_V).to(tl.int64)
        col_inside = tl.arange(0, BLOCK_V) < end - left
        z = _logits(
            x_ptr, w_ptr, b_ptr, first_row, rows, row_inside, left, cols, col_inside, width, x_stride, w_stride, scale,
            softcap, HAS_BIAS, HAS_SOFTCAP, BLOCK_N, BLOCK_V, BLOCK_H, TMA, PRECISION,
        )  # fmt: skip
        if HAS_STATS:
            logit_sum += tl.sum(tl.where(col_inside[None, :], z, 0.0), axis=1)
        z = tl.where(col_inside[None, :], z, -float("inf"))
        if HAS_STATS:
            place = tl.argmax(z, axis=1, tie_break_left=True).to(tl.int64) + left
        # From here on the label's own logit is -inf. A sum picks it out, since a maximum would drop NaN.
        own_col = (labels - left).to(tl.int32)
        hit = tl.arange(0, BLOCK_V)[None, :] == own_col[:, None]
        own_logit = tl.sum(tl.where(hit, z, 0.0), axis=1)
        own_logit = tl.where((own_col >= 0) & (own_col < BLOCK_V), own_logit, -float("inf"))
        z = tl.where(hit, -float("inf"), z)
        block_max = tl.maximum(tl.max(z, axis=1), own_logit)
        target = tl.maximum(target, own_logit, propagate_nan=tl.PropagateNan.ALL)
        highest = tl.maximum(running, block_max)
        shift = tl.where(highest == -float("inf"), 0.0, highest)
        kept = tl.where(running == highest, 1.0, tl.exp(running - shift))
        e = tl.exp(z - shift[:, None])
        if HAS_STATS:
            drop = tl.where(others > 0, (highest - running) * others, 0.0)
            own = tl.where(e > 0, e * (z - shift[:, None]), 0.0)
            entropy = (entropy + drop) * kept - tl.sum(own, axis=1)
            first = tl.where(block_max > running, place, first)
            square_sum = square_sum * kept * kept + tl.sum(e * e, axis=1)
        others = others * kept + tl.sum(e, axis=1)
        running = highest
    at = tl.program_id(0).to(tl.int64) * total_rows + rows
    tl.store(max_ptr + at, running, mask=row_inside)
    tl.store(others_ptr + at, others, mask=row_inside)
    tl.store(target_ptr + at, target, mask=row_inside)
    if HAS_STATS:
        tl.store(entropy_ptr + at, entropy, mask=row_inside)
        tl.store(logit_sum_ptr + at, logit_sum, mask=row_inside)
        tl.store(square_sum_ptr + at, square_sum, mask=row_inside)
        tl.store(argmax_ptr + at, first, mask=row_inside)


@triton.jit(
    do_not_specialize=["total_rows"],
    do_not_specialize_on_alignment=["labels_ptr", "max_ptr", "others_ptr", "scale_ptr", "residual_ptr"],
)
def linear_dlogits(
    x_ptr,  # (C, H), with TMA its descriptor
    w_ptr,  # (V, H), with TMA its descriptor
    b_ptr,  # (V,)
    labels_ptr,  # (C,) int64
    max_ptr,  # (C,) float32
    others_ptr,  # (C,) float32
    scale_ptr,  # (C,) float32
    residual_ptr,  # (C,) float32, 0; written by the program that has the label
    out_ptr,  # (C, Vt), columns start..start+Vt-1, written
    total_rows,
    tile_cols,
    start,
    width,
    x_stride,
    w_stride,
    out_stride,
    scale,
    softcap,
    HAS_BIAS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    HAS_SCALE: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_H: tl.constexpr,
    TMA: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Write ``dlogits_rows`` of logits that are formed here; grid (ceil(C / BLOCK_N), ceil(Vt / BLOCK_V))."""
    first_row = tl.program_id(0) * BLOCK_N
    rows = first_row.to(tl.int64) + tl.arange(0, BLOCK_N)
    row_inside = rows < total_rows
    first_col = tl.program_id(1) * BLOCK_V
    at = first_col.to(tl.int64) + tl.arange(0, BLOCK_V)
    col_inside = tl.arange(0, BLOCK_V) < tile_cols - first_col
    cols = start + at
    z = _logits(
        x_ptr, w_ptr, b_ptr, first_row, rows, row_inside, start + first_col, cols, col_inside, width, x_stride,
        w_stride, scale, softcap, HAS_BIAS, HAS_SOFTCAP, BLOCK_N, BLOCK_V, BLOCK_H, TMA, PRECISION,
    )  # fmt: skip
    labels = tl.load(labels_ptr + rows, mask=row_inside, other=-1)
    row_max = tl.load(max_ptr + rows, mask=row_inside, other=0.0)
    others = tl.load(others_ptr + rows, mask=row_inside, other=0.0)
    d = tl.exp(z - row_max[:, None])
    own = (labels - start - first_col).to(tl.int32)
    hit = (tl.arange(0, BLOCK_V)[None, :] == own[:, None]) & col_inside[None, :]
    d = tl.where(hit, -others[:, None], d)
    if HAS_SOFTCAP:
        d = d * _cap_slope(z, softcap)
    if HAS_SCALE:
        d = d * tl.load(scale_ptr + rows, mask=row_inside, other=0.0)[:, None]
    inside = row_inside[:, None] & col_inside[None, :]
    rounded = d.to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + rows[:, None] * out_stride + at[None, :], rounded, mask=inside)
    if HAS_RESIDUAL:
        lost = tl.sum(tl.where(hit, d - rounded.to(tl.float32), 0.0), axis=1)
        first = start + first_col
        here = (labels >= first) & (labels < tl.minimum(first + BLOCK_V, start + tile_cols))
        tl.store(residual_ptr + rows, lost, mask=row_inside & here)
