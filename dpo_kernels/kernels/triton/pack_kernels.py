"""Packing kernels: one counts the scored tokens of each sequence, one writes them side by side.

A program of both owns a packed sequence ``s``. With stacked input its rows are those of input sequence
``s // 2 + (s % 2) * S / 2``, so that chosen and rejected alternate. The host reads the counts between the two launches.
Numbers that differ from batch to batch are not specialised: their code would be compiled in the middle of a training.
"""

import triton
import triton.language as tl


@triton.jit
def _rows_of(sequence, sequences, bounds_ptr, width, rows, STACKED: tl.constexpr, HAS_BOUNDS: tl.constexpr):
    """The first row of a packed sequence, and the row after its last. Invalid bounds are clamped to the input."""
    place = sequence
    if STACKED:
        place = sequence // 2 + (sequence % 2) * (sequences // 2)
    if HAS_BOUNDS:
        begin = tl.load(bounds_ptr + place).to(tl.int64)
        end = tl.load(bounds_ptr + place + 1).to(tl.int64)
        begin = tl.minimum(tl.maximum(begin, 0), rows)
        end = tl.minimum(tl.maximum(end, begin), rows)
    else:
        begin = place * width
        end = begin + width
    return begin, end


@triton.jit
def _scored(labels_ptr, at, end, ignore_index, SHIFT: tl.constexpr):
    """The labels that rows ``at`` of a sequence predict, and whether they are scored. With a shift the last is not."""
    inside = at + SHIFT < end
    label = tl.load(labels_ptr + at + SHIFT, mask=inside, other=0).to(tl.int64)
    return label, inside & (label != ignore_index)


