"""What the numbers should be, and how far a provider's may be off before it gets no time.

Two checks. **Reduced**: a copy of the case with the same H, V, dtype and recipe but fewer tokens is computed in float64
by the package's oracle (``dpo_kernels.reference``), and loss, sequence log-probs and every entry of dX and dW are
compared. **Full size**: at the shape that is timed, a float32 pass over blocks of logits that shares no code with any
provider gives loss and log-probs, and *sketches* of the gradients: ``dX R`` and ``dW R`` with a fixed random ``R`` of
``SKETCHES`` columns, which need no gradient GEMM (``dX R = dlogits (W R)``, ``dW R = dlogits^T (X R)``).

**The rule**, the same for everyone: an error may be ``FACTOR`` times that of full logits in plain torch in the same
dtype on the reduced copy, plus a few roundings. It catches what is wrong, not what is merely rounded; the errors
themselves are printed beside the times. NaN and infinities are red whatever the rule says.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from dpo_kernels.reference import dpo_loss_reference, sequence_logps_reference, token_logps_reference

if TYPE_CHECKING:
    from benchmarks.data import Data

FACTOR = 20.0
ROUNDINGS = 64  # of the result's dtype, allowed whatever full logits lose
SKETCHES = 8
BLOCK_BYTES = 256 * 2**20  # of float32 logits held by the full-size check
BETA = 0.1
IGNORE = -100
# What a provider's numbers mean. Some peers cannot take a cached reference, some know no preference.
OBJECTIVES = ("dpo", "dpo without reference", "cross-entropy")


def logits(rows: Tensor, weight: Tensor, dtype: torch.dtype) -> Tensor:
    """``rows @ weight.T`` in a wider dtype, a block of the vocabulary at a time."""
    out = torch.empty(rows.shape[0], weight.shape[0], dtype=dtype, device=rows.device)
    wide = rows.to(dtype)
    for into, block in zip(out.split(8192, dim=1), weight.split(8192), strict=True):
        into.copy_(wide @ block.to(dtype).t())
    return out


@dataclass(frozen=True)
class Forward:
    """Token log-probs and log-sum-exps of the scored rows, float64."""

    data: "Data"
    logps: Tensor  # (N,)
    lse: Tensor  # (N,)

    def sequence_logps(self) -> Tensor:
        """(S,), float64."""
        labels = self.data.labels
        full = torch.zeros(labels.shape, dtype=torch.float64, device=labels.device)
        full[labels != IGNORE] = self.logps
        return full.sum(-1)


def forward(data: "Data", reference: bool = False) -> Forward:
    """One pass over blocks of float32 logits, of the policy or of the reference scored in the call."""
    hidden, weight = data.hidden, data.weight
    if reference:
        assert data.ref_hidden is not None
        hidden, weight = data.ref_hidden, data.weight if data.ref_weight is None else data.ref_weight
    logps, lse = [], []
    for x, y in _blocks(data, hidden):
        z = logits(x, weight.detach(), torch.float32)
        total = z.logsumexp(-1).double()
        lse.append(total)
        logps.append(z.gather(-1, y[:, None])[:, 0].double() - total)
    return Forward(data, torch.cat(logps), torch.cat(lse))


def _blocks(data: "Data", hidden: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    scored = data.labels.reshape(-1) != IGNORE
    rows, labels = hidden.detach().reshape(-1, hidden.shape[-1])[scored], data.labels.reshape(-1)[scored]
    size = max(1, BLOCK_BYTES // (4 * data.weight.shape[0]))
    yield from zip(rows.split(size), labels.split(size), strict=True)


def _margins(data: "Data", objective: str, policy: Tensor, ref: Tensor | None) -> Tensor:
    ratio = policy if ref is None or objective != "dpo" else policy - ref.double()
    half = policy.shape[0] // 2
    return BETA * (ratio[:half] - ratio[half:])


def _loss_and_coefficients(data: "Data", objective: str, policy: Tensor, ref: Tensor | None) -> tuple[Tensor, Tensor]:
    """The loss and its derivative by each sequence's log-prob, by hand."""
    if objective == "cross-entropy":
        return -policy.sum(), torch.full_like(policy, -1.0)
    u = _margins(data, objective, policy, ref)
    c = BETA * torch.sigmoid(-u) / u.shape[0]
    return torch.nn.functional.softplus(-u).mean(), torch.cat([-c, c])


