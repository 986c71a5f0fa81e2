"""The oracle: the equations in plain torch. It holds all the logits, imports torch only and shares no code.

Every other path is tested against this file run in float64. Run in the dtype of a model, this file is the "plain torch"
of the tolerance rule: it rounds logits to that dtype and takes log-softmax in float32 at least, as training code does.

The source is Rafailov et al., arXiv 2305.18290, eq. 7, with ``s`` the summed log-prob of a sequence::

    u = beta * [(s_w - ref_w) - (s_l - ref_l)]        loss = -log sigmoid(u)        d loss / d s_w = -beta sigmoid(-u)
"""

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dpo_kernels.reference.losses import family_loss, reads_kl


class ReferenceOutput(NamedTuple):
    """What ``dpo_loss_reference`` returns: the fields of ``DPOLossOutput``.

    Only ``loss`` carries a gradient. The tensors have the dtype of the logits, at least float32.

    Attributes:
        loss: The loss, a scalar, or ``(P,)`` with ``reduction="none"``.
        chosen_rewards: ``beta * (policy - reference)`` of each chosen sequence, ``(P,)``.
        rejected_rewards: ``beta * (policy - reference)`` of each rejected sequence, ``(P,)``.
        chosen_logps: The policy's log-prob of each chosen sequence, ``(P,)``.
        rejected_logps: The policy's log-prob of each rejected sequence, ``(P,)``.
        ref_chosen_logps: The reference's log-prob of each chosen sequence, ``(P,)``.
        ref_rejected_logps: The reference's log-prob of each rejected sequence, ``(P,)``.
        stats: Each requested statistic by name, and always "tokens", ``(S,)`` each. None carries a gradient.
    """

    loss: Tensor
    chosen_rewards: Tensor
    rejected_rewards: Tensor
    chosen_logps: Tensor
    rejected_logps: Tensor
    ref_chosen_logps: Tensor
    ref_rejected_logps: Tensor
    stats: dict[str, Tensor]


def token_logps_reference(
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
) -> Tensor:
    """Compute the log-prob of each label from full logits.

    Args:
        hidden: Hidden states of the policy, ``(S, T, H)``, or ``(N, H)`` with ``cu_seqlens``, in any floating dtype. It
            is differentiable.
        weight: Weight of the LM head, ``(V, H)``, in the dtype of ``hidden``. It is differentiable.
        labels: Token that each position predicts, ``(S, T)`` or ``(N,)``, int32 or int64. Each label lies in ``[0, V)``
            or equals ``ignore_index``.
        bias: Bias of the LM head, ``(V,)``, in the dtype of ``hidden``. None means no bias. It is differentiable.
        cu_seqlens: Cumulative lengths of packed sequences, ``(S + 1,)``, int32 or int64. None means that the input is
            padded.
        rows: Row of ``hidden`` that predicts each label, in the shape of ``labels``, int32 or int64. ``hidden`` is then
            ``(M, H)`` with any number of rows. None means that each label has the row at its own place.
        shift: bool. If true, ``hidden[:, t]`` predicts ``labels[:, t + 1]``, as in Hugging Face models.
        ignore_index: Label of the positions that are not scored, an integer.
        logit_scale: Factor on the logits, a finite number.
        softcap: Cap of the scaled logits, a number > 0. None means no cap.

    Returns:
        Log-probs in the shape of ``labels``, each at the place of its label, at least float32. They are 0 where not
        scored.

    Raises:
        RuntimeError: A shape or a dtype is wrong; torch raises it. The oracle checks no arguments itself.

    Source:
        Rafailov et al., arXiv 2305.18290, section 3: the terms whose sum is ``log pi(y | x)``.

    Example:
        >>> import torch
        >>> from dpo_kernels.reference import token_logps_reference
        >>> hidden, weight = torch.ones(1, 3, 8), torch.zeros(4, 8)  # each token has log-prob -log 4 = -1.386
        >>> logps = token_logps_reference(hidden, weight, torch.tensor([[-100, 1, 2]]))
        >>> [round(logp, 3) for logp in logps[0].tolist()]
        [0.0, -1.386, -1.386]
    """
    hidden = _of_labels(hidden, rows)
    hidden, targets, places = _align(hidden, labels, cu_seqlens, shift, ignore_index)
    keep = targets != ignore_index
    logits = _logits(hidden[keep], weight, bias, logit_scale, softcap)
    scored = logits.log_softmax(-1).gather(-1, targets[keep].long()[:, None])[:, 0]
    return scored.new_zeros(labels.numel()).index_put((places[keep],), scored).view(labels.shape)


