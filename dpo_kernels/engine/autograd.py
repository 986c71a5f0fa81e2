"""Autograd: each pass as a ``torch.autograd.Function`` and as a custom operator, with one backward for both.

In eager mode the passes are functions of autograd. A loss may then be any Python object, and tools that watch torch's
own operations see them. Inside ``torch.compile`` and ``torch.export``, and under fake tensors, the passes are the
operators of ``operators.py``.

Tensors that are saved for the backward pass are in accumulation precision. The upstream gradient multiplies them before
the single rounding to the parameter's dtype. They do not change before the last backward pass, because a retained graph
may run again.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from dpo_kernels import checks, losses
from dpo_kernels.checks import traced
from dpo_kernels.engine import operators, passes, places
from dpo_kernels.engine.out_of_memory import saying_what_fits
from dpo_kernels.engine.passes import GradDtypes, KeptGradients, SavedRows
from dpo_kernels.planning.plan import Plan
from dpo_kernels.problem import Problem
from dpo_kernels.shapes import TOKEN_LOGPS, NeedsGrad, row_indexed

try:  # torch's own ``apply`` calls it; a torch without it takes the slower way
    from torch._functorch.utils import unwrap_dead_wrappers
except ImportError:
    unwrap_dead_wrappers = None  # type: ignore[assignment]

SECOND_DERIVATIVE = (
    "second derivatives of the fused losses and log-probs are not supported: use dpo_kernels.reference, "
    "which is plain torch, or call backward without create_graph"
)
WEIGHT_IS_FREED = (
    "the head's weight was freed before this backward pass, which computes logits with it again: an engine that shards "
    "the head frees it at the end of a backward pass, and of unsharded() without gradients. Add up what needs the "
    "weight and call backward once, or enter unsharded() again before it"
)
IN_COMPILED_AUTOGRAD = (
    "does not go with compiled autograd yet: its graph of the backward pass runs operators that do not know it. Call "
    "backward with torch._dynamo.config.compiled_autograd = False"
)
# The upstream gradient may differ from ``main_grad_scale`` by this much, relative. It passes through float32, whose
# rounding error is 6e-8.
UPSTREAM_TOLERANCE = 1e-6


def loss_and_gradients(
    problem: Problem, plan: Plan, ref_S: Tensor, denominator: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, tuple[Tensor, ...]]:
    """Compute the loss, and its gradients for a later backward pass.

    With ``main_grad`` the gradient of the head is added to that buffer now, and autograd gets none for it. That never
    happens under a tracer.

    Args:
        problem: what is computed. It has a loss.
        plan: how it is computed. Its strategy forms gradients with the loss.
        ref_S: ``(S,)`` log-probs of the reference, float64. They are not read where the pass computes them itself.
        denominator: number that the sum of the losses is divided by, 0-d float64.

    Returns:
        The loss (0-d, differentiable), then without gradients the log-probs ``(S,)``, the statistics ``(k, S)`` and the
        log-probs of tokens. The last are at their labels' places ``(R,)``, or empty unless they were asked for. At the
        end come the reference's log-probs and the KL divergences, ``(S,)`` float64, of a pass that reads both heads.

    """
    head = problem.head
    if traced(problem.hidden):
        assert isinstance(problem.loss, losses.BoundLoss), "a loss without a name is not run by an operator"
        code, numbers, by_pair = problem.loss.encode(ref_S)
        packed, numbers, spec = operators.encode(problem, plan, code, (problem.loss.beta, *numbers))
        loss_tensors = [ref_S, denominator, by_pair]
        outputs = operators.loss_operator(problem.hidden, head.weight, head.bias, packed, loss_tensors, numbers, spec)
    else:
        weights = problem.packed.weights
        outputs = _Loss.apply(problem.hidden, head.weight, head.bias, weights, (ref_S, denominator), problem, plan)
    total, _, logps, means, _, _, _, tokens, *of_both = outputs
    return total, logps, means, by_label(tokens, problem), tuple(of_both)


def logps(problem: Problem, plan: Plan) -> tuple[Tensor, Tensor, Tensor]:
    """Compute log-probs without a loss.

    Returns:
        The differentiable log-probs, then without gradients the statistics ``(k, S)`` and the log-probs of tokens. The
        first are ``(S,)`` float64, or with ``per_token`` ``(R,)`` at the labels' places. The last are ``(R,)`` at
        their labels' places, or empty unless they were asked for.

    """
    head = problem.head
    if traced(problem.hidden):
        arguments = operators.encode(problem, plan)
        outputs = operators.logps_operator(problem.hidden, head.weight, head.bias, *arguments)
    else:
        outputs = _Logps.apply(problem.hidden, head.weight, head.bias, problem.packed.weights, problem, plan)
    out, means, *_, tokens = outputs
    return out, means, by_label(tokens, problem)


def by_label(logp_N: Tensor, problem: Problem) -> Tensor:
    """Return log-probs of tokens at their labels' places where they were asked for, else what was given."""
    return places.by_label(logp_N, problem.packed.slot, problem.shift) if TOKEN_LOGPS in problem.stats else logp_N