@dataclass(frozen=True)
class Sketch:
    """The full-size numbers of one objective."""

    loss: Tensor
    logps: Tensor  # (S,)
    hidden: Tensor  # (S, T, SKETCHES): dX R
    weight: Tensor | None  # (V, SKETCHES): dW R

    def errors(self, data: "Data", loss: Tensor, logps: Tensor | None) -> dict[str, float]:
        """Of a provider's loss, log-probs and the gradients that it left in ``data``."""
        grads = (("dX", data.hidden, self.hidden), ("dW", data.weight, self.weight))
        directions = sketch_directions(data)
        found = {
            name: _relative_l2(_project(leaf.grad, directions), wanted)
            for name, leaf, wanted in grads
            if wanted is not None
        }
        return {
            "loss": _distance(loss, self.loss),
            **({} if logps is None else {"logps": _distance(logps, self.logps)}),
            **found,
        }


def sketch_directions(data: "Data") -> Tensor:
    """R, ``(H, SKETCHES)``: random signs."""
    generator = torch.Generator(data.hidden.device).manual_seed(7)
    drawn = torch.randint(0, 2, (data.hidden.shape[-1], SKETCHES), generator=generator, device=data.hidden.device)
    return drawn.float() * 2 - 1


def _project(gradient: Tensor | None, directions: Tensor) -> Tensor | None:
    if gradient is None:
        return None
    flat = gradient.reshape(-1, gradient.shape[-1])
    out = torch.cat([block.float() @ directions for block in flat.split(8192)])
    return out.view(*gradient.shape[:-1], directions.shape[1])


def sketch(data: "Data", objective: str) -> Sketch:
    """Loss, log-probs and sketched gradients at full size: two passes over blocks of float32 logits."""
    with torch.no_grad():
        first = forward(data)
        policy = first.sequence_logps()
        ref = data.ref_logps
        if data.ref_hidden is not None and objective == "dpo":
            ref = forward(data, reference=True).sequence_logps()
        loss, by_sequence = _loss_and_coefficients(data, objective, policy, ref)
        scored = data.labels != IGNORE
        coefficients = by_sequence[:, None].expand(scored.shape)[scored].float()
        directions = sketch_directions(data)
        heads = _project(data.weight.detach(), directions)
        assert heads is not None
        rows_hidden, sums, at = [], torch.zeros_like(heads), 0
        for x, y in _blocks(data, data.hidden):
            here = slice(at, at + x.shape[0])
            z = logits(x, data.weight.detach(), torch.float32)
            z.sub_(first.lse[here, None].float()).exp_().mul_(-coefficients[here, None])
            z.scatter_add_(1, y[:, None], coefficients[here, None])
            rows_hidden.append(z @ heads)
            sums.addmm_(z.t(), x.float() @ directions)
            at += x.shape[0]
        placed = torch.zeros(*scored.shape, SKETCHES, device=scored.device)
        placed[scored] = torch.cat(rows_hidden)
    return Sketch(loss, policy, placed, sums if data.weight.requires_grad else None)


