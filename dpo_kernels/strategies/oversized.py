"""An example that is longer than the scratch, cut into several tiles.

Its loss is known only once its last token is. Its gradient is linear in the coefficients, so the part of the head is
formed for a coefficient of 1 in a buffer of its own, and multiplied by the coefficient at the end.
"""

import torch
from torch import Tensor

from dpo_kernels.shapes import Chunk
from dpo_kernels.strategies.buffers import Buffers


def run(buffers: Buffers, chunk: Chunk) -> None:
    """Process one example: accumulate its gradient with coefficient 1, then scale it once the loss is known."""
    kernels, packed, head = buffers.kernels, buffers.problem.packed, buffers.problem.head
    one_S = _derivative_by_difference(buffers, chunk)
    unscaled: dict[int, tuple[Tensor | None, Tensor | None]] = {}
    for start, stop, side in _tiles(buffers, chunk):
        x_CH, labels_C, tile, state = buffers.forward(start, stop)
        first_of_side = side not in unscaled
        if first_of_side:
            unscaled[side] = _buffer_like(buffers, buffers.dw), _buffer_like(buffers, buffers.db)
        if stop == start:
            continue
        scale_C = buffers.row_scale(one_S, chunk, start, stop, state)
        d = kernels.dlogits_(tile, labels_C, 0, state.max, state.others, head, scale_C, state.exponentiated)
        buffers.backward(d, x_CH, start, *unscaled[side], accumulate=not first_of_side)
    factor_S = (buffers.close_examples(chunk) / one_S).to(buffers.scratch.dtype)
    if buffers.dx is not None:
        tokens = slice(chunk.start, chunk.stop)
        factor_C = factor_S.index_select(0, packed.segments[tokens] - chunk.sequences[0])
        buffers.dx[tokens].mul_(factor_C[:, None])
    for side in sorted(unscaled):
        _add_scaled(buffers, unscaled[side], factor_S[side])


def _derivative_by_difference(buffers: Buffers, chunk: Chunk) -> Tensor:
    """Derivative of what the example's loss depends on by its sequence log-probs, float64.

    For a pair's loss of one difference it is (+1, -1), over the token counts where the loss averages. Otherwise each
    sequence stands for itself.
    """
    loss, counts = buffers.problem.loss, buffers.problem.packed.counts[slice(*chunk.sequences)]
    assert loss is not None, "a pass that forms gradients has a loss"
    ones = torch.ones_like(counts, dtype=buffers.ref.dtype)
    if loss.difference is None:
        return ones
    sign = torch.stack([ones[0], -ones[1]])
    return sign / counts.clamp(min=1) if loss.difference == "mean" else sign


def _tiles(buffers: Buffers, chunk: Chunk) -> list[tuple[int, int, int]]:
    """Tiles ``(start, stop, side)``. Sequences with coefficients of their own are not mixed: each is a side."""
    loss, schedule = buffers.problem.loss, buffers.schedule
    assert loss is not None, "a pass that forms gradients has a loss"
    bounds = [(chunk.start, chunk.stop, 0)]
    if loss.difference is None:
        counts = buffers.problem.packed.host_counts
        assert counts is not None, "an oversized example is only planned where the counts are on the host"
        bounds, start = [], chunk.start
        for side, count in enumerate(counts[slice(*chunk.sequences)]):
            bounds.append((start, start + count, side))
            start += count
    most = schedule.tile.rows // schedule.block_rows * schedule.block_rows or schedule.tile.rows
    return [
        (start, min(start + most, stop), side) for first, stop, side in bounds for start in range(first, stop, most)
    ]


def _buffer_like(buffers: Buffers, grad: Tensor | None) -> Tensor | None:
    return None if grad is None else buffers.kernels.buffer(grad.device, *grad.shape)


def _add_scaled(buffers: Buffers, unscaled: tuple[Tensor | None, Tensor | None], factor: Tensor) -> None:
    for total, part in zip((buffers.dw, buffers.db), unscaled, strict=True):
        if total is None or part is None:
            continue
        if buffers.written:
            total.addcmul_(part, factor)
        else:
            torch.mul(part, factor, out=total)
    buffers.written = True
