"""Losses of pairs, chosen and rejected: ``fused_dpo_loss``, its module, the loss on log-probs alone, ``explain``.

Every function takes hidden states as ``(2B, T, H)`` with labels ``(2B, T)``, or packed as ``(N, H)`` with labels
``(N,)`` and ``cu_seqlens`` ``(2B + 1,)``. A position is scored unless its label is ``ignore_index``.
"""

import inspect
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn

from dpo_kernels import checks, losses
from dpo_kernels.engine.run import pair_output, run
from dpo_kernels.inputs.divisors import check_divisor
from dpo_kernels.inputs.make_problem import pair_problem
from dpo_kernels.inputs.options import (
    Arguments,
    HeadOptions,
    Layout,
    MainGradOptions,
    PolicyTensors,
    Reduction,
    ReferenceTensors,
    check_stats,
    group,
)
from dpo_kernels.inputs.sequence_logps import check_logps
from dpo_kernels.loss_interface import LossInputs
from dpo_kernels.outputs import DPOLossOutput
from dpo_kernels.planning.plan import Execution, Plan, make_plan
from dpo_kernels.shapes import number_like

Loss = str | Sequence[str] | Callable[[LossInputs], Tensor]


def fused_dpo_loss(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    bias: Tensor | None = None,
    ref_hidden: Tensor | None = None,
    ref_weight: Tensor | None = None,
    ref_bias: Tensor | None = None,
    ref_logps: Tensor | None = None,
    reference_free: bool = False,
    loss_type: Loss = "sigmoid",
    beta: float = 0.1,
    label_smoothing: float = 0.0,
    cu_seqlens: Tensor | None = None,
    pairs: str = "stacked",
    token_weights: Tensor | None = None,
    shift: bool = False,
    ignore_index: int = -100,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    reduction: str = "mean",
    denominator: float | Tensor | None = None,
    token_denominator: float | Tensor | None = None,
    stats: tuple[str, ...] = (),
    backend: str = "auto",
    strategy: str = "auto",
    scratch_bytes: int | None = None,
    max_scored_tokens: int | None = None,
    main_grad: Tensor | None = None,
    main_grad_scale: float = 1.0,
    **loss_options: Any,
) -> DPOLossOutput:
    """DPO and its family from hidden states, without vocabulary-sized logits.

    ``loss = mean over pairs of -log sigmoid(beta * [(logp_w - ref_w) - (logp_l - ref_l)])`` for the default
    ``loss_type`` (Rafailov et al., arXiv 2305.18290, eq. 7), where a sequence's log-prob is the sum of those of its
    scored tokens, ``log softmax(cap(logit_scale * (W h + b)))[label]``, ``cap(z) = softcap * tanh(z / softcap)``.

    Args:
        hidden: ``(2B, T, H)`` or ``(N, H)``, float32, bfloat16, float16 or float64. Differentiable.
        weight: ``(V, H)`` LM head of the same dtype (any under autocast). Differentiable.
        labels: ``(2B, T)`` or ``(N,)``, int32 or int64, in ``[0, V)`` or ``ignore_index``.
        bias: ``(V,)``. Differentiable.
        ref_hidden: hidden states of the reference, same layout, its own H; scored here without gradient, with the
            policy's ``logit_scale`` and ``softcap`` (a model with another scale: scale its ``ref_weight`` and bias).
        ref_weight: ``(V, H_ref)`` head of the reference; None shares ``weight`` (and ``bias``).
        ref_bias: ``(V,)`` bias of the reference's head.
        ref_logps: ``(2B,)`` cached reference log-probs, in the order of the input sequences; float32, since 16 bits
            hold -300 to within a nat.
        reference_free: no reference: its log-probs count as 0.
        loss_type: a name of the family (``dpo_kernels.LOSSES``), a list of names, summed with ``loss_weights``, or a
            callable ``fn(LossInputs) -> (P,)``, which is taken to be coupled over the batch unless ``fn.separable`` is
            true.
        beta: inverse temperature, finite, at least 0 (ipo, sppo_hard, cal_dpo: above 0).
        label_smoothing: in [0, 0.5], for losses that have it; with "sigmoid" it is cDPO.
        cu_seqlens: ``(2B + 1,)`` cumulative lengths of packed sequences, int32 or int64.
        pairs: "stacked" (all chosen, then all rejected) or "interleaved" (chosen, rejected, chosen, ...).
        token_weights: like ``labels``, floating point: weight of each label in its sequence's sum, of the policy and
            of a reference scored here. Never differentiated.
        shift: labels are as in Hugging Face models, ``labels[:, t + 1]`` is predicted by ``hidden[:, t]``.
        ignore_index: label of positions that are not scored.
        logit_scale: factor on the logits.
        softcap: soft cap of the logits after scaling, None for none.
        reduction: "mean" over pairs, "sum", or "none" for the loss by pair.
        denominator: replaces the number of pairs under "mean" (gradient accumulation, data parallel).
        token_denominator: replaces the number of chosen tokens in token-level terms (``sft``, ``nll_weight``).
        stats: any of "entropy", "mean_logits", "top1" and "log_sum_p2" (the log of the sum of squared probabilities
            over the vocabulary): means over the scored tokens of a sequence; and "token_logps", each label's own
            log-prob in the shape of ``labels``, 0 where not scored. Detached.
        backend: "auto", "triton", "cuda", "cpp" or "torch".
        strategy: "auto", "chunked", "recompute" or "streaming".
        scratch_bytes: cap on vocabulary-sized scratch; None: 2 GiB on a GPU of 80 GB or more, a fortieth of the memory
            of a smaller one, 512 MiB elsewhere.
        max_scored_tokens: static capacity: packs without a host sync; more scored tokens make the loss NaN.
        main_grad: contiguous ``(V, H)`` float32 (float64 for float64 inputs), ``weight.grad`` or a buffer of the
            optimizer's: the gradient of ``weight`` is added to it during this call, times ``main_grad_scale``, and
            autograd gets none. Only a pair longer than the scratch then takes ``(V, H)`` memory. Losses separable by
            pair only.
        main_grad_scale: the upstream that ``loss`` will get (1 / accumulation steps, a GradScaler's scale). A backward
            with another one is an error on the CPU and NaN in the other gradients elsewhere; a second one an error.
        **loss_options: options of the loss by name, and those that every loss has: ``pair_weights`` ``(P,)`` multiplies
            its loss, ``nll_weight`` adds as much of the mean negative log-prob of chosen tokens; losses of log-ratios
            also take ``f_divergence`` ("reverse_kl", "forward_kl", "js", "alpha") and ``f_alpha``.

    Returns:
        ``DPOLossOutput``; all but ``loss`` detached.

    Raises:
        ValueError: shapes, values and combinations, with the argument's name. A label out of range is one on the CPU;
            on other devices it makes loss and gradients NaN instead, since looking would be a sync.
        TypeError: dtypes and types.
        RuntimeError: when a gradient is differentiated again, under vmap, in forward mode, and for batched gradients.

    """
    loss = losses.bind(loss_type, beta, label_smoothing, loss_options)
    arguments = Arguments(
        PolicyTensors(hidden, weight, labels, bias, cu_seqlens, token_weights),
        HeadOptions(logit_scale, softcap),
        ReferenceTensors(ref_hidden, ref_weight, ref_bias, ref_logps, reference_free),
        Layout(pairs, shift, ignore_index, max_scored_tokens),
        Reduction(reduction, denominator, token_denominator),
        MainGradOptions(main_grad, main_grad_scale),
        stats,
    )
    execution = Execution(backend, strategy, scratch_bytes)
    problem = pair_problem(arguments, loss)
    return pair_output(problem, run(problem, make_plan(problem.workload, execution)))


