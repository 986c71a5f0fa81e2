"""f-divergences that take the place of DPO's reverse KL (Wang et al., arXiv 2309.16240).

Each is a function of a log-ratio ``x = logp - ref``. The loss then sees this score where it would see ``x``.
"""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from dpo_kernels.losses.bounds import LARGEST_EXPONENT, at_most


def reverse_kl(ratio: Tensor, alpha: float) -> Tensor:
    """Return ``x``, which is DPO itself."""
    return ratio


def forward_kl(ratio: Tensor, alpha: float) -> Tensor:
    """Return ``1 - exp(-x)``. The exponent is at most 80."""
    return -torch.expm1(at_most(-ratio, LARGEST_EXPONENT))


def js(ratio: Tensor, alpha: float) -> Tensor:
    """Return ``log 2 + log s(x)``, the score of the Jensen-Shannon divergence; ``s`` is the logistic function."""
    return math.log(2.0) + F.logsigmoid(ratio)


def alpha_divergence(ratio: Tensor, alpha: float) -> Tensor:
    """Return ``(exp((alpha - 1) x) - 1) / (alpha - 1)``. The exponent is at most 80; alpha = 1 is the reverse KL."""
    power = alpha - 1.0
    if power == 0.0:
        return ratio
    return torch.expm1(at_most(power * ratio, LARGEST_EXPONENT)) / power


DIVERGENCES: dict[str, Callable[[Tensor, float], Tensor]] = {
    "reverse_kl": reverse_kl,
    "forward_kl": forward_kl,
    "js": js,
    "alpha": alpha_divergence,
}
