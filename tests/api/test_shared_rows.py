"""``rows``: labels say which row of the hidden states predicts them, and several may say the same."""

from dataclasses import replace

import pytest
import torch

import dpo_kernels as dk
from dpo_kernels import segments
from dpo_kernels.inputs.options import Layout, PolicyTensors
from dpo_kernels.inputs.shards import split_work
from dpo_kernels.reference import sequence_logps_reference, token_logps_reference
from tests.cases import Case, broken_results, run
from tests.family import DTYPES
from tests.gemm_counts import Allocations
from tests.small import (
    BACKENDS,
    F64,
    H_REF,
    STRATEGIES,
    TRAINED,
    H,
    S,
    T,
    V,
    agree,
    close,
    gradients,
    pack,
    problem,
    same,
)

M = 9  # rows of the hidden states, fewer than there are labels


def shared(**more):
    """Six ragged sequences over nine rows. One row is read by nobody, and rows of labels that do not count are wild."""
    data = problem(*TRAINED, token_weights=True, **more)
    g = torch.Generator().manual_seed(7)
    data["hidden"] = torch.randn(M, H, generator=g, dtype=F64).requires_grad_()
    if "ref_hidden" in data:
        data["ref_hidden"] = torch.randn(M, H_REF, generator=g, dtype=F64)
    rows = torch.randint(0, M - 1, (S, T), generator=g)
    wild = torch.where(torch.arange(S * T).view(S, T) % 2 == 0, -5, 10**6)
    data["rows"] = torch.where(data["labels"] < 0, wild, rows)
    return data


@pytest.mark.parametrize("layout", ["padded", "packed"])
@pytest.mark.parametrize("trained", [TRAINED, ("hidden",)], ids=["trainable", "frozen"])
@pytest.mark.parametrize("reference", [False, True], ids=["cached", "scored"])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_agrees_with_the_oracle(strategy, backend, reference, trained, layout):
    more = {"ref_hidden": True, "ref_weight": True, "ref_bias": True} if reference else {}
    data = shared(**more)
    for name in TRAINED:
        data[name].requires_grad_(name in trained)
    if layout == "packed":  # labels and what goes with them; the rows of the hidden states stay
        hidden = {name: data[name] for name in ("hidden", "ref_hidden") if name in data}
        data = pack({name: value for name, value in data.items() if name not in hidden} | {"hidden": data["labels"]})[0]
        data |= hidden
    out = agree(data, strategy=strategy, loss_type="ipo", stats=("entropy",))
    assert out.loss.isfinite()
    agree(data | {"rows": data["rows"].int().clamp(-5, 100)}, strategy=strategy)
    grad = gradients(out.loss, data)["hidden"]
    assert grad.shape == (M, H)
    assert not grad[M - 1].any()
    direct = dk.fused_dpo_loss(**data, strategy=strategy, backend=backend, loss_type="ipo")
    same(gradients(direct.loss, data)["hidden"], grad)


@pytest.mark.parametrize("loss_type", ["tdpo1", "tdpo2"])
@pytest.mark.parametrize("strategy", ["chunked", "recompute"])
def test_with_a_divergence(strategy, loss_type):
    data = shared(ref_hidden=True, ref_weight=True, ref_bias=True)
    agree(data, strategy=strategy, loss_type=loss_type, stats=("kl",))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("strategy", ["chunked", "recompute"])
def test_in_every_dtype(strategy, dtype):
    """By the tolerance rule; the gradients of a row are added up before they are rounded."""
    case = Case(dtype, bias=True)
    inputs = case.tensors()
    flat = inputs["hidden"].detach().flatten(0, 1)[:20].clone().requires_grad_()
    rows = torch.randint(0, 20, inputs["labels"].shape, generator=torch.Generator().manual_seed(2))
    inputs |= {"hidden": flat, "rows": rows}
    got = run(dk.fused_dpo_loss, inputs, strategy=strategy, **case.keywords())
    assert not broken_results(got, inputs, case.keywords(), dtype, "auto")


