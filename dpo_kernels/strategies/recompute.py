"""Log-probs in the forward pass; each tile of logits is computed again in the backward pass.

This is for upstream gradients that are known only in the backward pass. Per token the forward pass keeps the maximum,
the sum of exponentials and that sum without the label's own (one GEMM pass). The backward pass computes each tile
again, and one or two products from it: four GEMM passes in all.
"""

from torch import Tensor

from dpo_kernels.kernel_interface import RowKernels, RowResult
from dpo_kernels.problem import Problem
from dpo_kernels.shapes import Schedule, spans
from dpo_kernels.strategies.row_results import RowResults

Gradients = tuple[Tensor | None, Tensor | None, Tensor | None]


def logps(kernels: RowKernels, problem: Problem, schedule: Schedule) -> tuple[RowResult, Tensor | None]:
    """Log-probs of the packed tokens, one tile of logits at a time; nothing else is kept."""
    head, packed, tile = problem.head, problem.packed, schedule.tile
    scratch = kernels.scratch(problem.hidden.device, tile.rows, tile.cols)
    rows = RowResults(kernels, packed, head.vocab, problem.stats, like=scratch)
    for chunk in schedule.chunks:
        x_CH = packed.gather(problem.hidden, chunk.start, chunk.stop, kernels.dtype)
        labels_C = packed.labels[chunk.start : chunk.stop]
        state = kernels.new_state(labels_C.shape[0], x_CH.device, problem.stats)
        for left, right in spans(head.vocab, tile.cols):
            z = kernels.tile_in(scratch, labels_C.shape[0], right - left)
            kernels.project(x_CH, head, left, z)
            kernels.reduce(state, z, labels_C, left)
        rows.put(chunk.start, chunk.stop, state)
    return rows.result, None


def gradients(kernels: RowKernels, problem: Problem, schedule: Schedule, saved: RowResult, grad_N: Tensor) -> Gradients:
    """Gradients from the upstream gradient ``grad_N`` of each token's log-prob.

    Returns those of the packed hidden states ``(N + 1, H)`` with a zero last row, of the weight and of the bias; None
    where not needed. ``saved`` is what ``logps`` gave.
    """
    head, packed, tile = problem.head, problem.packed, schedule.tile
    scratch = kernels.scratch(problem.hidden.device, tile.rows, tile.cols)
    dx, dw, db = _allocate(kernels, problem)
    scale_N = (-grad_N * head.logit_scale / saved.sumexp).to(scratch.dtype)
    for chunk in schedule.chunks:
        start, stop = chunk.start, chunk.stop
        x_CH = packed.gather(problem.hidden, start, stop, kernels.dtype)
        sums = (packed.labels[start:stop], saved.max[start:stop], saved.others[start:stop])
        for left, right in spans(head.vocab, tile.cols):
            z = kernels.tile_in(scratch, stop - start, right - left)
            if schedule.recompute_in_library:
                kernels.project(x_CH, head, left, z)
                labels_C, max_C, others_C = sums
                d = kernels.dlogits_(z, labels_C, left, max_C, others_C, head, scale_N[start:stop])
            else:
                d = kernels.recomputed_dlogits(x_CH, head, left, z, *sums, scale_N[start:stop])
            if dx is not None:
                kernels.grad_hidden(d, head, left, dx[start:stop], accumulate=left > 0)
            if dw is not None:
                kernels.grad_weight(d, x_CH, dw[left:right], accumulate=start > 0)
            if db is not None:
                kernels.grad_bias(d, left, db[left:right], accumulate=start > 0)
            scale_C = d.scale
        if dx is not None and scale_C is not None:
            dx[start:stop].mul_(scale_C[:, None])
    return dx, dw, db


def _allocate(kernels: RowKernels, problem: Problem) -> Gradients:
    need, device, (vocab, width) = problem.needs_grad, problem.hidden.device, problem.head.weight.shape
    dx = kernels.buffer(device, problem.packed.capacity + 1, width).zero_() if need.hidden else None
    dw = kernels.buffer(device, vocab, width) if need.weight else None
    db = kernels.buffer(device, vocab) if need.bias else None
    for grad in (dw, db):
        if grad is not None and not problem.packed.used:
            grad.zero_()  # no tile ever writes it
    return dx, dw, db
