"""The forward pass computes log-probs, and the backward pass computes each tile of logits again.

This works with upstream gradients that are known only in the backward pass. The forward pass takes one GEMM pass. It
saves three numbers for each token: the maximum, the sum of exponentials, and that sum without the label's own. The
backward pass takes one GEMM pass for the logits and one for each gradient, which makes four in all.
"""

from torch import Tensor

from dpo_kernels.kernel_interface import RowKernels, RowResult
from dpo_kernels.problem import Problem
from dpo_kernels.shapes import Schedule, spans
from dpo_kernels.strategies import sampled
from dpo_kernels.strategies.row_results import RowResults
from dpo_kernels.strategies.sampled import Gradients, Sums
from dpo_kernels.strategies.weight_rows import WeightRows, weight_grad


def logps(kernels: RowKernels, problem: Problem, schedule: Schedule) -> tuple[RowResult, Tensor | None]:
    """Compute log-probs of the packed tokens, one tile of logits at a time. No derivative is saved."""
    head, packed, tile = problem.head, problem.packed, schedule.tile
    # Without a gradient that follows, codes are not written, and a tile is nothing but a shape.
    scratch = kernels.scratch(problem.hidden.device, 0 if kernels.codes_logits else schedule.scratch_logits)
    rows = RowResults(kernels, problem, like=scratch)
    # A reference, which gets no gradient, needs no sums of its rows.
    only_logps = not any(problem.needs_grad) and problem.shard is None and not problem.stats
    only_logps = only_logps and not kernels.codes_logits
    for chunk in schedule.chunks:
        x_CH = packed.gather(problem.hidden, chunk.start, chunk.stop, kernels.dtype)
        labels_C = packed.labels[chunk.start : chunk.stop]
        if only_logps and tile.cols >= head.vocab:
            z = kernels.tile_in(scratch, labels_C.shape[0], head.vocab)
            kernels.project(x_CH, head, 0, z)
            kernels.reduce_to_logps(z, labels_C, rows.result.logp[chunk.start : chunk.stop], keep_logits=True)
            continue
        state = kernels.new_state(labels_C.shape[0], x_CH.device, problem.stats)
        for left, right in spans(head.vocab, tile.cols):
            shape = (labels_C.shape[0], right - left)
            z = scratch.new_empty(()).expand(shape) if kernels.codes_logits else kernels.tile_in(scratch, *shape)
            kernels.project_and_reduce(state, x_CH, head, left, z, labels_C, gradient_follows=False)
        rows.put(chunk.start, chunk.stop, state)
    return rows.result, None


def gradients(kernels: RowKernels, problem: Problem, schedule: Schedule, saved: RowResult, grad_N: Tensor) -> Gradients:
    """Compute the gradients of the tokens' log-probs from logits that are computed again.

    Args:
        kernels: row operations of a backend.
        problem: what ``logps`` has computed.
        schedule: tile and chunks.
        saved: what ``logps`` has returned; its log-probs are not read.
        grad_N: ``(N,)`` upstream gradient of each token's log-prob. Where gradients of logits are rounded to float16
            its largest value is about 1.

    Returns:
        Gradients of the packed hidden states ``(N + 1, H)`` with a zero last row, of the weight ``(V, H)`` and of the
        bias ``(V,)``, in accumulation precision. Unwanted ones are None. That of the weight is a sparse tensor where
        the sampling says so.

    """
    head, packed, tile = problem.head, problem.packed, schedule.tile
    dx, dw, db = allocate(kernels, problem)
    scale_N = (-grad_N * head.logit_scale / saved.sumexp).to(saved.sumexp.dtype)
    if problem.sampling is not None:
        sampled.gradients(kernels, problem, schedule, saved, scale_N, (dx, dw, db))
        return dx, dw.gradient() if isinstance(dw, WeightRows) else dw, db
    assert not isinstance(dw, WeightRows), "an exact gradient has every row"
    scratch = kernels.scratch(problem.hidden.device, schedule.scratch_logits)
    for chunk in schedule.chunks:
        start, stop = chunk.start, chunk.stop
        x_CH = packed.gather(problem.hidden, start, stop, kernels.dtype)
        sums = (packed.labels[start:stop], saved.max[start:stop], saved.others[start:stop])
        scale_C: Tensor | None = None
        for left, right in spans(head.vocab, tile.cols):
            z = kernels.tile_in(scratch, stop - start, right - left)
            if schedule.recompute_in_library:
                kernels.project(x_CH, head, left, z)
                labels_C, max_C, others_C = sums
                of_rows = (max_C, others_C, head, scale_N[start:stop], False, head.logit_scale)
                d = kernels.dlogits_(z, labels_C, left, *of_rows)
            else:
                scales = (scale_N[start:stop], head.logit_scale)
                d = kernels.recomputed_dlogits(x_CH, head, left, z, *sums, *scales)
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


def allocate(kernels: RowKernels, problem: Problem) -> Sums:
    """Allocate the gradients that are wanted. Those that no tile will write are set to 0."""
    need, device, (vocab, width) = problem.needs_grad, problem.hidden.device, problem.head.weight.shape
    dx = kernels.buffer(device, problem.packed.capacity + 1, width).zero_() if need.hidden else None
    dw = weight_grad(kernels, problem)
    db = kernels.buffer(device, vocab) if need.bias else None
    for grad in (dw, db):
        if isinstance(grad, Tensor) and not problem.packed.used:
            grad.zero_()  # no tile writes it if there are no tokens
    return dx, dw, db
