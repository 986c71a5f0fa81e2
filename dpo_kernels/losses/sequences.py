"""Losses beyond pairs: of single labelled sequences (KTO, BCO) and of groups of ranked ones.

``x`` is the log-ratio ``logp - ref`` of a sequence, ``b`` beta, ``s`` the logistic function. Both kinds satisfy
``SequenceLoss``; units are sequences here, groups there.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from dpo_kernels.losses.binding import recording_gradients

KTO_LOSSES = ("kto", "bco")
GROUP_LOSSES = ("plackett_luce", "infonce")


class _UnnamedLoss:
    """What the losses of this file share: no fused tail, no place in an operator's schema."""

    separable, is_callable, difference, sigmoid = True, True, None, None

    def value_and_grad(self, policy_S: Tensor, ref_S: Tensor, counts_S: Tensor) -> tuple[Tensor, Tensor]:
        """Losses by unit and the derivative of their sum by ``policy_S``; detached."""
        with recording_gradients():
            leaf_S = policy_S.detach().requires_grad_()
            losses = self(leaf_S, ref_S, counts_S)
            (grad_S,) = torch.autograd.grad(losses.sum(), leaf_S)
        return losses.detach(), grad_S

    def __call__(self, policy_S: Tensor, ref_S: Tensor, counts_S: Tensor) -> Tensor:
        """Losses by unit."""
        raise NotImplementedError


@dataclass(frozen=True, eq=False)  # torch 2.11 hashes what it traces a call of
class LabelledLoss(_UnnamedLoss):
    """KTO and BCO: a loss of each sequence by itself.

    KTO (Ethayarajh et al., arXiv 2402.01306, eq. 8): ``w_d [1 - s(b x - z0)]`` for a desirable sequence,
    ``w_u [1 - s(z0 - b x)]`` for an undesirable one, ``z0 = b max(0, kl)`` without gradient.
    BCO (Jung et al., arXiv 2404.04656): ``-w_d log s(b x - d)`` and ``-w_u log s(d - b x)`` with the reward shift d.
    """

    name: str
    beta: float
    desirable_S: Tensor  # bool
    weights_S: Tensor  # float64, w_d or w_u
    shift: Tensor  # () float64: z0, or d

    def bounds(self, sequences: int) -> Sequence[int]:
        """See ``SequenceLoss``: one by one."""
        return range(sequences + 1)

    def of_examples(self, first: int, last: int) -> "LabelledLoss":
        """See ``SequenceLoss``."""
        return replace(self, desirable_S=self.desirable_S[first:last], weights_S=self.weights_S[first:last])

    def __call__(self, policy_S: Tensor, ref_S: Tensor, counts_S: Tensor) -> Tensor:
        """Losses ``(S,)``."""
        margin = self.beta * (policy_S - ref_S) - self.shift.to(policy_S.dtype)
        signed = torch.where(self.desirable_S, margin, -margin)
        losses = (-signed).sigmoid() if self.name == "kto" else -F.logsigmoid(signed)
        return losses * self.weights_S.to(losses.dtype)


@dataclass(frozen=True, eq=False)
class GroupLoss(_UnnamedLoss):
    """Plackett and Luce, and InfoNCE: a loss of each group of sequences, the best first.

    Plackett-Luce (Rafailov et al., arXiv 2305.18290, appendix A.3): the negative log-probability of the whole ranking,
    ``-sum over k of log [exp(b x_k) / sum over j >= k of exp(b x_j)]``. InfoNCE (Chen et al., arXiv 2402.05369):
    ``-log [exp(b x_0) / sum over j of exp(b x_j)]``, one chosen against all others. With two sequences both are DPO.
    """

    name: str
    beta: float
    sizes: tuple[int, ...]

    def bounds(self, sequences: int) -> Sequence[int]:
        """See ``SequenceLoss``: groups."""
        ends = [0]
        for size in self.sizes:
            ends.append(ends[-1] + size)
        return ends

    def of_examples(self, first: int, last: int) -> "GroupLoss":
        """See ``SequenceLoss``."""
        return replace(self, sizes=self.sizes[first:last])

    def __call__(self, policy_S: Tensor, ref_S: Tensor, counts_S: Tensor) -> Tensor:
        """Losses ``(G,)``."""
        scores = (self.beta * (policy_S - ref_S)).split(list(self.sizes))
        return torch.stack([self._of_one(group) for group in scores]) if scores else policy_S[:0]

    def _of_one(self, scores: Tensor) -> Tensor:
        if self.name == "infonce":
            return scores.logsumexp(0) - scores[0]
        remaining = scores.flip(0).logcumsumexp(0).flip(0)  # of the ones ranked k and below
        return (remaining - scores).sum()
