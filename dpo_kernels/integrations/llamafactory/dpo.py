"""LLaMA-Factory's DPO trainer, which also does ORPO and SimPO, on one pass over the LM head. For version 0.9.5."""

import inspect
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
from llamafactory.train.dpo.trainer import CustomDPOTrainer
from torch import Tensor

from dpo_kernels import DPOLossOutput, LossInputs, fused_dpo_loss, fused_sequence_logps, ld_token_weights
from dpo_kernels.integrations.fused_step import FusedStep, separable, why_no_fused_head, why_not_split
from dpo_kernels.integrations.head_calls import attach_heads

KNOWN = ("sigmoid", "hinge", "ipo", "orpo", "simpo")
AVERAGED = ("ipo", "orpo", "simpo")  # the losses that LLaMA-Factory gives averages over tokens
LEAST = 1e-6  # the weight of a term of the loss below which LLaMA-Factory leaves it out

Logps = tuple[Tensor | None, Tensor | None]


class FusedCustomDPOTrainer(FusedStep, CustomDPOTrainer):
    """``CustomDPOTrainer`` without full logits: the same arguments and logs, but for ``logits/*``.

    ``logits/chosen`` and ``logits/rejected`` are means over the scored tokens, where LLaMA-Factory's are over prompt
    and padding too. A completion without a token has the average 0, where LLaMA-Factory's is NaN.

    Args:
        model: the policy.
        ref_model: the reference, or None.
        *args, **kwargs: as for ``CustomDPOTrainer``.

    Attributes:
        fallback_reason: why LLaMA-Factory's own step is used, or an empty string.
        check_head: whether the fused head is compared with the model's own logits at the first batch.
        loss_as_asked: whether ``pref_loss`` is the loss that is computed. TRL 0.24 computes "sigmoid" for
            LLaMA-Factory 0.9.5 whatever is asked. False leaves that as it is.

    Raises:
        ValueError: ``pref_loss`` is "kto_pair", which TRL 0.24 does not have.

    Example::

        with patch_llamafactory():
            run_dpo(model_args, data_args, training_args, finetuning_args)

    """

    loss_as_asked = True

    _stack = "LLaMA-Factory"
    _known: tuple[dict[str, Tensor], Logps] | None = None  # what the own step reads, while it computes the log

    def __init__(self, model: Any, ref_model: Any, *args: Any, **kwargs: Any) -> None:
        attach_heads(self.check_head, model, ref_model)
        super().__init__(model, ref_model, *args, **kwargs)
        if self.loss_as_asked and self.loss_type not in KNOWN:
            raise ValueError(
                f"pref_loss={self.loss_type!r} is no loss of TRL, and LLaMA-Factory computes 'sigmoid' in its place "
                f"without a word: take one of {', '.join(KNOWN)}, or stage: kto for the KTO loss"
            )

    def _why_not(self) -> str:
        if self.is_encoder_decoder:
            return "the model is an encoder-decoder"
        if self.bco_gemma >= LEAST:
            return "pref_bco_weight needs a running mean of all rewards before the loss"
        return why_not_split(self.accelerator, ("cp", "sp", "tp")) or why_no_fused_head(self)

    def get_batch_loss_metrics(
        self, model: Any, batch: dict[str, Tensor], train_eval: Any = "train"
    ) -> tuple[Tensor, dict[str, Any]]:
        """Compute the loss of a batch and what LLaMA-Factory logs of it.

        Args:
            model: the model, or a wrapper of it.
            batch: a batch of LLaMA-Factory's collator, ``(2B, T)`` each, all chosen sequences first.
            train_eval: "train" or "eval".

        Returns:
            The loss ``()``, and the values by name.

        Raises:
            RuntimeError: the self-check of the head fails, or LLaMA-Factory's own loss is another one.

        Example::

            loss, metrics = trainer.get_batch_loss_metrics(trainer.model, batch)

        """
        stock: Any = super()
        if self.fallback_reason:
            values: tuple[Tensor, dict[str, Any]] = stock.get_batch_loss_metrics(model, batch, train_eval)
            return values
        reference = self.compute_reference_log_probs(model, batch)
        out = self._within(model, _for_the_model(batch), partial(self._step, batch["labels"], reference))
        self._known = (self._outputs(out), reference)
        try:
            theirs, metrics = stock.get_batch_loss_metrics(model, batch, train_eval)
        finally:
            self._known = None
        self._check_formula(out.loss.detach(), theirs)
        return out.loss, metrics

    def compute_reference_log_probs(self, model: Any, batch: dict[str, Tensor]) -> Logps:
        """Score a batch with the reference.

        Args:
            model: the policy, which is the reference too where it has an adapter and there is no other.
            batch: a batch of LLaMA-Factory's collator.

        Returns:
            Log-probs ``(B,)`` of the chosen and of the rejected completions, averages where the loss takes averages.
            Both are None where the loss has no reference.

        Raises:
            RuntimeError: the self-check of the head fails.

        Example::

            chosen, rejected = trainer.compute_reference_log_probs(trainer.model, batch)

        """
        if self._known is not None:
            return self._known[1]
        stock: Any = super()
        if self.fallback_reason or not self.finetuning_args.use_ref_model:
            logps: Logps = stock.compute_reference_log_probs(model, batch)
            return logps
        labels = batch["labels"]

        def work(outputs: Any, hidden: Tensor, weight: Tensor, options: dict[str, Any]) -> Tensor:
            return fused_sequence_logps(hidden, weight, labels.to(hidden.device), shift=True, **options)

        adapter: AbstractContextManager[Any] = nullcontext()
        if self.ref_model is None:
            adapter = self.accelerator.unwrap_model(model).disable_adapter()
        with torch.no_grad(), adapter:
            found = self._within(model if self.ref_model is None else self.ref_model, _for_the_model(batch), work)
        chosen, rejected = self._taken(found, (labels[:, 1:] != -100).sum(dim=1).to(found)).chunk(2)
        return chosen, rejected

    def concatenated_forward(
        self, model: Any, batch: dict[str, Tensor], is_ref_model: bool = False
    ) -> dict[str, Tensor]:
        """Give what the method of this name gives: with full logits, unless a fused step is being logged.

        Args:
            model: the model, or a wrapper of it.
            batch: a batch of LLaMA-Factory's collator.
            is_ref_model: whether the model is the reference.

        Returns:
            Log-probs ``(B,)`` and logits of both sides by name. In a fused step means stand for the logits.

        Example::

            logps = trainer.concatenated_forward(trainer.model, batch)["chosen_logps"]

        """
        if self._known is not None:
            return self._known[0]
        stock: Any = super()
        values: dict[str, Tensor] = stock.concatenated_forward(model, batch, is_ref_model)
        return values

    def dpo_loss(self, *args: Any, **kwargs: Any) -> Any:
        """Compute TRL's losses of pairs, of the kind that ``pref_loss`` asks for.

        Args:
            *args, **kwargs: as for ``trl.DPOTrainer.dpo_loss``.

        Returns:
            Losses and rewards ``(B,)``, as TRL gives them.

        Example::

            losses, *_ = trainer.dpo_loss(chosen, rejected, ref_chosen, ref_rejected)

        """
        stock: Any = super()
        if self.loss_as_asked and "loss_type" in inspect.signature(stock.dpo_loss).parameters:
            kwargs.setdefault("loss_type", self.loss_type)
        return stock.dpo_loss(*args, **kwargs)

    def _taken(self, logps: Tensor, counts: Tensor) -> Tensor:
        return logps / counts.clamp(min=1) if self.loss_type in AVERAGED else logps

    def _step(
        self, labels: Tensor, reference: Logps, outputs: Any, hidden: Tensor, weight: Tensor, options: dict[str, Any]
    ) -> DPOLossOutput:
        """Compute the fused loss. The policy's forward calls this."""
        labels = labels.to(hidden.device)
        known = [logps.to(hidden.device) for logps in reference if logps is not None]
        if known:
            options |= {"ref_logps": torch.cat(known)}
        if self.ld_alpha is not None:
            options |= {"token_weights": ld_token_weights(labels, self.ld_alpha, shift=True)}

        @separable
        def loss(x: LossInputs) -> Tensor:
            chosen = self._taken(x.policy_chosen_logps, x.chosen_tokens)
            rejected = self._taken(x.policy_rejected_logps, x.rejected_tokens)
            both = (x.ref_chosen_logps, x.ref_rejected_logps) if known else (None, None)
            losses: Tensor = self.compute_preference_loss(chosen, rejected, *both)[0]
            if self.ftx_gamma > LEAST:
                losses = losses - self.ftx_gamma * x.policy_chosen_logps / x.chosen_tokens.clamp(min=1)
            return losses

        return fused_dpo_loss(
            hidden,
            weight,
            labels,
            shift=True,
            loss_type=loss,
            reference_free=not known,
            stats=("mean_logits",),
            **options,
        )

    def _outputs(self, out: DPOLossOutput) -> dict[str, Tensor]:
        """Give what ``concatenated_forward`` would, with means over scored tokens for the logits."""
        tokens = out.stats["tokens"].view(2, -1)
        logits = (out.stats["mean_logits"].view(2, -1) * tokens).sum(dim=1) / tokens.sum(dim=1).clamp(min=1)
        counts = tokens.to(out.chosen_logps)
        return {
            "chosen_logps": self._taken(out.chosen_logps, counts[0]).detach(),
            "rejected_logps": self._taken(out.rejected_logps, counts[1]).detach(),
            "chosen_logits": logits[0],
            "rejected_logits": logits[1],
            "chosen_logps_avg": (out.chosen_logps / counts[0].clamp(min=1)).detach(),
        }


def _for_the_model(batch: dict[str, Tensor]) -> dict[str, Any]:
    return {**{name: value for name, value in batch.items() if name != "labels"}, "use_cache": False}
