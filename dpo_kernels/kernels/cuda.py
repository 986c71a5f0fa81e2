"""The cuda backend: row passes in CUDA (``csrc/cuda``), for GPUs without Triton."""

from torch import Tensor

from dpo_kernels.kernel_interface import RowState
from dpo_kernels.kernels.extension import ExtensionKernels


class CudaKernels(ExtensionKernels):
    """Row passes in CUDA."""

    name = "cuda"

    def reduce(self, state: RowState, tile: Tensor, labels_C: Tensor, start: int, keep_logits: bool = True) -> None:
        """See ``RowKernels``; the logits are kept, and the gradient's kernel exponentiates again."""
        self.reduce_rows(state, tile, labels_C, start, keep_logits=True)
