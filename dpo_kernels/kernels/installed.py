"""Which Triton and which driver are installed. Triton is not imported to find out."""

import contextlib
import functools
import importlib.metadata
import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch.torch_version import TorchVersion

# Older versions are refused. The kernels have been compiled ahead of time with this version and with later ones.
OLDEST_TRITON = "3.6"
DRIVER = Path("/proc/driver/nvidia/version")  # what NVIDIA's kernel module says of itself on Linux


def constant_in_graphs(function: Callable[..., Any]) -> Callable[..., Any]:
    """Mark a function whose result torch.compile takes as a constant.

    ``torch.compiler.assume_constant_result`` does the same, but imports the compiler, and Triton with it.
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


@constant_in_graphs
def why_no_triton() -> str | None:
    """Return why Triton cannot be used, or None where it can."""
    version = triton_version()
    if version is None:
        return "triton is not installed (pip install triton)"
    # torch.compile does not trace this function: in torch 2.11 its tracer cannot make a TorchVersion.
    if TorchVersion(version) < OLDEST_TRITON:
        return f"triton {version} is older than {OLDEST_TRITON}"
    return None


@functools.cache
def triton_version() -> str | None:
    """Return the version of the installed Triton, or None where there is none.

    It is read from disk once in a process. Every call of a public function asks for it while a GPU waits.
    """
    if importlib.util.find_spec("triton") is None:
        return None
    for distribution in ("triton", "pytorch-triton", "triton-rocm", "triton-windows"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            return importlib.metadata.version(distribution)
    return OLDEST_TRITON  # a local build has no distribution and is presumably recent


@functools.cache
def driver_version() -> str | None:
    """Return what the GPU's driver says of its version, or None where it says nothing."""
    try:
        return DRIVER.read_text().splitlines()[0].partition(":")[2].strip()
    except (OSError, IndexError):
        return None
