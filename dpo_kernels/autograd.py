"""The autograd glue: each pass as an autograd function and as a custom operator, from one description.

Run eagerly the passes are ``torch.autograd.Function``s, so that a loss may be any Python object, and tools that watch
torch's own operations see them. Inside ``torch.compile`` and ``torch.export``, and under fake tensors, they are custom
operators of the namespace ``dpo_kernels``, opaque to the tracer. The two share every line but the registration.

What is kept between forward and backward is in accumulation precision: an upstream multiplies it before the single
rounding to the parameter's dtype, and nothing kept is changed before the last backward: a retained one may run again.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from dpo_kernels import checks, dispatch, inputs, losses, passes
from dpo_kernels.shapes import STATS, TOKEN_LOGPS, Accumulator, PackedTokens, accumulation_dtype, sum_dtype

SECOND_DERIVATIVE = (
    "second derivatives of the fused losses and log-probs are not supported: use dpo_kernels.reference, "
    "which is plain torch, or call backward without create_graph"
)
# Places in the argument lists of passes.pair_loss and passes.logps.
SLOT, PAIR_LOSS, PAIR_BACKEND, LOGPS_OPTIONS, LOGPS_STRATEGY = 7, 14, 21, 11, 16
UPSTREAM_TOLERANCE = 1e-6  # an upstream goes through float32


def traced(tensor: Tensor) -> bool:
    """Whether a tracer or fake tensors are at work, so that only operators of the dispatcher may run."""
    fake = tensor.is_meta or type(tensor).__name__ in ("FakeTensor", "FunctionalTensor")
    return fake or torch.compiler.is_compiling()


def pack(
    batch: inputs.Batch, ignore_index: int, shift: bool, stacked: bool, max_scored_tokens: int | None
) -> PackedTokens:
    """The scored rows of a batch. Traced, the capacity is every row, so that no shape depends on data."""
    capacity, static = max_scored_tokens, max_scored_tokens is not None
    if capacity is not None or traced(batch.labels):
        rows = batch.labels.shape[0]
        capacity = rows if capacity is None else min(capacity, rows)
    call = _pack_op if traced(batch.labels) else passes.pack
    packed = call(
        batch.labels,
        batch.cu_seqlens,
        batch.token_weights,
        batch.head.vocab,
        ignore_index,
        shift,
        stacked,
        batch.width,
        -1 if capacity is None else capacity,
        static,
    )
    index, labels, weights, *rest = packed
    return PackedTokens(index, labels, weights if batch.token_weights is not None or static else None, *rest)


def pair_loss(
    batch: inputs.Batch,
    rows: PackedTokens,
    ref_S: Tensor,
    denominator: Tensor,
    loss: losses.BoundLoss,
    plan: dispatch.Plan,
    need: tuple[bool, bool, bool],
    stats: tuple[str, ...],
    *,
    shift: bool,
    into: Accumulator | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Differentiable sum of the losses over the denominator (); detached log-probs (S,), stats (k, S), tokens (R,).

    The last, log-probs at their labels' places, is empty unless asked for. With ``into`` (never traced) the gradient of
    the head is added there, now, and autograd gets none for it.
    """
    tensors, options = _tensors(batch, rows), (*_options(batch, plan, stats), *need)
    if traced(batch.hidden):
        code, numbers, by_pair = loss.encode(ref_S)
        done = _pair_loss_op(*tensors, ref_S, denominator, by_pair, code, loss.beta, numbers, *options)
    else:
        bound = loss if into is None else passes.LossInto(loss, into)
        done = _PairLoss.apply(*tensors, ref_S, denominator, None, bound, 0.0, [], *options)
    return done[0], done[2], done[3], _tokens(done[7], rows, stats, shift)


