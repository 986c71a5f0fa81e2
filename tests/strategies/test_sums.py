"""Sums of hundreds of thousands of values keep float64's digits, and what is copied in blocks is right in each of them.

The truth of a sum is ``math.fsum``, which rounds once. float32 has seven digits, and a sum in it loses more the longer
it is.
"""

import pytest
import torch

import dpo_kernels as dk
from dpo_kernels.engine import places
from dpo_kernels.kernels import extension
from dpo_kernels.kernels.cpp import CppKernels
from dpo_kernels.kernels.torch_kernels import TorchKernels
from tests.cases import STRATEGIES, Case
from tests.extremes import F64, assert_summed_in_float64

MISSING = extension.why_not("cpu")
KERNELS = [TorchKernels, pytest.param(CppKernels, marks=pytest.mark.skipif(MISSING is not None, reason=str(MISSING)))]


@pytest.mark.parametrize("weights_dtype", [None, torch.float32, F64], ids=str)
@pytest.mark.parametrize("kernels", KERNELS)
def test_long_sums_are_float64(kernels, weights_dtype):
    assert_summed_in_float64(kernels(torch.float32, 2**20), weights_dtype=weights_dtype)


# --- copies in blocks -------------------------------------------------------------------------------------------------


def gradients(case, strategy, upstream):
    """Of ``upstream * loss``, from a graph that is kept: no gradient is handed over in its own memory."""
    inputs = case.tensors()
    name, scratch = STRATEGIES[strategy]
    out = dk.fused_dpo_loss(**inputs, **case.keywords(), strategy=name, scratch_bytes=scratch)
    leaves = [value for value in inputs.values() if value.requires_grad]
    return torch.autograd.grad(out.loss, leaves, torch.full_like(out.loss, upstream), retain_graph=True)


@pytest.mark.parametrize("frozen", [False, True], ids=["trainable", "frozen"])
@pytest.mark.parametrize("strategy", ["chunked", "recompute", "streaming"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_every_block_of_a_copied_gradient_is_the_gradient(monkeypatch, dtype, strategy, frozen):
    """Gradients of more than 16 MiB are copied in several blocks: here of three rows, with the bits of one block."""
    case = Case(dtype, bias=True, weights=True, frozen=frozen)
    whole = gradients(case, strategy, upstream=1 / 3)
    monkeypatch.setattr(places, "CPU_COPY_BYTES", 3 * case.tensors()["hidden"].shape[-1] * 4)
    for got, wanted in zip(gradients(case, strategy, upstream=1 / 3), whole, strict=True):
        assert wanted.any()
        assert torch.equal(got, wanted)
