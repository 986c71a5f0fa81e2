"""The same equivalence on real hardware, and what only hardware shows. `make test-gpu` fails where there is no GPU.

``tests/gpu/`` has whole steps. The tests that need 40 GiB are a group of their own, which one worker runs.
"""

import re
import warnings
from contextlib import contextmanager

import pytest
import torch

import dpo_kernels as dk
from dpo_kernels.kernels import extension
from dpo_kernels.planning import free_memory, schedules, tables
from tests import cases
from tests.cases import LAYOUTS, RICH, STRATEGIES, VOCAB, Case, broken_by, broken_over_forms, broken_rules, run
from tests.cuda_tools import equivalence
from tests.cuda_tools.operators import Operators, by_copies
from tests.family import LOSSES
from tests.gpu import selection

pytestmark = pytest.mark.gpu

BACKENDS = ("torch", "triton", "cuda")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@pytest.fixture(autouse=True)
def _quiet_shared_reference(monkeypatch):
    monkeypatch.setattr("dpo_kernels.inputs.notices.warn_once", lambda message: None)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_equivalence(layout, dtype, strategy, backend):
    assert not broken_over_forms(dtype, layout, strategy, backend, device="cuda")


@pytest.mark.parametrize("backend", ["torch", "cuda"])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_equivalence_in_float64(strategy, backend):
    assert not broken_over_forms(torch.float64, "packed", strategy, backend, device="cuda")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_tiles_of_one_row(monkeypatch, dtype, backend):
    """cuBLAS is called otherwise for one row than for many, also to add to what is there."""
    budget = tables.divide_scratch(2**30, backend, dtype, torch.device("cuda"))
    one_row = ("chunked", budget.minimum_scratch(VOCAB, "cuda"))
    monkeypatch.setitem(cases.STRATEGIES, "one row", one_row)
    inputs = Case(dtype).tensors(device="cuda")
    assert dk.explain(**inputs, scratch_bytes=one_row[1], backend=backend).tile.rows == 1
    assert not broken_rules(Case(dtype), "one row", backend, device="cuda")


WIDE = {
    "whole": ("chunked", None),
    "pairs of several tiles": ("chunked", 2 * 10**7),
    "recompute": ("recompute", None),
    "columns of tiles": ("recompute", 2 * 10**7),
    "streaming": ("streaming", None),
}


def wide(dtype, vocab):
    """Three pairs of 150 tokens, labels half of which are likely."""
    g = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(6, 150, 128, generator=g), torch.randn(vocab, 128, generator=g) * 0.2
    likely = (hidden.view(-1, 128) @ weight.t()).argmax(-1).view(6, 150)
    labels = torch.where(torch.rand(6, 150, generator=g) < 0.5, likely, torch.randint(0, vocab, (6, 150), generator=g))
    inputs = {"hidden": hidden.to(dtype), "weight": weight.to(dtype), "labels": labels}
    inputs = {name: value.cuda() for name, value in inputs.items()}
    for name in ("hidden", "weight"):
        inputs[name].requires_grad_()
    return inputs


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("strategy", WIDE)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("vocab", [32000, 50257, 128256])
def test_vocabularies_of_models(monkeypatch, vocab, dtype, strategy, backend):
    """Many blocks of columns, which the small cases do not have; 50257 is odd."""
    monkeypatch.setitem(cases.STRATEGIES, strategy, WIDE[strategy])
    assert not broken_by(wide(dtype, vocab), {"reference_free": True}, dtype, strategy, backend)


@pytest.fixture
def operators():
    reason = extension.why_not("cuda")
    if reason is not None:
        pytest.fail(reason)
    return Operators(torch.ops.dpo_kernels, by_copies("cuda"))


@pytest.mark.parametrize("layout", [equivalence.PACKED, equivalence.Layout(1, 1), equivalence.Layout(3, 1)], ids=str)
@pytest.mark.parametrize("cols", [1000, 5000, 20000, 128256])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_operators_between_guards(operators, dtype, cols, layout):
    """Scalar heads and tails around vectors, wherever a row begins; nothing is touched beside it."""
    for softcap in (None, 30.0):
        equivalence.check_finish(operators, dtype, cols, layout, softcap is None, softcap=softcap)
    equivalence.check_reduce(operators, dtype, [cols, 31], layout)
    for narrow in (None, torch.bfloat16, torch.float16) if dtype == torch.float32 else (None,):
        for other in (layout, equivalence.PACKED):
            equivalence.check_dlogits(operators, dtype, narrow, cols, (layout, other), softcap=30.0)
            equivalence.check_dlogits(operators, dtype, narrow, cols, (other, layout), scaled=False)


