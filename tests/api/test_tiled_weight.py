"""``TiledWeight``: a frozen head of which only tiles are in memory gives what the whole weight gives."""

import copy

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import dpo_kernels as dk
from dpo_kernels import TiledWeight, tiled_weight
from tests.cases import LAYOUTS, RICH, Case, broken_results, run
from tests.family import DTYPES
from tests.gemm_counts import Allocations, costs
from tests.small import BACKENDS, F64, H, S, T, V, gradients, problem, same


def tiled(weight, seen=None):
    """The weight in tiles. ``seen`` gets the sizes that are asked for."""
    whole = weight.detach()

    def weight_tile(start, stop):
        assert 0 <= start < stop <= whole.shape[0]
        if seen is not None:
            seen.append(stop - start)
        return whole.index_select(0, torch.arange(start, stop))  # a slice would count as all of the weight's memory

    return TiledWeight(weight_tile, tuple(weight.shape), weight.dtype)


def scored(**more):
    return problem("hidden", ref_hidden=True, ref_weight=True, ref_bias=True, token_weights=True, **more)


CALLS = {
    "frozen head": {},
    "cut rows": {"scratch_bytes": 300, "softcap": 3.0, "strategy": "recompute"},
    "recompute": {"strategy": "recompute", "stats": ("entropy", "top1")},
    "streaming": {"strategy": "streaming", "logit_scale": 0.7},
    "by pair": {"reduction": "none"},
    "divergence": {"loss_type": "tdpo1", "stats": ("kl",)},
    "divergence, computed again": {"loss_type": "tdpo2", "strategy": "recompute", "softcap": 3.0},
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("picked_bytes", [1, 3 * H * 8, 2**20])
def test_is_the_whole_weight(call, backend, picked_bytes, monkeypatch):
    monkeypatch.setattr(tiled_weight, "PICKED_BYTES", picked_bytes)
    data, how = scored(), {**CALLS[call], "backend": backend, "beta": 0.7}
    tiles = data | {name: tiled(data[name]) for name in ("weight", "ref_weight")}
    one, two = dk.fused_dpo_loss(**data, **how), dk.fused_dpo_loss(**tiles, **how)
    same(two.loss, one.loss)
    for name, value in one.stats.items():
        same(two.stats[name], value)
    (ours,) = torch.autograd.grad(two.loss.sum(), data["hidden"])
    same(ours, gradients(one.loss.sum(), data)["hidden"])
    with torch.no_grad():
        same(dk.fused_dpo_loss(**tiles, **how).loss, one.loss)
    plan = dk.explain(**tiles, **how)
    assert (plan.tile.cols < V) == (call == "cut rows")
    assert str(plan).splitlines()[:3] == str(dk.explain(**data, **how)).splitlines()[:3]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("call", CALLS)
def test_inference_mode(call, backend):
    """With heads that were made outside of it."""
    data, how = scored(), {**CALLS[call], "backend": backend}
    tiles = data | {name: tiled(data[name]) for name in ("weight", "ref_weight")}
    with torch.inference_mode():
        same(dk.fused_dpo_loss(**tiles, **how).loss, dk.fused_dpo_loss(**data, **how).loss)


@pytest.mark.parametrize("trained", ["hidden", "bias"])
@pytest.mark.parametrize("call", ["frozen head", "recompute", "streaming", "divergence, computed again"])
def test_torch_func(call, trained):
    data, how = scored(), CALLS[call]
    tiles = data | {name: tiled(data[name]) for name in ("weight", "ref_weight")}

    def loss(value, given):
        return dk.fused_dpo_loss(**given | {trained: value}, **how).loss

    start = data[trained].detach()
    same(torch.func.grad(loss)(start, tiles), torch.func.grad(loss)(start, data))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_dtype(dtype, backend):
    """By the tolerance rule, with tiles of few rows."""
    for layout, rich in zip(LAYOUTS, (False, True, False, True), strict=True):
        case = Case(dtype, frozen=True, bias=rich, weights=rich, options=RICH if rich else {}, **LAYOUTS[layout])
        inputs = case.tensors()
        for strategy, scratch_bytes in (("chunked", 64 * 211 * 8), ("recompute", 8192), ("streaming", 16384)):
            how = {"strategy": strategy, "scratch_bytes": scratch_bytes, "backend": backend}
            got = run(dk.fused_dpo_loss, inputs | {"weight": tiled(inputs["weight"])}, **how, **case.keywords())
            assert not broken_results(got, inputs, case.keywords(), dtype, backend), (layout, strategy)


def test_log_probs_single_sequences_and_groups():
    data = problem("hidden")
    tiles = data | {"weight": tiled(data["weight"])}
    plain = {name: data[name] for name in ("hidden", "weight", "bias", "labels")}
    desirable = torch.arange(S) % 2 == 0
    for call in (
        lambda w: dk.fused_token_logps(**plain | {"weight": w}),
        lambda w: dk.fused_sequence_logps(**plain | {"weight": w}, strategy="streaming"),
        lambda w: dk.fused_kto_loss(**tiles | {"weight": w}, desirable=desirable).loss,
        lambda w: dk.fused_group_loss(**tiles | {"weight": w}, group_sizes=[4, 2]).loss,
    ):
        one, two = call(data["weight"]), call(tiles["weight"])
        same(two, one)
        (ours,), (theirs,) = (torch.autograd.grad(each.sum(), data["hidden"]) for each in (two, one))
        same(ours, theirs)


def test_a_reference_that_shares_the_tiles():
    data = problem("hidden")
    del data["ref_logps"]
    data["ref_hidden"] = torch.randn(S, T, H, dtype=F64)
    same(dk.fused_dpo_loss(**data | {"weight": tiled(data["weight"])}).loss, dk.fused_dpo_loss(**data).loss)


@pytest.mark.parametrize("inference", [False, True])
def test_copies(inference):
    """They read the same tiles. What belongs to another device needs another callable."""
    head = tiled(torch.randn(V, H, dtype=F64))
    with torch.inference_mode(inference):
        for made in (copy.deepcopy(head), head.clone(), head.to("cpu"), head.to("cpu", torch.float64)):
            assert type(made) is TiledWeight
            assert torch.equal(made.rows_between(2, 5), head.rows_between(2, 5))
        for made in (head.float(), head.to(torch.float32), head.to("cpu", torch.float32)):
            assert torch.equal(made.rows_between(2, 5), head.rows_between(2, 5).float())
        for move in (lambda: head.to("meta"), lambda: head.to("meta", torch.float32)):
            with pytest.raises(ValueError, match="a TiledWeight on cpu cannot be copied to meta"):
                move()


def test_a_gpu_without_an_index_is_the_current_one():
    with FakeTensorMode():
        head = TiledWeight(lambda start, stop: None, (V, H), F64, "cuda")
        assert head.device == torch.empty(1, device="cuda").device == torch.device("cuda", 0)


def test_int8():
    """A quantised head, as one row has one factor."""
    g = torch.Generator().manual_seed(0)
    codes = torch.randint(-127, 128, (V, H), generator=g).to(torch.int8)
    scale = torch.rand(V, 1, generator=g) / 100
    data = {name: value.detach() for name, value in problem(dtype=torch.float32).items() if name != "weight"}
    data["hidden"].requires_grad_()
    head = TiledWeight(lambda start, stop: codes[start:stop] * scale[start:stop], (V, H), torch.float32)
    one, two = dk.fused_dpo_loss(weight=codes * scale, **data), dk.fused_dpo_loss(weight=head, **data)
    torch.testing.assert_close(two.loss, one.loss, rtol=0, atol=0)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("scratch_mib", "reads"), [(4, 3), (64, 2)], ids=["cut rows", "whole rows"])
