"""Megatron's hook on several ranks: the head split by rows, with and without sequence parallelism."""

from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist

from dpo_kernels.distributed import ContextParallel
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


def two_heads(split_first: bool) -> list[torch.Tensor]:
    """Log-probs of one context for two heads with the same rows: one is split over the ranks, one is whole on each."""
    rank, world = dist.get_rank(), dist.get_world_size()
    alone = [dist.new_group([each]) for each in range(world)][rank]
    made = tensors()
    context = HeadContext()
    split = SimpleNamespace(weight=made["weight"].chunk(world)[rank], bias=None, tp_group=dist.group.WORLD)
    whole = SimpleNamespace(weight=made["weight"], bias=None, tp_group=alone)
    return [
        output_processor(
            hidden_states=made["hidden"],
            output_layer=layer,
            output_weight=None,
            labels=made["labels"],
            context=context,
            config=SimpleNamespace(sequence_parallel=False),
        )
        for layer in ((split, whole) if split_first else (whole, split))
    ]


def split_sequences(loss: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
    """The loss of a pair whose sequences are split over the ranks, and the gradient of this rank's hidden states."""
    rank, world = dist.get_rank(), dist.get_world_size()
    made = tensors()
    hidden = made["hidden"].chunk(world)[rank].clone().requires_grad_()
    value = output_processor(
        hidden_states=hidden,
        output_layer=SimpleNamespace(weight=made["weight"], bias=None),
        output_weight=None,
        labels=made["labels"].chunk(world, dim=1)[rank],
        context=HeadContext(vocab_size=V, loss=loss | {"context_parallel": ContextParallel(dist.group.WORLD)}),
        config=SimpleNamespace(sequence_parallel=False, context_parallel_size=world),
    )
    return value.detach(), torch.autograd.grad(value, hidden)[0]


def beside_megatrons_layer() -> list[tuple[torch.Tensor, ...]]:
    """Log-probs and gradients by Megatron's own output layer and cross-entropy, and by ours on that layer."""
    from megatron.core import parallel_state, tensor_parallel
    from megatron.core.transformer import TransformerConfig

    world = dist.get_world_size()
    parallel_state.initialize_model_parallel(tensor_model_parallel_size=world)
    config = TransformerConfig(
        num_layers=1,
        hidden_size=H,
        num_attention_heads=world,
        kv_channels=4,
        use_cpu_initialization=True,
        params_dtype=torch.float32,
        tensor_model_parallel_size=world,
    )
    layer = tensor_parallel.ColumnParallelLinear(
        H, PADDED, config=config, init_method=torch.nn.init.normal_, bias=False, gather_output=False
    )
    made = tensors()
    labels, upstream = made["labels"].clamp(min=0), made["upstream"].float()
    context = HeadContext(group=parallel_state.get_tensor_model_parallel_group())
    found = []
    for ours in (False, True):
        hidden = made["hidden"].float().requires_grad_()
        if ours:
            logps = output_processor(
                hidden_states=hidden, output_layer=layer, output_weight=None, labels=labels, context=context,
                config=config,
            )  # fmt: skip
        else:
            losses = tensor_parallel.vocab_parallel_cross_entropy(layer(hidden)[0], labels.t().contiguous())
            logps = -losses.t()
        found.append((logps.detach(), *torch.autograd.grad((logps * upstream).sum(), (hidden, layer.weight))))
    return found
