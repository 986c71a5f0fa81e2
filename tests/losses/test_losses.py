"""Each loss of the family: numbers worked out by hand, its derivative, its limits, and the properties of its entry."""

import dataclasses
import functools
import inspect
import math
import re

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from dpo_kernels import LossInputs, dpo_loss, explain, fused_dpo_loss, losses
from dpo_kernels.losses import LOSSES, LossSpec, registry
from dpo_kernels.reference import dpo_loss_reference
from dpo_kernels.reference.losses import family_loss as oracle_losses
from dpo_kernels.shapes import sum_dtype
from tests.hand_worked import F64, HAND, HAND_KL, LN2, LN3, OPTIONS, Row, at, f64, half, parts_of, referenced
from tests.problems import META, rand, says, whole

close = torch.testing.assert_close


def batch(pairs=6, requires_grad=False, scale=4.0):
    """Random log-probs (policy chosen and rejected, reference chosen and rejected) and token counts."""
    g = torch.Generator().manual_seed(1)
    logps = [-scale * torch.rand(pairs, generator=g, dtype=F64) for _ in range(4)]
    tokens = [torch.randint(1, 6, (pairs,), generator=g).to(F64) for _ in range(2)]
    return [side.requires_grad_(requires_grad) for side in logps[:2]], logps[2:], tokens


def losses_of(policy, reference, tokens, **options):
    bound = losses.bind(options["loss_type"], 1.0, 0.0, {}) if isinstance(options.get("loss_type"), str) else None
    if bound is not None and not bound.needs_reference:
        reference = (None, None)
    return dpo_loss(*policy, *reference, chosen_tokens=tokens[0], rejected_tokens=tokens[1], **options)[0]


def test_every_loss_has_a_row():
    with_kl = {with_kl.row.options["loss_type"] for with_kl in HAND_KL.values()}
    assert with_kl == {name for name, spec in LOSSES.items() if spec.needs_kl}
    assert {spec.name for case in HAND for spec in parts_of(case)} | with_kl == set(LOSSES)


@pytest.mark.parametrize("case", HAND)
def test_value_and_gradient_by_hand(case):
    row = HAND[case]
    (chosen, rejected), (loss, chosen_rewards, rejected_rewards) = row.call(requires_grad=True)
    close(loss.detach(), f64(row.loss), rtol=1e-14, atol=1e-15)
    loss.sum().backward()
    close(chosen.grad, f64(row.chosen_grad), rtol=1e-13, atol=0)
    got = torch.zeros_like(rejected) if rejected.grad is None else rejected.grad
    close(got, f64(row.rejected_grad), rtol=1e-13, atol=0)
    beta, (s_w, s_l, r_w, r_l) = row.options["beta"], (value or 0.0 for value in row.logps)
    close(chosen_rewards, f64(beta * (s_w - r_w)), rtol=1e-15, atol=0)
    close(rejected_rewards, f64(beta * (s_l - r_l)), rtol=1e-15, atol=0)


@pytest.mark.parametrize("case", HAND_KL)
def test_value_and_gradient_by_hand_with_kl(case):
    given = HAND_KL[case]
    kl = [f64(value).requires_grad_() for value in given.kl]
    sides, (loss, *_) = given.row.call(requires_grad=True, chosen_kl=kl[0], rejected_kl=kl[1])
    close(loss.detach(), f64(given.row.loss), rtol=1e-14, atol=0)
    loss.sum().backward()
    wanted = (given.row.chosen_grad, given.row.rejected_grad, given.chosen_kl_grad, given.rejected_kl_grad)
    for leaf, grad in zip((*sides, *kl), wanted, strict=True):
        close(torch.zeros_like(leaf) if leaf.grad is None else leaf.grad, f64(grad), rtol=1e-13, atol=0)


@pytest.mark.parametrize("case", HAND_KL)
def test_the_oracle_agrees_with_kl(case):
    """The oracle's formula, on the same numbers, which are no two alike."""
    policy, reference, tokens = batch()
    kl = [torch.rand(6, generator=torch.Generator().manual_seed(seed), dtype=F64).requires_grad_() for seed in (3, 4)]
    options = dict(HAND_KL[case].row.options)
    got = losses_of(policy, reference, tokens, **options, chosen_kl=kl[0], rejected_kl=kl[1])
    name, beta = options.pop("loss_type"), options.pop("beta")
    want = oracle_losses(name, beta, 0.0, *policy, *reference, *tokens, 1.0, options, tuple(kl))
    close(got, want, rtol=1e-13, atol=0)
    ours, theirs = (torch.autograd.grad(each.sum(), kl, allow_unused=True) for each in (got, want))
    for one, two in zip(ours, theirs, strict=True):
        close(one, two, rtol=1e-13, atol=0)


