"""Compiled autograd makes a graph of the backward pass alone, and the forward pass has run as ever."""

import pytest
import torch

import dpo_kernels as dk
from tests.small import TRAINED, S, T, gradients, problem, same

ROWS = torch.arange(S * T).flip(0).view(S, T)
SPARSE = {"gradient": "sparse", "tau": 0.1, "seed": 3}


def step(how, trained, compiled):
    """The gradients of a loss."""
    data = problem(*trained)
    if "rows" in how:
        data["hidden"] = data["hidden"].detach().reshape(S * T, -1).requires_grad_()
    loss = dk.fused_dpo_loss(**data, **how).loss
    if not compiled:
        return gradients(loss, data)
    torch._dynamo.reset()
    with torch._dynamo.compiled_autograd._enable(torch.compile(backend="eager")):
        loss.backward()
    return {name: data[name].grad for name in trained}


@pytest.mark.parametrize("trained", [TRAINED, ("hidden",)], ids=["trainable", "frozen"])
@pytest.mark.parametrize("how", [{}, {"strategy": "recompute"}, SPARSE], ids=["auto", "recompute", "sparse"])
def test_gives_the_same(how, trained):
    eager = step(how, trained, compiled=False)
    for name, grad in step(how, trained, compiled=True).items():
        same(grad, eager[name])


@pytest.mark.parametrize("trained", [TRAINED, ("hidden",)], ids=["trainable", "frozen"])
@pytest.mark.parametrize("strategy", ["auto", "recompute"])
def test_rows_are_refused(strategy, trained):
    with pytest.raises(RuntimeError, match="rows does not go with compiled autograd yet"):
        step({"rows": ROWS, "strategy": strategy}, trained, compiled=True)


def test_a_sample_that_is_drawn_again_is_refused():
    with pytest.raises(RuntimeError, match="gradient='sparse' does not go with compiled autograd yet"):
        step(SPARSE | {"strategy": "recompute"}, TRAINED, compiled=True)


@pytest.mark.parametrize("strategy", ["auto", "recompute"])
def test_a_sparse_gradient_of_the_head_is_refused(strategy):
    """By torch itself where the forward pass has formed it."""
    with pytest.raises(RuntimeError, match=r"(?i)compiled autograd"):
        step(SPARSE | {"strategy": strategy, "sparse_weight_grad": True}, TRAINED, compiled=True)
