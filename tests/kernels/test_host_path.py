"""What the host does of a call on a GPU stays within its budgets: launches, Python on the way to the first product."""

import importlib.util
import sys
from unittest.mock import patch

import pytest
import torch

import dpo_kernels as dk
from benchmarks import model, sparse_model
from dpo_kernels.api.warm_up import LENGTH
from tests import host_path
from tests.host_path import Launches, cost, on_a_gpu_of_stubs, step_of

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")

# Forward and backward, packing and the three matrix products included.
ONE_CHUNK, FURTHER_CHUNK = 30, 8
# Calls of Python between the one sync and the first product. Such a call takes about a quarter of a microsecond. 16 of
# them fill the dictionaries of records. The standard data class takes a call for each field instead, of a kind that
# Python does not count. It makes 278 calls that are counted, and takes 9 % longer.
PYTHON_CALLS = 300


@pytest.mark.parametrize("chunks", [1, 2, 3, 6])
def test_launches(chunks):
    found = cost(step_of(6, 64, chunks), 64)
    assert found.gemms == 3 * chunks
    assert found.ours == {
        "count_scored": 1,
        "write_packed": 1,
        "reduce_rows": chunks,
        "sigmoid_sequence_loss": chunks,
        "dlogits_rows": chunks,
        "add_label_rows": chunks,
        "to_input_rows": 1,
        "scale_and_round": 1,
    }
    assert found.total <= ONE_CHUNK + FURTHER_CHUNK * (chunks - 1), found


@pytest.mark.parametrize("scores_reference", [False, True])
@pytest.mark.parametrize("trainable", [False, True])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_the_model_of_gpus_has_the_launches(dtype, trainable, scores_reference):
    facts = {"trainable": trainable, "scores_reference": scores_reference}
    for chunks in (1, 2, 4):
        found = cost(step_of(8, 64, chunks, **facts, dtype=getattr(torch, dtype)), 64)
        assert found.total == model.launches_of_ours(chunks, **facts, dtype=dtype), (chunks, found)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_sparse_step_has_the_launches_of_its_model_and_no_further_sync(dtype):
    """Whether a sample is taken is decided on the device. Both ways are launched, and no number comes to the host."""
    for chunks in (1, 2, 4):
        found = cost(step_of(8, 64, chunks, dtype=getattr(torch, dtype), gradient="sparse"), 64)
        assert found.total == sparse_model.launches_of_sparse(chunks, dtype), (chunks, found)
        assert found.gemms == chunks
        assert found.ours["product_if"] == found.ours["add_kept_rows"] == 2 * chunks
        assert found.torch["copy to the host"] == 1
        assert found.torch.keys().isdisjoint({"_local_scalar_dense", "nonzero", "is_nonzero", "equal"})


def test_the_way_to_the_first_product_does_not_grow_with_the_pairs():
    few, many = (host_path.python_calls_to_first_gemm(step_of(pairs), 4) for pairs in (8, 256))
    assert 0 < few <= PYTHON_CALLS
    assert abs(many - few) <= 4


def test_nothing_is_launched_between_the_sync_and_the_gather():
    """The host has copied the counts when everything is packed, so that the GPU has nothing to do but wait for it."""
    step, seen = step_of(8), []
    with on_a_gpu_of_stubs(4) as stubs:
        kernel, sync = stubs.kernel, stubs.kernels
        step()
        stubs.kernels.clear()
        stubs.kernel = lambda given, *rest, **options: (seen.append(given.__name__), kernel(given, *rest, **options))
        step()
    assert sync["write_packed"] == 1
    assert seen[:2] == ["count_scored", "write_packed"]


def test_a_backend_by_name_packs_without_triton():
    """It may have been asked for because Triton does not work on a machine."""
    hidden, weight = torch.randn(4, 3, 8), torch.randn(20, 8)
    labels = torch.zeros(4, 3, dtype=torch.int64)
    with on_a_gpu_of_stubs(3) as stubs:
        dk.fused_dpo_loss(hidden, weight, labels, reference_free=True, backend="torch")
        assert stubs.gemms == 1
        assert not stubs.kernels
        dk.fused_dpo_loss(hidden, weight, labels, reference_free=True)
        assert stubs.kernels["write_packed"] == 1