def test_the_head_is_never_whole(scratch_mib, reads, backend):
    """Each tile is asked for once for the logits, once for the gradient, and once for the labels' rows of cut rows."""
    g = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(4, 32, 64, generator=g).requires_grad_(), torch.randn(65536, 64, generator=g)
    labels, asked = torch.randint(0, 65536, (4, 32), generator=g), []
    how = {"reference_free": True, "scratch_bytes": scratch_mib * 2**20, "backend": backend}
    head = tiled(weight, asked)
    with Allocations() as allocations:
        dk.fused_dpo_loss(hidden, head, labels, **how).loss.backward()
    memory = [leaf for leaf in allocations.kept if not isinstance(leaf, TiledWeight)]  # which has none
    assert max(leaf.untyped_storage().nbytes() for leaf in memory) <= scratch_mib * 2**20
    assert max(asked) * 64 * 4 <= 4 * 2**20 < weight.nbytes
    plan = dk.explain(hidden, head, labels, **how)
    assert (plan.tile.cols < 65536) == (reads == 3)
    assert sum(asked) == reads * -(-128 // plan.tile.rows) * 65536
    flops, _ = costs(lambda: dk.fused_dpo_loss(hidden, head, labels, **how | {"backend": "torch"}).loss)
    assert flops == 2 * 2 * 128 * 64 * 65536


def test_autocast():
    data = problem("hidden", dtype=torch.float32)
    whole = data | {"weight": data["weight"].detach()}
    with torch.autocast("cpu", dtype=torch.bfloat16):
        one = dk.fused_dpo_loss(**whole, backend="torch")
        two = dk.fused_dpo_loss(**data | {"weight": tiled(data["weight"])}, backend="torch")
    torch.testing.assert_close(two.loss, one.loss, rtol=1e-6, atol=0)
    (ours,), (theirs,) = (torch.autograd.grad(each.loss, data["hidden"]) for each in (two, one))
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-7)


