"""Packing: labels are shifted, unscored tokens are dropped, and the sequences of a pair are put side by side.

The values of labels and ``cu_seqlens`` are checked here, where they are first looked at. Under a tracer packing is an
operator of its own, because the number of scored tokens depends on data. On a GPU two Triton kernels do what takes
sixty launches in torch, while nothing else is there to run.
"""

import math
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from dpo_kernels.checks import check_cumulative, traced
from dpo_kernels.inputs.options import Layout
from dpo_kernels.inputs.tensors import Batch
from dpo_kernels.records import dataclass
from dpo_kernels.shapes import PackedTokens, SharedRows, accumulation_dtype, sum_dtype

NOWHERE = 2**62  # the slot of a row that is not scored, past every capacity


@dataclass(frozen=True)
class Packing:
    """How labels are read, and the capacity."""

    vocab: int  # V
    ignore_index: int  # the label of tokens that are not scored
    shift: bool  # hidden[t] predicts labels[t + 1]
    stacked: bool  # all chosen sequences come first in the input
    sequences: int  # S
    width: int  # T, or 0 where cu_seqlens say where sequences begin
    capacity: int | None  # packed tokens to allocate; None means as many as are scored
    static: bool  # the host must not learn how many tokens are scored
    in_triton: bool = False  # by the Triton kernels; they give the bits of torch's operations


def pack(batch: Batch, layout: Layout, *, stacked: bool, vocab: int | None = None) -> PackedTokens:
    """Return the scored tokens of a batch. Under a tracer the capacity is every row, so no shape depends on data."""
    tracing, capacity = traced(batch.labels), layout.max_scored_tokens
    if capacity is not None or tracing:
        rows = batch.labels.shape[0]
        capacity = rows if capacity is None else min(capacity, rows)
    packing = Packing(
        vocab=batch.head.vocab if vocab is None else vocab,
        ignore_index=layout.ignore_index,
        shift=layout.shift,
        stacked=stacked,
        sequences=batch.sequences,
        width=batch.width,
        capacity=capacity,
        static=layout.max_scored_tokens is not None,
        in_triton=layout.packs_in_triton,
    )
    if not tracing:
        return pack_labels(batch.labels, batch.cu_seqlens, batch.token_weights, packing)
    sizes = [packing.vocab, packing.ignore_index, packing.sequences, packing.width]
    sizes.append(-1 if packing.capacity is None else packing.capacity)
    flags = [packing.shift, packing.stacked, packing.static, packing.in_triton]
    packed = PackedTokens(*pack_operator(batch.labels, batch.cu_seqlens, batch.token_weights, sizes, flags))
    return packed if batch.token_weights is not None or packing.static else replace(packed, weights=None)


def pack_labels(
    labels_R: Tensor, cu_seqlens: Tensor | None, token_weights_R: Tensor | None, how: Packing
) -> PackedTokens:
    """Pack the scored tokens, sequence by sequence, with chosen and rejected of a pair side by side.

    Without a capacity exactly the scored tokens are allocated. That needs their counts on the host, which is the only
    sync of a call. With a static capacity there is no sync, and more scored tokens than fit make the result NaN.

    Args:
        labels_R: ``(R,)`` int32 or int64 labels of the flattened input.
        cu_seqlens: ``(S + 1,)`` int32 or int64 first row of each sequence, then R. None where each has ``how.width``.
        token_weights_R: ``(R,)`` weights at their labels' places, or None for 1.
        how: how labels are read, and the capacity.

    Returns:
        The packed tokens, in the order of pairs. A label outside the vocabulary makes their ``nan_if_invalid`` NaN on
        a GPU, where an error would need a sync.

    Raises:
        ValueError: on the CPU, a label is outside the vocabulary. On any device, the host has read ``cu_seqlens`` and
            its values are wrong.

    """
    # The kernels read without strides. Flattening leaves some: of ``labels[:, -1:]``, or of labels that were a column.
    labels_R = labels_R.contiguous()
    cu_seqlens = None if cu_seqlens is None else cu_seqlens.contiguous()
    token_weights_R = None if token_weights_R is None else token_weights_R.contiguous()
    device, rows = labels_R.device, labels_R.shape[0]
    if device.type == "cpu" and cu_seqlens is not None:
        check_cumulative(cu_seqlens.tolist(), rows, "hidden")
    if how.in_triton and rows and how.sequences:
        return _pack_in_triton(labels_R, cu_seqlens, token_weights_R, how)
    if cu_seqlens is None:
        cu_seqlens = torch.arange(how.sequences + 1, device=device) * how.width
    return _pack_in_torch(labels_R, cu_seqlens.to(torch.int64), token_weights_R, how)