# --- the loss with its gradients ------------------------------------------------------------------------------------


class PlainFunction(torch.autograd.Function):
    """A function that torch runs without looking up the defaults of its arguments. It has none.

    The search takes as long as the launch of ten kernels, while the GPU waits for the first.
    """

    @classmethod
    def apply(cls, *args: Any) -> Any:
        """Run the function as ``torch.autograd.Function.apply`` does."""
        if unwrap_dead_wrappers is None or torch._C._are_functorch_transforms_active():
            return super().apply(*args)
        return super(torch.autograd.Function, cls).apply(*unwrap_dead_wrappers(args))  # type: ignore[misc]


class _Loss(PlainFunction):
    """The pass that forms gradients with the loss. Its outputs are those of ``operators.loss_operator``.

    A pass that reads both heads has two outputs more, the reference's log-probs and the KL divergences.
    """

    @staticmethod
    def forward(
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        weights: Tensor | None,
        loss_tensors: tuple[Tensor, Tensor],
        problem: Problem,
        plan: Plan,
    ) -> tuple[Tensor, ...]:
        """Compute the loss and its gradients. ``loss_tensors`` are the reference's log-probs and the denominator."""
        result = passes.loss_and_gradients(with_tensors(problem, hidden, weight, bias, weights), plan, *loss_tensors)
        return result.total, result.losses, result.logps, result.means, *result.kept, result.tokens, *result.of_both

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        hidden, weight, bias, _, _, problem, plan = inputs
        keep_common(ctx, hidden, weight, bias, problem.needs_grad, output)
        _keep_loss(ctx, problem.packed.slot, output)
        ctx.backend, ctx.main_grad, ctx.shared = plan.backend, None, problem.packed.shared
        ctx.unknown = _unknown_to_operators(problem, samples_again=False)
        if problem.main_grad is not None:
            ctx.main_grad, ctx.upstream_used = problem.main_grad.scale, False
            ctx.needs = ctx.needs._replace(weight=False)

    @staticmethod
    def backward(ctx: Any, grad_total: Tensor | None, *ignored: Tensor | None) -> tuple[Tensor | None, ...]:
        return (*_loss_backward(ctx, grad_total), None, None, None, None)

    @staticmethod
    def vmap(info: Any, in_dims: Any, *args: Any) -> None:
        refuse_vmap()

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor | None) -> None:
        refuse_forward_mode()


def _keep_loss(ctx: Any, slot: Tensor, output: tuple[Tensor, ...]) -> None:
    _, _, _, _, dx, dw, db, *_ = output
    # Compiled autograd cannot take a sparse tensor, so its two parts are saved.
    ctx.rows_of = None if dw.layout == torch.strided else dw.shape
    rows = None if ctx.rows_of is None else dw.indices()[0]
    ctx.save_for_backward(slot, dx, dw if rows is None else dw.values(), db, rows)


