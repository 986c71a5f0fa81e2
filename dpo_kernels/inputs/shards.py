"""What is split over ranks: this rank's rows of the head, with labels that count from the first, and its tokens."""

from dataclasses import replace

from dpo_kernels.checks import traced
from dpo_kernels.inputs.options import Layout, MainGradOptions, PolicyTensors, ReferenceTensors
from dpo_kernels.inputs.packing import pack, with_rows
from dpo_kernels.inputs.tensors import Batch, check_tensor
from dpo_kernels.problem import VocabShard
from dpo_kernels.shapes import PackedTokens


def split_work(policy: PolicyTensors, layout: Layout) -> tuple[PolicyTensors, VocabShard | None]:
    """Check what is split over ranks. Without ``context_parallel`` and ``vocab_parallel`` nothing is.

    Returns the policy with the rows of its head that are tokens, and where they stand in the vocabulary.
    """
    _check_split_tokens(policy, layout)
    _check_shared_rows(policy, layout)
    parallel = policy.vocab_parallel
    if parallel is None:
        return policy, None
    if not hasattr(parallel, "shard_of"):
        raise TypeError(f"vocab_parallel must be a VocabParallel, got {type(parallel).__name__}")
    check_tensor("hidden", policy.hidden)
    check_tensor("weight", policy.weight)
    if policy.bias is not None:
        check_tensor("bias", policy.bias)
    num_rows, shard = parallel.shard_of(policy.weight)
    if num_rows == policy.weight.shape[0]:
        return policy, shard
    bias = None if policy.bias is None else policy.bias[:num_rows]
    return replace(policy, weight=policy.weight[:num_rows], bias=bias), shard


def _check_split_tokens(policy: PolicyTensors, layout: Layout) -> None:
    parallel = policy.context_parallel
    if parallel is None:
        return
    if not hasattr(parallel, "share"):
        raise TypeError(f"context_parallel must be a ContextParallel, got {type(parallel).__name__}")
    check_tensor("hidden", policy.hidden)
    if layout.shift:
        raise ValueError(
            "context_parallel goes with labels that were shifted before the split, shift=False: the label of a rank's "
            "last position lies on the next rank"
        )


def _check_shared_rows(policy: PolicyTensors, layout: Layout) -> None:
    if policy.rows is None:
        return
    if layout.shift:
        raise ValueError("rows says which row predicts each label, so labels are not shifted: leave shift=False")
    for name, given in (("vocab_parallel", policy.vocab_parallel), ("context_parallel", policy.context_parallel)):
        if given is not None:
            raise ValueError(f"rows does not go with {name} yet")
    check_tensor("hidden", policy.hidden)
    if traced(policy.hidden):
        raise ValueError("rows is not supported inside torch.compile yet: leave the call out of the graph")


def split_reference(reference: ReferenceTensors, policy: PolicyTensors, num_rows: int) -> ReferenceTensors:
    """Return the reference with the same rows of its own head, which is split as the policy's is.

    ``num_rows`` are those of the policy's weight as the caller gave it, padding included.
    """
    if policy.vocab_parallel is None:
        return reference
    weight, bias = reference.ref_weight, reference.ref_bias
    for name, tensor in (("ref_weight", weight), ("ref_bias", bias)):
        if tensor is None:
            continue
        check_tensor(name, tensor)
        if tensor.dim() and tensor.shape[0] != num_rows:
            raise ValueError(f"{name} has {tensor.shape[0]} rows, expected this rank's {num_rows}, as weight has")
    kept = policy.weight.shape[0]
    return replace(
        reference,
        ref_weight=None if weight is None else weight[:kept],
        ref_bias=None if bias is None else bias[:kept],
    )


def split_main_grad(options: MainGradOptions, policy: PolicyTensors, num_rows: int) -> MainGradOptions:
    """Return the buffer's rows that are tokens; it has ``num_rows`` as the weight the caller gave."""
    buffer, kept = options.main_grad, policy.weight.shape[0]
    if policy.vocab_parallel is None or buffer is None or kept == num_rows:
        return options
    check_tensor("main_grad", buffer)
    if buffer.shape[:1] != (num_rows,):
        return options
    return replace(options, main_grad=buffer[:kept])


def pack_labels_of(batch: Batch, layout: Layout, shard: VocabShard | None, *, stacked: bool) -> PackedTokens:
    """Pack the scored tokens; with a shard their labels count from its first row, and may lie outside of it."""
    if shard is None:
        packed = pack(batch, layout, stacked=stacked)
        return packed if batch.rows is None else with_rows(packed, batch.rows, batch.hidden.shape[0], batch.width)
    packed = pack(batch, layout, stacked=stacked, vocab=shard.total)
    return replace(packed, labels=packed.labels - shard.start)
