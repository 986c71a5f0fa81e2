"""The register of the family: what the engine must know about each loss beside its function."""

import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

LossFunction = Callable[..., Tensor]


@dataclass(frozen=True)
class LossSpec:
    """A member of the family: its function and what the engine must know about it.

    Attributes:
        name: that of the function.
        fn: ``fn(LossInputs, **options) -> (P,)``.
        separable: a pair's loss depends on that pair alone.
        needs_reference: it reads the reference's log-probs.
        difference: "sum" or "mean" if it depends on log-probs only through chosen minus rejected (sums or averages).
        averages: it divides by numbers of tokens.
        beta_positive: beta = 0 is refused.
        limits: closed intervals of options.
        scores: it reads log-probs only as log-ratios to the reference, so that an f-divergence may take their place.
        by_pair: options that may be ``(P,)`` tensors.
        from_engine: parameters that the engine fills in, which nobody can give.
        nll_weight: default of the modifier of that name.
    """

    name: str
    fn: LossFunction
    separable: bool = True
    needs_reference: bool = True
    difference: str | None = None
    averages: bool = False
    beta_positive: bool = False
    limits: dict[str, tuple[float, float]] = field(default_factory=dict)
    scores: bool = False
    by_pair: tuple[str, ...] = ()
    filled_by_engine: tuple[str, ...] = ()
    nll_weight: float = 0.0

    @property
    def options(self) -> tuple[str, ...]:
        """Names of the keyword options that the function takes."""
        parameters = inspect.signature(self.fn).parameters.values()
        names = (p.name for p in parameters if p.kind is inspect.Parameter.KEYWORD_ONLY)
        return tuple(name for name in names if name not in self.filled_by_engine)

    @property
    def defaults(self) -> dict[str, Any]:
        """Default values of the options."""
        parameters = inspect.signature(self.fn).parameters
        return {name: parameters[name].default for name in self.options}


LOSSES: dict[str, LossSpec] = {}


def register(**facts: Any) -> Callable[[LossFunction], LossFunction]:
    """Enter the decorated function into the family under its own name."""

    def enter(fn: LossFunction) -> LossFunction:
        LOSSES[fn.__name__] = LossSpec(name=fn.__name__, fn=fn, **facts)
        return fn

    return enter
