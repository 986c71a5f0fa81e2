"""Cached log-probs of the reference by token, ``ref_token_logps``: against the oracle, and against the other forms."""

import math

import pytest
import torch

from dpo_kernels import fused_dpo_loss, fused_group_loss, fused_kto_loss, fused_token_logps
from tests.small import F64, STRATEGIES, TRAINED, P, S, T, agree, close, gradients, pack, problem, same


def of_tokens(**more):
    """A problem whose reference is cached by token, with NaN wherever no label is scored."""
    data = problem(*TRAINED, token_weights=True, **more)
    del data["ref_logps"]
    values = -torch.rand(S, T, generator=torch.Generator().manual_seed(5), dtype=F64) - 1
    data["ref_token_logps"] = values.masked_fill(data["labels"] < 0, math.nan)
    return data


@pytest.mark.parametrize("layout", ["padded", "packed"])
@pytest.mark.parametrize("shift", [False, True])
@pytest.mark.parametrize("loss_type", ["sigmoid", "ipo"])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_agrees_with_the_oracle(strategy, loss_type, shift, layout):
    data = of_tokens()
    if shift:  # the first label of a sequence is not scored then, whatever it is
        data["ref_token_logps"][:, 0] = math.nan
    if layout == "packed":
        data, _ = pack(data)
    out = agree(data, strategy=strategy, shift=shift, loss_type=loss_type, beta=0.7)
    assert out.loss.isfinite()


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_is_the_reference_that_the_call_would_score(strategy):
    scored = problem(*TRAINED, ref_hidden=True, ref_weight=True, ref_bias=True, token_weights=True)
    head = {"bias": scored["ref_bias"], "labels": scored["labels"]}
    logps = fused_token_logps(scored["ref_hidden"], scored["ref_weight"], **head)
    cached = {name: value for name, value in scored.items() if not name.startswith("ref_")}
    one = fused_dpo_loss(**scored, strategy=strategy)
    two = fused_dpo_loss(**cached, ref_token_logps=logps, strategy=strategy)
    same(two.loss, one.loss)
    same(two.ref_rejected_logps, one.ref_rejected_logps)
    ours, theirs = gradients(two.loss, cached), gradients(one.loss, scored)
    for name in TRAINED:
        same(ours[name], theirs[name])


def test_the_weights_of_the_call_weigh_the_reference():
    """With ``ref_logps`` they do not: the caller has summed before."""
    data = of_tokens()
    plain = {name: value for name, value in data.items() if name != "token_weights"}
    sums = (data["ref_token_logps"] * data["token_weights"]).nan_to_num(0.0).sum(1)
    same(fused_dpo_loss(**data).ref_chosen_logps, sums[:P])
    same(fused_dpo_loss(**plain).ref_chosen_logps, data["ref_token_logps"].nan_to_num(0.0).sum(1)[:P])


def test_pairs_may_alternate():
    data, order = of_tokens(), torch.tensor([0, 3, 1, 4, 2, 5])
    moved = {name: value.detach()[order] if value.shape[0] == S else value for name, value in data.items()}
    same(fused_dpo_loss(**moved, pairs="interleaved").loss, fused_dpo_loss(**data).loss)


@pytest.mark.parametrize("capacity", [15, 17, 30])
def test_a_static_capacity_changes_nothing(capacity):
    """Unused capacity reads the first label's reference, which is NaN here."""
    data = of_tokens()
    assert data["ref_token_logps"][0, 0].isnan()
    assert int((data["labels"] >= 0).sum()) == 15
    agree(data, max_scored_tokens=capacity)


def test_single_sequences_and_groups_take_it():
    data = of_tokens()
    sums = (data["ref_token_logps"] * data["token_weights"]).nan_to_num(0.0).sum(1)
    cached = {name: value for name, value in data.items() if name != "ref_token_logps"} | {"ref_logps": sums}
    desirable = torch.arange(S) % 2 == 0
    for call in (
        lambda given: fused_kto_loss(**given, desirable=desirable),
        lambda given: fused_group_loss(**given, group_sizes=[4, 2]),
    ):
        one, two = call(data), call(cached)
        same(one.loss, two.loss)
        same(one.ref_logps, two.ref_logps)


def test_the_gradient_stops_at_it():
    data = of_tokens()
    data["ref_token_logps"] = data["ref_token_logps"].nan_to_num(0.0).requires_grad_()
    assert gradients(fused_dpo_loss(**data).loss, data)["ref_token_logps"] is None


def test_compiled():
    data = of_tokens()

    def step(hidden, weight, bias, labels, token_weights, ref_token_logps):
        given = {"bias": bias, "token_weights": token_weights, "ref_token_logps": ref_token_logps}
        return fused_dpo_loss(hidden, weight, labels, **given).loss

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    one, two = compiled(**data), step(**data)
    close(one, two, rtol=1e-12, atol=1e-13)
    for name in TRAINED:
        same(gradients(one, data)[name], gradients(two, data)[name])
