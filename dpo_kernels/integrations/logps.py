"""The log-probs that other training stacks make from logits, made from hidden states and the LM head.

One function serves them all. The modules beside this one give it the name, the arguments and the layout that each stack
knows.
"""

from typing import Any

import torch
from torch import Tensor

from dpo_kernels import fused_sequence_logps, fused_token_logps
from dpo_kernels.checks import check_choice, check_count, check_tensor
from dpo_kernels.distributed import VocabParallel
from dpo_kernels.integrations.token_logps import head_options

LAYOUTS = ("batch_first", "sequence_first", "packed")
EXECUTION = ("backend", "strategy", "scratch_bytes")  # of ``fused_token_logps``
INSTEAD = {"vocab_parallel": "group= takes a VocabParallel or its group"}


def head_logps(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    layout: str = "batch_first",
    per: str = "token",
    shift: bool = False,
    cu_seqlens: Tensor | None = None,
    bias: Tensor | None = None,
    temperature: float = 1.0,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    vocab_size: int | None = None,
    ignore_index: int = -100,
    group: Any = None,
    sequence_sharded_hidden: bool = False,
    **execution: Any,
) -> Tensor:
    """Compute log-probs of tokens or of sequences, differentiably and without vocabulary-sized logits.

    Logits are ``cap(logit_scale (W h + b)) / temperature``.

    Args:
        hidden: floating point. ``(B, T, H)`` if ``layout`` is "batch_first", ``(T, B, H)`` if "sequence_first", which
            is read without a copy, ``(N, H)`` or ``(1, N, H)`` if "packed".
        weight: ``(V, H)``, in the dtype of ``hidden``.
        labels: int64 or int32, ``(B, T)``, also with "sequence_first", or ``(N,)`` or ``(1, N)`` if packed.
        layout: one of ``LAYOUTS``.
        per: "token" or "sequence".
        shift: whether ``hidden`` at position t predicts the label at t + 1. Stacks that shift or roll their labels
            themselves pass False.
        cu_seqlens: cumulative lengths ``(S + 1,)`` of packed sequences. ``shift`` and ``per="sequence"`` need them.
        bias: ``(V,)``, or None.
        temperature: what logits are divided by, > 0.
        logit_scale: factor on the logits.
        softcap: soft cap of the logits before the temperature, > 0, or None.
        vocab_size: the number of tokens. Rows of the head beyond it are padding, and are left out. None means V.
        ignore_index: the label of positions that are not scored.
        group: the ranks that hold the head, as for ``VocabParallel``, or one of these. ``weight`` and ``bias`` are then
            this rank's rows. None means that the head is whole.
        sequence_sharded_hidden: whether hidden states arrive split over the group along the tokens.
        **execution: ``backend``, ``strategy`` and ``scratch_bytes`` of ``fused_token_logps``, and nothing else.

    Returns:
        In the shape of ``labels`` for tokens, 0 where not scored; ``(B,)`` or ``(S,)`` for sequences, sums over the
        scored tokens. float32, or float64 for float64 hidden states. They are part of the graph without any scored
        token too.

    Raises:
        ValueError: a shape, a value or a combination is wrong. The message names the argument.
        TypeError: a dtype or a type is wrong, or an argument is unknown.

    Example:
        >>> hidden, weight = torch.ones(3, 2, 8), torch.zeros(4, 8)  # three positions of two sequences
        >>> labels = torch.tensor([[1, 2, -100], [3, -100, -100]])
        >>> head_logps(hidden, weight, labels, layout="sequence_first", per="sequence")
        tensor([-2.7726, -1.3863])

    """
    if unknown := [name for name in execution if name not in EXECUTION]:
        hints = "".join(f"; {INSTEAD[name]}" for name in unknown if name in INSTEAD)
        raise TypeError(f"head_logps takes no {', '.join(unknown)}{hints}")
    check_choice("layout", layout, LAYOUTS)
    check_choice("per", per, ("token", "sequence"))
    for name, tensor in (("hidden", hidden), ("weight", weight), ("labels", labels)):
        check_tensor(name, tensor)
    if layout == "packed" and cu_seqlens is None and (shift or per == "sequence"):
        raise ValueError("cu_seqlens is needed: packed tokens are shifted and added up within their own sequence")
    if layout != "packed" and cu_seqlens is not None:
        raise ValueError(f'cu_seqlens goes with layout="packed", not with {layout!r}')
    options = head_options(temperature, softcap, logit_scale) | execution | {"ignore_index": ignore_index}
    weight, options["bias"], options["vocab_parallel"] = _rows(weight, bias, vocab_size, group, sequence_sharded_hidden)
    if layout == "batch_first":
        function = fused_token_logps if per == "token" else fused_sequence_logps
        return function(hidden, weight, labels, shift=shift, **options)
    if layout == "packed":
        flat, rows = hidden.reshape(-1, hidden.shape[-1]), labels.reshape(-1)
        if per == "sequence":
            return fused_sequence_logps(flat, weight, rows, shift=shift, cu_seqlens=cu_seqlens, **options)
        return _tokens(flat, weight, rows, cu_seqlens, shift, options).view(labels.shape)
    if hidden.dim() != 3 or labels.dim() != 2:
        raise ValueError(
            "sequence_first takes hidden (T, B, H) and labels (B, T), got "
            f"{tuple(hidden.shape)} and {tuple(labels.shape)}"
        )
    batch, length = labels.shape
    if hidden.shape[1] != batch or (hidden.shape[0] != length and not sequence_sharded_hidden):
        raise ValueError(f"hidden is (T, B, H) = {tuple(hidden.shape)}, but labels are (B, T) = {tuple(labels.shape)}")
    if shift:
        labels = torch.nn.functional.pad(labels[:, 1:], (0, 1), value=ignore_index)
    logps = _tokens(hidden.reshape(-1, hidden.shape[-1]), weight, labels.t().reshape(-1), None, False, options)
    logps = logps.view(length, batch).t()
    if shift:
        logps = torch.nn.functional.pad(logps[:, :-1], (1, 0))  # each at the place of its label
    return logps if per == "token" else logps.sum(dim=1)


