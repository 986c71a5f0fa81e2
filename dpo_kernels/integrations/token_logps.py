"""Per-token log-probs and statistics of a list of positions, differentiable: what TRL's chunked head returns."""

from typing import Any

import torch
from torch import Tensor

from dpo_kernels import LossInputs, fused_dpo_loss
from dpo_kernels.checks import check_choice, check_number, check_tensor

STATS = {"entropy": "entropy", "log_sum_sq_probs": "log_sum_p2", "mean_logits": "mean_logits", "is_top1": "top1"}
ENTROPY_TILE = 1 << 26  # numbers in one tile of logits while an entropy is differentiated: 256 MiB of float32


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
    """(log-probs, entropy, log_sum_sq_probs, mean_logits, is_top1) of ``targets (N,)`` at ``hidden (N, H)``.

    Each is ``(N,)``, or None where not among ``outputs``. Logits are ``cap(logit_scale (W h + b)) / temperature``.
    Log-probs and entropy are differentiable; an entropy costs its own pass over the head only where it is in fact
    differentiated. Errors as in ``fused_dpo_loss``; a ``temperature`` that is not > 0 is one too.
    """
    for name, tensor in (("hidden", hidden), ("weight", weight), ("targets", targets)):
        check_tensor(name, tensor)
    if targets.dim() != 1:
        raise ValueError(f"targets must have shape (N,), got {tuple(targets.shape)}")
    for name in outputs:
        check_choice("outputs", name, ("log_probs", *STATS))
    if check_number("temperature", temperature) <= 0:
        raise ValueError(
            f"temperature must be > 0, got {temperature}: logits are divided by it (greedy decoding has no log-probs)"
        )
    scale = check_number("logit_scale", logit_scale)
    cap = None if softcap is None else check_number("softcap", softcap)
    wanted = tuple(stat for name, stat in STATS.items() if name in outputs)
    # cap(z) / t = (c / t) tanh((s / t) z / (c / t)): the temperature is a matter of scale and cap.
    head: dict[str, Any] = {
        "logit_scale": scale / temperature,
        "softcap": None if cap is None else cap / temperature,
    }
    hidden, weight, bias = _same_dtype(hidden, weight, bias)
    rows = targets.shape[0]
    # One pair for each token, whose rejected side is empty: its loss is the token's log-prob, and the statistics of
    # its chosen side are the token's own.
    ends = torch.arange(1, rows + 1, device=targets.device).repeat_interleave(2)
    out = fused_dpo_loss(
        hidden,
        weight,
        targets,
        bias=bias,
        cu_seqlens=torch.nn.functional.pad(ends, (1, 0)),
        pairs="interleaved",
        reference_free=True,
        loss_type=_log_prob,
        reduction="none",
        stats=wanted,
        **head,
    )
    values: dict[str, Tensor] = {name: out.stats[stat][0::2] for name, stat in STATS.items() if stat in wanted}
    if "entropy" in values and torch.is_grad_enabled():
        values["entropy"] = _Entropy.apply(hidden, weight, bias, values["entropy"], *head.values())
    if "is_top1" in values:
        values["is_top1"] = values["is_top1"] > 0.5
    entropy, log_sum_sq_probs, mean_logits, is_top1 = (values.get(name) for name in STATS)
    return out.loss, entropy, log_sum_sq_probs, mean_logits, is_top1


def _log_prob(x: LossInputs) -> Tensor:
    return x.policy_chosen_logps


def _same_dtype(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    if hidden.dtype == weight.dtype or torch.is_autocast_enabled(hidden.device.type):
        return hidden, weight, bias
    return hidden, weight.to(hidden.dtype), None if bias is None else bias.to(hidden.dtype)


class _Entropy(torch.autograd.Function):
    """Entropies that were computed elsewhere, with their derivative ``dH / dz = -p (log p + H)`` in tiles of rows."""

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
