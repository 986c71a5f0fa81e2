"""The strategies and the backends, best first. A new one is a file of its own and a record here."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from dpo_kernels.kernel_interface import RowKernels, RowResult
from dpo_kernels.kernels.cpp import CppKernels
from dpo_kernels.kernels.cuda import CudaKernels
from dpo_kernels.kernels.torch_kernels import TorchKernels
from dpo_kernels.planning import refusals
from dpo_kernels.planning.memory_budget import Budget
from dpo_kernels.planning.schedules import schedule_examples, schedule_logps, schedule_streaming, streams_faster
from dpo_kernels.problem import Problem, Workload
from dpo_kernels.shapes import Schedule
from dpo_kernels.strategies import chunked, frozen_head, recompute, streaming
from dpo_kernels.strategies.buffers import LossAndGradients

Gradients = tuple[Tensor | None, Tensor | None, Tensor | None]


@dataclass(frozen=True)
class Strategy:
    """An algorithm: when it can run, what it costs, and its functions.

    Either it forms the gradients with the loss (``loss_and_gradients``), or log-probs first and gradients in the
    backward pass (``logps``, ``gradients``).
    """

    refuse: Callable[[Workload, Budget, int], str | None]
    gemms: Callable[[Workload], int]  # GEMM passes of 2 N H V FLOP, forward and backward
    schedule: Callable[[Workload, Budget], Schedule]
    loss_and_gradients: Callable[[RowKernels, Problem, Schedule, Tensor, Tensor], LossAndGradients] | None = None
    logps: Callable[[RowKernels, Problem, Schedule], tuple[RowResult, Tensor | None]] | None = None
    gradients: Callable[[RowKernels, Problem, Schedule, RowResult, Tensor], Gradients] | None = None
    with_frozen_head: str | None = None  # the strategy that takes its place where the head is frozen
    preferred: Callable[[Workload, str], bool] = lambda workload, backend: False  # before the order of the table


def _forward_and_backward(recomputed: int) -> Callable[[Workload], int]:
    """One GEMM pass forward; ``recomputed`` and those of the gradients backward, if there are any."""
    return lambda workload: 1 + (recomputed + workload.backward_gemms if any(workload.needs_grad) else 0)


def _streams_faster(workload: Workload, backend: str) -> bool:
    return BACKENDS[backend].load().streams_logps and streams_faster(workload)


STRATEGIES = {
    "chunked": Strategy(
        refusals.refuse_chunked,
        _forward_and_backward(0),
        schedule_examples,
        loss_and_gradients=chunked.loss_and_gradients,
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
    """Why a backend cannot run a workload (None: it can), and where its class of kernels is loaded from."""

    refuse: Callable[[Workload, bool], str | None]  # the workload, and whether the backend was asked for by name
    load: Callable[[], type[RowKernels]]

    def make(self, dtype: torch.dtype, workspace_bytes: int) -> RowKernels:
        """The kernels for one call."""
        return self.load()(dtype, workspace_bytes)


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


def divide_scratch(scratch_bytes: int, backend: str, dtype: torch.dtype, device: torch.device) -> Budget:
    """Divide a scratch for a backend: a quarter, up to a limit, for temporaries, the rest for the tile."""
    kernels = BACKENDS[backend].load()
    per_logit, alignment = kernels.bytes_per_logit(dtype, device.type), kernels.row_alignment(device.type)
    return Budget.of(scratch_bytes, device.type, per_logit, alignment, kernels.can_alias_weight_grad)