class FusedDPOLoss(nn.Module):
    """``fused_dpo_loss`` as a module: options in the constructor, tensors in ``forward``.

    Args and errors are those of ``fused_dpo_loss``; a loss or option that does not exist is refused at construction.
    """

    def __init__(
        self,
        *,
        loss_type: Loss = "sigmoid",
        beta: float = 0.1,
        label_smoothing: float = 0.0,
        reference_free: bool = False,
        pairs: str = "stacked",
        shift: bool = False,
        ignore_index: int = -100,
        logit_scale: float = 1.0,
        softcap: float | None = None,
        reduction: str = "mean",
        stats: tuple[str, ...] = (),
        backend: str = "auto",
        strategy: str = "auto",
        scratch_bytes: int | None = None,
        max_scored_tokens: int | None = None,
        **loss_options: Any,
    ) -> None:
        super().__init__()
        losses.bind(loss_type, beta, label_smoothing, loss_options)
        Reduction(reduction)
        ReferenceTensors(reference_free=reference_free)
        HeadOptions(logit_scale, softcap)
        Layout(pairs, shift, ignore_index, max_scored_tokens)
        Execution(backend, strategy, scratch_bytes)
        self.options = {
            "loss_type": loss_type,
            "beta": beta,
            "label_smoothing": label_smoothing,
            "reference_free": reference_free,
            "pairs": pairs,
            "shift": shift,
            "ignore_index": ignore_index,
            "logit_scale": logit_scale,
            "softcap": softcap,
            "reduction": reduction,
            "stats": check_stats(stats),
            "backend": backend,
            "strategy": strategy,
            "scratch_bytes": scratch_bytes,
            "max_scored_tokens": max_scored_tokens,
            **loss_options,
        }

    def forward(
        self,
        hidden: Tensor,
        weight: Tensor,
        labels: Tensor,
        *,
        bias: Tensor | None = None,
        ref_hidden: Tensor | None = None,
        ref_weight: Tensor | None = None,
        ref_bias: Tensor | None = None,
        ref_logps: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        token_weights: Tensor | None = None,
        denominator: float | Tensor | None = None,
        token_denominator: float | Tensor | None = None,
        **loss_options: Tensor,
    ) -> DPOLossOutput:
        """See ``fused_dpo_loss``; ``loss_options`` are tensors by pair (``margin``, ``pair_weights``, ...)."""
        return fused_dpo_loss(
            hidden,
            weight,
            labels,
            bias=bias,
            ref_hidden=ref_hidden,
            ref_weight=ref_weight,
            ref_bias=ref_bias,
            ref_logps=ref_logps,
            cu_seqlens=cu_seqlens,
            token_weights=token_weights,
            denominator=denominator,
            token_denominator=token_denominator,
            **self.options | loss_options,
        )

    def extra_repr(self) -> str:
        """The options."""
        return ", ".join(f"{name}={value!r}" for name, value in self.options.items())