def test_operators_on_edges(operators):
    equivalence.check_broken_logits(operators, torch.float32)
    equivalence.check_foreign_labels(operators)
    equivalence.check_tail_edges(operators)
    for weights in (None, torch.float32, torch.float64):
        equivalence.check_tail(operators, [3, 0, 70, 6400], torch.float32, weights, smoothing=0.1)
    equivalence.check_tail(operators, [], torch.float32)


def test_operators_on_many_rows(operators):
    """More than a grid has places in its second and third dimension."""
    tile = torch.randn(70000, 48)
    labels = torch.randint(0, 48, (70000,))
    parts = [torch.full((70000,), value) for value in (-torch.inf, 0.0, -torch.inf)]
    moved = [part.cuda() for part in parts]
    operators.ops.reduce_rows_(tile.cuda(), labels.cuda(), 0, True, *moved, None, None, None, None)
    highest, others, target = (part.cpu() for part in moved)
    torch.testing.assert_close(highest + (others + (target - highest).exp()).log(), tile.logsumexp(1))
    assert torch.equal(target, tile.gather(1, labels[:, None])[:, 0])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("upstream", [1.0, 1 / 3, 65536.0])
def test_losses_and_upstreams(upstream, loss, strategy, backend):
    for frozen in (False, True):
        case = Case(torch.bfloat16, frozen=frozen, weights=True, options=LOSSES[loss])
        assert not broken_rules(case, strategy, backend, upstream, device="cuda")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("number", range(4))
@pytest.mark.parametrize("extras", [False, True], ids=["plain", "rich"])
def test_every_launch_of_the_families(monkeypatch, extras, number, dtype):
    """By descriptors too, and with fewer columns for statistics. Ours recompute, whatever is predicted to be faster."""
    from dpo_kernels.kernels.triton import configs, launch_matmul

    def one(kernel, x, stats):
        family = configs.family_of(kernel, configs.target_of(x.device), x.dtype, stats)
        return (family[number % len(family)],)

    monkeypatch.setattr(launch_matmul, "launch_family", one)
    monkeypatch.setattr(schedules, "gpu_at", lambda device: None)
    case = Case(dtype, bias=extras, weights=extras, options=RICH if extras else {})
    assert not broken_rules(case, "streaming", "triton", device="cuda")


@pytest.mark.parametrize("mode", ["1", "cached", "0"])
def test_timing_changes_nothing_but_the_launch(monkeypatch, tmp_path, mode):
    """The first call, which times, the second, and one that reads what the first kept have the same bits."""
    from dpo_kernels.kernels.triton import autotune

    monkeypatch.setenv(autotune.FOLDER, str(tmp_path))
    monkeypatch.setenv(autotune.MODE, mode)
    found = []
    for new_process in (True, False, True):
        if new_process:
            autotune.clear_cache()
        case = Case(torch.bfloat16)
        options = {**case.keywords(), "strategy": "streaming", "backend": "triton"}
        found.append(run(dk.fused_dpo_loss, case.tensors(device="cuda"), **options))
    assert all(torch.equal(found[0][key], other[key]) for other in found[1:] for key in found[0])
    assert len(list(tmp_path.iterdir())) == (1 if mode == "1" else 0)
    autotune.clear_cache()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_repeated_runs_are_equal(strategy, backend):
    case = Case(torch.bfloat16, bias=True, weights=True, reference="hidden")
    inputs = case.tensors(device="cuda")
    name, scratch = STRATEGIES[strategy]
    options = {**case.keywords(), "strategy": name, "scratch_bytes": scratch, "backend": backend}
    first = run(dk.fused_dpo_loss, inputs, **options)
    for _ in range(5):
        again = run(dk.fused_dpo_loss, inputs, **options)
        assert all(torch.equal(first[key], again[key]) for key in first)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_bad_label_is_nan_not_a_device_assert(backend):
    inputs = Case(torch.bfloat16).tensors(device="cuda")
    inputs["labels"][0, 4] = 211
    out = dk.fused_dpo_loss(**inputs, backend=backend)
    out.loss.backward()
    assert out.loss.isnan()
    assert inputs["weight"].grad.isnan().all()
    assert torch.ones(1, device="cuda").item() == 1