def _loss_backward(ctx: Any, grad_total: Tensor | None) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Return the saved gradients (hidden states, weight, bias) times the upstream gradient."""
    if grad_total is None:
        return None, None, None
    checks.refuse_batched("the upstream of a fused loss", grad_total)
    slot, dx, dw, db, rows = ctx.saved_tensors
    with torch.no_grad():
        if ctx.unknown is not None and traced(grad_total):
            raise RuntimeError(f"{ctx.unknown} {IN_COMPILED_AUTOGRAD}")
        gradients = KeptGradients(dx, dw if rows is None else row_indexed(rows, dw, ctx.rows_of), db)
        if ctx.main_grad is not None:
            grad_total = _check_main_grad_scale(ctx, grad_total)
        if traced(grad_total):
            rounding = operators.encode_rounding(ctx.dtypes, ctx.needs)
            grads = operators.loss_backward_operator(grad_total, list(gradients), slot, rounding)
        elif torch._C._autograd._get_current_graph_task_keep_graph():
            grads = passes.scale_gradients(grad_total, gradients, slot, ctx.dtypes, ctx.needs, ctx.shared)
        else:
            how = (ctx.dtypes, ctx.needs, ctx.backend, ctx.shared)
            grads = passes.finalize_gradients(grad_total, gradients, slot, *how)
    return wrap_gradients(ctx, grads)


def _check_main_grad_scale(ctx: Any, grad_total: Tensor) -> Tensor:
    """Return 1 if the upstream gradient equals ``main_grad_scale``.

    Otherwise raise on the CPU and return NaN on a GPU. A second backward pass raises too.
    """
    if ctx.upstream_used:
        raise RuntimeError("main_grad got the gradient of one backward: with it a second one is refused")
    ctx.upstream_used = True
    agrees = (grad_total - ctx.main_grad).abs() <= UPSTREAM_TOLERANCE * abs(ctx.main_grad)
    if grad_total.device.type == "cpu" and not agrees:
        raise RuntimeError(
            f"main_grad holds the gradient for an upstream of main_grad_scale={ctx.main_grad}, but the loss was "
            f"differentiated with {float(grad_total)}"
        )
    return torch.where(agrees, torch.ones_like(grad_total), torch.full_like(grad_total, torch.nan))


# --- log-probs ------------------------------------------------------------------------------------------------------


class _Logps(PlainFunction):
    """The pass that computes log-probs. Its outputs are those of ``operators.logps_operator``."""

    @staticmethod
    def forward(
        hidden: Tensor, weight: Tensor, bias: Tensor | None, weights: Tensor | None, problem: Problem, plan: Plan
    ) -> tuple[Tensor, ...]:
        result = passes.logps(with_tensors(problem, hidden, weight, bias, weights), plan)
        return result.logps, result.means, *result.saved, result.tokens

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        hidden, weight, bias, _, problem, plan = inputs
        keep_common(ctx, hidden, weight, bias, problem.needs_grad, output)
        ctx.frozen, ctx.shard = passes.saves_dlogp_dhidden(plan.strategy, problem.needs_grad), problem.shard
        ctx.sampling, ctx.shared = problem.sampling, problem.packed.shared
        ctx.unknown = _unknown_to_operators(problem, samples_again=not ctx.frozen)
        ctx.grad_scale = 1.0 if problem.context is None else problem.context.grad_scale
        model = (None, None, None) if ctx.frozen else (hidden, weight, bias)
        ctx.numbers, ctx.spec, ctx.plan = *operators.encode_options(problem, plan), plan
        _keep_logps(ctx, model, operators.packed_tensors(problem), output)

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor | None, *ignored: Tensor | None) -> tuple[Tensor | None, ...]:
        if grad_out is not None and ctx.grad_scale != 1.0:
            grad_out = grad_out * ctx.grad_scale
        return (*_logps_backward(ctx, grad_out), None, None, None)

    @staticmethod
    def vmap(info: Any, in_dims: Any, *args: Any) -> None:
        refuse_vmap()

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor | None) -> None:
        refuse_forward_mode()


def _keep_logps(
    ctx: Any, model: tuple[Tensor | None, ...], packed: Sequence[Tensor | None], output: tuple[Tensor, ...]
) -> None:
    _, _, row_max, sumexp, others, dlogp_dhidden, _ = output
    ctx.save_for_backward(*model, row_max, sumexp, others, dlogp_dhidden, *packed)


def _logps_backward(ctx: Any, grad_out: Tensor | None) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Return the gradients of the hidden states, the weight and the bias, from those of the log-probs."""
    if grad_out is None:
        return None, None, None
    checks.refuse_batched("the upstream of fused log-probs", grad_out)
    hidden, weight, bias, row_max, sumexp, others, dlogp_dhidden, *packed = ctx.saved_tensors
    saved = SavedRows(row_max, sumexp, others, dlogp_dhidden)
    grads: tuple[Tensor | None, Tensor | None, Tensor | None]
    if traced(grad_out):
        if ctx.unknown is not None:
            raise RuntimeError(f"{ctx.unknown} {IN_COMPILED_AUTOGRAD}")
        packed = [grad_out.new_zeros(0) if tensor is None else tensor for tensor in packed]  # as operators take them
    with torch.no_grad():
        if ctx.frozen:
            grads = (_times_upstream(ctx, grad_out, dlogp_dhidden, packed), None, None)
        elif traced(grad_out):
            grads = operators.logps_backward_operator(
                grad_out, hidden, weight, bias, [*packed, *saved], ctx.numbers, ctx.spec
            )
        else:
            refuse_freed(weight)
            problem = operators.decode_problem(hidden, weight, bias, packed, ctx.numbers, ctx.spec)
            packed_tokens = replace(problem.packed, shared=ctx.shared)
            sampling = ctx.sampling or problem.sampling
            problem = replace(problem, packed=packed_tokens, shard=ctx.shard, sampling=sampling)
            plan = ctx.plan or operators.plan_of(problem, ctx.numbers, ctx.spec)
            grads = saying_what_fits(plan, lambda: passes.logps_gradients(grad_out, problem, plan, saved, ctx.dtypes))
    return wrap_gradients(ctx, grads)


