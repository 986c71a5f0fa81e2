"""The layout of LLaMA-Factory's newer trainer: a chosen and a rejected sequence in one row."""

from typing import Any

import torch
from torch import Tensor

CHOSEN, REJECTED = 1, 2  # token types; 0 is padding


def pairs_in_rows(
    hidden: Tensor, labels: Tensor, token_type_ids: Tensor, ignore_index: int = -100
) -> tuple[Tensor, Tensor, dict[str, Any]]:
    """Describe rows that hold a chosen sequence and then a rejected one to the fused functions.

    Nothing is copied but labels. The first token of a sequence is not scored: what stands before it belongs to another
    sequence or to padding.

    Args:
        hidden: hidden states ``(B, T, H)``.
        labels: int64 ``(B, T)``, not shifted, ``ignore_index`` where not scored. Padding may have any label.
        token_type_ids: integers ``(B, T)``: 1 at the chosen sequence, 2 at the rejected one behind it, 0 at padding
            before or behind them.
        ignore_index: the label of positions that are not scored.

    Returns:
        Hidden states ``(B T, H)``, labels ``(B T,)``, and the keyword arguments that tell a fused function about the
        layout. The sequences are interleaved: chosen, rejected, chosen, and so on.

    Raises:
        ValueError: the shapes differ, or a row does not hold the two sequences in this order. On a GPU the order is
            not looked at, because that would force a sync.

    Example:
        >>> types = torch.tensor([[1, 1, 2, 2, 2, 0]])
        >>> labels = torch.tensor([[4, 5, 5, 6, 7, 0]])
        >>> hidden, labels, layout = pairs_in_rows(torch.zeros(1, 6, 8), labels, types)
        >>> labels, layout["cu_seqlens"]
        (tensor([-100,    5, -100,    6,    7, -100]), tensor([0, 2, 6]))

    """
    if hidden.shape[:-1] != labels.shape or labels.shape != token_type_ids.shape or labels.dim() != 2:
        raise ValueError(
            f"hidden must be (B, T, H), labels and token_type_ids (B, T), got {tuple(hidden.shape)}, "
            f"{tuple(labels.shape)} and {tuple(token_type_ids.shape)}"
        )
    rows, length = labels.shape
    rejected = (token_type_ids == REJECTED).long()
    behind = rejected.cumsum(dim=1) > 0  # at the rejected sequence and behind it
    chosen_behind = (behind & (token_type_ids == CHOSEN)).any()
    if labels.device.type == "cpu" and bool(chosen_behind):
        raise ValueError("token_type_ids must be 1 at the chosen sequence and 2 at the rejected one behind it")
    first = torch.arange(rows, device=labels.device) * length
    starts = torch.stack([first, first + (~behind).sum(dim=1)], dim=1).flatten()
    cu_seqlens = torch.nn.functional.pad(starts, (0, 1), value=rows * length)
    before = torch.nn.functional.pad(token_type_ids[:, :-1], (1, 0))
    kept = labels.masked_fill((token_type_ids == 0) | (token_type_ids != before), ignore_index)
    layout = {"cu_seqlens": cu_seqlens, "pairs": "interleaved", "shift": True}
    return hidden.reshape(-1, hidden.shape[-1]), kept.flatten(), layout
