"""TRL's KTO trainer on one pass over the LM head. For TRL 1.15 and 1.16.

The reference and the policy's KL sequences are scored first. The policy's loss and gradients are then computed in one
pass. TRL's own step computes every logged value from the results.
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from trl import KTOTrainer
from trl.trainer import kto_trainer as trl_module

from dpo_kernels import SequenceLossOutput, fused_kto_loss, fused_sequence_logps
from dpo_kernels.integrations import lm_head
from dpo_kernels.integrations.fused_step import FusedStep, why_no_fused_head, why_not_split
from dpo_kernels.integrations.model_parts import innermost
from dpo_kernels.integrations.requirements import TRL_KTO, require
from dpo_kernels.integrations.routers import router_loss
from dpo_kernels.integrations.trl.batch import IGNORED
from dpo_kernels.integrations.trl.compatibility import adapter_on_the_head_allowed, told_before_sharding

require("trl", TRL_KTO, "FusedKTOTrainer")

LOSSES = ("kto", "apo_zero_unpaired")
STATS = ("entropy", "mean_logits")  # of which TRL logs means
LOGPS = ("ref_logps", "ref_KL_logps")
# What the collator gives for each sequence, and with the prefix "KL_" for its KL sequence.
OF_SEQUENCES = ("input_ids", "attention_mask", "completion_mask", "token_type_ids", "mm_token_type_ids")


class FusedKTOTrainer(FusedStep, KTOTrainer):
    """``trl.KTOTrainer`` with the fused loss: the same constructor, configuration, logs, checkpoints and evaluation.

    An adapter on ``lm_head`` works, which TRL refuses.

    Args:
        *args, **kwargs: as for ``trl.KTOTrainer``.

    Attributes:
        fallback_reason: why TRL's own step is used, or an empty string.
        check_head: whether the fused head is compared with the model's own logits at the first batch.

    Raises:
        ImportError: TRL is older than 1.15.
        ValueError: there is an adapter on the LM head, and the fused loss cannot be used.

    Example::

        from dpo_kernels.integrations.trl import FusedKTOTrainer as KTOTrainer

        trainer = KTOTrainer(model, args=KTOConfig(...), train_dataset=unpaired, processing_class=tokenizer)
        trainer.train()

    """

    precompute_ref_logps: bool  # set by TRL's constructor

    _logps_in_batch = LOGPS
    _scored: tuple[Any, Tensor | None] | None = None  # outputs and KL log-probs of the policy, while TRL logs them

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        with adapter_on_the_head_allowed(trl_module), told_before_sharding(self._attach, trl_module):
            super().__init__(*args, **kwargs)

    def _why_not(self) -> str:
        reason = self._why_not_fused()
        if reason and lm_head.has_adapter(innermost(self.model).get_output_embeddings()):
            raise ValueError(f"an adapter on the LM head needs the fused loss, but: {reason}")
        return reason

    def _why_not_fused(self) -> str:
        if self.loss_type not in LOSSES:
            return f"loss_type {self.loss_type} is not in this version's family"
        return why_not_split(self.accelerator, ("cp", "sp")) or why_no_fused_head(self)

    def compute_ref_log_probs(self, model: Any, inputs: dict[str, Any]) -> tuple[Tensor, Tensor | None]:
        """Score a batch with the reference, as TRL's method of this name does.

        Args:
            model: the reference model, or the policy where the reference is the policy with another adapter or none.
            inputs: a batch of TRL's collator.

        Returns:
            Log-probs ``(B,)`` of the completions, and ``(B,)`` of the KL sequences or None where the loss has none.

        Raises:
            RuntimeError: the self-check of the head fails.

        Example::

            logps, kl_logps = trainer.compute_ref_log_probs(trainer.ref_model, batch)

        """
        if self.fallback_reason:
            values: tuple[Tensor, Tensor | None] = super().compute_ref_log_probs(model, inputs)
            return values
        adapter: AbstractContextManager[Any] = nullcontext()
        policy = self.accelerator.unwrap_model(self.model)
        if self.ref_model is None and hasattr(policy, "peft_config"):
            adapter = trl_module.use_adapter(policy, "ref" if "ref" in policy.peft_config else None)
        kwargs = self.args.gradient_checkpointing_kwargs
        checkpointing_off = trl_module.disable_gradient_checkpointing(self.model, kwargs)
        with checkpointing_off, adapter, self.accelerator.autocast():
            logps = self._logps(model, inputs)
            return logps, self._logps(model, inputs, "KL_") if self.calculate_KL else None

    def _compute_kl_logps(self, model: Any, batch: dict[str, Any]) -> Tensor | None:
        if self._scored is not None:
            return self._scored[1]
        if self.fallback_reason:
            values: Tensor | None = super()._compute_kl_logps(model, batch)
            return values
        return self._logps(model, batch, "KL_") if self.calculate_KL else None

    def _compute_loss(self, model: Any, inputs: dict[str, Any], return_outputs: bool) -> Any:
        if self.fallback_reason:
            return super()._compute_loss(model, inputs, return_outputs)
        if self.precompute_ref_logps:
            reference, reference_kl = inputs["ref_logps"], inputs.get("ref_KL_logps")
        else:
            reference_model = self.model if self.ref_model is None else self.ref_model
            reference, reference_kl = self.compute_ref_log_probs(reference_model, inputs)
        kl_logps, kl = self._compute_kl_logps(model, inputs), torch.zeros((), device=self.accelerator.device)
        if kl_logps is not None:
            assert reference_kl is not None, "both come with the same loss"
            kl = self.accelerator.gather_for_metrics((kl_logps - reference_kl.to(kl_logps)).mean()).mean()
        policy_inputs = _for_the_model(inputs)
        if self.aux_loss_enabled:
            policy_inputs["output_router_logits"] = True
        out, aux_loss = self._within(model, policy_inputs, partial(self._policy, inputs, reference, kl))
        loss = out.loss
        if aux_loss is not None:
            loss = loss + self.router_aux_loss_coef * aux_loss.to(loss.device)
        with self._known(_outputs(inputs["completion_mask"], out, aux_loss), kl_logps):
            known = dict(zip(LOGPS, (reference, reference_kl), strict=True))
            of_trl = super()._compute_loss(self._outputs_of_policy, {**inputs, **known}, False)
        self._check_formula(loss.detach(), of_trl)
        if not return_outputs:
            return loss
        with torch.no_grad():  # compute_metrics wants logits, which the fused loss never had
            return loss, model(**_for_the_model(inputs))

    def _logps(self, model: Any, batch: dict[str, Any], prefix: str = "") -> Tensor:
        """Score completions ``(B,)``, or with the prefix "KL_" those of the KL sequences, without gradient."""

        def work(outputs: Any, hidden: Tensor, weight: Tensor, options: dict[str, Any]) -> Tensor:
            weight, options = self._rows(weight, options)
            return fused_sequence_logps(hidden, weight, _labels(batch, prefix).to(hidden.device), shift=True, **options)

        self._head(model).attach()
        with torch.no_grad():
            logps: Tensor = self._within(model, _for_the_model(batch, prefix), work)
        return logps.to(batch["input_ids"].device)

    def _policy(
        self,
        batch: dict[str, Any],
        reference: Tensor,
        kl: Tensor,
        outputs: Any,
        hidden: Tensor,
        weight: Tensor,
        options: dict[str, Any],
    ) -> tuple[SequenceLossOutput, Tensor | None]:
        """Compute the fused loss and the router loss. The policy's forward calls this."""
        aux_loss = None
        if self.aux_loss_enabled:
            aux_loss = router_loss(innermost(self.model), outputs, batch["attention_mask"])
        weight, options = self._rows(weight, options)
        out = fused_kto_loss(
            hidden,
            weight,
            _labels(batch).to(hidden.device),
            torch.as_tensor(batch["label"], dtype=torch.bool, device=hidden.device),
            beta=self.beta,
            kl=kl.to(hidden.device),
            desirable_weight=self.desirable_weight,
            undesirable_weight=self.undesirable_weight,
            ref_logps=reference.to(hidden.device),
            shift=True,
            stats=STATS,
            **options,
        )
        return out, aux_loss

    @contextmanager
    def _known(self, outputs: Any, kl_logps: Tensor | None) -> Iterator[None]:
        """Let TRL's step read what is known already, of policy and reference, instead of running the models."""
        precomputed = self.precompute_ref_logps
        self.precompute_ref_logps, self._scored = True, (outputs, kl_logps)
        try:
            yield
        finally:
            self.precompute_ref_logps, self._scored = precomputed, None

    def _outputs_of_policy(self, **inputs: Any) -> Any:
        """Stand for the model while TRL's step computes its log."""
        assert self._scored is not None, "set while TRL's step runs"
        return self._scored[0]


