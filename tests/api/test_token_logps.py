"""Log-probs and statistics of single positions, as TRL's chunked head returns them: the entropy's own derivative."""

import pytest
import torch

pytest.importorskip("trl", reason="trl is not installed")

from dpo_kernels.integrations import token_logps

ROWS, H, V = 11, 5, 13
F64 = torch.float64


def problem(dtype=F64, bias=True):
    g = torch.Generator().manual_seed(4)
    hidden, weight, bias = (
        torch.randn(*shape, generator=g, dtype=F64).to(dtype).requires_grad_() for shape in ((ROWS, H), (V, H), (V,))
    )
    return hidden, weight, bias, torch.randint(0, V, (ROWS,), generator=g)


@pytest.mark.parametrize("rows", [1, 4, ROWS])
@pytest.mark.parametrize("head", [{}, {"temperature": 0.7, "softcap": 3.0, "logit_scale": 1.3}], ids=["", "capped"])
def test_the_entropys_gradient_is_the_sum_over_its_tiles(monkeypatch, rows, head):
    """Of hidden states, head and bias, whatever the number of rows in a tile: 11, 3 and 1 of them."""
    monkeypatch.setattr(token_logps, "ENTROPY_TILE", rows * V)
    hidden, weight, bias, targets = problem()
    _, entropy, *_ = token_logps.token_logps(hidden, weight, bias, targets, outputs=("entropy",), **head)
    logits = torch.addmm(bias, hidden, weight.t())
    if head:
        logits = 3.0 * torch.tanh(1.3 * logits / 3.0) / 0.7
    logp = logits.log_softmax(-1)
    wanted = -(logp.exp() * logp).sum(-1)
    torch.testing.assert_close(entropy.to(F64), wanted, rtol=1e-6, atol=1e-6)
    upstream = torch.randn(ROWS, generator=torch.Generator().manual_seed(5), dtype=F64)
    leaves = (hidden, weight, bias)
    # The entropies themselves come in float32, and the derivative is formed with them.
    for ours, right in zip(
        torch.autograd.grad(entropy, leaves, upstream.to(entropy.dtype)),
        torch.autograd.grad(wanted, leaves, upstream),
        strict=True,
    ):
        torch.testing.assert_close(ours, right, rtol=1e-5, atol=1e-6)
