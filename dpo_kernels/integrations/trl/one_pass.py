"""TRL's trainers without a reference, ORPO and CPO, on one pass over the LM head.

These trainers make full logits twice a step. Here one call of ``fused_dpo_loss`` gives the loss, its gradients, and the
log-probs that are logged. The formulae of the pairs and every logged value are computed by TRL's own methods.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dpo_kernels.integrations.fused_step import FusedStep, why_no_fused_head, why_not_split
from dpo_kernels.integrations.model_parts import innermost
from dpo_kernels.integrations.routers import router_loss
from dpo_kernels.integrations.token_logps import token_logps

IGNORED = -100  # TRL's label of positions that are not scored


class Scored(NamedTuple):
    """What one pass over the head gives a trainer.

    Attributes:
        loss: the loss ``()`` without the router loss. Only this has a gradient.
        chosen: log-probs ``(B,)`` of the chosen completions, sums or averages as TRL's loss takes them.
        rejected: those of the rejected completions.
        nll: the mean ``()`` over tokens of the negative log-probs that TRL adds to its loss.

    Example:
        >>> zero = torch.zeros(())
        >>> Scored(zero, zero[None], zero[None], zero).nll
        tensor(0.)

    """

    loss: Tensor
    chosen: Tensor
    rejected: Tensor
    nll: Tensor


class OnePass(FusedStep):
    """The step of a trainer whose loss one call of ``fused_dpo_loss`` computes. It stands before TRL's class.

    Attributes:
        fallback_reason: why TRL's own step is used, or an empty string.

    Example:
        >>> issubclass(OnePass, FusedStep)
        True

    """

    _values: tuple[Any, ...] | None = None  # what TRL's own forward would return, while TRL computes its log from it

    def _why_not(self) -> str:
        if getattr(self, "is_encoder_decoder", False):
            return "the model is an encoder-decoder"
        return why_not_split(self.accelerator, ("cp", "sp", "tp")) or why_no_fused_head(self)

    # TRL's constructor calls neither of the next two, and its steps call both.

    def get_batch_loss_metrics(
        self, model: Any, batch: dict[str, Any], train_eval: str = "train"
    ) -> tuple[Tensor, dict[str, float]]:
        """Compute the loss of a batch and what TRL logs of it, as TRL's method of this name does.

        Args:
            model: the model, or a wrapper of it.
            batch: a batch of TRL's collator: ``chosen_input_ids`` ``(B, T)`` and so on.
            train_eval: "train" or "eval".

        Returns:
            The loss ``()``, and the values by name.

        Raises:
            RuntimeError: the self-check of the head fails, or TRL's own loss is another one.

        Example::

            loss, metrics = trainer.get_batch_loss_metrics(trainer.model, batch)

        """
        stock: Any = super()
        if self.fallback_reason:
            return stock.get_batch_loss_metrics(model, batch, train_eval)
        rows = self._rows_of(batch)
        inputs = {
            "input_ids": rows["concatenated_input_ids"],
            "attention_mask": rows["concatenated_attention_mask"],
            "use_cache": False,
        }
        if self.aux_loss_enabled:
            inputs["output_router_logits"] = True
        scored, logits, aux_loss = self._within(model, inputs, partial(self._step, rows))
        loss = scored.loss
        values = [scored.chosen, scored.rejected, *logits, scored.nll]
        if aux_loss is not None:
            loss = loss + self.aux_loss_coef * aux_loss.to(loss.device)
            values.append(aux_loss)
        self._values = tuple(value.detach() for value in values)
        try:
            of_trl, metrics = stock.get_batch_loss_metrics(model, batch, train_eval)
        finally:
            self._values = None
        self._check_formula(loss.detach(), of_trl)
        return loss, metrics

    def concatenated_forward(self, model: Any, batch: dict[str, Any]) -> tuple[Any, ...]:
        """Give what TRL's method of this name gives: with full logits, unless a fused step is being logged.

        Args:
            model: the model, or a wrapper of it.
            batch: a batch of TRL's collator.

        Returns:
            Log-probs ``(B,)`` of the chosen and of the rejected completions, logits of both, and TRL's NLL. In a fused
            step means stand for the logits.

        Example::

            chosen, rejected, *_ = trainer.concatenated_forward(trainer.model, batch)

        """
        if self._values is not None:
            return self._values
        stock: Any = super()
        values: tuple[Any, ...] = stock.concatenated_forward(model, batch)
        return values

    # --- inside the model's forward ---

    # These are set by TRL's constructor.
    aux_loss_enabled: bool
    aux_loss_coef: float
    concatenated_inputs: Callable[..., dict[str, Tensor]]

    _padding_from: str  # the attribute that holds TRL's id of padding, which the mean of the logits depends on
    _left_out: int  # how many positions at the end of each row TRL's mean of the logits leaves out

    def _rows_of(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        return self.concatenated_inputs(
            batch,
            is_encoder_decoder=False,
            padding_value=getattr(self, self._padding_from),
            device=self.accelerator.device,
        )

    def _step(
        self, rows: dict[str, Tensor], outputs: Any, hidden: Tensor, weight: Tensor, options: dict[str, Any]
    ) -> tuple[Scored, tuple[Tensor, Tensor], Tensor | None]:
        rows = {name: value.to(hidden.device) for name, value in rows.items()}
        aux_loss = None
        if self.aux_loss_enabled:
            aux_loss = router_loss(innermost(self.model), outputs, rows["concatenated_attention_mask"])
        seen = hidden[:, : hidden.shape[1] - self._left_out].detach()
        chosen, rejected = (mean_logits(side, weight, options) for side in seen.chunk(2))
        return self._score(rows, hidden, weight, options), (chosen, rejected), aux_loss

    def _score(self, rows: dict[str, Tensor], hidden: Tensor, weight: Tensor, options: dict[str, Any]) -> Scored:
        raise NotImplementedError


@torch.no_grad()
def mean_logits(hidden: Tensor, weight: Tensor, options: dict[str, Any]) -> Tensor:
    """Compute the mean of all logits of some positions.

    Without a soft cap it is the logit of the mean hidden state for the mean row of the head. With one it takes a pass
    over the head.

    Args:
        hidden: floating point ``(..., H)``.
        weight: floating point ``(V, H)``.
        options: ``bias``, ``logit_scale`` and ``softcap`` of the head.

    Returns:
        The mean ``()``, float32 or wider.

    Example:
        >>> options = {"bias": None, "logit_scale": 2.0, "softcap": None}
        >>> mean_logits(torch.ones(1, 3, 4), torch.ones(5, 4), options)
        tensor(8.)

    """
    flat, bias = hidden.reshape(-1, hidden.shape[-1]), options["bias"]
    if options["softcap"] is not None:
        targets = torch.zeros(len(flat), dtype=torch.long, device=flat.device)
        softcap, scale = options["softcap"], options["logit_scale"]
        means = token_logps(flat, weight, bias, targets, 1.0, softcap, scale, ("mean_logits",))[3]
        assert means is not None, "asked for"
        return means.mean()
    wide = torch.promote_types(hidden.dtype, torch.float32)
    mean = (flat.mean(dim=0, dtype=wide) * weight.mean(dim=0, dtype=wide)).sum()
    return options["logit_scale"] * (mean if bias is None else mean + bias.mean(dtype=wide))
