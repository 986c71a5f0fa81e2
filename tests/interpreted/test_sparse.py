"""Sparse gradients by the Triton kernels, in the sanitized interpreter: the sample, its products, and giving it up."""

import pytest
import torch
from triton.runtime.interpreter import InterpretedFunction

import dpo_kernels as dk
from dpo_kernels.kernels.triton import sparse_kernels
from tests.interpreted.sparse import (
    KINDS,
    ROWS,
    WIDTH,
    differences_of_the_exact,
    differences_of_the_lengths,
    differences_of_the_limit,
    differences_of_the_places,
    differences_of_the_products,
    differences_of_the_sample,
    problem,
    taken,
)
from tests.tolerance import relative_l2
from tests.triton_tools.interpreter import check_orders, sanitize

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SHARE = "dpo_kernels.kernels.torch_kernels.MOST_SAMPLED"


@pytest.fixture(autouse=True)
def _every_sample_is_taken(monkeypatch):
    monkeypatch.setattr(SHARE, 16.0)
    monkeypatch.setattr("dpo_kernels.inputs.notices.warn_once", lambda message: None)


@pytest.fixture
def sanitized():
    with sanitize() as seen:
        yield seen


@pytest.mark.usefixtures("sanitized")
@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize("kind", KINDS)
def test_the_sample_is_that_of_torch(kind, softcap):
    """The same entries, as the exponentials are the same. The tile has more columns than are read at once."""
    for seed in (3, torch.tensor(-(2**62) + 5)):
        assert not differences_of_the_sample(problem(kind, softcap=softcap, seed=seed))


@pytest.mark.usefixtures("sanitized")
@pytest.mark.parametrize("tau", [1e-12, 1e-35, 1e-44])
def test_a_tau_whose_unit_underflows(tau):
    """Logits are up to 140 apart, so that there are entries below."""
    assert not differences_of_the_sample(problem("far", cols=600, tau=tau))


@pytest.mark.usefixtures("sanitized")
@pytest.mark.parametrize("cols", [1, 17, 256, 2048, 2049])
def test_widths_of_tiles(cols):
    assert not differences_of_the_sample(problem(cols=cols))


@pytest.mark.usefixtures("sanitized")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("accumulate", [False, True])
def test_products_of_a_sample(dtype, accumulate):
    given = problem("peaked", cols=270, dtype=dtype)
    assert not differences_of_the_products(given, dtype, accumulate)


