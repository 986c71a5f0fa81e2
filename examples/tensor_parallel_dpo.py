"""DPO on a model that is split over GPUs by tensor parallelism, and copied by data parallelism.

Run it with ``torchrun --nproc-per-node 4 -m examples.tensor_parallel_dpo``: 2 x 2 processes, on GPUs with nccl, without
them on CPUs with gloo. Each group of ``--tensor-parallel`` processes holds the model once, and takes its share of the
pairs. Between the layers hidden states are split along the tokens (sequence parallelism). Every rank of a group scores
the same tokens with its own rows of the head.
"""

import argparse
import json
import os
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    PrepareModuleInput,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)

from demo.options import at_least
from dpo_kernels import fused_dpo_loss, fused_sequence_logps
from dpo_kernels.distributed import VocabParallel
from examples import material
from examples.plain_loop import refuse_to_train_nothing, stacked, tokenised

BY_TOKENS = Shard(1)  # of hidden states (sequences, tokens, H)


def main(argv: list[str] | None = None) -> list[float]:
    """Train, print one line a step on the first process, and return the losses."""
    options = parse(argv)
    mesh = make_mesh(options.tensor_parallel)
    data_parallel = mesh["dp"].size()
    if options.batch % data_parallel or options.pairs % options.batch:
        raise SystemExit(f"--batch must be a multiple of {data_parallel} copies of the model, and divide --pairs")
    model, tokenizer, texts, _ = material.load(False, options.pairs, 0, Path())
    rows: list[dict[str, Any]] = [{**tokenised(row, tokenizer), "ref_logps": (0.0, 0.0)} for row in texts]
    refuse_to_train_nothing(options, rows, 1)
    random.Random(0).shuffle(rows)
    split(model.to(mesh.device_type), mesh["tp"])

    share = options.batch // data_parallel
    begin = mesh["dp"].get_local_rank() * share
    batches = [
        stacked(rows[at + begin : at + begin + share], tokenizer.pad_token_id, options.max_length)
        for at in range(0, len(rows), options.batch)
    ]
    batches = [{name: value.to(mesh.device_type) for name, value in batch.items()} for batch in batches]
    with torch.no_grad():  # the reference is the model before training
        for batch in batches:
            hidden, weight, parallel = hidden_states_and_head(model, batch)
            batch["ref_logps"] = fused_sequence_logps(
                hidden, weight, batch["labels"], shift=True, vocab_parallel=parallel
            )

    optimizer = torch.optim.AdamW(model.parameters(), lr=options.learning_rate)
    losses = []
    for _ in range(options.epochs):
        for batch in batches:
            loss = step(model, batch, options.beta)
            average(mesh["dp"], [loss, *local_gradients(model)])
            norm: Any = torch.nn.utils.clip_grad_norm_(model.parameters(), options.largest_gradient)
            optimizer.step()
            optimizer.zero_grad()
            losses.append(float(loss))
            shown = {"loss": losses[-1], "grad_norm": float(norm.full_tensor())}  # every rank takes part in the sum
            if dist.get_rank() == 0:
                print(json.dumps(shown), flush=True)
    return losses


