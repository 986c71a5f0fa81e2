"""What the fused trainers share whose log TRL's own step computes: the fallback, and a comparison of the two losses."""

import logging
from typing import Any

import torch
from torch import Tensor

from dpo_kernels.integrations.model_parts import innermost
from dpo_kernels.integrations.trl.compatibility import settle_router_loss
from dpo_kernels.integrations.trl.head_calls import HeadCalls

logger = logging.getLogger(__name__)

# How far TRL's own loss of the first batch may lie from ours, relative to 1 or to itself. Both come from the same
# float32 log-probs.
FORMULA_TOLERANCE = 1e-3


class FusedStep(HeadCalls):
    """A step of TRL's whose loss one call of a fused function computes. It stands before TRL's class.

    Attributes:
        fallback_reason: why TRL's own step is used, or an empty string.

    Example:
        >>> issubclass(FusedStep, HeadCalls)
        True

    """

    model: Any

    _reason: str | None = None
    _formula_checked = False

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if not self.fallback_reason:
            settle_router_loss(self, innermost(self.model))
            self._attach(self.model)

    @property
    def fallback_reason(self) -> str:
        """Why TRL's own step is used, or an empty string. The first access writes it to the log."""
        if self._reason is None:
            self._reason = self._why_not()
            if self._reason and self.accelerator.is_main_process:
                logger.warning("%s: TRL's own step is used: %s", type(self).__name__, self._reason)
        return self._reason

    def _why_not(self) -> str:
        raise NotImplementedError

    def _check_formula(self, ours: Tensor, of_trl: Tensor) -> None:
        """Raise ``RuntimeError`` where this TRL adds up its loss in another way. The first finite loss is compared."""
        if self._formula_checked:
            return
        both = torch.stack([ours.double(), of_trl.detach().to(ours.device).double()]).tolist()
        difference = abs(both[0] - both[1])
        if difference != difference:
            return
        self._formula_checked = True
        if difference > FORMULA_TOLERANCE * max(1.0, abs(both[1])):
            raise RuntimeError(
                f"{type(self).__name__} computed the loss {both[0]:.6g}, and this version of TRL makes {both[1]:.6g} "
                "of the same log-probs: use TRL's own trainer"
            )
