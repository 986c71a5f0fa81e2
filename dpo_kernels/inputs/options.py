"""The options of the public functions in groups that check themselves. Fields are named like the arguments."""

from collections.abc import Mapping
from dataclasses import field, fields
from typing import Any, TypeVar

import torch
from torch import Tensor

from dpo_kernels import checks
from dpo_kernels.inputs.pair_order import PAIR_ORDERS, STACKED
from dpo_kernels.records import dataclass
from dpo_kernels.shapes import KL, STATS, TOKEN_LOGPS, Sampling

REDUCTIONS = ("mean", "sum", "none")
GRADIENTS = ("dense", "sparse")
T = TypeVar("T")


@dataclass(frozen=True)
class PolicyTensors:
    """The tensors of the policy. ``make_problem`` checks them against each other."""

    hidden: Tensor  # (S, T, H), or (N, H) with cu_seqlens
    weight: Tensor  # (V, H)
    labels: Tensor  # (S, T) or (N,), int32 or int64
    bias: Tensor | None = None  # (V,)
    cu_seqlens: Tensor | None = None  # (S + 1,) int32 or int64
    token_weights: Tensor | None = None  # like labels, in any floating-point dtype
    vocab_parallel: Any = None  # distributed.VocabParallel: weight and bias are this rank's rows of the head
    context_parallel: Any = None  # distributed.ContextParallel: the tokens are this rank's part of the sequences
    rows: Tensor | None = None  # like labels, int32 or int64: the row of hidden (M, H) that predicts each label


@dataclass(frozen=True)
class ReferenceTensors:
    """The reference in one of its forms: hidden states that are scored in the call, cached log-probs, or none."""

    ref_hidden: Tensor | None = None  # (S, T, H_ref) or (N, H_ref)
    ref_weight: Tensor | None = None  # (V, H_ref); None means that the policy's weight is used
    ref_bias: Tensor | None = None  # (V,)
    ref_logps: Tensor | None = None  # (S,) in the caller's order
    ref_token_logps: Tensor | None = None  # like labels, in any floating-point dtype
    reference_free: bool = False

    def __post_init__(self) -> None:
        checks.check_flag("reference_free", self.reference_free)


@dataclass(frozen=True)
class HeadOptions:
    """What is applied to the products of hidden states and head: a scale, then a softcap."""

    logit_scale: float = 1.0
    softcap: float | None = None

    def __post_init__(self) -> None:
        checks.check_number("logit_scale", self.logit_scale)
        if self.softcap is not None and checks.check_number("softcap", self.softcap) <= 0:
            raise ValueError(f"softcap must be > 0 or None, got {self.softcap}")


@dataclass(frozen=True)
class Layout:
    """How sequences and labels are arranged, and how many tokens may be scored."""

    pairs: str = STACKED  # the pair order of the input
    shift: bool = False  # hidden[t] predicts labels[t + 1]
    ignore_index: int = -100  # the label of tokens that are not scored
    max_scored_tokens: int | None = None  # a static capacity; None means as many tokens as are scored
    packs_in_triton: bool = False  # no argument: the engine knows whether the call may run Triton kernels

    def __post_init__(self) -> None:
        checks.check_choice("pairs", self.pairs, PAIR_ORDERS)
        checks.check_count("max_scored_tokens", self.max_scored_tokens, least=1)
        checks.check_flag("shift", self.shift)
        checks.check_integer("ignore_index", self.ignore_index)


@dataclass(frozen=True)
class Reduction:
    """How the losses of the examples become one number. ``make_problem`` checks denominators against the batch."""

    reduction: str = "mean"
    denominator: float | Tensor | None = None  # replaces the number of examples
    token_denominator: float | Tensor | None = None  # replaces the number of tokens in means over tokens

    def __post_init__(self) -> None:
        checks.check_choice("reduction", self.reduction, REDUCTIONS)
        if self.denominator is not None and self.reduction != "mean":
            raise ValueError(f"denominator goes with reduction='mean' only, got reduction={self.reduction!r}")


