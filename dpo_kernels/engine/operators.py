"""The passes as custom operators of the namespace ``dpo_kernels``, opaque to torch's tracers.

An operator takes tensors, lists of tensors, a list of numbers and a string. ``encode`` turns a problem and a plan into
these, ``decode_problem`` turns them back. The string is decoded once for all calls that share it. The lengths of
sequences are not in it, so the plan's chunks are made inside the operator.
"""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from dpo_kernels import losses
from dpo_kernels.engine import passes
from dpo_kernels.engine.passes import GradDtypes, KeptGradients, SavedRows
from dpo_kernels.planning.plan import Plan, lay_out
from dpo_kernels.problem import Problem
from dpo_kernels.shapes import STATS, TOKEN_LOGPS, Head, NeedsGrad, PackedTokens, accumulation_dtype

DTYPES = {
    torch.float32: "float32",
    torch.float64: "float64",
    torch.bfloat16: "bfloat16",
    torch.float16: "float16",
}
BY_NAME = {name: dtype for dtype, name in DTYPES.items()}
NUM_PACKED = 8  # tensors of PackedTokens


class Spec(NamedTuple):
    """What a string says of a problem and its plan."""

    strategy: str
    backend: str
    scratch_bytes: int
    compute_dtype: torch.dtype
    needs_grad: NeedsGrad
    stats: tuple[str, ...]
    has_weights: bool
    has_softcap: bool
    per_token: bool
    shift: bool
    static: bool
    loss: str  # of ``losses.encode``, empty where log-probs are the result


class Encoded(NamedTuple):
    """A problem and a plan as an operator takes them, beside the tensors of the model."""

    packed: list[Tensor]
    numbers: list[float]
    spec: str


def packed_tensors(packed: PackedTokens) -> list[Tensor | None]:
    """The fields of packed tokens, in the order of ``decode_packed``."""
    return [
        packed.index,
        packed.labels,
        packed.weights,
        packed.segments,
        packed.slot,
        packed.counts,
        packed.counts_host,
        packed.nan_if_invalid,
    ]


def encode_options(
    problem: Problem, plan: Plan, loss_code: str = "", loss_numbers: Sequence[float] = ()
) -> tuple[list[float], str]:
    """The numbers and the string of a problem and its plan."""
    head = problem.head
    flags = (
        *problem.needs_grad,
        problem.packed.weights is not None,
        head.softcap is not None,
        problem.per_token,
        problem.shift,
        problem.static,
    )
    words = (
        plan.strategy,
        plan.backend,
        str(plan.scratch_bytes),
        DTYPES[problem.compute_dtype],
        "".join("1" if flag else "0" for flag in flags),
        ",".join(problem.stats),
        loss_code,
    )
    softcap = 0.0 if head.softcap is None else head.softcap
    return [head.logit_scale, softcap, *loss_numbers], "|".join(words)


def encode(problem: Problem, plan: Plan, loss_code: str = "", loss_numbers: Sequence[float] = ()) -> Encoded:
    """The arguments of an operator beside the tensors of the model; missing weights are an empty tensor."""
    nothing = problem.packed.nan_if_invalid.new_zeros(0)
    packed = [nothing if tensor is None else tensor for tensor in packed_tensors(problem.packed)]
    return Encoded(packed, *encode_options(problem, plan, loss_code, loss_numbers))


@functools.lru_cache(maxsize=256)
def decode_spec(spec: str) -> Spec:
    """The inverse of what ``encode`` does to words and flags."""
    strategy, backend, scratch_bytes, dtype, flags, stats, loss = spec.split("|")
    hidden, weight, bias, has_weights, has_softcap, per_token, shift, static = (flag == "1" for flag in flags)
    return Spec(
        strategy,
        backend,
        int(scratch_bytes),
        BY_NAME[dtype],
        NeedsGrad(hidden, weight, bias),
        tuple(filter(None, stats.split(","))),
        has_weights,
        has_softcap,
        per_token,
        shift,
        static,
        loss,
    )


def decode_packed(tensors: Sequence[Tensor], spec: Spec) -> PackedTokens:
    """The packed tokens from a list of their fields."""
    index, labels, weights, segments, slot, counts, counts_host, nan_if_invalid = tensors
    has = weights if spec.has_weights else None
    return PackedTokens(index, labels, has, segments, slot, counts, counts_host, nan_if_invalid)


