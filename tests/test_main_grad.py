"""The head's gradient added to a given buffer while the loss is computed."""

import pytest
import torch

import dpo_kernels as dk
from dpo_kernels.kernels import extension
from dpo_kernels.kernels.torch_rows import TorchRows
from tests.cases import STRATEGIES, Case
from tests.test_dispatch import problem

BACKENDS = ["torch", *(["cpp"] if extension.why_not("cpu") is None else [])]
CHUNKED = [name for name, (strategy, _) in STRATEGIES.items() if strategy == "chunked"]


def gradients(case, upstream, main_grad, **options):
    """Gradients of ``upstream * loss`` by name; the head's is what ``main_grad`` has gained, where it is given."""
    inputs = case.tensors()
    leaves = {name: t for name, t in inputs.items() if isinstance(t, torch.Tensor) and t.requires_grad}
    if main_grad is not None:
        options |= {"main_grad": main_grad.clone(), "main_grad_scale": upstream}
    out = dk.fused_dpo_loss(**inputs, **case.options, **options)
    (out.loss * upstream).backward()
    found = {name: leaf.grad for name, leaf in leaves.items()}
    if main_grad is not None:
        assert found["weight"] is None
        found["weight"] = options["main_grad"] - main_grad
    return out.loss.detach(), found


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("strategy", CHUNKED)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("loss", ["sigmoid", "ipo", "nca_pair"])
@pytest.mark.parametrize("upstream", [1.0, 1 / 3, 65536.0])
def test_it_gains_what_autograd_would_have_got(upstream, loss, dtype, strategy, backend):
    case = Case(dtype, bias=True, weights=True, options={"loss_type": loss})
    options = {"strategy": "chunked", "scratch_bytes": STRATEGIES[strategy][1], "backend": backend}
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    start = torch.randn(case.tensors()["weight"].shape, dtype=wide)
    loss_value, wanted = gradients(case, upstream, None, **options)
    same_value, found = gradients(case, upstream, start, **options)
    assert torch.equal(loss_value, same_value)
    assert found.keys() == wanted.keys()
    # The head's goes through a difference with what was there, and is not rounded to its dtype.
    size = float(wanted["weight"].abs().max())
    rounding = {torch.float32: 1e-6, torch.float64: 1e-13, torch.bfloat16: 4e-3}[dtype]
    for name, grad in wanted.items():
        tolerance = rounding * max(size, float(grad.abs().max())) + (1e-6 if wide == torch.float32 else 1e-14)
        torch.testing.assert_close(found[name].to(grad.dtype), grad, rtol=0, atol=tolerance)


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
    shapes, original = [], TorchRows.buffer
    monkeypatch.setattr(
        TorchRows, "buffer", lambda self, device, *shape: shapes.append(shape) or original(self, device, *shape)
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
