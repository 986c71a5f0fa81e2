"""Checks of the head whose gradient is asked for as a sparse tensor of rows."""

from typing import Any

from torch import Tensor

from dpo_kernels.inputs.options import Arguments

# An engine that shards the head tells so by one of these attributes of the weight that it has gathered: ZeRO-3 by the
# first, and ``distributed.sharded_heads`` marks those of FSDP2 by the second.
ENGINES = {"ds_tensor": "ZeRO-3", "gathered_by": "FSDP2"}


def check_sparse_weight_grad(arguments: Arguments, *, tracing: bool) -> None:
    """Raise ``ValueError`` where a sparse gradient of the head would be refused later, or become dense.

    Under a tracer nothing runs that could make one, since the operators return dense tensors.
    """
    if not arguments.gradient.sparse_weight_grad:
        return
    weight = arguments.policy.weight
    if tracing:
        raise ValueError(
            "sparse_weight_grad is not supported inside torch.compile, whose operators return dense gradients: leave "
            "the call out of the graph"
        )
    if arguments.main_grad.main_grad is not None:
        raise ValueError("sparse_weight_grad does not go with main_grad, a dense buffer: autograd gets the rows")
    if not weight.requires_grad:
        return
    for attribute, engine in ENGINES.items():
        if hasattr(weight, attribute):
            raise ValueError(f"sparse_weight_grad does not go with {engine}, which reduces dense gradients over ranks")
    if not weight.is_leaf:
        raise ValueError(
            "sparse_weight_grad needs a weight that is a parameter itself: this one comes out of an operation (a view, "
            "FSDP1, a merged adapter), whose backward pass takes dense gradients"
        )
    if _depends_on(arguments.policy.hidden, weight):
        raise ValueError(
            "sparse_weight_grad does not go with a tied head: hidden was computed with the same weight, whose other "
            "gradient is dense, and so is the sum"
        )


def _depends_on(tensor: Tensor, parameter: Tensor) -> bool:
    """Return whether the graph of a tensor ends in a parameter. Reentrant checkpoints hide theirs."""
    waiting: list[Any] = [tensor.grad_fn]
    seen = set()
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if getattr(node, "variable", None) is parameter:
            return True
        waiting += [following for following, _ in node.next_functions]
    return False
