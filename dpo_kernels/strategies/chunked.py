"""Chunks of whole examples: each chunk's gradient is formed in the forward pass, from its logits.

For a chunk of whole pairs, groups or sequences, one GEMM gives the logits. The log-sum-exp, the labels' logits and sums
over sequences give the loss and its derivative. The logits are overwritten by their gradient. One GEMM each then gives
the gradients of the hidden states and of the head. That makes three GEMM passes of ``2 N H V`` FLOP, or two where one
of them needs no gradient. Only the gradient of the head outlives the chunk.
"""

from torch import Tensor

from dpo_kernels.kernel_interface import RowKernels
from dpo_kernels.problem import Problem
from dpo_kernels.shapes import Chunk, Schedule
from dpo_kernels.strategies import logits_in_weight_grad, oversized
from dpo_kernels.strategies.buffers import Buffers, LossAndGradients


def loss_and_gradients(
    kernels: RowKernels, problem: Problem, schedule: Schedule, ref_S: Tensor, denominator: Tensor
) -> LossAndGradients:
    """Compute the loss, its gradients and the log-probs of a problem.

    Args:
        kernels: row operations of a backend.
        problem: what is computed. With ``main_grad`` the head's gradient is added to that buffer, and all gradients
            are those of ``main_grad.scale * total``.
        schedule: tile and chunks. A tile of fewer columns than the vocabulary means that the logits of all rows lie
            in the memory of the head's gradient.
        ref_S: ``(S,)`` log-probs of the reference, float64.
        denominator: number that the sum of the losses is divided by, 0-d float64.

    """
    buffers = Buffers.allocate(kernels, problem, schedule, ref_S, denominator)
    for chunk in schedule.chunks:
        if schedule.logits_in_weight_grad:
            logits_in_weight_grad.run(buffers, chunk)
        elif chunk.oversized:
            oversized.run(buffers, chunk)
        else:
            _run(buffers, chunk)
    return buffers.result()


def _run(buffers: Buffers, chunk: Chunk) -> None:
    """Compute a chunk that fits the tile. Its coefficients are known before its gradient is formed and rounded."""
    x_CH, labels_C, tile, state = buffers.forward(chunk.start, chunk.stop)
    scale_C = buffers.close_chunk(chunk, state)
    if chunk.stop == chunk.start or not buffers.problem.head.vocab:
        return
    power = None if buffers.powers is None else buffers.powers[1]
    d = buffers.gradient_of_logits(tile, labels_C, chunk.start, state, scale_C, buffers.expected, power)
    # Where sequences are split too, ranks may see their last rows in other chunks.
    last = chunk.stop == buffers.schedule.chunks[-1].stop and buffers.problem.context is None
    buffers.backward(d, x_CH, chunk.start, buffers.dw, buffers.db, buffers.written, last)
    buffers.written = True
