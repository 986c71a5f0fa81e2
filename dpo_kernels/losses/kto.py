"""Losses of single labelled sequences: KTO and unpaired BCO. Each sequence is an example of its own.

In the docstrings ``x`` is the log-ratio ``logp - ref`` of a sequence, ``b`` is beta and ``s`` is the logistic function.
"""

from collections.abc import Sequence
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from dpo_kernels.losses.base import UnnamedLoss
from dpo_kernels.records import dataclass

KTO_LOSSES = ("kto", "bco")


# eq=False keeps the hash by identity: torch 2.11 hashes an object whose call it traces, before it has its fields.
@dataclass(frozen=True, eq=False)
class LabelledLoss(UnnamedLoss):
    """KTO or unpaired BCO, bound to the labels of a batch; satisfies ``SequenceLoss``.

    KTO is ``w_d [1 - s(b x - z0)]`` for a desirable sequence and ``w_u [1 - s(z0 - b x)]`` for an undesirable one, with
    ``z0 = b max(0, kl)``, which has no gradient (Ethayarajh et al., arXiv 2402.01306, eq. 8).
    BCO is ``-w_d log s(b x - d)`` and ``-w_u log s(d - b x)`` with the reward shift d (Jung et al., arXiv 2404.04656).

    Attributes:
        name: "kto" or "bco".
        beta: inverse temperature, at least 0.
        desirable_S: ``(S,)`` bool, true where a sequence is desirable.
        weights_S: ``(S,)`` float64, ``w_d`` or ``w_u`` of each sequence.
        shift: 0-d float64, ``z0`` for KTO and ``d`` for BCO.
    """

    name: str
    beta: float
    desirable_S: Tensor
    weights_S: Tensor
    shift: Tensor

    def bounds(self, sequences: int) -> Sequence[int]:
        """See ``SequenceLoss``: every sequence is an example."""
        return range(sequences + 1)

    def of_examples(self, first: int, last: int) -> "LabelledLoss":
        """See ``SequenceLoss``."""
        return replace(self, desirable_S=self.desirable_S[first:last], weights_S=self.weights_S[first:last])

    def __call__(self, policy_S: Tensor, ref_S: Tensor, counts_S: Tensor, kl_S: Tensor | None = None) -> Tensor:
        """Return the losses ``(S,)``."""
        margin = self.beta * (policy_S - ref_S) - self.shift.to(policy_S.dtype)
        signed = torch.where(self.desirable_S, margin, -margin)
        losses = (-signed).sigmoid() if self.name == "kto" else -F.logsigmoid(signed)
        return losses * self.weights_S.to(losses.dtype)
