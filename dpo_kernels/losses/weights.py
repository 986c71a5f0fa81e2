"""Weights that methods put on tokens and pairs: LD-DPO's and WPO's."""

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
    """Token weights of LD-DPO (Liu et al., arXiv 2409.06411): ``alpha`` beyond the length that both sides share.

    A sequence's sum is then ``sum of its first l log-probs + alpha * sum of the rest``, l the scored tokens of the
    shorter side of its pair.

    Args:
        labels: as for ``fused_dpo_loss``, ``(2B, T)`` or ``(N,)`` with ``cu_seqlens``.
        alpha: in [0, 1]; 1 is DPO.
        cu_seqlens: ``(2B + 1,)`` of packed sequences.
        pairs: "stacked" or "interleaved".
        shift: whether the call shifts the labels (its first label of a sequence is not scored).
        ignore_index: label of positions that are not scored.

    Returns:
        float32 in the shape of ``labels``, for ``token_weights``.

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
        # On other devices a look at the values would be a sync: wrong ones make NaN, and no access out of bounds.
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
    """Pair weights of WPO (Zhou et al., arXiv 2406.11827): how likely the policy itself is to write the pair.

    The product over both sides of ``exp(mean over tokens of [log p(y_t) - log sum_v p(v)^2])`` (eq. 2), without a
    bound, as in TRL 1.16: where both sides are made of tokens that the policy prefers, it exceeds 1.

    Args:
        out: result of a call with ``stats=("log_sum_p2",)`` and without ``token_weights``, which would weigh the
            means. A pass without gradient gives it for one GEMM unit.
        pairs: "stacked" or "interleaved", as in that call.
        largest: bound of the product, > 0. The authors' own code has 1, and so had TRL.

    Returns:
        ``(P,)`` in the dtype of the log-probs, without gradient, for ``pair_weights``.

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
