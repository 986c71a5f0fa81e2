"""LLaMA-Factory's KTO trainer on one pass over the LM head. For version 0.9.5."""

from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
from llamafactory.train.kto.trainer import CustomKTOTrainer
from torch import Tensor

from dpo_kernels import SequenceLossOutput, fused_kto_loss, fused_sequence_logps
from dpo_kernels.integrations.fused_step import FusedStep, why_no_fused_head, why_not_split
from dpo_kernels.integrations.head_calls import attach_heads

KL = "kl_"  # the prefix of the KL sequences' entries in a batch
# What the model gets of a batch: with the prefix for the KL sequences, and the same for both.
OF_SEQUENCES = ("input_ids", "attention_mask", "token_type_ids", "cross_attention_mask")
OF_IMAGES = ("pixel_values", "image_sizes", "image_grid_thw", "aspect_ratio_ids", "aspect_ratio_mask")
LEAST = 1e-6  # the weight of the SFT term below which LLaMA-Factory leaves it out

Forward = tuple[Tensor, Tensor, Tensor]  # what ``forward`` gives: logits, log-probs, averages over tokens
Reference = tuple[Tensor, Tensor, Tensor]  # log-probs: chosen, rejected, KL sequences


class FusedCustomKTOTrainer(FusedStep, CustomKTOTrainer):
    """``CustomKTOTrainer`` without full logits: the same arguments and logs, but for ``logits/*``.

    ``logits/chosen`` and ``logits/rejected`` are means over sequences of the mean logit of their scored tokens.
    LLaMA-Factory's are sums over all positions and the whole vocabulary, divided by the number of sequences.

    Args:
        model: the policy.
        ref_model: the reference, or None.
        *args, **kwargs: as for ``CustomKTOTrainer``.

    Attributes:
        fallback_reason: why LLaMA-Factory's own step is used, or an empty string.
        check_head: whether the fused head is compared with the model's own logits at the first batch.

    Example::

        with patch_llamafactory():
            run_kto(model_args, data_args, training_args, finetuning_args)

    """

    _stack = "LLaMA-Factory"
    _known: tuple[dict[str, Forward], Reference] | None = None  # what the own step reads, while it computes the log

    def __init__(self, model: Any, ref_model: Any, *args: Any, **kwargs: Any) -> None:
        attach_heads(self.check_head, model, ref_model)
        super().__init__(model, ref_model, *args, **kwargs)

    def _why_not(self) -> str:
        if self.is_encoder_decoder:
            return "the model is an encoder-decoder"
        if self.ftx_gamma > LEAST:
            return "pref_ftx adds a term that the fused loss has not"
        return why_not_split(self.accelerator, ("cp", "sp", "tp")) or why_no_fused_head(self)

    def forward(self, model: Any, batch: dict[str, Tensor], prefix: Any = "") -> Forward:
        """Give what the method of this name gives: with full logits, unless a fused step is being logged.

        Args:
            model: the model, or a wrapper of it.
            batch: a batch of LLaMA-Factory's collator.
            prefix: "", or "kl_" for the KL sequences.

        Returns:
            Logits, log-probs ``(S,)`` and averages ``(S,)``. In a fused step means ``(S,)`` stand for the logits.

        Example::

            _, logps, _ = trainer.forward(trainer.model, batch)

        """
        if self._known is not None:
            return self._known[0][prefix]
        stock: Any = super()
        values: Forward = stock.forward(model, batch, prefix)
        return values

    def compute_reference_log_probs(self, model: Any, batch: dict[str, Tensor]) -> Reference:
        """Score a batch with the reference.

        Args:
            model: the policy, which is the reference too where it has an adapter and there is no other.
            batch: a batch of LLaMA-Factory's collator.

        Returns:
            Log-probs of the chosen, of the rejected and of the KL sequences.

        Raises:
            RuntimeError: the self-check of the head fails.

        Example::

            chosen, rejected, kl = trainer.compute_reference_log_probs(trainer.model, batch)

        """
        if self._known is not None:
            return self._known[1]
        stock: Any = super()
        if self.fallback_reason:
            values: Reference = stock.compute_reference_log_probs(model, batch)
            return values
        adapter: AbstractContextManager[Any] = nullcontext()
        if self.ref_model is None:
            adapter = self.accelerator.unwrap_model(model).disable_adapter()
        reference_model = model if self.ref_model is None else self.ref_model
        with adapter:
            logps, kl_logps = (self._logps(reference_model, batch, prefix) for prefix in ("", KL))
        desirable = batch["kto_tags"]
        return logps[desirable], logps[~desirable], kl_logps

    def get_batch_loss_metrics(self, model: Any, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, Any]]:
        """Compute the loss of a batch and what LLaMA-Factory logs of it.

        Args:
            model: the model, or a wrapper of it.
            batch: a batch of LLaMA-Factory's collator.

        Returns:
            The loss ``()``, and the values by name.

        Raises:
            RuntimeError: the self-check of the head fails, or LLaMA-Factory's own loss is another one.

        Example::

            loss, metrics = trainer.get_batch_loss_metrics(trainer.model, batch)

        """
        stock: Any = super()
        if self.fallback_reason:
            values: tuple[Tensor, dict[str, Any]] = stock.get_batch_loss_metrics(model, batch)
            return values
        chosen, rejected, ref_kl = reference = self.compute_reference_log_probs(model, batch)
        kl_logps, desirable = self._logps(model, batch, KL), batch["kto_tags"]
        kl = self.accelerator.gather_for_metrics((kl_logps - ref_kl).mean()).mean()
        ref_logps = chosen.new_empty(len(desirable))
        ref_logps[desirable], ref_logps[~desirable] = chosen, rejected
        out = self._within(model, _for_the_model(batch), partial(self._step, batch, ref_logps, kl))
        averages = out.logps / out.stats["tokens"].to(out.logps).clamp(min=1)
        policy = (out.stats["mean_logits"], out.logps.detach(), averages.detach())
        self._known = ({"": policy, KL: (kl_logps, kl_logps, kl_logps)}, reference)
        try:
            theirs, metrics = stock.get_batch_loss_metrics(model, batch)
        finally:
            self._known = None
        self._check_formula(out.loss.detach(), theirs)
        return out.loss, metrics

    def _logps(self, model: Any, batch: dict[str, Tensor], prefix: str) -> Tensor:
        """Score completions ``(S,)``, or the KL sequences, without gradient."""

        def work(outputs: Any, hidden: Tensor, weight: Tensor, options: dict[str, Any]) -> Tensor:
            labels = batch[f"{prefix}labels"].to(hidden.device)
            return fused_sequence_logps(hidden, weight, labels, shift=True, **options)

        with torch.no_grad():
            logps: Tensor = self._within(model, _for_the_model(batch, prefix), work)
        return logps

    def _step(
        self,
        batch: dict[str, Tensor],
        ref_logps: Tensor,
        kl: Tensor,
        outputs: Any,
        hidden: Tensor,
        weight: Tensor,
        options: dict[str, Any],
    ) -> SequenceLossOutput:
        """Compute the fused loss. The policy's forward calls this."""
        return fused_kto_loss(
            hidden,
            weight,
            batch["labels"].to(hidden.device),
            batch["kto_tags"].to(hidden.device),
            beta=self.beta,
            kl=kl.to(hidden.device),
            desirable_weight=self.desirable_weight,
            undesirable_weight=self.undesirable_weight,
            ref_logps=ref_logps.to(hidden.device),
            shift=True,
            stats=("mean_logits",),
            **options,
        )


def _for_the_model(batch: dict[str, Tensor], prefix: str = "") -> dict[str, Any]:
    own = {name: batch[prefix + name] for name in OF_SEQUENCES if prefix + name in batch}
    return {**own, **{name: batch[name] for name in OF_IMAGES if name in batch}, "use_cache": False}
