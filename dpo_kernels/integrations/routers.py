"""The router loss of a mixture of experts, computed from the outputs of its backbone as its own forward computes it.

Most such models of transformers balance the load of their experts with ``load_balancing_loss_func`` of their own
module. Others (Llama 4, DeepSeek) have router logits and a coefficient in their configuration, but no loss.
"""

import inspect
import math
from typing import Any

from torch import Tensor

FUNCTION = "load_balancing_loss_func"  # the name of the router loss in the modules of transformers
# The names by which models and configurations call the number of experts, and the number of them that a token uses.
EXPERTS = ("num_experts", "num_local_experts", "moe_num_experts", "n_routed_experts")
PER_TOKEN = ("num_experts_per_tok", "moe_top_k")


def why_no_router_loss(model: Any) -> str:
    """Say why a router loss cannot be computed for a causal model.

    Args:
        model: a causal model of transformers, without wrappers.

    Returns:
        The reason in words, or an empty string.

    Example:
        >>> from torch import nn
        >>> why_no_router_loss(nn.Linear(4, 8))
        'Linear computes no router loss'

    """
    name = type(model).__name__
    function = _function(model)
    if function is None:
        return f"{name} computes no router loss"
    if not _has_routers(model):
        return f"{name} puts out no router logits"
    missing = [argument for argument, value in _arguments(function, model, (), None).items() if value is None]
    if missing := [argument for argument in missing if argument != "attention_mask"]:
        return f"{name} and its configuration do not say, by any name known here, the router loss's {missing[0]}"
    return ""


def router_loss(model: Any, outputs: Any, attention_mask: Tensor | None) -> Tensor:
    """Compute the load-balancing loss from a backbone's outputs.

    Args:
        model: a causal model of transformers for which ``why_no_router_loss`` finds no reason.
        outputs: what its backbone returned with ``output_router_logits=True``.
        attention_mask: ``(B, T)``, 0 at padding, or None.

    Returns:
        The loss ``()``, not yet multiplied by its coefficient.

    Raises:
        RuntimeError: there are no router logits among the outputs.

    Example::

        loss = out.loss + 0.001 * router_loss(model, outputs, attention_mask)

    """
    logits = getattr(outputs, "router_logits", None)
    if not logits:
        raise RuntimeError(
            f"the backbone of {type(model).__name__} returned no router logits: set router_aux_loss_coef=0.0 to train "
            "without a router loss"
        )
    function = _function(model)
    loss: Tensor = function(**_arguments(function, model, logits, attention_mask))
    return loss


def _function(model: Any) -> Any:
    """Return the router loss that the model's forward calls, or None."""
    for kind in type(model).__mro__:
        forward = inspect.unwrap(vars(kind).get("forward", lambda: None))
        if FUNCTION in getattr(getattr(forward, "__code__", None), "co_names", ()):
            return forward.__globals__[FUNCTION]
    return None


def _has_routers(model: Any) -> bool:
    """Say whether transformers records router logits of a module of the model; True where this cannot be told."""
    recorders = [
        names["router_logits"]
        for module in model.modules()
        if "router_logits" in (names := getattr(module, "_can_record_outputs", None) or {})
    ]
    if not recorders:
        return not any(getattr(module, "_can_record_outputs", None) for module in model.modules())
    flat = [one for recorder in recorders for one in (recorder if isinstance(recorder, list | tuple) else [recorder])]
    kinds = tuple(getattr(recorder, "target_class", recorder) for recorder in flat)
    return any(isinstance(module, kinds) for module in model.modules())


def _arguments(function: Any, model: Any, logits: Any, attention_mask: Tensor | None) -> dict[str, Any]:
    config = model.config.get_text_config()
    holders = (model, config, getattr(config, "ffn_config", None))

    def first(names: tuple[str, ...]) -> Any:
        return next((v for h in holders for name in names if (v := getattr(h, name, None)) is not None), None)

    experts = first(EXPERTS)
    known = {
        "gate_logits": logits,
        "num_experts": experts,
        # Doge finds an expert by a pair of keys, so that it has as many keys as the root of the number of experts.
        "num_keys": None if experts is None else math.floor(math.sqrt(experts)),
        "top_k": first(PER_TOKEN),
        "attention_mask": attention_mask,
    }
    return {name: known.get(name) for name in inspect.signature(function).parameters}
