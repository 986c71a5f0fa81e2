"""This package, by backend and strategy; those that cannot run say why in the package's own words."""

from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

import dpo_kernels
from benchmarks.data import BETA, IGNORE, Data
from benchmarks.providers import Outputs, Provider, Step, Unavailable, Variant
from dpo_kernels.planning.tables import BACKEND_NAMES

EVERY_POSITION = ", every position"
ABOUT = {
    "chunked": "whole pairs in one reused scratch, gradient formed in the forward pass: 3 units, frozen head 2",
    "recompute": "one tile of logits at a time, log-sum-exp kept: 4 units, frozen head 2",
    "streaming": "a small fixed tile, nothing kept: 4 units, frozen head 3",
}


def fused(data: Data, variant: Variant, *, backend: str, strategy: str) -> Step:
    """``fused_dpo_loss`` as documented, with default scratch."""
    options: dict[str, Any] = {"beta": BETA, "backend": backend, "strategy": strategy, **data.reference}
    if data.case.reference == "shared":
        options["ref_weight"] = data.weight.detach()  # said in words: without it there is a warning that it will drift
    try:
        dpo_kernels.explain(data.hidden, data.weight, data.labels, **options)
    except (ValueError, ImportError) as error:
        raise Unavailable(str(error)) from None

    def run() -> Outputs:
        out = dpo_kernels.fused_dpo_loss(data.hidden, data.weight, data.labels, **options)
        out.loss.backward()
        return Outputs(out.loss, torch.cat([out.chosen_logps, out.rejected_logps]))

    return run


def every_position(data: Data, variant: Variant, **how: str) -> Step:
    """The same call with a label at every position: what masking saves, told in one run."""
    filled = torch.where(data.labels == IGNORE, data.labels.amax(dim=1, keepdim=True), data.labels)
    return fused(replace(data, labels=filled), variant, **how)


def token_logps(data: Data, *, backend: str, strategy: str) -> Tensor:
    """``fused_token_logps`` of the scored rows."""
    with torch.no_grad():
        logps = dpo_kernels.fused_token_logps(data.hidden, data.weight, data.labels, backend=backend, strategy=strategy)
    return logps[data.labels != IGNORE]


PROVIDERS = [
    Provider(
        f"ours/{backend}/{strategy}",
        "ours",
        f"fused_dpo_loss(backend={backend!r}, strategy={strategy!r}): {ABOUT[strategy]}",
        partial(fused, backend=backend, strategy=strategy),
        token_logps=partial(token_logps, backend=backend, strategy=strategy),
        level="few" if strategy == "chunked" else "all",
        compiles=("cuda",),
    )
    for backend in BACKEND_NAMES
    for strategy in ABOUT
] + [
    Provider(
        f"ours/{backend}/chunked{EVERY_POSITION}",
        "yardstick",
        f"ours/{backend}/chunked with no position masked: twice the scored tokens, a yardstick and not the same work",
        partial(every_position, backend=backend, strategy="chunked"),
        level="few",
        group="half",
        gated=False,
        compiles=("cuda",),
    )
    for backend in BACKEND_NAMES
]
