"""Losses of groups of ranked sequences: Plackett-Luce and InfoNCE. Each group is an example.

In the docstrings ``x`` is the log-ratio ``logp - ref`` of a sequence and ``b`` is beta.
"""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from dpo_kernels.losses.base import UnnamedLoss
from dpo_kernels.records import dataclass

GROUP_LOSSES = ("plackett_luce", "infonce")


# eq=False keeps the hash by identity: torch 2.11 hashes an object whose call it traces, before it has its fields.
@dataclass(frozen=True, eq=False)
class GroupLoss(UnnamedLoss):
    """Plackett-Luce or InfoNCE, bound to the group sizes of a batch; satisfies ``SequenceLoss``.

    The best sequence of a group comes first. Plackett-Luce is the negative log-probability of the whole ranking,
    ``-sum over k of log [exp(b x_k) / sum over j >= k of exp(b x_j)]`` (Rafailov et al., arXiv 2305.18290,
    appendix A.3). InfoNCE contrasts the first sequence with all others: ``-log [exp(b x_0) / sum over j of
    exp(b x_j)]`` (Chen et al., arXiv 2402.05369). For a group of two sequences both equal DPO.

    Attributes:
        name: "plackett_luce" or "infonce".
        beta: inverse temperature, at least 0.
        sizes: number of sequences in each of the G groups.
    """

    name: str
    beta: float
    sizes: tuple[int, ...]

    def bounds(self, sequences: int) -> Sequence[int]:
        """See ``SequenceLoss``: every group is an example."""
        ends = [0]
        for size in self.sizes:
            ends.append(ends[-1] + size)
        return ends

    def of_examples(self, first: int, last: int) -> "GroupLoss":
        """See ``SequenceLoss``."""
        return replace(self, sizes=self.sizes[first:last])

    def __call__(self, policy_S: Tensor, ref_S: Tensor, counts_S: Tensor, kl_S: Tensor | None = None) -> Tensor:
        """Return the losses ``(G,)``."""
        scores = (self.beta * (policy_S - ref_S)).split(list(self.sizes))
        return torch.stack([self._of_one(group) for group in scores]) if scores else policy_S[:0]

    def _of_one(self, scores: Tensor) -> Tensor:
        if self.name == "infonce":
            return scores.logsumexp(0) - scores[0]
        remaining = scores.flip(0).logcumsumexp(0).flip(0)  # over the sequences ranked k and below
        return (remaining - scores).sum()
