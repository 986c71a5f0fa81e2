"""Losses without a reference. ``p_c`` and ``p_r`` are the policy's log-probs, ``n`` counts, ``a = p / n`` averages."""

import torch
import torch.nn.functional as F
from torch import Tensor

from dpo_kernels.loss_interface import LossInputs
from dpo_kernels.losses.bounds import LARGEST_EXPONENT, at_least, at_most
from dpo_kernels.losses.pairwise import SMOOTHING, averages, smoothed
from dpo_kernels.losses.registry import register

LEAST_SURPRISE = 1e-30  # nats a token; an average log-prob above minus this counts as this: 1 over it fits float32
HALF = -0.6931471805599453  # the log-prob of 1/2, where the two forms of log(1 - p) meet
SMALL_ALPHA = 1e-8


def _average_logps(x: LossInputs) -> tuple[Tensor, Tensor]:
    return averages(x, x.policy_chosen_logps, x.policy_rejected_logps)


@register(needs_reference=False, difference="mean", averages=True, limits={"label_smoothing": SMOOTHING})
def simpo(x: LossInputs, *, gamma: float = 0.5, label_smoothing: float = 0.0) -> Tensor:
    """SimPO, ``-log s(b (a_c - a_r) - gamma)``, Meng et al., arXiv 2405.14734, eq. 6."""
    chosen, rejected = _average_logps(x)
    return smoothed(x.beta * (chosen - rejected) - gamma, label_smoothing)


@register(needs_reference=False, averages=True, limits={"alpha": (-100.0, 100.0)})
def alphapo(x: LossInputs, *, alpha: float = 0.25, gamma: float = 0.5) -> Tensor:
    """AlphaPO, ``-log s((b / alpha) (exp(-alpha a_r) - exp(-alpha a_c)) - gamma)``, Gupta et al., arXiv 2501.03884.

    The limit at ``alpha = 0`` is SimPO. The exponents are held at 80.
    """

    def shaped(average: Tensor) -> Tensor:
        if abs(alpha) < SMALL_ALPHA:
            return average
        return -torch.expm1(at_most(-alpha * average, LARGEST_EXPONENT)) / alpha

    chosen, rejected = _average_logps(x)
    return -F.logsigmoid(x.beta * (shaped(chosen) - shaped(rejected)) - gamma)


@register(needs_reference=False, difference="sum", limits={"label_smoothing": SMOOTHING}, nll_weight=1.0)
def cpo(x: LossInputs, *, label_smoothing: float = 0.0) -> Tensor:
    """CPO, ``-log s(b (p_c - p_r)) + nll_weight NLL(chosen)``, Xu et al., arXiv 2401.08417."""
    return smoothed(x.beta * (x.policy_chosen_logps - x.policy_rejected_logps), label_smoothing)


@register(needs_reference=False, averages=True)
def orpo(x: LossInputs) -> Tensor:
    """ORPO, ``-a_c - b log s(log odds(a_c) - log odds(a_r))``, Hong et al., arXiv 2403.07691, eq. 6 and 7.

    ``log odds(a) = a - log(1 - exp(a))``. An average that reaches 0 (no token, or a certain one) has infinite odds,
    and the log odds of an average above -1e-30 a gradient of 0.
    """
    chosen, rejected = _average_logps(x)
    return -chosen - x.beta * F.logsigmoid(_log_odds(chosen) - _log_odds(rejected))


def _log_odds(average: Tensor) -> Tensor:
    held = at_most(average, -LEAST_SURPRISE)
    # log(1 - exp(a)): whichever of the two forms keeps its digits.
    near = torch.log(-torch.expm1(at_least(held, HALF)))
    far = torch.log1p(-torch.exp(at_most(held, HALF)))
    return held - torch.where(held > HALF, near, far)


@register(needs_reference=False, filled_by_engine=("token_factor",))
def sft(x: LossInputs, *, token_factor: float | Tensor) -> Tensor:
    """Supervised fine-tuning on the chosen side: the mean over all its scored tokens of the batch of ``-log p``.

    By pair ``-p_c token_factor`` with ``token_factor = P / sum of n_c``, so that the mean over pairs is the mean over
    tokens; with a ``denominator`` and a ``token_denominator`` it is their ratio.
    """
    return -x.policy_chosen_logps * token_factor
