"""Which of TRL's setups the fused loss covers, and one check of TRL's that it does not need."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from trl.trainer import dpo_trainer as trl_module


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
def adapter_on_the_head_allowed() -> Iterator[None]:
    """Let TRL's constructor accept an adapter on the LM head while this context is open.

    TRL refuses such an adapter because it reads the head's bare weight. The fused loss applies the adapter too, so the
    refusal is not needed. TRL recognises adapters as instances of PEFT's ``BaseTunerLayer``. The context replaces that
    class by one without instances, in TRL's module only.

    Example::

        with adapter_on_the_head_allowed():
            trainer = DPOTrainer(model, peft_config=LoraConfig(target_modules=["lm_head"]), ...)

    """
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
    """No object is an instance of this class."""
