"""The head's gradient as a sparse tensor of the rows that a sample reaches: the dense gradient's numbers, less memory.

The oracle is the dense gradient of the same sample, whose expectation is tested in ``test_sparse.py``.
"""

import math

import pytest
import torch

import dpo_kernels as dk
from dpo_kernels.kernel_interface import LogitsGradient, SparseGradient
from dpo_kernels.kernels.torch_kernels import TorchKernels
from dpo_kernels.strategies.weight_rows import WeightRows
from tests.gemm_counts import costs
from tests.strategies.test_sparse import (
    BY_BACKEND,
    LENGTH,
    PAIRS,
    TAU,
    VOCAB,
    WAYS,
    WIDTH,
    _every_sample_is_taken,  # noqa: F401  a fixture that every test uses
    batch,
    leaves,
    step,
)
from tests.tolerance import relative_l2

SPARSE = {"gradient": "sparse", "tau": TAU, "seed": 3}
ROWS = {**SPARSE, "sparse_weight_grad": True}


def assert_rows_of(found, dense, *, tolerance=0.0):
    """Check that a coalesced tensor holds rows in ascending order, and the numbers of a dense one."""
    assert found.layout == torch.sparse_coo
    assert found.is_coalesced()
    assert (found.sparse_dim(), found.dense_dim()) == (1, 1)
    assert (found.shape, found.dtype, found.device) == (dense.shape, dense.dtype, dense.device)
    assert (found.indices()[0].diff() > 0).all()
    assert relative_l2(found.to_dense(), dense) <= tolerance


# --- the numbers of the dense gradient --------------------------------------------------------------------------------


@BY_BACKEND
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kind", ["gaussian", "peaked", "softcap"])
def test_rows_have_the_bits_of_the_dense_gradient(kind, way, backend):
    """With an oversized pair the rows are scaled before they are added, and so rounded in another order."""
    inputs = batch(kind, bias=torch.linspace(-1, 1, VOCAB).requires_grad_())
    _, (dx, dw, db) = step(inputs, **SPARSE, backend=backend, **WAYS[way])
    _, (x, w, b) = step(inputs, **ROWS, backend=backend, **WAYS[way])
    assert_rows_of(w, dw, tolerance=1e-7 if way == "oversized" else 0.0)
    assert torch.equal(x, dx)
    assert torch.equal(b, db), "the bias is dense"
    reached = dw.count_nonzero(dim=1).nonzero()[:, 0]
    assert set(reached.tolist()) <= set(w.indices()[0].tolist())
    assert w._nnz() < VOCAB


@BY_BACKEND
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("way", ["chunked", "cut rows"])
@pytest.mark.parametrize("scale", [1.0, 1 / 3, 1024.0])
def test_dtypes_and_loss_scales_round_once(scale, way, dtype, backend):
    inputs, found = batch("peaked", dtype=dtype), []
    for options in (SPARSE, ROWS):
        out = dk.fused_dpo_loss(**inputs, **options, backend=backend, **WAYS[way])
        kept, last = (
            torch.autograd.grad(out.loss * scale, inputs["weight"], retain_graph=retained)[0]
            for retained in (True, False)
        )
        assert torch.equal(kept.to_dense(), last.to_dense())
        found.append(last)
    dense, rows = found
    assert_rows_of(rows, dense)


@BY_BACKEND
@pytest.mark.parametrize("way", WAYS)
def test_a_tile_whose_sample_does_not_pay_reaches_all_of_its_rows(monkeypatch, way, backend):
    monkeypatch.setattr("dpo_kernels.kernels.torch_kernels.MOST_SAMPLED", 0.001)
    inputs = batch()
    _, exact = step(inputs, backend=backend, **WAYS[way])
    _, found = step(inputs, **ROWS | {"tau": 2.0**-9}, backend=backend, **WAYS[way])
    assert found[1]._nnz() == VOCAB
    assert_rows_of(found[1], exact[1], tolerance=1e-6)


