"""A call between the door and the passes: how it is to be run, and what goes back to the caller."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dpo_kernels import autograd, checks, dispatch, inputs, losses, tiles
from dpo_kernels.outputs import DPOLossOutput
from dpo_kernels.shapes import STATS, TOKEN_LOGPS, Accumulator, PackedTokens, sum_dtype

PAIRS = ("stacked", "interleaved")


@dataclass(frozen=True)
class Run:
    """The options that say how rows are packed and computed, checked."""

    shift: bool
    ignore_index: int
    backend: str
    strategy: str
    scratch_bytes: int | None
    max_scored_tokens: int | None

    def __post_init__(self) -> None:
        checks.check_choice("backend", self.backend, ("auto", *dispatch.BACKEND_NAMES))
        checks.check_choice("strategy", self.strategy, ("auto", *dispatch.STRATEGIES))
        checks.check_count("scratch_bytes", self.scratch_bytes, least=0)
        checks.check_count("max_scored_tokens", self.max_scored_tokens, least=1)
        checks.check_flag("shift", self.shift)
        checks.check_integer("ignore_index", self.ignore_index)

    def pack(self, batch: inputs.Batch, *, stacked: bool) -> PackedTokens:
        """The scored rows."""
        return autograd.pack(batch, self.ignore_index, self.shift, stacked, self.max_scored_tokens)

    def problem(
        self,
        batch: inputs.Batch,
        rows: PackedTokens,
        loss: Any,
        need: tuple[bool, bool, bool],
        *,
        scalar: bool,
        reference_units: int,
        accumulates: bool = False,
    ) -> dispatch.Problem:
        """The facts that dispatch decides by."""
        tracing = autograd.traced(batch.hidden)
        scratch = self.scratch_bytes
        return dispatch.Problem(
            rows=rows.capacity,
            vocab=batch.head.vocab,
            hidden=batch.hidden.shape[1],
            dtype=batch.compute_dtype,
            device=batch.hidden.device,
            need=need,
            loss=loss,
            separable=loss is None or loss.separable,
            scalar=scalar,
            callable_loss=loss is not None and loss.is_callable,
            counts=None if tracing else rows.host_counts,
            static=self.max_scored_tokens is not None,
            tracing=tracing,
            scratch_bytes=tiles.default_scratch_bytes(batch.hidden.device) if scratch is None else scratch,
            reference_units=reference_units,
            accumulates=accumulates,
        )


@dataclass(frozen=True)
class Call:
    """A checked and packed call of a fused loss."""

    batch: inputs.Batch
    reference: inputs.Batch | None
    loss: Any  # SequenceLoss that can be called, with a beta
    run: Run
    rows: PackedTokens
    need: tuple[bool, bool, bool]
    stats: tuple[str, ...]
    stacked: bool
    problem: dispatch.Problem
    plan: dispatch.Plan
    labels_shape: torch.Size
    into: Accumulator | None


def prepare(hidden: Tensor, weight: Tensor, labels: Tensor, options: dict[str, Any]) -> Call:
    """Check and pack the arguments of ``fused_dpo_loss`` and choose how to run them."""
    loss = losses.bind(options["loss_type"], options["beta"], options["label_smoothing"], options["loss_options"])
    checks.check_choice("pairs", options["pairs"], PAIRS)

    def fitted(batch: inputs.Batch, rows: PackedTokens) -> losses.BoundLoss:
        pairs = batch.sequences // 2
        fits = losses.fit_to_batch(loss, pairs, batch.hidden.device)
        return fits.with_token_factor(_token_factor(rows, options), pairs) if fits.needs_token_factor else fits

    facts = {"needs_reference": loss.needs_reference, "loss_name": loss.name}
    return _prepare(hidden, weight, labels, options, fitted, facts, stacked=options["pairs"] == "stacked", paired=True)


# Options of the losses beyond pairs, with their defaults: those of ``fused_dpo_loss``.
SEQUENCE_OPTIONS: dict[str, Any] = {
    "bias": None,
    "ref_hidden": None,
    "ref_weight": None,
    "ref_bias": None,
    "ref_logps": None,
    "reference_free": False,
    "cu_seqlens": None,
    "token_weights": None,
    "shift": False,
    "ignore_index": -100,
    "logit_scale": 1.0,
    "softcap": None,
    "reduction": "mean",
    "denominator": None,
    "stats": (),
    "backend": "auto",
    "strategy": "auto",
    "scratch_bytes": None,
    "max_scored_tokens": None,
    "main_grad": None,
    "main_grad_scale": 1.0,
}


def prepare_sequences(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    bound: Callable[[inputs.Batch], Any],
    options: dict[str, Any],
    function: str,
) -> Call:
    """The same for losses of sequences or groups, in the order of the input; ``bound`` makes the loss of a batch."""
    for name in options:
        if name not in SEQUENCE_OPTIONS:
            raise TypeError(f"{function}() got an unexpected option {name!r}; known: {', '.join(SEQUENCE_OPTIONS)}")
    facts = {"needs_reference": True, "loss_name": function}
    every = SEQUENCE_OPTIONS | options
    return _prepare(hidden, weight, labels, every, lambda batch, rows: bound(batch), facts, stacked=False, paired=False)


def _prepare(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    options: dict[str, Any],
    fitted: Callable[[inputs.Batch, PackedTokens], Any],
    facts: dict[str, Any],
    *,
    stacked: bool,
    paired: bool,
) -> Call:
    checks.check_flag("reference_free", options["reference_free"])
    for name, value in (options | options.get("loss_options", {})).items():
        checks.refuse_batched(name, value)
        checks.refuse_forward_mode(name, value)
    batch = inputs.check_batch(
        hidden,
        weight,
        labels,
        options["bias"],
        options["cu_seqlens"],
        options["token_weights"],
        options["logit_scale"],
        options["softcap"],
        paired=paired,
    )
    reference = inputs.check_reference(
        batch,
        hidden,
        options["ref_hidden"],
        options["ref_weight"],
        options["ref_bias"],
        options["ref_logps"],
        options["reference_free"],
        **facts,
    )
    inputs.check_reduction(options["reduction"], options["denominator"], batch)
    inputs.check_divisor("token_denominator", options.get("token_denominator"), batch.hidden)
    stats = inputs.check_stats(options["stats"])
    inputs.check_main_grad(options["main_grad"], options["main_grad_scale"], batch)
    run = Run(
        options["shift"],
        options["ignore_index"],
        options["backend"],
        options["strategy"],
        options["scratch_bytes"],
        options["max_scored_tokens"],
    )
    rows = run.pack(batch, stacked=stacked)
    loss = fitted(batch, rows)
    need = gradients_wanted(batch)
    problem = run.problem(
        batch,
        rows,
        loss,
        need,
        scalar=options["reduction"] != "none",
        reference_units=0 if reference is None else 1,
        accumulates=options["main_grad"] is not None,
    )
    plan = dispatch.choose(problem, run.strategy, run.backend)
    into = _accumulator(options, problem, plan)
    return Call(batch, reference, loss, run, rows, need, stats, stacked, problem, plan, labels.shape, into)


def _accumulator(options: dict[str, Any], problem: dispatch.Problem, plan: dispatch.Plan) -> Accumulator | None:
    """Where the head's gradient goes, if a gradient is wanted at all and the pass that forms it runs."""
    if options["main_grad"] is None or not problem.head_trainable:
        return None
    if problem.tracing:
        raise ValueError("main_grad is written to while the loss is computed, which torch.compile must not trace")
    if not plan.forms_gradient:
        reason = dispatch.why_not("chunked", problem, plan.backend) or f"strategy={plan.strategy!r} was asked for"
        raise ValueError(f"main_grad needs the pass that forms gradients with the loss: {reason}")
    return Accumulator(options["main_grad"], float(options["main_grad_scale"]))


