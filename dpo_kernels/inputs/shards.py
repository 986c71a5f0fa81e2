"""A head that is split over ranks: this rank's rows, and labels that count from the first of them."""

from dataclasses import replace
from typing import Any

from dpo_kernels.inputs.options import Layout, PolicyTensors, ReferenceTensors
from dpo_kernels.inputs.packing import pack
from dpo_kernels.inputs.tensors import Batch
from dpo_kernels.problem import VocabShard, traced
from dpo_kernels.shapes import PackedTokens


def split_head(policy: PolicyTensors) -> tuple[PolicyTensors, VocabShard | None]:
    """Return the policy with the rows of its head that are tokens, and where they stand in the vocabulary."""
    parallel = policy.vocab_parallel
    if parallel is None:
        return policy, None
    if not hasattr(parallel, "shard_of"):
        raise TypeError(f"vocab_parallel must be a VocabParallel, got {type(parallel).__name__}")
    if traced(policy.hidden):
        raise ValueError("vocab_parallel is not supported inside torch.compile yet: leave the call out of the graph")
    num_rows, shard = parallel.shard_of(policy.weight)
    if num_rows == policy.weight.shape[0]:
        return policy, shard
    bias = None if policy.bias is None else policy.bias[:num_rows]
    return replace(policy, weight=policy.weight[:num_rows], bias=bias), shard


def split_reference(reference: ReferenceTensors, policy: PolicyTensors) -> ReferenceTensors:
    """Return the reference with the same rows of its own head."""
    if policy.vocab_parallel is None:
        return reference
    num_rows = policy.weight.shape[0]
    weight = None if reference.ref_weight is None else reference.ref_weight[:num_rows]
    bias = None if reference.ref_bias is None else reference.ref_bias[:num_rows]
    return replace(reference, ref_weight=weight, ref_bias=bias)


def check_ranks(parallel: Any, batch: Batch, facts: tuple[Any, ...]) -> None:
    """Raise on every rank where ranks were given problems that do not fit together."""
    if parallel is None:
        return
    hidden, head = batch.hidden, batch.head
    needs = (hidden.requires_grad, head.weight.requires_grad, head.bias is not None)
    kind = (tuple(hidden.shape), str(hidden.dtype), str(head.weight.dtype), batch.sequences, needs)
    parallel.check_same((*kind, head.logit_scale, head.softcap, *facts), hidden.device)


def pack_labels_of(batch: Batch, layout: Layout, shard: VocabShard | None, *, stacked: bool) -> PackedTokens:
    """Pack the scored tokens; with a shard their labels count from its first row, and may lie outside of it."""
    if shard is None:
        return pack(batch, layout, stacked=stacked)
    packed = pack(batch, layout, stacked=stacked, vocab=shard.total)
    return replace(packed, labels=packed.labels - shard.start)
