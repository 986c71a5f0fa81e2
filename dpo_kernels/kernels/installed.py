"""What is installed, asked without importing it."""

import contextlib
import importlib.metadata
import importlib.util
from collections.abc import Callable
from typing import Any

OLDEST_TRITON = "3.6"


def constant_in_graphs(function: Callable[..., Any]) -> Callable[..., Any]:
    """``torch.compiler.assume_constant_result``, which would import the compiler (and triton) with the package."""
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


@constant_in_graphs
def triton_version() -> str | None:
    """Version of the installed triton; None where there is none."""
    if importlib.util.find_spec("triton") is None:
        return None
    for distribution in ("triton", "pytorch-triton", "triton-rocm", "triton-windows"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            return importlib.metadata.version(distribution)
    return OLDEST_TRITON  # a build of one's own, presumably a recent one
