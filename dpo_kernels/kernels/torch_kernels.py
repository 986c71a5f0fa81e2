"""The torch backend: every row operation in plain torch, on any device. Other backends are tested against it.

Logits are float32 wherever the operands have 16 bits. On CUDA the GEMM itself has float32 output. Elsewhere the
operands are upcast in blocks.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from dpo_kernels.kernel_interface import (
    Coefficients,
    LogitsGradient,
    RowKernels,
    RowResult,
    RowsOfBoth,
    RowState,
    SampledRows,
    SparseGradient,
    rescale,
)
from dpo_kernels.kernels import divergence, float16_range
from dpo_kernels.kernels.divergence import log_sumexp
from dpo_kernels.kernels.sampling import most_entries, sample
from dpo_kernels.shapes import Head, Sampling, accumulation_dtype, spans
from dpo_kernels.tiled_weight import TiledWeight

SIXTEEN_BIT = (torch.bfloat16, torch.float16)
# A row operation on the CPU works on blocks whose temporaries take at most this many bytes. That much usually fits the
# second-level cache of a core.
CACHED_BYTES = 2 * 2**20
# A row operation holds so many temporaries of a block at once: its exponentials, and a product of them.
BLOCK_TEMPORARIES = 2
# A sample with more entries than this part of the tile is given up for the products of the whole tile. The number is a
# choice: an entry costs several times its part of a product.
MOST_SAMPLED = 1 / 16
# With matrix instructions a sample is given up at a part of the tile that is so many times smaller. By the model of
# GPUs (benchmarks/sparse_model.py) that pays from 1/123 of the tile on an H100, 1/83 on an H200 and 1/59 on an A100,
# where V = 128256 and H = 4096. The part of a smaller vocabulary is fewer entries: 384 of 49152.
MATRIX_INSTRUCTIONS = 8
# Numbers of 8 bytes, and values, that an entry of a sample has at most while the head's gradient is formed from it.
ENTRY_INDICES, ENTRY_VALUES = 8, 4
SAMPLING_BYTES = 64  # of temporaries for each logit while a sample is drawn


def most_sampled_on_gpus(dtype: torch.dtype) -> float:
    """Return the part of a tile's entries above which kernels of a GPU give its sample up. Triton need not be there."""
    return MOST_SAMPLED / (MATRIX_INSTRUCTIONS if dtype in SIXTEEN_BIT else 1)