@BY_BACKEND
def test_every_public_function(backend):
    inputs = {name: value for name, value in batch().items() if name != "ref_logps"}
    desirable = torch.tensor([True, False, True, False])
    calls = {
        "sequences": lambda o: dk.fused_sequence_logps(**inputs, **o).sum(),
        "tokens": lambda o: dk.fused_token_logps(**inputs, **o).sum(),
        "kto": lambda o: dk.fused_kto_loss(**inputs, desirable=desirable, reference_free=True, **o).loss,
        "groups": lambda o: dk.fused_group_loss(**inputs, group_sizes=[4], reference_free=True, **o).loss,
        "module": lambda o: (
            dk.FusedDPOLoss(reference_free=True, **{k: v for k, v in o.items() if k != "seed"})(
                **inputs, seed=o["seed"]
            ).loss
        ),
    }
    for call in calls.values():
        dense, rows = (
            torch.autograd.grad(call({**options, "backend": backend}), inputs["weight"])[0]
            for options in (SPARSE, ROWS)
        )
        assert_rows_of(rows, dense)


@BY_BACKEND
@pytest.mark.parametrize("way", ["chunked", "recompute"])
def test_without_a_scored_token_no_row_is_reached(way, backend):
    inputs = batch(labels=torch.full((2 * PAIRS, LENGTH), -100))
    inputs["labels"].fill_(-100)
    _, found = step(inputs, **ROWS, backend=backend, **WAYS[way])
    assert_rows_of(found[1], torch.zeros(VOCAB, WIDTH))
    assert found[1]._nnz() == 0


@BY_BACKEND
def test_a_frozen_weight_gets_none(backend):
    inputs = batch()
    inputs["weight"].requires_grad_(False)
    _, (dense,) = step(inputs, **SPARSE, backend=backend)
    _, (found,) = step(inputs, **ROWS, backend=backend)
    assert torch.equal(found, dense)


def test_offloaded_graphs():
    inputs = batch()
    _, (_, dense) = step(inputs, **SPARSE)
    with torch.autograd.graph.save_on_cpu():
        _, (_, rows) = step(inputs, **ROWS)
    assert_rows_of(rows, dense)


def test_differentiated_again_it_raises():
    inputs = batch()
    out = dk.fused_dpo_loss(**inputs, **ROWS)
    (dw,) = torch.autograd.grad(out.loss, inputs["weight"], create_graph=True)
    with pytest.raises(RuntimeError, match="second derivatives"):
        torch.autograd.grad(dw.to_dense().square().sum(), inputs["hidden"])


# --- optimizers -------------------------------------------------------------------------------------------------------


def accumulated(seeds, **options):
    """The parameters, with the gradients of one backward pass for each seed added up."""
    inputs = batch("peaked", bias=torch.linspace(-1, 1, VOCAB).requires_grad_())
    for seed in seeds:
        dk.fused_dpo_loss(**inputs, **options | {"seed": seed}).loss.backward()
    return inputs


@pytest.mark.parametrize("seeds", [(1,), (1, 2, 3)])
@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_sgd_does_the_step_of_the_dense_gradient(momentum, seeds):
    steps = []
    for options in (SPARSE, ROWS):
        inputs = accumulated(seeds, **options)
        assert inputs["weight"].grad.is_sparse == ("sparse_weight_grad" in options)
        assert not inputs["bias"].grad.is_sparse
        optimizer = torch.optim.SGD([inputs["weight"], inputs["bias"]], lr=0.5, momentum=momentum)
        for _ in range(2):
            optimizer.step()
        steps.append(inputs)
    for name in ("weight", "bias"):
        torch.testing.assert_close(steps[1][name], steps[0][name], rtol=1e-6, atol=1e-7)
    assert not torch.equal(steps[1]["weight"], batch("peaked")["weight"]), "there was a step"


