"""The plan: how a problem is computed, as one frozen object. It is made here and executed as it is."""

from collections.abc import Callable, Sequence
from dataclasses import field, replace
from functools import cached_property, partial
from typing import Any

from torch import Tensor

from dpo_kernels import checks
from dpo_kernels.planning.collectives import Collective, Pass, collectives_of
from dpo_kernels.planning.free_memory import recommended, scratch_by_default
from dpo_kernels.planning.memory_budget import MIB, Budget
from dpo_kernels.planning.refusals import refuse_kl, refuse_triton_on
from dpo_kernels.planning.schedules import extra_bytes, num_tiles
from dpo_kernels.planning.tables import BACKEND_NAMES, BACKENDS, STRATEGIES, Strategy, divide_scratch
from dpo_kernels.problem import Workload
from dpo_kernels.records import dataclass
from dpo_kernels.shapes import Schedule, Tile, accumulation_dtype

KIB = 2**10  # bytes
AUTO = "auto"  # the caller leaves the choice to ``make_plan``


@dataclass(frozen=True)
class Execution:
    """How the caller wants a problem computed. Names are checked here; ``make_plan`` checks whether they can run it."""

    backend: str = AUTO
    strategy: str = AUTO
    scratch_bytes: int | None = None  # None stands for the default of the device

    def __post_init__(self) -> None:
        checks.check_choice("backend", self.backend, (AUTO, *BACKEND_NAMES))
        checks.check_choice("strategy", self.strategy, (AUTO, *STRATEGIES))
        checks.check_count("scratch_bytes", self.scratch_bytes, least=0)