@pytest.mark.parametrize("strategy", ["auto", "recompute", "streaming"])
@pytest.mark.parametrize("trained", [TRAINED, ("hidden",)], ids=["trainable", "frozen"])
def test_log_probs(trained, strategy):
    data = shared()
    plain = {name: data[name] for name in (*TRAINED, "labels", "rows")}
    for name in TRAINED:
        plain[name].requires_grad_(name in trained)
    upstream = torch.linspace(-1, 2, S * T, dtype=F64).view(S, T)
    for ours, theirs, weight in (
        (dk.fused_token_logps, token_logps_reference, upstream),
        (dk.fused_sequence_logps, sequence_logps_reference, upstream[:, 0]),
    ):
        got, want = ours(**plain, strategy=strategy), theirs(**plain)
        same(got, want)
        for name, grad in gradients((got * weight).sum(), plain).items():
            same(grad, gradients((want * weight).sum(), plain)[name])


def test_a_row_at_its_own_place_changes_nothing():
    """The same bits: a sum of one number is that number."""
    data = problem(*TRAINED, ref_hidden=True, ref_weight=True)
    flat = {name: data[name].detach().reshape(S * T, -1) for name in ("hidden", "ref_hidden")}
    flat["hidden"].requires_grad_()
    rows = torch.arange(S * T).view(S, T)
    one, two = dk.fused_dpo_loss(**data), dk.fused_dpo_loss(**data | flat, rows=rows)
    assert torch.equal(one.loss, two.loss)
    ours, theirs = gradients(two.loss, data | flat), gradients(one.loss, data)
    assert torch.equal(ours["hidden"].view(S, T, H), theirs["hidden"])
    assert torch.equal(ours["weight"], theirs["weight"])


def test_a_prompt_that_is_computed_once():
    """Chosen and rejected begin behind the same row, as written out by a copy."""
    g = torch.Generator().manual_seed(0)
    prompt, chosen, rejected = (torch.randn(n, H, generator=g, dtype=F64) for n in (2, 3, 3))
    labels = torch.randint(0, V, (2, 4), generator=g)
    weight = torch.randn(V, H, generator=g, dtype=F64).requires_grad_()
    hidden = torch.cat([prompt, chosen, rejected]).requires_grad_()
    rows = torch.tensor([[1, 2, 3, 4], [1, 5, 6, 7]])
    out = dk.fused_dpo_loss(hidden, weight, labels, rows=rows, reference_free=True, beta=0.7)
    copied = torch.stack([torch.cat([prompt[1:], side]) for side in (chosen, rejected)]).requires_grad_()
    want = dk.fused_dpo_loss(copied, weight, labels, reference_free=True, beta=0.7)
    same(out.loss, want.loss)
    ours, theirs = (torch.autograd.grad(each, leaf)[0] for each, leaf in ((out.loss, hidden), (want.loss, copied)))
    same(ours[1], theirs[:, 0].sum(0))
    same(ours[2:5], theirs[0, 1:])
    assert not ours[0].any()


def test_single_sequences_and_groups_take_it():
    data = shared()
    copied = data["hidden"].detach()[data["rows"].clamp(0, M - 1)].requires_grad_()
    plain = {name: value for name, value in data.items() if name != "rows"} | {"hidden": copied}
    desirable = torch.arange(S) % 2 == 0
    for call in (
        lambda given: dk.fused_kto_loss(**given, desirable=desirable),
        lambda given: dk.fused_group_loss(**given, group_sizes=[4, 2]),
    ):
        same(call(data).loss, call(plain).loss)


@pytest.mark.parametrize("capacity", [15, 17, 30])
def test_a_static_capacity(capacity):
    agree(shared(), max_scored_tokens=capacity)
    agree(shared(), max_scored_tokens=capacity, strategy="recompute")


def test_no_tokens_and_no_rows():
    data = shared()
    data["labels"] = torch.full((S, T), -100)
    grad = gradients(agree(data).loss, data)["hidden"]
    assert grad.shape == (M, H)
    assert not grad.any()
    none = data | {"hidden": torch.zeros(0, H, dtype=F64, requires_grad=True)}
    for capacity in ({}, {"max_scored_tokens": 4}, {"max_scored_tokens": 4, "strategy": "recompute"}):
        out = dk.fused_dpo_loss(**none, **capacity)
        same(out.loss, dk.fused_dpo_loss(**data).loss)
        assert gradients(out.loss, none)["hidden"].shape == (0, H)


def test_main_grad_and_samples():
    data, buffer = shared(), torch.zeros(V, H, dtype=F64)
    want = gradients(dk.fused_dpo_loss(**data).loss, data)
    dk.fused_dpo_loss(**data, main_grad=buffer).loss.backward()
    same(buffer, want["weight"])
    same(data["hidden"].grad, want["hidden"])
    data["hidden"].grad = None
    whole = gradients(dk.fused_dpo_loss(**data, gradient="sparse", tau=1e-12).loss, data)
    same(whole["hidden"], want["hidden"])


