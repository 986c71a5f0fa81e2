"""The products of a tile's gradient, exact or a sample of it, and log-probs' gradients from samples.

A tile whose sample would not pay takes its exact gradient, so that the expectation is exact in any case.
"""

from torch import Tensor

from dpo_kernels.kernel_interface import LogitsGradient, RowKernels, RowResult, SampledRows, SparseGradient
from dpo_kernels.problem import Problem
from dpo_kernels.shapes import Head, Schedule, spans
from dpo_kernels.strategies.weight_rows import WeightRows

# These are gradients of the hidden states, the weight and the bias, each None where not wanted.
Gradients = tuple[Tensor | None, Tensor | None, Tensor | None]
# The same while products are added to them.
Sums = tuple[Tensor | None, Tensor | WeightRows | None, Tensor | None]


def add_products(
    kernels: RowKernels,
    d: LogitsGradient | SparseGradient,
    head: Head,
    start: int,
    x_CH: Tensor,
    grads: Sums,
    *,
    first_columns: bool,
    first_rows: bool,
) -> None:
    """Add the products of a tile's gradient to those of its rows and columns, every factor of the rows included.

    Args:
        kernels: row operations of a backend.
        d: gradient ``(C, Vt)`` of a tile of logits.
        head: the head that made the logits.
        start: the vocabulary's column that comes first in the tile.
        x_CH: hidden states of its rows.
        grads: ``(C, H)``, ``(Vt, H)`` or rows of ``(V, H)``, and ``(Vt,)``, None where not wanted.
        first_columns: whether the first gradient holds nothing yet.
        first_rows: whether the others hold nothing yet.

    """
    dx, dw, db = grads
    if isinstance(d, SparseGradient):
        if dx is not None:
            kernels.sparse_grad_hidden(d, head, start, dx, accumulate=not first_columns)
        if isinstance(dw, WeightRows):
            dw.add_sample(d, start, x_CH)
        elif dw is not None:
            kernels.sparse_grad_weight(d, x_CH, dw, accumulate=not first_rows)
        if db is not None:
            kernels.sparse_grad_bias(d, db, accumulate=not first_rows)
        return
    if dx is not None:
        part = dx if first_columns else dx.new_empty(dx.shape)
        kernels.grad_hidden(d, head, start, part, accumulate=False)
        if d.scale is not None:
            part.mul_(d.scale[:, None])
        if not first_columns:
            dx.add_(part)
    if isinstance(dw, WeightRows):
        dw.add_exact(d, start, x_CH)
    elif dw is not None:
        kernels.grad_weight(d, x_CH, dw, accumulate=not first_rows)
    if db is not None:
        kernels.grad_bias(d, start, db, accumulate=not first_rows)


def gradients(
    kernels: RowKernels, problem: Problem, schedule: Schedule, saved: RowResult, scale_N: Tensor, grads: Sums
) -> None:
    """Write the gradients of log-probs from logits that are computed again, see ``recompute.gradients``.

    Args:
        kernels: row operations of a backend.
        problem: what has been computed, with its sampling.
        schedule: tile and chunks. A tile begins at a multiple of ``sampling.BLOCK`` columns.
        saved: sums of all rows.
        scale_N: ``(N,)`` factor of each row of the logits' gradient.
        grads: ``(N + 1, H)``, ``(V, H)`` or its rows, and ``(V,)``, None where not wanted.

    """
    head, packed, (dx, dw, db) = problem.head, problem.packed, grads
    assert problem.sampling is not None, "exact gradients are formed by recompute.gradients"
    scratch = kernels.scratch(problem.hidden.device, schedule.scratch_logits)
    for chunk in schedule.chunks:
        rows = slice(chunk.start, chunk.stop)
        x_CH, labels_C = packed.gather(problem.hidden, chunk.start, chunk.stop, kernels.dtype), packed.labels[rows]
        sums, scale_C = (saved.max[rows], saved.others[rows]), scale_N[rows]
        of_rows = SampledRows.of(labels_C, *sums, saved.sumexp[rows], scale_C, packed.index[rows])
        for left, right in spans(head.vocab, schedule.tile.cols):
            z = kernels.tile_in(scratch, chunk.stop - chunk.start, right - left)
            how = (of_rows, problem.sampling, head.logit_scale)
            d = kernels.recomputed_sampled_dlogits(x_CH, head, left, z, *how)
            of_tile = (
                None if dx is None else dx[rows],
                dw[left:right] if isinstance(dw, Tensor) else dw,
                None if db is None else db[left:right],
            )
            add_products(kernels, d, head, left, x_CH, of_tile, first_columns=left == 0, first_rows=chunk.start == 0)
