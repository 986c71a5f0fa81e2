"""The family of preference losses: pure functions of sequence log-probs that know no vocabulary.

``pairwise`` has those with a reference, ``reference_free`` the others, ``divergence`` the scores of f-divergences;
``registry`` says what the engine must know about each, ``binding`` makes one function of a name and its options. A loss
sees ``LossInputs`` (``(P,)`` float64 tensors) and returns ``(P,)``; its derivative is torch autograd on these few
numbers. To add one: a function, a row in ``tests/test_losses.py``, a row in the README's table.
"""

from dpo_kernels.losses import pairwise, reference_free  # they enter themselves
from dpo_kernels.losses.binding import BoundLoss, Loss, bind, decode, fit_to_batch
from dpo_kernels.losses.registry import LOSSES, LossSpec, register

__all__ = [
    "LOSSES",
    "BoundLoss",
    "Loss",
    "LossSpec",
    "bind",
    "decode",
    "fit_to_batch",
    "pairwise",
    "reference_free",
    "register",
]