def sequence_logps_reference(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    cu_seqlens: Tensor | None = None,
    token_weights: Tensor | None = None,
    **options: Any,
) -> Tensor:
    """Compute the log-probs of sequences, each a weighted sum over its scored tokens.

    Args:
        hidden: Hidden states of the policy, ``(S, T, H)``, or ``(N, H)`` with ``cu_seqlens``, in any floating dtype. It
            is differentiable.
        weight: Weight of the LM head, ``(V, H)``, in the dtype of ``hidden``. It is differentiable.
        labels: Token that each position predicts, ``(S, T)`` or ``(N,)``, int32 or int64. Each label lies in ``[0, V)``
            or equals ``ignore_index``.
        cu_seqlens: Cumulative lengths of packed sequences, ``(S + 1,)``, int32 or int64. None means that the input is
            padded.
        token_weights: Weight of each label in its sequence's sum, in the shape of ``labels``, floating point. It gets
            no gradient.
        **options: The other keyword arguments of ``token_logps_reference``. They follow here.
        bias: Bias of the LM head, ``(V,)``, in the dtype of ``hidden``. None means no bias. It is differentiable.
        rows: Row of ``hidden`` that predicts each label, in the shape of ``labels``, int32 or int64. ``hidden`` is then
            ``(M, H)`` with any number of rows. None means that each label has the row at its own place.
        shift: bool. If true, ``hidden[:, t]`` predicts ``labels[:, t + 1]``, as in Hugging Face models.
        ignore_index: Label of the positions that are not scored, an integer.
        logit_scale: Factor on the logits, a finite number.
        softcap: Cap of the scaled logits, a number > 0. None means no cap.

    Returns:
        ``(S,)``, at least float32. A sequence without a scored token gets 0.

    Raises:
        RuntimeError: A shape or a dtype is wrong; torch raises it. The oracle checks no arguments itself.

    Source:
        Rafailov et al., arXiv 2305.18290, section 3: ``log pi(y | x)``.

    Example:
        >>> import torch
        >>> from dpo_kernels.reference import sequence_logps_reference
        >>> hidden, weight = torch.ones(2, 3, 8), torch.zeros(4, 8)  # each token has log-prob -log 4 = -1.386
        >>> labels = torch.tensor([[-100, 1, 2], [-100, -100, 3]])
        >>> [round(logp, 3) for logp in sequence_logps_reference(hidden, weight, labels).tolist()]
        [-2.773, -1.386]
    """
    logps = token_logps_reference(hidden, weight, labels, cu_seqlens=cu_seqlens, **options)
    if token_weights is not None:
        logps = logps * token_weights.detach().to(logps.dtype)
    return _sums(logps, cu_seqlens)