@pytest.mark.parametrize("backend", BACKENDS)
def test_little_memory_is_enough_and_an_error_says_how(backend):
    """With 1 GiB a frozen head runs by default. A scratch of 2 GiB is an error, and what it recommends runs."""
    g = torch.Generator("cuda").manual_seed(0)
    hidden = torch.randn(2, 2048, 64, device="cuda", dtype=torch.bfloat16, generator=g).requires_grad_()
    weight = torch.randn(128256, 64, device="cuda", dtype=torch.bfloat16, generator=g)
    labels = torch.randint(0, 128256, (2, 2048), device="cuda", generator=g)

    def call(scratch_bytes=None):
        options = {"reference_free": True, "backend": backend, "scratch_bytes": scratch_bytes}
        return dk.fused_dpo_loss(hidden, weight, labels, **options).loss.item()

    want = call(2**28)
    torch.cuda.empty_cache()
    total, before = torch.cuda.mem_get_info()[1], torch.cuda.get_per_process_memory_fraction()
    torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + 2**30) / total)
    free_memory.forget()
    try:
        with pytest.raises(torch.OutOfMemoryError, match=r"scratch_bytes=\d+ would run") as raised:
            call(2**31)
        recommended = int(re.search(r"scratch_bytes=(\d+) would run", str(raised.value))[1])
        assert abs(call(recommended) - want) < 1e-5
        assert abs(call() - want) < 1e-5
    finally:
        torch.cuda.set_per_process_memory_fraction(before)
        free_memory.forget()


