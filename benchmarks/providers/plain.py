"""The floor and full logits: what torch alone does."""

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.cases import Case
from benchmarks.data import IGNORE, Data
from benchmarks.providers import Outputs, Provider, Step, Variant, tail

FLOOR_BYTES = 4 * 2**30  # of logits held by the floor; beyond it goes chunk by chunk, adding dW up in place


def floor(data: Data, variant: Variant) -> Step:
    """The GEMMs of the case on its scored rows and nothing else, into preallocated outputs of the same dtype."""
    scored = data.labels != IGNORE
    x, w = data.hidden.detach()[scored], data.weight.detach()
    size = max(1, min(x.shape[0], FLOOR_BYTES // (w.shape[0] * w.element_size())))
    z, dx = torch.empty(size, w.shape[0], dtype=w.dtype, device=w.device), torch.empty_like(x)
    dw = torch.empty_like(w) if data.weight.requires_grad else None
    ref_x = None if data.ref_hidden is None else data.ref_hidden[scored]
    ref_w = w if data.ref_weight is None else data.ref_weight

    def run() -> None:
        for at in range(0, x.shape[0], size):
            rows, logits = x[at : at + size], z[: min(size, x.shape[0] - at)]
            if ref_x is not None:
                torch.mm(ref_x[at : at + size], ref_w.t(), out=logits)
            torch.mm(rows, w.t(), out=logits)
            torch.mm(logits, w, out=dx[at : at + size])
            if dw is not None and at == 0:
                torch.mm(logits.t(), rows, out=dw)
            elif dw is not None:
                dw.addmm_(logits.t(), rows)

    return run


def _token_logps(rows: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """Logits in the model's dtype, log-softmax in float32: as training code has it."""
    logps = F.linear(rows, weight).float().log_softmax(-1)
    return logps.gather(-1, labels.clamp(min=0)[:, None])[:, 0]


def full_logits(data: Data, variant: Variant) -> Step:
    """Every position, prompt and padding too."""
    return tail.step(data, _token_logps, drop=False)


def full_logits_scored(data: Data, variant: Variant) -> Step:
    """The scored rows only."""
    return tail.step(data, _token_logps, drop=True)


def full_logits_compiled(data: Data, variant: Variant) -> Step:
    """The loss of every position in one compiled graph."""
    scored = data.labels != IGNORE

    def sequences(hidden: Tensor, weight: Tensor) -> Tensor:
        logps = _token_logps(hidden.flatten(0, 1), weight, data.labels.flatten())
        return logps.view(scored.shape).masked_fill(~scored, 0).sum(-1)

    @torch.compile(fullgraph=True, dynamic=False)
    def loss_of(hidden: Tensor, weight: Tensor, ref: Tensor) -> tuple[Tensor, Tensor]:
        logps = sequences(hidden, weight)
        return tail.dpo(logps, ref), logps

    compiled_reference = torch.compile(sequences, fullgraph=True, dynamic=False)

    def run() -> Outputs:
        ref = data.ref_logps
        if ref is None:
            assert data.ref_hidden is not None
            with torch.no_grad():
                ref = compiled_reference(data.ref_hidden, data.weight if data.ref_weight is None else data.ref_weight)
        loss, logps = loss_of(data.hidden, data.weight, ref)
        loss.backward()
        return Outputs(loss, logps)

    return run


def _has_masked(case: Case) -> bool:
    return case.positions > case.tokens


PROVIDERS = [
    Provider(
        "floor",
        "floor",
        "bare GEMMs of the scored rows (logits, dX, dW unless frozen, logits of a computed reference) in the case's "
        "dtype, outputs preallocated: what the arithmetic alone takes at this precision",
        floor,
        level="few",
        gated=False,
    ),
    Provider(
        "full logits",
        "full logits",
        "logits of every position in the model's dtype, float32 log-softmax, autograd: the step that everybody writes",
        full_logits,
        level="few",
    ),
    Provider(
        "full logits, scored rows",
        "full logits",
        "the same after dropping prompt and padding by hand",
        full_logits_scored,
        level="all",
    ),
    Provider(
        "full logits, compiled",
        "full logits",
        "the same under torch.compile, in one graph",
        full_logits_compiled,
        level="all",
        compiles=("cpu", "cuda"),
    ),
]