def run(call: Call, options: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor, dict[str, Tensor]]:
    """Loss, log-probs (S,) of policy and reference in the internal order, and statistics in that of the input."""
    # The reference comes first: a pass that forms gradients needs the coefficients, and these the reference.
    ref_S = reference_logps(call, options.get("ref_logps"))
    reduction = options.get("reduction", "mean")
    over = divisor(call, reduction, options.get("denominator"), ref_S)
    if call.plan.forms_gradient:
        loss, policy_S, means, tokens = autograd.pair_loss(
            call.batch,
            call.rows,
            ref_S,
            over,
            call.loss,
            call.plan,
            call.need,
            call.stats,
            shift=call.run.shift,
            into=call.into,
        )
        return loss, policy_S, ref_S, _statistics(call, means, tokens)
    policy_S, means, tokens = autograd.logps(
        call.batch, call.rows, call.plan, call.need, call.stats, per_token=False, shift=call.run.shift
    )
    losses_U = call.loss(policy_S, ref_S, call.rows.counts)
    loss = losses_U if reduction == "none" else losses_U.sum() / over
    return loss, policy_S, ref_S, _statistics(call, means, tokens)


def _statistics(call: Call, means: Tensor, tokens: Tensor) -> dict[str, Tensor]:
    names = [name for name in call.stats if name in STATS]
    found = {name: to_input(means[i], call.stacked) for i, name in enumerate(names)}
    found["tokens"] = to_input(call.rows.counts, call.stacked).float()
    if TOKEN_LOGPS in call.stats:
        found[TOKEN_LOGPS] = tokens.view(call.labels_shape).to(call.batch.result_dtype)
    return found


