"""The options of TRL's DPOConfig as arguments of ``fused_dpo_loss``, or the reason why there are no such arguments."""

from dataclasses import dataclass
from typing import Any

from dpo_kernels import FusedDPOLoss, losses

# Our names of TRL's f-divergences.
DIVERGENCES = {"forward_kl": "forward_kl", "js_divergence": "js", "alpha_divergence": "alpha"}
# The losses for which TRL 1.16 and the fused loss compute the same divergence; sft has no scores to take one of. For
# ipo and sigmoid_norm TRL averages the scores over tokens. With any other loss TRL refuses a divergence.
DIVERGING = ("sigmoid", "robust", "hinge", "exo_pair", "discopop", "sft")


class NotFused(ValueError):
    """TRL computes a combination of options, and the fused loss does not. The message says why.

    Example:
        >>> str(NotFused("loss_type sft with ld_alpha"))
        'loss_type sft with ld_alpha'

    """


@dataclass(frozen=True)
class LossOptions:
    """Keyword arguments for ``fused_dpo_loss``, and what else the trainer must know.

    Attributes:
        arguments: ``loss_type``, ``beta`` and the options of the loss.
        needs_reference: whether the loss reads the reference's log-probs.
        differences_from_trl: what the fused loss does that TRL leaves out, as a line for the log. It may be empty.

    Example:
        >>> LossOptions({"loss_type": "sft", "beta": 0.1}, needs_reference=False, differences_from_trl="").arguments
        {'loss_type': 'sft', 'beta': 0.1}

    """

    arguments: dict[str, Any]
    needs_reference: bool
    differences_from_trl: str


def loss_options(trainer: Any) -> LossOptions:
    """Read the loss of a ``DPOTrainer`` from the attributes that its constructor has set.

    Args:
        trainer: a ``DPOTrainer``, or an object with the same attributes.

    Returns:
        The arguments for ``fused_dpo_loss``.

    Raises:
        NotFused: only TRL computes this combination.
        ValueError: an option would have no effect, or ``ld_alpha`` is outside [0, 1].

    Example:
        >>> from types import SimpleNamespace
        >>> trainer = SimpleNamespace(
        ...     loss_types=["sigmoid", "sft"], loss_weights=[1.0, 0.5], beta=0.1, label_smoothing=0.0,
        ...     ld_alpha=None, use_weighting=False, f_divergence_type="reverse_kl",
        ... )
        >>> loss_options(trainer).arguments
        {'beta': 0.1, 'loss_type': ('sigmoid', 'sft'), 'loss_weights': [1.0, 0.5]}

    """
    weights: dict[str, float] = {}
    for name, weight in zip(trainer.loss_types, trainer.loss_weights, strict=True):
        weights[name] = weights.get(name, 0.0) + weight
    unknown = [name for name in weights if name not in losses.LOSSES]
    if unknown:
        raise NotFused(f"loss_type {', '.join(unknown)} is not in this version's family")
    specs = [losses.LOSSES[name] for name in weights]
    arguments: dict[str, Any] = {"beta": trainer.beta, "loss_type": next(iter(weights))}
    if len(weights) > 1 or set(weights.values()) != {1.0}:
        arguments |= {"loss_type": tuple(weights), "loss_weights": list(weights.values())}
    differences_from_trl = _smoothing(arguments, trainer.label_smoothing, specs)
    if "discopop" in weights:
        arguments["discopop_tau"] = trainer.args.discopop_tau
    _check_tokens(weights, trainer)
    _divergence(arguments, trainer, specs)
    try:
        FusedDPOLoss(**arguments)
    except (ValueError, TypeError) as error:
        raise NotFused(f"the fused loss refuses these options ({error})") from error
    return LossOptions(arguments, any(spec.needs_reference for spec in specs), differences_from_trl)


def _smoothing(arguments: dict[str, Any], label_smoothing: float, specs: list[Any]) -> str:
    """Add ``label_smoothing`` to the arguments; return how this differs from TRL, or an empty string."""
    taking = [spec.name for spec in specs if "label_smoothing" in spec.options]
    if label_smoothing == 0.0:
        return ""
    if not taking:
        names = ", ".join(spec.name for spec in specs)
        raise ValueError(
            f"label_smoothing={label_smoothing} has no effect with loss_type {names}: set it to 0, or add a loss "
            "that smooths (sigmoid, robust, exo_pair, aot, aot_unpaired)"
        )
    arguments["label_smoothing"] = label_smoothing
    if "sigmoid" not in taking:
        return ""
    return f"label_smoothing={label_smoothing} is honoured by the sigmoid loss (conservative DPO); TRL ignores it there"


def _check_tokens(weights: dict[str, float], trainer: Any) -> None:
    if trainer.ld_alpha is not None and not 0.0 <= trainer.ld_alpha <= 1.0:
        raise ValueError(f"ld_alpha must lie in [0, 1], got {trainer.ld_alpha}")
    if "sft" in weights and trainer.ld_alpha is not None:
        raise NotFused("loss_type sft with ld_alpha: TRL weighs the tokens of the other losses only")
    if "sft" in weights and trainer.use_weighting:
        raise NotFused("loss_type sft with use_weighting: it has no pairs to weigh")


def _divergence(arguments: dict[str, Any], trainer: Any, specs: list[Any]) -> None:
    kind = trainer.f_divergence_type
    if kind == "reverse_kl":
        return
    if kind not in DIVERGENCES:
        raise NotFused(f"f_divergence_type {kind!r} is not in this version's family")
    other = [spec.name for spec in specs if spec.name not in DIVERGING]
    if other:
        raise NotFused(f"f_divergence_type {kind!r} with loss_type {', '.join(other)}")
    if any(spec.uses_log_ratios_only for spec in specs):  # sft alone has no reference to diverge from
        arguments["f_divergence"] = DIVERGENCES[kind]
        if kind == "alpha_divergence":
            arguments["f_alpha"] = trainer.f_alpha_divergence_coef