@pytest.mark.parametrize("seeds", [(1,), (1, 2, 3)])
def test_sparse_adam_moves_the_reached_rows_and_no_others(seeds):
    """Its first step is ``-lr * g / (|g| + eps / sqrt(1 - beta2))``: corrections take out what the moments decay."""
    before, grad = batch("peaked")["weight"].detach(), accumulated(seeds, **SPARSE)["weight"].grad
    inputs = accumulated(seeds, **ROWS)
    rows = inputs["weight"].grad.coalesce().indices()[0]
    torch.optim.SparseAdam([inputs["weight"]], lr=0.25, eps=1e-8).step()
    wanted = before.clone()
    wanted[rows] -= 0.25 * grad[rows] / (grad[rows].abs() + 1e-8 / math.sqrt(1 - 0.999))
    torch.testing.assert_close(inputs["weight"].detach(), wanted, rtol=1e-5, atol=1e-5)
    others = torch.ones(VOCAB, dtype=torch.bool).index_fill_(0, rows, False)
    assert others.any()
    assert torch.equal(inputs["weight"].detach()[others], before[others])


def test_zero_grad_and_a_dense_gradient_before():
    """torch adds rows to a dense gradient in place."""
    inputs = batch()
    inputs["weight"].grad = torch.ones(VOCAB, WIDTH)
    out = dk.fused_dpo_loss(**inputs, **ROWS)
    out.loss.backward()
    _, (_, dense) = step(inputs, **SPARSE)
    torch.testing.assert_close(inputs["weight"].grad, 1 + dense)


# --- memory -----------------------------------------------------------------------------------------------------------