class TorchKernels(RowKernels):
    """Row operations with at most ``workspace_bytes`` of vocabulary-sized temporaries beside the caller's tile."""

    name = "torch"

    @staticmethod
    def bytes_per_logit(dtype: torch.dtype, device_type: str) -> int:
        """See ``RowKernels``. On CUDA a float32 logit has a 16-bit copy, which the gradient GEMMs read."""
        if dtype in SIXTEEN_BIT and device_type == "cuda":
            return 6
        return accumulation_dtype(dtype).itemsize

    def rounds_operands(self, like: Tensor) -> bool:
        """See ``RowKernels``. Elsewhere than on CUDA 16-bit operands are upcast."""
        return self.dtype in SIXTEEN_BIT and like.is_cuda

    def new_state(self, rows: int, device: torch.device, stats: Sequence[str]) -> RowState:
        """See ``RowKernels``."""
        dtype = accumulation_dtype(self.dtype)

        def full(value: float) -> Tensor:
            return torch.full((rows,), value, dtype=dtype, device=device)

        return RowState(
            max=full(-torch.inf),
            others=full(0.0),
            target=full(-torch.inf),
            entropy=full(0.0) if "entropy" in stats else None,
            logit_sum=full(0.0) if "mean_logits" in stats else None,
            argmax=torch.zeros(rows, dtype=torch.int64, device=device) if "top1" in stats else None,
            square_sum=full(0.0) if "log_sum_p2" in stats else None,
        )

    def project(self, x_CH: Tensor, head: Head, start: int, tile: Tensor) -> None:
        """See ``RowKernels``."""
        self.multiply(x_CH, head, start, tile)
        stop = start + tile.shape[1]
        if head.bias is not None:
            tile.add_(head.bias[start:stop].to(self.dtype).to(tile.dtype))
        if head.softcap is not None:
            tile.mul_(head.logit_scale / head.softcap).tanh_().mul_(head.softcap)
        elif head.logit_scale != 1.0:
            tile.mul_(head.logit_scale)

    def multiply(self, x_CH: Tensor, head: Head, start: int, tile: Tensor) -> None:
        """Compute ``tile = x_CH @ W[start:start+Vt]^T``."""
        for left, right, weight_VtH in self._weights(head, start, start + tile.shape[1], tile):
            part = tile if right - left == tile.shape[1] else tile[:, left:right]
            _matmul_into(x_CH, weight_VtH.t(), part, accumulate=False)

    def reduce(self, state: RowState, tile: Tensor, labels_C: Tensor, start: int, keep_logits: bool = True) -> None:
        """See ``RowKernels``."""
        fields: dict[str, Any] = {name: value for name, value in vars(state).items() if isinstance(value, Tensor)}
        for rows, cols in self._blocks(tile):
            # Only where a block holds whole rows are its exponentials shifted by the rows' final maximum.
            state.exponentiated = not keep_logits and cols.stop - cols.start == tile.shape[1]
            part = replace(state, **{name: value[rows] for name, value in fields.items()})
            self._reduce_block(part, tile[rows, cols], labels_C[rows], start + cols.start, state.exponentiated)
            for name, value in fields.items():
                value[rows] = getattr(part, name)

    def _reduce_block(self, state: RowState, z: Tensor, labels_C: Tensor, start: int, overwrite: bool) -> None:
        """Fold one block of logits ``z`` into the state; with ``overwrite`` the block then holds ``exp(z - max)``."""
        label, label_in_block = _columns(labels_C, start, z)
        label_logit = z.gather(1, label)[:, 0]
        block_max = z.amax(dim=1)
        highest = torch.maximum(state.max, block_max)
        # A row that is -inf so far has only unreachable tokens. It is shifted by 0, because -inf - -inf would be NaN.
        shift = highest.masked_fill(highest == -torch.inf, 0.0)
        decay = rescale(state.max, highest)
        if state.logit_sum is not None:
            state.logit_sum = state.logit_sum + z.sum(dim=1)
        if state.argmax is not None:
            first = z.argmax(dim=1) + start
            state.argmax = torch.where(block_max > state.max, first, state.argmax)
        e = (z.sub_(shift[:, None]) if overwrite else z - shift[:, None]).exp_()
        label_exp = e.gather(1, label)
        # The label's exponential becomes 0, but stays NaN in a row that holds one.
        e.scatter_(1, label, torch.where(label_in_block[:, None], label_exp - label_exp, label_exp))
        if state.entropy is not None:
            # When the shift grows by d, every -e * log e gains d * e.
            drop = torch.where(state.others > 0, (highest - state.max) * state.others, state.others)
            state.entropy = (state.entropy + drop) * decay + torch.special.entr(e).sum(dim=1)
        if state.square_sum is not None:
            state.square_sum = state.square_sum * decay.square() + torch.linalg.vecdot(e, e)
        state.others = state.others * decay + e.sum(dim=1)
        if overwrite:
            e.scatter_(1, label, label_exp)
        state.max = highest
        state.target = torch.where(label_in_block, label_logit, state.target)

    def row_logps(self, state: RowState, labels_C: Tensor, vocab: int) -> RowResult:
        """See ``RowKernels``. ``(z_y - max) - log sumexp`` keeps the digits that ``z_y - lse`` would lose.

        Where the label's logit is the largest, ``expm1`` gives exactly 0, and ``log1p`` keeps the digits of the other
        tokens' sum. Where another logit is the largest, that sum is at least 1.
        """
        shifted_target = state.target - state.max
        log_total = log_sumexp(state, shifted_target)
        sumexp = state.sumexp
        stats = {}
        if state.entropy is not None:
            # The label's own term is 0 if its logit is -inf, where 0 * -inf would be NaN.
            label_term = torch.where(
                shifted_target == -torch.inf, torch.zeros_like(shifted_target), shifted_target.exp() * shifted_target
            )
            stats["entropy"] = log_total + (state.entropy - label_term) / sumexp
        if state.logit_sum is not None:
            stats["mean_logits"] = state.logit_sum / vocab
        if state.argmax is not None:
            stats["top1"] = (state.argmax == labels_C).to(state.max.dtype)
        if state.square_sum is not None:
            stats["log_sum_p2"] = (state.square_sum + (2.0 * shifted_target).expm1()).log1p() - 2.0 * log_total
        return RowResult(shifted_target - log_total, state.max, sumexp, state.others, stats)

    def dlogits_(
        self,
        tile: Tensor,
        labels_C: Tensor,
        start: int,
        max_C: Tensor,
        others_C: Tensor,
        head: Head,
        scale_C: Tensor | None,
        exponentiated: bool = False,
        expected: float = 1.0,
    ) -> LogitsGradient:
        """See ``RowKernels``. A tile that is not rounded here comes back without its scale.

        Without a softcap, a row of the tile becomes ``exp(z_v - max)``. At the label ``y`` it becomes minus the sum of
        ``exp(z_v - max)`` over all other ``v``. The scale of a token is ``-g * logit_scale / sumexp``, with ``g`` the
        derivative of the total by its log-prob. The product is ``g * logit_scale * (onehot - p)``, the gradient of the
        unscaled logits.
        """
        label, label_in_tile = _columns(labels_C, start, tile)
        label_value = -others_C[:, None]
        if head.softcap is not None:
            assert not exponentiated, "the softcap's derivative needs the logits"
            # d z / d raw = scale * (1 - (z / softcap)^2). The label's is taken before the logits are overwritten.
            label_value = label_value * tile.gather(1, label).div_(head.softcap).square_().neg_().add_(1.0)
        if not exponentiated:
            for rows, cols in self._blocks(tile):
                z = tile[rows, cols]
                slope = None if head.softcap is None else (z / head.softcap).square_().neg_().add_(1.0)
                z.sub_(max_C[rows, None]).exp_()
                if slope is not None:
                    z.mul_(slope)
        tile.scatter_(1, label, torch.where(label_in_tile[:, None], label_value, tile.gather(1, label)))
        return self._as_operands(tile, labels_C, start, scale_C, others_C, expected)

    def _as_operands(
        self,
        tile: Tensor,
        labels_C: Tensor,
        start: int,
        scale_C: Tensor | None,
        largest_C: Tensor,
        expected: float,
    ) -> LogitsGradient:
        """Return a tile of logits' gradients as the GEMMs read it. Where they read 16 bits it is scaled and rounded.

        Args:
            tile: ``(C, Vt)`` values, the labels' own included.
            labels_C: ``(C,)`` int64 labels.
            start: the vocabulary's column that comes first in the tile.
            scale_C: ``(C,)`` factor of each row, or None for 1.
            largest_C: ``(C,)`` bound of each row's values.
            expected: see ``RowKernels.dlogits_``.

        """
        if not self.rounds_operands(tile):
            return LogitsGradient(tile, scale_C, labels_C)
        applied, left = self.scales_before_rounding(scale_C, largest_C, expected)
        if applied is not None:
            tile.mul_(applied[:, None])
        operands = self.empty_operands_like(tile).copy_(tile)
        column, label_in_tile = _columns(labels_C, start, tile)
        residual_C = (tile.gather(1, column) - operands.gather(1, column).to(tile.dtype))[:, 0]
        residual_C = residual_C.masked_fill(~label_in_tile, 0.0)
        return LogitsGradient(operands, left, labels_C, residual_C, self.x_exponent(expected))

    def scales_before_rounding(
        self, scale_C: Tensor | None, others_C: Tensor, expected: float
    ) -> tuple[Tensor | None, Tensor | None]:
        """Return what rows are multiplied by before they are rounded, and the factors that they still need, or None."""
        if self.dtype != torch.float16:
            return scale_C, None
        return float16_range.row_scales(scale_C, others_C, expected)

    def x_exponent(self, expected: float) -> int:
        """Return the exponent that ``LogitsGradient`` has for a rounded tile."""
        return float16_range.x_exponent(expected) if self.dtype == torch.float16 else 0

    def grad_hidden(self, d: LogitsGradient, head: Head, start: int, out_CH: Tensor, accumulate: bool) -> None:
        """See ``RowKernels``."""
        values = d.values
        for left, right, weight_VtH in self._weights(head, start, start + values.shape[1], values):
            _matmul_into(values[:, left:right], weight_VtH, out_CH, accumulate or left > 0)
        self.add_rounding_residual(d, head, out_CH)

    def add_rounding_residual(self, d: LogitsGradient, head: Head, out_CH: Tensor) -> None:
        """Add the rounding residual of each label's value, which is by far the largest of its row."""
        if d.residual is not None:
            own_CH = head.weight.index_select(0, d.labels.clamp(0, head.vocab - 1)).to(self.dtype).to(out_CH.dtype)
            out_CH.addcmul_(own_CH, d.residual[:, None])

    def grad_weight(self, d: LogitsGradient, x_CH: Tensor, out_VtH: Tensor, accumulate: bool) -> None:
        """See ``RowKernels``."""
        _matmul_into(d.values.t(), self.scaled_rows(d, x_CH), out_VtH, accumulate, alpha=2.0**-d.x_exponent)

    @staticmethod
    def scaled_rows(d: LogitsGradient, x_CH: Tensor) -> Tensor:
        """Return rows of X as the product for the head's gradient reads them, times what ``d`` leaves to them."""
        scale_C = d.scale if d.x_scale is None else d.x_scale
        if scale_C is None:
            return x_CH.to(d.values.dtype)
        scale_C = scale_C * 2.0**d.x_exponent if d.x_exponent else scale_C
        return torch.mul(x_CH, scale_C[:, None], out=torch.empty_like(x_CH, dtype=d.values.dtype))

    def grad_bias(self, d: LogitsGradient, start: int, out_Vt: Tensor, accumulate: bool) -> None:
        """See ``RowKernels``."""
        if d.scale is None:
            product = d.values.sum(dim=0, dtype=out_Vt.dtype)
        elif d.values.dtype == d.scale.dtype:
            product = torch.mv(d.values.t(), d.scale)
        else:
            product = torch.empty_like(out_Vt)
            self.grad_weight(d, d.values.new_ones(d.values.shape[0], 1), product[:, None], accumulate=False)
        _put(out_Vt, product, accumulate)
        self.add_residual_to_bias(d, start, out_Vt)

    @staticmethod
    def add_residual_to_bias(d: LogitsGradient, start: int, out_Vt: Tensor) -> None:
        """Add the rounding residuals of the labels' values to the columns from ``start``."""
        if d.residual is not None:
            # The residual is 0 where the label is not among these columns. index_put_ adds in a fixed order.
            column = (d.labels - start).clamp(0, out_Vt.shape[0] - 1)
            scale_C = d.scale if d.x_scale is None else d.x_scale
            residual_C = d.residual if scale_C is None else d.residual * scale_C
            out_Vt.index_put_((column,), residual_C.to(out_Vt.dtype), accumulate=True)

    @staticmethod
    def most_sampled(dtype: torch.dtype) -> float:
        """Return the part of a tile's entries above which its sample is given up, for a dtype of the operands."""
        return MOST_SAMPLED

    @staticmethod
    def sample_bytes(dtype: torch.dtype, rows: int, cols: int, tau: float) -> int:
        """See ``RowKernels``. Sorting by column takes most of them."""
        _, entries = most_entries(rows, cols, TorchKernels.most_sampled(dtype), tau)
        return entries * (ENTRY_INDICES * 8 + ENTRY_VALUES * accumulation_dtype(dtype).itemsize)

    def sample_dlogits(
        self,
        tile: Tensor,
        start: int,
        of_rows: SampledRows,
        head: Head,
        sampling: Sampling,
        exponentiated: bool = False,
        expected: float = 1.0,
    ) -> SparseGradient | None:
        """See ``RowKernels``. On a GPU each block of rows costs a sync."""
        rows, cols = tile.shape
        most, kept = int(self.most_sampled(self.dtype) * rows * cols), 0
        counts: list[Tensor] = []
        columns: list[Tensor] = []
        values: list[Tensor] = []
        for top, bottom in spans(rows, max(1, self.workspace_bytes // (SAMPLING_BYTES * max(1, cols)))):
            z, part = tile[top:bottom], slice(top, bottom)
            e = z if exponentiated else (z - of_rows.max[part, None]).exp_()
            label = (of_rows.labels[part] - start)[:, None] == torch.arange(cols, device=tile.device)
            chosen, value, likely = sample(e, label, of_rows.sumexp[part], of_rows.tokens[part], start, sampling)
            value = torch.where(label, -of_rows.others[part, None], value)
            if head.softcap is not None:
                value = value * (z / head.softcap).square_().neg_().add_(1.0)
            counts.append(chosen.sum(dim=1))
            columns.append(chosen.nonzero()[:, 1])
            values.append(value[chosen])
            kept += int(likely.sum())
            if kept > most:
                return None
        offsets = torch.cat([of_rows.labels.new_zeros(1), torch.cat(counts).cumsum(0)])
        return SparseGradient(offsets, torch.cat(columns), torch.cat(values), of_rows.scale)

    def sparse_grad_hidden(self, d: SparseGradient, head: Head, start: int, out_CH: Tensor, accumulate: bool) -> None:
        """See ``RowKernels``."""
        width = max(1, head.weight.shape[1]) * out_CH.dtype.itemsize
        _, value_K = self._scaled_entries(d)
        most = int(d.offsets.diff().amax().clamp(min=1))
        for top, bottom in spans(out_CH.shape[0], max(1, self.workspace_bytes // (width * most))):
            offsets = d.offsets[top : bottom + 1]
            entries = slice(int(offsets[0]), int(offsets[-1]))
            rows_KH = head.weight.index_select(0, d.columns[entries] + start).to(self.dtype).to(out_CH.dtype)
            rows_KH.mul_(value_K[entries, None])
            _put(out_CH[top:bottom], torch.segment_reduce(rows_KH, "sum", offsets=offsets - offsets[0]), accumulate)

    def sparse_grad_weight(self, d: SparseGradient, x_CH: Tensor, out_VtH: Tensor, accumulate: bool) -> None:
        """See ``RowKernels``. The entries are sorted by column, so that the order of the additions is fixed."""
        if not accumulate:
            out_VtH.zero_()
        order = d.columns.argsort(stable=True)
        by_column, counts = d.columns[order].unique_consecutive(return_counts=True)
        row_K, value_K = self._scaled_entries(d)
        x_CH, offsets = x_CH.to(out_VtH.dtype), torch.cat([counts.new_zeros(1), counts.cumsum(0)])
        width = max(1, x_CH.shape[1]) * x_CH.dtype.itemsize
        most = int(counts.amax()) if counts.shape[0] else 1
        for left, right in spans(by_column.shape[0], max(1, self.workspace_bytes // (width * most))):
            part = offsets[left : right + 1]
            entries = order[int(part[0]) : int(part[-1])]
            rows_KH = x_CH.index_select(0, row_K[entries]).mul_(value_K[entries, None])
            sums = torch.segment_reduce(rows_KH, "sum", offsets=part - part[0])
            out_VtH.index_add_(0, by_column[left:right], sums)  # every row at most once

    def sparse_grad_bias(self, d: SparseGradient, out_Vt: Tensor, accumulate: bool) -> None:
        """See ``RowKernels``."""
        if not accumulate:
            out_Vt.zero_()
        _, value_K = self._scaled_entries(d)
        out_Vt.index_put_((d.columns,), value_K, accumulate=True)  # which adds in a fixed order

    @staticmethod
    def _scaled_entries(d: SparseGradient) -> tuple[Tensor, Tensor]:
        """Return the row of each entry, and its value times the row's factor."""
        counts = d.offsets.diff()
        row_K = torch.arange(counts.shape[0], device=counts.device).repeat_interleave(counts)
        return row_K, d.values * d.scale[row_K]

    def kl_of_rows(self, rows: RowsOfBoth) -> Tensor:
        """See ``RowKernels``."""
        return divergence.kl_of_rows(rows, self._blocks(rows.tile, divergence.BLOCK_TEMPORARIES))

    def dlogits_of_both_(
        self,
        rows: RowsOfBoth,
        labels_C: Tensor,
        head: Head,
        coefficients: Coefficients,
        expected: float = 1.0,
    ) -> LogitsGradient:
        """See ``RowKernels``."""
        blocks = self._blocks(rows.tile, divergence.BLOCK_TEMPORARIES)
        scale_C, largest_C = divergence.mix_(rows, labels_C, head, coefficients, blocks)
        return self._as_operands(rows.tile, labels_C, 0, scale_C, largest_C, expected)

    def _weights(self, head: Head, start: int, stop: int, tile: Tensor) -> Iterator[tuple[int, int, Tensor]]:
        """Yield rows ``start..stop-1`` of the head as GEMM operands, each with its first and last column of the tile.

        On devices other than CUDA, 16-bit rows are upcast in blocks that fit the workspace. So are those of a head that
        comes in tiles, on every device.
        """
        row_values = max(1, head.weight.shape[1])
        if isinstance(head.weight, TiledWeight):
            operand = self.dtype if tile.is_cuda else accumulation_dtype(self.dtype)
            row_bytes = row_values * (self.dtype.itemsize + operand.itemsize)
            for left, right in spans(stop - start, max(1, self.workspace_bytes // row_bytes)):
                yield left, right, head.weight.rows_between(start + left, start + right).to(operand)
            return
        if tile.is_cuda or self.dtype not in SIXTEEN_BIT:
            weight = head.weight if stop - start == head.vocab else head.weight[start:stop]
            yield 0, stop - start, weight.to(self.dtype)
            return
        row_bytes = row_values * accumulation_dtype(self.dtype).itemsize
        for left, right in spans(stop - start, max(1, self.workspace_bytes // row_bytes)):
            weight_VtH = head.weight[start + left : start + right]
            yield left, right, weight_VtH.to(self.dtype).to(accumulation_dtype(self.dtype))

    def _blocks(self, tile: Tensor, temporaries: int = BLOCK_TEMPORARIES) -> Iterator[tuple[slice, slice]]:
        """Yield rows and columns of blocks whose temporaries fit the workspace, and on the CPU also the cache."""
        budget = self.workspace_bytes if tile.is_cuda else min(self.workspace_bytes, CACHED_BYTES)
        elements = max(1, budget // (temporaries * tile.dtype.itemsize))
        width = min(tile.shape[1], elements)
        for top, bottom in spans(tile.shape[0], max(1, elements // width)):
            for left, right in spans(tile.shape[1], width):
                yield slice(top, bottom), slice(left, right)


def _columns(labels_C: Tensor, start: int, tile: Tensor) -> tuple[Tensor, Tensor]:
    """Return a column ``(C, 1)`` of the tile for each label, and whether the label's own is among them, ``(C,)``."""
    column = labels_C - start
    return column.clamp(0, tile.shape[1] - 1)[:, None], (column >= 0) & (column < tile.shape[1])


def _put(out: Tensor, value: Tensor, accumulate: bool) -> None:
    """Add a value to ``out``, or replace it."""
    if accumulate:
        out.add_(value)
    else:
        out.copy_(value)


def _matmul_into(a: Tensor, b: Tensor, out: Tensor, accumulate: bool, alpha: float = 1.0) -> None:
    """Compute ``out (+)= alpha * a @ b`` in the precision of ``out``."""
    kept = {"beta": float(accumulate), "alpha": alpha}
    if a.is_cuda and a.dtype in SIXTEEN_BIT:
        if accumulate or alpha != 1.0:
            torch.addmm(out, a, b, out_dtype=out.dtype, **kept, out=out)
        else:
            torch.mm(a, b, out_dtype=out.dtype, out=out)
        return
    a, b = a.to(out.dtype), b.to(out.dtype)
    if accumulate or alpha != 1.0:
        torch.addmm(out, a, b, **kept, out=out)
    else:
        torch.mm(a, b, out=out)