def _tokens(
    hidden: Tensor, weight: Tensor, labels: Tensor, cu_seqlens: Tensor | None, shift: bool, options: dict[str, Any]
) -> Tensor:
    if cu_seqlens is None:  # one sequence: nothing is shifted
        cu_seqlens = torch.tensor([0, labels.shape[0]], dtype=torch.int32, device=labels.device)
    return fused_token_logps(hidden, weight, labels, shift=shift, cu_seqlens=cu_seqlens, **options)


def token_rows(weight: Tensor, bias: Tensor | None, vocab_size: int | None) -> tuple[Tensor, Tensor | None]:
    """Cut the padding of a vocabulary off a head that is whole.

    Args:
        weight: ``(V, H)``.
        bias: ``(V,)``, or None.
        vocab_size: the number of tokens, from 1 to V. None means V.

    Returns:
        Views of the first ``vocab_size`` rows.

    Raises:
        ValueError: ``vocab_size`` is not from 1 to V.
        TypeError: ``vocab_size`` is no integer.

    Example:
        >>> token_rows(torch.zeros(4, 8), None, 3)[0].shape
        torch.Size([3, 8])

    """
    check_count("vocab_size", vocab_size, least=1)
    if vocab_size is not None and vocab_size > weight.shape[0]:
        raise ValueError(f"vocab_size is {vocab_size}, but weight has {weight.shape[0]} rows")
    rows = slice(None) if vocab_size is None or vocab_size == weight.shape[0] else slice(vocab_size)
    return weight[rows], None if bias is None else bias[rows]


def _rows(
    weight: Tensor, bias: Tensor | None, vocab_size: int | None, group: Any, sequence_sharded_hidden: bool
) -> tuple[Tensor, Tensor | None, VocabParallel | None]:
    """Give the rows of the head that are tokens, and how they are split."""
    if group is None:
        if sequence_sharded_hidden:
            raise ValueError("sequence_sharded_hidden=True needs the group that the hidden states are split over")
        return *token_rows(weight, bias, vocab_size), None
    if isinstance(group, VocabParallel):
        if vocab_size not in (None, group.vocab_size) or sequence_sharded_hidden != group.sequence_sharded_hidden:
            raise ValueError("vocab_size and sequence_sharded_hidden are those of the VocabParallel that is given")
        return weight, bias, group
    parallel = VocabParallel(group, vocab_size=vocab_size, sequence_sharded_hidden=sequence_sharded_hidden)
    return weight, bias, parallel
