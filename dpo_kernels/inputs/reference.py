"""Checks of the reference in each of its forms: hidden states that are scored, cached log-probs, or none."""

from typing import NamedTuple

import torch
from torch import Tensor

from dpo_kernels.checks import check_device, traced
from dpo_kernels.inputs import notices
from dpo_kernels.inputs.options import Arguments, HeadOptions, PolicyTensors, ReferenceTensors
from dpo_kernels.inputs.tensors import Batch, check_float_tensor, check_floating, check_head, compute_dtype, shape
from dpo_kernels.problem import CachedTokenReference, ScoredReference
from dpo_kernels.shapes import Head, accumulation_dtype
from dpo_kernels.tiled_weight import frozen


class LossFacts(NamedTuple):
    """What errors about the reference say about the loss."""

    name: str
    needs_reference: bool


def check_reference(
    batch: Batch, policy: PolicyTensors, given: ReferenceTensors, options: HeadOptions, owner: LossFacts
) -> ScoredReference | CachedTokenReference | Tensor | None:
    """Check the reference, and return it in its form.

    Args:
        batch: checked tensors of the policy.
        policy: the policy's tensors as the caller has passed them.
        given: the reference's tensors as the caller has passed them.
        options: scale and softcap of the head, which both models share.
        owner: what errors say about the loss.

    Returns:
        A reference to be scored, or cached log-probs by token, or those ``(S,)`` in the caller's order, or None.

    """
    ref_hidden, ref_logps, hidden = given.ref_hidden, given.ref_logps, policy.hidden
    forms = {"ref_hidden": ref_hidden, "ref_logps": ref_logps, "ref_token_logps": given.ref_token_logps}
    names = [name for name, tensor in forms.items() if tensor is not None]
    if len(names) > 1:
        raise ValueError(f"{names[0]} and {names[1]} are both given; pass one of them")
    if given.reference_free and names:
        raise ValueError(f"reference_free=True and {names[0]} exclude each other")
    if names and not owner.needs_reference:
        raise ValueError(f"{names[0]} is given, but the loss {owner.name!r} has no reference; leave it out")
    for name, tensor in (("ref_weight", given.ref_weight), ("ref_bias", given.ref_bias)):
        if tensor is not None and ref_hidden is None:
            raise ValueError(f"{name} is given without ref_hidden")
    if ref_logps is not None:
        check_floating("ref_logps", ref_logps)
        if ref_logps.shape != (batch.sequences,):
            raise ValueError(
                f"ref_logps has shape {shape(ref_logps)}, expected ({batch.sequences},): one per sequence, "
                "in the order of the input"
            )
        check_device("ref_logps", ref_logps, "hidden", batch.hidden)
        notices.warn_of_16_bits("ref_logps", ref_logps)
        return ref_logps.detach()
    if given.ref_token_logps is not None:
        return _of_tokens(policy, given.ref_token_logps)
    if ref_hidden is None:
        if owner.needs_reference and not given.reference_free:
            raise ValueError(
                f"the loss {owner.name!r} needs a reference and got none: give ref_hidden, ref_logps or "
                "ref_token_logps, or say reference_free=True"
            )
        return None
    check_float_tensor("ref_hidden", ref_hidden)
    if ref_hidden.dim() != hidden.dim() or ref_hidden.shape[:-1] != hidden.shape[:-1]:
        raise ValueError(f"ref_hidden has shape {shape(ref_hidden)}, expected that of hidden {shape(hidden)} but for H")
    check_device("ref_hidden", ref_hidden, "hidden", batch.hidden)
    return _scored(batch, ref_hidden, given, options)


def check_divergence(
    arguments: Arguments,
    batch: Batch,
    reference: ScoredReference | CachedTokenReference | Tensor | None,
    wanted_by: str,
) -> None:
    """Raise unless the KL divergence from the reference can be computed. ``wanted_by`` says in errors what reads it."""
    if not isinstance(reference, ScoredReference):
        raise ValueError(
            f"{wanted_by} needs the KL divergence from the reference over the whole vocabulary: give ref_hidden, and "
            "ref_weight unless the heads are the same. Log-probs of the labels are not enough"
        )
    policy = arguments.policy
    for name, given in (("vocab_parallel", policy.vocab_parallel), ("context_parallel", policy.context_parallel)):
        if given is not None:
            raise ValueError(f"{wanted_by} does not go with {name} yet")
    if arguments.gradient.sampling is not None:
        raise ValueError(f"{wanted_by} does not go with gradient='sparse': the sample is one of the policy alone")
    if traced(batch.hidden):
        raise ValueError(f"{wanted_by} is not supported inside torch.compile yet: leave the call out of the graph")
    if accumulation_dtype(reference.compute_dtype) != accumulation_dtype(batch.compute_dtype):
        raise TypeError(
            f"{wanted_by} needs logits of one dtype, but ref_hidden computes in {reference.compute_dtype} and "
            f"hidden in {batch.compute_dtype}: convert one of them"
        )


def _of_tokens(policy: PolicyTensors, logps: Tensor) -> CachedTokenReference:
    """Check cached log-probs of tokens, and return them flattened."""
    check_floating("ref_token_logps", logps)
    if logps.shape != policy.labels.shape:
        raise ValueError(
            f"ref_token_logps has shape {shape(logps)}, expected the shape of labels {shape(policy.labels)}: "
            "one for each label, at its place"
        )
    check_device("ref_token_logps", logps, "hidden", policy.hidden)
    notices.warn_of_16_bits("ref_token_logps", logps)
    return CachedTokenReference(logps.detach().reshape(-1))


def _scored(batch: Batch, ref_hidden: Tensor, given: ReferenceTensors, options: HeadOptions) -> ScoredReference:
    """Check the reference's head, and return hidden states and head without gradients."""
    weight, bias, weight_name = given.ref_weight, given.ref_bias, "ref_weight"
    if weight is None:
        weight, weight_name = batch.head.weight, "weight (ref_weight=None shares it)"
        bias = batch.head.bias if bias is None else bias
        if weight.requires_grad and torch.is_grad_enabled():
            notices.warn_once(
                "ref_weight=None scores the reference with `weight`, which requires a gradient: the reference will "
                "drift with the policy. Pass the reference model's own head as ref_weight, or cached ref_logps."
            )
    elif bias is None and batch.head.bias is not None and weight.shape == batch.head.weight.shape:
        notices.warn_once(
            "bias is given, but a ref_weight of weight's shape comes without ref_bias: the reference is scored without "
            "a bias. Pass ref_bias, zeros where its head has none."
        )
    names = ("ref_hidden", weight_name, "ref_bias")
    head = check_head(ref_hidden, weight, bias, options, names, shard=batch.head.vocab == 0)
    ref_head = Head(
        frozen(head.weight),
        None if head.bias is None else head.bias.detach(),
        head.logit_scale,
        head.softcap,
    )
    if head.vocab != batch.head.vocab:
        raise ValueError(
            f"ref_weight has V = {head.vocab}, but weight has V = {batch.head.vocab}: the labels are shared"
        )
    return ScoredReference(
        hidden=ref_hidden.detach().reshape(-1, ref_hidden.shape[-1]),
        head=ref_head,
        compute_dtype=compute_dtype(ref_hidden, head.weight, ("ref_hidden", weight_name)),
    )
