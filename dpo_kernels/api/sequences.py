"""Public functions for feedback that does not come in pairs: labelled sequences and ranked groups."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from dpo_kernels import checks
from dpo_kernels.engine.in_step import planned
from dpo_kernels.engine.run import run_sequences
from dpo_kernels.inputs.make_problem import sequence_problem
from dpo_kernels.inputs.options import Arguments
from dpo_kernels.inputs.tensors import Batch
from dpo_kernels.loss_interface import SequenceLoss
from dpo_kernels.losses import GROUP_LOSSES, KTO_LOSSES, GroupLoss, LabelledLoss
from dpo_kernels.outputs import SequenceLossOutput
from dpo_kernels.planning.plan import Execution
from dpo_kernels.shapes import sum_dtype

# What these losses take of the options of ``fused_dpo_loss``, in its order.
OPTIONS = (
    "bias",
    "ref_hidden",
    "ref_weight",
    "ref_bias",
    "ref_logps",
    "ref_token_logps",
    "reference_free",
    "cu_seqlens",
    "token_weights",
    "rows",
    "shift",
    "ignore_index",
    "logit_scale",
    "softcap",
    "reduction",
    "denominator",
    "stats",
    "backend",
    "strategy",
    "scratch_bytes",
    "max_scored_tokens",
    "main_grad",
    "main_grad_scale",
    "gradient",
    "tau",
    "seed",
    "sparse_weight_grad",
    "vocab_parallel",
    "context_parallel",
)


def fused_kto_loss(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    desirable: Tensor,
    *,
    loss_type: str = "kto",
    beta: float = 0.1,
    kl: float | Tensor = 0.0,
    delta: float | Tensor = 0.0,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
    **options: Any,
) -> SequenceLossOutput:
    """Compute KTO or unpaired BCO from hidden states, where each sequence is desirable or not.

    ``x`` is a sequence's log-ratio to the reference. KTO is ``1 - sigmoid(beta x - z0)`` for a desirable sequence and
    ``1 - sigmoid(z0 - beta x)`` for another, with ``z0 = beta max(0, kl)``. BCO is ``-log sigmoid(beta x - delta)`` and
    ``-log sigmoid(delta - beta x)``.

    Args:
        hidden: Hidden states of the policy, ``(S, T, H)``, or ``(N, H)`` with ``cu_seqlens``; float32, bfloat16,
            float16 or float64. It is differentiable.
        weight: Weight of the LM head, ``(V, H)``, in the dtype of ``hidden`` (under autocast in any dtype). It is
            differentiable.
        labels: Token that each position predicts, ``(S, T)`` or ``(N,)``, int32 or int64. Each label lies in ``[0, V)``
            or equals ``ignore_index``.
        desirable: Whether each sequence is desirable, ``(S,)`` bool.
        loss_type: "kto" or "bco".
        beta: Inverse temperature, a finite number >= 0.
        kl: Estimate of the policy's KL divergence from the reference, in nats, a number or a 0-d tensor. ``kto_kl``
            computes it. It gets no gradient.
        delta: Reward shift of BCO, a number or a 0-d tensor. ``RunningDelta`` keeps it. It gets no gradient.
        desirable_weight: Factor on the losses of desirable sequences, a number.
        undesirable_weight: Factor on the losses of the other sequences, a number.
        **options: The keyword arguments that follow, with the meaning and default they have in ``fused_dpo_loss``.
        bias: Bias of the LM head, ``(V,)``, in the dtype of ``hidden``. None means no bias. It is differentiable.
        ref_hidden: Hidden states of the reference model, ``(S, T, H_ref)`` or ``(N, H_ref)``, floating point. The call
            scores them without gradient and applies the policy's ``logit_scale`` and ``softcap``. If the reference has
            another scale, multiply ``ref_weight`` and ``ref_bias`` by the quotient.
        ref_weight: Weight of the reference's LM head, ``(V, H_ref)``, in the dtype of ``ref_hidden``. None shares
            ``weight`` and ``bias``.
        ref_bias: Bias of the reference's LM head, ``(V,)``, in the dtype of ``ref_hidden``.
        ref_logps: Cached log-probs of the reference, ``(S,)``, floating point, in the order of the input sequences.
            Keep them in float32, because bfloat16 holds -300 only to within one nat.
        ref_token_logps: Cached log-prob of each label under the reference, in the shape of ``labels``, floating point.
            It takes the place of ``ref_logps``, and the call sums it with ``token_weights``. What stands where no label
            is scored does not matter. Keep it in float32.
        reference_free: bool. If true, there is no reference, and its log-probs count as 0.
        cu_seqlens: Cumulative lengths of packed sequences, ``(S + 1,)``, int32 or int64. None means that the input is
            padded.
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
        reduction: "mean" over sequences, "sum", or "none" for the loss of each sequence.
        denominator: Number > 0, or a 0-d tensor, that replaces the number of sequences under "mean". Gradient
            accumulation and data parallel training need it.
        stats: Names of statistics to return without gradient, a tuple, list or set. "entropy", "mean_logits", "top1"
            and "log_sum_p2" are means over the scored tokens of each sequence. "log_sum_p2" is the log of the summed
            squared probabilities. "token_logps" is the log-prob of each label, in the shape of ``labels``, and 0 where
            not scored. "kl" is the sum over a sequence's scored tokens of ``KL(reference || policy)`` in nats, with
            ``token_weights``. It needs ``ref_hidden``.
        backend: "auto", or a backend by its name, as the plan of ``explain`` lists them.
        strategy: "auto", "chunked", "frozen_head", "recompute" or "streaming". If the head is frozen, "chunked" and
            "recompute" run "frozen_head". A KL divergence takes "chunked" or "recompute".
        scratch_bytes: Cap on the bytes of vocabulary-sized scratch, an integer >= 0. None means 2 GiB on a GPU of 80 GB
            or more, a fortieth of the memory of a smaller GPU, and 512 MiB elsewhere. A GPU with little free memory
            gets less.
        max_scored_tokens: Static number of scored tokens to reserve, an integer >= 1. With it the call needs no host
            sync. The loss is NaN if there are more.
        main_grad: Buffer for the gradient of ``weight``: ``weight.grad``, or one that the optimizer owns. It is
            ``(V, H)``, contiguous, and float32 (float64 for float64 inputs). The call adds ``main_grad_scale`` times
            the gradient to it, and autograd then gets none. The call allocates ``(V, H)`` memory only if a sequence
            exceeds the scratch.
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

    Returns:
        ``SequenceLossOutput``, of which only ``loss`` carries a gradient.

    Raises:
        ValueError: A shape, a value or a combination is wrong; the message names the argument. A label out of range
            raises on the CPU. On other devices it makes the loss and its gradients NaN, because the check would force a
            sync.
        TypeError: A dtype or a type is wrong.
        RuntimeError: A gradient is differentiated again, or the call is under ``vmap``, in forward mode, or asked for
            batched gradients.

    Source:
        KTO: Ethayarajh et al., arXiv 2402.01306, eq. 8. BCO: Jung et al., arXiv 2404.04656.

    Example:
        >>> import torch
        >>> from dpo_kernels import fused_kto_loss
        >>> _ = torch.manual_seed(0)
        >>> hidden, weight = torch.randn(3, 2, 8), torch.randn(16, 8)
        >>> labels, desirable = torch.randint(16, (3, 2)), torch.tensor([True, False, True])
        >>> out = fused_kto_loss(hidden, weight, labels, desirable, ref_logps=torch.full((3,), -8.0), beta=0.5)
        >>> round(out.loss.item(), 3)
        0.52
    """
    checks.check_choice("loss_type", loss_type, KTO_LOSSES)
    for given in (("desirable", desirable), ("kl", kl), ("delta", delta)):
        checks.refuse_batched(*given)
        checks.refuse_forward_mode(*given)
    checks.check_tensor("desirable", desirable)
    if desirable.dtype != torch.bool:
        raise TypeError(f"desirable must be of bool, got {desirable.dtype}")
    beta = _check_beta(beta)
    shift = beta * _zero_dimensional("kl", kl).clamp(min=0) if loss_type == "kto" else _zero_dimensional("delta", delta)
    factors = [checks.check_number(*pair) for pair in (
        ("desirable_weight", desirable_weight), ("undesirable_weight", undesirable_weight),
    )]  # fmt: skip

    def bound(batch: Batch) -> LabelledLoss:
        if desirable.shape != (batch.sequences,):
            raise ValueError(
                f"desirable has shape {tuple(desirable.shape)}, expected ({batch.sequences},): one for each sequence"
            )
        checks.check_device("desirable", desirable, "hidden", batch.hidden)
        if shift.is_meta:
            checks.check_device("kl" if loss_type == "kto" else "delta", shift, "hidden", batch.hidden)
        real = sum_dtype(desirable.device)
        liked, disliked = (torch.full((), f, dtype=real, device=desirable.device) for f in factors)
        weights = torch.where(desirable, liked, disliked)
        return LabelledLoss(loss_type, beta, desirable, weights, shift.to(batch.hidden.device, real))

    return _run((hidden, weight, labels), bound, options, "fused_kto_loss")


def fused_group_loss(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    group_sizes: Sequence[int],
    *,
    loss_type: str = "plackett_luce",
    beta: float = 0.1,
    **options: Any,
) -> SequenceLossOutput:
    """Compute a loss of ranked groups of completions from hidden states.

    The completions of one prompt are adjacent, the best first. "plackett_luce" is the negative log-probability of the
    whole ranking, and "infonce" contrasts the first with all others. Both work on ``beta`` times the log-ratios, and
    with groups of two both are DPO.

    Args:
        hidden: Hidden states of the policy, ``(S, T, H)``, or ``(N, H)`` with ``cu_seqlens``; float32, bfloat16,
            float16 or float64. It is differentiable.
        weight: Weight of the LM head, ``(V, H)``, in the dtype of ``hidden`` (under autocast in any dtype). It is
            differentiable.
        labels: Token that each position predicts, ``(S, T)`` or ``(N,)``, int32 or int64. Each label lies in ``[0, V)``
            or equals ``ignore_index``.
        group_sizes: Number of sequences in each group, a list or tuple of integers >= 1.
        loss_type: "plackett_luce" or "infonce".
        beta: Inverse temperature, a finite number >= 0.
        **options: The keyword arguments that follow, with the meaning and default they have in ``fused_dpo_loss``.
        bias: Bias of the LM head, ``(V,)``, in the dtype of ``hidden``. None means no bias. It is differentiable.
        ref_hidden: Hidden states of the reference model, ``(S, T, H_ref)`` or ``(N, H_ref)``, floating point. The call
            scores them without gradient and applies the policy's ``logit_scale`` and ``softcap``. If the reference has
            another scale, multiply ``ref_weight`` and ``ref_bias`` by the quotient.
        ref_weight: Weight of the reference's LM head, ``(V, H_ref)``, in the dtype of ``ref_hidden``. None shares
            ``weight`` and ``bias``.
        ref_bias: Bias of the reference's LM head, ``(V,)``, in the dtype of ``ref_hidden``.
        ref_logps: Cached log-probs of the reference, ``(S,)``, floating point, in the order of the input sequences.
            Keep them in float32, because bfloat16 holds -300 only to within one nat.
        ref_token_logps: Cached log-prob of each label under the reference, in the shape of ``labels``, floating point.
            It takes the place of ``ref_logps``, and the call sums it with ``token_weights``. What stands where no label
            is scored does not matter. Keep it in float32.
        reference_free: bool. If true, there is no reference, and its log-probs count as 0.
        cu_seqlens: Cumulative lengths of packed sequences, ``(S + 1,)``, int32 or int64. None means that the input is
            padded.
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
        reduction: "mean" over groups, "sum", or "none" for the loss of each group.
        denominator: Number > 0, or a 0-d tensor, that replaces the number of groups under "mean". Gradient accumulation
            and data parallel training need it.
        stats: Names of statistics to return without gradient, a tuple, list or set. "entropy", "mean_logits", "top1"
            and "log_sum_p2" are means over the scored tokens of each sequence. "log_sum_p2" is the log of the summed
            squared probabilities. "token_logps" is the log-prob of each label, in the shape of ``labels``, and 0 where
            not scored. "kl" is the sum over a sequence's scored tokens of ``KL(reference || policy)`` in nats, with
            ``token_weights``. It needs ``ref_hidden``.
        backend: "auto", or a backend by its name, as the plan of ``explain`` lists them.
        strategy: "auto", "chunked", "frozen_head", "recompute" or "streaming". If the head is frozen, "chunked" and
            "recompute" run "frozen_head". A KL divergence takes "chunked" or "recompute".
        scratch_bytes: Cap on the bytes of vocabulary-sized scratch, an integer >= 0. None means 2 GiB on a GPU of 80 GB
            or more, a fortieth of the memory of a smaller GPU, and 512 MiB elsewhere. A GPU with little free memory
            gets less.
        max_scored_tokens: Static number of scored tokens to reserve, an integer >= 1. With it the call needs no host
            sync. The loss is NaN if there are more.
        main_grad: Buffer for the gradient of ``weight``: ``weight.grad``, or one that the optimizer owns. It is
            ``(V, H)``, contiguous, and float32 (float64 for float64 inputs). The call adds ``main_grad_scale`` times
            the gradient to it, and autograd then gets none. The call allocates ``(V, H)`` memory only if a group
            exceeds the scratch.
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

    Returns:
        ``SequenceLossOutput``, of which only ``loss`` carries a gradient.

    Raises:
        ValueError: A shape, a value or a combination is wrong; the message names the argument. A label out of range
            raises on the CPU. On other devices it makes the loss and its gradients NaN, because the check would force a
            sync.
        TypeError: A dtype or a type is wrong.
        RuntimeError: A gradient is differentiated again, or the call is under ``vmap``, in forward mode, or asked for
            batched gradients.

    Source:
        Plackett-Luce: Rafailov et al., arXiv 2305.18290, appendix A.3. InfoNCE: Chen et al., arXiv 2402.05369.

    Example:
        >>> import torch
        >>> from dpo_kernels import fused_group_loss
        >>> hidden, weight, labels = torch.ones(3, 2, 8), torch.zeros(4, 8), torch.zeros(3, 2, dtype=torch.int64)
        >>> out = fused_group_loss(hidden, weight, labels, [3], reference_free=True)  # 3! equal rankings
        >>> round(out.loss.exp().item(), 3)
        6.0
    """
    checks.check_choice("loss_type", loss_type, GROUP_LOSSES)
    beta = _check_beta(beta)
    if not isinstance(group_sizes, tuple | list):
        raise TypeError(f"group_sizes must be a list of integers, got {type(group_sizes).__name__}")
    for size in group_sizes:
        checks.check_count("group_sizes", size, least=1)

    def bound(batch: Batch) -> GroupLoss:
        if sum(group_sizes) != batch.sequences:
            raise ValueError(f"group_sizes sum to {sum(group_sizes)}, but there are {batch.sequences} sequences")
        return GroupLoss(loss_type, beta, tuple(group_sizes))

    return _run((hidden, weight, labels), bound, options, "fused_group_loss")


def _run(
    policy: tuple[Tensor, Tensor, Tensor],
    loss_of: Callable[[Batch], SequenceLoss],
    options: dict[str, Any],
    function: str,
) -> SequenceLossOutput:
    """Check the arguments, run the loss, and return its results in the result dtype."""
    for name in options:
        if name not in OPTIONS:
            raise TypeError(f"{function}() got an unexpected option {name!r}; known: {', '.join(OPTIONS)}")
    arguments = Arguments.by_name({**dict(zip(("hidden", "weight", "labels"), policy, strict=True)), **options})
    wished = {name: options[name] for name in ("backend", "strategy", "scratch_bytes") if name in options}
    problem, plan = planned(lambda given: sequence_problem(given, loss_of, function), arguments, Execution(**wished))
    return run_sequences(problem, plan)


def _check_beta(beta: float) -> float:
    """Return ``beta`` as a float; raise unless it is a finite number >= 0."""
    beta = checks.check_number("beta", beta)
    if beta < 0:
        raise ValueError(f"beta must be >= 0, got {beta}")
    return beta


def _zero_dimensional(name: str, value: float | Tensor) -> Tensor:
    """Return a number or a 0-d tensor as a 0-d tensor without gradient, in the dtype of sums."""
    if not isinstance(value, Tensor):
        return torch.tensor(checks.check_number(name, value), dtype=torch.float64, device="cpu")
    checks.check_floating(name, value)
    if value.dim() != 0:
        raise ValueError(f"{name} must be a number or a 0-d tensor, got shape {tuple(value.shape)}")
    return value.detach().to(sum_dtype(value.device))
