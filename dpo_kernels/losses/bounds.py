"""Bounds on arguments of losses, with one subgradient at the bound in every release of torch.

``Tensor.clamp`` passes the gradient on at its bound up to torch 2.13 and drops it from 2.14 on. ORPO's two forms of
``log(1 - exp(a))`` meet at such a bound, and between them they would lose the gradient there.
"""

import torch
from torch import Tensor

LARGEST_EXPONENT = 80.0  # a loss of exp(80) is still finite in float32


def at_most(value: Tensor, bound: float) -> Tensor:
    """``min(value, bound)``; the gradient is 1 up to the bound itself and 0 beyond it. NaN stays NaN."""
    return torch.where(value > bound, bound, value)


def at_least(value: Tensor, bound: float) -> Tensor:
    """``max(value, bound)``; the gradient is 1 down to the bound itself and 0 beyond it. NaN stays NaN."""
    return torch.where(value < bound, bound, value)
