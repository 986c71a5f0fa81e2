"""How the functions behave inside torch's machinery: gradcheck, operators, compile, autocast, checkpointing."""

import pytest
import torch
import torch._inductor.config
from torch.utils.checkpoint import checkpoint

import dpo_kernels as dk
from dpo_kernels.engine import autograd
from dpo_kernels.inputs import packing
from dpo_kernels.reference import dpo_loss_reference
from tests.cases import (
    OPERATOR_CALLS,
    RICH,
    STRATEGIES,
    Case,
    failed_opchecks,
    recorded_operators,
    registered_operators,
    rounded_tile,
    run,
)
from tests.family import coupled, one_sided
from tests.small import BACKENDS
from tests.tolerance import RELATIVE_L2_BAR, relative_l2

F64 = torch.float64


def small(frozen=False, bias=True):
    """Inputs of a few numbers, for finite differences."""
    g = torch.Generator().manual_seed(5)
    labels = torch.tensor([[-100, 1, 6], [2, -100, -100], [-100, 0, 3], [5, 4, -100]])
    return {
        "hidden": torch.randn(4, 3, 4, generator=g, dtype=F64, requires_grad=True),
        "weight": torch.randn(7, 4, generator=g, dtype=F64, requires_grad=not frozen),
        "labels": labels,
        "bias": torch.randn(7, generator=g, dtype=F64, requires_grad=not frozen) if bias else None,
    }


def differentiable(inputs):
    return [inputs[name] for name in ("hidden", "weight", "bias") if inputs[name] is not None]


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("frozen", [False, True], ids=["trainable", "frozen"])
@pytest.mark.parametrize(
    "loss", ["sigmoid", "ipo", "hinge", one_sided, coupled], ids=lambda v: getattr(v, "__name__", v)
)
def test_gradcheck(loss, frozen, strategy):
    name, _ = STRATEGIES[strategy]
    if loss is coupled and name == "chunked":
        name = "auto"
    inputs = small(frozen)
    scratch = {"chunked-tiny": 2 * 7 * 8 * 2, "recompute-tiles": 256}.get(strategy)

    def call(hidden, weight, bias):
        return dk.fused_dpo_loss(
            hidden,
            weight,
            inputs["labels"],
            bias=bias,
            reference_free=True,
            loss_type=loss,
            beta=0.4,
            softcap=3.0,
            logit_scale=1.3,
            strategy=name,
            scratch_bytes=scratch,
        ).loss

    assert torch.autograd.gradcheck(call, differentiable(inputs))


@pytest.mark.parametrize("strategy", ["recompute", "streaming"])
@pytest.mark.parametrize("frozen", [False, True], ids=["trainable", "frozen"])
@pytest.mark.parametrize("shift", [False, True])
@pytest.mark.parametrize("function", [dk.fused_sequence_logps, dk.fused_token_logps], ids=["sequence", "token"])
def test_gradcheck_logps(function, shift, frozen, strategy):
    inputs = small(frozen)

    def call(hidden, weight, bias):
        return function(hidden, weight, inputs["labels"], bias=bias, shift=shift, strategy=strategy)

    assert torch.autograd.gradcheck(call, differentiable(inputs))


# --- operators --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [F64, torch.float32], ids=str)
@pytest.mark.parametrize("call", OPERATOR_CALLS)
def test_opcheck(monkeypatch, call, dtype):
    operators = recorded_operators(monkeypatch, Case(dtype, **OPERATOR_CALLS[call]))
    assert len(operators) >= 3
    assert not failed_opchecks(operators)


def test_every_operator_is_checked(monkeypatch):
    names = set()
    for call in OPERATOR_CALLS.values():
        names |= {op._qualname for op, _ in recorded_operators(monkeypatch, Case(F64, **call))}
    assert names == registered_operators()


def test_pack_of_unknown_length_has_a_fake(monkeypatch):
    """Outside a tracer the capacity is what the data says: an unbacked size to the fake."""
    (op, args), *_ = recorded_operators(monkeypatch, Case(F64))
    assert op._qualname == "dpo_kernels::pack"
    *tensors, sizes, flags = args
    unknown = (*tensors, [*sizes[:-1], -1], flags)
    torch.library.opcheck(op, unknown, test_utils=("test_schema", "test_faketensor"))