def decode_problem(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    packed: Sequence[Tensor],
    numbers: Sequence[float],
    spec: str,
    loss: losses.BoundLoss | None = None,
) -> Problem:
    """The problem, but for its reference and what is done to the losses afterwards."""
    said = decode_spec(spec)
    logit_scale, softcap, *_ = numbers
    return Problem(
        hidden=hidden,
        head=Head(weight, bias, logit_scale, softcap if said.has_softcap else None),
        packed=decode_packed(packed, said),
        compute_dtype=said.compute_dtype,
        needs_grad=said.needs_grad,
        stats=said.stats,
        loss=loss,
        per_token=said.per_token,
        shift=said.shift,
        static=said.static,
    )


def plan_of(problem: Problem, spec: str) -> Plan:
    """The plan that was encoded, with the chunks of these lengths."""
    said = decode_spec(spec)
    return lay_out(problem.workload, said.strategy, said.backend, said.scratch_bytes)


def encode_rounding(dtypes: GradDtypes, needs: NeedsGrad) -> str:
    """Which gradients are wanted, and in which dtypes."""
    return "|".join((*(DTYPES[dtype] for dtype in dtypes), "".join("1" if need else "0" for need in needs)))


@functools.lru_cache(maxsize=256)
def decode_rounding(rounding: str) -> tuple[GradDtypes, NeedsGrad]:
    """The inverse of ``encode_rounding``."""
    *dtypes, needs = rounding.split("|")
    return GradDtypes(*(BY_NAME[name] for name in dtypes)), NeedsGrad(*(need == "1" for need in needs))


# --- the operators -------------------------------------------------------------------------------------------------


