"""The passes as custom operators of the namespace ``dpo_kernels``, opaque to torch's tracers.

An operator takes tensors, lists of tensors, a list of numbers and a string. ``encode`` turns a problem and a plan into
these, and ``decode_problem`` turns them back. The string is decoded once for all calls that share it. It does not hold
the lengths of sequences, so the plan's chunks are made inside the operator.
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
from dpo_kernels.shapes import STATS, TOKEN_LOGPS, Head, NeedsGrad, PackedTokens, Sampling, accumulation_dtype

# The string names dtypes in this way.
DTYPES = {
    torch.float32: "float32",
    torch.float64: "float64",
    torch.bfloat16: "bfloat16",
    torch.float16: "float16",
}
BY_NAME = {name: dtype for dtype, name in DTYPES.items()}
NUM_PACKED = 9  # the number of tensors of PackedTokens, and the seed of a sample


class Spec(NamedTuple):
    """The options of a problem and its plan that the string of an operator holds."""

    strategy: str
    backend: str
    compute_dtype: torch.dtype
    needs_grad: NeedsGrad
    stats: tuple[str, ...]
    has_weights: bool
    has_softcap: bool
    per_token: bool
    shift: bool
    static: bool
    samples: bool
    loss: str  # the string of ``losses.encode``, empty where log-probs are the result


class Encoded(NamedTuple):
    """A problem and a plan as the arguments of an operator. The tensors of the model come before them."""

    packed: list[Tensor]
    numbers: list[float]
    spec: str


def packed_tensors(problem: Problem) -> list[Tensor | None]:
    """Return the fields of packed tokens, and the seed of a sample if it is a tensor, as ``decode_packed`` expects."""
    packed, sampling = problem.packed, problem.sampling
    return [
        packed.index,
        packed.labels,
        packed.weights,
        packed.segments,
        packed.slot,
        packed.counts,
        packed.counts_host,
        packed.nan_if_invalid,
        sampling.seed if sampling is not None and isinstance(sampling.seed, Tensor) else None,
    ]


def encode_options(
    problem: Problem, plan: Plan, loss_code: str = "", loss_numbers: Sequence[float] = ()
) -> tuple[list[float], str]:
    """Return the numbers and the string of a problem and its plan; the loss is encoded by ``losses``."""
    head = problem.head
    flags = (
        *problem.needs_grad,
        problem.packed.weights is not None,
        head.softcap is not None,
        problem.per_token,
        problem.shift,
        problem.static,
        problem.sampling is not None,
    )
    words = (
        plan.strategy,
        plan.backend,
        DTYPES[problem.compute_dtype],
        "".join("1" if flag else "0" for flag in flags),
        ",".join(problem.stats),
        loss_code,
    )
    softcap = 0.0 if head.softcap is None else head.softcap
    # A scratch that changes from call to call must not make another graph: it is a number, not a part of the string.
    tau = 0.0 if problem.sampling is None else problem.sampling.tau
    return [head.logit_scale, softcap, float(plan.scratch_bytes), tau, *loss_numbers], "|".join(words)


def encode(problem: Problem, plan: Plan, loss_code: str = "", loss_numbers: Sequence[float] = ()) -> Encoded:
    """Return the arguments of an operator after the tensors of the model. Missing tensors become empty ones."""
    nothing = problem.packed.nan_if_invalid.new_zeros(0)
    packed = [nothing if tensor is None else tensor for tensor in packed_tensors(problem)]
    return Encoded(packed, *encode_options(problem, plan, loss_code, loss_numbers))


@functools.lru_cache(maxsize=256)
def decode_spec(spec: str) -> Spec:
    """Return the options that ``encode_options`` has written into a string."""
    strategy, backend, dtype, flags, stats, loss = spec.split("|")
    hidden, weight, bias, has_weights, has_softcap, per_token, shift, static, samples = (flag == "1" for flag in flags)
    return Spec(
        strategy,
        backend,
        BY_NAME[dtype],
        NeedsGrad(hidden, weight, bias),
        tuple(filter(None, stats.split(","))),
        has_weights,
        has_softcap,
        per_token,
        shift,
        static,
        samples,
        loss,
    )


def decode_packed(tensors: Sequence[Tensor], spec: Spec) -> PackedTokens:
    """Return packed tokens from the list of their fields, which ends with a seed."""
    index, labels, weights, segments, slot, counts, counts_host, nan_if_invalid, _ = tensors
    has = weights if spec.has_weights else None
    if spec.static:  # nothing that the host knows, so no operator's argument is a tensor on the CPU
        counts_host = torch.full((counts.shape[0],), -1, dtype=torch.int64, device="cpu")
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
    """Return the problem without its reference and its reduction. ``packed`` is a list of ``NUM_PACKED`` tensors.

    The seed is the last of them. Outside a tracer it may be a number, which the list lacks and the caller sets.
    """
    said = decode_spec(spec)
    logit_scale, softcap, _, tau, *_ = numbers
    return Problem(
        hidden=hidden,
        head=Head(weight, bias, logit_scale, softcap if said.has_softcap else None),
        packed=decode_packed(packed, said),
        compute_dtype=said.compute_dtype,
        needs_grad=said.needs_grad,
        stats=said.stats,
        loss=loss,
        sampling=Sampling(tau, packed[-1]) if said.samples else None,
        per_token=said.per_token,
        shift=said.shift,
        static=said.static,
    )


def plan_of(problem: Problem, numbers: Sequence[float], spec: str) -> Plan:
    """Return the plan that was encoded, with chunks for the lengths of this problem."""
    options = decode_spec(spec)
    _, _, scratch_bytes, *_ = numbers
    return lay_out(problem.workload, options.strategy, options.backend, int(scratch_bytes))


def encode_rounding(dtypes: GradDtypes, needs: NeedsGrad) -> str:
    """Return a string that says which gradients are wanted, and in which dtypes."""
    return "|".join((*(DTYPES[dtype] for dtype in dtypes), "".join("1" if need else "0" for need in needs)))


@functools.lru_cache(maxsize=256)
def decode_rounding(rounding: str) -> tuple[GradDtypes, NeedsGrad]:
    """Return what ``encode_rounding`` has written into a string."""
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
    """Run ``passes.loss_and_gradients``.

    ``loss_tensors`` are the reference's log-probs, the denominator and the loss's tensors by pair. The outputs are the
    total, losses, log-probs, means, gradients (hidden, weight, bias) and log-probs of tokens.
    """
    ref_S, denominator, by_pair = loss_tensors
    _, _, _, _, beta, *loss_numbers = numbers
    loss = losses.decode(decode_spec(spec).loss, beta, loss_numbers, by_pair)
    problem = decode_problem(hidden, weight, bias, packed, numbers, spec, loss)
    result = passes.loss_and_gradients(problem, plan_of(problem, numbers, spec), ref_S, denominator)
    return result.total, result.losses, result.logps, result.means, *result.kept, result.tokens


def _loss_backward(
    grad_total: Tensor, kept: Sequence[Tensor], slot: Tensor, rounding: str
) -> tuple[Tensor, Tensor, Tensor]:
    """Run ``passes.scale_gradients``. ``rounding`` comes from ``encode_rounding``."""
    return passes.scale_gradients(grad_total, KeptGradients(*kept), slot, *decode_rounding(rounding))


def _logps(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    packed: Sequence[Tensor],
    numbers: Sequence[float],
    spec: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Run ``passes.logps``. The outputs are log-probs, means, the four of ``SavedRows``, and log-probs of tokens."""
    problem = decode_problem(hidden, weight, bias, packed, numbers, spec)
    result = passes.logps(problem, plan_of(problem, numbers, spec))
    return result.logps, result.means, *result.saved, result.tokens


