"""The pair order: the caller may stack or interleave pairs, and inside the library they are interleaved."""

import torch
from torch import Tensor

PAIR_ORDERS = ("stacked", "interleaved")
STACKED = PAIR_ORDERS[0]


def to_alternating(values_S: Tensor, stacked: bool, dtype: torch.dtype) -> Tensor:
    """Return values ``(S,)`` of sequences in the caller's order with chosen and rejected alternating, in ``dtype``."""
    if not stacked:
        return values_S.to(dtype)
    out = torch.empty(values_S.shape, dtype=dtype, device=values_S.device)
    out.view(-1, 2).copy_(values_S.view(2, -1).t())
    return out


def to_callers_order(values_S: Tensor, stacked: bool, dtype: torch.dtype) -> Tensor:
    """Return values ``(S,)`` of alternating sequences in the caller's order, in ``dtype``."""
    if not stacked:
        return values_S.to(dtype)
    out = torch.empty(values_S.shape, dtype=dtype, device=values_S.device)
    out.view(2, -1).copy_(values_S.view(-1, 2).t())
    return out
