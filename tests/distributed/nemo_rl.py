"""NeMo-RL's log-probs and loss on several ranks: the head split by rows, hidden states along the tokens."""

from typing import Any

import torch
import torch.distributed as dist

from dpo_kernels.distributed import VocabParallel
from dpo_kernels.integrations.nemo_rl import from_parallel_hidden_states_to_logprobs, preference_loss

T, B, H, V = 6, 4, 5, 12
F64 = torch.float64
GATHER_OUTPUT = None  # as NeMo-RL passes it where nobody has said otherwise


def tensors(dtype: torch.dtype = F64) -> dict[str, torch.Tensor]:
    """The same on every rank."""
    g = torch.Generator().manual_seed(11)
    return {
        "hidden": torch.randn(T, B, H, generator=g, dtype=F64).to(dtype),
        "weight": torch.randn(V, H, generator=g, dtype=F64).to(dtype),
        "upstream": torch.randn(B, T - 1, generator=g, dtype=F64).to(dtype),
        "input_ids": torch.randint(0, V, (B, T), generator=g),
        "token_mask": torch.tensor([[0, 0, 1, 1, 1, 1], [0, 0, 1, 1, 0, 0], [0, 1, 1, 1, 0, 0], [0, 1, 1, 1, 1, 0]]),
        "sample_mask": torch.ones(B, dtype=dtype),
        "reference_policy_logprobs": (-3 * torch.rand(B, T, generator=g, dtype=F64)).to(dtype),
    }


def part(made: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor, tuple[int, int]]:
    """This rank's tokens and rows, and the bounds of these."""
    rank, world = dist.get_rank(), dist.get_world_size()
    hidden, rows = (made[name].chunk(world)[rank].clone().requires_grad_() for name in ("hidden", "weight"))
    return hidden, rows, (rank * (V // world), (rank + 1) * (V // world))


def log_probs(chunk_size: int | None) -> dict[str, Any]:
    """Log-probs and gradients of this rank's part."""
    made = tensors()
    hidden, rows, (start, stop) = part(made)
    logps = from_parallel_hidden_states_to_logprobs(
        hidden,
        rows,
        GATHER_OUTPUT,
        made["input_ids"],
        vocab_start_index=start,
        vocab_end_index=stop,
        inference_only=False,
        tp_group=dist.group.WORLD,
        cp_group=dist.new_group([dist.get_rank()], use_local_synchronization=True),
        chunk_size=chunk_size,
    )
    return {"logps": logps.detach(), "grads": torch.autograd.grad((logps * made["upstream"]).sum(), (hidden, rows))}


def loss() -> dict[str, Any]:
    """The loss, its metrics, and the gradients of this rank's part."""
    made = tensors()
    hidden, rows, (start, stop) = part(made)
    parallel = VocabParallel(dist.group.WORLD, start=start, stop=stop, sequence_sharded_hidden=True)
    options = {"sft_loss_weight": 0.3, "sft_average_log_probs": True, "vocab_parallel": parallel}
    value, metrics = preference_loss(hidden.transpose(0, 1), rows, made, torch.tensor(6.0), **options)
    return {"loss": value.detach(), "metrics": metrics, "grads": torch.autograd.grad(value, (hidden, rows))}


def refused(what: str) -> str:
    """What is said of sequences that are split over ranks, or of bounds that are too narrow by one row."""
    made = tensors()
    hidden, rows, (start, stop) = part(made)
    stop -= what == "bounds"
    given = (hidden, rows, GATHER_OUTPUT, made["input_ids"], start, stop, dist.group.WORLD)
    try:
        from_parallel_hidden_states_to_logprobs(*given, cp_group=dist.group.WORLD if what == "sequences" else None)
    except ValueError as error:
        return str(error)
    return ""


def beside_nemo_rls_function() -> list[tuple[torch.Tensor, ...]]:
    """Log-probs and gradients by NeMo-RL's own function, and by ours, in float32."""
    from nemo_rl.distributed import model_utils

    made = tensors(torch.float32)
    hidden, rows, bounds = part(made)
    found = []
    for function in (model_utils.from_parallel_hidden_states_to_logprobs, from_parallel_hidden_states_to_logprobs):
        given = (hidden, rows, GATHER_OUTPUT, made["input_ids"], *bounds, dist.group.WORLD)
        logps = function(*given, chunk_size=4)
        found.append((logps.detach(), *torch.autograd.grad((logps * made["upstream"]).sum(), (hidden, rows))))
    return found
