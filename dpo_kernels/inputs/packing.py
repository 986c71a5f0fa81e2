"""Labels to packed tokens: shift, drop what is not scored, put the sequences of a pair side by side.

The values of labels and ``cu_seqlens`` are checked here, where they are first looked at. Under a tracer packing is an
operator of its own, since how many tokens are scored depends on data.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from dpo_kernels.checks import check_cumulative
from dpo_kernels.inputs.options import Layout
from dpo_kernels.inputs.tensors import Batch
from dpo_kernels.problem import traced
from dpo_kernels.shapes import PackedTokens, accumulation_dtype, sum_dtype

NOWHERE = 2**62  # a slot past every capacity


@dataclass(frozen=True)
class Packing:
    """How labels are read and how much room there is."""

    vocab: int
    ignore_index: int
    shift: bool
    stacked: bool  # the input has all chosen sequences first
    width: int  # T, or 0 where cu_seqlens say where sequences begin
    capacity: int | None  # tokens to make room for; None: as many as are scored
    static: bool  # the host is not to learn how many are scored


def pack(batch: Batch, layout: Layout, *, stacked: bool) -> PackedTokens:
    """The scored tokens of a batch. Traced, the capacity is every row, so that no shape depends on data."""
    tracing, capacity = traced(batch.labels), layout.max_scored_tokens
    if capacity is not None or tracing:
        rows = batch.labels.shape[0]
        capacity = rows if capacity is None else min(capacity, rows)
    how = Packing(
        vocab=batch.head.vocab,
        ignore_index=layout.ignore_index,
        shift=layout.shift,
        stacked=stacked,
        width=batch.width,
        capacity=capacity,
        static=layout.max_scored_tokens is not None,
    )
    if not tracing:
        return pack_labels(batch.labels, batch.cu_seqlens, batch.token_weights, how)
    sizes = [how.vocab, how.ignore_index, how.width, -1 if how.capacity is None else how.capacity]
    flags = [how.shift, how.stacked, how.static]
    packed = PackedTokens(*pack_operator(batch.labels, batch.cu_seqlens, batch.token_weights, sizes, flags))
    return packed if batch.token_weights is not None or how.static else replace(packed, weights=None)


def pack_labels(labels_R: Tensor, cu_seqlens: Tensor, token_weights_R: Tensor | None, how: Packing) -> PackedTokens:
    """Pack the scored tokens, sequence by sequence: chosen and rejected of a pair side by side.

    Without a capacity exactly what is scored is allocated, which needs the counts on the host: the one sync of a call.
    A static one avoids that sync too; more scored tokens than fit then make the result NaN. Values are checked here:
    on the CPU a bad label is a ``ValueError``; on other devices, where reading it would be a sync, the result is NaN.
    """
    vocab, ignore_index, shift, width = how.vocab, how.ignore_index, how.shift, how.width
    capacity, static = how.capacity, how.static
    device, sequences = labels_R.device, cu_seqlens.shape[0] - 1
    rows = labels_R.shape[0]
    if device.type == "cpu" and not width:
        check_cumulative(cu_seqlens.tolist(), rows, "hidden")
    targets_R, position = labels_R, torch.arange(rows, device=device)
    sequence_R = torch.bucketize(position, cu_seqlens[1:], right=True)
    in_range = sequence_R < sequences
    sequence_R = sequence_R.clamp(max=max(sequences - 1, 0))
    if shift:
        # hidden[t] predicts labels[t + 1]; a sequence's last row predicts nothing.
        targets_R = torch.cat([labels_R[1:], labels_R.new_full((min(rows, 1),), ignore_index)])
        in_range &= position + 1 < cu_seqlens[1:].index_select(0, sequence_R) if sequences else in_range
    scored_R = (targets_R != ignore_index) & in_range
    bad_R = scored_R & ((targets_R < 0) | (targets_R >= vocab))
    if device.type == "cpu" and bool(bad_R.any()):
        _raise_bad_label(targets_R, bad_R, how)
    order_S = _alternating_order(sequences, how.stacked, device)
    slot_R, counts_S = _slots(scored_R, sequence_R, cu_seqlens, order_S)
    if static:
        counts_host = torch.full((sequences,), -1, dtype=torch.int64, device="cpu")
    else:
        host = torch.cat([counts_S, cu_seqlens]).to("cpu", copy=True)  # one transfer for both
        counts_host = host[:sequences].clone()
        if device.type != "cpu" and not width:
            check_cumulative(host[sequences:].tolist(), rows, "hidden")
        if capacity is None:
            capacity = int(counts_host.sum())
    assert capacity is not None, "a static packing has a capacity"
    overflow = counts_S.sum() > capacity
    slot_R = slot_R.clamp(0, capacity)
    # One slot more than the capacity takes everything that is not scored; it is cut off again.
    index = torch.zeros(capacity + 1, dtype=torch.int64, device=device).scatter_(0, slot_R, position)[:capacity]
    segments = _segments(counts_S, capacity)
    unused = torch.arange(capacity, device=device) >= counts_S.sum()
    labels_N = targets_R.index_select(0, index).to(torch.int64) if rows else index
    labels_N = labels_N.clamp(0, vocab - 1).masked_fill(unused, 0)
    weights = None
    if token_weights_R is not None:
        shifted = torch.cat([token_weights_R[1:], token_weights_R[:1]]) if shift else token_weights_R
        weights = shifted.index_select(0, index) if rows else shifted.new_zeros(capacity)
        weights = weights.to(accumulation_dtype(weights.dtype))
        weights = weights.masked_fill(unused, 0.0)
    elif static:
        weights = (~unused).to(torch.float32)  # no coefficient may reach a row that stands for nothing
    invalid = bad_R.any() | overflow | (cu_seqlens[0] != 0) | (cu_seqlens[-1] != rows) | (cu_seqlens.diff() < 0).any()
    zero = torch.zeros((), dtype=sum_dtype(device), device=device)
    return PackedTokens(
        index=index.clone(),
        labels=labels_N,
        weights=weights,
        segments=segments,
        slot=slot_R,
        counts=counts_S,
        counts_host=counts_host,
        nan_if_invalid=torch.where(invalid, zero + math.nan, zero),
    )


def _alternating_order(sequences: int, stacked: bool, device: torch.device) -> Tensor:
    """Input sequence at each internal place: chosen and rejected of a pair alternate inside."""
    order_S = torch.arange(sequences, device=device)
    return order_S.view(2, -1).t().reshape(-1) if stacked else order_S


def _slots(scored_R: Tensor, sequence_R: Tensor, cu_seqlens: Tensor, order_S: Tensor) -> tuple[Tensor, Tensor]:
    """Place of each row among the packed ones (a number past every place where not scored), and counts ``(S,)``."""
    rows, sequences = scored_R.shape[0], order_S.shape[0]
    before = torch.cat([scored_R.new_zeros(1, dtype=torch.int64), scored_R.cumsum(0)])  # scored rows before each row
    bounds = cu_seqlens.clamp(0, rows)
    before_S = before.index_select(0, bounds)
    by_input_S = before_S.diff()
    counts_S = by_input_S.index_select(0, order_S)
    starts_S = torch.zeros_like(counts_S).scatter_(0, order_S, counts_S.cumsum(0) - counts_S)
    if rows == 0 or sequences == 0:
        return torch.full((rows,), NOWHERE, dtype=torch.int64, device=scored_R.device), counts_S
    rank_R = before[:-1] - before_S.index_select(0, sequence_R)
    slot_R = starts_S.index_select(0, sequence_R) + rank_R
    return torch.where(scored_R, slot_R, torch.full_like(slot_R, NOWHERE)), counts_S


def _segments(counts_S: Tensor, capacity: int) -> Tensor:
    """Sequence of each packed row."""
    place = torch.arange(capacity, device=counts_S.device)
    segments = torch.bucketize(place, counts_S.cumsum(0), right=True)
    return segments.clamp(max=max(counts_S.shape[0] - 1, 0))


def _raise_bad_label(targets_R: Tensor, bad_R: Tensor, how: Packing) -> None:
    row = int(bad_R.nonzero()[0])
    place = row + int(how.shift)
    where = f"{place // how.width}, {place % how.width}" if how.width else f"{place}"
    raise ValueError(
        f"labels[{where}] = {int(targets_R[row])} is outside [0, {how.vocab}) (weight has {how.vocab} rows) and is not "
        f"ignore_index = {how.ignore_index}"
    )


def _pack_as_operator(
    labels: Tensor, cu_seqlens: Tensor, token_weights: Tensor | None, sizes: Sequence[int], flags: Sequence[bool]
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """``pack_labels`` with a tensor for everything: the fields of ``PackedTokens``, missing weights empty."""
    packed = pack_labels(labels, cu_seqlens, token_weights, _packing(sizes, flags))
    weights = packed.nan_if_invalid.new_zeros(0) if packed.weights is None else packed.weights
    return (
        packed.index,
        packed.labels,
        weights,
        packed.segments,
        packed.slot,
        packed.counts,
        packed.counts_host,
        packed.nan_if_invalid,
    )


def _packing(sizes: Sequence[int], flags: Sequence[bool]) -> Packing:
    vocab, ignore_index, width, capacity = sizes
    shift, stacked, static = flags
    return Packing(vocab, ignore_index, shift, stacked, width, None if capacity < 0 else capacity, static)


pack_operator = torch.library.custom_op("dpo_kernels::pack", _pack_as_operator, mutates_args=())


@pack_operator.register_fake
def _fake_pack(
    labels: Tensor, cu_seqlens: Tensor, token_weights: Tensor | None, sizes: Sequence[int], flags: Sequence[bool]
) -> tuple[Tensor, ...]:
    *_, capacity = sizes
    *_, static = flags
    places = torch.library.get_ctx().new_dynamic_size() if capacity < 0 else capacity
    sequences = cu_seqlens.shape[0] - 1
    long = labels.new_empty(0, dtype=torch.int64)
    real = sum_dtype(labels.device)
    weights = labels.new_empty(0, dtype=real)
    if token_weights is not None:
        weights = token_weights.new_empty(places, dtype=accumulation_dtype(token_weights.dtype))
    elif static:
        weights = labels.new_empty(places, dtype=torch.float32)
    return (
        long.new_empty(places),
        long.new_empty(places),
        weights,
        long.new_empty(places),
        long.new_empty(labels.shape[0]),
        long.new_empty(sequences),
        torch.empty(sequences, dtype=torch.int64, device="cpu"),
        labels.new_empty((), dtype=real),
    )