@pytest.mark.parametrize("accumulate", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("softcap", [None, 5.0])
def test_too_many_entries_go_dense(monkeypatch, sanitized, dtype, accumulate, softcap):
    monkeypatch.setattr(SHARE, 1e-3)
    assert not differences_of_the_exact(problem(cols=150, dtype=dtype, softcap=softcap), dtype, accumulate)
    assert sanitized["product_if"] == sanitized["add_kept_rows"] == 3


@pytest.mark.usefixtures("sanitized")
def test_lengths_are_rounded_and_none_is_0():
    assert not differences_of_the_lengths()


@pytest.mark.usefixtures("sanitized")
def test_the_expectation_decides_on_the_device():
    """The expectation is what sampling.sample says, summed over the rows of a tile. Rows are placed in blocks."""
    assert not differences_of_the_limit(problem())
    assert not differences_of_the_places()


@pytest.mark.usefixtures("sanitized")
def test_nan_is_not_hidden():
    """A row that holds one is kept whole, or is one of too many entries."""
    given = problem(cols=300)
    rows = given.rows._replace(sumexp=given.rows.sumexp.clone().index_fill_(0, torch.tensor([1]), torch.nan))
    kernels, d = taken(type(given)(given.tile, rows, given.head, given.start, given.sampling))
    dx, dw = torch.zeros(ROWS, WIDTH), torch.zeros(300, WIDTH)
    kernels.sparse_grad_hidden(d, given.head, given.start, dx, False)
    kernels.sparse_grad_weight(d, torch.full((ROWS, WIDTH), torch.nan), dw, False)
    assert dw.isnan().all()
    assert dx[[0, 2, 3, 4]].isfinite().all()


@pytest.mark.usefixtures("sanitized")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_memory_of_entries_is_what_the_plan_counts(dtype):
    """Sorting takes as much again as what it returns, and the places before it: torch's on a GPU, which is measured in
    ``tests/gpu/test_sparse.py``. To find where a column begins takes its number, in 32 bits.
    """
    given = problem(cols=1000, dtype=dtype)
    kernels, d = taken(given, dtype)
    begins, order = d.by_column
    of_sort = order.nbytes + d.columns.nbytes
    held = d.rows.nbytes + d.columns.nbytes + d.values.nbytes + 2 * of_sort + order.nbytes + begins.nbytes * 3 // 2
    counted = kernels.sample_bytes(dtype, *given.tile.shape, given.sampling.tau)
    assert counted == held


def test_programs_may_run_in_any_order():
    given = problem("peaked", cols=270)

    def run():
        kernels, d = taken(given)
        dx, dw = torch.zeros(ROWS, WIDTH), torch.zeros(270, WIDTH)
        kernels.sparse_grad_hidden(d, given.head, given.start, dx, False)
        kernels.sparse_grad_weight(d, torch.ones(ROWS, WIDTH), dw, False)
        used = int(d.offsets[-1])
        return d.offsets, d.rows[:used], d.columns, d.values[:used], dx, dw

    check_orders(run)


# --- whole steps ------------------------------------------------------------------------------------------------------

VOCAB = 260  # a block of the sampler, and a rest
WAYS = {
    "chunked": {"strategy": "chunked"},
    "oversized": {"strategy": "chunked", "scratch_bytes": 4 * VOCAB * 6},
    "cut rows": {"strategy": "recompute", "scratch_bytes": 6 * 256 * 12},
    "streaming": {"strategy": "streaming"},
}


def inputs_of(dtype, trainable=True):
    g = torch.Generator().manual_seed(1)
    inputs = {
        "hidden": torch.randn(4, 3, WIDTH, generator=g).to(dtype).requires_grad_(),
        "weight": torch.randn(VOCAB, WIDTH, generator=g).to(dtype).requires_grad_(trainable),
        "bias": torch.linspace(-1, 1, VOCAB).to(dtype).requires_grad_(trainable),
        "labels": torch.randint(0, VOCAB, (4, 3), generator=g),
        "token_weights": torch.linspace(0.5, 1.5, 12).view(4, 3),
        "softcap": 6.0,
        "logit_scale": 0.7,
        "reference_free": True,
    }
    inputs["labels"][0, 0] = -100
    return inputs


def step(inputs, **options):
    out = dk.fused_dpo_loss(**inputs, gradient="sparse", tau=2.0**-5, seed=2, **options)
    leaves = [value for value in inputs.values() if isinstance(value, torch.Tensor) and value.requires_grad]
    return torch.autograd.grad(out.loss, leaves)


@pytest.mark.usefixtures("sanitized")
@pytest.mark.parametrize("trainable", [True, False])
@pytest.mark.parametrize("way", WAYS)
def test_a_step_is_that_of_torch(way, trainable):
    inputs = inputs_of(torch.float32, trainable)
    pairs = zip(step(inputs, backend="triton", **WAYS[way]), step(inputs, backend="torch", **WAYS[way]), strict=True)
    for mine, other in pairs:
        assert relative_l2(mine, other) <= 3e-6


@pytest.mark.usefixtures("sanitized")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_a_step_in_16_bits(dtype):
    inputs = inputs_of(dtype)
    for mine, other in zip(step(inputs, backend="triton"), step(inputs, backend="torch"), strict=True):
        assert mine.dtype == dtype
        assert relative_l2(mine, other) <= 1e-3


@pytest.mark.usefixtures("sanitized")
def test_a_step_that_goes_dense(monkeypatch):
    monkeypatch.setattr(SHARE, 1e-4)
    inputs = inputs_of(torch.bfloat16)
    out = dk.fused_dpo_loss(**inputs, backend="triton", strategy="chunked")
    exact = torch.autograd.grad(out.loss, [inputs[name] for name in ("hidden", "weight", "bias")])
    for mine, other in zip(step(inputs, backend="triton", strategy="chunked"), exact, strict=True):
        assert relative_l2(mine, other) <= 1e-3


@pytest.mark.usefixtures("sanitized")
def test_main_grad_counts_as_written():
    inputs = inputs_of(torch.float32)
    (_, wanted_grad, _) = step(inputs, backend="triton")
    buffer = torch.ones(VOCAB, WIDTH)
    before = buffer._version
    out = dk.fused_dpo_loss(**inputs, gradient="sparse", tau=2.0**-5, seed=2, backend="triton", main_grad=buffer)
    out.loss.backward()
    torch.testing.assert_close(buffer - 1, wanted_grad, rtol=1e-4, atol=1e-6)
    assert buffer._version > before


def test_every_kernel_is_launched_here(sanitized):
    step(inputs_of(torch.float32), backend="triton")
    public = {name: value for name, value in vars(sparse_kernels).items() if not name.startswith("_")}
    ours = {name for name, value in public.items() if isinstance(value, InterpretedFunction)}
    assert len(ours) == 5
    assert ours <= set(sanitized)
