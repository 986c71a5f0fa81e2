"""Memory of the C++ backend: blocks that are kept for the next step, and a gradient handed over in its own memory."""

import gc
import os
import subprocess
import sys
import weakref

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef

import dpo_kernels as dk
from dpo_kernels import fused_dpo_loss
from dpo_kernels.kernels import extension
from dpo_kernels.kernels.cpp import CppKernels
from dpo_kernels.planning import tables
from tests.small import CPU_BACKEND, STRATEGIES, TRAINED, V, problem

MISSING = extension.why_not("cpu")
built = pytest.mark.skipif(MISSING is not None, reason=str(MISSING))
pooled = pytest.mark.skipif(MISSING is not None or sys.platform != "linux", reason="memory is only kept on Linux")
MIB = 2**20


def block(mib):
    return torch.ops.dpo_kernels.new_huge(torch.empty(0), [mib * MIB // 4])


@built
@pytest.mark.parametrize("size", [(0,), (3, 5), (1 << 20, 3), (0, 7)])
def test_huge_memory_is_memory(size):
    like = torch.empty(0, dtype=torch.float64)
    tensor = torch.ops.dpo_kernels.new_huge(like, size)
    assert (tensor.shape, tensor.dtype, tensor.is_contiguous()) == (torch.Size(size), torch.float64, True)
    tensor.fill_(2.0)
    assert float(tensor.sum()) == 2.0 * tensor.numel()
    with pytest.raises(RuntimeError, match="lengths >= 0"):
        torch.ops.dpo_kernels.new_huge(like, [2**40, 2**40])


@pytest.fixture
def emptied():
    dk.empty_cache()
    yield
    dk.empty_cache()


@pooled
def test_a_freed_block_is_the_next_one_of_its_size(emptied):
    tensor = block(8).fill_(1.0)
    where = tensor.data_ptr()
    view = tensor[5:7]
    del tensor
    assert block(8).data_ptr() != where  # a view keeps it alive
    del view
    first, second = block(8), block(8)
    assert where in {first.data_ptr(), second.data_ptr()}
    del first, second
    assert dk.empty_cache() == 16 * MIB
    assert dk.empty_cache() == 0


@pooled
def test_ragged_batches_leave_one_block(emptied):
    for mib in (20, 24, 14, 30, 16, 29):
        block(mib)
    assert dk.empty_cache() == 30 * MIB


@pooled
def test_a_block_is_not_wasted_on_a_much_smaller_one(emptied):
    where = block(20).data_ptr()
    small = block(8)
    assert small.data_ptr() != where
    assert block(10).data_ptr() == where  # at most twice as much
    assert dk.empty_cache() == 20 * MIB


@pooled
def test_what_is_of_no_use_goes_back(emptied):
    block(20)
    for _ in range(16):
        block(4)
    assert dk.empty_cache() == 24 * MIB
    block(20)
    for _ in range(17):
        block(4)
    assert dk.empty_cache() == 4 * MIB


USES_AND_EMPTIES = """if True:
    import torch, dpo_kernels as dk
    from dpo_kernels.kernels import extension
    extension.why_not("cpu")
    for mib in (8, 20, 6):
        torch.ops.dpo_kernels.new_huge(torch.empty(0), [mib * 2**18])
    print(dk.empty_cache() // 2**20)
"""
EMPTIES = """if True:
    import dpo_kernels as dk
    try:
        dk.empty_cache()
    except Exception as error:
        print(type(error).__name__)
"""


def said_by_a_process_of_its_own(code=USES_AND_EMPTIES, **environment):
    return subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        check=False,
    )


@pooled
@pytest.mark.parametrize(("limit", "kept"), [("0", 0), (str(10 * MIB), 6), (str(25 * MIB), 6), (str(26 * MIB), 26)])
def test_the_limit_is_kept_and_the_oldest_goes(limit, kept):
    done = said_by_a_process_of_its_own(DPO_KERNELS_CPU_CACHE_BYTES=limit)
    assert int(done.stdout) == kept, done.stderr


@pooled
@pytest.mark.parametrize(("processes", "kept"), [("1", True), ("1000000000", False)])
def test_processes_of_a_machine_share_what_may_lie_idle(monkeypatch, processes, kept):
    monkeypatch.delenv("DPO_KERNELS_CPU_CACHE_BYTES", raising=False)
    done = said_by_a_process_of_its_own(LOCAL_WORLD_SIZE=processes)
    assert (int(done.stdout) > 0) == kept, done.stderr


@pooled
@pytest.mark.parametrize("limit", ["many", "-1", "8MiB", ""])
def test_a_limit_that_is_no_number_is_named(limit):
    done = said_by_a_process_of_its_own(DPO_KERNELS_CPU_CACHE_BYTES=limit)
    assert f"DPO_KERNELS_CPU_CACHE_BYTES must be a number of bytes, got {limit}" in done.stderr


@pooled
def test_the_error_of_a_process_that_only_empties_is_a_documented_one():
    done = said_by_a_process_of_its_own(EMPTIES, DPO_KERNELS_CPU_CACHE_BYTES="1e9")
    raised = done.stdout.strip()
    assert raised, done.stderr
    assert f"{raised}: ``DPO_KERNELS_CPU_CACHE_BYTES``" in dk.empty_cache.__doc__


def test_without_the_extension_there_is_nothing_to_empty(monkeypatch):
    monkeypatch.setattr(extension, "why_not", lambda device_type: "it was not built")
    assert dk.empty_cache() == 0


# --- scratch dies with the call ---


SCRATCHES = [(strategy, need) for strategy in STRATEGIES for need in ((), ("hidden",), TRAINED)]


@pytest.mark.parametrize("backend", sorted({"torch", CPU_BACKEND}))
@pytest.mark.parametrize(("strategy", "need"), SCRATCHES)
def test_no_scratch_outlives_its_call(monkeypatch, strategy, need, backend):
    """Neither the result nor its graph holds a tile, nor does anything that only a collection of cycles would free."""
    kernels, seen = tables.BACKENDS[backend].load(), []
    scratch = kernels.scratch

    def watched(self, *given):
        memory = scratch(self, *given)
        seen.append((weakref.ref(memory), StorageWeakRef(memory.untyped_storage()), memory.numel()))
        return memory

    monkeypatch.setattr(kernels, "scratch", watched)
    options = {"strategy": strategy, "backend": backend, "stats": ("entropy", "token_logps")}
    data = problem(*need)
    gc.disable()
    try:
        for more in ({}, {"scratch_bytes": 5 * V * 8}, {"reduction": "none"} if strategy != "chunked" else {}):
            out = fused_dpo_loss(**data, **options, **more)
            if need:
                out.loss.sum().backward(retain_graph=True)
            assert len(seen) >= 1 + (strategy != "chunked" and need == TRAINED)
            assert [size for alive, _, size in seen if alive() is not None] == []
            assert [size for _, memory, size in seen if not memory.expired()] == []
            seen.clear()
    finally:
        gc.enable()


# --- a gradient in its own memory -------------------------------------------------------------------------------------


@built
@pytest.mark.parametrize("count", [0, 1, 1023, 1024, 1025, 2047, 4096, 100_003, 2**20 + 17])
def test_floats_narrowed_in_place(count):
    values = torch.randn(count, generator=torch.Generator().manual_seed(count))
    values[::97] = float("nan")
    wanted = (values * (1 / 3)).bfloat16()
    torch.ops.dpo_kernels.round_to_bfloat16_(values, 1 / 3)
    downcast = values.view(torch.bfloat16)[:count]
    torch.testing.assert_close(downcast, wanted, rtol=0, atol=0, equal_nan=True)


def trained(dtype, backend, upstreams):
    """The gradients of the head after each backward of one graph."""
    g = torch.Generator().manual_seed(3)
    hidden = torch.randn(4, 6, 24, generator=g).to(dtype).requires_grad_()
    weight = torch.randn(531, 24, generator=g).to(dtype).requires_grad_()
    labels = torch.randint(0, 531, (4, 6), generator=g)
    loss = dk.fused_dpo_loss(hidden, weight, labels, ref_logps=torch.randn(4, generator=g) - 30, backend=backend).loss
    seen = []
    for number, upstream in enumerate(upstreams):
        weight.grad = None
        (loss * upstream).backward(retain_graph=number < len(upstreams) - 1)
        seen.append(weight.grad)
    return seen


@built
@pytest.mark.parametrize("backend", ["cpp", "torch"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("upstream", [1.0, 1 / 3, 65536.0])
def test_the_last_backward_gives_the_bits_of_a_retained_one(dtype, upstream, backend):
    for scaled in (upstream, torch.tensor(upstream, dtype=torch.float64)):
        kept, last = trained(dtype, backend, [scaled, scaled])
        assert kept.dtype == last.dtype == dtype
        assert torch.equal(kept, last)
        assert last.is_contiguous()


@built
def test_a_bfloat16_gradient_takes_no_memory_of_its_own():
    total = torch.randn(100, 30)
    given = CppKernels.finalize_weight_grad(total, torch.tensor(2.0), torch.bfloat16)
    assert (given.shape, given.dtype, given.data_ptr()) == (total.shape, torch.bfloat16, total.data_ptr())
    assert CppKernels.finalize_weight_grad(torch.randn(4, 2).t(), torch.tensor(2.0), torch.bfloat16) is None
    assert CppKernels.finalize_weight_grad(total, torch.tensor(2.0), torch.float16) is None