@dataclass(frozen=True)
class Plan:
    """What runs, what it costs, and why nothing else does. ``str()`` says it in a few lines.

    A GEMM pass is ``2 N H V`` FLOP, where N is the number of scored tokens. ``gemms`` counts the passes of the policy,
    forward and backward. ``reference_gemms`` counts those of a reference that is scored in the call. ``tile`` is the
    block of logits that the scratch holds. ``chunks`` is the number of tiles, or None where the host does not know the
    lengths. ``extra_bytes`` is the memory of the accumulators of oversized examples.
    """

    workload: Workload = field(repr=False, compare=False)
    strategy: str
    backend: str
    scratch_bytes: int
    schedule: Schedule | None  # None while tracing; the operator makes it once it knows the lengths
    reference: "Plan | None" = None  # the plan of a reference that is scored in the call
    divided: Budget | None = field(default=None, repr=False, compare=False)  # the scratch, where it is divided already
    asked: Execution | None = field(default=None, repr=False, compare=False)  # what the caller left open

    @property
    def forms_gradients(self) -> bool:
        """Whether the gradients are formed with the loss, in the forward pass."""
        return STRATEGIES[self.strategy].loss_and_gradients is not None

    @property
    def algorithm(self) -> Strategy:
        """The record of the strategy."""
        return STRATEGIES[self.strategy]

    @property
    def budget(self) -> Budget:
        """How the scratch is divided."""
        if self.divided is not None:
            return self.divided
        return _divided(self.workload, self.backend, self.scratch_bytes)

    @property
    def gemms(self) -> int:
        """GEMM passes of the policy, forward and backward."""
        return self.algorithm.gemms(self.workload)

    @property
    def reference_gemms(self) -> int:
        """GEMM passes of a reference that is scored in the call."""
        if self.workload.kl:  # they are computed again with the policy's logits, if their divergence gets a gradient
            again = self.algorithm.gradients is not None and self.workload.kl_grad and any(self.workload.needs_grad)
            return 1 + int(again)
        return 0 if self.reference is None else self.reference.gemms

    @property
    def tile(self) -> Tile:
        """The block of logits that the scratch holds."""
        return self._laid_out.tile

    @property
    def tile_bytes(self) -> int:
        """The bytes that are allocated for the tile and for the copies of it that the backend makes."""
        return self._laid_out.scratch_logits * self.budget.bytes_per_logit

    @property
    def _laid_out(self) -> Schedule:
        return self.schedule or self.algorithm.schedule(self.workload, self.budget)

    @property
    def chunks(self) -> int | None:
        """The number of tiles of logits, or None where the host does not know the lengths."""
        if self.schedule is None or (self.forms_gradients and self.workload.counts is None):
            return None
        return len(self.schedule.chunks) if self.forms_gradients else num_tiles(self.workload, self.schedule)

    @property
    def extra_bytes(self) -> int:
        """The bytes of the accumulators that oversized examples need."""
        return 0 if self.schedule is None else extra_bytes(self.workload, self.schedule)

    @property
    def sample_bytes(self) -> int:
        """The most bytes that the entries of a sampled tile take, or 0 where gradients are exact."""
        workload = self.workload
        if workload.tau is None or not any(workload.needs_grad):
            return 0
        kernels = BACKENDS[self.backend].load()
        return kernels.sample_bytes(workload.dtype, self.tile.rows, self.tile.cols, workload.tau)

    @property
    def peak_bytes(self) -> int:
        """The most bytes that the pass with the scratch holds beside its inputs, or the reference's if that holds more.

        Copies of a head under autocast are not counted. A sparse gradient of the head counts as if every row were
        reached.
        """
        workload, wide = self.workload, accumulation_dtype(self.workload.dtype).itemsize
        tokens, row = workload.num_tokens, workload.width * wide
        grads = (tokens + 1) * row if workload.needs_grad.hidden else 0
        if workload.needs_grad.weight and not workload.fills_main_grad:
            grads += workload.vocab * row
        # The rows of a chunk are gathered, and scaled. A token has some forty numbers of at most eight bytes.
        rows = min(tokens, self.tile.rows) * 2 * (row + workload.width * workload.dtype.itemsize) + tokens * 40 * 8
        if workload.kl and workload.reference is not None:  # the reference's rows of a chunk are gathered too
            rows += min(tokens, self.tile.rows) * workload.reference.width * workload.reference.dtype.itemsize
        scratch = self.tile_bytes + self.budget.workspace_bytes + self.extra_bytes + self.sample_bytes
        return max(scratch + grads + rows, 0 if self.reference is None else self.reference.peak_bytes)

    def out_of_memory(self) -> str:
        """Return what to tell a caller whose call ran out of a GPU's memory: a smaller scratch that fits what is free.

        It may be that none does.
        """
        workload, asked = self.workload, self.asked or Execution(self.backend, self.strategy)
        ranks = max(workload.shard_ranks, workload.context_ranks)
        peak_of = partial(_peak_with, workload, asked)
        return recommended(self.scratch_bytes, workload.device, peak_of, ranks)

    @property
    def logits_in_weight_grad(self) -> bool:
        """Whether the logits lie in the memory of the head's gradient, which replaces them tile by tile."""
        return self.schedule is not None and self.schedule.logits_in_weight_grad

    @property
    def collectives(self) -> tuple[Collective, ...]:
        """The collectives of the call, forward and backward, where the head or the sequences are split over ranks."""
        policy = self._as_pass()
        reference = None if self.reference is None else self.reference._as_pass()
        return () if policy is None else collectives_of(policy, reference)

    def _as_pass(self) -> Pass | None:
        if self.schedule is None:
            return None
        streams = self.strategy == "streaming" and BACKENDS[self.backend].load().streams_logps
        return Pass(self.workload, self.schedule, self.forms_gradients, streams)

    @cached_property
    def rejected(self) -> dict[str, str]:
        """Why every other strategy and backend does not run, by name."""
        return _reasons_against(self)

    # These are older names of the properties, which callers may still use.
    units = gemms
    reference_units = reference_gemms
    forms_gradient = forms_gradients
    lent = logits_in_weight_grad

    @property
    def against(self) -> dict[str, str]:
        """The older name of ``rejected``."""
        return self.rejected

    def __str__(self) -> str:
        workload, tile = self.workload, self.tile
        most = " at most" if workload.static else ""  # the host knows only the capacity
        used = self.tile_bytes
        # Without any scratch there is still a tile of ``LEAST_TILE_BYTES``.
        limit = f" of at most {_size(self.scratch_bytes)}" if used <= self.scratch_bytes else ", the least"
        lines = [
            f"strategy {self.strategy}, backend {self.backend}",
            f"  N={workload.num_tokens} scored tokens{most}, H={workload.width}, V={workload.vocab}, "
            + str(workload.dtype).removeprefix("torch."),
            f"  GEMM passes (2 N H V FLOP each): {self.gemms} policy + {self.reference_gemms} reference",
            *self._about_the_sample(),
            *self._rows_of_weight_grad(),
            f"  logits tile {tile.rows} x {tile.cols} ({_size(used)}{limit}){self._number_of_chunks()}",
        ]
        if self.budget.codes and used:
            lines.append("  logits are kept in 16 bits until their gradient is formed")
        elif self.budget.codes:
            lines.append("  logits are reduced in the cache and not kept, because no gradient follows")
        if workload.kl:
            lines.append("  the reference's logits lie in the scratch beside those of the policy")
        if self.logits_in_weight_grad:
            lines.append("  logits in the memory of the head's gradient, which replaces them tile by tile")
        if self.extra_bytes:
            lines.append(f"  accumulators for oversized pairs: {_size(self.extra_bytes)}")
        if self.collectives:
            number, sent = (
                sum(values) for values in zip(*((e.number, e.bytes) for e in self.collectives), strict=True)
            )
            what = ", ".join(f"{each.number} of {each.what} ({_size(each.bytes)})" for each in self.collectives)
            lines.append(f"  collectives: {number}, to which this rank brings {_size(sent)}: {what}")
        lines += [f"  not {name}: {reason}" for name, reason in self.rejected.items()]
        return "\n".join(lines)

    def _rows_of_weight_grad(self) -> list[str]:
        """Return the line about a sparse gradient of the head."""
        workload = self.workload
        if not (workload.sparse_weight_grad and workload.needs_grad.weight):
            return []
        row = workload.width * accumulation_dtype(workload.dtype).itemsize
        return [
            f"  the head's gradient holds only the rows that the sample reaches, of {_size(row)} each; all "
            f"{workload.vocab} would be {_size(workload.vocab * row)}"
        ]

    def _about_the_sample(self) -> list[str]:
        """Return the line about gradients of a sample, if they are."""
        if not self.workload.samples:
            return []
        return [f"  gradients are those of a sample of the logits' gradient, {_size(self.sample_bytes)} at most"]

    def _number_of_chunks(self) -> str:
        """Return the end of the line about the tile, or nothing where the host does not know the lengths."""
        if self.chunks is None:
            return ""
        what, rest = ("chunk", " of whole examples") if self.forms_gradients else ("tile", "")
        return f", {self.chunks} {what}{'' if self.chunks == 1 else 's'}{rest}"


