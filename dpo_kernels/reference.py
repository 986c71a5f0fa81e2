"""The oracle: the equations in plain torch, materialising everything. Imports torch only; shares no code.

Every fast path is tested against this file run in float64. Run in the dtype of a model it is the "plain torch" of the
tolerance rule: logits rounded to that dtype, log-softmax in float32 at least, as training code does it.

Rafailov et al., arXiv 2305.18290, eq. 7, with s a sequence's summed log-prob::

    u = beta * [(s_w - ref_w) - (s_l - ref_l)]        loss = -log sigmoid(u)        d loss / d s_w = -beta sigmoid(-u)
"""

from collections.abc import Callable
from itertools import pairwise
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from torch import Tensor


class ReferenceOutput(NamedTuple):
    """The fields of ``DPOLossOutput``."""

    loss: Tensor
    chosen_rewards: Tensor
    rejected_rewards: Tensor
    chosen_logps: Tensor
    rejected_logps: Tensor
    ref_chosen_logps: Tensor
    ref_rejected_logps: Tensor
    stats: dict[str, Tensor]


def token_logps_reference(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    bias: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    shift: bool = False,
    ignore_index: int = -100,
    logit_scale: float = 1.0,
    softcap: float | None = None,
) -> Tensor:
    """Log-prob of each scored label, in the shape of ``labels``, 0 elsewhere."""
    hidden, targets, places = _align(hidden, labels, cu_seqlens, shift, ignore_index)
    keep = targets != ignore_index
    logits = _logits(hidden[keep], weight, bias, logit_scale, softcap)
    scored = logits.log_softmax(-1).gather(-1, targets[keep].long()[:, None])[:, 0]
    return scored.new_zeros(labels.numel()).index_put((places[keep],), scored).view(labels.shape)


def sequence_logps_reference(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    cu_seqlens: Tensor | None = None,
    token_weights: Tensor | None = None,
    **options: Any,
) -> Tensor:
    """Sums ``(S,)`` of the token log-probs, weighted by ``token_weights``."""
    logps = token_logps_reference(hidden, weight, labels, cu_seqlens=cu_seqlens, **options)
    if token_weights is not None:
        logps = logps * token_weights.detach().to(logps.dtype)
    return _sums(logps, cu_seqlens)


def dpo_loss_reference(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    bias: Tensor | None = None,
    ref_hidden: Tensor | None = None,
    ref_weight: Tensor | None = None,
    ref_bias: Tensor | None = None,
    ref_logps: Tensor | None = None,
    reference_free: bool = False,
    loss_type: str | Callable[..., Tensor] = "sigmoid",
    beta: float = 0.1,
    label_smoothing: float = 0.0,
    cu_seqlens: Tensor | None = None,
    pairs: str = "stacked",
    token_weights: Tensor | None = None,
    shift: bool = False,
    ignore_index: int = -100,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    reduction: str = "mean",
    denominator: float | Tensor | None = None,
    stats: tuple[str, ...] = (),
) -> ReferenceOutput:
    """``fused_dpo_loss`` with everything materialised; same arguments but for those that say how to run it.

    Any floating dtype; differentiable as often as torch is. Arguments are taken to be right.
    """
    layout: dict[str, Any] = {"cu_seqlens": cu_seqlens, "shift": shift, "ignore_index": ignore_index}
    cap: dict[str, Any] = {"logit_scale": logit_scale, "softcap": softcap}
    policy = sequence_logps_reference(hidden, weight, labels, bias=bias, token_weights=token_weights, **layout, **cap)
    if ref_hidden is not None:
        if ref_weight is None:
            ref_weight, ref_bias = weight, bias if ref_bias is None else ref_bias
        with torch.no_grad():
            reference = sequence_logps_reference(
                ref_hidden, ref_weight, labels, bias=ref_bias, token_weights=token_weights, **layout, **cap
            )
    elif ref_logps is not None:
        reference = ref_logps.detach().to(policy.dtype)
    else:
        reference = torch.zeros_like(policy)
    _, targets, places = _align(hidden, labels, cu_seqlens, shift, ignore_index)
    scored = torch.zeros(labels.numel(), dtype=policy.dtype, device=labels.device)
    scored[places] = (targets != ignore_index).to(policy.dtype)
    counts = _sums(scored.view(labels.shape), cu_seqlens)
    s_w, s_l = _split(policy, pairs)
    r_w, r_l = _split(reference, pairs)
    n_w, n_l = _split(counts, pairs)
    loss = _loss(loss_type, beta, label_smoothing, s_w, s_l, r_w, r_l, n_w, n_l)
    if reduction != "none":
        loss = loss.sum()
    if reduction == "mean":
        loss = loss / (s_w.shape[0] if denominator is None else denominator)
    measured = _stats(hidden, weight, labels, bias, stats, layout, cap)
    return ReferenceOutput(
        loss,
        (beta * (s_w - r_w)).detach(),
        (beta * (s_l - r_l)).detach(),
        s_w.detach(),
        s_l.detach(),
        r_w,
        r_l,
        {**measured, "tokens": counts},
    )


