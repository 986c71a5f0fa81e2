"""The three passes that autograd sees: loss with gradients, log-probs, and the gradients of log-probs.

Gradients that wait for the backward pass are in accumulation precision. They are multiplied by their upstream gradient
and rounded once to the parameter's dtype. An empty tensor stands for each output that was not asked for.
"""

from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from dpo_kernels.engine import places
from dpo_kernels.kernel_interface import BothKernels, RowKernels, RowResult
from dpo_kernels.planning.plan import Plan
from dpo_kernels.planning.tables import BACKENDS, STRATEGIES
from dpo_kernels.problem import Problem, ScoredReference
from dpo_kernels.shapes import (
    MOST_EXPONENT,
    STATS,
    TOKEN_LOGPS,
    WRAPPERS_THAT_UNWRAP,
    Head,
    NeedsGrad,
    PackedTokens,
    Schedule,
    SharedRows,
    accumulation_dtype,
    row_indexed,
)
from dpo_kernels.tiled_weight import TiledWeight, frozen


class KeptGradients(NamedTuple):
    """Gradients of the loss that wait for the backward pass, in accumulation precision. Unwanted ones are empty."""

    hidden: Tensor  # (N + 1, H), last row 0
    weight: Tensor  # (V, H), a sparse tensor of rows where the sampling says so
    bias: Tensor  # (V,)


