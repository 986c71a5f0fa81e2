"""Which of TRL's setups the fused loss covers, and what TRL's constructor must do for it."""

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from dpo_kernels.integrations.fused_step import why_no_fused_head, why_not_split
from dpo_kernels.integrations.trl.options import LossOptions, NotFused, loss_options

# The functions by which TRL's constructor gives a model to an engine that may shard it.
SHARDING = ("prepare_deepspeed", "prepare_fsdp")


def why_not_this_setup(trainer: Any) -> str:
    """Say which part of model, data or machine the fused loss does not cover.

    Args:
        trainer: a ``DPOTrainer`` whose constructor has run.

    Returns:
        The reason in words, or an empty string where the fused loss can be used.

    Example:
        >>> from types import SimpleNamespace
        >>> why_not_this_setup(SimpleNamespace(use_liger_kernel=True))
        "use_liger_kernel=True chooses Liger's loss in this version of TRL"

    """
    if getattr(trainer, "use_liger_kernel", False):
        return "use_liger_kernel=True chooses Liger's loss in this version of TRL"
    if why_not_split(trainer.accelerator, ("cp", "sp")):
        return "context and sequence parallelism split the sequences, and TRL's DPOTrainer does not support them"
    return ""


def options_or_reason(trainer: Any) -> tuple[LossOptions | None, str]:
    """Give the options of the fused loss, or say why it cannot be used.

    Args:
        trainer: a ``DPOTrainer`` that is a ``HeadCalls``, and whose models no engine has sharded yet.

    Returns:
        The options and an empty string, or a reason in words.

    Example::

        options, reason = options_or_reason(trainer)

    """
    try:
        options = loss_options(trainer)
    except NotFused as error:
        return None, str(error)
    if reason := why_not_this_setup(trainer):
        return options, reason
    return options, why_no_fused_head(trainer)


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
