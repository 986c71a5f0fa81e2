"""Tokens to sequences, and the transpose."""

import torch
from torch import Tensor

from dpo_kernels.shapes import sum_dtype


def segment_sum(values_N: Tensor, weights_N: Tensor | None, counts_S: Tensor) -> Tensor:
    """(Weighted) sums ``(S,)`` of consecutive runs of ``counts_S`` values, float64, each in the order of its own run.

    The sum of a run does not depend on what surrounds it, so padding and batch composition change no bit. Values
    beyond ``counts_S.sum()`` are left out.
    """
    values = values_N.to(sum_dtype(values_N.device))
    if weights_N is not None:
        values = values * weights_N.to(values.dtype)
    if counts_S.shape[0] == 0:
        return values.new_zeros(0)
    if values.device.type not in ("cpu", "cuda"):
        segments = torch.repeat_interleave(torch.arange(counts_S.shape[0], device=values.device), counts_S)
        out = values.new_zeros(counts_S.shape[0])
        return out.index_add_(0, segments, values[: segments.shape[0]])
    offsets = offsets_of(counts_S, values.shape[0])
    # unsafe skips a check that would read the offsets back to the host.
    return torch.segment_reduce(values, "sum", offsets=offsets, unsafe=True, initial=0)


def offsets_of(counts_S: Tensor, length: int) -> Tensor:
    """Where each run begins and the last ends, ``(S + 1,)``.

    A static capacity that overflowed has more tokens than there is room for (the result is NaN): nothing is read
    beyond it.
    """
    return torch.cat([counts_S.new_zeros(1), counts_S.cumsum(0)]).clamp(max=length)


def sequence_to_token(values_S: Tensor, segments_N: Tensor, weights_N: Tensor | None) -> Tensor:
    """The transpose of the (weighted) sum: one value per row, ``values[segment] * weight``."""
    values_N = values_S.index_select(0, segments_N)
    return values_N if weights_N is None else values_N * weights_N.to(values_N.dtype)
