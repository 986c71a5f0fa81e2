"""Passes over the whole head in tiles, composed of a backend's own tile operations.

A backend that has a native streaming kernel overrides these; one that has not inherits them.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from dpo_kernels.kernel_interface import LogitsGradient, RowKernels, RowResult, RowState, rescale
from dpo_kernels.loss_interface import SequenceLoss
from dpo_kernels.segments import segment_sum
from dpo_kernels.shapes import GPU_ROW_ALIGNMENT, Head, PackedTokens, Tile, accumulation_dtype, padded, spans


class TiledPasses(RowKernels):
    """``linear_*`` and ``tail`` of ``RowKernels`` from tile operations and plain torch."""

    def buffer(self, device: torch.device, *shape: int) -> Tensor:
        """See ``RowKernels``."""
        return torch.empty(shape, dtype=accumulation_dtype(self.dtype), device=device)

    @staticmethod
    def row_alignment(device_type: str) -> int:
        """See ``RowKernels``: on a GPU 16 elements, without which a GEMM or a row pass of an odd vocabulary reads
        element by element.
        """
        return GPU_ROW_ALIGNMENT if device_type == "cuda" else 1

    def scratch(self, device: torch.device, rows: int, cols: int) -> Tensor:
        """See ``RowKernels``."""
        return self.buffer(device, rows * padded(cols, self.row_alignment(device.type)))

    def tile_in(self, scratch: Tensor, rows: int, cols: int) -> Tensor:
        """See ``RowKernels``."""
        pitch = padded(cols, self.row_alignment(scratch.device.type))
        return scratch[: rows * pitch].view(rows, pitch)[:, :cols]

    def empty_operands_like(self, tile: Tensor) -> Tensor:
        """An uninitialised tile of GEMM operands."""
        rows, cols = tile.shape
        pitch = padded(cols, self.row_alignment(tile.device.type))
        return tile.new_empty(rows, pitch, dtype=self.dtype)[:, :cols]

    @staticmethod
    def finalize_weight_grad(grad: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor | None:
        """See ``RowKernels``; in place, and untouched where that can be told without a sync."""
        if grad.dtype != dtype:
            return None
        return grad if grad.device.type == "cpu" and float(factor) == 1.0 else grad.mul_(factor)

    def segment_sum(self, values_N: Tensor, weights_N: Tensor | None, counts_S: Tensor) -> Tensor:
        """See ``sequence.segment_sum``."""
        return segment_sum(values_N, weights_N, counts_S)

    def sequence_loss(
        self,
        logp_N: Tensor,
        weights_N: Tensor | None,
        counts_S: Tensor,
        ref_S: Tensor,
        nan_if_invalid: Tensor,
        loss: SequenceLoss,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """See ``RowKernels``; the poison reaches the gradient too, whatever the loss makes of a NaN."""
        sums_S = self.segment_sum(logp_N, weights_N, counts_S) + nan_if_invalid
        losses_P, grad_S = loss.value_and_grad(sums_S, ref_S, counts_S)
        return sums_S, losses_P, grad_S + nan_if_invalid

    def linear_logprob(
        self, hidden_RH: Tensor, head: Head, rows: PackedTokens, tile: Tile, stats: Sequence[str]
    ) -> RowResult:
        """See ``RowKernels``."""
        scratch = self.scratch(hidden_RH.device, tile.rows, tile.cols)
        out = _RowResults(rows, scratch, stats)
        for start, stop in spans(rows.used, tile.rows):
            x_CH = rows.gather(hidden_RH, start, stop, self.dtype)
            labels_C = rows.labels[start:stop]
            state = self.new_state(stop - start, x_CH.device, stats)
            for left, right in spans(head.vocab, tile.cols):
                z = self.tile_in(scratch, stop - start, right - left)
                self.project(x_CH, head, left, z)
                self.reduce(state, z, labels_C, left)
            out.put(start, stop, self.row_logps(state, labels_C, head.vocab))
        return out.result

    def stream_logprob(
        self, hidden_RH: Tensor, head: Head, rows: PackedTokens, tile: Tile, stats: Sequence[str]
    ) -> RowResult:
        """See ``RowKernels``; without a kernel of its own, small tiles in memory."""
        return self.linear_logprob(hidden_RH, head, rows, tile, stats)

    def recomputed_dlogits(
        self,
        x_CH: Tensor,
        head: Head,
        start: int,
        tile: Tensor,
        labels_C: Tensor,
        max_C: Tensor,
        others_C: Tensor,
        scale_C: Tensor | None,
    ) -> LogitsGradient:
        """See ``RowKernels``."""
        self.project(x_CH, head, start, tile)
        return self.dlogits_(tile, labels_C, start, max_C, others_C, head, scale_C)

    def reduce_and_dlogits(self, state: RowState, tile: Tensor, labels_C: Tensor, head: Head) -> LogitsGradient:
        """See ``RowKernels``."""
        self.reduce(state, tile, labels_C, 0, keep_logits=head.softcap is not None)
        return self.dlogits_(tile, labels_C, 0, state.max, state.others, head, None, state.exponentiated)

    def linear_direction(
        self, hidden_RH: Tensor, head: Head, rows: PackedTokens, tile: Tile, stats: Sequence[str]
    ) -> tuple[RowResult, Tensor]:
        """See ``RowKernels``. A row's softmax-weighted sum of the head is rescaled as its maximum grows."""
        scratch = self.scratch(hidden_RH.device, tile.rows, tile.cols)
        out = _RowResults(rows, scratch, stats)
        dlogp_dhidden = scratch.new_zeros(rows.capacity + 1, hidden_RH.shape[1])
        for start, stop in spans(rows.used, tile.rows):
            x_CH = rows.gather(hidden_RH, start, stop, self.dtype)
            labels_C = rows.labels[start:stop]
            state = self.new_state(stop - start, x_CH.device, stats)
            run = self._whole_direction if tile.cols >= head.vocab else self._cut_direction
            run(state, x_CH, head, labels_C, scratch, tile.cols, dlogp_dhidden[start:stop])
            out.put(start, stop, self.row_logps(state, labels_C, head.vocab))
        return out.result, dlogp_dhidden

    def _whole_direction(
        self, state: RowState, x_CH: Tensor, head: Head, labels_C: Tensor, scratch: Tensor, _: int, out_CH: Tensor
    ) -> None:
        z = self.tile_in(scratch, x_CH.shape[0], head.vocab)
        self.project(x_CH, head, 0, z)
        d = self.reduce_and_dlogits(state, z, labels_C, head)
        self.grad_hidden(d, head, 0, out_CH, accumulate=False)
        scale_C = head.logit_scale / state.sumexp
        out_CH.mul_((scale_C if d.scale is None else scale_C * d.scale)[:, None])

    def _cut_direction(
        self, state: RowState, x_CH: Tensor, head: Head, labels_C: Tensor, scratch: Tensor, cols: int, out_CH: Tensor
    ) -> None:
        nothing_yet = torch.zeros_like(state.others)  # the label's own term is added once the sum is known
        for left, right in spans(head.vocab, cols):
            z = self.tile_in(scratch, x_CH.shape[0], right - left)
            self.project(x_CH, head, left, z)
            before = state.max.clone()
            self.reduce(state, z, labels_C, left)
            if left:
                out_CH.mul_(rescale(before, state.max)[:, None])
            # A row of -inf so far (unreachable tokens) is shifted by 0, or -inf - -inf would be NaN.
            shift_C = state.max.masked_fill(state.max == -torch.inf, 0.0)
            d = self.dlogits_(z, labels_C, left, shift_C, nothing_yet, head, None, state.exponentiated)
            self.grad_hidden(d, head, left, out_CH, accumulate=left > 0)
        out_CH.addcmul_(_label_rows(head, labels_C, state.target, self.dtype), state.others[:, None], value=-1)
        out_CH.mul_((head.logit_scale / state.sumexp)[:, None])

    def linear_logprob_backward(
        self,
        hidden_RH: Tensor,
        head: Head,
        rows: PackedTokens,
        saved: tuple[Tensor, Tensor, Tensor],
        grad_N: Tensor,
        tile: Tile,
        need: tuple[bool, bool, bool],
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """See ``RowKernels``."""
        max_N, sumexp_N, others_N = saved
        scratch = self.scratch(hidden_RH.device, tile.rows, tile.cols)
        grads = self._new_gradients(hidden_RH, head, rows, need)
        dx, dw, db = grads
        scale_N = (-grad_N * head.logit_scale / sumexp_N).to(scratch.dtype)
        for start, stop in spans(rows.used, tile.rows):
            x_CH = rows.gather(hidden_RH, start, stop, self.dtype)
            for left, right in spans(head.vocab, tile.cols):
                z = self.tile_in(scratch, stop - start, right - left)
                here = (rows.labels[start:stop], max_N[start:stop], others_N[start:stop])
                d = self.recomputed_dlogits(x_CH, head, left, z, *here, scale_N[start:stop])
                if dx is not None:
                    self.grad_hidden(d, head, left, dx[start:stop], accumulate=left > 0)
                if dw is not None:
                    self.grad_weight(d, x_CH, dw[left:right], accumulate=start > 0)
                if db is not None:
                    self.grad_bias(d, left, db[left:right], accumulate=start > 0)
                scale_C = d.scale
            if dx is not None and scale_C is not None:
                dx[start:stop].mul_(scale_C[:, None])
        return grads

    def _new_gradients(
        self, hidden_RH: Tensor, head: Head, rows: PackedTokens, need: tuple[bool, bool, bool]
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Buffers for the gradients by hidden rows (one more row, zero), weight and bias; None where not needed."""
        need_hidden, need_weight, need_bias = need
        vocab, width = head.weight.shape
        device = hidden_RH.device
        dx = self.buffer(device, rows.capacity + 1, width).zero_() if need_hidden else None
        dw = self.buffer(device, vocab, width) if need_weight else None
        db = self.buffer(device, vocab) if need_bias else None
        for grad in (dw, db):
            if grad is not None and not rows.used:
                grad.zero_()  # no tile ever writes it
        return dx, dw, db


def _label_rows(head: Head, labels_C: Tensor, target_C: Tensor, dtype: torch.dtype) -> Tensor:
    """The head's rows of the labels, times the softcap's derivative at their logits."""
    rows_CH = head.weight.index_select(0, labels_C).to(dtype).to(target_C.dtype)
    if head.softcap is None:
        return rows_CH
    return rows_CH * (1.0 - (target_C / head.softcap).square())[:, None]


class _RowResults:
    """Results of row tiles, put together; capacity that stands for nothing keeps log-prob 0."""

    def __init__(self, rows: PackedTokens, like: Tensor, stats: Sequence[str]) -> None:
        zeros, ones = like.new_zeros(rows.capacity), like.new_ones(rows.capacity)
        self.result = RowResult(
            zeros,
            torch.zeros_like(zeros),
            ones,
            torch.zeros_like(zeros),
            {name: torch.zeros_like(zeros) for name in stats},
        )

    def put(self, start: int, stop: int, part: RowResult) -> None:
        self.result.logp[start:stop] = part.logp
        self.result.max[start:stop] = part.max
        self.result.sumexp[start:stop] = part.sumexp
        self.result.others[start:stop] = part.others
        for name, value in part.stats.items():
            self.result.stats[name][start:stop] = value