MIX = {"loss_type": ["sigmoid", "hinge"], "loss_weights": [0.7, 0.4], "nll_weight": 0.3}
THROUGH_OPERATORS = {
    "mix": Case(bias=True, options=MIX | RICH | {"pair_weights": torch.tensor([0.5, 1.0, 2.0])}),
    "recompute": Case(bias=True, weights=True, shift=True, options=RICH | {"strategy": "recompute"}),
    "frozen head": Case(frozen=True, bias=True, weights=True, options=RICH | {"scratch_bytes": 8192}),
}


@pytest.mark.parametrize("case", THROUGH_OPERATORS)
def test_operators_give_what_eager_functions_give(monkeypatch, case):
    """Every option reaches the other side of an operator, whose arguments are numbers and one string."""
    inputs, options = THROUGH_OPERATORS[case].tensors(), THROUGH_OPERATORS[case].keywords()
    eager = run(dk.fused_dpo_loss, inputs, 1.7, **options)
    for module in (packing, autograd):
        monkeypatch.setattr(module, "traced", lambda tensor: True)
    got = run(dk.fused_dpo_loss, inputs, 1.7, **options)
    assert got.keys() == eager.keys()
    for name, value in eager.items():
        torch.testing.assert_close(got[name], value, rtol=1e-6, atol=1e-7)


# --- torch.compile ----------------------------------------------------------------------------------------------------


def _named(hidden, weight, labels, ref_logps):
    return dk.fused_dpo_loss(hidden, weight, labels, ref_logps=ref_logps, stats=("entropy",))


def _with_callable(hidden, weight, labels, ref_logps):
    return dk.fused_dpo_loss(hidden, weight, labels, ref_logps=ref_logps, loss_type=coupled)


def _with_separable_callable(hidden, weight, labels, ref_logps):
    return dk.fused_dpo_loss(hidden, weight, labels, ref_logps=ref_logps, loss_type=one_sided)


def _by_pair(hidden, weight, labels, ref_logps):
    return dk.fused_dpo_loss(hidden, weight, labels, ref_logps=ref_logps, loss_type="ipo", reduction="none", shift=True)


def _interleaved_packed(hidden, weight, labels, ref_logps):
    cu_seqlens = torch.arange(hidden.shape[0] + 1, dtype=torch.int32) * hidden.shape[1]
    return dk.fused_dpo_loss(
        hidden.flatten(0, 1),
        weight,
        labels.flatten(),
        ref_logps=ref_logps,
        cu_seqlens=cu_seqlens,
        pairs="interleaved",
    )


@pytest.fixture
def _fresh_compiler():
    torch._dynamo.reset()
    # Or inductor starts a pool of processes for Triton's kernels, of which there are none on a CPU; each imports torch.
    with torch._inductor.config.patch(compile_threads=1):
        yield


# Inductor compiles each operator once, here and in test_compile_once_for_all_lengths: its compiler is all of the time.
@pytest.mark.slow
@pytest.mark.usefixtures("_fresh_compiler")
@pytest.mark.parametrize(
    ("function", "backend"),
    [
        (_named, "aot_eager"),
        (_with_callable, "inductor"),
        (_with_separable_callable, "aot_eager"),
        (_by_pair, "inductor"),
        (_interleaved_packed, "aot_eager"),
    ],
)
def test_compile_fullgraph(function, backend):
    inputs = Case().tensors()
    leaves = [inputs["hidden"], inputs["weight"]]
    eager = function(**inputs)
    upstream = torch.randn_like(eager.loss)
    eager_grads = torch.autograd.grad(eager.loss, leaves, upstream)
    compiled = torch.compile(function, fullgraph=True, backend=backend)(**inputs)
    compiled_grads = torch.autograd.grad(compiled.loss, leaves, upstream)
    for name in eager._fields[:-1]:
        torch.testing.assert_close(getattr(compiled, name), getattr(eager, name), rtol=1e-6, atol=1e-6)
    for name, value in eager.stats.items():
        torch.testing.assert_close(compiled.stats[name], value, rtol=1e-6, atol=1e-6)
    for got, expected in zip(compiled_grads, eager_grads, strict=True):
        torch.testing.assert_close(got, expected, rtol=2e-5, atol=1e-7)


