"""The loss as it is usually written, through the logits of every position, beside the fused one."""

from collections.abc import Callable

import torch
import torch.nn.functional as F

from demo.data import IGNORED
from dpo_kernels import fused_dpo_loss
from dpo_kernels.reference import dpo_loss_reference


def full_logits_loss(
    hidden: torch.Tensor,  # (2B, T, H)
    weight: torch.Tensor,  # (V, H)
    labels: torch.Tensor,  # (2B, T), not shifted
    ref_logps: torch.Tensor,  # (2B,)
    *,
    beta: float,
    loss_type: str,
    label_smoothing: float,
) -> torch.Tensor:
    """Return the mean loss, holding (2B, T, V) logits, their log-softmax and its gradient."""
    if loss_type != "sigmoid":  # the package's own oracle also holds everything
        return dpo_loss_reference(
            hidden,
            weight,
            labels,
            ref_logps=ref_logps,
            shift=True,
            beta=beta,
            loss_type=loss_type,
            label_smoothing=label_smoothing,
        ).loss
    logits = (hidden @ weight.T)[:, :-1]
    targets = labels[:, 1:]
    scored = targets != IGNORED
    logps = logits.float().log_softmax(-1).gather(-1, targets.where(scored, 0)[..., None])[..., 0]
    log_ratios = (logps * scored).sum(-1) - ref_logps
    chosen, rejected = log_ratios.chunk(2)
    u = beta * (chosen - rejected)
    return -((1 - label_smoothing) * F.logsigmoid(u) + label_smoothing * F.logsigmoid(-u)).mean()


def fused_loss(
    hidden: torch.Tensor,  # (2B, T, H)
    weight: torch.Tensor,  # (V, H)
    labels: torch.Tensor,  # (2B, T), not shifted
    ref_logps: torch.Tensor,  # (2B,)
    *,
    beta: float,
    loss_type: str,
    label_smoothing: float,
) -> torch.Tensor:
    """Return the same mean loss from `dpo_kernels`."""
    return fused_dpo_loss(
        hidden,
        weight,
        labels,
        ref_logps=ref_logps,
        shift=True,
        beta=beta,
        loss_type=loss_type,
        label_smoothing=label_smoothing,
    ).loss


METHODS: dict[str, Callable[..., torch.Tensor]] = {"full logits": full_logits_loss, "fused": fused_loss}
