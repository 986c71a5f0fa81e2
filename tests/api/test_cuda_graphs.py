"""With a static capacity a compiled step has no tensor on the CPU, for which inductor would give up CUDA graphs.

Tensors without memory stand for those of a GPU. No GPU is needed to see where a graph's tensors lie.
"""

import pytest
import torch
from functorch.compile import make_boxed_func
from torch._dynamo.backends.common import aot_autograd

import dpo_kernels as dk

CAPACITY = 12


def devices_of(call, trainable=True):
    """The types of the devices of all tensors in the graphs of a step, forward and backward."""
    found = set()

    def keep(graph, inputs):
        for node in graph.graph.nodes:
            value = node.meta.get("val")
            values = value if isinstance(value, tuple | list) else [value]
            found.update(each.device.type for each in values if isinstance(each, torch.Tensor))
        return make_boxed_func(graph.forward)

    torch.compiler.reset()
    hidden = torch.empty(4, 5, 8, device="meta", requires_grad=True)
    weight = torch.empty(32, 8, device="meta", requires_grad=trainable)
    labels = torch.empty(4, 5, dtype=torch.int64, device="meta")
    ref_logps = torch.empty(4, device="meta")
    backend = aot_autograd(fw_compiler=keep, bw_compiler=keep)
    torch.compile(call, backend=backend, fullgraph=True)(hidden, weight, labels, ref_logps).backward()
    torch.compiler.reset()
    return found


CALLS = {
    "loss": lambda h, w, y, ref, n: dk.fused_dpo_loss(h, w, y, ref_logps=ref, max_scored_tokens=n).loss,
    "ipo": lambda h, w, y, ref, n: dk.fused_dpo_loss(h, w, y, ref_logps=ref, loss_type="ipo", max_scored_tokens=n).loss,
    "by pair": lambda h, w, y, ref, n: dk.fused_dpo_loss(
        h, w, y, ref_logps=ref, reduction="none", max_scored_tokens=n
    ).loss.sum(),
    "log-probs": lambda h, w, y, ref, n: dk.fused_sequence_logps(h, w, y, max_scored_tokens=n).sum(),
    "tokens": lambda h, w, y, ref, n: dk.fused_token_logps(h, w, y, max_scored_tokens=n).sum(),
}


@pytest.mark.parametrize("trainable", [True, False], ids=["trainable", "frozen"])
@pytest.mark.parametrize("name", CALLS)
def test_no_tensor_of_a_static_step_lies_on_the_cpu(name, trainable):
    assert devices_of(lambda *tensors: CALLS[name](*tensors, CAPACITY), trainable) == {"meta"}


def test_without_a_capacity_the_host_learns_the_counts():
    assert devices_of(lambda *tensors: CALLS["loss"](*tensors, None)) == {"cpu", "meta"}
