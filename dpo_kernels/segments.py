"""Sums over the tokens of a sequence, and their transpose.

These functions are the boundary between the two halves of the library: kernels know tokens, losses know sequences.
"""

import torch
from torch import Tensor

from dpo_kernels.shapes import sum_dtype


def segment_sum(values_N: Tensor, weights_N: Tensor | None, counts_S: Tensor) -> Tensor:
    """Return the weighted sum of each sequence's token values, ``(S,)``, in the dtype of sums.

    Each sum adds its own tokens in their order. It does not depend on what surrounds them, so padding and the other
    sequences of a batch change no bit. Values beyond ``counts_S.sum()`` are left out.

    Args:
        values_N: One value per scored token, ``(N,)``, packed sequence by sequence.
        weights_N: One weight per scored token, ``(N,)``. None means 1.
        counts_S: Number of scored tokens of each sequence, ``(S,)``, integer.

    Returns:
        ``(S,)``, float64 (float32 on MPS, which lacks float64). A sequence without tokens gets 0.
    """
    values = values_N.to(sum_dtype(values_N.device))
    if weights_N is not None:
        values = values * weights_N.to(values.dtype)
    if counts_S.shape[0] == 0:
        return values.new_zeros(0)
    if values.device.type not in ("cpu", "cuda"):
        place = torch.arange(values.shape[0], device=values.device)
        segments = torch.bucketize(place, counts_S.cumsum(0), right=True)  # S for values of no sequence
        return values.new_zeros(counts_S.shape[0] + 1).index_add_(0, segments, values)[:-1]
    offsets = offsets_of(counts_S, values.shape[0])
    # ``unsafe`` skips a check that would copy the offsets to the host, which is a sync.
    return torch.segment_reduce(values, "sum", offsets=offsets, unsafe=True, initial=0)


def segment_sum_of_rows(rows_NH: Tensor, offsets: Tensor) -> Tensor:
    """Return the sum of each run of rows, ``(M, H)`` in their dtype. The order of the additions is fixed.

    Args:
        rows_NH: ``(N, H)`` rows.
        offsets: ``(M + 1,)`` int64, first row of each run, then the end of the last one. Rows behind it are left out.
    """
    if rows_NH.device.type in ("cpu", "cuda"):
        return torch.segment_reduce(rows_NH, "sum", offsets=offsets, unsafe=True, initial=0)
    return _segment_sum_by_index(rows_NH, offsets)


def _segment_sum_by_index(rows_NH: Tensor, offsets: Tensor) -> Tensor:
    """Do the same on devices without segments in torch."""
    place = torch.arange(rows_NH.shape[0], device=rows_NH.device)
    runs = torch.bucketize(place, offsets[1:], right=True)  # M for rows of no run
    return rows_NH.new_zeros(offsets.shape[0], rows_NH.shape[1]).index_add_(0, runs, rows_NH)[:-1]


def offsets_of(counts_S: Tensor, length: int) -> Tensor:
    """Return the offset at which each sequence begins, and the end of the last one, ``(S + 1,)``.

    Offsets are clamped to ``length``. If more tokens are scored than a static capacity holds, the counts exceed it. The
    result is NaN then, and the clamp keeps reads within memory.
    """
    return torch.cat([counts_S.new_zeros(1), counts_S.cumsum(0)]).clamp(max=length)


def sequence_to_token(values_S: Tensor, segments_N: Tensor, weights_N: Tensor | None) -> Tensor:
    """Return ``values_S[segment] * weight`` for each token, ``(N,)``.

    This is the transpose of ``segment_sum``: it takes a gradient by sequences to one by tokens.

    Args:
        values_S: One value per sequence, ``(S,)``.
        segments_N: Sequence of each token, ``(N,)``, int64.
        weights_N: One weight per token, ``(N,)``. None means 1.
    """
    values_N = values_S.index_select(0, segments_N)
    return values_N if weights_N is None else values_N * weights_N.to(values_N.dtype)