def test_no_file_is_opened_in_a_call_after_the_first():
    step, opened = step_of(4), []
    watching = False

    def hook(event, arguments):
        if watching and event == "open":
            opened.append(arguments[0])

    with on_a_gpu_of_stubs(4):
        step()
        sys.addaudithook(hook)  # it cannot be taken away again
        watching = True
        step()
        watching = False
        with open(__file__):
            assert not opened
        watching = True
        with open(__file__):
            pass
        watching = False
    assert opened == [__file__]


def test_the_counter_counts():
    x = torch.ones(3, 4)
    with Launches() as seen:
        (x.t().reshape(-1) + 1).sum()  # a copy, an addition and a sum
        torch.empty(5).view(5, 1)[1:]
        torch.zeros(0).clone()
        torch.zeros(2)
    assert seen.by_name == {"clone": 1, "add": 1, "sum": 1, "zeros": 1}


def test_stubs_leave_nothing_behind():
    with on_a_gpu_of_stubs(4):
        assert torch.ones(1).is_cuda
    assert not torch.ones(1).is_cuda
    with pytest.raises(ValueError, match="backend='triton' cannot run this"):
        step_of(2)()


def compiled_by(call, scored):
    """What Triton would compile for the launches of a call: the kernel, its specialised arguments and its options."""
    from triton.runtime.driver import driver

    from dpo_kernels.kernels.triton import launch_matmul
    from dpo_kernels.kernels.triton.configs import INTERPRETED
    from tests.triton_tools.aot import _StandIn

    found, before = set(), driver._active
    with on_a_gpu_of_stubs(scored) as stubs, patch.object(launch_matmul, "launch_family", lambda *_: (INTERPRETED,)):
        stub = stubs.kernel

        def seen(kernel, *arguments, grid, warmup=False, **options):
            specialise = kernel.device_caches["sm_90"][-1]
            _, arguments_kinds, given = specialise(*arguments, **options)
            found.add((kernel.__name__, str(arguments_kinds), str(given)))
            stub(kernel, *arguments, grid=grid, **options)

        stubs.kernel = seen
        driver.set_active(_StandIn("sm_90"))
        try:
            call()
        finally:
            driver._active = before
    return found


@pytest.mark.parametrize("strategy", ["chunked", "recompute", "streaming"])
@pytest.mark.parametrize("trainable", [True, False])
def test_a_warm_up_compiles_what_batches_of_any_lengths_run(strategy, trainable):
    g = torch.Generator().manual_seed(0)
    weight = torch.randn(512, 64, generator=g).bfloat16().requires_grad_(trainable)
    options = {"backend": "triton", "strategy": strategy}
    warmed = compiled_by(lambda: dk.warm_up(weight, rows=512, **options), LENGTH)
    assert {"count_scored", "write_packed"} < {name for name, *_ in warmed}
    for sequences, length in ((4, 5), (2, 16), (6, 301), (16, 37)):
        hidden = torch.randn(sequences, length, 64, generator=g).bfloat16().requires_grad_()
        labels = torch.randint(0, 512, (sequences, length), generator=g)

        def step(given=(hidden, weight, labels)):
            dk.fused_dpo_loss(*given, reference_free=True, **options).loss.backward()

        assert compiled_by(step, length) <= warmed, (sequences, length)
    bounds = torch.arange(0, 31, 5, dtype=torch.int32)
    how = {"cu_seqlens": bounds, "token_weights": torch.ones(30), **options}
    hidden, labels = torch.randn(30, 64, generator=g).bfloat16().requires_grad_(), torch.zeros(30, dtype=torch.int64)
    packed = compiled_by(
        lambda: dk.fused_dpo_loss(hidden, weight, labels, reference_free=True, **how).loss.backward(), 5
    )
    assert not packed <= warmed
    assert packed <= compiled_by(lambda: dk.warm_up(weight, rows=512, **how), LENGTH)
    capped = compiled_by(lambda: dk.warm_up(weight, rows=512, softcap=30.0, **options), LENGTH)
    assert not capped <= warmed  # the comparison sees a difference
