"""Losses of pairs, chosen and rejected: ``fused_dpo_loss``, and ``explain``, which says how it would run.

Every function takes hidden states as ``(2B, T, H)`` with labels ``(2B, T)``, or packed as ``(N, H)`` with labels
``(N,)`` and ``cu_seqlens`` ``(2B + 1,)``. A position is scored unless its label is ``ignore_index``.
"""

import inspect
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from dpo_kernels import losses
from dpo_kernels.distributed import ContextParallel, VocabParallel
from dpo_kernels.engine.in_step import planned
from dpo_kernels.engine.run import run_pairs
from dpo_kernels.inputs.make_problem import pair_problem
from dpo_kernels.inputs.options import (
    Arguments,
    GradientOptions,
    HeadOptions,
    Layout,
    MainGradOptions,
    PolicyTensors,
    Reduction,
    ReferenceTensors,
)
from dpo_kernels.loss_interface import LossInputs
from dpo_kernels.outputs import DPOLossOutput
from dpo_kernels.planning.plan import Execution, Plan

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
    ref_token_logps: Tensor | None = None,
    reference_free: bool = False,
    loss_type: Loss = "sigmoid",
    beta: float = 0.1,
    label_smoothing: float = 0.0,
    cu_seqlens: Tensor | None = None,
    pairs: str = "stacked",
    token_weights: Tensor | None = None,
    rows: Tensor | None = None,
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
    gradient: str = "dense",
    tau: float = 2.0**-12,
    seed: int | Tensor = 0,
    sparse_weight_grad: bool = False,
    vocab_parallel: VocabParallel | None = None,
    context_parallel: ContextParallel | None = None,
    **loss_options: Any,
) -> DPOLossOutput:
    """Compute DPO, or another loss of its family, from hidden states without vocabulary-sized logits.

    The default loss is DPO, the mean over pairs of ``-log sigmoid(u)``, where w is the chosen and l the rejected
    sequence::

        u = beta * [(logp_w - ref_w) - (logp_l - ref_l)]

    A sequence's log-prob is the sum over its scored tokens of ``log softmax(cap(logit_scale * (W h + b)))[label]``,
    with ``cap(z) = softcap * tanh(z / softcap)``.

    Args:
        hidden: Hidden states of the policy, ``(2B, T, H)``, or ``(N, H)`` with ``cu_seqlens``; float32, bfloat16,
            float16 or float64. It is differentiable.
        weight: Weight of the LM head, ``(V, H)``, in the dtype of ``hidden`` (under autocast in any dtype). It is
            differentiable. A frozen one may be a ``TiledWeight``.
        labels: Token that each position predicts, ``(2B, T)`` or ``(N,)``, int32 or int64. Each label lies in
            ``[0, V)`` or equals ``ignore_index``.
        bias: Bias of the LM head, ``(V,)``, in the dtype of ``hidden``. None means no bias. It is differentiable.
        ref_hidden: Hidden states of the reference model, ``(2B, T, H_ref)`` or ``(N, H_ref)``, floating point. The call
            scores them without gradient and applies the policy's ``logit_scale`` and ``softcap``. If the reference has
            another scale, multiply ``ref_weight`` and ``ref_bias`` by the quotient.
        ref_weight: Weight of the reference's LM head, ``(V, H_ref)``, in the dtype of ``ref_hidden``. None shares
            ``weight`` and ``bias``.
        ref_bias: Bias of the reference's LM head, ``(V,)``, in the dtype of ``ref_hidden``.
        ref_logps: Cached log-probs of the reference, ``(2B,)``, floating point, in the order of the input sequences.
            Keep them in float32, because bfloat16 holds -300 only to within one nat.
        ref_token_logps: Cached log-prob of each label under the reference, in the shape of ``labels``, floating point.
            It takes the place of ``ref_logps``, and the call sums it with ``token_weights``. What stands where no label
            is scored does not matter. Keep it in float32.
        reference_free: bool. If true, there is no reference, and its log-probs count as 0.
        loss_type: Name of a loss (a key of ``dpo_kernels.LOSSES``), a list of names or a callable. A list is summed
            with ``loss_weights``. A callable maps ``LossInputs`` to ``(P,)`` losses. It counts as coupled over the
            batch, unless it has an attribute ``separable`` that is true.
        beta: Inverse temperature, a finite number >= 0. The losses "ipo", "sppo_hard" and "cal_dpo" need beta > 0.
        label_smoothing: Probability that a label is flipped, a number in [0, 0.5], for the losses that have this
            option. With "sigmoid" the loss is then cDPO.
        cu_seqlens: Cumulative lengths of packed sequences, ``(2B + 1,)``, int32 or int64. None means that the input is
            padded.
        pairs: Order of the sequences. "stacked" puts all chosen before all rejected ones, "interleaved" alternates
            chosen and rejected.
        token_weights: Weight of each label in its sequence's sum, in the shape of ``labels``, floating point. It
            applies to the policy and to a reference that is scored here. It gets no gradient.
        rows: Row of ``hidden`` that predicts each label, in the shape of ``labels``, int32 or int64. ``hidden`` is then
            ``(M, H)`` with any number M of rows, and ``ref_hidden`` has the same M. Labels may share a row, whose
            gradients are added up. Its logits are computed once for each of its labels. Rows of labels that are not
            scored do not matter.
        shift: bool. If true, ``hidden[:, t]`` predicts ``labels[:, t + 1]``, as in Hugging Face models.
        ignore_index: Label of the positions that are not scored, an integer.
        logit_scale: Factor on the logits, a finite number.
        softcap: Cap of the scaled logits, a number > 0. None means no cap.
        reduction: "mean" over pairs, "sum", or "none" for the loss of each pair.
        denominator: Number > 0, or a 0-d tensor, that replaces the number of pairs under "mean". Gradient accumulation
            and data parallel training need it.
        token_denominator: Number > 0, or a 0-d tensor, that replaces the number of chosen tokens in the means over
            tokens (``sft``, ``nll_weight``).
        stats: Names of statistics to return without gradient, a tuple, list or set. "entropy", "mean_logits", "top1"
            and "log_sum_p2" are means over the scored tokens of each sequence. "log_sum_p2" is the log of the summed
            squared probabilities. "token_logps" is the log-prob of each label, in the shape of ``labels``, and 0 where
            not scored. "kl" is the sum over a sequence's scored tokens of ``KL(reference || policy)`` in nats, with
            ``token_weights``. It needs ``ref_hidden``.
        backend: "auto", "triton", "cuda", "cpp" or "torch".
        strategy: "auto", "chunked", "frozen_head", "recompute" or "streaming". If the head is frozen, "chunked" and
            "recompute" run "frozen_head". A KL divergence takes "chunked" or "recompute".
        scratch_bytes: Cap on the bytes of vocabulary-sized scratch, an integer >= 0. None means 2 GiB on a GPU of 80 GB
            or more, a fortieth of the memory of a smaller GPU, and 512 MiB elsewhere. A GPU with little free memory
            gets less.
        max_scored_tokens: Static number of scored tokens to reserve, an integer >= 1. With it the call needs no host
            sync. The loss is NaN if there are more.
        main_grad: Buffer for the gradient of ``weight``: ``weight.grad``, or one that the optimizer owns. It is
            ``(V, H)``, contiguous, and float32 (float64 for float64 inputs). The call adds ``main_grad_scale`` times
            the gradient to it, and autograd then gets none. The loss must be separable by pair. The call allocates
            ``(V, H)`` memory only if a pair exceeds the scratch.
        main_grad_scale: Upstream gradient that ``loss`` will get, a number other than 0. It is 1 / accumulation steps,
            or a GradScaler's scale. If another one arrives, the backward pass raises on the CPU and gives NaN
            elsewhere. A second backward pass raises.
        gradient: "dense", or "sparse" for gradients of a sample: an unbiased estimate that computes a small part of the
            products. The loss and the log-probs are exact. See docs/sparse-gradient.md.
        tau: Threshold of the sample, a number in (0, 1]. Probabilities above it are kept as they are. A token keeps
            about ``1 / tau`` entries at the most.
        seed: Seed of the sample, an int or a 0-d int64 tensor on the device of ``hidden``. Equal seeds give equal bits.
            Take another one at each step, for each micro-batch and on each rank.
        sparse_weight_grad: bool. If true, the gradient of ``weight`` is a sparse COO tensor of the rows that the sample
            reaches, for optimizers that take one. ``weight`` must be a parameter of its own. A tied one is refused.
            Reentrant checkpointing hides that it is tied, and the sum of its gradients is dense.
        vocab_parallel: A ``distributed.VocabParallel``. ``weight`` and ``bias`` are then this rank's rows of the head.
            So are those of the reference. Labels stay ids of the whole vocabulary.
        context_parallel: A ``distributed.ContextParallel``. ``hidden`` and ``labels`` are then this rank's tokens of
            the sequences, and ``shift`` must be false. Sums and counts are completed before the loss.
        **loss_options: Options of the loss by name; ``dpo_kernels.LOSSES[name].options`` lists those of one loss.
            "odpo" has ``margin``, "rebel" ``reward_gap``, "bco_pair" ``delta``, and these three may be ``(P,)``
            tensors. "discopop" has ``discopop_tau``, "dpop" ``dpop_lambda``, "simpo" ``gamma``, "alphapo" ``alpha`` and
            ``gamma``, and "tdpo2" ``tdpo_alpha``. The options that follow go with every loss, unless they say
            otherwise.
        pair_weights: Factor on each pair's loss, ``(P,)`` or 0-d, floating point or integer.
        nll_weight: Number that multiplies the mean negative log-prob of the chosen tokens, which is added to the loss.
            The default is 1 for "cpo" and 0 for the others.
        loss_weights: Weight of each loss in a list of names, as many numbers as names. The default is 1 for each.
        f_divergence: "reverse_kl", "forward_kl", "js" or "alpha", for losses that depend only on log-ratios. The
            default is "reverse_kl", DPO's own.
        f_alpha: Parameter of the divergence "alpha", a number. The default is 0.5.

    Returns:
        ``DPOLossOutput``, of which only ``loss`` carries a gradient.

    Raises:
        ValueError: A shape, a value or a combination is wrong; the message names the argument. A label out of range
            raises on the CPU. On other devices it makes the loss and its gradients NaN, because the check would force a
            sync.
        TypeError: A dtype or a type is wrong.
        RuntimeError: A gradient is differentiated again, or the call is under ``vmap``, in forward mode, or asked for
            batched gradients.

    Source:
        Rafailov et al., arXiv 2305.18290, eq. 7. The README's table names the paper of each other loss.

    Example:
        >>> import torch
        >>> from dpo_kernels import fused_dpo_loss
        >>> _ = torch.manual_seed(0)
        >>> hidden = torch.randn(4, 3, 8, requires_grad=True)  # two chosen sequences, then two rejected ones
        >>> weight = torch.randn(16, 8, requires_grad=True)
        >>> labels = torch.randint(16, (4, 3))
        >>> labels[:, 0] = -100  # the prompt is not scored
        >>> out = fused_dpo_loss(hidden, weight, labels, ref_logps=torch.full((4,), -8.0), beta=0.1)
        >>> out.loss.backward()
        >>> round(out.loss.item(), 3), tuple(weight.grad.shape)
        (0.524, (16, 8))
    """
    loss = losses.bind(loss_type, beta, label_smoothing, loss_options)
    arguments = Arguments(
        PolicyTensors(hidden, weight, labels, bias, cu_seqlens, token_weights, vocab_parallel, context_parallel, rows),
        HeadOptions(logit_scale, softcap),
        ReferenceTensors(ref_hidden, ref_weight, ref_bias, ref_logps, ref_token_logps, reference_free),
        Layout(pairs, shift, ignore_index, max_scored_tokens),
        Reduction(reduction, denominator, token_denominator),
        MainGradOptions(main_grad, main_grad_scale),
        GradientOptions(gradient, tau, seed, sparse_weight_grad),
        stats,
    )
    execution = Execution(backend, strategy, scratch_bytes)
    problem, plan = planned(lambda given: pair_problem(given, loss), arguments, execution)
    return run_pairs(problem, plan)


