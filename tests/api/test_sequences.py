"""KTO, BCO and ranked groups: values by hand, DPO as the group of two, the oracle's log-probs, chunks and errors."""

import math

import pytest
import torch

import dpo_kernels as dk
from dpo_kernels.engine import in_step
from dpo_kernels.reference import sequence_logps_reference
from tests.cases import STRATEGIES, Case, rounded_tile, strategy_and_scratch
from tests.small import BACKENDS, F64
from tests.tolerance import violations

close = torch.testing.assert_close
LN2, LN3 = math.log(2), math.log(3)


def one_by_one(*log_ratios):
    """Sequences of one token with these log-ratios: log-probs of -1, and the reference beside them."""
    count = len(log_ratios)
    ratios = torch.tensor(log_ratios, dtype=F64)
    hidden = torch.ones(count, 1, 1, dtype=F64)
    weight = torch.tensor([[0.0], [math.log(math.e - 1)]], dtype=F64)  # the first token's log-prob is -1
    labels = torch.zeros(count, 1, dtype=torch.int64)
    return {"hidden": hidden, "weight": weight, "labels": labels, "ref_logps": -1 - ratios}


def test_kto_by_hand():
    """beta 1/2: 1 - s(log 3) = 1/4 and 1 - s(-log 2) = 2/3; with z0 = log 2 it is 1 - s(log 3/2) and 1 - s(log 4)."""
    data = one_by_one(2 * LN3, 2 * LN2)
    desirable = torch.tensor([True, False])
    out = dk.fused_kto_loss(**data, desirable=desirable, beta=0.5, reduction="none")
    close(out.loss, torch.tensor([1 / 4, 2 / 3], dtype=F64))
    close(out.rewards, torch.tensor([LN3, LN2], dtype=F64))
    out = dk.fused_kto_loss(**data, desirable=desirable, beta=0.5, kl=2 * LN2, reduction="none")
    close(out.loss, torch.tensor([2 / 5, 1 / 2], dtype=F64))
    negative = dk.fused_kto_loss(**data, desirable=desirable, beta=0.5, kl=torch.tensor(-3.0), reduction="none")
    close(negative.loss, torch.tensor([1 / 4, 2 / 3], dtype=F64))
    weighted = dk.fused_kto_loss(**data, desirable=desirable, beta=0.5, desirable_weight=2.0, undesirable_weight=3.0)
    close(weighted.loss, torch.tensor((2 / 4 + 3 * 2 / 3) / 2, dtype=F64))


def test_bco_by_hand():
    """-log s(log 3 - log 2) = log 5/3, -log s(log 2 - log 2) = log 2."""
    data = one_by_one(2 * LN3, 2 * LN2)
    desirable = torch.tensor([True, False])
    out = dk.fused_kto_loss(**data, desirable=desirable, beta=0.5, loss_type="bco", delta=LN2, reduction="none")
    close(out.loss, torch.tensor([math.log(5 / 3), LN2], dtype=F64))


def test_groups_by_hand():
    """Scores log 3, log 2, 0: first of 6, then of 3; alone it is certain."""
    data = one_by_one(2 * LN3, 2 * LN2, 0.0, 5.0)
    out = dk.fused_group_loss(**data, group_sizes=[3, 1], beta=0.5, reduction="none")
    close(out.loss, torch.tensor([LN2 + math.log(3 / 2), 0.0], dtype=F64))
    out = dk.fused_group_loss(**data, group_sizes=[3, 1], beta=0.5, loss_type="infonce", reduction="none")
    close(out.loss, torch.tensor([LN2, 0.0], dtype=F64))


@pytest.mark.parametrize("loss_type", ["plackett_luce", "infonce"])
def test_dpo_is_the_group_of_two(loss_type):
    case = Case(F64, pairs="interleaved")
    inputs = case.tensors()
    group = dk.fused_group_loss(**inputs, group_sizes=[2, 2, 2], loss_type=loss_type, beta=0.3)
    pairs = dk.fused_dpo_loss(**inputs, beta=0.3, pairs="interleaved")
    close(group.loss, pairs.loss, rtol=1e-13, atol=0)
    close(group.rewards[0::2], pairs.chosen_rewards, rtol=1e-12, atol=1e-13)
    leaves = (inputs["hidden"], inputs["weight"])
    for ours, theirs in zip(*(torch.autograd.grad(out.loss, leaves) for out in (group, pairs)), strict=True):
        close(ours, theirs, rtol=1e-11, atol=1e-14)


