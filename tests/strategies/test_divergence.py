"""The KL divergence from a reference that is scored in the same pass, and the losses that read it."""

import itertools
import math

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

import dpo_kernels as dk
from dpo_kernels.kernels import divergence
from dpo_kernels.planning import tables
from dpo_kernels.reference import dpo_loss_reference
from tests.cases import LAYOUTS, RICH, VOCAB, Case, broken_results, run
from tests.covers import cover
from tests.family import DTYPES
from tests.gemm_counts import costs
from tests.small import BACKENDS, F64, TRAINED, H, P, S, T, V, agree, gradients, pack, problem, same

ROW = 2 * 8 * VOCAB  # bytes of a row of both heads' logits in float64, and as much again for the temporaries
SCRATCH = {
    "chunked": ("chunked", None),
    "chunked-pairs": ("chunked", 16 * ROW),  # a chunk for each pair
    "recompute": ("recompute", None),
    "recompute-rows": ("recompute", 2 * ROW),  # a few rows at a time
}
LOSSES = {
    "tdpo1": {"loss_type": "tdpo1"},
    "tdpo2": {"loss_type": "tdpo2", "tdpo_alpha": 0.7},
    "statistic": {"loss_type": "ipo"},
}


@pytest.fixture(autouse=True)
def _quiet_shared_reference(monkeypatch):
    monkeypatch.setattr("dpo_kernels.inputs.notices.warn_once", lambda message: None)


def with_divergence(**more):
    """Six ragged sequences with a reference that is scored."""
    return problem(*TRAINED, ref_hidden=True, ref_weight=True, ref_bias=True, **more)


