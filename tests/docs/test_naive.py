"""The plain DPO of ``dpo_kernels.naive`` is the oracle's, autograd's and the fused library's, and it stays short."""

import inspect

import torch

from dpo_kernels import fused_dpo_loss, naive
from dpo_kernels.naive import dpo_gradients, dpo_loss
from dpo_kernels.reference import dpo_loss_reference
from tests.small import problem, same

BETA = 0.7


def plain_problem():
    """Three ragged pairs in float64, one sequence of them without a scored token."""
    data = problem("hidden", "weight")
    del data["bias"]
    return data


def autograd_of(loss, data):
    return torch.autograd.grad(loss, [data["hidden"], data["weight"]])


def test_the_value_is_the_oracles_and_that_of_the_fused_loss():
    data = plain_problem()
    loss = dpo_loss(**data, beta=BETA).detach()
    same(loss, dpo_loss_reference(**data, beta=BETA).loss.detach())
    same(loss, fused_dpo_loss(**data, beta=BETA).loss.detach())


def test_the_value_by_hand():
    """A head of zeros gives each of 4 tokens log-prob -log 4; the chosen sequence has one token less than the other."""
    labels = torch.tensor([[-100, 1], [2, 3]])
    loss = dpo_loss(torch.ones(2, 2, 3), torch.zeros(4, 3), labels, torch.zeros(2), beta=1.0)
    # u = -log 4 + 2 log 4 = log 4, and -log sigmoid(log 4) = log(1 + 1 / 4)
    torch.testing.assert_close(loss, torch.tensor(1.25).log())


def test_the_gradients_are_autograds_the_oracles_and_those_of_the_fused_loss():
    data = plain_problem()
    _, d_hidden, d_weight = dpo_gradients(**data, beta=BETA)
    for function in (dpo_loss_reference, fused_dpo_loss):
        expected = autograd_of(function(**data, beta=BETA).loss, data)
        same(d_hidden.detach(), expected[0])
        same(d_weight.detach(), expected[1])
    same(d_hidden.detach(), autograd_of(dpo_loss(**data, beta=BETA), data)[0])
    same(d_weight.detach(), autograd_of(dpo_loss(**data, beta=BETA), data)[1])


def test_the_gradient_of_the_logits_is_autograds():
    """With an identity for a head the hidden states are the logits themselves."""
    data = problem("hidden")
    logits = torch.randn(*data["labels"].shape, 11, dtype=torch.float64, requires_grad=True)
    identity = torch.eye(11, dtype=torch.float64)
    d_logits, d_hidden, _ = dpo_gradients(logits, identity, data["labels"], data["ref_logps"], BETA)
    (expected,) = torch.autograd.grad(dpo_loss(logits, identity, data["labels"], data["ref_logps"], BETA), logits)
    same(d_logits.detach(), expected)
    same(d_hidden.detach(), expected)
    assert not d_logits[data["labels"] == naive.NOT_SCORED].any()


def test_the_file_is_short_and_needs_torch_only():
    source = inspect.getsource(naive)
    assert len(source.splitlines()) <= 80
    imports = [line for line in source.splitlines() if line.startswith(("import ", "from "))]
    assert all(line.split()[1].partition(".")[0] == "torch" for line in imports)