class Reduced:
    """The float64 numbers of a reduced copy, by objective, and what plain torch loses on it."""

    def __init__(self, data: "Data") -> None:
        self.data = data
        self._oracles: dict[str, tuple[Tensor, Tensor, Tensor, Tensor | None]] = {}
        self._tokens: Tensor | None = None

    def oracle(self, objective: str) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """Loss, sequence log-probs, dX and dW (None: frozen), in float64."""
        if objective not in self._oracles:
            self._oracles[objective] = _by_reference(self.data, objective, torch.float64)
        return self._oracles[objective]

    def errors(self, objective: str, loss: Tensor, logps: Tensor | None) -> dict[str, float]:
        """Of a provider's loss, log-probs and the gradients that it left in ``data``."""
        true_loss, true_logps, dX, dW = self.oracle(objective)
        found = {"loss": _distance(loss, true_loss)}
        if logps is not None:
            found["logps"] = _distance(logps, true_logps)
        found["dX"] = _relative_l2(self.data.hidden.grad, dX)
        if dW is not None:
            found["dW"] = _relative_l2(self.data.weight.grad, dW)
        return found

    def token_error(self, logps: Tensor) -> float:
        """Largest error of scored tokens' log-probs, nats."""
        if self._tokens is None:
            with torch.no_grad():
                hidden, weight = self.data.hidden.double(), self.data.weight.double()
                self._tokens = token_logps_reference(hidden, weight, self.data.labels)[self.data.labels != IGNORE]
        return _distance(logps, self._tokens)

    @cached_property
    def plain(self) -> dict[str, float]:
        """Errors of full logits in plain torch, in the dtype of the case."""
        loss, logps, dX, dW = _by_reference(self.data, "dpo", self.data.hidden.dtype)
        true_loss, true_logps, true_dX, true_dW = self.oracle("dpo")
        found = {
            "loss": _distance(loss, true_loss),
            "logps": _distance(logps, true_logps),
            "dX": _relative_l2(dX, true_dX),
        }
        if true_dW is not None:
            found["dW"] = _relative_l2(dW, true_dW)
        return found


def allowed(plain: dict[str, float], sketched: "Data", reduced: "Data", objective: str) -> dict[str, float]:
    """The largest error that is not red, for ``sketched``, given what plain torch loses on ``reduced``.

    A sequence's log-prob is a sum, so its error may grow with the tokens of a sequence; the loss depends on log-probs
    alone, by beta (cross-entropy: by 1 each).
    """
    eps = torch.finfo(reduced.hidden.dtype).eps
    longer = max(sketched.case.lengths) / max(reduced.case.lengths)
    logps = FACTOR * plain["logps"] * longer + ROUNDINGS * 2.0**-23 * max(sketched.case.lengths)
    slope = sketched.case.sequences if objective == "cross-entropy" else 2 * BETA
    bounds = {"loss": FACTOR * plain["loss"] + slope * logps, "logps": logps}
    for name in ("dX", "dW"):
        if name in plain:
            bounds[name] = FACTOR * plain[name] + ROUNDINGS * min(eps, 2.0**-15)
    return bounds


def is_green(errors: dict[str, float], bounds: dict[str, float]) -> bool:
    """Whether every error is finite and allowed."""
    return all(math.isfinite(error) and error <= bounds[name] for name, error in errors.items())


def _by_reference(data: "Data", objective: str, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """By the package's oracle, in a dtype."""
    hidden = data.hidden.detach().to(dtype).requires_grad_()
    weight = data.weight.detach().to(dtype).requires_grad_(data.weight.requires_grad)
    if objective == "cross-entropy":
        logps = sequence_logps_reference(hidden, weight, data.labels)
        loss = -logps.sum()
    else:
        reference: dict = {"reference_free": True}
        if objective == "dpo":
            reference = {name: value if name == "ref_logps" else value.to(dtype) for name, value in _given(data)}
        out = dpo_loss_reference(hidden, weight, data.labels, beta=BETA, **reference)
        loss, logps = out.loss, torch.cat([out.chosen_logps, out.rejected_logps])
    loss.backward()
    assert hidden.grad is not None
    return loss.detach(), logps.detach(), hidden.grad, weight.grad


def _given(data: "Data") -> list[tuple[str, Tensor]]:
    return [(name, value) for name, value in data.reference.items() if value is not None]


def _distance(value: Tensor, oracle: Tensor) -> float:
    return float((value.detach().double() - oracle.double()).abs().max())


def _relative_l2(value: Tensor | None, oracle: Tensor) -> float:
    """In blocks, so that no float64 copy of a whole gradient is made; a missing gradient is infinitely wrong."""
    if value is None or value.shape != oracle.shape:
        return math.inf
    error = scale = 0.0
    width = oracle.shape[-1]
    for a, b in zip(value.reshape(-1, width).split(8192), oracle.reshape(-1, width).split(8192), strict=True):
        error += float((a.double() - b.double()).pow(2).sum())
        scale += float(b.double().pow(2).sum())
    return math.sqrt(error / scale) if scale else math.sqrt(error)
