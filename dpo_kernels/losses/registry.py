"""The register of the losses of pairs: each loss's function and the properties that the engine relies on.

``LOSSES`` maps the name that ``loss_type`` takes to a ``LossSpec``:

>>> from dpo_kernels import LOSSES
>>> LOSSES["simpo"].needs_reference
False
>>> LOSSES["odpo"].options
('margin', 'label_smoothing')
"""

import inspect
from collections.abc import Callable
from dataclasses import field
from typing import Any

from torch import Tensor

from dpo_kernels.records import dataclass

LossFunction = Callable[..., Tensor]


@dataclass(frozen=True)
class LossSpec:
    """A loss of pairs: its function and the properties that the engine relies on. ``register`` makes one.

    Attributes:
        name: name of the loss, which is that of its function.
        fn: ``fn(LossInputs, **options) -> (P,)``, differentiable by the policy's log-probs.

    The other attributes are the arguments of ``register``, which explains them.
    """

    name: str
    fn: LossFunction
    separable: bool = True
    needs_reference: bool = True
    needs_kl: bool = False
    difference: str | None = None
    averages: bool = False
    beta_positive: bool = False
    limits: dict[str, tuple[float, float]] = field(default_factory=dict)
    uses_log_ratios_only: bool = False
    by_pair: tuple[str, ...] = ()
    filled_by_engine: tuple[str, ...] = ()
    nll_weight: float = 0.0
    # Default value of each keyword option of the function; ``inspect.Parameter.empty`` where it must be given.
    defaults: dict[str, Any] = field(init=False)
    options: tuple[str, ...] = field(init=False)  # their names

    def __post_init__(self) -> None:
        parameters = inspect.signature(self.fn).parameters.values()
        given = [p for p in parameters if p.kind is inspect.Parameter.KEYWORD_ONLY]
        defaults = {p.name: p.default for p in given if p.name not in self.filled_by_engine}
        object.__setattr__(self, "defaults", defaults)
        object.__setattr__(self, "options", tuple(defaults))


LOSSES: dict[str, LossSpec] = {}


def register(
    *,
    separable: bool = True,
    needs_reference: bool = True,
    needs_kl: bool = False,
    difference: str | None = None,
    averages: bool = False,
    beta_positive: bool = False,
    limits: dict[str, tuple[float, float]] | None = None,
    uses_log_ratios_only: bool = False,
    by_pair: tuple[str, ...] = (),
    filled_by_engine: tuple[str, ...] = (),
    nll_weight: float = 0.0,
) -> Callable[[LossFunction], LossFunction]:
    """Enter the decorated function into ``LOSSES`` under its own name.

    The function takes ``LossInputs``, whose tensors have the shape ``(P,)``, and its options as keyword-only arguments.
    It returns one loss for each pair, ``(P,)``. torch autograd differentiates it. The properties are not checked when
    the loss runs; ``tests/losses/test_losses.py`` tries them.

    Args:
        separable: whether a pair's loss depends on that pair alone. The engine computes the loss and its gradient chunk
            by chunk only then.
        needs_reference: whether the loss reads the reference's log-probs.
        needs_kl: whether the loss reads ``chosen_kl`` or ``rejected_kl``. The call then needs ``ref_hidden``.
        difference: "sum" if the loss depends on log-probs only through the chosen sum minus the rejected sum, "mean" if
            the same holds for averages over tokens, else None.
        averages: whether the loss divides by numbers of tokens.
        beta_positive: whether ``beta = 0`` is an error.
        limits: closed interval ``(low, high)`` of each option that has one.
        uses_log_ratios_only: whether the loss reads log-probs only as log-ratios to the reference. It then takes the
            options ``f_divergence`` and ``f_alpha``.
        by_pair: names of the options that may be ``(P,)`` tensors.
        filled_by_engine: names of the parameters that the engine fills in and nobody can pass.
        nll_weight: default of the option ``nll_weight``, which every loss has.

    Returns:
        A decorator that returns the function as it is.

    Raises:
        TypeError: a property has a name that is not listed here.

    Example:
        >>> import torch
        >>> from dpo_kernels import LOSSES, dpo_loss
        >>> from dpo_kernels.losses import register
        >>> @register(difference="sum", uses_log_ratios_only=True, limits={"power": (1.0, 4.0)})
        ... def shortfall(x, *, power=2.0):
        ...     '''Penalise a margin below 1 by a power of what it lacks.'''
        ...     chosen = x.policy_chosen_logps - x.ref_chosen_logps
        ...     rejected = x.policy_rejected_logps - x.ref_rejected_logps
        ...     return (1.0 - x.beta * (chosen - rejected)).clamp(min=0).pow(power)
        >>> chosen, rejected, reference = torch.tensor([-3.0]), torch.tensor([-5.0]), torch.tensor([-4.0])
        >>> losses, _, _ = dpo_loss(chosen, rejected, reference, reference, loss_type="shortfall", beta=0.25)
        >>> losses
        tensor([0.2500])
        >>> del LOSSES["shortfall"]  # so that the example leaves nothing behind

    """

    def enter(fn: LossFunction) -> LossFunction:
        LOSSES[fn.__name__] = LossSpec(
            name=fn.__name__,
            fn=fn,
            separable=separable,
            needs_reference=needs_reference,
            needs_kl=needs_kl,
            difference=difference,
            averages=averages,
            beta_positive=beta_positive,
            limits=limits or {},
            uses_log_ratios_only=uses_log_ratios_only,
            by_pair=by_pair,
            filled_by_engine=filled_by_engine,
            nll_weight=nll_weight,
        )
        return fn

    return enter