def _loss(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    packed: Sequence[Tensor],
    loss_tensors: Sequence[Tensor],
    numbers: Sequence[float],
    spec: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """``passes.loss_and_gradients``: total, losses, log-probs, means, gradients (hidden, weight, bias), tokens."""
    ref_S, denominator, by_pair = loss_tensors
    _, _, beta, *loss_numbers = numbers
    loss = losses.decode(decode_spec(spec).loss, beta, loss_numbers, by_pair)
    problem = decode_problem(hidden, weight, bias, packed, numbers, spec, loss)
    done = passes.loss_and_gradients(problem, plan_of(problem, spec), ref_S, denominator)
    return done.total, done.losses, done.logps, done.means, *done.kept, done.tokens


def _loss_backward(
    grad_total: Tensor, kept: Sequence[Tensor], slot: Tensor, rounding: str
) -> tuple[Tensor, Tensor, Tensor]:
    """``passes.scale_gradients``; ``rounding`` is what ``encode_rounding`` gives."""
    return passes.scale_gradients(grad_total, KeptGradients(*kept), slot, *decode_rounding(rounding))


def _logps(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    packed: Sequence[Tensor],
    numbers: Sequence[float],
    spec: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """``passes.logps``: log-probs, means, what is saved (max, sumexp, others, derivative), tokens."""
    problem = decode_problem(hidden, weight, bias, packed, numbers, spec)
    done = passes.logps(problem, plan_of(problem, spec))
    return done.logps, done.means, *done.saved, done.tokens


def _logps_backward(
    grad_out: Tensor,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    packed_and_saved: Sequence[Tensor],
    numbers: Sequence[float],
    spec: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """``passes.logps_gradients``."""
    packed, saved = packed_and_saved[:NUM_PACKED], packed_and_saved[NUM_PACKED:]
    problem = decode_problem(hidden, weight, bias, packed, numbers, spec)
    dtypes = GradDtypes.of(hidden, weight, bias)
    return passes.logps_gradients(grad_out, problem, plan_of(problem, spec), SavedRows(*saved), dtypes)


def _frozen_logps_backward(
    grad_out: Tensor, dlogp_dhidden: Tensor, packed: Sequence[Tensor], spec: str, dtype: torch.dtype
) -> Tensor:
    """``passes.derivative_times_upstream``: the gradient of the hidden states."""
    said = decode_spec(spec)
    return passes.derivative_times_upstream(
        grad_out, dlogp_dhidden, decode_packed(packed, said), said.per_token, said.shift, dtype
    )


loss_operator = torch.library.custom_op("dpo_kernels::loss", _loss, mutates_args=())
loss_backward_operator = torch.library.custom_op("dpo_kernels::loss_backward", _loss_backward, mutates_args=())
logps_operator = torch.library.custom_op("dpo_kernels::logps", _logps, mutates_args=())
logps_backward_operator = torch.library.custom_op("dpo_kernels::logps_backward", _logps_backward, mutates_args=())
frozen_logps_backward_operator = torch.library.custom_op(
    "dpo_kernels::frozen_logps_backward", _frozen_logps_backward, mutates_args=()
)


# --- what they return, by shape and dtype --------------------------------------------------------------------------


@loss_operator.register_fake
def _fake_loss(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    packed: Sequence[Tensor],
    loss_tensors: Sequence[Tensor],
    numbers: Sequence[float],
    spec: str,
) -> tuple[Tensor, ...]:
    said, ref_S = decode_spec(spec), loss_tensors[0]
    tokens = decode_packed(packed, said)
    sequences = tokens.counts.shape[0]
    kept = hidden.new_empty(0, dtype=accumulation_dtype(said.compute_dtype))
    need = said.needs_grad
    return (
        ref_S.new_empty(()),
        ref_S.new_empty(sequences // 2),
        ref_S.new_empty(sequences),
        _fake_means(tokens, said),
        kept.new_empty(tokens.capacity + 1, hidden.shape[1]) if need.hidden else kept.new_empty(0),
        kept.new_empty(weight.shape) if need.weight else kept.new_empty(0),
        kept.new_empty(weight.shape[0]) if need.bias else kept.new_empty(0),
        _fake_tokens(kept, tokens, said),
    )


@loss_backward_operator.register_fake
def _fake_loss_backward(grad_total: Tensor, kept: Sequence[Tensor], slot: Tensor, rounding: str) -> tuple[Tensor, ...]:
    dx, dw, db = kept
    dtypes, needs = decode_rounding(rounding)
    return (
        dx.new_empty(slot.shape[0], dx.shape[1], dtype=dtypes.hidden) if needs.hidden else dx.new_empty(0),
        torch.empty_like(dw, dtype=dtypes.weight) if needs.weight else dx.new_empty(0),
        torch.empty_like(db, dtype=dtypes.bias) if needs.bias else dx.new_empty(0),
    )


@logps_operator.register_fake
def _fake_logps(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    packed: Sequence[Tensor],
    numbers: Sequence[float],
    spec: str,
) -> tuple[Tensor, ...]:
    said = decode_spec(spec)
    tokens = decode_packed(packed, said)
    kept = hidden.new_empty(0, dtype=accumulation_dtype(said.compute_dtype))
    sequences = tokens.nan_if_invalid.new_empty(tokens.counts.shape[0])
    out = kept.new_empty(tokens.slot.shape[0]) if said.per_token else sequences
    if passes.saves_dlogp_dhidden(said.strategy, said.needs_grad):
        derivative = kept.new_empty(tokens.capacity + 1, hidden.shape[1])
        saved = (kept.new_empty(0), kept.new_empty(0), kept.new_empty(0), derivative)
    else:
        row_max, sumexp, others = (kept.new_empty(tokens.capacity) for _ in range(3))
        saved = (row_max, sumexp, others, kept.new_empty(0))
    return out, _fake_means(tokens, said), *saved, _fake_tokens(kept, tokens, said)


@logps_backward_operator.register_fake
def _fake_logps_backward(
    grad_out: Tensor,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    packed_and_saved: Sequence[Tensor],
    numbers: Sequence[float],
    spec: str,
) -> tuple[Tensor, ...]:
    need = decode_spec(spec).needs_grad
    nothing = packed_and_saved[-1].new_empty(0)
    dx, dw, db = nothing, nothing.new_empty(0), nothing.new_empty(0)
    if need.hidden:
        dx = torch.empty_like(hidden, memory_format=torch.contiguous_format)
    if need.weight:
        dw = torch.empty_like(weight, memory_format=torch.contiguous_format)
    if need.bias:
        db = weight.new_empty(weight.shape[0], dtype=GradDtypes.of(hidden, weight, bias).bias)
    return dx, dw, db


@frozen_logps_backward_operator.register_fake
def _fake_frozen_logps_backward(
    grad_out: Tensor, dlogp_dhidden: Tensor, packed: Sequence[Tensor], spec: str, dtype: torch.dtype
) -> Tensor:
    slot = decode_packed(packed, decode_spec(spec)).slot
    return dlogp_dhidden.new_empty(slot.shape[0], dlogp_dhidden.shape[1], dtype=dtype)


def _fake_means(tokens: PackedTokens, said: Spec) -> Tensor:
    names = [name for name in said.stats if name in STATS]
    return tokens.counts.new_empty(len(names), tokens.counts.shape[0], dtype=torch.float32)


def _fake_tokens(kept: Tensor, tokens: PackedTokens, said: Spec) -> Tensor:
    return kept.new_empty(tokens.capacity if TOKEN_LOGPS in said.stats else 0)
