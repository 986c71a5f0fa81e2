"""Losses of pairs without a reference. Each is a pure function of sequence log-probs.

In the docstrings ``p_c`` and ``p_r`` are the policy's log-probs of the chosen and the rejected sequence. ``n_c`` and
``n_r`` are their numbers of scored tokens, and ``a_c = p_c / n_c`` and ``a_r = p_r / n_r`` the averages. ``b`` is beta
and ``s`` the logistic function.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from dpo_kernels.loss_interface import LossInputs
from dpo_kernels.losses.bounds import LARGEST_EXPONENT, at_least, at_most
from dpo_kernels.losses.pairwise import SMOOTHING, averages, smoothed
from dpo_kernels.losses.registry import register

# ORPO counts an average log-prob above -1e-30 nats a token as -1e-30. The derivative of its log odds there is 1e30,
# which is finite in float32.
LEAST_SURPRISE = 1e-30
# This is log(1/2) in nats. Below it log1p(-exp(a)) keeps more digits of log(1 - exp(a)), above it log(-expm1(a)).
HALF = -0.6931471805599453
# AlphaPO takes its limit at alpha = 0, SimPO, for smaller magnitudes of alpha. The threshold is our choice.
SMALL_ALPHA = 1e-8


def _average_logps(x: LossInputs) -> tuple[Tensor, Tensor]:
    return averages(x, x.policy_chosen_logps, x.policy_rejected_logps)


@register(needs_reference=False, difference="mean", averages=True, limits={"label_smoothing": SMOOTHING})
def simpo(x: LossInputs, *, gamma: float = 0.5, label_smoothing: float = 0.0) -> Tensor:
    """SimPO is ``-log s(b (a_c - a_r) - gamma)`` (Meng et al., arXiv 2405.14734, eq. 6)."""
    chosen, rejected = _average_logps(x)
    return smoothed(x.beta * (chosen - rejected) - gamma, label_smoothing)


@register(needs_reference=False, averages=True, limits={"alpha": (-100.0, 100.0)})
def alphapo(x: LossInputs, *, alpha: float = 0.25, gamma: float = 0.5) -> Tensor:
    """AlphaPO is ``-log s((b / alpha) (exp(-alpha a_r) - exp(-alpha a_c)) - gamma)`` (Gupta et al., arXiv 2501.03884).

    Its limit at ``alpha = 0`` is SimPO. The exponents are at most 80.
    """

    def shaped(average: Tensor) -> Tensor:
        if abs(alpha) < SMALL_ALPHA:
            return average
        return -torch.expm1(at_most(-alpha * average, LARGEST_EXPONENT)) / alpha

    chosen, rejected = _average_logps(x)
    return -F.logsigmoid(x.beta * (shaped(chosen) - shaped(rejected)) - gamma)


@register(needs_reference=False, difference="sum", limits={"label_smoothing": SMOOTHING}, nll_weight=1.0)
def cpo(x: LossInputs, *, label_smoothing: float = 0.0) -> Tensor:
    """CPO is ``-log s(b (p_c - p_r)) + nll_weight NLL(chosen)`` (Xu et al., arXiv 2401.08417)."""
    return smoothed(x.beta * (x.policy_chosen_logps - x.policy_rejected_logps), label_smoothing)


@register(needs_reference=False, averages=True)
def orpo(x: LossInputs) -> Tensor:
    """ORPO is ``-a_c - b log s(log odds(a_c) - log odds(a_r))`` (Hong et al., arXiv 2403.07691, eq. 6 and 7).

    Here ``log odds(a) = a - log(1 - exp(a))``. The odds of an average of 0 are infinite; it occurs if a sequence has no
    scored token, or only certain ones. Therefore an average above -1e-30 counts as -1e-30, with a gradient of 0.
    """
    chosen, rejected = _average_logps(x)
    return -chosen - x.beta * F.logsigmoid(_log_odds(chosen) - _log_odds(rejected))


def _log_odds(average: Tensor) -> Tensor:
    held = at_most(average, -LEAST_SURPRISE)
    # Both are log(1 - exp(a)). Each is used where it keeps its digits.
    near = torch.log(-torch.expm1(at_least(held, HALF)))
    far = torch.log1p(-torch.exp(at_most(held, HALF)))
    return held - torch.where(held > HALF, near, far)


@register(needs_reference=False, filled_by_engine=("token_factor",))
def sft(x: LossInputs, *, token_factor: float | Tensor) -> Tensor:
    """Supervised fine-tuning is the mean of ``-log p`` over all scored tokens of the batch's chosen sequences.

    The loss of a pair is ``-p_c token_factor`` with ``token_factor = P / sum of n_c``. The mean over pairs is then the
    mean over tokens. The option ``denominator`` replaces P, and ``token_denominator`` the sum.
    """
    return -x.policy_chosen_logps * token_factor
