"""The interface between the losses and the engine: what a loss sees, and what the engine asks of it."""

from collections.abc import Sequence
from typing import NamedTuple, Protocol

from torch import Tensor


class LossInputs(NamedTuple):
    """What a loss of pairs sees.

    The tensors are ``(P,)`` float64, or float32 on devices without float64.

    Attributes:
        policy_chosen_logps: The policy's log-prob of each chosen sequence.
        policy_rejected_logps: The policy's log-prob of each rejected sequence.
        ref_chosen_logps: The reference's log-prob of each chosen sequence, 0 without a reference.
        ref_rejected_logps: The reference's log-prob of each rejected sequence, 0 without a reference.
        chosen_tokens: The number of scored tokens of each chosen sequence.
        rejected_tokens: The number of scored tokens of each rejected sequence.
        beta: The inverse temperature, a number.
        chosen_kl: The sum over the scored tokens of each chosen sequence of ``KL(reference || policy)``. It is None
            unless the loss asks for it by ``needs_kl``.
        rejected_kl: The same of each rejected sequence, or None.

    Example:
        A loss of one's own is a function of these.

        >>> import torch
        >>> from dpo_kernels import dpo_loss
        >>> def squared(x):
        ...     return (x.policy_chosen_logps - x.policy_rejected_logps - 1) ** 2
        >>> one, two = torch.tensor([-3.0]), torch.tensor([-6.0])
        >>> dpo_loss(one, two, None, None, loss_type=squared, reference_free=True)[0]
        tensor([4.])
    """

    policy_chosen_logps: Tensor
    policy_rejected_logps: Tensor
    ref_chosen_logps: Tensor
    ref_rejected_logps: Tensor
    chosen_tokens: Tensor
    rejected_tokens: Tensor
    beta: float
    chosen_kl: Tensor | None = None
    rejected_kl: Tensor | None = None


class SequenceLoss(Protocol):
    """A loss with its options fixed, as the strategies see it: a function of the sequences' log-probs.

    The loss is a sum over examples. An example is a pair, a group of ranked completions, or one labelled sequence.
    The sequences of an example are adjacent.
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

    @property
    def needs_kl(self) -> bool:
        """Whether the loss reads the KL divergence of the reference from the policy."""

    def bounds(self, sequences: int) -> Sequence[int]:
        """Return the index of each example's first sequence, followed by ``sequences``, their total number."""

    @property
    def difference(self) -> str | None:
        """Whether the examples are pairs of which one coefficient serves both sides.

        It is "sum" if the loss depends on log-probs only through the chosen sum minus the rejected sum. It is "mean"
        if the same holds for averages over tokens. It is None if each sequence has a coefficient of its own.
        """

    @property
    def sigmoid(self) -> tuple[float, float] | None:
        """(beta, label smoothing) if the loss is plain DPO, which a backend may compute in one kernel; else None."""

    def of_examples(self, first: int, last: int) -> "SequenceLoss":
        """Return the loss of examples ``first..last-1`` alone, with their part of its tensors."""

    def value_and_grad(self, policy_S: Tensor, ref_S: Tensor, counts_S: Tensor) -> tuple[Tensor, Tensor]:
        """Return one loss for each example, and the derivative ``(S,)`` of their sum by ``policy_S``."""

    def value_and_grads(
        self, policy_S: Tensor, ref_S: Tensor, counts_S: Tensor, kl_S: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Do ``value_and_grad`` of a loss with ``needs_kl``. The last result is the derivative by ``kl_S``."""

    def __call__(self, policy_S: Tensor, ref_S: Tensor, counts_S: Tensor, kl_S: Tensor | None = None) -> Tensor:
        """Return one loss for each example, differentiable by the log-probs and by the KL divergences."""