@dataclass(frozen=True)
class MainGradOptions:
    """A buffer for the gradient of the head. ``make_problem`` checks it against the head."""

    main_grad: Tensor | None = None  # (V, H) float32, or float64 for float64 operands
    main_grad_scale: float = 1.0  # the upstream gradient that the caller promises

    def __post_init__(self) -> None:
        if checks.check_number("main_grad_scale", self.main_grad_scale) == 0:
            raise ValueError("main_grad_scale must not be 0: the other gradients are divided by it")
        if self.main_grad is None and self.main_grad_scale != 1.0:
            raise ValueError("main_grad_scale goes with main_grad only")


@dataclass(frozen=True)
class GradientOptions:
    """Whether gradients are exact, or those of a sample of the logits' gradient."""

    gradient: str = "dense"
    tau: float = 2.0**-12  # probabilities above it are kept as they are
    seed: int | Tensor = 0  # an int, or a 0-d int64 tensor
    sparse_weight_grad: bool = False  # the gradient of the weight is a sparse tensor of the rows that are reached

    def __post_init__(self) -> None:
        checks.check_choice("gradient", self.gradient, GRADIENTS)
        checks.check_flag("sparse_weight_grad", self.sparse_weight_grad)
        if self.sparse_weight_grad and self.gradient != "sparse":
            raise ValueError("sparse_weight_grad goes with gradient='sparse' only: an exact gradient has every row")
        if not 0 < checks.check_number("tau", self.tau) <= 1:
            raise ValueError(f"tau must be in (0, 1], got {self.tau}")
        if not isinstance(self.seed, Tensor):
            checks.check_integer("seed", self.seed)
            if not -(2**63) <= self.seed < 2**63:
                raise ValueError(f"seed must fit 64 bits, got {self.seed}")
        elif self.seed.dim() != 0 or self.seed.dtype != torch.int64:
            raise ValueError(
                f"seed must be an int or a 0-d int64 tensor, got {self.seed.dtype} of {self.seed.dim()} dims"
            )

    @property
    def sampling(self) -> Sampling | None:
        """The threshold and the seed of a sparse gradient, or None for an exact one."""
        return None if self.gradient == "dense" else Sampling(float(self.tau), self.seed, self.sparse_weight_grad)


@dataclass(frozen=True)
class Arguments:
    """All arguments that say what a call computes, except for its loss."""

    policy: PolicyTensors
    head: HeadOptions = field(default_factory=HeadOptions)
    reference: ReferenceTensors = field(default_factory=ReferenceTensors)
    layout: Layout = field(default_factory=Layout)
    reduction: Reduction = field(default_factory=Reduction)
    main_grad: MainGradOptions = field(default_factory=MainGradOptions)
    gradient: GradientOptions = field(default_factory=GradientOptions)
    stats: tuple[str, ...] = ()

    @staticmethod
    def by_name(named: Mapping[str, Any]) -> "Arguments":
        """Return the groups that are made from named arguments. Missing ones have their defaults."""
        return Arguments(
            policy=group(PolicyTensors, named),
            head=group(HeadOptions, named),
            reference=group(ReferenceTensors, named),
            layout=group(Layout, named),
            reduction=group(Reduction, named),
            main_grad=group(MainGradOptions, named),
            gradient=group(GradientOptions, named),
            stats=named.get("stats", ()),
        )


def group(kind: type[T], named: Mapping[str, Any]) -> T:
    """Return a group that is made from those named arguments that are its fields."""
    return kind(**{name: named[name] for name in FIELDS[kind] if name in named})


# These are the fields of each group. torch.compile cannot read them from a class.
FIELDS: dict[type, tuple[str, ...]] = {
    kind: tuple(each.name for each in fields(kind))
    for kind in (
        *(PolicyTensors, ReferenceTensors, HeadOptions, Layout, Reduction, MainGradOptions),
        GradientOptions,
    )
}


def check_stats(stats: Any) -> tuple[str, ...]:
    """Return the names of the requested statistics in the order of ``STATS``, then ``"kl"`` and ``"token_logps"``."""
    known = (*STATS, KL, TOKEN_LOGPS)
    if isinstance(stats, str) or not isinstance(stats, tuple | list | set | frozenset):
        raise TypeError(f"stats must be a tuple of names, got {type(stats).__name__}; known: {', '.join(known)}")
    for name in stats:
        checks.check_choice("stats", name, known)
    return tuple(name for name in known if name in stats)
