"""Sums of hundreds of thousands of values keep float64's digits, and what is copied in blocks is right in each of them.

The truth of a sum is ``math.fsum``, which rounds once. float32 has seven digits, and a sum in it loses more the longer
it is.
"""

import math

import pytest
import torch

import dpo_kernels as dk
from dpo_kernels import losses
from dpo_kernels.engine import passes
from dpo_kernels.kernels import extension
from dpo_kernels.kernels.cpp import CppKernels
from dpo_kernels.kernels.torch_kernels import TorchKernels
from tests.cases import STRATEGIES, Case

F64 = torch.float64
MISSING = extension.why_not("cpu")
KERNELS = [TorchKernels, pytest.param(CppKernels, marks=pytest.mark.skipif(MISSING is not None, reason=str(MISSING)))]
COUNTS = (200_000, 0, 99_000, 995)  # 300,000 with five more, which belong to no sequence


def assert_summed_in_float64(kernels, counts=COUNTS, weights_dtype=None):
    """Alone and by the tail of the sigmoid loss, which some backends do in a pass of its own."""
    g = torch.Generator().manual_seed(5)
    values = -8 * torch.rand(sum(counts) + 5, generator=g)  # nats
    weights = None if weights_dtype is None else torch.rand(values.shape, generator=g, dtype=weights_dtype)
    terms = values.double() if weights is None else values.double() * weights.double()
    exact = torch.tensor([math.fsum(part.tolist()) for part in terms[: sum(counts)].split(counts)], dtype=F64)
    ref_S = exact + torch.tensor([0.25, -0.25]).repeat(len(counts) // 2)  # margins of half a nat, whatever the sums
    loss, zero = losses.bind("sigmoid", 0.5, 0.0, {}), torch.zeros((), dtype=F64)
    counts_S = torch.tensor(counts)
    sums, found, grad = kernels.sequence_loss(values, weights, counts_S, ref_S, zero, loss)
    for got in (kernels.segment_sum(values, weights, counts_S), sums):
        torch.testing.assert_close(got, exact, rtol=1e-12, atol=1e-12)
    slope = torch.tensor([-0.5, 0.5], dtype=F64) * math.exp(0.25) / (1 + math.exp(0.25))  # at u = -0.25
    torch.testing.assert_close(found, torch.full_like(found, math.log1p(math.exp(0.25))), rtol=1e-8, atol=0)
    torch.testing.assert_close(grad, slope.repeat(len(counts) // 2), rtol=1e-8, atol=0)


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
    monkeypatch.setattr(passes, "CPU_COPY_BYTES", 3 * case.tensors()["hidden"].shape[-1] * 4)
    for got, wanted in zip(gradients(case, strategy, upstream=1 / 3), whole, strict=True):
        assert wanted.any()
        assert torch.equal(got, wanted)