@pytest.mark.xdist_group(selection.LARGE)
@pytest.mark.parametrize("backend", BACKENDS)
def test_more_than_two_to_the_31_elements(backend):
    """2.2e9 logits in one tile."""
    if torch.cuda.mem_get_info()[0] < 40 * 2**30:
        pytest.skip("needs 40 GiB of free memory")
    vocab, width, rows = 128256, 64, 17000
    hidden = torch.randn(2, rows // 2, width, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    weight = torch.randn(vocab, width, device="cuda", dtype=torch.bfloat16).mul_(0.1).requires_grad_()
    labels = torch.randint(0, vocab, (2, rows // 2), device="cuda")
    whole = dk.fused_dpo_loss(hidden, weight, labels, reference_free=True, backend=backend, scratch_bytes=32 * 2**30)
    parts = dk.fused_dpo_loss(hidden, weight, labels, reference_free=True, backend=backend, scratch_bytes=2 * 2**30)
    torch.testing.assert_close(whole.chosen_logps, parts.chosen_logps, rtol=1e-6, atol=1e-2)
    torch.testing.assert_close(whole.rejected_logps, parts.rejected_logps, rtol=1e-6, atol=1e-2)
    assert whole.chosen_logps.item() < -rows / 2 * 10  # about log V a token


@pytest.mark.xdist_group(selection.LARGE)
@pytest.mark.parametrize("strategy", ["streaming", "recompute"])
def test_a_head_beyond_two_to_the_31_elements(strategy):
    """The kernels that multiply by themselves, against torch; labels are in the last columns."""
    if torch.cuda.mem_get_info()[0] < 40 * 2**30:
        pytest.skip("needs 40 GiB of free memory")
    vocab, width = 256000, 9216
    hidden = torch.randn(2, 300, width, device="cuda", dtype=torch.bfloat16)
    weight = torch.randn(vocab, width, device="cuda", dtype=torch.bfloat16).mul_(0.02)
    labels = vocab - 1 - torch.randint(0, 5000, (2, 300), device="cuda")
    found = [
        dk.fused_token_logps(hidden, weight, labels, strategy=name, backend=backend)
        for name, backend in ((strategy, "triton"), ("recompute", "torch"))
    ]
    torch.testing.assert_close(*found, rtol=1e-5, atol=1e-4)


@pytest.mark.xdist_group(selection.LARGE)
@pytest.mark.parametrize("backend", BACKENDS)
def test_hidden_states_beyond_two_to_the_31_elements(backend):
    """Rows there are read, and their gradients written, where they belong."""
    if torch.cuda.mem_get_info()[0] < 40 * 2**30:
        pytest.skip("needs 40 GiB of free memory")
    width, rows, scored = 65536, 34000, 8
    hidden = torch.zeros(2, rows // 2, width, device="cuda", dtype=torch.bfloat16)
    hidden[:, -scored:].normal_()
    weight = torch.randn(512, width, device="cuda", dtype=torch.bfloat16).mul_(0.01).requires_grad_()
    labels = torch.full((2, rows // 2), -100, device="cuda")
    labels[:, -scored:] = torch.randint(0, 512, (2, scored), device="cuda")
    found = []
    for part in (slice(None), slice(rows // 2 - scored, None)):
        x = hidden[:, part].clone().requires_grad_()
        out = dk.fused_dpo_loss(x, weight, labels[:, part], reference_free=True, backend=backend)
        dx, dw = torch.autograd.grad(out.loss, [x, weight])
        assert not dx[:, :-scored].any()
        assert dx[:, -scored:].any(dim=-1).all()
        assert dw.any()
        found.append((out.loss.detach(), dx[:, -scored:].clone(), dw))
    assert all(torch.equal(far, near) for far, near in zip(*found, strict=True))


@pytest.mark.parametrize("backend", BACKENDS)
def test_flat_rows_of_a_large_vocabulary_in_float16(backend):
    """The label's own value is minus the sum of exponentials: V, which is more than float16 holds."""
    hidden = torch.zeros(2, 8, 64, device="cuda", dtype=torch.float16, requires_grad=True)
    weight = torch.randn(131072, 64, device="cuda", dtype=torch.float16).requires_grad_()
    labels = torch.randint(0, 131072, (2, 8), device="cuda")
    dk.fused_dpo_loss(hidden, weight, labels, reference_free=True, backend=backend).loss.backward()
    own = weight.detach()[labels].double() - weight.detach().double().mean(0)
    sign = torch.tensor([-1.0, 1.0], device="cuda").view(2, 1, 1)
    torch.testing.assert_close(hidden.grad.double(), 0.1 * 0.5 * sign * own, rtol=2e-3, atol=2e-4)


def test_a_second_device():
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two CUDA devices")
    assert not broken_rules(Case(torch.bfloat16), "chunked", "triton", device="cuda:1")


@contextmanager
def syncs_forbidden():
    """A synchronisation with the host is an error; torch warns, once a process, that this mode is a prototype."""
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Synchronization debug mode is a prototype")
            torch.cuda.set_sync_debug_mode("error")
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_sync_with_a_static_capacity(backend):
    inputs = Case(torch.bfloat16).tensors(device="cuda")
    options = {"max_scored_tokens": 64, "backend": backend}
    dk.fused_dpo_loss(**inputs, **options).loss.backward()  # compiles
    with syncs_forbidden():
        dk.fused_dpo_loss(**inputs, **options).loss.backward()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("frozen", [False, True])
def test_a_captured_step_replays_on_other_data(frozen, backend):
    case = Case(torch.bfloat16, frozen=frozen)
    first, second = (case.tensors(seed, device="cuda") for seed in (0, 1))
    options = {"max_scored_tokens": 64, "backend": backend}
    leaves = [t for t in first.values() if isinstance(t, torch.Tensor) and t.requires_grad]

    def step():
        out = dk.fused_dpo_loss(**first, **options)
        return out.loss.detach(), torch.autograd.grad(out.loss, leaves)

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    with torch.no_grad():
        for name, value in second.items():
            if isinstance(value, torch.Tensor):
                first[name].copy_(value)
    graph.replay()
    loss, grads = step()
    assert torch.equal(captured[0], loss)
    assert all(torch.equal(a, b) for a, b in zip(captured[1], grads, strict=True))
