"""The head's gradient added to a given buffer while the loss is computed."""

import sys

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import dpo_kernels as dk
from dpo_kernels.kernels.torch_kernels import TorchKernels
from dpo_kernels.reference import dpo_loss_reference
from tests.cases import STRATEGIES, Case, rounded_tile, run, widened
from tests.problems import problem
from tests.small import BACKENDS
from tests.tolerance import RELATIVE_L2_BAR, relative_l2, violations

CHUNKED = [name for name, (strategy, _) in STRATEGIES.items() if strategy == "chunked"]


def gradients(case, upstream, main_grad, **options):
    """Gradients of ``upstream * loss`` by name; the head's is what ``main_grad`` has gained."""
    inputs = case.tensors()
    buffer = main_grad.clone()
    how = options | {"main_grad": buffer, "main_grad_scale": upstream}
    out = dk.fused_dpo_loss(**inputs, **case.keywords(), **how)
    (out.loss * upstream).backward()
    assert inputs["weight"].grad is None
    found = {f"d{name}": inputs[name].grad for name in ("hidden", "bias")}
    return out.loss.detach(), found | {"dweight": buffer - main_grad}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("strategy", CHUNKED)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("loss", ["sigmoid", "ipo", "nca_pair"])
@pytest.mark.parametrize("upstream", [1.0, 1 / 3, 65536.0])
def test_it_gains_what_autograd_would_have_got(upstream, loss, dtype, strategy, backend):
    """By the oracle and the tolerance rule; the head's gain is not rounded to its dtype, and is held to more."""
    case = Case(dtype, bias=True, weights=True, options={"loss_type": loss})
    how = {"strategy": "chunked", "scratch_bytes": STRATEGIES[strategy][1], "backend": backend}
    inputs = case.tensors()
    oracle = run(dpo_loss_reference, widened(inputs), upstream, **case.keywords())
    plain = run(dpo_loss_reference, inputs, upstream, **case.keywords())
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    # As large as what is added, so that the difference below keeps its digits.
    start = torch.randn(oracle["dweight"].shape).to(wide) * oracle["dweight"].std().to(wide)
    loss_value, found = gradients(case, upstream, start, **how)
    broken = violations("loss", loss_value, oracle["loss"], plain["loss"], dtype, gradient=False)
    for name, grad in found.items():
        rounded = grad.to(dtype)
        twice = name == "dweight" and rounded_tile(backend, dtype)
        broken += violations(name, rounded, oracle[name], plain[name], dtype, gradient=True, two_roundings=twice)
    assert not broken
    # One rounding, that of the tile, or none.
    bar = RELATIVE_L2_BAR[dtype if rounded_tile(backend, dtype) else wide]
    assert relative_l2(found["dweight"], oracle["dweight"]) <= bar


def test_accumulation_over_two_halves_is_one_batch():
    inputs = Case(torch.float64).tensors()
    weight = inputs.pop("weight")
    main_grad = torch.zeros_like(weight, requires_grad=False)
    whole = dk.fused_dpo_loss(weight=weight, **inputs)
    whole.loss.backward()
    pairs = inputs["hidden"].shape[0] // 2
    for part in ([0], list(range(1, pairs))):
        rows = [*part, *(pairs + i for i in part)]
        some = {name: value[rows] if isinstance(value, torch.Tensor) else value for name, value in inputs.items()}
        some["hidden"] = some["hidden"].detach()
        dk.fused_dpo_loss(weight=weight, **some, denominator=pairs, main_grad=main_grad).loss.backward()
    torch.testing.assert_close(main_grad, weight.grad, rtol=1e-12, atol=1e-14)


def test_weight_grad_itself_is_a_buffer():
    hidden, weight, labels = problem(pairs=1)
    dk.fused_dpo_loss(hidden, weight, labels, reference_free=True).loss.backward()
    once = weight.grad.clone()
    dk.fused_dpo_loss(hidden, weight, labels, reference_free=True, main_grad=weight.grad).loss.backward()
    torch.testing.assert_close(weight.grad, 2 * once)


