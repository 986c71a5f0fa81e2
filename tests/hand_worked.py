"""Pairs worked out by hand, one row or more for each loss: value and gradient by the two log-probs."""

import dataclasses
import math

import torch

from dpo_kernels import dpo_loss
from dpo_kernels.losses import LOSSES

F64 = torch.float64


def f64(*values):
    return torch.tensor(values, dtype=F64)


@dataclasses.dataclass(frozen=True)
class Row:
    """One pair worked out by hand."""

    logps: tuple[float | None, ...]  # policy chosen, policy rejected, reference chosen, reference rejected
    loss: float
    chosen_grad: float
    rejected_grad: float
    options: dict
    tokens: tuple[float, float] = (1.0, 1.0)

    def call(self, requires_grad=False, **changes):
        chosen, rejected, *reference = (None if value is None else f64(value) for value in self.logps)
        for side in (chosen, rejected):
            side.requires_grad_(requires_grad)
        counts = {name: f64(n) for name, n in zip(("chosen_tokens", "rejected_tokens"), self.tokens, strict=True)}
        return (chosen, rejected), dpo_loss(chosen, rejected, *reference, **counts | self.options | changes)


# Log-ratios 1 (= -10 + 11) and -1.1972245773362196 (= -20 + 18.80277542266378), so that with beta 0.5
# u = 0.5 * 2.1972245773362196 = log 3, sigmoid(u) = 3/4, sigmoid(-u) = 1/4.
QUARTER = (-10.0, -20.0, -11.0, -18.80277542266378)

HAND = {
    # loss = -log(3/4); derivative by u is -sigmoid(-u) = -1/4, times beta: -0.125
    "sigmoid": Row(QUARTER, 0.28768207245178085, -0.125, 0.125, {"loss_type": "sigmoid", "beta": 0.5}),
    # -0.8 log(3/4) - 0.2 log(1/4) = 0.8 * 0.28768207245178085 + 0.2 * 1.3862943611198906;
    # derivative by u: -0.8 / 4 + 0.2 * 3/4 = -0.05, times beta: -0.025
    "sigmoid, smoothed": Row(
        QUARTER, 0.5074045301854028, -0.025, 0.025, {"loss_type": "sigmoid", "beta": 0.5, "label_smoothing": 0.2}
    ),
    # u = 0.5 * (1 - -0.5) = 0.75: 1 - 0.75; slope -beta
    "hinge": Row((-3.0, -5.0, -4.0, -4.5), 0.25, -0.5, 0.5, {"loss_type": "hinge", "beta": 0.5}),
    # u = 0.5 * (1 - 5) = -2: 1 + 2
    "hinge, wrong side": Row((-3.0, -5.0, -4.0, -10.0), 3.0, -0.5, 0.5, {"loss_type": "hinge", "beta": 0.5}),
    # u = 0.5 * (1 - -4) = 2.5: beyond the margin nothing is left
    "hinge, beyond the margin": Row((-3.0, -8.0, -4.0, -4.0), 0.0, 0.0, 0.0, {"loss_type": "hinge", "beta": 0.5}),
    # averages 3 / 2 and -5 / 4, h = 2.75, 1 / (2 beta) = 2: 0.75^2; 2 * 0.75 / 2 and -2 * 0.75 / 4
    "ipo": Row((-7.0, -15.0, -10.0, -10.0), 0.5625, 0.75, -0.375, {"loss_type": "ipo", "beta": 0.25}, (2.0, 4.0)),
    # no tokens count as 1: 3 and -5 / 4, h = 4.25: 2.25^2; 2 * 2.25 and -2 * 2.25 / 4
    "ipo, no tokens": Row(
        (-7.0, -15.0, -10.0, -10.0), 5.0625, 4.5, -1.125, {"loss_type": "ipo", "beta": 0.25}, (0.0, 4.0)
    ),
}
LN2, LN3 = math.log(2), math.log(3)


def at(c, r, p_c=-10.0, p_r=-20.0):
    """Log-probs with these log-ratios."""
    return p_c, p_r, p_c - c, p_r - r


# With beta 1/2: beta c = log 3 (sigmoid 3/4), beta r = -log 2 (sigmoid 1/3), u = log 6 (sigmoid 6/7).
NICE = at(2 * LN3, -2 * LN2)


def half(loss_type, **options):
    return {"loss_type": loss_type, "beta": 0.5, **options}