def dpo_loss_reference(
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
    loss_type: str | Sequence[str] | Callable[..., Tensor] = "sigmoid",
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
    **loss_options: Any,
) -> ReferenceOutput:
    """Compute the result of ``fused_dpo_loss`` from full logits, in plain torch.

    The function takes the arguments of ``fused_dpo_loss`` but for those that say how to run it. It can be
    differentiated as often as torch allows.

    Args:
        hidden: Hidden states of the policy, ``(2B, T, H)``, or ``(N, H)`` with ``cu_seqlens``, in any floating dtype.
            It is differentiable.
        weight: Weight of the LM head, ``(V, H)``, in the dtype of ``hidden``. It is differentiable.
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
        ref_token_logps: Cached log-prob of each label under the reference, in the shape of ``labels``, floating point.
            ``token_weights`` apply to them. What stands where no label is scored does not matter.
        reference_free: bool. If true, there is no reference, and its log-probs count as 0.
        loss_type: Name of a loss, a list of names or a callable. A list is summed with ``loss_weights``. A callable
            maps an object with the fields of ``LossInputs`` to ``(P,)`` losses.
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
            ``(M, H)`` with any number of rows, and so is ``ref_hidden``. None means that each label has its own row.
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
            squared probabilities. "kl" is the sum over a sequence's scored tokens of ``KL(reference || policy)``, with
            ``token_weights``. It needs ``ref_hidden``.
        **loss_options: Options of the loss by name, numbers or ``(P,)`` tensors. The options that follow go with every
            loss, unless they say otherwise.
        pair_weights: Factor on each pair's loss, ``(P,)`` or 0-d, floating point or integer.
        nll_weight: Number that multiplies the mean negative log-prob of the chosen tokens, which is added to the loss.
            The default is 1 for "cpo" and 0 for the others.
        loss_weights: Weight of each loss in a list of names, as many numbers as names. The default is 1 for each.
        f_divergence: "reverse_kl", "forward_kl", "js" or "alpha", for losses that depend only on log-ratios. The
            default is "reverse_kl", DPO's own.
        f_alpha: Parameter of the divergence "alpha", a number. The default is 0.5.

    Returns:
        ``ReferenceOutput``, of which only ``loss`` carries a gradient.

    Raises:
        KeyError: The name of the loss is unknown.
        RuntimeError: A shape or a dtype is wrong; torch raises it. The oracle checks no arguments itself.

    Source:
        Rafailov et al., arXiv 2305.18290, eq. 7. The README's table names the paper of each other loss.

    Example:
        >>> import torch
        >>> from dpo_kernels.reference import dpo_loss_reference
        >>> _ = torch.manual_seed(0)
        >>> hidden, weight = torch.randn(4, 3, 8).double(), torch.randn(16, 8).double()
        >>> labels = torch.randint(16, (4, 3))
        >>> labels[:, 0] = -100  # the prompt is not scored
        >>> out = dpo_loss_reference(hidden, weight, labels, ref_logps=torch.full((4,), -8.0), beta=0.1)
        >>> round(out.loss.item(), 3)
        0.524
    """
    hidden = _of_labels(hidden, rows)
    ref_hidden = None if ref_hidden is None else _of_labels(ref_hidden, rows)
    layout: dict[str, Any] = {"cu_seqlens": cu_seqlens, "shift": shift, "ignore_index": ignore_index}
    cap: dict[str, Any] = {"logit_scale": logit_scale, "softcap": softcap}
    policy = sequence_logps_reference(hidden, weight, labels, bias=bias, token_weights=token_weights, **layout, **cap)
    scored = _scored(hidden, labels, cu_seqlens, shift, ignore_index)
    kl = None
    if ref_hidden is not None:
        if ref_weight is None:
            ref_weight, ref_bias = weight, bias if ref_bias is None else ref_bias
        with torch.no_grad():
            reference = sequence_logps_reference(
                ref_hidden, ref_weight, labels, bias=ref_bias, token_weights=token_weights, **layout, **cap
            )
        if "kl" in stats or reads_kl(loss_type):
            both = ((hidden, weight, bias), (ref_hidden, ref_weight, ref_bias))
            kl = _sequence_kl(*both, labels, token_weights, layout, cap)
    elif ref_logps is not None:
        reference = ref_logps.detach().to(policy.dtype)
    elif ref_token_logps is not None:
        values = ref_token_logps.detach().to(policy.dtype)
        if token_weights is not None:
            values = values * token_weights.detach().to(policy.dtype)
        reference = _sums(torch.where(scored, values, 0.0), cu_seqlens)
    else:
        reference = torch.zeros_like(policy)
    counts = _sums(scored.to(policy.dtype), cu_seqlens)
    s_w, s_l = _split(policy, pairs)
    r_w, r_l = _split(reference, pairs)
    n_w, n_l = _split(counts, pairs)
    over = s_w.shape[0] if denominator is None else denominator
    nll_scale = over / (n_w.sum().clamp(min=1) if token_denominator is None else token_denominator)
    kls = (None, None) if kl is None else _split(kl, pairs)
    loss = family_loss(loss_type, beta, label_smoothing, s_w, s_l, r_w, r_l, n_w, n_l, nll_scale, loss_options, kls)
    if reduction != "none":
        loss = loss.sum()
    if reduction == "mean":
        loss = loss / (s_w.shape[0] if denominator is None else denominator)
    measured = _stats(hidden, weight, labels, bias, tuple(name for name in stats if name != "kl"), layout, cap)
    if "kl" in stats and kl is not None:
        measured["kl"] = kl.detach()
    return ReferenceOutput(
        loss,
        (beta * (s_w - r_w)).detach(),
        (beta * (s_l - r_l)).detach(),
        s_w.detach(),
        s_l.detach(),
        r_w,
        r_l,
        {**measured, "tokens": counts},
    )


def _of_labels(hidden: Tensor, rows: Tensor | None) -> Tensor:
    """Return the hidden states of each label. A row of a label that is not scored may be any number."""
    return hidden if rows is None else hidden[rows.long().clamp(0, hidden.shape[0] - 1)]


