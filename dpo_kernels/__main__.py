"""``python -m dpo_kernels``: what can run here, how to have the rest, self-checks, and times beside full logits."""

import argparse
import os
import platform
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from statistics import median

import torch
from torch import Tensor

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
BETA = 0.1
FULL_LOGITS = "full logits"
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
            if reason is not None:
                yield f"    to have it: {_cure(reason)}"
    yield f"self-checks on {device.type}, beside torch in float64 on the CPU"
    for name, dtypes in able.items():
        for dtype in dtypes:
            yield from _checked(name, device, dtype)
    sizes = f"{PAIRS} pairs of 2 x {LENGTH} tokens, H={WIDTH}, V={VOCAB}, float32"
    yield f"{TIMINGS} timings of a step, {sizes}, forward and backward, after one that warms up"
    yield from _timings([name for name, dtypes in able.items() if torch.float32 in dtypes], device)


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


def _cure(reason: str) -> str:
    """Return what to do about a reason why a backend cannot run, in one sentence."""
    if reason.startswith(FAILED):
        return "report it with this output; backend='torch' runs meanwhile"
    if reason.startswith("hidden is on"):
        return (
            "it is for tensors on a CPU: run with --device cpu" if reason.endswith("for cpu") else _cure_without_gpu()
        )
    if reason.startswith("triton "):
        return f"pip install 'triton>={installed.OLDEST_TRITON}'"
    return extension.HOW


def _cure_without_gpu() -> str:
    if torch.cuda.is_available():
        return "it is for tensors on a GPU: run with --device cuda"
    if torch.version.cuda is None and torch.version.hip is None:
        driver = installed.driver_version()
        return "it needs a GPU and a torch for it: " + (
            f"the driver is there ({driver}), so install a torch that is built for CUDA"
            if driver
            else "this torch is built for CPUs only"
        )
    return f"it needs a GPU: torch is built for CUDA {torch.version.cuda or torch.version.hip}, but finds none here"


def _timings(backends: Sequence[str], device: torch.device) -> Iterator[str]:
    """Yield a line for full logits, and one for each backend with its time over theirs. They take turns."""
    random = torch.Generator("cpu").manual_seed(0)
    hidden = torch.randn(2 * PAIRS, LENGTH, WIDTH, generator=random, device="cpu").to(device).requires_grad_()
    weight = (torch.randn(VOCAB, WIDTH, generator=random, device="cpu") * WIDTH**-0.5).to(device).requires_grad_()
    labels = torch.randint(0, VOCAB, (2 * PAIRS, LENGTH), generator=random, device="cpu").to(device)
    ways: dict[str, Callable[[], Tensor]] = {FULL_LOGITS: partial(_full_logits, hidden, weight, labels)}
    for name in backends:
        ways[name] = partial(_fused, hidden, weight, labels, name)
    took: dict[str, list[float]] = {name: [] for name in ways}
    failed: dict[str, str] = {}
    for _ in range(TIMINGS + 1):
        for name in (name for name in ways if name not in failed):
            try:
                took[name].append(_milliseconds(ways[name], device))
            except (RuntimeError, ValueError) as error:
                failed[name] = f"failed: {type(error).__name__}: {(str(error).splitlines() or [''])[0][:300]}"
            hidden.grad = weight.grad = None
    for name in ways:
        if name in failed:
            yield f"  {name}: {failed[name]}"
            continue
        line = f"  {name}: " + ", ".join(f"{ms:.0f}" if ms >= 100 else f"{ms:.3g}" for ms in took[name][1:]) + " ms"
        if name != FULL_LOGITS and FULL_LOGITS not in failed:
            line += f" ({median(took[name][1:]) / median(took[FULL_LOGITS][1:]):.2f} of {FULL_LOGITS})"
        yield line


def _fused(hidden: Tensor, weight: Tensor, labels: Tensor, backend: str) -> Tensor:
    return fused_dpo_loss(hidden, weight, labels, reference_free=True, beta=BETA, backend=backend).loss


def _full_logits(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """Return the same loss as plain torch computes it."""
    logps = (hidden @ weight.t()).log_softmax(dim=-1).gather(-1, labels[..., None])[..., 0].sum(dim=-1)
    chosen, rejected = logps.chunk(2)
    return -torch.nn.functional.logsigmoid(BETA * (chosen - rejected)).mean()


def _milliseconds(loss: Callable[[], Tensor], device: torch.device) -> float:
    begin = time.perf_counter()
    loss().backward()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return 1e3 * (time.perf_counter() - begin)


if __name__ == "__main__":
    sys.exit(main())
