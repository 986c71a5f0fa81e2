"""Log-probs and KL divergences from the logits of both heads, where the gradient cannot be formed with the loss.

Both are differentiable. The backward pass computes the logits of both heads again.
"""

from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dpo_kernels import checks
from dpo_kernels.engine import operators, passes
from dpo_kernels.engine.autograd import (
    PlainFunction,
    by_label,
    keep_common,
    refuse_forward_mode,
    refuse_freed,
    refuse_vmap,
    with_tensors,
    wrap_gradients,
)
from dpo_kernels.engine.out_of_memory import saying_what_fits
from dpo_kernels.engine.passes import GradDtypes
from dpo_kernels.kernel_interface import Coefficients, RowResult, SumsOfBoth
from dpo_kernels.planning.plan import Plan
from dpo_kernels.problem import Problem, ScoredReference
from dpo_kernels.segments import sequence_to_token

NUM_SAVED = len(SumsOfBoth._fields)


class Sums(NamedTuple):
    """The results by sequence, and those by token that were asked for."""

    policy: Tensor  # (S,) float64 log-probs of the policy, differentiable
    kl: Tensor  # (S,) float64 KL divergences, differentiable where the loss reads them
    reference: Tensor  # (S,) float64 log-probs of the reference
    means: Tensor  # (k, S) statistics
    tokens: Tensor  # (R,) log-probs of tokens at their labels' places, empty unless asked for


def logps(problem: Problem, plan: Plan) -> Sums:
    """Compute log-probs and KL divergences without a loss."""
    head = problem.head
    out = _BothLogps.apply(problem.hidden, head.weight, head.bias, problem.packed.weights, problem, plan)
    policy, kl, reference, means, tokens, *_ = out
    return Sums(policy, kl, reference, means, by_label(tokens, problem))


class _BothLogps(PlainFunction):
    """The pass that computes log-probs and KL divergences. Its outputs are ``Sums``, then ``SumsOfBoth``."""

    @staticmethod
    def forward(
        hidden: Tensor, weight: Tensor, bias: Tensor | None, weights: Tensor | None, problem: Problem, plan: Plan
    ) -> tuple[Tensor, ...]:
        return _forward(with_tensors(problem, hidden, weight, bias, weights), plan)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        hidden, weight, bias, _, problem, plan = inputs
        keep_common(ctx, hidden, weight, bias, problem.needs_grad, output, differentiable=2 if problem.kl_grad else 1)
        reference = problem.reference
        ctx.plan, ctx.compute_dtype = plan, reference.compute_dtype
        ctx.kl_grad, ctx.head, ctx.shared = problem.kl_grad, reference.head, problem.packed.shared
        ctx.numbers, ctx.spec = operators.encode_options(problem, plan)
        tensors = (hidden, weight, bias, reference.hidden, reference.head.weight, reference.head.bias)
        ctx.save_for_backward(*tensors, *output[-NUM_SAVED:], *operators.packed_tensors(problem))

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor | None) -> tuple[Tensor | None, ...]:
        grad_S, kl_grad_S, *_ = upstream
        if grad_S is None and kl_grad_S is None:
            return (None,) * 6
        for grad in (grad_S, kl_grad_S):
            checks.refuse_batched("the upstream of fused log-probs", grad)
        hidden, weight, bias, ref_hidden, ref_weight, ref_bias, *rest = ctx.saved_tensors
        saved, packed = SumsOfBoth(*rest[:NUM_SAVED]), rest[NUM_SAVED:]
        refuse_freed(weight)
        refuse_freed(ref_weight)
        problem = operators.decode_problem(hidden, weight, bias, packed, ctx.numbers, ctx.spec)
        ref_head = replace(ctx.head, weight=ref_weight, bias=ref_bias)
        problem = replace(problem, packed=replace(problem.packed, shared=ctx.shared))
        problem = replace(problem, kl=ctx.kl_grad, reference=ScoredReference(ref_hidden, ref_head, ctx.compute_dtype))
        with torch.no_grad():
            grads = saying_what_fits(
                ctx.plan, lambda: _gradients(problem, ctx.plan, saved, grad_S, kl_grad_S, ctx.dtypes)
            )
        return (*wrap_gradients(ctx, grads), None, None, None)

    @staticmethod
    def vmap(info: Any, in_dims: Any, *args: Any) -> None:
        refuse_vmap()

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor | None) -> None:
        refuse_forward_mode()


def _forward(problem: Problem, plan: Plan) -> tuple[Tensor, ...]:
    """Return the outputs of the pass."""
    algorithm, packed = plan.algorithm.both.logps, problem.packed
    assert algorithm is not None, "the plan computes log-probs first"
    with passes.autocast_off(problem.hidden), torch.no_grad():
        kernels, operands, schedule = passes.prepared(problem, plan)
        found = algorithm(passes.both_kernels(kernels, problem, plan), operands, schedule)
        sums = [
            kernels.segment_sum(values_N, packed.weights, packed.counts) + packed.nan_if_invalid
            for values_N in (found.policy.logp, found.kl, found.reference.logp)
        ]
        means = passes.sequence_means(kernels, found.policy.stats, problem)
    tokens = passes.checked_tokens(found.policy.logp, problem, found.kl.new_zeros(0))
    policy, reference = found.policy, found.reference
    saved = SumsOfBoth(policy.max, policy.sumexp, policy.others, reference.max, reference.others)
    return *sums, means, tokens, *saved


def _gradients(
    problem: Problem,
    plan: Plan,
    saved: SumsOfBoth,
    grad_S: Tensor | None,
    kl_grad_S: Tensor | None,
    dtypes: GradDtypes,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of hidden states, weight and bias. Unwanted ones are empty.

    ``grad_S`` and ``kl_grad_S`` are the upstream gradients ``(S,)`` of log-probs and KL divergences, None for 0.
    """
    both, packed = plan.algorithm.both, problem.packed
    assert both.gradients is not None, "the strategy computes logits again"
    zeros_S = torch.zeros_like(packed.counts, dtype=packed.nan_if_invalid.dtype)
    of_tokens = [
        sequence_to_token(zeros_S if grad is None else grad, packed.segments, packed.weights) + packed.nan_if_invalid
        for grad in (grad_S, kl_grad_S)
    ]
    with passes.autocast_off(problem.hidden):
        kernels, operands, schedule = passes.prepared(problem, plan)
        power = passes.power_of_largest(kernels, *of_tokens)
        upstream = Coefficients(*(each if power is None else each / power for each in of_tokens))
        if problem.kl:
            grads = both.gradients(passes.both_kernels(kernels, problem, plan), operands, schedule, saved, upstream)
        else:
            assert plan.algorithm.gradients is not None, "the strategy computes logits again"
            rows = RowResult(saved.max[:0], saved.max, saved.sumexp, saved.others)
            grads = plan.algorithm.gradients(kernels, operands, schedule, rows, upstream.of_logp)
        return passes.finished(problem, kernels, grads, power, dtypes)