COMPUTED = {
    "computed reference": Case(reference="hidden"),
    "computed reference, shared head": Case(reference="shared", frozen=True),
    "token weights": Case(weights=True, bias=True),
    "token weights, computed reference, packed": Case(weights=True, reference="hidden", layout="packed", shift=True),
}


@pytest.mark.usefixtures("_fresh_compiler")
@pytest.mark.parametrize("case", COMPUTED)
def test_compile_with_a_computed_reference_and_token_weights(case):
    case = COMPUTED[case]
    inputs = case.tensors()
    eager = run(dk.fused_dpo_loss, inputs, 1.7, **case.keywords())
    compiled = torch.compile(dk.fused_dpo_loss, fullgraph=True, backend="aot_eager")
    got = run(compiled, inputs, 1.7, **case.keywords())
    assert got.keys() == eager.keys()
    for name, value in eager.items():
        torch.testing.assert_close(
            got[name], value, rtol=1e-6, atol=1e-7, msg=lambda text, name=name: f"{name}: {text}"
        )


@pytest.mark.slow
@pytest.mark.usefixtures("_fresh_compiler")
def test_compile_once_for_all_lengths():
    compiled = torch.compile(_named, fullgraph=True, dynamic=True)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for longest in (11, 10, 9):
            inputs = Case().tensors()
            for name in ("hidden", "labels"):
                inputs[name] = inputs[name].detach()[:, :longest].clone(memory_format=torch.contiguous_format)
            inputs["hidden"].requires_grad_()
            leaves = (inputs["hidden"], inputs["weight"])
            got, expected = compiled(**inputs).loss, _named(**inputs).loss
            assert torch.equal(got, expected)
            for a, b in zip(torch.autograd.grad(got, leaves), torch.autograd.grad(expected, leaves), strict=True):
                assert torch.equal(a, b)


def test_fake_tensors_need_no_data():
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        hidden = torch.empty(4, 6, 8, requires_grad=True)
        weight = torch.empty(50, 8, requires_grad=True)
        labels = torch.zeros(4, 6, dtype=torch.int64)
        out = dk.fused_dpo_loss(hidden, weight, labels, reference_free=True)
        out.loss.backward()
        assert out.loss.shape == ()
        assert hidden.grad.shape == hidden.shape


# --- autocast, checkpointing, repeated and second backward ------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("frozen", [False, True], ids=["trainable", "frozen"])
def test_autocast(frozen, strategy, backend):
    """GEMMs see bfloat16, gradients come back in the parameters' float32 without a rounding to bfloat16 between.

    Where the gradient GEMMs read bfloat16 their tile has been rounded once; elsewhere nothing has.
    """
    case = Case(torch.float32, frozen=frozen, bias=True)
    inputs = case.tensors()
    name, scratch = STRATEGIES[strategy]
    with torch.autocast("cpu", torch.bfloat16):
        out = dk.fused_dpo_loss(**inputs, **case.keywords(), strategy=name, scratch_bytes=scratch, backend=backend)
    leaves = {k: v for k, v in inputs.items() if isinstance(v, torch.Tensor) and v.requires_grad}
    grads = torch.autograd.grad(out.loss, list(leaves.values()))
    rounded = {
        k: v.detach().to(torch.bfloat16).double().requires_grad_(k in leaves)
        if k in ("hidden", "weight", "bias")
        else v
        for k, v in inputs.items()
    }
    oracle = dpo_loss_reference(**rounded, **case.keywords())
    expected = torch.autograd.grad(oracle.loss, [rounded[k] for k in leaves])
    torch.testing.assert_close(out.loss.double(), oracle.loss, rtol=1e-5, atol=0)
    allowed = RELATIVE_L2_BAR[torch.bfloat16] if rounded_tile(backend, torch.bfloat16) else 1e-5
    for (key, leaf), got, want in zip(leaves.items(), grads, expected, strict=True):
        assert got.dtype == leaf.dtype == torch.float32
        assert not torch.equal(got, got.bfloat16().float()), f"{key} was rounded to bfloat16"
        assert relative_l2(got, want) < allowed, key


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing(reentrant, strategy):
    case = Case(torch.float32)
    inputs = case.tensors()
    name, scratch = STRATEGIES[strategy]
    others = {k: v for k, v in inputs.items() if k not in ("hidden", "weight")}

    def call(hidden, weight):
        return dk.fused_dpo_loss(
            torch.tanh(hidden), weight, **others, **case.keywords(), strategy=name, scratch_bytes=scratch
        ).loss

    leaves = (inputs["hidden"], inputs["weight"])
    plain = torch.autograd.grad(call(*leaves), leaves)
    checkpoint(call, *leaves, use_reentrant=reentrant).backward()  # reentrant checkpoints only know .backward()
    for leaf, expected in zip(leaves, plain, strict=True):
        assert torch.equal(leaf.grad, expected)


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("frozen", [False, True], ids=["trainable", "frozen"])
def test_backward_twice_with_retained_graph(frozen, strategy):
    case = Case(torch.bfloat16, frozen=frozen, bias=True)
    inputs = case.tensors()
    name, scratch = STRATEGIES[strategy]
    out = dk.fused_dpo_loss(**inputs, **case.keywords(), strategy=name, scratch_bytes=scratch)
    leaves = [v for v in inputs.values() if isinstance(v, torch.Tensor) and v.requires_grad]
    first = torch.autograd.grad(out.loss, leaves, retain_graph=True)
    torch.autograd.grad(out.loss, leaves, torch.tensor(3.0), retain_graph=True)  # another upstream between
    second = torch.autograd.grad(out.loss, leaves)
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a, b)
        assert a.data_ptr() != b.data_ptr()


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("frozen", [False, True], ids=["trainable", "frozen"])
def test_second_derivatives_are_refused(frozen, strategy):
    case = Case(torch.float32, frozen=frozen)
    inputs = case.tensors()
    name, scratch = STRATEGIES[strategy]
    out = dk.fused_dpo_loss(**inputs, **case.keywords(), strategy=name, scratch_bytes=scratch)
    leaves = [inputs["hidden"]] if frozen else [inputs["hidden"], inputs["weight"]]
    for leaf in leaves:
        (grad,) = torch.autograd.grad(out.loss, leaf, create_graph=True)
        penalized = dk.fused_dpo_loss(**inputs, **case.keywords()).loss + grad.square().sum()
        with pytest.raises(RuntimeError, match="second derivatives of the fused losses"):
            torch.autograd.grad(penalized, leaves, retain_graph=True)