@BY_BACKEND
@pytest.mark.parametrize(("way", "tokens"), [("chunked", 16), ("recompute", 16), ("oversized", 16)])
def test_nothing_has_the_size_of_the_head(way, tokens, backend):
    """Sixteen tokens reach a few rows of 20,000. The largest allocations are then those of the tile of logits."""
    vocab, width = 20_000, 512
    g = torch.Generator().manual_seed(0)
    hidden = torch.randn(2, tokens // 2, width, generator=g).requires_grad_()
    weight = torch.randn(vocab, width, generator=g).requires_grad_()
    labels = torch.randint(0, vocab, (2, tokens // 2), generator=g)
    how = {"oversized": {"strategy": "chunked", "scratch_bytes": 4 * vocab * 6}}.get(way, {"strategy": way})

    def call(**options):
        return dk.fused_dpo_loss(
            hidden, weight, labels, reference_free=True, gradient="sparse", backend=backend, **how, **options
        ).loss

    _, (dense_bytes, _) = costs(call, besides=[weight])
    assert dense_bytes == 4 * vocab * width
    weight.grad = None
    _, (most_bytes, shape) = costs(lambda: call(sparse_weight_grad=True), besides=[weight])
    assert most_bytes <= 8 * tokens * vocab, shape  # of the sampler's whole numbers, 64 bits for each logit
    assert weight.grad.is_sparse
    assert weight.grad._nnz() < vocab // 10


def test_explain_says_so():
    inputs = batch()
    row, whole = 4 * WIDTH, 4 * WIDTH * VOCAB
    line = f"only the rows that the sample reaches, of {row} bytes each; all {VOCAB} would be {whole / 1024:.1f} KiB"
    assert line in str(dk.explain(**inputs, **ROWS))
    assert "rows that the sample" not in str(dk.explain(**inputs, **SPARSE))
    inputs["weight"].requires_grad_(False)
    assert "rows that the sample" not in str(dk.explain(**inputs, **ROWS))


# --- rows alone -------------------------------------------------------------------------------------------------------


def test_rows_are_added_where_they_belong():
    """Against plain products: tiles that begin at different columns, exact ones among them, and a sum of two."""
    g = torch.Generator().manual_seed(0)
    kernels = TorchKernels(torch.float32, 5 * WIDTH * 4)  # exact tiles are cut into blocks of five columns
    x, like = torch.randn(3, WIDTH, generator=g), torch.zeros(40, WIDTH)
    rows, wanted = WeightRows(kernels, like), torch.zeros(40, WIDTH)
    for start, columns in ((20, [1, 7, 3]), (0, [5, 5, 2]), (20, [7, 7, 19])):
        values, scale = torch.randn(3, generator=g), torch.randn(3, generator=g)
        rows.add_sample(SparseGradient(torch.arange(4), torch.tensor(columns), values, scale), start, x)
        for row, column in enumerate(columns):
            wanted[start + column] += values[row] * scale[row] * x[row]
    assert_rows_of(rows.gradient(), wanted, tolerance=1e-6)
    assert rows.gradient().indices()[0].tolist() == [2, 5, 21, 23, 27, 39]
    d, scale = torch.randn(3, 12, generator=g), torch.randn(3, generator=g)
    rows.add_exact(LogitsGradient(d, scale, torch.zeros(3, dtype=torch.int64)), 8, x)
    wanted[8:20] += (d * scale[:, None]).T @ x
    assert_rows_of(rows.gradient(), wanted, tolerance=1e-6)
    total = WeightRows(kernels, like)
    total.add_exact(LogitsGradient(d, scale, torch.zeros(3, dtype=torch.int64)), 0, x)
    wanted = 2.5 * wanted
    wanted[:12] += (d * scale[:, None]).T @ x
    total.add_scaled(rows, torch.tensor(2.5))
    assert_rows_of(total.gradient(), wanted, tolerance=1e-6)


# --- refusals ---------------------------------------------------------------------------------------------------------


def refused(match, **more):
    with pytest.raises(ValueError, match=match):
        dk.fused_dpo_loss(**batch() | more.pop("inputs", {}), **ROWS | more)


def test_what_it_does_not_go_with():
    refused("goes with gradient='sparse' only", gradient="dense")
    refused("does not go with main_grad", main_grad=torch.zeros(VOCAB, WIDTH))
    with pytest.raises(ValueError, match="goes with gradient='sparse' only"):
        dk.FusedDPOLoss(sparse_weight_grad=True)
    with pytest.raises(TypeError, match="sparse_weight_grad must be"):
        dk.fused_dpo_loss(**batch(), **ROWS | {"sparse_weight_grad": 1})


def test_kernels_that_do_not_tell_the_host_their_rows_are_refused():
    """Without a gradient of the weight they are not refused for that."""
    refused("backend='triton' cannot run this: sparse_weight_grad needs the number of kept entries", backend="triton")
    inputs = batch()
    assert "sparse_weight_grad" in dk.explain(**inputs, **ROWS).against["triton"]
    inputs["weight"].requires_grad_(False)
    assert "sparse_weight_grad" not in dk.explain(**inputs, **ROWS).against["triton"]


def test_a_weight_that_comes_out_of_an_operation_is_refused():
    inputs = batch()
    view = inputs["weight"].view(VOCAB, WIDTH)
    refused("needs a weight that is a parameter itself", inputs=inputs | {"weight": view})
    dk.fused_dpo_loss(**inputs | {"weight": view.detach()}, **ROWS)  # it is frozen


def test_a_tied_head_is_refused():
    inputs = batch()
    embedded = inputs["weight"][torch.randint(0, VOCAB, (2 * PAIRS, LENGTH))].tanh()
    refused("does not go with a tied head", inputs=inputs | {"hidden": embedded})
    other = torch.randn(VOCAB, WIDTH).requires_grad_()[torch.randint(0, VOCAB, (2 * PAIRS, LENGTH))].tanh()
    dk.fused_dpo_loss(**inputs | {"hidden": other}, **ROWS).loss.backward()
    assert inputs["weight"].grad.is_sparse


@pytest.mark.parametrize(("attribute", "engine"), [("ds_tensor", "ZeRO-3"), ("gathered_by", "FSDP2")])
def test_a_head_that_an_engine_has_gathered_is_refused(attribute, engine):
    inputs = batch()
    setattr(inputs["weight"], attribute, "something")
    refused(f"does not go with {engine}", inputs=inputs)


def test_inside_a_graph_it_is_refused():
    inputs = batch()

    @torch.compile(backend="eager", fullgraph=True)
    def compiled(hidden, weight):
        return dk.fused_dpo_loss(**inputs | {"hidden": hidden, "weight": weight}, **ROWS).loss

    with pytest.raises(Exception, match=r"sparse_weight_grad is not supported inside torch\.compile"):
        compiled(inputs["hidden"], inputs["weight"])


def test_leaves_of_the_batch():
    """What the tests above rely on: the order of the gradients."""
    assert [tuple(leaf.shape) for leaf in leaves(batch())] == [(2 * PAIRS, LENGTH, WIDTH), (VOCAB, WIDTH)]
