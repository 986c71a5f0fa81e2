"""TRL's DPO trainer on the fused loss.

The reference is scored first. The policy's loss and gradients are then computed in one pass inside the model's own
``forward``, where DistributedDataParallel and autocast see them. TRL's own loss serves what the fused loss does not
support. This module is written for TRL 0.29 to 1.16.
"""

import inspect
import logging
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from trl import DPOTrainer
from trl.trainer import dpo_trainer as trl_module

from dpo_kernels import fused_dpo_loss, fused_sequence_logps, wpo_pair_weights
from dpo_kernels.integrations import lm_head
from dpo_kernels.integrations.fused_step import settle_router_loss
from dpo_kernels.integrations.head_calls import HeadCalls
from dpo_kernels.integrations.head_check import evaluating
from dpo_kernels.integrations.model_parts import innermost
from dpo_kernels.integrations.routers import router_loss
from dpo_kernels.integrations.trl.batch import COLLATED, REFERENCE, PairBatch, check_packing, pair_batch
from dpo_kernels.integrations.trl.compatibility import (
    adapter_on_the_head_allowed,
    options_or_reason,
    told_before_sharding,
)
from dpo_kernels.integrations.trl.metrics import STATS, record
from dpo_kernels.integrations.trl.options import LossOptions
from dpo_kernels.integrations.trl.reference_check import check_reference
from dpo_kernels.integrations.trl.sparse import Calls, SparseGradients

logger = logging.getLogger(__name__)


