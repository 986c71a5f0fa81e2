"""(strategy, backend) for a problem: tables of candidates, each with its reasons for refusal.

A new backend is a kernel file and a line in ``BACKENDS``; a new strategy a file and a line in ``STRATEGIES``.
"""

import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch

from dpo_kernels import tiles
from dpo_kernels.device_specs import ChunkCosts, gpu_at
from dpo_kernels.kernel_interface import RowKernels
from dpo_kernels.kernels import extension, installed
from dpo_kernels.kernels.extension import empty_cache as empty_cache
from dpo_kernels.kernels.torch_kernels import TorchKernels
from dpo_kernels.loss_interface import SequenceLoss
from dpo_kernels.shapes import Tile, accumulation_dtype
from dpo_kernels.strategies.groups import Group, oversized_buffers, plan_groups
from dpo_kernels.tiles import MIB, Budget, tile_of, tile_of_pairs


@dataclass(frozen=True)
class Problem:
    """The facts about a call that decide how it is run."""

    rows: int  # scored rows, or the capacity where they are not known
    vocab: int
    hidden: int
    dtype: torch.dtype  # of the GEMM operands
    device: torch.device
    need: tuple[bool, bool, bool]  # gradients wanted by (hidden, weight, bias)
    loss: SequenceLoss | None  # None: log-probs are asked for, by sequence or token
    separable: bool
    scalar: bool  # the upstream is one number
    callable_loss: bool
    counts: Sequence[int] | None  # scored tokens by sequence, chosen and rejected alternating; None: not on the host
    static: bool  # max_scored_tokens: the host never knows the counts
    tracing: bool  # inside torch.compile or export
    scratch_bytes: int
    reference_units: int
    accumulates: bool = False  # the head's gradient is added to a buffer of the caller's

    @property
    def head_trainable(self) -> bool:
        """Whether the head's weight or bias wants a gradient."""
        return self.need[1] or self.need[2]

    @property
    def gemms(self) -> int:
        """GEMMs of the backward pass proper."""
        return int(self.need[0]) + int(self.need[1])


@dataclass(frozen=True)
class Plan:
    """What runs, what it costs, and why nothing else does. ``str()`` says it in a few lines."""

    strategy: str
    backend: str
    units: int  # GEMM units of 2 N H V FLOP, forward and backward, N the scored tokens
    reference_units: int
    tile: Tile
    scratch_bytes: int
    chunks: int | None  # None where the host does not know the lengths
    extra_bytes: int  # unscaled accumulators of oversized pairs
    forms_gradient: bool  # the fused pass over pairs runs, which needs the loss; else log-probs come first
    lent: bool = False  # the logits lie in the memory of the head's gradient, and leave it tile by tile
    against: dict[str, str] = field(default_factory=dict)  # why not each other strategy and backend

    def __str__(self) -> str:
        chunks = "" if self.chunks is None else f", chunks: {self.chunks}"
        lines = [
            f"strategy {self.strategy}, backend {self.backend}",
            f"  GEMM units (2 N H V FLOP each): {self.units} policy + {self.reference_units} reference",
            f"  logits tile {self.tile.rows} x {self.tile.cols}, scratch {self.scratch_bytes / MIB:.4g} MiB{chunks}",
        ]
        if self.lent:
            lines.append("  logits in the memory of the head's gradient, which replaces them tile by tile")
        if self.extra_bytes:
            lines.append(f"  accumulators for oversized pairs: {self.extra_bytes / MIB:.4g} MiB")
        lines += [f"  not {name}: {reason}" for name, reason in self.against.items()]
        return "\n".join(lines)


@dataclass(frozen=True)
class Backend:
    """Why a backend cannot run a problem (None: it can), and where its class of kernels is loaded from."""

    refuse: Callable[[Problem, bool], str | None]  # the problem, and whether the backend was asked for by name
    load: Callable[[], type[TorchKernels]]

    def make(self, dtype: torch.dtype, workspace_bytes: int) -> RowKernels:
        """The kernels for one call."""
        return self.load()(dtype, workspace_bytes)


@dataclass(frozen=True)
class Strategy:
    """Why a strategy cannot run a problem (None: it can), and its units forward + backward."""

    refuse: Callable[[Problem, Budget], str | None]
    units: Callable[[Problem], int]


