"""Weights of tokens and pairs: those of LD-DPO and of WPO."""

import math

import torch
from torch import Tensor

from dpo_kernels.checks import (
    INDEX_DTYPES,
    check_choice,
    check_cumulative,
    check_flag,
    check_integer,
    check_number,
    check_tensor,
    has_values,
)
from dpo_kernels.outputs import DPOLossOutput

PAIRS = ("stacked", "interleaved")


def ld_token_weights(
    labels: Tensor,
    alpha: float,
    *,
    cu_seqlens: Tensor | None = None,
    pairs: str = "stacked",
    shift: bool = False,
    ignore_index: int = -100,
) -> Tensor:
    """Return the token weights of LD-DPO (Liu et al., arXiv 2409.06411).

    Let l be the number of scored tokens of the shorter side of a pair. The first l scored tokens of both sides have the
    weight 1, and those beyond have the weight ``alpha``. A sequence's log-prob is then ``sum of its first l + alpha *
    sum of the rest``.

    Args:
        labels: ``(2B, T)``, or ``(N,)`` with ``cu_seqlens``, int32 or int64.
        alpha: weight in [0, 1]. With 1 the loss is DPO.
        cu_seqlens: ``(2B + 1,)`` int32 or int64, the cumulative lengths of packed sequences.
        pairs: "stacked" or "interleaved", as in the call of the loss.
        shift: whether the call of the loss shifts the labels. The first label of a sequence is then not scored.
        ignore_index: label of positions that are not scored.

    Returns:
        float32 in the shape of ``labels``, for the argument ``token_weights``. All weights are NaN if ``cu_seqlens`` is
        wrong where a check would force a host sync: on a GPU, and under ``torch.compile``.

    Raises:
        TypeError: ``labels`` or ``cu_seqlens`` is not an integer tensor, or another argument has the wrong type.
        ValueError: shapes or devices do not fit, or the number of sequences is odd. ``alpha`` is not in [0, 1], or
            ``pairs`` is unknown. ``cu_seqlens`` on the CPU does not rise from 0 to N.

    Example:
        The chosen completion has three tokens and the rejected one has two, so the third has the weight ``alpha``.

        >>> import torch
        >>> from dpo_kernels import ld_token_weights
        >>> labels = torch.tensor([[-100, 5, 6, 7], [-100, 8, 9, -100]])
        >>> ld_token_weights(labels, alpha=0.25)[labels != -100]
        tensor([1.0000, 1.0000, 0.2500, 1.0000, 1.0000])

    """
    _check_ld_arguments(labels, alpha, cu_seqlens, pairs, shift, ignore_index)
    rows = labels.numel()
    place = torch.arange(rows, device=labels.device)
    broken = torch.zeros((), dtype=torch.bool, device=labels.device)
    if cu_seqlens is None:
        sequences, width = labels.shape
        bounds = torch.arange(sequences + 1, device=labels.device) * width
    else:
        sequences, bounds = cu_seqlens.shape[0] - 1, cu_seqlens.to(torch.int64)
        broken = (bounds[0] != 0) | (bounds[-1] != rows) | (bounds.diff() < 0).any()
        # Reading the values on a GPU would be a host sync. The bounds are clamped, so wrong ones make NaN and no access
        # out of bounds.
        bounds = bounds.clamp(0, rows)
    if sequences == 0 or rows == 0:
        return torch.ones(labels.shape, dtype=torch.float32, device=labels.device).masked_fill(broken, math.nan)
    segments = (torch.searchsorted(bounds, place, right=True) - 1).clamp(0, sequences - 1)
    scored = labels.reshape(-1) != ignore_index
    if shift:
        scored = scored & (place != bounds[segments])
    so_far = torch.cat([scored.new_zeros(1, dtype=torch.int64), scored.cumsum(0)])
    rank = so_far[:-1] - so_far[bounds[segments]]
    counts = so_far[bounds].diff()
    by_pair = counts.view(2, -1) if pairs == "stacked" else counts.view(-1, 2).t()
    shared = by_pair.amin(dim=0)
    shared_S = torch.cat([shared, shared]) if pairs == "stacked" else shared.repeat_interleave(2)
    one = torch.ones((), dtype=torch.float32, device=labels.device)
    weights = torch.where(rank < shared_S[segments], one, alpha * one)
    return weights.masked_fill(broken, math.nan).view(labels.shape)