def test_create_graph_alone_is_no_error():
    inputs = Case(torch.float32).tensors()
    out = dk.fused_dpo_loss(**inputs)
    (plain,) = torch.autograd.grad(out.loss, inputs["hidden"], retain_graph=True)
    (grad,) = torch.autograd.grad(out.loss, inputs["hidden"], create_graph=True)
    assert torch.equal(grad, plain)


def test_hooks_and_accumulation_see_ordinary_gradients():
    inputs = Case(torch.float32).tensors()
    inputs["weight"].grad = torch.ones_like(inputs["weight"])
    seen = []
    inputs["hidden"].register_hook(seen.append)
    loss = dk.fused_dpo_loss(**inputs).loss
    (expected,) = torch.autograd.grad(loss, inputs["weight"], retain_graph=True)
    loss.backward()
    torch.testing.assert_close(inputs["weight"].grad, expected + 1, rtol=0, atol=0)
    assert len(seen) == 1


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_torch_func_grad(strategy):
    inputs = Case(torch.float64).tensors()
    name, scratch = STRATEGIES[strategy]
    others = {k: v for k, v in inputs.items() if k not in ("hidden", "weight")}

    def call(hidden, weight):
        return dk.fused_dpo_loss(hidden, weight, **others, strategy=name, scratch_bytes=scratch).loss

    leaves = (inputs["hidden"], inputs["weight"])
    expected = torch.autograd.grad(call(*leaves), leaves)
    got = torch.func.grad(call, argnums=(0, 1))(*(leaf.detach() for leaf in leaves))
    for a, b in zip(got, expected, strict=True):
        assert torch.equal(a, b)


# --- what there is no rule for: vmap and forward mode -----------------------------------------------------------------

# From torch 2.14 on the decompositions of forward mode warn of torch's own use of torch.jit.
forward_mode = pytest.mark.filterwarnings(r"ignore:`torch\.jit\.")
VMAP = r"is batched by vmap.*use dpo_kernels\.reference"
FORWARD = r"is part of a forward-mode differentiation.*use dpo_kernels\.reference"


def of_hidden(function):
    """A transform tried on the hidden states alone."""
    return lambda call, hidden, weight: function(lambda x: call(x, weight), hidden)


