"""Sparse gradients on a GPU, and the same bodies on the CPU where they can run there."""

import pytest
import torch

from dpo_kernels.kernel_interface import SampledRows
from dpo_kernels.shapes import Head, Sampling
from tests.cases import Case
from tests.gpu.steps import assert_equal_bits, inputs_of, step
from tests.gpu.test_steps import GPU, everywhere
from tests.tolerance import RELATIVE_L2_BAR, relative_l2

TAU = 2.0**-4
STRATEGIES = pytest.mark.parametrize("strategy", ["chunked", "recompute", "streaming"])
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
SHARE = "dpo_kernels.kernels.torch_kernels.MOST_SAMPLED"


@pytest.fixture(autouse=True)
def _every_sample_is_taken(monkeypatch):
    monkeypatch.setattr(SHARE, 16.0)
    monkeypatch.setattr("dpo_kernels.inputs.notices.warn_once", lambda message: None)


def sampled(inputs, backend, seed=3, **options):
    return step(inputs, **options, backend=backend, gradient="sparse", tau=TAU, seed=seed)


@everywhere
@STRATEGIES
@DTYPES
def test_the_sample_is_that_of_the_reference(device, backend, dtype, strategy):
    """A device may round a probability another way, which moves few entries. Another sample would be far off."""
    case = Case(dtype, bias=True, weights=True)
    options = {**case.keywords(), "strategy": strategy}
    found = [grad.cpu() for grad in sampled(inputs_of(case, device), backend, **options)]
    wanted = sampled(inputs_of(case, "cpu"), "torch", **options)
    other = sampled(inputs_of(case, "cpu"), "torch", seed=4, **options)
    for mine, same, different in zip(found[1:], wanted[1:], other[1:], strict=True):
        assert relative_l2(mine, same) <= 0.25 * relative_l2(different, same)


@everywhere
@STRATEGIES
def test_equal_seeds_give_equal_bits(device, backend, strategy):
    inputs = inputs_of(Case(torch.bfloat16), device)
    seed = torch.tensor(3, device=device)
    first = sampled(inputs, backend, strategy=strategy)
    assert_equal_bits(first, sampled(inputs, backend, seed=seed, strategy=strategy))
    assert not torch.equal(first[1], sampled(inputs, backend, seed=4, strategy=strategy)[1])


@everywhere
@STRATEGIES
@DTYPES
def test_too_many_entries_give_the_exact_gradient(monkeypatch, device, backend, dtype, strategy):
    monkeypatch.setattr(SHARE, 1e-4)
    inputs = inputs_of(Case(dtype), device)
    exact = step(inputs, backend=backend, strategy=strategy)
    for mine, other in zip(sampled(inputs, backend, strategy=strategy), exact, strict=True):
        assert relative_l2(mine, other) <= RELATIVE_L2_BAR[dtype]


@GPU
@pytest.mark.parametrize("share", [16.0, 1e-4])
def test_no_further_sync(monkeypatch, share):
    """Whether a sample is taken is decided on the device."""
    monkeypatch.setattr(SHARE, share)
    inputs = inputs_of(Case(torch.bfloat16), "cuda")
    options = {"max_scored_tokens": int((inputs["labels"] >= 0).sum()), "strategy": "chunked"}
    sampled(inputs, "triton", **options)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        sampled(inputs, "triton", **options)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@GPU
def test_the_memory_of_entries_is_what_the_plan_counts():
    """The most that is allocated for a sample and its order. A pass of the sort has small tables besides."""
    pytest.importorskip("triton")
    from dpo_kernels.kernels.triton.backend import TritonKernels

    rows, cols, tau, device = 1024, 32768, 2.0**-12, torch.device("cuda")
    kernels, one = TritonKernels(torch.float32, 2**20), torch.ones(rows, device=device)
    labels = torch.arange(rows, device=device)
    of_rows = SampledRows.of(labels, 0 * one, cols * one - 1, cols * one, one, labels)
    tile, head = torch.zeros(rows, cols, device=device), Head(torch.zeros(cols, 1, device=device))
    counted = kernels.sample_bytes(torch.float32, rows, cols, tau)

    def most_bytes():
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        d = kernels.sample_dlogits(tile, 0, of_rows, head, Sampling(tau, 0))
        assert d.columns.numel() > 2**20
        assert len(d.by_column) == 2
        return torch.cuda.max_memory_allocated() - before

    most_bytes()  # which compiles the kernels
    assert 0.95 * counted <= most_bytes() <= 1.05 * counted


@GPU
def test_a_captured_step_takes_another_seed():
    """A graph that is replayed reads the seed anew. Its gradients are those of a call with that seed."""
    inputs, seed = inputs_of(Case(torch.bfloat16), "cuda"), torch.tensor(3, device="cuda")
    options = {"max_scored_tokens": int((inputs["labels"] >= 0).sum()), "strategy": "chunked"}
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            sampled(inputs, "triton", seed=seed, **options)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = sampled(inputs, "triton", seed=seed, **options)
    for value in (3, 2**40 + 1):
        seed.fill_(value)
        graph.replay()
        assert_equal_bits(found, sampled(inputs, "triton", seed=value, **options))
