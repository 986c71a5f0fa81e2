"""The Triton backend: row kernels, the sequence loss and the streaming pass; plain GEMMs stay torch's."""

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from dpo_kernels.kernel_interface import LogitsGradient, RowScale, RowState, SampledRows, SparseGradient
from dpo_kernels.kernels.sampling import most_entries
from dpo_kernels.kernels.torch_kernels import SIXTEEN_BIT, TorchKernels, most_sampled_on_gpus
from dpo_kernels.kernels.triton import autotune, launch_hidden, launch_matmul, launch_rows, launch_sparse
from dpo_kernels.kernels.triton.launch_sparse import COLUMN_BYTES, ENTRY_BYTES, DeviceSample
from dpo_kernels.loss_interface import SequenceLoss
from dpo_kernels.shapes import GPU_ROW_ALIGNMENT, Head, Sampling


class TritonKernels(TorchKernels):
    """Row operations by Triton kernels, on CUDA or, with ``TRITON_INTERPRET=1``, step by step on the CPU."""

    name = "triton"
    streams_logps = True
    launch_errors = autotune.CANNOT_RUN

    def __init__(self, dtype: torch.dtype, workspace_bytes: int, narrow: bool = False) -> None:
        super().__init__(dtype, workspace_bytes, narrow)
        self._aligned_weight: Tensor | None = None

    @staticmethod
    def row_alignment(device_type: str) -> int:
        """See ``RowKernels``; the interpreter has the alignment of a GPU, so that it sees what a GPU does."""
        return GPU_ROW_ALIGNMENT

    @staticmethod
    def bytes_per_logit(dtype: torch.dtype, device_type: str) -> int:
        """The float32 tile and, for 16-bit operands, the copy that the gradient GEMMs read."""
        return 4 if dtype == torch.float32 else 6

    def rounds_operands(self, like: Tensor) -> bool:
        """See ``RowKernels``; in the interpreter as on a GPU."""
        return self.dtype in SIXTEEN_BIT

    def scales_before_rounding(
        self, scale_C: Tensor | None, others_C: Tensor, expected: float
    ) -> tuple[Tensor | None, Tensor | None]:
        """See ``TorchKernels``; one kernel instead of ten."""
        if self.dtype != torch.float16 or not others_C.shape[0]:
            return super().scales_before_rounding(scale_C, others_C, expected)
        return launch_rows.float16_scales(scale_C, others_C, expected)

    def project(self, x_CH: Tensor, head: Head, start: int, tile: Tensor) -> None:
        """See ``RowKernels``; bias, scale and cap take one pass over the raw products."""
        self.multiply(x_CH, head, start, tile)
        if head.bias is not None or head.softcap is not None or head.logit_scale != 1.0:
            launch_rows.apply_bias_scale_cap(tile, head, start)

    def reduce(self, state: RowState, tile: Tensor, labels_C: Tensor, start: int, keep_logits: bool = True) -> None:
        """See ``RowKernels``; the logits are kept, and the gradient's kernel exponentiates again."""
        launch_rows.reduce_rows(state, tile, labels_C, start)

    def reduce_to_logps(self, tile: Tensor, labels_C: Tensor, logp_C: Tensor, keep_logits: bool) -> RowState:
        """See ``RowKernels``; one kernel starts the state, reads the logits and ends with the log-probs."""
        state = RowState(torch.empty_like(logp_C), torch.empty_like(logp_C), torch.empty_like(logp_C))
        launch_rows.reduce_rows(state, tile, labels_C, 0, logp_C)
        return state

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
        """See ``RowKernels``; 16-bit operands are scaled, and written beside the tile."""
        assert not exponentiated, "this backend keeps the logits"
        return self._dlogits_if(None, tile, labels_C, start, max_C, others_C, head, scale_C, expected)

    def _dlogits_if(
        self,
        flag: Tensor | None,
        tile: Tensor,
        labels_C: Tensor,
        start: int,
        max_C: Tensor,
        others_C: Tensor,
        head: Head,
        scale_C: Tensor | None,
        expected: float,
    ) -> LogitsGradient:
        """Do ``dlogits_``. Where a flag, 0-d int32, is 0 the values are undefined and the residual is 0."""
        if not self.rounds_operands(tile):
            launch_rows.dlogits_rows(tile, tile, labels_C, start, max_C, others_C, None, None, head.softcap, flag)
            return LogitsGradient(tile, scale_C, labels_C)
        out = self.empty_operands_like(tile)
        residual = torch.empty_like(max_C) if flag is None else torch.zeros_like(max_C)
        applied, left = self.scales_before_rounding(scale_C, others_C, expected)
        launch_rows.dlogits_rows(tile, out, labels_C, start, max_C, others_C, applied, residual, head.softcap, flag)
        return LogitsGradient(out, left, labels_C, residual, self.x_exponent(expected))

    def reduce_and_dlogits(self, state: RowState, tile: Tensor, labels_C: Tensor, head: Head) -> LogitsGradient:
        """See ``RowKernels``; bfloat16 operands without a cap or statistics take one pass instead of two.

        A trainable head cannot use it: its coefficients are known later, and would round X a second time.
        """
        stats = (state.entropy, state.logit_sum, state.argmax, state.square_sum)
        if self.dtype != torch.bfloat16 or head.softcap is not None or any(s is not None for s in stats):
            return super().reduce_and_dlogits(state, tile, labels_C, head)
        out = self.empty_operands_like(tile)
        factor, residual = launch_rows.softmax_grad_rows(state, tile, out, labels_C)
        return LogitsGradient(out, factor, labels_C, residual)

    def sequence_loss(
        self,
        logp_N: Tensor,
        weights_N: Tensor | None,
        counts_S: Tensor,
        ref_S: Tensor,
        nan_if_invalid: Tensor,
        loss: SequenceLoss,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """See ``RowKernels``; the sigmoid family takes one kernel, other losses take autograd."""
        if loss.sigmoid is None or counts_S.shape[0] == 0:
            return super().sequence_loss(logp_N, weights_N, counts_S, ref_S, nan_if_invalid, loss)
        return launch_rows.sigmoid_sequence_loss(logp_N, weights_N, counts_S, ref_S, nan_if_invalid, loss.sigmoid)

    def sequence_loss_and_scale(
        self,
        logp_C: Tensor,
        weights_C: Tensor | None,
        counts_S: Tensor,
        ref_S: Tensor,
        nan_if_invalid: Tensor,
        loss: SequenceLoss,
        scale: RowScale,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """See ``RowKernels``; the sigmoid family takes one kernel, other losses take autograd and torch."""
        if loss.sigmoid is None or scale.divisor is None or counts_S.shape[0] == 0:
            return super().sequence_loss_and_scale(logp_C, weights_C, counts_S, ref_S, nan_if_invalid, loss, scale)
        return launch_rows.sigmoid_sequence_loss(
            logp_C, weights_C, counts_S, ref_S, nan_if_invalid, loss.sigmoid, scale
        )

    def add_rounding_residual(self, d: LogitsGradient, head: Head, out_CH: Tensor) -> None:
        """See ``TorchKernels``; one kernel reads the labels' rows of the head and adds to the gradient."""
        if d.residual is not None and out_CH.shape[0]:
            launch_hidden.add_label_rows(out_CH, head.weight, d.labels, d.residual)

    def stream_logps(self, x_CH: Tensor, head: Head, labels_C: Tensor, stats: Sequence[str]) -> RowState:
        """See ``RowKernels``; the logits stay in registers."""
        return launch_matmul.linear_logps(launch_matmul.aligned_rows(x_CH), self._weight(head), head, labels_C, stats)

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
        """See ``RowKernels``; one kernel goes from hidden states to the operand, with no float32 logits between."""
        operands = (launch_matmul.aligned_rows(x_CH), self._weight(head), head, start)
        if not self.rounds_operands(tile):
            launch_matmul.linear_dlogits(*operands, tile, labels_C, max_C, others_C, None, None)
            return LogitsGradient(tile, scale_C, labels_C)
        out, residual = self._first_half(tile), torch.zeros_like(max_C)
        applied, left = self.scales_before_rounding(scale_C, others_C, expected)
        launch_matmul.linear_dlogits(*operands, out, labels_C, max_C, others_C, applied, residual)
        return LogitsGradient(out, left, labels_C, residual, self.x_exponent(expected))

    @staticmethod
    def most_sampled(dtype: torch.dtype) -> float:
        """See ``TorchKernels``; matrix instructions multiply whole tiles faster."""
        return most_sampled_on_gpus(dtype)

    @staticmethod
    def sample_bytes(dtype: torch.dtype, rows: int, cols: int, tau: float) -> int:
        """See ``RowKernels``; the memory for entries has a fixed size, and is sorted whole."""
        _, entries = most_entries(rows, cols, TritonKernels.most_sampled(dtype), tau)
        return entries * ENTRY_BYTES + (cols + 1) * COLUMN_BYTES

    def sample_dlogits(
        self,
        tile: Tensor,
        start: int,
        of_rows: SampledRows,
        head: Head,
        sampling: Sampling,
        exponentiated: bool = False,
        expected: float = 1.0,
    ) -> DeviceSample:
        """See ``RowKernels``; the device decides whether the sample is taken, so the exact gradient comes with it."""
        assert not exponentiated, "this backend keeps the logits"
        d = launch_sparse.sample_rows(tile, start, of_rows, head.softcap, sampling, self.most_sampled(self.dtype))
        of_rows_exactly = (of_rows.labels, start, of_rows.max, of_rows.others, head, of_rows.scale)
        return replace(d, exact=self._dlogits_if(d.too_many, tile, *of_rows_exactly, expected))

    def sparse_grad_hidden(self, d: SparseGradient, head: Head, start: int, out_CH: Tensor, accumulate: bool) -> None:
        """See ``RowKernels``; one of two sums is taken, as the device decides."""
        sample, exact = _parts(d)
        if not out_CH.numel():
            return
        launch_sparse.add_kept_rows(sample, head.weight, start, out_CH, by_column=False, accumulate=accumulate)
        weight_VtH, values = self._weight(head)[start : start + sample.cols], exact.values
        how: dict[str, Any] = {"transposed": False, "accumulate": accumulate}
        launch_sparse.product_if(sample.too_many, values, weight_VtH, exact.scale, out_CH, **how)
        if exact.residual is not None:
            lost = exact.residual if exact.scale is None else exact.residual * exact.scale
            launch_hidden.add_label_rows(out_CH, head.weight, exact.labels, lost, sample.too_many)

    def sparse_grad_weight(self, d: SparseGradient, x_CH: Tensor, out_VtH: Tensor, accumulate: bool) -> None:
        """See ``RowKernels``; entries are sorted by column, so that the order of the additions is fixed."""
        sample, exact = _parts(d)
        if out_VtH.numel():
            launch_sparse.add_kept_rows(sample, x_CH, 0, out_VtH, by_column=True, accumulate=accumulate)
            x_CH = launch_matmul.aligned_rows(self.scaled_rows(exact, x_CH))
            how: dict[str, Any] = {"transposed": True, "accumulate": accumulate, "alpha": 2.0**-exact.x_exponent}
            launch_sparse.product_if(sample.too_many, exact.values, x_CH, None, out_VtH, **how)
            # torch does not count what a kernel writes, and out_VtH may be the caller's main_grad.
            torch.autograd.graph.increment_version(out_VtH)

    def sparse_grad_bias(self, d: SparseGradient, out_Vt: Tensor, accumulate: bool) -> None:
        """See ``RowKernels``; it is the gradient of a weight whose hidden states are 1."""
        sample, exact = _parts(d)
        ones = exact.values.new_ones(d.scale.shape[0], 1)
        self.sparse_grad_weight(d, ones, out_Vt[:, None], accumulate)
        self.add_residual_to_bias(exact, sample.start, out_Vt)

    @staticmethod
    def to_input_rows(dx: Tensor, slot: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor | None:
        """See ``RowKernels``; one kernel gathers, multiplies and rounds."""
        return launch_hidden.to_input_rows(dx, slot, factor, dtype)

    @staticmethod
    def finalize_weight_grad(grad: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor | None:
        """See ``RowKernels``; one kernel multiplies and rounds."""
        if dtype not in SIXTEEN_BIT or grad.dtype != torch.float32 or not grad.is_contiguous():
            return TorchKernels.finalize_weight_grad(grad, factor, dtype)
        return launch_hidden.scale_and_round(grad, factor, dtype)

    def launches(
        self, operation: str, x_CH: Tensor, stats: bool
    ) -> Sequence[tuple[str, AbstractContextManager[object]]]:
        """See ``RowKernels``; the matmul kernels have families of launches."""
        kernel = {"recomputed_dlogits": "linear_dlogits", "stream_logps": "linear_logps"}[operation]
        family = launch_matmul.launch_family(kernel, x_CH, stats)
        return [(f"{kernel} {launch}", launch_matmul.pinned(launch)) for launch in family]

    @classmethod
    def chosen_launches(cls) -> Any:
        """See ``RowKernels``; the launches of the matmul kernels."""
        return autotune.choices()

    @classmethod
    def take_launches(cls, chosen: Any) -> None:
        """See ``RowKernels``."""
        autotune.take(chosen)

    @classmethod
    def cannot_take(cls, error: Exception) -> bool:
        """See ``RowKernels``."""
        return autotune.cannot_run(error)

    def _weight(self, head: Head) -> Tensor:
        """The head as the matmul kernels read it; rows that are not aligned are copied once a call."""
        if self._aligned_weight is None:
            self._aligned_weight = launch_matmul.aligned_rows(head.weight)
        return self._aligned_weight

    def _first_half(self, tile: Tensor) -> Tensor:
        """A tile of 16-bit operands of the same shape in the first half of a float32 tile's memory."""
        rows, pitch = tile.shape[0], tile.stride(0)
        memory = tile.as_strided((rows * pitch,), (1,)).view(self.dtype)
        return memory[: rows * pitch].view(rows, pitch)[:, : tile.shape[1]]


def _parts(d: SparseGradient) -> tuple[DeviceSample, LogitsGradient]:
    """The sample and the exact gradient of ``TritonKernels.sample_dlogits``."""
    assert isinstance(d, DeviceSample), "the sample of another backend"
    assert d.exact is not None, "sample_dlogits has set it"
    return d, d.exact
