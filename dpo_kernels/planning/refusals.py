"""Why a strategy or a backend cannot run a workload.

Each function returns the reason in words, or None where it can run. For strategies ``scratch_bytes`` is the size of the
scratch and ``budget`` is how it is divided for the backend.
"""

import os
from collections.abc import Callable

import torch

from dpo_kernels.kernels import extension, installed
from dpo_kernels.planning.chunks import oversized_buffers
from dpo_kernels.planning.free_memory import free_bytes
from dpo_kernels.planning.memory_budget import LEAST_TILE_BYTES, MIB, Budget
from dpo_kernels.planning.schedules import extra_bytes, schedule_examples, tile_with_gradients
from dpo_kernels.problem import Workload


def refuse_chunked(workload: Workload, budget: Budget, scratch_bytes: int) -> str | None:
    """``chunked`` needs a separable loss that is reduced to one number, and room for one row of logits.

    Without a trainable head it is replaced by ``frozen_head``, which needs no loss.
    """
    if workload.loss is not None and not workload.loss.separable:
        return "the loss is coupled over the batch: a chunk of pairs does not determine its coefficients"
    row_cap = budget.whole_rows(workload.vocab)
    logits_in_grad = tile_with_gradients(workload, budget).cols < workload.vocab
    if row_cap < 1 and not logits_in_grad:
        minimum = budget.minimum_scratch(workload.vocab, workload.device.type)
        return f"scratch_bytes={scratch_bytes} is less than the {minimum} bytes that one row of logits needs"
    if not any(workload.needs_grad) or (not workload.needs_grad.head and not workload.kl):
        return None  # make_plan puts recompute or frozen_head in its place
    if workload.loss is None:
        return "log-probs have upstreams that are known only in the backward pass, and the head wants a gradient"
    if not workload.scalar:
        reason = "reduction='none' has upstreams that are known only in the backward pass"
        return f"{reason}, and the head wants a gradient" if workload.needs_grad.head else reason
    if workload.loss.is_callable and workload.tracing:
        return "inside torch.compile a loss without a name is traced into the graph, not run by the fused operator"
    if logits_in_grad:
        return None
    if workload.static and workload.shared_tokens > row_cap:
        return (
            f"max_scored_tokens={workload.shared_tokens} does not fit one chunk of {row_cap} rows, and where pairs end "
            "is not known on the host"
        )
    if workload.tracing:
        return None  # a tracer does not know the lengths
    schedule = schedule_examples(workload, budget)
    if workload.kl and any(chunk.oversized for chunk in schedule.chunks):
        return "an example is longer than the chunk, and its KL divergence would need an accumulator of its own"
    if oversized_buffers(schedule.chunks, workload.loss) > 2:
        return "a group of more than two sequences is longer than the chunk: each would need an accumulator of its own"
    if workload.device.type != "cuda" or workload.static or max(workload.shard_ranks, workload.context_ranks) > 1:
        return None
    extra = extra_bytes(workload, schedule)
    free = free_bytes(workload.device) if extra else None
    if free is not None and extra > free:
        return f"a pair longer than the chunk needs {extra / MIB:.4g} MiB of accumulators, more than is free"
    return None


def refuse_frozen_head(workload: Workload, budget: Budget, scratch_bytes: int) -> str | None:
    """``frozen_head`` needs a head that wants no gradient, and a tile."""
    if workload.needs_grad.head:
        return "the head wants a gradient"
    if workload.kl:
        return "it keeps the derivatives of log-probs, and not those of KL divergences"
    if workload.samples and budget.whole_rows(workload.vocab) < 1:
        return "a sample needs the sums of whole rows, which do not fit the scratch"
    return _refuse_small_tile(workload, budget, scratch_bytes)


def refuse_recompute(workload: Workload, budget: Budget, scratch_bytes: int) -> str | None:
    """``recompute`` needs a tile."""
    return _refuse_small_tile(workload, budget, scratch_bytes)


def refuse_streaming(workload: Workload, budget: Budget, scratch_bytes: int) -> str | None:
    """``streaming`` runs everything but a KL divergence."""
    return "a KL divergence needs whole rows of both heads' logits" if workload.kl else None


def refuse_kl(workload: Workload, budget: Budget, scratch_bytes: int) -> str | None:
    """A KL divergence needs room for one row of both heads' logits, whatever the strategy."""
    if not workload.kl or budget.whole_rows(workload.vocab):
        return None
    minimum = budget.minimum_scratch(workload.vocab, workload.device.type)
    return f"scratch_bytes={scratch_bytes} is less than the {minimum} bytes that one row of both heads' logits needs"


def _refuse_small_tile(workload: Workload, budget: Budget, scratch_bytes: int) -> str | None:
    minimum = min(LEAST_TILE_BYTES, budget.row_bytes(workload.vocab))
    if budget.tile_bytes < minimum:
        return f"scratch_bytes={scratch_bytes} leaves a tile of less than {minimum} bytes"
    return None


# --- backends; ``by_name`` says whether the caller asked for the backend --------------------------------------------


def refuse_triton(workload: Workload, by_name: bool) -> str | None:
    """The Triton backend needs CUDA tensors, or Triton's interpreter if it was asked for by name."""
    if workload.tiled:
        return "the head comes in tiles, and these kernels read it as a matrix"
    if workload.sparse_weight_grad and workload.needs_grad.weight:
        return "sparse_weight_grad needs the number of kept entries on the host, and these kernels leave it on the GPU"
    return refuse_triton_on(workload.device, workload.dtype, by_name, tracing=workload.tracing)


def refuse_triton_on(device: torch.device, dtype: torch.dtype, by_name: bool, *, tracing: bool) -> str | None:
    """The same before there is a workload. ``dtype`` is that of the GEMM operands, or of the hidden states.

    On a GPU the first call runs the self-check.
    """
    if dtype == torch.float64:
        return "float64 is not for Triton kernels"
    if reason := installed.why_no_triton():
        return reason
    if device.type == "cuda":
        return _verdict("triton", device, dtype, by_name, tracing)
    if os.environ.get("TRITON_INTERPRET") != "1":
        return f"hidden is on {device.type}: the kernels need CUDA, or TRITON_INTERPRET=1 to step through them"
    return None if by_name else "its interpreter is for stepping through the kernels: ask for it by name"


def refuse_extension(device_type: str) -> Callable[[Workload, bool], str | None]:
    """Return the function that says why the extension's kernels for a device cannot run."""

    def refuse(workload: Workload, by_name: bool) -> str | None:
        if workload.device.type != device_type:
            return f"hidden is on {workload.device.type}, these kernels are for {device_type}"
        if workload.tiled and device_type == "cuda":
            return "the head comes in tiles, which these kernels were not tried with"
        reason = extension.why_not(device_type) or extension.why_not_on(workload.device)
        if reason is None and device_type == "cuda":
            reason = _verdict("cuda", workload.device, workload.dtype, by_name, workload.tracing)
        return reason

    return refuse


def _verdict(backend: str, device: torch.device, dtype: torch.dtype, by_name: bool, tracing: bool) -> str | None:
    """Say what the self-check of a backend says. It is imported where there is a GPU."""
    from dpo_kernels.kernels import verdicts

    return verdicts.why_not(backend, device, dtype, by_name, tracing)


def refuse_torch(workload: Workload, by_name: bool) -> str | None:
    """The torch backend runs everything."""
    return None