def _pack_in_triton(
    labels_R: Tensor, cu_seqlens: Tensor | None, token_weights_R: Tensor | None, how: Packing
) -> PackedTokens:
    from dpo_kernels.kernels.triton import launch_pack

    given = launch_pack.Labels(
        labels_R, cu_seqlens, how.sequences, how.width, how.vocab, how.ignore_index, how.shift, how.stacked
    )
    counted = launch_pack.count(given)
    if labels_R.device.type == "cpu" and any(counted.bad.tolist()):  # in Triton's interpreter
        _raise_first_bad_label(labels_R, cu_seqlens, how)
    # Everything is packed before the host waits for the counts, so that the GPU has nothing left to do for packing.
    index, labels, weights, segments, slot, nan_if_invalid = launch_pack.write(
        given, counted, token_weights_R, how.capacity, static=how.static
    )
    counts_host, capacity = _on_the_host(counted.counts_and_bounds, given.rows, how)
    if how.capacity is None:
        index, labels, segments = index[:capacity], labels[:capacity], segments[:capacity]
        weights = None if weights is None else weights[:capacity]
    return PackedTokens(index, labels, weights, segments, slot, counted.counts, counts_host, nan_if_invalid)


def _pack_in_torch(labels_R: Tensor, cu_seqlens: Tensor, token_weights_R: Tensor | None, how: Packing) -> PackedTokens:
    device, rows, sequences = labels_R.device, labels_R.shape[0], cu_seqlens.shape[0] - 1
    position = torch.arange(rows, device=device)
    targets_R, scored_R, sequence_R = _scored(labels_R, cu_seqlens, position, how)
    bad_R = scored_R & ((targets_R < 0) | (targets_R >= how.vocab))
    if device.type == "cpu" and bool(bad_R.any()):
        _raise_bad_label(targets_R, bad_R, how)
    order_S = _alternating_order(sequences, how.stacked, device)
    slot_R, counts_S = _slots(scored_R, sequence_R, cu_seqlens, order_S)
    counts_and_bounds = counts_S if how.width else torch.cat([counts_S, cu_seqlens])
    counts_host, capacity = _on_the_host(counts_and_bounds, rows, how)
    overflow = counts_S.sum() > capacity
    slot_R = slot_R.clamp(0, capacity)
    # All rows that are not scored go to one more slot than the capacity, which is then cut off.
    index = torch.zeros(capacity + 1, dtype=torch.int64, device=device).scatter_(0, slot_R, position)[:capacity]
    segments = _segments(counts_S, capacity)
    unused = torch.arange(capacity, device=device) >= counts_S.sum()
    labels_N = targets_R.index_select(0, index).to(torch.int64) if rows else index
    labels_N = labels_N.clamp(0, how.vocab - 1).masked_fill(unused, 0)
    invalid = bad_R.any() | overflow | (cu_seqlens[0] != 0) | (cu_seqlens[-1] != rows) | (cu_seqlens.diff() < 0).any()
    zero = torch.zeros((), dtype=sum_dtype(device), device=device)
    return PackedTokens(
        index=index.clone(),
        labels=labels_N,
        weights=_packed_weights(token_weights_R, index, unused, how),
        segments=segments,
        slot=slot_R,
        counts=counts_S,
        counts_host=counts_host,
        nan_if_invalid=torch.where(invalid, zero + math.nan, zero),
    )


def with_rows(packed: PackedTokens, rows_R: Tensor, num_rows: int, width: int) -> PackedTokens:
    """Return packed tokens that read the rows of the hidden states that the caller names.

    Args:
        packed: the scored tokens.
        rows_R: ``(R,)`` row of each label, anything where no label is scored.
        num_rows: M, the rows of the hidden states.
        width: T, or 0 for packed input.

    Raises:
        ValueError: on the CPU, a scored label has a row outside ``[0, M)``. On a GPU its ``nan_if_invalid`` is NaN.

    """
    place = torch.arange(packed.capacity, device=rows_R.device)
    used = place < packed.counts.sum()
    rows_N = rows_R.index_select(0, packed.index).to(torch.int64) if rows_R.shape[0] else packed.index
    bad = used & ((rows_N < 0) | (rows_N >= num_rows))
    if rows_R.device.type == "cpu" and bool(bad.any()):
        row = int(packed.index[bad.nonzero()[0, 0]])
        where = f"{row // width}, {row % width}" if width else f"{row}"
        raise ValueError(f"rows[{where}] = {int(rows_R[row])} is outside [0, {num_rows}) (hidden has {num_rows} rows)")
    index = rows_N.clamp(0, max(num_rows - 1, 0)).masked_fill(~used, 0)
    by_row, order = index.masked_fill(~used, num_rows).sort(stable=True)  # unused capacity comes last
    offsets = torch.searchsorted(by_row, torch.arange(num_rows + 1, device=rows_R.device))
    invalid = packed.nan_if_invalid.masked_fill(bad.any(), math.nan)
    return replace(packed, shared=SharedRows(index, order, offsets), nan_if_invalid=invalid)