class FusedDPOTrainer(HeadCalls, DPOTrainer):
    """``trl.DPOTrainer`` with the fused loss: the same constructor, configuration, logs, checkpoints and evaluation.

    It differs from TRL 1.16 in these points, all of them on purpose:

    - ``padding_free=True`` works.
    - A LoRA adapter on ``lm_head`` works.
    - ``label_smoothing`` applies to the sigmoid loss too, and the log says so.
    - An option that would have no effect is an error.
    - A head that is not what its configuration says is an error at the first batch.

    Args:
        *args, **kwargs: as for ``trl.DPOTrainer``.
        gradient: ``"dense"`` for exact gradients of the LM head and the hidden states, or ``"sparse"`` for unbiased
            estimates of them, see docs/sparse-gradient.md. What is logged is exact, except for ``grad_norm``.
        tau: threshold of the estimates, a number in (0, 1].
        seed: seed of the estimates, an int, or None for ``args.seed``. Each step, micro-batch and rank has a seed of
            its own that follows from it. A resumed run goes on with the same ones.

    Attributes:
        fallback_reason: why TRL's own loss is used, or an empty string.
        check_reference: whether precomputed log-probs are compared with the reference's own at the first training
            batch. That needs a ``ref_model`` or an adapter to switch off. It becomes False after the comparison. Set
            it to False where the log-probs are meant to be another reference's.
        check_head: whether the fused head is compared with the model's own logits at the first batch. A subclass that
            sets it to False leaves that out.

    Raises:
        ValueError: an option would have no effect, or the fused loss cannot be used while ``padding_free=True``,
            ``gradient="sparse"`` or an adapter on the LM head needs it.

    Example::

        from dpo_kernels.integrations.trl import FusedDPOTrainer as DPOTrainer

        trainer = DPOTrainer(model, args=DPOConfig(...), train_dataset=pairs, processing_class=tokenizer)
        trainer.train()

    """

    check_reference = True
    _logps_in_batch = REFERENCE

    # These are set at their first use: TRL's constructor already scores the reference where it precomputes log-probs.
    _loss_options: LossOptions | None = None
    _reason: str | None = None
    _packing_checked = False

    def __init__(
        self, *args: Any, gradient: str = "dense", tau: float = 2.0**-12, seed: int | None = None, **kwargs: Any
    ) -> None:
        self._sparse, self._calls = SparseGradients(gradient, tau, seed), Calls()
        given: Any = inspect.signature(DPOTrainer.__init__).bind_partial(self, *args, **kwargs).arguments.get("args")
        padding_free = bool(getattr(given, "padding_free", False))
        if padding_free:
            given.padding_free = False  # TRL would say that it is unavailable
        with adapter_on_the_head_allowed(trl_module), told_before_sharding(self._attach, trl_module):
            super().__init__(*args, **kwargs)
        if padding_free:
            given.padding_free = self.padding_free = True
            if reason := self.fallback_reason or (self._is_vision_dataset and "images cannot be packed"):
                raise ValueError(f"padding_free=True needs the fused loss, which cannot be used: {reason}")
        if self._sparse.sampled and self.fallback_reason:
            raise ValueError(f"gradient='sparse' needs the fused loss, which cannot be used: {self.fallback_reason}")
        if self._sparse.sampled:
            self.add_callback(self._calls)
        if not self.fallback_reason:
            settle_router_loss(self, innermost(self.model))
            self._attach(self.model)

    @property
    def fallback_reason(self) -> str:
        """Why TRL's own loss is used, or an empty string. The first access writes it to the log."""
        if self._reason is None:
            self._loss_options, self._reason = options_or_reason(self)
            if self._reason and lm_head.has_adapter(innermost(self.model).get_output_embeddings()):
                raise ValueError(f"an adapter on the LM head needs the fused loss, but: {self._reason}")
            message = f"TRL's own loss is used: {self._reason}" if self._reason else ""
            if self._loss_options is not None and not message:
                message = self._loss_options.differences_from_trl
            if message and self.accelerator.is_main_process:
                logger.warning("FusedDPOTrainer: %s", message)
        return self._reason

    not_fused = fallback_reason  # the older name

    # --- the loss ---

    def compute_ref_log_probs(self, model: Any, inputs: dict[str, Any] | None = None) -> tuple[Tensor, Tensor]:
        """Score a batch with the reference, as TRL's method of this name does.

        Args:
            model: the reference model, or the policy where the reference is the policy with another adapter or none.
                Before TRL 1.9 the method takes ``inputs`` alone, in this place.
            inputs: a batch of TRL's collator, ``(2B, T)`` each, all chosen sequences first.

        Returns:
            Log-probs ``(B,)`` of the chosen and ``(B,)`` of the rejected completions, in the dtype of the sums.

        Raises:
            ValueError: the batch is not one of TRL's collator.
            RuntimeError: the self-check of the head fails.

        Example::

            chosen, rejected = trainer.compute_ref_log_probs(trainer.ref_model, batch)

        """
        if self.fallback_reason:
            return super().compute_ref_log_probs(*([model] if inputs is None else [model, inputs]))
        if inputs is None:
            model, inputs = self._reference_model, model
        chosen, rejected = self._reference(self._batch(inputs, model), model).chunk(2)
        return chosen, rejected

    def _precompute_ref_logps(self, dataset: Any, name: str, batch_size: int) -> Any:
        if set(REFERENCE) <= set(dataset.column_names or ()):  # from precompute_reference_logps, say
            if self.ld_alpha is not None:
                raise ValueError(
                    f"the data bring {' and '.join(REFERENCE)}, sums over all tokens alike, but "
                    f"ld_alpha={self.ld_alpha} weighs the policy's tokens: leave the columns out, and log-probs with "
                    "ld_alpha are computed"
                )
            return dataset
        return super()._precompute_ref_logps(dataset, name, batch_size)

    def _compute_loss(self, model: Any, inputs: dict[str, Any], return_outputs: bool) -> Any:
        if self.fallback_reason:
            return super()._compute_loss(model, inputs, return_outputs)
        mode = "train" if self.model.training else "eval"
        batch = self._batch(inputs, model)
        if self.precompute_ref_logps:
            reference = torch.cat([inputs[name] for name in REFERENCE])
            if self.check_reference and mode == "train":
                self.check_reference = not self._check_reference(inputs, reference)
        else:
            reference = self._reference(batch, self._reference_model)
        sampling = self._sampling() if mode == "train" else {}
        work = partial(self._policy, batch, reference, sampling)
        result = self._within(model, self._inputs_of_policy(batch), work)
        out, aux_loss = result["out"], result["aux_loss"]
        loss = out.loss
        if aux_loss is not None:
            loss = loss + self.router_aux_loss_coef * aux_loss.to(loss.device)
        record(self, mode, out, batch, reference, aux_loss)
        if not return_outputs:
            return loss
        with torch.no_grad():  # compute_metrics wants logits, which the fused loss never had
            return loss, model(**pair_batch(inputs, None, False).inputs, use_cache=False)

    def _sampling(self) -> dict[str, Any]:
        """Return the arguments of a call whose gradients may be those of a sample."""
        if not self._sparse.sampled:
            return {}
        accelerator, micro_batches = self.accelerator, self.args.gradient_accumulation_steps
        ranks = (accelerator.process_index, accelerator.num_processes)
        return self._sparse.arguments(self.args.seed, self._calls.next(self.state.global_step, micro_batches, *ranks))

    def _batch(self, inputs: dict[str, Any], model: Any) -> PairBatch:
        padding_free, whole = bool(self.padding_free), inputs
        if hasattr(self, "_truncate_inputs") and set(COLLATED) <= set(inputs):
            # TRL 0.29 cuts to max_length here, later versions when they collate.
            inputs = inputs | dict(zip(COLLATED, self._truncate_inputs(*(inputs[k] for k in COLLATED)), strict=True))
        if padding_free and not self._packing_checked:
            few = {name: inputs[name][:: max(1, len(inputs[name]) - 1)] for name in ("input_ids", "attention_mask")}

            def hidden_states(some: dict[str, Any]) -> Any:
                return self._within(
                    model, {**some, "use_cache": False}, lambda outputs, hidden, weight, options: hidden
                )

            with self.accelerator.autocast():
                check_packing(self._head(model).attach().model, few, hidden_states, self.accelerator.gather)
            self._packing_checked = True
        batch = pair_batch(inputs, self.ld_alpha, padding_free)
        return batch if inputs is whole else replace(batch, tokens=whole["attention_mask"].sum())  # as TRL counts

    def _inputs_of_policy(self, batch: PairBatch) -> dict[str, Any]:
        inputs = {**batch.inputs, "use_cache": False}
        # The models' own forwards read this from the configuration, their backbones do not.
        return inputs | {"output_router_logits": True} if getattr(self, "aux_loss_enabled", False) else inputs

    @property
    def _reference_model(self) -> Any:
        return self.model if self.ref_model is None else self.ref_model  # a compiled model has no truth value

    def _reference(self, batch: PairBatch, model: Any) -> Tensor:
        """Return the reference's log-probs ``(2B,)``. It is a model, or the policy with another adapter or none."""
        self._head(model).attach()

        def work(outputs: Any, hidden: Tensor, weight: Tensor, options: dict[str, Any]) -> Tensor:
            hidden, layout = batch.arguments(hidden)
            labels = batch.labels.to(hidden.device)
            weight, options = self._rows(weight, options)
            return fused_sequence_logps(hidden, weight, labels, **layout, **batch.weights(hidden.device), **options)

        adapter: AbstractContextManager[Any] = nullcontext()
        policy = self.accelerator.unwrap_model(self.model)
        if self.ref_model is None and hasattr(policy, "peft_config"):
            adapter = trl_module.use_adapter(policy, "ref" if "ref" in policy.peft_config else None)
        kwargs = self.args.gradient_checkpointing_kwargs
        checkpointing_off = trl_module.disable_gradient_checkpointing(self.model, kwargs)
        with torch.no_grad(), checkpointing_off, adapter, self.accelerator.autocast():
            logps: Tensor = self._within(model, {**batch.inputs, "use_cache": False}, work)
        return logps.to(batch.labels.device)

    def _check_reference(self, inputs: dict[str, Any], precomputed: Tensor) -> bool:
        """Raise ``ValueError`` where precomputed log-probs ``(2B,)`` are clearly not those of a reference at hand.

        Return False where nothing is scored: any reference would agree, so that a later batch must be compared.
        """
        model = self._reference_model
        plain = self.accelerator.unwrap_model(model)
        if self.ref_model is None and not hasattr(plain, "peft_config"):
            return True

        def score(few: dict[str, Any]) -> Tensor:
            with evaluating(plain):
                return self._reference(self._batch(few, model), model)

        return check_reference(inputs, precomputed, score, self.accelerator.gather)

    def _policy(
        self,
        batch: PairBatch,
        reference: Tensor,
        sampling: dict[str, Any],
        outputs: Any,
        hidden: Tensor,
        weight: Tensor,
        options: dict[str, Any],
    ) -> dict[str, Any]:
        """Compute the fused loss and the router loss. The policy's forward calls this."""
        assert self._loss_options is not None, "set when it was decided to come here"
        aux_loss = None
        if getattr(self, "aux_loss_enabled", False):
            aux_loss = router_loss(innermost(self.model), outputs, batch.inputs.get("attention_mask"))
        hidden, layout = batch.arguments(hidden)
        labels = batch.labels.to(hidden.device)
        weight, options = self._rows(weight, options)
        call = partial(fused_dpo_loss, hidden, weight, labels, **layout, **options)
        arguments = dict(self._loss_options.arguments)
        if self.use_weighting:
            # TRL does not bound these weights. They cost one more pass over the head, without gradients.
            with torch.no_grad():
                arguments["pair_weights"] = wpo_pair_weights(call(reference_free=True, stats=("log_sum_p2",)))
        if self._loss_options.needs_reference:
            arguments["ref_logps"] = reference.to(hidden.device)
        out = call(**arguments, **sampling, **batch.weights(hidden.device), stats=STATS)
        return {"out": out, "aux_loss": aux_loss}
