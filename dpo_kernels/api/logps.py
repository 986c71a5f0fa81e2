"""Differentiable log-probs of sequences and of tokens, for losses of the caller's own."""

from torch import Tensor

from dpo_kernels.distributed import ContextParallel, VocabParallel
from dpo_kernels.engine.in_step import planned
from dpo_kernels.engine.run import run_logps
from dpo_kernels.inputs.make_problem import logps_problem
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
from dpo_kernels.planning.plan import Execution


def fused_sequence_logps(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    bias: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    token_weights: Tensor | None = None,
    rows: Tensor | None = None,
    shift: bool = False,
    ignore_index: int = -100,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    backend: str = "auto",
    strategy: str = "auto",
    scratch_bytes: int | None = None,
    max_scored_tokens: int | None = None,
    gradient: str = "dense",
    tau: float = 2.0**-12,
    seed: int | Tensor = 0,
    sparse_weight_grad: bool = False,
    vocab_parallel: VocabParallel | None = None,
    context_parallel: ContextParallel | None = None,
) -> Tensor:
    """Compute the log-probs of sequences from hidden states, differentiably and without vocabulary-sized logits.

    A sequence's log-prob is the sum over its scored tokens of ``log softmax(cap(logit_scale * (W h + b)))[label]``,
    with ``cap(z) = softcap * tanh(z / softcap)``. The number of sequences S may be odd.

    Args:
        hidden: Hidden states of the policy, ``(S, T, H)``, or ``(N, H)`` with ``cu_seqlens``; float32, bfloat16,
            float16 or float64. It is differentiable.
        weight: Weight of the LM head, ``(V, H)``, in the dtype of ``hidden`` (under autocast in any dtype). It is
            differentiable.
        labels: Token that each position predicts, ``(S, T)`` or ``(N,)``, int32 or int64. Each label lies in ``[0, V)``
            or equals ``ignore_index``.
        bias: Bias of the LM head, ``(V,)``, in the dtype of ``hidden``. None means no bias. It is differentiable.
        cu_seqlens: Cumulative lengths of packed sequences, ``(S + 1,)``, int32 or int64. None means that the input is
            padded.
        token_weights: Weight of each label in its sequence's sum, in the shape of ``labels``, floating point. It gets
            no gradient.
        rows: Row of ``hidden`` that predicts each label, in the shape of ``labels``, int32 or int64. ``hidden`` is then
            ``(M, H)`` with any number of rows. Labels may share a row, whose gradients are added up. Its logits are
            computed once for each of its labels. Rows of labels that are not scored do not matter.
        shift: bool. If true, ``hidden[:, t]`` predicts ``labels[:, t + 1]``, as in Hugging Face models.
        ignore_index: Label of the positions that are not scored, an integer.
        logit_scale: Factor on the logits, a finite number.
        softcap: Cap of the scaled logits, a number > 0. None means no cap.
        backend: "auto", or a backend by its name, as the plan of ``explain`` lists them.
        strategy: "auto", "chunked", "frozen_head", "recompute" or "streaming". If the head is frozen, "chunked" and
            "recompute" run "frozen_head".
        scratch_bytes: Cap on the bytes of vocabulary-sized scratch, an integer >= 0. None means 2 GiB on a GPU of 80 GB
            or more, a fortieth of the memory of a smaller GPU, and 512 MiB elsewhere. A GPU with little free memory
            gets less.
        max_scored_tokens: Static number of scored tokens to reserve, an integer >= 1. With it the call needs no host
            sync. The log-probs are NaN if there are more.
        gradient: "dense", or "sparse" for gradients of a sample: an unbiased estimate that computes a small part of the
            products. The loss and the log-probs are exact. See docs/sparse-gradient.md.
        tau: Threshold of the sample, a number in (0, 1]. Probabilities above it are kept as they are. A token keeps
            about ``1 / tau`` entries at the most.
        seed: Seed of the sample, an int or a 0-d int64 tensor on the device of ``hidden``. Equal seeds give equal bits.
            Take another one at each step, for each micro-batch and on each rank.
        sparse_weight_grad: bool. If true, the gradient of ``weight`` is a sparse COO tensor of the rows that the sample
            reaches, for optimizers that take one. ``weight`` must be a parameter of its own. A tied one is refused.
            Reentrant checkpointing hides that it is tied, and the sum of its gradients is dense.
        vocab_parallel: a ``distributed.VocabParallel``. ``weight`` and ``bias`` are then this rank's rows of the head.
            Labels stay ids of the whole vocabulary.
        context_parallel: a ``distributed.ContextParallel``. ``hidden`` and ``labels`` are then this rank's tokens of
            the sequences, and ``shift`` must be false. Sums and counts are completed over the group.

    Returns:
        ``(S,)``, float32 (float64 for float64 inputs). A sequence without a scored token gets 0.

    Raises:
        ValueError: A shape, a value or a combination is wrong; the message names the argument. A label out of range
            raises on the CPU. On other devices it makes the results and their gradients NaN, because the check would
            force a sync.
        TypeError: A dtype or a type is wrong.
        RuntimeError: A gradient is differentiated again, or the call is under ``vmap``, in forward mode, or asked for
            batched gradients.

    Source:
        Rafailov et al., arXiv 2305.18290, section 3: ``log pi(y | x)``.

    Example:
        >>> import torch
        >>> from dpo_kernels import fused_sequence_logps
        >>> hidden, weight = torch.ones(2, 3, 8), torch.zeros(4, 8)  # each token has log-prob -log 4 = -1.386
        >>> labels = torch.tensor([[-100, 1, 2], [-100, -100, 3]])
        >>> [round(logp, 3) for logp in fused_sequence_logps(hidden, weight, labels).tolist()]
        [-2.773, -1.386]
    """
    policy = PolicyTensors(
        hidden, weight, labels, bias, cu_seqlens, token_weights, vocab_parallel, context_parallel, rows
    )
    layout = Layout(shift=shift, ignore_index=ignore_index, max_scored_tokens=max_scored_tokens)
    head = HeadOptions(logit_scale, softcap)
    how = GradientOptions(gradient, tau, seed, sparse_weight_grad)
    arguments = Arguments(policy, head, ReferenceTensors(), layout, Reduction(), MainGradOptions(), how)
    execution = Execution(backend, strategy, scratch_bytes)
    return run_logps(*planned(lambda given: logps_problem(given, per_token=False), arguments, execution))