def test_the_hidden_states_are_not_copied():
    """Nothing is as large as the hidden states that the labels would have by themselves."""
    g = torch.Generator().manual_seed(0)
    hidden, weight = (
        torch.randn(8, 256, generator=g).requires_grad_(),
        torch.randn(64, 256, generator=g).requires_grad_(),
    )
    labels, rows = torch.randint(0, 64, (64, 32), generator=g), torch.randint(0, 8, (64, 32), generator=g)
    with Allocations() as allocations, torch.no_grad():
        dk.fused_dpo_loss(
            hidden, weight, labels, rows=rows, reference_free=True, scratch_bytes=2**15, strategy="recompute"
        )
    assert allocations.largest()[0] < labels.numel() * 256 * 4 // 4


@pytest.mark.parametrize(("rows", "tokens"), [(4096, 16), (16, 4096)], ids=["few tokens", "many tokens"])
def test_gradients_of_rows_are_added_up_in_blocks(rows, tokens, monkeypatch):
    """A block is one of the tokens' rows or of their sums, whichever are more."""
    block = 64 * 2**10
    monkeypatch.setattr("dpo_kernels.engine.places.CPU_COPY_BYTES", block)
    g = torch.Generator().manual_seed(0)
    hidden = torch.randn(rows, 64, generator=g).bfloat16().requires_grad_()
    labels = torch.randint(0, 8, (2, tokens // 2), generator=g)
    at = torch.randint(0, rows, labels.shape, generator=g)
    weight = torch.randn(8, 64, generator=g).bfloat16()
    loss = dk.fused_dpo_loss(hidden, weight, labels, rows=at, reference_free=True).loss
    with Allocations() as allocations:
        loss.backward()
    known = {hidden.grad.nbytes, (tokens + 1) * 64 * 4}  # the result, and what the forward pass has saved
    assert max(size for size, _ in allocations.sizes.values() if size not in known) <= block


@pytest.mark.parametrize("step", [1, 3, 10**9])
def test_blocks_of_columns_change_no_bit(monkeypatch, step):
    data = shared()
    want = gradients(dk.fused_dpo_loss(**data).loss, data)["hidden"]
    monkeypatch.setattr("dpo_kernels.engine.places.CPU_COPY_BYTES", step)
    assert torch.equal(gradients(dk.fused_dpo_loss(**data).loss, data)["hidden"], want)


def test_sums_of_rows_where_torch_has_no_segments():
    """As on MPS."""
    rows, offsets = torch.randn(7, 3), torch.tensor([0, 2, 2, 5, 6])
    want = torch.stack([rows[a:b].sum(0) for a, b in ((0, 2), (2, 2), (2, 5), (5, 6))])
    close(segments.segment_sum_of_rows(rows, offsets), want)
    close(segments._segment_sum_by_index(rows, offsets), want)


@pytest.mark.parametrize("value", [-1, M])
def test_a_row_that_is_not_there_is_named(value):
    data = shared()
    assert int(data["labels"][3, 2]) >= 0
    data["rows"][3, 2] = value
    with pytest.raises(ValueError, match=rf"rows\[3, 2\] = {value} is outside \[0, 9\) \(hidden has 9 rows\)"):
        dk.fused_dpo_loss(**data)


@pytest.mark.parametrize("function", [dk.fused_dpo_loss, dk.fused_sequence_logps])
def test_inside_a_graph_it_is_refused(function):
    data = shared()
    given = {name: data[name] for name in ("weight", "labels", "rows")}
    free = {"reference_free": True} if function is dk.fused_dpo_loss else {}

    def step(hidden):
        return function(hidden, **given, **free)

    with pytest.raises(Exception, match=r"rows is not supported inside torch\.compile yet"):
        torch.compile(step, backend="eager", fullgraph=True)(data["hidden"])


@pytest.mark.parametrize("name", ["vocab_parallel", "context_parallel"])
def test_ranks_that_share_work_are_refused(name):
    class Parallel:
        share = None

    policy = PolicyTensors(**{each: shared()[each] for each in ("hidden", "weight", "labels", "rows")})
    with pytest.raises(ValueError, match=f"rows does not go with {name} yet"):
        split_work(replace(policy, **{name: Parallel()}), Layout())
