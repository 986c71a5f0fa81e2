"""``run`` carries out a plan: the reference, then the loss or log-probs, then the outputs for the caller."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor

from dpo_kernels.engine import autograd, both_heads, places
from dpo_kernels.engine.out_of_memory import saying_what_fits
from dpo_kernels.inputs.pair_order import to_callers_order
from dpo_kernels.outputs import DPOLossOutput, SequenceLossOutput
from dpo_kernels.planning.plan import Plan
from dpo_kernels.problem import CachedReference, CachedTokenReference, MainGrad, Problem, ScoredReference
from dpo_kernels.shapes import KL, STATS, TOKEN_LOGPS, number_like, sum_dtype

MAIN_GRAD_IS_LOST = (
    "dpo_kernels: the error came after a gradient was added to main_grad, or a part of one. main_grad is NaN now: zero "
    "it before the next step"
)


class Result(NamedTuple):
    """The results of a loss. Log-probs are in the packed order of sequences, statistics in the caller's."""

    loss: Tensor  # (), or one for each example with reduction="none"; it is differentiable
    policy_logps: Tensor  # (S,)
    ref_logps: Tensor  # (S,)
    stats: dict[str, Tensor]


def run(problem: Problem, plan: Plan) -> Result:
    """Compute the loss of a problem, its log-probs and its statistics."""
    assert problem.loss is not None, "a problem without a loss is one of run_logps"
    if problem.kl:
        return _run_both(problem, plan)
    # The reference comes first. A pass that forms gradients needs the coefficients, and these need the reference.
    ref_S = _reference_logps(problem, plan)
    denominator = _denominator(problem, ref_S)
    if plan.forms_gradients:
        loss, policy_S, means, tokens, _ = autograd.loss_and_gradients(problem, plan, ref_S, denominator)
    else:
        policy_S, means, tokens = autograd.logps(problem, plan)
        loss = _reduced(problem.loss(policy_S, ref_S, problem.total_counts), problem, denominator)
    return Result(loss, policy_S, ref_S, _statistics(problem, means, tokens))


def _run_both(problem: Problem, plan: Plan) -> Result:
    """Do the same where one pass reads the policy's head and the reference's."""
    assert problem.loss is not None, "a divergence is asked for beside a loss"
    zeros_S = torch.zeros_like(problem.packed.counts, dtype=sum_dtype(problem.hidden.device))
    denominator = _denominator(problem, zeros_S)
    if plan.forms_gradients:
        loss, policy_S, means, tokens, of_both = autograd.loss_and_gradients(problem, plan, zeros_S, denominator)
        ref_S, kl_S = of_both
    else:
        policy_S, kl_S, ref_S, means, tokens = both_heads.logps(problem, plan)
        kl = (kl_S,) if problem.kl_grad else ()
        loss = _reduced(problem.loss(policy_S, ref_S, problem.total_counts, *kl), problem, denominator)
    return Result(loss, policy_S, ref_S, _statistics(problem, means, tokens, kl_S))


def _reduced(losses_E: Tensor, problem: Problem, denominator: Tensor) -> Tensor:
    return losses_E if problem.reduction == "none" else losses_E.sum() / denominator


def run_logps(problem: Problem, plan: Plan) -> Tensor:
    """Compute differentiable log-probs, ``(S,)`` of sequences or in the shape of the labels for tokens."""
    out, _, _ = saying_what_fits(plan, lambda: autograd.logps(problem, plan))
    out = out.to(problem.result_dtype)
    return out.view(problem.labels_shape) if problem.per_token else out