def refuse_freed(weight: Tensor) -> None:
    """Raise where an engine has taken the weight's memory away since the forward pass, as FSDP2 or as ZeRO-3 does."""
    wrapped = torch._C._functorch.is_functorch_wrapped_tensor(weight)  # by torch.func, which shows no memory
    plain = type(weight) in (Tensor, torch.nn.Parameter) and not wrapped
    if weight.dim() != 2 or (plain and weight.numel() and not weight.untyped_storage().nbytes()):
        raise RuntimeError(WEIGHT_IS_FREED)


def _unknown_to_operators(problem: Problem, *, samples_again: bool) -> str | None:
    """Return the argument of a call that the operators of the backward pass do not know, or None."""
    sampling = problem.sampling
    if problem.packed.shared is not None:
        return "rows"
    if sampling is not None and sampling.sparse_weight_grad:
        return "sparse_weight_grad"
    if sampling is not None and samples_again:
        return "gradient='sparse'"
    return None if problem.shard is None else "vocab_parallel"


def _times_upstream(ctx: Any, grad_out: Tensor, dlogp_dhidden: Tensor, packed: Sequence[Tensor]) -> Tensor:
    dtype = ctx.dtypes.hidden
    if traced(grad_out):
        return operators.frozen_logps_backward_operator(grad_out, dlogp_dhidden, packed, ctx.spec, dtype)
    options = operators.decode_spec(ctx.spec)
    tokens = replace(operators.decode_packed(packed, options), shared=ctx.shared)
    return passes.derivative_times_upstream(grad_out, dlogp_dhidden, tokens, options.per_token, options.shift, dtype)


# --- what both share ------------------------------------------------------------------------------------------------


def with_tensors(
    problem: Problem, hidden: Tensor, weight: Tensor, bias: Tensor | None, weights: Tensor | None
) -> Problem:
    """Return the problem with the tensors that autograd passes, which ``torch.func`` has unwrapped."""
    given = (problem.hidden, problem.head.weight, problem.head.bias, problem.packed.weights)
    if all(mine is theirs for mine, theirs in zip(given, (hidden, weight, bias, weights), strict=True)):
        return problem
    head = replace(problem.head, weight=weight, bias=bias)
    return replace(problem, hidden=hidden, head=head, packed=replace(problem.packed, weights=weights))


