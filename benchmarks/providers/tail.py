"""DPO on top of per-token log-probs, as a user of a log-prob head writes it."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.data import BETA, IGNORE, Data
from benchmarks.providers import Outputs, Step

# Rows (R, H), head (V, H), labels (R,) -> log-probs (R,), anything where a label is IGNORE.
TokenLogps = Callable[[Tensor, Tensor, Tensor], Tensor]


def dpo(policy: Tensor, ref: Tensor) -> Tensor:
    """Mean DPO loss of sequence log-probs, chosen then rejected (Rafailov et al., arXiv 2305.18290, eq. 7)."""
    chosen, rejected = (policy - ref).chunk(2)
    return -F.logsigmoid(BETA * (chosen - rejected)).mean()


def step(data: Data, token_logps: TokenLogps, *, drop: bool) -> Step:
    """A step around a log-prob head. ``drop`` gives it the scored rows only, as its users do where it pays."""
    scored = data.labels != IGNORE

    def sequences(hidden: Tensor, weight: Tensor) -> Tensor:
        if drop:
            logps = token_logps(hidden[scored], weight, data.labels[scored])
            return logps.new_zeros(scored.shape).masked_scatter(scored, logps).sum(-1)
        logps = token_logps(hidden.flatten(0, 1), weight, data.labels.flatten())
        return logps.view(scored.shape).masked_fill(~scored, 0).sum(-1)

    def run() -> Outputs:
        ref = data.ref_logps
        if ref is None:
            assert data.ref_hidden is not None
            with torch.no_grad():
                ref = sequences(data.ref_hidden, data.weight if data.ref_weight is None else data.ref_weight)
        logps = sequences(data.hidden, data.weight)
        loss = dpo(logps, ref)
        loss.backward()
        return Outputs(loss, logps)

    return run
