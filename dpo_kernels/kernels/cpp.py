"""The cpp backend: row passes in C++ (``csrc/cpu``) and, where the CPU has them, bfloat16 GEMMs."""

import torch
from torch import Tensor

from dpo_kernels.kernel_interface import LogitsGradient, RowState, SampledRows, SparseGradient
from dpo_kernels.kernels.extension import ExtensionKernels
from dpo_kernels.kernels.installed import constant_in_graphs
from dpo_kernels.kernels.sampling import most_entries
from dpo_kernels.kernels.torch_kernels import TorchKernels
from dpo_kernels.shapes import Head, Sampling, accumulation_dtype
from dpo_kernels.tiled_weight import TiledWeight

CODED_COLS = 256  # columns of a block of codes, as csrc/cpu/rows.h has it


class CppKernels(ExtensionKernels):
    """Row passes in vectorised C++ on the CPU, threaded over rows."""

    name = "cpp"
    can_alias_weight_grad = True  # because new memory is slow, and there may be little of it

    def rounds_operands(self, like: Tensor) -> bool:
        """See ``RowKernels``; only where this CPU multiplies the operands' dtype."""
        return _multiplies(self.dtype)

    def buffer(self, device: torch.device, *shape: int) -> Tensor:
        """See ``RowKernels``; memory that an earlier step freed is used again, see ``extension.empty_cache``."""
        like = torch.empty(0, dtype=accumulation_dtype(self.dtype), device=device)
        try:
            memory: Tensor = torch.ops.dpo_kernels.new_huge(like, shape)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError:  # there is not so much; torch's own error is the one that callers know
            return like.new_empty(shape)
        return memory

    @staticmethod
    def finalize_weight_grad(grad: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor | None:
        """See ``RowKernels``; a bfloat16 result takes the first half of the memory."""
        if (grad.dtype, dtype) != (torch.float32, torch.bfloat16) or not grad.is_contiguous():
            return TorchKernels.finalize_weight_grad(grad, factor, dtype)
        torch.ops.dpo_kernels.round_to_bfloat16_(grad, float(factor))
        return grad.view(dtype).view(-1)[: grad.numel()].view(grad.shape)

    @staticmethod
    def bytes_per_logit(dtype: torch.dtype, device_type: str) -> int:
        """See ``RowKernels``; where this CPU multiplies bfloat16 there is the copy that the gradient GEMMs read."""
        return 6 if _multiplies(dtype) else accumulation_dtype(dtype).itemsize

    @staticmethod
    def can_code_logits(dtype: torch.dtype) -> bool:
        """See ``RowKernels``; where this CPU multiplies bfloat16."""
        return _multiplies(dtype)

    def scratch(self, device: torch.device, logits: int) -> Tensor:
        """See ``RowKernels``; with codes it has half as many elements."""
        return super().scratch(device, (logits + 1) // 2 if self.codes_logits else logits)

    def tile_in(self, scratch: Tensor, rows: int, cols: int) -> Tensor:
        """See ``RowKernels``."""
        return super().tile_in(scratch.view(torch.int16) if self.codes_logits else scratch, rows, cols)

    def project_and_reduce(
        self,
        state: RowState,
        x_CH: Tensor,
        head: Head,
        start: int,
        tile: Tensor,
        labels_C: Tensor,
        *,
        keep_logits: bool = True,
        gradient_follows: bool = True,
    ) -> None:
        """See ``RowKernels``; logits are coded, or forgotten, while they are in the cache."""
        if not self.codes_logits:
            super().project_and_reduce(state, x_CH, head, start, tile, labels_C, keep_logits=keep_logits)
            return
        rows, cols = tile.shape
        state.block_max = state.max.new_empty(-(-cols // CODED_COLS), rows) if gradient_follows else None
        torch.ops.dpo_kernels.linear_reduce_(
            *self._linear(x_CH, head, start, cols),
            labels_C,
            start,
            tile if gradient_follows else None,
            state.block_max,
            state.max,
            state.others,
            state.target,
            state.entropy,
            state.logit_sum,
            state.argmax,
            state.square_sum,
        )

    def dlogits_of_state(
        self,
        tile: Tensor,
        labels_C: Tensor,
        start: int,
        state: RowState,
        head: Head,
        scale_C: Tensor | None,
        expected: float = 1.0,
    ) -> LogitsGradient:
        """See ``RowKernels``; the gradient takes the place of codes."""
        if not self.codes_logits:
            return super().dlogits_of_state(tile, labels_C, start, state, head, scale_C, expected)
        sums = (state.max, state.others, state.target)
        return self._dlogits_of_codes(tile, state.block_max, tile, labels_C, start, *sums, head, scale_C)

    def dlogits_elsewhere(
        self,
        kept: Tensor,
        then: RowState,
        tile: Tensor,
        labels_C: Tensor,
        start: int,
        state: RowState,
        head: Head,
        scale_C: Tensor | None,
    ) -> LogitsGradient:
        """See ``RowKernels``; one pass from codes to the gradient."""
        if not self.codes_logits:
            return super().dlogits_elsewhere(kept, then, tile, labels_C, start, state, head, scale_C)
        sums = (state.max, state.others, state.target)
        return self._dlogits_of_codes(kept, then.block_max, tile, labels_C, start, *sums, head, scale_C)

    def _dlogits_of_codes(
        self,
        codes: Tensor,
        block_max: Tensor | None,
        out: Tensor,
        labels_C: Tensor,
        start: int,
        max_C: Tensor,
        others_C: Tensor,
        target_C: Tensor,
        head: Head,
        scale_C: Tensor | None,
    ) -> LogitsGradient:
        """Turn codes into the gradient in the memory of a tile, which may be their own."""
        values, residual = out.view(torch.bfloat16), torch.zeros_like(max_C)
        sums = (max_C, others_C, target_C)
        torch.ops.dpo_kernels.dlogits_of_codes_(
            codes, block_max, values, labels_C, start, *sums, scale_C, residual, head.softcap
        )
        return LogitsGradient(values, None, labels_C, residual)

    def project_and_dlogits(
        self, state: RowState, x_CH: Tensor, head: Head, tile: Tensor, labels_C: Tensor
    ) -> LogitsGradient:
        """See ``RowKernels``."""
        if not self.codes_logits:
            return super().project_and_dlogits(state, x_CH, head, tile, labels_C)
        self.project_and_reduce(state, x_CH, head, 0, tile, labels_C)
        return self.dlogits_of_state(tile, labels_C, 0, state, head, None)

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
        expected: float = 1.0,
    ) -> LogitsGradient:
        """See ``RowKernels``; from hidden states to the operand, with no float32 logits between."""
        sums = (max_C, others_C, scale_C)
        if not self.codes_logits:
            return super().recomputed_dlogits(x_CH, head, start, tile, labels_C, *sums, expected)
        values, residual = tile.view(torch.bfloat16), torch.zeros_like(max_C)
        operands = self._linear(x_CH, head, start, tile.shape[1])
        torch.ops.dpo_kernels.linear_dlogits_(*operands, values, labels_C, start, *sums, residual)
        return LogitsGradient(values, None, labels_C, residual)

    def _linear(
        self, x_CH: Tensor, head: Head, start: int, cols: int
    ) -> tuple[Tensor, Tensor, Tensor | None, float, float | None]:
        """Return the arguments that stand for logits in the operators: operands, bias, scale and softcap."""
        bias = None if head.bias is None else head.bias[start : start + cols]
        bias = None if bias is None else bias.to(self.dtype).float().contiguous()
        return x_CH, _operand(head.weight[start : start + cols]), bias, head.logit_scale, head.softcap

    def multiply(self, x_CH: Tensor, head: Head, start: int, tile: Tensor) -> None:
        """``tile = x_CH @ W[start:start+Vt]^T``."""
        if not _multiplies(self.dtype) or isinstance(head.weight, TiledWeight):
            return super().multiply(x_CH, head, start, tile)
        weight_VtH = _operand(head.weight[start : start + tile.shape[1]])
        torch.ops.dpo_kernels.matmul_bfloat16_(x_CH, weight_VtH.t(), tile, False)

    def reduce(self, state: RowState, tile: Tensor, labels_C: Tensor, start: int, keep_logits: bool = True) -> None:
        """See ``RowKernels``."""
        self.reduce_rows(state, tile, labels_C, start, keep_logits)
        state.exponentiated = not keep_logits

    def grad_hidden(self, d: LogitsGradient, head: Head, start: int, out_CH: Tensor, accumulate: bool) -> None:
        """See ``RowKernels``."""
        if d.values.dtype != torch.bfloat16 or isinstance(head.weight, TiledWeight):
            return super().grad_hidden(d, head, start, out_CH, accumulate)
        weight_VtH = _operand(head.weight[start : start + d.values.shape[1]])
        torch.ops.dpo_kernels.matmul_bfloat16_(d.values, weight_VtH, out_CH, accumulate)
        self.add_rounding_residual(d, head, out_CH)

    def grad_weight(self, d: LogitsGradient, x_CH: Tensor, out_VtH: Tensor, accumulate: bool) -> None:
        """See ``RowKernels``."""
        if d.values.dtype != torch.bfloat16:
            return super().grad_weight(d, x_CH, out_VtH, accumulate)
        torch.ops.dpo_kernels.matmul_bfloat16_(d.values.t(), x_CH, out_VtH, accumulate)
        # torch does not count what our operators write, and out_VtH may be the caller's main_grad.
        torch.autograd.graph.increment_version(out_VtH)

    @staticmethod
    def sample_bytes(dtype: torch.dtype, rows: int, cols: int, tau: float) -> int:
        """See ``RowKernels``; threads collect entries in memory that may be twice too large, which is then copied."""
        _, entries = most_entries(rows, cols, CppKernels.most_sampled(dtype), tau)
        return 3 * entries * (4 + accumulation_dtype(dtype).itemsize)

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
        """See ``RowKernels``; one pass over the tile."""
        offsets, columns, values = torch.ops.dpo_kernels.sample_rows(
            tile,
            of_rows.labels,
            start,
            of_rows.max,
            of_rows.others,
            of_rows.sumexp,
            of_rows.tokens,
            int(sampling.seed),
            sampling.tau,
            head.softcap,
            exponentiated,
            int(self.most_sampled(self.dtype) * tile.numel()),
        )
        return SparseGradient(offsets, columns, values, of_rows.scale) if offsets.shape[0] else None

    def sampled_dlogits_of_state(
        self,
        tile: Tensor,
        start: int,
        state: RowState,
        of_rows: SampledRows,
        head: Head,
        sampling: Sampling,
        expected: float = 1.0,
    ) -> LogitsGradient | SparseGradient:
        """See ``RowKernels``."""
        if not self.codes_logits:
            return super().sampled_dlogits_of_state(tile, start, state, of_rows, head, sampling, expected)
        return self._sample_or_all_of_codes(tile, state.block_max, start, state.target, of_rows, head, sampling)

    def recomputed_sampled_dlogits(
        self,
        x_CH: Tensor,
        head: Head,
        start: int,
        tile: Tensor,
        of_rows: SampledRows,
        sampling: Sampling,
        expected: float = 1.0,
    ) -> LogitsGradient | SparseGradient:
        """See ``RowKernels``."""
        if not self.codes_logits:
            return super().recomputed_sampled_dlogits(x_CH, head, start, tile, of_rows, sampling, expected)
        rows, cols = tile.shape
        block_max, target = of_rows.max.new_empty(-(-cols // CODED_COLS), rows), torch.zeros_like(of_rows.max)
        operands = self._linear(x_CH, head, start, cols)
        torch.ops.dpo_kernels.linear_codes_(*operands, of_rows.labels, start, tile, block_max, target)
        return self._sample_or_all_of_codes(tile, block_max, start, target, of_rows, head, sampling)

    def _sample_or_all_of_codes(
        self,
        codes: Tensor,
        block_max: Tensor | None,
        start: int,
        target: Tensor,
        of_rows: SampledRows,
        head: Head,
        sampling: Sampling,
    ) -> LogitsGradient | SparseGradient:
        """Sample from codes, or turn them into the exact gradient in their place."""
        offsets, columns, values = torch.ops.dpo_kernels.sample_codes(
            codes,
            block_max,
            of_rows.labels,
            start,
            of_rows.max,
            of_rows.others,
            target,
            of_rows.sumexp,
            of_rows.tokens,
            int(sampling.seed),
            sampling.tau,
            head.softcap,
            int(self.most_sampled(self.dtype) * codes.numel()),
        )
        if offsets.shape[0]:
            return SparseGradient(offsets, columns, values, of_rows.scale)
        sums = (of_rows.max, of_rows.others, target)
        return self._dlogits_of_codes(codes, block_max, codes, of_rows.labels, start, *sums, head, of_rows.scale)

    def sparse_grad_hidden(self, d: SparseGradient, head: Head, start: int, out_CH: Tensor, accumulate: bool) -> None:
        """See ``RowKernels``."""
        weight_VtH = head.weight[start:]
        overlaps = weight_VtH.stride(0) < weight_VtH.shape[1] or weight_VtH.stride(1) != 1
        if weight_VtH.dtype not in (out_CH.dtype, torch.bfloat16) or overlaps:
            return super().sparse_grad_hidden(d, head, start, out_CH, accumulate)
        torch.ops.dpo_kernels.sparse_times_head_(
            d.offsets, d.columns, d.values, d.scale, weight_VtH, out_CH, accumulate
        )

    def sparse_grad_weight(self, d: SparseGradient, x_CH: Tensor, out_VtH: Tensor, accumulate: bool) -> None:
        """See ``RowKernels``."""
        x_CH = x_CH if x_CH.dtype == torch.bfloat16 else x_CH.to(out_VtH.dtype)
        torch.ops.dpo_kernels.sparse_transposed_times_hidden_(
            d.offsets, d.columns, d.values, d.scale, x_CH.contiguous(), out_VtH, accumulate
        )
        torch.autograd.graph.increment_version(out_VtH)


@constant_in_graphs
def _multiplies(dtype: torch.dtype) -> bool:
    """Whether this CPU multiplies matrices of ``dtype``, which then need no upcast."""
    return dtype == torch.bfloat16 and bool(torch.ops.dpo_kernels.has_bfloat16_matmul())


def _operand(weight_VtH: Tensor) -> Tensor:
    """The weight in bfloat16, contiguous along rows or columns."""
    weight_VtH = weight_VtH.to(torch.bfloat16)
    return weight_VtH if 1 in weight_VtH.stride() else weight_VtH.contiguous()