def _labels(batch: dict[str, Any], prefix: str = "") -> Tensor:
    labels: Tensor = batch[f"{prefix}input_ids"].masked_fill(batch[f"{prefix}completion_mask"] == 0, IGNORED)
    return labels


def _for_the_model(batch: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Give the model's inputs for the completions, or with the prefix "KL_" for the KL sequences."""
    own = {name: batch[prefix + name] for name in OF_SEQUENCES if prefix + name in batch and name != "completion_mask"}
    others = {
        name: value
        for name, value in batch.items()
        if name not in (*OF_SEQUENCES, *LOGPS, "label") and not name.startswith("KL_")
    }
    return {**others, **own, "use_cache": False}


def _outputs(mask: Tensor, out: SequenceLossOutput, aux_loss: Tensor | None) -> Any:
    """Give what TRL's log reads of a model's outputs: values of tokens, of which only sums over a sequence matter."""
    mask = mask[:, 1:]
    tokens = out.stats["tokens"].to(mask.device)[:, None].clamp(min=1)

    def spread(means: Tensor) -> Tensor:
        return means.detach().to(mask.device)[:, None] * mask

    return SimpleNamespace(
        log_probs=spread(out.logps) / tokens,
        entropy=spread(out.stats["entropy"]),
        mean_logits=spread(out.stats["mean_logits"]),
        aux_loss=None if aux_loss is None else aux_loss.detach(),
    )
