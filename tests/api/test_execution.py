"""How a call is laid out and run: layouts, static capacity, gradients wanted, the module, explain."""

import math

import pytest
import torch

from dpo_kernels import (
    FusedDPOLoss,
    explain,
    fused_dpo_loss,
    fused_sequence_logps,
    fused_token_logps,
)
from dpo_kernels.inputs import notices
from dpo_kernels.planning import tables
from dpo_kernels.reference import dpo_loss_reference
from tests.small import (
    BY_PAIR,
    COUNTS,
    CPU_BACKEND,
    F64,
    H_REF,
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

BACKENDS = sorted({"torch", CPU_BACKEND})


@pytest.fixture(autouse=True)
def _forget_warnings(monkeypatch):
    monkeypatch.setattr(notices, "issued", set())


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


@pytest.mark.parametrize("more", [{}, {"token_weights": True}], ids=["", "weights"])
def test_capacity_that_is_not_used_adds_nothing(more, strategy):
    """Rows that stand for nothing have the bias for their logits, and must not pull it: 25 of 40 here."""
    data = problem(*TRAINED, **more)
    agree(data, strategy=strategy, max_scored_tokens=40)
    plain = {name: value for name, value in data.items() if name not in ("ref_logps", "token_weights")}
    for function in (fused_sequence_logps, fused_token_logps):
        if strategy != "chunked":  # which has no pass for log-probs of a trained head
            ours = gradients(function(**plain, strategy=strategy, max_scored_tokens=40), plain)
            theirs = gradients(function(**plain, strategy=strategy), plain)
            assert all(torch.equal(ours[name], theirs[name]) for name in TRAINED)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "options", [{}, {"reduction": "none"}, {"max_scored_tokens": 40}, {"scratch_bytes": 5 * V * 8}]
)
def test_a_frozen_weight_costs_nothing_where_the_bias_is_trained(monkeypatch, options, backend):
    """No GEMM for its gradient and no memory of its size."""
    kernels, seen = tables.BACKENDS[backend].load(), []
    buffer, grad_weight = kernels.buffer, kernels.grad_weight

    def watched_buffer(self, device, *shape):
        seen.extend(["memory"] * (shape == (V, H)))
        return buffer(self, device, *shape)

    def watched_product(self, *given, **more):
        seen.append("product")
        return grad_weight(self, *given, **more)

    monkeypatch.setattr(kernels, "buffer", watched_buffer)
    monkeypatch.setattr(kernels, "grad_weight", watched_product)
    for strategy in STRATEGIES:
        if (strategy, *options) == ("chunked", "reduction"):
            continue  # refused
        grads = []
        for need in (("hidden", "bias"), TRAINED):
            seen.clear()
            data = problem(*need)
            out = fused_dpo_loss(**data, strategy=strategy, backend=backend, loss_type=SEPARABLE, **options)
            grads.append(gradients(out.loss, data))
            assert set(seen) == ({"memory", "product"} if need == TRAINED else set())
        assert torch.equal(grads[0]["hidden"], grads[1]["hidden"])
        assert torch.equal(grads[0]["bias"], grads[1]["bias"])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("form", ["whole rows", "lent"])
def test_a_reference_is_scored_in_whatever_scratch_the_policy_runs_in(form, backend):
    """The strategy that was asked for is the policy's: the reference may need more for a row, or have no lender."""
    data = problem(*TRAINED, dtype=torch.float32, ref_hidden=True, ref_weight=True)
    scratch = 2 * V * 4
    if form == "whole rows":
        for name in ("ref_hidden", "ref_weight"):
            data[name] = data[name].double()
        scratch = 4 * (V + 3) * 4 // 3  # a row of float32, and none of float64
    elif tables.BACKENDS[backend].load().can_alias_weight_grad:
        g = torch.Generator().manual_seed(1)
        wide = sum(COUNTS) + 1  # no more rows than the head is wide
        data["hidden"] = torch.randn(S, T, wide, generator=g, requires_grad=True)
        vocab = 1200  # a block of 528 columns beside another
        data["weight"] = torch.randn(vocab, wide, generator=g, requires_grad=True)
        data["bias"] = torch.randn(vocab, generator=g, requires_grad=True)
        data["ref_weight"] = torch.randn(vocab, H_REF, generator=g)
        scratch = 4 * (sum(COUNTS) * 544 * 4) // 3
    how = {"strategy": "chunked", "scratch_bytes": scratch, "backend": backend}
    got = fused_dpo_loss(**data, ref_bias=torch.zeros_like(data["ref_weight"][:, 0]), **how)
    wide = {name: value.double() if value.is_floating_point() else value for name, value in data.items()}
    want = dpo_loss_reference(**wide, ref_bias=torch.zeros_like(wide["ref_weight"][:, 0]))
    close(got.ref_chosen_logps.double(), want.ref_chosen_logps, rtol=1e-5, atol=1e-5)
    close(got.loss.detach().double(), want.loss.detach(), rtol=1e-5, atol=1e-5)


