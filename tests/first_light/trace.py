"""A profiler's trace of one call, and what it says: ``python -m tests.first_light.trace DEVICE FOLDER``.

It counts launches, finds how long the device is idle before the first matrix product, and prints one JSON object. The
folder then has ``trace.json``, which a viewer such as Perfetto shows.
"""

import argparse
import json
import re
import sys
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

import dpo_kernels as dk

# Names of kernels that multiply: of cuBLAS, CUTLASS and ours; and of torch's operations on a CPU.
PRODUCT = re.compile(r"gemm|cutlass|cublas|nvjet|xmma|linear_logps|linear_dlogits|^aten::(mm|addmm)$|matmul_bfloat16_")
NO_KERNEL = re.compile(r"^(Memcpy|Memset)")
LARGEST = 12  # kernels that the report lists


class Event(NamedTuple):
    """A kernel of the device, or an operation of the host; microseconds."""

    name: str
    begin: float
    end: float


def analysis(events: Iterable[Event]) -> dict[str, Any]:
    """What a call did: launches, its span and how much of it was idle, before the first product and in all."""
    ordered = sorted(events, key=lambda event: event.begin)
    if not ordered:
        return {"launches": 0}
    origin = ordered[0].begin
    first = next((event.begin for event in ordered if PRODUCT.search(event.name)), None)
    by_name: dict[str, list[float]] = {}
    for event in ordered:
        by_name.setdefault(event.name, []).append(event.end - event.begin)
    largest = sorted(by_name.items(), key=lambda item: -sum(item[1]))[:LARGEST]
    end = max(event.end for event in ordered)
    return {
        "launches": sum(not NO_KERNEL.match(event.name) for event in ordered),
        "copies": sum(bool(NO_KERNEL.match(event.name)) for event in ordered),
        "products": sum(bool(PRODUCT.search(event.name)) for event in ordered),
        "span_us": round(end - origin, 1),
        "idle_us": round(end - origin - _busy(ordered, end), 1),
        "before_first_product_us": None if first is None else round(first - origin, 1),
        "idle_before_first_product_us": None if first is None else round(first - origin - _busy(ordered, first), 1),
        "launches_before_first_product": None if first is None else sum(event.begin < first for event in ordered),
        "largest": [[name, len(times), round(sum(times), 1)] for name, times in largest],
    }


def _busy(ordered: Sequence[Event], until: float) -> float:
    """Microseconds before ``until`` in which something ran; events may overlap."""
    busy, reached = 0.0, ordered[0].begin
    for event in ordered:
        end = min(event.end, until)
        if end > reached:
            busy += end - max(event.begin, reached)
            reached = end
    return busy


def traced(device: str, folder: Path, sizes: tuple[int, int, int, int]) -> dict[str, Any]:
    """Trace one forward and backward after three others; ``sizes`` are pairs, length, H and V."""
    pairs, length, width, vocab = sizes
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    g = torch.Generator().manual_seed(0)
    hidden = torch.randn(2 * pairs, length, width, generator=g).to(device, dtype).requires_grad_()
    weight = torch.empty(vocab, width, device=device, dtype=dtype).normal_(std=width**-0.5).requires_grad_()
    labels = torch.randint(0, vocab, (2 * pairs, length), generator=g).to(device)
    ref_logps = torch.full((2 * pairs,), -float(length)).to(device)
    cuda = device == "cuda"

    def call() -> None:
        hidden.grad = weight.grad = None
        dk.fused_dpo_loss(hidden, weight, labels, ref_logps=ref_logps).loss.backward()
        if cuda:
            torch.cuda.synchronize()

    for _ in range(3):
        call()
    begin = time.perf_counter()
    call()
    wall = 1e3 * (time.perf_counter() - begin)
    with profile(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]) as seen:
        call()
    wanted = DeviceType.CUDA if cuda else DeviceType.CPU
    events = [
        Event(event.name, event.time_range.start, event.time_range.end)
        for event in seen.events()
        if event.device_type == wanted and (cuda or event.name.startswith(("aten::", "dpo_kernels::")))
    ]
    folder.mkdir(parents=True, exist_ok=True)
    seen.export_chrome_trace(str(folder / "trace.json"))
    plan = dk.explain(hidden, weight, labels, ref_logps=ref_logps)
    sizes_said = {"N": 2 * pairs * length, "H": width, "V": vocab, "dtype": str(dtype).removeprefix("torch.")}
    how = {"backend": plan.backend, "strategy": plan.strategy, "chunks": plan.chunks, "wall_ms": round(wall, 3)}
    return sizes_said | how | analysis(events)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.first_light.trace", description=__doc__)
    parser.add_argument("device", choices=("cpu", "cuda"))
    parser.add_argument("folder", type=Path)
    asked = parser.parse_args(arguments)
    sizes = (4, 256, 4096, 128256) if asked.device == "cuda" else (2, 16, 32, 1024)
    print(json.dumps(traced(asked.device, asked.folder, sizes)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
