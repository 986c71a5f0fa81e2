"""What fused trainers share whose log a stack's own step computes: the fallback, and a comparison of both losses."""

import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from dpo_kernels import LossInputs
from dpo_kernels.integrations.head_calls import HeadCalls
from dpo_kernels.integrations.model_parts import innermost
from dpo_kernels.integrations.routers import why_no_router_loss

logger = logging.getLogger(__name__)

PARALLELISMS = {"cp": "context", "sp": "sequence", "tp": "tensor"}
# How far the stack's own loss of the first batch may lie from ours, relative to 1 or to itself. Both come from the same
# float32 log-probs.
FORMULA_TOLERANCE = 1e-3


class FusedStep(HeadCalls):
    """A step whose loss one call of a fused function computes. It stands before the stack's own trainer.

    Attributes:
        fallback_reason: why the stack's own step is used, or an empty string.

    Example:
        >>> issubclass(FusedStep, HeadCalls)
        True

    """

    model: Any

    _stack = "TRL"  # the name of the stack
    _reason: str | None = None
    _formula_checked = False

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if not self.fallback_reason:
            settle_router_loss(self, innermost(self.model))
            self._attach(self.model)

    @property
    def fallback_reason(self) -> str:
        """Why the stack's own step is used, or an empty string. The first access writes it to the log."""
        if self._reason is None:
            self._reason = self._why_not()
            if self._reason and self.accelerator.is_main_process:
                logger.warning("%s: %s's own step is used: %s", type(self).__name__, self._stack, self._reason)
        return self._reason

    def _why_not(self) -> str:
        raise NotImplementedError

    def _check_formula(self, ours: Tensor, theirs: Tensor) -> None:
        """Raise ``RuntimeError`` where the stack adds up its loss in another way. The first finite loss is compared."""
        if self._formula_checked:
            return
        both = torch.stack([ours.double(), theirs.detach().to(ours.device).double()]).tolist()
        difference = abs(both[0] - both[1])
        if difference != difference:
            return
        self._formula_checked = True
        if difference > FORMULA_TOLERANCE * max(1.0, abs(both[1])):
            raise RuntimeError(
                f"{type(self).__name__} computed the loss {both[0]:.6g}, and this version of {self._stack} makes "
                f"{both[1]:.6g} of the same log-probs: use {self._stack}'s own trainer"
            )


def separable(loss: Callable[[LossInputs], Tensor]) -> Callable[[LossInputs], Tensor]:
    """Mark a loss of pairs as one of which each pair's part depends on that pair alone.

    Args:
        loss: as ``loss_type`` of ``fused_dpo_loss``.

    Returns:
        The same function.

    Example:
        >>> separable(lambda x: x.policy_chosen_logps).separable
        True

    """
    loss.separable = True  # type: ignore[attr-defined]
    return loss


def why_not_split(accelerator: Any, kinds: tuple[str, ...]) -> str:
    """Say whether a parallelism is on that splits what a fused trainer looks at.

    Args:
        accelerator: accelerate's.
        kinds: names among "cp" (context), "sp" (sequence) and "tp" (tensor) of those that the trainer does not cover.

    Returns:
        The reason in words, or an empty string.

    Example:
        >>> from types import SimpleNamespace
        >>> why_not_split(SimpleNamespace(parallelism_config=SimpleNamespace(cp_size=2)), ("cp", "sp"))
        'context and sequence parallelism split what this trainer looks at'

    """
    parallel = getattr(accelerator, "parallelism_config", None)
    if all((getattr(parallel, f"{kind}_size", 1) or 1) <= 1 for kind in kinds):
        return ""
    *first, last = (PARALLELISMS[kind] for kind in kinds)
    return f"{', '.join(first)} and {last} parallelism split what this trainer looks at"


def why_no_fused_head(trainer: Any) -> str:
    """Say why the head of a trainer's model, or of its reference, cannot be fused.

    Args:
        trainer: a ``HeadCalls`` with ``model``, and with ``ref_model`` where it has one.

    Returns:
        The reason in words, or an empty string. There is none where a fused head is attached already.

    Example::

        reason = why_no_fused_head(trainer)

    """
    try:
        for model in (trainer.model, getattr(trainer, "ref_model", None)):
            if model is not None:
                trainer._head(model)
    except (TypeError, ValueError) as error:
        return str(error)
    return ""


def settle_router_loss(trainer: Any, model: Any) -> None:
    """Switch the router loss off, with a line in the log, where a model has a coefficient for it but no loss.

    Args:
        trainer: a trainer whose constructor has run. Its ``aux_loss_enabled`` may be changed.
        model: its causal model.

    Raises:
        ValueError: the configuration asks for the loss.

    Example:
        >>> from types import SimpleNamespace
        >>> settle_router_loss(SimpleNamespace(aux_loss_enabled=False), None)

    """
    if not getattr(trainer, "aux_loss_enabled", False) or not (reason := why_no_router_loss(model)):
        return
    if coefficient := getattr(trainer.args, "router_aux_loss_coef", None):
        raise ValueError(
            f"router_aux_loss_coef={coefficient} weighs a router loss that is not to be had: {reason}; leave it out"
        )
    trainer.aux_loss_enabled = False
    if trainer.accelerator.is_main_process:
        logger.warning("%s: there is no router loss: %s", type(trainer).__name__, reason)