@triton.jit(
    do_not_specialize=["sequences", "rows", "width"],
    do_not_specialize_on_alignment=["labels_ptr", "bounds_ptr"],
)
def count_scored(
    labels_ptr,  # (R,) int32 or int64
    bounds_ptr,  # (S + 1,) int32 or int64 cu_seqlens
    counts_ptr,  # (S,) int64, written
    copy_ptr,  # (S + 1,) int64, written with the bounds
    bad_ptr,  # (S,) int64, written: scored labels outside of the vocabulary
    sequences: tl.int64,
    rows: tl.int64,
    width: tl.int64,
    vocab: tl.int64,
    ignore_index: tl.int64,
    SHIFT: tl.constexpr,
    STACKED: tl.constexpr,
    HAS_BOUNDS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Grid (S,)."""
    sequence = tl.program_id(0).to(tl.int64)
    begin, end = _rows_of(sequence, sequences, bounds_ptr, width, rows, STACKED, HAS_BOUNDS)
    count = tl.zeros([BLOCK], tl.int64)
    bad = tl.zeros([BLOCK], tl.int64)
    for first in range(begin, end, BLOCK):
        label, scored = _scored(labels_ptr, first + tl.arange(0, BLOCK), end, ignore_index, SHIFT)
        count += scored.to(tl.int64)
        bad += (scored & ((label < 0) | (label >= vocab))).to(tl.int64)
    tl.store(counts_ptr + sequence, tl.sum(count, axis=0))
    tl.store(bad_ptr + sequence, tl.sum(bad, axis=0))
    if HAS_BOUNDS:
        tl.store(copy_ptr + sequence, tl.load(bounds_ptr + sequence).to(tl.int64))
        if sequence == sequences - 1:
            tl.store(copy_ptr + sequences, tl.load(bounds_ptr + sequences).to(tl.int64))


@triton.jit
def _nan_if_invalid(
    total, counts_ptr, bounds_ptr, bad_ptr, sequences, rows, capacity, HAS_BOUNDS: tl.constexpr, BLOCK: tl.constexpr
):
    """NaN where a label is outside of the vocabulary, the bounds do not rise from 0 to R, or the capacity is exceeded.

    Otherwise it is 0.
    """
    wrong = tl.zeros([BLOCK], tl.int64)
    for first in range(0, sequences, BLOCK):
        at = first + tl.arange(0, BLOCK)
        inside = at < sequences
        wrong += tl.load(bad_ptr + at, mask=inside, other=0)
        if HAS_BOUNDS:
            begin = tl.load(bounds_ptr + at, mask=inside, other=0)
            end = tl.load(bounds_ptr + at + 1, mask=inside, other=0)
            wrong += (end < begin).to(tl.int64)
    invalid = (tl.sum(wrong, axis=0) > 0) | (total > capacity)
    if HAS_BOUNDS:
        invalid = invalid | (tl.load(bounds_ptr) != 0) | (tl.load(bounds_ptr + sequences) != rows)
    return tl.where(invalid, float("nan"), 0.0)


@triton.jit(
    do_not_specialize=["sequences", "rows", "width", "capacity"],
    do_not_specialize_on_alignment=["labels_ptr", "bounds_ptr", "token_weights_ptr"],
)
def write_packed(
    labels_ptr,  # (R,) int32 or int64
    bounds_ptr,  # (S + 1,) int32 or int64 cu_seqlens
    token_weights_ptr,  # (R,) floating point
    counts_ptr,  # (S,) int64 scored tokens
    bad_ptr,  # (S,) int64 labels outside of the vocabulary
    index_ptr,  # (N,) int64, written as all that follow
    packed_labels_ptr,  # (N,) int64
    weights_ptr,  # (N,) float32 or float64
    segments_ptr,  # (N,) int64
    slot_ptr,  # (R,) int64
    nan_if_invalid_ptr,  # () float64
    sequences: tl.int64,
    rows: tl.int64,
    width: tl.int64,
    vocab: tl.int64,
    ignore_index: tl.int64,
    capacity: tl.int64,
    SHIFT: tl.constexpr,
    STACKED: tl.constexpr,
    HAS_BOUNDS: tl.constexpr,
    FITS: tl.constexpr,
    HAS_TOKEN_WEIGHTS: tl.constexpr,
    HAS_WEIGHTS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Grid (S,). The programs share what is left of the capacity, where the label is 0 and so is the weight.

    FITS: the capacity is the number of scored tokens, at most that of the argument.
    """
    sequence = tl.program_id(0).to(tl.int64)
    before = tl.zeros([BLOCK], tl.int64)
    everything = tl.zeros([BLOCK], tl.int64)
    for first in range(0, sequences, BLOCK):
        at = first + tl.arange(0, BLOCK)
        count = tl.load(counts_ptr + at, mask=at < sequences, other=0)
        everything += count
        before += tl.where(at < sequence, count, 0)
    place = tl.sum(before, axis=0)
    total = tl.sum(everything, axis=0)
    if FITS:
        capacity = tl.minimum(total, capacity)
    begin, end = _rows_of(sequence, sequences, bounds_ptr, width, rows, STACKED, HAS_BOUNDS)
    for first in range(begin, end, BLOCK):
        at = first + tl.arange(0, BLOCK)
        label, scored = _scored(labels_ptr, at, end, ignore_index, SHIFT)
        rank = tl.cumsum(scored.to(tl.int32), axis=0)
        to = place + rank - 1
        tl.store(slot_ptr + at, tl.where(scored & (to < capacity), to, capacity), mask=at < end)
        kept = scored & (to < capacity)
        tl.store(index_ptr + to, at, mask=kept)
        tl.store(packed_labels_ptr + to, tl.minimum(tl.maximum(label, 0), vocab - 1), mask=kept)
        tl.store(segments_ptr + to, tl.zeros([BLOCK], tl.int64) + sequence, mask=kept)
        if HAS_WEIGHTS:
            weight = tl.full([BLOCK], 1.0, tl.float32)
            if HAS_TOKEN_WEIGHTS:
                weight = tl.load(token_weights_ptr + at + SHIFT, mask=kept, other=0.0)
            tl.store(weights_ptr + to, weight.to(weights_ptr.dtype.element_ty), mask=kept)
        place += tl.sum(scored.to(tl.int64), axis=0)
    nothing = tl.zeros([BLOCK], tl.int64)
    for first in range(total + sequence * BLOCK, capacity, sequences * BLOCK):
        at = first + tl.arange(0, BLOCK)
        unused = at < capacity
        tl.store(index_ptr + at, nothing, mask=unused)
        tl.store(packed_labels_ptr + at, nothing, mask=unused)
        tl.store(segments_ptr + at, nothing + sequences - 1, mask=unused)
        if HAS_WEIGHTS:
            tl.store(weights_ptr + at, nothing.to(weights_ptr.dtype.element_ty), mask=unused)
    if sequence == 0:
        nan_if_invalid = _nan_if_invalid(
            total, counts_ptr, bounds_ptr, bad_ptr, sequences, rows, capacity, HAS_BOUNDS, BLOCK
        )
        tl.store(nan_if_invalid_ptr, nan_if_invalid.to(nan_if_invalid_ptr.dtype.element_ty))
