"""``python -m dpo_kernels``: versions, devices, what can run and why not, self-checks and timings, for bug reports."""

import argparse
import os
import platform
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from dpo_kernels import __version__, fused_dpo_loss
from dpo_kernels.kernels import extension, installed, verdicts
from dpo_kernels.kernels.self_check import mismatches
from dpo_kernels.planning.tables import BACKENDS
from dpo_kernels.problem import Workload
from dpo_kernels.shapes import NeedsGrad

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Instructions of a CPU that decide how fast rows and 16-bit products are.
CPU_FLAGS = ("avx2", "avx512f", "avx512_bf16", "avx512_fp16", "amx_bf16", "asimd", "bf16", "sve")
FAILED = "its self-check"  # how every reason of ``verdicts.checked`` begins
TIMINGS = 3
# The step that is timed: pairs, tokens of a sequence, H and V. A CPU takes some 100 ms for it.
PAIRS, LENGTH, WIDTH, VOCAB = 4, 32, 512, 16384
DIALS = ("DPO_KERNELS_", "TRITON_", "CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS", "PYTORCH_ALLOC", "PYTORCH_CUDA_ALLOC")


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the report. Returns 1 where a backend that can run fails its self-check, else 0."""
    parser = argparse.ArgumentParser(prog="python -m dpo_kernels", description=__doc__)
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="default: a GPU if there is")
    name = parser.parse_args(arguments).device
    if name == "cuda" and not torch.cuda.is_available():
        parser.error("torch finds no CUDA device")
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    healthy = True
    for line in report(torch.device(name, torch.cuda.current_device()) if name == "cuda" else torch.device(name)):
        healthy = healthy and FAILED not in line
        sys.stdout.write(line + "\n")
        sys.stdout.flush()
    return 0 if healthy else 1


def report(device: torch.device) -> Iterator[str]:
    """Yield the lines of the report on a device, each as soon as it is known.

    A backend that fails is a line of the report, and the others follow.
    """
    yield from _versions()
    yield from _devices()
    yield f"extension: {_extension()}"
    dials = [f"{key}={value}" for key, value in sorted(os.environ.items()) if key.startswith(DIALS)]
    yield f"variables: {', '.join(dials) or 'none'}"
    yield f"backends on {device.type}"
    able: dict[str, list[torch.dtype]] = {}
    for name in BACKENDS:
        reasons = {dtype: _why_not(name, dtype, device) for dtype in DTYPES}
        able[name] = [dtype for dtype in DTYPES if (reasons[dtype] or FAILED).startswith(FAILED)]
        for reason in dict.fromkeys(reasons.values()):
            which = ", ".join(_short(dtype) for dtype in DTYPES if reasons[dtype] == reason)
            yield f"  {name}: {'can run' if reason is None else 'cannot run: ' + reason} ({which})"
    yield f"self-checks on {device.type}, beside torch in float64 on the CPU"
    for name, dtypes in able.items():
        for dtype in dtypes:
            yield from _checked(name, device, dtype)
    sizes = f"{PAIRS} pairs of 2 x {LENGTH} tokens, H={WIDTH}, V={VOCAB}, float32"
    yield f"{TIMINGS} timings of a step, {sizes}, forward and backward, after one that warms up"
    for name in (name for name, dtypes in able.items() if torch.float32 in dtypes):
        yield f"  {name}: {_timings(name, device)}"


def _versions() -> Iterator[str]:
    yield f"dpo_kernels {__version__} in {Path(__file__).parent}"
    yield f"python {platform.python_version()} on {platform.platform(terse=True)}"
    yield f"torch {torch.__version__}, CUDA {torch.version.cuda or 'none'}, HIP {torch.version.hip or 'none'}"
    triton = installed.triton_version()
    yield f"triton {triton or 'none'}" + (f", unusable: {reason}" if (reason := installed.why_no_triton()) else "")


def _devices() -> Iterator[str]:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    fields = {line.partition(":")[0].strip(): line.partition(":")[2].strip() for line in lines}
    flags = set((fields.get("flags") or fields.get("Features") or "").split())
    name = fields.get("model name") or platform.processor() or platform.machine()
    has = " ".join(flag for flag in CPU_FLAGS if flag in flags) or "no vector instructions that are known here"
    yield f"CPU: {os.cpu_count()} x {name}: {has}; torch uses {torch.get_num_threads()} threads"
    yield f"driver: {installed.driver_version() or 'none'}"
    if not torch.cuda.is_available():
        yield "GPU: none that torch finds"
    for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        facts = torch.cuda.get_device_properties(index)
        free = torch.cuda.mem_get_info(index)[0]
        size = f"{facts.total_memory / 2**30:.1f} GiB, {free / 2**30:.1f} free"
        yield f"GPU {index}: {facts.name}, sm_{facts.major}{facts.minor}, {facts.multi_processor_count} SMs, {size}"


def _extension() -> str:
    reason = extension.why_not("cpu")
    if reason is not None:
        return reason
    operators = torch.ops.dpo_kernels
    rows, product = operators.row_instruction_set(), operators.bfloat16_product()
    without = extension.why_not("cuda")
    gpu = "without CUDA" if without else f"CUDA for {', '.join(f'sm_{n}' for n in operators.cuda_architectures())}"
    torchs = f"for torch {operators.extension_oldest_torch()} and later"
    return f"{torchs}; rows by {rows}, bfloat16 products by {product}; {gpu}"


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _why_not(backend: str, dtype: torch.dtype, device: torch.device) -> str | None:
    grads = NeedsGrad(hidden=True, weight=True, bias=False)
    workload = Workload(2 * PAIRS * LENGTH, 2 * PAIRS, VOCAB, WIDTH, dtype, device, grads)
    return BACKENDS[backend].refuse(workload, True)


def _checked(backend: str, device: torch.device, dtype: torch.dtype) -> Iterator[str]:
    """Yield the verdict, and every mismatch. It is found anew, whatever an earlier process has kept."""
    kernels = BACKENDS[backend].load()
    begin = time.perf_counter()
    reason = verdicts.checked(kernels, device, dtype)
    took = f"{1e3 * (time.perf_counter() - begin):.0f} ms, with what had to be compiled"
    yield f"  {backend}, {_short(dtype)}: {reason or verdicts.HEALTHY} ({took})"
    if reason is not None and "failed" in reason:
        for mismatch in mismatches(kernels, dtype, device):
            yield f"    {mismatch}"


def _timings(backend: str, device: torch.device) -> str:
    random = torch.Generator("cpu").manual_seed(0)
    hidden = torch.randn(2 * PAIRS, LENGTH, WIDTH, generator=random, device="cpu").to(device).requires_grad_()
    weight = (torch.randn(VOCAB, WIDTH, generator=random, device="cpu") * WIDTH**-0.5).to(device).requires_grad_()
    labels = torch.randint(0, VOCAB, (2 * PAIRS, LENGTH), generator=random, device="cpu").to(device)
    took = []
    try:
        for _ in range(TIMINGS + 1):
            hidden.grad = weight.grad = None
            begin = time.perf_counter()
            fused_dpo_loss(hidden, weight, labels, reference_free=True, backend=backend).loss.backward()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            took.append(1e3 * (time.perf_counter() - begin))
    except (RuntimeError, ValueError) as error:
        return f"failed: {type(error).__name__}: {(str(error).splitlines() or [''])[0][:300]}"
    return ", ".join(f"{ms:.3g}" for ms in took[1:]) + " ms"


if __name__ == "__main__":
    sys.exit(main())
