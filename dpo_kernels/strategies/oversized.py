"""An oversized example: it has more tokens than the tile has rows, and is cut into several tiles.

Its loss is known only after its last token. Its gradient is linear in the coefficients. So the head's gradient is
formed with a coefficient of 1 in an accumulator, and multiplied by the coefficient at the end.
"""

import torch
from torch import Tensor

from dpo_kernels.shapes import Chunk
from dpo_kernels.strategies.buffers import Buffers
from dpo_kernels.strategies.weight_rows import WeightRows, weight_grad


def run(buffers: Buffers, chunk: Chunk) -> None:
    """Process one example: accumulate its gradient with coefficient 1, then scale it once the loss is known."""
    packed, head = buffers.problem.packed, buffers.problem.head
    one_S = _derivative_by_difference(buffers, chunk)
    power = None if buffers.powers is None else buffers.powers[0]
    unscaled: dict[int, tuple[Tensor | WeightRows | None, Tensor | None]] = {}
    for start, stop, side in _tiles(buffers, chunk):
        x_CH, labels_C, tile, state = buffers.forward(start, stop)
        first_of_side = side not in unscaled
        if first_of_side:
            unscaled[side] = weight_grad(buffers.kernels, buffers.problem), _buffer_like(buffers, buffers.db)
        if stop == start or not head.vocab:
            continue
        scale_C = buffers.row_scale(one_S, chunk, start, stop, state)
        d = buffers.gradient_of_logits(tile, labels_C, start, state, scale_C, head.logit_scale, power)
        buffers.backward(d, x_CH, start, *unscaled[side], accumulate=not first_of_side)
    factor_S = (buffers.close_examples(chunk) / one_S).to(buffers.scratch.dtype)
    if buffers.dx is not None:
        tokens = slice(chunk.start, chunk.stop)
        factor_C = factor_S.index_select(0, packed.segments[tokens] - chunk.sequences[0])
        buffers.dx[tokens].mul_(factor_C[:, None])
    if buffers.powers is not None:  # gradients are added up without one power, and these accumulators without the other
        factor_S = factor_S * (buffers.powers[0] / buffers.powers[1])
    for side in sorted(unscaled):
        _add_scaled(buffers, unscaled[side], factor_S[side])


def _derivative_by_difference(buffers: Buffers, chunk: Chunk) -> Tensor:
    """Return the coefficients ``(sequences of the example,)`` that its gradient is first formed with, float64.

    A pair's loss may depend on a difference of log-probs alone. Then they are +1 and -1, over the token counts if the
    loss averages. Otherwise each is 1.
    """
    loss, counts = buffers.problem.loss, buffers.problem.total_counts[slice(*chunk.sequences)]
    assert loss is not None, "a pass that forms gradients has a loss"
    ones = torch.ones_like(counts, dtype=buffers.ref.dtype)
    if loss.difference is None:
        return ones
    sign = torch.stack([ones[0], -ones[1]])
    return sign / counts.clamp(min=1) if loss.difference == "mean" else sign


def _tiles(buffers: Buffers, chunk: Chunk) -> list[tuple[int, int, int]]:
    """Return tiles ``(start, stop, side)``, which share an accumulator if they have the same side.

    Sequences whose coefficients are independent are different sides. No tile holds tokens of two sides.
    """
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
    most = schedule.oversized_rows
    return [
        (start, min(start + most, stop), side) for first, stop, side in bounds for start in range(first, stop, most)
    ]


def _buffer_like(buffers: Buffers, grad: Tensor | None) -> Tensor | None:
    return None if grad is None else buffers.kernels.buffer(grad.device, *grad.shape)


def _add_scaled(buffers: Buffers, unscaled: tuple[Tensor | WeightRows | None, Tensor | None], factor: Tensor) -> None:
    """Add accumulators of weight and bias, times a 0-d factor, to the gradients."""
    for total, part in zip((buffers.dw, buffers.db), unscaled, strict=True):
        if total is None or part is None:
            continue
        if isinstance(total, WeightRows) or isinstance(part, WeightRows):
            assert isinstance(total, WeightRows), "both are rows, or neither"
            assert isinstance(part, WeightRows), "both are rows, or neither"
            total.add_scaled(part, factor)
        elif buffers.written:
            total.addcmul_(part, factor)
        else:
            torch.mul(part, factor, out=total)
    buffers.written = True