def logps(
    batch: inputs.Batch,
    rows: PackedTokens,
    plan: dispatch.Plan,
    need: tuple[bool, bool, bool],
    stats: tuple[str, ...],
    *,
    per_token: bool,
    shift: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Differentiable log-probs, (S,) float64 or by token (R,) at the labels' places, statistics (k, S), tokens (R,)."""
    call = _logps_op if traced(batch.hidden) else _Logps.apply
    done = call(*_tensors(batch, rows), per_token, shift, *_options(batch, plan, stats), *need)
    return done[0], done[1], _tokens(done[6], rows, stats, shift)


def _tokens(logp_N: Tensor, rows: PackedTokens, stats: tuple[str, ...], shift: bool) -> Tensor:
    return passes.by_label(logp_N, rows.slot, shift) if TOKEN_LOGPS in stats else logp_N


def _tensors(batch: inputs.Batch, rows: PackedTokens) -> tuple[Tensor | None, ...]:
    packed = (rows.index, rows.labels, rows.weights, rows.segments, rows.slot)
    return (
        batch.hidden,
        batch.head.weight,
        batch.head.bias,
        *packed,
        rows.counts,
        rows.counts_host,
        rows.nan_if_invalid,
    )


def _options(batch: inputs.Batch, plan: dispatch.Plan, stats: tuple[str, ...]) -> tuple[Any, ...]:
    head = (batch.head.logit_scale, batch.head.softcap, batch.compute_dtype)
    return (*head, plan.strategy, plan.backend, plan.scratch_bytes, ",".join(stats))


# --- forward to backward ----------------------------------------------------------------------------------------------


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    """What both functions keep; their first output is the differentiable one."""
    hidden, weight, bias = inputs[:3]
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*output[1:])
    ctx.dtypes = (hidden.dtype, weight.dtype, weight.dtype if bias is None else bias.dtype)
    ctx.inputs, ctx.need = len(inputs), inputs[-3:]
    ctx.anchor = _anchor(hidden, weight, bias)


def _pair_loss_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    _setup(ctx, inputs, output)
    ctx.backend, ctx.upstream, ctx.upstream_used = inputs[PAIR_BACKEND], None, False
    if isinstance(inputs[PAIR_LOSS], passes.LossInto):
        ctx.upstream, ctx.need = inputs[PAIR_LOSS].into.upstream, (ctx.need[0], False, ctx.need[2])
    ctx.save_for_backward(inputs[SLOT], *output[4:7])


def _pair_loss_backward(ctx: Any, grad_total: Tensor | None, *ignored: Tensor | None) -> tuple[Tensor | None, ...]:
    if grad_total is None:
        return (None,) * ctx.inputs
    checks.refuse_batched("the upstream of a fused loss", grad_total)
    slot, dx, dw, db = ctx.saved_tensors
    with torch.no_grad():
        if ctx.upstream is not None:
            grad_total = _check_main_grad_scale(ctx, grad_total)
        if traced(grad_total):
            grads = _scale_op(grad_total, dx, dw, db, slot, *ctx.dtypes, *ctx.need)
        else:
            last = not torch._C._autograd._get_current_graph_task_keep_graph()
            scale = partial(passes.scale_last, backend=ctx.backend) if last else passes.scale
            grads = scale(grad_total, dx, dw, db, slot, *ctx.dtypes, *ctx.need)
    return _finish_backward(ctx, grads)


def _check_main_grad_scale(ctx: Any, grad_total: Tensor) -> Tensor:
    """1, since the gradients were formed for the upstream that ``main_grad_scale`` announced; a lie is no number."""
    if ctx.upstream_used:
        raise RuntimeError("main_grad got the gradient of one backward: with it a second one is refused")
    ctx.upstream_used = True
    kept = (grad_total - ctx.upstream).abs() <= UPSTREAM_TOLERANCE * abs(ctx.upstream)
    if grad_total.device.type == "cpu" and not kept:
        raise RuntimeError(
            f"main_grad holds the gradient for an upstream of main_grad_scale={ctx.upstream}, but the loss was "
            f"differentiated with {float(grad_total)}"
        )
    return torch.where(kept, torch.ones_like(grad_total), torch.full_like(grad_total, torch.nan))


def _logps_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    _setup(ctx, inputs, output)
    ctx.options = inputs[LOGPS_OPTIONS:]
    model, packed = inputs[:3], inputs[3:LOGPS_OPTIONS]
    if passes.saves_dlogp_dhidden(inputs[LOGPS_STRATEGY], ctx.need):
        model = (None, None, None)
    ctx.save_for_backward(*model, *packed, *output[2:6])


def _logps_backward(ctx: Any, grad_out: Tensor | None, *ignored: Tensor | None) -> tuple[Tensor | None, ...]:
    if grad_out is None:
        return (None,) * ctx.inputs
    checks.refuse_batched("the upstream of fused log-probs", grad_out)
    call = _logps_grad_op if traced(grad_out) else passes.logps_grad
    with torch.no_grad():
        grads = call(grad_out, *ctx.saved_tensors, *ctx.dtypes, *ctx.options)
    return _finish_backward(ctx, grads)


def _finish_backward(ctx: Any, grads: tuple[Tensor, Tensor, Tensor]) -> tuple[Tensor | None, ...]:
    wanted = [grad if need else None for grad, need in zip(grads, ctx.need, strict=True)]
    if torch.is_grad_enabled() and ctx.anchor is not None:  # create_graph=True
        wanted = [None if grad is None else _RefuseSecondDerivative.apply(ctx.anchor, grad) for grad in wanted]
    return (*wanted, *(None,) * (ctx.inputs - 3))


