"""Every kernel of a backend against the oracle at the widths of real models: ``python -m tests.first_light.widths``.

It prints one JSON object a line: a case's name, its broken rules, and at the end which Triton kernels were launched.
"""

import argparse
import json
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
from torch.profiler import ProfilerActivity, profile

from dpo_kernels.kernels import verdicts
from dpo_kernels.planning import schedules
from tests import cases
from tests.cases import RICH

# The kernels that the cases below must launch on the backend triton.
TRITON_KERNELS = (
    "apply_bias_scale_cap",
    "reduce_rows",
    "dlogits_rows",
    "softmax_grad_rows",
    "sigmoid_sequence_loss",
    "linear_logps",
    "linear_dlogits",
    "add_label_rows",
    "to_input_rows",
    "scale_and_round",
    "float16_scales",
    "count_scored",
    "write_packed",
)


class Width(NamedTuple):
    """A head, and what is done with it."""

    hidden: int
    vocab: int
    dtype: torch.dtype
    strategy: str
    frozen: bool = False
    rich: bool = False  # bias, scale, softcap and statistics
    by_kernel: bool = False  # the backend's own kernel recomputes logits, though the library is predicted to be faster


BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
GPU = {
    "8B head, trainable": Width(4096, 128256, BF16, "chunked"),
    "8B head, frozen": Width(4096, 128256, BF16, "chunked", frozen=True),
    "8B head, streamed": Width(4096, 128256, BF16, "streaming"),
    "narrow head, logits recomputed in a kernel": Width(1024, 128256, BF16, "streaming", by_kernel=True),
    "softcap, bias and statistics, 256000 tokens": Width(2304, 256000, BF16, "recompute", rich=True),
    "8B head, float16": Width(4096, 128256, FP16, "chunked"),
    "8B head, float16, frozen": Width(4096, 128256, FP16, "chunked", frozen=True),
    "odd vocabulary, float32": Width(1024, 50257, FP32, "chunked"),
    "float32, streamed": Width(1024, 128256, FP32, "streaming"),
}
# The same, small: a dry run on a CPU.
SMALL = {name: each._replace(hidden=16, vocab=307) for name, each in GPU.items()}
PAIRS, LENGTH = 3, 40
# In the place of the strategies of the small cases, some of which have a scratch to match.
STRATEGIES = {name: (name, None) for name in ("chunked", "recompute", "streaming")}


def inputs_of(case: Width, device: str) -> dict[str, Any]:
    """Half the labels are likely; weights are such that logits are neither flat nor one-hot."""
    g = torch.Generator().manual_seed(0)
    hidden = torch.randn(2 * PAIRS, LENGTH, case.hidden, generator=g).to(device, case.dtype)
    weight = (torch.randn(case.vocab, case.hidden, generator=g) * 3.0 * case.hidden**-0.5).to(device, case.dtype)
    likely = torch.stack([(rows.float() @ weight.float().t()).argmax(-1) for rows in hidden])
    random = torch.randint(0, case.vocab, (2 * PAIRS, LENGTH), generator=g).to(device)
    sure = (torch.rand(2 * PAIRS, LENGTH, generator=g) < 0.5).to(device)
    inputs = {"hidden": hidden.requires_grad_(), "weight": weight, "labels": torch.where(sure, likely, random)}
    if case.rich:
        inputs["bias"] = (torch.randn(case.vocab, generator=g) * 0.5).to(device, case.dtype)
    for name in ("weight", "bias"):
        if name in inputs and not case.frozen:
            inputs[name].requires_grad_()
    return inputs


def judged(device: str, backend: str, chosen: dict[str, Width]) -> Iterator[dict[str, Any]]:
    """Yield the name and the broken rules of each case, and the Triton kernels that ran."""
    activities = [ProfilerActivity.CUDA] if device == "cuda" else [ProfilerActivity.CPU]
    launched: set[str] = set()
    for name, case in chosen.items():
        keywords = {"reference_free": True, "beta": 0.3, **(RICH if case.rich else {})}
        with profile(activities=activities) as seen:
            try:
                with _as_told(case):
                    broken = cases.broken_by(inputs_of(case, device), keywords, case.dtype, case.strategy, backend)
            except (AssertionError, RuntimeError, ValueError) as error:  # the cases after it may still run
                broken = [f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:300]}"]
        launched |= {kernel for kernel in TRITON_KERNELS for event in seen.events() if kernel in event.name}
        yield {"case": name, "broken": broken}
        if device == "cuda":
            torch.cuda.empty_cache()
    yield {"launched": sorted(launched)}


@contextmanager
def _as_told(case: Width) -> Iterator[None]:
    """The strategies of models, no self-check that would launch every kernel, and the kernel that recomputes."""
    with ExitStack() as patches:
        patches.enter_context(patch.dict(cases.STRATEGIES, STRATEGIES))
        patches.enter_context(patch.dict(os.environ, {verdicts.SWITCH: "0"}))
        if case.by_kernel:
            patches.enter_context(patch.object(schedules, "gpu_at", lambda device: None))
        yield


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.first_light.widths", description=__doc__)
    parser.add_argument("device", choices=("cpu", "cuda"))
    parser.add_argument("backend")
    asked = parser.parse_args(arguments)
    for found in judged(asked.device, asked.backend, GPU if asked.device == "cuda" else SMALL):
        print(json.dumps(found), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
