"""Public functions for feedback that does not come in pairs: labelled sequences and ranked groups."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from dpo_kernels import checks
from dpo_kernels.engine.run import run, sequence_output
from dpo_kernels.inputs.make_problem import sequence_problem
from dpo_kernels.inputs.options import Arguments, group
from dpo_kernels.inputs.tensors import Batch
from dpo_kernels.loss_interface import SequenceLoss
from dpo_kernels.losses import GROUP_LOSSES, KTO_LOSSES, GroupLoss, LabelledLoss
from dpo_kernels.outputs import SequenceLossOutput
from dpo_kernels.planning.plan import Execution, make_plan
from dpo_kernels.shapes import sum_dtype

# What these losses take of the options of ``fused_dpo_loss``, in its order.
OPTIONS = (
    "bias",
    "ref_hidden",
    "ref_weight",
    "ref_bias",
    "ref_logps",
    "reference_free",
    "cu_seqlens",
    "token_weights",
    "shift",
    "ignore_index",
    "logit_scale",
    "softcap",
    "reduction",
    "denominator",
    "stats",
    "backend",
    "strategy",
    "scratch_bytes",
    "max_scored_tokens",
    "main_grad",
    "main_grad_scale",
)


def fused_kto_loss(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    desirable: Tensor,
    *,
    loss_type: str = "kto",
    beta: float = 0.1,
    kl: float | Tensor = 0.0,
    delta: float | Tensor = 0.0,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
    **options: Any,
) -> SequenceLossOutput:
    """KTO and unpaired BCO from hidden states: each sequence is desirable or not, on its own.

    ``loss_type="kto"`` (Ethayarajh et al., arXiv 2402.01306, eq. 8): ``1 - sigmoid(beta x - z0)`` for a desirable
    sequence, ``1 - sigmoid(z0 - beta x)`` for another, x its log-ratio to the reference and ``z0 = beta max(0, kl)``.
    ``loss_type="bco"`` (Jung et al., arXiv 2404.04656): ``-log sigmoid(beta x - delta)`` and
    ``-log sigmoid(delta - beta x)``.

    Args:
        hidden: ``(S, T, H)``, or ``(N, H)`` with ``cu_seqlens``; any number of sequences.
        weight: ``(V, H)``.
        labels: ``(S, T)`` or ``(N,)``.
        desirable: ``(S,)`` bool.
        loss_type: "kto" or "bco".
        beta: inverse temperature, at least 0.
        kl: estimate of the policy's KL to the reference in nats, the mean log-ratio of mismatched completions
            (``kto_kl``); a number or a 0-d tensor, never differentiated.
        delta: reward shift of BCO, a number or a 0-d tensor (``RunningDelta``).
        desirable_weight: factor of desirable sequences' losses.
        undesirable_weight: factor of the others'.
        **options: as in ``fused_dpo_loss``: bias, ref_hidden, ref_weight, ref_bias, ref_logps ``(S,)``, reference_free,
            cu_seqlens, token_weights, shift, ignore_index, logit_scale, softcap, reduction ("mean" is over sequences),
            denominator, stats, backend, strategy, scratch_bytes, max_scored_tokens.

    Returns:
        ``SequenceLossOutput``.

    Raises:
        ValueError, TypeError, RuntimeError: as ``fused_dpo_loss``.

    """
    checks.check_choice("loss_type", loss_type, KTO_LOSSES)
    for given in (("desirable", desirable), ("kl", kl), ("delta", delta)):
        checks.refuse_batched(*given)
        checks.refuse_forward_mode(*given)
    checks.check_tensor("desirable", desirable)
    if desirable.dtype != torch.bool:
        raise TypeError(f"desirable must be of bool, got {desirable.dtype}")
    beta = _check_beta(beta)
    shift = beta * _zero_dimensional("kl", kl).clamp(min=0) if loss_type == "kto" else _zero_dimensional("delta", delta)
    factors = [checks.check_number(*pair) for pair in (
        ("desirable_weight", desirable_weight), ("undesirable_weight", undesirable_weight),
    )]  # fmt: skip

    def bound(batch: Batch) -> LabelledLoss:
        if desirable.shape != (batch.sequences,):
            raise ValueError(
                f"desirable has shape {tuple(desirable.shape)}, expected ({batch.sequences},): one for each sequence"
            )
        checks.check_device("desirable", desirable, "hidden", batch.hidden)
        if shift.is_meta:
            checks.check_device("kl" if loss_type == "kto" else "delta", shift, "hidden", batch.hidden)
        real = sum_dtype(desirable.device)
        liked, disliked = (torch.full((), f, dtype=real, device=desirable.device) for f in factors)
        weights = torch.where(desirable, liked, disliked)
        return LabelledLoss(loss_type, beta, desirable, weights, shift.to(batch.hidden.device, real))

    return _run((hidden, weight, labels), bound, options, "fused_kto_loss")


def fused_group_loss(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    group_sizes: Sequence[int],
    *,
    loss_type: str = "plackett_luce",
    beta: float = 0.1,
    **options: Any,
) -> SequenceLossOutput:
    """A ranking of K completions of one prompt, or one chosen and m rejected; groups adjacent, the best first.

    ``loss_type="plackett_luce"`` (Rafailov et al., arXiv 2305.18290, appendix A.3) or "infonce" (Chen et al., arXiv
    2402.05369), on ``beta`` times the log-ratios; with groups of two both are DPO.

    Args:
        hidden: ``(S, T, H)``, or ``(N, H)`` with ``cu_seqlens``; S the sum of ``group_sizes``.
        weight: ``(V, H)``.
        labels: ``(S, T)`` or ``(N,)``.
        group_sizes: sequences of each group, integers of at least 1.
        loss_type: "plackett_luce" or "infonce".
        beta: inverse temperature, at least 0.
        **options: as in ``fused_kto_loss``; "mean" is over groups.

    Returns:
        ``SequenceLossOutput``.

    Raises:
        ValueError, TypeError, RuntimeError: as ``fused_dpo_loss``.

    """
    checks.check_choice("loss_type", loss_type, GROUP_LOSSES)
    beta = _check_beta(beta)
    if not isinstance(group_sizes, tuple | list):
        raise TypeError(f"group_sizes must be a list of integers, got {type(group_sizes).__name__}")
    for size in group_sizes:
        checks.check_count("group_sizes", size, least=1)

    def bound(batch: Batch) -> GroupLoss:
        if sum(group_sizes) != batch.sequences:
            raise ValueError(f"group_sizes sum to {sum(group_sizes)}, but there are {batch.sequences} sequences")
        return GroupLoss(loss_type, beta, tuple(group_sizes))

    return _run((hidden, weight, labels), bound, options, "fused_group_loss")


def _run(
    policy: tuple[Tensor, Tensor, Tensor],
    loss_of: Callable[[Batch], SequenceLoss],
    options: dict[str, Any],
    function: str,
) -> SequenceLossOutput:
    for name in options:
        if name not in OPTIONS:
            raise TypeError(f"{function}() got an unexpected option {name!r}; known: {', '.join(OPTIONS)}")
    arguments = Arguments.by_name({**dict(zip(("hidden", "weight", "labels"), policy, strict=True)), **options})
    problem = sequence_problem(arguments, loss_of, function)
    plan = make_plan(problem.workload, group(Execution, options))
    return sequence_output(problem, run(problem, plan))


def _check_beta(beta: float) -> float:
    beta = checks.check_number("beta", beta)
    if beta < 0:
        raise ValueError(f"beta must be >= 0, got {beta}")
    return beta


def _zero_dimensional(name: str, value: float | Tensor) -> Tensor:
    if not isinstance(value, Tensor):
        return torch.tensor(checks.check_number(name, value), dtype=torch.float64, device="cpu")
    checks.check_floating(name, value)
    if value.dim() != 0:
        raise ValueError(f"{name} must be a number or a 0-d tensor, got shape {tuple(value.shape)}")
    return value.detach().to(sum_dtype(value.device))
