"""Which of TRL's setups the fused loss covers, and what TRL's constructor must do for it."""

import functools
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from dpo_kernels.integrations.routers import why_no_router_loss
from dpo_kernels.integrations.transformers import fused_lm_head
from dpo_kernels.integrations.trl.options import LossOptions, NotFused, loss_options

logger = logging.getLogger(__name__)

# The functions by which TRL's constructor gives a model to an engine that may shard it.
SHARDING = ("prepare_deepspeed", "prepare_fsdp")
PARALLELISMS = {"cp": "context", "sp": "sequence", "tp": "tensor"}


def why_not_this_setup(trainer: Any) -> str:
    """Say which part of model, data or machine the fused loss does not cover.

    Args:
        trainer: a ``DPOTrainer`` whose constructor has run.

    Returns:
        The reason in words, or an empty string where the fused loss can be used.

    Example:
        >>> from types import SimpleNamespace
        >>> why_not_this_setup(SimpleNamespace(_is_vision_dataset=True))
        'the data set has images'

    """
    if trainer._is_vision_dataset:
        return "the data set has images"
    if getattr(trainer, "use_liger_kernel", False):
        return "use_liger_kernel=True chooses Liger's loss in this version of TRL"
    if why_not_split(trainer.accelerator, ("cp", "sp")):
        return "context and sequence parallelism split the sequences, and TRL's DPOTrainer does not support them"
    return ""


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


def options_or_reason(trainer: Any, check_head: bool) -> tuple[LossOptions | None, str]:
    """Give the options of the fused loss, or say why it cannot be used.

    Args:
        trainer: a ``DPOTrainer`` whose models no engine has sharded yet.
        check_head: as ``check`` of ``fused_lm_head``.

    Returns:
        The options and an empty string, or a reason in words.

    Example::

        options, reason = options_or_reason(trainer, check_head=True)

    """
    try:
        options = loss_options(trainer)
    except NotFused as error:
        return None, str(error)
    if reason := why_not_this_setup(trainer):
        return options, reason
    return options, why_no_fused_head(trainer, check_head)


def why_no_fused_head(trainer: Any, check_head: bool) -> str:
    """Say why the head of a trainer's model, or of its reference, cannot be fused.

    Args:
        trainer: a trainer of TRL's with ``model``, and with ``ref_model`` where it has one.
        check_head: as ``check`` of ``fused_lm_head``.

    Returns:
        The reason in words, or an empty string.

    Example::

        reason = why_no_fused_head(trainer, check_head=True)

    """
    try:
        for model in (trainer.model, getattr(trainer, "ref_model", None)):
            if model is not None:
                fused_lm_head(trainer.accelerator.unwrap_model(model), check=check_head)
    except (TypeError, ValueError) as error:
        return str(error)
    return ""


def settle_router_loss(trainer: Any, model: Any) -> None:
    """Switch the router loss off, with a line in the log, where a model has a coefficient for it but no loss.

    Args:
        trainer: a ``DPOTrainer`` whose constructor has run. Its ``aux_loss_enabled`` may be changed.
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


@contextmanager
def adapter_on_the_head_allowed(module: Any) -> Iterator[None]:
    """Let TRL's constructor accept an adapter on the LM head while this context is open.

    TRL refuses such an adapter because it reads the head's bare weight. The fused loss applies the adapter too, so the
    refusal is not needed. TRL recognises adapters as instances of PEFT's ``BaseTunerLayer``. The context replaces that
    class by one without instances, in one module of TRL's only.

    Args:
        module: TRL's module that holds the trainer.

    Example::

        with adapter_on_the_head_allowed(trl.trainer.dpo_trainer):
            trainer = DPOTrainer(model, peft_config=LoraConfig(target_modules=["lm_head"]), ...)

    """
    known = getattr(module, "BaseTunerLayer", None)
    if known is None:
        yield
        return
    module.BaseTunerLayer = _NoLayer
    try:
        yield
    finally:
        module.BaseTunerLayer = known


@contextmanager
def told_before_sharding(tell: Callable[[Any], None], module: Any) -> Iterator[None]:
    """Call ``tell(model)`` while this context is open, before TRL's constructor gives a model to FSDP or DeepSpeed.

    Afterwards the weights cannot be looked at: each rank holds a shard of them. TRL's constructor does this to the
    reference, which it may have loaded itself. Under DeepSpeed it does it to the policy too, where it precomputes
    log-probs with it.

    Args:
        tell: it is called with the model.
        module: TRL's module that holds the trainer.

    Example::

        with told_before_sharding(lambda model: fused_lm_head(model).attach(), trl.trainer.dpo_trainer):
            trainer = DPOTrainer(model, ref_model, ...)

    """
    known = {name: getattr(module, name) for name in SHARDING if hasattr(module, name)}

    def telling(prepare: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(prepare)
        def told(model: Any, *args: Any, **kwargs: Any) -> Any:
            tell(model)
            return prepare(model, *args, **kwargs)

        return told

    try:
        for name, prepare in known.items():
            setattr(module, name, telling(prepare))
        yield
    finally:
        for name, prepare in known.items():
            setattr(module, name, prepare)


class _NoLayer:
    """No object is an instance of this class."""
