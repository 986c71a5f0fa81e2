"""ms-swift's log-probs of tokens without logits. Nothing of ms-swift is imported."""

from typing import Any

from torch import Tensor

from dpo_kernels.integrations.token_logps import token_logps


def get_per_token_logps(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    label_pad_token_id: int = -100,
    reduction: str = "mean",
    *,
    bias: Tensor | None = None,
    logit_scale: float = 1.0,
    softcap: float | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute what ms-swift's ``get_per_token_logps(logits, labels, ...)`` computes, of one rank's tokens.

    Only scored positions are computed. Under sequence parallelism hand the results to ms-swift's ``GatherLoss``.

    Args:
        hidden: floating point ``(B, T, H)``, or ``(1, N, H)`` without padding.
        weight: floating point ``(V, H)``.
        labels: int64 ``(B, T)``, the token after each position. ms-swift has rolled them.
        label_pad_token_id: the label of positions that are not scored.
        reduction: of the logits of a position, "mean" or "sum".
        bias: ``(V,)``, or None.
        logit_scale: factor on the logits.
        softcap: soft cap of the logits, or None.

    Returns:
        Log-probs ``(B, T)``, reduced logits ``(B, T)`` and the mask ``(B, T)`` of scored positions. The first two are
        float32 and 0 where not scored; ms-swift's have the dtype of the logits. Log-probs are differentiable, and part
        of the graph without a scored position too.

    Raises:
        ValueError: a shape or a value is wrong.
        TypeError: a dtype or a type is wrong.

    Example:
        >>> import torch
        >>> labels = torch.tensor([[1, -100]])
        >>> get_per_token_logps(torch.ones(1, 2, 8), torch.zeros(4, 8), labels)
        (tensor([[-1.3863,  0.0000]]), tensor([[0., 0.]]), tensor([[ True, False]]))

    """
    if labels.shape != hidden.shape[:-1]:
        raise ValueError(f"hidden is {tuple(hidden.shape)}, but labels are {tuple(labels.shape)}")
    if reduction not in ("mean", "sum"):
        raise ValueError(f"unknown reduction {reduction!r}; known: mean, sum")
    mask = labels != label_pad_token_id
    options: dict[str, Any] = {"softcap": softcap, "logit_scale": logit_scale, "outputs": ("mean_logits",)}
    logps, _, _, means, _ = token_logps(hidden[mask], weight, bias, labels[mask], **options)
    assert means is not None, "asked for"
    reduced = means if reduction == "mean" else means * weight.shape[0]
    zeros = logps.new_zeros(mask.shape)
    return zeros.masked_scatter(mask, logps), zeros.to(reduced.dtype).masked_scatter(mask, reduced), mask
