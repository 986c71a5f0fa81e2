"""How a call is laid out and run: layouts, static capacity, gradients wanted, the module, explain."""

import math

import pytest
import torch

from dpo_kernels import (
    FusedDPOLoss,
    dispatch,
    explain,
    fused_dpo_loss,
    fused_sequence_logps,
    fused_token_logps,
    inputs,
)
from dpo_kernels.reference import dpo_loss_reference
from tests.small import (
    BY_PAIR,
    COUNTS,
    CPU_BACKEND,
    F64,
    STRATEGIES,
    TRAINED,
    H,
    P,
    S,
    T,
    V,
    agree,
    gradients,
    pack,
    problem,
    same,
)


@pytest.fixture(autouse=True)
def _forget_warnings(monkeypatch):
    monkeypatch.setattr(inputs, "_warned", set())


@pytest.fixture(params=STRATEGIES)
def strategy(request):
    return request.param


# --- layouts ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shift", [False, True])
def test_packed_equals_padded(shift, strategy):
    more = {"ref_hidden": True, "ref_weight": True, "token_weights": True}
    padded = problem(*TRAINED, **more)
    packed, keep = pack(padded)
    stats = ("entropy", "top1")
    one = fused_dpo_loss(**padded, shift=shift, strategy=strategy, stats=stats)
    two = agree(packed, shift=shift, strategy=strategy, stats=stats)
    for name in ("loss", *BY_PAIR):
        same(getattr(two, name), getattr(one, name))
    assert all(torch.equal(two.stats[name], one.stats[name]) for name in one.stats)
    ours, theirs = gradients(two.loss, packed), gradients(one.loss, padded)
    same(ours["hidden"], theirs["hidden"][keep])
    same(ours["weight"], theirs["weight"])
    wide = packed | {"cu_seqlens": packed["cu_seqlens"].long()}
    assert torch.equal(fused_dpo_loss(**wide, shift=shift, strategy=strategy, stats=stats).loss, two.loss)


def strided(tensor):
    """The same numbers at an offset, in steps of two, the last dimension outermost."""
    room = torch.full((*tensor.shape[::-1], 2), 99).to(tensor.dtype)
    view = room.permute(*range(tensor.dim() - 1, -1, -1), tensor.dim())[..., 1]
    view.copy_(tensor.detach())
    return view


@pytest.mark.parametrize("layout", ["padded", "packed"])
def test_strides_and_int32_change_nothing(layout, strategy):
    data = problem(*TRAINED, ref_hidden=True, ref_weight=True, ref_bias=True, token_weights=True)
    data = pack(data)[0] if layout == "packed" else data
    moved = {n: strided(v).requires_grad_(v.requires_grad) for n, v in data.items() if n != "cu_seqlens"}
    moved["labels"] = strided(data["labels"].int())
    assert not any(value.is_contiguous() for value in moved.values())
    assert all(value.storage_offset() for value in moved.values())
    out = agree(data | moved, strategy=strategy, shift=True)
    want = fused_dpo_loss(**data, strategy=strategy, shift=True)
    same(out.loss, want.loss)
    ours, theirs = gradients(out.loss, moved), gradients(want.loss, data)
    for name in TRAINED:
        same(ours[name], theirs[name])


def test_strided_reference_and_upstream(strategy):
    data = problem("hidden")
    out = fused_dpo_loss(**data | {"ref_logps": strided(data["ref_logps"])}, reduction="none", strategy=strategy)
    want = dpo_loss_reference(**data, reduction="none")
    same(out.loss, want.loss)
    upstream = strided(torch.randn(P, dtype=F64))
    ours, theirs = (torch.autograd.grad(x.loss, data["hidden"], upstream)[0] for x in (out, want))
    same(ours, theirs)


def test_a_head_with_more_rows_than_tokens(strategy):
    data = problem(*TRAINED)
    data["labels"] = data["labels"].clamp(max=4)  # rows 5.. are no token's
    out = agree(data, strategy=strategy)
    assert gradients(out.loss, data)["weight"][5:].abs().min() > 0


