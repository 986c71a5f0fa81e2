"""The formulas of the family, each written from its paper; ``x`` holds what a loss sees, by pair.

``c`` and ``r`` are the log-ratios of the chosen and the rejected sequence, ``b`` is beta, ``o`` the options.
"""

import math
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor


def _softplus(z: Tensor) -> Tensor:
    """Return ``log(1 + exp(z)) = -log sigmoid(-z)``.

    torch's own ``softplus`` is off by exp(-20) beyond its threshold.
    """
    return torch.logaddexp(z, torch.zeros_like(z))


def reads_kl(loss_type: str | Sequence[str] | Callable[..., Tensor]) -> bool:
    """Return whether a loss may read the KL divergence of the reference from the policy."""
    if callable(loss_type):
        return True
    names = (loss_type,) if isinstance(loss_type, str) else loss_type
    return any(name in ("tdpo1", "tdpo2") for name in names)


def family_loss(
    loss_type: str | Sequence[str] | Callable[..., Tensor],
    beta: float,
    label_smoothing: float,
    s_w: Tensor,
    s_l: Tensor,
    r_w: Tensor,
    r_l: Tensor,
    n_w: Tensor,
    n_l: Tensor,
    nll_scale: Tensor | float,
    options: dict[str, Any],
    kls: tuple[Tensor | None, Tensor | None] = (None, None),
) -> Tensor:
    """Return the losses by pair.

    The formulas are written a second time here, apart from the library's, so that a slip in one of them is seen.
    ``nll_scale`` turns a pair's sum of chosen log-probs into its part of the mean over tokens. ``kls`` are the KL
    divergences of the reference from the policy, summed over chosen and over rejected tokens.
    """
    options = dict(options)
    weights, nll_weight = options.pop("pair_weights", 1.0), options.pop("nll_weight", None)
    if callable(loss_type):
        total = loss_type(
            SimpleNamespace(
                policy_chosen_logps=s_w,
                policy_rejected_logps=s_l,
                ref_chosen_logps=r_w,
                ref_rejected_logps=r_l,
                chosen_tokens=n_w,
                rejected_tokens=n_l,
                beta=beta,
                chosen_kl=kls[0],
                rejected_kl=kls[1],
            )
        )
        return total * weights + (nll_weight or 0.0) * -s_w * nll_scale
    names = (loss_type,) if isinstance(loss_type, str) else tuple(loss_type)
    mix = options.pop("loss_weights", None) or (1.0,) * len(names)
    divergence, f_alpha = options.pop("f_divergence", "reverse_kl"), options.pop("f_alpha", 0.5)
    score = _SCORES[divergence]
    sides = SimpleNamespace(
        b=beta,
        e=label_smoothing,
        c=score(s_w - r_w, f_alpha),
        r=score(s_l - r_l, f_alpha),
        p_c=s_w,
        p_r=s_l,
        ref_c=r_w,
        ref_r=r_l,
        n_c=n_w.clamp(min=1),
        n_r=n_l.clamp(min=1),
        nll=-s_w * nll_scale,
        k_c=kls[0],
        k_r=kls[1],
        o=SimpleNamespace(**options),
    )
    total = sum(weight * _FAMILY[name](sides) for weight, name in zip(mix, names, strict=True))
    if nll_weight is None:
        nll_weight = 1.0 if "cpo" in names else 0.0
    return total * weights + nll_weight * sides.nll


def _positive_part(x: Tensor) -> Tensor:
    """Return ``max(0, x)``, whose slope at 0 is 0 in every release of torch."""
    return torch.where(x <= 0, torch.zeros_like(x), x)


def _at_most(x: Tensor, bound: float) -> Tensor:
    """Return ``min(x, bound)``, whose slope at the bound is 1 in every release of torch."""
    return torch.where(x > bound, torch.full_like(x, bound), x)


def _smoothed(x: Any, u: Tensor) -> Tensor:
    """Return ``-log sigmoid(u)``, with the labels smoothed by ``x.e`` (cDPO)."""
    return (1 - x.e) * _softplus(-u) + x.e * _softplus(u)


def _kl_to_preference(x: Any) -> Tensor:
    """Return EXO's divergence ``KL(sigmoid(u) || 1 - e)``; e = 0 is replaced by 1e-3."""
    u, e = x.b * (x.c - x.r), x.e or 1e-3
    p = 1 / (1 + torch.exp(-u))
    q = 1 / (1 + torch.exp(u))
    return p * (-_softplus(-u) - math.log(1 - e)) + q * (-_softplus(u) - math.log(e))


def _odds_ratio(x: Any) -> Tensor:
    """Return ORPO's loss, eq. 6 and 7: the negative log-prob of the chosen side plus the log odds ratio's term."""
    a, b = x.p_c / x.n_c, x.p_r / x.n_r
    odds = [torch.exp(v) / -torch.expm1(v) for v in (_at_most(a, -1e-30), _at_most(b, -1e-30))]
    return -a + x.b * torch.log1p(odds[1] / odds[0])