def batched_gradients(call, hidden, weight):
    for leaf in (hidden, weight):  # each has a gradient of its own to batch
        leaf = leaf.clone().requires_grad_()
        out = call(*((leaf, weight) if leaf.shape == hidden.shape else (hidden, leaf)))
        upstreams = torch.ones(3, *out.shape, dtype=out.dtype)
        with pytest.raises(RuntimeError, match=f"the upstream of .*{VMAP}"):
            torch.autograd.grad(out, leaf, upstreams, is_grads_batched=True, retain_graph=True)
    torch.autograd.grad(out, leaf, upstreams, is_grads_batched=True)


def dual_numbers(call, hidden, weight):
    with torch.autograd.forward_ad.dual_level():
        call(torch.autograd.forward_ad.make_dual(hidden, torch.ones_like(hidden)), weight)


def forward_over_reverse(call, hidden, weight):
    gradient = torch.func.grad(lambda x: call(x, weight).sum())
    torch.func.jvp(gradient, (hidden,), (hidden,))


def batched_pullback(call, hidden, weight):
    out, pullback = torch.func.vjp(lambda x: call(x, weight), hidden)
    torch.func.vmap(pullback)(torch.ones(3, *out.shape, dtype=out.dtype))


TRANSFORMS = {
    "vmap": (VMAP, of_hidden(lambda f, x: torch.func.vmap(f)(torch.stack([x, x])))),
    "vmap of the head": (VMAP, lambda f, x, w: torch.func.vmap(lambda w: f(x, w))(torch.stack([w, w]))),
    "vmap of grad": (VMAP, of_hidden(lambda f, x: torch.func.vmap(torch.func.grad(lambda x: f(x).sum()))(x[None]))),
    "vmap of a pullback": (VMAP, batched_pullback),
    "jacrev": (VMAP, of_hidden(lambda f, x: torch.func.jacrev(f)(x))),
    "is_grads_batched": (VMAP, batched_gradients),
    "vectorize": (VMAP, of_hidden(lambda f, x: torch.autograd.functional.jacobian(f, x, vectorize=True))),
    "jvp": (FORWARD, of_hidden(lambda f, x: torch.func.jvp(f, (x,), (x,)))),
    "jvp of the head": (FORWARD, lambda f, x, w: torch.func.jvp(lambda w: f(x, w), (w,), (w,))),
    "jvp of grad": (FORWARD, forward_over_reverse),
    "jacfwd": (f"({VMAP}|{FORWARD})", of_hidden(lambda f, x: torch.func.jacfwd(f)(x))),
    "hessian": (f"({VMAP}|{FORWARD})", of_hidden(lambda f, x: torch.func.hessian(lambda x: f(x).sum())(x))),
    "linearize": (FORWARD, of_hidden(lambda f, x: torch.func.linearize(f, x))),
    "dual numbers": (FORWARD, dual_numbers),
}
FUSED = {
    "loss": lambda hidden, weight, labels, **how: (
        dk.fused_dpo_loss(hidden, weight, labels, reference_free=True, **how).loss
    ),
    "by pair": lambda hidden, weight, labels, **how: (
        dk.fused_dpo_loss(hidden, weight, labels, reference_free=True, reduction="none", **how).loss
    ),
    "sequences": dk.fused_sequence_logps,
    "tokens": dk.fused_token_logps,
}


@forward_mode
@pytest.mark.parametrize("function", FUSED)
@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("frozen", [False, True], ids=["trainable", "frozen"])
def test_transforms_without_a_rule_are_refused(frozen, transform, function):
    """The loss of a trainable head has a pass of its own."""
    words, run = TRANSFORMS[transform]
    inputs = small(bias=False)
    hidden, weight = (leaf.detach() for leaf in differentiable(inputs))
    weight.requires_grad_(not frozen)

    def call(hidden, weight):
        return FUSED[function](hidden, weight, inputs["labels"])

    with pytest.raises(RuntimeError, match=words):
        run(call, hidden, weight)


@forward_mode
@pytest.mark.usefixtures("_fresh_compiler")
@pytest.mark.parametrize("function", FUSED)
def test_forward_mode_is_refused_in_a_graph_too(function):
    """There it would give a tangent of 0."""
    inputs = Case(F64).tensors()
    weight, labels = inputs["weight"].detach(), inputs["labels"]

    def tangent(hidden):
        return torch.func.jvp(lambda x: FUSED[function](x, weight, labels), (hidden,), (torch.ones_like(hidden),))

    with pytest.raises(Exception, match=FORWARD):
        torch.compile(tangent, backend="aot_eager", fullgraph=True)(inputs["hidden"].detach())