def keep_common(
    ctx: Any,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    needs: NeedsGrad,
    output: tuple[Tensor, ...],
    differentiable: int = 1,
) -> None:
    """Save what every function needs for the backward pass. The first outputs are ``differentiable``, one or more."""
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*output[differentiable:])
    ctx.dtypes, ctx.needs = GradDtypes.of(hidden, weight, bias), needs
    ctx.anchor = _anchor(hidden, weight, bias)


def wrap_gradients(ctx: Any, grads: Sequence[Tensor | None]) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Return the gradients that are wanted. Each raises an error if it is differentiated again."""
    dx, dw, db = (grad if need else None for grad, need in zip(grads, ctx.needs, strict=True))
    if torch.is_grad_enabled() and ctx.anchor is not None:  # create_graph=True
        dx, dw, db = (None if g is None else _RefuseSecondDerivative.apply(ctx.anchor, g) for g in (dx, dw, db))
    return dx, dw, db


def _anchor(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor | None:
    """Return an empty tensor that depends on the differentiable inputs in the graph and holds none of their memory."""
    if traced(hidden):
        return None
    with torch.enable_grad():
        ends = [
            t[:0].reshape(-1).to(torch.float32, copy=True)
            for t in (hidden, weight, bias)
            if t is not None and t.requires_grad
        ]
        return torch.cat(ends) if ends else None


class _RefuseSecondDerivative(torch.autograd.Function):
    """The identity on a gradient. Differentiating it again raises an error instead of giving zero."""

    @staticmethod
    def forward(anchor: Tensor, grad: Tensor) -> Tensor:
        return grad.view_as(grad) if grad.layout == torch.strided else grad.detach()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        pass  # torch.func requires this method

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, None]:
        raise RuntimeError(SECOND_DERIVATIVE)


def refuse_vmap() -> None:
    """Raise the error of ``vmap`` where nested transforms have hidden it from input validation."""
    raise RuntimeError(f"this is {checks.UNDER_VMAP}")


def refuse_forward_mode() -> None:
    """Raise the error of forward mode, as ``refuse_vmap`` does that of ``vmap``."""
    raise RuntimeError(f"this is {checks.IN_FORWARD_MODE}")


# --- the same backward for the operators ----------------------------------------------------------------------------


def _loss_operator_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    hidden, weight, bias, packed, loss_tensors, _, spec = inputs
    options = operators.decode_spec(spec)
    keep_common(ctx, hidden, weight, bias, options.needs_grad, output)
    _keep_loss(ctx, operators.decode_packed(packed, options).slot, output)
    ctx.backend, ctx.main_grad, ctx.shared, ctx.unknown = options.backend, None, None, None
    ctx.lists = (len(packed), len(loss_tensors))


def _loss_operator_backward(ctx: Any, grad_total: Tensor | None, *ignored: Tensor | None) -> tuple[Any, ...]:
    packed, loss_tensors = ctx.lists
    return (*_loss_backward(ctx, grad_total), [None] * packed, [None] * loss_tensors, None, None)


def _logps_operator_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    hidden, weight, bias, packed, numbers, spec = inputs
    options = operators.decode_spec(spec)
    keep_common(ctx, hidden, weight, bias, options.needs_grad, output)
    ctx.frozen = passes.saves_dlogp_dhidden(options.strategy, options.needs_grad)
    model = (None, None, None) if ctx.frozen else (hidden, weight, bias)
    ctx.numbers, ctx.spec, ctx.plan = numbers, spec, None
    ctx.shard = ctx.sampling = ctx.shared = ctx.unknown = None
    _keep_logps(ctx, model, packed, output)


def _logps_operator_backward(ctx: Any, grad_out: Tensor | None, *ignored: Tensor | None) -> tuple[Any, ...]:
    return (*_logps_backward(ctx, grad_out), [None] * operators.NUM_PACKED, None, None)


operators.loss_operator.register_autograd(_loss_operator_backward, setup_context=_loss_operator_setup)
operators.logps_operator.register_autograd(_logps_operator_backward, setup_context=_logps_operator_setup)
