"""Tokens that a head is nearly certain of: log-probs and gradients to the last digits, however small they are.

Each hidden state picks one column of the head, which holds its logits: multiples of 1/64, so that float32 has the
products and every difference of logits exactly, and each row of logits comes back as a column of the head's gradient.
The truth is formed in float64 from the differences alone, where nothing cancels.
"""

from typing import NamedTuple

import torch
from torch import Tensor

import dpo_kernels as dk
from tests.cases import STRATEGIES, VOCAB
from tests.tolerance import exponential_error

# Nats from the largest other logit to the label's, by sequence: chosen, then rejected.
MARGINS = (5.0, 16.0, 18.0, 30.0, -3.0, 40.0, 0.0, 20.0, 17.0, 25.0)
TOKENS = 2  # in each sequence, at most
BETA = 0.3
# Of a value formed of float32 exponentials: each is within 2 ulp (2.4e-7), sums, quotients and coefficients add theirs.
# On a GPU the error of an exponential grows with its distance from 1 (tests/tolerance.py).
RELATIVE = 1e-6
FARTHEST = max(MARGINS) + 4.0  # nats from a row's maximum to a logit; the others lie in an interval of 4


class Certain(NamedTuple):
    """Hidden states (S, T, N), a head (V, N) and labels (S, T); row n of the N scored ones has the logits W[:, n]."""

    hidden: Tensor
    weight: Tensor
    labels: Tensor

    @property
    def logits(self) -> Tensor:
        """(N, V), float64."""
        return self.weight.detach().double().t()


class Truth(NamedTuple):
    """Of each row, in float64: its log-prob, and the derivatives of that by its logits."""

    logp: Tensor  # (N,)
    slope: Tensor  # (N, V)


def certain(vocab: int, dtype: torch.dtype = torch.float32, softcap: float | None = None) -> Certain:
    """Two sequences for each pair of margins; the last one has a single token."""
    g = torch.Generator().manual_seed(vocab)
    margins = torch.tensor(MARGINS).repeat_interleave(TOKENS)[:-1]
    count = margins.shape[0]
    step = 64 if dtype == torch.float32 else 2  # bfloat16 has 8 bits
    z = -(torch.rand(count, vocab, generator=g) * 4 * step).floor() / step
    labels = torch.randint(0, vocab, (count,), generator=g)
    labels[0], labels[1] = 0, vocab - 1
    z[torch.arange(count), labels] = -9.0
    z[torch.arange(count), labels] = z.amax(1) + margins
    if softcap is None:
        z -= (torch.arange(count) % 4 * 8)[:, None]  # the label's logit on both sides of 0
    all_labels = torch.full((len(MARGINS) * TOKENS,), -100)
    all_labels[:count] = labels
    hidden = torch.eye(count + 1, count)  # the row that is not scored is 0
    shape = (len(MARGINS), TOKENS)
    return Certain(
        hidden.view(*shape, count).to(dtype).requires_grad_(),
        z.t().contiguous().to(dtype).requires_grad_(),
        all_labels.view(shape),
    )


def truth(problem: Certain) -> Truth:
    """What the float64 oracle gives where it keeps the digits: log_softmax there is off by 1e-16 of the logits."""
    labels = problem.labels[problem.labels >= 0]
    own = torch.nn.functional.one_hot(labels, problem.logits.shape[1]).bool()
    z = problem.logits
    e = (z - z.gather(1, labels[:, None])).exp().masked_fill(own, 0.0)
    others = e.sum(1, keepdim=True)
    return Truth(-others[:, 0].log1p(), torch.where(own, others, -e) / (1 + others))


def odds_ratio(chosen: Tensor, rejected: Tensor, beta: float = BETA) -> Tensor:
    """ORPO of average log-probs that are not 0, Hong et al., arXiv 2403.07691, eq. 6 and 7."""
    log_odds = [a - (-a.expm1()).log() for a in (chosen, rejected)]
    return -chosen + beta * torch.nn.functional.softplus(log_odds[1] - log_odds[0])


def relative_error(got: Tensor, wanted: Tensor) -> float:
    """The largest, each value by its own size; 0 must be 0."""
    got, wanted = got.detach().double(), wanted.detach().double()
    error = torch.where(got == wanted, torch.zeros_like(wanted), (got - wanted).abs() / wanted.abs())
    return float(error.nan_to_num(nan=torch.inf).max())