def _sequence_kl(
    policy: tuple[Tensor, Tensor, Tensor | None],
    reference: tuple[Tensor, Tensor, Tensor | None],
    labels: Tensor,
    token_weights: Tensor | None,
    layout: dict[str, Any],
    cap: dict[str, Any],
) -> Tensor:
    """Return the weighted sum over each sequence's scored tokens of ``KL(reference || policy)``, ``(S,)``.

    This is ``D_SeqKL(x, y; reference || policy)`` of Zeng et al., arXiv 2404.11999. Only the policy gets a
    gradient. Each model is hidden states, weight and bias of its head.
    """
    cu_seqlens, shift, ignore_index = layout.values()
    logps, (ref_hidden, ref_weight, ref_bias) = [], reference
    constant = (ref_hidden.detach(), ref_weight.detach(), None if ref_bias is None else ref_bias.detach())
    for hidden, weight, bias in (policy, constant):
        rows, targets, places = _align(hidden, labels, cu_seqlens, shift, ignore_index)
        keep = targets != ignore_index
        logps.append(_logits(rows[keep], weight, bias, **cap).log_softmax(-1))
    ours, theirs = logps
    impossible = theirs == -torch.inf  # such a token adds nothing, where 0 * -inf would be NaN
    difference = torch.where(impossible, 0.0, theirs) - torch.where(impossible, 0.0, ours)
    scored = (theirs.exp() * difference).sum(-1)
    values = scored.new_zeros(labels.numel()).index_put((places[keep],), scored).view(labels.shape)
    if token_weights is not None:
        values = values * token_weights.detach().to(values.dtype)
    return _sums(values, cu_seqlens)


def _stats(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: Tensor | None,
    names: tuple[str, ...],
    layout: dict[str, Any],
    cap: dict[str, Any],
) -> dict[str, Tensor]:
    """Return the mean of each named statistic over the scored tokens of each input sequence, ``(S,)``."""
    if not names:
        return {}
    cu_seqlens, shift, ignore_index = layout.values()
    hidden, targets, places = _align(hidden, labels, cu_seqlens, shift, ignore_index)
    keep = targets != ignore_index
    with torch.no_grad():
        logits = _logits(hidden[keep], weight, bias, **cap)
        logp = logits.log_softmax(-1)
        token = {
            "entropy": -torch.where(logp == -torch.inf, 0.0, logp.exp() * logp).sum(-1),
            "mean_logits": logits.mean(-1),
            "top1": (logits.argmax(-1) == targets[keep]).to(logits.dtype),
            "log_sum_p2": (2 * logp).logsumexp(-1),
        }
        one = torch.ones_like(token["top1"])
        full = {name: one.new_zeros(labels.numel()).index_put((places[keep],), v) for name, v in token.items()}
        count = _sums(one.new_zeros(labels.numel()).index_put((places[keep],), one).view(labels.shape), cu_seqlens)
        return {name: _sums(full[name].view(labels.shape), cu_seqlens) / count.clamp(min=1) for name in names}


def _logits(hidden: Tensor, weight: Tensor, bias: Tensor | None, logit_scale: float, softcap: float | None) -> Tensor:
    """Return the final logits of rows, in float32 at least."""
    logits = torch.nn.functional.linear(hidden, weight, bias)
    logits = logits if logits.dtype == torch.float64 else logits.float()
    if softcap is not None:
        return softcap * torch.tanh(logit_scale * logits / softcap)
    return logit_scale * logits


def _align(
    hidden: Tensor, labels: Tensor, cu_seqlens: Tensor | None, shift: bool, ignore_index: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the hidden rows, the label each predicts, and that label's place among all, sequence by sequence."""
    flat, rows = labels.reshape(-1), hidden.reshape(-1, hidden.shape[-1])
    bounds = list(range(0, flat.numel() + 1, max(1, labels.shape[-1]))) if cu_seqlens is None else cu_seqlens.tolist()
    places = torch.arange(flat.numel(), device=labels.device)
    if not shift:
        return rows, flat, places
    pieces = [(a, b) for a, b in pairwise(bounds) if b - a > 1]
    if not pieces:
        return rows[:0], flat[:0], places[:0]
    return (
        torch.cat([rows[a : b - 1] for a, b in pieces]),
        torch.cat([flat[a + 1 : b] for a, b in pieces]),
        torch.cat([places[a + 1 : b] for a, b in pieces]),
    )


def _scored(hidden: Tensor, labels: Tensor, cu_seqlens: Tensor | None, shift: bool, ignore_index: int) -> Tensor:
    """Return whether each label is scored, a bool tensor in the shape of the labels."""
    _, targets, places = _align(hidden, labels, cu_seqlens, shift, ignore_index)
    scored = torch.zeros(labels.numel(), dtype=torch.bool, device=labels.device)
    scored[places] = targets != ignore_index
    return scored.view(labels.shape)


def _sums(values: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    """Return the sum over each sequence, ``(S,)``."""
    if cu_seqlens is None:
        return values.sum(-1)
    bounds = cu_seqlens.tolist()
    return torch.stack([values[a:b].sum() for a, b in pairwise(bounds)])


def _split(values: Tensor, pairs: str) -> tuple[Tensor, Tensor]:
    """Return the values of the chosen and of the rejected sequences, ``(P,)`` each."""
    if pairs == "interleaved":
        return values[0::2], values[1::2]
    half = values.shape[0] // 2
    return values[:half], values[half:]
