"""Fused heads that are attached to the models of a trainer before its constructor lets an engine shard them."""

from contextlib import suppress
from typing import Any

from dpo_kernels.integrations.transformers import fused_lm_head


def attached(check_head: bool, *models: Any) -> None:
    """Attach a fused head to each model that can have one. The trainer's fallback says why another cannot.

    Args:
        check_head: as ``check`` of ``fused_lm_head``.
        *models: causal models of transformers, or None.

    Example::

        attached(True, model, ref_model)

    """
    for model in models:
        if model is not None:
            with suppress(TypeError, ValueError):
                fused_lm_head(model, check=check_head).attach()
