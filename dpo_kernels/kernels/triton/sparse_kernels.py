"""Kernels of sparse gradients: a sample of a tile's gradient, and its products.

``kernels/sampling.py`` explains the sample. A program owns a row of the tile, or a stretch of a row of a product. Every
kernel after ``place_rows`` reads one flag on the device: whether the sample is given up for the exact gradient. So the
host need not know, and does not wait. Products of a sample are sums of a few rows. Strides are in elements, and offsets
that multiply a row are 64-bit.
"""

import triton
import triton.language as tl

from dpo_kernels.kernels.triton.row_kernels import _cap_slope, _reach


@triton.jit
def _grid_starts(seed, token, block, UNITS: tl.constexpr):
    """Where the grids of blocks of a row begin, ``(GROUPS,)`` int32. ``block`` counts over the vocabulary."""
    zero = block * 0
    low = token.to(tl.int32) + zero
    high = (token >> 32).to(tl.int32) + zero
    word, _1, _2, _3 = tl.philox(seed, low, high, block, zero)
    return (word // (2**32 // UNITS)).to(tl.int32)


@triton.jit
def _lengths(z, at, cols, column, highest, threshold, per_unit, UNITS: tl.constexpr):
    """Return exponentials, which of them are the label's or large, and the lengths of the small ones on their line.

    A unit of a tiny threshold may underflow, so that ``per_unit`` is infinite. No length exceeds UNITS.
    """
    e = tl.exp(z - highest)
    inside = at < cols
    own = at == column
    large = inside & (own | ((e <= threshold) == 0))  # NaN is not small, and so is kept
    small = inside & (own == 0) & (e > 0) & (e <= threshold)
    rounded = tl.maximum(tl.floor(e * per_unit + 0.5), 1.0)
    return e, large, tl.where(small, tl.minimum(rounded, UNITS * 1.0), 0.0).to(tl.int32)


@triton.jit
def _kept(lengths, large, starts, UNITS: tl.constexpr):
    """Return which entries ``(GROUPS, SAMPLED)`` are kept: large ones, and those that a point of the grid falls on."""
    ends = tl.cumsum(lengths, axis=1) + starts[:, None]
    hit = ends // UNITS != (ends - lengths) // UNITS
    return (large | hit).to(tl.int32)


@triton.jit(
    do_not_specialize=["start"],
    do_not_specialize_on_alignment=["labels_ptr", "tokens_ptr", "max_ptr", "sumexp_ptr"],
)
def count_sample(
    tile_ptr,  # (C, Vt) float32, final logits of columns start..start+Vt-1
    labels_ptr,  # (C,) int64
    tokens_ptr,  # (C,) int64, row of each token in the flattened input
    max_ptr,  # (C,) float32
    sumexp_ptr,  # (C,) float32
    seed_ptr,  # () int64
    counts_ptr,  # (C,) int32, written: entries that the sample keeps
    expected_ptr,  # (C,) int64, written: entries that are expected, whatever the seed
    cols,
    row_stride,
    start,  # a multiple of SAMPLED
    tau,
    UNITS: tl.constexpr,
    PADDED: tl.constexpr,
    GROUPS: tl.constexpr,
    SAMPLED: tl.constexpr,
):
    """Count the entries that a sample keeps of each row; grid (C,). GROUPS blocks of columns are read at once."""
    row = tl.program_id(0).to(tl.int64)
    base = tile_ptr + row * row_stride
    reach = _reach(cols, PADDED)
    column = tl.load(labels_ptr + row) - start
    highest = tl.load(max_ptr + row)
    threshold = tl.load(sumexp_ptr + row) * tau
    per_unit = tl.div_rn(UNITS * 1.0, threshold)
    seed = tl.load(seed_ptr)
    token = tl.load(tokens_ptr + row)
    within = tl.arange(0, GROUPS)[:, None] * SAMPLED + tl.arange(0, SAMPLED)[None, :]
    count = tl.zeros([GROUPS], tl.int32)
    certain = tl.zeros([GROUPS], tl.int32)
    units = tl.zeros([GROUPS], tl.int64)
    for left in range(0, cols, GROUPS * SAMPLED):
        at = left + within
        z = tl.load(base + at, mask=at < reach, other=0.0)
        _, large, lengths = _lengths(z, at, cols, column, highest, threshold, per_unit, UNITS)
        starts = _grid_starts(seed, token, (start + left) // SAMPLED + tl.arange(0, GROUPS), UNITS)
        count += tl.sum(_kept(lengths, large, starts, UNITS), axis=1)
        certain += tl.sum(large.to(tl.int32), axis=1)
        units += tl.sum(lengths, axis=1)
    tl.store(counts_ptr + row, tl.sum(count, axis=0))
    tl.store(expected_ptr + row, tl.sum(certain, axis=0) + tl.sum(units, axis=0) // UNITS)


@triton.jit(do_not_specialize=["rows", "limit", "capacity"])
def place_rows(
    counts_ptr,  # (C,) int32
    expected_ptr,  # (C,) int64
    offsets_ptr,  # (C + 1,) int64, written: where the entries of each row begin
    too_many_ptr,  # () int32, written: whether more entries are expected than the limit, or kept than there is memory
    rows,
    limit,
    capacity,
    BLOCK: tl.constexpr,
):
    """Place the entries of rows one after another, and decide whether the sample is taken; grid (1,).

    The limit bounds the kept entries by the capacity. To compare them too keeps ``write_sample`` inside its memory.
    """
    placed = tl.zeros([], tl.int64)
    expected = tl.zeros([BLOCK], tl.int64)
    for first in range(0, rows, BLOCK):
        row = first + tl.arange(0, BLOCK)
        inside = row < rows
        counts = tl.load(counts_ptr + row, mask=inside, other=0).to(tl.int64)
        expected += tl.load(expected_ptr + row, mask=inside, other=0)
        tl.store(offsets_ptr + row, placed + tl.cumsum(counts, axis=0) - counts, mask=inside)
        placed += tl.sum(counts, axis=0)
    tl.store(offsets_ptr + rows, placed)
    too_many = (tl.sum(expected, axis=0) > limit) | (placed > capacity)
    tl.store(too_many_ptr, too_many.to(tl.int32))


@triton.jit(
    do_not_specialize=["start"],
    do_not_specialize_on_alignment=["labels_ptr", "tokens_ptr", "max_ptr", "others_ptr", "sumexp_ptr"],
)
def write_sample(
    tile_ptr,  # (C, Vt) float32, final logits of columns start..start+Vt-1
    labels_ptr,  # (C,) int64
    tokens_ptr,  # (C,) int64, row of each token in the flattened input
    max_ptr,  # (C,) float32
    others_ptr,  # (C,) float32
    sumexp_ptr,  # (C,) float32
    seed_ptr,  # () int64
    offsets_ptr,  # (C + 1,) int64
    too_many_ptr,  # () int32
    rows_ptr,  # (K,) int32, written: row of each entry
    columns_ptr,  # (K,) int32, written: its column in the tile
    values_ptr,  # (K,) float32, written
    cols,
    row_stride,
    start,  # a multiple of SAMPLED
    tau,
    softcap,
    HAS_SOFTCAP: tl.constexpr,
    UNITS: tl.constexpr,
    PADDED: tl.constexpr,
    GROUPS: tl.constexpr,
    SAMPLED: tl.constexpr,
):
    """Write the entries that ``count_sample`` has counted, in the order of rows and columns; grid (C,)."""
    if tl.load(too_many_ptr) != 0:
        return
    row = tl.program_id(0).to(tl.int64)
    base = tile_ptr + row * row_stride
    reach = _reach(cols, PADDED)
    column = tl.load(labels_ptr + row) - start
    highest = tl.load(max_ptr + row)
    others = tl.load(others_ptr + row)
    threshold = tl.load(sumexp_ptr + row) * tau
    per_unit = tl.div_rn(UNITS * 1.0, threshold)
    seed = tl.load(seed_ptr)
    token = tl.load(tokens_ptr + row)
    within = tl.arange(0, GROUPS)[:, None] * SAMPLED + tl.arange(0, SAMPLED)[None, :]
    place = tl.load(offsets_ptr + row)
    for left in range(0, cols, GROUPS * SAMPLED):
        at = left + within
        z = tl.load(base + at, mask=at < reach, other=0.0)
        e, large, lengths = _lengths(z, at, cols, column, highest, threshold, per_unit, UNITS)
        starts = _grid_starts(seed, token, (start + left) // SAMPLED + tl.arange(0, GROUPS), UNITS)
        kept = _kept(lengths, large, starts, UNITS)
        value = tl.where(lengths > 0, e * tl.div_rn(UNITS * 1.0, tl.maximum(lengths, 1).to(tl.float32)), e)
        value = tl.where(at == column, -others, value)
        if HAS_SOFTCAP:
            value = value * _cap_slope(z, softcap)
        of_group = tl.sum(kept, axis=1)
        before = tl.cumsum(of_group, axis=0) - of_group
        to = place + before[:, None] + tl.cumsum(kept, axis=1) - kept
        tl.store(rows_ptr + to, row.to(tl.int32), mask=kept != 0)
        tl.store(columns_ptr + to, at, mask=kept != 0)
        tl.store(values_ptr + to, value, mask=kept != 0)
        place += tl.sum(of_group, axis=0)


@triton.jit(do_not_specialize=["first"])
def add_kept_rows(
    begins_ptr,  # (M + 1,) int64, where the entries of each row of the result begin
    order_ptr,  # (K,) int64, the entries in that order; not read without BY_COLUMN
    rows_ptr,  # (K,) int32, row of each entry in the tile
    columns_ptr,  # (K,) int32, its column
    values_ptr,  # (K,) float32
    scale_ptr,  # (C,) float32, factor of each row of the tile
    too_many_ptr,  # () int32
    matrix_ptr,  # rows of the head, or with BY_COLUMN hidden states, in any dtype
    out_ptr,  # (M, H) float32, written or added to
    first,  # row of the matrix that belongs to row or column 0 of the tile
    width,
    matrix_stride,
    matrix_col_stride,
    out_stride,
    BY_COLUMN: tl.constexpr,
    ADD: tl.constexpr,
    ENTRIES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Sum rows of a matrix times the entries of a sample; grid (M, ceil(H / BLOCK)).

    A row of the result belongs to a row of the tile, or with BY_COLUMN to a column. The order of additions is fixed.
    """
    if tl.load(too_many_ptr) != 0:
        return
    row = tl.program_id(0).to(tl.int64)
    begin = tl.load(begins_ptr + row)
    end = tl.load(begins_ptr + row + 1)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = at < width
    total = tl.zeros([BLOCK], tl.float32)
    for entry in range(begin, end, ENTRIES):
        entries = entry + tl.arange(0, ENTRIES)
        taken = entries < end
        if BY_COLUMN:
            entries = tl.load(order_ptr + entries, mask=taken, other=0)
        of_tile = tl.load(rows_ptr + entries, mask=taken, other=0)
        factor = tl.load(values_ptr + entries, mask=taken, other=0.0)
        factor *= tl.load(scale_ptr + of_tile, mask=taken, other=0.0)
        if not BY_COLUMN:
            of_tile = tl.load(columns_ptr + entries, mask=taken, other=0)
        source = (of_tile.to(tl.int64) + first) * matrix_stride
        places = source[:, None] + at.to(tl.int64)[None, :] * matrix_col_stride
        values = tl.load(matrix_ptr + places, mask=taken[:, None] & inside[None, :], other=0.0)
        total += tl.sum(values.to(tl.float32) * factor[:, None], axis=0)
    out = out_ptr + row * out_stride + at
    if ADD:
        if begin == end:
            return
        total += tl.load(out, mask=inside, other=0.0)
    tl.store(out, total, mask=inside)


@triton.jit(do_not_specialize=["total_rows"], do_not_specialize_on_alignment=["scale_ptr"])
def product_if(
    flag_ptr,  # () int32
    d_ptr,  # (C, Vt), a tile of the gradient
    b_ptr,  # (Vt, H), or with TRANSPOSED (C, H)
    scale_ptr,  # (C,) float32
    out_ptr,  # (C, H) float32, or with TRANSPOSED (Vt, H); written or added to
    total_rows,
    tile_cols,
    width,
    d_stride,
    b_stride,
    out_stride,
    alpha,
    TRANSPOSED: tl.constexpr,
    HAS_SCALE: tl.constexpr,
    ADD: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Compute ``out (+)= scale * (d @ b)``, or with TRANSPOSED ``out (+)= alpha * (d^T @ b)``, where the flag is not 0.

    The grid is (ceil(H / BLOCK_N), ceil(M / BLOCK_M)) for M rows of ``out``. Programs that run at once share parts of
    ``d``. Its columns should be a multiple of 16, without which loads are narrow.
    """
    if tl.load(flag_ptr) == 0:
        return
    if TRANSPOSED:
        height = tile_cols
        depth = total_rows
    else:
        height = total_rows
        depth = tile_cols
    rows = tl.program_id(1).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    cols = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    row_inside = rows < height
    col_inside = cols < width
    total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for first in range(0, depth, BLOCK_K):
        at = first + tl.arange(0, BLOCK_K).to(tl.int64)
        inside = at < depth
        if TRANSPOSED:
            d_at = d_ptr + at[None, :] * d_stride + rows[:, None]
        else:
            d_at = d_ptr + rows[:, None] * d_stride + at[None, :]
        d = tl.load(d_at, mask=row_inside[:, None] & inside[None, :], other=0.0)
        b_at = b_ptr + at[:, None] * b_stride + cols[None, :]
        b = tl.load(b_at, mask=inside[:, None] & col_inside[None, :], other=0.0)
        total = tl.dot(d, b, total, input_precision=PRECISION)
    if TRANSPOSED:
        total *= alpha
    if HAS_SCALE:
        total *= tl.load(scale_ptr + rows, mask=row_inside, other=0.0)[:, None]
    places = out_ptr + rows[:, None] * out_stride + cols[None, :]
    written = row_inside[:, None] & col_inside[None, :]
    if ADD:
        total += tl.load(places, mask=written, other=0.0)
    tl.store(places, total, mask=written)