def returning(made):
    return TiledWeight(lambda start, stop: made(start, stop), (V, H), F64)


BAD_TILES = {
    r"weight_tile\(0, 11\) must return \(11, 4\) of torch.float64 on cpu, got \(10, 4\)": returning(
        lambda start, stop: torch.zeros(stop - start - 1, H, dtype=F64)
    ),
    r"got \(11, 4\) of torch.float32 on cpu": returning(lambda start, stop: torch.zeros(stop - start, H)),
    r"got \(11, 4\) of torch.float64 on meta": returning(
        lambda start, stop: torch.zeros(stop - start, H, dtype=F64, device="meta")
    ),
    "must return a tensor, got list": returning(lambda start, stop: [0.0]),
}


@pytest.mark.parametrize("words", BAD_TILES)
def test_a_tile_that_is_not_what_was_said(words):
    data = problem("hidden")
    with pytest.raises((ValueError, TypeError), match=words):
        dk.fused_dpo_loss(**data | {"weight": BAD_TILES[words]})


def test_what_a_head_in_tiles_does_not_go_with():
    data = problem("hidden") | {"weight": tiled(torch.zeros(V, H, dtype=F64))}
    trained = data | {"weight": tiled(torch.zeros(V, H, dtype=F64)).requires_grad_()}
    with pytest.raises(ValueError, match="weight comes in tiles and is frozen: it gets no gradient"):
        dk.fused_dpo_loss(**trained)
    with pytest.raises(ValueError, match="weight comes in tiles, which does not go with gradient='sparse'"):
        dk.fused_dpo_loss(**data, gradient="sparse")
    with pytest.raises(ValueError, match="weight comes in tiles, which does not go with vocab_parallel yet"):
        dk.fused_dpo_loss(**data, vocab_parallel=object())
    with pytest.raises(ValueError, match="the head comes in tiles, and these kernels read it as a matrix"):
        dk.fused_dpo_loss(**data, backend="triton")
    others = {"weight": data["weight"], "ref_weight": tiled(torch.zeros(12, 3, dtype=F64)), "ref_bias": None}
    with pytest.raises(ValueError, match="ref_weight has V = 12, but weight has V = 11"):
        dk.fused_dpo_loss(**scored() | others)
    with pytest.raises(TypeError, match="weight_tile must be callable, got list"):
        TiledWeight([], (V, H), F64)


@pytest.mark.parametrize("operation", [
    lambda weight: weight.add(1), lambda weight: weight.t(), lambda weight: weight[2:3],
    lambda weight: torch.nn.functional.linear(torch.zeros(1, H, dtype=F64), weight),
])  # fmt: skip
def test_nothing_makes_it_whole(operation):
    with pytest.raises(TypeError, match="needs the whole weight, of which a TiledWeight has tiles only"):
        operation(tiled(torch.zeros(V, H, dtype=F64)))


def test_inside_a_graph_it_is_refused():
    data = problem("hidden")
    head = tiled(data["weight"])

    def step(hidden):
        return dk.fused_dpo_loss(**data | {"hidden": hidden, "weight": head}).loss

    with pytest.raises(Exception, match=r"TiledWeight|tiles"):
        torch.compile(step, backend="eager", fullgraph=True)(data["hidden"])
