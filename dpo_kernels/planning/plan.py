"""How a problem is computed: one frozen object, made here and executed as it is."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property

from dpo_kernels import checks
from dpo_kernels.planning.memory_budget import MIB, Budget, default_scratch_bytes
from dpo_kernels.planning.schedules import extra_bytes, num_tiles
from dpo_kernels.planning.tables import BACKEND_NAMES, BACKENDS, STRATEGIES, Strategy, divide_scratch
from dpo_kernels.problem import Workload
from dpo_kernels.shapes import Schedule, Tile

AUTO = "auto"


@dataclass(frozen=True)
class Execution:
    """How the caller wants a problem computed. The names are checked here, what they can run by ``make_plan``."""

    backend: str = AUTO
    strategy: str = AUTO
    scratch_bytes: int | None = None  # None: by the device

    def __post_init__(self) -> None:
        checks.check_choice("backend", self.backend, (AUTO, *BACKEND_NAMES))
        checks.check_choice("strategy", self.strategy, (AUTO, *STRATEGIES))
        checks.check_count("scratch_bytes", self.scratch_bytes, least=0)


@dataclass(frozen=True)
class Plan:
    """What runs, what it costs, and why nothing else does. ``str()`` says it in a few lines.

    A GEMM pass is ``2 N H V`` FLOP, N the scored tokens; ``gemms`` counts those of the policy, forward and backward,
    ``reference_gemms`` those of a reference that is scored in the call. ``tile`` is the part of the logits that the
    scratch holds, and ``chunks`` how many tiles there are, None where the host does not know the lengths.
    ``extra_bytes`` are those of unscaled gradients of oversized pairs.
    """

    workload: Workload = field(repr=False)
    strategy: str
    backend: str
    scratch_bytes: int
    schedule: Schedule | None  # None while tracing: the operator makes it when it knows the lengths
    reference: "Plan | None" = None  # of a reference that is scored in the call

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
        return divide_scratch(self.scratch_bytes, self.backend, self.workload.dtype, self.workload.device)

    @property
    def gemms(self) -> int:
        """GEMM passes of the policy, forward and backward."""
        return self.algorithm.gemms(self.workload)

    @property
    def reference_gemms(self) -> int:
        """GEMM passes of a reference that is scored in the call."""
        return 0 if self.reference is None else self.reference.gemms

    @property
    def tile(self) -> Tile:
        """The part of the logits that the scratch holds."""
        assert self.schedule is not None, "a plan is explained where the lengths are known"
        return self.schedule.tile

    @property
    def chunks(self) -> int | None:
        """How many tiles of logits there are; None where the host does not know the lengths."""
        if self.schedule is None or (self.forms_gradients and self.workload.counts is None):
            return None
        return len(self.schedule.chunks) if self.forms_gradients else num_tiles(self.workload, self.schedule)

    @property
    def extra_bytes(self) -> int:
        """Bytes of unscaled gradients of the head, for pairs that are longer than the tile."""
        return 0 if self.schedule is None else extra_bytes(self.workload, self.schedule)

    @property
    def logits_in_weight_grad(self) -> bool:
        """Whether the logits lie in the memory of the head's gradient, which replaces them tile by tile."""
        return self.schedule is not None and self.schedule.logits_in_weight_grad

    @cached_property
    def rejected(self) -> dict[str, str]:
        """Why each other strategy and backend is not taken."""
        return _reasons_against(self)

    # What these properties were called first.
    units = gemms
    reference_units = reference_gemms
    lent = logits_in_weight_grad

    @property
    def against(self) -> dict[str, str]:
        """What ``rejected`` was called first."""
        return self.rejected

    def __str__(self) -> str:
        chunks = "" if self.chunks is None else f", chunks: {self.chunks}"
        lines = [
            f"strategy {self.strategy}, backend {self.backend}",
            f"  GEMM passes (2 N H V FLOP each): {self.gemms} policy + {self.reference_gemms} reference",
            f"  logits tile {self.tile.rows} x {self.tile.cols}, scratch {self.scratch_bytes / MIB:.4g} MiB{chunks}",
        ]
        if self.logits_in_weight_grad:
            lines.append("  logits in the memory of the head's gradient, which replaces them tile by tile")
        if self.extra_bytes:
            lines.append(f"  accumulators for oversized pairs: {self.extra_bytes / MIB:.4g} MiB")
        lines += [f"  not {name}: {reason}" for name, reason in self.rejected.items()]
        return "\n".join(lines)


def make_plan(workload: Workload, execution: Execution | None = None) -> Plan:
    """The plan for a workload; raises ``ValueError`` with the reason if what was asked for by name cannot run."""
    wished = execution or Execution()
    by_name = wished.backend != AUTO
    backend = _first(BACKEND_NAMES, wished.backend, "backend", lambda name: BACKENDS[name].refuse(workload, by_name))
    scratch_bytes = wished.scratch_bytes
    if scratch_bytes is None:
        scratch_bytes = default_scratch_bytes(workload.device)
    budget = divide_scratch(scratch_bytes, backend, workload.dtype, workload.device)
    asked = wished.strategy
    if asked == AUTO:
        asked = next((name for name, each in STRATEGIES.items() if each.preferred(workload, backend)), AUTO)
    strategy = _first(
        tuple(STRATEGIES),
        asked,
        "strategy",
        lambda name: STRATEGIES[name].refuse(workload, budget, scratch_bytes),
    )
    if not workload.needs_grad.head:
        strategy = STRATEGIES[strategy].with_frozen_head or strategy
    if workload.fills_main_grad and workload.needs_grad.head:
        _check_main_grad(workload, strategy, budget, scratch_bytes)
    reference = None
    if workload.reference is not None:
        # A strategy that was asked for is about the policy: one that needs the loss has nothing to do here.
        forms_gradients = wished.strategy != AUTO and STRATEGIES[wished.strategy].loss_and_gradients is not None
        wished = Execution(wished.backend, AUTO if forms_gradients else wished.strategy, scratch_bytes)
        reference = make_plan(workload.reference, wished)
    return lay_out(workload, strategy, backend, scratch_bytes, reference)


def lay_out(workload: Workload, strategy: str, backend: str, scratch_bytes: int, reference: Plan | None = None) -> Plan:
    """The plan once strategy and backend are chosen. Inside an operator this is where the chunks are made."""
    schedule = None
    if not workload.tracing:
        budget = divide_scratch(scratch_bytes, backend, workload.dtype, workload.device)
        schedule = STRATEGIES[strategy].schedule(workload, budget)
    return Plan(workload, strategy, backend, scratch_bytes, schedule, reference)


def _check_main_grad(workload: Workload, strategy: str, budget: Budget, scratch_bytes: int) -> None:
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
    """The first candidate without a reason against it."""
    if asked != AUTO:
        reason = refuse(asked)
        if reason is not None:
            raise ValueError(f"{what}={asked!r} cannot run this: {reason}")
        return asked
    for name in names:
        if refuse(name) is None:
            return name
    raise AssertionError(f"the last {what} of the table takes everything")