def fused_token_logps(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    bias: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    rows: Tensor | None = None,
    shift: bool = False,
    ignore_index: int = -100,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    backend: str = "auto",
    strategy: str = "auto",
    scratch_bytes: int | None = None,
    max_scored_tokens: int | None = None,
    gradient: str = "dense",
    tau: float = 2.0**-12,
    seed: int | Tensor = 0,
    sparse_weight_grad: bool = False,
    vocab_parallel: VocabParallel | None = None,
) -> Tensor:
    """Compute the log-prob of each token from hidden states, differentiably and without vocabulary-sized logits.

    A token's log-prob is ``log softmax(cap(logit_scale * (W h + b)))[label]``, with
    ``cap(z) = softcap * tanh(z / softcap)``. The number of sequences S may be odd.

    Args:
        hidden: Hidden states of the policy, ``(S, T, H)``, or ``(N, H)`` with ``cu_seqlens``; float32, bfloat16,
            float16 or float64. It is differentiable.
        weight: Weight of the LM head, ``(V, H)``, in the dtype of ``hidden`` (under autocast in any dtype). It is
            differentiable.
        labels: Token that each position predicts, ``(S, T)`` or ``(N,)``, int32 or int64. Each label lies in ``[0, V)``
            or equals ``ignore_index``.
        bias: Bias of the LM head, ``(V,)``, in the dtype of ``hidden``. None means no bias. It is differentiable.
        cu_seqlens: Cumulative lengths of packed sequences, ``(S + 1,)``, int32 or int64. None means that the input is
            padded.
        rows: Row of ``hidden`` that predicts each label, in the shape of ``labels``, int32 or int64. ``hidden`` is then
            ``(M, H)`` with any number of rows. Labels may share a row, whose gradients are added up. Its logits are
            computed once for each of its labels. Rows of labels that are not scored do not matter.
        shift: bool. If true, ``hidden[:, t]`` predicts ``labels[:, t + 1]``, as in Hugging Face models.
        ignore_index: Label of the positions that are not scored, an integer.
        logit_scale: Factor on the logits, a finite number.
        softcap: Cap of the scaled logits, a number > 0. None means no cap.
        backend: "auto", or a backend by its name, as the plan of ``explain`` lists them.
        strategy: "auto", "chunked", "frozen_head", "recompute" or "streaming". If the head is frozen, "chunked" and
            "recompute" run "frozen_head".
        scratch_bytes: Cap on the bytes of vocabulary-sized scratch, an integer >= 0. None means 2 GiB on a GPU of 80 GB
            or more, a fortieth of the memory of a smaller GPU, and 512 MiB elsewhere. A GPU with little free memory
            gets less.
        max_scored_tokens: Static number of scored tokens to reserve, an integer >= 1. With it the call needs no host
            sync. The log-probs are NaN if there are more.
        gradient: "dense", or "sparse" for gradients of a sample: an unbiased estimate that computes a small part of the
            products. The loss and the log-probs are exact. See docs/sparse-gradient.md.
        tau: Threshold of the sample, a number in (0, 1]. Probabilities above it are kept as they are. A token keeps
            about ``1 / tau`` entries at the most.
        seed: Seed of the sample, an int or a 0-d int64 tensor on the device of ``hidden``. Equal seeds give equal bits.
            Take another one at each step, for each micro-batch and on each rank.
        sparse_weight_grad: bool. If true, the gradient of ``weight`` is a sparse COO tensor of the rows that the sample
            reaches, for optimizers that take one. ``weight`` must be a parameter of its own. A tied one is refused.
            Reentrant checkpointing hides that it is tied, and the sum of its gradients is dense.
        vocab_parallel: a ``distributed.VocabParallel``. ``weight`` and ``bias`` are then this rank's rows of the head.
            Labels stay ids of the whole vocabulary.

    Returns:
        Log-probs in the shape of ``labels``, each at the place of its label, float32 (float64 for float64 inputs). They
        are 0 where not scored.

    Raises:
        ValueError: A shape, a value or a combination is wrong; the message names the argument. A label out of range
            raises on the CPU. On other devices it makes the results and their gradients NaN, because the check would
            force a sync.
        TypeError: A dtype or a type is wrong.
        RuntimeError: A gradient is differentiated again, or the call is under ``vmap``, in forward mode, or asked for
            batched gradients.

    Source:
        Rafailov et al., arXiv 2305.18290, section 3: the terms whose sum is ``log pi(y | x)``.

    Example:
        >>> import torch
        >>> from dpo_kernels import fused_token_logps
        >>> hidden, weight = torch.ones(1, 3, 8), torch.zeros(4, 8)  # each token has log-prob -log 4 = -1.386
        >>> logps = fused_token_logps(hidden, weight, torch.tensor([[-100, 1, 2]]))
        >>> [round(logp, 3) for logp in logps[0].tolist()]
        [0.0, -1.386, -1.386]
    """
    policy = PolicyTensors(hidden, weight, labels, bias, cu_seqlens, None, vocab_parallel, rows=rows)
    layout = Layout(shift=shift, ignore_index=ignore_index, max_scored_tokens=max_scored_tokens)
    head = HeadOptions(logit_scale, softcap)
    how = GradientOptions(gradient, tau, seed, sparse_weight_grad)
    arguments = Arguments(policy, head, ReferenceTensors(), layout, Reduction(), MainGradOptions(), how)
    execution = Execution(backend, strategy, scratch_bytes)
    return run_logps(*planned(lambda given: logps_problem(given, per_token=True), arguments, execution))
