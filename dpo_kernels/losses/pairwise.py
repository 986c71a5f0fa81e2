"""Losses of pairs with a reference: one pure function of sequence log-probs each, with its paper and equation.

In the docstrings ``c`` and ``r`` are the log-ratios ``logp - ref`` of the chosen and the rejected sequence, ``n_c`` and
``n_r`` their scored tokens, ``b`` is beta and ``u = b (c - r)``; ``s`` is the logistic function.

DNO (Rosset et al., arXiv 2404.03715) and D2PO (Singhal et al., arXiv 2405.01511) are ``sigmoid`` on other data: pairs
sampled from the policy itself, ranked by a stronger model (DNO) or by a reward model that is kept up to date (D2PO).
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from dpo_kernels.loss_interface import LossInputs
from dpo_kernels.losses.registry import register

SMOOTHING = (0.0, 0.5)
BELOW_HALF = 0.5 - 1e-6
LEAST_SMOOTHING_OF_EXO = 1e-3


def log_ratios(x: LossInputs) -> tuple[Tensor, Tensor]:
    """``(c, r)``."""
    return x.policy_chosen_logps - x.ref_chosen_logps, x.policy_rejected_logps - x.ref_rejected_logps


def averages(x: LossInputs, chosen: Tensor, rejected: Tensor) -> tuple[Tensor, Tensor]:
    """By token; a sequence without any counts as one of one token."""
    return chosen / x.chosen_tokens.clamp(min=1), rejected / x.rejected_tokens.clamp(min=1)


def _u(x: LossInputs) -> Tensor:
    chosen, rejected = log_ratios(x)
    return x.beta * (chosen - rejected)


def smoothed(u: Tensor, label_smoothing: float) -> Tensor:
    """``-(1 - e) log s(u) - e log s(-u)``."""
    if label_smoothing == 0.0:
        return -F.logsigmoid(u)
    return -(1.0 - label_smoothing) * F.logsigmoid(u) - label_smoothing * F.logsigmoid(-u)


@register(difference="sum", limits={"label_smoothing": SMOOTHING}, scores=True)
def sigmoid(x: LossInputs, *, label_smoothing: float = 0.0) -> Tensor:
    """DPO, ``-log s(u)``, Rafailov et al., arXiv 2305.18290, eq. 7; smoothed it is cDPO.

    With smoothing e, ``-(1 - e) log s(u) - e log s(-u)`` (Mitchell, "A note on DPO with noisy preferences", 2023,
    eq. 3).
    """
    return smoothed(_u(x), label_smoothing)


@register(difference="sum", limits={"label_smoothing": (0.0, BELOW_HALF)}, scores=True)
def robust(x: LossInputs, *, label_smoothing: float = 0.0) -> Tensor:
    """Robust DPO, ``[-(1 - e) log s(u) + e log s(-u)] / (1 - 2 e)``, Chowdhury et al., arXiv 2403.00409

    Unbiased where a share e of the labels is flipped.
    """
    u, e = _u(x), label_smoothing
    return (-(1.0 - e) * F.logsigmoid(u) + e * F.logsigmoid(-u)) / (1.0 - 2.0 * e)


@register(difference="sum", scores=True)
def hinge(x: LossInputs) -> Tensor:
    """``max(0, 1 - u)`` on DPO's margin: SLiC-HF's hinge, Zhao et al., arXiv 2305.10425, eq. 1, as RSO has it.

    RSO is Liu et al., arXiv 2309.06657, eq. 9 ("hinge-norm"). With ``nll_weight`` it is SLiC-HF with its regulariser.
    """
    return F.relu(1.0 - _u(x))


@register(difference="mean", averages=True, beta_positive=True)
def ipo(x: LossInputs) -> Tensor:
    """IPO, ``(c / n_c - r / n_r - 1 / (2 b))^2``, Azar et al., arXiv 2310.12036, eq. 17, on log-ratios per token.

    The averages (over scored tokens, at least 1) are the authors' later recommendation and what TRL computes.
    """
    chosen, rejected = averages(x, *log_ratios(x))
    return (chosen - rejected - 1.0 / (2.0 * x.beta)).square()


@register(difference="sum", limits={"label_smoothing": SMOOTHING}, scores=True)
def exo_pair(x: LossInputs, *, label_smoothing: float = 0.0) -> Tensor:
    """EXO on pairs, ``s(u) [log s(u) - log(1 - e)] + s(-u) [log s(-u) - log e]``, Ji et al., arXiv 2402.00856

    The reverse KL to a preference of ``1 - e``, which must not be certain: smoothing 0 is taken as 1e-3. Computed as
    the negative entropy of ``s(u)``, a function of ``|u|``, less ``s(u) log(1 - e) + s(-u) log e``.
    """
    u = _u(x)
    e = label_smoothing or LEAST_SMOOTHING_OF_EXO
    size = u.abs()
    return F.logsigmoid(size) - size * (-size).sigmoid() - u.sigmoid() * math.log((1.0 - e) / e) - math.log(e)


@register(scores=True)
def nca_pair(x: LossInputs) -> Tensor:
    """NCA on pairs, ``-log s(b c) - [log s(-b c) + log s(-b r)] / 2``, Chen et al., arXiv 2402.05369"""
    chosen, rejected = (x.beta * ratio for ratio in log_ratios(x))
    return -F.logsigmoid(chosen) - 0.5 * F.logsigmoid(-chosen) - 0.5 * F.logsigmoid(-rejected)


@register(scores=True, by_pair=("delta",))
def bco_pair(x: LossInputs, *, delta: float | Tensor = 0.0) -> Tensor:
    """BCO on pairs, ``-log s(b c - d) - log s(-(b r - d))``, Jung et al., arXiv 2404.04656

    ``delta`` is the reward shift d, the running mean of both sides' rewards: ``losses.RunningDelta`` keeps it.
    """
    chosen, rejected = (x.beta * ratio for ratio in log_ratios(x))
    return -F.logsigmoid(chosen - delta) - F.logsigmoid(delta - rejected)


@register(beta_positive=True, scores=True)
def sppo_hard(x: LossInputs) -> Tensor:
    """SPPO with hard labels, ``(c - 1 / (2 b))^2 + (r + 1 / (2 b))^2``, Wu et al., arXiv 2405.00675"""
    chosen, rejected = log_ratios(x)
    half = 1.0 / (2.0 * x.beta)
    return (chosen - half).square() + (rejected + half).square()


@register(scores=True)
def apo_zero(x: LossInputs) -> Tensor:
    """APO-zero, ``1 - s(b c) + s(b r)``, D'Oosterlinck et al., arXiv 2408.06266: chosen up, rejected down."""
    chosen, rejected = log_ratios(x)
    return (-x.beta * chosen).sigmoid() + (x.beta * rejected).sigmoid()


