"""The losses: pure functions of the sequences' log-probs, which know nothing of tokens, logits or vocabularies.

- ``pairwise`` has the losses of pairs with a reference, ``reference_free`` those without one, and ``token_level`` those
  that read a KL divergence. ``divergence`` has the scores of f-divergences.
- ``registry`` keeps the properties of each loss of pairs. ``bind`` checks a name and its options and makes a
  ``BoundLoss`` of them.
- ``kto`` has the losses of single labelled sequences, and ``ranked`` those of ranked groups.
- ``estimates``, ``weights`` and ``bradley_terry`` are helpers around the losses.

A loss of pairs sees ``LossInputs``, whose tensors are ``(P,)`` float64, and returns ``(P,)``. torch autograd
differentiates it on these few numbers. To add a loss, write a function, a row in ``tests/hand_worked.py`` and a row in
the table of losses in the documentation.
"""

from dpo_kernels.losses import pairwise, reference_free, token_level  # importing them registers their losses
from dpo_kernels.losses.bind import Loss, bind, fit_to_batch, needs_kl
from dpo_kernels.losses.bound_loss import BoundLoss, decode
from dpo_kernels.losses.kto import KTO_LOSSES, LabelledLoss
from dpo_kernels.losses.ranked import GROUP_LOSSES, GroupLoss
from dpo_kernels.losses.registry import LOSSES, LossSpec, register

__all__ = [
    "GROUP_LOSSES",
    "KTO_LOSSES",
    "LOSSES",
    "BoundLoss",
    "GroupLoss",
    "LabelledLoss",
    "Loss",
    "LossSpec",
    "bind",
    "decode",
    "fit_to_batch",
    "needs_kl",
    "pairwise",
    "reference_free",
    "register",
    "token_level",
]
