"""Regressions of speed, by pytest-benchmark: ``python -m pytest benchmarks/test_regressions.py``.

Each case's time is divided by that of its bare GEMMs, run in turn with it, and the ratio is compared with the one
stored for this kind of machine in ``benchmarks/baseline.json``. Absolute times are shown and never compared. A machine
without a baseline skips, saying so; ``--write-baseline`` stores one.
"""

import json
from pathlib import Path
from statistics import median
from typing import Any

import pytest

from benchmarks import cases, data, environment, providers
from benchmarks.devices import Device, open_device

BASELINE = Path(__file__).with_name("baseline.json")
SLOWER = 1.25  # times the stored ratio: beyond what rounds on a shared machine differ by
ROUNDS, GPU_ROUNDS = 15, 20
BACKENDS = {"cpu": ("cpp", "torch"), "cuda": ("triton", "cuda", "torch")}
CPU_CASES = (
    "quick/256x8192/n128/fp32/trainable",
    "quick/256x8192/n128/fp32/frozen",
    "quick/256x8192/n128/bf16/trainable",
    "quick/1024x32000/n256/fp32/half",
)
GPU_CASES = ("gpu/llama3-1b/n8192/bf16/trainable", "gpu/llama3-1b/n8192/bf16/frozen")


def ratio(benchmark: Any, device: Device, case: str, backend: str) -> float:
    """Median over rounds of our time over that of the floor, which runs before it each round."""
    known = providers.registry()
    drawn = data.make(cases.CASES[case], device.torch_device)
    try:
        ours = known[f"ours/{backend}/chunked"].build(drawn, {})
    except providers.Unavailable as reason:
        pytest.skip(str(reason))
    floor = known["floor"].build(drawn, {})
    for step in (ours, floor):
        step()
    least: list[float] = []

    def before_each() -> None:
        drawn.clear()
        least.append(device.seconds(floor))

    times: list[float] = []
    rounds = ROUNDS if device.kind == "cpu" else GPU_ROUNDS
    # Timed by the device, since a GPU's calls return before they are done; pytest-benchmark shows and keeps its own.
    benchmark.pedantic(lambda: times.append(device.seconds(ours)), setup=before_each, rounds=rounds)
    value = median(one / other for one, other in zip(times, least, strict=True))
    benchmark.extra_info.update(case=case, backend=backend, over_floor=value)
    return value


def judge(request: pytest.FixtureRequest, device: Device, name: str, value: float) -> None:
    """Compare with the stored ratio of this machine, or store it."""
    stored = json.loads(BASELINE.read_text(encoding="utf-8")) if BASELINE.exists() else {}
    slug = environment.machine(device)["slug"]
    if request.config.getoption("--write-baseline"):
        stored.setdefault(slug, {})[name] = round(value, 3)
        BASELINE.write_text(json.dumps(stored, indent=1, sort_keys=True) + "\n", encoding="utf-8")
        return
    if name not in stored.get(slug, {}):
        pytest.skip(f"no baseline for {name} on {slug}: --write-baseline stores one ({value:.2f} times the floor now)")
    allowed = SLOWER * stored[slug][name]
    assert value <= allowed, f"{name}: {value:.2f} times the floor, was {stored[slug][name]:.2f}, allowed {allowed:.2f}"


@pytest.mark.parametrize("backend", BACKENDS["cpu"])
@pytest.mark.parametrize("case", CPU_CASES)
def test_cpu(benchmark: Any, request: pytest.FixtureRequest, case: str, backend: str) -> None:
    """Ours over the floor on this processor."""
    device = open_device("cpu")
    judge(request, device, f"{case} {backend}", ratio(benchmark, device, case, backend))


@pytest.mark.gpu
@pytest.mark.parametrize("backend", BACKENDS["cuda"])
@pytest.mark.parametrize("case", GPU_CASES)
def test_gpu(benchmark: Any, request: pytest.FixtureRequest, case: str, backend: str) -> None:
    """Ours over the floor on this GPU."""
    device = open_device("cuda")
    judge(request, device, f"{case} {backend}", ratio(benchmark, device, case, backend))