def _anchor(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor | None:
    """An empty tensor that hangs on the differentiable inputs' graph and holds none of their memory."""
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
    """Passes a gradient through; differentiating it again is an error instead of a silent zero."""

    @staticmethod
    def forward(anchor: Tensor, grad: Tensor) -> Tensor:
        return grad.view_as(grad)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        pass  # torch.func asks for one

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, None]:
        raise RuntimeError(SECOND_DERIVATIVE)


def _refuse_vmap(info: Any, in_dims: Any, *args: Any) -> None:
    """Where a transform around another one has hidden from the door what it does."""
    raise RuntimeError(f"this is {checks.UNDER_VMAP}")


def _refuse_forward_mode(ctx: Any, *tangents: Tensor | None) -> None:
    raise RuntimeError(f"this is {checks.IN_FORWARD_MODE}")


class _PairLoss(torch.autograd.Function):
    forward = staticmethod(passes.pair_loss)
    setup_context = staticmethod(_pair_loss_setup)
    backward = staticmethod(_pair_loss_backward)
    vmap, jvp = staticmethod(_refuse_vmap), staticmethod(_refuse_forward_mode)


class _Logps(torch.autograd.Function):
    forward = staticmethod(passes.logps)
    setup_context = staticmethod(_logps_setup)
    backward = staticmethod(_logps_backward)
    vmap, jvp = staticmethod(_refuse_vmap), staticmethod(_refuse_forward_mode)


# --- the same as operators --------------------------------------------------------------------------------------------

_pack_op = torch.library.custom_op("dpo_kernels::pack", passes.pack, mutates_args=())
_pair_loss_op = torch.library.custom_op("dpo_kernels::pair_loss", passes.pair_loss, mutates_args=())
_scale_op = torch.library.custom_op("dpo_kernels::pair_loss_backward", passes.scale, mutates_args=())
_logps_op = torch.library.custom_op("dpo_kernels::logps", passes.logps, mutates_args=())
_logps_grad_op = torch.library.custom_op("dpo_kernels::logps_backward", passes.logps_grad, mutates_args=())

_pair_loss_op.register_autograd(_pair_loss_backward, setup_context=_pair_loss_setup)
_logps_op.register_autograd(_logps_backward, setup_context=_logps_setup)


@_pack_op.register_fake
def _fake_pack(
    labels: Tensor,
    cu_seqlens: Tensor,
    token_weights: Tensor | None,
    vocab: int,
    ignore_index: int,
    shift: bool,
    stacked: bool,
    width: int,
    capacity: int,
    static: bool,
) -> tuple[Tensor, ...]:
    places = torch.library.get_ctx().new_dynamic_size() if capacity < 0 else capacity
    sequences = cu_seqlens.shape[0] - 1
    long = labels.new_empty(0, dtype=torch.int64)
    real = sum_dtype(labels.device)
    weights = labels.new_empty(0, dtype=real)
    if token_weights is not None:
        weights = token_weights.new_empty(places, dtype=accumulation_dtype(token_weights.dtype))
    elif static:
        weights = labels.new_empty(places, dtype=torch.float32)
    return (
        long.new_empty(places),
        long.new_empty(places),
        weights,
        long.new_empty(places),
        long.new_empty(labels.shape[0]),
        long.new_empty(sequences),
        torch.empty(sequences, dtype=torch.int64, device="cpu"),
        labels.new_empty((), dtype=real),
    )


