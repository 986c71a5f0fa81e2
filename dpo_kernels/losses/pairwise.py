"""Losses of pairs with a reference. Each is a pure function of sequence log-probs.

Each docstring names the loss, its formula and its paper. There ``c`` and ``r`` are the log-ratios ``logp - ref`` of the
chosen and the rejected sequence, and ``n_c`` and ``n_r`` their numbers of scored tokens. ``b`` is beta, ``s`` is the
logistic function, and ``u = b (c - r)`` is DPO's margin.

DNO (Rosset et al., arXiv 2404.03715) and D2PO (Singhal et al., arXiv 2405.01511) use ``sigmoid`` on pairs that are
sampled from the policy itself. A stronger model ranks them in DNO, and a reward model that is kept up to date in D2PO.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from dpo_kernels.loss_interface import LossInputs
from dpo_kernels.losses.registry import register

# Label smoothing is the assumed share of flipped labels. At 1/2 the labels say nothing.
SMOOTHING = (0.0, 0.5)
# Robust DPO divides by 1 - 2 e, so its label smoothing stays below 1/2. The distance is our choice.
BELOW_HALF = 0.5 - 1e-6
# EXO takes the logarithm of the label smoothing. TRL too puts 1e-3 in the place of 0.
LEAST_SMOOTHING_OF_EXO = 1e-3


def log_ratios(x: LossInputs) -> tuple[Tensor, Tensor]:
    """Return ``(c, r)``."""
    return x.policy_chosen_logps - x.ref_chosen_logps, x.policy_rejected_logps - x.ref_rejected_logps


def averages(x: LossInputs, chosen: Tensor, rejected: Tensor) -> tuple[Tensor, Tensor]:
    """Divide both sides by their numbers of scored tokens, where a sequence without any counts as one of one token."""
    return chosen / x.chosen_tokens.clamp(min=1), rejected / x.rejected_tokens.clamp(min=1)


def _u(x: LossInputs) -> Tensor:
    chosen, rejected = log_ratios(x)
    return x.beta * (chosen - rejected)


def smoothed(u: Tensor, label_smoothing: float) -> Tensor:
    """Return ``-(1 - e) log s(u) - e log s(-u)``, where e is the label smoothing."""
    if label_smoothing == 0.0:
        return -F.logsigmoid(u)
    return -(1.0 - label_smoothing) * F.logsigmoid(u) - label_smoothing * F.logsigmoid(-u)


@register(difference="sum", limits={"label_smoothing": SMOOTHING}, uses_log_ratios_only=True)
def sigmoid(x: LossInputs, *, label_smoothing: float = 0.0) -> Tensor:
    """DPO is ``-log s(u)`` (Rafailov et al., arXiv 2305.18290, eq. 7).

    With label smoothing e it is cDPO, ``-(1 - e) log s(u) - e log s(-u)`` (Mitchell, "A note on DPO with noisy
    preferences", 2023, eq. 3).
    """
    return smoothed(_u(x), label_smoothing)


@register(difference="sum", limits={"label_smoothing": (0.0, BELOW_HALF)}, uses_log_ratios_only=True)
def robust(x: LossInputs, *, label_smoothing: float = 0.0) -> Tensor:
    """Robust DPO is ``[-(1 - e) log s(u) + e log s(-u)] / (1 - 2 e)`` (Chowdhury et al., arXiv 2403.00409).

    It is an unbiased estimate of DPO's loss if a share e of the labels is flipped.
    """
    u, e = _u(x), label_smoothing
    return (-(1.0 - e) * F.logsigmoid(u) + e * F.logsigmoid(-u)) / (1.0 - 2.0 * e)


@register(difference="sum", uses_log_ratios_only=True)
def hinge(x: LossInputs) -> Tensor:
    """The hinge loss is ``max(0, 1 - u)``, which RSO calls "hinge-norm" (Liu et al., arXiv 2309.06657, eq. 9).

    It is the hinge of SLiC-HF (Zhao et al., arXiv 2305.10425, eq. 1) on DPO's margin. ``nll_weight`` adds SLiC-HF's
    regulariser.
    """
    return F.relu(1.0 - _u(x))


@register(difference="mean", averages=True, beta_positive=True)
def ipo(x: LossInputs) -> Tensor:
    """IPO is ``(c / n_c - r / n_r - 1 / (2 b))^2`` (Azar et al., arXiv 2310.12036, eq. 17, on averages over tokens).

    The authors later recommended these averages, and TRL computes them. A sequence without scored tokens counts as one
    of one token.
    """
    chosen, rejected = averages(x, *log_ratios(x))
    return (chosen - rejected - 1.0 / (2.0 * x.beta)).square()


@register(difference="sum", limits={"label_smoothing": SMOOTHING}, uses_log_ratios_only=True)
def exo_pair(x: LossInputs, *, label_smoothing: float = 0.0) -> Tensor:
    """EXO on pairs is ``s(u) [log s(u) - log(1 - e)] + s(-u) [log s(-u) - log e]`` (Ji et al., arXiv 2402.00856).

    This is the reverse KL to a preference of ``1 - e``. A certain preference would make it infinite, so label smoothing
    0 counts as 1e-3. The code computes the negative entropy of ``s(u)``, which is a function of ``|u|``, and subtracts
    ``s(u) log(1 - e) + s(-u) log e``.
    """
    u = _u(x)
    e = label_smoothing or LEAST_SMOOTHING_OF_EXO
    size = u.abs()
    return F.logsigmoid(size) - size * (-size).sigmoid() - u.sigmoid() * math.log((1.0 - e) / e) - math.log(e)


@register(uses_log_ratios_only=True)
def nca_pair(x: LossInputs) -> Tensor:
    """NCA on pairs is ``-log s(b c) - [log s(-b c) + log s(-b r)] / 2`` (Chen et al., arXiv 2402.05369)."""
    chosen, rejected = (x.beta * ratio for ratio in log_ratios(x))
    return -F.logsigmoid(chosen) - 0.5 * F.logsigmoid(-chosen) - 0.5 * F.logsigmoid(-rejected)


@register(uses_log_ratios_only=True, by_pair=("delta",))
def bco_pair(x: LossInputs, *, delta: float | Tensor = 0.0) -> Tensor:
    """BCO on pairs is ``-log s(b c - d) - log s(-(b r - d))`` (Jung et al., arXiv 2404.04656).

    ``delta`` is the reward shift d, a running mean of both sides' rewards, which ``RunningDelta`` keeps.
    """
    chosen, rejected = (x.beta * ratio for ratio in log_ratios(x))
    return -F.logsigmoid(chosen - delta) - F.logsigmoid(delta - rejected)


@register(beta_positive=True, uses_log_ratios_only=True)
def sppo_hard(x: LossInputs) -> Tensor:
    """SPPO with hard labels is ``(c - 1 / (2 b))^2 + (r + 1 / (2 b))^2`` (Wu et al., arXiv 2405.00675)."""
    chosen, rejected = log_ratios(x)
    half = 1.0 / (2.0 * x.beta)
    return (chosen - half).square() + (rejected + half).square()


@register(uses_log_ratios_only=True)
def apo_zero(x: LossInputs) -> Tensor:
    """APO-zero is ``1 - s(b c) + s(b r)`` (D'Oosterlinck et al., arXiv 2408.06266).

    It makes the chosen sequence likelier and the rejected one less likely.
    """
    chosen, rejected = log_ratios(x)
    return (-x.beta * chosen).sigmoid() + (x.beta * rejected).sigmoid()


@register(uses_log_ratios_only=True)
def apo_down(x: LossInputs) -> Tensor:
    """APO-down is ``s(b c) + 1 - s(b (c - r))`` (D'Oosterlinck et al., arXiv 2408.06266).

    It makes both sequences less likely, and the rejected one more so.
    """
    chosen, rejected = log_ratios(x)
    return (x.beta * chosen).sigmoid() + (x.beta * (rejected - chosen)).sigmoid()


@register(difference="sum", limits={"discopop_tau": (1e-6, 1.0)}, uses_log_ratios_only=True)
def discopop(x: LossInputs, *, discopop_tau: float = 0.05) -> Tensor:
    """DiscoPOP (LRML) is ``-log s(u) (1 - m) + exp(-u) m`` with ``m = s(u / tau)`` (Lu et al., arXiv 2406.08414).

    The code computes ``exp(-u) m`` as ``exp(-u + log s(u / tau))``, because for very negative u the factors are
    infinity and 0.
    """
    u = _u(x)
    logistic = -F.logsigmoid(u) * (-u / discopop_tau).sigmoid()
    return logistic + torch.exp(-u + F.logsigmoid(u / discopop_tau))


@register(difference="mean", averages=True)
def sigmoid_norm(x: LossInputs) -> Tensor:
    """Length-normalised DPO is ``-log s(b (c / n_c - r / n_r))``, as in Tulu 3 (Lambert et al., arXiv 2411.15124)."""
    chosen, rejected = averages(x, *log_ratios(x))
    return -F.logsigmoid(x.beta * (chosen - rejected))


@register(difference="sum", uses_log_ratios_only=True, by_pair=("margin",), limits={"label_smoothing": SMOOTHING})
def odpo(x: LossInputs, *, margin: float | Tensor = 0.0, label_smoothing: float = 0.0) -> Tensor:
    """DPO with an offset is ``-log s(u - margin)``, ``margin`` by pair (Amini et al., arXiv 2402.10571)."""
    return smoothed(_u(x) - margin, label_smoothing)


@register(difference="sum", uses_log_ratios_only=True, by_pair=("reward_gap",))
def rebel(x: LossInputs, *, reward_gap: float | Tensor = 0.0) -> Tensor:
    """REBEL is ``(u - reward_gap)^2`` with b = 1 / eta (Gao et al., arXiv 2404.16767).

    ``reward_gap`` is the reward of the chosen sequence minus that of the rejected one, by pair. The reference is the
    policy of the previous iteration.
    """
    return (_u(x) - reward_gap).square()


@register(beta_positive=True, uses_log_ratios_only=True)
def cal_dpo(x: LossInputs) -> Tensor:
    """Cal-DPO is ``-log s(c - r) + (c - 1 / (2 b))^2 + (r + 1 / (2 b))^2`` (Xiao et al., arXiv 2412.14516)."""
    chosen, rejected = log_ratios(x)
    half = 1.0 / (2.0 * x.beta)
    return -F.logsigmoid(chosen - rejected) + (chosen - half).square() + (rejected + half).square()


@register(limits={"dpop_lambda": (0.0, 1e6)}, uses_log_ratios_only=True)
def dpop(x: LossInputs, *, dpop_lambda: float = 50.0) -> Tensor:
    """DPO-Positive is ``-log s(b (c - r - lambda max(0, -c)))`` (Pal et al., arXiv 2402.13228)."""
    chosen, rejected = log_ratios(x)
    return -F.logsigmoid(x.beta * (chosen - rejected - dpop_lambda * F.relu(-chosen)))


@register(separable=False, limits={"label_smoothing": SMOOTHING})
def aot(x: LossInputs, *, label_smoothing: float = 0.0) -> Tensor:
    """Paired AOT compares quantiles of the policy's margins with the reference's (Melnyk et al., arXiv 2406.05882).

    With ``d = sort(logp_c - logp_r) - sort(ref_c - ref_r)`` over the batch it is DPO's loss of ``b d``.
    """
    policy = (x.policy_chosen_logps - x.policy_rejected_logps).sort().values
    reference = (x.ref_chosen_logps - x.ref_rejected_logps).sort().values
    return smoothed(x.beta * (policy - reference), label_smoothing)


@register(separable=False, limits={"label_smoothing": SMOOTHING}, uses_log_ratios_only=True)
def aot_unpaired(x: LossInputs, *, label_smoothing: float = 0.0) -> Tensor:
    """Unpaired AOT is DPO's loss of ``b [sort(c) - sort(r)]`` over the batch (Melnyk et al., arXiv 2406.05882)."""
    chosen, rejected = log_ratios(x)
    return smoothed(x.beta * (chosen.sort().values - rejected.sort().values), label_smoothing)
