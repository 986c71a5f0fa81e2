"""Losses of pairs that read the KL divergence of the reference from the policy, as TDPO does.

In the docstrings ``c`` and ``r`` are the log-ratios of the chosen and the rejected sequence, ``b`` is beta, and ``s``
is the logistic function. ``k_c`` and ``k_r`` are the sums over the sequences' scored tokens of
``KL(reference || policy)``, which the paper writes ``D_SeqKL(x, y; reference || policy)``.
"""

import torch.nn.functional as F
from torch import Tensor

from dpo_kernels.loss_interface import LossInputs
from dpo_kernels.losses.pairwise import log_ratios
from dpo_kernels.losses.registry import register


@register(needs_kl=True)
def tdpo1(x: LossInputs) -> Tensor:
    """TDPO1 is ``-log s(b (c - r) - b (k_r - k_c))`` (Zeng et al., arXiv 2404.11999)."""
    (chosen, rejected), (chosen_kl, rejected_kl) = log_ratios(x), _divergences(x)
    return -F.logsigmoid(x.beta * (chosen - rejected - (rejected_kl - chosen_kl)))


@register(needs_kl=True, limits={"tdpo_alpha": (0.0, 1e6)})
def tdpo2(x: LossInputs, *, tdpo_alpha: float = 0.5) -> Tensor:
    """TDPO2 is ``-log s(b (c - r) - alpha b (k_r - stopped(k_c)))`` (Zeng et al., arXiv 2404.11999).

    ``k_c`` gets no gradient. ``tdpo_alpha`` is alpha, 0.5 in the authors' code.
    """
    (chosen, rejected), (chosen_kl, rejected_kl) = log_ratios(x), _divergences(x)
    return -F.logsigmoid(x.beta * (chosen - rejected - tdpo_alpha * (rejected_kl - chosen_kl.detach())))


def _divergences(x: LossInputs) -> tuple[Tensor, Tensor]:
    """Return ``(k_c, k_r)``."""
    assert x.chosen_kl is not None, "the engine gives them to a loss with needs_kl"
    assert x.rejected_kl is not None, "the engine gives them to a loss with needs_kl"
    return x.chosen_kl, x.rejected_kl
