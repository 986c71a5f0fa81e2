"""The tables of strategies and backends, best first. A new one takes a file and a record here."""

from collections.abc import Callable
from dataclasses import field

import torch
from torch import Tensor

from dpo_kernels.kernel_interface import (
    BothKernels,
    Coefficients,
    RowKernels,
    RowResult,
    RowsAndDivergences,
    SumsOfBoth,
)
from dpo_kernels.kernels.cpp import CppKernels
from dpo_kernels.kernels.cuda import CudaKernels
from dpo_kernels.kernels.torch_kernels import TorchKernels
from dpo_kernels.planning import refusals
from dpo_kernels.planning.memory_budget import Budget
from dpo_kernels.planning.schedules import schedule_examples, schedule_logps, schedule_streaming, streams_faster
from dpo_kernels.problem import Problem, Workload
from dpo_kernels.records import dataclass
from dpo_kernels.shapes import Schedule, accumulation_dtype
from dpo_kernels.strategies import both_heads, chunked, frozen_head, recompute, streaming
from dpo_kernels.strategies.both_heads import LossOfBoth
from dpo_kernels.strategies.buffers import LossAndGradients
from dpo_kernels.strategies.recompute import Gradients


@dataclass(frozen=True)
class BothHeads:
    """The functions of a strategy that reads the logits of the policy and of the reference side by side."""

    loss_and_gradients: Callable[[BothKernels, Problem, Schedule, Tensor], LossOfBoth] | None = None
    logps: Callable[[BothKernels, Problem, Schedule], RowsAndDivergences] | None = None
    gradients: Callable[[BothKernels, Problem, Schedule, SumsOfBoth, Coefficients], Gradients] | None = None


@dataclass(frozen=True)
class Strategy:
    """When an algorithm can run, what it costs, and its functions.

    It either forms the gradients with the loss (``loss_and_gradients``), or computes log-probs first (``logps``). In
    the second case ``gradients`` forms the gradients in the backward pass. Without ``gradients`` the forward pass saves
    a derivative.
    """

    refuse: Callable[[Workload, Budget, int], str | None]  # takes the workload, the budget and the scratch's bytes
    gemms: Callable[[Workload], int]  # GEMM passes of 2 N H V FLOP, forward and backward
    schedule: Callable[[Workload, Budget], Schedule]
    loss_and_gradients: Callable[[RowKernels, Problem, Schedule, Tensor, Tensor], LossAndGradients] | None = None
    logps: Callable[[RowKernels, Problem, Schedule], tuple[RowResult, Tensor | None]] | None = None
    gradients: Callable[[RowKernels, Problem, Schedule, RowResult, Tensor], Gradients] | None = None
    both: BothHeads = field(default_factory=BothHeads)  # its functions where a KL divergence is wanted
    with_frozen_head: str | None = None  # the strategy that replaces it where the head is frozen
    # This says whether the strategy goes before all others for a workload and the name of a backend.
    preferred: Callable[[Workload, str], bool] = lambda workload, backend: False


def _forward_and_backward(recomputed: int) -> Callable[[Workload], int]:
    """Return a function that counts the GEMM passes of a strategy.

    One pass is forward. If a gradient is wanted, ``recomputed`` passes compute logits again, and each gradient takes
    one, except for gradients of a sample.
    """

    def gemms(workload: Workload) -> int:
        if not any(workload.needs_grad):
            return 1
        return 1 + recomputed + (0 if workload.samples else workload.backward_gemms)

    return gemms


def _streams_faster(workload: Workload, backend: str) -> bool:
    return BACKENDS[backend].load().streams_logps and streams_faster(workload)


STRATEGIES = {
    "chunked": Strategy(
        refusals.refuse_chunked,
        _forward_and_backward(0),
        schedule_examples,
        loss_and_gradients=chunked.loss_and_gradients,
        both=BothHeads(loss_and_gradients=both_heads.loss_and_gradients),
        with_frozen_head="frozen_head",
    ),
    "frozen_head": Strategy(
        refusals.refuse_frozen_head, _forward_and_backward(0), schedule_logps, logps=frozen_head.logps
    ),
    "recompute": Strategy(
        refusals.refuse_recompute,
        _forward_and_backward(1),
        schedule_logps,
        logps=recompute.logps,
        gradients=recompute.gradients,
        both=BothHeads(logps=both_heads.logps, gradients=both_heads.gradients),
        with_frozen_head="frozen_head",
    ),
    "streaming": Strategy(
        refusals.refuse_streaming,
        _forward_and_backward(1),
        schedule_streaming,
        logps=streaming.logps,
        gradients=streaming.gradients,
        preferred=_streams_faster,
    ),
}


@dataclass(frozen=True)
class Backend:
    """When a backend can run, and how its class of kernels is loaded."""

    refuse: Callable[[Workload, bool], str | None]  # its flag says whether the backend was asked for by name
    load: Callable[[], type[RowKernels]]

    def make(self, dtype: torch.dtype, workspace_bytes: int, narrow: bool) -> RowKernels:
        """Return the kernels for one call.

        ``dtype`` is that of the GEMM operands. With ``narrow`` tiles may hold logits in 16 bits.
        """
        return self.load()(dtype, workspace_bytes, narrow)


def _load_triton() -> type[RowKernels]:
    from dpo_kernels.kernels.triton.backend import TritonKernels

    return TritonKernels


BACKENDS: dict[str, Backend] = {
    "triton": Backend(refusals.refuse_triton, _load_triton),
    "cuda": Backend(refusals.refuse_extension("cuda"), lambda: CudaKernels),
    "cpp": Backend(refusals.refuse_extension("cpu"), lambda: CppKernels),
    "torch": Backend(refusals.refuse_torch, lambda: TorchKernels),
}
BACKEND_NAMES = tuple(BACKENDS)


CODE_BYTES = 2  # of a logit where a backend ``codes_logits``


def divide_scratch(
    scratch_bytes: int,
    backend: str,
    dtype: torch.dtype,
    device: torch.device,
    *,
    narrow: bool = False,
    kl: bool = False,
) -> Budget:
    """Return how a scratch is divided for a backend, see ``Budget.of``.

    ``dtype`` is that of the GEMM operands. With ``narrow`` logits may be kept in 16 bits. With ``kl`` the logits of the
    reference lie beside those of the policy.
    """
    kernels = BACKENDS[backend].load()
    codes = narrow and kernels.can_code_logits(dtype)
    per_logit = CODE_BYTES if codes else kernels.bytes_per_logit(dtype, device.type)
    if kl:
        per_logit += accumulation_dtype(dtype).itemsize  # no GEMM reads the reference's logits again
    aliased = kernels.can_alias_weight_grad * (accumulation_dtype(dtype).itemsize // CODE_BYTES if codes else 1)
    return Budget.of(scratch_bytes, device.type, per_logit, kernels.row_alignment(device.type), aliased, codes)