def choose(problem: Problem, strategy: str, backend: str) -> Plan:
    """The plan for a problem; raises ``ValueError`` with the reason if what was asked for by name cannot run."""
    backend_name = _first(
        BACKEND_NAMES, backend, "backend", lambda name: _refuse_backend(problem, name, by_name=backend != "auto")
    )
    budget = divide(problem, backend_name)
    asked = "streaming" if strategy == "auto" and _streams_faster(problem, backend_name) else strategy
    name = _first(tuple(STRATEGIES), asked, "strategy", lambda name: STRATEGIES[name].refuse(problem, budget))
    forms_gradient = problem.loss is not None and problem.scalar and problem.head_trainable and name == "chunked"
    tile = _tile_of_problem(problem, budget) if forms_gradient else tile_of(name, budget, problem.rows, problem.vocab)
    groups = _groups(problem, tile) if forms_gradient else None
    chunks: int | None = None
    if groups is not None:
        chunks = len(groups)
    elif not problem.tracing and not forms_gradient:
        chunks = math.ceil(problem.rows / tile.rows) * math.ceil(problem.vocab / tile.cols)
    return Plan(
        strategy=name,
        backend=backend_name,
        units=STRATEGIES[name].units(problem),
        reference_units=problem.reference_units,
        tile=tile,
        scratch_bytes=problem.scratch_bytes,
        chunks=chunks,
        extra_bytes=_extra_bytes(problem, tile) if forms_gradient else 0,
        forms_gradient=forms_gradient,
        lent=forms_gradient and tile.cols < problem.vocab,
    )


def reasons_against(problem: Problem, plan: Plan) -> dict[str, str]:
    """Why every strategy and backend but the plan's is not taken."""
    against: dict[str, str] = {}
    for name in BACKEND_NAMES:
        if name != plan.backend:
            against[name] = (
                _refuse_backend(problem, name, by_name=False) or f"it could run; {plan.backend} is preferred"
            )
    budget = divide(problem, plan.backend)
    for name, candidate in STRATEGIES.items():
        if name == plan.strategy:
            continue
        units = candidate.units(problem)
        reason = candidate.refuse(problem, budget)
        if reason is None and plan.strategy == "streaming" and _streams_faster(problem, plan.backend):
            reason = (
                f"it could run; at H={problem.hidden} the traffic of its logits is predicted to cost more than it saves"
            )
        against[name] = reason or f"it could run, at {units} GEMM units against {plan.units}"
    return against


def why_not(strategy: str, problem: Problem, backend: str) -> str | None:
    """Why a strategy cannot run a problem with a backend; None where it can."""
    return STRATEGIES[strategy].refuse(problem, divide(problem, backend))


def divide(problem: Problem, backend: str) -> Budget:
    """Divide the problem's scratch for a backend."""
    return budget_of(problem.scratch_bytes, backend, problem.dtype, problem.device)


def budget_of(scratch_bytes: int, backend: str, dtype: torch.dtype, device: torch.device) -> Budget:
    """Divide a scratch: a quarter, up to a limit, for the temporaries, the rest for the tile."""
    kernels = BACKENDS[backend].load()
    per_logit, alignment = kernels.bytes_per_logit(dtype, device.type), kernels.row_alignment(device.type)
    return Budget.of(scratch_bytes, device.type, per_logit, alignment, kernels.can_alias_weight_grad)


def _tile_of_problem(problem: Problem, budget: Budget) -> Tile:
    lends = problem.loss is not None and problem.scalar and problem.need[1] and not problem.accumulates
    lends = lends and not problem.tracing  # the number of rows is not to be looked at
    return tile_of_pairs(budget, problem.rows, problem.vocab, problem.hidden if lends else 0)


def chunking_of(device: torch.device) -> ChunkCosts:
    """What chunks cost on a device; without a GPU the fewest are best."""
    gpu = gpu_at(device)
    return ChunkCosts() if gpu is None else gpu.chunking


def _streams_faster(problem: Problem, backend: str) -> bool:
    """Whether log-probs alone, a reference's say, are predicted to be faster without logits in memory.

    Only the Triton backend has a kernel for it, and only its 16-bit launches have matrix instructions.
    """
    gpu = gpu_at(problem.device)
    if gpu is None or backend != "triton" or any(problem.need) or accumulation_dtype(problem.dtype) == problem.dtype:
        return False
    return problem.hidden <= gpu.streaming_width


# --- the strategies ---------------------------------------------------------------------------------------------------


def _refuse_chunked(problem: Problem, budget: Budget) -> str | None:
    if not problem.separable:
        return "the loss is coupled over the batch: a chunk of pairs does not determine its coefficients"
    fits = budget.whole_rows(problem.vocab)
    lent = _tile_of_problem(problem, budget).cols < problem.vocab
    if fits < 1 and not lent:
        least = budget.minimum_scratch(problem.vocab, problem.device.type)
        return f"scratch_bytes={problem.scratch_bytes} is less than the {least} bytes that one row of logits needs"
    if not problem.head_trainable:
        return None
    if problem.loss is None:
        return "log-probs have upstreams that are known only in the backward pass, and the head wants a gradient"
    if not problem.scalar:
        return "reduction='none' has upstreams that are known only in the backward pass, and the head wants a gradient"
    if problem.callable_loss and problem.tracing:
        return "inside torch.compile a loss without a name is traced into the graph, not run by the fused operator"
    if lent:
        return None
    if problem.static and problem.rows > fits:
        return (
            f"max_scored_tokens={problem.rows} does not fit one chunk of {fits} rows, and where pairs end is not "
            "known on the host"
        )
    groups = _groups(problem, Tile(fits, problem.vocab))
    if groups is not None and problem.loss is not None and oversized_buffers(groups, problem.loss) > 2:
        return "a group of more than two sequences is longer than the chunk: each would need an accumulator of its own"
    return _refuse_for_memory(problem, Tile(fits, problem.vocab))