# --- how it runs ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("capacity", [sum(COUNTS), sum(COUNTS) + 1, S * T, 1000])
def test_a_static_capacity_that_fits_changes_nothing(capacity, strategy):
    data = problem(*TRAINED, ref_hidden=True, ref_weight=True, token_weights=True)
    data["hidden"].data[0, 0] = math.nan  # masked, and what unused capacity points at
    data["labels"][0, 0] = -100
    out = agree(data, strategy=strategy, max_scored_tokens=capacity, stats=("entropy",))
    assert torch.equal(gradients(out.loss, data)["hidden"][0, 0], torch.zeros(H, dtype=F64))
    plain = {name: value for name, value in data.items() if not name.startswith("ref_")}
    tokens = fused_sequence_logps(**plain, max_scored_tokens=capacity)
    same(tokens[:P].detach(), out.chosen_logps)


@pytest.mark.parametrize("loss_type", ["sigmoid", "hinge"])  # torch's derivative of a hinge at NaN is 0
@pytest.mark.parametrize("frozen", [False, True])
def test_an_overflowing_capacity_is_nan_and_never_a_number(frozen, loss_type, strategy):
    data = problem(*TRAINED[:1] if frozen else TRAINED)
    out = fused_dpo_loss(**data, loss_type=loss_type, strategy=strategy, max_scored_tokens=sum(COUNTS) - 1)
    assert out.loss.isnan()
    grads = gradients(out.loss, data)
    scored = data["labels"] >= 0
    assert grads["hidden"][scored].isnan().any()
    for name in grads.keys() - {"hidden"}:
        assert grads[name].isnan().all()
    plain = {name: value for name, value in data.items() if name != "ref_logps"}
    for function in (fused_sequence_logps, fused_token_logps):
        assert function(**plain, max_scored_tokens=sum(COUNTS) - 1).isnan().any()


@pytest.mark.parametrize("need", [(), ("hidden",), ("weight",), ("bias",), ("hidden", "bias"), ("weight", "bias")])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_gradients_for_what_requires_them_and_nothing_else(need, reduction):
    for strategy in ("auto", "recompute", "streaming"):
        data = problem(*need)
        out = agree(data, reduction=reduction, strategy=strategy)
        assert out.loss.requires_grad == bool(need)
        if need:
            out.loss.sum().backward()
        for name in TRAINED:
            assert (data[name].grad is None) == (name not in need)


def test_no_grad(strategy):
    data = problem(*TRAINED)
    with torch.no_grad():
        out = fused_dpo_loss(**data, strategy=strategy)
    assert not out.loss.requires_grad
    same(out.loss, fused_dpo_loss(**data, strategy=strategy).loss.detach())
    with torch.inference_mode():
        same(fused_dpo_loss(**data, strategy=strategy).loss.clone(), out.loss)


def test_the_module_equals_the_function():
    data = problem(*TRAINED, ref_hidden=True, ref_weight=True, ref_bias=True, token_weights=True)
    options = {
        "loss_type": "sigmoid", "beta": 0.4, "label_smoothing": 0.1, "pairs": "interleaved", "shift": True,
        "ignore_index": -100, "logit_scale": 0.9, "softcap": 5.0, "stats": ("top1",), "strategy": "recompute",
        "scratch_bytes": 10**6,
    }  # fmt: skip
    module = FusedDPOLoss(**options)
    assert list(module.parameters()) == []
    got, want = module(**data, denominator=2.5), fused_dpo_loss(**data, **options, denominator=2.5)
    for name in ("loss", *BY_PAIR):
        assert torch.equal(getattr(got, name), getattr(want, name))
    assert torch.equal(got.stats["top1"], want.stats["top1"])
    ours, theirs = gradients(got.loss, data), gradients(want.loss, data)
    assert all(torch.equal(ours[name], theirs[name]) for name in TRAINED)
    for name, value in options.items():
        assert f"{name}={value!r}" in repr(module)
    packed, _ = pack(problem(*TRAINED))
    kinds = {"reference_free": True, "reduction": "none", "max_scored_tokens": 40}
    del packed["ref_logps"]
    same(FusedDPOLoss(**kinds)(**packed).loss, fused_dpo_loss(**packed, **kinds).loss)


@pytest.mark.parametrize("cap", [{"logit_scale": -0.6}, {"softcap": 2.0}, {"logit_scale": 1.7, "softcap": 1.5}])
def test_scale_and_cap(cap, strategy):
    agree(problem(*TRAINED, ref_hidden=True, ref_weight=True), strategy=strategy, **cap)
    agree(problem("hidden"), strategy=strategy, **cap)


