"""The arguments of a public function become a ``Problem``: they are checked, flattened and packed."""

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from dpo_kernels import losses
from dpo_kernels.checks import check_device, refuse_batched, refuse_forward_mode, traced
from dpo_kernels.inputs.divisors import check_main_grad, check_reduction
from dpo_kernels.inputs.options import Arguments, check_stats
from dpo_kernels.inputs.pair_order import STACKED, to_alternating
from dpo_kernels.inputs.reference import LossFacts, check_divergence, check_reference
from dpo_kernels.inputs.shards import pack_labels_of, split_main_grad, split_reference, split_work
from dpo_kernels.inputs.tensors import Batch, check_batch, check_tensor
from dpo_kernels.inputs.weight_layout import check_sparse_weight_grad
from dpo_kernels.loss_interface import SequenceLoss
from dpo_kernels.problem import CachedReference, CachedTokenReference, Problem, ScoredReference
from dpo_kernels.shapes import KL, NeedsGrad, Sampling, sum_dtype
from dpo_kernels.tiled_weight import TiledWeight

# The loss is made once the batch is known, because options with one value for each pair must fit it.
LossOfBatch = Callable[[Batch], SequenceLoss]


def pair_problem(arguments: Arguments, loss: losses.BoundLoss) -> Problem:
    """Return the problem of a loss of pairs, chosen and rejected."""

    def of_batch(batch: Batch) -> losses.BoundLoss:
        return losses.fit_to_batch(loss, batch.sequences // 2, batch.hidden.device)

    for name, value in loss.tensors.items():
        refuse_batched(name, value)
        refuse_forward_mode(name, value)
    return _problem(arguments, of_batch, LossFacts(loss.name, loss.needs_reference), paired=True)


def sequence_problem(arguments: Arguments, loss_of: Callable[[Batch], SequenceLoss], function: str) -> Problem:
    """Return the problem of a loss of single sequences or of groups, in the order of the input.

    Args:
        arguments: what the caller has passed.
        loss_of: makes the loss for a checked batch.
        function: name of the loss in errors.

    """
    return _problem(arguments, loss_of, LossFacts(function, True), paired=False)


def logps_problem(arguments: Arguments, *, per_token: bool) -> Problem:
    """Return the problem that asks for log-probs of sequences or of tokens."""
    layout = arguments.layout
    _check_tiled(arguments)
    policy, shard = split_work(arguments.policy, layout)
    batch = check_batch(policy, arguments.head, paired=False)
    return Problem(
        hidden=batch.hidden,
        head=batch.head,
        packed=pack_labels_of(batch, layout, shard, stacked=False),
        shard=shard,
        compute_dtype=batch.compute_dtype,
        needs_grad=gradients_wanted(batch),
        sampling=_sampling(arguments, batch),
        per_token=per_token,
        shift=layout.shift,
        static=layout.max_scored_tokens is not None,
        labels_shape=policy.labels.shape,
        result_dtype=batch.result_dtype,
    )


def _problem(arguments: Arguments, loss_of: LossOfBatch, facts: LossFacts, *, paired: bool) -> Problem:
    """Check everything that a loss takes, and return its problem with the sequences in the packed order."""
    ref_tensors, reduction, main_grad = arguments.reference, arguments.reduction, arguments.main_grad
    tensors = {
        "ref_hidden": ref_tensors.ref_hidden,
        "ref_weight": ref_tensors.ref_weight,
        "ref_bias": ref_tensors.ref_bias,
        "ref_logps": ref_tensors.ref_logps,
        "ref_token_logps": ref_tensors.ref_token_logps,
        "token_weights": arguments.policy.token_weights,
        "denominator": reduction.denominator,
        "token_denominator": reduction.token_denominator,
        "main_grad": main_grad.main_grad,
    }
    for name, value in tensors.items():
        refuse_batched(name, value)
        refuse_forward_mode(name, value)
    _check_tiled(arguments)
    policy, shard = split_work(arguments.policy, arguments.layout)
    batch = check_batch(policy, arguments.head, paired=paired)
    ref_tensors = split_reference(ref_tensors, policy, arguments.policy.weight.shape[0])
    main_grad = split_main_grad(main_grad, policy, arguments.policy.weight.shape[0])
    stats = check_stats(arguments.stats)
    if KL in stats and not facts.needs_reference:
        raise ValueError(f"stats='kl' does not go with the loss {facts.name!r}, which has no reference: leave it out")
    reference = check_reference(batch, policy, ref_tensors, arguments.head, facts)
    check_reduction(reduction, batch)
    buffer = check_main_grad(main_grad, batch)
    layout, stacked = arguments.layout, paired and arguments.layout.pairs == STACKED
    needs_grad, loss, cached = gradients_wanted(batch), loss_of(batch), _in_packed_order(reference, stacked)
    kl = KL in stats or loss.needs_kl
    if kl:
        check_divergence(arguments, batch, reference, f"the loss {facts.name!r}" if loss.needs_kl else "stats='kl'")
    # Packing is the last step: the GPU waits from its sync to the first GEMM.
    packed = pack_labels_of(batch, layout, shard, stacked=stacked)
    return Problem(
        hidden=batch.hidden,
        head=batch.head,
        packed=packed,
        compute_dtype=batch.compute_dtype,
        needs_grad=needs_grad,
        stats=stats,
        loss=loss,
        shard=shard,
        reference=cached,
        kl=kl,
        reduction=reduction.reduction,
        denominator=reduction.denominator,
        token_denominator=reduction.token_denominator,
        main_grad=buffer if needs_grad.head else None,
        sampling=_sampling(arguments, batch),
        shift=layout.shift,
        stacked=stacked,
        static=layout.max_scored_tokens is not None,
        labels_shape=arguments.policy.labels.shape,
        result_dtype=batch.result_dtype,
    )


def _check_tiled(arguments: Arguments) -> None:
    """Raise where a head in tiles cannot be used yet."""
    policy = arguments.policy
    for name, weight in (("weight", policy.weight), ("ref_weight", arguments.reference.ref_weight)):
        if not isinstance(weight, TiledWeight):
            continue
        if policy.vocab_parallel is not None:
            raise ValueError(f"{name} comes in tiles, which does not go with vocab_parallel yet")
        if arguments.gradient.sampling is not None:
            raise ValueError(f"{name} comes in tiles, which does not go with gradient='sparse'")
        check_tensor("hidden", policy.hidden)
        if traced(policy.hidden):
            raise ValueError(
                f"{name} comes in tiles, which torch.compile cannot trace: leave the call out of the graph"
            )


def _sampling(arguments: Arguments, batch: Batch) -> Sampling | None:
    """Return how gradients are sampled. Raise where that cannot be done yet.

    Inside a tracer the seed is a tensor. A number would be a part of the graph, which another one would need anew.
    """
    sampling = arguments.gradient.sampling
    if sampling is None:
        return None
    policy = arguments.policy
    check_sparse_weight_grad(arguments, tracing=traced(batch.hidden))
    for name, given in (("vocab_parallel", policy.vocab_parallel), ("context_parallel", policy.context_parallel)):
        if given is not None:
            raise ValueError(f"gradient='sparse' does not go with {name} yet: the samples of ranks would be the same")
    if not isinstance(sampling.seed, Tensor):
        if not traced(batch.hidden):
            return sampling
        return Sampling(sampling.tau, torch.full((), sampling.seed, dtype=torch.int64, device=batch.hidden.device))
    refuse_batched("seed", sampling.seed)
    check_device("seed", sampling.seed, "hidden", batch.hidden)
    return replace(sampling, seed=sampling.seed.clone())  # which the caller may change before the backward pass


def _in_packed_order(
    reference: ScoredReference | CachedTokenReference | Tensor | None, stacked: bool
) -> CachedReference | CachedTokenReference | ScoredReference | None:
    """Return the reference with its cached log-probs, if it has any, in the order of the packed sequences."""
    if not isinstance(reference, Tensor):
        return reference
    return CachedReference(to_alternating(reference, stacked, sum_dtype(reference.device)))


def gradients_wanted(batch: Batch) -> NeedsGrad:
    """Return which of hidden, weight and bias want a gradient now."""
    recording, head = torch.is_grad_enabled(), batch.head
    return NeedsGrad(
        recording and batch.hidden.requires_grad,
        recording and head.weight.requires_grad,
        recording and head.bias is not None and head.bias.requires_grad,
    )