BAD_KL = {
    "the loss 'tdpo1' needs chosen_kl and rejected_kl, and rejected_kl is missing": {"chosen_kl": torch.zeros(6)},
    "needs chosen_kl and rejected_kl, and chosen_kl is missing": {"rejected_kl": torch.zeros(6)},
    "chosen_kl has shape (5,), expected (P,)": {"chosen_kl": torch.zeros(5), "rejected_kl": torch.zeros(6)},
    "rejected_kl must be floating point": {"chosen_kl": torch.zeros(6), "rejected_kl": torch.zeros(6).long()},
    "chosen_kl is given, but the loss 'sigmoid' does not read it": {
        "chosen_kl": torch.zeros(6),
        "loss_type": "sigmoid",
    },
}


@pytest.mark.parametrize("words", BAD_KL)
def test_bad_kl(words):
    policy, reference, tokens = batch()
    with pytest.raises((ValueError, TypeError), match=re.escape(words)):
        losses_of(policy, reference, tokens, **{"loss_type": "tdpo1"} | BAD_KL[words])


# Where an argument lies on a bound: torch's own clamp has the slope 1 there up to 2.13 and 0 from 2.14 on. A bound on
# an exponent passes the gradient on, a hinge has none (torch.relu, which TRL calls).
E80 = math.exp(80.0)
ON_A_BOUND = {
    "hinge at its kink": Row(at(1.0, -1.0), 0.0, 0.0, 0.0, half("hinge")),
    # u = (0 + 2 log 3) / 2 = log 3, whose penalty begins here
    "dpop at its kink": Row(at(0.0, -2 * LN3), math.log(4 / 3), -0.125, 0.125, half("dpop", dpop_lambda=2.0)),
    # scores 1 - exp(80) and 0; the loss of u = (1 - exp(80)) / 2 is -u
    "forward KL": Row(at(-80.0, 0.0), 0.5 * (E80 - 1), -0.5 * E80, 0.5, half("sigmoid", f_divergence="forward_kl")),
    # scores exp(80) - 1 and 0 the other way around, alpha = 2
    "alpha-divergence": Row(
        at(0.0, 80.0), 0.5 * (E80 - 1), -0.5, 0.5 * E80, half("sigmoid", f_divergence="alpha", f_alpha=2.0)
    ),
    # shaped averages 1 - exp(80) and 0
    "alphapo": Row((-80.0, 0.0, None, None), 0.5 * (E80 - 1), -0.5 * E80, 0.5, half("alphapo", alpha=1.0, gamma=0.0)),
    # both at probability 1/2, where both forms of log(1 - p) meet: log 2 + (log 2) / 2; slopes -1 - 1/2 and 1/2
    "orpo": Row((-LN2, -LN2, None, None), 1.5 * LN2, -1.5, 0.5, half("orpo")),
}


@pytest.mark.parametrize("case", ON_A_BOUND)
def test_value_and_gradient_on_a_bound(case):
    row = ON_A_BOUND[case]
    (chosen, rejected), (loss, _, _) = row.call(requires_grad=True)
    loss.sum().backward()
    for got, wanted in ((loss.detach(), row.loss), (chosen.grad, row.chosen_grad), (rejected.grad, row.rejected_grad)):
        close(got, f64(wanted), rtol=1e-13, atol=0)


@pytest.mark.parametrize("case", ON_A_BOUND)
def test_the_oracle_has_the_same_gradient_on_a_bound(case):
    row = ON_A_BOUND[case]
    options = dict(row.options)
    sides = [f64(value or 0.0).requires_grad_() for value in row.logps]
    one = f64(1.0)
    loss = oracle_losses(options.pop("loss_type"), options.pop("beta"), 0.0, *sides, one, one, 1.0, options)
    grads = torch.autograd.grad(loss.sum(), sides[:2])
    for got, wanted in zip((loss, *grads), (row.loss, row.chosen_grad, row.rejected_grad), strict=True):
        close(got.detach(), f64(wanted), rtol=1e-13, atol=0)


