"""A frozen head: the forward pass forms each log-prob and its derivative with respect to the hidden state.

An upstream gradient only scales that derivative. So the forward pass forms it from the logits that it has just made,
and the backward pass multiplies its rows. That makes two GEMM passes.
"""

from dataclasses import replace

import torch
from torch import Tensor

from dpo_kernels.kernel_interface import RowKernels, RowResult, RowState, SampledRows, rescale
from dpo_kernels.problem import Problem
from dpo_kernels.shapes import Head, Schedule, spans
from dpo_kernels.strategies import recompute
from dpo_kernels.strategies.row_results import RowResults
from dpo_kernels.strategies.sampled import add_products
from dpo_kernels.strategies.vocab_shards import complete


def logps(kernels: RowKernels, problem: Problem, schedule: Schedule) -> tuple[RowResult, Tensor | None]:
    """Compute log-probs of the packed tokens, and ``-d logp / d hidden`` where a gradient is wanted.

    The second result is ``(N + 1, H)`` with a zero last row, or None.
    """
    if not problem.needs_grad.hidden:
        return recompute.logps(kernels, problem, schedule)
    head, packed, tile = problem.head, problem.packed, schedule.tile
    scratch = kernels.scratch(problem.hidden.device, schedule.scratch_logits)
    rows = RowResults(kernels, problem, like=scratch)
    dlogp_dhidden = scratch.new_zeros(packed.capacity + 1, problem.hidden.shape[1])
    for chunk in schedule.chunks:
        x_CH = packed.gather(problem.hidden, chunk.start, chunk.stop, kernels.dtype)
        labels_C, out_CH = packed.labels[chunk.start : chunk.stop], dlogp_dhidden[chunk.start : chunk.stop]
        state = kernels.new_state(labels_C.shape[0], x_CH.device, problem.stats)
        if tile.cols >= head.vocab and problem.shard is None:
            _whole_rows(kernels, problem, state, x_CH, labels_C, scratch, out_CH, chunk.start)
        else:
            _cut_rows(kernels, problem, state, x_CH, labels_C, scratch, out_CH, tile.cols)
        rows.put(chunk.start, chunk.stop, state, completed=True)
    return rows.result, dlogp_dhidden


def _whole_rows(
    kernels: RowKernels,
    problem: Problem,
    state: RowState,
    x_CH: Tensor,
    labels_C: Tensor,
    scratch: Tensor,
    out_CH: Tensor,
    start: int,
) -> None:
    """Write ``-d logp / d hidden`` of a tile of whole rows into ``out_CH``, and fold its logits into the state.

    ``start`` is the packed token of the first row.
    """
    head, sampling = problem.head, problem.sampling
    z = kernels.tile_in(scratch, x_CH.shape[0], head.vocab)
    if sampling is None:
        exact = kernels.project_and_dlogits(state, x_CH, head, z, labels_C)
        scale_C = head.logit_scale / state.sumexp
        kernels.grad_hidden(exact, head, 0, out_CH, accumulate=False)
        out_CH.mul_((scale_C if exact.scale is None else scale_C * exact.scale)[:, None])
        return
    kernels.project_and_reduce(state, x_CH, head, 0, z, labels_C, keep_logits=head.softcap is not None)
    tokens_C = problem.packed.index[start : start + labels_C.shape[0]]
    scale_C = head.logit_scale / state.sumexp
    of_rows = SampledRows.of(labels_C, state.max, state.others, state.sumexp, scale_C, tokens_C)
    d = kernels.sampled_dlogits_of_state(z, 0, state, of_rows, head, sampling, head.logit_scale)
    add_products(kernels, d, head, 0, x_CH, (out_CH, None, None), first_columns=True, first_rows=True)


def _cut_rows(
    kernels: RowKernels,
    problem: Problem,
    state: RowState,
    x_CH: Tensor,
    labels_C: Tensor,
    scratch: Tensor,
    out_CH: Tensor,
    cols: int,
) -> None:
    """Do the same with tiles of ``cols`` columns.

    The sum of the head's rows, weighted by exponentials, is rescaled whenever a row's maximum grows.
    """
    head = problem.head
    without_label = torch.zeros_like(state.others)  # the label's own term is added after the last tile
    for left, right in spans(head.vocab, cols):
        z = kernels.tile_in(scratch, x_CH.shape[0], right - left)
        before = state.max.clone()
        kernels.project_and_reduce(state, x_CH, head, left, z, labels_C)
        if left:
            out_CH.mul_(rescale(before, state.max)[:, None])
        # A row that is -inf so far has only unreachable tokens. It is shifted by 0, because -inf - -inf would be NaN.
        shift_C = state.max.masked_fill(state.max == -torch.inf, 0.0)
        d = kernels.dlogits_of_state(z, labels_C, left, replace(state, max=shift_C, others=without_label), head, None)
        kernels.grad_hidden(d, head, left, out_CH, accumulate=left > 0)
    if head.vocab and d.scale is not None:
        out_CH.mul_(d.scale[:, None])  # the same for every tile, since it depends on nothing of theirs
    if problem.shard is not None:
        own_max = state.max
        complete(state, problem.shard)
        out_CH.mul_(rescale(own_max, state.max)[:, None])
    out_CH.addcmul_(_label_rows(head, labels_C, state.target, kernels.dtype), state.others[:, None], value=-1)
    out_CH.mul_((head.logit_scale / state.sumexp)[:, None])


def _label_rows(head: Head, labels_C: Tensor, target_C: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the labels' rows ``(C, H)`` of the head, times the softcap's derivative at the labels' logits."""
    rows_CH = head.weight.new_zeros(labels_C.shape[0], head.weight.shape[1], dtype=target_C.dtype)
    here = (labels_C >= 0) & (labels_C < head.vocab)  # of a shard of the vocabulary not all labels are
    if head.vocab:
        labels_here = labels_C.clamp(0, head.vocab - 1)
        rows_CH = head.weight.index_select(0, labels_here).to(dtype).to(target_C.dtype)
        rows_CH = rows_CH.masked_fill(~here[:, None], 0.0)
    if head.softcap is None:
        return rows_CH
    return rows_CH * (1.0 - (target_C / head.softcap).square())[:, None]
