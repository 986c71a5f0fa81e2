"""Values of tokens on their way between packed places, labels and rows of the input."""

import torch
from torch import Tensor

from dpo_kernels.problem import Problem
from dpo_kernels.segments import segment_sum, segment_sum_of_rows, sequence_to_token
from dpo_kernels.shapes import PackedTokens, SharedRows, row_indexed

# Gradients are scaled and rounded in blocks of this many bytes, which caps the temporaries. Blocks on a GPU are large,
# so that a few launches are enough for any batch. Both numbers are choices and not measured.
CPU_COPY_BYTES = 16 * 2**20
GPU_COPY_BYTES = 256 * 2**20


def by_label(logp_N: Tensor, slot: Tensor, shift: bool) -> Tensor:
    """Return log-probs ``(R,)`` at the places of their labels, 0 where none is scored."""
    out = torch.cat([logp_N, logp_N.new_zeros(1)]).index_select(0, slot)
    return _labels_to_rows(out, shift, forward=True)


def _labels_to_rows(values_R: Tensor, shift: bool, forward: bool) -> Tensor:
    """Move values from a hidden row to the label that it predicts, or back if ``forward`` is false."""
    if not shift or values_R.shape[0] == 0:
        return values_R
    zero = values_R.new_zeros(1)
    return torch.cat([zero, values_R[:-1]]) if forward else torch.cat([values_R[1:], zero])


def _of_packed_tokens(values_R: Tensor, packed: PackedTokens, shift: bool) -> Tensor:
    """Return the values ``(N,)`` of packed tokens from values at the places of their labels."""
    moved_R = _labels_to_rows(values_R, shift, forward=False)
    return moved_R.index_select(0, packed.index) if moved_R.shape[0] else moved_R.new_zeros(packed.capacity)


def sums_by_sequence(values_R: Tensor, problem: Problem) -> Tensor:
    """Return the weighted sum of each packed sequence's values, ``(S,)`` in the dtype of sums.

    ``values_R`` stand at the places of their labels. Those of labels that are not scored are not read.
    """
    packed = problem.packed
    sums_S = segment_sum(_of_packed_tokens(values_R, packed, problem.shift), packed.weights, packed.counts)
    return sums_S if problem.context is None else problem.context.complete(sums_S)


def upstream_of_tokens(grad_out: Tensor, packed: PackedTokens, per_token: bool, shift: bool) -> Tensor:
    """Return the upstream gradient ``(N,)`` of each token's log-prob. It is NaN where the input is invalid."""
    if not per_token:
        return sequence_to_token(grad_out, packed.segments, packed.weights) + packed.nan_if_invalid
    grad_N = _of_packed_tokens(grad_out, packed, shift)
    if packed.weights is not None:
        grad_N = grad_N * packed.weights.to(grad_N.dtype)
    return grad_N + packed.nan_if_invalid.to(grad_N.dtype)


def to_input_rows(
    dx: Tensor, slot: Tensor, scale: Tensor, dtype: torch.dtype, shared: SharedRows | None = None
) -> Tensor:
    """Return packed rows at their places in the input, times one factor or one for each row. Other rows are 0.

    Rows that several tokens share get the sum over these.
    """
    rows, width = slot.shape[0] if shared is None else shared.offsets.shape[0] - 1, dx.shape[1]
    out = torch.empty(rows, width, dtype=dtype, device=dx.device)
    step = max(1, (GPU_COPY_BYTES if dx.is_cuda else CPU_COPY_BYTES) // max(1, width * dx.dtype.itemsize))
    if shared is not None:
        return _added_up(dx, shared, scale, out, step)
    for start in range(0, rows, step):
        places = slot[start : start + step]
        part = dx.index_select(0, places)
        out[start : start + step] = part.mul_(scale if scale.dim() == 0 else scale.index_select(0, places)[:, None])
    return out


def _added_up(dx: Tensor, shared: SharedRows, scale: Tensor, out: Tensor, step: int) -> Tensor:
    """Fill ``out`` ``(M, H)`` with the sums of the packed rows that share one, and return it.

    Some columns of all rows are done at a time, and the host need not know how many tokens share a row. The two
    temporaries, of the tokens and of their sums, take as many bytes as ``step`` rows of ``dx`` each, or one column.
    """
    width = dx.shape[1]
    columns = max(1, step * width // max(1, shared.order.shape[0], out.shape[0]))
    factor = scale if scale.dim() == 0 else scale.index_select(0, shared.order)[:, None]
    for left in range(0, width, columns):
        part = dx[:, left : left + columns].index_select(0, shared.order).mul_(factor)
        out[:, left : left + columns] = segment_sum_of_rows(part, shared.offsets)
    return out


def scaled_copy(grad: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
    """Return ``grad``, which may be a sparse tensor of rows, times a 0-d factor, rounded once to ``dtype``."""
    if grad.layout != torch.strided:
        return row_indexed(grad.indices()[0], scaled_copy(grad.values(), factor, dtype), grad.shape)
    if grad.dtype == dtype:
        return grad * factor
    out = torch.empty(grad.shape, dtype=dtype, device=grad.device)
    if grad.is_cuda:
        # One CUDA kernel rounds what it writes. On the CPU torch would make a float32 copy of everything first.
        return torch.mul(grad, factor, out=out)
    step = max(1, CPU_COPY_BYTES // max(1, grad[:1].numel() * grad.dtype.itemsize))
    for start in range(0, grad.shape[0], step):
        out[start : start + step] = grad[start : start + step] * factor
    return out
