"""The cpp backend: row passes in C++ (``csrc/cpu``) and, where the CPU has them, bfloat16 GEMMs."""

import torch
from torch import Tensor

from dpo_kernels.kernel_interface import LogitsGradient, RowState, SampledRows, SparseGradient
from dpo_kernels.kernels.extension import ExtensionKernels
from dpo_kernels.kernels.installed import constant_in_graphs
from dpo_kernels.kernels.sampling import most_entries
from dpo_kernels.kernels.torch_kernels import TorchKernels
from dpo_kernels.shapes import Head, Sampling, accumulation_dtype


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
        """The tile and, where this CPU multiplies bfloat16, the copy that the gradient GEMMs read."""
        return 6 if _multiplies(dtype) else accumulation_dtype(dtype).itemsize

    def multiply(self, x_CH: Tensor, head: Head, start: int, tile: Tensor) -> None:
        """``tile = x_CH @ W[start:start+Vt]^T``."""
        if not _multiplies(self.dtype):
            return super().multiply(x_CH, head, start, tile)
        weight_VtH = _operand(head.weight[start : start + tile.shape[1]])
        torch.ops.dpo_kernels.matmul_bfloat16_(x_CH, weight_VtH.t(), tile, False)

    def reduce(self, state: RowState, tile: Tensor, labels_C: Tensor, start: int, keep_logits: bool = True) -> None:
        """See ``RowKernels``."""
        self.reduce_rows(state, tile, labels_C, start, keep_logits)
        state.exponentiated = not keep_logits

    def grad_hidden(self, d: LogitsGradient, head: Head, start: int, out_CH: Tensor, accumulate: bool) -> None:
        """See ``RowKernels``."""
        if d.values.dtype != torch.bfloat16:
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
        torch.ops.dpo_kernels.sparse_transposed_times_hidden_(
            d.offsets, d.columns, d.values, d.scale, x_CH.to(out_VtH.dtype).contiguous(), out_VtH, accumulate
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