HAND |= {
    # [-0.8 log(6/7) + 0.2 log(1/7)] / 0.6; by u: (-0.8 / 7 - 0.2 * 6/7) / 0.6 = -10/21
    "robust": Row(
        NICE, (0.8 * math.log(7 / 6) - 0.2 * math.log(7)) / 0.6, -5 / 21, 5 / 21, half("robust", label_smoothing=0.2)
    ),
    # 6/7 (log 6/7 - log 3/4) + 1/7 (log 1/7 - log 1/4); by u: s(u) s(-u) [u - log(3/4 / (1/4))] = 6/49 log 2
    "exo_pair": Row(
        NICE,
        6 / 7 * math.log(8 / 7) + 1 / 7 * math.log(4 / 7),
        3 / 49 * LN2,
        -3 / 49 * LN2,
        half("exo_pair", label_smoothing=0.25),
    ),
    # log 4/3 + (log 4) / 2 + (log 3/2) / 2; by c: (-1/4 + 3/8) / 2, by r: (1/3) / 2 / 2
    "nca_pair": Row(NICE, math.log(4 / 3) + 0.5 * math.log(4 * 3 / 2), 1 / 16, 1 / 12, half("nca_pair")),
    # log 4/3 + log 3/2 = log 2
    "bco_pair": Row(NICE, LN2, -1 / 8, 1 / 6, half("bco_pair")),
    # beta c - delta = log 3/2 (3/5), delta - beta r = log 4 (4/5)
    "bco_pair, shifted": Row(NICE, math.log(25 / 12), -0.2, 0.1, half("bco_pair", delta=LN2)),
    # (3 - 1)^2 + (-2.5 + 1)^2
    "sppo_hard": Row(at(3.0, -2.5), 6.25, 4.0, -3.0, half("sppo_hard")),
    # 1 - 3/4 + 1/3; slopes 3/16 and 2/9
    "apo_zero": Row(NICE, 7 / 12, -3 / 32, 1 / 9, half("apo_zero")),
    # 3/4 + 1 - 6/7; slopes 3/16 and 6/49
    "apo_down": Row(NICE, 25 / 28, (3 / 16 - 6 / 49) / 2, 3 / 49, half("apo_down")),
    # m = 6/7: (log 7/6) / 7 + (1/6) 6/7; by u: -1/7 - 6/49 log 7/6
    "discopop": Row(
        NICE,
        (math.log(7 / 6) + 1) / 7,
        (-1 / 7 - 6 / 49 * math.log(7 / 6)) / 2,
        (1 / 7 + 6 / 49 * math.log(7 / 6)) / 2,
        half("discopop", discopop_tau=1.0),
    ),
    # the log-ratios of NICE by token
    "sigmoid_norm": Row(
        at(4 * LN3, -8 * LN2), math.log(7 / 6), -1 / 28, 1 / 56, half("sigmoid_norm"), tokens=(2.0, 4.0)
    ),
    # log 6 - log 2 = log 3
    "odpo": Row(NICE, math.log(4 / 3), -0.125, 0.125, half("odpo", margin=LN2)),
    # u = 2: (2 - 1)^2
    "rebel": Row(at(1.0, -3.0), 1.0, 1.0, -1.0, half("rebel", reward_gap=1.0)),
    # log 4/3 + (log 3 - 1)^2 + (0 + 1)^2
    "cal_dpo": Row(at(LN3, 0.0), math.log(4 / 3) + (LN3 - 1) ** 2 + 1, -0.25 + 2 * (LN3 - 1), 2.25, half("cal_dpo")),
    # c < 0: c - r + 2 c = -3 + 3 + 2 log 3, times 1/2: log 3; by c three times as steep
    "dpop": Row(at(-1.0, -3 - 2 * LN3), math.log(4 / 3), -0.375, 0.125, half("dpop", dpop_lambda=2.0)),
    # one pair has nothing to be sorted with
    "aot": Row(NICE, math.log(7 / 6), -1 / 14, 1 / 14, half("aot")),
    "aot_unpaired": Row(NICE, math.log(7 / 6), -1 / 14, 1 / 14, half("aot_unpaired")),
    # averages -1 and -2 - 2 log 3: (1 + 2 log 3) / 2 - 1/2 = log 3
    "simpo": Row(
        (-2.0, 4 * (-2 - 2 * LN3), None, None), math.log(4 / 3), -1 / 16, 1 / 32, half("simpo", gamma=0.5), (2.0, 4.0)
    ),
    # 5 - 2 - (3 - log 3) = log 3; slopes -2/4 and 5/4
    "alphapo": Row(
        (-LN2, -math.log(5), None, None),
        math.log(4 / 3),
        -0.5,
        1.25,
        {"loss_type": "alphapo", "beta": 1.0, "alpha": 1.0, "gamma": 3 - LN3},
    ),
    # log 4/3, and the average of -1 over two tokens
    "cpo": Row((-1.0, -1 - 2 * LN3, None, None), math.log(4 / 3) + 0.5, -0.625, 0.125, half("cpo"), (2.0, 1.0)),
    "cpo, without": Row(
        (-1.0, -1 - 2 * LN3, None, None), math.log(4 / 3), -0.125, 0.125, half("cpo", nll_weight=0.0), (2.0, 1.0)
    ),
    # probabilities 1/2 and 1/4, odds 1 and 1/3: log 2 + (log 4/3) / 2; slopes -1 - (1/4) 2 / 2 and (1/4) (4/3) / 2
    "orpo": Row((-LN2, -2 * LN2, None, None), LN2 + 0.5 * math.log(4 / 3), -1.25, 1 / 6, half("orpo")),
    "sft": Row((-3.0, -5.0, None, None), 1.5, -0.5, 0.0, half("sft"), (2.0, 1.0)),
    # log 7/6 + 0.3 * 10 / 2
    "sigmoid with nll": Row(
        NICE, math.log(7 / 6) + 1.5, -1 / 14 - 0.15, 1 / 14, half("sigmoid", nll_weight=0.3), (2.0, 1.0)
    ),
    # MPO: 0.8 log 7/6 + 0.2 log 2 + 0.5 * 10 / 2
    "sigmoid, bco_pair and sft": Row(
        NICE,
        0.8 * math.log(7 / 6) + 0.2 * LN2 + 2.5,
        -0.8 / 14 - 0.2 / 8 - 0.25,
        0.8 / 14 + 0.2 / 6,
        half(("sigmoid", "bco_pair", "sft"), loss_weights=(0.8, 0.2, 0.5)),
        (2.0, 1.0),
    ),
    # scores 1 - exp(-x) of log 2 and -log 2: 1/2 and -1; u = 3/4; slopes of the scores 1/2 and 2
    "sigmoid, forward KL": Row(
        at(LN2, -LN2),
        math.log1p(math.exp(-0.75)),
        -0.5 * 0.5 / (1 + math.exp(0.75)),
        0.5 * 2.0 / (1 + math.exp(0.75)),
        half("sigmoid", f_divergence="forward_kl"),
    ),
    # scores log 2 + log s(x) of log 3 and -log 3: u = log(3/4 / (1/4)) / 2; slopes of the scores 1/4 and 3/4
    "sigmoid, JS": Row(
        at(LN3, -LN3),
        math.log1p(1 / math.sqrt(3)),
        -0.5 * 0.25 / (1 + math.sqrt(3)),
        0.5 * 0.75 / (1 + math.sqrt(3)),
        half("sigmoid", f_divergence="js"),
    ),
    # alpha 2: scores exp(x) - 1 of log 2 and 0: 1 and 0; max(0, 1 - 1/2)
    "hinge, alpha": Row(at(LN2, 0.0), 0.5, -1.0, 0.5, half("hinge", f_divergence="alpha", f_alpha=2.0)),
}
OPTIONS = {case: row.options for case, row in HAND.items()}


