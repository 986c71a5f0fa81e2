"""TRL's DPO trainer on the fused loss: one line changed.

    from dpo_kernels.integrations.trl import FusedDPOTrainer as DPOTrainer

The reference is scored first, then the policy's loss and gradients are formed in one pass inside the model's own
``forward``, where DistributedDataParallel and autocast see it. What is not supported goes to TRL's own loss with one
line in the log. Written for TRL 0.29 to 1.16.
"""

import inspect
import logging
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor
from trl import DPOTrainer
from trl.trainer import dpo_trainer as trl_module

from dpo_kernels import fused_dpo_loss, fused_sequence_logps, wpo_pair_weights
from dpo_kernels.integrations import lm_head, trl_loss, trl_metrics
from dpo_kernels.integrations.head_check import evaluating
from dpo_kernels.integrations.routers import router_loss, why_no_router_loss
from dpo_kernels.integrations.transformers import CALL, FusedLMHead, fused_lm_head, innermost
from dpo_kernels.integrations.trl_batch import REFERENCE, PairBatch, check_packing, pair_batch
from dpo_kernels.integrations.trl_patch import patch_trl, unpatch_trl

__all__ = ["FusedDPOTrainer", "patch_trl", "unpatch_trl"]

logger = logging.getLogger(__name__)

# Precomputed log-probs of so many pairs are compared with the reference's own. In 16 bits each token's differs by some
# 0.1 with padding and attention kernel, which over a long completion is less than a hundredth of the sum.
CHECKED_PAIRS = 2
REFERENCE_NATS, REFERENCE_SHARE = 1.0, 0.01