def _token_factor(rows: PackedTokens, options: dict[str, Any]) -> Tensor:
    """What turns a pair's sum of chosen log-probs into its part of their mean over tokens; see ``losses.sft``."""
    counts = rows.counts[0::2]
    scored = counts.sum().clamp(min=1).to(sum_dtype(counts.device))
    tokens, pairs = options["token_denominator"], options["denominator"]
    over = torch.full_like(scored, counts.shape[0]) if pairs is None else number_like(pairs, scored)
    return over / (scored if tokens is None else number_like(tokens, scored))


def number_like(value: float | Tensor, like: Tensor) -> Tensor:
    """A number of the caller's, in the dtype and on the device of a 0-d tensor."""
    if isinstance(value, Tensor):
        return value.detach().to(device=like.device, dtype=like.dtype, copy=True)
    return torch.full_like(like, value)


def gradients_wanted(batch: inputs.Batch) -> tuple[bool, bool, bool]:
    """Which of (hidden, weight, bias) want a gradient now."""
    recording, head = torch.is_grad_enabled(), batch.head
    return (
        recording and batch.hidden.requires_grad,
        recording and head.weight.requires_grad,
        recording and head.bias is not None and head.bias.requires_grad,
    )


def sequence_or_token_logps(batch: inputs.Batch, run: Run, *, per_token: bool) -> Tensor:
    """Differentiable log-probs without a loss, in the result dtype."""
    rows, need = run.pack(batch, stacked=False), gradients_wanted(batch)
    problem = run.problem(batch, rows, None, need, scalar=False, reference_units=0)
    plan = dispatch.choose(problem, run.strategy, run.backend)
    out, _, _ = autograd.logps(batch, rows, plan, need, (), per_token=per_token, shift=run.shift)
    return out.to(batch.result_dtype)


def reference_logps(call: Call, ref_logps: Tensor | None) -> Tensor:
    """Reference log-probs (S,) in the internal order and in the dtype of sums: computed, cached, or 0."""
    dtype = sum_dtype(call.batch.hidden.device)
    if ref_logps is not None:
        return to_internal(ref_logps.detach().to(dtype), call.stacked)
    if call.reference is None:
        return torch.zeros(call.batch.sequences, dtype=dtype, device=call.batch.hidden.device)
    frozen = (False, False, False)
    problem = call.run.problem(call.reference, call.rows, None, frozen, scalar=False, reference_units=0)
    # A strategy asked for by name is about the policy; nothing speaks against the first one here.
    plan = dispatch.choose(problem, "auto" if call.run.strategy == "chunked" else call.run.strategy, call.run.backend)
    with torch.no_grad():
        out, _, _ = autograd.logps(call.reference, call.rows, plan, frozen, (), per_token=False, shift=call.run.shift)
    return out


def divisor(call: Call, reduction: str, denominator: float | Tensor | None, like: Tensor) -> Tensor:
    """What the sum of the losses is divided by, 0-d, in the dtype of sums."""
    if reduction != "mean":
        return like.new_ones(())
    units = len(call.loss.bounds(call.batch.sequences)) - 1
    return number_like(units if denominator is None else denominator, like.new_ones(()))


def to_internal(values_S: Tensor, stacked: bool) -> Tensor:
    """Input order to chosen and rejected alternating."""
    return values_S.view(2, -1).t().reshape(-1) if stacked else values_S


def to_input(values_S: Tensor, stacked: bool) -> Tensor:
    """The inverse of ``to_internal``, on the last dimension."""
    if not stacked:
        return values_S
    return torch.cat([values_S[..., 0::2], values_S[..., 1::2]], dim=-1)


def output(call: Call, loss: Tensor, policy_S: Tensor, ref_S: Tensor, stats: dict[str, Tensor]) -> DPOLossOutput:
    """The results in the caller's order and dtype."""
    dtype = call.batch.result_dtype
    policy_S, ref_S = policy_S.detach(), ref_S.detach()
    rewards_S = call.loss.beta * (policy_S - ref_S)
    return DPOLossOutput(
        loss.to(dtype),
        rewards_S[0::2].to(dtype),
        rewards_S[1::2].to(dtype),
        policy_S[0::2].to(dtype),
        policy_S[1::2].to(dtype),
        ref_S[0::2].to(dtype),
        ref_S[1::2].to(dtype),
        stats,
    )