def _loss(
    loss_type: str | Callable[..., Tensor],
    beta: float,
    label_smoothing: float,
    s_w: Tensor,
    s_l: Tensor,
    r_w: Tensor,
    r_l: Tensor,
    n_w: Tensor,
    n_l: Tensor,
) -> Tensor:
    """Losses by pair. Written out once more, apart from the library's, so that a slip in one is seen."""
    u = beta * ((s_w - r_w) - (s_l - r_l))
    if callable(loss_type):
        return loss_type(
            SimpleNamespace(
                policy_chosen_logps=s_w,
                policy_rejected_logps=s_l,
                ref_chosen_logps=r_w,
                ref_rejected_logps=r_l,
                chosen_tokens=n_w,
                rejected_tokens=n_l,
                beta=beta,
            )
        )
    if loss_type == "sigmoid":
        # -log sigmoid(u) = log(1 + exp(-u)); a preference flipped with probability e costs log(1 + exp(u)).
        # logaddexp, as torch's softplus is off by exp(-20) beyond its threshold.
        kept, flipped = torch.logaddexp(-u, 0 * u), torch.logaddexp(u, 0 * u)
        return (1 - label_smoothing) * kept + label_smoothing * flipped
    if loss_type == "hinge":
        return torch.clamp(1 - u, min=0)
    if loss_type == "ipo":
        per_token = (s_w - r_w) / n_w.clamp(min=1) - (s_l - r_l) / n_l.clamp(min=1)
        return (per_token - 1 / (2 * beta)) ** 2
    raise ValueError(f"the oracle has no loss {loss_type!r}")


def _stats(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: Tensor | None,
    names: tuple[str, ...],
    layout: dict[str, Any],
    cap: dict[str, Any],
) -> dict[str, Tensor]:
    """Means over scored tokens, ``(S,)``, by input sequence."""
    if not names:
        return {}
    cu_seqlens, shift, ignore_index = layout.values()
    hidden, targets, places = _align(hidden, labels, cu_seqlens, shift, ignore_index)
    keep = targets != ignore_index
    with torch.no_grad():
        logits = _logits(hidden[keep], weight, bias, **cap)
        logp = logits.log_softmax(-1)
        token = {
            "entropy": -torch.where(logp == -torch.inf, 0.0, logp.exp() * logp).sum(-1),
            "mean_logits": logits.mean(-1),
            "top1": (logits.argmax(-1) == targets[keep]).to(logits.dtype),
            "log_sum_p2": (2 * logp).logsumexp(-1),
        }
        one = torch.ones_like(token["top1"])
        full = {name: one.new_zeros(labels.numel()).index_put((places[keep],), v) for name, v in token.items()}
        count = _sums(one.new_zeros(labels.numel()).index_put((places[keep],), one).view(labels.shape), cu_seqlens)
        return {name: _sums(full[name].view(labels.shape), cu_seqlens) / count.clamp(min=1) for name in names}


def _logits(hidden: Tensor, weight: Tensor, bias: Tensor | None, logit_scale: float, softcap: float | None) -> Tensor:
    """Final logits of rows, at least float32."""
    logits = torch.nn.functional.linear(hidden, weight, bias)
    logits = logits if logits.dtype == torch.float64 else logits.float()
    if softcap is not None:
        return softcap * torch.tanh(logit_scale * logits / softcap)
    return logit_scale * logits


def _align(
    hidden: Tensor, labels: Tensor, cu_seqlens: Tensor | None, shift: bool, ignore_index: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Hidden rows, the label each predicts, and the place of that label among all; sequence by sequence."""
    flat, rows = labels.reshape(-1), hidden.reshape(-1, hidden.shape[-1])
    bounds = list(range(0, flat.numel() + 1, max(1, labels.shape[-1]))) if cu_seqlens is None else cu_seqlens.tolist()
    places = torch.arange(flat.numel(), device=labels.device)
    if not shift:
        return rows, flat, places
    pieces = [(a, b) for a, b in pairwise(bounds) if b - a > 1]
    if not pieces:
        return rows[:0], flat[:0], places[:0]
    return (
        torch.cat([rows[a : b - 1] for a, b in pieces]),
        torch.cat([flat[a + 1 : b] for a, b in pieces]),
        torch.cat([places[a + 1 : b] for a, b in pieces]),
    )


def _sums(values: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    if cu_seqlens is None:
        return values.sum(-1)
    bounds = cu_seqlens.tolist()
    return torch.stack([values[a:b].sum() for a, b in pairwise(bounds)])


def _split(values: Tensor, pairs: str) -> tuple[Tensor, Tensor]:
    if pairs == "interleaved":
        return values[0::2], values[1::2]
    half = values.shape[0] // 2
    return values[:half], values[half:]
