"""The order of sequences: all chosen first or alternating outside, always alternating inside."""

import torch
from torch import Tensor

PAIR_ORDERS = ("stacked", "interleaved")
STACKED = PAIR_ORDERS[0]


def to_alternating(values_S: Tensor, stacked: bool) -> Tensor:
    """From the caller's order to chosen and rejected alternating, ``(S,)``."""
    return values_S.view(2, -1).t().reshape(-1) if stacked else values_S


def to_callers_order(values_S: Tensor, stacked: bool) -> Tensor:
    """The inverse of ``to_alternating``, on the last dimension."""
    return torch.cat([values_S[..., 0::2], values_S[..., 1::2]], dim=-1) if stacked else values_S
