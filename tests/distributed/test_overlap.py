"""What a split head exchanges while a GPU computes."""

import pytest
import torch

import dpo_kernels as dk
from dpo_kernels.distributed import VocabParallel
from dpo_kernels.kernels.torch_kernels import TorchKernels
from tests.distributed import lockstep


@pytest.mark.parametrize(("rows", "scratch_bytes"), [((20, 17), 1500), ((37, 0), 2600)])
def test_the_last_product_for_dw_hides_the_sum_of_dx(monkeypatch, rows, scratch_bytes):
    """The sum begins after the last dX and before the last dW; a rank without rows takes part in it at the end."""
    happened = {0: [], 1: []}

    def told(what, function, rank_of):
        def run(*arguments, **options):
            happened[rank_of(*arguments, **options)].append(what)
            return function(*arguments, **options)

        return run

    current = {}
    monkeypatch.setattr(
        lockstep, "_all_reduce", told("sum of dX", lockstep._all_reduce, lambda tensor, group, async_op: group.mine)
    )
    for name, what in (("grad_hidden", "dX"), ("grad_weight", "dW")):
        plain = getattr(TorchKernels, name)
        monkeypatch.setattr(TorchKernels, name, told(what, plain, lambda *a, **o: current["group"].mine))

    def step(group, rank):
        current["group"] = group
        g = torch.Generator().manual_seed(0)
        hidden = torch.randn(4, 3, 8, generator=g, dtype=torch.float64, requires_grad=True)
        weight = torch.randn(37, 8, generator=g, dtype=torch.float64)
        labels = torch.randint(37, (4, 3), generator=g)
        first = sum(rows[:rank])
        shard = weight[first : first + rows[rank]].clone().requires_grad_()
        options = {"reference_free": True, "backend": "torch", "scratch_bytes": scratch_bytes}
        parallel = VocabParallel(group)
        assert dk.explain(hidden, shard, labels, vocab_parallel=parallel, **options).chunks == 2
        dk.fused_dpo_loss(hidden, shard, labels, vocab_parallel=parallel, **options).loss.backward()
        whole = weight.clone().requires_grad_()
        other = hidden.detach().clone().requires_grad_()
        before = list(happened[rank])
        dk.fused_dpo_loss(other, whole, labels, **options).loss.backward()
        happened[rank] = before
        torch.testing.assert_close(hidden.grad, other.grad, rtol=1e-12, atol=1e-14)

    lockstep.run(2, step)
    busy = ["dX", "dW", "dX", "sum of dX", "dW"]
    assert happened == {0: busy, 1: busy if rows[1] else ["sum of dX"]}