def _logps_backward(
    grad_out: Tensor,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    packed_and_saved: Sequence[Tensor],
    numbers: Sequence[float],
    spec: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Run ``passes.logps_gradients``. ``packed_and_saved`` lists the packed tokens and then ``SavedRows``."""
    packed, saved = packed_and_saved[:NUM_PACKED], packed_and_saved[NUM_PACKED:]
    problem = decode_problem(hidden, weight, bias, packed, numbers, spec)
    dtypes = GradDtypes.of(hidden, weight, bias)
    return passes.logps_gradients(grad_out, problem, plan_of(problem, numbers, spec), SavedRows(*saved), dtypes)


def _frozen_logps_backward(
    grad_out: Tensor, dlogp_dhidden: Tensor, packed: Sequence[Tensor], spec: str, dtype: torch.dtype
) -> Tensor:
    """Run ``passes.derivative_times_upstream``, which gives the gradient of the hidden states."""
    options = decode_spec(spec)
    return passes.derivative_times_upstream(
        grad_out, dlogp_dhidden, decode_packed(packed, options), options.per_token, options.shift, dtype
    )


loss_operator = torch.library.custom_op("dpo_kernels::loss", _loss, mutates_args=())
loss_backward_operator = torch.library.custom_op("dpo_kernels::loss_backward", _loss_backward, mutates_args=())
logps_operator = torch.library.custom_op("dpo_kernels::logps", _logps, mutates_args=())
logps_backward_operator = torch.library.custom_op("dpo_kernels::logps_backward", _logps_backward, mutates_args=())
frozen_logps_backward_operator = torch.library.custom_op(
    "dpo_kernels::frozen_logps_backward", _frozen_logps_backward, mutates_args=()
)


# --- fake kernels: each gives the shapes and dtypes of its operator's outputs ----------------------------------------


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
    """Return empty tensors with the shapes and dtypes of the outputs of ``_loss``."""
    options, ref_S = decode_spec(spec), loss_tensors[0]
    tokens = decode_packed(packed, options)
    sequences = tokens.counts.shape[0]
    empty = hidden.new_empty(0, dtype=accumulation_dtype(options.compute_dtype))
    need = options.needs_grad
    return (
        ref_S.new_empty(()),
        ref_S.new_empty(sequences // 2),
        ref_S.new_empty(sequences),
        _fake_means(tokens, options),
        empty.new_empty(tokens.capacity + 1, hidden.shape[1]) if need.hidden else empty.new_empty(0),
        empty.new_empty(weight.shape) if need.weight else empty.new_empty(0),
        empty.new_empty(weight.shape[0]) if need.bias else empty.new_empty(0),
        _fake_tokens(empty, tokens, options),
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
    """Return empty tensors with the shapes and dtypes of the outputs of ``_logps``."""
    options = decode_spec(spec)
    tokens = decode_packed(packed, options)
    empty = hidden.new_empty(0, dtype=accumulation_dtype(options.compute_dtype))
    sequences = tokens.nan_if_invalid.new_empty(tokens.counts.shape[0])
    out = empty.new_empty(tokens.slot.shape[0]) if options.per_token else sequences
    if passes.saves_dlogp_dhidden(options.strategy, options.needs_grad):
        derivative = empty.new_empty(tokens.capacity + 1, hidden.shape[1])
        saved = (empty.new_empty(0), empty.new_empty(0), empty.new_empty(0), derivative)
    else:
        row_max, sumexp, others = (empty.new_empty(tokens.capacity) for _ in range(3))
        saved = (row_max, sumexp, others, empty.new_empty(0))
    return out, _fake_means(tokens, options), *saved, _fake_tokens(empty, tokens, options)


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
    """Return empty tensors with the shapes and dtypes of the outputs of ``_logps_backward``."""
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
