"""Where and with what something was measured."""

import importlib.metadata
import os
import platform
import re
import subprocess
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

from benchmarks.devices import Cuda, Device

ROOT = Path(__file__).parents[1]
PEERS = ("trl", "liger_kernel", "cut-cross-entropy", "quack-kernels", "transformers")
# Instructions that decide how fast a CPU multiplies 16-bit matrices.
CPU_FLAGS = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "avx512_fp16", "amx_bf16", "asimd", "bf16", "sve")
FAST_BF16 = {"avx512_bf16", "amx_bf16"}  # instructions that multiply bfloat16


def machine(device: Device) -> dict[str, Any]:
    """The device itself: what a results file and a report page are named after."""
    if isinstance(device, Cuda):
        properties = device.api.get_device_properties(device.api.current_device())
        return {
            "kind": "cuda",
            "name": properties.name,
            "memory_bytes": properties.total_memory,
            "multiprocessors": properties.multi_processor_count,
            "capability": f"{properties.major}.{properties.minor}",
            "slug": slug(properties.name),
        }
    name, flags = processor()
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return {
        "kind": "cpu",
        "name": f"{cores} × {name}",
        "cores": cores,
        "flags": [flag for flag in CPU_FLAGS if flag in flags],
        "slug": slug(f"cpu {name} x{cores}"),
    }


def record(device: str, threads: int) -> dict[str, Any]:
    """Versions, commit, date and threads: what may change between two runs on one machine."""
    found = {
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d"),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": _version("triton"),
        "peers": {name: _version(name) for name in PEERS},
        "threads": threads,
        "platform": platform.platform(terse=True),
        **commit_and_changes(),
    }
    if device == "cuda":
        found |= {"cuda": torch.version.cuda, "driver": _driver()}
    return found


def comparable(one: dict[str, Any], other: dict[str, Any]) -> bool:
    """Whether rows measured under both may stand in one case: the same but for the date."""
    return {k: v for k, v in one.items() if k != "date"} == {k: v for k, v in other.items() if k != "date"}


def slug(name: str) -> str:
    """A file name: lower case, without trademarks and frequencies' spaces."""
    plain = re.sub(r"\((?:r|tm)\)|@|\bcpu\b(?=.*\bcpu\b)", " ", name.lower())
    return re.sub(r"[^a-z0-9.]+", "-", plain).strip("-")


def processor() -> tuple[str, set[str]]:
    """Name of the CPU, and all features that the system tells of it."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    fields = {line.partition(":")[0].strip(): line.partition(":")[2].strip() for line in lines}
    name = fields.get("model name") or platform.processor() or platform.machine()
    return name, set((fields.get("flags") or fields.get("Features") or "").split())


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def commit_and_changes() -> dict[str, Any]:
    """The commit measured, and whether files that can change a number differ from it; None outside a checkout."""
    commit = output_of("git", "rev-parse", "HEAD")
    status = output_of("git", "--no-optional-locks", "status", "--porcelain", "--", "dpo_kernels", "csrc", "setup.py")
    return {"commit": commit, "dirty": None if status is None else bool(status)}


def _driver() -> str | None:
    text = output_of("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    return text.splitlines()[0] if text else None


def output_of(*command: str) -> str | None:
    """What a command prints; None where it fails or is not there."""
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=20, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None
