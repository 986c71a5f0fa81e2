"""Bounds on the arguments of losses, whose gradient at the bound is the same in every release of torch.

At its bound ``Tensor.clamp`` passes the gradient on up to torch 2.13 and drops it from 2.14 on. ORPO needs the former:
its two forms of ``log(1 - exp(a))`` meet at such a bound, where both would drop the gradient.
"""

import torch
from torch import Tensor

# This is the largest exponent that a loss takes. exp(80) = 5.5e34 is finite in float32, whose limit is exp(88.7).
LARGEST_EXPONENT = 80.0


def at_most(value: Tensor, bound: float) -> Tensor:
    """Return ``min(value, bound)``. The gradient is 1 up to the bound itself and 0 above it. NaN stays NaN."""
    return torch.where(value > bound, bound, value)


def at_least(value: Tensor, bound: float) -> Tensor:
    """Return ``max(value, bound)``. The gradient is 1 down to the bound itself and 0 below it. NaN stays NaN."""
    return torch.where(value < bound, bound, value)