def _scored(labels_R: Tensor, cu_seqlens: Tensor, position: Tensor, how: Packing) -> tuple[Tensor, Tensor, Tensor]:
    """Return for each row the label that it predicts, whether that is scored, and the row's sequence."""
    rows, sequences = labels_R.shape[0], cu_seqlens.shape[0] - 1
    targets_R = labels_R
    sequence_R = torch.bucketize(position, cu_seqlens[1:], right=True)
    in_range = sequence_R < sequences
    sequence_R = sequence_R.clamp(max=max(sequences - 1, 0))
    if how.shift:
        # hidden[t] predicts labels[t + 1]. The last row of a sequence predicts nothing.
        targets_R = torch.cat([labels_R[1:], labels_R.new_full((min(rows, 1),), how.ignore_index)])
        in_range &= position + 1 < cu_seqlens[1:].index_select(0, sequence_R) if sequences else in_range
    return targets_R, (targets_R != how.ignore_index) & in_range, sequence_R


def _on_the_host(counts_and_bounds: Tensor, rows: int, how: Packing) -> tuple[Tensor, int]:
    """Return the counts on the CPU, -1 where they are not to be read, and the capacity.

    ``counts_and_bounds`` holds the counts ``(S,)``, and behind them the ``cu_seqlens`` unless there is a width.
    """
    if how.static:
        assert how.capacity is not None, "a static packing has a capacity"
        return torch.full((how.sequences,), -1, dtype=torch.int64, device="cpu"), how.capacity
    host = counts_and_bounds.to("cpu", copy=True)  # one transfer for both
    counts_host = host[: how.sequences].clone()
    if counts_and_bounds.device.type != "cpu" and not how.width:
        check_cumulative(host[how.sequences :].tolist(), rows, "hidden")
    return counts_host, int(counts_host.sum()) if how.capacity is None else how.capacity


def _packed_weights(token_weights_R: Tensor | None, index: Tensor, unused: Tensor, how: Packing) -> Tensor | None:
    """Return the packed tokens' weights, None where all are 1; no coefficient may reach unused capacity."""
    if token_weights_R is None:
        return (~unused).to(torch.float32) if how.static else None
    shifted = torch.cat([token_weights_R[1:], token_weights_R[:1]]) if how.shift else token_weights_R
    weights = shifted.index_select(0, index) if shifted.shape[0] else shifted.new_zeros(index.shape[0])
    weights = weights.to(accumulation_dtype(weights.dtype))
    return weights.masked_fill(unused, 0.0)


def _alternating_order(sequences: int, stacked: bool, device: torch.device) -> Tensor:
    """Return the input's sequence ``(S,)`` at each packed place, where chosen and rejected alternate."""
    order_S = torch.arange(sequences, device=device)
    return order_S.view(2, -1).t().reshape(-1) if stacked else order_S


def _slots(scored_R: Tensor, sequence_R: Tensor, cu_seqlens: Tensor, order_S: Tensor) -> tuple[Tensor, Tensor]:
    """Return the slot ``(R,)`` of each row, ``NOWHERE`` if it is not scored, and the counts ``(S,)``."""
    rows, sequences = scored_R.shape[0], order_S.shape[0]
    # These are the numbers of scored rows before each row, and before each sequence.
    scored_before = torch.cat([scored_R.new_zeros(1, dtype=torch.int64), scored_R.cumsum(0)])
    bounds = cu_seqlens.clamp(0, rows)
    scored_before_S = scored_before.index_select(0, bounds)
    by_input_S = scored_before_S.diff()
    counts_S = by_input_S.index_select(0, order_S)
    starts_S = torch.zeros_like(counts_S).scatter_(0, order_S, counts_S.cumsum(0) - counts_S)
    if rows == 0 or sequences == 0:
        return torch.full((rows,), NOWHERE, dtype=torch.int64, device=scored_R.device), counts_S
    rank_R = scored_before[:-1] - scored_before_S.index_select(0, sequence_R)
    slot_R = starts_S.index_select(0, sequence_R) + rank_R
    return torch.where(scored_R, slot_R, torch.full_like(slot_R, NOWHERE)), counts_S