ALL_OF_THEM = ("entropy", "mean_logits", "top1", "log_sum_p2", "token_logps")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("cap", [{}, {"softcap": 3.0, "logit_scale": 0.8}], ids=["", "capped"])
def test_under_autocast_only_the_operands_are_rounded(cap, backend, strategy):
    """Bit by bit what a model of that dtype gets: neither statistics nor any product within is rounded as well."""
    data = problem(*TRAINED, dtype=torch.float32)
    rounded = {name: value.detach().bfloat16().requires_grad_() for name, value in data.items() if name in TRAINED}
    for more in ({}, {"reduction": "none"}):
        if more and strategy == "chunked":
            continue  # refused
        options = {"strategy": strategy, "backend": backend, "stats": ALL_OF_THEM, **cap, **more}
        with torch.autocast("cpu", torch.bfloat16):
            got = fused_dpo_loss(**data, **options)
            ours = gradients(got.loss, data)
        want = fused_dpo_loss(**data | rounded, **options)
        theirs = gradients(want.loss, rounded)
        for name in ("loss", *BY_PAIR):
            assert torch.equal(getattr(got, name), getattr(want, name)), name
        for name in (*ALL_OF_THEM, "tokens"):
            assert torch.equal(got.stats[name], want.stats[name]), name
        for name in TRAINED:
            assert ours[name].dtype == torch.float32
            assert torch.equal(ours[name].bfloat16(), theirs[name]), name


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


@pytest.mark.parametrize("scratch", [5 * V * 8, 8 * V * 8, 14 * V * 8])
def test_what_differs_by_pair_goes_with_its_pair(scratch):
    """Pairs of 9, 5 and 1 tokens, in chunks and in tiles of their own."""
    by_pair = {"margin": torch.tensor([0.5, -1.0, 2.0]), "pair_weights": torch.tensor([1.0, 3.0, 0.25])}
    data = problem(*TRAINED)
    assert explain(**data, scratch_bytes=scratch).chunks > 1
    agree(data, loss_type="odpo", beta=0.7, nll_weight=0.5, scratch_bytes=scratch, **by_pair)


COUPLED = lambda x: x.policy_chosen_logps.mean() - x.policy_rejected_logps  # noqa: E731
SEPARABLE = lambda x: x.policy_chosen_logps**2 - x.policy_rejected_logps  # noqa: E731
SEPARABLE.separable = True

# grads, options: strategy, units, reference units, and a word of the reason against each other strategy
PLANS = {
    "trainable": (TRAINED, {}, "chunked", 3, {"recompute": "4 GEMM passes against 3", "streaming": "against 3"}),
    "frozen": (("hidden",), {}, "frozen_head", 2, {"chunked": "it is frozen_head", "recompute": "it is frozen_head",
               "streaming": "could run, at 3"}),
    "head alone": (("weight",), {}, "chunked", 2, {"recompute": "could run, at 3", "streaming": "could run, at 3"}),
    "nothing": ((), {}, "frozen_head", 1, {"recompute": "it is frozen_head", "streaming": "could run, at 1"}),
    "reduction none": (TRAINED, {"reduction": "none"}, "recompute", 4, {"chunked": "reduction='none'"}),
    "reduction none, frozen": (("hidden",), {"reduction": "none"}, "frozen_head", 2,
               {"recompute": "it is frozen_head"}),
    "coupled": (TRAINED, {"loss_type": COUPLED}, "recompute", 4, {"chunked": "coupled over the batch"}),
    "coupled, frozen": (("hidden",), {"loss_type": COUPLED}, "frozen_head", 2, {"chunked": "coupled over the batch"}),
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
    others = {*tables.STRATEGIES, *tables.BACKEND_NAMES} - {strategy, CPU_BACKEND}
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
