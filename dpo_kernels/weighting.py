"""Weights that methods put on tokens and pairs: LD-DPO's and WPO's."""

import torch
from torch import Tensor

from dpo_kernels.checks import check_choice, check_number, check_tensor
from dpo_kernels.types import DPOLossOutput

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
    check_choice("pairs", pairs, PAIRS)
    check_tensor("labels", labels)
    if not 0.0 <= check_number("alpha", alpha) <= 1.0:
        raise ValueError(f"alpha must lie in [0, 1], got {alpha}")
    if cu_seqlens is None:
        if labels.dim() != 2:
            raise ValueError(f"labels has shape {tuple(labels.shape)}, expected (2B, T), or (N,) with cu_seqlens")
        sequences, width = labels.shape
        starts = torch.arange(sequences, device=labels.device) * width
        segments = torch.arange(sequences, device=labels.device).repeat_interleave(width)
    else:
        sequences = cu_seqlens.shape[0] - 1
        starts = cu_seqlens[:-1].to(torch.int64)
        positions = torch.arange(labels.shape[0], device=labels.device)
        segments = torch.searchsorted(cu_seqlens.to(torch.int64), positions, right=True) - 1
    if sequences % 2:
        raise ValueError(f"labels holds {sequences} sequences, an odd number: pairs need two each")
    flat = labels.reshape(-1)
    scored = flat != ignore_index
    if shift:
        scored = scored & (torch.arange(flat.shape[0], device=flat.device) != starts[segments])
    so_far = torch.cat([scored.new_zeros(1, dtype=torch.int64), scored.cumsum(0)])
    rank = so_far[:-1] - so_far[starts][segments]
    ends = torch.cat([starts[1:], starts.new_tensor([flat.shape[0]])])
    counts = so_far[ends] - so_far[starts]
    by_pair = counts.view(2, -1) if pairs == "stacked" else counts.view(-1, 2).t()
    shared = by_pair.amin(dim=0)
    shared_S = torch.cat([shared, shared]) if pairs == "stacked" else shared.repeat_interleave(2)
    one = torch.ones((), dtype=torch.float32, device=flat.device)
    return torch.where(rank < shared_S[segments], one, alpha * one).view(labels.shape)


def wpo_pair_weights(out: DPOLossOutput, pairs: str = "stacked") -> Tensor:
    """Pair weights of WPO (Zhou et al., arXiv 2406.11827): how likely the policy itself is to write the pair.

    The product over both sides of ``exp(mean over tokens of [log p(y_t) - log sum_v p(v)^2])``, each at most 1, from a
    result that was asked for ``stats=("log_sum_p2",)``: ``(P,)`` float32, for ``pair_weights``. A pass without gradient
    gives it for one GEMM unit.
    """
    check_choice("pairs", pairs, PAIRS)
    if "log_sum_p2" not in out.stats:
        raise ValueError("wpo_pair_weights needs stats=('log_sum_p2',) in the call that made `out`")
    aligned, tokens = (out.stats[name] for name in ("log_sum_p2", "tokens"))
    split = (lambda s: s.chunk(2)) if pairs == "stacked" else (lambda s: (s[0::2], s[1::2]))
    weights = torch.ones_like(out.chosen_logps)
    for logps, norm, count in zip((out.chosen_logps, out.rejected_logps), split(aligned), split(tokens), strict=True):
        weights = weights * torch.exp(logps / count.clamp(min=1) - norm).clamp(max=1.0)
    return weights.detach()