def test_groups_and_kto_have_it_too():
    hidden, weight, labels = problem(pairs=1)
    free = {"reference_free": True}

    def group(**extra):
        return dk.fused_group_loss(hidden, weight, labels, [2], loss_type="infonce", **free, **extra).loss

    def kto(**extra):
        return dk.fused_kto_loss(hidden, weight, labels, torch.tensor([True, False]), **free, **extra).loss

    for loss in (group, kto):
        weight.grad, buffer = None, torch.zeros_like(weight, requires_grad=False)
        loss().backward()
        loss(main_grad=buffer).backward()
        assert weight.grad.any()
        torch.testing.assert_close(buffer, weight.grad)


def test_no_memory_of_the_heads_size_is_taken(monkeypatch):
    hidden, weight, labels = problem(pairs=1)
    shapes, original = [], TorchKernels.buffer
    monkeypatch.setattr(
        TorchKernels, "buffer", lambda self, device, *shape: shapes.append(shape) or original(self, device, *shape)
    )
    options = {"reference_free": True, "backend": "torch"}
    dk.fused_dpo_loss(hidden, weight, labels, **options)
    assert tuple(weight.shape) in shapes
    shapes.clear()
    dk.fused_dpo_loss(hidden, weight, labels, **options, main_grad=torch.zeros_like(weight, requires_grad=False))
    assert tuple(weight.shape) not in shapes


def test_without_a_gradient_nothing_is_added():
    hidden, weight, labels = problem(pairs=1)
    buffer = torch.zeros_like(weight, requires_grad=False)
    with torch.no_grad():
        dk.fused_dpo_loss(hidden, weight, labels, reference_free=True, main_grad=buffer)
    assert not buffer.any()


def test_another_upstream_and_a_second_backward_are_refused():
    hidden, weight, labels = problem(pairs=1)

    def loss(**extra):
        buffer = torch.zeros_like(weight, requires_grad=False)
        return dk.fused_dpo_loss(hidden, weight, labels, reference_free=True, main_grad=buffer, **extra).loss

    with pytest.raises(RuntimeError, match=r"main_grad_scale=1\.0, but the loss was differentiated with 0\.5"):
        (loss() / 2).backward()
    value = loss(main_grad_scale=0.5)
    (value / 2).backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="a second one is refused"):
        (value / 2).backward()


@pytest.mark.parametrize("off", [1e-5, 1e-3, 1e-2, -1e-5, -1e-3])
@pytest.mark.parametrize("scale", [1.0, 65536.0, 1 / 3])
def test_an_upstream_that_is_nearly_the_one_announced_is_another(scale, off):
    """Only what float32 makes of the same number is the same: a thousandth off is a wrong gradient of the head."""
    hidden, weight, labels = problem(pairs=1)
    given = {"main_grad": torch.zeros_like(weight, requires_grad=False), "main_grad_scale": scale}
    loss = dk.fused_dpo_loss(hidden, weight, labels, reference_free=True, **given).loss
    with pytest.raises(RuntimeError, match="but the loss was differentiated with"):
        loss.backward(torch.tensor(scale * (1 + off)), retain_graph=True)
    assert hidden.grad is None
    value = dk.fused_dpo_loss(hidden, weight, labels, reference_free=True, **given).loss
    value.backward(torch.tensor(scale))  # in float32


def one(weight, **changes):
    return torch.zeros(**{"size": weight.shape, "dtype": torch.float32} | changes)


