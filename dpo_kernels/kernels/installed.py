"""What is installed, asked without importing it."""

import contextlib
import importlib.metadata
import importlib.util
from collections.abc import Callable
from typing import Any

from torch.torch_version import TorchVersion

OLDEST_TRITON = "3.6"


def constant_in_graphs(function: Callable[..., Any]) -> Callable[..., Any]:
    """``torch.compiler.assume_constant_result``, which would import the compiler (and triton) with the package."""
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


@constant_in_graphs
def why_no_triton() -> str | None:
    """Why there is no triton to use; None where there is."""
    version = triton_version()
    if version is None:
        return "triton is not installed (pip install triton)"
    # Not for the tracer of torch.compile: that of torch 2.11 does not know how to make a version.
    if TorchVersion(version) < OLDEST_TRITON:
        return f"triton {version} is older than {OLDEST_TRITON}"
    return None


def triton_version() -> str | None:
    """Version of the installed triton; None where there is none."""
    if importlib.util.find_spec("triton") is None:
        return None
    for distribution in ("triton", "pytorch-triton", "triton-rocm", "triton-windows"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            return importlib.metadata.version(distribution)
    return OLDEST_TRITON  # a build of one's own, presumably a recent one