def _shaped(average: Tensor, alpha: float) -> Tensor:
    """Return AlphaPO's reward of an average log-prob; alpha = 0 is its limit, the average itself."""
    return average if alpha == 0 else (1 - torch.exp(-alpha * average)) / alpha


# c, r: log-ratios; p: policy log-probs; n: tokens; b: beta; e: smoothing; o: options. -log sigmoid(z) is _softplus(-z).
_FAMILY: dict[str, Callable[[Any], Tensor]] = {
    "sigmoid": lambda x: _smoothed(x, x.b * (x.c - x.r)),
    "robust": lambda x: (
        ((1 - x.e) * _softplus(-x.b * (x.c - x.r)) - x.e * _softplus(x.b * (x.c - x.r))) / (1 - 2 * x.e)
    ),
    "hinge": lambda x: _positive_part(1 - x.b * (x.c - x.r)),
    "ipo": lambda x: ((x.p_c - x.ref_c) / x.n_c - (x.p_r - x.ref_r) / x.n_r - 1 / (2 * x.b)) ** 2,
    "exo_pair": _kl_to_preference,
    "nca_pair": lambda x: _softplus(-x.b * x.c) + (_softplus(x.b * x.c) + _softplus(x.b * x.r)) / 2,
    "bco_pair": lambda x: _softplus(_option(x, "delta") - x.b * x.c) + _softplus(x.b * x.r - _option(x, "delta")),
    "sppo_hard": lambda x: (x.c - 1 / (2 * x.b)) ** 2 + (x.r + 1 / (2 * x.b)) ** 2,
    "apo_zero": lambda x: 1 - torch.sigmoid(x.b * x.c) + torch.sigmoid(x.b * x.r),
    "apo_down": lambda x: torch.sigmoid(x.b * x.c) + 1 - torch.sigmoid(x.b * (x.c - x.r)),
    "discopop": lambda x: _discovered(x.b * (x.c - x.r), _option(x, "discopop_tau", 0.05)),
    "sigmoid_norm": lambda x: _softplus(-x.b * ((x.p_c - x.ref_c) / x.n_c - (x.p_r - x.ref_r) / x.n_r)),
    "odpo": lambda x: _smoothed(x, x.b * (x.c - x.r) - _option(x, "margin")),
    "rebel": lambda x: (x.b * (x.c - x.r) - _option(x, "reward_gap")) ** 2,
    "cal_dpo": lambda x: _softplus(x.r - x.c) + (x.c - 1 / (2 * x.b)) ** 2 + (x.r + 1 / (2 * x.b)) ** 2,
    "dpop": lambda x: _softplus(-x.b * (x.c - x.r - _option(x, "dpop_lambda", 50.0) * _positive_part(-x.c))),
    "aot": lambda x: _smoothed(x, x.b * (torch.sort(x.p_c - x.p_r)[0] - torch.sort(x.ref_c - x.ref_r)[0])),
    "aot_unpaired": lambda x: _smoothed(x, x.b * (torch.sort(x.c)[0] - torch.sort(x.r)[0])),
    "simpo": lambda x: _smoothed(x, x.b * (x.p_c / x.n_c - x.p_r / x.n_r) - _option(x, "gamma", 0.5)),
    "alphapo": lambda x: _softplus(
        _option(x, "gamma", 0.5)
        - x.b * _shaped(x.p_c / x.n_c, _option(x, "alpha", 0.25))
        + x.b * _shaped(x.p_r / x.n_r, _option(x, "alpha", 0.25))
    ),
    "cpo": lambda x: _smoothed(x, x.b * (x.p_c - x.p_r)),
    "orpo": _odds_ratio,
    "sft": lambda x: x.nll,
    "tdpo1": lambda x: _softplus(x.b * (x.k_r - x.k_c) - x.b * (x.c - x.r)),
    "tdpo2": lambda x: _softplus(
        _option(x, "tdpo_alpha", 0.5) * (x.b * x.k_r - (x.b * x.k_c).detach()) - x.b * (x.c - x.r)
    ),
}

_SCORES: dict[str, Callable[[Tensor, float], Tensor]] = {
    "reverse_kl": lambda x, alpha: x,
    "forward_kl": lambda x, alpha: 1 - torch.exp(_at_most(-x, 80.0)),
    "js": lambda x, alpha: math.log(2) - _softplus(-x),
    "alpha": lambda x, alpha: (torch.exp(_at_most((alpha - 1) * x, 80.0)) - 1) / (alpha - 1),
}


def _discovered(u: Tensor, tau: float) -> Tensor:
    """Return DiscoPOP's blend of a logistic and an exponential loss."""
    m = torch.sigmoid(u / tau)
    return _softplus(-u) * (1 - m) + torch.exp(-u - _softplus(-u / tau))


def _option(x: Any, name: str, default: float = 0.0) -> Any:
    """Return the option ``name`` of the loss, or its default."""
    return getattr(x.o, name, default)
