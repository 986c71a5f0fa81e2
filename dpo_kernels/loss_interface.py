"""What a loss sees, and what the engine asks of it."""

from collections.abc import Sequence
from typing import NamedTuple, Protocol

from torch import Tensor


class LossInputs(NamedTuple):
    """What a loss sees: ``(P,)`` sequence log-probs and token counts (floating point), and beta."""

    policy_chosen_logps: Tensor
    policy_rejected_logps: Tensor
    ref_chosen_logps: Tensor
    ref_rejected_logps: Tensor
    chosen_tokens: Tensor
    rejected_tokens: Tensor
    beta: float


class SequenceLoss(Protocol):
    """A loss bound to its options, as strategies see it: a function of sequences, example by example.

    An example is what has one loss: a pair, a group of ranked completions, or one sequence alone.
    """

    @property
    def beta(self) -> float:
        """Inverse temperature."""

    @property
    def separable(self) -> bool:
        """Whether an example's loss depends on that example alone."""

    @property
    def is_callable(self) -> bool:
        """Whether the loss is a user's function, which has no name that an operator could carry."""

    def bounds(self, sequences: int) -> Sequence[int]:
        """The first sequence of each example in turn, then ``sequences``."""

    @property
    def difference(self) -> str | None:
        """Whether examples are pairs, and one coefficient serves a pair.

        "sum" or "mean" if the loss depends on log-probs only through chosen minus rejected sums or averages; None if
        the two sides have coefficients of their own.
        """

    @property
    def sigmoid(self) -> tuple[float, float] | None:
        """(beta, label smoothing) if the loss is DPO's, which a backend may do in one kernel."""

    def of_examples(self, first: int, last: int) -> "SequenceLoss":
        """The loss of examples ``first..last-1`` alone, where it differs by example."""

    def value_and_grad(self, policy_S: Tensor, ref_S: Tensor, counts_S: Tensor) -> tuple[Tensor, Tensor]:
        """Losses by example and the derivative of their sum by the policy's sequence log-probs ``(S,)``."""

    def __call__(self, policy_S: Tensor, ref_S: Tensor, counts_S: Tensor) -> Tensor:
        """Losses by example, differentiable by the log-probs."""
