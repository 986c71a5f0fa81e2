"""Everything in the errors of a GPU: the kernels, the library's GEMMs, and what the tests allow."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from unittest.mock import patch

from dpo_kernels.kernels import torch_kernels
from tests import tolerance
from tests.triton_tools import gpu_arithmetic, interpreter


@contextmanager
def computing(mode: str) -> Iterator[None]:
    """``sanitize`` computes by ``mode`` (``gpu_arithmetic.MODES``) in this context, and tolerances are a GPU's."""
    with ExitStack() as context:
        context.enter_context(patch.object(interpreter, "arithmetic_mode", mode))
        if mode != "exact":
            context.enter_context(tolerance.of_a_gpu())
        if mode == "truncating":
            context.enter_context(patch.object(torch_kernels, "_matmul_into", gpu_arithmetic.truncating_matmul_into))
        yield