def _size(size_bytes: int) -> str:
    """Return a number of bytes in words, in the largest unit of which there is at least one."""
    for unit, name in ((MIB, "MiB"), (KIB, "KiB")):
        if size_bytes >= unit:
            return f"{round(size_bytes / unit, 1):g} {name}"
    return f"{size_bytes} bytes"


def packs_in_triton(hidden: Any, execution: Execution) -> bool:
    """Return whether a call on ``hidden`` may run Triton kernels, before anything is known about its work.

    Then they pack its tokens too. A caller who asks for another backend by name gets no Triton kernel at all.
    """
    if execution.backend not in (AUTO, "triton") or not isinstance(hidden, Tensor):
        return False
    by_name, tracing = execution.backend != AUTO, checks.traced(hidden)
    return refuse_triton_on(hidden.device, hidden.dtype, by_name, tracing=tracing) is None


def make_plan(workload: Workload, execution: Execution | None = None) -> Plan:
    """Return the plan for a workload.

    Raises:
        ValueError: a strategy or backend that was asked for by name cannot run the workload. The text says why.

    """
    wished = execution or Execution()
    by_name = wished.backend != AUTO
    backend = _first(BACKEND_NAMES, wished.backend, "backend", lambda name: BACKENDS[name].refuse(workload, by_name))
    scratch_bytes = wished.scratch_bytes
    if scratch_bytes is None:
        scratch_bytes = scratch_by_default(workload, partial(_peak_with, workload, wished))
    budget = _divided(workload, backend, scratch_bytes)
    if (reason := refuse_kl(workload, budget, scratch_bytes)) is not None:
        raise ValueError(reason)
    strategy_name = wished.strategy
    if strategy_name == AUTO:
        strategy_name = next((name for name, each in STRATEGIES.items() if each.preferred(workload, backend)), AUTO)
    strategy = _first(
        tuple(STRATEGIES),
        strategy_name,
        "strategy",
        lambda name: STRATEGIES[name].refuse(workload, budget, scratch_bytes),
    )
    samples_cut_rows = workload.samples and budget.whole_rows(workload.vocab) < 1
    if workload.kl and not any(workload.needs_grad):
        strategy = "recompute"
    elif not workload.needs_grad.head and not samples_cut_rows and not workload.kl:
        strategy = STRATEGIES[strategy].with_frozen_head or strategy
    if workload.fills_main_grad and workload.needs_grad.head:
        _check_main_grad(workload, strategy, budget, scratch_bytes)
    asked, reference = wished, None
    if workload.reference is not None and not workload.kl:
        # The caller asks for a strategy of the policy. One that needs the loss cannot score the reference.
        forms_gradients = wished.strategy != AUTO and STRATEGIES[wished.strategy].loss_and_gradients is not None
        wished = Execution(wished.backend, AUTO if forms_gradients else wished.strategy, scratch_bytes)
        reference = make_plan(workload.reference, wished)
    return lay_out(workload, strategy, backend, scratch_bytes, reference, budget, asked)