@forward_mode
@pytest.mark.parametrize("name", ["ref_logps", "ref_token_logps", "denominator", "token_weights", "kl", "delta"])
def test_what_is_never_differentiated_is_not_either_in_forward_mode(name):
    """A tangent of 0 would be a number and wrong."""
    inputs = Case(F64).tensors()
    hidden, weight, labels = (inputs[each].detach() for each in ("hidden", "weight", "labels"))
    by_token = tuple(labels.shape)
    shapes = {"ref_logps": (labels.shape[0],), "token_weights": by_token, "ref_token_logps": by_token}
    value = torch.ones(shapes.get(name, ()), dtype=F64)
    free = {} if name.startswith("ref_") else {"reference_free": True}

    def call(given):
        if name in ("kl", "delta"):
            liked = torch.ones(labels.shape[0], dtype=torch.bool)
            kind = "kto" if name == "kl" else "bco"
            return dk.fused_kto_loss(hidden, weight, labels, liked, loss_type=kind, **{name: given}, **free).loss
        return dk.fused_dpo_loss(hidden, weight, labels, **{name: given}, **free).loss

    with pytest.raises(RuntimeError, match=f"{name} is part of a forward-mode"):
        torch.func.jvp(call, (value,), (torch.ones_like(value),))


# is_grads_batched asks for the words of a refusal itself; linearize's own tracing warns.
@forward_mode
@pytest.mark.parametrize("transform", [name for name in TRANSFORMS if name not in ("is_grads_batched", "linearize")])
def test_the_reference_has_the_rules_that_the_fused_ones_have_not(transform):
    inputs = small(bias=False)
    leaves = (leaf.detach() for leaf in differentiable(inputs))
    TRANSFORMS[transform][1](
        lambda hidden, weight: dpo_loss_reference(hidden, weight, inputs["labels"], reference_free=True).loss, *leaves
    )


ONE_BATCHED = {
    "labels": lambda x: {"labels": x["labels"].expand(2, -1, -1)},
    "bias": lambda x: {"bias": x["bias"].expand(2, -1)},
    "token_weights": lambda x: {"token_weights": torch.ones(2, *x["labels"].shape)},
    "ref_logps": lambda x: {"ref_logps": torch.zeros(2, 4)},
    "rows": lambda x: {"hidden": x["hidden"][0], "rows": torch.zeros(2, *x["labels"].shape, dtype=torch.int64)},
    "ref_token_logps": lambda x: {"ref_token_logps": torch.zeros(2, *x["labels"].shape)},
    "ref_hidden": lambda x: {"ref_hidden": x["hidden"].expand(2, -1, -1, -1)},
    "denominator": lambda x: {"denominator": torch.ones(2)},
    "margin": lambda x: {"margin": torch.ones(2, 2), "loss_type": "odpo"},
    "pair_weights": lambda x: {"pair_weights": torch.ones(2, 2)},
}


@pytest.mark.parametrize("name", ONE_BATCHED)
def test_the_argument_that_is_batched_is_named(name):
    inputs = {name: value.detach() for name, value in small().items()} | {"ref_logps": torch.zeros(4)}
    options = ONE_BATCHED[name](inputs)
    batched = options.pop(name)
    if name in ("ref_hidden", "ref_token_logps"):
        del inputs["ref_logps"]
    with pytest.raises(RuntimeError, match=f"{name} {VMAP}"):
        torch.func.vmap(lambda one: dk.fused_dpo_loss(**inputs | options | {name: one}).loss)(batched)


@pytest.mark.parametrize("name", ["desirable", "kl", "delta"])
def test_what_is_batched_of_single_sequences_is_named(name):
    inputs = {name: value.detach() for name, value in small().items()} | {"desirable": torch.ones(4) > 0}
    batched = inputs["desirable"].expand(2, -1) if name == "desirable" else torch.ones(2)
    with pytest.raises(RuntimeError, match=f"{name} {VMAP}"):
        torch.func.vmap(lambda one: dk.fused_kto_loss(**inputs | {name: one}, reference_free=True).loss)(batched)


