"""Megatron's hook on several ranks: the head split by rows, with and without sequence parallelism."""

from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist

from dpo_kernels.integrations.megatron import HeadContext, output_processor

S, B, H, V, PADDED = 6, 2, 5, 11, 16


def tensors() -> dict[str, torch.Tensor]:
    """The same on every rank."""
    g = torch.Generator().manual_seed(7)
    labels = torch.randint(0, V, (B, S), generator=g)
    labels[0, :2] = -100
    return {
        "hidden": torch.randn(S, B, H, generator=g, dtype=torch.float64),
        "weight": torch.randn(PADDED, H, generator=g, dtype=torch.float64),
        "labels": labels,
        "upstream": torch.randn(B, S, generator=g, dtype=torch.float64),
    }


def log_probs(sequence_parallel: bool) -> dict[str, Any]:
    """Log-probs and gradients of this rank's part."""
    rank, world = dist.get_rank(), dist.get_world_size()
    made = tensors()
    rows = made["weight"].chunk(world)[rank].clone().requires_grad_()
    hidden = (made["hidden"].chunk(world)[rank] if sequence_parallel else made["hidden"]).clone().requires_grad_()
    layer = SimpleNamespace(weight=rows, bias=None, tp_group=dist.group.WORLD)
    context = HeadContext(vocab_size=V, temperature=0.8)
    values = []
    for _ in range(2):  # the second call knows the sizes
        logps = output_processor(
            hidden_states=hidden,
            output_layer=layer,
            output_weight=None,
            labels=made["labels"],
            context=context,
            config=SimpleNamespace(sequence_parallel=sequence_parallel),
            scale_logits=lambda logits: 0.5 * logits,
        )
        values.append(logps.detach())
    grads = torch.autograd.grad((logps * made["upstream"]).sum(), (hidden, rows))
    return {"logps": values, "hidden": grads[0], "rows": grads[1]}