def oracle(inputs, kind, beta, desirable):
    logps = sequence_logps_reference(inputs["hidden"], inputs["weight"], inputs["labels"])
    scores = beta * (logps - inputs["ref_logps"].to(logps.dtype))
    if kind == "kto":
        return torch.where(desirable, 1 - torch.sigmoid(scores - 0.1), 1 - torch.sigmoid(0.1 - scores)).mean()
    if kind == "bco":
        return torch.logaddexp(torch.where(desirable, 0.2 - scores, scores - 0.2), 0 * scores).mean()
    total = 0.0
    for group in (scores[:4], scores[4:]):
        places = range(len(group)) if kind == "plackett_luce" else [0]
        total = total - sum(torch.log_softmax(group[k:], 0)[0] for k in places)
    return total / 2


KINDS = {
    "kto": lambda inputs, beta, desirable, **how: dk.fused_kto_loss(
        **inputs, desirable=desirable, beta=beta, kl=0.1 / beta, **how
    ),
    "bco": lambda inputs, beta, desirable, **how: dk.fused_kto_loss(
        **inputs, desirable=desirable, beta=beta, loss_type="bco", delta=0.2, **how
    ),
    "plackett_luce": lambda inputs, beta, desirable, **how: dk.fused_group_loss(
        **inputs, group_sizes=(4, 2), beta=beta, **how
    ),
    "infonce": lambda inputs, beta, desirable, **how: dk.fused_group_loss(
        **inputs, group_sizes=(4, 2), beta=beta, loss_type="infonce", **how
    ),
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("kind", KINDS)
def test_equivalence(kind, strategy, backend):
    desirable = torch.tensor([True, False, False, True, True, False])
    for dtype in (F64, torch.float32, torch.bfloat16):
        name, scratch = strategy_and_scratch(strategy, backend, dtype)
        for frozen in (False, True):
            inputs = Case(dtype, frozen=frozen).tensors()
            leaves = [inputs[n] for n in ("hidden", "weight") if inputs[n].requires_grad]
            how = {"strategy": name, "scratch_bytes": scratch, "backend": backend}
            if (kind, strategy, frozen) in {(k, "chunked-tiny", False) for k in ("plackett_luce", "infonce")}:
                with pytest.raises(ValueError, match="more than two sequences is longer than the chunk"):
                    KINDS[kind](inputs, 0.3, desirable, **how)
                continue
            got = KINDS[kind](inputs, 0.3, desirable, **how).loss
            plain = oracle(inputs, kind, 0.3, desirable)
            wide = {n: v.detach().double().requires_grad_(v.requires_grad) if v.is_floating_point() else v
                    for n, v in inputs.items()}  # fmt: skip
            exact = oracle(wide, kind, 0.3, desirable)
            broken = violations("loss", got.detach(), exact.detach(), plain.detach(), dtype, gradient=False)
            wide_leaves = [wide[n] for n in ("hidden", "weight") if wide[n].requires_grad]
            grads = [torch.autograd.grad(*pair) for pair in ((got, leaves), (exact, wide_leaves), (plain, leaves))]
            for place, (ours, right, ordinary) in enumerate(zip(*grads, strict=True)):
                twice = place == 1 and rounded_tile(backend, dtype)
                broken += violations("gradient", ours, right, ordinary, dtype, gradient=True, two_roundings=twice)
            assert not broken


@pytest.mark.parametrize(("kind", "units"), [("kto", 3), ("plackett_luce", 3)])
def test_one_pass_like_dpo(kind, units, monkeypatch):
    """Separable by sequence or group: the gradient is formed in the forward pass."""
    plans = []
    choose = in_step.make_plan
    monkeypatch.setattr(
        "dpo_kernels.engine.in_step.make_plan", lambda *given: plans.append(choose(*given)) or plans[-1]
    )
    KINDS[kind](Case(torch.float32).tensors(), 0.3, torch.ones(6, dtype=torch.bool))
    assert (plans[-1].strategy, plans[-1].units) == ("chunked", units)


def test_compiled():
    inputs = Case(torch.float32).tensors()
    desirable = torch.tensor([True, False, False, True, True, False])

    def step(hidden, weight, labels, ref_logps):
        given = {"hidden": hidden, "weight": weight, "labels": labels, "ref_logps": ref_logps}
        return KINDS["kto"](given, 0.3, desirable).loss

    eager = step(**inputs)
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")(**inputs)
    close(compiled, eager)
    leaves = (inputs["hidden"], inputs["weight"])
    for ours, theirs in zip(*(torch.autograd.grad(loss, leaves) for loss in (compiled, eager)), strict=True):
        close(ours, theirs, rtol=1e-5, atol=1e-7)


# 6, 7, 1, 0, 3 and 5 scored tokens; in whole examples two chunks or more.
CHUNKS = {
    "kto": {"desirable": torch.tensor([True, False, False, True, False, True]), "undesirable_weight": 3.0},
    "bco": {"desirable": torch.tensor([True, False, False, True, False, True]), "loss_type": "bco", "delta": 0.4},
    "plackett_luce": {"group_sizes": [2, 1, 3]},
    "infonce": {"group_sizes": [2, 3, 1], "loss_type": "infonce"},
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", CHUNKS)
def test_every_chunk_has_examples_of_its_own(kind, backend, monkeypatch):
    """Labels, weights and sizes of a later chunk are those of its sequences, not of the first ones."""
    plans, choose = [], in_step.make_plan
    monkeypatch.setattr(
        "dpo_kernels.engine.in_step.make_plan", lambda *given: plans.append(choose(*given)) or plans[-1]
    )
    function = dk.fused_group_loss if "group_sizes" in CHUNKS[kind] else dk.fused_kto_loss
    inputs = Case(F64).tensors()
    leaves = (inputs["hidden"], inputs["weight"])
    results = []
    for rows in (22, 13):
        scratch = (4 * rows * inputs["weight"].shape[0] * 8 + 2) // 3
        loss = function(
            **inputs, beta=0.5, backend=backend, strategy="chunked", scratch_bytes=scratch, **CHUNKS[kind]
        ).loss
        results.append((loss.detach(), *torch.autograd.grad(loss, leaves)))
    assert plans[0].chunks == 1
    assert plans[1].chunks > 1
    for one, many in zip(*results, strict=True):
        close(many, one, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("strategy", ["chunked", "recompute"])
@pytest.mark.parametrize(("loss_type", "name"), [("kto", "kl"), ("bco", "delta")])
def test_estimates_are_never_differentiated(loss_type, name, strategy):
    inputs = Case(F64).tensors()
    estimate = torch.tensor(0.7, dtype=F64, requires_grad=True)
    desirable = torch.tensor([True, False, True, True, False, False])
    how = {"loss_type": loss_type, "strategy": strategy, "beta": 0.5}
    out = dk.fused_kto_loss(**inputs, desirable=desirable, **{name: estimate}, **how)
    leaves = (inputs["hidden"], inputs["weight"], estimate)
    *ours, none = torch.autograd.grad(out.loss, leaves, allow_unused=True)
    assert none is None
    plain = dk.fused_kto_loss(**inputs, desirable=desirable, **{name: 0.7}, **how)
    for got, want in zip(ours, torch.autograd.grad(plain.loss, leaves[:2]), strict=True):
        assert torch.equal(got, want)
    assert not out.rewards.requires_grad


BAD = {
    "desirable must be of bool": lambda i: dk.fused_kto_loss(**i, desirable=torch.ones(6)),
    "desirable has shape": lambda i: dk.fused_kto_loss(**i, desirable=torch.ones(5, dtype=torch.bool)),
    "desirable must be a tensor": lambda i: dk.fused_kto_loss(**i, desirable=[True] * 6),
    "unknown loss_type 'dpo'; known: kto, bco": lambda i: kto_with(i, loss_type="dpo"),
    "beta must be >= 0": lambda i: kto_with(i, beta=-1.0),
    "kl must be a number or a 0-d tensor": lambda i: kto_with(i, kl=torch.zeros(2)),
    "unexpected option 'pairs'": lambda i: kto_with(i, pairs="stacked"),
    "needs a reference": lambda i: kto_with({n: v for n, v in i.items() if n != "ref_logps"}),
    "group_sizes sum to 5, but there are 6": lambda i: dk.fused_group_loss(**i, group_sizes=[3, 2]),
    "group_sizes must be at least 1": lambda i: dk.fused_group_loss(**i, group_sizes=[6, 0]),
    "group_sizes must be a list": lambda i: dk.fused_group_loss(**i, group_sizes=6),
    "known: plackett_luce, infonce": lambda i: dk.fused_group_loss(**i, group_sizes=[6], loss_type="borda"),
}


def kto_with(inputs, **options):
    return dk.fused_kto_loss(**inputs, desirable=torch.ones(6, dtype=torch.bool), **options)


@pytest.mark.parametrize("words", BAD)
def test_bad_input(words):
    with pytest.raises((ValueError, TypeError), match=words):
        BAD[words](Case(torch.float32).tensors())
