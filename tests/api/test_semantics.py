"""The semantics that the documentation decides, each by a named test, in float64 against the oracle or by hand."""

import itertools
import math
import warnings

import pytest
import torch

from dpo_kernels import (
    dpo_loss,
    fused_dpo_loss,
    fused_sequence_logps,
    fused_token_logps,
)
from dpo_kernels.inputs import notices
from dpo_kernels.reference import dpo_loss_reference, sequence_logps_reference, token_logps_reference
from tests.small import (
    BY_PAIR,
    COUNTS,
    F64,
    STRATEGIES,
    TRAINED,
    H,
    P,
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


@pytest.fixture(autouse=True)
def _forget_warnings(monkeypatch):
    monkeypatch.setattr(notices, "issued", set())


@pytest.fixture(params=STRATEGIES)
def strategy(request):
    return request.param


# --- order, detachment, dtypes ----------------------------------------------------------------------------------------

INTERLEAVED = torch.tensor([0, 3, 1, 4, 2, 5])  # from stacked: chosen 0, 1, 2, rejected 3, 4, 5


def test_pairs_orders_inputs_and_reference_and_stats_but_not_outputs(strategy):
    stats = ("entropy", "mean_logits", "top1")
    stacked = problem(*TRAINED)
    moved = {n: v.detach()[INTERLEAVED] if v.shape[0] == S else v for n, v in stacked.items()}
    moved["hidden"].requires_grad_()
    one = agree(stacked, strategy=strategy, stats=stats, beta=0.7)
    two = agree(moved, strategy=strategy, stats=stats, beta=0.7, pairs="interleaved")
    same(two.loss, one.loss)
    for name in BY_PAIR:
        same(getattr(two, name), getattr(one, name))
    for name in (*stats, "tokens"):
        close(two.stats[name], one.stats[name][INTERLEAVED], rtol=0, atol=0)
    close(one.ref_chosen_logps, stacked["ref_logps"][:P])
    close(one.ref_rejected_logps, stacked["ref_logps"][P:])
    mistaken = fused_dpo_loss(**stacked, pairs="interleaved", beta=0.7)
    assert (mistaken.loss - one.loss).detach().abs() > 1e-3


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_all_but_the_loss_is_detached(reduction):
    data = problem(*TRAINED, ref_hidden=True, ref_weight=True)
    data["ref_hidden"].requires_grad_()
    out = fused_dpo_loss(**data, reduction=reduction, stats=("entropy", "mean_logits", "top1"))
    assert out.loss.requires_grad
    assert [name for name in BY_PAIR if getattr(out, name).requires_grad] == []
    assert [name for name, value in out.stats.items() if value.requires_grad] == []
    rewards = 0.1 * (out.chosen_logps - out.ref_chosen_logps)
    same(out.chosen_rewards, rewards)


@pytest.mark.parametrize(("dtype", "result"), [
    (torch.float32, torch.float32), (torch.bfloat16, torch.float32), (torch.float16, torch.float32), (F64, F64),
])  # fmt: skip
def test_results_are_float32_or_float64_and_gradients_the_parameters(dtype, result, strategy):
    data = problem(*TRAINED, dtype=dtype)
    wide = {n: v.detach().double() if v.is_floating_point() else v for n, v in data.items()}
    out, want = fused_dpo_loss(**data, strategy=strategy), dpo_loss_reference(**wide)
    for name in ("loss", *BY_PAIR):
        assert getattr(out, name).dtype == result
        close(getattr(out, name).detach(), getattr(want, name).to(result), rtol=3e-6, atol=3e-6)
    assert all(value.dtype == torch.float32 for value in out.stats.values())
    assert {name: grad.dtype for name, grad in gradients(out.loss, data).items()} == dict.fromkeys(TRAINED, dtype)
    plain = {name: data[name] for name in (*TRAINED, "labels")}
    logps = fused_sequence_logps(**plain, strategy="auto" if strategy == "chunked" else strategy)
    assert logps.dtype == fused_token_logps(**plain).dtype == result
    close(logps[:P].detach(), out.chosen_logps)


def test_autocast_computes_narrow_and_differentiates_wide(strategy):
    data = problem(*TRAINED, dtype=torch.float32)
    narrow = {n: v.detach().bfloat16().requires_grad_() if n in TRAINED else v for n, v in data.items()}
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = fused_dpo_loss(**data, strategy=strategy)
    want = fused_dpo_loss(**narrow, strategy=strategy)
    close(out.loss, want.loss, rtol=0, atol=0)
    exact = fused_dpo_loss(**data, strategy=strategy)
    assert out.loss != exact.loss
    ours, theirs = gradients(out.loss, data), gradients(want.loss, narrow)
    for name in TRAINED:
        assert ours[name].dtype == torch.float32
        close(ours[name], theirs[name].float(), rtol=2**-8, atol=1e-7)


# --- shift and token weights ------------------------------------------------------------------------------------------


def shifted_by_hand(data, bounds):
    """The labels and weights moved so that no shift is needed; a sequence's last place predicts nothing."""
    labels, weights = data["labels"].reshape(-1), data["token_weights"].reshape(-1)
    moved, along = torch.full_like(labels, -100), torch.zeros_like(weights)
    for a, b in itertools.pairwise(bounds):
        if b > a:
            moved[a : b - 1], along[a : b - 1] = labels[a + 1 : b], weights[a + 1 : b]
    return data | {"labels": moved.view(data["labels"].shape), "token_weights": along.view(data["labels"].shape)}


@pytest.mark.parametrize("layout", ["padded", "packed"])
def test_shift_moves_labels_and_weights_within_their_sequence(layout, strategy):
    data = problem(*TRAINED, ref_hidden=True, ref_weight=True, token_weights=True)
    data["labels"] = torch.where(data["labels"] < 0, 2, data["labels"])  # scored up to every edge
    bounds = list(range(0, S * T + 1, T))
    if layout == "packed":
        data, _ = pack(data)
        bounds = data["cu_seqlens"].tolist()
    moved = shifted_by_hand(data, bounds)
    out = agree(data, strategy=strategy, shift=True, beta=0.6)
    want = fused_dpo_loss(**moved, strategy=strategy, beta=0.6)
    same(out.loss, want.loss)
    same(out.ref_rejected_logps, want.ref_rejected_logps)
    ours, theirs = gradients(out.loss, data), gradients(want.loss, moved)
    for name in TRAINED:
        same(ours[name], theirs[name])
    last = [b - 1 for a, b in itertools.pairwise(bounds) if b > a]
    flat = ours["hidden"].reshape(-1, H)
    assert torch.equal(flat[last], torch.zeros(len(last), H, dtype=F64))
    assert flat[0].abs().min() > 0
    assert out.stats["tokens"].tolist() == [max(b - a - 1, 0) for a, b in itertools.pairwise(bounds)]


@pytest.mark.parametrize("shift", [False, True])
@pytest.mark.parametrize("layout", ["padded", "packed"])
def test_token_logps_lie_at_their_labels(layout, shift):
    data = problem("hidden", "weight")
    del data["ref_logps"]
    if layout == "packed":
        data, _ = pack(data)
    got, want = fused_token_logps(**data, shift=shift), token_logps_reference(**data, shift=shift)
    assert got.shape == data["labels"].shape
    same(got, want)
    scored = data["labels"] >= 0
    if shift:
        scored.view(-1)[data["cu_seqlens"][:-2].long() if layout == "packed" else torch.arange(0, S * T, T)] = False
    assert torch.equal(got != 0, scored)
    upstream = torch.randn(got.shape, dtype=F64)
    for ours, theirs in zip(
        *(torch.autograd.grad(x, (data["hidden"], data["weight"]), upstream) for x in (got, want)), strict=True
    ):
        same(ours, theirs)
    data["labels"] = data["labels"].masked_fill(data["labels"] >= 0, -100)
    assert torch.equal(fused_token_logps(**data), torch.zeros_like(got))


def test_one_row_by_hand():
    """H = 1 and W = (0, log 2, log 5): softmax of hidden 1 is (1, 2, 5) / 8, of 2 is (1, 4, 25) / 30."""
    weight = torch.tensor([[0.0], [math.log(2)], [math.log(5)]], dtype=F64)
    hidden, labels = torch.tensor([[[1.0], [2.0]]], dtype=F64), torch.tensor([[1, 2]])
    want = torch.tensor([[math.log(2 / 8), math.log(25 / 30)]], dtype=F64)
    same(fused_token_logps(hidden, weight, labels), want)
    same(fused_sequence_logps(hidden, weight, labels), want.sum(1))
    same(fused_token_logps(hidden, weight, labels, shift=True), torch.tensor([[0.0, math.log(5 / 8)]], dtype=F64))
    same(
        fused_token_logps(hidden[:, :1], weight, labels[:, :1], logit_scale=2.0),
        torch.full((1, 1), math.log(4 / 30), dtype=F64),
    )


def test_token_weights_weigh_policy_and_computed_reference_alike(strategy):
    data = problem(*TRAINED, ref_hidden=True, ref_weight=True, token_weights=True)
    data["token_weights"].requires_grad_()
    out = agree(data, strategy=strategy)
    assert gradients(out.loss, data)["token_weights"] is None
    tokens = {n: data[n] for n in (*TRAINED, "labels")}
    want = (token_logps_reference(**tokens) * data["token_weights"]).sum(1)
    same(out.chosen_logps, want[:P].detach())
    reference = token_logps_reference(data["ref_hidden"], data["ref_weight"], data["labels"])
    same(out.ref_chosen_logps, (reference * data["token_weights"]).sum(1)[:P].detach())
    sums = fused_sequence_logps(**tokens, token_weights=data["token_weights"])
    same(sums, want)
    assert torch.autograd.grad(sums.sum(), data["token_weights"], allow_unused=True)[0] is None
    cached = {name: value for name, value in data.items() if not name.startswith("ref_")} | {"ref_logps": torch.ones(S)}
    same(fused_dpo_loss(**cached).ref_chosen_logps, torch.ones(P, dtype=F64))


def test_averages_divide_by_counts_and_not_by_weights(strategy):
    """IPO with every weight 2 sees twice the average log-ratios; a weight of 0 still counts its token."""
    data = problem(*TRAINED)
    plain = agree(data, loss_type="ipo", beta=0.5, strategy=strategy)
    n = torch.tensor(COUNTS, dtype=F64).clamp(min=1)
    zero_ref = data | {"ref_logps": torch.zeros(S, dtype=F64)}
    double = agree(zero_ref | {"token_weights": torch.full((S, T), 2.0, dtype=F64)}, loss_type="ipo", beta=0.5,
                   strategy=strategy, reduction="mean", stats=("entropy",))  # fmt: skip
    h = 2 * (plain.chosen_logps / n[:P] - plain.rejected_logps / n[P:])
    same(double.loss.detach(), (h - 1.0).square().mean())
    assert double.stats["tokens"].tolist() == COUNTS
    close(double.stats["entropy"], dpo_loss_reference(**data, stats=("entropy",)).stats["entropy"].float())
    one_off = torch.ones(S, T, dtype=F64)
    one_off[0, 2] = 0.0
    out = agree(zero_ref | {"token_weights": one_off}, loss_type="ipo", beta=0.5, strategy=strategy)
    assert out.stats["tokens"].tolist() == COUNTS
    assert torch.equal(gradients(out.loss, zero_ref)["hidden"][0, 2], torch.zeros(H, dtype=F64))


# --- empty sequences, masked positions --------------------------------------------------------------------------------


@pytest.mark.parametrize(("loss_type", "value"), [
    ("sigmoid", 0.6931471805599453), ("hinge", 1.0), ("ipo", 25.0),  # log 2, 1 - 0, (0 - 1 / 0.2)^2
    (lambda x: x.beta + x.policy_chosen_logps + x.chosen_tokens, 0.1),
])  # fmt: skip
def test_sequences_without_tokens_have_log_prob_0_and_gradient_0(loss_type, value, strategy):
    data = problem(*TRAINED)
    data["labels"] = torch.full((S, T), -100)
    if callable(loss_type):
        loss_type.separable = True
    data["ref_logps"] = torch.zeros(S)
    out = fused_dpo_loss(**data, loss_type=loss_type, strategy=strategy, stats=("entropy", "top1"))
    same(out.loss.detach(), torch.tensor(value, dtype=F64))
    for name in BY_PAIR:
        assert torch.equal(getattr(out, name), torch.zeros(P, dtype=F64))
    assert all(torch.equal(value, torch.zeros(S)) for value in out.stats.values())
    for name, grad in gradients(out.loss, data).items():
        assert torch.equal(grad, torch.zeros_like(data[name]))


@pytest.mark.parametrize("garbage", [math.nan, math.inf])
@pytest.mark.parametrize("shift", [False, True])
def test_nothing_leaks_from_masked_positions(garbage, shift, strategy):
    data = problem(*TRAINED, ref_hidden=True, ref_weight=True, token_weights=True)
    labels = data["labels"]
    unread = torch.cat([labels[:, 1:], labels[:, :1] * 0 - 100], 1) < 0 if shift else labels < 0
    dirty = {name: data[name].detach().masked_fill(unread[..., None], garbage) for name in ("hidden", "ref_hidden")}
    dirty["hidden"].requires_grad_()
    unweighed = labels < 0
    dirty["token_weights"] = data["token_weights"].masked_fill(unweighed, garbage)
    stats = ("entropy", "mean_logits", "top1")
    clean = agree(data, shift=shift, strategy=strategy, stats=stats)
    out = fused_dpo_loss(**data | dirty, shift=shift, strategy=strategy, stats=stats)
    for name in ("loss", *BY_PAIR):
        assert torch.equal(getattr(out, name), getattr(clean, name))
    assert all(torch.equal(out.stats[name], clean.stats[name]) for name in clean.stats)
    ours, theirs = gradients(out.loss, data | dirty), gradients(clean.loss, data)
    assert all(torch.equal(ours[name], theirs[name]) for name in TRAINED)
    assert torch.equal(ours["hidden"][unread], torch.zeros_like(ours["hidden"][unread]))


# --- reductions -------------------------------------------------------------------------------------------------------


def test_reductions(strategy):
    each = agree(problem("hidden"), reduction="none", strategy=strategy)
    assert each.loss.shape == (P,)
    same(agree(problem(*TRAINED), reduction="sum", strategy=strategy).loss, each.loss.sum())
    same(agree(problem(*TRAINED), strategy=strategy).loss, each.loss.sum() / P)
    for denominator in (7, 0.5, torch.tensor(7.0), torch.tensor(2, dtype=torch.int64)):
        out = agree(problem(*TRAINED), denominator=denominator, strategy=strategy)
        same(out.loss, each.loss.sum() / float(denominator))
    agree(problem(*TRAINED), reduction="none")


def test_accumulated_micro_batches_equal_one_batch(strategy):
    data = problem(*TRAINED)
    whole = agree(data, strategy=strategy)
    want = gradients(whole.loss, data)
    total, grads = 0.0, {"weight": 0.0, "bias": 0.0, "hidden": torch.zeros(S, T, H, dtype=F64)}
    for part in ([0], [1, 2]):
        rows = torch.tensor([*part, *(p + P for p in part)])
        micro = {n: v.detach()[rows] if v.shape[0] == S else v for n, v in data.items()}
        micro["hidden"].requires_grad_()
        loss = fused_dpo_loss(**micro, denominator=float(P), strategy=strategy).loss
        got = gradients(loss, micro)
        total = total + loss.detach()
        grads["weight"], grads["bias"] = grads["weight"] + got["weight"], grads["bias"] + got["bias"]
        grads["hidden"][rows] = got["hidden"]
    same(total, whole.loss.detach())
    for name in TRAINED:
        same(grads[name], want[name])


# --- statistics -------------------------------------------------------------------------------------------------------


def test_stats_are_means_over_scored_tokens(strategy):
    names = ("top1", "entropy", "mean_logits", "log_sum_p2")
    data = problem(*TRAINED, token_weights=True)
    out = agree(data, stats=names, strategy=strategy, logit_scale=0.8, softcap=3.0)
    assert out.stats.keys() == {*names, "tokens"}
    assert all(value.shape == (S,) and value.dtype == torch.float32 for value in out.stats.values())
    assert out.stats["tokens"].tolist() == COUNTS
    logits = 3.0 * torch.tanh(0.8 * (data["hidden"][1] @ data["weight"].T + data["bias"]) / 3.0)
    scored = data["labels"][1] >= 0
    logp = logits[scored].detach().log_softmax(-1)
    close(out.stats["entropy"][1], -(logp.exp() * logp).sum(-1).mean().float())
    close(out.stats["mean_logits"][1], logits[scored].detach().mean().float())
    close(out.stats["log_sum_p2"][1], logp.exp().square().sum(-1).log().mean().float())
    close(out.stats["top1"][1], (logp.argmax(-1) == data["labels"][1][scored]).float().mean())
    assert fused_dpo_loss(**data).stats.keys() == {"tokens"}
    assert fused_dpo_loss(**data, stats=["entropy"]).stats.keys() == {"entropy", "tokens"}


# --- the reference ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ref_bias", [False, True])
def test_reference_of_another_width(ref_bias, strategy):
    data = problem(*TRAINED, ref_hidden=True, ref_weight=True, **({"ref_bias": True} if ref_bias else {}))
    names = [name for name in data if name.startswith("ref_")]
    for name in names:
        data[name].requires_grad_()
    out = agree(data, strategy=strategy)
    assert [gradients(out.loss, data)[name] for name in names] == [None] * len(names)
    want = sequence_logps_reference(data["ref_hidden"], data["ref_weight"], data["labels"], bias=data.get("ref_bias"))
    same(torch.cat([out.ref_chosen_logps, out.ref_rejected_logps]), want.detach())


@pytest.mark.parametrize("ref_bias", [False, True])
def test_shared_head_warns_once_and_is_a_constant(ref_bias, strategy):
    data = problem(*TRAINED)
    data["ref_hidden"] = torch.randn(S, T, H, dtype=F64)
    cached = dict(data)
    if ref_bias:
        data["ref_bias"] = torch.randn(V, dtype=F64)
    del data["ref_logps"], cached["ref_hidden"]
    with pytest.warns(UserWarning, match="ref_weight=None .* requires a gradient: the reference will drift"):
        out = fused_dpo_loss(**data, strategy=strategy)
    out = agree(data, strategy=strategy)  # a second warning would be an error
    cached["ref_logps"] = torch.cat([out.ref_chosen_logps, out.ref_rejected_logps])
    bias = data.get("ref_bias", data["bias"])  # None shares the bias too
    want = sequence_logps_reference(data["ref_hidden"], data["weight"], data["labels"], bias=bias)
    same(cached["ref_logps"], want.detach())
    ours, theirs = gradients(out.loss, data), gradients(fused_dpo_loss(**cached, strategy=strategy).loss, cached)
    for name in TRAINED:
        same(ours[name], theirs[name])


def test_a_reference_that_leaves_out_the_bias_warns():
    data = problem(*TRAINED)
    data["ref_hidden"], data["ref_weight"] = torch.randn(S, T, H, dtype=F64), torch.randn(V, H, dtype=F64)
    del data["ref_logps"]
    with pytest.warns(UserWarning, match="the reference is scored without a bias. Pass ref_bias, zeros where"):
        out = fused_dpo_loss(**data)
    same(out.loss, fused_dpo_loss(**data, ref_bias=torch.zeros(V, dtype=F64)).loss)


@pytest.mark.parametrize(("dtype", "lost"), [(torch.bfloat16, "1 nats"), (torch.float16, "0.125 nats")])
def test_cached_log_probs_of_16_bits_warn(dtype, lost):
    """DeepSpeed casts every float of a batch to the model's dtype."""
    data = problem(*TRAINED)
    data["ref_logps"] = data["ref_logps"].to(dtype)
    with pytest.warns(UserWarning, match=f"ref_logps is {dtype}, which holds a log-prob of -300 to within {lost}"):
        fused_dpo_loss(**data)
    by_token = {name: value for name, value in data.items() if name != "ref_logps"}
    with pytest.warns(UserWarning, match=f"ref_token_logps is {dtype}, which holds a log-prob of -300"):
        fused_dpo_loss(**by_token, ref_token_logps=torch.zeros(data["labels"].shape, dtype=dtype))
    pair = torch.randn(2, P), torch.randn(2, P).to(dtype)
    with pytest.warns(UserWarning, match=f"ref_rejected_logps is {dtype}"):
        dpo_loss(*pair[0], pair[0][0], pair[1][1])


def test_no_warning_where_nothing_drifts():
    data = problem("hidden")
    data["ref_hidden"] = data.pop("hidden").detach() + 1
    data["hidden"] = data["ref_hidden"] - 1
    del data["ref_logps"]
    trained = data | {"weight": data["weight"].clone().requires_grad_()}
    with warnings.catch_warnings(record=True) as caught:
        fused_dpo_loss(**data)  # frozen
        fused_dpo_loss(**trained, ref_weight=data["weight"], ref_bias=data["bias"])
        with torch.no_grad():
            fused_dpo_loss(**trained)
    assert caught == []


def test_reference_free_is_a_reference_of_zeros():
    data = problem(*TRAINED)
    del data["ref_logps"]
    out = agree(data, reference_free=True)
    same(out.loss, fused_dpo_loss(**data, ref_logps=torch.zeros(S)).loss)
    assert torch.equal(out.ref_rejected_logps, torch.zeros(P, dtype=F64))
