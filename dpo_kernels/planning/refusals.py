"""Why a strategy or a backend cannot run a workload, in words; None where it can."""

import os
from collections.abc import Callable

import torch

from dpo_kernels.kernels import extension, installed
from dpo_kernels.planning.chunks import oversized_buffers
from dpo_kernels.planning.memory_budget import LEAST_TILE_BYTES, MIB, Budget
from dpo_kernels.planning.schedules import extra_bytes, schedule_examples, tile_with_gradients
from dpo_kernels.problem import Workload


def refuse_chunked(workload: Workload, budget: Budget, scratch_bytes: int) -> str | None:
    """It needs a loss that is separable by example, and room for one row of logits."""
    if workload.loss is not None and not workload.loss.separable:
        return "the loss is coupled over the batch: a chunk of pairs does not determine its coefficients"
    fits = budget.whole_rows(workload.vocab)
    aliased = tile_with_gradients(workload, budget).cols < workload.vocab
    if fits < 1 and not aliased:
        least = budget.minimum_scratch(workload.vocab, workload.device.type)
        return f"scratch_bytes={scratch_bytes} is less than the {least} bytes that one row of logits needs"
    if not workload.needs_grad.head:
        return None  # frozen_head takes its place
    if workload.loss is None:
        return "log-probs have upstreams that are known only in the backward pass, and the head wants a gradient"
    if not workload.scalar:
        return "reduction='none' has upstreams that are known only in the backward pass, and the head wants a gradient"
    if workload.loss.is_callable and workload.tracing:
        return "inside torch.compile a loss without a name is traced into the graph, not run by the fused operator"
    if aliased:
        return None
    if workload.static and workload.num_tokens > fits:
        return (
            f"max_scored_tokens={workload.num_tokens} does not fit one chunk of {fits} rows, and where pairs end is "
            "not known on the host"
        )
    if workload.tracing:
        return None  # the lengths are not to be looked at
    schedule = schedule_examples(workload, budget)
    if oversized_buffers(schedule.chunks, workload.loss) > 2:
        return "a group of more than two sequences is longer than the chunk: each would need an accumulator of its own"
    if workload.device.type != "cuda" or workload.static:
        return None
    extra = extra_bytes(workload, schedule)
    if extra and extra > _free_bytes(workload.device):
        return f"a pair longer than the chunk needs {extra / MIB:.4g} MiB of accumulators, more than is free"
    return None


def _free_bytes(device: torch.device) -> int:
    """What a CUDA device could still give: the driver, and what torch's allocator keeps for reuse."""
    kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return torch.cuda.mem_get_info(device)[0] + kept


def refuse_frozen_head(workload: Workload, budget: Budget, scratch_bytes: int) -> str | None:
    """It needs a head that wants no gradient."""
    if workload.needs_grad.head:
        return "the head wants a gradient"
    return _refuse_small_tile(workload, budget, scratch_bytes)


def refuse_recompute(workload: Workload, budget: Budget, scratch_bytes: int) -> str | None:
    """It needs a tile."""
    return _refuse_small_tile(workload, budget, scratch_bytes)


def refuse_streaming(workload: Workload, budget: Budget, scratch_bytes: int) -> str | None:
    """It runs everything."""
    return None


def _refuse_small_tile(workload: Workload, budget: Budget, scratch_bytes: int) -> str | None:
    least = min(LEAST_TILE_BYTES, budget.row_bytes(workload.vocab))
    if budget.tile_bytes < least:
        return f"scratch_bytes={scratch_bytes} leaves a tile of less than {least} bytes"
    return None


# --- backends: the workload, and whether the backend was asked for by name -------------------------------------------


def refuse_triton(workload: Workload, by_name: bool) -> str | None:
    """It needs Triton and CUDA tensors, or its interpreter."""
    if workload.dtype == torch.float64:
        return "float64 is not for Triton kernels"
    if reason := installed.why_no_triton():
        return reason
    if workload.device.type == "cuda":
        return None
    if os.environ.get("TRITON_INTERPRET") != "1":
        return f"hidden is on {workload.device.type}: the kernels need CUDA, or TRITON_INTERPRET=1 to step through them"
    return None if by_name else "its interpreter is for stepping through the kernels: ask for it by name"


def refuse_extension(device_type: str) -> Callable[[Workload, bool], str | None]:
    """The refusal of the compiled extension's part for a device."""

    def refuse(workload: Workload, by_name: bool) -> str | None:
        if workload.device.type != device_type:
            return f"hidden is on {workload.device.type}, these kernels are for {device_type}"
        return extension.why_not(device_type) or extension.why_not_on(workload.device)

    return refuse


def refuse_torch(workload: Workload, by_name: bool) -> str | None:
    """It runs everything."""
    return None