def _refuse_for_memory(problem: Problem, tile: Tile) -> str | None:
    if problem.device.type != "cuda" or problem.tracing or problem.static:
        return None
    extra = _extra_bytes(problem, tile)
    if extra and extra > _free_bytes(problem.device):
        return f"a pair longer than the chunk needs {extra / MIB:.4g} MiB of accumulators, more than is free"
    return None


def _free_bytes(device: torch.device) -> int:
    """What a CUDA device could still give: the driver, and what torch's allocator keeps for reuse."""
    kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return torch.cuda.mem_get_info(device)[0] + kept


def _refuse_recompute(problem: Problem, budget: Budget) -> str | None:
    least = min(tiles.LEAST_TILE_BYTES, budget.row_bytes(problem.vocab))
    if budget.tile_bytes < least:
        return f"scratch_bytes={problem.scratch_bytes} leaves a tile of less than {least} bytes"
    return None


def _units_kept(problem: Problem, passes_with_head: int) -> int:
    if not any(problem.need):
        return 1
    if not problem.head_trainable:
        return 1 + problem.gemms  # the derivative's direction is formed beside the log-probs
    return passes_with_head + problem.gemms


def _units_streaming(problem: Problem) -> int:
    return 2 + problem.gemms if any(problem.need) else 1  # a recomputed tile serves both gradients


def _groups(problem: Problem, tile: Tile) -> list[Group] | None:
    if problem.counts is None or problem.loss is None:
        return None
    bounds = problem.loss.bounds(len(problem.counts))
    return plan_groups(problem.counts, problem.rows, bounds, tile.rows, chunking_of(problem.device))


def _extra_bytes(problem: Problem, tile: Tile) -> int:
    groups = _groups(problem, tile)
    if groups is None or problem.loss is None or not problem.need[1]:
        return 0
    buffers = oversized_buffers(groups, problem.loss)
    return buffers * problem.vocab * problem.hidden * accumulation_dtype(problem.dtype).itemsize


# --- the backends -----------------------------------------------------------------------------------------------------


def _refuse_backend(problem: Problem, name: str, by_name: bool) -> str | None:
    return BACKENDS[name].refuse(problem, by_name)


def _refuse_triton(problem: Problem, by_name: bool) -> str | None:
    if problem.dtype == torch.float64:
        return "float64 is not for Triton kernels"
    if reason := installed.why_no_triton():
        return reason
    if problem.device.type == "cuda":
        return None
    if os.environ.get("TRITON_INTERPRET") != "1":
        return f"hidden is on {problem.device.type}: the kernels need CUDA, or TRITON_INTERPRET=1 to step through them"
    return None if by_name else "its interpreter is for stepping through the kernels: ask for it by name"


def _refuse_extension(device_type: str) -> Callable[[Problem, bool], str | None]:
    def refuse(problem: Problem, by_name: bool) -> str | None:
        if problem.device.type != device_type:
            return f"hidden is on {problem.device.type}, these kernels are for {device_type}"
        return extension.why_not(device_type) or extension.why_not_on(problem.device)

    return refuse


def _load_triton() -> type[TorchKernels]:
    from dpo_kernels.kernels.triton.backend import TritonKernels

    return TritonKernels


# --- the tables, best first -------------------------------------------------------------------------------------------

STRATEGIES = {
    "chunked": Strategy(_refuse_chunked, lambda problem: _units_kept(problem, 1)),
    "recompute": Strategy(_refuse_recompute, lambda problem: _units_kept(problem, 2)),
    "streaming": Strategy(lambda problem, budget: None, _units_streaming),
}
BACKENDS = {
    "triton": Backend(_refuse_triton, _load_triton),
    "cuda": Backend(_refuse_extension("cuda"), lambda: extension.CudaKernels),
    "cpp": Backend(_refuse_extension("cpu"), lambda: extension.CppKernels),
    "torch": Backend(lambda problem, by_name: None, lambda: TorchKernels),
}
BACKEND_NAMES = tuple(BACKENDS)


def _first(names: Sequence[str], asked: str, what: str, refuse: Callable[[str], str | None]) -> str:
    """The first candidate without a reason against it."""
    if asked != "auto":
        reason = refuse(asked)
        if reason is not None:
            raise ValueError(f"{what}={asked!r} cannot run this: {reason}")
        return asked
    for name in names:
        if refuse(name) is None:
            return name
    raise AssertionError(f"the last {what} of the table takes everything")
