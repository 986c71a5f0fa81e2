"""Whole pairs at a time: the gradient is formed in the forward pass, from the logits it has just made.

For a chunk of whole pairs: logits GEMM, log-sum-exp and gather, sequence sums, loss and its derivative, the logits
overwritten by their gradient, one GEMM each for the hidden states and the head: three units of ``2 N H V`` FLOP, two
when one of them needs no gradient. Nothing vocabulary-sized outlives the chunk but the gradient of the head.

Few enough rows need no scratch for their logits where a backend says so: these lie in the memory of the head's
gradient, which replaces them a block of columns at a time.

A pair longer than the scratch is cut freely (``docs/design.md``): its gradient is linear in the coefficients, which
are known once its last token is, so the head's share is kept unscaled in a buffer of its own until then.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dpo_kernels.device_specs import ChunkCosts
from dpo_kernels.kernel_interface import LogitsGradient, RowKernels, RowState, rescale
from dpo_kernels.loss_interface import SequenceLoss
from dpo_kernels.segments import sequence_to_token
from dpo_kernels.shapes import Accumulator, Head, PackedTokens, Tile, spans
from dpo_kernels.strategies.groups import Group, oversized_buffers, plan_groups


@dataclass(frozen=True)
class Logits:
    """The logits of rows ``start..stop-1`` in the scratch, and what was reduced from them."""

    start: int
    stop: int
    x: Tensor  # (C, H)
    tile: Tensor  # (C, V)
    state: RowState


@dataclass(frozen=True)
class PairGradients:
    """What the pass leaves behind; gradients are those of ``total``, None where not needed."""

    total: Tensor  # () float64, sum of the losses over the denominator
    losses: Tensor  # by unit
    logps: Tensor  # (S,)
    stats: dict[str, Tensor]  # name -> (N,)
    token_logps: Tensor  # (N,)
    hidden: Tensor | None  # (N + 1, H), last row 0
    weight: Tensor | None  # (V, H)
    bias: Tensor | None  # (V,)


def pair_gradients(
    kernels: RowKernels,
    hidden_RH: Tensor,
    head: Head,
    rows: PackedTokens,
    ref_S: Tensor,
    loss: SequenceLoss,
    denominator: Tensor,
    tile: Tile,
    need: tuple[bool, bool, bool],
    stats: Sequence[str],
    into: Accumulator | None = None,
    chunking: ChunkCosts | None = None,
) -> PairGradients:
    """Run the pass; ``need`` says which of (hidden, weight, bias) want a gradient, ``denominator`` is 0-d float64.

    With ``into`` the head's gradient is added there and all gradients are those of ``into.upstream * total``. A tile
    of fewer columns than the vocabulary holds all rows, and the gradient's memory the logits.
    """
    chunking = chunking or ChunkCosts()
    groups = plan_groups(rows.host_counts, rows.capacity, loss.bounds(rows.counts.shape[0]), tile.rows, chunking)
    largest = max((group.stop - group.start for group in groups), default=0)
    tile = Tile(min(tile.rows, largest), tile.cols)
    run = _Pass(kernels, hidden_RH, head, rows, ref_S, loss, denominator, tile, need, stats, into, chunking.tile_rows)
    for group in groups:
        if tile.cols < head.vocab:
            run.lent(group)
        elif group.oversized:
            run.oversized(group)
        else:
            run.whole(group)
    return run.result()


class _Pass:
    """The buffers of one pass, and the two ways to run a group through them."""

    def __init__(
        self,
        kernels: RowKernels,
        hidden_RH: Tensor,
        head: Head,
        rows: PackedTokens,
        ref_S: Tensor,
        loss: SequenceLoss,
        denominator: Tensor,
        tile: Tile,
        need: tuple[bool, bool, bool],
        stats: Sequence[str],
        into: Accumulator | None,
        block_rows: int,
    ) -> None:
        self.kernels, self.hidden, self.head, self.rows = kernels, hidden_RH, head, rows
        self.ref, self.loss, self.denominator = ref_S, loss, denominator
        self.tile, self.stats, self.block_rows = tile, stats, block_rows
        self.scratch = kernels.scratch(hidden_RH.device, tile.rows, tile.cols)
        need_hidden, need_weight, need_bias = need
        width = hidden_RH.shape[1]
        self.dx = self.scratch.new_zeros(rows.capacity + 1, width) if need_hidden else None
        self.db = kernels.buffer(hidden_RH.device, head.vocab) if need_bias else None
        self.into, self.dw = into, None
        if into is not None:
            self.dw = into.total
        elif need_weight:
            self.dw = kernels.buffer(hidden_RH.device, head.vocab, width)
        self.unscaled: list[tuple[Tensor | None, Tensor | None]] = []
        self.written = into is not None  # whether dw and db hold anything yet
        if self.db is not None and self.written:
            self.db.zero_()
        self.logp = self.scratch.new_zeros(rows.capacity)
        self.token_stats = {name: self.scratch.new_zeros(rows.capacity) for name in stats}
        self.losses: list[Tensor] = []
        self.logps: list[Tensor] = []

    def whole(self, group: Group) -> None:
        """A chunk of whole units: the coefficients are known before the gradient is formed."""
        logits = self._forward(group.start, group.stop)
        scale_C = self._row_scale(self._tail(group), group, group.start, group.stop, logits.state)
        self._backward(logits, scale_C, self.dw, self.db, self.written)
        self.written = self.written or group.stop > group.start

    def lent(self, group: Group) -> None:
        """All rows as one chunk, whose logits lie where the head's gradient will: block by block in the rows of theirs.

        A block is copied to the scratch, as its gradient, before its place is overwritten; so nothing vocabulary-sized
        is needed beside ``dw``, and no row of it is written twice.
        """
        kernels, head, dw = self.kernels, self.head, self.dw
        assert dw is not None, "a plan to borrow has a lender"
        labels_C = self.rows.labels[group.start : group.stop]
        x_CH = self.rows.gather(self.hidden, group.start, group.stop, kernels.dtype)
        state = kernels.new_state(labels_C.shape[0], x_CH.device, self.stats)
        blocks: list[tuple[int, Tensor, Tensor]] = []  # first column, logits, the maximum that they were shifted by
        for left, right in spans(head.vocab, self.tile.cols):
            z = dw[left:right].view(-1)[: labels_C.shape[0] * (right - left)].view(-1, right - left)
            kernels.project(x_CH, head, left, z)
            kernels.reduce(state, z, labels_C, left, keep_logits=head.softcap is not None)
            blocks.append((left, z, state.max.clone()))
        self._put(group.start, group.stop, state, labels_C)
        scale_C = self._row_scale(self._tail(group), group, group.start, group.stop, state)
        scaled_CH: Tensor | None = None
        for left, z, shift_C in blocks:
            tile = kernels.tile_in(self.scratch, *z.shape)
            if state.exponentiated:
                torch.mul(z, rescale(shift_C, state.max)[:, None], out=tile)
            else:
                tile.copy_(z)
            d = kernels.dlogits_(tile, labels_C, left, state.max, state.others, head, scale_C, state.exponentiated)
            if scaled_CH is None:
                scaled_CH = x_CH if d.scale is None else x_CH * d.scale[:, None]
            right = left + z.shape[1]
            if self.dx is not None:
                kernels.grad_hidden(d, head, left, self.dx[group.start : group.stop], accumulate=left > 0)
            if self.db is not None:
                kernels.grad_bias(d, left, self.db[left:right], accumulate=False)
            kernels.grad_weight(LogitsGradient(d.values, None, d.labels), scaled_CH, dw[left:right], accumulate=False)
        if self.dx is not None and d.scale is not None:
            self.dx[group.start : group.stop].mul_(d.scale[:, None])
        self.written = True

    def oversized(self, group: Group) -> None:
        """One unit in several tiles: the gradient per 1 of coefficient first, the coefficient last."""
        unit_S = self._unit_coefficients(group)
        filled = [False] * oversized_buffers([group], self.loss)
        for start, stop, side in self._cut(group):
            logits = self._forward(start, stop)
            dw, db = self._unscaled_buffers(side)
            scale_C = self._row_scale(unit_S, group, start, stop, logits.state)
            self._backward(logits, scale_C, dw, db, filled[side])
            filled[side] = True
        factor_S = (self._tail(group) / unit_S).to(self.scratch.dtype)
        if self.dx is not None:
            factor_C = factor_S.index_select(0, self.rows.segments[group.start : group.stop] - group.sequences[0])
            self.dx[group.start : group.stop].mul_(factor_C[:, None])
        for side in range(len(filled)):
            if filled[side]:
                self._flush(side, factor_S[side])

    def result(self) -> PairGradients:
        """Everything put together."""
        if not self.written:
            for empty in (self.dw, self.db):
                if empty is not None:
                    empty.zero_()
        losses = torch.cat(self.losses) if self.losses else self.ref[:0]
        logps = torch.cat(self.logps) if self.logps else self.ref
        total = losses.sum() / self.denominator
        dw = self.dw if self.into is None else None
        return PairGradients(total, losses, logps, self.token_stats, self.logp, self.dx, dw, self.db)

    def _forward(self, start: int, stop: int) -> Logits:
        kernels, head, labels_C = self.kernels, self.head, self.rows.labels[start:stop]
        x_CH = self.rows.gather(self.hidden, start, stop, kernels.dtype)
        tile = kernels.tile_in(self.scratch, stop - start, head.vocab)
        state = kernels.new_state(stop - start, x_CH.device, self.stats)
        if stop > start:
            kernels.project(x_CH, head, 0, tile)
            # The softcap's derivative is taken from the logits; without one they have been seen for the last time.
            kernels.reduce(state, tile, labels_C, 0, keep_logits=head.softcap is not None)
            self._put(start, stop, state, labels_C)
        return Logits(start, stop, x_CH, tile, state)

    def _put(self, start: int, stop: int, state: RowState, labels_C: Tensor) -> None:
        done = self.kernels.row_logps(state, labels_C, self.head.vocab)
        self.logp[start:stop] = done.logp
        for name in self.stats:
            self.token_stats[name][start:stop] = done.stats[name]

    def _tail(self, group: Group) -> Tensor:
        """Close the group's pairs; returns the derivative of the total by their sequence log-probs."""
        tokens = slice(group.start, group.stop)
        sequences = slice(*group.sequences)
        weights = None if self.rows.weights is None else self.rows.weights[tokens]
        logps_S, losses_P, grad_S = self.kernels.sequence_loss(
            self.logp[tokens],
            weights,
            self.rows.counts[sequences],
            self.ref[sequences],
            self.rows.nan_if_invalid,
            self.loss.of_examples(group.first, group.last),
        )
        self.losses.append(losses_P)
        self.logps.append(logps_S)
        grad_S = grad_S / self.denominator
        return grad_S if self.into is None else grad_S * self.into.upstream

    def _row_scale(self, values_S: Tensor, group: Group, start: int, stop: int, state: RowState) -> Tensor:
        """Factor of the logits' rows: minus a row's coefficient, over its sum of exponentials."""
        rows = slice(start, stop)
        weights = None if self.rows.weights is None else self.rows.weights[rows]
        coefficient_C = sequence_to_token(values_S, self.rows.segments[rows] - group.sequences[0], weights)
        return (-coefficient_C * self.head.logit_scale / state.sumexp).to(self.scratch.dtype)

    def _backward(
        self, logits: Logits, scale_C: Tensor, dw: Tensor | None, db: Tensor | None, accumulate: bool
    ) -> None:
        """Overwrite the logits by their gradient and add its products to ``dx``, ``dw`` and ``db``."""
        start, stop, tile, state = logits.start, logits.stop, logits.tile, logits.state
        if stop == start:
            return
        kernels, labels_C = self.kernels, self.rows.labels[start:stop]
        d = kernels.dlogits_(tile, labels_C, 0, state.max, state.others, self.head, scale_C, state.exponentiated)
        if self.dx is not None:
            kernels.grad_hidden(d, self.head, 0, self.dx[start:stop], accumulate=False)
            if d.scale is not None:
                self.dx[start:stop].mul_(d.scale[:, None])
        if dw is not None:
            kernels.grad_weight(d, logits.x, dw, accumulate)
        if db is not None:
            kernels.grad_bias(d, 0, db, accumulate)

    def _unit_coefficients(self, group: Group) -> Tensor:
        """Derivative of what the unit's loss depends on by its sequence log-probs, float64.

        For a pair's loss of one difference that is (+1, -1), over the token counts where it averages; otherwise each
        sequence stands for itself.
        """
        counts = self.rows.counts[slice(*group.sequences)]
        ones = torch.ones_like(counts, dtype=self.ref.dtype)
        if self.loss.difference is None:
            return ones
        sign = torch.stack([ones[0], -ones[1]])
        return sign / counts.clamp(min=1) if self.loss.difference == "mean" else sign

    def _cut(self, group: Group) -> list[tuple[int, int, int]]:
        """Tiles ``(start, stop, buffer)`` of an oversized unit; coefficients of their own are not mixed."""
        bounds = [(group.start, group.stop, 0)]
        if self.loss.difference is None:
            counts = self.rows.host_counts
            assert counts is not None, "an oversized unit is only planned where the counts are on the host"
            bounds, start = [], group.start
            for side, count in enumerate(counts[slice(*group.sequences)]):
                bounds.append((start, start + count, side))
                start += count
        whole = self.tile.rows // self.block_rows * self.block_rows or self.tile.rows
        return [(at, min(at + whole, stop), side) for start, stop, side in bounds for at in range(start, stop, whole)]

    def _unscaled_buffers(self, side: int) -> tuple[Tensor | None, Tensor | None]:
        while len(self.unscaled) <= side:
            self.unscaled.append(
                (
                    None if self.dw is None else self.kernels.buffer(self.dw.device, *self.dw.shape),
                    None if self.db is None else self.kernels.buffer(self.db.device, *self.db.shape),
                )
            )
        return self.unscaled[side]

    def _flush(self, side: int, factor: Tensor) -> None:
        for total, unscaled in zip((self.dw, self.db), self.unscaled[side], strict=True):
            if total is None or unscaled is None:
                continue
            if self.written:
                total.addcmul_(unscaled, factor)
            else:
                torch.mul(unscaled, factor, out=total)
        self.written = True