class FusedDPOTrainer(DPOTrainer):
    """``trl.DPOTrainer`` with the fused loss: the same constructor, configuration, logs, checkpoints and evaluation.

    Differences from TRL 1.16, all deliberate: ``padding_free=True`` works; a LoRA adapter on ``lm_head`` works;
    ``label_smoothing`` is honoured by the sigmoid loss (said in the log); an option that would have no effect is an
    error; a head that is not what its configuration says is an error at the first batch.

    Attributes:
        not_fused: why TRL's own loss is used, or an empty string.
        check_reference: compare precomputed log-probs with the reference's own at the first training batch, where a
            ``ref_model`` or an adapter to switch off makes that possible. False afterwards; set it to False where the
            log-probs are meant to be another reference's.
        check_head: compare the fused head with the model's own logits at the first batch. A subclass that sets it to
            False leaves that out.

    """

    check_reference = True
    check_head = True

    # Set at their first use: TRL's constructor already scores the reference when it precomputes log-probs.
    _loss_options: trl_loss.LossOptions | None = None
    _reason: str | None = None
    _packing_checked = False
    _work: Callable[..., Any] | None = None

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        if not hasattr(DPOTrainer, "_compute_loss"):
            raise ImportError("FusedDPOTrainer needs trl >= 0.29: this one's DPOTrainer has no _compute_loss")
        given: Any = inspect.signature(DPOTrainer.__init__).bind_partial(self, *args, **kwargs).arguments.get("args")
        padding_free = bool(getattr(given, "padding_free", False))
        if padding_free:
            given.padding_free = False  # TRL would say that it is unavailable
        with _adapter_on_the_head_allowed():
            super().__init__(*args, **kwargs)
        if padding_free:
            given.padding_free = self.padding_free = True
            if self.fallback_reason:
                raise ValueError(f"padding_free=True needs the fused loss, which cannot be used: {self.not_fused}")
        if not self.fallback_reason:
            self._settle_router_loss()
            self._head(self.model).attach()

    @property
    def fallback_reason(self) -> str:
        """Why TRL's own loss is used, or an empty string. Says so in the log the first time."""
        if self._reason is None:
            self._reason = self._why_not_fused()
            if self._reason and lm_head.has_adapter(innermost(self.model).get_output_embeddings()):
                raise ValueError(f"an adapter on the LM head needs the fused loss, but: {self._reason}")
            said = f"TRL's own loss is used: {self._reason}" if self._reason else ""
            if self._loss_options is not None and not said:
                said = self._loss_options.differences_from_trl
            if said and self.accelerator.is_main_process:
                logger.warning("FusedDPOTrainer: %s", said)
        return self._reason

    def _why_not_fused(self) -> str:
        try:
            self._loss_options = trl_loss.loss_options(self)
        except trl_loss.NotFused as error:
            return str(error)
        if reason := _why_not_this_setup(self):
            return reason
        try:
            for model in (self.model, self.ref_model):
                if model is not None:
                    fused_lm_head(self.accelerator.unwrap_model(model), check=self.check_head)
        except (TypeError, ValueError) as error:
            return str(error)
        return ""

    def _settle_router_loss(self) -> None:
        """No router loss, and one line in the log, where the model's configuration has a coefficient but it no loss."""
        if not getattr(self, "aux_loss_enabled", False) or not (reason := why_no_router_loss(innermost(self.model))):
            return
        if coefficient := getattr(self.args, "router_aux_loss_coef", None):
            raise ValueError(
                f"router_aux_loss_coef={coefficient} weighs a router loss that is not to be had: {reason}; leave it out"
            )
        self.aux_loss_enabled = False
        if self.accelerator.is_main_process:
            logger.warning("FusedDPOTrainer: there is no router loss: %s", reason)

    def _head(self, model: Any) -> FusedLMHead:
        """The head attached to a model; attaches one where there is none."""
        model = self.accelerator.unwrap_model(model)
        attached = getattr(innermost(model).forward, CALL, None)
        return attached.of(innermost(model)) if attached is not None else fused_lm_head(model, check=self.check_head)

    # --- the loss ---

    def compute_ref_log_probs(self, model: Any, inputs: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """Reference log-probs of a padded batch, ``(B,)`` for each side."""
        if self.fallback_reason:
            return super().compute_ref_log_probs(model, inputs)
        batch = self._batch(inputs)
        chosen, rejected = self._reference(batch, model).chunk(2)
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
        batch = self._batch(inputs)
        if self.precompute_ref_logps:
            reference = torch.cat([inputs[name] for name in REFERENCE])
            if self.check_reference and mode == "train":
                self.check_reference = not self._check_reference(inputs, reference)
        else:
            reference = self._reference(batch, self.ref_model or self.model)
        result = self._within(model, self._inputs_of_policy(batch), partial(self._policy, batch, reference))
        out, aux_loss = result["out"], result["aux_loss"]
        loss = out.loss
        if aux_loss is not None:
            loss = loss + self.router_aux_loss_coef * aux_loss.to(loss.device)
        trl_metrics.record(self, mode, out, batch, reference, aux_loss)
        if not return_outputs:
            return loss
        with torch.no_grad():  # for compute_metrics, which wants the logits that the fused loss never had
            return loss, model(**{name: inputs[name] for name in ("input_ids", "attention_mask")}, use_cache=False)

    def _batch(self, inputs: dict[str, Any]) -> PairBatch:
        padding_free = bool(self.padding_free)
        if padding_free and not self._packing_checked:
            self._check_packing(inputs)
            self._packing_checked = True
        return pair_batch(inputs, self.ld_alpha, padding_free)

    def _inputs_of_policy(self, batch: PairBatch) -> dict[str, Any]:
        inputs = {**batch.inputs, "use_cache": False}
        # The models' own forwards read this from the configuration, their backbones do not.
        return inputs | {"output_router_logits": True} if getattr(self, "aux_loss_enabled", False) else inputs

    def _reference(self, batch: PairBatch, model: Any) -> Tensor:
        """Log-probs of the reference ``(2B,)``: its own model, or the policy's with another adapter or none."""
        self._head(model).attach()

        def work(outputs: Any, hidden: Tensor, weight: Tensor, options: dict[str, Any]) -> Tensor:
            hidden, layout = batch.arguments(hidden)
            labels = batch.labels.to(hidden.device)
            return fused_sequence_logps(hidden, weight, labels, **layout, **batch.weights(hidden.device), **options)

        adapter: AbstractContextManager[Any] = nullcontext()
        policy = self.accelerator.unwrap_model(self.model)
        if self.ref_model is None and hasattr(policy, "peft_config"):
            adapter = trl_module.use_adapter(policy, "ref" if "ref" in policy.peft_config else None)
        with torch.no_grad(), self._not_checkpointing(), adapter, self.accelerator.autocast():
            logps: Tensor = self._within(model, {**batch.inputs, "use_cache": False}, work)
        return logps.to(batch.labels.device)

    def _within(self, model: Any, inputs: dict[str, Any], work: Callable[..., Any]) -> Any:
        """What ``work(outputs, hidden, weight, options)`` returns, done inside the model's forward."""
        self._work = work
        try:
            return model(**inputs, **{CALL: self._do_work})
        finally:
            self._work = None

    @torch.compiler.disable  # in a compiled model too; and one function for every batch, or each would compile anew
    def _do_work(self, *given: Any) -> Any:
        assert self._work is not None, "set around the call of the model"
        return self._work(*given)

    def _check_reference(self, inputs: dict[str, Any], precomputed: Tensor) -> bool:
        """Raise ``ValueError`` where precomputed log-probs ``(2B,)`` are clearly not those of a reference at hand.

        False where nothing is scored, so that any reference gives the same.
        """
        model = self.ref_model or self.model
        plain = self.accelerator.unwrap_model(model)
        if self.is_deepspeed_enabled or (self.ref_model is None and not hasattr(plain, "peft_config")):
            return True
        sides = inputs["completion_mask"][:, 1:].any(dim=1).view(2, -1)
        scored = sides.any(dim=0).nonzero()[:CHECKED_PAIRS, 0].tolist()
        if not scored:
            return False
        few = [*scored, *(pair + len(precomputed) // 2 for pair in scored)]
        batch = self._batch({name: value[few] for name, value in inputs.items() if name not in REFERENCE})
        with evaluating(plain):
            expected = self._reference(batch, model)
        given = precomputed[few].to(expected)
        excess = (given - expected).abs() - REFERENCE_SHARE * expected.abs() - REFERENCE_NATS
        if bool((excess <= 0).all()):
            return True
        worst = int(excess.argmax())
        side = REFERENCE[worst // (len(few) // 2)]
        raise ValueError(
            f"{side} is {given[worst]:.2f} for one of the first pairs, but the reference gives {expected[worst]:.2f} "
            "(other weights, token ids or max_length): leave the columns out to have them computed, or set "
            "trainer.check_reference = False if another reference is meant"
        )

    def _policy(
        self, batch: PairBatch, reference: Tensor, outputs: Any, hidden: Tensor, weight: Tensor, options: dict[str, Any]
    ) -> dict[str, Any]:
        """The fused loss, from within the policy's forward."""
        assert self._loss_options is not None, "set when it was decided to come here"
        aux_loss = None
        if getattr(self, "aux_loss_enabled", False):
            aux_loss = router_loss(innermost(self.model), outputs, batch.inputs.get("attention_mask"))
        hidden, layout = batch.arguments(hidden)
        labels = batch.labels.to(hidden.device)
        call = partial(fused_dpo_loss, hidden, weight, labels, **layout, **options)
        arguments = dict(self._loss_options.arguments)
        if self.use_weighting:
            arguments["pair_weights"] = _wpo_weights(call)
        if self._loss_options.needs_reference:
            arguments["ref_logps"] = reference.to(hidden.device)
        out = call(**arguments, **batch.weights(hidden.device), stats=trl_metrics.STATS)
        return {"out": out, "aux_loss": aux_loss}

    # --- its surroundings ---

    def _prepare_inputs(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """As transformers does, but log-probs are not the model's inputs, which DeepSpeed has cast to 16 bits."""
        prepared: dict[str, Any] = super()._prepare_inputs(inputs)
        prepared |= {name: inputs[name].to(self.args.device) for name in REFERENCE if name in inputs}
        return prepared

    def _not_checkpointing(self) -> AbstractContextManager[Any]:
        kwargs = self.args.gradient_checkpointing_kwargs
        return trl_module.disable_gradient_checkpointing(self.model, kwargs)

    def _check_packing(self, inputs: dict[str, Any]) -> None:
        few = {name: inputs[name][:: max(1, len(inputs[name]) - 1)] for name in ("input_ids", "attention_mask")}
        with self.accelerator.autocast():
            check_packing(self._head(self.model), few)


def _wpo_weights(call: Any) -> Tensor:
    """Weights of pairs as TRL takes them, not bounded: one more pass over the head, no gradient."""
    with torch.no_grad():
        return wpo_pair_weights(call(reference_free=True, stats=("log_sum_p2",)))


def _why_not_this_setup(trainer: Any) -> str:
    """What of model, data and machine the fused loss does not cover."""
    if trainer._is_vision_dataset:
        return "the data set has images"
    if getattr(trainer, "use_liger_kernel", False):
        return "use_liger_kernel=True chooses Liger's loss in this version of TRL"
    if getattr(trainer, "is_fsdp_enabled", False):
        return "FSDP shards the LM head"
    plugin = getattr(trainer.accelerator.state, "deepspeed_plugin", None)
    if plugin is not None and plugin.zero_stage == 3:
        return "DeepSpeed ZeRO-3 shards the LM head"
    parallel = getattr(trainer.accelerator, "parallelism_config", None)
    if any((getattr(parallel, f"{kind}_size", 1) or 1) > 1 for kind in ("tp", "cp", "sp")):
        return "tensor, context and sequence parallelism shard the batch or the LM head"
    if trainer.args.torch_compile:
        return "torch_compile=True compiles the model's forward, in which the fused loss runs"
    return ""


@contextmanager
def _adapter_on_the_head_allowed() -> Iterator[None]:
    """TRL refuses an adapter on the LM head, since it reads the head's bare weight; the fused loss does not."""
    known = getattr(trl_module, "BaseTunerLayer", None)
    if known is None:
        yield
        return
    trl_module.BaseTunerLayer = _NoLayer
    try:
        yield
    finally:
        trl_module.BaseTunerLayer = known


class _NoLayer:
    """Nothing is an instance of it."""