@dataclasses.dataclass(frozen=True)
class RowWithKL:
    """One pair of a loss that reads the KL divergences from the reference, chosen and rejected."""

    row: Row
    kl: tuple[float, float]
    chosen_kl_grad: float
    rejected_kl_grad: float


# With beta 1/2 and D = 2 log 6, what is taken from D is 2 log 2 in each row: u = log 3, whose loss falls by 1/4.
HAND_KL = {
    # k_r - k_c = 2 log 2
    "tdpo1": RowWithKL(Row(NICE, math.log(4 / 3), -0.125, 0.125, half("tdpo1")), (LN2, 3 * LN2), -0.125, 0.125),
    # half of k_r - k_c = 4 log 2, and the chosen side is a constant
    "tdpo2": RowWithKL(Row(NICE, math.log(4 / 3), -0.125, 0.125, half("tdpo2")), (LN2, 5 * LN2), 0.0, 0.0625),
    # twice k_r - k_c = log 2
    "tdpo2, alpha": RowWithKL(
        Row(NICE, math.log(4 / 3), -0.125, 0.125, half("tdpo2", tdpo_alpha=2.0)), (LN2, 2 * LN2), 0.0, 0.25
    ),
}


def parts_of(case):
    """The losses of a case, as their entries have them."""
    names = OPTIONS[case]["loss_type"]
    return [LOSSES[name] for name in ((names,) if isinstance(names, str) else names)]


def referenced(case):
    return any(spec.needs_reference for spec in parts_of(case))