def make_mesh(tensor_parallel: int) -> DeviceMesh:
    """Make the mesh of all processes: copies of the model, and the processes that hold a copy together."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    world = int(os.environ["WORLD_SIZE"])
    if world % tensor_parallel:
        raise SystemExit(f"--tensor-parallel {tensor_parallel} does not divide {world} processes")
    return init_device_mesh(device, (world // tensor_parallel, tensor_parallel), mesh_dim_names=("dp", "tp"))


def split(model: Any, mesh: DeviceMesh) -> None:
    """Split a Llama over the ranks of ``mesh``: heads of attention, columns of the MLP, rows of both vocabularies.

    Norms and residuals see hidden states that are split along the tokens. The head is only split and never called.
    """
    column, row = ColwiseParallel(), RowwiseParallel(output_layouts=BY_TOKENS, use_local_output=False)
    plan: dict[str, Any] = {
        "model.embed_tokens": RowwiseParallel(
            input_layouts=Replicate(), output_layouts=BY_TOKENS, use_local_output=False
        ),
        "model.norm": SequenceParallel(),
        "lm_head": ColwiseParallel(),
    }
    for number in range(len(model.model.layers)):
        layer = f"model.layers.{number}."
        plan[layer + "input_layernorm"] = plan[layer + "post_attention_layernorm"] = SequenceParallel()
        plan[layer + "self_attn"] = PrepareModuleInput(
            input_kwarg_layouts={"hidden_states": BY_TOKENS}, desired_input_kwarg_layouts={"hidden_states": Replicate()}
        )
        plan[layer + "mlp"] = PrepareModuleInput(input_layouts=BY_TOKENS, desired_input_layouts=Replicate())
        for name in ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.gate_proj", "mlp.up_proj"):
            plan[layer + name] = column
        plan[layer + "self_attn.o_proj"] = plan[layer + "mlp.down_proj"] = row
    parallelize_module(model, mesh, plan)


def hidden_states_and_head(model: Any, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor, VocabParallel]:
    """Run the layers, and return what the loss takes.

    Returns:
        Hidden states ``(S, T, H)`` of all tokens, the same on every rank, this rank's rows of the head, and where they
        stand in the vocabulary.

    """
    hidden: DTensor = model.model(
        input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False
    ).last_hidden_state
    rows, parallel = VocabParallel.of(model.lm_head.weight, mesh_dim="tp")
    # The loss adds up the gradient of the hidden states over the ranks itself (reduce_hidden_grad=True). So each rank
    # gives back the whole gradient, and grad_placements must say Replicate. Partial would add it up once more. The way
    # back through redistribute only cuts out the rank's own tokens.
    # The other right choice is reduce_hidden_grad=False with Partial: then redistribute adds up, by reduce-scatter.
    whole = hidden.redistribute(placements=[Replicate()])
    return whole.to_local(grad_placements=[Replicate()]), rows, parallel


def step(model: Any, batch: dict[str, Tensor], beta: float) -> Tensor:
    """Compute the mean loss over the pairs of this batch, and the gradients of this copy of the model."""
    hidden, weight, parallel = hidden_states_and_head(model, batch)
    out = fused_dpo_loss(
        hidden,
        weight,
        batch["labels"],
        shift=True,
        ref_logps=batch["ref_logps"],
        beta=beta,
        vocab_parallel=parallel,
    )
    out.loss.backward()
    return out.loss.detach()


def local_gradients(model: Any) -> list[Tensor]:
    """Return this rank's part of every gradient, split as its parameter is.

    A norm sees some of the tokens only, so that ranks hold parts of a sum. They are added up here once, and not in each
    operation of the optimizer. The gradient of the head's rows is complete.
    """
    parts = []
    for parameter in model.parameters():
        parameter.grad = parameter.grad.redistribute(placements=parameter.placements)
        parts.append(parameter.grad.to_local())
    return parts


def average(copies: DeviceMesh, tensors: Sequence[Tensor]) -> None:
    """Average over the copies of the model, in place: each has the same number of pairs."""
    for tensor in tensors:
        dist.all_reduce(tensor, group=copies.get_group())
        tensor /= copies.size()


def parse(argv: list[str] | None) -> argparse.Namespace:
    """Read the options, which are small by default."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--tensor-parallel", type=at_least(1), default=2, help="processes that hold a copy of the model"
    )
    parser.add_argument("--pairs", type=at_least(1), default=16)
    parser.add_argument("--epochs", type=at_least(1), default=2)
    parser.add_argument("--batch", type=at_least(1), default=4, help="pairs in a step, of all copies together")
    parser.add_argument("--max-length", type=at_least(1), default=128)
    parser.add_argument("--beta", type=at_least(0.0, float), default=0.1)
    parser.add_argument("--learning-rate", type=at_least(0.0, float), default=1e-2)
    parser.add_argument("--largest-gradient", type=at_least(0.0, float), default=1.0, help="norm to clip gradients to")
    return parser.parse_args(argv)


if __name__ == "__main__":
    main()
    dist.destroy_process_group()
