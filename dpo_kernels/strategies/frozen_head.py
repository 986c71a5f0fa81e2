"""A head that is not trained: the derivative of each log-prob by its hidden state is formed beside the log-prob.

That derivative is a vector that no upstream gradient turns, only scales (``docs/design.md``). So the forward pass
forms it from the logits that it has just made, and the backward pass multiplies rows: two GEMM passes in all.
"""

import torch
from torch import Tensor

from dpo_kernels.kernel_interface import RowKernels, RowResult, RowState, rescale
from dpo_kernels.problem import Problem
from dpo_kernels.shapes import Head, Schedule, spans
from dpo_kernels.strategies import recompute
from dpo_kernels.strategies.row_results import RowResults


def logps(kernels: RowKernels, problem: Problem, schedule: Schedule) -> tuple[RowResult, Tensor | None]:
    """Log-probs of the packed tokens and, where a gradient is wanted, ``-d logp / d hidden``.

    The latter is ``(N + 1, H)`` with a zero last row.
    """
    if not problem.needs_grad.hidden:
        return recompute.logps(kernels, problem, schedule)
    head, packed, tile = problem.head, problem.packed, schedule.tile
    scratch = kernels.scratch(problem.hidden.device, tile.rows, tile.cols)
    rows = RowResults(kernels, packed, head.vocab, problem.stats, like=scratch)
    dlogp_dhidden = scratch.new_zeros(packed.capacity + 1, problem.hidden.shape[1])
    for chunk in schedule.chunks:
        x_CH = packed.gather(problem.hidden, chunk.start, chunk.stop, kernels.dtype)
        labels_C, out_CH = packed.labels[chunk.start : chunk.stop], dlogp_dhidden[chunk.start : chunk.stop]
        state = kernels.new_state(labels_C.shape[0], x_CH.device, problem.stats)
        if tile.cols >= head.vocab:
            _whole_rows(kernels, state, x_CH, head, labels_C, scratch, out_CH)
        else:
            _cut_rows(kernels, state, x_CH, head, labels_C, scratch, out_CH, tile.cols)
        rows.put(chunk.start, chunk.stop, state)
    return rows.result, dlogp_dhidden


def _whole_rows(
    kernels: RowKernels, state: RowState, x_CH: Tensor, head: Head, labels_C: Tensor, scratch: Tensor, out_CH: Tensor
) -> None:
    z = kernels.tile_in(scratch, x_CH.shape[0], head.vocab)
    kernels.project(x_CH, head, 0, z)
    d = kernels.reduce_and_dlogits(state, z, labels_C, head)
    kernels.grad_hidden(d, head, 0, out_CH, accumulate=False)
    scale_C = head.logit_scale / state.sumexp
    out_CH.mul_((scale_C if d.scale is None else scale_C * d.scale)[:, None])


def _cut_rows(
    kernels: RowKernels,
    state: RowState,
    x_CH: Tensor,
    head: Head,
    labels_C: Tensor,
    scratch: Tensor,
    out_CH: Tensor,
    cols: int,
) -> None:
    """Column by column: a row's softmax-weighted sum of the head is rescaled as its maximum grows."""
    without_label = torch.zeros_like(state.others)  # the label's own term is added once the sum is known
    for left, right in spans(head.vocab, cols):
        z = kernels.tile_in(scratch, x_CH.shape[0], right - left)
        kernels.project(x_CH, head, left, z)
        before = state.max.clone()
        kernels.reduce(state, z, labels_C, left)
        if left:
            out_CH.mul_(rescale(before, state.max)[:, None])
        # A row of -inf so far (unreachable tokens) is shifted by 0, or -inf - -inf would be NaN.
        shift_C = state.max.masked_fill(state.max == -torch.inf, 0.0)
        d = kernels.dlogits_(z, labels_C, left, shift_C, without_label, head, None, state.exponentiated)
        kernels.grad_hidden(d, head, left, out_CH, accumulate=left > 0)
    out_CH.addcmul_(_label_rows(head, labels_C, state.target, kernels.dtype), state.others[:, None], value=-1)
    out_CH.mul_((head.logit_scale / state.sumexp)[:, None])


def _label_rows(head: Head, labels_C: Tensor, target_C: Tensor, dtype: torch.dtype) -> Tensor:
    """The head's rows of the labels, times the softcap's derivative at their logits."""
    rows_CH = head.weight.index_select(0, labels_C).to(dtype).to(target_C.dtype)
    if head.softcap is None:
        return rows_CH
    return rows_CH * (1.0 - (target_C / head.softcap).square())[:, None]