@pytest.mark.parametrize("case", HAND)
def test_swapped_sides_are_another_loss(case):
    policy, reference, tokens = batch()
    straight = losses_of(policy, reference, tokens, **OPTIONS[case])
    swapped = losses_of(policy[::-1], reference[::-1], tokens[::-1], **OPTIONS[case])
    assert ((straight - swapped).abs() > 1e-3).all()


@pytest.mark.parametrize("case", HAND)
def test_agrees_with_the_oracle(case):
    g = torch.Generator().manual_seed(2)
    hidden, ref_hidden = (torch.randn(6, 5, 4, generator=g, dtype=F64) for _ in range(2))
    weight = torch.randn(9, 4, generator=g, dtype=F64).requires_grad_()
    labels = torch.randint(0, 9, (6, 5), generator=g)
    labels[1, 2:] = labels[3, :] = labels[5, 1] = -100
    call = {"reduction": "none", **OPTIONS[case]}
    if referenced(case):
        call |= {"ref_hidden": ref_hidden, "ref_weight": weight.detach() * 0.7}
    oracle = dpo_loss_reference(hidden, weight, labels, **call)
    logps = [getattr(oracle, name).requires_grad_() for name in ("chosen_logps", "rejected_logps")]
    counts = oracle.stats["tokens"]
    reference = (oracle.ref_chosen_logps, oracle.ref_rejected_logps) if referenced(case) else (None, None)
    got, chosen, rejected = dpo_loss(
        *logps, *reference,
        chosen_tokens=counts[:3], rejected_tokens=counts[3:], **OPTIONS[case],
    )  # fmt: skip
    close(got, oracle.loss, rtol=1e-12, atol=1e-14)
    close(chosen, oracle.chosen_rewards, rtol=1e-12, atol=1e-14)
    close(rejected, oracle.rejected_rewards, rtol=1e-12, atol=1e-14)
    assert (chosen - rejected).abs().min() > 1e-3
    fused = fused_dpo_loss(hidden, weight, labels, **call)
    close(fused.loss, got, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("case", HAND)
def test_gradcheck(case):
    policy, reference, tokens = batch(requires_grad=True)
    assert torch.autograd.gradcheck(lambda *sides: losses_of(sides, reference, tokens, **OPTIONS[case]), policy)


@pytest.mark.parametrize("beta", [0.1, 1.0, 3.0])
def test_derivative_of_sigmoid(beta):
    """d loss / d logp_w = -beta sigmoid(-u), and its opposite for the rejected."""
    policy, reference, tokens = batch(requires_grad=True)
    losses_of(policy, reference, tokens, beta=beta).sum().backward()
    (s_w, s_l), (r_w, r_l) = (side.detach() for side in policy), reference
    c = beta / (1 + torch.exp(beta * ((s_w - r_w) - (s_l - r_l))))
    close(policy[0].grad, -c, rtol=1e-12, atol=0)
    close(policy[1].grad, c, rtol=1e-12, atol=0)


# loss and its derivative by the chosen log-prob at u = +1e4 and u = -1e4 (beta 1)
FAR = {
    "sigmoid": ({}, (0.0, 0.0), (1e4, -1.0)),
    "smoothed": ({"label_smoothing": 0.125}, (1250.0, 0.125), (8750.0, -0.875)),
    "hinge": ({"loss_type": "hinge"}, (0.0, 0.0), (10001.0, -1.0)),
    # (1e4 - 1/2)^2 and (-1e4 - 1/2)^2; 2 (u - 1/2)
    "ipo": ({"loss_type": "ipo"}, (99990000.25, 19999.0), (100010000.25, -20001.0)),
}


@pytest.mark.parametrize("dtype", [torch.float32, F64])
@pytest.mark.parametrize("case", FAR)
def test_large_margins_stay_finite_and_right(case, dtype):
    options, *expected = FAR[case]
    for u, (value, slope) in zip((1e4, -1e4), expected, strict=True):
        chosen, zero = torch.tensor([u], dtype=dtype, requires_grad=True), torch.zeros(1, dtype=dtype)
        loss, reward, _ = dpo_loss(chosen, zero, zero, zero, beta=1.0, **options)
        loss.backward()
        close(loss.detach(), torch.tensor([value], dtype=dtype))
        close(chosen.grad, torch.tensor([slope], dtype=dtype))
        close(reward, torch.tensor([u], dtype=dtype))


@pytest.mark.parametrize("dtype", [torch.float32, F64])
@pytest.mark.parametrize("case", HAND)
def test_every_loss_is_finite_at_log_ratios_of_ten_thousand(case, dtype):
    """Also its derivative; a square of 1e4 is finite in float32 too."""
    for signs in ((1, 1), (1, -1), (-1, 1), (-1, -1), (0, 0), (0, -1)):
        logps = [torch.tensor([1e4 * sign], dtype=dtype) for sign in signs]
        if not referenced(case):
            logps = [-side.abs() for side in logps]  # log-probs
        for side in logps:
            side.requires_grad_()
        zero, one = torch.zeros(1, dtype=dtype), torch.ones(1, dtype=dtype)
        loss = losses_of(logps, (zero, zero), (one, one), **OPTIONS[case])
        grads = torch.autograd.grad(loss.sum(), logps, materialize_grads=True)
        assert loss.isfinite().all()
        assert all(grad.isfinite().all() for grad in grads)


def test_discopop_forward_kl_and_orpo_survive_where_others_give_nan():
    """DiscoPOP below u = -89 (infinity times 0), forward KL there, ORPO at an average log-prob of 0."""
    low = torch.tensor([-1000.0], requires_grad=True)
    zero = torch.zeros(1)
    for options in ({"loss_type": "discopop", "beta": 1.0}, {"f_divergence": "forward_kl", "beta": 0.1}):
        loss = dpo_loss(low, zero, zero, zero, **options)[0]
        (grad,) = torch.autograd.grad(loss.sum(), low)
        assert loss.isfinite().all()
        assert grad.isfinite().all()
    sure = torch.zeros(1, requires_grad=True)
    loss = dpo_loss(sure, low.detach(), None, None, loss_type="orpo")[0]
    (grad,) = torch.autograd.grad(loss.sum(), sure)
    assert loss.isfinite().all()
    assert grad.isfinite().all()


@pytest.mark.parametrize(("options", "value"), [
    ({}, 0.6931471805599453), ({"label_smoothing": 0.3}, 0.6931471805599453), ({"loss_type": "hinge"}, 1.0),
])  # fmt: skip
def test_beta_zero(options, value):
    policy, reference, tokens = batch(requires_grad=True)
    loss = losses_of(policy, reference, tokens, beta=0.0, **options)
    loss.sum().backward()
    close(loss.detach(), torch.full((6,), value, dtype=F64), rtol=1e-15, atol=0)
    for side in policy:
        close(side.grad, torch.zeros(6, dtype=F64), rtol=0, atol=0)


def test_smoothing_smooths():
    """cDPO is the expectation over labels flipped with probability e, and at 1/2 it does not care which side won."""
    policy, reference, tokens = batch()
    straight = losses_of(policy, reference, tokens, beta=0.7)
    flipped = losses_of(policy[::-1], reference[::-1], tokens, beta=0.7)
    for e in (0.0, 0.1, 0.5):
        smooth = losses_of(policy, reference, tokens, beta=0.7, label_smoothing=e)
        close(smooth, (1 - e) * straight + e * flipped, rtol=1e-12, atol=0)
    close(smooth, losses_of(policy[::-1], reference[::-1], tokens, beta=0.7, label_smoothing=0.5), rtol=1e-12, atol=0)


def test_ipo_without_counts_takes_averages():
    (s_w, s_l), (r_w, r_l), (n_w, n_l) = batch()
    counted = losses_of((s_w, s_l), (r_w, r_l), (n_w, n_l), loss_type="ipo")
    close(dpo_loss(s_w / n_w, s_l / n_l, r_w / n_w, r_l / n_l, loss_type="ipo")[0], counted, rtol=1e-12, atol=0)
    whole_counts = losses_of((s_w, s_l), (r_w, r_l), (n_w.long(), n_l.int()), loss_type="ipo")
    close(whole_counts, counted, rtol=0, atol=0)


@pytest.mark.parametrize("case", HAND)
def test_the_order_of_the_pairs_does_not_matter(case):
    order = torch.tensor([4, 0, 3, 5, 1, 2])
    policy, reference, tokens = batch(requires_grad=True)
    straight = losses_of(policy, reference, tokens, **OPTIONS[case])
    shuffled = [[side[order] for side in sides] for sides in (policy, reference, tokens)]
    again = losses_of(*shuffled, **OPTIONS[case])
    close(again.sum(), straight.sum(), rtol=1e-12, atol=0)
    if all(spec.separable for spec in parts_of(case)):
        close(again, straight[order], rtol=1e-12, atol=0)


@pytest.mark.parametrize("case", HAND)
def test_properties_of_the_entry(case):
    """``difference``, ``separable`` and the like are what the engine relies on: each is tried."""
    options = dict(OPTIONS[case])
    bound = losses.bind(options.pop("loss_type"), options.pop("beta"), options.pop("label_smoothing", 0.0), options)
    policy, reference, tokens = batch()
    base = losses_of(policy, reference, tokens, **OPTIONS[case])
    step = {"sum": torch.full((6,), 0.75, dtype=F64), "mean": 0.75}.get(bound.difference)
    if step is not None:
        n_w, n_l = tokens if bound.difference == "mean" else (1.0, 1.0)
        lifted = (policy[0] + step * n_w, policy[1] + step * n_l)
        close(losses_of(lifted, reference, tokens, **OPTIONS[case]), base, rtol=1e-12, atol=1e-14)
    changed = (policy[0] - torch.arange(6) % 2, policy[1])  # pairs 0, 2, 4 as they were
    other = losses_of(changed, reference, tokens, **OPTIONS[case])
    assert torch.equal(other[0::2], base[0::2]) == bound.separable
    assert (other[1::2] != base[1::2]).any()
    if bound.needs_reference:
        elsewhere = losses_of(policy, (reference[0] - 0.5, reference[1]), tokens, **OPTIONS[case])
        assert not torch.equal(elsewhere, base)
    longer = losses_of(policy, reference, (tokens[0], tokens[1] + 1), **OPTIONS[case])
    assert torch.equal(longer, base) != any(spec.averages for spec in parts_of(case))


@pytest.mark.parametrize("case", HAND)
def test_value_and_grad_is_autograd(case):
    """What the fused pass asks of a loss, also with gradients switched off around it."""
    policy, reference, tokens = batch(requires_grad=True)
    options = dict(OPTIONS[case])
    name, beta = options.pop("loss_type"), options.pop("beta")
    bound = losses.bind(name, beta, options.pop("label_smoothing", 0.0), options)
    expected = losses_of(policy, reference, tokens, **OPTIONS[case])
    grads = torch.autograd.grad(expected.sum(), policy, materialize_grads=True)
    if bound.needs_token_factor:
        bound = bound.with_token_factor(6 / tokens[0].sum(), 6)
    if not referenced(case):
        reference = [torch.zeros(6, dtype=F64)] * 2
    alternating = [torch.stack(sides, dim=1).flatten().detach() for sides in (policy, reference, tokens)]
    code, numbers, by_pair = bound.encode(policy[0])
    again = losses.decode(code, beta, numbers, by_pair)
    for each in (bound, again):
        with torch.no_grad():
            value, grad = each.value_and_grad(*alternating)
        close(value, expected.detach(), rtol=1e-14, atol=1e-15)
        close(grad, torch.stack(grads, dim=1).flatten(), rtol=1e-14, atol=1e-15)
        assert not value.requires_grad
        assert not grad.requires_grad


def test_options_are_the_keywords_of_the_function(monkeypatch):
    def tempered(x: LossInputs, *, tau: float, floor: float = 0.25):
        return tau * (x.policy_rejected_logps - x.policy_chosen_logps) + floor

    assert LOSSES["sigmoid"].options == ("label_smoothing",)
    assert LOSSES["sigmoid"].defaults == {"label_smoothing": 0.0}
    assert LOSSES["ipo"].options == LOSSES["hinge"].options == ()
    spec = LossSpec("tempered", tempered, limits={"tau": (0.0, 4.0)})
    assert spec.options == ("tau", "floor")
    monkeypatch.setitem(LOSSES, "tempered", spec)
    got = dpo_loss(f64(-1.0), f64(-2.0), f64(0.0), f64(0.0), loss_type="tempered", tau=3.0)[0]
    close(got, f64(-2.75), rtol=1e-15, atol=0)  # 3 * (-2 + 1) + 0.25
    got = dpo_loss(f64(-1.0), f64(-2.0), f64(0.0), f64(0.0), loss_type="tempered", tau=3.0, floor=5.0)[0]
    close(got, f64(2.0), rtol=1e-15, atol=0)
    for value, kind, words in ((5.0, ValueError, "tau must lie in [0.0, 4.0] for 'tempered' ... 5.0"),
                               ("3", TypeError, "tau must be a real number ... str")):  # fmt: skip
        with pytest.raises(kind, match=says(words)):
            dpo_loss(f64(-1.0), f64(-2.0), f64(0.0), f64(0.0), loss_type="tempered", tau=value)
    with pytest.raises(ValueError, match=says("label_smoothing is not an option ... it has: tau, floor")):
        dpo_loss(f64(0), f64(0), f64(0), f64(0), loss_type="tempered", tau=1.0, label_smoothing=0.1)


def test_register_enters_under_the_functions_name(monkeypatch):
    monkeypatch.setattr("dpo_kernels.losses.registry.LOSSES", {})

    @losses.register(separable=False, difference="sum")
    def fresh(x):
        return x.policy_chosen_logps

    entered = registry.LOSSES
    assert list(entered) == ["fresh"]
    assert entered["fresh"] == LossSpec("fresh", fresh, separable=False, difference="sum")
    with pytest.raises(TypeError, match="unexpected keyword argument 'log_ratios'"):
        losses.register(log_ratios=True)


def test_register_has_the_properties_of_an_entry(monkeypatch):
    """Every property can be given, reaches its own field, and has that field's default."""
    monkeypatch.setattr("dpo_kernels.losses.registry.LOSSES", {})
    fields = {
        field.name: field for field in dataclasses.fields(LossSpec) if field.init and field.name not in ("name", "fn")
    }
    assert inspect.signature(losses.register).parameters.keys() == fields.keys()
    plain = losses.register()(lambda x: x.policy_chosen_logps)
    assert registry.LOSSES["<lambda>"] == LossSpec("<lambda>", plain)
    values = {
        "separable": False,
        "needs_reference": False,
        "needs_kl": True,
        "difference": "mean",
        "averages": True,
        "beta_positive": True,
        "limits": {"tau": (0.0, 1.0)},
        "uses_log_ratios_only": True,
        "by_pair": ("tau",),
        "filled_by_engine": ("token_factor",),
        "nll_weight": 0.5,
    }
    assert values.keys() == fields.keys()
    for name, value in values.items():
        entered = losses.register(**{name: value})(lambda x: x.policy_chosen_logps)
        assert registry.LOSSES["<lambda>"] == LossSpec("<lambda>", entered, **{name: value})
        assert registry.LOSSES["<lambda>"] != LossSpec("<lambda>", entered)


@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_results_are_by_pair_and_rewards_detached(dtype):
    policy, reference, _ = batch(requires_grad=True)
    sides = [side.to(dtype) for side in (*policy, *reference)]
    out = dpo_loss(*sides)
    assert [value.shape for value in out] == [(6,)] * 3
    assert [value.dtype for value in out] == [dtype] * 3
    assert [value.requires_grad for value in out] == [True, False, False]
    close(out[1] - out[2], 0.1 * ((sides[0] - sides[2]) - (sides[1] - sides[3])).detach())
    close(out[0].detach(), torch.log1p(torch.exp(out[2] - out[1])))


def test_a_token_denominator_goes_where_the_log_probs_are():
    with FakeTensorMode(allow_non_fake_inputs=True):
        logps = torch.zeros(3, device="cuda")
        losses, *_ = dpo_loss(logps, logps, None, None, loss_type="cpo", token_denominator=64.0)
    assert losses.device.type == "cuda"


def test_there_is_no_float64_on_mps():
    """Whatever there is one of by pair or sequence is float32 there."""
    assert sum_dtype(torch.device("mps")) == torch.float32
    with FakeTensorMode(allow_non_fake_inputs=True):
        logps = torch.zeros(3, device="mps")
        losses, *_ = dpo_loss(logps, logps, None, None, loss_type="cpo")
    assert losses.dtype == torch.float32


def test_the_reference_gets_no_gradient():
    policy, reference, tokens = batch(requires_grad=True)
    for side in reference:
        side.requires_grad_()
    grads = torch.autograd.grad(
        losses_of(policy, reference, tokens).sum(), (*policy, *reference), allow_unused=True
    )  # fmt: skip
    assert [grad is None for grad in grads] == [False, False, True, True]


def test_without_a_reference_it_counts_as_zero():
    policy, _, tokens = batch()
    zeros = [torch.zeros(6, dtype=F64)] * 2
    for case, options in OPTIONS.items():
        if not referenced(case):
            continue
        got = losses_of(policy, (None, None), tokens, reference_free=True, **options)
        close(got, losses_of(policy, zeros, tokens, **options), rtol=0, atol=0)


def test_a_callable_sees_every_field():
    policy, reference, tokens = batch()
    seen = {}

    def mine(x):
        seen.update(x._asdict())
        return x.beta * x.policy_chosen_logps

    got = losses_of(policy, reference, tokens, loss_type=mine, beta=0.3)
    close(got, 0.3 * policy[0], rtol=0, atol=0)
    assert tuple(seen) == LossInputs._fields
    assert seen["chosen_kl"] is seen["rejected_kl"] is None
    kl = f64(*range(6)), f64(*range(6, 12))
    mine.needs_kl = True
    losses_of(policy, reference, tokens, loss_type=mine, beta=0.3, chosen_kl=kl[0], rejected_kl=kl[1])
    for name, value in zip(LossInputs._fields, (*policy, *reference, *tokens, 0.3, *kl), strict=True):
        close(seen[name], value, rtol=0, atol=0)


def test_a_partial_function_has_the_attributes_of_its_own():
    def mine(x, factor, more):
        return factor * x.chosen_kl + more

    policy, reference, tokens = batch()
    mine.needs_kl = mine.separable = True  # type: ignore[attr-defined]
    twice = functools.partial(functools.partial(mine, factor=2.0), more=1.0)
    kl = f64(*range(6)), f64(*range(6, 12))
    got = losses_of(policy, reference, tokens, loss_type=twice, chosen_kl=kl[0], rejected_kl=kl[1])
    close(got, 2 * kl[0] + 1, rtol=0, atol=0)
    assert losses.bind(twice, 0.1, 0.0, {}).separable
    twice.needs_kl = False  # type: ignore[attr-defined]  # one of its own
    assert not losses.bind(twice, 0.1, 0.0, {}).needs_kl


@pytest.mark.parametrize("reads", [lambda x: x.chosen_kl, lambda x: 2 * x.chosen_kl, lambda x: x.rejected_kl.exp()])
def test_a_function_without_needs_kl_is_told_of_it(reads):
    policy, reference, tokens = batch()
    with pytest.raises(
        TypeError, match=r"NoneType.* a function that reads them has an attribute needs_kl that is true"
    ):
        losses_of(policy, reference, tokens, loss_type=reads)


def test_other_errors_of_a_function_are_its_own():
    def mine(x):
        raise TypeError("mine")

    policy, reference, tokens = batch()
    with pytest.raises(TypeError, match=r"^mine$"):
        losses_of(policy, reference, tokens, loss_type=mine)


def a_batch_of_hidden_states():
    g = torch.Generator().manual_seed(4)
    labels = torch.randint(0, 9, (6, 5), generator=g)
    labels[1, 2:] = labels[3, :] = labels[5, 1] = -100
    return {
        "hidden": torch.randn(6, 5, 4, generator=g, dtype=F64, requires_grad=True),
        "weight": torch.randn(9, 4, generator=g, dtype=F64, requires_grad=True),
        "labels": labels,
        "ref_logps": -torch.rand(6, generator=g, dtype=F64),
    }


def centred(x):
    """Coupled over the batch."""
    margin = x.policy_chosen_logps - x.policy_rejected_logps - (x.ref_chosen_logps - x.ref_rejected_logps)
    return x.beta * (margin - margin.mean()).square() + x.chosen_tokens - 2 * x.rejected_tokens


def apart(x):
    """Each pair by itself, and each side with a coefficient of its own."""
    chosen, rejected = x.policy_chosen_logps - x.ref_chosen_logps, x.policy_rejected_logps - x.ref_rejected_logps
    return x.beta * chosen.square() - torch.nn.functional.logsigmoid(rejected / x.rejected_tokens.clamp(min=1))


@pytest.mark.parametrize(("function", "separable", "strategy"), [
    (centred, None, "recompute"), (apart, None, "recompute"), (apart, False, "recompute"), (apart, True, "chunked"),
])  # fmt: skip
def test_a_callable_is_coupled_unless_it_says_otherwise(monkeypatch, function, separable, strategy):
    if separable is not None:
        monkeypatch.setattr(function, "separable", separable, raising=False)
    inputs = a_batch_of_hidden_states()
    assert explain(**inputs, loss_type=function, beta=0.3).strategy == strategy
    got = fused_dpo_loss(**inputs, loss_type=function, beta=0.3)
    want = dpo_loss_reference(**inputs, loss_type=function, beta=0.3)
    close(got.loss, want.loss, rtol=1e-12, atol=0)
    close(got.chosen_rewards, want.chosen_rewards, rtol=1e-12, atol=0)
    leaves = (inputs["hidden"], inputs["weight"])
    for ours, theirs in zip(*(torch.autograd.grad(out.loss, leaves) for out in (got, want)), strict=True):
        close(ours, theirs, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("separable", [False, True])
@pytest.mark.parametrize("pairs", ["stacked", "interleaved"])
def test_the_engine_fills_every_field_of_a_callable(separable, pairs):
    seen = []

    def mine(x):
        seen.append(x)
        return x.policy_chosen_logps

    mine.separable = separable
    inputs = a_batch_of_hidden_states()
    out = fused_dpo_loss(**inputs, loss_type=mine, beta=0.3, pairs=pairs)
    (x,) = seen
    assert type(x) is LossInputs
    counts = (inputs["labels"] >= 0).sum(1).to(F64)
    sides = (slice(0, 3), slice(3, 6)) if pairs == "stacked" else (slice(0, 6, 2), slice(1, 6, 2))
    for got, want in (
        (x.policy_chosen_logps.detach(), out.chosen_logps),
        (x.policy_rejected_logps.detach(), out.rejected_logps),
        (x.ref_chosen_logps, inputs["ref_logps"][sides[0]]),
        (x.ref_rejected_logps, inputs["ref_logps"][sides[1]]),
        (x.chosen_tokens, counts[sides[0]]),
        (x.rejected_tokens, counts[sides[1]]),
    ):
        close(got, want, rtol=0, atol=0)
    assert x.beta == 0.3


def test_no_pairs():
    none = torch.zeros(0)
    assert all(torch.equal(value, none) for value in dpo_loss(none, none, none, none))


def logps_with(**changes):
    names = ("policy_chosen_logps", "policy_rejected_logps", "ref_chosen_logps", "ref_rejected_logps")
    return {name: rand(2) for name in names} | changes


BAD_LOGPS = {
    "policy a list": ({"policy_chosen_logps": [0.0]}, TypeError, "policy_chosen_logps must be a tensor ... got list"),
    "policy None": ({"policy_rejected_logps": None}, TypeError, "policy_rejected_logps must be a tensor"),
    "policy int64": ({"policy_rejected_logps": whole(1, 2)}, TypeError, "policy_rejected_logps must be floating point"),
    "policy 2-D": ({"policy_chosen_logps": rand(2, 1)}, ValueError, "policy_chosen_logps has shape (2, 1) ... (P,)"),
    "sides differ": ({"policy_rejected_logps": rand(3)}, ValueError,
        "policy_rejected_logps has shape (3,) ... policy_chosen_logps (2,)"),
    "reference shape": ({"ref_rejected_logps": rand(1)}, ValueError, "ref_rejected_logps has shape (1,)"),
    "reference int64": ({"ref_chosen_logps": whole(1, 2)}, TypeError, "ref_chosen_logps must be floating point"),
    "reference elsewhere": ({"ref_chosen_logps": rand(2, **META)}, ValueError,
        "ref_chosen_logps is on meta ... policy_chosen_logps is on cpu"),
    "reference missing": ({"ref_chosen_logps": None, "ref_rejected_logps": None}, ValueError,
        "'sigmoid' needs a reference ... reference_free=True"),
    "reference half": ({"ref_rejected_logps": None}, ValueError,
        "needs a reference ... ref_chosen_logps and ref_rejected_logps"),
    "reference_free with one": ({"reference_free": True}, ValueError,
        "reference_free=True and ref_chosen_logps exclude"),
    "tokens shape": ({"chosen_tokens": rand(3)}, ValueError, "chosen_tokens has shape (3,)"),
    "tokens an int": ({"rejected_tokens": 3}, TypeError, "rejected_tokens must be a tensor ... got int"),
    "loss_type unknown": ({"loss_type": "dpo"}, ValueError, "unknown loss_type 'dpo' ... known:"),
    "beta negative": ({"beta": -1.0}, ValueError, "beta must be >= 0"),
    "label_smoothing": ({"label_smoothing": 0.7}, ValueError, "label_smoothing must lie in [0.0, 0.5]"),
    "no such option": ({"tau": 1.0}, ValueError, "tau is not an option of the loss 'sigmoid'"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD_LOGPS)
def test_bad_input_of_dpo_loss(case):
    changes, kind, words = BAD_LOGPS[case]
    with pytest.raises(kind, match=says(words)):
        dpo_loss(**logps_with(**changes))