class GradDtypes(NamedTuple):
    """The dtypes of the parameters. Their gradients are rounded to these."""

    hidden: torch.dtype
    weight: torch.dtype
    bias: torch.dtype

    @staticmethod
    def of(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> "GradDtypes":
        """Return the dtypes of tensors. A missing bias counts as having the weight's."""
        return GradDtypes(hidden.dtype, weight.dtype, weight.dtype if bias is None else bias.dtype)


class LossResult(NamedTuple):
    """What the pass with gradients returns."""

    total: Tensor  # () float64, sum of the losses over the denominator
    losses: Tensor  # (P,) for pairs, else one for each example
    logps: Tensor  # (S,) float64
    means: Tensor  # (k, S) statistics
    kept: KeptGradients
    tokens: Tensor  # (N,) log-probs, empty unless asked for
    of_both: tuple[Tensor, ...] = ()  # (S,) reference's log-probs and KL divergences of a pass over both heads


class SavedRows(NamedTuple):
    """What the backward pass of log-probs needs: sums of each token, or the saved derivative with empty sums."""

    max: Tensor  # (N,)
    sumexp: Tensor  # (N,)
    others: Tensor  # (N,)
    dlogp_dhidden: Tensor  # (N + 1, H)


class LogpsResult(NamedTuple):
    """What the pass without a loss returns."""

    logps: Tensor  # (S,), or with per_token (R,) at the labels' places
    means: Tensor  # (k, S) statistics
    saved: SavedRows
    tokens: Tensor  # (N,) log-probs, empty unless asked for


def loss_and_gradients(problem: Problem, plan: Plan, ref_S: Tensor, denominator: Tensor) -> LossResult:
    """Compute the loss and its gradients.

    Args:
        problem: what is computed. With ``main_grad`` the head's gradient is added to that buffer, and all gradients
            are those of ``main_grad.scale`` times the loss.
        plan: how it is computed. Its strategy forms gradients with the loss.
        ref_S: ``(S,)`` log-probs of the reference, float64. They are not read where the pass computes them itself.
        denominator: number that the sum of the losses is divided by, 0-d float64.

    """
    algorithm, both = plan.algorithm.loss_and_gradients, plan.algorithm.both.loss_and_gradients
    assert algorithm is not None, "the plan forms gradients"
    of_both: list[Tensor] = []
    with autocast_off(problem.hidden), torch.no_grad():
        kernels, operands, schedule = prepared(problem, plan)
        if both is not None and problem.kl:
            result, *of_both = both(both_kernels(kernels, problem, plan), operands, schedule, denominator)
        else:
            result = algorithm(kernels, operands, schedule, ref_S, denominator)
        means = sequence_means(kernels, result.stats, problem)
    nothing = torch.empty(0, dtype=accumulation_dtype(problem.compute_dtype), device=problem.hidden.device)
    grads = KeptGradients(*(nothing.clone() if g is None else g for g in (result.hidden, result.weight, result.bias)))
    tokens = checked_tokens(result.token_logps, problem, nothing)
    return LossResult(result.total, result.losses, result.logps, means, grads, tokens, tuple(of_both))


def scale_gradients(
    grad_total: Tensor,
    kept: KeptGradients,
    slot: Tensor,
    dtypes: GradDtypes,
    needs: NeedsGrad,
    shared: SharedRows | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Multiply gradients by the upstream gradient and round them.

    Args:
        grad_total: upstream gradient, 0-d.
        kept: gradients of the loss in accumulation precision.
        slot: ``(R,)`` int64 place of each input row among the packed tokens, N where not scored.
        dtypes: dtypes of the results.
        needs: which gradients are wanted.
        shared: the rows that the tokens read, where several may read one. ``slot`` does not matter then.

    Returns:
        Gradients of the hidden states ``(R, H)``, the weight ``(V, H)`` and the bias ``(V,)``. Unwanted ones are empty.

    """
    dx, dw, db = kept
    factor = grad_total.to(dx.dtype) if any(needs) else grad_total
    return (
        places.to_input_rows(dx, slot, factor, dtypes.hidden, shared) if needs.hidden else dx.new_zeros(0),
        places.scaled_copy(dw, factor, dtypes.weight) if needs.weight else dx.new_zeros(0),
        places.scaled_copy(db, factor, dtypes.bias) if needs.bias else dx.new_zeros(0),
    )


def finalize_gradients(
    grad_total: Tensor,
    kept: KeptGradients,
    slot: Tensor,
    dtypes: GradDtypes,
    needs: NeedsGrad,
    backend: str,
    shared: SharedRows | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Do the same as ``scale_gradients`` where nothing will read the gradients in ``kept`` again.

    The weight's gradient is scaled in its own memory if ``backend`` can do that. A copy would take a good part of the
    time of its GEMM, and as much memory again.
    """
    kernels, hidden, weight = BACKENDS[backend].load(), None, None
    if needs.hidden and shared is None:
        hidden = kernels.to_input_rows(kept.hidden, slot, grad_total, dtypes.hidden)
    if needs.weight:
        weight = _finalized(kernels, kept.weight, grad_total.to(kept.weight.dtype), dtypes.weight)
    left = NeedsGrad(needs.hidden and hidden is None, needs.weight and weight is None, needs.bias)
    dx, dw, db = scale_gradients(grad_total, kept, slot, dtypes, left, shared)
    return dx if hidden is None else hidden, dw if weight is None else weight, db


def logps(problem: Problem, plan: Plan) -> LogpsResult:
    """Compute log-probs of sequences or of tokens, and what their backward pass needs."""
    algorithm, packed = plan.algorithm.logps, problem.packed
    assert algorithm is not None, "the plan computes log-probs first"
    with autocast_off(problem.hidden), torch.no_grad():
        kernels, operands, schedule = prepared(problem, plan)
        rows, dlogp_dhidden = algorithm(kernels, operands, schedule)
        _reduce_hidden_grad(problem, dlogp_dhidden)
        if problem.per_token:
            out = places.by_label(rows.logp, packed.slot, problem.shift)
        else:
            out = kernels.segment_sum(rows.logp, packed.weights, packed.counts)
        out = out + packed.nan_if_invalid.to(out.dtype)
        if problem.context is not None and not problem.per_token:
            out = problem.context.complete(out)
        means = sequence_means(kernels, rows.stats, problem)
    nothing = rows.logp.new_zeros(0)
    if dlogp_dhidden is None:
        saved = SavedRows(rows.max, rows.sumexp, rows.others, nothing)
    else:  # the derivative is all that the backward pass needs
        saved = SavedRows(nothing, nothing.clone(), nothing.clone(), dlogp_dhidden)
    return LogpsResult(out, means, saved, checked_tokens(rows.logp, problem, nothing))


def saves_dlogp_dhidden(strategy: str, needs: NeedsGrad) -> bool:
    """Return whether a strategy saves the derivative of the log-probs with respect to the hidden states."""
    return STRATEGIES[strategy].gradients is None and needs.hidden


def derivative_times_upstream(
    grad_out: Tensor, dlogp_dhidden: Tensor, packed: PackedTokens, per_token: bool, shift: bool, dtype: torch.dtype
) -> Tensor:
    """Return the gradient of the hidden states from the saved derivative.

    Args:
        grad_out: upstream gradient of the log-probs: ``(S,)``, or ``(R,)`` with ``per_token``.
        dlogp_dhidden: ``(N + 1, H)`` saved derivative with the sign changed and a zero last row.
        packed: the packed tokens.
        per_token: whether the log-probs are by token.
        shift: whether ``hidden[t]`` predicts ``labels[t + 1]``.
        dtype: dtype of the result, ``(R, H)``.

    """
    with torch.no_grad():
        grad_N = places.upstream_of_tokens(grad_out, packed, per_token, shift)
        scale = torch.cat([-grad_N, grad_N.new_zeros(1)]).to(dlogp_dhidden.dtype)
        return places.to_input_rows(dlogp_dhidden, packed.slot, scale, dtype, packed.shared)


def logps_gradients(
    grad_out: Tensor, problem: Problem, plan: Plan, saved: SavedRows, dtypes: GradDtypes
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute the gradients of ``logps`` from logits that are computed again.

    Args:
        grad_out: upstream gradient of the log-probs: ``(S,)``, or ``(R,)`` at the labels' places with ``per_token``.
        problem: what ``logps`` has computed.
        plan: the plan that it has used.
        saved: what it has saved.
        dtypes: dtypes of the results.

    Returns:
        Gradients of the hidden states ``(R, H)``, the weight ``(V, H)`` and the bias ``(V,)``. Unwanted ones are empty.

    """
    algorithm = plan.algorithm.gradients
    assert algorithm is not None, "strategies without a backward pass keep the derivative"
    with autocast_off(grad_out), torch.no_grad():
        grad_N = places.upstream_of_tokens(grad_out, problem.packed, problem.per_token, problem.shift)
        kernels, operands, schedule = prepared(problem, plan)
        rows = RowResult(saved.max[:0], saved.max, saved.sumexp, saved.others)
        power = power_of_largest(kernels, grad_N)
        upstream_N = grad_N if power is None else grad_N / power
        return finished(problem, kernels, algorithm(kernels, operands, schedule, rows, upstream_N), power, dtypes)


# --- what they share ------------------------------------------------------------------------------------------------


def prepared(problem: Problem, plan: Plan) -> tuple[RowKernels, Problem, Schedule]:
    """Return the kernels of one call, the problem with the head as the GEMMs read it, and the schedule."""
    assert plan.schedule is not None, "a plan is executed where the lengths are known"
    kernels = BACKENDS[plan.backend].make(problem.compute_dtype, plan.budget.workspace_bytes, plan.workload.narrow)
    names, reference = tuple(name for name in problem.stats if name in STATS), problem.reference
    if isinstance(reference, ScoredReference) and problem.kl:
        reference = replace(reference, head=_operand_head(reference.head, reference.compute_dtype))
    head = _operand_head(problem.head, problem.compute_dtype)
    return kernels, replace(problem, head=head, reference=reference, stats=names), plan.schedule


def both_kernels(kernels: RowKernels, problem: Problem, plan: Plan) -> BothKernels:
    """Return the kernels of a call that reads both heads. ``kernels`` are those of the policy."""
    assert isinstance(problem.reference, ScoredReference), "a divergence is one from a reference that is scored"
    of_reference = BACKENDS[plan.backend].make(
        problem.reference.compute_dtype, plan.budget.workspace_bytes, narrow=False
    )
    return BothKernels(kernels, of_reference)


def _reduce_hidden_grad(problem: Problem, grad: Tensor | None) -> None:
    """Add up the shards' parts of the hidden states' gradient, in the precision of accumulation."""
    shard = problem.shard
    if shard is not None and grad is not None and shard.reduce_hidden_grad is not None:
        shard.reduce_hidden_grad(grad)()


def _operand_head(head: Head, dtype: torch.dtype) -> Head:
    """Return the head as the GEMMs read it. Under autocast it is a copy in autocast's dtype."""
    bias, weight = None if head.bias is None else _settled(head.bias.detach().to(dtype)), frozen(head.weight)
    operand = weight.converted(dtype) if isinstance(weight, TiledWeight) else _settled(weight.to(dtype))
    return Head(operand, bias, head.logit_scale, head.softcap)


def _settled(tensor: Tensor) -> Tensor:
    """Return a tensor that its collective has filled. torch's operations wait for that, and our kernels do not."""
    return tensor.wait() if type(tensor).__name__ in WRAPPERS_THAT_UNWRAP else tensor  # type: ignore[attr-defined]


def checked_tokens(logp_N: Tensor, problem: Problem, nothing: Tensor) -> Tensor:
    """Return the log-probs of tokens, NaN where the input is invalid, or an empty tensor unless asked for."""
    if TOKEN_LOGPS not in problem.stats:
        return nothing.clone()
    return logp_N + problem.packed.nan_if_invalid.to(logp_N.dtype)


def autocast_off(tensor: Tensor) -> AbstractContextManager[object]:
    """Return a context in which autocast changes no product on the device of a tensor."""
    device_type = tensor.device.type
    return torch.autocast(device_type, enabled=False) if torch.is_autocast_enabled(device_type) else nullcontext()


def sequence_means(kernels: RowKernels, stats: dict[str, Tensor], problem: Problem) -> Tensor:
    """Return the means ``(k, S)`` float32 over scored tokens. They are 0 for a sequence without any."""
    packed = problem.packed
    names = [name for name in problem.stats if name in STATS]
    if not names:
        return packed.nan_if_invalid.new_zeros(0, packed.counts.shape[0]).float()
    sums = torch.stack([kernels.segment_sum(stats[name], None, packed.counts) for name in names])
    if problem.context is not None:
        sums = problem.context.complete(sums)
    return (sums / problem.total_counts.clamp(min=1)).float()


def finished(
    problem: Problem,
    kernels: RowKernels,
    grads: tuple[Tensor | None, Tensor | None, Tensor | None],
    power: Tensor | None,
    dtypes: GradDtypes,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return packed gradients times a factor, in their dtypes and at their places. Unwanted ones are empty.

    Args:
        problem: what was computed.
        kernels: the row operations that the gradients come from.
        grads: gradients of hidden states, weight and bias in accumulation precision, None where not wanted.
        power: the factor, 0-d, or None for 1.
        dtypes: dtypes of the results.

    """
    (dx, dw, db), packed = grads, problem.packed
    one = torch.ones((), dtype=accumulation_dtype(problem.compute_dtype), device=problem.hidden.device)
    factor = of_hidden = one if power is None else power.to(one.dtype)
    if dx is not None and power is not None and problem.shard is not None:  # another rank may have another power
        dx, of_hidden = dx.mul_(factor), one
    _reduce_hidden_grad(problem, dx)
    if power is not None and dw is not None:
        finalized = _finalized(kernels, dw, factor, dtypes.weight)
        dw = places.scaled_copy(dw, factor, dtypes.weight) if finalized is None else finalized
    if power is not None and db is not None:
        db = db * factor
    return (
        one.new_zeros(0)
        if dx is None
        else places.to_input_rows(dx, packed.slot, of_hidden, dtypes.hidden, packed.shared),
        one.new_zeros(0) if dw is None else _rounded(dw, dtypes.weight),
        one.new_zeros(0) if db is None else db.to(dtypes.bias),
    )


def power_of_largest(kernels: RowKernels, *grads: Tensor) -> Tensor | None:
    """Return the power of two, 0-d, that the largest of all upstream gradients is at most, without a sync.

    Where that is not finite the power is any. The rows of the others are right under any power. None stands for 1,
    where gradients of logits are not rounded to float16.
    """
    if kernels.dtype != torch.float16 or not kernels.rounds_operands(grads[0]):
        return None
    largest = torch.cat([*(each.abs() for each in grads), grads[0].new_zeros(1)]).amax()
    return torch.ldexp(largest.new_ones(()), largest.frexp().exponent.clamp(-MOST_EXPONENT, MOST_EXPONENT))


def _finalized(
    kernels: RowKernels | type[RowKernels], grad: Tensor, factor: Tensor, dtype: torch.dtype
) -> Tensor | None:
    """Do ``RowKernels.finalize_weight_grad`` with a gradient that may be a sparse tensor of rows."""
    if grad.layout == torch.strided:
        return kernels.finalize_weight_grad(grad, factor, dtype)
    values = kernels.finalize_weight_grad(grad.values(), factor, dtype)
    return None if values is None else row_indexed(grad.indices()[0], values, grad.shape)


def _rounded(grad: Tensor, dtype: torch.dtype) -> Tensor:
    """Return a gradient, which may be a sparse tensor of rows, in ``dtype``."""
    if grad.layout == torch.strided:
        return grad.to(dtype)
    return row_indexed(grad.indices()[0], grad.values().to(dtype), grad.shape)
