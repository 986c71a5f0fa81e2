"""Calls of a trainer's model that return what a piece of work makes of hidden states and LM head."""

from collections.abc import Callable
from contextlib import suppress
from functools import cached_property
from typing import Any

import torch

from dpo_kernels.integrations.head_forward import CALL
from dpo_kernels.integrations.model_parts import innermost
from dpo_kernels.integrations.split_head import SplitHeads
from dpo_kernels.integrations.transformers import FusedLMHead, fused_lm_head


class HeadCalls:
    """What the fused trainers share. It stands before the stack's class among the bases of a trainer.

    Attributes:
        accelerator: accelerate's, which the trainer's constructor makes.
        check_head: whether the fused head is compared with the model's own logits at the first batch. A subclass that
            sets it to False leaves that out.

    Example:
        >>> HeadCalls().check_head
        True

    """

    accelerator: Any
    args: Any
    check_head = True

    _logps_in_batch: tuple[str, ...] = ()  # the entries of a batch that hold log-probs
    _work: Callable[..., Any] | None = None

    def _head(self, model: Any) -> FusedLMHead:
        """Return the head that is attached to a model, or a new one where none is."""
        # With keep_torch_compile accelerate would take DistributedDataParallel out of a compiled model for good.
        model = self.accelerator.unwrap_model(model, keep_torch_compile=False)
        attached = getattr(innermost(model).forward, CALL, None)
        return attached.of(innermost(model)) if attached is not None else fused_lm_head(model, check=self.check_head)

    @property
    def fallback_reason(self) -> str:
        """Why the stack's own step is used, or an empty string."""
        return ""

    def _attach(self, model: Any) -> None:
        """Have the model's forward compute the fused loss. It must be done before an engine shards the weights."""
        if not self.fallback_reason:
            self._head(model).attach()

    def _prepare_inputs(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """Do as transformers does, but keep the log-probs: DeepSpeed casts inputs to 16 bits, and they are none."""
        stock: Any = super()
        prepared: dict[str, Any] = stock._prepare_inputs(inputs)
        return prepared | {name: inputs[name].to(self.args.device) for name in self._logps_in_batch if name in inputs}

    def _within(self, model: Any, inputs: dict[str, Any], work: Callable[..., Any]) -> Any:
        """Call the model so that its forward returns what ``work(outputs, hidden, weight, options)`` returns."""
        self._work = work
        try:
            return model(**inputs, **{CALL: self._do_work})
        finally:
            self._work = None

    # The work runs eagerly in a compiled model too. It is one function for every batch, or each would compile anew.
    @torch.compiler.disable
    def _do_work(self, *given: Any) -> Any:
        assert self._work is not None, "set around the call of the model"
        return self._work(*given)

    @cached_property
    def _rows(self) -> SplitHeads:
        return SplitHeads(self.accelerator)


def attach_heads(check_head: bool, *models: Any) -> None:
    """Attach a fused head to each model that can have one, before a constructor lets an engine shard them.

    Args:
        check_head: as ``check`` of ``fused_lm_head``.
        *models: causal models of transformers, or None. One that can have no fused head is left as it is: the trainer's
            ``fallback_reason`` says why.

    Example::

        attach_heads(True, model, ref_model)

    """
    for model in models:
        if model is not None:
            with suppress(TypeError, ValueError):
                fused_lm_head(model, check=check_head).attach()