def _segments(counts_S: Tensor, capacity: int) -> Tensor:
    """Return the packed sequence ``(capacity,)`` of each packed token."""
    place = torch.arange(capacity, device=counts_S.device)
    segments = torch.bucketize(place, counts_S.cumsum(0), right=True)
    return segments.clamp(max=max(counts_S.shape[0] - 1, 0))


def _raise_first_bad_label(labels_R: Tensor, cu_seqlens: Tensor | None, how: Packing) -> None:
    """Raise for the first scored label outside of the vocabulary."""
    rows, device = labels_R.shape[0], labels_R.device
    if cu_seqlens is None:
        cu_seqlens = torch.arange(0, rows + 1, how.width, device=device)
    targets_R, scored_R, _ = _scored(labels_R, cu_seqlens.to(torch.int64), torch.arange(rows, device=device), how)
    _raise_bad_label(targets_R, scored_R & ((targets_R < 0) | (targets_R >= how.vocab)), how)


def _raise_bad_label(targets_R: Tensor, bad_R: Tensor, how: Packing) -> None:
    row = int(bad_R.nonzero()[0])
    place = row + int(how.shift)
    where = f"{place // how.width}, {place % how.width}" if how.width else f"{place}"
    raise ValueError(
        f"labels[{where}] = {int(targets_R[row])} is outside [0, {how.vocab}) (weight has {how.vocab} rows) and is not "
        f"ignore_index = {how.ignore_index}"
    )


def _pack_as_operator(
    labels: Tensor, cu_seqlens: Tensor | None, token_weights: Tensor | None, sizes: Sequence[int], flags: Sequence[bool]
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Run ``pack_labels`` and return the fields of ``PackedTokens``. Missing weights are an empty tensor.

    So are the host's counts of a static capacity, which the host does not know. A graph with a tensor on the CPU would
    get no CUDA graph.
    """
    how = _packing(sizes, flags)
    packed = pack_labels(labels, cu_seqlens, token_weights, how)
    weights = packed.nan_if_invalid.new_zeros(0) if packed.weights is None else packed.weights
    return (
        packed.index,
        packed.labels,
        weights,
        packed.segments,
        packed.slot,
        packed.counts,
        packed.counts.new_zeros(0) if how.static else packed.counts_host,
        packed.nan_if_invalid,
    )


def _packing(sizes: Sequence[int], flags: Sequence[bool]) -> Packing:
    vocab, ignore_index, sequences, width, capacity = sizes
    shift, stacked, static, in_triton = flags
    capacity_or_none = None if capacity < 0 else capacity
    return Packing(vocab, ignore_index, shift, stacked, sequences, width, capacity_or_none, static, in_triton)


pack_operator = torch.library.custom_op("dpo_kernels::pack", _pack_as_operator, mutates_args=())


@pack_operator.register_fake
def _fake_pack(
    labels: Tensor, cu_seqlens: Tensor | None, token_weights: Tensor | None, sizes: Sequence[int], flags: Sequence[bool]
) -> tuple[Tensor, ...]:
    """Return empty tensors with the shapes and dtypes of the outputs of ``_pack_as_operator``."""
    *_, sequences, _, capacity = sizes
    *_, static, _ = flags
    places = torch.library.get_ctx().new_dynamic_size() if capacity < 0 else capacity
    empty_int64 = labels.new_empty(0, dtype=torch.int64)
    real_dtype = sum_dtype(labels.device)
    weights = labels.new_empty(0, dtype=real_dtype)
    if token_weights is not None:
        weights = token_weights.new_empty(places, dtype=accumulation_dtype(token_weights.dtype))
    elif static:
        weights = labels.new_empty(places, dtype=torch.float32)
    return (
        empty_int64.new_empty(places),
        empty_int64.new_empty(places),
        weights,
        empty_int64.new_empty(places),
        empty_int64.new_empty(labels.shape[0]),
        empty_int64.new_empty(sequences),
        empty_int64.new_empty(0) if static else torch.empty(sequences, dtype=torch.int64, device="cpu"),
        labels.new_empty((), dtype=real_dtype),
    )