@pytest.mark.parametrize("scratch", [0, 40, 74, 200, 1000])
def test_auto_takes_whatever_scratch_there_is(scratch):
    """Less than a row of logits cuts the vocabulary (88 bytes a row here), less than that streams."""
    for need in (TRAINED, ("hidden",)):
        data = problem(*need, token_weights=True)
        for options in ({}, {"loss_type": "ipo", "beta": 0.4}, {"reduction": "none"}):
            agree(data, scratch_bytes=scratch, **options)


COUPLED = lambda x: x.policy_chosen_logps.mean() - x.policy_rejected_logps  # noqa: E731
SEPARABLE = lambda x: x.policy_chosen_logps**2 - x.policy_rejected_logps  # noqa: E731
SEPARABLE.separable = True

# grads, options: strategy, units, reference units, and a word of the reason against each other strategy
PLANS = {
    "trainable": (TRAINED, {}, "chunked", 3, {"recompute": "4 GEMM units against 3", "streaming": "against 3"}),
    "frozen": (("hidden",), {}, "chunked", 2, {"recompute": "could run, at 2", "streaming": "could run, at 3"}),
    "head alone": (("weight",), {}, "chunked", 2, {"recompute": "could run, at 3", "streaming": "could run, at 3"}),
    "nothing": ((), {}, "chunked", 1, {"recompute": "could run, at 1", "streaming": "could run, at 1"}),
    "reduction none": (TRAINED, {"reduction": "none"}, "recompute", 4, {"chunked": "reduction='none'"}),
    "reduction none, frozen": (("hidden",), {"reduction": "none"}, "chunked", 2, {"recompute": "could run"}),
    "coupled": (TRAINED, {"loss_type": COUPLED}, "recompute", 4, {"chunked": "coupled over the batch"}),
    "coupled, frozen": (("hidden",), {"loss_type": COUPLED}, "recompute", 2, {"chunked": "coupled over the batch"}),
    "separable": (TRAINED, {"loss_type": SEPARABLE}, "chunked", 3, {"recompute": "against 3"}),
    "no scratch": (TRAINED, {"scratch_bytes": 0}, "streaming", 4,
                   {"chunked": "one row of logits", "recompute": "scratch_bytes=0"}),
    "by name": (TRAINED, {"strategy": "streaming"}, "streaming", 4, {"chunked": "could run, at 3"}),
}  # fmt: skip


@pytest.mark.parametrize("case", PLANS)
def test_explain_says_what_runs_and_why_nothing_else(case):
    need, options, strategy, units, reasons = PLANS[case]
    data = problem(*need)
    plan = explain(**data, **options)
    assert (plan.strategy, plan.backend, plan.units, plan.reference_units) == (strategy, CPU_BACKEND, units, 0)
    others = {*dispatch.STRATEGIES, *dispatch.BACKEND_NAMES} - {strategy, CPU_BACKEND}
    assert plan.against.keys() == others
    assert all(plan.against.values())
    for name, words in reasons.items():
        assert words in plan.against[name]
    for name in others:
        assert f"not {name}: {plan.against[name]}" in str(plan)
    assert f"strategy {strategy}, backend {CPU_BACKEND}" in str(plan)
    agree(data, **options)
    with torch.no_grad():
        assert explain(**data, **options).units == 1


def test_explain_counts_the_reference_and_the_chunks():
    data = problem(*TRAINED, ref_hidden=True, ref_weight=True)
    plan = explain(**data)
    assert (plan.units, plan.reference_units, plan.chunks, plan.extra_bytes) == (3, 1, 1, 0)
    assert plan.tile.cols == V
    assert "3 policy + 1 reference" in str(plan)
    small = explain(**data, scratch_bytes=5 * V * 8)  # pairs of 9, 5 and 1 tokens, at most 4 rows at once
    buffer = V * H * 8
    assert (small.strategy, small.extra_bytes) == ("chunked", buffer)
    assert small.chunks > 1
    assert "oversized pairs" in str(small)
    assert explain(**data, scratch_bytes=5 * V * 8, loss_type=SEPARABLE).extra_bytes == 2 * buffer
    for options in ({}, {"loss_type": SEPARABLE}, {"loss_type": "ipo"}):
        agree(data, scratch_bytes=5 * V * 8, **options)


def test_explain_on_a_device_that_no_backend_knows():
    data = {name: value.detach().to("meta") for name, value in problem().items()}
    data["weight"].requires_grad_()
    plan = explain(**data)
    assert (plan.strategy, plan.backend, plan.units) == ("chunked", "torch", 2)