def run_pairs(problem: Problem, plan: Plan) -> DPOLossOutput:
    """Compute the loss of pairs. The results have the caller's dtype."""
    with _guarding(problem.main_grad):
        result = saying_what_fits(plan, lambda: run(problem, plan))
        dtype, *by_sequence = _by_sequence(problem, result)
        # One rounding for all of them, into memory where chosen and rejected lie apart.
        apart = torch.empty(3, 2, by_sequence[0].shape[0] // 2, dtype=dtype, device=by_sequence[0].device)
        apart.copy_(torch.stack(by_sequence).view(3, -1, 2).transpose(1, 2))
        chosen_rewards, rejected_rewards, chosen, rejected, ref_chosen, ref_rejected = apart.flatten(0, 1).unbind()
        return DPOLossOutput(
            result.loss.to(dtype),
            chosen_rewards,
            rejected_rewards,
            chosen,
            rejected,
            ref_chosen,
            ref_rejected,
            result.stats,
        )


def run_sequences(problem: Problem, plan: Plan) -> SequenceLossOutput:
    """Compute the loss of sequences or groups. The results have the caller's dtype."""
    with _guarding(problem.main_grad):
        result = saying_what_fits(plan, lambda: run(problem, plan))
        dtype, rewards_S, policy_S, ref_S = _by_sequence(problem, result)
        return SequenceLossOutput(
            result.loss.to(dtype), rewards_S.to(dtype), policy_S.to(dtype), ref_S.to(dtype), result.stats
        )


@contextmanager
def _guarding(main_grad: MainGrad | None) -> Iterator[None]:
    """Fill the caller's buffer with NaN where an error leaves it with a gradient that nobody expects, or a part of one.

    A trainer that catches an out-of-memory error and goes on would otherwise train on it without a word.
    """
    if main_grad is None:
        yield
        return
    before = main_grad.buffer._version  # torch counts the operations that write to a tensor
    try:
        yield
    except BaseException as error:
        if main_grad.buffer._version != before:
            main_grad.buffer.fill_(math.nan)
            if hasattr(error, "add_note"):  # Python 3.11
                error.add_note(MAIN_GRAD_IS_LOST)
        raise


def _by_sequence(problem: Problem, result: Result) -> tuple[torch.dtype, Tensor, Tensor, Tensor]:
    assert problem.loss is not None, "rewards are those of a loss"
    policy_S, ref_S = result.policy_logps.detach(), result.ref_logps.detach()
    return problem.result_dtype, problem.loss.beta * (policy_S - ref_S), policy_S, ref_S


def _statistics(problem: Problem, means: Tensor, tokens: Tensor, kl_S: Tensor | None = None) -> dict[str, Tensor]:
    names, stacked = [name for name in problem.stats if name in STATS], problem.stacked
    stats = {name: to_callers_order(means[i], stacked, means.dtype) for i, name in enumerate(names)}
    stats["tokens"] = to_callers_order(problem.total_counts, stacked, torch.float32)
    if KL in problem.stats and kl_S is not None:
        stats[KL] = to_callers_order(kl_S.detach(), stacked, problem.result_dtype)
    if TOKEN_LOGPS in problem.stats:
        stats[TOKEN_LOGPS] = tokens.view(problem.labels_shape).to(problem.result_dtype)
    return stats


def _reference_logps(problem: Problem, plan: Plan) -> Tensor:
    """Return the reference's log-probs ``(S,)`` in the packed order and the dtype of sums: cached, computed, or 0."""
    device, reference = problem.hidden.device, problem.reference
    if isinstance(reference, CachedReference):
        return reference.logps
    if isinstance(reference, CachedTokenReference):
        return places.sums_by_sequence(reference.logps, problem)
    if not isinstance(reference, ScoredReference):
        return torch.zeros(problem.packed.counts.shape[0], dtype=sum_dtype(device), device=device)
    assert plan.reference is not None, "a plan has one for a reference that is scored"
    with torch.no_grad():
        out, _, _ = autograd.logps(problem.of_reference(reference), plan.reference)
    return out


def _denominator(problem: Problem, like: Tensor) -> Tensor:
    """Return the 0-d number that the sum of the losses is divided by, in the dtype of ``like``."""
    if problem.reduction != "mean":
        return like.new_ones(())
    assert problem.loss is not None, "a mean is one over the examples of a loss"
    examples = len(problem.loss.bounds(problem.packed.counts.shape[0])) - 1
    denominator = examples if problem.denominator is None else problem.denominator
    return (
        number_like(denominator, like.new_ones(()))
        if isinstance(denominator, Tensor)
        else like.new_full((), denominator)
    )
