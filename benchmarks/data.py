"""Tensors of a case, with logits peaked like a trained model's or Gaussian.

**The peaked recipe.** Rows of the head are Gaussian of unit length on average. A token has ``CANDIDATES`` = 8 plausible
continuations, drawn at random, with wanted logits ``top - FALL * log(1 + rank)``; ``top`` varies by token as
``log V + N(TOP, SPREAD)``, so that some tokens are certain and some wide open, as in language. The hidden state is the
sum of the candidates' rows times their wanted logits: a unit row's product with itself is 1 and with another about
``1 / sqrt(H)``, so the wanted logits come out, over a background that is Gaussian like the rest of a vocabulary. The
label is candidate ``rank`` with probability proportional to ``1 / (1 + rank) ** 2``. With H of 1024 and more this gives
a mean target probability of 0.4 to 0.5 and an entropy of about two nats. What came out is measured and printed with the
results, with the *keep-rate*: the share of softmax entries above 2^-12, the threshold of cut-cross-entropy's filter.

**The Gaussian recipe**: hidden states are Gaussian and logits have unit variance; every entry of the softmax is small.

Cached reference log-probs are the policy's own plus Gaussian noise of ``REFERENCE_NOISE`` nats, so that coefficients of
pairs differ and none is saturated. A reference scored in the call has hidden states a little off the policy's.
"""

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from benchmarks import truth
from benchmarks.cases import Case

CANDIDATES = 8
TOP, SPREAD, FALL = 4.0, 3.0, 2.5
REFERENCE_NOISE = 5.0
KEEP_THRESHOLD = 2.0**-12
IGNORE = -100
BETA = 0.1
SAMPLE_ROWS = 256  # rows that the statistics are taken from


@dataclass(frozen=True)
class Data:
    """What every provider gets. ``hidden`` and, if trainable, ``weight`` are leaves that collect ``.grad``."""

    case: Case
    hidden: Tensor  # (S, T, H), all chosen then all rejected
    weight: Tensor  # (V, H)
    labels: Tensor  # (S, T), IGNORE where not scored
    ref_logps: Tensor | None  # (S,) float32
    ref_hidden: Tensor | None  # (S, T, H)
    ref_weight: Tensor | None  # (V, H); None beside ref_hidden shares the policy's head

    def clear(self) -> None:
        """Forget gradients."""
        self.hidden.grad = self.weight.grad = None

    @property
    def output_bytes(self) -> int:
        """Of the gradients that a call leaves behind."""
        leaves = (self.hidden, self.weight)
        return sum(t.numel() * t.element_size() for t in leaves if t.requires_grad)

    @property
    def reference(self) -> dict[str, Tensor | None]:
        """The keyword arguments of ``fused_dpo_loss`` and of the oracle that say what the reference is."""
        given = {"ref_logps": self.ref_logps, "ref_hidden": self.ref_hidden, "ref_weight": self.ref_weight}
        return {name: value for name, value in given.items() if value is not None}


def make(case: Case, device: torch.device, seed: int = 0, weight: Tensor | None = None) -> Data:
    """Draw the tensors of a case. A ``weight`` of the right shape is shared instead of drawn."""
    dtype = getattr(torch, case.dtype)
    generator = torch.Generator(device).manual_seed(seed)
    if weight is None:
        # Drawn block by block in float32: a vocabulary-sized float32 copy would be seen in the peak memory.
        weight = torch.empty(case.vocab, case.hidden, dtype=dtype, device=device)
        for block in weight.split(8192):
            block.copy_(torch.randn(block.shape, generator=generator, device=device).div_(math.sqrt(case.hidden)))
    weight = weight.detach()
    hidden = torch.empty(case.sequences, case.width, case.hidden, dtype=dtype, device=device)
    targets = torch.empty(case.sequences, case.width, dtype=torch.int64, device=device)
    fill = _peaked if case.distribution == "peaked" else _gaussian
    for rows, labels in zip(hidden.view(-1, case.hidden).split(1024), targets.view(-1).split(1024), strict=True):
        fill(rows, labels, weight, generator)
    labels = targets.masked_fill(~_scored(case, device), IGNORE)
    data = Data(case, hidden.requires_grad_(), weight.requires_grad_(case.trainable), labels, None, None, None)
    if case.reference == "cached":
        logps = truth.forward(data).sequence_logps()
        noise = REFERENCE_NOISE * torch.randn(logps.shape, generator=generator, device=device)
        return replace(data, ref_logps=(logps + noise).float())
    scale = 1 + 0.02 * torch.randn(hidden.shape[:2], generator=generator, device=device)
    return replace(
        data,
        ref_hidden=(hidden.detach() * scale[..., None].to(dtype)),
        ref_weight=weight.detach() * 0.99 if case.reference == "own" else None,
    )


def statistics(data: Data) -> dict[str, float]:
    """Of the first scored rows: mean target probability, mean entropy in nats, largest logit, keep-rate."""
    with torch.no_grad():
        scored = data.labels.view(-1) != IGNORE
        rows = data.hidden.detach().view(-1, data.case.hidden)[scored][:SAMPLE_ROWS]
        labels = data.labels.view(-1)[scored][:SAMPLE_ROWS]
        totals = torch.zeros(4, dtype=torch.float64, device="cpu")
        for x, y in zip(rows.split(32), labels.split(32), strict=True):
            logits = truth.logits(x, data.weight.detach(), torch.float32)
            logp = logits.log_softmax(-1)
            p = logp.exp()
            totals[0] += p.gather(-1, y[:, None]).sum().item()
            totals[1] -= (p * logp).sum().item()
            totals[2] += (p > KEEP_THRESHOLD).sum().item()
            totals[3] = max(totals[3].item(), logits.max().item())
    count = rows.shape[0]
    return {
        "target_probability": float(totals[0] / count),
        "entropy_nats": float(totals[1] / count),
        "keep_rate": float(totals[2] / (count * data.case.vocab)),
        "largest_logit": float(totals[3]),
        "rows": count,
    }


def _scored(case: Case, device: torch.device) -> Tensor:
    at = torch.arange(case.width, device=device)
    lengths = torch.tensor(case.lengths, device=device)[:, None]
    return (at >= case.prompt_length) & (at < case.prompt_length + lengths)


def _peaked(rows: Tensor, labels: Tensor, weight: Tensor, generator: torch.Generator) -> None:
    """Fill hidden states and labels in place by the peaked recipe."""
    count, vocab, device = rows.shape[0], weight.shape[0], rows.device
    candidates = torch.randint(vocab, (count, CANDIDATES), generator=generator, device=device)
    rank = torch.arange(1, CANDIDATES + 1, device=device, dtype=torch.float32)
    top = math.log(vocab) + TOP + SPREAD * torch.randn(count, 1, generator=generator, device=device)
    wanted = (top - FALL * rank.log()).clamp_(min=0)
    mixed = torch.zeros(rows.shape, dtype=torch.float32, device=device)
    for k in range(CANDIDATES):
        mixed.addcmul_(weight[candidates[:, k]].float(), wanted[:, k : k + 1])
    rows.copy_(mixed)
    chosen = torch.multinomial(rank.pow(-2).expand(count, -1), 1, generator=generator)
    labels.copy_(candidates.gather(1, chosen)[:, 0])


def _gaussian(rows: Tensor, labels: Tensor, weight: Tensor, generator: torch.Generator) -> None:
    """Fill hidden states and labels in place: logits of unit variance, labels at random."""
    rows.copy_(torch.randn(rows.shape, generator=generator, device=rows.device))
    labels.copy_(torch.randint(weight.shape[0], labels.shape, generator=generator, device=rows.device))
