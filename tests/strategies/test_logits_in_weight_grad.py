"""Logits that lie in the memory of the head's gradient until it replaces them: the fused pass over few enough rows."""

import pytest
import torch

import dpo_kernels as dk
from dpo_kernels.kernels import extension
from dpo_kernels.kernels.cpp import CppKernels
from dpo_kernels.planning import memory_budget
from dpo_kernels.reference import dpo_loss_reference
from tests.cases import LAYOUTS, RICH, Case, broken_by, broken_over_forms, broken_rules
from tests.family import DTYPES, FAMILY, case_of
from tests.gemm_counts import costs, measure

pytestmark = pytest.mark.skipif(extension.why_not("cpu") is not None, reason=str(extension.why_not("cpu")))

LONG = 10**4  # columns of a vocabulary that is worth it


def problem(rows=32, hidden=64, vocab=LONG, trainable=True, dtype=torch.float32):
    g = torch.Generator().manual_seed(0)
    labels = torch.randint(0, vocab, (4, rows // 4), generator=g)
    hidden_states = torch.randn(4, rows // 4, hidden, generator=g).to(dtype).requires_grad_()
    weight = (torch.randn(vocab, hidden, generator=g) / 8).to(dtype).requires_grad_(trainable)
    return hidden_states, weight, labels


@pytest.fixture
def blocks(monkeypatch):
    """The vocabulary of the equivalence cases in blocks of at least 16 columns, whatever the dtype."""
    monkeypatch.setattr(memory_budget, "LEAST_ALIASED_COLS", 16)
    monkeypatch.setattr(memory_budget, "ALIASED_BLOCK_BYTES", 22 * 8 * 32)
    monkeypatch.setattr("dpo_kernels.inputs.notices.warn_once", lambda message: None)
    for dtype in DTYPES:
        inputs = Case(dtype).tensors()
        plan = dk.explain(inputs["hidden"], inputs["weight"], inputs["labels"], reference_free=True)
        assert plan.lent
        assert plan.tile.cols < 211


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_equivalence(blocks, layout, dtype):
    assert not broken_over_forms(dtype, layout, "chunked", "cpp")


@pytest.mark.parametrize("loss", FAMILY)
def test_family(blocks, loss):
    for dtype in (torch.float64, torch.bfloat16):
        assert not broken_rules(case_of(loss, dtype), "chunked", "cpp")


@pytest.mark.parametrize("upstream", [1 / 3, 65536.0, -2.5e-3])
def test_upstream(blocks, upstream):
    for dtype in DTYPES:
        assert not broken_rules(Case(dtype, bias=True), "chunked", "cpp", upstream)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("unreachable", [slice(0, 100), slice(100, 211)], ids=["the first blocks", "the last ones"])
def test_blocks_of_unreachable_tokens(blocks, dtype, unreachable):
    """Nothing but -inf so far must not become NaN once a finite logit is seen."""
    case = Case(dtype, bias=True)
    inputs = case.tensors()
    with torch.no_grad():
        inputs["bias"][unreachable] = -torch.inf
    reachable = 150 if unreachable.start == 0 else 50
    inputs["labels"] = torch.where(inputs["labels"] >= 0, reachable, inputs["labels"])
    assert not broken_by(inputs, case.keywords(), dtype, "chunked", "cpp")


def test_peaks_in_the_last_block(blocks):
    """Exponentials under an early maximum that a later block exceeds by far."""
    for dtype in (torch.float64, torch.float32):
        case = Case(dtype, bias=True, options={"stats": RICH["stats"]})
        inputs = case.tensors()
        with torch.no_grad():
            inputs["bias"][-3:] += 90.0
        assert not broken_by(inputs, case.keywords(), dtype, "chunked", "cpp", saturated=True)


def test_static_capacity_borrows_too(blocks):
    case = Case(options={"max_scored_tokens": 24})
    inputs = case.tensors()
    assert dk.explain(**inputs, **case.keywords()).lent
    assert not broken_rules(case, "chunked", "cpp")


def test_the_same_bits_again():
    results = []
    for _ in range(2):
        hidden, weight, labels = problem()
        loss = dk.fused_dpo_loss(hidden, weight, labels, reference_free=True).loss
        results.append((loss.detach(), *torch.autograd.grad(loss, (hidden, weight))))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_traced_calls_borrow_as_well():
    """The operator's body knows the sizes that the graph does not."""
    hidden, weight, labels = problem()
    compiled = torch.compile(dk.fused_dpo_loss, backend="aot_eager", fullgraph=True)
    grads = []
    for function in (dk.fused_dpo_loss, compiled):
        loss = function(hidden, weight, labels, reference_free=True, backend="cpp").loss
        grads.append(torch.autograd.grad(loss, (hidden, weight)))
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


@pytest.fixture
def wide_enough(monkeypatch):
    """Blocks of 1024 columns less than an odd number of 16: the vocabulary has several."""
    monkeypatch.setattr(memory_budget, "ALIASED_BLOCK_BYTES", 32 * 4 * 1024)


@pytest.mark.parametrize(
    ("facts", "options"),
    [
        ({"rows": 68}, {}),  # more rows than the gradient is wide
        ({"vocab": 1000}, {}),  # all of it fits a block
        ({"trainable": False}, {}),
        ({}, {"strategy": "recompute"}),
        ({}, {"backend": "torch"}),
        ({}, {"scratch_bytes": 32 * 400 * 4}),  # blocks would be too narrow
        ({}, {"main_grad": torch.zeros(LONG, 64)}),  # holds what was accumulated before
        ({}, {"reduction": "none"}),
    ],
)
def test_who_does_not_borrow(wide_enough, facts, options):
    assert dk.explain(*problem(), reference_free=True).lent, "or nothing below is told"
    plan = dk.explain(*problem(**facts), reference_free=True, **options)
    assert not plan.lent
    assert "memory of the head's gradient" not in str(plan)


@pytest.mark.parametrize("rows", [40, 96, 128])
def test_gradients_of_logits_in_16_bits(monkeypatch, rows):
    """With fewer and with more rows than the head is wide, in blocks of several largest logits each."""
    monkeypatch.setattr(memory_budget, "ALIASED_BLOCK_BYTES", rows * 2048)
    hidden, weight, labels = problem(rows=rows, vocab=3000, dtype=torch.bfloat16)
    plan = dk.explain(hidden, weight, labels, reference_free=True)
    assert plan.lent or not CppKernels.can_code_logits(torch.bfloat16)
    out = dk.fused_dpo_loss(hidden, weight, labels, reference_free=True)
    exact = [each.detach().double().requires_grad_() for each in (hidden, weight)]
    wanted = dpo_loss_reference(*exact, labels, reference_free=True)
    torch.testing.assert_close(out.loss.double(), wanted.loss, rtol=1e-5, atol=1e-5)
    pairs = zip(torch.autograd.grad(out.loss, (hidden, weight)), torch.autograd.grad(wanted.loss, exact), strict=True)
    for got, true in pairs:
        assert float((got.double() - true).norm() / true.norm()) < 2.5e-3  # two roundings to bfloat16


@pytest.mark.parametrize(("rows", "lent"), [(64, True), (128, True), (132, False)])
def test_logits_in_16_bits_need_half_of_the_memory(monkeypatch, rows, lent):
    monkeypatch.setattr(memory_budget, "ALIASED_BLOCK_BYTES", 2**18)
    if not CppKernels.can_code_logits(torch.bfloat16):
        pytest.skip("this CPU multiplies no bfloat16")
    hidden, weight, labels = problem(rows=rows, dtype=torch.bfloat16)
    assert dk.explain(hidden, weight, labels, reference_free=True).lent == lent
    flops, (largest, _) = costs(lambda: dk.fused_dpo_loss(hidden, weight, labels, reference_free=True).loss)
    assert flops == 3 * 2 * rows * 64 * LONG
    assert largest == (weight.numel() * 4 if lent else rows * LONG * 2)


def test_the_plan_says_so(wide_enough):
    plan = dk.explain(*problem(), reference_free=True)
    assert (plan.lent, plan.chunks, plan.extra_bytes, plan.tile.rows) == (True, 1, 0, 32)
    assert "logits in the memory of the head's gradient" in str(plan)
    assert memory_budget.LEAST_ALIASED_COLS <= plan.tile.cols <= 1024


def test_a_scratch_without_room_for_the_rows_needs_no_other_strategy(wide_enough):
    """Before, a pair of 16 rows would have been cut, and rows that are longer than the scratch refused."""
    scratch = 32 * 800 * 4
    plan = dk.explain(*problem(), reference_free=True, scratch_bytes=scratch)
    assert (plan.strategy, plan.lent, plan.chunks) == ("chunked", True, 1)
    static = dk.explain(*problem(), reference_free=True, scratch_bytes=scratch, max_scored_tokens=40)
    assert (static.strategy, static.lent) == ("chunked", True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_three_units_and_no_memory_but_the_gradients(wide_enough, dtype):
    hidden, weight, labels = problem(dtype=dtype)
    flops, (largest, shape) = costs(lambda: dk.fused_dpo_loss(hidden, weight, labels, reference_free=True).loss)
    assert flops == 3 * 2 * 32 * 64 * LONG
    assert (largest, shape) == (weight.numel() * 4, tuple(weight.shape))


@pytest.mark.slow
def test_peak_memory():
    """N = 256, H = 256, V = 49152: a tile of logits would take 50 MB beside gradients of 51 MB."""
    measured = measure(pairs=2, length=64, scratch_mib=512)
    assert measured["finite"]
    assert measured["extra"] <= measured["gradients"] + 42e6, measured