@_pair_loss_op.register_fake
def _fake_pair_loss(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    index: Tensor,
    labels: Tensor,
    weights: Tensor | None,
    segments: Tensor,
    slot: Tensor,
    counts: Tensor,
    counts_host: Tensor,
    nan_if_invalid: Tensor,
    ref: Tensor,
    denominator: Tensor,
    pair_values: Tensor,
    loss: str,
    beta: float,
    loss_values: Sequence[float],
    logit_scale: float,
    softcap: float | None,
    dtype: torch.dtype,
    strategy: str,
    backend: str,
    scratch_bytes: int,
    stats: str,
    need_hidden: bool,
    need_weight: bool,
    need_bias: bool,
) -> tuple[Tensor, ...]:
    sequences = counts.shape[0]
    kept = hidden.new_empty(0, dtype=accumulation_dtype(dtype))
    return (
        ref.new_empty(()),
        ref.new_empty(sequences // 2),
        ref.new_empty(sequences),
        _fake_stats(counts, stats),
        kept.new_empty(index.shape[0] + 1, hidden.shape[1]) if need_hidden else kept.new_empty(0),
        kept.new_empty(weight.shape) if need_weight else kept.new_empty(0),
        kept.new_empty(weight.shape[0]) if need_bias else kept.new_empty(0),
        _fake_tokens(kept, index, stats),
    )


@_scale_op.register_fake
def _fake_scale(
    grad_total: Tensor,
    dx: Tensor,
    dw: Tensor,
    db: Tensor,
    slot: Tensor,
    hidden_dtype: torch.dtype,
    weight_dtype: torch.dtype,
    bias_dtype: torch.dtype,
    need_hidden: bool,
    need_weight: bool,
    need_bias: bool,
) -> tuple[Tensor, ...]:
    return (
        dx.new_empty(slot.shape[0], dx.shape[1], dtype=hidden_dtype) if need_hidden else dx.new_empty(0),
        torch.empty_like(dw, dtype=weight_dtype) if need_weight else dx.new_empty(0),
        torch.empty_like(db, dtype=bias_dtype) if need_bias else dx.new_empty(0),
    )


@_logps_op.register_fake
def _fake_logps(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    index: Tensor,
    labels: Tensor,
    weights: Tensor | None,
    segments: Tensor,
    slot: Tensor,
    counts: Tensor,
    counts_host: Tensor,
    nan_if_invalid: Tensor,
    per_token: bool,
    shift: bool,
    logit_scale: float,
    softcap: float | None,
    dtype: torch.dtype,
    strategy: str,
    backend: str,
    scratch_bytes: int,
    stats: str,
    need_hidden: bool,
    need_weight: bool,
    need_bias: bool,
) -> tuple[Tensor, ...]:
    kept = hidden.new_empty(0, dtype=accumulation_dtype(dtype))
    out = kept.new_empty(slot.shape[0]) if per_token else nan_if_invalid.new_empty(counts.shape[0])
    if passes.saves_dlogp_dhidden(strategy, (need_hidden, need_weight, need_bias)):
        dlogp_dhidden = kept.new_empty(index.shape[0] + 1, hidden.shape[1])
        saved = (kept.new_empty(0), kept.new_empty(0), kept.new_empty(0), dlogp_dhidden)
    else:
        row_max, sumexp, others = (kept.new_empty(index.shape[0]) for _ in range(3))
        saved = (row_max, sumexp, others, kept.new_empty(0))
    return out, _fake_stats(counts, stats), *saved, _fake_tokens(kept, index, stats)


@_logps_grad_op.register_fake
def _fake_logps_grad(
    grad_out: Tensor,
    hidden: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    index: Tensor,
    labels: Tensor,
    weights: Tensor | None,
    segments: Tensor,
    slot: Tensor,
    counts: Tensor,
    counts_host: Tensor,
    nan_if_invalid: Tensor,
    row_max: Tensor,
    sumexp: Tensor,
    others: Tensor,
    dlogp_dhidden: Tensor,
    hidden_dtype: torch.dtype,
    weight_dtype: torch.dtype,
    bias_dtype: torch.dtype,
    per_token: bool,
    shift: bool,
    logit_scale: float,
    softcap: float | None,
    dtype: torch.dtype,
    strategy: str,
    backend: str,
    scratch_bytes: int,
    stats: str,
    need_hidden: bool,
    need_weight: bool,
    need_bias: bool,
) -> tuple[Tensor, ...]:
    nothing = dlogp_dhidden.new_empty(0)
    if passes.saves_dlogp_dhidden(strategy, (need_hidden, need_weight, need_bias)):
        return (
            dlogp_dhidden.new_empty(slot.shape[0], dlogp_dhidden.shape[1], dtype=hidden_dtype),
            nothing,
            dlogp_dhidden.new_empty(0),
        )
    assert weight is not None, "kept unless the direction is"
    vocab, width = weight.shape
    return (
        nothing.new_empty(slot.shape[0], width, dtype=hidden_dtype) if need_hidden else nothing,
        nothing.new_empty(vocab, width, dtype=weight_dtype) if need_weight else dlogp_dhidden.new_empty(0),
        nothing.new_empty(vocab, dtype=bias_dtype) if need_bias else dlogp_dhidden.new_empty(0),
    )


def _fake_stats(counts: Tensor, stats: str) -> Tensor:
    names = [name for name in stats.split(",") if name in STATS]
    return counts.new_empty(len(names), counts.shape[0], dtype=torch.float32)


def _fake_tokens(kept: Tensor, index: Tensor, stats: str) -> Tensor:
    return kept.new_empty(index.shape[0] if TOKEN_LOGPS in stats.split(",") else 0)