@register(scores=True)
def apo_down(x: LossInputs) -> Tensor:
    """APO-down, ``s(b c) + 1 - s(b (c - r))``, D'Oosterlinck et al., arXiv 2408.06266: both down, apart."""
    chosen, rejected = log_ratios(x)
    return (x.beta * chosen).sigmoid() + (x.beta * (rejected - chosen)).sigmoid()


@register(difference="sum", limits={"discopop_tau": (1e-6, 1.0)}, scores=True)
def discopop(x: LossInputs, *, discopop_tau: float = 0.05) -> Tensor:
    """DiscoPOP (LRML), ``-log s(u) (1 - m) + exp(-u) m`` with ``m = s(u / tau)``, Lu et al., arXiv 2406.08414

    ``exp(-u) m`` is ``exp(-u + log s(u / tau))``: its factors alone are infinity times 0 for very negative u.
    """
    u = _u(x)
    logistic = -F.logsigmoid(u) * (-u / discopop_tau).sigmoid()
    return logistic + torch.exp(-u + F.logsigmoid(u / discopop_tau))


@register(difference="mean", averages=True)
def sigmoid_norm(x: LossInputs) -> Tensor:
    """Length-normalised DPO, ``-log s(b (c / n_c - r / n_r))``, as in Tulu 3, Lambert et al., arXiv 2411.15124"""
    chosen, rejected = averages(x, *log_ratios(x))
    return -F.logsigmoid(x.beta * (chosen - rejected))


@register(difference="sum", scores=True, by_pair=("margin",), limits={"label_smoothing": SMOOTHING})
def odpo(x: LossInputs, *, margin: float | Tensor = 0.0, label_smoothing: float = 0.0) -> Tensor:
    """DPO with an offset, ``-log s(u - margin)``, Amini et al., arXiv 2402.10571; ``margin`` by pair."""
    return smoothed(_u(x) - margin, label_smoothing)


@register(difference="sum", scores=True, by_pair=("reward_gap",))
def rebel(x: LossInputs, *, reward_gap: float | Tensor = 0.0) -> Tensor:
    """REBEL, ``(u - reward_gap)^2``, Gao et al., arXiv 2404.16767, b = 1 / eta.

    ``reward_gap`` is the reward of the chosen minus that of the rejected, by pair; the reference is the last policy.
    """
    return (_u(x) - reward_gap).square()


@register(beta_positive=True, scores=True)
def cal_dpo(x: LossInputs) -> Tensor:
    """Cal-DPO, ``-log s(c - r) + (c - 1 / (2 b))^2 + (r + 1 / (2 b))^2``, Xiao et al., arXiv 2412.14516"""
    chosen, rejected = log_ratios(x)
    half = 1.0 / (2.0 * x.beta)
    return -F.logsigmoid(chosen - rejected) + (chosen - half).square() + (rejected + half).square()


@register(limits={"dpop_lambda": (0.0, 1e6)}, scores=True)
def dpop(x: LossInputs, *, dpop_lambda: float = 50.0) -> Tensor:
    """DPO-Positive, ``-log s(b (c - r - lambda max(0, -c)))``, Pal et al., arXiv 2402.13228"""
    chosen, rejected = log_ratios(x)
    return -F.logsigmoid(x.beta * (chosen - rejected - dpop_lambda * F.relu(-chosen)))


@register(separable=False, limits={"label_smoothing": SMOOTHING})
def aot(x: LossInputs, *, label_smoothing: float = 0.0) -> Tensor:
    """AOT, paired, Melnyk et al., arXiv 2406.05882: quantiles of the policy's margins against the reference's.

    ``d = sort(logp_c - logp_r) - sort(ref_c - ref_r)`` over the batch, then DPO's loss of ``b d``.
    """
    policy = (x.policy_chosen_logps - x.policy_rejected_logps).sort().values
    reference = (x.ref_chosen_logps - x.ref_rejected_logps).sort().values
    return smoothed(x.beta * (policy - reference), label_smoothing)


@register(separable=False, limits={"label_smoothing": SMOOTHING}, scores=True)
def aot_unpaired(x: LossInputs, *, label_smoothing: float = 0.0) -> Tensor:
    """AOT, unpaired, Melnyk et al., arXiv 2406.05882: ``d = sort(c) - sort(r)`` over the batch."""
    chosen, rejected = log_ratios(x)
    return smoothed(x.beta * (chosen.sort().values - rejected.sort().values), label_smoothing)