def dpo_loss(
    policy_chosen_logps: Tensor,
    policy_rejected_logps: Tensor,
    ref_chosen_logps: Tensor | None,
    ref_rejected_logps: Tensor | None,
    beta: float = 0.1,
    label_smoothing: float = 0.0,
    *,
    loss_type: Loss = "sigmoid",
    reference_free: bool = False,
    chosen_tokens: Tensor | None = None,
    rejected_tokens: Tensor | None = None,
    token_denominator: float | Tensor | None = None,
    **loss_options: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    """The loss on log-probs alone: ``(losses, chosen_rewards, rejected_rewards)``, each ``(P,)``, no reduction.

    float32, float64 if the policy's are. ``losses`` is differentiable, the rewards ``beta * (policy - ref)`` are
    detached. Losses that average over tokens (ipo) divide by ``chosen_tokens`` and ``rejected_tokens``; without them
    the log-probs are taken to be averages. ``reference_free=True`` takes None for the reference. Errors as in
    ``fused_dpo_loss``.
    """
    bound = losses.bind(loss_type, beta, label_smoothing, loss_options)
    checks.check_flag("reference_free", reference_free)
    policy, reference, tokens = check_logps(
        (policy_chosen_logps, policy_rejected_logps),
        (ref_chosen_logps, ref_rejected_logps),
        (chosen_tokens, rejected_tokens),
        reference_free,
        bound.needs_reference,
        bound.name,
    )
    check_divisor("token_denominator", token_denominator, policy[0], "policy_chosen_logps")
    bound = losses.fit_to_batch(bound, policy[0].shape[0], policy[0].device)
    divisor = tokens[0].sum().clamp(min=1)
    if token_denominator is not None:
        divisor = number_like(token_denominator, divisor)
    bound = bound.with_token_factor(policy[0].shape[0] / divisor, policy[0].shape[0])
    losses_P = bound.evaluate(LossInputs._make((*policy, *reference, *tokens, bound.beta)))
    chosen, rejected = (bound.beta * (p - r).detach() for p, r in zip(policy, reference, strict=True))
    return losses_P, chosen, rejected


def explain(hidden: Tensor, weight: Tensor, labels: Tensor, **options: Any) -> Plan:
    """What ``fused_dpo_loss`` with the same arguments would run, what it costs, and why nothing else.

    The result's fields say it to programs (``strategy``, ``backend``, ``units``, ``reference_units``, ``tile``,
    ``scratch_bytes``, ``chunks``, ``extra_bytes``, ``lent``, ``against``), its ``str()`` to people. Nothing is computed
    on the head. Raises what the call itself would raise.
    """
    bound = inspect.signature(fused_dpo_loss).bind(hidden, weight, labels, **options)
    bound.apply_defaults()
    named = bound.arguments
    loss = losses.bind(named["loss_type"], named["beta"], named["label_smoothing"], named["loss_options"])
    problem = pair_problem(Arguments.by_name(named), loss)
    return make_plan(problem.workload, group(Execution, named))
