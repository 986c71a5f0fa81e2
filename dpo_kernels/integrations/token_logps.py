"""Differentiable log-probs and statistics of single tokens, as TRL's chunked head returns them."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from dpo_kernels import DPOLossOutput, LossInputs, fused_dpo_loss
from dpo_kernels.checks import check_choice, check_number, check_tensor

# TRL's names of the statistics, and ours.
STATS = {"entropy": "entropy", "log_sum_sq_probs": "log_sum_p2", "mean_logits": "mean_logits", "is_top1": "top1"}
# How many logits are held at once while an entropy is differentiated: 256 MiB of float32.
ENTROPY_TILE = 1 << 26


def token_logps(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    temperature: float = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    outputs: tuple[str, ...] = (),
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """Compute log-probs and statistics of tokens from hidden states and the LM head.

    Logits are ``cap(logit_scale (W h + b)) / temperature``. Log-probs and entropy are differentiable. An entropy costs
    a pass over the head of its own only where its gradient is in fact computed.

    Args:
        hidden: floating point ``(N, H)``.
        weight: floating point ``(V, H)``.
        bias: floating point ``(V,)``, or None.
        targets: int64 or int32 ``(N,)``, the tokens that are scored.
        temperature: > 0.
        softcap: soft cap of the logits before the temperature, > 0, or None.
        logit_scale: factor on the logits.
        outputs: names among "log_probs", "entropy", "log_sum_sq_probs", "mean_logits" and "is_top1". Log-probs are
            always returned.

    Returns:
        Log-probs, entropy, log_sum_sq_probs, mean_logits and is_top1 in this order. Each is ``(N,)``, or None if it
        was not asked for. Log-probs are float32, or float64 for float64 hidden states. ``is_top1`` is bool, the other
        statistics are float32.

    Raises:
        ValueError: a shape or a value is wrong, an output is unknown, or ``temperature`` is not > 0.
        TypeError: an argument has the wrong type or dtype.

    Example:
        >>> hidden, weight = torch.eye(2), torch.tensor([[2.0, 0.0], [0.0, 1.0], [0.0, 0.0]])
        >>> logps, entropy, *_, is_top1 = token_logps(
        ...     hidden, weight, None, torch.tensor([0, 2]), outputs=("entropy", "is_top1")
        ... )
        >>> logps, entropy, is_top1
        (tensor([-0.2395, -1.5514]), tensor([0.6656, 0.9753]), tensor([ True, False]))

    """
    for name, tensor in (("hidden", hidden), ("weight", weight), ("targets", targets)):
        check_tensor(name, tensor)
    if targets.dim() != 1:
        raise ValueError(f"targets must have shape (N,), got {tuple(targets.shape)}")
    for name in outputs:
        check_choice("outputs", name, ("log_probs", *STATS))
    wanted = tuple(stat for name, stat in STATS.items() if name in outputs)
    options = head_options(temperature, softcap, logit_scale)
    hidden, weight, bias = same_dtype(hidden, weight, bias)
    out = scored(hidden, weight, bias, targets, options, _log_prob, reduction="none", stats=wanted)
    values: dict[str, Tensor] = {name: out.stats[stat][0::2] for name, stat in STATS.items() if stat in wanted}
    if "entropy" in values and torch.is_grad_enabled():
        values["entropy"] = differentiable_entropy(hidden, weight, bias, values["entropy"], options)
    if "is_top1" in values:
        values["is_top1"] = values["is_top1"] > 0.5
    entropy, log_sum_sq_probs, mean_logits, is_top1 = (values.get(name) for name in STATS)
    return out.loss, entropy, log_sum_sq_probs, mean_logits, is_top1


def head_options(temperature: float, softcap: float | None, logit_scale: float) -> dict[str, Any]:
    """Give ``logit_scale`` and ``softcap`` of a head whose logits are divided by a temperature.

    With z = W h + b, scale s and cap c: c tanh(s z / c) / t = (c / t) tanh((s / t) z / (c / t)). The temperature t
    therefore divides the scale and the cap.

    Args:
        temperature: > 0.
        softcap: soft cap of the logits before the temperature, or None.
        logit_scale: factor on the logits.

    Returns:
        The two keyword arguments of the fused functions, in this order.

    Raises:
        ValueError: ``temperature`` is not > 0, or a number is not finite.
        TypeError: an argument is no number.

    Example:
        >>> head_options(0.5, 3.0, 1.0)
        {'logit_scale': 2.0, 'softcap': 6.0}

    """
    if check_number("temperature", temperature) <= 0:
        raise ValueError(
            f"temperature must be > 0, got {temperature}: logits are divided by it (greedy decoding has no log-probs)"
        )
    scale = check_number("logit_scale", logit_scale)
    cap = None if softcap is None else check_number("softcap", softcap)
    return {"logit_scale": scale / temperature, "softcap": None if cap is None else cap / temperature}


def scored(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    options: dict[str, Any],
    loss: Callable[[LossInputs], Tensor],
    **how: Any,
) -> DPOLossOutput:
    """Call ``fused_dpo_loss`` with single tokens for sequences.

    Each token is the chosen side of a pair whose rejected side is empty. So ``policy_chosen_logps`` of the loss are the
    tokens' log-probs, and the statistics of the chosen sides are the tokens' own.

    Args:
        hidden: floating point ``(N, H)``.
        weight: floating point ``(V, H)``.
        bias: floating point ``(V,)``, or None.
        targets: int64 or int32 ``(N,)``.
        options: of the head, as ``head_options`` gives them.
        loss: a loss of the pairs, ``(N,)``.
        **how: ``reduction`` and ``stats`` of ``fused_dpo_loss``.

    Returns:
        What ``fused_dpo_loss`` returns.

    Example:
        >>> zeros = torch.zeros(2, 4)
        >>> options = head_options(1.0, None, 1.0)
        >>> scored(zeros, zeros, None, torch.tensor([0, 1]), options, lambda x: x.policy_chosen_logps).loss
        tensor(-0.6931)

    """
    ends = torch.arange(1, targets.shape[0] + 1, device=targets.device).repeat_interleave(2)
    return fused_dpo_loss(
        hidden,
        weight,
        targets,
        bias=bias,
        cu_seqlens=torch.nn.functional.pad(ends, (1, 0)),
        pairs="interleaved",
        reference_free=True,
        loss_type=loss,
        **options,
        **how,
    )


def differentiable_entropy(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, entropy: Tensor, options: dict[str, Any]
) -> Tensor:
    """Give entropies their derivative. It costs a pass over the head, in the backward.

    Args:
        hidden: floating point ``(N, H)``.
        weight: floating point ``(V, H)``.
        bias: floating point ``(V,)``, or None.
        entropy: float32 ``(N,)``, the entropies of these logits.
        options: of the head, as ``head_options`` gives them.

    Returns:
        The entropies, differentiable with respect to the first three arguments.

    Example:
        >>> hidden, weight = torch.eye(2, requires_grad=True), torch.tensor([[2.0, 0.0], [0.0, 2.0]])
        >>> differentiable_entropy(hidden, weight, None, torch.tensor([0.3653, 0.3653]), head_options(1.0, None, 1.0))
        tensor([0.3653, 0.3653], grad_fn=<_EntropyBackward>)

    """
    entropies: Tensor = _Entropy.apply(hidden, weight, bias, entropy, *options.values())
    return entropies


def _log_prob(x: LossInputs) -> Tensor:
    return x.policy_chosen_logps


def same_dtype(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """Cast the head to the dtype of the hidden states, unless autocast does so.

    Args:
        hidden: floating point ``(N, H)``.
        weight: floating point ``(V, H)``.
        bias: floating point ``(V,)``, or None.

    Returns:
        The three, differentiable.

    Example:
        >>> same_dtype(torch.zeros(1, 4), torch.zeros(2, 4, dtype=torch.float64), None)[1].dtype
        torch.float32

    """
    if hidden.dtype == weight.dtype or torch.is_autocast_enabled(hidden.device.type):
        return hidden, weight, bias
    return hidden, weight.to(hidden.dtype), None if bias is None else bias.to(hidden.dtype)


class _Entropy(torch.autograd.Function):
    """Give entropies that were computed elsewhere their derivative, ``dH / dz = -p (log p + H)``, in tiles of rows."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        entropy: Tensor,
        logit_scale: float,
        softcap: float | None,
    ) -> Tensor:
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(hidden, weight, bias, entropy)
        ctx.head = (logit_scale, softcap)
        return entropy.clone()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor | None) -> tuple[Tensor | None, ...]:
        if grad is None:
            return (None,) * 6
        hidden, weight, bias, entropy = ctx.saved_tensors
        logit_scale, softcap = ctx.head
        need_hidden, need_weight, need_bias = ctx.needs_input_grad[:3]
        wide = weight.to(torch.promote_types(weight.dtype, torch.float32))
        dx = torch.zeros_like(hidden) if need_hidden else None
        dw = torch.zeros_like(wide) if need_weight else None
        db = torch.zeros_like(wide[:, 0]) if need_bias else None
        step = max(1, ENTROPY_TILE // weight.shape[0])
        with torch.autocast(hidden.device.type, enabled=False):
            for start in range(0, hidden.shape[0], step):
                rows = slice(start, start + step)
                x = hidden[rows].to(wide.dtype)
                logits = x @ wide.t() if bias is None else torch.addmm(bias.to(wide.dtype), x, wide.t())
                logits = logits * logit_scale
                slope: Any = logit_scale
                if softcap is not None:
                    squashed = torch.tanh(logits / softcap)
                    logits, slope = softcap * squashed, logit_scale * (1 - squashed * squashed)
                logp = logits.log_softmax(-1)
                d = -logp.exp() * (logp + entropy[rows, None].to(wide.dtype)) * grad[rows, None].to(wide.dtype) * slope
                if dx is not None:
                    dx[rows] = (d @ wide).to(dx.dtype)
                if dw is not None:
                    dw.addmm_(d.t(), x)
                if db is not None:
                    db += d.sum(dim=0)
        return (
            dx,
            None if dw is None else dw.to(weight.dtype),
            None if db is None else db.to(bias.dtype),
            None,
            None,
            None,
        )