def broken(case, scratch, backend, options):
    name, scratch_bytes = SCRATCH[scratch]
    keywords = {**case.keywords(), "stats": ("kl", *case.keywords().get("stats", ())), **options}
    how = {"strategy": name, "scratch_bytes": scratch_bytes, "backend": backend}
    inputs = case.tensors()
    plan = dk.explain(**inputs, **keywords, **how)
    assert plan.strategy == name
    got = run(dk.fused_dpo_loss, inputs, **how, **keywords)
    return broken_results(got, inputs, keywords, case.dtype, backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("scratch", SCRATCH)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_equivalence(dtype, scratch, backend):
    """By the tolerance rule, against the float64 oracle."""
    factors = {"loss": tuple(LOSSES), "layout": tuple(LAYOUTS), "reference": ("hidden", "shared")}
    switches = dict.fromkeys(("frozen", "bias", "weights", "rich"), (False, True))
    for row in cover({**factors, **switches}):
        facts = {name: row[name] for name in ("reference", "frozen", "bias", "weights")}
        case = Case(dtype, options=RICH if row["rich"] else {}, **facts, **LAYOUTS[row["layout"]])
        assert not broken(case, scratch, backend, LOSSES[row["loss"]]), row


@pytest.mark.parametrize("operation", ["kl", "mix", "mix with a softcap"])
def test_a_block_has_as_many_temporaries_as_is_said(operation):
    """The operation itself runs on one block, and the most bytes that it holds at once are counted."""
    z, ref_z = torch.randn(4, 2**16), torch.randn(4, 2**16)
    shifts = z.logsumexp(1), ref_z.logsumexp(1)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        if operation == "kl":
            divergence._kl_of_block(z, shifts[0], ref_z, shifts[1])
        else:
            softcap = None if operation == "mix" else 5.0
            divergence._mix_block_(z, shifts[0], shifts[0], ref_z, shifts[1], shifts[1], softcap)
    events = [event for event in profiled.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = itertools.accumulate(event.nbytes() for event in sorted(events, key=lambda event: event.start_ns()))
    assert z.nbytes < max(held) * 1.01 <= divergence.BLOCK_TEMPORARIES * z.nbytes


def test_losses_without_a_reference_have_no_divergence():
    """With a reference and without one the error is the same, so neither sends on to the other."""
    data = with_divergence()
    free = {name: value for name, value in data.items() if not name.startswith("ref_")}
    for given in (data, free):
        with pytest.raises(ValueError, match="stats='kl' does not go with the loss 'simpo', which has no reference"):
            dk.fused_dpo_loss(**given, loss_type="simpo", stats=("kl",))


def test_the_small_scratches_cut():
    inputs, keywords = Case(F64, reference="hidden").tensors(), {"loss_type": "tdpo1", "stats": ("kl",)}
    for scratch, (name, scratch_bytes) in SCRATCH.items():
        plan = dk.explain(**inputs, **keywords, strategy=name, scratch_bytes=scratch_bytes, backend="torch")
        assert (plan.chunks > 1) == (scratch_bytes is not None), scratch


def unstopped(x):
    """TDPO2 without its stopped gradient, so that it has the derivative that differences see."""
    margin = x.policy_chosen_logps - x.ref_chosen_logps - (x.policy_rejected_logps - x.ref_rejected_logps)
    return -torch.nn.functional.logsigmoid(x.beta * (margin - 0.5 * (x.rejected_kl - x.chosen_kl)))


unstopped.needs_kl = unstopped.separable = True  # type: ignore[attr-defined]


def coupled_kl(x):
    """The divergence of a pair against the mean of the batch."""
    gap = x.rejected_kl - x.chosen_kl + 0.1 * x.policy_chosen_logps
    return (x.beta * (gap - gap.mean())).square() + x.chosen_kl.tanh()


coupled_kl.needs_kl = True  # type: ignore[attr-defined]


@pytest.mark.parametrize("strategy", ["chunked", "recompute"])
@pytest.mark.parametrize("loss", ["tdpo1", unstopped, coupled_kl], ids=["tdpo1", "unstopped", "coupled"])
def test_gradcheck(loss, strategy):
    data = with_divergence(token_weights=True)
    if loss is coupled_kl:
        strategy = "auto" if strategy == "chunked" else strategy
    constants = {name: value for name, value in data.items() if name not in TRAINED}

    def call(hidden, weight, bias):
        leaves = {"hidden": hidden, "weight": weight, "bias": bias}
        how = {"softcap": 3.0, "logit_scale": 1.3, "strategy": strategy, "beta": 0.4, "loss_type": loss}
        return dk.fused_dpo_loss(**constants, **leaves, **how).loss

    assert torch.autograd.gradcheck(call, tuple(data[name] for name in TRAINED))


@pytest.mark.parametrize("strategy", ["chunked", "recompute"])
@pytest.mark.parametrize("options", [
    {"loss_type": "tdpo2", "nll_weight": 0.3, "pair_weights": torch.tensor([0.5, 0.0, 2.0])},
    {"loss_type": ("tdpo2", "bco_pair", "tdpo1"), "loss_weights": (1.0, 0.5, -0.3)},
    {"loss_type": "tdpo2", "tdpo_alpha": 3.0, "label_smoothing": 0.0, "denominator": 5.0},
    {"loss_type": "tdpo1", "beta": 0.0},
])  # fmt: skip
def test_other_coefficients(strategy, options):
    """Coefficients of log-prob and divergence whose ratio differs by sequence and changes its sign."""
    data = with_divergence(token_weights=True)
    agree(data, **{"beta": 0.6} | options, strategy=strategy, stats=("kl", "top1"))
    agree(pack(data)[0], **{"beta": 0.6} | options, strategy=strategy, stats=("kl",), shift=True)


@pytest.mark.parametrize("reduction", ["sum", "none"])
def test_reductions(reduction):
    data = with_divergence()
    out = agree(data, loss_type="tdpo2", reduction=reduction, stats=("kl",))
    assert out.loss.dim() == (reduction == "none")


def test_the_gradient_of_tdpo2_stops_at_the_chosen_side():
    data = with_divergence()
    with_both = gradients(dk.fused_dpo_loss(**data, loss_type=unstopped).loss, data)
    stopped = gradients(agree(data, loss_type="tdpo2").loss, data)
    rejected = slice(P, None)
    same(stopped["hidden"][rejected], with_both["hidden"][rejected])
    assert float((stopped["hidden"][:P] - with_both["hidden"][:P]).abs().max()) > 1e-3


def test_the_statistic_is_the_sum_of_the_tokens_divergences():
    """By hand: full log-softmax of both heads."""
    data = with_divergence(token_weights=True)
    ours = (data["hidden"] @ data["weight"].t() + data["bias"]).log_softmax(-1).detach()
    theirs = (data["ref_hidden"] @ data["ref_weight"].t() + data["ref_bias"]).log_softmax(-1)
    by_token = (theirs.exp() * (theirs - ours)).sum(-1) * data["token_weights"] * (data["labels"] >= 0)
    for loss_type in ("sigmoid", "tdpo1"):
        out = dk.fused_dpo_loss(**data, loss_type=loss_type, stats=("kl", "entropy"))
        same(out.stats["kl"], by_token.sum(-1))
        assert not out.stats["kl"].requires_grad
        assert out.stats["kl"].dtype == F64


def test_single_sequences_and_groups_have_the_statistic():
    data = with_divergence()
    want = dpo_loss_reference(**data, stats=("kl",)).stats["kl"]
    desirable = torch.arange(S) % 2 == 0
    for call in (
        lambda **how: dk.fused_kto_loss(**data, desirable=desirable, **how),
        lambda **how: dk.fused_group_loss(**data, group_sizes=[4, 2], **how),
    ):
        one, two = call(stats=("kl",)), call()
        same(one.stats["kl"], want)
        same(one.loss, two.loss)
        for name, grad in gradients(one.loss, data).items():
            same(grad, gradients(two.loss, data)[name])


# --- what it costs ----------------------------------------------------------------------------------------------------

ROWS, WIDTH, REF_WIDTH, TOKENS = 64, 32, 48, 2048


def large(trainable=True, hidden_grad=True):
    g = torch.Generator().manual_seed(0)
    return {
        "hidden": torch.randn(8, ROWS, WIDTH, generator=g).requires_grad_(hidden_grad),
        "weight": torch.randn(TOKENS, WIDTH, generator=g).requires_grad_(trainable),
        "labels": torch.randint(0, TOKENS, (8, ROWS), generator=g),
        "ref_hidden": torch.randn(8, ROWS, REF_WIDTH, generator=g),
        "ref_weight": torch.randn(TOKENS, REF_WIDTH, generator=g),
    }


COSTS = [
    # options, trainable head, hidden with gradient -> strategy, passes of the policy and of the reference
    ({"loss_type": "tdpo1"}, True, True, "chunked", 3, 1),
    ({"loss_type": "tdpo2"}, False, True, "chunked", 2, 1),
    ({"loss_type": "tdpo2"}, True, False, "chunked", 2, 1),
    ({"loss_type": "tdpo1"}, False, False, "recompute", 1, 1),
    ({"loss_type": "tdpo1", "strategy": "chunked"}, False, False, "recompute", 1, 1),
    ({"loss_type": "tdpo1", "reduction": "none"}, True, True, "recompute", 4, 2),
    ({"loss_type": "tdpo1", "strategy": "recompute"}, False, True, "recompute", 3, 2),
    ({"stats": ("kl",)}, True, True, "chunked", 3, 1),
    ({"stats": ("kl",), "strategy": "recompute"}, True, True, "recompute", 4, 1),
    ({"stats": ("kl",), "reduction": "none"}, False, True, "recompute", 3, 1),
]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("options", "trainable", "hidden_grad", "strategy", "passes", "ref_passes"), COSTS)
def test_passes_and_scratch_are_as_explain_says(options, trainable, hidden_grad, strategy, passes, ref_passes, backend):
    data = large(trainable, hidden_grad)
    scratch = 4 * 2**20  # a pair has 2 MiB of logits of both heads, and a call 8
    how = {**options, "scratch_bytes": scratch, "backend": backend}
    plan = dk.explain(**data, **how)
    assert (plan.strategy, plan.gemms, plan.reference_gemms) == (strategy, passes, ref_passes)
    assert plan.chunks > 1
    assert plan.tile_bytes <= scratch
    flops, (largest, shape) = costs(lambda: dk.fused_dpo_loss(**data, **how).loss)
    if backend == "torch":
        assert flops == 2 * 8 * ROWS * TOKENS * (passes * WIDTH + ref_passes * REF_WIDTH)
    assert largest <= scratch // 2, shape
    assert "the reference's logits lie in the scratch beside those of the policy" in str(plan)


def test_a_pair_that_exceeds_the_scratch_is_computed_again():
    data = large()
    plan = dk.explain(**data, loss_type="tdpo1", scratch_bytes=2**20, backend="torch")
    assert (plan.strategy, plan.gemms, plan.reference_gemms) == ("recompute", 4, 2)
    assert plan.rejected["chunked"].startswith("an example is longer than the chunk")
    small = with_divergence()
    for scratch_bytes in (3 * V * 16 * 4 // 3, 2**20):
        agree(small, loss_type="tdpo2", scratch_bytes=scratch_bytes, stats=("kl",))


def test_logits_do_not_lie_in_the_gradient():
    """They would with so few tokens and no divergence."""
    data = large()
    data = {name: value[:, :2] if name not in ("weight", "ref_weight") else value for name, value in data.items()}
    plans = [dk.explain(**data, stats=stats, scratch_bytes=2**17) for stats in ((), ("kl",))]
    assert [plan.logits_in_weight_grad for plan in plans] == [plans[0].backend == "cpp", False]


# --- numerics ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_tiny_divergence_keeps_its_digits(backend):
    """Two models that differ by 1e-4: the sum of q (log q - log p) in float32 would be noise."""
    g = torch.Generator().manual_seed(1)
    hidden, weight = torch.randn(4, 8, 16, generator=g), torch.randn(997, 16, generator=g)
    moved = hidden + 1e-4 * torch.randn(4, 8, 16, generator=g)
    labels = torch.randint(0, 997, (4, 8), generator=g)
    given = {"labels": labels, "stats": ("kl",)}
    out = dk.fused_dpo_loss(moved, weight, **given, ref_hidden=hidden, ref_weight=weight, backend=backend)
    wide = [each.double() for each in (moved, weight, hidden)]
    want = dpo_loss_reference(*wide[:2], **given, ref_hidden=wide[2], ref_weight=wide[1]).stats["kl"]
    assert float(want.max()) < 1e-5
    torch.testing.assert_close(out.stats["kl"].double(), want, rtol=1e-2, atol=0)
    equal = dk.fused_dpo_loss(hidden, weight, **given, ref_hidden=hidden, ref_weight=weight, backend=backend)
    assert equal.stats["kl"].tolist() == [0.0] * 4


@pytest.mark.parametrize("backend", BACKENDS)
def test_tokens_that_a_model_excludes(backend):
    """Logits of -inf: of the reference or of both they add nothing that is not finite, of the policy alone infinity."""
    data = with_divergence()
    data["labels"] = data["labels"].where(data["labels"] < 8, 1)
    data["bias"] = data["bias"].detach().clone()
    data["bias"][9:], data["ref_bias"][9:], data["ref_bias"][8] = -math.inf, -math.inf, -math.inf
    for strategy in ("chunked", "recompute"):
        agree(data, loss_type="tdpo1", strategy=strategy, backend=backend, stats=("kl",))
    data["ref_bias"][9] = 0.0
    kl = dk.fused_dpo_loss(**data, stats=("kl",), backend=backend).stats["kl"]
    assert kl.isposinf().tolist() == [True] * 5 + [False]


def test_a_ratio_that_float32_does_not_hold():
    """A token of probability exp(-95) under the reference, a subnormal number, is the policy's only one."""
    eye, labels = torch.eye(3), torch.zeros(2, 1, dtype=torch.int64)
    hidden, ref_hidden = torch.tensor([-60.0, 0.0, -60.0]), torch.tensor([0.0, -95.0, -3.0])
    given = (hidden.expand(2, 1, 3), eye, labels)
    out = dk.fused_dpo_loss(*given, ref_hidden=ref_hidden.expand(2, 1, 3), ref_weight=eye, stats=("kl",))
    q, p = ref_hidden.double().softmax(0), hidden.double().softmax(0)
    torch.testing.assert_close(out.stats["kl"].double(), (q * (q / p).log()).sum().expand(2), rtol=1e-6, atol=0)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("strategy", ["chunked", "recompute"])
def test_distributions_far_apart(strategy, backend):
    """A ratio of probabilities may exceed what float32 holds, either way."""
    g = torch.Generator().manual_seed(2)
    data = {
        "hidden": (40 * torch.randn(2, 3, 4, generator=g)).requires_grad_(),
        "weight": torch.randn(50, 4, generator=g).requires_grad_(),
        "labels": torch.randint(0, 50, (2, 3), generator=g),
        "ref_hidden": 40 * torch.randn(2, 3, 4, generator=g),
        "ref_weight": torch.randn(50, 4, generator=g),
    }
    keywords = {"loss_type": "tdpo1", "beta": 0.01, "stats": ("kl",)}
    got = run(dk.fused_dpo_loss, data, **keywords, strategy=strategy, backend=backend)
    assert float(got["stats.kl"].min()) > 100
    assert not broken_results(got, data, keywords, torch.float32, backend)


# --- around it --------------------------------------------------------------------------------------------------------


def test_sequences_without_tokens():
    data = with_divergence()
    data["labels"] = torch.full((S, T), -100)
    out = agree(data, loss_type="tdpo2", stats=("kl",))
    assert out.stats["kl"].tolist() == [0.0] * S
    assert out.loss.requires_grad  # a rank without a token must still reach its collectives
    empty = {name: value[:0] if value.shape[0] == S else value for name, value in data.items()}
    out = dk.fused_dpo_loss(**empty, loss_type="tdpo2", stats=("kl",), reduction="sum")
    assert out.stats["kl"].shape == (0,)
    assert float(out.loss.detach()) == 0.0
    out.loss.backward()


@pytest.mark.parametrize("capacity", [15, 17, 30])
def test_a_static_capacity(capacity):
    agree(with_divergence(), loss_type="tdpo2", stats=("kl",), max_scored_tokens=capacity)
    agree(with_divergence(), loss_type="tdpo2", strategy="recompute", stats=("kl",), max_scored_tokens=capacity)


def test_too_small_a_capacity_is_nan():
    for strategy in ("chunked", "recompute"):
        data = with_divergence()
        out = dk.fused_dpo_loss(**data, loss_type="tdpo2", stats=("kl",), max_scored_tokens=14, strategy=strategy)
        assert out.loss.isnan()
        assert out.stats["kl"].isnan().all()
        assert gradients(out.loss, data)["weight"].isnan().all()


def test_main_grad():
    data, scale = with_divergence(), 0.25
    want = gradients(dk.fused_dpo_loss(**data, loss_type="tdpo2").loss, data)
    buffer = torch.ones(V, H, dtype=F64)
    out = dk.fused_dpo_loss(**data, loss_type="tdpo2", main_grad=buffer, main_grad_scale=scale)
    (out.loss * scale).backward()
    same(buffer - 1, scale * want["weight"])
    same(data["hidden"].grad, scale * want["hidden"])
    assert data["weight"].grad is None


def test_the_reference_may_have_another_dtype():
    data = {name: value.detach().float() if value.is_floating_point() else value for name, value in large().items()}
    data |= {name: data[name].bfloat16() for name in ("ref_hidden", "ref_weight")}
    data = {name: data[name].requires_grad_(name in ("hidden", "weight")) for name in data}
    keywords = {"loss_type": "tdpo1", "stats": ("kl",)}
    wide = data | {name: data[name].float() for name in ("ref_hidden", "ref_weight")}
    one, two = (run(dk.fused_dpo_loss, each, **keywords, backend="torch") for each in (data, wide))
    for name, value in one.items():
        torch.testing.assert_close(value, two[name], rtol=1e-4, atol=1e-6)


def test_autocast():
    data = problem(*TRAINED, dtype=torch.float32, ref_hidden=True, ref_weight=True)
    rounded = {n: v.detach().bfloat16() if v.is_floating_point() else v for n, v in data.items()}
    rounded = {n: v.requires_grad_(n in TRAINED) for n, v in rounded.items()}
    for strategy in ("chunked", "recompute"):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            one = dk.fused_dpo_loss(**data, loss_type="tdpo1", strategy=strategy, stats=("kl",))
        two = dk.fused_dpo_loss(**rounded, loss_type="tdpo1", strategy=strategy, stats=("kl",))
        assert torch.equal(one.loss, two.loss)
        assert torch.equal(one.stats["kl"], two.stats["kl"])
        ours, theirs = gradients(one.loss, data), gradients(two.loss, rounded)
        assert {grad.dtype for grad in ours.values()} == {torch.float32}
        torch.testing.assert_close(ours["weight"], theirs["weight"].float(), rtol=2**-8, atol=1e-7)


def test_the_reference_gets_no_gradient_and_may_not_change_before_the_backward_pass():
    data = with_divergence()
    for name in ("ref_hidden", "ref_weight"):
        data[name].requires_grad_()
    out = dk.fused_dpo_loss(**data, loss_type="tdpo1", strategy="recompute", reduction="none")
    found = gradients(out.loss, data)
    assert found["ref_hidden"] is found["ref_weight"] is None
    with torch.no_grad():
        data["ref_weight"].add_(1.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.loss.sum().backward()


def test_one_upstream_alone():
    """A loss that reads nothing but divergences, and one that reads no log-prob of the policy's rejected side."""
    data = with_divergence()

    def only(x):
        return x.chosen_kl.square() - x.rejected_kl

    only.needs_kl = True
    agree(data, loss_type=only, strategy="recompute")
    only.separable = True
    agree(data, loss_type=only, strategy="chunked")


@pytest.mark.parametrize("strategy", ["chunked", "recompute"])
def test_a_retained_graph_and_second_derivatives(strategy):
    data = with_divergence()
    loss = dk.fused_dpo_loss(**data, loss_type="tdpo1", strategy=strategy).loss
    first, second = gradients(loss, data), gradients(loss, data)
    for name in TRAINED:
        assert torch.equal(first[name], second[name])
    (grad,) = torch.autograd.grad(loss, data["hidden"], create_graph=True)
    with pytest.raises(RuntimeError, match="second derivatives"):
        grad.sum().backward()


def test_a_separable_loss_with_a_parameter_of_its_own_is_refused():
    data, alpha = with_divergence(), torch.ones((), dtype=F64, requires_grad=True)

    def mine(x):
        return alpha * x.chosen_kl - x.policy_rejected_logps

    mine.needs_kl = mine.separable = True
    with pytest.raises(ValueError, match="marked separable but uses a tensor"):
        dk.fused_dpo_loss(**data, loss_type=mine)
    mine.separable = False
    (grad,) = torch.autograd.grad(dk.fused_dpo_loss(**data, loss_type=mine).loss, alpha)
    assert float(grad) > 0


@pytest.mark.parametrize("options", [{"loss_type": "tdpo1"}, {"stats": ("kl",)}])
def test_inside_a_graph_it_is_refused(options):
    data = with_divergence()

    def step(hidden):
        return dk.fused_dpo_loss(**data | {"hidden": hidden}, **options).loss

    with pytest.raises(Exception, match=r"not supported inside torch\.compile yet"):
        torch.compile(step, backend="eager", fullgraph=True)(data["hidden"])


def test_every_strategy_has_its_functions_or_refuses():
    workload = Case(F64, reference="hidden")
    for name, strategy in tables.STRATEGIES.items():
        both = strategy.both
        known = (both.loss_and_gradients, both.logps, both.gradients)
        try:
            dk.explain(**workload.tensors(), stats=("kl",), strategy=name)
        except ValueError:
            assert known == (None, None, None)
            continue
        wanted = (strategy.loss_and_gradients, strategy.logps, strategy.gradients)
        assert [one is None for one in known] == [one is None for one in wanted]


def test_ranks_that_share_work_are_refused():
    class Parallel:
        def shard_of(self, weight):
            return weight.shape[0], None

        def share(self, *given):
            raise AssertionError

    from dpo_kernels.inputs.make_problem import pair_problem
    from dpo_kernels.inputs.options import Arguments
    from dpo_kernels.losses import bind

    for name, loss in itertools.product(("vocab_parallel", "context_parallel"), ("sigmoid", "tdpo1")):
        arguments = Arguments.by_name(with_divergence() | {name: Parallel(), "stats": ("kl",)})
        with pytest.raises(ValueError, match=f"does not go with {name} yet"):
            pair_problem(arguments, bind(loss, 0.1, 0.0, {}))