def explain(hidden: Tensor, weight: Tensor, labels: Tensor, **options: Any) -> Plan:
    """Say what ``fused_dpo_loss`` with the same arguments would run, what it costs, and why nothing else.

    The call checks and packs its arguments, but computes nothing on the head.

    Args:
        hidden: Hidden states of the policy, ``(2B, T, H)``, or ``(N, H)`` with ``cu_seqlens``; float32, bfloat16,
            float16 or float64. It is differentiable.
        weight: Weight of the LM head, ``(V, H)``, in the dtype of ``hidden`` (under autocast in any dtype). It is
            differentiable. A frozen one may be a ``TiledWeight``.
        labels: Token that each position predicts, ``(2B, T)`` or ``(N,)``, int32 or int64. Each label lies in
            ``[0, V)`` or equals ``ignore_index``.
        **options: The keyword arguments of ``fused_dpo_loss``. They follow here.
        bias: Bias of the LM head, ``(V,)``, in the dtype of ``hidden``. None means no bias. It is differentiable.
        ref_hidden: Hidden states of the reference model, ``(2B, T, H_ref)`` or ``(N, H_ref)``, floating point. The call
            scores them without gradient and applies the policy's ``logit_scale`` and ``softcap``. If the reference has
            another scale, multiply ``ref_weight`` and ``ref_bias`` by the quotient.
        ref_weight: Weight of the reference's LM head, ``(V, H_ref)``, in the dtype of ``ref_hidden``. None shares
            ``weight`` and ``bias``.
        ref_bias: Bias of the reference's LM head, ``(V,)``, in the dtype of ``ref_hidden``.
        ref_logps: Cached log-probs of the reference, ``(2B,)``, floating point, in the order of the input sequences.
            Keep them in float32, because bfloat16 holds -300 only to within one nat.
        ref_token_logps: Cached log-prob of each label under the reference, in the shape of ``labels``, floating point.
            It takes the place of ``ref_logps``, and the call sums it with ``token_weights``. What stands where no label
            is scored does not matter. Keep it in float32.
        reference_free: bool. If true, there is no reference, and its log-probs count as 0.
        loss_type: Name of a loss (a key of ``dpo_kernels.LOSSES``), a list of names or a callable. A list is summed
            with ``loss_weights``. A callable maps ``LossInputs`` to ``(P,)`` losses. It counts as coupled over the
            batch, unless it has an attribute ``separable`` that is true.
        beta: Inverse temperature, a finite number >= 0. The losses "ipo", "sppo_hard" and "cal_dpo" need beta > 0.
        label_smoothing: Probability that a label is flipped, a number in [0, 0.5], for the losses that have this
            option. With "sigmoid" the loss is then cDPO.
        cu_seqlens: Cumulative lengths of packed sequences, ``(2B + 1,)``, int32 or int64. None means that the input is
            padded.
        pairs: Order of the sequences. "stacked" puts all chosen before all rejected ones, "interleaved" alternates
            chosen and rejected.
        token_weights: Weight of each label in its sequence's sum, in the shape of ``labels``, floating point. It
            applies to the policy and to a reference that is scored here. It gets no gradient.
        rows: Row of ``hidden`` that predicts each label, in the shape of ``labels``, int32 or int64. ``hidden`` is then
            ``(M, H)`` with any number M of rows, and ``ref_hidden`` has the same M. Labels may share a row, whose
            gradients are added up. Its logits are computed once for each of its labels. Rows of labels that are not
            scored do not matter.
        shift: bool. If true, ``hidden[:, t]`` predicts ``labels[:, t + 1]``, as in Hugging Face models.
        ignore_index: Label of the positions that are not scored, an integer.
        logit_scale: Factor on the logits, a finite number.
        softcap: Cap of the scaled logits, a number > 0. None means no cap.
        reduction: "mean" over pairs, "sum", or "none" for the loss of each pair.
        denominator: Number > 0, or a 0-d tensor, that replaces the number of pairs under "mean". Gradient accumulation
            and data parallel training need it.
        token_denominator: Number > 0, or a 0-d tensor, that replaces the number of chosen tokens in the means over
            tokens (``sft``, ``nll_weight``).
        stats: Names of statistics to return without gradient, a tuple, list or set. "entropy", "mean_logits", "top1"
            and "log_sum_p2" are means over the scored tokens of each sequence. "log_sum_p2" is the log of the summed
            squared probabilities. "token_logps" is the log-prob of each label, in the shape of ``labels``, and 0 where
            not scored. "kl" is the sum over a sequence's scored tokens of ``KL(reference || policy)`` in nats, with
            ``token_weights``. It needs ``ref_hidden``.
        backend: "auto", or a backend by its name, as the plan lists them.
        strategy: "auto", "chunked", "frozen_head", "recompute" or "streaming". If the head is frozen, "chunked" and
            "recompute" run "frozen_head". A KL divergence takes "chunked" or "recompute".
        scratch_bytes: Cap on the bytes of vocabulary-sized scratch, an integer >= 0. None means 2 GiB on a GPU of 80 GB
            or more, a fortieth of the memory of a smaller GPU, and 512 MiB elsewhere. A GPU with little free memory
            gets less.
        max_scored_tokens: Static number of scored tokens to reserve, an integer >= 1. With it the call needs no host
            sync. The loss is NaN if there are more.
        main_grad: Buffer for the gradient of ``weight``: ``weight.grad``, or one that the optimizer owns. It is
            ``(V, H)``, contiguous, and float32 (float64 for float64 inputs). The call adds ``main_grad_scale`` times
            the gradient to it, and autograd then gets none. The loss must be separable by pair. The call allocates
            ``(V, H)`` memory only if a pair exceeds the scratch.
        main_grad_scale: Upstream gradient that ``loss`` will get, a number other than 0. It is 1 / accumulation steps,
            or a GradScaler's scale. If another one arrives, the backward pass raises on the CPU and gives NaN
            elsewhere. A second backward pass raises.
        gradient: "dense", or "sparse" for gradients of a sample: an unbiased estimate that computes a small part of the
            products. The loss and the log-probs are exact. See docs/sparse-gradient.md.
        tau: Threshold of the sample, a number in (0, 1]. Probabilities above it are kept as they are. A token keeps
            about ``1 / tau`` entries at the most.
        seed: Seed of the sample, an int or a 0-d int64 tensor on the device of ``hidden``. Equal seeds give equal bits.
            Take another one at each step, for each micro-batch and on each rank.
        sparse_weight_grad: bool. If true, the gradient of ``weight`` is a sparse COO tensor of the rows that the sample
            reaches, for optimizers that take one. ``weight`` must be a parameter of its own. A tied one is refused.
            Reentrant checkpointing hides that it is tied, and the sum of its gradients is dense.
        vocab_parallel: A ``distributed.VocabParallel``. ``weight`` and ``bias`` are then this rank's rows of the head.
            So are those of the reference. Labels stay ids of the whole vocabulary.
        context_parallel: A ``distributed.ContextParallel``. ``hidden`` and ``labels`` are then this rank's tokens of
            the sequences, and ``shift`` must be false. Sums and counts are completed before the loss.
        loss_options: Further options of the loss, each by its own name.
        pair_weights: Factor on each pair's loss, ``(P,)`` or 0-d, floating point or integer.
        nll_weight: Number that multiplies the mean negative log-prob of the chosen tokens, which is added to the loss.
            The default is 1 for "cpo" and 0 for the others.
        loss_weights: Weight of each loss in a list of names, as many numbers as names. The default is 1 for each.
        f_divergence: "reverse_kl", "forward_kl", "js" or "alpha", for losses that depend only on log-ratios. The
            default is "reverse_kl", DPO's own.
        f_alpha: Parameter of the divergence "alpha", a number. The default is 0.5.

    Returns:
        A ``Plan``, whose ``str()`` is meant for people. Programs read ``strategy``, ``backend``, ``gemms``,
        ``reference_gemms``, ``tile``, ``scratch_bytes``, ``chunks``, ``extra_bytes``, ``logits_in_weight_grad``,
        ``collectives`` and ``rejected``. A GEMM pass is 2 N H V FLOP, with N scored tokens. The older names ``units``,
        ``reference_units``, ``lent`` and ``against`` are aliases.

    Raises:
        ValueError: A shape, a value or a combination is wrong, or what was asked for by name cannot run.
        TypeError: A dtype or a type is wrong.
        RuntimeError: An argument is batched by ``vmap`` or carries a tangent of forward mode.

    Source:
        The costs are derived in ``docs/design.md``.

    Example:
        >>> import torch
        >>> from dpo_kernels import explain
        >>> hidden, weight = torch.ones(4, 3, 8), torch.zeros(16, 8, requires_grad=True)
        >>> labels = torch.zeros(4, 3, dtype=torch.int64)
        >>> plan = explain(hidden, weight, labels, reference_free=True, backend="torch")
        >>> plan.strategy, plan.backend
        ('chunked', 'torch')
    """
    bound = inspect.signature(fused_dpo_loss).bind(hidden, weight, labels, **options)
    bound.apply_defaults()
    named = bound.arguments
    loss = losses.bind(named["loss_type"], named["beta"], named["label_smoothing"], named["loss_options"])
    arguments = Arguments.by_name(named)
    execution = Execution(named["backend"], named["strategy"], named["scratch_bytes"])
    _, plan = planned(lambda given: pair_problem(given, loss), arguments, execution)
    return plan
