"""Which positions of a batch the self-check of a head compares."""

from typing import Any

import torch
from torch import Tensor

# The self-check compares this many sequences, and this many positions of each.
ROWS, POSITIONS = 2, 8


def kept(mask: Any, shape: torch.Size) -> tuple[Tensor, Tensor]:
    """Choose which sequences ``(R,)`` and positions ``(R, POSITIONS)`` of ``shape`` ``(B, T)`` are compared.

    They are CPU indices: the last positions that are no padding, of the first sequences that have the most of them.
    Padding is left out because anything may stand there, NaN included. A sequence with fewer positions repeats them, so
    that of a single position both the natural and the stretched logits are compared.

    Args:
        mask: the attention mask, or anything else, which then masks nothing.
        shape: ``(B, T)``.

    Returns:
        Rows and positions, integer tensors.

    Example:
        >>> kept(torch.tensor([[1, 1, 0]]), torch.Size([1, 3]))[1].tolist()
        [[0, 1, 0, 1, 0, 1, 0, 1]]

    """
    chosen = torch.ones(shape, dtype=torch.bool, device="cpu")
    if isinstance(mask, Tensor) and (mask.shape == shape or (shape[0] == 1 and mask.numel() == shape[1])):
        chosen = (mask != 0).cpu().reshape(shape)
    most = chosen.sum(dim=1).clamp(max=POSITIONS)
    rows = torch.argsort(most, descending=True, stable=True)[:ROWS]
    rows = rows[most[rows] > 0]
    slots = torch.arange(POSITIONS, device="cpu")
    columns = [chosen[row].nonzero()[-POSITIONS:, 0] for row in rows]
    places = [some[slots % len(some)] for some in columns]
    return rows, torch.stack(places) if places else torch.zeros(0, POSITIONS, dtype=torch.long, device="cpu")


def taken(hidden: Tensor, places: tuple[Tensor, Tensor]) -> Tensor:
    """Take the compared positions of hidden states.

    Args:
        hidden: ``(B, T, H)`` or ``(T, H)``.
        places: what ``kept`` returns.

    Returns:
        ``(R, POSITIONS, H)`` or ``(POSITIONS, H)``.

    Example:
        >>> taken(torch.zeros(1, 3, 4), kept(None, torch.Size([1, 3]))).shape
        torch.Size([1, 8, 4])

    """
    rows, columns = places
    return hidden[rows[:, None], columns] if hidden.dim() > 2 else hidden[columns[0]]


def stretched(hidden: Tensor, factor: float) -> Tensor:
    """Multiply every other position by a factor.

    Args:
        hidden: ``(R, POSITIONS, ..., H)`` or ``(POSITIONS, H)``.
        factor: the factor.

    Returns:
        A tensor of the same shape.

    Example:
        >>> stretched(torch.ones(8, 1), 3.0)[:, 0].tolist()
        [1.0, 3.0, 1.0, 3.0, 1.0, 3.0, 1.0, 3.0]

    """
    odd = torch.arange(POSITIONS, device=hidden.device) % 2 == 1
    return torch.where(odd.view(-1, *[1] * max(1, hidden.dim() - 2)), hidden * factor, hidden)
