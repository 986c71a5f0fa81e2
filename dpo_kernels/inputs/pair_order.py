"""The pair order: the caller may stack or interleave pairs, and inside the library they are interleaved."""

import torch
from torch import Tensor

PAIR_ORDERS = ("stacked", "interleaved")
STACKED = PAIR_ORDERS[0]


def to_alternating(values_S: Tensor, stacked: bool) -> Tensor:
    """Return values ``(S,)`` of sequences in the caller's order with chosen and rejected alternating."""
    return values_S.view(2, -1).t().reshape(-1) if stacked else values_S


def to_callers_order(values_S: Tensor, stacked: bool) -> Tensor:
    """Return values ``(..., S)`` of alternating sequences in the caller's order."""
    return torch.cat([values_S[..., 0::2], values_S[..., 1::2]], dim=-1) if stacked else values_S
