"""OpenRLHF's log-probs and DPO loss without logits. Nothing of OpenRLHF is imported.

OpenRLHF converts the logits of the batch to float32 in ``Actor.forward``, and reduces them afterwards. These functions
take the hidden states and the head in their place.
"""

from typing import Any

import torch
from torch import Tensor

from dpo_kernels import DPOLossOutput, LossInputs, fused_dpo_loss
from dpo_kernels.integrations.logps import head_logps


def log_probs_from_hidden(
    hidden: Tensor, weight: Tensor, labels: Tensor, temperature: float = 1.0, **options: Any
) -> Tensor:
    """Compute what OpenRLHF's ``log_probs_from_logits(logits, labels, temperature)`` computes.

    Args:
        hidden: floating point ``(B, T, H)``. A packed batch is ``(1, N, H)``, or this rank's part of it under ring
            attention.
        weight: floating point ``(V, H)``.
        labels: the token after each position, int64 ``(B, T)``: ``rolled_sequences`` in OpenRLHF.
        temperature: what logits are divided by, > 0.
        **options: ``bias``, ``logit_scale``, ``softcap`` and more, as for ``head_logps``.

    Returns:
        ``(B, T)``, float32, differentiable. OpenRLHF then gathers and pads them under ring attention, and drops the
        last column.

    Raises:
        ValueError, TypeError: as in ``head_logps``.

    Example:
        >>> log_probs_from_hidden(torch.ones(1, 2, 8), torch.zeros(4, 8), torch.tensor([[1, 3]]))
        tensor([[-1.3863, -1.3863]])

    """
    return head_logps(hidden, weight, labels, temperature=temperature, **options)


def preference_loss(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    ref_logps: Tensor,
    beta: float,
    label_smoothing: float = 0.0,
    ipo: bool = False,
    *,
    sums_in_ipo: bool = False,
    **options: Any,
) -> DPOLossOutput:
    """Compute the loss of OpenRLHF's ``DPOLoss`` in one pass over the head.

    Args:
        hidden: floating point ``(2B, T, H)``, all chosen sequences first.
        weight: floating point ``(V, H)``.
        labels: the sequences' own ids, int64 ``(2B, T)``, -100 on prompts and padding. They are shifted here.
        ref_logps: sums ``(2B,)`` of the reference's log-probs.
        beta: inverse temperature, > 0 with IPO.
        label_smoothing: probability that a label is flipped, in [0, 0.5]. IPO has none.
        ipo: IPO instead of DPO.
        sums_in_ipo: with IPO, take sums of log-probs, as OpenRLHF does. The paper and this package take averages over
            tokens; sums make the target ``1 / (2 beta)`` mean something else for each length.
        **options: of ``fused_dpo_loss``.

    Returns:
        As ``fused_dpo_loss``. ``chosen_rewards`` and ``rejected_rewards`` are those that OpenRLHF logs.

    Raises:
        ValueError: an option has no effect, or as in ``fused_dpo_loss``.
        TypeError: as in ``fused_dpo_loss``.

    Source:
        OpenRLHF 0.11.2, ``DPOLoss``; IPO: Azar et al., arXiv 2310.12036, eq. 17.

    Example:
        >>> hidden, weight = torch.ones(2, 3, 8), torch.zeros(4, 8)
        >>> out = preference_loss(hidden, weight, torch.ones(2, 3, dtype=torch.long), torch.zeros(2), beta=0.1)
        >>> round(out.loss.item(), 4)
        0.6931

    """
    if sums_in_ipo and not ipo:
        raise ValueError("sums_in_ipo=True has no effect without ipo=True")
    if ipo and label_smoothing:
        raise ValueError(f"label_smoothing={label_smoothing} has no effect with ipo=True")
    loss: Any = "sigmoid"
    if ipo:
        loss = _ipo_of_sums if sums_in_ipo else "ipo"
    else:
        options["label_smoothing"] = label_smoothing
    return fused_dpo_loss(hidden, weight, labels, shift=True, ref_logps=ref_logps, beta=beta, loss_type=loss, **options)


def _ipo_of_sums(x: LossInputs) -> Tensor:
    chosen = x.policy_chosen_logps - x.ref_chosen_logps
    return torch.square(chosen - (x.policy_rejected_logps - x.ref_rejected_logps) - 1 / (2 * x.beta))


_ipo_of_sums.separable = True  # type: ignore[attr-defined]
