"""The losses of pairs on log-probs alone."""

from typing import Any

from torch import Tensor

from dpo_kernels import checks, losses
from dpo_kernels.api.pairs import Loss
from dpo_kernels.inputs.divisors import check_divisor
from dpo_kernels.inputs.sequence_logps import check_divergences, check_logps
from dpo_kernels.loss_interface import LossInputs
from dpo_kernels.shapes import number_like


def dpo_loss(
    policy_chosen_logps: Tensor,
    policy_rejected_logps: Tensor,
    ref_chosen_logps: Tensor | None,
    ref_rejected_logps: Tensor | None,
    beta: float = 0.1,
    label_smoothing: float = 0.0,
    *,
    loss_type: Loss = "sigmoid",
    reference_free: bool = False,
    chosen_tokens: Tensor | None = None,
    rejected_tokens: Tensor | None = None,
    token_denominator: float | Tensor | None = None,
    chosen_kl: Tensor | None = None,
    rejected_kl: Tensor | None = None,
    **loss_options: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute the loss and the rewards of each pair from log-probs alone.

    The rewards are ``beta * (policy - reference)``.

    Args:
        policy_chosen_logps: The policy's log-prob of each chosen sequence, ``(P,)``, floating point. It is
            differentiable.
        policy_rejected_logps: The policy's log-prob of each rejected sequence, ``(P,)``, floating point. It is
            differentiable.
        ref_chosen_logps: The reference's log-prob of each chosen sequence, ``(P,)``, floating point. Pass None if the
            loss has no reference, or with ``reference_free``.
        ref_rejected_logps: The reference's log-prob of each rejected sequence, ``(P,)``, floating point. None has the
            same meaning.
        beta: Inverse temperature, a finite number >= 0. The losses "ipo", "sppo_hard" and "cal_dpo" need beta > 0.
        label_smoothing: Probability that a label is flipped, a number in [0, 0.5], for the losses that have this
            option. With "sigmoid" the loss is then cDPO.
        loss_type: Name of a loss (a key of ``dpo_kernels.LOSSES``), a list of names or a callable. A list is summed
            with ``loss_weights``. A callable maps ``LossInputs`` to ``(P,)`` losses. It counts as coupled over the
            batch, unless it has an attribute ``separable`` that is true.
        reference_free: bool. If true, there is no reference, and its log-probs count as 0.
        chosen_tokens: Number of scored tokens of each chosen sequence, ``(P,)``, integer or floating point. Losses that
            average over tokens, such as "ipo", divide by it. None means 1, so that the log-probs count as averages.
        rejected_tokens: Number of scored tokens of each rejected sequence, ``(P,)``, integer or floating point. None
            means 1.
        token_denominator: Number > 0, or a 0-d tensor, that replaces the number of chosen tokens in the means over
            tokens (``sft``, ``nll_weight``).
        chosen_kl: Sum over the scored tokens of each chosen sequence of ``KL(reference || policy)``, ``(P,)``, floating
            point. It is differentiable. The losses "tdpo1" and "tdpo2" need it.
        rejected_kl: The same of each rejected sequence, ``(P,)``, floating point. It is differentiable.
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
        ``(losses, chosen_rewards, rejected_rewards)``, each ``(P,)``, float32 (float64 if the policy's log-probs are).
        Only ``losses`` carries a gradient.

    Raises:
        ValueError: A shape, a value or a combination is wrong; the message names the argument.
        TypeError: A dtype or a type is wrong.
        RuntimeError: An option carries a tangent of forward mode.

    Source:
        Rafailov et al., arXiv 2305.18290, eq. 7. The README's table names the paper of each other loss.

    Example:
        >>> import torch
        >>> from dpo_kernels import dpo_loss
        >>> chosen, rejected = torch.tensor([-10.0]), torch.tensor([-12.0])
        >>> reference = torch.tensor([-11.0])
        >>> losses, *rewards = dpo_loss(chosen, rejected, reference, reference, beta=0.1)  # u = 0.1 * (1 - (-1)) = 0.2
        >>> round(losses.item(), 4), [round(reward.item(), 4) for reward in rewards]
        (0.5981, [0.1, -0.1])
    """
    bound = losses.bind(loss_type, beta, label_smoothing, loss_options)
    checks.check_flag("reference_free", reference_free)
    policy, reference, tokens = check_logps(
        (policy_chosen_logps, policy_rejected_logps),
        (ref_chosen_logps, ref_rejected_logps),
        (chosen_tokens, rejected_tokens),
        reference_free,
        bound.needs_reference,
        bound.name,
    )
    check_divisor("token_denominator", token_denominator, policy[0], "policy_chosen_logps")
    bound = losses.fit_to_batch(bound, policy[0].shape[0], policy[0].device)
    divisor = tokens[0].sum().clamp(min=1)
    if token_denominator is not None:
        divisor = number_like(token_denominator, divisor)
    bound = bound.with_token_factor(policy[0].shape[0] / divisor, policy[0].shape[0])
    divergences = check_divergences((chosen_kl, rejected_kl), policy[0], bound.needs_kl, bound.name)
    losses_P = bound.evaluate(LossInputs._make((*policy, *reference, *tokens, bound.beta, *divergences)))
    chosen, rejected = (bound.beta * (p - r).detach() for p, r in zip(policy, reference, strict=True))
    return losses_P, chosen, rejected
