"""A tile of fixed size is the only scratch: 1 MiB of logits on a CPU and 256 MiB on a GPU, whatever the batch.

Some backends have a kernel that keeps the logits of the forward pass in registers. The backward pass computes the tiles
again from the saved sums, whether the head is trainable or frozen. One tile serves both gradients. That makes four GEMM
passes with a trainable head, and three with a frozen one.
"""

from torch import Tensor

from dpo_kernels.kernel_interface import RowKernels, RowResult
from dpo_kernels.problem import Problem
from dpo_kernels.shapes import Schedule, accumulation_dtype
from dpo_kernels.strategies import recompute
from dpo_kernels.strategies.row_results import RowResults


def logps(kernels: RowKernels, problem: Problem, schedule: Schedule) -> tuple[RowResult, Tensor | None]:
    """Compute log-probs of the packed tokens in one GEMM pass. No derivative is saved."""
    packed = problem.packed
    if not kernels.streams_logps or not packed.used:
        return recompute.logps(kernels, problem, schedule)
    empty = problem.hidden.new_empty(0, dtype=accumulation_dtype(kernels.dtype))
    rows = RowResults(kernels, problem, like=empty)
    x_NH = packed.gather(problem.hidden, 0, packed.used, kernels.dtype)
    if problem.head.vocab:
        state = kernels.stream_logps(x_NH, problem.head, packed.labels[: packed.used], problem.stats)
    else:  # this rank has no row of the head, but meets the others once for all tokens
        state = kernels.new_state(packed.used, x_NH.device, problem.stats)
    rows.put(0, packed.used, state)
    return rows.result, None


gradients = recompute.gradients