def off_by_hidden(grad: Tensor, problem: Certain, slopes: Tensor) -> float:
    """The largest error of d hidden, each by the size of what was added up, in parts of what is allowed.

    A GEMM may add V terms one after another: the roundings of such a sum walk about sqrt(V) of them far.
    """
    weight = problem.weight.detach().double()
    wanted, size = slopes @ weight, slopes.abs() @ weight.abs()
    error = (grad.double().flatten(0, 1)[: slopes.shape[0]] - wanted).abs() / size
    return float(error.nan_to_num(torch.inf).max()) / (
        allowed(problem.weight.dtype) + weight.shape[0] ** 0.5 * 2.0**-24
    )


def allowed(dtype: torch.dtype = torch.float32) -> float:
    """The relative error of a value; in bfloat16 with a rounding of the tile and one of the result, both to 8 bits."""
    exponentials = RELATIVE + exponential_error(FARTHEST)
    return exponentials if dtype == torch.float32 else (1 + 2.0**-8) ** 2 - 1 + exponentials


def _options(problem: Certain, strategy: str) -> dict[str, str | int | None]:
    name, scratch = STRATEGIES[strategy]
    if scratch is not None and name == "chunked":
        scratch = scratch * problem.weight.shape[0] // VOCAB
    return {"strategy": name, "scratch_bytes": scratch}


def off_log_probs(problem: Certain, strategy: str, backend: str) -> dict[str, float]:
    """Errors, in parts of what is allowed, of token log-probs and their gradients, trainable and frozen head."""
    how = {**_options(problem, strategy), "backend": backend}
    hidden, weight, labels = problem
    wanted, scored = truth(problem), labels >= 0
    upstream = torch.linspace(0.5, 2.0, int(scored.sum())).to(torch.float32)
    slopes = wanted.slope * upstream.double()[:, None]
    off = {}
    for frozen in (False, True):
        logp = dk.fused_token_logps(hidden, weight.detach() if frozen else weight, labels, **how)[scored]
        kind = "frozen " if frozen else ""
        grads = torch.autograd.grad(logp, (hidden,) if frozen else (hidden, weight), upstream)
        off[f"{kind}logp"] = relative_error(logp, wanted.logp) / allowed()
        off[f"{kind}dhidden"] = off_by_hidden(grads[0], problem, slopes)
        if not frozen:
            off["dweight"] = relative_error(grads[1].t(), slopes) / allowed(weight.dtype)
    return off


def off_orpo(problem: Certain, strategy: str, backend: str, reduction: str = "mean") -> dict[str, float]:
    """The same of ORPO's value by the pairs' log-probs, and of its gradient by every logit."""
    how = {**_options(problem, strategy), "backend": backend, "reduction": reduction}
    hidden, weight, labels = problem
    wanted, counts = truth(problem), (labels >= 0).sum(1)
    logp = torch.zeros(labels.shape, dtype=torch.float64)
    logp[labels >= 0] = wanted.logp
    sums = logp.sum(1).requires_grad_()
    chosen, rejected = (sums / counts).chunk(2)
    losses = odds_ratio(chosen, rejected)
    loss = losses.mean() if reduction == "mean" else losses
    (by_sequence,) = torch.autograd.grad(loss.sum(), sums)
    slopes = wanted.slope * by_sequence.repeat_interleave(counts)[:, None]
    got = dk.fused_dpo_loss(hidden, weight, labels, loss_type="orpo", beta=BETA, stats=("token_logps",), **how)
    grads = torch.autograd.grad(got.loss.sum(), (hidden, weight))
    return {
        "loss": relative_error(got.loss, loss) / allowed(),
        "sums": relative_error(torch.cat([got.chosen_logps, got.rejected_logps]), sums) / allowed(),
        "tokens": relative_error(got.stats["token_logps"], logp) / allowed(),
        "dhidden": off_by_hidden(grads[0], problem, slopes),
        "dweight": relative_error(grads[1].t(), slopes) / allowed(weight.dtype),
    }


def broken(off: dict[str, float]) -> dict[str, float]:
    """What is further off than allowed, and how many times."""
    return {name: times for name, times in off.items() if not times <= 1.0}