@pytest.mark.parametrize(
    ("error", "words", "changed"),
    [
        (TypeError, "main_grad must be torch.float32, in which", lambda w: {"main_grad": one(w, dtype=torch.bfloat16)}),
        (TypeError, "main_grad must be a tensor", lambda w: {"main_grad": 3}),
        (ValueError, "main_grad must have the shape of weight", lambda w: {"main_grad": torch.zeros(3, 8)}),
        (ValueError, "main_grad must be contiguous", lambda w: {"main_grad": torch.zeros(w.shape[::-1]).t()}),
        (ValueError, "must not require a gradient", lambda w: {"main_grad": one(w).requires_grad_()}),
        (ValueError, "main_grad is on meta", lambda w: {"main_grad": one(w, device="meta")}),
        (ValueError, "main_grad_scale must not be 0", lambda w: {"main_grad": one(w), "main_grad_scale": 0.0}),
        (TypeError, "main_grad_scale", lambda w: {"main_grad": one(w), "main_grad_scale": "much"}),
        (ValueError, "main_grad_scale goes with main_grad only", lambda w: {"main_grad_scale": 2.0}),
        (
            ValueError,
            "reduction='none'",
            lambda w: {"main_grad": one(w), "reduction": "none"},
        ),
        (
            ValueError,
            "the loss is coupled",
            lambda w: {"main_grad": one(w), "loss_type": "aot"},
        ),
        (ValueError, "strategy='recompute' was asked for", lambda w: {"main_grad": one(w), "strategy": "recompute"}),
    ],
)
def test_what_it_cannot_do_is_said(error, words, changed):
    hidden, weight, labels = problem(pairs=2)
    with pytest.raises(error, match=words):
        dk.fused_dpo_loss(hidden, weight, labels, ref_logps=torch.zeros(4), **changed(weight))


def test_a_frozen_head_has_no_gradient_to_add():
    hidden, weight, labels = problem(trainable=False, pairs=1)
    with pytest.raises(ValueError, match="weight does not require a gradient"):
        dk.fused_dpo_loss(hidden, weight, labels, reference_free=True, main_grad=one(weight))


def test_it_is_not_traced():
    hidden, weight, labels = problem(pairs=1)

    @torch.compile(fullgraph=True, backend="eager")
    def step(buffer):
        return dk.fused_dpo_loss(hidden, weight, labels, reference_free=True, main_grad=buffer).loss

    with pytest.raises(Exception, match=r"torch\.compile must not trace"):
        step(one(weight))


class OutOfMemoryAt(TorchDispatchMode):
    """Let the ``number``-th operation of torch fail as one that finds no memory."""

    def __init__(self, number):
        super().__init__()
        self.left = number

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.left -= 1
        if self.left == 0:
            raise torch.OutOfMemoryError("no memory")
        return func(*args, **kwargs or {})


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("dtype", "scratch_bytes"), [(torch.float32, None), (torch.float32, 3000), (torch.bfloat16, None)], ids=str
)
def test_an_error_at_any_place_leaves_no_part_of_a_gradient(dtype, backend, scratch_bytes):
    """Wherever memory ends, the buffer is what it was, or NaN with a note that says so."""
    hidden, weight, labels = problem(pairs=2, length=5, vocab=40)
    inputs = hidden.detach().to(dtype).requires_grad_(), weight.detach().to(dtype).requires_grad_(), labels
    untouched, lost, number = 0, 0, 0
    while True:
        number += 1
        buffer = torch.ones(inputs[1].shape)
        try:
            with OutOfMemoryAt(number):
                options = {"reference_free": True, "scratch_bytes": scratch_bytes, "backend": backend}
                dk.fused_dpo_loss(*inputs, main_grad=buffer, **options)
            break
        except torch.OutOfMemoryError as error:
            notes = "".join(getattr(error, "__notes__", []))
            if torch.equal(buffer, torch.ones_like(buffer)):
                assert not notes
                untouched += 1
            else:
                assert buffer.isnan().all()
                assert "main_grad is NaN now" in notes or sys.version_info < (3, 11)
                lost += 1
    assert untouched > 20
    assert lost > 5
    assert bool(buffer.isfinite().all())
