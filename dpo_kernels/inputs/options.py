"""The options of the public functions in groups that check themselves. Field names are those of the arguments."""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, TypeVar

from torch import Tensor

from dpo_kernels import checks
from dpo_kernels.inputs.pair_order import PAIR_ORDERS, STACKED
from dpo_kernels.shapes import STATS, TOKEN_LOGPS

REDUCTIONS = ("mean", "sum", "none")
T = TypeVar("T")


@dataclass(frozen=True)
class PolicyTensors:
    """The tensors of the model that is trained; ``make_problem`` checks them against each other."""

    hidden: Tensor
    weight: Tensor
    labels: Tensor
    bias: Tensor | None = None
    cu_seqlens: Tensor | None = None
    token_weights: Tensor | None = None


@dataclass(frozen=True)
class ReferenceTensors:
    """The reference in one of its forms: hidden states to score, cached log-probs, or none."""

    ref_hidden: Tensor | None = None
    ref_weight: Tensor | None = None
    ref_bias: Tensor | None = None
    ref_logps: Tensor | None = None
    reference_free: bool = False

    def __post_init__(self) -> None:
        checks.check_flag("reference_free", self.reference_free)


@dataclass(frozen=True)
class HeadOptions:
    """What is done to the products of hidden states and head: scale, then soft cap."""

    logit_scale: float = 1.0
    softcap: float | None = None

    def __post_init__(self) -> None:
        checks.check_number("logit_scale", self.logit_scale)
        if self.softcap is not None and checks.check_number("softcap", self.softcap) <= 0:
            raise ValueError(f"softcap must be > 0 or None, got {self.softcap}")


@dataclass(frozen=True)
class Layout:
    """Where sequences and labels stand, and how many tokens may be scored."""

    pairs: str = STACKED
    shift: bool = False
    ignore_index: int = -100
    max_scored_tokens: int | None = None

    def __post_init__(self) -> None:
        checks.check_choice("pairs", self.pairs, PAIR_ORDERS)
        checks.check_count("max_scored_tokens", self.max_scored_tokens, least=1)
        checks.check_flag("shift", self.shift)
        checks.check_integer("ignore_index", self.ignore_index)


@dataclass(frozen=True)
class Reduction:
    """How the losses of the examples become one number; ``make_problem`` checks divisors against the batch."""

    reduction: str = "mean"
    denominator: float | Tensor | None = None
    token_denominator: float | Tensor | None = None

    def __post_init__(self) -> None:
        checks.check_choice("reduction", self.reduction, REDUCTIONS)
        if self.denominator is not None and self.reduction != "mean":
            raise ValueError(f"denominator goes with reduction='mean' only, got reduction={self.reduction!r}")


@dataclass(frozen=True)
class MainGradOptions:
    """A buffer for the gradient of the head; ``make_problem`` checks it against the head."""

    main_grad: Tensor | None = None
    main_grad_scale: float = 1.0

    def __post_init__(self) -> None:
        if checks.check_number("main_grad_scale", self.main_grad_scale) == 0:
            raise ValueError("main_grad_scale must not be 0: the other gradients are divided by it")
        if self.main_grad is None and self.main_grad_scale != 1.0:
            raise ValueError("main_grad_scale goes with main_grad only")


@dataclass(frozen=True)
class Arguments:
    """Everything that says what a call computes, but for its loss."""

    policy: PolicyTensors
    head: HeadOptions = field(default_factory=HeadOptions)
    reference: ReferenceTensors = field(default_factory=ReferenceTensors)
    layout: Layout = field(default_factory=Layout)
    reduction: Reduction = field(default_factory=Reduction)
    main_grad: MainGradOptions = field(default_factory=MainGradOptions)
    stats: tuple[str, ...] = ()

    @staticmethod
    def by_name(named: Mapping[str, Any]) -> "Arguments":
        """The groups from arguments by their names; what is missing has its default."""
        return Arguments(
            policy=group(PolicyTensors, named),
            head=group(HeadOptions, named),
            reference=group(ReferenceTensors, named),
            layout=group(Layout, named),
            reduction=group(Reduction, named),
            main_grad=group(MainGradOptions, named),
            stats=named.get("stats", ()),
        )


def group(kind: type[T], named: Mapping[str, Any]) -> T:
    """A group of options from those of the named arguments that are its fields."""
    return kind(**{name: named[name] for name in FIELDS[kind] if name in named})


# The fields of each group; torch.compile cannot look at those of a class.
FIELDS: dict[type, tuple[str, ...]] = {
    kind: tuple(each.name for each in fields(kind))
    for kind in (PolicyTensors, ReferenceTensors, HeadOptions, Layout, Reduction, MainGradOptions)
}


def check_stats(stats: Any) -> tuple[str, ...]:
    """The names of requested statistics in the order of the register."""
    known = (*STATS, TOKEN_LOGPS)
    if isinstance(stats, str) or not isinstance(stats, tuple | list | set | frozenset):
        raise TypeError(f"stats must be a tuple of names, got {type(stats).__name__}; known: {', '.join(known)}")
    for name in stats:
        checks.check_choice("stats", name, known)
    return tuple(name for name in known if name in stats)