def lay_out(
    workload: Workload,
    strategy: str,
    backend: str,
    scratch_bytes: int,
    reference: Plan | None = None,
    budget: Budget | None = None,
    asked: Execution | None = None,
) -> Plan:
    """Return the plan with a chosen strategy and backend. Inside an operator this call makes the chunks."""
    schedule = None
    if not workload.tracing:
        budget = budget or _divided(workload, backend, scratch_bytes)
        schedule = STRATEGIES[strategy].schedule(workload, budget)
    return Plan(workload, strategy, backend, scratch_bytes, schedule, reference, budget, asked)


def _divided(workload: Workload, backend: str, scratch_bytes: int) -> Budget:
    how = {"narrow": workload.narrow, "kl": workload.kl}
    return divide_scratch(scratch_bytes, backend, workload.dtype, workload.device, **how)


def _peak_with(workload: Workload, asked: Execution, scratch_bytes: int) -> int | None:
    """Return the bytes that a call takes with another scratch, or None where it cannot run as it was asked for."""
    try:
        return make_plan(workload, replace(asked, scratch_bytes=scratch_bytes)).peak_bytes
    except ValueError:
        return None


def _check_main_grad(workload: Workload, strategy: str, budget: Budget, scratch_bytes: int) -> None:
    """Raise ``ValueError`` unless the plan forms the head's gradient in the forward pass, outside a tracer."""
    if workload.tracing:
        raise ValueError("main_grad is written to while the loss is computed, which torch.compile must not trace")
    if STRATEGIES[strategy].loss_and_gradients is not None:
        return
    with_loss = (each for each in STRATEGIES.values() if each.loss_and_gradients is not None)
    reason = next(filter(None, (each.refuse(workload, budget, scratch_bytes) for each in with_loss)), None)
    raise ValueError(
        "main_grad needs the pass that forms gradients with the loss: "
        f"{reason or f'strategy={strategy!r} was asked for'}"
    )


def _reasons_against(plan: Plan) -> dict[str, str]:
    """Return why each strategy and backend that the plan does not use was not chosen."""
    workload, rejected = plan.workload, {}
    for name, backend in BACKENDS.items():
        if name != plan.backend:
            reason = backend.refuse(workload, False)
            rejected[name] = reason or f"it could run; {plan.backend} is preferred"
    for name, strategy in STRATEGIES.items():
        if name == plan.strategy:
            continue
        reason = strategy.refuse(workload, plan.budget, plan.scratch_bytes)
        if reason is None and plan.algorithm.preferred(workload, plan.backend):
            reason = (
                f"it could run; at H={workload.width} the traffic of its logits is predicted to cost more than it saves"
            )
        if not workload.needs_grad.head and strategy.with_frozen_head == plan.strategy:
            reason = reason or f"with a head that wants no gradient it is {plan.strategy}"
        rejected[name] = reason or f"it could run, at {strategy.gemms(workload)} GEMM passes against {plan.gemms}"
    return rejected


def _first(names: Sequence[str], asked: str, what: str, refuse: Callable[[str], str | None]) -> str:
    """Return ``asked``, or for ``"auto"`` the first name that can run. Raise ``ValueError`` if ``asked`` cannot."""
    if asked != AUTO:
        reason = refuse(asked)
        if reason is not None:
            raise ValueError(f"{what}={asked!r} cannot run this: {reason}")
        return asked
    for name in names:
        if refuse(name) is None:
            return name
    raise AssertionError(f"the last {what} of the table takes everything")
