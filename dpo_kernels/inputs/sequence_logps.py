"""The tensors of ``dpo_loss``, which takes log-probs instead of hidden states."""

from typing import Any

import torch
from torch import Tensor

from dpo_kernels import checks
from dpo_kernels.checks import check_device
from dpo_kernels.inputs import notices
from dpo_kernels.inputs.tensors import check_floating, shape


def check_logps(
    policy: tuple[Tensor, Tensor],
    reference: tuple[Tensor | None, Tensor | None],
    tokens: tuple[Tensor | None, Tensor | None],
    reference_free: bool,
    needs_reference: bool,
    loss_name: str,
) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...], tuple[Tensor, ...]]:
    """Check the tensors of ``dpo_loss``, each a pair of chosen and rejected, all ``(P,)``.

    Args:
        policy: log-probs of the policy.
        reference: log-probs of the reference. Missing ones become 0.
        tokens: numbers of scored tokens. Missing ones become 1.
        reference_free: whether the caller says that there is no reference.
        needs_reference: whether the loss depends on a reference.
        loss_name: name of the loss in errors.

    Returns:
        Policy, reference and tokens in float32, or in float64 if a log-prob of the policy is float64. The reference is
        detached.

    """
    chosen = policy[0]
    for side, logps, ref, count in zip(("chosen", "rejected"), policy, reference, tokens, strict=True):
        _check_by_pair(f"policy_{side}_logps", logps, chosen)
        if ref is not None:
            _check_by_pair(f"ref_{side}_logps", ref, chosen)
            notices.warn_of_16_bits(f"ref_{side}_logps", ref)
        if count is not None:
            _check_by_pair(f"{side}_tokens", count, chosen, floating=False)
    sides = zip(("ref_chosen_logps", "ref_rejected_logps"), reference, strict=True)
    ref_names = [name for name, tensor in sides if tensor is not None]
    if ref_names and reference_free:
        raise ValueError(f"reference_free=True and {ref_names[0]} exclude each other; pass None for the reference")
    if ref_names and not needs_reference:
        raise ValueError(f"{ref_names[0]} is given, but the loss {loss_name!r} has no reference; pass None")
    if needs_reference and not reference_free and any(tensor is None for tensor in reference):
        raise ValueError(
            f"the loss {loss_name!r} needs a reference: give ref_chosen_logps and ref_rejected_logps, "
            "or say reference_free=True"
        )
    dtype = torch.float64 if torch.float64 in (policy[0].dtype, policy[1].dtype) else torch.float32
    zero, one = torch.zeros_like(chosen, dtype=dtype), torch.ones_like(chosen, dtype=dtype)
    return (
        tuple(t.to(dtype) for t in policy),
        tuple(zero if t is None else t.detach().to(dtype) for t in reference),
        tuple(one if t is None else t.to(dtype) for t in tokens),
    )


def check_divergences(
    given: tuple[Tensor | None, Tensor | None], like: Tensor, needs_kl: bool, loss_name: str
) -> tuple[Tensor | None, ...]:
    """Check the KL divergences of chosen and rejected sequences, both ``(P,)``. Return them in the dtype of ``like``.

    A loss with ``needs_kl`` needs both. Another one takes neither.
    """
    for name, tensor in zip(("chosen_kl", "rejected_kl"), given, strict=True):
        if needs_kl and tensor is None:
            raise ValueError(f"the loss {loss_name!r} needs chosen_kl and rejected_kl, and {name} is missing")
        if tensor is None:
            continue
        if not needs_kl:
            raise ValueError(f"{name} is given, but the loss {loss_name!r} does not read it; leave it out")
        _check_by_pair(name, tensor, like)
    return tuple(None if tensor is None else tensor.to(like.dtype) for tensor in given)


def _check_by_pair(name: str, tensor: Any, like: Tensor, *, floating: bool = True) -> None:
    check_floating(name, tensor) if floating else checks.check_real(name, tensor)
    if tensor.dim() != 1 or tensor.shape != like.shape:
        raise ValueError(f"{name} has shape {shape(tensor)}, expected (P,) as policy_chosen_logps {shape(like)}")
    check_device(name, tensor, "policy_chosen_logps", like)
