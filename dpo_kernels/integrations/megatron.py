"""Megatron-LM's head without logits, by its own hook ``output_processor`` (Megatron Core 0.18 and later).

    context = HeadContext(temperature=1.0, vocab_size=tokenizer.vocab_size)
    hook = {"output_processor": output_processor, "output_processor_context": context}
    logps = model(ids, positions, mask, labels=labels, **hook)

Nothing of Megatron is patched or imported. Labels are Megatron's: each is the token after its position.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from dpo_kernels import fused_dpo_loss
from dpo_kernels.distributed import VocabParallel
from dpo_kernels.integrations.logps import head_logps, token_rows
from dpo_kernels.integrations.token_logps import head_options

IGNORED = -100


@dataclass(frozen=True)
class HeadContext:
    """What ``output_processor`` must know beside what Megatron gives it.

    Attributes:
        temperature: what logits are divided by, > 0.
        vocab_size: the number of tokens. Megatron pads its vocabulary, and padded rows hold real weights. None means
            that there is no padding.
        group: the ranks that hold the head. None takes ``tp_group`` of the output layer, if that has several ranks.
        loss: keyword arguments of ``fused_dpo_loss``, such as ``loss_type``, ``beta``, ``ref_logps``, ``pairs`` and
            ``denominator``. The hook then returns the loss of the pairs, and not log-probs. None for log-probs.
        main_grad_scale: with ``loss``, the gradient that the loss will get: 1 over the number of micro-batches, times
            the scale of the gradients if there is one. The head's gradient then goes into ``weight.main_grad`` at once.
            None leaves it to autograd, and works everywhere.
        keep: called with what ``fused_dpo_loss`` returns, so that it can be logged.

    Example:
        >>> HeadContext(vocab_size=50257).temperature
        1.0

    """

    temperature: float = 1.0
    vocab_size: int | None = None
    group: Any = None
    loss: dict[str, Any] | None = None
    main_grad_scale: float | None = None
    keep: Callable[[Any], None] | None = None
    _parallel: dict[Any, VocabParallel] = field(default_factory=dict, init=False, repr=False, compare=False)


def output_processor(
    *,
    hidden_states: Tensor,
    output_layer: Any,
    output_weight: Tensor | None,
    labels: Tensor,
    context: HeadContext,
    config: Any,
    loss_mask: Tensor | None = None,
    packed_seq_params: Any = None,
    scale_logits: Callable[[Tensor], Tensor] | None = None,
    **unused: Any,
) -> Tensor:
    """Compute log-probs, or a loss of pairs, in the place of Megatron's output layer.

    Args:
        hidden_states: ``(S, B, H)``, or ``(S / ranks, B, H)`` with sequence parallelism. It is read without a copy.
        output_layer: the layer whose weight ``(V / ranks, H)`` is used.
        output_weight: the weight of the embedding where it is shared, else None.
        labels: int64 ``(B, S)``, the token after each position.
        context: a ``HeadContext``.
        config: Megatron's configuration, of which ``sequence_parallel`` and ``context_parallel_size`` are read.
        loss_mask: ``(B, S)``. Positions where it is 0 are not scored. None scores every label but -100.
        packed_seq_params: with ``loss``, ``cu_seqlens_q_padded`` or ``cu_seqlens_q`` tells the sequences of a packed
            batch ``(1, S)``. ``loss_mask`` must be 0 at their last positions, whose labels are another sequence's.
        scale_logits: Megatron's factor of muP.
        **unused: Megatron's other arguments.

    Returns:
        Log-probs ``(B, S)``, float32, 0 where not scored; or the loss ``()``.

    Raises:
        ValueError: there are no labels, a shape is wrong, or ``vocab_size`` is more than the head's rows. With
            ``loss``, sequences are split by context parallelism and ``context_parallel`` is not among the arguments.

    Example:
        >>> from types import SimpleNamespace
        >>> layer = SimpleNamespace(weight=torch.zeros(8, 4), bias=None)
        >>> output_processor(
        ...     hidden_states=torch.ones(3, 2, 4), output_layer=layer, output_weight=None,
        ...     labels=torch.tensor([[1, 2, 3], [0, 1, -100]]), context=HeadContext(vocab_size=4),
        ...     config=SimpleNamespace(sequence_parallel=False),
        ... )
        tensor([[-1.3863, -1.3863, -1.3863],
                [-1.3863, -1.3863,  0.0000]])

    """
    if labels is None:
        raise ValueError("output_processor needs labels: without them nothing is scored, so call the model without it")
    weight = output_layer.weight if output_weight is None else output_weight
    bias = getattr(output_layer, "bias", None)
    if loss_mask is not None:
        labels = labels.masked_fill(loss_mask.reshape(labels.shape) == 0, IGNORED)
    parallel = _parallel(output_layer, context, bool(config.sequence_parallel))
    scale = _factor(scale_logits)
    if context.loss is None:
        return head_logps(
            hidden_states,
            weight,
            labels,
            layout="sequence_first",
            bias=bias,
            temperature=context.temperature,
            logit_scale=scale,
            vocab_size=context.vocab_size if parallel is None else None,
            group=parallel,
            sequence_sharded_hidden=parallel is not None and parallel.sequence_sharded_hidden,
        )
    ranks = getattr(config, "context_parallel_size", 1)
    if ranks > 1 and packed_seq_params is None and context.loss.get("context_parallel") is None:
        raise ValueError(
            f"context_parallel_size is {ranks}: this rank has a part of each sequence, and a loss needs all of it. Put "
            '"context_parallel": ContextParallel(group) into loss, or take log-probs'
        )
    if parallel is None and context.vocab_size not in (None, weight.shape[0]):
        weight, bias = token_rows(weight, bias, context.vocab_size)
        if context.main_grad_scale is not None:
            raise ValueError("main_grad_scale needs a head without padding, or one that is split over ranks")
    return _loss(hidden_states, weight, bias, labels, packed_seq_params, scale, parallel, context)


def _loss(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    packed_seq_params: Any,
    scale: float,
    parallel: VocabParallel | None,
    context: HeadContext,
) -> Tensor:
    assert context.loss is not None, "asked for"
    options = {**head_options(context.temperature, None, scale), **context.loss}
    if packed_seq_params is not None:
        if labels.shape[0] != 1:
            raise ValueError(f"a packed batch has one row, got labels {tuple(labels.shape)}")
        # Where sequences are padded within a packed batch, these say where they lie, and the others how long they are.
        padded = getattr(packed_seq_params, "cu_seqlens_q_padded", None)
        options["cu_seqlens"] = packed_seq_params.cu_seqlens_q if padded is None else padded
        hidden, labels = hidden.reshape(-1, hidden.shape[-1]), labels.reshape(-1)
    elif parallel is not None and parallel.sequence_sharded_hidden:
        raise ValueError("a loss with sequence parallelism needs a packed batch: use log-probs")
    else:  # a sequence's tokens must lie together, and Megatron's lie B apart; this copies hidden states, no logits
        hidden = hidden.transpose(0, 1).contiguous()
    main_grad = getattr(weight, "main_grad", None) if weight.requires_grad and torch.is_grad_enabled() else None
    if context.main_grad_scale is not None and main_grad is not None:
        weight = _InMainGrad.apply(weight)
        options |= {"main_grad": main_grad, "main_grad_scale": context.main_grad_scale}
    out = fused_dpo_loss(hidden, weight, labels, bias=bias, vocab_parallel=parallel, **options)
    if context.keep is not None:
        context.keep(out)
    return out.loss


class _InMainGrad(torch.autograd.Function):
    """Tell Megatron that a weight's gradient is in ``main_grad`` already.

    Megatron waits for a gradient of each parameter. It adds that of a weight only where ``grad_added_to_main_grad`` is
    false, or where the embedding shares the weight (``zero_out_wgrad``). So the gradient that is returned is zero.
    """

    @staticmethod
    def forward(ctx: Any, weight: Tensor) -> Tensor:
        ctx.set_materialize_grads(False)
        ctx.weight = weight
        return weight.view_as(weight)

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None) -> Tensor:
        ctx.weight.grad_added_to_main_grad = True
        zero: Tensor = ctx.weight.new_zeros(())
        return zero.expand_as(ctx.weight)


def _parallel(output_layer: Any, context: HeadContext, sequence_parallel: bool) -> VocabParallel | None:
    """Give the ``VocabParallel`` of the head, always the same one for a context and a group.

    Heads that share a context may be split differently, as a policy's and a reference's. None means that one rank holds
    the head.
    """
    group = context.group if context.group is not None else getattr(output_layer, "tp_group", None)
    if group is None:
        return None
    made = VocabParallel(group, vocab_size=context.vocab_size, sequence_sharded_hidden=sequence_parallel)
    # By its id: a deep copy of a context shares its groups, which cannot be copied. The value holds the group.
    parallel = context._parallel.setdefault((id(made.group), sequence_parallel), made)
    return parallel if parallel.ranks > 1 else None


def _factor(scale_logits: Callable[[Tensor], Tensor] | None) -> float:
    """Return the factor by which muP scales logits; raise ``ValueError`` where it does something else."""
    if scale_logits is None:
        return 1.0
    one, three = scale_logits(torch.tensor([1.0, 3.0], device="cpu")).tolist()
    if abs(three - 3 * one) > 1e-6 * abs(three):
        raise ValueError("scale_logits does not multiply logits by a number: the head is not linear")
    return float(one)