def _check_ld_arguments(
    labels: Tensor, alpha: float, cu_seqlens: Tensor | None, pairs: str, shift: bool, ignore_index: int
) -> None:
    check_choice("pairs", pairs, PAIRS)
    check_flag("shift", shift)
    check_integer("ignore_index", ignore_index)
    if not 0.0 <= check_number("alpha", alpha) <= 1.0:
        raise ValueError(f"alpha must lie in [0, 1], got {alpha}")
    _check_index_tensor("labels", labels)
    if cu_seqlens is None:
        if labels.dim() != 2:
            raise ValueError(f"labels has shape {tuple(labels.shape)}, expected (2B, T), or (N,) with cu_seqlens")
        sequences = labels.shape[0]
    else:
        if labels.dim() != 1:
            raise ValueError(f"labels has shape {tuple(labels.shape)}, expected (N,) when cu_seqlens is given")
        _check_cu_seqlens(cu_seqlens, labels)
        sequences = cu_seqlens.shape[0] - 1
    if sequences % 2:
        raise ValueError(f"labels holds {sequences} sequences, an odd number: pairs need two each")


def _check_index_tensor(name: str, tensor: Tensor) -> None:
    check_tensor(name, tensor)
    if tensor.dtype not in INDEX_DTYPES:
        raise TypeError(f"{name} must be int32 or int64, got {tensor.dtype}")


def _check_cu_seqlens(cu_seqlens: Tensor, labels: Tensor) -> None:
    _check_index_tensor("cu_seqlens", cu_seqlens)
    if cu_seqlens.dim() != 1 or cu_seqlens.shape[0] < 1:
        raise ValueError(f"cu_seqlens must have shape (2B + 1,), got {tuple(cu_seqlens.shape)}")
    if cu_seqlens.device != labels.device:
        raise ValueError(f"cu_seqlens is on {cu_seqlens.device} but labels is on {labels.device}: move one of them")
    if cu_seqlens.device.type != "cpu" or not has_values(cu_seqlens):
        return
    check_cumulative(cu_seqlens.tolist(), labels.shape[0], "labels")


def wpo_pair_weights(out: DPOLossOutput, pairs: str = "stacked", *, largest: float | None = None) -> Tensor:
    """Return the pair weights of WPO: how likely the policy is to write both completions of a pair.

    The weight is the product over both sides of ``exp(mean over tokens of [log p(y_t) - log sum_v p(v)^2])`` (Zhou et
    al., arXiv 2406.11827, eq. 2). It exceeds 1 if the policy prefers the tokens of both sides. By default it has no
    bound, as in TRL 1.16.

    Args:
        out: result of a call with ``stats=("log_sum_p2",)`` and without ``token_weights``, which would change the
            means. A call without gradient takes one GEMM pass.
        pairs: "stacked" or "interleaved", as in that call.
        largest: upper bound of the product, > 0, or None. The authors' code bounds it by 1, and earlier releases of TRL
            did.

    Returns:
        ``(P,)`` in the dtype of the log-probs, without gradient, for the argument ``pair_weights``.

    Raises:
        TypeError: ``out`` is not a ``DPOLossOutput``, or ``largest`` is not a number.
        ValueError: ``out`` lacks the statistic, ``pairs`` is unknown, or ``largest`` is not above 0.

    Example:
        The next token is one of three, with probabilities 1/2, 1/4 and 1/4, whose squares sum to 3/8. The chosen
        completion is the likeliest token and the rejected one is another: ``(1/2) / (3/8) * (1/4) / (3/8) = 8/9``.

        >>> import torch
        >>> from dpo_kernels import fused_dpo_loss, wpo_pair_weights
        >>> hidden = torch.tensor([0.5, 0.25, 0.25]).log().expand(2, 1, 3).contiguous()
        >>> labels = torch.tensor([[0], [1]])
        >>> out = fused_dpo_loss(hidden, torch.eye(3), labels, reference_free=True, stats=("log_sum_p2",))
        >>> wpo_pair_weights(out)
        tensor([0.8889])

    """
    check_choice("pairs", pairs, PAIRS)
    if not isinstance(out, DPOLossOutput):
        raise TypeError(f"out must be the result of fused_dpo_loss, got {type(out).__name__}")
    if "log_sum_p2" not in out.stats:
        raise ValueError("wpo_pair_weights needs stats=('log_sum_p2',) in the call that made `out`")
    if largest is not None and check_number("largest", largest) <= 0:
        raise ValueError(f"largest must be > 0 or None, got {largest}")
    aligned, tokens = (out.stats[name] for name in ("log_sum_p2", "tokens"))
    split = (lambda s: s.chunk(2)) if pairs == "stacked" else (lambda s: (s[0::2], s[1::2]))
    exponent = torch.zeros_like(out.chosen_logps)
    for logps, norm, count in zip((out.chosen_logps, out.rejected_logps), split(aligned), split(tokens), strict=True):
        exponent = exponent + (logps / count.clamp(min=1) - norm)
    return exponent.exp().clamp(max=largest).detach() if largest is not None else exponent.exp().detach()
