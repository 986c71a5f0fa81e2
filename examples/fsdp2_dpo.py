"""DPO on a model that FSDP2 shards, in a training loop of your own.

Run it with ``torchrun --nproc-per-node 2 -m examples.fsdp2_dpo``, on GPUs with NCCL and elsewhere with gloo. The fused
loss runs in the head's own forward, where FSDP2 has gathered the head. Its gradient is reduced and sharded like every
other one.
"""

import argparse
import functools
import json
import os
import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.fsdp import fully_shard

from demo.options import at_least
from dpo_kernels import fused_sequence_logps
from dpo_kernels.integrations.transformers import fused_lm_head
from examples import material
from examples.plain_loop import loss, stacked, tokenised


def main(argv: list[str] | None = None) -> list[float]:
    """Train, print one line a step, and return the losses."""
    options = parse(argv)
    device = join()
    rank, world = dist.get_rank(), dist.get_world_size()
    model, tokenizer, texts, _ = material.load(options.real, options.pairs, 0, options.cache)
    rows = [tokenised(row, tokenizer) for row in texts]
    if len(rows) < options.batch * world:
        raise SystemExit(f"--pairs: {len(rows)} pairs are fewer than one step takes, {options.batch} on {world} ranks")
    random.Random(0).shuffle(rows)
    model = shard(model.to(device))
    optimizer = torch.optim.AdamW(model.parameters(), lr=options.learning_rate)

    def batches() -> Iterator[tuple[Sequence[dict[str, Any]], dict[str, Tensor]]]:
        """Yield this rank's part of each step, and the same as tensors."""
        for start in range(0, len(rows) - options.batch * world + 1, options.batch * world):
            mine = rows[start + rank * options.batch :][: options.batch]
            yield mine, to(device, stacked(mine, pad=tokenizer.pad_token_id, max_length=options.max_length))

    for row in rows:
        row["ref_logps"] = (0.0, 0.0)
    for mine, batch in batches():  # the reference is the policy before training
        for number, values in enumerate(reference(model, batch).view(2, -1).t().tolist()):
            mine[number]["ref_logps"] = values

    losses = []
    for _ in range(options.epochs):
        for _, batch in batches():
            out = call(model, batch, functools.partial(loss, batch, options.beta))
            out.loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            # Every rank has as many pairs, so that the mean over ranks is the mean over pairs.
            means = torch.stack([out.loss.detach(), (out.chosen_rewards - out.rejected_rewards).mean()])
            dist.all_reduce(means)
            losses.append(float(means[0]) / world)
            if rank == 0:
                print(json.dumps({"loss": losses[-1], "margin": float(means[1]) / world}), flush=True)
    return losses


def join() -> torch.device:
    """Join the ranks that torchrun has started, and return this rank's device."""
    local = int(os.environ.get("LOCAL_RANK", "0"))
    device = torch.device("cuda", local) if torch.cuda.is_available() else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if not dist.is_initialized():
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    return device


def shard(model: Any) -> Any:
    """Shard a model: a unit for each layer, one for the head, and one for the rest."""
    fused_lm_head(model).attach()
    for layer in model.model.layers:
        fully_shard(layer)
    if model.lm_head.weight is not model.model.embed_tokens.weight:  # a tied head belongs to the embedding's unit
        fully_shard(model.lm_head)
    return fully_shard(model).train()


def call(model: Any, batch: dict[str, Tensor], work: Any) -> Any:
    """Call the model, so that FSDP2 sees one ordinary forward."""
    return model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False, fused_call=work)


@torch.no_grad()
def reference(model: Any, batch: dict[str, Tensor]) -> Tensor:
    """Compute the log-prob of each sequence."""

    def work(outputs: Any, hidden: Tensor, weight: Tensor, options: dict[str, Any]) -> Tensor:
        return fused_sequence_logps(hidden, weight, batch["labels"], shift=True, **options)

    logps: Tensor = call(model, batch, work)
    return logps


def to(device: torch.device, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """Move a batch to a device."""
    return {name: value.to(device) for name, value in batch.items()}


def parse(argv: list[str] | None) -> argparse.Namespace:
    """Read the options, which are small by default."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--real", action="store_true", help="SmolLM2-135M and movie reviews, as in make demo")
    parser.add_argument("--pairs", type=at_least(1), default=32)
    parser.add_argument("--epochs", type=at_least(1), default=2)
    parser.add_argument("--batch", type=at_least(1), default=4, help="pairs of a step on each rank")
    parser.add_argument("--max-length", type=at_least(1), default=128)
    parser.add_argument("--beta", type=at_least(0.0, float), default=0.1)
    parser.add_argument("--learning-rate", type=at_least(0.0, float), default=None)
    parser.add_argument("--cache", type=Path, default=Path(".demo_cache"))
    options = parser.parse_args(argv)
    if options.learning_rate is None:
        options.learning_rate = 1e-5 if options.real else 1e-2
    return options


if __name__ == "__main__":
    main()
    dist.destroy_process_group()