@forward_mode
def test_a_margin_with_a_tangent_is_refused_like_one_with_a_gradient():
    inputs = {name: value.detach() for name, value in small().items()}

    def loss(margin):
        return dk.fused_dpo_loss(**inputs, ref_logps=torch.zeros(4), loss_type="odpo", margin=margin).loss

    with pytest.raises(ValueError, match="margin requires a gradient"):
        loss(torch.ones(2, requires_grad=True))
    with pytest.raises(RuntimeError, match=f"margin {FORWARD}"):
        torch.func.jvp(loss, (torch.ones(2),), (torch.ones(2),))


@forward_mode
def test_losses_of_log_probs_are_plain_torch_and_have_every_rule():
    policy = torch.randn(3, 2, 4, generator=torch.Generator().manual_seed(2), dtype=F64)
    ref = torch.full((4,), -2.0, dtype=F64)

    def loss(both):
        return dk.dpo_loss(both[0], both[1], ref, ref)[0]

    together = torch.func.vmap(loss)(policy)
    torch.testing.assert_close(together, torch.stack([loss(one) for one in policy]))
    one = policy[0]
    forward, backward = torch.func.jacfwd(loss)(one), torch.func.jacrev(loss)(one)
    assert forward.abs().max() > 0
    torch.testing.assert_close(forward, backward)


@pytest.mark.slow
@pytest.mark.usefixtures("_fresh_compiler")
def test_export():
    class Step(torch.nn.Module):
        def forward(self, hidden, weight, labels, ref_logps):
            return _named(hidden, weight, labels, ref_logps).loss

    inputs = {k: v.detach() for k, v in Case().tensors().items()}
    exported = torch.export.export(Step(), (), kwargs=inputs)
    assert torch.equal(exported.module()(**inputs), _named(**inputs).loss)


def test_offloaded_saved_tensors():
    inputs = Case(torch.float32).tensors()
    leaves = (inputs["hidden"], inputs["weight"])
    expected = torch.autograd.grad(dk.fused_dpo_loss(**inputs).loss, leaves)
    with torch.autograd.graph.save_on_cpu():
        loss = dk.fused_dpo_loss(**inputs).loss
    for a, b in zip(torch.autograd.grad(loss, leaves), expected, strict=True):
        assert torch.equal(a, b)


def test_meta_tensors_have_shapes_only():
    out = dk.fused_dpo_loss(
        torch.empty(4, 3, 8, device="meta", requires_grad=True),
        torch.empty(9, 8, device="meta"),
        torch.zeros(4, 3, dtype=torch.int64, device="meta"),
        reference_free=True,
        reduction="none",
    )
    assert out.loss.is_meta
    assert out.loss.shape == out.chosen_rewards.shape == (2,)


@pytest.mark.parametrize("function", [dk.fused_dpo_loss, dk.fused_sequence_logps])
def test_a_compiled_call_takes_another_scratch(function):
    """It is a number that the tracer makes symbolic, and must not end in a string."""
    inputs = small(bias=False)
    given = {"reference_free": True} if function is dk.fused_dpo_loss else {}

    def step(scratch_bytes):
        out = function(inputs["hidden"], inputs["weight"], inputs["labels"], scratch_bytes=scratch_bytes, **given)
        return out.loss if function is dk.fused_dpo_loss else out.sum()

    compiled = torch.compile(step, backend="aot_eager", fullgraph=True)
    for scratch_bytes in (10_000, 11_000, 12_000):
        torch.testing.assert_close(compiled(scratch_bytes), step(scratch_bytes))


def test_a_divisor_that_changes_needs_no_graph_of_its_own():
    """The number of pairs on all ranks differs by step, and torch gives up after eight graphs."""
    inputs, graphs = Case(torch.float32).tensors(), []

    def loss(denominator):
        given = (inputs["hidden"], inputs["weight"], inputs["labels"])
        return dk.fused_dpo_loss(*given, ref_logps=inputs["ref_logps"], backend="torch", denominator=denominator).loss

    def counted(graph, examples):
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    compiled = torch.compile(loss, backend=counted, fullgraph=True)
    for number in (2.0, 3.0, 4.0, 5.0, 6.0):
        torch.testing.assert_close(compiled(number), loss(number))
    torch._dynamo.reset()
    assert len(graphs) <= 2
